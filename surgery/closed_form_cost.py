"""What merging KV heads in closed form takes on a machine: an estimate for `plan`, before any weight is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .anatomy import BYTES
from .side_by_side import WORKERS

if TYPE_CHECKING:
    from .anatomy import Anatomy

TRIED = 4  # texts on which layers are tried alone
STRIDE = 4  # of the queries of a text every so many rows are fitted
STEPS = 12  # of a solver, for each fit
LAYERS = 2  # are fitted side by side on a CPU, where their inputs are the base's


@dataclass(frozen=True)
class Calibration:
    """What is measured and fitted.

    Attributes:
        samples, length: pieces of text, and tokens in each.
        fits: of queries, keys and values, one after the other.
        written: tokens that the model writes first.
        tried: texts on which each layer is first tried alone.
        mlp: the output projections of MLPs are refitted.
        copied: heads are put in another order first, and the old weights kept.
        ahead: layers are fitted to the base's inputs, LAYERS of them side by side where there are threads for it.
        stride: of the queries every so many rows are fitted.
    """

    samples: int
    length: int
    fits: int
    written: int = 0
    tried: int = 0
    mlp: bool = True
    copied: bool = False
    ahead: bool = True
    stride: int = STRIDE

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    def flops(self, anatomy: Anatomy, merged: int) -> float:
        """Floating-point operations for so many merged layers.

        The text goes through the base and through the converted model; a fit makes a product with its Hessian for
        each step, for its start and for its goal. A trial puts the text through the base once more, and its texts from
        every layer on.
        """
        layer, hidden = anatomy.layers[0], getattr(anatomy.config, "hidden_size", 0)
        width, layers = layer.heads * layer.head_dim, len(anatomy.layers)
        product = width * (4 * hidden + 2.5 * self.length) / self.stride
        each = 4 * anatomy.parameters + layers * 12 * width * self.length + merged * (STEPS + 2) * self.fits * product
        trials = anatomy.parameters * (2 * self.tokens + layers * self.tried * self.length) if self.tried else 0
        return each * self.tokens + 3 * anatomy.parameters * self.written + trials

    def memory(self, anatomy: Anatomy, merged: int) -> float:
        """Bytes beyond the model for so many merged layers.

        In float32: of all tokens the hidden states twice and the MLP's state and input; for each layer that is fitted
        at a time its inputs twice, wanted outputs, heads' outputs, the base's queries and keys, and the attention of
        every `stride`-th row of both and their mean; for a second one the hidden states between; of the texts that are
        worked on side by side the attention of all rows. A trial holds log-probabilities of its texts. Beside these:
        new weights of all layers, which are written when all are known; one layer in float32; and for the widest
        projection that is refitted five square matrices in float64 (two sums, and three of the solver). Before all
        that, a float32 model writes in bfloat16 where a CPU is faster in it: a second copy.
        """
        layer, hidden = anatomy.layers[0], getattr(anatomy.config, "hidden_size", 0)
        inner = getattr(anatomy.config, "intermediate_size", None) or 4 * hidden
        width, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        a_layer = 3 * hidden + 2 * width + keys + 3 * layer.heads * self.length / self.stride
        threads = os.cpu_count() or 1
        together = min(LAYERS, threads) if self.ahead else 1
        a_token = (2 + together) * hidden + inner + together * a_layer
        attention, projection = 2 * hidden * (width + keys), hidden * inner * self.mlp
        held = merged * (attention * (1 + self.copied + bool(self.tried)) + projection)
        wide = inner if self.mlp else width
        solver = 8 * (5 * wide**2 + 3 * wide * hidden)
        one_layer = 4 * anatomy.parameters / len(anatomy.layers)
        vocabulary = getattr(anatomy.config, "vocab_size", None) or 0
        trials = 4 * (self.tried + 3) * self.length * vocabulary if self.tried else 0
        beside = 4 * 4 * layer.heads * self.length**2 * min(WORKERS, threads)
        rest = 4 * self.tokens * a_token + BYTES.get(anatomy.dtype, 2) * held + one_layer + solver + trials + beside
        return max(rest, 2.0 * anatomy.parameters if self.written else 0.0)
