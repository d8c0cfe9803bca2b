"""The cache of a surgical checkpoint: one layer of stores for each layer of the model (see surgery_stores.py), and how
the model comes by it.
"""

from __future__ import annotations

import inspect
from functools import lru_cache

import torch
import transformers
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .surgery_block import NAME, head_kinds
from .surgery_heads import HeadKinds
from .surgery_stores import FullStore, RingStore

# Transformers renamed the forward's argument during 5.x.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"


class SurgeryLayer(CacheLayerMixin):
    """The cache of one layer: a store for each visibility that its KV heads have.

    Args:
        heads: the kinds of heads in the layer.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, heads: HeadKinds):
        super().__init__()
        self.heads = heads
        self.stores = [FullStore(v) if v.window is None else RingStore(v) for v in heads.visibilities]
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
        grad = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if grad and self.get_seq_length() and any(isinstance(store, RingStore) for store in self.stores):
            raise ValueError("gradients do not flow through a surgical cache: use torch.no_grad(), or one call")
        if not torch.is_inference_mode_enabled():  # tensors made in inference mode cannot be written outside it
            self.change(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
        new = zip(self.stores, self.heads.split_keys(key_states), self.heads.split_keys(value_states), strict=True)
        views = [store.append(keys, values, self.record_past) for store, keys, values in new]
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
        layers: the kinds of heads of each layer.
    """

    def __init__(self, layers: list[HeadKinds], offloading: bool = False):
        super().__init__(layers=[SurgeryLayer(heads) for heads in layers], offloading=offloading)
        self.fits: dict | None = None  # the last surgery block that was found to be of these heads

    @classmethod
    def of(cls, config, **kwargs) -> SurgeryCache:
        """The cache of a surgical model with this config."""
        cache = cls(head_kinds(config), **kwargs)
        cache.fits = config.surgery
        return cache

    def refuse_other(self, config) -> None:
        """Raise a ValueError if the heads of such a model are not split as they are here."""
        block = getattr(config, "surgery", None)
        if block is not self.fits:
            if [layer.heads.facts for layer in self.layers] != [heads.facts for heads in head_kinds(config)]:
                raise ValueError("this cache was made by a model whose heads are split otherwise: begin a new one")
            self.fits = block

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, in every layer or, if one cannot, in none."""
        count = -tokens_to_remove
        if not all(store.can_crop(count) for layer in self.layers for store in layer.stores):
            raise RuntimeError(
                f"crop({tokens_to_remove}) reaches tokens that left a window; call activate_past_recording() before "
                "the tokens that may be taken back"
            )
        super().crop(tokens_to_remove)

    def stop_past_recording(self) -> None:
        for layer in self.layers:
            layer.record_past = False

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


def give_cache(module, args, kwargs):
    """Forward pre-hook: where the model would make a `DynamicCache`, it gets ours; what it was given is checked.

    Raises:
        ValueError: this cache cannot be used, or another attention function was set behind the model's back.
    """
    if not module.config._attn_implementation.startswith(f"{NAME}_"):
        name = module.config._attn_implementation
        raise ValueError(f"attn_implementation={name!r} was set on a part of a surgical model: it undoes the surgery")
    # Some models take it for themselves, and none hands on what its config says: attention would not see it.
    weights = kwargs.get("output_attentions")
    if weights or (weights is None and getattr(module.config, "output_attentions", False)):
        raise ValueError("output_attentions is not supported by a surgical model: the weights are never held")
    if CACHE != "past_key_values" and "past_key_values" in kwargs:  # the old name, until Transformers drops it
        given = kwargs["past_key_values"]
        kwargs = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        kwargs |= {CACHE: kwargs.get(CACHE) if kwargs.get(CACHE) is not None else given}
    position = _cache_position(type(module))
    cache = args[position] if len(args) > position else kwargs.get(CACHE)
    if cache is not None:
        refuse_cache(cache)
        if isinstance(cache, SurgeryCache):
            cache.refuse_other(module.config)
        return args, kwargs
    asked = kwargs.get("use_cache")
    if asked is None and module.training and torch.is_grad_enabled():
        return args, kwargs | {"use_cache": False}  # packed rows are seen as such only without a cache
    use_cache = module.config.use_cache if asked is None else asked
    checkpointing = module.training and getattr(module.base_model, "gradient_checkpointing", False)
    if not use_cache or checkpointing or len(args) > position:
        return args, kwargs
    return args, kwargs | {CACHE: SurgeryCache.of(module.config)}


@lru_cache
def _cache_position(cls) -> int:
    return list(inspect.signature(cls.forward).parameters).index(CACHE) - 1  # without self


def refuse_cache(cache) -> None:
    """A plain `DynamicCache` gives right results without the saving; caches that keep keys in another form do not."""
    if not isinstance(cache, (SurgeryCache, DynamicCache)) or "Quantized" in type(cache).__name__:
        raise ValueError(
            f"a surgical model keeps its own cache and cannot use {type(cache).__name__}: leave the cache out, or "
            "pass a DynamicCache() (right results, no memory saved)"
        )
    if not isinstance(cache, SurgeryCache) and any(cache.is_sliding):
        raise ValueError(
            "a surgical model cannot use a cache that drops keys by the base's own window: leave the cache out, or "
            "pass DynamicCache() without a config"
        )
