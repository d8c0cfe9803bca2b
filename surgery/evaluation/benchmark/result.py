"""The result of a benchmark: seconds, bytes and the ratios between models, as an object and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from surgery.io.printing import count

STOCK, FULL, SPLIT = "base", "all full", "patched"
SPEEDS = (  # name of a speed-up, the model compared with, the model judged, what is timed
    ("prefill_vs_stock", STOCK, SPLIT, "prefill"),
    ("decode_vs_stock", STOCK, SPLIT, "decode"),
    ("prefill_vs_block_cache", FULL, SPLIT, "prefill"),
    ("decode_vs_block_cache", FULL, SPLIT, "decode"),
)
SHARES = (  # name, what is counted: the converted model's bytes as a share of the base's
    ("cache_bytes_vs_stock", "cache_bytes"),
    ("decode_cache_bytes_vs_stock", "decode_cache_bytes"),
    ("peak_memory_vs_stock", "peak_memory"),
)
DRAWN = (  # panels of the picture: title, y label, ratio -> name in the legend
    (
        "speed: higher is better",
        "times as fast",
        {
            "prefill_vs_stock": "prompt, against the base",
            "decode_vs_stock": "decoding, against the base",
            "decode_vs_block_cache": "decoding, against the same cache with all heads full",
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
    """The measurements of one model at one prompt length.

    Attributes:
        prefill_rounds: seconds for the prompt, one number per round.
        decode_rounds: seconds for one token after the prompt, one number per round (the median of its tokens).
        cache_bytes: bytes of the tensors that the cache holds after the prompt.
        decode_cache_bytes: the same after the decoded tokens; a cache that grows by blocks has spare room then.
        peak_memory: peak bytes during the prompt beyond the weights, including its cache; None: not measured.
        work: multiply-adds of the prompt in layers with a gate or sparse prefill: part -> [number that was done,
            number without gate and sparse prefill].
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
        """Seconds for the prompt, median over the rounds."""
        return statistics.median(self.prefill_rounds)

    @property
    def decode(self) -> float:
        """Seconds per decoded token, median over the rounds."""
        return statistics.median(self.decode_rounds)

    def to_dict(self) -> dict[str, Any]:
        """The timing as plain data: seconds, tokens per second, bytes. A spread is slowest over fastest round."""
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
    """All timings of one run, with the machine and the models.

    Attributes:
        machine: processor, threads, version of torch.
        model: layers, dtype and attention of the base; `synthetic`: whether weights are random.
        split: number of streaming KV heads and of all KV heads, in all and per layer; None for a native model.
        gate: number of layers with a gate, kinds of gates, mean share of heads that are on; None: no layer has one.
        rounds, decode: repetitions, and tokens decoded in each.
        notes: what a reader of the figures must know.
        sparse: number of layers with sparse prefill, and its methods; None: no layer has it.
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
        """For each length: how many times as fast the converted model is, and which share of the bytes it takes.

        A speed-up is computed within each round, whose runs follow one another; the ratio is the median over the
        rounds, and `ranges` holds the lowest and the highest. None: not measured, or there is no head split. Two
        shares are about the prompt in layers with a gate or sparse prefill. `multiply_adds`: multiply-adds done, as a
        share of those without gate and sparse prefill. `pairs_read`: the same for pairs of a query and a key.
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
    """The largest number over the smallest."""
    return max(rounds) / min(rounds)


def plot(result: Benchmark, path: str | Path) -> Path:
    """Draw the ratios against the length: one panel for speeds, one for bytes. Bars span all rounds.

    Errors are those of `surgery.report.plots.curves`.
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
    rounds = count(result.rounds, "round")
    return curves(
        path,
        panels,
        x_label="tokens in the prompt",
        title=f"converted model against its base: {what}{result.model['layers']} layers, {result.model['dtype']}\n"
        f"{result.machine}; bars: slowest and fastest of {rounds}",
        log_x=True,
    )
