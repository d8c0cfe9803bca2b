"""The store of full heads under a policy (surgery_kv_policy.py): the keys that stay, which differ among KV heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .surgery_stores import VECTORS, FullStore, KeyValues, RingStore, VectorStore, rows_at, spare
from .surgery_visibility import Visibility

READER = "read"  # the keeper that chooses what is read (surgery_kv_read.py)
RESERVED = ("keys", "values", "slots")  # names of a store's own tensors


def store_of(visibility: Visibility) -> FullStore | RingStore | KeptStore | VectorStore:
    """An empty store for the heads of one visibility."""
    if visibility.window is not None:
        return RingStore(visibility)
    if visibility.keeper == VECTORS:
        return VectorStore(visibility)
    return KeptStore(visibility) if visibility.keeper else FullStore(visibility)


class _Past(NamedTuple):
    """What a `KeptStore` held before a call, and how to add the first tokens of that call again."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    archive: Any
    stored: int
    seen: int
    settled: int
    gaps: bool
    replay: Callable[[int], None]


class KeptStore(FullStore):
    """The keys of some heads that a policy keeps, which may differ from KV head to KV head, with their slots.

    Until a key is dropped, slots are consecutive and are not stored. The tokens since the last drop are the last ones
    of every row and KV head, in order. So these tokens can be removed again (`crop`). Tokens of earlier calls can be,
    too, while the cache records them: `past` then has what the store held before each of these calls.

    Attributes:
        state: what a policy or a reader remembers of each row, name -> [batch, ...]. A policy's is never changed in
            place. Tokens that are removed take a reader's away.
        archive: what KV heads that keep every key hold beside the table, a `surgery_kv_archive.Archive`, or None.
    """

    def reset(self) -> None:
        super().reset()
        self.settled = 0  # number of tokens that had come when the policy last dropped or noted something
        self.gaps = False  # some KV heads keep fewer keys than others, and have slots of -1 for the rest
        self.recording = False  # whether this call's tokens may be removed again
        self.past: list[_Past] = []
        self.state: dict[str, torch.Tensor] = {}
        self.archive: Any = None

    def append(self, keys: torch.Tensor, values: torch.Tensor, recording: bool) -> KeyValues:
        """The new keys alone: the policy stores them."""
        self.recording = recording
        self.past = self.past if recording else []
        new = keys.shape[2]
        return KeyValues(self.visibility, keys, values, new, self.seen + new, store=self)

    def add(self, keys: torch.Tensor, values: torch.Tensor, **notes: torch.Tensor) -> KeyValues:
        """Store new keys and values, and notes on them. Returns the view of all that is stored."""
        added = {"keys": keys, "values": values, **notes}
        if "slots" in self.tensors:
            slots = torch.arange(self.seen, self.seen + keys.shape[2], dtype=torch.int32, device=keys.device)
            added["slots"] = slots.expand(*keys.shape[:2], -1)
        without = {name: old for name, old in self.notes.items() if name not in added}
        added |= {name: old.new_zeros(*keys.shape[:3], *old.shape[3:]) for name, old in without.items()}
        view = self._append(added)
        if "slots" in added:
            view.slots, view.gaps = self._used("slots").long(), self.gaps
        view.archive = self.archive if self.archive is not None and self.archive.length else None
        view.store = self
        return view

    def _spare(self, length: int) -> int:
        most = self.visibility.most
        return super()._spare(length) if most is None or length > most else min(super()._spare(length), most - length)

    def remember(self, replay: Callable[[int], None]) -> None:
        """Keep what is stored now, before the keys of a call are added that may be removed again.

        Args:
            replay: adds the call's first tokens, so many, as the call does.
        """
        held = dict(self.tensors), dict(self.state), self.archive, self.stored, self.seen, self.settled, self.gaps
        self.past.append(_Past(*held, replay))

    @contextmanager
    def on(self, device) -> Iterator[None]:
        """Hold the stored tensors on a device during a call: a cache that offloads has sent them away before it."""
        home = next((tensor.device for tensor in self.tensors.values()), device)
        self._move(device)
        try:
            yield
        finally:
            self._move(home)

    def _move(self, device) -> None:
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        self.state = {name: tensor.to(device) for name, tensor in self.state.items()}
        if self.archive is not None:
            self.archive = self.archive.changed(lambda tensor: tensor.to(device))

    @property
    def notes(self) -> dict[str, torch.Tensor]:
        """A policy's notes on the stored keys: name -> [batch, KV heads, stored, ...], 0 for new keys."""
        return {name: self._used(name) for name in self.tensors if name not in RESERVED}

    def forget_notes(self) -> None:
        """Drop every note and its memory."""
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in RESERVED}

    def note(self, notes: dict[str, torch.Tensor]) -> None:
        """Replace the notes of the same names. A key's notes are dropped with the key.

        Raises:
            ValueError: a note does not have a value for each stored key, or has the name of one of the store's
            tensors.
        """
        memory = {tensor.untyped_storage().data_ptr() for tensor in self.tensors.values()}
        changed = {}
        for name, noted in notes.items():
            if noted.shape[:3] != self._used("keys").shape[:3]:
                wanted = list(self._used("keys").shape[:3])
                raise ValueError(f"a policy's note {name!r} is {list(noted.shape)}, and begins with {wanted}")
            if name in RESERVED:
                raise ValueError(f"a policy's note may not be called {name!r}: the cache holds {', '.join(RESERVED)}")
            shown = self._used(name) if name in self.tensors else None
            same = shown is not None and (noted.data_ptr(), noted.stride()) == (shown.data_ptr(), shown.stride())
            if not (same and noted.shape == shown.shape and noted.dtype == shown.dtype):
                shared = noted.untyped_storage().data_ptr() in memory  # a view of a note, or another note
                changed[name] = noted.clone() if shared else noted
        for name, noted in changed.items():
            old = self.tensors.get(name)
            if old is None or (old.dtype, old.shape[3:]) != (noted.dtype, noted.shape[3:]) or self._is_fixed:
                self.tensors[name] = noted
            else:
                old[:, :, : self.stored] = noted

    @property
    def _is_fixed(self) -> bool:
        """Whether stored tensors may not be changed in place: a graph or an earlier state of the store needs them."""
        return bool(self.past) or torch.is_grad_enabled()

    def table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stored keys, values and slots, [batch, KV heads, stored, ...]. From here on slots are stored."""
        keys = self._used("keys")
        if "slots" not in self.tensors:
            slots = torch.arange(self.stored, dtype=torch.int32, device=keys.device)
            self.tensors["slots"] = slots.repeat(*keys.shape[:2], 1)
        return keys, self._used("values"), self._used("slots")

    def select(self, stays: torch.Tensor) -> None:
        """Drop keys and free their memory.

        Args:
            stays: the stored keys that stay, bool [batch, KV heads, stored] or indices [batch, KV heads, m].
        """
        short = None
        if stays.dtype == torch.bool:
            real = self._used("slots") >= 0 if "slots" in self.tensors else torch.ones_like(stays)
            if bool((stays | ~real).all()):
                return
            stays = stays & real
            counts = stays.sum(-1, keepdim=True)
            index = stays.int().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())]
            short = torch.arange(index.shape[-1], device=index.device) >= counts
        else:
            index = stays.sort(dim=-1).values
        self.table()
        for name in self.tensors:
            old = self._used(name)
            kept = rows_at(old, index)
            if name == "slots" and short is not None:
                kept = kept.masked_fill(short, -1)
                self.gaps = bool((kept < 0).any())
            self._put(name, kept)
        self.stored, self.settled = index.shape[-1], self.seen
        if short is None:
            self.gaps = bool((self._used("slots") < 0).any())

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        """Write the remaining tensor into the buffer, or replace the buffer where it is far longer."""
        buffer, length = self.tensors[name], tensor.shape[2]
        if buffer.shape[2] - length <= max(spare(length), (self.visibility.most or 0) - length) and not self._is_fixed:
            buffer[:, :, :length] = tensor
        else:
            self.tensors[name] = tensor

    def crop(self, count: int) -> None:
        end = self.seen - count
        while self.past and self.seen > end:
            past = self.past.pop()
            self.tensors, self.state, self.archive, self.stored, self.seen, self.settled, self.gaps = past[:-1]
            if self.seen < end:
                past.replay(end - self.seen)
        self.accept()
        if count and self.visibility.keeper == READER:
            self.state = {}
        super().crop(self.seen - end)
        if not self.seen:
            self.reset()

    def accept(self) -> None:
        self.past = []

    def can_crop(self, count: int) -> bool:
        """Whether `count` tokens can be removed: recorded ones, and those since the policy last did something."""
        return self.seen - count >= (self.past[0] if self.past else self).settled
