"""One attention layer: its heads, their shapes, and the settings that a surgery gave it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any

from surgery.architecture.families import Family, with_kv_vector
from surgery.io.safetensors import DTYPE_BITS, TORCH_NAMES

if TYPE_CHECKING:
    from surgery.runtime.surgery_config import HeadCost, Part

BYTES = {dtype: DTYPE_BITS[dtype] // 8 for dtype in TORCH_NAMES}


@dataclass(frozen=True)
class Latent:
    """The latent attention (MLA) of a layer: the keys and values of all heads are made of one vector for each token.

    Attributes:
        rank: numbers in this vector.
        rope: channels of the key that all heads share, which RoPE rotates.
        nope: channels of a head's query and key that RoPE does not rotate.
        value: channels of a head's value.
        queries: numbers in the vector that queries are made of; 0: they are made of the layer's input.
        fold: neighbouring frequencies of the base that each of its frequencies stands for, while it is being made.
    """

    rank: int
    rope: int
    nope: int
    value: int
    queries: int = 0
    fold: int = field(default=1, compare=False)

    @property
    def width(self) -> int:
        """Numbers that the cache holds for each token."""
        return self.rank + self.rope


@dataclass(frozen=True)
class LayerAnatomy:
    """One attention layer.

    Attributes:
        index, path: the layer's index, and the path of its attention module in this checkpoint or model.
        heads, kv_heads, head_dim: number of query heads, number of KV heads, channels of one head.
        rotary: number of channels that RoPE rotates (0: none; less than head_dim: partial).
        positions: "half", "interleaved", "learned", "alibi", "none" or "unknown" (a guessed family).
        qk_norm: None, "shared", "per head", "modules" or "whole" (see families.py).
        window: sliding window in tokens, or None for full attention.
        soft_cap: cap on the scores, or None.
        biases: letters of the projections with a bias, in the order "qkvo".
        dtype: dtype of the projections, in safetensors' spelling; "" if only the config is known.
        layout: the family's row, with Falcon's variants resolved.
        query_groups: number of query heads that read each KV head, if the numbers differ; else ().
        query_numbers, kv_numbers: the base's numbers of these heads, if some of its heads were removed; else ().
        vector: numbers in the vector of which keys and values are made, where a surgery gave the layer one; else 0.
        latent: the layer's latent attention, or None. Such a layer has one KV head here, which is what its cache
            holds; `head_dim` is the size of a query, and `rotary` counts its last channels.
        entry: the settings of a surgery in this layer, as in the `surgery` block. The block's numbers of heads and
            shapes are not in it, because the fields above hold them.
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
    vector: int = 0
    latent: Latent | None = None
    entry: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Number of query heads that share one KV head, if it is the same for all."""
        return self.heads // self.kv_heads

    def query_name(self, head: int) -> int:
        """The base's number of a query head."""
        return self.query_numbers[head] if self.query_numbers else head

    def kv_name(self, head: int) -> int:
        """The base's number of a KV head."""
        return self.kv_numbers[head] if self.kv_numbers else head

    @property
    def parts(self) -> dict[str, Part]:
        """The parts of the runtime that this layer uses, by name."""
        from surgery.runtime.surgery_config import used_parts

        return used_parts(self.entry) if self.entry else {}

    @property
    def streaming(self) -> tuple[int, ...]:
        """KV heads that see only the first `sinks` tokens and the last `streaming_window` tokens (head split)."""
        return tuple(self.entry.get("streaming", ()))

    @property
    def sinks(self) -> int:
        """Number of first tokens that the streaming heads see."""
        return self.entry.get("sinks", 0)

    @property
    def streaming_window(self) -> int:
        """Number of last tokens that the streaming heads see."""
        return self.entry.get("window", 0)

    def kv_cost(self, positions: int | None = None) -> list[HeadCost]:
        """What the cache holds for each KV head, then what it holds beside them, in tokens.

        Args:
            positions: the most tokens that the model takes (None: unknown). A sliding window of the base's own bounds
                the cache if it is narrower.
        """
        from surgery.runtime.surgery_config import HeadCost

        limit = self.window if self.window and self.window < (positions or inf) else None
        cost = HeadCost() if limit is None else HeadCost(0, limit)
        heads = [cost._replace(readers=len(group)) for group in groups_of(self)]
        for part in self.parts.values():
            heads = part.kv_cost(self.entry, heads)
        return heads

    def with_vector(self, entry: dict[str, Any]) -> LayerAnatomy:
        """This layer with keys and values that are made of a vector.

        Args:
            entry: its `low_rank` in the `surgery` block (surgery/runtime/surgery_low_rank.py).
        """
        layout = with_kv_vector(self.layout)
        return replace(self, layout=layout, vector=entry["rank"], entry=self.entry | {"low_rank": entry})

    def with_entry(self, **changes: Any) -> LayerAnatomy:
        """This layer with other values of some keys of its entry in the `surgery` block."""
        return replace(self, entry=self.entry | changes)

    @property
    def split_info(self) -> dict | None:
        """The head split as plain data, with heads by the base's numbers; None if all heads are full."""
        if not self.streaming:
            return None
        return {
            "kv_heads": [self.kv_name(head) for head in self.streaming],
            "sinks": self.sinks,
            "window": self.streaming_window,
        }

    @property
    def kv_width(self) -> int:
        """Numbers that the cache holds for each token and KV head: its key and its value."""
        return self.latent.width if self.latent else 2 * self.head_dim

    @property
    def token_width(self) -> int:
        """Numbers of keys and values that the cache holds for each token."""
        return self.kv_heads * self.kv_width

    @property
    def norm_per_head(self) -> bool:
        """Whether the QK-norm has weights for each head, which follow the heads."""
        return self.qk_norm in ("per head", "modules", "whole")

    @property
    def tensor_names(self) -> list[str]:
        """Names of this layer's stored tensors whose shape depends on its heads, relative to the attention module."""
        layout = self.layout
        if layout.latent_norm:
            down = [layout.q_down, layout.q_down_norm] if layout.q_down else []
            biased = {"q": layout.q_input, "k": layout.k, "o": layout.o}
            names = [*down, layout.q, layout.k, layout.latent_norm, layout.v, layout.o]
            return [f"{name}.weight" for name in names] + [f"{biased[letter]}.bias" for letter in self.biases]
        projections = {layout.qkv: "qkv"} if layout.qkv else {layout.q: "q", layout.k: "k", layout.v: "v"}
        down = [layout.kv_down] if layout.kv_down else []
        names = [f"{name}.weight" for name in [*down, *projections, layout.o]]
        names += [f"{name}.bias" for name, letters in projections.items() if letters[0] in self.biases]
        if self.norm_per_head:
            names += norm_names(self, "q_norm", self.heads) + norm_names(self, "k_norm", self.kv_heads)
        return [*names, layout.sinks] if layout.sinks else names


def groups_of(anatomy: LayerAnatomy) -> list[list[int]]:
    """For each KV head of a layer, the indices of the query heads that read it."""
    sizes = anatomy.query_groups or [anatomy.group] * anatomy.kv_heads
    firsts = [sum(sizes[:head]) for head in range(len(sizes))]
    return [list(range(first, first + size)) for first, size in zip(firsts, sizes, strict=True)]


def query_names(anatomy: LayerAnatomy) -> list[int]:
    """The base's numbers of a layer's query heads, in the order in which they are stored."""
    return [anatomy.query_name(head) for head in range(anatomy.heads)]


def shown_names(names: list[int]) -> str:
    """Numbers of heads as text: "0 to 8", or a list if some are missing."""
    return f"0 to {names[-1]}" if names == list(range(len(names))) else ", ".join(map(str, names))


def norm_names(anatomy: LayerAnatomy, norm: str, heads: int) -> list[str]:
    """Names of the tensors of a norm with one row per head, relative to the attention module."""
    name = getattr(anatomy.layout, norm)
    if anatomy.qk_norm == "modules":
        return [f"{name}.norms.{head}.weight" for head in range(heads)]
    return [f"{name}.weight"]


def pair_channels(rotary: int, positions: str) -> tuple[list[int], list[int]]:
    """The channels that hold the real and the imaginary parts of RoPE's complex numbers."""
    if positions == "interleaved":
        return list(range(0, rotary, 2)), list(range(1, rotary, 2))
    return list(range(rotary // 2)), list(range(rotary // 2, rotary))
