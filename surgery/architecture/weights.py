"""One layer's attention weights in one canonical form, whatever the file's layout.

`unpack` turns the tensors of any layout of `families.py` (separate, fused by block, interleaved per head or
group, Conv1D-transposed) into an `AttentionLayer`; `pack` is its exact inverse. So a weight rewrite is written
only once, for the canonical form.

Shapes: H query heads, G KV heads, d head size, D hidden size. Query head h reads KV head h // (H // G).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from surgery.architecture.layer import norm_names

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.families import Family
    from surgery.architecture.layer import Latent, LayerAnatomy

PROJECTIONS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class AttentionLayer:
    """The attention weights of one layer.

    Attributes:
        anatomy: heads, KV heads, head size, RoPE and norms of this layer.
        q [H, d, D], k [G, d, D], v [G, d, D], o [D, H, d]: projections.
        q_bias [H, d], k_bias [G, d], v_bias [G, d]: biases, or None. The output bias belongs to no head and
            is not touched.
        q_norm [H, d], k_norm [G, d]: weights of norms that have one row per head, or None. A norm weight
            that all heads share [d] does not depend on the heads and is not listed here.
        sinks [H]: learned sink logits, or None.
    """

    anatomy: LayerAnatomy
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    sinks: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, for the tensors that this layer has."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "anatomy")
        return {name: tensor for name, tensor in tensors if tensor is not None}

    def replace(self, **tensors: Any) -> AttentionLayer:
        """This layer with other tensors, and possibly another anatomy that fits them."""
        return replace(self, **tensors)

    def copy(self, projections: Collection[str] = PROJECTIONS) -> AttentionLayer:
        """A layer whose tensors are in fresh contiguous memory on the CPU.

        Both engines compute on such a copy: the last bits of a sum depend on how memory is aligned.

        Args:
            projections: which of `q`, `k`, `v` and `o` to copy. The others become meta tensors: shape and dtype alone.
        """
        import torch

        def fresh(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()

        withheld = set(PROJECTIONS).difference(projections)
        copies = {
            name: torch.empty_like(tensor, device="meta") if name in withheld else fresh(tensor)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **copies)


def unpack(anatomy: LayerAnatomy, tensors: dict[str, Tensor]) -> AttentionLayer:
    """Canonical form of one layer.

    Args:
        anatomy: the layer's anatomy.
        tensors: name relative to the attention module ("q_proj.weight") -> tensor, as stored.
    """
    layout = anatomy.layout
    unpacked: dict[str, Tensor] = {}
    if layout.qkv is None:
        for letter, heads in _heads(anatomy).items():
            name = getattr(layout, letter)
            weight = _rows_first(layout, tensors[f"{name}.weight"])
            unpacked[letter] = weight.reshape(heads, anatomy.head_dim, -1)
            if f"{name}.bias" in tensors:
                unpacked[f"{letter}_bias"] = tensors[f"{name}.bias"].reshape(heads, anatomy.head_dim)
    else:
        unpacked |= _split(anatomy, _rows_first(layout, tensors[f"{layout.qkv}.weight"]), "")
        if f"{layout.qkv}.bias" in tensors:
            unpacked |= _split(anatomy, tensors[f"{layout.qkv}.bias"], "_bias")
    unpacked["o"] = _rows_first(layout, tensors[f"{layout.o}.weight"]).reshape(-1, anatomy.heads, anatomy.head_dim)
    if anatomy.norm_per_head:
        for norm, heads in (("q_norm", anatomy.heads), ("k_norm", anatomy.kv_heads)):
            names = norm_names(anatomy, norm, heads)
            weights = [tensors[name] for name in names]
            stacked = weights[0] if len(weights) == 1 else _stack(weights)
            unpacked[norm] = stacked.reshape(heads, anatomy.head_dim)
    if layout.sinks:
        unpacked["sinks"] = tensors[layout.sinks]
    return AttentionLayer(anatomy, **unpacked)


def pack(layer: AttentionLayer) -> dict[str, Tensor]:
    """The stored tensors of one layer: the inverse of `unpack`, for the layout in `layer.anatomy`."""
    anatomy, layout = layer.anatomy, layer.anatomy.layout
    tensors: dict[str, Tensor] = {}
    if layout.qkv is None:
        for letter in ("q", "k", "v"):
            name, weight, bias = getattr(layout, letter), getattr(layer, letter), getattr(layer, f"{letter}_bias")
            tensors[f"{name}.weight"] = _rows_first(layout, weight.flatten(0, 1))
            if bias is not None:
                tensors[f"{name}.bias"] = bias.flatten()
    else:
        joined = _join(anatomy, layer.q, layer.k, layer.v)
        tensors[f"{layout.qkv}.weight"] = _rows_first(layout, joined)
        if layer.q_bias is not None:
            biases = (layer.q_bias, layer.k_bias, layer.v_bias)
            tensors[f"{layout.qkv}.bias"] = _join(anatomy, *cast("tuple[Tensor, Tensor, Tensor]", biases))
    tensors[f"{layout.o}.weight"] = _rows_first(layout, layer.o.flatten(1))
    for norm, heads in (("q_norm", anatomy.heads), ("k_norm", anatomy.kv_heads)):
        weight = getattr(layer, norm)
        if weight is not None:
            names = norm_names(anatomy, norm, heads)
            if anatomy.qk_norm == "modules":
                tensors |= dict(zip(names, weight.unbind(0), strict=True))
            else:
                tensors[names[0]] = weight.flatten() if anatomy.qk_norm == "whole" else weight
    if layer.sinks is not None and layout.sinks is not None:
        tensors[layout.sinks] = layer.sinks
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def with_bias(layer: AttentionLayer, projection: str) -> Tensor:
    """The weight of "q", "k" or "v" in float64 [heads, d, D]. A bias is appended as a column: [heads, d, D + 1]."""
    import torch

    weight, bias = getattr(layer, projection).double(), getattr(layer, f"{projection}_bias")
    return weight if bias is None else torch.cat([weight, bias.double().unsqueeze(-1)], dim=-1)


def stacked(layer: AttentionLayer, projection: str, heads: list[Tensor]) -> dict[str, Tensor]:
    """The inverse of `with_bias`, rounded once to the stored dtype."""
    import torch

    rows, weight, bias = torch.stack(heads), getattr(layer, projection), getattr(layer, f"{projection}_bias", None)
    if bias is None:
        return {projection: rows.to(weight.dtype)}
    return {projection: rows[..., :-1].to(weight.dtype), f"{projection}_bias": rows[..., -1].to(bias.dtype)}


def unpacked_shapes(anatomy: LayerAnatomy, like: AttentionLayer) -> dict[str, tuple[int, ...]]:
    """Shapes that a layer of `anatomy` must have. `like` determines which tensors exist, and the hidden size."""
    hidden = like.q.shape[-1]
    shapes = {
        "q": (anatomy.heads, anatomy.head_dim, hidden),
        "k": (anatomy.kv_heads, anatomy.head_dim, hidden),
        "v": (anatomy.kv_heads, anatomy.head_dim, hidden),
        "o": (like.o.shape[0], anatomy.heads, anatomy.head_dim),
        "q_bias": (anatomy.heads, anatomy.head_dim),
        "k_bias": (anatomy.kv_heads, anatomy.head_dim),
        "v_bias": (anatomy.kv_heads, anatomy.head_dim),
        "q_norm": (anatomy.heads, anatomy.head_dim),
        "k_norm": (anatomy.kv_heads, anatomy.head_dim),
        "sinks": (anatomy.heads,),
    }
    return {name: shapes[name] for name in like.tensors()}


def packed_shapes(anatomy: LayerAnatomy, hidden: int, out: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of `pack` for a layer of `anatomy`, in the order of its `tensor_names`; needs no torch.

    Args:
        hidden: number of channels that the projections read.
        out: number of channels that the output projection writes.
    """
    layout, size = anatomy.layout, anatomy.head_dim
    if anatomy.latent:
        return _latent_shapes(anatomy, anatomy.latent, hidden, out)
    queries, kv = anatomy.heads * size, anatomy.kv_heads * size
    rows = {layout.qkv: queries + 2 * kv} if layout.qkv else {layout.q: queries, layout.k: kv, layout.v: kv}
    shapes: dict[str, tuple[int, ...]] = {f"{layout.kv_down}.weight": (anatomy.vector, hidden)}
    for name, count in rows.items():
        read = anatomy.vector if layout.kv_down and name != layout.q else hidden
        shapes |= {f"{name}.weight": (read, count) if layout.conv1d else (count, read), f"{name}.bias": (count,)}
    shapes[f"{layout.o}.weight"] = (queries, out) if layout.conv1d else (out, queries)
    for norm, heads in (("q_norm", anatomy.heads), ("k_norm", anatomy.kv_heads)):
        whole = {"whole": (heads * size,), "modules": (size,)}.get(anatomy.qk_norm or "", (heads, size))
        shapes |= dict.fromkeys(norm_names(anatomy, norm, heads), whole)
    if layout.sinks:
        shapes[layout.sinks] = (anatomy.heads,)
    return {name: shapes[name] for name in anatomy.tensor_names}


def _latent_shapes(anatomy: LayerAnatomy, latent: Latent, hidden: int, out: int) -> dict[str, tuple[int, ...]]:
    """The result of `packed_shapes` for latent attention."""
    layout, heads = anatomy.layout, anatomy.heads
    shapes: dict[str, tuple[int, ...]] = {
        f"{layout.q_down}.weight": (latent.queries, hidden),
        f"{layout.q_down}.bias": (latent.queries,),
        f"{layout.q_down_norm}.weight": (latent.queries,),
        f"{layout.q}.weight": (heads * anatomy.head_dim, latent.queries or hidden),
        f"{layout.k}.weight": (latent.width, hidden),
        f"{layout.k}.bias": (latent.width,),
        f"{layout.latent_norm}.weight": (latent.rank,),
        f"{layout.v}.weight": (heads * (latent.nope + latent.value), latent.rank),
        f"{layout.o}.weight": (out, heads * latent.value),
        f"{layout.o}.bias": (out,),
    }
    return {name: shapes[name] for name in anatomy.tensor_names}


def unread_weights(anatomy: LayerAnatomy, rewritten: Collection[str]) -> set[str]:
    """The stored weights of a layer that hold none of the rewritten projections. A fused weight holds three."""
    layout = anatomy.layout
    holders = {letter: layout.qkv or getattr(layout, letter) for letter in "qkv"} | {"o": layout.o}
    read = {holders[projection] for projection in holders if projection in rewritten}
    return {f"{holder}.weight" for holder in {*holders.values()} - read}


def _heads(anatomy: LayerAnatomy) -> dict[str, int]:
    return {"q": anatomy.heads, "k": anatomy.kv_heads, "v": anatomy.kv_heads}


def _rows_first(layout: Family, weight: Tensor) -> Tensor:
    """Convert a weight between its stored form and [out, in]. Conv1D stores [in, out]: both ways are the transpose."""
    return weight.T if layout.conv1d else weight


def _stack(weights: list[Tensor]) -> Tensor:
    import torch

    return torch.stack(weights)


def _split(anatomy: LayerAnatomy, fused: Tensor, suffix: str) -> dict[str, Tensor]:
    """Fused rows [(H + 2G) d, ...] -> q [H, d, ...], k and v [G, d, ...]."""
    heads, groups = anatomy.heads, anatomy.kv_heads
    fused = fused.reshape(heads + 2 * groups, anatomy.head_dim, *fused.shape[1:])
    if anatomy.layout.layout == "rows":
        q, k, v = fused.split([heads, groups, groups])
    else:
        grouped = fused.reshape(groups, heads // groups + 2, *fused.shape[1:])
        q, k, v = grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1]
    return {f"q{suffix}": q, f"k{suffix}": k, f"v{suffix}": v}


def _join(anatomy: LayerAnatomy, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The inverse of `_split`."""
    import torch

    if anatomy.layout.layout == "rows":
        return torch.cat([q, k, v]).flatten(0, 1)
    groups = anatomy.kv_heads
    q = q.reshape(groups, anatomy.heads // groups, *q.shape[1:])
    return torch.cat([q, k.unsqueeze(1), v.unsqueeze(1)], dim=1).flatten(0, 2)
