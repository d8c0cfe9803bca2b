"""Writes new attention weights into a loaded model: parameters, attributes, config."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.layer import LayerAnatomy, query_names
from surgery.architecture.sliding import WINDOWS, refuse_windows, write_windows
from surgery.architecture.stock_class import set_fields
from surgery.architecture.surgery_block import layer_entries
from surgery.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.layer import LayerAnatomy


def kept_heads(old: LayerAnatomy, new: LayerAnatomy) -> tuple[list[int], list[int]]:
    """The earlier indices of the query heads and the KV heads that a layer has now; heads are identified by the base's
    numbers.
    """
    queries, kv_heads = query_names(old), [old.kv_name(head) for head in range(old.kv_heads)]
    return (
        [queries.index(name) for name in query_names(new)],
        [kv_heads.index(new.kv_name(head)) for head in range(new.kv_heads)],
    )


def write_layers(
    model, before: Anatomy, after: Anatomy, results: list[dict[str, Tensor]], surgical: bool = False
) -> None:
    """Put new attention tensors in a loaded model: parameters, attributes, config, and the `surgery` block if any.

    Args:
        results: the result of `pack` for each layer.
        surgical: make the model a surgical one even if a stock config can describe it.
    """
    slides = [layer.window for layer in before.layers] != [layer.window for layer in after.layers]
    if slides:
        refuse_windows(model, after)
    for old, new, tensors in zip(before.layers, after.layers, results, strict=True):
        module = model.get_submodule(old.path)
        for name in set(old.tensor_names) - set(new.tensor_names):
            _drop_norm(module, name)
        for name, tensor in tensors.items():
            _assign(module, name, tensor)
        _keep_terms(module, old, new)
        _set_head_numbers(module, new, after.edits)
    if slides:
        write_windows(model, after)
    else:
        # Not `before.config`: an earlier step may have made another one.
        set_fields(model.config.get_text_config(), after.edits)
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in results]
    if entries := layer_entries(after, shapes, needed=surgical):
        from surgery.runtime.modeling_surgery import patch

        patch(model, {"layers": entries})


def own_config(model) -> None:
    """Give a model its own copy of its config, because another model may have been made from the same object."""
    memo: dict = {}
    for module in model.modules():
        if _is_config(getattr(module, "config", None)):
            module.config = deepcopy(module.config, memo)


def snapshot(model, weights: Iterable[Tensor] = ()) -> Callable[[], None]:
    """Remember the state of a model: classes, modules, parameters and which of them train, hooks and configs.

    Args:
        weights: parameters whose values are copied; no other weight is.

    Returns:
        A function that restores this state. Other tensors whose values were changed in place stay changed. Dicts and
        lists are filled again, not replaced: a hook's handle removes the hook from the dict that it knows.
    """
    values = [(weight, weight.detach().clone()) for weight in {id(each): each for each in weights}.values()]
    trains = [(weight, weight.requires_grad) for weight in model.parameters()]
    modules = [(module, type(module), _remembered(vars(module))) for module in model.modules()]
    known = {id(module.config): module.config for module, *_ in modules if hasattr(module, "config")}
    inner = {id(value): value for config in known.values() for value in vars(config).values() if _is_config(value)}
    configs = [(config, type(config), _remembered(vars(config))) for config in {**known, **inner}.values()]

    def restore() -> None:
        for owner, cls, refill in (*modules, *configs):
            owner.__class__ = cls
            refill()
        for weight, value in values:
            weight.data.copy_(value)
        for weight, asked in trains:
            if weight.requires_grad != asked:  # a weight made in inference mode takes no other
                weight.requires_grad_(asked)

    return restore


def _remembered(value) -> Callable[[], Any]:
    """A function that fills a dict or a list with what it holds now, and those inside it, and returns it.

    Other values are returned as they are.
    """
    if type(value) in (dict, OrderedDict, defaultdict):  # others, as a model's output, may refuse to be filled
        entries = {name: _remembered(inner) for name, inner in value.items()}

        def fill():
            held = {name: inner() for name, inner in entries.items()}
            value.clear()
            value.update(held)
            return value

        return fill
    if type(value) is list:
        items = list(map(_remembered, value))

        def fill_list():
            value[:] = [inner() for inner in items]
            return value

        return fill_list
    return lambda: value


def _is_config(value) -> bool:
    return hasattr(value, "to_diff_dict") and hasattr(value, "model_type")


def refuse_non_finite(tensors: dict[str, Tensor], path: str) -> None:
    """Raise SurgeryError if a tensor of the layer at `path` holds NaN or infinity. A meta tensor has no values."""
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.numel():
            continue
        if not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN if any value is
            raise ModelError(
                f"{path}.{name} holds NaN or infinite values",
                fix="the base checkpoint is damaged: download it again",
            )


def _assign(module, name: str, tensor: Tensor) -> None:
    """Replace a parameter by a tensor; device and `requires_grad` stay the same."""
    from torch import nn

    owner_path, _, leaf = name.rpartition(".")
    owner = _norm_module(module, owner_path)
    old = getattr(owner, leaf)
    if tensor.shape == old.shape:
        old.data.copy_(tensor)
        return
    setattr(owner, leaf, nn.Parameter(tensor.to(old.device), requires_grad=old.requires_grad))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
    elif hasattr(owner, "nf"):  # Conv1D
        owner.nx, owner.nf = owner.weight.shape


def _keep_terms(module, old: LayerAnatomy, new: LayerAnatomy) -> None:
    """Reduce the parameters that a surgery added to a module to the rows of the heads that stay."""
    from torch import nn

    rows_of = getattr(module, "surgery_parameters", {})
    if not rows_of or old == new:
        return
    from surgery.runtime.surgery_config import KV_HEADS

    queries, kv_heads = kept_heads(old, new)
    for name, heads in rows_of.items():
        parameter = getattr(module, name)
        rows = parameter.detach()[kv_heads if heads == KV_HEADS else queries].clone()
        setattr(module, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def _norm_module(module, path: str):
    """The submodule at a path. A list of per-head norms is first extended with copies of its last norm if needed."""
    from copy import deepcopy

    owner_path, _, leaf = path.rpartition(".")
    if leaf.isdigit():
        norms = module.get_submodule(owner_path)
        while len(norms) <= int(leaf):
            norms.append(deepcopy(norms[-1]))
    return module.get_submodule(path) if path else module


def _drop_norm(module, name: str) -> None:
    """Remove the last of a list of per-head norms; the names that disappear are always the last ones."""
    owner = module.get_submodule(name.rsplit(".", 2)[0])
    del owner[-1]


def _set_head_numbers(module, target, edits: dict) -> None:
    """Set the numbers of heads that attention modules store themselves, under the names that families use."""
    numbers = {name: value for name, value in edits.items() if name not in WINDOWS} | {
        "num_key_value_heads": target.kv_heads,
        "num_kv_heads": target.kv_heads,
        "num_key_value_groups": target.group,
        "num_heads": target.heads,
    }
    for name, value in numbers.items():
        if hasattr(module, name):
            setattr(module, name, value)
