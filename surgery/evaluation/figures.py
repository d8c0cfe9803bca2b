"""The figures of an evaluation: each model's own, what compares the two, and the records of further probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from surgery.evaluation.paired import finite
from surgery.evaluation.probes import REGISTRY, find
from surgery.evaluation.result import Result
from surgery.io.printing import Block


@dataclass
class Side:
    """One model's figures.

    Attributes:
        cross_entropy: nats per token, mean over the tokens scored; perplexity is its exponential.
        kv_bytes_per_token: KV cache of one token, all layers; None if the attention is not understood.
        load_bytes: bytes of the weight files that are loaded from the folder, or of the parameters of a loaded model.
        nonfinite_tokens: scored tokens whose log-probability is NaN or infinite. A single one makes the figures NaN.
    """

    cross_entropy: float | None = None
    perplexity: float | None = None
    kv_bytes_per_token: int | None = None
    load_bytes: int | None = None
    nonfinite_tokens: int = 0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Side:
        """The figures of a record; a figure that it lacks is None."""
        return cls(**{each.name: record[each.name] for each in fields(cls) if each.name in record})


@dataclass(repr=False)
class Evaluation(Result):
    """The result of `evaluate`, with the text that was scored.

    Attributes:
        status: "done" or "not run". If it was not run, `reason` says why and no figure of a run exists.
        text: title, sha256 (first 12 digits), tokens scored, windows, length (tokens in a window).
        base, out: each model's own figures; base is None if none was given.
        kl: KL(base || out) in nats per token: mean, p99 (99th percentile over tokens), top_k.
        top1_agreement: share of tokens where both models find the same next token most probable.
        notes: remarks for the reader, such as figures that could not be determined.
        probes: records of the other probes that a recipe asks for, by name; {} if there are none.
    """

    status: str
    text: dict[str, Any]
    out: Side
    base: Side | None = None
    kl: dict[str, Any] | None = None
    top1_agreement: float | None = None
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)

    PROBE: ClassVar[str] = "perplexity"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Evaluation:
        """The result in a report, which an earlier version may have written; a figure that it lacks is None."""
        base, own = record.get("base"), {"kl", "top1_agreement", "reason", "notes"}
        sides = {"out": Side.of(record.get("out") or {}), "base": None if base is None else Side.of(base)}
        others = {name: record[name] for name in REGISTRY if name != cls.PROBE and record.get(name)}
        kept = {name: record[name] for name in own if record.get(name) is not None}
        return cls(record.get("status", "done"), record.get("text") or {}, **sides, **kept, probes=others)

    def alone(self) -> str:
        """The perplexity of a model that was measured without a base."""
        return "perplexity ?" if self.out.perplexity is None else f"perplexity {self.out.perplexity:,.2f}"

    def blocks(self) -> list[Block]:
        """The probe's own figures, and a sentence for each of the other probes."""
        sentences = []
        for name, record in self.probes.items():
            done = record.get("status", "done") == "done"
            reason = find(name).sentence(record) if done else f"{name} {record['status']}: {record.get('reason', '')}"
            sentences.append(reason or f"{name}: {find(name).missing(record)}")
        return [*super().blocks(), *sentences]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data for JSON. NaN and infinity become None; `gate` fails on them."""
        data = {"status": self.status, "reason": self.reason} if self.reason else {"status": self.status}
        data |= {
            "text": dict(self.text),
            "base": self.base and dict(vars(self.base)),
            "out": dict(vars(self.out)),
        }
        data |= {"kl": self.kl and dict(self.kl), "top1_agreement": self.top1_agreement}
        data |= self.probes
        return finite(data | {"notes": list(self.notes)} if self.notes else data)
