"""Run weight rewrites on one layer, or on a loaded model in place, and refuse invalid results of an operation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.edit import refuse_non_finite, write_layers
from surgery.architecture.layer import LayerAnatomy
from surgery.architecture.weights import PROJECTIONS, AttentionLayer, pack, unpack, unpacked_shapes
from surgery.errors import SurgeryError, shown
from surgery.io.files import json_fault
from surgery.machine.progress import begin

if TYPE_CHECKING:
    from surgery.operations.base import ApplyContext, Operation, WeightRewrite


def author_error(operation: Operation, fault: str) -> Exception:
    """The error for an invalid result: a TypeError for a built-in operation, else one that names the other package.

    Args:
        fault: a clause that names the member and the result ("plan returns None, ...").
    """
    message, module = f"{operation.op}: {fault}", type(operation).__module__
    if module.startswith("surgery.operations."):
        return TypeError(message)
    return SurgeryError(
        message, where=module, fix="this operation is not of surgery: tell its authors", code="plugin-fault"
    )


def checked_record(operation: Operation, record: Any) -> dict[str, Any]:
    """The record of an operation; {} for None.

    Raises:
        SurgeryError: a third-party operation recorded something that JSON cannot hold.
        TypeError: a built-in operation did.
    """
    if not isinstance(record, dict | None):
        raise author_error(operation, f"its record is {shown(record)}, and a dict of plain data is wanted")
    if fault := json_fault(record):
        raise author_error(operation, f"its record is no JSON: {fault}")
    return record or {}


def run_rewrite(operation: WeightRewrite, layer: AttentionLayer, after: Anatomy, index: int):
    """Run `operation.rewrite` on a copy of a layer. The new layer must have the planned anatomy, shapes and dtypes.

    The copy has values for the projections of `rewritten_projections` alone. The others come from the old layer.

    Args:
        after: the planned anatomy of the model.
        index: index of the layer.

    Returns:
        The new layer, and the operation's record.

    Raises:
        SurgeryError: the result of a third-party operation is not as planned.
        TypeError: the result of a built-in operation is not.
    """
    target, rewritten = after.layers[index], operation.rewritten_projections
    try:
        result = operation.rewrite(layer.copy(rewritten), target)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        what = f"layer {index}: rewrite reads a projection that rewritten_projections does not name ({error})"
        raise author_error(operation, what.partition("\n")[0]) from None
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], AttentionLayer)):
        raise author_error(operation, f"rewrite returns {shown(result)}, and an AttentionLayer and a dict are wanted")
    new, record = result
    withheld = [name for name in PROJECTIONS if name not in rewritten]
    if fault := _fault(new, layer, target, withheld):
        raise author_error(operation, f"layer {index}: {fault}")
    return new.replace(**{name: getattr(layer, name) for name in withheld}), checked_record(operation, record)


def _fault(new: AttentionLayer, old: AttentionLayer, target: LayerAnatomy, withheld: list[str]) -> str:
    """How a rewritten layer differs from the plan; "" if it does not."""
    if new.anatomy != target:
        return "its anatomy is not that of the target (layer.replace(anatomy=target, ...))"
    shapes, tensors = unpacked_shapes(target, old), new.tensors()
    if unexpected := tensors.keys() ^ shapes.keys():
        return f"the parts {', '.join(sorted(unexpected))} came or went"
    for name, tensor in tensors.items():
        old_tensor = getattr(old, name)
        if tuple(tensor.shape) != shapes[name]:
            return f"{name} has shape {list(tensor.shape)}, and {list(shapes[name])} is planned"
        if tensor.dtype != old_tensor.dtype:
            return f"{name} is {tensor.dtype}, and {old_tensor.dtype} is stored"
        if name in withheld and not tensor.is_meta:
            return f"{name} has new values, and rewritten_projections does not name it"
        if name not in withheld and tensor.is_meta and not old_tensor.is_meta:
            return f"{name} has no values: it was made from a projection that rewritten_projections does not name"
    return ""


def rewrite_model(model, operation: WeightRewrite, context: ApplyContext) -> dict:
    """Apply one weight rewrite to a loaded model, in place; returns the records of its layers, by path."""
    return rewrite_steps(model, [(operation, context)])[0]


def rewrite_steps(model, steps: list[tuple[WeightRewrite, ApplyContext]]) -> list[dict]:
    """Apply weight rewrites one after the other to a loaded model, in place: parameters, attributes and config.

    All layers are computed through all steps before the first layer of the model changes. So an error leaves the model
    unchanged.

    Returns:
        The record of each step.
    """
    before, after = steps[0][1].before, steps[-1][1].change.after
    records, results = [{} for _ in steps], []
    progress = steps[0][1].progress
    begin(progress, "rewriting layers", len(before.layers))
    for anatomy in before.layers:
        module = model.get_submodule(anatomy.path)
        tensors = {name: module.get_parameter(name).detach() for name in anatomy.tensor_names}
        refuse_non_finite(tensors, anatomy.path)
        layer = unpack(anatomy, tensors)
        for index, (operation, context) in enumerate(steps):
            layer, record = run_rewrite(operation, layer, context.change.after, anatomy.index)
            if record:
                records[index][anatomy.path] = record
        results.append(pack(layer))
        if progress:
            progress(anatomy.index + 1, len(before.layers), "rewriting layers")
    write_layers(model, before, after, results)
    return records
