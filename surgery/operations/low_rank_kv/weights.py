"""The weights of one layer whose keys and values are made of a vector of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.calibration.closed_form.vector_layer import VectorWeights


@dataclass(frozen=True)
class LowRankLayer(VectorWeights):
    """The attention weights of one layer whose keys and values are made of a vector, before they are stored.

    H query heads, G KV heads of d channels; D channels of the layer's input and output; r numbers in the vector. Where
    projections have biases, the layer's input has a last channel that is always 1, and so has the vector: n = D + 1
    and s = r + 1. Otherwise n = D and s = r.

    Attributes:
        q: [H, d, n], queries.
        vector: [s, n], rows that make the vector.
        key_maps, value_maps: [G, d, s], from the vector to keys before norm and RoPE, and to values.
        o: [D, H, d], output projection.
    """

    def stored(self, dtype) -> dict[str, torch.Tensor]:
        """The tensors of the attention module that the layer replaces, by name.

        Args:
            dtype: of the tensors.
        """
        layout, rank, inputs = self.anatomy.layout, self.anatomy.vector, len(self.o)
        tensors = {
            f"{layout.kv_down}.weight": self.vector[:rank, :inputs],
            f"{layout.q}.weight": self.q[..., :inputs].flatten(0, 1),
            f"{layout.k}.weight": self.key_maps[..., :rank].flatten(0, 1),
            f"{layout.v}.weight": self.value_maps[..., :rank].flatten(0, 1),
            f"{layout.o}.weight": self.o.flatten(1),
        }
        if self.q.shape[-1] > inputs:
            heads = {layout.q: self.q, layout.k: self.key_maps, layout.v: self.value_maps}
            tensors |= {f"{name}.bias": rows[..., -1].flatten() for name, rows in heads.items()}
        return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
