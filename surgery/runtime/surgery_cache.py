"""The cache of a surgical checkpoint: keys and values that no later query may see are not kept.

A full head keeps every key, in a buffer that grows by blocks. A head that sees sinks + window keeps the first real
tokens of each row and a ring of the last `window` slots. Keys are stored as attention made them, after RoPE, at the
position they were made at, and are never turned again.

Row r of a left-padded batch has `pad[r]` slots before its first real token: the token in slot j has position
j - pad[r]. Slots are the same for all rows, positions are not. The cache does not know the padding; the attention
function does, and asks for the sinks with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 256  # slots by which a full head's buffer grows at least; a long one grows by 1/32 of its length


@dataclass(frozen=True)
class Visibility:
    """Which keys a query at position i sees: those j <= i with i - j < limit, and j < sinks or i - j < window.

    Attributes:
        window: None for a full head.
        limit: the base model's own sliding window in this layer, or None.
    """

    sinks: int = 0
    window: int | None = None
    limit: int | None = None

    def simplified(self) -> Visibility:
        """The same keys in the form that stores least: where the base's own window is narrower, it rules alone."""
        if self.limit is not None and (self.window is None or self.window >= self.limit):
            return Visibility(0, self.limit, None)
        return self


@dataclass
class KeyValues:
    """What the heads of one visibility attend to in one call.

    Attributes:
        keys, values: [batch, heads, n, head_dim]; the last `new` of them are of this call.
        slots: [n], the slot of each; -1 where a ring is still empty. None: consecutive, the last is the newest.
        end: one more than the newest slot.
        sink_keys, sink_values: [batch, heads, sinks, head_dim] by position, or None; right after `settle_sinks`.
        incoming: keys and values of this call's tokens, where sinks may be among them.
        store: where the sinks are kept, if anywhere.
    """

    visibility: Visibility
    keys: torch.Tensor
    values: torch.Tensor
    new: int
    end: int
    slots: torch.Tensor | None = None
    sink_keys: torch.Tensor | None = None
    sink_values: torch.Tensor | None = None
    incoming: tuple[torch.Tensor, torch.Tensor] | None = None
    store: RingStore | None = None

    @property
    def start(self) -> int:
        """Slot of the first key, where slots are consecutive."""
        return self.end - self.keys.shape[2]

    def settle_sinks(self, pad: torch.Tensor | None) -> None:
        """Take those of the new tokens that are among their row's first real ones into the sinks.

        Args:
            pad: [batch], slots before each row's first real token, or None for none.
        """
        count, (keys, values) = self.visibility.sinks, self.incoming
        first, device = self.end - self.new, keys.device
        if count == 0 or (pad is None and first >= count):
            return
        position = torch.arange(count, device=device).expand(keys.shape[0], -1)
        source = position - first if pad is None else position + pad[:, None] - first  # index among the new tokens
        arrived = ((source >= 0) & (source < self.new))[:, None, :, None]
        index = source.clamp(0, self.new - 1)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.sink_keys = torch.where(arrived, keys.gather(2, index), self.sink_keys)
        self.sink_values = torch.where(arrived, values.gather(2, index), self.sink_values)
        if self.store is not None:
            kept = {"sink_keys": self.sink_keys.detach(), "sink_values": self.sink_values.detach()}
            self.store.tensors |= kept


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
        if keys.requires_grad and self.tensors:  # training through a cache: nothing in place
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
    """Sinks by position, and the last `window` slots of some heads, slot s at index s % window."""

    def __init__(self, visibility: Visibility):
        self.visibility = visibility
        self.reset()

    def reset(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None  # recorded, not yet in the ring
        self.seen = 0  # slots in the ring's history

    def _create(self, like: torch.Tensor) -> None:
        for name, length in (("keys", self.visibility.window), ("sink_keys", self.visibility.sinks)):
            for kind in (name, name.replace("keys", "values")):
                self.tensors[kind] = like.new_zeros((*like.shape[:2], length, like.shape[3]))

    def append(self, keys: torch.Tensor, values: torch.Tensor, recording: bool) -> KeyValues:
        if not self.tensors:
            self._create(keys)
        new, window = keys.shape[2], self.visibility.window
        if new == 1 and not recording and self.pending is None:
            self._write(keys, values)
            slots = self._slots()
            view = KeyValues(self.visibility, self.tensors["keys"], self.tensors["values"], 1, self.seen, slots)
        else:
            near_keys, near_values = self._ordered(keys, values)
            end = self.seen + (self.pending[0].shape[2] if self.pending else 0) + new
            if recording:
                self.pending = tuple(
                    torch.cat([old, fresh], dim=2) if old is not None else fresh
                    for old, fresh in zip(self.pending or (None, None), (keys, values), strict=True)
                )
            else:
                self._flush()
                self._write(keys, values)
            reach = window - 1 + new
            view = KeyValues(self.visibility, near_keys[:, :, -reach:], near_values[:, :, -reach:], new, end)
        view.sink_keys, view.sink_values = self.tensors["sink_keys"], self.tensors["sink_values"]
        view.incoming, view.store = (keys, values), self
        return view

    def _slots(self) -> torch.Tensor:
        """Slot of each index of the ring, -1 where nothing was written yet."""
        index = torch.arange(self.visibility.window, device=self.tensors["keys"].device)
        newest = self.seen - 1
        slots = newest - (newest - index) % self.visibility.window
        return slots.clamp(min=-1)

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        window, new = self.visibility.window, keys.shape[2]
        kept = min(window, new)
        index = torch.arange(self.seen + new - kept, self.seen + new, device=keys.device) % window
        self.tensors["keys"].index_copy_(2, index, keys[:, :, new - kept :].detach())
        self.tensors["values"].index_copy_(2, index, values[:, :, new - kept :].detach())
        self.seen += new

    def _ordered(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ring in order of slots, then what is pending, then the new ones."""
        kept = min(self.seen, self.visibility.window)
        index = torch.arange(self.seen - kept, self.seen, device=keys.device) % self.visibility.window
        old = (self.tensors["keys"].index_select(2, index), self.tensors["values"].index_select(2, index))
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


class SurgeryLayer(CacheLayerMixin):
    """The cache of one layer: a store for each visibility that its KV heads have.

    Args:
        heads: (visibility, KV head numbers) of every kind of head in the layer.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, heads: list[tuple[Visibility, list[int]]]):
        super().__init__()
        self.heads = heads
        self.stores = [
            FullStore(visibility) if visibility.window is None else RingStore(visibility) for visibility, _ in heads
        ]
        self.record_past = False

    def lazy_initialization(self, key_states, value_states) -> None:
        self.is_initialized = True
        self.device = key_states.device

    def update(self, key_states, value_states, *args, **kwargs):
        """Store new keys and values [batch, KV heads, n, head_dim].

        Returns:
            One object twice, in place of keys and values: the list of `KeyValues`, one for each visibility.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        views = [
            store.append(select(key_states, numbers), select(value_states, numbers), self.record_past)
            for store, (_, numbers) in zip(self.stores, self.heads, strict=True)
        ]
        return views, views

    def get_seq_length(self) -> int:
        store = self.stores[0]
        pending = getattr(store, "pending", None)
        return store.seen + (pending[0].shape[2] if pending else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove")
        for store in self.stores:
            store.crop(-tokens_to_remove)

    def reset(self) -> None:
        self.is_initialized = self.record_past = False
        for store in self.stores:
            store.reset()

    def change(self, function) -> None:
        """Apply a function to every tensor that is held."""
        for store in self.stores:
            store.tensors = {name: function(tensor) for name, tensor in store.tensors.items()}
            if getattr(store, "pending", None):
                store.pending = tuple(function(tensor) for tensor in store.pending)

    def reorder_cache(self, beam_idx) -> None:
        self.change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices) -> None:
        self.change(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        self.change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.change(lambda tensor: tensor.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        self.change(count)
        return total


class SurgeryCache(Cache):
    """The cache that a surgical model makes for itself.

    Args:
        layers: for each layer the (visibility, KV head numbers) of its kinds of heads.
    """

    def __init__(self, layers: list[list[tuple[Visibility, list[int]]]], offloading: bool = False):
        super().__init__(layers=[SurgeryLayer(heads) for heads in layers], offloading=offloading)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, in every layer or, if one cannot, in none."""
        count = -tokens_to_remove
        if not all(store.can_crop(count) for layer in self.layers for store in layer.stores):
            raise RuntimeError(
                f"crop({tokens_to_remove}) reaches tokens that left a window; call activate_past_recording() before "
                "the tokens that may be taken back"
            )
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


def select(tensor: torch.Tensor, heads: list[int]) -> torch.Tensor:
    """Heads [batch, heads, ...] by number; no copy where they are neighbours."""
    if heads == list(range(heads[0], heads[0] + len(heads))):
        return tensor[:, heads[0] : heads[0] + len(heads)]
    return tensor[:, heads]
