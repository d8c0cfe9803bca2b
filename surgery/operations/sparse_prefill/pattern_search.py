"""The search of a sparse pattern for each head, as in MInference, on the blocks that sparse prefill really reads.

A pattern is an estimator of `surgery_estimators` with its settings. The patterns of a head compete at a limited cost:
among the patterns that read at most a given share of the causal blocks, the best one has the most attention weight in
its blocks, averaged over rows of real text. Only the weights of some rows are in memory: [rows, n], not [n, n].

Source: Jiang et al. 2024 (arXiv 2407.02490), section 3.2. They search by the error of one sample's attention output.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from surgery.calibration.attention_hook import hook_attention
from surgery.data.calibration_text import calibration_sequences
from surgery.data.text import BUILTIN, load_text
from surgery.errors import SettingError
from surgery.machine.placement import exact
from surgery.machine.progress import begin
from surgery.runtime.surgery_attention import surgery_attention
from surgery.runtime.surgery_estimators import settings_problems
from surgery.runtime.surgery_sparse_prefill import Sparse

SLACK = 0.02  # a pattern may cost this share more than the density, since costs vary with the text


@dataclass(frozen=True)
class Patterns:
    """The pattern of every query head.

    Attributes:
        layers: [layers][query heads], each {"method": ..., and its settings}, as `by_head` takes them; [] for a layer
            with the base's own sliding window.
        recovered: [layers][query heads], attention weight in the kept blocks, mean over texts.
        cost: [layers][query heads], share of the causal blocks that are kept, mean over texts.
        origin: how the patterns were found.
    """

    layers: list[list[dict]]
    recovered: list[list[float]]
    cost: list[list[float]]
    origin: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """All fields as plain data for JSON."""
        return asdict(self)


def candidates(length: int, block: int) -> list[dict]:
    """Patterns that compete on texts of `length` tokens: sinks + window, columns + diagonals, top blocks by query.

    Args:
        block: tokens of a block.
    """
    steps = [2 * 4**power for power in range(length.bit_length() // 2)]
    windows = [{"method": "streaming", "sinks": 4, "window": step} for step in [*range(1, length, block), length]]
    crossed = [
        {"method": "vertical_slash", "vertical": vertical, "slash": slash, "sinks": 4, "nearest": 1}
        for vertical in [4, *(4 + step for step in steps), length]  # the sinks count
        for slash in [1, *steps]
    ]
    tops = sorted({max(2, round(1.4**power)) for power in range(2, 40) if 1.4**power <= length / block})
    picked = [
        {"method": "block_topk", "top": top, "votes": votes}
        for top in [*tops, -(-length // block)]
        for votes in (0.0, 0.1, 0.3)
    ]
    return [*windows, *crossed, *picked]


def _refuse(density: float, among: list[dict], block: int) -> None:
    if not 0 < density <= 1:
        raise SettingError(f"density {density} is not above 0 and up to 1", where="search of patterns")
    for pattern in among:
        settings = {name: value for name, value in pattern.items() if name != "method"}
        if faults := settings_problems(pattern.get("method"), settings, block):
            raise SettingError(faults[0], where="search of patterns")


def search_patterns(
    model,
    tokenizer,
    *,
    density: float = 0.2,
    block: int = 64,
    samples: int = 2,
    length: int = 2048,
    rows: int = 64,
    text=BUILTIN,
    among: list[dict] | None = None,
    progress=None,
) -> Patterns:
    """Find the best pattern of every query head of a model.

    Args:
        model, tokenizer: in memory; the model is not changed.
        density: share of the causal blocks that a head may read, above 0, up to 1.
        block: tokens of a block, a power of two, at least 16.
        samples, length: number of texts, and tokens in each (cut to the model's positions). The density holds for
            texts of this length.
        rows: number of queries whose weights are measured, spread evenly over the last seven eighths of a text.
        text: see `load_text`; the calibration part of the built-in text is used.
        among: patterns that compete; default: `candidates`.
        progress: called with done, total and a label.

    Raises:
        SurgeryError: the density or the block is out of range; no pattern is cheap enough; or as for `hook_attention`.
    """
    sequences = calibration_sequences(model, tokenizer, text, length, samples)
    length = sequences.shape[1]
    among = candidates(length, block) if among is None else among
    _refuse(density, among, block)
    positions, totals = torch.linspace(length // 8, length - 1, rows).long().unique(), dict[int, torch.Tensor]()

    def attention(module, query, key, value, mask, **kwargs):
        layer = module.layer_idx
        if hook.windows[layer] is None:
            weights = hook.weights(module, query, key, positions, **kwargs)
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            measured = measure(query, key, weights, positions, scale, block, among)
            totals[layer] = totals.get(layer, 0) + torch.stack(measured).cpu() / samples
        return surgery_attention(module, query, key, value, mask, **kwargs)

    with hook_attention(model, attention) as hook, torch.no_grad():
        begin(progress, "measuring patterns", samples)
        for index, sequence in enumerate(sequences):
            model.base_model(input_ids=sequence[None].to(model.device), use_cache=False)
            if progress:
                progress(index + 1, samples, "measuring patterns")
    layers, recovered, cost = [], [], []
    for layer in range(len(hook.modules)):
        weight, costs = totals.get(layer, torch.zeros(2, len(among), 0))
        chosen = best(weight, costs, density)
        layers.append([dict(among[index]) for index in chosen])
        recovered.append([weight[index, head].item() for head, index in enumerate(chosen)])
        cost.append([costs[index, head].item() for head, index in enumerate(chosen)])
    loaded = load_text(text, "calibration")
    origin = {"density": density, "block": block, "samples": samples, "length": length, "rows": len(positions)}
    return Patterns(layers, recovered, cost, origin | {"text": loaded.title, "sha256": loaded.sha256[:12]})


def measure(query, key, weights, positions, scale: float, block: int, among: list[dict]) -> tuple:
    """The attention weight that patterns recover and their cost, for the queries and keys of one layer.

    Args:
        query: [batch, heads, n, head_dim], key: [batch, KV heads, n, head_dim], after norms and RoPE.
        weights: [batch, heads, r, n], attention weights of the queries at `positions`.
        positions: long [r].
        scale: factor on q·k.
        block: tokens of a block.
        among: patterns.

    Returns:
        The weight in the blocks that a pattern keeps (mean over rows), and the share of the causal blocks that it
        keeps; both [patterns, heads].
    """
    heads, length = query.shape[1:3]
    in_blocks = pad(weights, (0, -length % block)).unflatten(-1, (-1, block)).sum(-1)
    blocks = in_blocks.shape[-1]
    recovered, cost = [], []
    for pattern in among:
        kept = Sparse.of(pattern | {"block": block}).kept(query, key, scale)
        kept = kept.repeat_interleave(heads // kept.shape[1], dim=1)
        kept_of_rows = kept[:, :, positions.to(kept.device) // block]
        recovered.append((in_blocks * kept_of_rows).sum(-1).mean((0, 2)))
        cost.append(exact(kept.sum((2, 3))).mean(0) / (blocks * (blocks + 1) / 2))
    return exact(torch.stack(recovered)), torch.stack(cost)


def best(recovered: torch.Tensor, cost: torch.Tensor, density: float) -> list[int]:
    """For each head, the index of the pattern that recovers most and costs at most `density`; ties go to the cheapest.

    Args:
        recovered, cost: [patterns, heads], results of `measure`.

    Raises:
        SurgeryError: every pattern costs more.
    """
    chosen = []
    for head in range(recovered.shape[1]):
        affordable = [index for index in range(len(recovered)) if cost[index, head] <= density * (1 + SLACK)]
        if not affordable:
            least = cost[:, head].min().item()
            raise SettingError(
                f"no pattern reads at most {density:g} of the blocks; the cheapest reads {least:.2f}",
                where=f"query head {head}",
                fix="search with a higher density, on longer text, or with smaller blocks",
            )
        chosen.append(max(affordable, key=lambda index: (recovered[index, head].item(), -cost[index, head].item())))
    return chosen
