"""Give a loaded model latent attention in closed form."""

from __future__ import annotations

from surgery.architecture.edit import refuse_non_finite
from surgery.architecture.latent import write_latent
from surgery.architecture.stock_class import refuse_other_class
from surgery.calibration.closed_form.layer_inputs import FitSettings
from surgery.calibration.closed_form.layerwise_fit import write_mlps
from surgery.data.text import CalibrationText
from surgery.io.resume import LayerFiles
from surgery.operations.base import ApplyContext
from surgery.operations.mla.layer import Compression

REVISION = 2  # raise it when a change of the fit gives other weights: a resumed run then mixes no two versions


def compress(model, context: ApplyContext, text: CalibrationText, settings: FitSettings) -> dict:
    """Convert a loaded model, in place, to the latent attention that `context.change` plans.

    Args:
        text: the calibration text.

    Returns:
        A record of each layer, by its path, and of the text.

    Raises:
        SurgeryError: there is no tokenizer, the text is too short, or weights are not finite.
    """
    refuse_other_class(model, "mla")
    before, after = context.before, context.change.after
    sequences, source = context.calibration(model, text, "mla", "mla needs the tokenizer, for its calibration text")
    identity = [REVISION, settings, after.latent, sequences.tolist()]
    files = LayerFiles(context.folder, context.state_name("mla"), identity)
    run = Compression(model, after.layers, sequences, settings, files.load, files.save)
    tensors_of_layers, records = run.layers(context.progress)
    for tensors, layer in zip(tensors_of_layers, after.layers, strict=True):
        refuse_non_finite(tensors, layer.path)
    refuse_non_finite(run.mlps, "model")
    write_latent(model, after, tensors_of_layers)
    write_mlps(model, run.mlps)  # last: an error before leaves the model as it was
    record = {layer.path: fitted for layer, fitted in zip(before.layers, records, strict=True)}
    return record | {"calibration": source | {"tokens": sequences.numel()}}
