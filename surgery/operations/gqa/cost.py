"""What merging KV heads in closed form takes on a machine: an estimate for `plan`, before any weight is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.architecture.layer import BYTES
from surgery.data.text import begun
from surgery.machine.device import fast_in_bfloat16
from surgery.machine.parallel import WORKERS

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

TRIED = 4  # texts on which layers are tried alone
STRIDE = 4  # of the queries of a text every so many rows are fitted
STEPS = 12  # of a solver, for each fit
EARLY = 0.25  # of a solver's steps the first fit of scores takes, where others follow it
LAYERS, NARROW = 2, 2048  # layers of fewer channels are fitted side by side on a CPU, if their inputs are the base's
RIDGES = 5  # that are solved for an output projection, the last fit with them; it is a few more or less
KERNELS = 0.6e9  # bytes: in bfloat16 a CPU's attention to one query keeps compiled products of all lengths
UNUSED = 1.15  # times the memory in use: what the allocator holds beside it


def layers_at_a_time(anatomy: Anatomy) -> int:
    """How many layers are fitted side by side, where there are threads for it.

    Of wide ones a product alone keeps all threads busy; and the solver of one MLP, whose end the next layer awaits,
    would have a share of the threads and take longer than that layer's fits: minutes at 7B's shape. Measured were 576
    channels, where two at a time pay, and 4,096, where they do not; NARROW lies between.
    """
    return LAYERS if _widths(anatomy)[0] < NARROW else 1


def efforts(fits: int) -> list[float]:
    """What share of a solver's steps each fit of scores takes: more and more, as the next one undoes a part of it."""
    return [EARLY + turn / (fits - 1) for turn in range(fits)] if fits > 1 else [1.0] * fits


@dataclass(frozen=True)
class Calibration:
    """What is measured and fitted.

    Attributes:
        samples, length: pieces of text, and tokens in each.
        scores: fits of queries and keys, one after the other.
        values: values are fitted.
        written: tokens that the model writes first.
        tried: texts on which each layer is first tried alone.
        mlp: the output projections of MLPs are refitted.
        copied: heads are put in another order first, and the old weights kept.
        ahead: layers are fitted to the base's inputs, and may be so side by side (`layers_at_a_time`).
        stride: of the queries every so many rows are fitted.
    """

    samples: int
    length: int
    scores: int
    values: bool = True
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
        """Floating-point operations in float32 for so many merged layers; one in float64 counts as two.

        The text goes through the base and through the converted model; a fit makes a product with its Hessian for
        each step, for its start and for its goal. An MLP's output projection takes the moments of its input, and for
        each ridge a factorisation, a solution and its loss. A trial puts the text through the base once more, and its
        texts from every layer on.
        """
        layer, (hidden, inner) = anatomy.layers[0], _widths(anatomy)
        width, layers = layer.heads * layer.head_dim, len(anatomy.layers)
        products = sum(round(effort * STEPS) + 2 for effort in efforts(self.scores)) + (STEPS + 2) * self.values
        product = width * (4 * hidden + 2.5 * self.length) / self.stride
        each = 4 * anatomy.parameters + layers * 12 * width * self.length + merged * products * product
        mended = merged * self.mlp
        each += mended * 2 * inner * (inner + hidden)
        solved = mended * RIDGES * 2 * (inner**3 / 3 + 4 * inner**2 * hidden)
        trials = anatomy.parameters * (2 * self.tokens + layers * self.tried * self.length) if self.tried else 0
        return each * self.tokens + solved + 3 * anatomy.parameters * self.written + trials

    def memory(self, anatomy: Anatomy, merged: int) -> float:
        """Bytes beyond the model for so many merged layers, on a CPU.

        In float32: of all tokens the hidden states twice and the MLP's state and input; for each layer that is fitted
        at a time its inputs twice, wanted outputs, heads' outputs, the base's queries and keys, and the attention of
        every `stride`-th row of both and their mean; for a second one the hidden states between; of the texts that are
        worked on side by side the attention of all rows. A trial holds log-probabilities of its texts. Beside these:
        new weights of all layers, which are written when all are known; each of these layers in float32, and its
        attention's weights and moments in float64, with what solvers make of them; for the widest projection that is
        refitted, of one layer at a time, five square matrices in float64 (two sums, and three of the solver). Writing
        the text takes a cache; a float32 model writes in bfloat16 where a CPU is faster in it: a second copy.
        """
        layer, (hidden, inner) = anatomy.layers[0], _widths(anatomy)
        width, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        a_layer = 3 * hidden + 2 * width + keys + 3 * layer.heads * self.length / self.stride
        threads = os.cpu_count() or 1
        together = max(1, min(layers_at_a_time(anatomy), threads, merged)) if self.ahead else 1
        a_token = (2 + together) * hidden + inner + together * a_layer
        attention, projection = 2 * hidden * (width + keys), hidden * inner * self.mlp
        held = merged * (attention * (1 + self.copied + bool(self.tried)) + projection)
        wide = inner if self.mlp else width
        solver = 8 * (5 * wide**2 + 8 * wide * hidden)
        vocabulary = getattr(anatomy.config, "vocab_size", None) or 0
        known = (anatomy.parameters - 2 * vocabulary * hidden) / len(anatomy.layers)  # of a config alone none are
        one_layer = 4 * max(known, attention + 3 * hidden * inner)
        fits = 8 * (3 * hidden**2 + 3 * width**2 + 10 * hidden * width)
        solvers = together * one_layer + max(solver, fits) + (together - 1) * fits
        trials = 4 * (self.tried + 3) * self.length * vocabulary if self.tried else 0
        beside = 4 * 4 * layer.heads * self.length**2 * min(together * WORKERS, threads)
        rest = 4 * self.tokens * a_token + BYTES.get(anatomy.dtype, 2) * held + solvers + trials + beside
        rest *= UNUSED
        if not self.written:
            return rest
        rows, fast = begun(self.written // self.length), fast_in_bfloat16()
        writing = rows * (self.length * anatomy.kv_bytes_per_token + 3 * 8 * vocabulary)
        if fast and BYTES.get(anatomy.dtype, 2) > 2:
            writing += 2 * anatomy.parameters
        compiled = KERNELS if fast and layer.heads == layer.kv_heads else 0.0
        return max(rest, writing) + compiled


def _widths(anatomy: Anatomy) -> tuple[int, int]:
    """Of the hidden states, and of an MLP's."""
    hidden = getattr(anatomy.config, "hidden_size", 0)
    return hidden, getattr(anatomy.config, "intermediate_size", None) or 4 * hidden
