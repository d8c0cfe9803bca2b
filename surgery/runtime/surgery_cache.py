"""The cache of a surgical checkpoint: `SurgeryCache` for a model, with a `SurgeryLayer` for each layer.

A layer has a store for each visibility of its KV heads (surgery_stores.py). modeling_surgery.py makes a cache where
the caller gives none.
"""

from __future__ import annotations

import inspect

import torch
import transformers
from transformers.cache_utils import Cache, CacheLayerMixin

from .surgery_kept_store import store_of
from .surgery_stores import VectorStore
from .surgery_visibility import HeadKinds, head_kinds

# Transformers renamed the forward's argument during 5.x.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"


class SurgeryLayer(CacheLayerMixin):
    """The cache of one layer: a store for each visibility of its KV heads.

    Args:
        heads: the kinds of heads in the layer.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, heads: HeadKinds):
        super().__init__()
        self.heads = heads
        self.stores = [store_of(visibility) for visibility in heads.visibilities]
        self.record_past = False

    def lazy_initialization(self, key_states, value_states) -> None:
        self.is_initialized = True
        self.device = key_states.device

    def update(self, key_states, value_states, *args, **kwargs):
        """Store new keys and values [batch, KV heads, n, head_dim]. Gradients flow through those that are kept.

        Returns:
            The same list twice, in place of keys and values: a `KeyValues` for each visibility.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not torch.is_inference_mode_enabled():  # tensors made in inference mode cannot be written outside it
            self.change(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
        new = zip(self.stores, self.heads.split_keys(key_states), self.heads.split_keys(value_states), strict=True)
        views = [store.append(keys, values, self.record_past) for store, keys, values in new]
        for view, store in zip(views, self.stores, strict=True):
            view.prompt_slots = store.prompt_slots
        return views, views

    def get_seq_length(self) -> int:
        store = self.stores[0]
        pending = getattr(store, "pending", None)
        return store.seen + (pending[0].shape[2] if pending else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self, **kwargs) -> None:
        """Keep what `crop` may have to bring back. Newer Transformers name the states of recurrent layers to keep."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove")
        for store in self.stores:
            store.crop(-tokens_to_remove)
        end = self.get_seq_length()
        for store in self.stores:  # other tokens may come to the slots from `end` on
            noted = store.prompt_slots.items()
            store.prompt_slots = {name: slots.masked_fill(slots >= end, -1) for name, slots in noted}

    def reset(self) -> None:
        self.is_initialized = self.record_past = False
        for store in self.stores:
            store.reset()

    def change(self, function, moves: bool = False) -> None:
        """Replace every stored tensor by the function's result for it.

        Args:
            moves: the function moves tensors to another device; what other layers read stays where it is.
        """
        for store in self.stores:
            stays = store.shared if moves else ()
            store.tensors = {n: tensor if n in stays else function(tensor) for n, tensor in store.tensors.items()}
            store.prompt_slots = {name: function(slots) for name, slots in store.prompt_slots.items()}
            if getattr(store, "state", None):
                store.state = {name: function(tensor) for name, tensor in store.state.items()}
            if getattr(store, "archive", None):
                store.archive = store.archive.changed(function)
            if getattr(store, "pending", None):
                store.pending = tuple(function(tensor) for tensor in store.pending)

    def reorder_cache(self, beam_idx) -> None:
        self._move(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices) -> None:
        self._move(lambda tensor: tensor[indices, ...])

    def _move(self, function) -> None:
        """Give every stored tensor other rows. What was recorded of the old rows is accepted."""
        self.change(function)
        for store in self.stores:
            store.accept()

    def offload(self) -> None:
        self.change(lambda tensor: tensor.to("cpu", non_blocking=True), moves=True)

    def prefetch(self) -> None:
        if self.is_initialized:
            self.change(lambda tensor: tensor.to(self.device, non_blocking=True), moves=True)

    @property
    def nbytes(self) -> int:
        """Size of the stored tensors in bytes."""
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
        layers: the kinds of heads of each layer.
    """

    def __init__(self, layers: list[HeadKinds], offloading: bool = False):
        super().__init__(layers=[SurgeryLayer(heads) for heads in layers], offloading=offloading)
        of_vectors = [store for layer in self.layers for store in layer.stores if isinstance(store, VectorStore)]
        for store in of_vectors:
            store.of_cache = of_vectors
        self.fits: dict | None = None  # the last surgery block that was found to have these kinds of heads

    @classmethod
    def of(cls, config, **kwargs) -> SurgeryCache:
        """The cache of a surgical model with this config."""
        cache = cls(head_kinds(config), **kwargs)
        cache.fits = config.surgery
        return cache

    def refuse_other(self, config) -> None:
        """Raise a ValueError if a model with this config has other kinds of heads than this cache."""
        block = getattr(config, "surgery", None)
        if block is not self.fits:
            if [layer.heads.spec for layer in self.layers] != [heads.spec for heads in head_kinds(config)]:
                raise ValueError("this cache was made by a model whose heads are split otherwise: begin a new one")
            self.fits = block

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens from every layer.

        Raises:
            RuntimeError: a layer cannot remove them; then none does.
        """
        count = -tokens_to_remove
        if not all(store.can_crop(count) for layer in self.layers for store in layer.stores):
            raise RuntimeError(
                f"crop({tokens_to_remove}) reaches back to before a window moved on, or before keys were dropped or "
                "weighed; call activate_past_recording() before the tokens that may be taken back"
            )
        super().crop(tokens_to_remove)

    def stop_past_recording(self) -> None:
        for layer in self.layers:
            layer.record_past = False

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)
