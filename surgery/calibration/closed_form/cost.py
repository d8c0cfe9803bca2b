"""An estimate for `plan`, before any weight is read, of the time and memory of a conversion in closed form."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.architecture.layer import BYTES
from surgery.calibration.cost import Measurement, layer_parameters, widths
from surgery.data.text import samples_to_begin
from surgery.machine.device import fast_in_bfloat16
from surgery.machine.parallel import WORKERS
from surgery.machine.speed import EFFICIENCY

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

TRIED = 4  # texts on which each layer is tried alone
STRIDE = 4  # every fourth query of a text is fitted
STEPS = 12  # steps of a solver for one fit
EARLY = 0.25  # share of STEPS that the first fit of scores takes if other fits follow
LAYERS, NARROW = 2, 2048  # layers fitted in parallel on a CPU if they have fewer channels and the base's inputs
RIDGES = 5  # solutions for one output projection, including the last fit; in practice a few more or fewer
SOLVED = EFFICIENCY  # products of large matrices reach the machine's whole speed, a model reaches this share of it
# All eigenvectors of n rows in float64 take the time of EIGENVECTORS * n^3 operations in products in float32. On two
# cores it was 20 * n^3 at 2,048 rows, 23 at 4,096 and 29 at 8,192.
EIGENVECTORS = 25
WRITING = "calibration text"  # a stage
KERNELS = 0.6e9  # bytes: in bfloat16, attention of one query on a CPU keeps compiled products for all lengths
UNUSED = 1.15  # memory that the allocator holds, as a multiple of the memory in use


def layers_at_a_time(anatomy: Anatomy) -> int:
    """How many layers are fitted in parallel, if there are enough threads.

    In a wide layer one product keeps all threads busy. The next layer must also wait for the solver of this layer's
    MLP. In parallel that solver would have only a share of the threads, and would take longer than the next layer's
    fits: minutes at the shape of a 7B model. Two layers at a time were measured to be faster at 576 channels, and not
    at 4,096; NARROW lies between.
    """
    return LAYERS if widths(anatomy)[0] < NARROW else 1


def efforts(fits: int) -> tuple[float, ...]:
    """The share of STEPS that each fit of scores takes. The shares grow, since each fit undoes a part of the last."""
    return tuple(EARLY + index / (fits - 1) for index in range(fits)) if fits > 1 else (1.0,) * fits


@dataclass(frozen=True)
class Calibration:
    """What a conversion measures and fits.

    Attributes:
        samples, length: number of calibration texts, and tokens in each.
        scores: the fits of queries and keys, one after the other: the share of STEPS that each takes.
        values: whether values are fitted.
        written: tokens of calibration text that the model writes first.
        tried: number of texts on which each layer is first tried alone.
        trials: how many fits of each layer are tried.
        outputs: how often attention's output projection is refitted.
        mlp: whether the output projections of MLPs are refitted.
        copied: whether heads are reordered first, which keeps a copy of the old weights.
        ahead: whether layers are fitted to the base's inputs, so that they may run in parallel (`layers_at_a_time`).
        stride: every `stride`-th query is fitted.
        stage: name of the fits, for progress and plan.
        decomposed: rows of the largest symmetric matrix of which the start of each layer takes all eigenvectors; 0:
            it is too small to count.
        wider: how many more channels the new queries and keys have than the base's, as a factor.
        grown: how many more weights the new attention has, as a factor.
    """

    samples: int
    length: int
    scores: tuple[float, ...] = ()
    values: bool = True
    written: int = 0
    tried: int = 0
    trials: int = 1
    outputs: int = 0
    mlp: bool = True
    copied: bool = False
    ahead: bool = True
    stride: int = STRIDE
    stage: str = "merging layers"
    decomposed: int = 0
    wider: float = 1.0
    grown: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return self.samples * self.length

    def measurements(self, anatomy: Anatomy, merged: int) -> tuple[Measurement, ...]:
        """The stages with `merged` converted layers: text is written, layers are tried alone, layers are converted."""
        memory, on_gpu = self.memory(anatomy, merged), self.memory(anatomy, merged, gpu=True)
        flops = {
            WRITING: 3 * anatomy.parameters * self.written,
            "trying layers alone": self._trial_flops(anatomy),
            self.stage: self.flops(anatomy, merged),
        }
        return tuple(
            Measurement(stage, count, memory, memory_on_gpu=on_gpu, writes=stage == WRITING)
            for stage, count in flops.items()
            if count
        )

    def _trial_flops(self, anatomy: Anatomy) -> float:
        """The trial of single layers: all text goes through the base, every layer is fitted, and the tried texts run
        from there on.
        """
        layers = len(anatomy.layers)
        if not self.tried:
            return 0
        texts = anatomy.parameters * (2 * self.tokens + layers * self.tried * self.length)
        return self.trials * (texts + layers * self._fit_flops(anatomy))

    def flops(self, anatomy: Anatomy, merged: int) -> float:
        """Floating-point operations to convert `merged` layers, in float32; one in float64 counts as two.

        The text goes through the layers of the base and of the converted model, and not through the output layer.
        """
        layer, (hidden, inner) = anatomy.layers[0], widths(anatomy)
        width, layers = layer.heads * layer.head_dim, len(anatomy.layers)
        per_token = 4 * layer_parameters(anatomy) + layers * 12 * width * self.length
        mlps = merged * self.mlp * self._refit_flops(inner, hidden)
        fits = 0 if self.tried and self.ahead else merged  # else the trial's fits serve
        return per_token * self.tokens + mlps + fits * self._fit_flops(anatomy)

    def _fit_flops(self, anatomy: Anatomy) -> float:
        """The fit of one layer's attention.

        A solver computes one product with the Hessian for each step, one for its start and one for its target. In each
        step it also multiplies the gradient by the preconditioner, in float64. The start takes eigenvectors, of a
        matrix that it makes of the second moments of the layer's input.
        """
        layer, (hidden, _) = anatomy.layers[0], widths(anatomy)
        width = layer.heads * layer.head_dim
        products = sum(round(effort * STEPS) + 2 for effort in self.scores) + (STEPS + 2) * self.values
        product = self.wider * width * (4 * hidden + 2.5 * self.length) / self.stride * self.tokens
        preconditioned = SOLVED * 2 * 2 * self.wider * width * hidden**2
        rows = self.decomposed
        made = 2 * 2 * rows * hidden * (hidden + rows)
        start = SOLVED * (EIGENVECTORS * rows**3 + made)
        return products * (product + preconditioned) + start + self.outputs * self._refit_flops(width, hidden)

    def _refit_flops(self, inputs: int, outputs: int) -> float:
        """A refit of an output projection: the moments of its input and, for each ridge, a factorisation, a solution
        and its loss.
        """
        solves = RIDGES * SOLVED * 2 * (inputs**3 / 3 + 4 * inputs**2 * outputs)
        return 2 * inputs * (inputs + outputs) * self.tokens + solves

    def memory(self, anatomy: Anatomy, merged: int, gpu: bool = False) -> float:
        """Bytes in addition to the model to convert `merged` layers, on a CPU or on a GPU.

        On a GPU one layer is fitted at a time, and one text; the new weights are in main memory.

        In float32:
        - for all tokens, the hidden states twice, and the MLP's state and input;
        - for each layer that is being fitted, its inputs twice, the wanted outputs, the heads' outputs, the base's
          queries and keys, and the attention of every `stride`-th row in both models and the mean of the two;
        - for a second layer that is being fitted, the hidden states between the two;
        - for the texts that run in parallel, the attention of all rows;
        - for a trial of single layers, the log-probabilities of its texts.

        In addition:
        - the new weights of all layers, since they are written only when all are known;
        - for each layer that is being fitted, its weights in float32, and the weights and moments of its attention in
          float64, with the solver's temporaries;
        - for the widest refitted projection, one layer at a time, five square matrices in float64 (two sums, and three
          of the solver);
        - for writing the text, a KV cache. A float32 model writes in bfloat16 where the CPU is faster in it, which
          takes a second copy of the model.
        """
        layer, (hidden, inner) = anatomy.layers[0], widths(anatomy)
        width, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        a_layer = 3 * hidden + 2 * width + keys + 3 * layer.heads * self.length / self.stride
        threads = 1 if gpu else os.cpu_count() or 1
        layers_at_once = max(1, min(layers_at_a_time(anatomy), threads, merged)) if self.ahead else 1
        a_token = (2 + layers_at_once) * hidden + inner + layers_at_once * a_layer
        attention, projection = 2 * hidden * (width + keys), hidden * inner * self.mlp
        attention_copies = self.grown + self.copied + (self.trials if self.tried else 0)
        new_weights = 0 if gpu else merged * (attention * attention_copies + projection)
        widest = inner if self.mlp else width
        solver = 8 * (5 * widest**2 + 8 * widest * hidden)
        vocabulary = getattr(anatomy.config, "vocab_size", None) or 0
        # No parameters are counted if the anatomy was made from a config alone.
        layer_bytes = 4 * max(layer_parameters(anatomy) / len(anatomy.layers), attention + 3 * hidden * inner)
        fits = 8 * (3 * hidden**2 + 3 * width**2 + 10 * self.grown * hidden * width)
        solvers = layers_at_once * layer_bytes + max(solver, fits) + (layers_at_once - 1) * fits
        trials = 4 * (self.tried + 3) * self.length * vocabulary if self.tried else 0
        attention_maps = 4 * 4 * layer.heads * self.length**2 * min(layers_at_once * WORKERS, threads)
        total = (
            4 * self.tokens * a_token + BYTES.get(anatomy.dtype, 2) * new_weights + solvers + trials + attention_maps
        )
        total *= UNUSED
        if not self.written:
            return total
        # Running text and conversations take turns. Neither begins more rows than running text alone would.
        rows, fast = samples_to_begin(self.written // self.length), not gpu and fast_in_bfloat16()
        writing = rows * (anatomy.kv_bytes_at(self.length) + 3 * 8 * vocabulary)
        if fast and BYTES.get(anatomy.dtype, 2) > 2:
            writing += 2 * anatomy.parameters
        compiled = KERNELS if fast and layer.heads == layer.kv_heads else 0.0
        return max(total, writing) + compiled
