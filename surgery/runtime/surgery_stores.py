"""What a surgical checkpoint's cache keeps: keys and values that no later query may see are not kept.

A full head keeps every key, in a buffer that grows by blocks. A head that sees sinks + window keeps the first real
tokens of each row and a ring of the last `window` slots. Keys are stored as attention made them, after RoPE, at the
position they were made at, and are never turned again.

Row r of a left-padded batch has `pad[r]` slots before its first real token: the token in slot j has position
j - pad[r]. Slots are the same for all rows, positions are not. The cache does not know the padding; the attention
function does, and asks for the sinks with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .surgery_heads import Visibility

GROWTH = 256  # slots by which a full head's buffer grows at least; a long one grows by 1/32 of its length


@dataclass
class KeyValues:
    """What the heads of one visibility attend to in one call.

    Attributes:
        keys, values: [batch, heads, n, head_dim]; the last `new` of them are of this call.
        ring: keys and values lie as in the store's ring (`store.slots()`), not in the order of their slots.
        end: one more than the newest slot.
        sink_keys, sink_values: [batch, heads, sinks, head_dim] by position; right after `settle_sinks`.
        incoming: keys and values of this call's tokens, where sinks may be among them.
        store: where the sinks are kept, if anywhere.
        whole: sinks and ring in one buffer, once both are full: all that an unpadded row's next query sees.
        read: where prefill was sparse, which keys were read of those seen (surgery_prefill.py); None: all.
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
    store: RingStore | None = None
    whole: tuple[torch.Tensor, torch.Tensor] | None = None
    read: Callable | None = None

    @property
    def start(self) -> int:
        """Slot of the first key, where slots are consecutive."""
        return self.end - self.keys.shape[2]

    def settle_sinks(self, pad: torch.Tensor | None) -> None:
        """Take those of the new tokens that are among their row's first real ones into the sinks.

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

    def __init__(self, visibility: Visibility):
        self.visibility = visibility
        self.reset()

    def reset(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.seen = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor, recording: bool) -> KeyValues:
        end = self.seen + keys.shape[2]
        if torch.is_grad_enabled() and self.tensors:  # training through a cache: nothing in place
            self.tensors = {
                "keys": torch.cat([self._used("keys"), keys], dim=2),
                "values": torch.cat([self._used("values"), values], dim=2),
            }
        else:
            for name, new in (("keys", keys), ("values", values)):
                self._reserve(name, new, end)
                self.tensors[name][:, :, self.seen : end] = new
        self.seen = end
        return KeyValues(self.visibility, self._used("keys"), self._used("values"), keys.shape[2], end)

    def _used(self, name: str) -> torch.Tensor:
        return self.tensors[name][:, :, : self.seen]

    def _reserve(self, name: str, like: torch.Tensor, end: int) -> None:
        old = self.tensors.get(name)
        if old is not None and old.shape[2] >= end:
            return
        room = end if old is None and end > GROWTH else end + max(GROWTH, end // 32)
        new = like.new_empty((*like.shape[:2], room, like.shape[3]))
        if old is not None:
            new[:, :, : self.seen] = old[:, :, : self.seen]
        self.tensors[name] = new

    def crop(self, count: int) -> None:
        self.seen = max(self.seen - count, 0)

    def can_crop(self, count: int) -> bool:
        return True


class RingStore:
    """Sinks by position, then the last `window` slots of some heads, slot s at index sinks + s % window."""

    def __init__(self, visibility: Visibility):
        self.visibility = visibility
        self.reset()

    def reset(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None  # recorded, not yet in the ring
        self.seen = 0  # slots in the ring's history

    def append(self, keys: torch.Tensor, values: torch.Tensor, recording: bool) -> KeyValues:
        sinks, window, new = self.visibility.sinks, self.visibility.window, keys.shape[2]
        if not self.tensors:
            shape = (*keys.shape[:2], sinks + window, keys.shape[3])
            self.tensors = {"keys": keys.new_zeros(shape), "values": values.new_zeros(shape)}
        training = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        if new == 1 and not recording and self.pending is None and not training:
            held = (self.tensors["keys"], self.tensors["values"])
            for tensor, one in zip(held, (keys, values), strict=True):
                tensor[:, :, sinks + self.seen % window] = one[:, :, 0].detach()
            self.seen += 1
            near = [tensor.narrow(2, sinks, window) for tensor in held]
            view = KeyValues(self.visibility, *near, 1, self.seen, ring=True)
            view.whole = held if self.seen >= sinks + window else None
        else:
            near = self._ordered(keys, values)
            end = self.seen + (self.pending[0].shape[2] if self.pending else 0) + new
            if recording:
                parts = zip(self.pending or (None, None), (keys, values), strict=True)
                self.pending = tuple(new if old is None else torch.cat([old, new], dim=2) for old, new in parts)
            else:
                self._flush()
                self._write(keys, values)
            reach = window - 1 + new
            view = KeyValues(self.visibility, *(part[:, :, -reach:] for part in near), new, end)
        view.sink_keys, view.sink_values = (self.tensors[name].narrow(2, 0, sinks) for name in ("keys", "values"))
        view.incoming, view.store = (keys, values), self
        return view

    def keep_sinks(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.tensors["keys"][:, :, : self.visibility.sinks] = keys.detach()
        self.tensors["values"][:, :, : self.visibility.sinks] = values.detach()

    def slots(self, device) -> torch.Tensor:
        """Slot of each index of the ring, -1 where nothing was written yet."""
        index = torch.arange(self.visibility.window, device=device)
        newest = self.seen - 1
        return (newest - (newest - index) % self.visibility.window).clamp(min=-1)

    def _index(self, first: int, end: int, device) -> torch.Tensor:
        return torch.arange(first, end, device=device) % self.visibility.window + self.visibility.sinks

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        new = keys.shape[2]
        kept = min(self.visibility.window, new)
        index = self._index(self.seen + new - kept, self.seen + new, keys.device)
        self.tensors["keys"].index_copy_(2, index, keys[:, :, new - kept :].detach())
        self.tensors["values"].index_copy_(2, index, values[:, :, new - kept :].detach())
        self.seen += new

    def _ordered(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The ring in order of slots, then what is pending, then the new ones."""
        if self.seen == 0 and not self.pending:
            return keys, values
        index = self._index(self.seen - min(self.seen, self.visibility.window), self.seen, keys.device)
        old = tuple(self.tensors[name].index_select(2, index) for name in ("keys", "values"))
        parts = [old, *([self.pending] if self.pending else []), (keys, values)]
        return tuple(torch.cat(part, dim=2) for part in zip(*parts, strict=True))

    def _flush(self) -> None:
        if self.pending:
            pending, self.pending = self.pending, None
            self._write(*pending)

    def crop(self, count: int) -> None:
        if self.pending:
            taken = min(count, self.pending[0].shape[2])
            left = self.pending[0].shape[2] - taken
            self.pending = tuple(part[:, :, :left] for part in self.pending) if left else None
            count -= taken
            self._flush()
        self.seen = max(self.seen - count, 0)

    def can_crop(self, count: int) -> bool:
        """Whether so many tokens can be taken back: recorded ones, or any while nothing has left the window."""
        pending = self.pending[0].shape[2] if self.pending else 0
        return count <= pending or self.seen <= self.visibility.window
