"""What a benchmark measured: seconds, bytes, and the ratios that follow from them, as an object and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STOCK, FULL, SPLIT = "base", "all full", "patched"
SPEEDS = (  # name, the slower and the faster one of a speed-up, what is timed
    ("prefill_vs_stock", STOCK, SPLIT, "prefill"),
    ("decode_vs_stock", STOCK, SPLIT, "decode"),
    ("prefill_vs_block_cache", FULL, SPLIT, "prefill"),
    ("decode_vs_block_cache", FULL, SPLIT, "decode"),
)
SHARES = (  # name, what is counted: the patched model's as a share of the base's
    ("cache_bytes_vs_stock", "cache_bytes"),
    ("decode_cache_bytes_vs_stock", "decode_cache_bytes"),
    ("peak_memory_vs_stock", "peak_memory"),
)
DRAWN = (  # panel -> what is drawn in it, with its name in the legend
    (
        "speed: higher is better",
        "times as fast",
        {
            "prefill_vs_stock": "prompt, beside the base",
            "decode_vs_stock": "decoding, beside the base",
            "decode_vs_block_cache": "decoding, beside this cache with all heads full",
        },
    ),
    (
        "memory: lower is better",
        "share of the base's bytes",
        {"cache_bytes_vs_stock": "KV cache", "peak_memory_vs_stock": "peak of the prompt, without the weights"},
    ),
)


@dataclass(frozen=True)
class Timing:
    """One model at one length.

    Attributes:
        prefill_rounds: seconds for the prompt, one number a round.
        decode_rounds: seconds for one token after it, one number a round (the median of that round's tokens).
        cache_bytes: bytes of the tensors that the cache holds after the prompt.
        decode_cache_bytes: the same after the decoded tokens: a cache that grows by blocks has room to spare.
        peak_memory: most bytes that the prompt took beyond the weights, its cache among them; None: not measured.
        work: multiply-adds of the prompt in layers that have a gate or sparse prefill, part -> [as counted, without].
    """

    model: str
    length: int
    prefill_rounds: tuple[float, ...]
    decode_rounds: tuple[float, ...]
    cache_bytes: int
    decode_cache_bytes: int
    peak_memory: int | None = None
    work: dict[str, list[int]] = field(default_factory=dict)

    @property
    def prefill(self) -> float:
        """Seconds, median over the rounds."""
        return statistics.median(self.prefill_rounds)

    @property
    def decode(self) -> float:
        """Seconds a token, median over the rounds."""
        return statistics.median(self.decode_rounds)

    def to_dict(self) -> dict[str, Any]:
        """The timing as plain data: seconds, tokens a second, bytes; a spread is the slowest to the fastest round."""
        return asdict(self) | {
            "prefill": self.prefill,
            "prefill_spread": spread(self.prefill_rounds),
            "prefill_tokens_per_second": self.length / self.prefill,
            "decode": self.decode,
            "decode_spread": spread(self.decode_rounds),
            "decode_tokens_per_second": 1 / self.decode,
        }


@dataclass(frozen=True)
class Benchmark:
    """All timings of one run, and what they were taken on.

    Attributes:
        machine: processor, threads, torch.
        model: what was run: layers, dtype, the base's attention; `synthetic`: random weights.
        split: KV heads that stream, of how many, per layer; None for a native model.
        gate: layers that have a gate, its kinds, the mean share of heads that are on there; None: no layer has one.
        rounds, decode: repetitions, and tokens decoded in each.
        notes: what a reader of the figures must know.
        sparse: layers whose prefill is sparse, the methods; None: no layer's is.
    """

    machine: str
    model: dict[str, Any]
    split: dict[str, Any] | None
    gate: dict[str, Any] | None
    rounds: int
    decode: int
    timings: list[Timing]
    notes: list[str] = field(default_factory=list)
    sparse: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All timings and ratios as plain data, for `--json`."""
        return {**vars(self), "timings": [t.to_dict() for t in self.timings], "ratios": self.ratios()}

    def ratios(self) -> list[dict[str, Any]]:
        """For each length: how many times as fast the patched model is, and what share of the bytes it takes.

        A speed is compared within each round, whose runs follow one another, and the median over the rounds given;
        `ranges` has the lowest and the highest. None: not measured, or there is no head split. `multiply_adds`: of
        the attention of layers with a gate or sparse prefill, in the prompt; `pairs_read`: of the pairs of a query and
        a key that such layers would multiply, those that they did.
        """
        rows = []
        for length in dict.fromkeys(t.length for t in self.timings):
            by_model = {t.model: t for t in self.timings if t.length == length}
            row: dict[str, Any] = {"length": length, "ranges": {}}
            for name, slow, fast, what in SPEEDS:
                row[name] = None
                if slow in by_model:
                    pairs = zip(*(getattr(by_model[model], f"{what}_rounds") for model in (slow, fast)), strict=True)
                    quotients = [one / other for one, other in pairs]
                    row[name], row["ranges"][name] = statistics.median(quotients), [min(quotients), max(quotients)]
            for name, what in SHARES:
                base, ours = getattr(by_model[STOCK], what), getattr(by_model[SPLIT], what)
                row[name] = ours / base if base and ours is not None else None
            work = by_model[SPLIT].work
            counted, total = (sum(work_of_part[i] for work_of_part in work.values()) for i in (0, 1))
            row["multiply_adds"] = counted / total if total else None
            row["pairs_read"] = work["attention"][0] / work["attention"][1] if total else None
            rows.append(row)
        return rows


def spread(rounds: Sequence[float]) -> float:
    """Largest over smallest."""
    return max(rounds) / min(rounds)


def plot(result: Benchmark, path: str | Path) -> Path:
    """Ratios against length, speeds and bytes apart; bars reach from the slowest to the fastest round.

    See `surgery.report.plots.curves` for its errors.
    """
    from surgery.report.plots import Line, Panel, curves

    rows = sorted(result.ratios(), key=lambda row: row["length"])
    panels = []
    for title, y_label, names in DRAWN:
        lines = {}
        for name, label in names.items():
            if known := [row for row in rows if row[name] is not None]:
                ends = [row["ranges"][name] for row in known] if name in known[0]["ranges"] else None
                lines[label] = Line([row["length"] for row in known], [row[name] for row in known], ends)
        panels.append(Panel(lines, y_label, title, levels={"1: as the base": 1.0}))
    split, what = result.split, "random weights, " if result.model["synthetic"] else ""
    if split:
        what += f"{split['streaming']} of {split['kv_heads']} KV heads stream, "
    rounds = f"{result.rounds} round{'s' * (result.rounds != 1)}"
    return curves(
        path,
        panels,
        x_label="tokens in the prompt",
        title=f"converted model beside its base: {what}{result.model['layers']} layers, {result.model['dtype']}\n"
        f"{result.machine}; bars: slowest and fastest of {rounds}",
        log_x=True,
    )
