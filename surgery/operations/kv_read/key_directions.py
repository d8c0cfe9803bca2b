"""The directions in which the keys of a KV head are strongest, after RoPE.

Source: Singhania et al. 2024, "Loki", arXiv 2406.02542: a principal-component basis of the keys for each head, from a
calibration text. Here it is of the keys' second moments, without the mean taken off, since a score is a product with
the key itself.
"""

from __future__ import annotations

import torch

from surgery.calibration.attention_hook import hook_attention
from surgery.machine.progress import begin
from surgery.runtime.surgery_attention import surgery_attention

STAGE = "measuring keys"


def key_directions(model, sequences: torch.Tensor, dims: int, progress=None) -> list[torch.Tensor]:
    """The `dims` strongest directions of the keys of each layer, float64 [KV heads, head_dim, dims], orthonormal.

    Args:
        sequences: tokens of the calibration text, long [samples, length].
        progress: called with done, total and a label.
    """

    def attention(module, query, key, value, mask, **kwargs):
        wide = key.double()
        moments[module.layer_idx] += (wide.mT @ wide).sum(0).cpu()
        return surgery_attention(module, query, key, value, mask, **kwargs)

    with hook_attention(model, attention) as hook, torch.no_grad():
        shapes = [(layer.kv_heads, layer.head_dim, layer.head_dim) for layer in hook.anatomy.layers]
        moments = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        begin(progress, STAGE, len(sequences))
        for index, ids in enumerate(sequences):
            model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
            if progress:
                progress(index + 1, len(sequences), STAGE)
    return [torch.linalg.eigh(moment).eigenvectors.flip(-1)[..., :dims] for moment in moments]
