"""Run a weight rewrite: on one layer, or on a loaded model in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.edit import refuse_non_finite, write_layers
from surgery.architecture.layer import LayerAnatomy
from surgery.architecture.weights import AttentionLayer, pack, part_shapes, unpack
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.operations.base import ApplyContext, WeightRewrite


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
    if new.anatomy != target:
        return "its anatomy is not that of the target (layer.replace(anatomy=target, ...))"
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


def rewrite_model(model, operation: WeightRewrite, context: ApplyContext) -> dict:
    """Apply one weight rewrite to a loaded model, in place."""
    return rewrite_steps(model, [(operation, context)])[0]


def rewrite_steps(model, steps: list[tuple[WeightRewrite, ApplyContext]]) -> list[dict]:
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
