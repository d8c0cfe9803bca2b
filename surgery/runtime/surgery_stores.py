"""The stores of a layer's cache, which keep only the keys and values that a later query may see.

    Scoring     how the heads of a layer score keys in a call
    FullStore   full heads: every key, in a buffer that grows by blocks
    RingStore   heads that see sinks + window: a row's first real tokens and a ring of the last `window` slots
    KeptStore   full heads under a policy: the keys that stay, which differ among KV heads (surgery_kept_store.py)
    VectorStore the vectors of which all keys and values are made (surgery_low_rank.py)
    KeyValues   the view of a store that the attention function gets for one call, in place of keys and values

A method that drops keys needs no store of its own: it is a policy. The policy adds a call's keys to its store, all at
once or piece by piece (`KeptStore.add`), and says which stay (`KeptStore.select`). Keys are stored after RoPE, at
their original positions, and are never rotated again.

Row r of a left-padded batch has `pad[r]` slots before its first real token: the token in slot j has position
j - pad[r]. Slots are the same for all rows, positions are not. The cache does not know the padding. The attention
function knows it, and passes it to `KeyValues.settle_sinks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .surgery_visibility import Visibility

VECTORS = "vectors"  # the keeper that makes keys and values of vectors (surgery_low_rank.py)
GROWTH = 256  # a full head's buffer grows by at least this many slots; a long one grows by 1/32 of its length


class Scoring(NamedTuple):
    """How the heads of a layer score keys in a call.

    Attributes:
        mask: bool [batch, N], the slots of real tokens; None: all are real.
        pad: [batch], slots before each row's first real token, N for a row without one; None: none.
        scale, softcap: the factor on q.k, and the cap of the scores or None.
        sink: [heads], logit of the base's own learned sink, which takes its share after the corrections; or None.
    """

    mask: torch.Tensor | None
    pad: torch.Tensor | None
    scale: float
    softcap: float | None
    sink: torch.Tensor | None = None

    def positions(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        """The positions of the tokens in these slots, long [1 or batch, n]; -1 for padding."""
        slots = torch.arange(begin, end, device=device)[None]
        if self.mask is None:
            return slots
        return torch.where(self.mask[:, begin:end], slots - self.pad.long()[:, None], -1)


@dataclass
class KeyValues:
    """The keys and values that the heads of one visibility attend to in one call.

    Attributes:
        keys, values: [batch, heads, n, head_dim]; the last `new` of them are this call's, unless `ring`.
        ring: keys and values are in the order of the store's ring (`store.slots()`), not in the order of their slots.
        end: the newest slot + 1.
        sink_keys, sink_values: [batch, heads, sinks, head_dim] by position; valid after `settle_sinks`.
        incoming: keys and values of this call's tokens, which may contain sinks.
        store: the store that keeps the sinks, or from which a policy may drop keys, or None.
        slots: long [batch, heads, n], the slot of each key, -1 where there is no key; None: slots are consecutive.
        gaps: some slots are -1.
        archive: more keys of some heads of each row, which every query sees, a `surgery_kv_archive.Archive`; or None.
        sinks_and_ring: sinks and ring in one buffer, once both are full; an unpadded row's query sees exactly this.
        read: after sparse prefill, a function that says which keys were read (`Sparse.attend`); None: all seen keys.
        prompt_slots: what a part notes of the prompt for later calls, name -> int [batch, query heads, m], slots of
            the prompt's tokens, -1 where there is none. They live in the cache. None: the call has no cache of ours.
    """

    visibility: Visibility
    keys: torch.Tensor
    values: torch.Tensor
    new: int
    end: int
    ring: bool = False
    sink_keys: torch.Tensor | None = None
    sink_values: torch.Tensor | None = None
    incoming: tuple[torch.Tensor, torch.Tensor] | None = None
    store: RingStore | FullStore | None = None
    slots: torch.Tensor | None = None
    gaps: bool = False
    archive: Any = None
    sinks_and_ring: tuple[torch.Tensor, torch.Tensor] | None = None
    read: Callable | None = None
    prompt_slots: dict[str, torch.Tensor] | None = None

    @property
    def start(self) -> int:
        """Slot of the first key, where slots are consecutive."""
        return self.end - self.keys.shape[2]

    def settle_sinks(self, pad: torch.Tensor | None) -> None:
        """Copy the new tokens that are among their row's first real tokens into the sinks.

        Args:
            pad: [batch], slots before each row's first real token, or None for none.
        """
        count, (keys, values), first = self.visibility.sinks, self.incoming, self.end - self.new
        if count == 0 or (pad is None and first >= count):
            return
        if pad is None and first == 0 and self.new >= count:
            self.sink_keys, self.sink_values = keys[:, :, :count], values[:, :, :count]
        else:
            self._pick_sinks(count, first, pad)
        if self.store is not None:
            self.store.keep_sinks(self.sink_keys, self.sink_values)

    def _pick_sinks(self, count: int, first: int, pad: torch.Tensor | None) -> None:
        (keys, values), device = self.incoming, self.keys.device
        position = torch.arange(count, device=device).expand(keys.shape[0], -1)
        source = position - first if pad is None else position + pad[:, None] - first  # index among the new tokens
        arrived = ((source >= 0) & (source < self.new))[:, None, :, None]
        index = source.clamp(0, self.new - 1)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.sink_keys = torch.where(arrived, keys.gather(2, index), self.sink_keys)
        self.sink_values = torch.where(arrived, values.gather(2, index), self.sink_values)


def uncached(visibility: Visibility, keys: torch.Tensor, values: torch.Tensor) -> KeyValues:
    """The view of a call without a cache: every key is new, and the sinks are among them."""
    length = keys.shape[2]
    view = KeyValues(visibility, keys, values, length, length, incoming=(keys, values))
    if visibility.sinks:
        shape = (*keys.shape[:2], visibility.sinks, keys.shape[3])
        view.sink_keys, view.sink_values = keys.new_zeros(shape), values.new_zeros(shape)
    return view


class FullStore:
    """All keys of some heads, in a buffer that grows by blocks."""

    shared = ()  # names of tensors that other layers read, too

    def __init__(self, visibility: Visibility):
        self.visibility = visibility
        self.reset()

    def reset(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.prompt_slots: dict[str, torch.Tensor] = {}
        self.seen = self.stored = 0  # number of tokens that came, and of those in the buffer

    def append(self, keys: torch.Tensor, values: torch.Tensor, recording: bool) -> KeyValues:
        return self._append({"keys": keys, "values": values})

    def _append(self, added: dict[str, torch.Tensor]) -> KeyValues:
        """Append tensors [batch, heads, n, ...] to the stored tensors of the same names."""
        new = self._store(added)
        return KeyValues(self.visibility, self._used("keys"), self._used("values"), new, self.seen)

    def _store(self, added: dict[str, torch.Tensor]) -> int:
        """Append tensors as `_append` does; returns the number of new tokens."""
        new = added["keys"].shape[2]
        end = self.stored + new
        if torch.is_grad_enabled() and self.tensors:  # training through a cache: nothing is changed in place
            self.tensors = {name: torch.cat([self._used(name), tensor], dim=2) for name, tensor in added.items()}
        else:
            for name, tensor in added.items():
                self._reserve(name, tensor, end)
                self.tensors[name][:, :, self.stored : end] = tensor
        self.seen, self.stored = self.seen + new, end
        return new

    def _used(self, name: str) -> torch.Tensor:
        return self.tensors[name][:, :, : self.stored]

    def _reserve(self, name: str, like: torch.Tensor, end: int) -> None:
        old = self.tensors.get(name)
        if old is not None and old.shape[2] >= end:
            return
        room = end if old is None and end > GROWTH else end + self._spare(end)
        new = like.new_empty((*like.shape[:2], room, *like.shape[3:]))
        if old is not None:
            new[:, :, : self.stored] = old[:, :, : self.stored]
        self.tensors[name] = new

    def _spare(self, length: int) -> int:
        return spare(length)

    def crop(self, count: int) -> None:
        self.seen, self.stored = max(self.seen - count, 0), max(self.stored - count, 0)

    def can_crop(self, count: int) -> bool:
        return True

    def accept(self) -> None:
        """Forget how recorded tokens could be removed."""


class VectorStore(FullStore):
    """The vectors of all tokens, of which the keys and values of a layer are made.

    Tokens are turned by the same angles in every layer, so that one store of a cache keeps them for all.

    Attributes:
        of_cache: the stores of this kind in the cache, in the order of its layers.
    """

    shared = ("cos", "sin")

    def __init__(self, visibility: Visibility):
        super().__init__(visibility)
        self.of_cache = [self]

    def append(self, keys: torch.Tensor, values: torch.Tensor, recording: bool) -> KeyValues:
        """The new keys and values alone: the keeper stores their vectors."""
        new = keys.shape[2]
        return KeyValues(self.visibility, keys, values, new, self.seen + new, store=self)

    def add(self, vectors: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Store the vectors [batch, n, rank] of new tokens.

        Args:
            angles: the cosines and sines [1 or batch, n, width] by which they are turned; None: another store has
                them, or nothing is turned.
        """
        added = {"keys": vectors[:, None]}
        for name, each in zip(("cos", "sin"), angles or (), strict=False):
            added[name] = each.expand(len(vectors), -1, -1)[:, None]
        if self.tensors:  # a cache that offloads has sent the vectors away
            added = {name: tensor.to(self.tensors[name].device) for name, tensor in added.items()}
        self._store(added)

    def vectors(self, device) -> torch.Tensor:
        """All vectors, [batch, 1, N, rank]."""
        return self._used("keys").to(device)

    def angles(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and sines of all tokens, [batch, 1, N, width]."""
        keeper = next(store for store in self.of_cache if "cos" in store.tensors)
        cos, sin = (keeper._used(name).to(device) for name in ("cos", "sin"))
        return cos, sin


def spare(length: int) -> int:
    """The number of spare slots that a buffer of this length gets when it grows."""
    return max(GROWTH, length // 32)


def rows_at(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor [batch, heads, N, ...] at index, long [batch, heads, m]: [batch, heads, m, ...].

    `gather` looks up every number; here whole rows are copied, in less time. Every index must be one of a row: not all
    others are refused.
    """
    (count, heads, length, *_), size = tensor.shape, tensor.shape[-1]
    across, along, step, *rest = tensor.stride()
    across, along = across * (count > 1), along * (heads > 1)  # the stride of a single row means nothing
    if _tracked(tensor) or rest != [1] or step != size or across % size or along % size:
        where = index.reshape(*index.shape, *[1] * (tensor.dim() - 3)).expand(*index.shape, *tensor.shape[3:])
        return tensor.gather(2, where)
    across, along = across // size, along // size
    rows = tensor.as_strided(((count - 1) * across + (heads - 1) * along + length, size), (size, 1))
    batch, head = (torch.arange(many, device=index.device) for many in (count, heads))
    first = batch[:, None] * across + head * along  # the row of each head's first token
    return rows.index_select(0, (first[..., None] + index).flatten()).view(*index.shape, size)


def _tracked(*tensors: torch.Tensor) -> bool:
    """Whether gradients flow through these tensors; if so, they must not be changed in place."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class RingStore:
    """The sinks of some heads by position, then their last `window` slots; slot s is at index sinks + s % window."""

    shared = ()

    def __init__(self, visibility: Visibility):
        self.visibility = visibility
        self.reset()

    def reset(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.prompt_slots: dict[str, torch.Tensor] = {}
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None  # recorded, not yet in the ring
        self.seen = 0  # number of slots that were written to the ring

    def append(self, keys: torch.Tensor, values: torch.Tensor, recording: bool) -> KeyValues:
        sinks, window, new = self.visibility.sinks, self.visibility.window, keys.shape[2]
        if not self.tensors:
            shape = (*keys.shape[:2], sinks + window, keys.shape[3])
            self.tensors = {"keys": keys.new_zeros(shape), "values": values.new_zeros(shape)}
        training = _tracked(keys, values, *self.tensors.values())
        if not training:  # tensors that a graph holds must not be changed
            self.tensors = {n: t.detach().clone() if t.requires_grad else t for n, t in self.tensors.items()}
        if new == 1 and not recording and self.pending is None and not training:
            buffers = (self.tensors["keys"], self.tensors["values"])
            for tensor, one in zip(buffers, (keys, values), strict=True):
                tensor[:, :, sinks + self.seen % window] = one[:, :, 0]
            self.seen += 1
            near = [tensor.narrow(2, sinks, window) for tensor in buffers]
            view = KeyValues(self.visibility, *near, 1, self.seen, ring=True)
            view.sinks_and_ring = buffers if self.seen >= sinks + window else None
        else:
            near = self._ordered(keys, values)
            end = self.seen + (self.pending[0].shape[2] if self.pending else 0) + new
            if recording:
                pairs = zip(self.pending or (None, None), (keys, values), strict=True)
                self.pending = tuple(new if old is None else torch.cat([old, new], dim=2) for old, new in pairs)
            else:
                self._flush()
                self._write(keys, values)
            reach = window - 1 + new
            view = KeyValues(self.visibility, *(tensor[:, :, -reach:] for tensor in near), new, end)
        view.sink_keys, view.sink_values = (self.tensors[name].narrow(2, 0, sinks) for name in ("keys", "values"))
        view.incoming, view.store = (keys, values), self
        return view

    def keep_sinks(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        count = self.visibility.sinks
        for name, sinks in (("keys", keys), ("values", values)):
            if _tracked(keys, values):
                self.tensors[name] = torch.cat([sinks, self.tensors[name][:, :, count:]], dim=2)
            else:
                self.tensors[name][:, :, :count] = sinks

    def slots(self, device) -> torch.Tensor:
        """The slot at each index of the ring, -1 where nothing was written yet."""
        index = torch.arange(self.visibility.window, device=device)
        newest = self.seen - 1
        return (newest - (newest - index) % self.visibility.window).clamp(min=-1)

    def _index(self, first: int, end: int, device) -> torch.Tensor:
        return torch.arange(first, end, device=device) % self.visibility.window + self.visibility.sinks

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        new = keys.shape[2]
        count = min(self.visibility.window, new)
        index = self._index(self.seen + new - count, self.seen + new, keys.device)
        for name, tensor in (("keys", keys), ("values", values)):
            newest = tensor[:, :, new - count :]
            if _tracked(keys, values, self.tensors[name]):
                self.tensors[name] = self.tensors[name].index_copy(2, index, newest)
            else:
                self.tensors[name].index_copy_(2, index, newest)
        self.seen += new

    def _ordered(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The ring's keys and values in order of slots, then the pending ones, then the new ones."""
        if self.seen == 0 and not self.pending:
            return keys, values
        index = self._index(self.seen - min(self.seen, self.visibility.window), self.seen, keys.device)
        old = tuple(self.tensors[name].index_select(2, index) for name in ("keys", "values"))
        chunks = [old, *([self.pending] if self.pending else []), (keys, values)]
        return tuple(torch.cat(tensors, dim=2) for tensors in zip(*chunks, strict=True))

    def _flush(self) -> None:
        if self.pending:
            pending, self.pending = self.pending, None
            self._write(*pending)

    def crop(self, count: int) -> None:
        if self.pending:
            taken = min(count, self.pending[0].shape[2])
            left = self.pending[0].shape[2] - taken
            self.pending = tuple(tensor[:, :, :left] for tensor in self.pending) if left else None
            count -= taken
            self._flush()
        self.seen = max(self.seen - count, 0)

    def can_crop(self, count: int) -> bool:
        """Whether `count` tokens can be removed: recorded ones can, and any while no token has left the window."""
        pending = self.pending[0].shape[2] if self.pending else 0
        return count <= pending or self.seen <= self.visibility.window

    def accept(self) -> None:
        """Forget nothing: recorded tokens wait for `crop`, or for a call that is not recorded."""
