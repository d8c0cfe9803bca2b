"""Give a loaded model keys and values of low rank in closed form."""

from __future__ import annotations

from surgery.architecture.edit import refuse_non_finite
from surgery.calibration.closed_form.layer_inputs import FitSettings
from surgery.calibration.closed_form.layerwise_fit import write_mlps
from surgery.data.text import CalibrationText
from surgery.io.resume import LayerFiles
from surgery.operations.base import ApplyContext, give_entries
from surgery.operations.low_rank_kv.layer import LowRankConversion

REVISION = 1  # raise it when a change of the fit gives other weights: a resumed run then mixes no two versions


def lower_rank(model, context: ApplyContext, text: CalibrationText, settings: FitSettings) -> dict:
    """Convert a loaded model, in place, to the keys and values of low rank that `context.change` plans.

    Args:
        text: the calibration text.

    Returns:
        A record of each layer, by its path, and of the text.

    Raises:
        SurgeryError: there is no tokenizer, the text is too short, or weights are not finite.
    """
    after, what = context.change.after, "low_rank_kv needs the tokenizer, for its calibration text"
    sequences, source = context.calibration(model, text, "low_rank_kv", what)
    identity = [REVISION, settings, [layer.vector for layer in after.layers], sequences.tolist()]
    files = LayerFiles(context.folder, context.state_name("low_rank_kv"), identity)
    run = LowRankConversion(model, after.layers, sequences, settings, files.load, files.save)
    tensors_of_layers, records = run.layers(context.progress)
    for tensors, layer in zip(tensors_of_layers, after.layers, strict=True):
        refuse_non_finite(tensors, layer.path)
    refuse_non_finite(run.mlps, "model")
    give_entries(model, [layer.entry for layer in after.layers], "low_rank_kv")
    for tensors, layer in zip(tensors_of_layers, after.layers, strict=True):
        module = model.get_submodule(layer.path)
        for name, tensor in tensors.items() if layer.vector else ():
            module.get_parameter(name).data.copy_(tensor)
    write_mlps(model, run.mlps)
    record = {layer.path: fitted for layer, fitted in zip(after.layers, records, strict=True) if layer.vector}
    return record | {"calibration": source | {"tokens": sequences.numel()}}
