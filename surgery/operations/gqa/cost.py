"""Time and memory that merging KV heads in closed form takes: an estimate for `plan`, before any weight is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.architecture.layer import BYTES
from surgery.data.text import samples_to_begin
from surgery.machine.device import fast_in_bfloat16
from surgery.machine.parallel import WORKERS
from surgery.operations.base import Measurement

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

TRIED = 4  # texts on which each layer is tried alone
STRIDE = 4  # every fourth query of a text is fitted
STEPS = 12  # of a solver, for each fit
EARLY = 0.25  # share of a solver's steps that the first fit of scores takes, where others follow it
LAYERS, NARROW = 2, 2048  # layers of fewer channels are fitted in parallel on a CPU, if their inputs are the base's
RIDGES = 5  # solutions for one output projection, the last fit included; in practice a few more or fewer
KERNELS = 0.6e9  # bytes: in bfloat16 a CPU's attention to one query keeps compiled products of all lengths
UNUSED = 1.15  # what the allocator holds, as a multiple of the memory in use


def layers_at_a_time(anatomy: Anatomy) -> int:
    """How many layers are fitted in parallel, where there are threads for it.

    In a wide layer one product keeps all threads busy. And the solver of an MLP, for which the next layer waits, would
    have a share of the threads and take longer than that layer's fits: minutes at 7B's shape. At 576 channels two
    at a time were measured to be faster, at 4,096 they were not; NARROW lies between.
    """
    return LAYERS if _widths(anatomy)[0] < NARROW else 1


def efforts(fits: int) -> list[float]:
    """The share of a solver's steps that each fit of scores takes. It grows, as each fit undoes a part of the last."""
    return [EARLY + index / (fits - 1) for index in range(fits)] if fits > 1 else [1.0] * fits


@dataclass(frozen=True)
class Calibration:
    """What is measured and fitted.

    Attributes:
        samples, length: calibration texts, and tokens in each.
        scores: how many fits of queries and keys follow one another.
        values: whether values are fitted.
        written: tokens that the model writes first.
        tried: texts on which each layer is first tried alone.
        mlp: whether the output projections of MLPs are refitted.
        copied: whether heads are first put into another order, and the old weights kept.
        ahead: whether layers are fitted to the base's inputs, and so may be fitted in parallel (`layers_at_a_time`).
        stride: every `stride`-th query is fitted.
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
        """Tokens of all samples."""
        return self.samples * self.length

    def measurements(self, anatomy: Anatomy, merged: int) -> tuple[Measurement, ...]:
        """The stages for `merged` layers: the model writes text, layers are tried alone, layers are merged."""
        memory = self.memory(anatomy, merged)
        flops = {
            "calibration text": 3 * anatomy.parameters * self.written,
            "trying layers alone": self._trial_flops(anatomy),
            "merging layers": self.flops(anatomy, merged),
        }
        return tuple(Measurement(stage, count, memory) for stage, count in flops.items() if count)

    def _trial_flops(self, anatomy: Anatomy) -> float:
        """Of a trial of single layers: the text goes through the base, the trial's texts from every layer on."""
        layers = len(anatomy.layers)
        return anatomy.parameters * (2 * self.tokens + layers * self.tried * self.length) if self.tried else 0

    def flops(self, anatomy: Anatomy, merged: int) -> float:
        """Floating-point operations in float32 of the merge of `merged` layers; one in float64 counts as two.

        The text goes through the base and through the converted model. A fit makes a product with its Hessian for
        each step, for its start and for its goal. An MLP's output projection takes the moments of its input, and for
        each ridge a factorisation, a solution and its loss.
        """
        layer, (hidden, inner) = anatomy.layers[0], _widths(anatomy)
        width, layers = layer.heads * layer.head_dim, len(anatomy.layers)
        products = sum(round(effort * STEPS) + 2 for effort in efforts(self.scores)) + (STEPS + 2) * self.values
        product = width * (4 * hidden + 2.5 * self.length) / self.stride
        per_token = 4 * anatomy.parameters + layers * 12 * width * self.length + merged * products * product
        refitted_mlps = merged * self.mlp
        per_token += refitted_mlps * 2 * inner * (inner + hidden)
        solves = refitted_mlps * RIDGES * 2 * (inner**3 / 3 + 4 * inner**2 * hidden)
        return per_token * self.tokens + solves

    def memory(self, anatomy: Anatomy, merged: int) -> float:
        """Bytes beyond the model for `merged` layers, on a CPU.

        In float32 these are held:
        - for all tokens, the hidden states twice and the MLP's state and input;
        - for each layer that is fitted at a time, its inputs twice, the wanted outputs, the heads' outputs, the base's
          queries and keys, and the attention of every `stride`-th row in both models and their mean;
        - for a second layer at a time, the hidden states between the two;
        - for the texts that are worked on in parallel, the attention of all rows;
        - for a trial of single layers, the log-probabilities of its texts.

        Besides, there are the new weights of all layers, which are written when all are known; each layer that is
        fitted at a time in float32, and the weights and moments of its attention in float64, with what solvers make of
        them; and for the widest projection that is refitted, one layer at a time, five square matrices in float64 (two
        sums, and three of the solver). Writing the text takes a cache. A float32 model writes in bfloat16 where the
        CPU is faster in it, which takes a second copy.
        """
        layer, (hidden, inner) = anatomy.layers[0], _widths(anatomy)
        width, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        a_layer = 3 * hidden + 2 * width + keys + 3 * layer.heads * self.length / self.stride
        threads = os.cpu_count() or 1
        layers_at_once = max(1, min(layers_at_a_time(anatomy), threads, merged)) if self.ahead else 1
        a_token = (2 + layers_at_once) * hidden + inner + layers_at_once * a_layer
        attention, projection = 2 * hidden * (width + keys), hidden * inner * self.mlp
        new_weights = merged * (attention * (1 + self.copied + bool(self.tried)) + projection)
        widest = inner if self.mlp else width
        solver = 8 * (5 * widest**2 + 8 * widest * hidden)
        vocabulary = getattr(anatomy.config, "vocab_size", None) or 0
        # Below 0 where the anatomy is that of a config, which counts no parameters.
        layer_parameters = (anatomy.parameters - 2 * vocabulary * hidden) / len(anatomy.layers)
        layer_bytes = 4 * max(layer_parameters, attention + 3 * hidden * inner)
        fits = 8 * (3 * hidden**2 + 3 * width**2 + 10 * hidden * width)
        solvers = layers_at_once * layer_bytes + max(solver, fits) + (layers_at_once - 1) * fits
        trials = 4 * (self.tried + 3) * self.length * vocabulary if self.tried else 0
        attention_maps = 4 * 4 * layer.heads * self.length**2 * min(layers_at_once * WORKERS, threads)
        total = (
            4 * self.tokens * a_token + BYTES.get(anatomy.dtype, 2) * new_weights + solvers + trials + attention_maps
        )
        total *= UNUSED
        if not self.written:
            return total
        rows, fast = samples_to_begin(self.written // self.length), fast_in_bfloat16()
        writing = rows * (self.length * anatomy.kv_bytes_per_token + 3 * 8 * vocabulary)
        if fast and BYTES.get(anatomy.dtype, 2) > 2:
            writing += 2 * anatomy.parameters
        compiled = KERNELS if fast and layer.heads == layer.kv_heads else 0.0
        return max(total, writing) + compiled


def _widths(anatomy: Anatomy) -> tuple[int, int]:
    """Channels of the hidden states, and of an MLP's hidden layer."""
    hidden = getattr(anatomy.config, "hidden_size", 0)
    return hidden, getattr(anatomy.config, "intermediate_size", None) or 4 * hidden
