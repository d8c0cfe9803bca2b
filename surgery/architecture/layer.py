"""One attention layer: its heads, their shapes, and what the surgery gave it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from surgery.architecture.families import Family
from surgery.io.safetensors import DTYPE_BITS, TORCH_NAMES

if TYPE_CHECKING:
    from surgery.runtime.surgery_config import HeadCost, Part

BYTES = {dtype: DTYPE_BITS[dtype] // 8 for dtype in TORCH_NAMES}


@dataclass(frozen=True)
class LayerAnatomy:
    """One attention layer.

    Attributes:
        index, path: the layer's number and its attention module's path in this file or model.
        heads, kv_heads, head_dim: query heads, KV heads, channels of one head.
        rotary: channels that RoPE turns (0: none; less than head_dim: partial).
        positions: "half", "interleaved", "learned", "alibi", "none" or "unknown" (a guessed family).
        qk_norm: None, "shared", "per head", "modules" or "whole" (see families.py).
        window: sliding window in tokens, or None for full attention.
        soft_cap: cap on the scores, or None.
        biases: which of "q", "k", "v", "o" have a bias (letters in that order).
        dtype: of the projections, in safetensors' spelling; "" when only the config is known.
        layout: the family's row, with Falcon's variants settled.
        query_groups: query heads that read each KV head, where they are not equally many; else ().
        query_numbers, kv_numbers: what the base calls these heads, where some of its heads are gone; else ().
        entry: what the parts of a surgery set in this layer, as in the `surgery` block; heads and shapes, which the
            block names as well, are the fields above.
    """

    index: int
    path: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    positions: str
    qk_norm: str | None
    window: int | None
    soft_cap: float | None
    biases: str
    dtype: str
    layout: Family
    query_groups: tuple[int, ...] = ()
    query_numbers: tuple[int, ...] = ()
    kv_numbers: tuple[int, ...] = ()
    entry: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads that share one KV head, where they are equally many for each."""
        return self.heads // self.kv_heads

    def query_name(self, head: int) -> int:
        """The base's number of a query head."""
        return self.query_numbers[head] if self.query_numbers else head

    def kv_name(self, head: int) -> int:
        """The base's number of a KV head."""
        return self.kv_numbers[head] if self.kv_numbers else head

    @property
    def parts(self) -> dict[str, Part]:
        """The parts of the runtime that this layer uses, by name: each says what it does here."""
        from surgery.runtime.surgery_config import used_parts

        return used_parts(self.entry) if self.entry else {}

    @property
    def streaming(self) -> tuple[int, ...]:
        """KV heads that see only `sinks` first tokens and the last `streaming_window` (head split)."""
        return tuple(self.entry.get("streaming", ()))

    @property
    def sinks(self) -> int:
        return self.entry.get("sinks", 0)

    @property
    def streaming_window(self) -> int:
        return self.entry.get("window", 0)

    @property
    def kv_cost(self) -> list[HeadCost]:
        """What the cache holds of each KV head, in tokens."""
        from surgery.runtime.surgery_config import HeadCost

        heads = [HeadCost()] * self.kv_heads
        for part in self.parts.values():
            heads = part.kv_cost(self.entry, heads)
        return heads

    def with_entry(self, **changes: Any) -> LayerAnatomy:
        """This layer with other values of some keys of its entry in the `surgery` block."""
        return replace(self, entry=self.entry | changes)

    @property
    def split_facts(self) -> dict | None:
        """The head split as plain data, heads by the base's numbers; None where all heads are full."""
        if not self.streaming:
            return None
        return {
            "kv_heads": [self.kv_name(head) for head in self.streaming],
            "sinks": self.sinks,
            "window": self.streaming_window,
        }

    @property
    def norm_per_head(self) -> bool:
        return self.qk_norm in ("per head", "modules", "whole")

    @property
    def tensor_names(self) -> list[str]:
        """Stored tensors of this layer that follow its heads, relative to the attention module."""
        layout = self.layout
        projections = {layout.qkv: "qkv"} if layout.qkv else {layout.q: "q", layout.k: "k", layout.v: "v"}
        names = [f"{name}.weight" for name in [*projections, layout.o]]
        names += [f"{name}.bias" for name, part in projections.items() if part[0] in self.biases]
        if self.norm_per_head:
            names += norm_names(self, "q_norm", self.heads) + norm_names(self, "k_norm", self.kv_heads)
        return [*names, layout.sinks] if layout.sinks else names


def groups_of(facts: LayerAnatomy) -> list[list[int]]:
    """The query heads that read each KV head of a layer."""
    sizes = facts.query_groups or [facts.group] * facts.kv_heads
    firsts = [sum(sizes[:head]) for head in range(len(sizes))]
    return [list(range(first, first + size)) for first, size in zip(firsts, sizes, strict=True)]


def query_names(facts: LayerAnatomy) -> list[int]:
    """The base's numbers of a layer's query heads, in the order in which they are stored."""
    return [facts.query_name(head) for head in range(facts.heads)]


def shown_names(names: list[int]) -> str:
    """Heads for people: "0 to 8", or the list where some are gone."""
    return f"0 to {names[-1]}" if names == list(range(len(names))) else ", ".join(map(str, names))


def norm_names(facts: LayerAnatomy, part: str, heads: int) -> list[str]:
    """Names of the tensors of a norm with one row per head, relative to the attention module."""
    name = getattr(facts.layout, part)
    if facts.qk_norm == "modules":
        return [f"{name}.norms.{head}.weight" for head in range(heads)]
    return [f"{name}.weight"]
