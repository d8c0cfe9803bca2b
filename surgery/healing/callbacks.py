"""Callbacks of a training: metrics.jsonl, progress, scores on held-out text, and an early end.

`HeldOutEvaluator` scores a small held-out text while the model trains.

`SurgeryCallback` is for a user's own Trainer. It adds the record of the surgery to the Trainer's checkpoints, which
`check` and `push` need.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from surgery.calibration.scoring import score_model
from surgery.data.text import load_text, windows
from surgery.errors import SurgeryError
from surgery.healing.sparse_attention import switch_step
from surgery.healing.trainer import rate_at
from surgery.healing.validate import watched_limits
from surgery.io.files import write_text
from surgery.io.loading import read_config
from surgery.io.output_folder import weight_files
from surgery.machine.progress import PERCENT, begin
from surgery.report.gate import gate
from surgery.report.report import Report

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from surgery.config.heal import Heal
    from surgery.config.recipe import Evaluate
    from surgery.healing.trainer import HealTrainer


METRICS = "metrics.jsonl"


class HealCallback(TrainerCallback):
    """Writes a line of metrics for each step, reports progress, and stops the training by the clock or the gate.

    Args:
        folder: the folder of metrics.jsonl.
        steps: the planned number of steps; None where the clock ends the training.
        held_out: scores held-out text, or None.
        earlier: seconds of training before a resume.
        progress: called with done, total and a label.
    """

    def __init__(
        self,
        heal: Heal,
        folder: Path,
        steps: int | None,
        held_out: HeldOutEvaluator | None,
        earlier: float,
        progress: Callable[[int, int, str], None] | None,
    ):
        self.heal, self.file, self.steps = heal, folder / METRICS, steps
        self.held_out, self.earlier, self.progress = held_out, earlier, progress
        self.trainer: HealTrainer | None = None  # set when the Trainer exists
        self.rate, self.step_started, self.fraction_at_start = 0.0, 0.0, 0.0
        self.figures_before: dict[str, float] = {}  # held-out figures of the untrained model

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Remove lines of metrics after the resumed step, score the untrained model, and start the clock."""
        if state.is_world_process_zero:
            write_text(self.file, "".join(json.dumps(line) + "\n" for line in read(self.file, state.global_step)))
        if self.held_out and not state.global_step:
            self.figures_before = self.held_out.measure(model).figures
        self.trainer.clock.start(self.earlier)
        begin(self.progress, "training", self.steps or PERCENT)
        self.step_started = time.monotonic()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Set the learning rate by the clock, where `heal.minutes` ends the training."""
        if self.trainer.clock.limit:  # the rate is that of the step's middle, which is known only when the step ends
            middle = self._of_all((self.fraction_at_start + self.trainer.clock.fraction) / 2, "mean")
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_at(middle, self.heal.warmup)
        self.rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Write the step's metrics, score held-out text when it is due, and end the training at a limit."""
        means = self.trainer.step_means()
        tokens, now = self.heal.rows * self.heal.length, time.monotonic()
        line = {"step": state.global_step, "tokens": state.global_step * tokens, "seconds": self.trainer.clock.seconds}
        line |= means | {"learning_rate": self.rate, "gradient_norm": self.trainer.norm}
        line["tokens_per_second"] = tokens / (now - self.step_started)
        if self.figures_before:
            line["held_out_before"], self.figures_before = self.figures_before, {}
        if self.held_out and self._due(state.global_step):
            scores = self.held_out.measure(model)
            line |= scores.figures
            if self.heal.stop_at_gate and self._of_all(float(scores.passed), "sum"):
                self.trainer.ended = "gate"
        if self._time_is_over():
            self.trainer.ended = "minutes"
        if self.heal.full_from is not None:
            line["full_attention"] = self.trainer.attends_full
        if self.heal.alternate:
            line["trains"] = "gates" if self.trainer.trains_gates(state.global_step - 1) else "experts"
        if self.trainer.sparse and (self.trainer.ended or state.global_step == self.steps):
            line |= self.trainer.text_losses(model)
        if self.trainer.ended:  # nothing is lost: the result is made from this checkpoint
            control.should_training_stop, control.should_save = True, bool(self.heal.checkpoint_every)
        if state.is_world_process_zero:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._show(line)
        self.step_started = time.monotonic()  # scores and checkpoints do not count as a step's time
        return control

    def on_step_begin(self, args, state, control, **kwargs):
        """Note when the step starts, and decide whether its attention is full."""
        self.step_started = time.monotonic()
        self.fraction_at_start = self.trainer.clock.fraction if self.trainer.clock.limit else 0.0
        if self.heal.full_from is not None:
            self.trainer.attends_full = self._full(state.global_step)

    def _full(self, done: int) -> bool:
        """Whether the step after `done` steps has full attention. All processes decide the same."""
        switch = switch_step(self.heal)
        if switch is not None:
            return done >= switch
        return self._of_all(self.fraction_at_start, "mean") >= self.heal.full_from

    def _due(self, step: int) -> bool:
        return bool(self.heal.eval_every) and step % self.heal.eval_every == 0

    def _time_is_over(self) -> bool:
        """Whether the time is over in any process. All processes then stop after the same step."""
        clock = self.trainer.clock
        return bool(clock.limit) and self._of_all(float(clock.fraction >= 1), "sum") > 0

    def _of_all(self, value: float, how: str) -> float:
        """The sum or mean over all processes; every process must call this."""
        value = torch.tensor(value, device=self.trainer.args.device)
        return self.trainer.accelerator.reduce(value, how).item()

    def _show(self, line: dict) -> None:
        if not self.progress:
            return
        kl = f", KL {line['kl']:.3f}" if line.get("kl", line["loss"]) != line["loss"] else ""
        label = f"training: loss {line['loss']:.3f}{kl}, {line['tokens_per_second']:,.0f} tokens/s"
        if self.steps is not None:
            self.progress(line["step"], self.steps, label)
        else:
            self.progress(int(PERCENT * min(1.0, line["seconds"] / self.trainer.clock.limit)), PERCENT, label)


def read(file: Path, last: int | None = None) -> list[dict]:
    """The lines of a metrics file up to the step `last`, without a line that is incomplete after a kill."""
    lines = []
    if file.is_file():
        for text in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if last is None or line["step"] <= last:
                    lines.append(line)
    return lines


WINDOWS, TOP_K = 2, 256


@dataclass(frozen=True)
class HeldOutScores:
    """The figures for a line of metrics, and whether they pass the gate."""

    figures: dict[str, float]
    passed: bool


class HeldOutEvaluator:
    """Scores a model on the first windows of the recipe's evaluation text, compared with the base's probabilities.

    Args:
        base: folder of the base, or the loaded model.
        tokenizer: the model's tokenizer.
        settings: the recipe's evaluation settings: text, length, limits.
    """

    def __init__(self, base, tokenizer, settings: Evaluate):
        self.limits = watched_limits(settings)
        probe = settings.main
        text = load_text(probe.text, part="held-out")
        self.samples = windows(text, tokenizer, probe.length, min(WINDOWS, probe.windows))
        self.top_k = min(TOP_K, read_config(base).get_text_config().vocab_size)
        self.folder = tempfile.TemporaryDirectory(prefix="surgery-")
        self.base_loss = self._score(base)["loss"].mean().item()

    def measure(self, model) -> HeldOutScores:
        """The model's scores on the held-out text: loss and KL to the base in nats a token, top-1 agreement."""
        scores = self._score(model)
        loss, kl, top1 = (scores[name].double().mean().item() for name in ("loss", "kl", "same"))
        figures = {"held_out_loss": loss, "held_out_kl": kl, "held_out_top1": top1}
        evaluation = {
            "status": "done",
            "base": {"perplexity": math.exp(self.base_loss)},
            "out": {"perplexity": math.exp(loss) if loss < 700 else math.inf},
            "kl": {"mean": kl},
            "top1_agreement": top1,
        }
        return HeldOutScores(figures, bool(self.limits) and gate(evaluation, self.limits)[0] == "passed")

    def _score(self, source) -> dict:
        return score_model(source, self.samples, Path(self.folder.name), self.top_k, lambda done: None)


class SurgeryCallback(TrainerCallback):
    """Writes surgery.json and the card into every checkpoint of a whole model that a Trainer saves.

    A Trainer saves only the model. Without this callback the checkpoint would lack its base, its changes and the
    hashes of its files. The record has no scores, since the training has changed the model: `surgery eval` measures
    them.

        trainer = Trainer(model, ..., callbacks=[surgery.SurgeryCallback(report)])

    Args:
        report: the report that `surgery.apply` returned for this model.
    """

    def __init__(self, report: Report):
        if not isinstance(report, Report):
            fix = "give the report that surgery.apply returned for this model"
            raise SurgeryError(f"report is {type(report).__name__}, not a surgery.Report", fix=fix)
        self.report = report

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write surgery.json and the card into the checkpoint that the Trainer has just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and (files := weight_files(folder)) and (folder / "config.json").is_file():
            data = self.report.data
            gate_record = {"status": "not run", "limits": data["gate"]["limits"]}
            changes = {"files": files, "check": None, "evaluation": None, "gate": gate_record, "code": None}
            in_memory = {"class": (data.get("in_memory") or {}).get("class"), "steps": state.global_step}
            Report(data | changes | {"in_memory": in_memory}, folder).save(list_files=True)
