"""The two engines: both call the same pure `rewrite` on the same canonical layer, and agree to the bit."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy
from surgery.io.safetensors import stored_dtype
from surgery.errors import SurgeryError
from surgery.architecture.layer_anatomy import LayerAnatomy
from surgery.architecture.weights import AttentionLayer, pack, part_shapes, unpack
from surgery.operations.prune_heads.select import kept_heads
from surgery.architecture.surgery_block import PER_KV_HEAD, layer_entries

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.io.safetensors import Checkpoint
    from surgery.operations.base import Context, WeightRewrite
    from surgery.conversion.plan import Plan

LAYERS_KEPT = 2  # a layer whose tensors lie far apart in the file is computed again, not kept


class LayerStream:
    """New attention tensors by name, computed a layer at a time from a checkpoint on disk; for several threads.

    Args:
        records: what an earlier run noted of the layers that it finished.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, records: list[dict] | None = None):
        self.plan, self.checkpoint = plan, checkpoint
        self._records: list[dict] = records or [{} for _ in plan.steps]
        self._lock = Lock()
        self._layer_of = {
            f"{layer.path}.{name}": layer.index
            for anatomy in (plan.before, plan.after)
            for layer in anatomy.layers
            for name in layer.tensor_names
        }
        self._ready: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def tensor(self, name: str) -> Tensor:
        """The new tensor of this stored name."""
        index = self._layer_of[name]
        with self._lock:
            if index not in self._ready:
                while len(self._ready) >= LAYERS_KEPT:
                    self._ready.popitem(last=False)
                self._ready[index] = self._compute(index)
            self._ready.move_to_end(index)
            return self._ready[index][name]

    @property
    def records(self) -> list[dict]:
        """What each operation noted so far, layers in order."""
        with self._lock:
            paths = [layer.path for layer in self.plan.before.layers]
            return [{path: record[path] for path in paths if path in record} for record in self._records]

    def _compute(self, index: int) -> dict[str, Tensor]:
        facts = self.plan.before.layers[index]
        tensors = {name: self.checkpoint.read(f"{facts.path}.{name}") for name in facts.tensor_names}
        refuse_non_finite(tensors, facts.path)
        layer = unpack(facts, tensors)
        for number, step in enumerate(self.plan.steps):
            layer, record = run_rewrite(step.operation, layer, step.change.after, index)
            if record:
                self._records[number][facts.path] = record
        new = {f"{facts.path}.{name}": tensor for name, tensor in pack(layer).items()}
        for name, tensor in new.items():
            planned = self.plan.dtypes.get(name), self.plan.shapes.get(name)
            if (stored_dtype(tensor), tuple(tensor.shape)) != planned:
                raise SurgeryError(
                    f"{name} became {stored_dtype(tensor)} {list(tensor.shape)}, and {planned[0]} was planned",
                    fix="tensors of one part of a layer differ in dtype: store the model in one dtype first",
                )
        return new


def run_rewrite(operation: WeightRewrite, layer: AttentionLayer, after: Anatomy, index: int):
    """`operation.rewrite` on a copy in memory of its own; what it gives must be of the form that was planned.

    Raises:
        SurgeryError: a third party's operation gives another form; TypeError: one of ours does.
    """
    target = after.layers[index]
    new, record = operation.rewrite(layer.copy(), target)
    if fault := _fault(new, layer, target):
        what = f"{operation.op}: layer {index}: {fault}"
        module = type(operation).__module__
        if module.startswith("surgery.operations."):
            raise TypeError(what)
        raise SurgeryError(what, where=module, fix="this operation is not of surgery: tell its authors")
    return new, record


def _fault(new: AttentionLayer, old: AttentionLayer, target: LayerAnatomy) -> str:
    """How a rewritten layer differs from what was planned; "" if it does not."""
    if new.facts != target:
        return "its facts are not those of the target (layer.replace(facts=target, ...))"
    shapes, parts = part_shapes(target, old), new.tensors()
    if odd := parts.keys() ^ shapes.keys():
        return f"the parts {', '.join(sorted(odd))} came or went"
    for part, tensor in parts.items():
        wanted = getattr(old, part)
        if tuple(tensor.shape) != shapes[part]:
            return f"{part} has shape {list(tensor.shape)}, and {list(shapes[part])} is planned"
        if tensor.dtype != wanted.dtype:
            return f"{part} is {tensor.dtype}, and {wanted.dtype} is stored"
    return ""


def rewrite_model(model, operation: WeightRewrite, context: Context) -> dict:
    """Apply one weight rewrite to a loaded model, in place."""
    return rewrite_steps(model, [(operation, context)])[0]


def rewrite_steps(model, steps: list[tuple[WeightRewrite, Context]]) -> list[dict]:
    """Apply weight rewrites, one on the other, to a loaded model, in place: parameters, attributes and config.

    Every layer is computed through all steps before the first is changed: an error leaves the model as it was.

    Returns:
        The record of each step.
    """
    before, after = steps[0][1].before, steps[-1][1].change.after
    records, results = [{} for _ in steps], []
    for facts in before.layers:
        module = model.get_submodule(facts.path)
        tensors = {name: module.get_parameter(name).detach() for name in facts.tensor_names}
        refuse_non_finite(tensors, facts.path)
        layer = unpack(facts, tensors)
        for number, (operation, context) in enumerate(steps):
            layer, record = run_rewrite(operation, layer, context.change.after, facts.index)
            if record:
                records[number][facts.path] = record
        results.append(pack(layer))
        if progress := steps[0][1].progress:
            progress(facts.index + 1, len(before.layers), "layers")
    write_layers(model, before, after, results)
    return records


def write_layers(
    model, before: Anatomy, after: Anatomy, results: list[dict[str, Tensor]], surgical: bool = False
) -> None:
    """Put new attention tensors in a loaded model: parameters, attributes, config, and the `surgery` block if any.

    Args:
        results: of each layer, what `pack` gives.
        surgical: the model becomes a surgical one even if the config can say it all.
    """
    for facts, target, tensors in zip(before.layers, after.layers, results, strict=True):
        module = model.get_submodule(facts.path)
        for name in set(facts.tensor_names) - set(target.tensor_names):
            _drop_norm(module, name)
        for name, tensor in tensors.items():
            _assign(module, name, tensor)
        _keep_terms(module, facts, target)
        _set_head_numbers(module, target, after.edits)
    for name, value in after.edits.items():
        setattr(before.config, name, value)
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in results]
    if entries := layer_entries(after, shapes, needed=surgical):
        from surgery.runtime.modeling_surgery import patch

        patch(model, {"layers": entries})


def refuse_non_finite(tensors: dict[str, Tensor], path: str) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN if any value is
            raise SurgeryError(
                f"{path}.{name} holds NaN or infinite values",
                fix="the base checkpoint is damaged: download it again",
            )


def _assign(module, name: str, tensor: Tensor) -> None:
    """Put a tensor in a parameter's place, on its device and with its `requires_grad`."""
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
    """Of the parameters that a surgery gave to a module, keep the rows of the heads that stay."""
    from torch import nn

    names = getattr(module, "surgery_parameters", ())
    if not names or old == new:
        return
    queries, kv_heads = kept_heads(old, new)
    for name in names:
        parameter = getattr(module, name)
        rows = parameter.detach()[kv_heads if name in PER_KV_HEAD else queries].clone()
        setattr(module, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def _norm_module(module, path: str):
    """A submodule; a list of per-head norms grows by copies of its last."""
    from copy import deepcopy

    owner_path, _, leaf = path.rpartition(".")
    if leaf.isdigit():
        norms = module.get_submodule(owner_path)
        while len(norms) <= int(leaf):
            norms.append(deepcopy(norms[-1]))
    return module.get_submodule(path) if path else module


def _drop_norm(module, name: str) -> None:
    """Shorten a list of per-head norms by one: the names that go are always those at its end."""
    owner = module.get_submodule(name.rsplit(".", 2)[0])
    del owner[-1]


def _set_head_numbers(module, target, edits: dict) -> None:
    """The numbers that attention modules keep beside the config, under the names that families use."""
    numbers = edits | {
        "num_key_value_heads": target.kv_heads,
        "num_kv_heads": target.kv_heads,
        "num_key_value_groups": target.group,
        "num_heads": target.heads,
    }
    for name, value in numbers.items():
        if hasattr(module, name):
            setattr(module, name, value)
