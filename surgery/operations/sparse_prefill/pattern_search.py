"""Which sparse pattern suits each head: the search of MInference, on the blocks that sparse prefill really reads.

A pattern is a method of `surgery_block_selection` with its settings. Those of a head compete at equal cost: among the
patterns that read at most a given share of the causal blocks, the one whose blocks hold most of the attention weight,
mean over rows of real text. The weights of some rows alone are held, never those of all: [rows, n], not [n, n].

Jiang et al. 2024 (arXiv 2407.02490), section 3.2, search by the error of one sample's attention output.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from surgery.calibration.attention_hook import hook_attention
from surgery.data.passkeys import calibration_pieces
from surgery.data.text import BUILTIN, load_text
from surgery.errors import SurgeryError
from surgery.runtime.surgery_attention import surgery_attention
from surgery.runtime.surgery_block_selection import settings_problems
from surgery.runtime.surgery_sparse_prefill import Sparse

SPARED = 0.02  # a pattern may cost so much more than asked for, as a share of it: costs move with the text


@dataclass(frozen=True)
class Patterns:
    """The pattern of every query head.

    Attributes:
        layers: [layers][query heads], each {"method": ..., and its settings}, as `by_head` takes them; [] for a layer
            whose heads see a window of the base's own.
        recovered: attention weight in the kept blocks, and
        cost: kept share of the causal blocks, both [layers][query heads], mean over texts.
        origin: how they were found.
    """

    layers: list[list[dict]]
    recovered: list[list[float]]
    cost: list[list[float]]
    origin: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        return asdict(self)


def candidates(length: int, block: int) -> list[dict]:
    """Patterns that compete on texts of this length: sinks + window, columns + diagonals, blocks that queries pick."""
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
        raise SurgeryError(f"density {density} is not above 0 and up to 1", where="search of patterns")
    for pattern in among:
        settings = {name: value for name, value in pattern.items() if name != "method"}
        if faults := settings_problems(pattern.get("method"), settings, block):
            raise SurgeryError(faults[0], where="search of patterns")


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
        model, tokenizer: in memory; the model is left as it was.
        density: share of the causal blocks that a head may read, above 0, up to 1.
        block: tokens of a block, a power of two from 16.
        samples, length: texts, and tokens in each (cut to the model's positions); budgets hold for such lengths.
        rows: queries whose weights are looked at, spread evenly over the later seven eighths of a text.
        text: see `load_text`; of the built-in text the calibration part.
        among: patterns that compete; default: `candidates`.
        progress: called with done, total and a label.

    Raises:
        SurgeryError: a density or a block out of range; no pattern is cheap enough; or see `hook_attention`.
    """
    pieces = calibration_pieces(model, tokenizer, text, length, samples)
    length = pieces.shape[1]
    among = candidates(length, block) if among is None else among
    _refuse(density, among, block)
    looked = torch.linspace(length // 8, length - 1, rows).long().unique()
    totals: dict[int, torch.Tensor] = {}

    def attention(module, query, key, value, mask, **kwargs):
        layer = module.layer_idx
        if seen.windows[layer] is None:
            weights = seen.weights(module, query, key, looked, **kwargs)
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            found = measure(query, key, weights, looked, scale, block, among)
            totals[layer] = totals.get(layer, 0) + torch.stack(found).double().cpu() / samples
        return surgery_attention(module, query, key, value, mask, **kwargs)

    with hook_attention(model, attention) as seen, torch.no_grad():
        for number, piece in enumerate(pieces):
            model.base_model(input_ids=piece[None].to(model.device), use_cache=False)
            if progress:
                progress(number + 1, samples, "patterns")
        count = len(seen.modules)
    layers, recovered, cost = [], [], []
    for layer in range(count):
        weight, read = totals.get(layer, torch.zeros(2, len(among), 0))
        chosen = best(weight, read, density)
        layers.append([dict(among[index]) for index in chosen])
        recovered.append([weight[index, head].item() for head, index in enumerate(chosen)])
        cost.append([read[index, head].item() for head, index in enumerate(chosen)])
    loaded = load_text(text, "calibration")
    origin = {"density": density, "block": block, "samples": samples, "length": length, "rows": len(looked)}
    return Patterns(layers, recovered, cost, origin | {"text": loaded.title, "sha256": loaded.sha256[:12]})


def measure(query, key, weights, rows, scale: float, block: int, among: list[dict]) -> tuple:
    """What patterns hold and cost, on the queries and keys of one layer.

    Args:
        query: [batch, heads, n, head_dim], key: [batch, KV heads, n, head_dim], after norms and RoPE.
        weights: attention weights of the queries at the places `rows` (long [r]): [batch, heads, r, n].
        among: patterns.

    Returns:
        The weight in the kept blocks, mean over rows, and the kept share of the causal blocks, each [patterns, heads].
    """
    heads, length = query.shape[1:3]
    in_blocks = pad(weights, (0, -length % block)).unflatten(-1, (-1, block)).sum(-1)
    blocks = in_blocks.shape[-1]
    held, cost = [], []
    for pattern in among:
        kept = Sparse.of(pattern | {"block": block}).kept(query, key, scale)
        kept = kept.repeat_interleave(heads // kept.shape[1], dim=1)
        own = kept[:, :, rows.to(kept.device) // block]
        held.append((in_blocks * own).sum(-1).mean((0, 2)))
        cost.append(kept.sum((2, 3)).double().mean(0) / (blocks * (blocks + 1) / 2))
    return torch.stack(held).double(), torch.stack(cost)


def best(held: torch.Tensor, cost: torch.Tensor, density: float) -> list[int]:
    """For each head the pattern that holds most among those that cost at most `density`; of equal ones the cheapest.

    Args:
        held, cost: [patterns, heads].

    Raises:
        SurgeryError: there is none.
    """
    chosen = []
    for head in range(held.shape[1]):
        cheap = [n for n in range(len(held)) if cost[n, head] <= density * (1 + SPARED)]
        if not cheap:
            least = cost[:, head].min().item()
            raise SurgeryError(
                f"no pattern reads at most {density:g} of the blocks; the cheapest reads {least:.2f}",
                where=f"query head {head}",
                fix="search with a higher density, on longer text, or with smaller blocks",
            )
        chosen.append(max(cheap, key=lambda n: (held[n, head].item(), -cost[n, head].item())))
    return chosen
