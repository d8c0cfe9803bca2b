"""Which needles a model finds, alone or beside its base: exact match by decoding with the model's own cache, and the
answer's NLL, over a grid of lengths and depths.

Base and patched model run one after the other, never both in memory. Of the needles that the base answers, the share
that the patched model answers too ("kept") is what the surgery is judged by; needles that a head split's streaming
heads see anyway, through sinks or window, prove nothing and are left out of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibration.scoring import last_logits, refuse_other_tokenizer, refuse_too_long
from surgery.data.haystack import Needle, chance, form_for, make_needles
from surgery.data.text import BUILTIN, Text, load_text
from surgery.evaluation.paired import run_base_then_model, wilson
from surgery.evaluation.perplexity import LABELS, finite
from surgery.io.loading import loaded, read_config, read_tokenizer

if TYPE_CHECKING:
    from surgery.io.loading import Source


@dataclass(frozen=True)
class Outcome:
    """How one model did on one needle.

    Attributes:
        hit: greedy decoding gives exactly the answer's tokens.
        nll: nats per token of the answer, mean, each token given the true ones before it.
    """

    hit: bool
    nll: float


@dataclass
class NeedleResult:
    """What `evaluate_needles` measured.

    Attributes:
        status: "done", or "not run" for the stated `reason`; then there are no outcomes.
        settings: lengths, depths, samples, seed, secret, form, text (title, sha256), chance of a guess.
        needles: the prompts, in the order of the outcomes.
        outcomes: "base" (if one was given) and "out" -> one `Outcome` a needle.
        reach: most sinks and widest window of the streaming heads of `out`; None where it has no such heads.
    """

    status: str
    settings: dict
    needles: list[Needle]
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    reach: tuple[int, int] | None = None
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    def counts(self, needle: Needle) -> bool:
        """Whether a needle proves anything: no streaming head sees it from question or answer."""
        return self.reach is None or needle.outside(*self.reach)

    def kept(self) -> dict | None:
        """Of the needles that count and the base finds, how many `out` finds too; share with its 95% interval."""
        if "base" not in self.outcomes:
            return None
        rows = zip(self.needles, self.outcomes["base"], self.outcomes["out"], strict=True)
        found = [out.hit for needle, base, out in rows if base.hit and self.counts(needle)]
        low, high = wilson(sum(found), len(found))
        share = sum(found) / len(found) if found else math.nan
        return {"of": len(found), "kept": sum(found), "share": share, "low": low, "high": high}

    def cell(self, label: str, length: int, depth: float) -> tuple[int, int]:
        """Hits and needles of one cell of the grid."""
        rows = zip(self.needles, self.outcomes[label], strict=True)
        hits = [outcome.hit for needle, outcome in rows if (needle.length, needle.depth) == (length, depth)]
        return sum(hits), len(hits)

    def grid(self, label: str) -> list[list[float]]:
        """Share of hits [depths][lengths]; NaN where there was no needle."""
        return [
            [hits / of if of else math.nan for hits, of in (self.cell(label, n, depth) for n in self.lengths)]
            for depth in self.depths
        ]

    @property
    def lengths(self) -> list[int]:
        return self.settings["lengths"]

    @property
    def depths(self) -> list[float]:
        return self.settings["depths"]

    def side(self, label: str) -> dict:
        """One model over all needles: hits, accuracy with its 95% interval, mean NLL of the answers."""
        outcomes = self.outcomes[label]
        hits, of = sum(o.hit for o in outcomes), len(outcomes)
        low, high = wilson(hits, of)
        nll = math.fsum(o.nll for o in outcomes) / of
        return {"hits": hits, "of": of, "accuracy": hits / of, "low": low, "high": high, "nll": nll}

    def to_dict(self) -> dict:
        """The same facts for JSON; NaN becomes None."""
        facts: dict[str, Any] = {"status": self.status} | ({"reason": self.reason} if self.reason else {})
        facts |= {"settings": self.settings, "needles": len(self.needles)}
        if self.reach:
            sinks, window = self.reach
            inside = sum(not self.counts(needle) for needle in self.needles)
            facts["streaming"] = {"sinks": sinks, "window": window, "needles_inside": inside}
        for label in self.outcomes:
            facts[label] = self.side(label) | {"grid": self.grid(label)}
        if self.outcomes:
            facts |= {"kept": self.kept(), "cases": [self._case(i) for i in range(len(self.needles))]}
        return finite(facts | ({"notes": self.notes} if self.notes else {}))

    def _case(self, number: int) -> dict:
        needle = self.needles[number]
        facts = {name: getattr(needle, name) for name in ("length", "depth", "sample", "seed", "secret")}
        facts |= {"tokens": len(needle.prompt), "first": needle.span[0], "counts": self.counts(needle)}
        return facts | {label: vars(outcomes[number]) for label, outcomes in self.outcomes.items()}


def run_needles(
    model, needles: Sequence[Needle], progress: Callable[[int], None] | None = None, cached: bool = True
) -> list[Outcome]:
    """Put every needle to a loaded model, which is left in the mode it was in.

    The prompt is one prefill; then the answer's tokens are fed one by one through the model's own cache, as in
    decoding. They are the true ones: as long as each is also the most probable one, that is greedy decoding, and
    from the first that is not, greedy decoding has missed. So one pass gives both figures.

    Args:
        progress: called with the number of needles done.
        cached: False: prompt and answer in one forward without a cache, which is faster. The figures are the same as
            far as cached is uncached, which holds for a head split, not for whatever works in prefill alone.
    """
    import torch

    outcomes = []
    with loaded(model), torch.no_grad():
        for needle in needles:
            outcomes.append(_outcome(needle, (_decoded if cached else _at_once)(model, needle)))
            if progress:
                progress(len(outcomes))
    return outcomes


def _decoded(model, needle: Needle):
    """Logits of each of the answer's tokens, one by one through the cache."""
    import torch

    from surgery.runtime.modeling_surgery import CACHE

    given, cache = list(needle.prompt), {}
    for token in needle.answer:
        ids = torch.tensor([given], device=model.device)
        step = model(input_ids=ids, use_cache=True, **cache, **last_logits(model, 1))
        yield step.logits[0, -1]
        given, cache = [token], {CACHE: step[CACHE]}


def _at_once(model, needle: Needle):
    """The same from one forward without a cache."""
    import torch

    ids, count = torch.tensor([[*needle.prompt, *needle.answer[:-1]]], device=model.device), len(needle.answer)
    return model(input_ids=ids, use_cache=False, **last_logits(model, count)).logits[0, -count:]


def _outcome(needle: Needle, logits) -> Outcome:
    hit, losses = True, []
    for token, row in zip(needle.answer, logits, strict=True):
        logp = row.float().log_softmax(-1)
        hit = hit and int(logp.argmax()) == token
        losses.append(-logp[token].item())
    return Outcome(hit and all(map(math.isfinite, losses)), math.fsum(losses) / len(losses))


def evaluate_needles(
    out: Source,
    base: Source | None = None,
    *,
    tokenizer: Any = None,
    text: str | Path | Text = BUILTIN,
    lengths: Sequence[int] = (512, 1024, 2048),
    depths: int | Sequence[float] = 5,
    samples: int = 4,
    seed: int = 0,
    secret: str = "digits",
    form: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> NeedleResult:
    """Put the same needles to a model and to its base, one after the other.

    Args:
        out, base: model folder, or loaded model. A loaded model stays where and as it is.
        tokenizer: needed where no folder is given; otherwise taken from base, or from out without a base.
        text, lengths, depths, samples, seed, secret, form: see `make_needles`.
        progress: called as progress(done, total, label) after each needle; label is "base" or "out".

    Raises:
        SurgeryError: as `make_needles`; prompts longer than a model's positions, a tokenizer of another model, a
            folder that is not a model or has no safetensors, a base that yields NaN.
    """
    sources = dict(zip(LABELS, (base, out), strict=True)) if base is not None else {"out": out}
    configs = {label: read_config(source) for label, source in sources.items()}
    said = ("prompt and answer", "shorter --lengths")
    refuse_too_long(configs, max(lengths, default=0), *said)
    words = load_text(text, part="held-out")
    tokenizer = tokenizer or read_tokenizer(next(iter(sources.values())))
    form = form_for(tokenizer, form)
    drawn = {"samples": samples, "seed": seed, "secret": secret, "form": form}
    needles = make_needles(tokenizer, lengths=lengths, depths=depths, text=words, **drawn)
    longest = max(len(needle.prompt) + len(needle.answer) for needle in needles)
    refuse_too_long(configs, longest, *said)
    refuse_other_tokenizer(configs, max(token for needle in needles for token in (*needle.prompt, *needle.answer)))
    grid = {name: list(dict.fromkeys(getattr(n, name[:-1]) for n in needles)) for name in ("lengths", "depths")}
    settings = grid | drawn | {"text": {"title": words.title, "sha256": words.sha256[:12]}, "chance": chance(secret)}
    result = NeedleResult("done", settings, needles, reach=_reach(configs["out"]))
    run_base_then_model(
        result,
        sources,
        lambda model, tick: run_needles(model, needles, tick),
        what="needles",
        cases=len(needles),
        extra=lambda kv_bytes: 2 * longest * kv_bytes,  # twice the cache: growing it copies it
        broken=lambda outcome: not math.isfinite(outcome.nll),
        progress=progress,
    )
    return result


def _reach(config) -> tuple[int, int] | None:
    """The most sinks and the widest window of a model's streaming heads."""
    layers = (getattr(config, "surgery", None) or {}).get("layers", [])
    split = [(layer.get("sinks", 0), layer.get("window", 1)) for layer in layers if layer.get("streaming")]
    return (max(sinks for sinks, _ in split), max(window for _, window in split)) if split else None
