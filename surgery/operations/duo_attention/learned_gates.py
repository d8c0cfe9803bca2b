"""gates: DuoAttention's optimisation. Each KV head gets a gate a in [0, 1], and the weights are frozen.

The output of a KV head's group is a * (full attention) + (1 - a) * (sinks + window). The loss is the mean squared
difference between the last hidden states and those of the full model, on the rows where passkeys are repeated, plus
weight * mean |a|. A gate that the answers do not need falls to 0.

Source: Xiao et al. 2024, "DuoAttention", arXiv 2410.10819, and its code (MIT): AdamW without decay, all gates 1 at
first and clamped after each step, linear warm-up and cool-down over a fifth of the steps each, floor 0.1. Differences:

- sinks, window and visibility are those of the saved model;
- both terms of the mix are computed from the same mixed hidden states;
- gates are float32;
- the difference is relative to the size of the hidden states, and the weight is 0.12 of that (theirs is 0.05 of the
  plain square, which left most gates of SmolLM2-135M undecided);
- there are 60 steps at a rate of 0.05 (theirs: 2,000 at 0.02), which take minutes on a CPU for a model of that size.
"""

from __future__ import annotations

from pathlib import Path

import torch

from surgery.calibration.attention_hook import AttentionHook, hook_attention
from surgery.calibration.gradients import with_gradients
from surgery.calibration.head_scores import HeadScores, model_identity
from surgery.data.passkeys import Recall, calibration
from surgery.data.text import BUILTIN
from surgery.errors import SurgeryError
from surgery.machine.progress import begin
from surgery.runtime.surgery_attention import surgery_attention

UNDECIDED = (0.1, 0.9)


def gates(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    samples: int = 8,
    length: int = 768,
    keys: int = 4,
    steps: int = 60,
    rate: float = 0.05,
    weight: float = 0.12,
    seed: int = 0,
    text=BUILTIN,
    state: str | Path | None = None,
    progress=None,
) -> HeadScores:
    """The gates after optimisation.

    Args: as for `far_mass`, and
        keys: passkeys in a sequence.
        steps: steps of the optimiser, each on one sequence, in turn.
        rate, weight: learning rate; weight of the gates' mean in the loss.
        state: a file that is replaced after every step. A run with the same settings resumes from it.

    Raises:
        SurgeryError: the state file is from a run with other settings.
    """
    options = {"samples": samples, "length": length, "keys": keys, "seed": seed}
    sequences, settings = calibration(model, tokenizer, text, sinks=sinks, window=window, **options)
    settings |= {"steps": steps, "rate": rate, "weight": weight}
    mixed = MixedAttention(sinks, window)
    with with_gradients(), hook_attention(model, mixed) as hook:
        mixed.hook = hook
        run = _Run(sum(hook.kv_heads), model.device, rate, settings | {"model": model_identity(hook.anatomy)["hash"]})
        if state is not None and Path(state).is_file():
            run.load(Path(state))
        full_states: dict[int, torch.Tensor] = {}
        begin(progress, "training gates", steps)
        for step in range(len(run.losses), steps):
            index = step % samples
            if index not in full_states:
                mixed.gates = None
                with torch.no_grad():
                    full_states[index] = answer_states(model, sequences[index])
            mixed.gates = run.gates
            distance = relative_distance(answer_states(model, sequences[index]), full_states[index])
            run.step(distance, weight, schedule(step, steps))
            if state is not None:
                run.save(Path(state))
            if progress:
                progress(step + 1, steps, "training gates")
        table = [row.tolist() for row in run.gates.detach().cpu().split(hook.kv_heads)]
    flat = [gate for table_row in table for gate in table_row]
    undecided = sum(UNDECIDED[0] < gate < UNDECIDED[1] for gate in flat) / len(flat)
    return HeadScores("gates", table, settings | {"undecided": round(undecided, 4), "losses": run.losses})


class MixedAttention:
    """An attention function for `hook_attention` that mixes a KV head's full and streaming output by its gate.

    Attributes:
        hook: set inside the context.
        gates: [KV heads of all layers]; None: all heads see all keys.
    """

    def __init__(self, sinks: int, window: int):
        self.sinks, self.window = sinks, window
        self.hook: AttentionHook
        self.gates: torch.Tensor | None = None

    def __call__(self, module, query, key, value, mask, **kwargs):
        layer, counts = module.layer_idx, self.hook.kv_heads
        full, _ = surgery_attention(module, query, key, value, mask, **kwargs)  # [batch, n, heads, head_dim]
        if self.gates is None:
            return full, None
        reach = {"sinks": self.sinks, "window": self.window}
        near = self.hook.streamed(module, query, key, value, mask, **reach, **kwargs)
        own = self.gates.split(counts)[layer].repeat_interleave(query.shape[1] // counts[layer])
        gate = own.clamp(0, 1).to(full)[None, None, :, None]
        return gate * full + (1 - gate) * near, None


def answer_states(model, sequence: Recall) -> torch.Tensor:
    """The last hidden states on the answers' rows: [r, hidden], float32 or wider."""
    hidden = model.base_model(input_ids=sequence.ids[None].to(model.device), use_cache=False).last_hidden_state[0]
    hidden = hidden[sequence.rows.to(hidden.device)]
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def relative_distance(states: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Mean squared difference relative to the mean square of `full`: a weight then means the same in every model."""
    return (states - full).square().mean() / full.square().mean()


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: it rises over the first fifth of the steps, falls over the last, and is >= 0.1."""
    slope = max(1, steps // 5)
    return min(1.0, max((step + 1) / slope, 0.1), max((steps - step) / slope, 0.1))


class _Run:
    """Gates and their optimiser, with the state that is saved between steps."""

    def __init__(self, count: int, device, rate: float, settings: dict):
        self.gates = torch.ones(count, device=device, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.gates], lr=rate, weight_decay=0.0)
        self.rate, self.settings = rate, settings
        self.losses: list[list[float]] = []  # for each step: distance, mean gate

    def step(self, distance: torch.Tensor, weight: float, factor: float) -> None:
        """One step of the optimiser; `factor` multiplies the learning rate."""
        self.losses.append([distance.item(), self.gates.mean().item()])
        loss = distance + weight * self.gates.abs().mean()
        (self.gates.grad,) = torch.autograd.grad(loss, [self.gates])
        self.optimizer.param_groups[0]["lr"] = self.rate * factor
        self.optimizer.step()
        with torch.no_grad():
            self.gates.clamp_(0, 1)

    def save(self, file: Path) -> None:
        """Write the state as JSON, which keeps every bit of a float32."""
        from surgery.io.files import write_json
        from surgery.io.output_folder import machine_errors

        moments = self.optimizer.state[self.gates]
        state = {name: moments[name].tolist() for name in ("exp_avg", "exp_avg_sq")}
        with machine_errors(file):
            write_json(
                file,
                {"settings": self.settings, "gates": self.gates.tolist(), "losses": self.losses, **state},
            )

    def load(self, file: Path) -> None:
        """Restore the state from a file; a file of a run with other settings raises a SurgeryError."""
        from surgery.io.files import read_json

        state = read_json(file)
        if state.get("settings") != self.settings:
            theirs = state.get("settings") or {}
            differ = ", ".join(key for key in self.settings if theirs.get(key) != self.settings[key])
            raise SurgeryError(
                f"the unfinished run has another {differ}",
                where=str(file),
                fix="finish it with its own settings, or remove the file (--overwrite) to start again",
                code="unfinished-run",
            )
        self.losses = state["losses"]
        with torch.no_grad():
            self.gates.copy_(torch.tensor(state["gates"]))
        moments = {name: torch.tensor(state[name], device=self.gates.device) for name in ("exp_avg", "exp_avg_sq")}
        self.optimizer.state[self.gates] = {"step": torch.tensor(float(len(self.losses))), **moments}
