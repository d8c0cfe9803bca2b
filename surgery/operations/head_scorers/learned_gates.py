"""gates: DuoAttention's optimisation. Each KV head gets a gate a in [0, 1], and the weights are frozen.

The output of a KV head's group is a * (full attention) + (1 - a) * (sinks + window). The loss is the mean squared
difference between the last hidden states and those of the full model, on the rows where passkeys are repeated, plus
weight * mean |a|. A gate that the answers do not need falls to 0.

Source: Xiao et al. 2024, "DuoAttention", arXiv 2410.10819, and its code (MIT): AdamW without decay, all gates 1 at
first and clamped after each step, linear warm-up and cool-down over a fifth of the steps each, floor 0.1.

`PRESETS` holds three sets of values for the other settings. `short` takes minutes on a CPU for a model of 135M
parameters. `paper` has the values of the paper, and `released` also follows its code where that differs. In all three
a streaming head sees sinks and window by position, where the released code works in blocks of 128 tokens. Gates are
float32, and a sequence is as long as the model allows at most. No passkey lies in the window of a question.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from surgery.calibration.attention_hook import AttentionHook, hook_attention
from surgery.calibration.gradients import recomputed, with_gradients
from surgery.calibration.head_scores import HeadScores, model_identity
from surgery.calibration.layerwise import decoder_layers
from surgery.data.passkeys import Recall, passkeys
from surgery.data.text import BUILTIN, Text, fitting_length, load_text
from surgery.errors import SurgeryError
from surgery.machine.progress import begin
from surgery.operations.base import Count, Length, Seed, WholeNumber
from surgery.runtime.surgery_attention import surgery_attention

UNDECIDED = (0.1, 0.9)
LONG = 2048  # tokens from which the activations of a layer are computed again in the backward pass

# What each preset says where a setting is None.
PRESETS: dict[str, dict[str, Any]] = {
    "short": {
        "samples": 8,
        "length": 768,
        "keys": 4,
        "words": 8,
        "alphabet": "text",
        "steps": 60,
        "rate": 0.05,
        "weight": 0.12,
        "distance": "relative",
        "rows": "answers",
        "full": "mixed",
        "train_sinks": None,
        "train_window": None,
    },
    "paper": {
        "samples": 2000,
        "length": [round(1000 + 31_000 * index / 49) for index in range(50)],
        "keys": 10,
        "words": 32,
        "alphabet": "nato",
        "steps": 2000,
        "rate": 0.02,
        "weight": 0.05,
        "distance": "square",
        "rows": "answers",
        "full": "mixed",
        "train_sinks": 128,
        "train_window": 256,
    },
}
PRESETS["released"] = PRESETS["paper"] | {"rows": "questions", "full": "base"}
ADDED = ("preset", "words", "alphabet", "distance", "rows", "full", "train_sinks", "train_window")


def gates(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    preset: Literal["short", "paper", "released"] = "short",
    samples: Count | None = None,
    length: Length | Annotated[list[Length], Field(min_length=1)] | None = None,
    keys: Count | None = None,
    words: Count | None = None,
    alphabet: Literal["text", "nato"] | None = None,
    steps: Count | None = None,
    rate: Annotated[float, Field(gt=0, le=1)] | None = None,
    weight: Annotated[float, Field(ge=0)] | None = None,
    distance: Literal["relative", "square"] | None = None,
    rows: Literal["answers", "questions"] | None = None,
    full: Literal["mixed", "base"] | None = None,
    train_sinks: WholeNumber | None = None,
    train_window: Count | None = None,
    seed: Seed = 0,
    text=BUILTIN,
    state: str | Path | None = None,
    progress=None,
) -> HeadScores:
    """The gates after optimisation.

    Args: as for `far_mass`, and
        preset: where a setting is None, its value is that of this preset (see `PRESETS`).
        samples: number of sequences.
        length: tokens in a sequence; a list: the sequences have these lengths, in a random order.
        keys, words, alphabet: passkeys in a sequence, words in a passkey, and what they are (see `passkeys`).
        steps: steps of the optimiser, each on one sequence, in turn.
        rate, weight: learning rate; weight of the gates' mean in the loss.
        distance: "square": the mean squared difference of the last hidden states. "relative": the same relative to
            their mean square, so that a weight means the same in every model.
        rows: "answers": the rows that predict the passkeys. "questions": the tokens of questions and passkeys.
        full: "mixed": the full output in the mix is computed from the mixed hidden states, as in the saved model.
            "base": it is that of the base, without a gradient.
        train_sinks, train_window: of a streaming head while the gates are trained; None: `sinks` and `window`.
        state: a file that is replaced after every step. A run with the same settings resumes from it.

    Raises:
        SurgeryError: the state file is from a run with other settings.
    """
    given = {"samples": samples, "length": length, "keys": keys, "words": words, "alphabet": alphabet, "steps": steps}
    given |= {"rate": rate, "weight": weight, "distance": distance, "rows": rows, "full": full}
    given |= {"train_sinks": train_sinks, "train_window": train_window}
    chosen = {"preset": preset} | PRESETS[preset] | {name: each for name, each in given.items() if each is not None}
    reach = {"sinks": sinks, "window": window, "seed": seed}
    return _scores(model, tokenizer, load_text(text, part="calibration"), reach | chosen, state, progress)


def _scores(model, tokenizer, text: Text, settings: dict, state: str | Path | None, progress) -> HeadScores:
    """Train gates with these settings of `gates`, all of them given."""
    reach = {
        name: settings[name] if settings[f"train_{name}"] is None else settings[f"train_{name}"]
        for name in ("sinks", "window")
    }
    sequences = _Sequences(model, tokenizer, text, reach, settings)
    settings = {"text": text.title, "sha256": text.sha256[:12]} | settings | {"length": sequences.recorded_length}
    mixed = MixedAttention(**reach, from_base=settings["full"] == "base")
    with with_gradients(), hook_attention(model, mixed) as mixed.hook:
        counts, identity = mixed.hook.kv_heads, {"model": model_identity(mixed.hook.anatomy)["hash"]}
        run = _Run(sum(counts), model.device, settings["rate"], settings | identity)
        if state is not None and Path(state).is_file():
            run.load(Path(state))
        _train(model, mixed, sequences, run, None if state is None else Path(state), progress)
        table = [row.tolist() for row in run.gates.detach().cpu().split(counts)]
    flat = [gate for table_row in table for gate in table_row]
    undecided = sum(UNDECIDED[0] < gate < UNDECIDED[1] for gate in flat) / len(flat)
    return HeadScores("gates", table, settings | {"undecided": round(undecided, 4), "losses": run.losses})


def _train(model, mixed: MixedAttention, sequences: _Sequences, run: _Run, state: Path | None, progress) -> None:
    """The steps that are left of a run; `state` is the file that is replaced after each."""
    steps, samples, rows = (run.settings[name] for name in ("steps", "samples", "rows"))
    measure = relative_distance if run.settings["distance"] == "relative" else mean_square
    long = decoder_layers(model, mixed.hook.anatomy) if sequences.longest > LONG else []
    full_states: dict[int, torch.Tensor] = {}
    begin(progress, "training gates", steps)
    for step in range(len(run.losses), steps):
        index = step % samples
        sequence = sequences[index]
        if index not in full_states or mixed.from_base:
            mixed.gates = None
            with torch.no_grad():
                full = answer_states(model, sequence, rows)
            full_states = {**full_states, index: full} if samples < steps else {index: full}  # some are read once
        mixed.gates = run.gates
        with recomputed(long):
            distance = measure(answer_states(model, sequence, rows), full_states[index])
            run.step(distance, run.settings["weight"], schedule(step, steps))
        if state is not None:
            run.save(state)
        if progress:
            progress(step + 1, steps, "training gates")


class _Sequences:
    """The sequences of a run by their index. Those of one length are made together, when one of them is needed."""

    def __init__(self, model, tokenizer, text: Text, reach: dict, settings: dict):
        asked = settings["length"] if isinstance(settings["length"], list) else [settings["length"]]
        lengths = [fitting_length(model.config, length) for length in asked]
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(settings["seed"])).tolist()
        self.lengths = [lengths[order[index % len(order)]] for index in range(settings["samples"])]
        self.recorded_length = lengths if isinstance(settings["length"], list) else lengths[0]
        self._make = {"text": text, "tokenizer": tokenizer, **reach}
        self._make |= {name: settings[name] for name in ("keys", "words", "alphabet")}
        self._seed, self._several = settings["seed"], len(lengths) > 1
        self._made: dict[int, list[Recall]] = {}

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def __getitem__(self, index: int) -> Recall:
        length = self.lengths[index]
        if length not in self._made:
            # With one seed, lengths of which the text has equally many windows would get the same passkeys.
            seed = random.Random(f"{self._seed} {length}").getrandbits(32) if self._several else self._seed
            self._made[length] = passkeys(**self._make, length=length, samples=self.lengths.count(length), seed=seed)
        return self._made[length][self.lengths[:index].count(length)]


class MixedAttention:
    """An attention function for `hook_attention` that mixes a KV head's full and streaming output by its gate.

    Attributes:
        hook: set inside the context.
        gates: [KV heads of all layers]; None: all heads see all keys.
        from_base: the full output in the mix is that of the last call in which `gates` was None.
    """

    def __init__(self, sinks: int, window: int, from_base: bool = False):
        self.sinks, self.window, self.from_base = sinks, window, from_base
        self.hook: AttentionHook
        self.gates: torch.Tensor | None = None
        self._full: dict[int, torch.Tensor] = {}

    def __call__(self, module, query, key, value, mask, **kwargs):
        layer, counts = module.layer_idx, self.hook.kv_heads
        if self.gates is None or not self.from_base:
            full, _ = surgery_attention(module, query, key, value, mask, **kwargs)  # [batch, n, heads, head_dim]
        else:
            full = self._full[layer]
        if self.gates is None:
            if self.from_base:
                self._full[layer] = full.detach()
            return full, None
        reach = {"sinks": self.sinks, "window": self.window}
        near = self.hook.streamed(module, query, key, value, mask, **reach, **kwargs)
        own = self.gates.split(counts)[layer].repeat_interleave(query.shape[1] // counts[layer])
        gate = own.clamp(0, 1).to(full)[None, None, :, None]
        return gate * full + (1 - gate) * near, None


def answer_states(model, sequence: Recall, rows: str = "answers") -> torch.Tensor:
    """The last hidden states on the rows of the loss: [r, hidden], float32 or wider.

    Args:
        rows: "answers": the rows that predict the passkeys. "questions": the tokens of questions and passkeys.
    """
    hidden = model.base_model(input_ids=sequence.ids[None].to(model.device), use_cache=False).last_hidden_state[0]
    chosen = sequence.rows
    if rows == "questions":
        pairs = zip(sequence.questions, sequence.answers, strict=True)
        chosen = torch.cat([torch.arange(first, end) for (first, _), (_, end) in pairs])
    hidden = hidden[chosen.to(hidden.device)]
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def mean_square(states: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over rows and features (the paper's equation 2, as a mean)."""
    return (states - full).square().mean()


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
        earlier = {"preset": "short"} | PRESETS["short"]  # of a run that did not record these yet
        theirs = {name: earlier[name] for name in ADDED} | (state.get("settings") or {})
        if theirs != self.settings:
            keys = dict.fromkeys((*self.settings, *theirs))
            differ = ", ".join(key for key in keys if theirs.get(key) != self.settings.get(key))
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
