"""Massive activations: where they are, and what the model loses without them.

Source: Sun et al. 2024, arXiv 2402.17762 (`surgery.calibration.massive` has the definition), and the experiment of its
section on interventions: massive activations are set to zero, or to their mean over texts, after the layer where they
first appear. Set to zero they ruin the model, set to their mean they change nothing: they are constants, which work as
biases. The perplexity is that of the model unchanged, with zeros and with the means.

They are found, and their means are taken, on other windows than those that are scored: of the built-in text on its
calibration part, of a file on its own windows. The paper sets one or two channels of one layer, at the first token and
at the largest later one; here all kinds that are found are set, each where it first appears in its text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from surgery.architecture.anatomy import positions_of
from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long, score_window
from surgery.data.text import BUILTIN, load_text
from surgery.data.text import windows as text_windows
from surgery.evaluation.paired import NAMES, CaseResult, kept_words
from surgery.evaluation.probes.base import CaseProbe, Effort, Row, Table
from surgery.evaluation.probes.fields import TextSource
from surgery.io.loading import loaded, read_config, read_tokenizer
from surgery.io.printing import count

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from surgery.architecture.anatomy import Anatomy
    from surgery.calibration.massive import Massive
    from surgery.io.loading import ModelSource

ZERO, MEAN = "at zero", "at their mean"  # names of the two changes
KEYS = {ZERO: "zero", MEAN: "mean"}  # the same in JSON


@dataclass(frozen=True, eq=False)
class Window:
    """A window that is scored: its tokens, long [n], and the number of tokens that the model knows."""

    ids: torch.Tensor
    vocabulary: int


@dataclass(frozen=True)
class WindowLoss:
    """The loss of one model on one window: mean nats per token, and the number of tokens that are scored."""

    nll: float
    tokens: int


@dataclass(frozen=True)
class Found:
    """What was found in one model.

    Attributes:
        massive: the kinds of massive activations.
        largest: the largest activation of all (see `find_massive`).
        set: for each change, how many activations were set in the scored windows.
    """

    massive: list[Massive]
    largest: dict[str, Any]
    set: dict[str, int] = field(default_factory=dict)


@dataclass(repr=False)
class MassiveResult(CaseResult):
    """The result of the probe. `cases` are the windows that are scored; an outcome is a `WindowLoss`.

    Attributes:
        tokenizer: gives the text of tokens.
        samples: windows in which massive activations are found, long [samples, n].
        found: "base" (if one was given) and "out" -> what was found.
    """

    tokenizer: Any = None
    samples: torch.Tensor | None = None
    found: dict[str, Found] = field(default_factory=dict)

    PROBE: ClassVar[str] = "massive"
    COUNT: ClassVar[str] = "windows"
    COMPARISON: ClassVar[str] = "kept"

    def perplexities(self, label: str) -> dict[str, float]:
        """Perplexity of one model: intact, and "zero" and "mean" if it has massive activations."""
        changed = self.changed.get(label, {}).items()
        return {"intact": _perplexity(self.outcomes[label])} | {KEYS[name]: _perplexity(run) for name, run in changed}

    def side(self, label: str) -> dict:
        """One model's perplexities and massive activations, how many were set, and the largest activation."""
        found = self.found[label]
        data: dict[str, Any] = {"perplexity": self.perplexities(label), "massive": [asdict(m) for m in found.massive]}
        return data | {"set": {KEYS[name]: count for name, count in found.set.items()}, "largest": found.largest}

    def compare(self) -> dict | None:
        """Of the base's kinds of massive activations (channel, and first token or later): how many `out` has too."""
        if "base" not in self.outcomes:
            return None
        base, out = ({each.kind for each in self.found[label].massive} for label in ("base", "out"))
        return {"of": len(base), "kept": len(base & out), "new": len(out - base)}

    def case(self, index: int) -> dict:
        """The losses of one window."""
        losses: dict[str, Any] = {}
        for label, outcomes in self.outcomes.items():
            changed = {KEYS[name]: run[index].nll for name, run in self.changed.get(label, {}).items()}
            losses[label] = {"intact": outcomes[index].nll} | changed
        return losses

    def alone(self) -> str:
        return f"{len(self.found['out'].massive)} massive activations"


class MassiveActivations(CaseProbe):
    """Massive activations of the residual stream: where they are, and the perplexity without them."""

    name: ClassVar[str] = "massive"
    summary: ClassVar[str] = "massive activations: where they are; perplexity with them at zero and at their mean"
    cases_are: ClassVar[str] = "windows"
    stage: ClassVar[str] = "massive activations"

    text: TextSource = Field(BUILTIN, description="'builtin' or a text file.")
    samples: int = Field(8, ge=1, description="Windows in which massive activations are found; others are scored.")
    windows: int = Field(8, ge=1, description="Windows that are scored.")
    length: int = Field(512, ge=2, description="Tokens in a window.")
    magnitude: float = Field(100.0, ge=0, description="A massive activation has a larger magnitude than this.")
    ratio: float = Field(1000.0, ge=0, description="And at least this times the median magnitude of its layer.")
    most: int = Field(16, ge=1, description="Kinds that are listed and set, at most; the largest first.")

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        longest = positions_of(config)
        return {"length": longest} if longest and 2 <= longest < self.length else {}

    @property
    def effort(self) -> Effort:
        return Effort((self.samples + 3 * self.windows) * self.length, self.length)

    def refuse(self, base: ModelSource, out: Anatomy) -> None:
        """Raise the errors that `make_cases` raises for the base alone."""
        self.make_cases(read_tokenizer(base), {"out": read_config(base)})

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> MassiveResult:
        """The windows.

        Raises:
            SurgeryError: the text is too short; windows are longer than a model's positions; the tokenizer belongs to
                another model.
        """
        refuse_too_long(configs, self.length, "a window", "a shorter length")
        text = load_text(self.text, part="held-out")
        if self.text == BUILTIN:
            samples = text_windows(load_text(BUILTIN, part="calibration"), tokenizer, self.length, self.samples)
            scored = text_windows(text, tokenizer, self.length, self.windows)
        else:
            both = text_windows(text, tokenizer, self.length, self.samples + self.windows)
            samples, scored = both[: self.samples], both[self.samples :]
        refuse_other_tokenizer(configs, int(max(samples.max(), scored.max())))
        settings = {"text": {"title": text.title, "sha256": text.sha256[:12]}}
        settings |= {key: getattr(self, key) for key in ("samples", "windows", "length", "magnitude", "ratio", "most")}
        vocabulary = max(config.get_text_config().vocab_size for config in configs.values())
        cases = [Window(ids, vocabulary) for ids in scored]
        return MassiveResult("done", settings, cases, tokenizer=tokenizer, samples=samples)

    def run(self, model: Any, result: CaseResult, progress: Callable[[int], None]) -> list[WindowLoss]:
        losses = []
        with loaded(model):
            for window in result.cases:
                loss = score_window(model, window.ids, None, 0)["loss"]
                losses.append(WindowLoss(loss.mean().item(), len(loss)))
                progress(len(losses))
        return losses

    def count_changes(self, label: str) -> int:
        return len(KEYS)

    def changes(self, label: str, model: Any, result: MassiveResult) -> dict[str, AbstractContextManager]:
        """Find the massive activations, and give the two changes; {} if there are none."""
        from surgery.calibration.massive import find_massive

        samples = cast("torch.Tensor", result.samples)
        rule = {"magnitude": self.magnitude, "ratio": self.ratio}

        def name(token: int) -> str:
            return result.tokenizer.decode([token])

        massive, largest = find_massive(model, samples, most=self.most, name=name, **rule)
        found = result.found[label] = Found(massive, largest)
        values = {ZERO: {each.kind: 0.0 for each in massive}, MEAN: {each.kind: each.value for each in massive}}
        return {name: _set(model, found, name, values[name], rule) for name in values if massive}

    def extra_bytes(self, cases: list, kv_bytes: int) -> int:
        return 8 * len(cases[0].ids) * cases[0].vocabulary  # the logits, in at most float32, and a copy

    def is_broken(self, outcome: WindowLoss) -> bool:
        return not math.isfinite(outcome.nll)

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        base, out = (record.get(label) or {} for label in ("base", "out"))
        counts = [None if not side else float(len(side["massive"])) for side in (base, out)]
        rows = [Row("massive activations", *counts, "{:.0f}", ratio=False)]
        for key, words in (("zero", "at zero"), ("mean", "at their mean")):
            figures = [(side.get("perplexity") or {}).get(key) for side in (base, out)]
            if any(figure is not None for figure in figures):
                rows.append(Row(f"perplexity with massive activations {words}", *figures))
        return rows

    @classmethod
    def sentence(cls, record: dict) -> str:
        return kept_words("massive activations", record)

    @classmethod
    def paragraph(cls, record: dict) -> str:
        """Where the massive activations are, and what the model loses without them."""
        if record.get("status") != "done":
            reason = record.get("reason") or "no reason was recorded"
            return f"Massive activations were **not searched**: {reason}."
        out, settings = record.get("out") or {}, record["settings"]
        rule = f"magnitude above {settings['magnitude']:g} and at least {settings['ratio']:,g} times the median"
        if not out.get("massive"):
            return f"The model has no massive activations ({rule})."
        places = ", ".join(_place(each) for each in out["massive"])
        return f"Massive activations ({rule}): {places}. {_effect(out)}"

    @classmethod
    def lines(cls, result: MassiveResult) -> list[Table | str]:
        """The massive activations of each model, and its perplexities."""
        lines: list[Table | str] = []
        both, record = len(result.outcomes) > 1, result.to_dict()
        settings = record["settings"]
        for label in result.outcomes:
            side = record[label]
            if both:
                lines.append(f"{NAMES[label]}:")
            if not side["massive"]:
                lines += [_none(side["largest"]), ""]
                continue
            headers = ("channel", "layers", "mean value", "largest", "× median", "texts", "token (position)")
            lines += [Table(headers, [_cells(each, settings["samples"]) for each in side["massive"]]), ""]
            effect = [["intact", _shown(side["perplexity"]["intact"]), ""]]
            for key, words in (("zero", "set to zero"), ("mean", "set to their mean")):
                effect.append([words, _shown(side["perplexity"].get(key)), f"{side['set'].get(key, 0):,}"])
            lines += [Table(("massive activations", "perplexity", "values set"), effect), ""]
        if kept := result.compare():
            new = f", and has {count(kept['new'], 'other')}" if kept["new"] else ""
            lines.append(f"The converted model keeps {kept['kept']} of {kept['of']} massive activations{new}.")
        rule = f"a magnitude above {settings['magnitude']:g}, and at least {settings['ratio']:,g} times the median"
        lines.append(f"Massive: {rule} after the layer. They are set after the layer where they first appear.")
        scored = count(settings["windows"], "other")
        size = f"{settings['samples']} windows of {settings['length']:,} tokens, scored on {scored}"
        return [*lines, f"Found in {size}: {settings['text']['title']} (sha256 {settings['text']['sha256']})."]


@contextmanager
def _set(model: Any, found: Found, name: str, values: dict, rule: dict):
    """The context in which massive activations have these values; afterwards `found` has their number."""
    from surgery.calibration.massive import massive_set

    with massive_set(model, values, **rule) as counts:
        yield
    found.set[name] = sum(counts.values())


def _perplexity(losses: list[WindowLoss]) -> float:
    mean = math.fsum(loss.nll * loss.tokens for loss in losses) / sum(loss.tokens for loss in losses)
    return math.exp(mean) if mean < 700 else math.inf


def _shown(perplexity: float | None) -> str:
    if perplexity is None:
        return "not finite"
    return f"{perplexity:,.3f}" if perplexity < 10_000 else f"{perplexity:.3g}"


def _place(massive: dict) -> str:
    """A massive activation in a few words."""
    where = "the first token" if massive["first"] else "later tokens"
    return f"channel {massive['channel']} at {where} from layer {massive['layer']} on ({massive['value']:,.0f})"


def _cells(massive: dict, samples: int) -> list[str]:
    places = [f"{place['token']!r} ({place['position']})" for place in massive["places"]]
    more = ", ..." if massive["count"] > sum(place["count"] for place in massive["places"]) else ""
    return [
        str(massive["channel"]),
        f"{massive['layer']} to {massive['last']}",
        f"{massive['value']:,.1f}",
        f"{massive['magnitude']:,.1f}",
        f"{massive['ratio']:,.0f}",
        f"{massive['texts']} of {samples}",
        ", ".join(places) + more,
    ]


def _none(largest: dict) -> str:
    """That there are no massive activations, with the largest activation."""
    if not largest:
        return "No massive activations."
    where = f"layer {largest['layer']}, channel {largest['channel']}, position {largest['position']}"
    return (
        f"No massive activations. The largest activation is {largest['magnitude']:,.1f} ({where}), "
        f"{largest['ratio']:,.0f} times the median."
    )


def _effect(side: dict) -> str:
    intact, zero, mean = (side["perplexity"].get(key) for key in ("intact", "zero", "mean"))
    figures = [_shown(figure) for figure in (intact, zero, mean)]
    return f"Perplexity {figures[0]}; with them set to zero {figures[1]}, set to their mean {figures[2]}."
