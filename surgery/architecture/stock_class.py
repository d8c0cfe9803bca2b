"""A loaded model as a model of another stock family, in place: modules keep their parameters and hooks."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from surgery.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedConfig, PreTrainedModel

# A family that a surgery makes -> the families that it is made of.
BASES = {"deepseek_v3": ("llama", "mistral", "qwen2"), "ministral": ("llama", "mistral")}
OF_CLASS = ("_tp_plan", "_ep_plan", "_pp_plan", "_no_split_modules")  # what a model copies from its class
NOT_CARRIED = (
    "model_type", "architectures", "head_dim", "mlp_bias", "attention_bias", "transformers_version", "auto_map",
    "layer_types", "sliding_window", "use_sliding_window", "max_window_layers",
)  # fmt: skip
OF_SOURCE = ("_name_or_path", "_commit_hash")  # where a config was read from
FORWARDS = ("forward", "_old_forward")  # what a module holds itself where somebody wrapped it, as Accelerate does


def base_type_of(ours: str, base: str) -> str:
    """The `model_type` of the base that a result was made from: its own, unless a surgery changes the family.

    Args:
        ours: `model_type` of the result.
        base: `model_type` of the base in question.
    """
    return base if base in BASES.get(ours, ()) else ours


def refuse_other_class(model: PreTrainedModel, op: str) -> None:
    """Raise SurgeryError unless a model in memory is Transformers' causal model of its family."""
    kind = type(model)
    if not (kind.__module__.startswith("transformers.") and kind.__name__.endswith("ForCausalLM")):
        raise UnsupportedModelError(
            f"{op}: {kind.__name__} is not a causal model of Transformers, and the result is one",
            fix="load the model with AutoModelForCausalLM",
        )


def stock_config(config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    """The config of the family `fields["model_type"]`: the fields of `config`, changed as `fields` says."""
    from transformers import CONFIG_MAPPING

    old = {name: value for name, value in config.to_dict().items() if name not in NOT_CARRIED}
    made = CONFIG_MAPPING[fields["model_type"]](**(old | fields))
    vars(made).update({name: value for name, value in vars(config).items() if name in OF_SOURCE})
    return made


def set_fields(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    """Set fields of a config; one that has its value already stays untouched."""
    for name, value in fields.items():
        if getattr(config, name, None) != value:
            setattr(config, name, value)


def empty_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A causal model of a config, without memory, that calls attention as `model` does."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation)


def refuse_other_forward(model: PreTrainedModel, paths: Iterable[str]) -> None:
    """Raise SurgeryError if a module whose class will change has a forward that is not its class's, as far as is seen.

    Accelerate's hooks wrap the class's forward, and are kept.
    """
    for module in _changing(model, paths):
        for name in FORWARDS:
            own = vars(module).get(name)
            wrapped = name == "forward" and hasattr(module, "_old_forward")
            if own is not None and not wrapped and getattr(own, "__func__", None) is not type(module).forward:
                raise UnsupportedModelError(
                    f"the forward of a {type(module).__name__} was replaced, and the result has another class",
                    fix="convert the model before it is patched, or convert its folder",
                )


def _changing(model: PreTrainedModel, paths: Iterable[str]) -> list:
    return [model, model.base_model, *map(model.get_submodule, paths)]


def take_class(model: PreTrainedModel, stock: PreTrainedModel, paths: Iterable[str]) -> None:
    """Give a model the config and the classes of a stock model; `paths` are the submodules that change theirs, too."""
    paths = list(paths)
    for ours, made in ((model, stock), (model.base_model, stock.base_model)):
        vars(ours).update({name: value for name, value in vars(made).items() if name in OF_CLASS})
    for ours, made in zip(_changing(model, paths), _changing(stock, paths), strict=True):
        old, ours.__class__ = type(ours), type(made)
        for name in FORWARDS:  # a wrapper calls the forward of the class that it was made from
            if getattr(vars(ours).get(name), "__func__", None) is old.forward:
                setattr(ours, name, MethodType(type(made).forward, ours))
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = stock.config
