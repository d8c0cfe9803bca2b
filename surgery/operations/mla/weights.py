"""The weights of one layer with latent attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery.architecture.latent import NORM_EPSILON, interleaved, scaled_norm
from surgery.calibration.closed_form.vector_layer import VectorWeights


@dataclass(frozen=True)
class LatentLayer(VectorWeights):
    """The attention weights of one layer with latent attention, before they are stored.

    H query heads in G groups with the same keys and values; p channels of a key without RoPE and e with it; r numbers
    in the latent vector; d channels of a value; D channels of the layer's input and output; n of them, and where
    projections have biases a last one that is always 1.

    Attributes:
        q: [H, p + e, n], queries; their first p channels are not rotated.
        key_maps: [G, p, r], from the vector to the keys without RoPE.
        value_maps: [G, d, r], from the vector to the values.
        o: [D, H, d], output projection.
        shared: [1, e, n], the rotated key of all heads.
    """

    shared: torch.Tensor

    def rows(self, projection: str, like: torch.Tensor) -> torch.Tensor:
        rows = super().rows(projection, like)
        return torch.cat([rows, self.shared.to(like).expand(len(rows), -1, -1)], 1) if projection == "k" else rows

    def stored(self, scale: float, largest: tuple[float, float], dtype) -> dict[str, torch.Tensor]:
        """The tensors of the stock module (architecture/latent.py), by name, without the bias of the output.

        Args:
            scale: the base's factor on q·k. The stock module has its own, (p + e)^-½, so that queries take the ratio.
            largest: the largest mean square over a text of a latent vector, and of the layer's input.
            dtype: of the tensors.
        """
        layout, heads, free = self.anatomy.layout, len(self.q), self.key_maps.shape[1]
        factor, weight = scaled_norm(largest[0])
        queries = torch.cat([self.q[:, :free].double(), interleaved(self.q[:, free:].double())], 1)
        queries = (queries * (scale * self.q.shape[1] ** 0.5)).flatten(0, 1)
        made = torch.cat([self.vector.double() * factor, interleaved(self.shared[0].double())])
        maps = torch.cat([self.key_maps, self.value_maps], 1).repeat_interleave(heads // len(self.key_maps), 0)
        size = self.anatomy.latent.queries if self.anatomy.latent else 0
        tensors = self._with_query_vector(queries, size, largest[1]) if size else {f"{layout.q}.weight": queries}
        tensors |= {
            f"{layout.k}.weight": made[:, : len(self.o)],
            f"{layout.latent_norm}.weight": torch.full((len(self.vector),), weight, dtype=torch.float64),
            f"{layout.v}.weight": maps.flatten(0, 1),
            f"{layout.o}.weight": self.o.flatten(1),
        }
        if size:
            tensors[f"{layout.k}.bias"] = made[:, -1]
        return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}

    def _with_query_vector(self, queries: torch.Tensor, size: int, largest: float) -> dict[str, torch.Tensor]:
        """The tensors of queries [H (p + e), D + 1], whose last column is their bias, by way of a vector.

        The vector is the layer's input and a 1, scaled by a power of two, so that making it rounds nothing. Its norm
        rounds once.

        Args:
            size: numbers in this vector; those behind the 1 are zero.
            largest: the largest mean square of the layer's input over a text.
        """
        layout, width = self.anatomy.layout, queries.shape[1]
        inputs = width - 1
        factor, weight = scaled_norm(largest)
        factor = 2.0 ** math.floor(math.log2(factor))
        down, bias = queries.new_zeros(size, inputs), queries.new_zeros(size)
        down[:inputs], bias[inputs] = factor * torch.eye(inputs, dtype=down.dtype), factor
        up = queries.new_zeros(len(queries), size)
        up[:, :width] = queries / (factor * weight / NORM_EPSILON**0.5)
        return {
            f"{layout.q_down}.weight": down,
            f"{layout.q_down}.bias": bias,
            f"{layout.q_down_norm}.weight": queries.new_full((size,), weight),
            f"{layout.q}.weight": up,
        }
