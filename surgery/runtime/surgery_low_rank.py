"""Keys and values that are made of one vector for each token, which the cache holds in their place.

An entry of the `surgery` block may hold `low_rank`:

    {"rank": 192, "head_dim": 64, "rotary": 64, "angles": 128}

The layer's input x_j of token j gives a vector of `rank` numbers, and this gives the keys and values of all heads:

    c_j = C x_j        k_j = turn_j(norm(A c_j + a))        v_j = B c_j + b

C is `kv_vector`, A and B are `k_proj.up` and `v_proj.up`. Biases, the norm of keys and RoPE are the base's own:
`norm` gives the name and the kind of the norm (left out where there is none), `rotary` the number of channels that
RoPE turns.

A prompt makes keys and values as the base does. A later call makes the keys of the past anew. It turns them by the
cosines and sines with which they came, which one layer keeps for all: `angles` is how many numbers it keeps for a
token (`wide`: in float32, whatever the dtype of the weights), and other layers leave it out. A call of few queries
makes no values of the past. All heads read the vectors:

    sum over j of p_j (B c_j + b) = B (sum over j of p_j c_j) + b sum over j of p_j

Adapters take the names of these modules: peft knows no `k_proj` that is no linear map.

With a `DynamicCache`, or without a cache, keys and values are as in the base, and no memory is saved.
"""

from __future__ import annotations

import inspect
import sys
import threading
from dataclasses import replace

import torch

from .surgery_config import HeadCost, Part, is_whole, used_parts
from .surgery_projections import is_hooked, is_plain
from .surgery_stores import VECTORS, KeyValues, Scoring, VectorStore
from .surgery_visibility import Visibility, seen_keys

FEW = 32  # most queries of a call whose values are read as vectors
VECTOR, UP = "kv_vector", "up"  # names of the modules
ANGLES = "position_embeddings"  # the argument by which attention gets cosines and sines
NORMS = ("shared", "per head", "modules", "whole")  # kinds of norms of keys (surgery/architecture/families.py)


class Call(threading.local):
    """What a thread's call of an attention module has so far.

    Attributes:
        module: the attention module, or a replica of it that another device runs.
        hidden, vector: the layer's input [batch, n, hidden size] and its vectors [batch, n, rank].
        angles: the cosines and sines of RoPE, [1 or batch, n, width] each; None where nothing turns.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.module = self.hidden = self.vector = self.angles = None

    def __deepcopy__(self, memo) -> Call:
        return Call()

    def __reduce__(self):
        return Call, ()

    def vector_of(self, module, hidden: torch.Tensor) -> torch.Tensor:
        """The vectors of an input; keys and values of one call share them."""
        if self.hidden is not hidden:
            self.hidden, self.vector = hidden, getattr(self.module or module, VECTOR)(hidden)
        return self.vector


class Made(torch.nn.Module):
    """A projection of keys or values that reads the vectors.

    Args:
        module: the attention module.
        old: the projection in whose place it comes.
        rank: numbers in a vector.
    """

    def __init__(self, module, old, rank: int):
        super().__init__()
        self.of = (module,)  # in a tuple, so that it is no submodule
        self.up = _linear(rank, old.out_features, old, bias=old.bias is not None)
        self.train(old.training)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        (module,) = self.of
        return self.up(module.surgery_vectors.vector_of(module, hidden))


def _linear(inputs: int, outputs: int, like, bias: bool = False) -> torch.nn.Linear:
    """A linear map on the device, in the dtype and in the mode of another one."""
    weight = like.weight
    made = torch.nn.Linear(inputs, outputs, bias, device=weight.device, dtype=weight.dtype)
    return made.requires_grad_(weight.requires_grad).train(like.training)


def _begin(module, args, kwargs) -> None:
    """Forward pre-hook of an attention module: note the angles of this call."""
    call = module.surgery_vectors
    call.clear()
    angles = kwargs.get(ANGLES)
    if angles is None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
        place = names.index(ANGLES) if ANGLES in names else len(args)
        angles = args[place] if place < len(args) else None
    call.module, call.angles = module, angles


def _end(module, args, output) -> None:
    """Forward hook: hold no tensor of a call that is over."""
    module.surgery_vectors.clear()


class LayerVectors:
    """How the heads of one layer attend to the vectors of a cache.

    Args:
        head_dim, rotary, angles, norm: see the module's docstring.
    """

    def __init__(self, head_dim: int, rotary: int, angles: int, norm: list[str] | None):
        self.head_dim, self.rotary, self.angles, self.norm = head_dim, rotary, angles, norm

    def attend(self, module, kind: int, query, view: KeyValues, terms, scoring: Scoring, attend) -> torch.Tensor:
        """Attention of all heads; arguments as for `LayerPolicy.attend`."""
        store, new = view.store, view.new
        if not isinstance(store, VectorStore):  # no cache of ours: all keys and values are here
            return attend(query, view, terms)
        call, device = module.surgery_vectors, query.device
        store.add(call.vector, call.angles if self.angles else None)
        view, past = replace(view, store=None), store.seen - new
        if past == 0:
            return attend(query, view, terms)
        vectors = store.vectors(device)
        angles = tuple(each[:, :, :past] for each in store.angles(device)) if self.rotary else None
        call.hidden = call.vector = vectors[:, 0, :past]  # of which both projections make those of the past
        keys = torch.cat([self._keys(module, call.vector, angles), view.keys], dim=2)
        few = query.shape[2] <= _most_read(vectors.shape[-1], query, view.values)
        if few and is_plain(module.v_proj.up) and not is_hooked(module.v_proj):
            return _read(query, keys, vectors, module.v_proj.up, scoring, terms.sink)
        values = self._heads(module.v_proj(call.vector)).transpose(1, 2)
        return attend(query, replace(view, keys=keys, values=torch.cat([values, view.values], dim=2)), terms)

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [batch, n, heads * head_dim] as [batch, n, heads, head_dim]."""
        return rows.unflatten(-1, (-1, self.head_dim))

    def _keys(self, module, vectors: torch.Tensor, angles: tuple | None) -> torch.Tensor:
        """The keys [batch, KV heads, n, head_dim] of vectors [batch, n, rank], which the call has as its input, too.

        Args:
            angles: cosines and sines [batch, 1, n, width].
        """
        rows, (name, kind) = module.k_proj(vectors), self.norm or ("", "")
        if kind == "whole":
            rows = getattr(module, name)(rows)
        keys = self._heads(rows)
        if kind in ("shared", "per head"):
            keys = getattr(module, name)(keys)
        keys = keys.transpose(1, 2)
        if kind == "modules":
            keys = getattr(module, name)(keys)
        if angles is None:
            return keys
        turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
        turning, rest = keys[..., : self.rotary], keys[..., self.rotary :]
        _, turned = turn(turning[:, :0], turning, *(each[:, 0] for each in angles))
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _most_read(rank: int, query: torch.Tensor, values: torch.Tensor) -> int:
    """Up to so many queries, reading the vectors takes fewer products than making values, for any past.

    Never more than `FEW`: their scores of all keys exist at once.
    """
    heads, size, kv_heads = query.shape[1], query.shape[3], values.shape[1]
    more = rank - size  # products that a head of a query spends on each token beyond those with a value
    return min(FEW, kv_heads * rank * size // (heads * more)) if more > 0 else FEW


def _read(query, keys, vectors, up, scoring: Scoring, sink) -> torch.Tensor:
    """Causal attention of few queries, the last ones of all tokens, whose values are maps of the vectors.

    Args:
        query: [batch, heads, n, head_dim].
        keys: [batch, KV heads, N, head_dim].
        vectors: [batch, 1, N, rank].
        up: the map to the values of all KV heads.
        sink: [heads], logit of the base's learned sink; or None.

    Returns:
        [batch, heads, n, head_dim], zero for queries that see no key.
    """
    batch, heads, length, size = query.shape
    kv_heads, end = keys.shape[1:3]
    scores = (query * scoring.scale).reshape(batch, kv_heads, -1, size) @ keys.mT  # float16 holds no q.k unscaled
    scores = scores.view(batch, heads, length, end).to(torch.promote_types(scores.dtype, torch.float32))
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    seen = None
    if length > 1 or scoring.mask is not None:
        slots = torch.arange(end, device=query.device)
        seen = seen_keys(Visibility(), slots[end - length :], slots, scoring.mask, None, False)[:, None]
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sink is not None:
        column = sink.to(scores)[None, :, None, None].expand(batch, -1, length, 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    if seen is not None:
        weights = weights * seen.any(-1, keepdim=True)
    read = weights.to(vectors.dtype).flatten(1, 2)[:, None] @ vectors
    read = read.view(batch, kv_heads, -1, vectors.shape[-1])
    out = (read @ up.weight.view(kv_heads, size, -1).mT).view(query.shape)
    if up.bias is not None:
        of_heads = up.bias.view(kv_heads, 1, size).expand(-1, heads // kv_heads, -1).reshape(heads, 1, size)
        out = out + weights.sum(-1, keepdim=True).to(out.dtype) * of_heads
    return out


class LowRank(Part):
    """Keys and values that are made of vectors. An entry has `low_rank` (see the module's docstring)."""

    keys = ("low_rank",)

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        entry = layer["low_rank"]
        least = {"rank": 1, "head_dim": 1, "rotary": 0, "angles": 1}
        named = isinstance(entry, dict) and {"rank", "head_dim", "rotary"} <= {*entry} <= {*least, "norm", "wide"}
        if not named or not all(is_whole(entry[name], least[name]) for name in least if name in entry):
            return f"has low_rank {entry!r}; it names rank, head_dim, rotary, and perhaps angles, wide and norm"
        norm = entry.get("norm", ["", NORMS[0]])
        if not (isinstance(norm, list) and len(norm) == 2 and norm[1] in NORMS):
            return f"has a norm {norm!r} of low_rank; it is a name and one of {', '.join(NORMS)}"
        if others := sorted(used_parts(layer).keys() - {"low_rank"}):
            return f"has low_rank and {others[0]}, and keys that are made of vectors take no other change"
        return ""

    def visibilities(self, layer: dict, heads: list[Visibility]) -> list[Visibility]:
        return [replace(seen, keeper=VECTORS, rank=layer["low_rank"]["rank"]) for seen in heads]

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        if "low_rank" not in layer:  # the weights stay of low rank, and are cached as any others
            return
        entry = layer["low_rank"]
        if VECTOR not in module._modules:
            old = module.k_proj
            module.surgery_vectors = Call()
            module.add_module(VECTOR, _linear(old.in_features, entry["rank"], old))
            module.k_proj, module.v_proj = (Made(module, each, entry["rank"]) for each in (old, module.v_proj))
            module.surgery_modules = (VECTOR, UP)
            module.register_forward_pre_hook(_begin, with_kwargs=True)
            module.register_forward_hook(_end, always_call=True)
        own = entry["head_dim"], entry["rotary"], entry.get("angles", 0), entry.get("norm")
        module.surgery_keepers[VECTORS] = LayerVectors(*own)

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("vectors",)

    def kv_cost(self, layer: dict, heads: list[HeadCost]) -> list[HeadCost]:
        entry = layer["low_rank"]
        key_and_value = 2 * entry["head_dim"]
        made = [cost._replace(growing=entry["rank"] / (key_and_value * len(heads))) for cost in heads]
        if entry.get("wide"):
            beside = entry.get("angles", 0) * torch.float32.itemsize
            return [made[0]._replace(beside=beside / made[0].growing), *made[1:]]
        return [*made, HeadCost(entry.get("angles", 0) / key_and_value, readers=0)]

    def describe(self, layer: dict) -> tuple[str, str] | None:
        return "keys, values", f"made of {layer['low_rank']['rank']} numbers a token"

    def display_key(self, layer: dict):
        return layer.get("low_rank", {}).get("rank")


PART = LowRank()
