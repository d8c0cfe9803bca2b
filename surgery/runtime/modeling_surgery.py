"""The model class of a surgical checkpoint, made at load time from the class of its base.

`SurgeryLlamaForCausalLM` is `LlamaForCausalLM` with another attention function and another cache. Parameter names,
`generate`, peft and the rest of Transformers work on it as on the base (but see surgery_low_rank.py). The checkpoint
carries this file, the files that it imports, and the parts that the surgery uses. They import torch and transformers
alone. With `trust_remote_code=True` a checkpoint needs nothing else.

The other files:

    surgery_config.py      the config's `surgery` block, which describes the surgery; the registry of parts, each
                           of which describes itself (`Part`): a new term is a file, a line in `FILES` and a test
    surgery_visibility.py  which keys a head sees (`Visibility`), the kinds of heads of a layer, and the mask function
    surgery_attention.py   the attention function, and the path of one call through it
    surgery_cache.py       the cache of a model
    surgery_stores.py      the keys and values that the cache keeps: a store for each kind of head
    surgery_kv_policy.py   policies that drop keys: a method of KV eviction is one more file next to it

How a mask gets from `generate` to the attention function: `ATTENTION` is the name of the model's attention
implementation. `surgery_mask` and the attention function are registered under it below. Transformers looks up the mask
function by this name, and passes its result to every layer's call as `attention_mask`.

How the cache gets there: where the model would make a `DynamicCache`, the pre-hook `give_cache` passes a
`SurgeryCache` instead. (`generate` calls `_prepare_cache_for_generation` for this.) The cache's `update` returns views
of its stores, which the attention function gets in place of keys and values.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from functools import lru_cache
from pathlib import Path

import torch
import transformers

from .surgery_config import (
    CODE,
    ENTRY,
    FORMAT,
    NAME,
    PARTS,
    PER_LAYER,
    Part,
    depends_on_prompt,
    export_files,
    load_part,
    parts_of,
    per_layer_config,
    query_groups,
    used_parts,
    validate,
    version_fault,
)

if fault := version_fault():  # before names are imported that older versions lack
    raise ImportError(fault)

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from .surgery_attention import surgery_attention
from .surgery_cache import CACHE, SurgeryCache
from .surgery_visibility import head_kinds, surgery_mask

PREFIX = "Surgery"

# The process has one registry of attention functions, and other checkpoints may bring another copy or version of this
# code. The name contains a hash of the code, so that a model calls the functions it was loaded with.
_FILES = [file for name in CODE for file in sorted(Path(__file__).parent.glob(name))]
_CODE = __name__.encode() + b"".join(file.read_bytes() for file in _FILES)
ATTENTION = f"{NAME}_{hashlib.sha256(_CODE).hexdigest()[:12]}"
AttentionInterface.register(ATTENTION, surgery_attention)
AttentionMaskInterface.register(ATTENTION, surgery_mask)


def attention_modules(model) -> list:
    """The attention modules of a model, in the order of their layers."""
    modules = [m for m in model.modules() if "Attention" in type(m).__name__ and hasattr(m, "layer_idx")]
    return sorted(modules, key=lambda module: module.layer_idx)


def attach(model) -> None:
    """Give every attention module its heads' visibility, its shapes and its parts; add the hook `give_cache`."""
    kinds, (modules, layers) = head_kinds(model.config), _fitting(model)
    for module in modules:
        module.surgery_heads = kinds[module.layer_idx]
        layer = layers[module.layer_idx]
        for name, shape in layer.get("shapes", {}).items():
            _resize(model, module, name, torch.Size(shape))
        used, before = used_parts(layer), getattr(module, "surgery_parts", ())
        _register(module, layer, used)
        for name in PARTS:
            if name in used or name in before:  # a part that is no longer used undoes its own changes
                load_part(name).attach(module, layer, query_groups(model.config, layer))
        module.surgery_parts = tuple(used)
    for module in {model, model.base_model}:  # either may be called first, and then gives the cache
        if give_cache not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(give_cache, with_kwargs=True)


def _fitting(model) -> tuple[list, list[dict]]:
    """The attention modules of a model and the layers of its `surgery` block. Nothing is changed.

    Raises:
        ValueError: the block does not fit the model, or the model's attention would never call our function.
    """
    layers, modules = validate(model.config), attention_modules(model)
    layer_indices = [module.layer_idx for module in modules]
    if layer_indices != list(range(len(layers))):
        raise ValueError(
            f"the model has attention modules for layers {layer_indices}, the surgery block {len(layers)} layers"
        )
    for module, layer in zip(modules, layers, strict=True):
        if not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
            raise ValueError(f"{type(module).__name__} does not use Transformers' attention interface in this version")
        known = dict(module.named_parameters())
        if unknown := [name for name in layer.get("shapes", {}) if name not in known]:
            where = f"layer {module.layer_idx} of the surgery block"
            raise ValueError(f"{where} names {unknown[0]}, which {type(module).__name__} does not have")
    return modules, layers


def _resize(model, module, name: str, shape: torch.Size) -> None:
    """Give a parameter of an attention module the shape that its layer's entry names, before weights are loaded."""
    path, _, leaf = name.rpartition(".")
    owner, old = module.get_submodule(path), module.get_parameter(name)
    if old.shape == shape:
        return
    setattr(owner, leaf, torch.nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
    if leaf == "weight" and isinstance(owner, torch.nn.Linear):
        owner.out_features, owner.in_features = shape
    if not old.is_meta:
        model._init_weights(owner)


def _register(module, layer: dict, parts: dict[str, Part]) -> None:
    """Give an attention module the parameters that its entry in the surgery block names, with values that do nothing.

    A parameter that already exists with this shape keeps its values. `module.surgery_parameters` lists the parameters
    that have a row for each head, and says whether these are query heads or KV heads.
    """
    shapes = layer.get("parameters", {})
    known = {name: parameter for part in parts.values() for name, parameter in part.parameters.items()}
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    for name, shape in shapes.items():
        old = getattr(module, name, None)
        if old is None or tuple(old.shape) != tuple(shape):
            values = torch.full(shape, known[name].identity, dtype=like.dtype, device=like.device)
            module.register_parameter(name, torch.nn.Parameter(values))
    module.surgery_parameters = {name: known[name].rows for name in shapes if known[name].rows}
    module.surgery_corrections, module.surgery_keepers = {}, {}


def give_cache(module, args, kwargs):
    """Forward pre-hook: pass a `SurgeryCache` where the model would make a `DynamicCache`, and check a given cache.

    Raises:
        ValueError: the given cache cannot be used, attention weights are asked for, or another attention function was
            set on a part of the model.
    """
    if not module.config._attn_implementation.startswith(f"{NAME}_"):
        name = module.config._attn_implementation
        raise ValueError(f"attn_implementation={name!r} was set on a part of a surgical model: it undoes the surgery")
    # Some models consume this argument, and no model passes on its config's value: attention would not see either.
    weights = kwargs.get("output_attentions")
    if weights or (weights is None and getattr(module.config, "output_attentions", False)):
        raise ValueError("output_attentions is not supported by a surgical model: the weights are never held")
    if CACHE != "past_key_values" and "past_key_values" in kwargs:  # the old name, until Transformers drops it
        legacy_cache = kwargs["past_key_values"]
        kwargs = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        kwargs |= {CACHE: kwargs.get(CACHE) if kwargs.get(CACHE) is not None else legacy_cache}
    position = _cache_position(type(module))
    cache = args[position] if len(args) > position else kwargs.get(CACHE)
    if cache is not None:
        if isinstance(cache, SurgeryCache):  # as in every step: nothing else is asked
            cache.refuse_other(module.config)
            return args, kwargs
        own = any(part.in_own_cache(layer) for layer in validate(module.config) for part in used_parts(layer).values())
        refuse_cache(cache, own)
        if own or depends_on_prompt(module.config):
            raise ValueError(
                f"this surgery keeps in the model's own cache what it chose or found, and {type(cache).__name__} "
                "cannot hold it: leave the cache out"
            )
        return args, kwargs
    requested = kwargs.get("use_cache")
    if requested is None and module.training and torch.is_grad_enabled() and module.device.type != "meta":
        return args, kwargs | {"use_cache": False}  # Transformers detects packed rows only without a cache
    use_cache = module.config.use_cache if requested is None else requested
    checkpointing = module.training and getattr(module.base_model, "gradient_checkpointing", False)
    if not use_cache or checkpointing or len(args) > position:
        return args, kwargs
    return args, kwargs | {CACHE: SurgeryCache.of(module.config)}


@lru_cache
def _cache_position(cls) -> int:
    return list(inspect.signature(cls.forward).parameters).index(CACHE) - 1  # without self


def refuse_cache(cache, own: bool = False) -> None:
    """Raise a ValueError for a cache that would give wrong results.

    A plain `DynamicCache` gives right results, and saves no memory. Caches that keep keys in another form are refused.

    Args:
        own: the model works with its own cache alone.
    """
    if not isinstance(cache, (SurgeryCache, DynamicCache)) or "Quantized" in type(cache).__name__:
        raise ValueError(
            f"a surgical model keeps its own cache and cannot use {type(cache).__name__}: leave the cache out"
            + ("" if own else ", or pass a DynamicCache() (right results, no memory saved)")
        )
    if not isinstance(cache, SurgeryCache) and any(cache.is_sliding):
        raise ValueError(
            "a surgical model cannot use a cache that drops keys by the base's own window: leave the cache out, or "
            "pass DynamicCache() without a config"
        )


class SurgeryConfig(transformers.PreTrainedConfig):
    """The class that AutoConfig finds for `model_type: "surgery"`. It makes a config of the base's class, extended."""

    model_type = NAME

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        block = config_dict.get(NAME)
        base = block.get("base_model_type") if isinstance(block, dict) else None
        if base not in CONFIG_MAPPING:
            raise ValueError(f"the surgery block names the base model type {base!r}, which Transformers does not know")
        return _make(PREFIX + CONFIG_MAPPING[base].__name__).from_dict(config_dict, **kwargs)


class _ConfigMixin:
    """Added to the base's config class: `model_type` is the base's in memory, and "surgery" on disk."""

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return {**config_dict, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)

    def __post_init__(self, *args, **kwargs):
        kwargs.pop(PER_LAYER, None)  # the `surgery` block says it, and more
        super().__post_init__(*args, **kwargs)

    def to_diff_dict(self):
        written = {**super().to_diff_dict(), "model_type": NAME}
        try:
            layers = validate(self)
        except ValueError:  # printing calls this too; a model with such a block is neither made nor saved
            return written
        own = per_layer_config(layers, self.num_attention_heads, getattr(self, "num_key_value_heads", None))
        return written | ({PER_LAYER: own} if own else {})

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Save as Transformers does, and export the code that this surgery uses. Saving a model calls this, too."""
        parts = parts_of(validate(self))
        self.auto_map = auto_map(type(self).__name__, *(self.architectures or ()))
        super().save_pretrained(save_directory)
        export_files(parts, save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs):
        """Do nothing: Transformers would copy the code of a registered class as well, whether it is used or not."""


class _ModelMixin:
    """What a surgical model class adds to its base class."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs):
        """Do nothing: `_ConfigMixin.save_pretrained` decides which code is saved with a model."""

    def __init__(self, config, *args, **kwargs):
        if fault := version_fault(config):  # else the base's own code fails with a KeyError
            raise ValueError(fault)
        _refuse_attention(config._attn_implementation)  # asked for at load
        config._attn_implementation = ATTENTION  # config.json does not keep it
        super().__init__(config, *args, **kwargs)
        attach(self)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Load as Transformers does. Raise a ValueError where the file lacks a parameter of the surgery."""
        if sharding := [name for name in ("tp_plan", "tp_size", "device_mesh") if kwargs.get(name) is not None]:
            raise ValueError(f"{sharding[0]} cuts attention by heads, which would undo the surgery: use device_map")
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        own = {name for layer in model.config.surgery["layers"] for name in layer.get("parameters", {})}
        modules = {name for module in attention_modules(model) for name in getattr(module, "surgery_modules", ())}
        lost = (key for key in info["missing_keys"] if key.rpartition(".")[2] in own or modules & {*key.split(".")})
        if lost := sorted(lost):
            raise ValueError(f"{len(lost)} parameters of the surgery are not in the file, the first is {lost[0]}")
        return (model, info) if output_loading_info else model

    def set_attn_implementation(self, name, *args, **kwargs):
        _refuse_attention(name)
        return super().set_attn_implementation(ATTENTION, *args, **kwargs)

    def make_cache(self, **kwargs) -> SurgeryCache:
        """An empty cache for this model."""
        return SurgeryCache.of(self.config, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "offloaded"):
            raise ValueError(f"cache_implementation={kind!r} would undo the surgery: leave it out")
        user_cache, drafts = model_kwargs.get(CACHE), getattr(generation_config, "is_assistant", False)
        # A model that drafts for another one gets its cache back in every round. Of any other, an assisted generation
        # has ended, and what the cache recorded may go.
        if isinstance(user_cache, SurgeryCache) and not drafts:
            user_cache.stop_past_recording()
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE)
        if made is not None and made is not user_cache:
            ours = self.make_cache(offloading=kind == "offloaded")
            if drafts:
                ours.activate_past_recording()
            model_kwargs[CACHE] = ours
        return result

    def _assisted_decoding(self, *args, **kwargs):
        if depends_on_prompt(self.config):  # Transformers gives the prompt and the first speculated tokens in one call
            raise ValueError(
                "this surgery must know where a prompt ends and which call is one step, and assisted decoding hides "
                "it: leave assistant_model and prompt_lookup_num_tokens out (this model may assist another)"
            )
        return super()._assisted_decoding(*args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        raise ValueError("continuous batching uses a paged cache, which would undo the surgery; use generate")


def auto_map(config: str, *models: str) -> dict[str, str]:
    """The `auto_map` of a config.json, which says the class that each Auto class finds; takes surgical class names."""
    causal = {PREFIX + name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    kinds = {"AutoModelForCausalLM" if name in causal else "AutoModel": name for name in models if PREFIX in name}
    return {auto: f"{ENTRY}.{name}" for auto, name in {"AutoConfig": config, **kinds}.items()}


def _refuse_attention(name) -> None:
    """Raise a ValueError for an attention implementation other than ours, or another copy of this code's.

    A config may come from a model that ran another copy.
    """
    if name is not None and not str(name).startswith(f"{NAME}_"):
        raise ValueError(f"attn_implementation={name!r} would undo the surgery; this model has its own: leave it out")


def patch(model, block: dict) -> None:
    """Turn a loaded model, in place, into the surgical model that `from_pretrained` of its saved folder will give.

    Args:
        block: the `surgery` block without `format` and `base_model_type`. A model that is already surgical keeps
            what this block does not set, both in each layer's entry and in its own block.
    """
    config, base = model.config, type(model)
    is_stock = not hasattr(base, "make_cache")
    if not is_stock and not issubclass(base, _ModelMixin):
        raise ValueError("this model runs the code that came with its checkpoint: load it with surgery.load(FOLDER)")
    if is_stock:
        known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_MAPPING_NAMES.values()}
        if base.__name__ not in known or getattr(transformers, base.__name__, None) is not base:
            raise ValueError(f"{base.__name__} is not a causal language model of Transformers: it cannot be saved so")
        classes = _make(PREFIX + type(config).__name__), _make(PREFIX + base.__name__)
    before = getattr(config, NAME, None)
    merged = {**(before or {}), "format": FORMAT, "base_model_type": type(config).model_type, **block}
    if before and len(before["layers"]) == len(merged["layers"]):
        merged["layers"] = [_merged(old, new) for old, new in zip(before["layers"], merged["layers"], strict=True)]
    setattr(config, NAME, merged)
    try:
        _fitting(model)
    except ValueError:
        setattr(config, NAME, before) if before is not None else delattr(config, NAME)
        raise
    if is_stock:
        config.__class__, model.__class__ = classes
    config.architectures = [type(model).__name__]
    model.set_attn_implementation(ATTENTION)
    if config._attn_implementation != ATTENTION:
        raise ValueError(f"{base.__name__} does not take another attention function")
    attach(model)


def _merged(old: dict, new: dict) -> dict:
    """A layer's entry, updated by another surgery's entry. The parameters of both stay."""
    parameters = old.get("parameters", {}) | new.get("parameters", {})
    return old | new | ({"parameters": parameters} if parameters else {})


def _make(name: str):
    """The class `Surgery...`, made on first use from the Transformers class whose name follows the prefix."""
    if name in globals():
        return globals()[name]
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base, transformers.PreTrainedConfig):
        made = globals()[name] = type(name, (_ConfigMixin, base), {"__module__": __name__})
        for auto, mapping in ((AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING), (AutoModel, MODEL_MAPPING)):
            if base in mapping:
                auto.register(made, _make(PREFIX + mapping[base].__name__), exist_ok=True)
        return made
    attributes = {"__module__": __name__, "config_class": _make(PREFIX + base.config_class.__name__)}
    made = globals()[name] = type(name, (_ModelMixin, base), attributes)
    # Transformers renames tensors of some classes when it reads and writes them (GPT-NeoX's output layer), and looks
    # the renaming up by the name of the class. Renamings by `model_type` it finds in the base model inside.
    if (renamed := get_checkpoint_conversion_mapping(base.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, renamed, overwrite=True)  # another copy of this code did the same
    return made


def __getattr__(name: str):
    return _make(name)
