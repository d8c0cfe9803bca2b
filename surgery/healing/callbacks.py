"""What is seen of a training while it runs: metrics.jsonl, progress, held-out scores, and when it ends early."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from surgery.healing.schedule import rate_at
from surgery.io.files import write_text

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.healing.held_out import HeldOut
    from surgery.healing.trainer import HealTrainer

METRICS = "metrics.jsonl"


class Follow(TrainerCallback):
    """Writes a line of metrics a step, reports progress, and stops at the clock or the gate.

    Args:
        folder: where metrics.jsonl is.
        steps: planned; None where the clock ends the training.
        watch: held-out text, or None.
        earlier: seconds of training before a resume.
        progress: called with done, total and a label.
    """

    def __init__(
        self,
        heal: Heal,
        folder: Path,
        steps: int | None,
        watch: HeldOut | None,
        earlier: float,
        progress: Callable[[int, int, str], None] | None,
    ):
        self.heal, self.file, self.steps = heal, folder / METRICS, steps
        self.watch, self.earlier, self.progress = watch, earlier, progress
        self.trainer: HealTrainer | None = None  # given when it is there
        self.rate, self.before, self.begun = 0.0, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_text(self.file, "".join(json.dumps(line) + "\n" for line in read(self.file, state.global_step)))
        self.trainer.clock.start(self.earlier)
        self.before = time.monotonic()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.trainer.clock.limit:  # the rate is that of the middle of the step, which nobody knew when it began
            middle = self._of_all((self.begun + self.trainer.clock.fraction) / 2, "mean")
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_at(middle, self.heal.warmup)
        self.rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        means = self.trainer.step_means()
        tokens, now = self.heal.rows * self.heal.length, time.monotonic()
        line = {"step": state.global_step, "tokens": state.global_step * tokens, "seconds": self.trainer.clock.seconds}
        line |= means | {"learning_rate": self.rate, "gradient_norm": self.trainer.norm}
        line["tokens_per_second"] = tokens / (now - self.before)
        if self.watch and self._due(state.global_step):
            scores = self.watch.measure(model)
            line |= scores.figures
            if self.heal.stop_at_gate and self._of_all(float(scores.passed), "sum"):
                self.trainer.ended = "gate"
        if self._time_is_over():
            self.trainer.ended = "minutes"
        if self.trainer.ended:  # nothing is lost of what comes after it: the result is made from this checkpoint
            control.should_training_stop, control.should_save = True, bool(self.heal.checkpoint_every)
        if state.is_world_process_zero:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._show(line)
        self.before = time.monotonic()  # a score and a checkpoint are no part of a step's time
        return control

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = time.monotonic()
        self.begun = self.trainer.clock.fraction if self.trainer.clock.limit else 0.0

    def _due(self, step: int) -> bool:
        return bool(self.heal.eval_every) and step % self.heal.eval_every == 0

    def _time_is_over(self) -> bool:
        """Whether the clock says so in any process: all stop after the same step."""
        clock = self.trainer.clock
        return bool(clock.limit) and self._of_all(float(clock.fraction >= 1), "sum") > 0

    def _of_all(self, value: float, how: str) -> float:
        """The sum or mean over all processes, which must do the same."""
        value = torch.tensor(value, device=self.trainer.args.device)
        return self.trainer.accelerator.reduce(value, how).item()

    def _show(self, line: dict) -> None:
        if not self.progress:
            return
        kl = f", KL {line['kl']:.3f}" if line.get("kl", line["loss"]) != line["loss"] else ""
        label = f"healing: loss {line['loss']:.3f}{kl}, {line['tokens_per_second']:,.0f} tokens/s"
        if self.steps is not None:
            self.progress(line["step"], self.steps, label)
        else:
            limit = self.trainer.clock.limit
            self.progress(min(int(line["seconds"]), int(limit)), int(limit), label)


def read(file: Path, last: int | None = None) -> list[dict]:
    """The lines of a metrics file, up to a step; what a kill cut off is left out."""
    lines = []
    if file.is_file():
        for text in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if last is None or line["step"] <= last:
                    lines.append(line)
    return lines
