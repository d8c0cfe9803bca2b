"""Scores for `prune_heads`: the importance of each query head to a model, higher = keep.

    magnitude  ||W_O^h W_V^g||_F, from the weights alone
    gradient   mean over sequences of |d loss / d mask_h|, each layer's scores divided by their l2 norm
               (Michel et al. 2019, "Are Sixteen Heads Really Better than One?", arXiv 1905.10650)
    ablation   KL from the unchanged model, in nats per token, when the head alone is silenced
    random     a control

A mask multiplies the head's output before the output projection. Ablation costs a forward pass for every head and
sequence; the layers before the head's layer are not computed again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from surgery.calibration.head_scores import HeadScores, names_method, refuse_not_finite
from surgery.machine.progress import begin

if TYPE_CHECKING:
    import torch

    from surgery.architecture.anatomy import Anatomy

METHODS = ("magnitude", "gradient", "ablation", "random")
ROWS = 64  # last tokens of a sequence on which ablation compares predictions; their log-probabilities are in memory


def is_method(scores: str) -> bool:
    """Whether a recipe's `scores` names a method; raises as `names_method` does."""
    return names_method(scores, METHODS, "a table of numbers, one row of query heads for each layer")


def importance(
    model,
    method: str,
    sequences: torch.Tensor | None,
    seed: int = 0,
    progress=None,
    silent: list[list[int]] | None = None,
) -> HeadScores:
    """Scores [layers][query heads] of a model in memory, which is not changed.

    Args:
        method: a name in `METHODS`.
        sequences: tokens, long [samples, length], for the methods that measure.
        seed: seed of the method `random`.
        progress: called with done, total and a label.
        silent: query heads of each layer that are silenced while the others are scored. `gradient` and `ablation`
            then judge the model without these heads, and give them 0.

    Raises:
        SurgeryError: a score is NaN or inf.
    """
    from surgery.architecture.anatomy import Anatomy

    anatomy = Anatomy.of(model)
    silent = silent or [[] for _ in anatomy.layers]
    if method == "random":
        table = random_table(anatomy, seed)
    elif method == "magnitude":
        table = magnitude_table(model, anatomy)
    else:
        function = {"gradient": gradient_table, "ablation": ablation_table}[method]
        with _frozen(model):
            table = function(model, anatomy, sequences, silent, progress)
    refuse_not_finite([table], method)
    return HeadScores(method, table)


def random_table(anatomy: Anatomy, seed: int) -> list[list[float]]:
    """Random numbers [layers][query heads]; the same seed gives the same numbers."""
    draw = random.Random(seed)
    return [[draw.random() for _ in range(layer.heads)] for layer in anatomy.layers]


def magnitude_table(model, anatomy: Anatomy) -> list[list[float]]:
    """`magnitudes` of every layer, [layers][query heads], from the weights alone."""
    from surgery.architecture.weights import unpack
    from surgery.operations.prune_heads.select import magnitudes

    table = []
    for layer in anatomy.layers:
        module = model.get_submodule(layer.path)
        tensors = {name: module.get_parameter(name).detach() for name in layer.tensor_names}
        table.append(magnitudes(unpack(layer, tensors)))
    return table


def gradient_table(
    model, anatomy: Anatomy, sequences: torch.Tensor, silent: list[list[int]], progress=None
) -> list[list[float]]:
    """Mean |d loss / d mask| over sequences; the loss is the cross-entropy of a sequence, in nats per token.

    The mask of a silent head is 0, and its score is 0.
    """
    import torch

    from surgery.calibration.gradients import with_gradients

    sums = [torch.zeros(layer.heads, dtype=torch.float64) for layer in anatomy.layers]
    begin(progress, "measuring heads", len(sequences))
    for index, sequence in enumerate(sequences):
        with with_gradients():
            masks = [mask.to(model.device).requires_grad_() for mask in _masks(anatomy, silent)]
            with masked(model, anatomy, masks):
                loss = model(input_ids=sequence[None].to(model.device), use_cache=False).logits
                gradients = torch.autograd.grad(cross_entropy(loss[0], sequence), masks)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.abs().cpu().double()
        if progress:
            progress(index + 1, len(sequences), "measuring heads")
    for total, heads in zip(sums, silent, strict=True):
        total[heads] = 0.0
    return [(total / (total.norm() or 1)).tolist() for total in sums]


def _masks(anatomy: Anatomy, silent: list[list[int]]) -> list[torch.Tensor]:
    """For each layer ones [query heads], with zeros for its silent heads."""
    import torch

    masks = [torch.ones(layer.heads) for layer in anatomy.layers]
    for mask, heads in zip(masks, silent, strict=True):
        mask[heads] = 0
    return masks


def cross_entropy(logits: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next token in nats, from logits [length, vocabulary]."""
    import torch
    from torch.nn.functional import cross_entropy as loss

    wide = torch.promote_types(logits.dtype, torch.float32)
    return loss(logits[:-1].to(wide), sequence[1:].to(logits.device))


def ablation_table(
    model, anatomy: Anatomy, sequences: torch.Tensor, silent: list[list[int]], progress=None
) -> list[list[float]]:
    """KL in nats [layers][query heads], averaged over the last `ROWS` tokens of sequences.

    It is the KL from the model in which the silent heads alone are silenced. A silent head's score is 0.
    """
    import torch

    from surgery.calibration.layerwise import decoder_layers, each_layer

    blocks = decoder_layers(model, anatomy)
    table = [[0.0] * layer.heads for layer in anatomy.layers]
    speaking = [[head for head in range(layer.heads) if head not in silent[layer.index]] for layer in anatomy.layers]
    done, total = 0, len(sequences) * sum(map(len, speaking))

    def answer(ids):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=ROWS).logits[0, -ROWS:]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    masks = {layer: mask.to(model.device) for layer, mask in enumerate(_masks(anatomy, silent)) if silent[layer]}
    with torch.no_grad(), masked(model, anatomy, masks):
        begin(progress, "measuring heads", total)
        for sequence in sequences:
            ids = sequence[None].to(model.device)
            for layer, measure in each_layer(blocks, partial(answer, ids)):
                for head in speaking[layer]:
                    mask = torch.ones(len(table[layer]), device=model.device)
                    mask[head] = 0
                    with masked(model, anatomy, {layer: mask}):
                        table[layer][head] += measure() / len(sequences)
                    done += 1
                    if progress:
                        progress(done, total, "measuring heads")
    return table


@contextmanager
def masked(model, anatomy: Anatomy, masks) -> Iterator[None]:
    """Multiply each head's output, before the output projection, by its mask while the context is open.

    Args:
        masks: layer -> [query heads], or a list of one for each layer; layers without a mask are unchanged.
    """
    by_layer = masks.items() if isinstance(masks, dict) else enumerate(masks)
    with ExitStack() as stack:
        for index, mask in by_layer:
            layer = anatomy.layers[index]

            def before(_, args, mask=mask, size=layer.head_dim):
                z = args[0]
                return ((z.unflatten(-1, (-1, size)) * mask.to(z)[:, None]).flatten(-2), *args[1:])

            output = model.get_submodule(layer.path).get_submodule(layer.layout.o)
            hook = output.register_forward_pre_hook(before)
            stack.callback(hook.remove)
        yield


@contextmanager
def _frozen(model) -> Iterator[None]:
    """Put the model in eval mode and freeze its weights; restore both afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in frozen:
            parameter.requires_grad_(True)
