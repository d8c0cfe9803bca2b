"""Which KV heads need the far past: a score for each, higher = keep the whole cache.

A score table is [layers][KV heads] with its origin, saved as JSON and reusable; heads have the base's numbers.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SurgeryError

FORMAT = 1


@dataclass(frozen=True)
class HeadScores:
    """A score for every KV head.

    Attributes:
        method: how it was measured.
        scores: [layers][KV heads].
        origin: text (title, sha256), sinks, window, samples, length, seed, model shape.
    """

    method: str
    scores: list[list[float]]
    origin: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        from ..output import machine_errors, write_json

        with machine_errors(Path(path)):
            write_json(Path(path), self.to_dict())


def load_scores(path: str | Path, layers: int, kv_heads: int) -> HeadScores:
    """Scores from a file: our JSON, or a table of numbers (rows are layers) as DuoAttention publishes its patterns.

    Raises:
        SurgeryError: not such a file, or of a model of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise SurgeryError("no such score file", where=str(path), fix="`surgery score MODEL -o FILE` writes one")
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            raw = json.loads(text)
            found = HeadScores(str(raw["method"]), [[float(x) for x in row] for row in raw["scores"]], raw["origin"])
        else:
            rows = [[float(x) for x in line.split()] for line in text.splitlines() if line.strip()]
            found = HeadScores("file", rows, {"file": path.name})
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise SurgeryError(f"not a table of scores: {error}", where=str(path)) from None
    shape = [len(found.scores), *sorted({len(row) for row in found.scores})]
    if shape != [layers, kv_heads]:
        raise SurgeryError(
            f"the scores are of another model: {' x '.join(map(str, shape))} (layers x KV heads)",
            where=str(path),
            exists=f"this model has {layers} x {kv_heads}",
        )
    if any(x != x for row in found.scores for x in row):
        raise SurgeryError("the scores hold NaN", where=str(path))
    return found


def far_mass(
    model, tokenizer, *, sinks: int, window: int, samples: int = 8, length: int = 1024, seed: int = 0, progress=None
) -> HeadScores:
    """Attention mass that falls outside sinks + window where a passage comes back after a long gap.

    Each sample is calibration text whose first passage is repeated at its end; on the rows of the repetition a head
    that copies from the past must look at the first occurrence. A KV head's score is the largest mean mass of its
    query heads: if one of them needs the far past, the KV head must keep it.

    Args:
        model, tokenizer: in memory; the model is left as it was.
        sinks, window: of the streaming heads that are planned.
        samples, length: sequences, and tokens in each (cut to what the model and the text allow).
        seed: order of the passages.
    """
    import torch

    from .text import load_text

    text = load_text(part="calibration")
    passage, longest = 64, getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    length = min(length, longest)
    gap = length - 2 * passage
    if gap < sinks + window:
        raise SurgeryError(
            f"sinks + window = {sinks + window} leave no far past in {length} tokens", fix="choose a smaller window"
        )
    ids = tokenizer(text.text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    samples = min(samples, len(ids) // (length - passage))
    if samples < 1:
        raise SurgeryError(f"the calibration text has only {len(ids)} tokens, {length - passage} are needed")
    order = torch.randperm(len(ids) // (length - passage), generator=torch.Generator().manual_seed(seed))[:samples]
    totals: dict[int, torch.Tensor] = {}

    def measure(module, query, key, scale, limit):
        rows = slice(query.shape[2] - passage, None)
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query[:, :, rows].float() @ keys.float().mT * scale
        position = torch.arange(query.shape[2], device=query.device)
        distance = position[rows, None] - position[None, :]
        scores = scores.masked_fill((distance < 0) | (distance >= (limit or length)), float("-inf"))
        far = (position[None, :] >= sinks) & (distance >= window)
        mass = (scores.softmax(-1) * far).sum(-1).mean(-1)[0]  # [heads]
        totals[module.layer_idx] = totals.get(module.layer_idx, 0) + mass.double().cpu()

    with watched(model, measure), torch.no_grad():
        for number, start in enumerate(order.tolist()):
            begin = start * (length - passage)
            piece = ids[begin : begin + length - passage]
            model(input_ids=torch.cat([piece, piece[:passage]])[None].to(model.device), use_cache=False)
            if progress:
                progress(number + 1, samples, "head scores")
    kv_heads = kv_head_count(model)
    table = [(totals[i] / samples).view(kv_heads, -1).amax(-1).tolist() for i in sorted(totals)]
    origin = {"text": text.title, "sha256": text.sha256[:12], "sinks": sinks, "window": window}
    return HeadScores("far-mass", table, origin | {"samples": samples, "length": length, "seed": seed})


def kv_head_count(model) -> int:
    text = model.config.get_text_config()
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


@contextmanager
def watched(model, measure):
    """The model in eval mode with every attention call shown to `measure(module, query, key, scale, window)`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from ..runtime.modeling_surgery import attention_modules
    from ..runtime.surgery_attention import surgery_attention, surgery_mask
    from ..runtime.surgery_heads import base_windows, kinds_of_heads, query_groups

    if getattr(model.config, "surgery", None):
        raise SurgeryError(
            "this model is surgical already: heads are measured on the base", where=type(model).__name__
        )
    windows, groups = base_windows(model.config), query_groups(model.config)
    modules = attention_modules(model)
    before, training = model.config._attn_implementation, model.training

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        measure(module, query, key, scale, windows[module.layer_idx])
        return surgery_attention(module, query, key, value, mask, scaling=scaling, **kwargs)

    name = "surgery_watch"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, surgery_mask)
    try:
        for module in modules:
            module.surgery_heads = kinds_of_heads(groups, limit=windows[module.layer_idx])
        model.eval().set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)
        for module in modules:
            del module.surgery_heads


def choose_streaming(
    scores: list[list[float]],
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    min_retrieval: int = 0,
    protect: tuple[int, ...] = (),
) -> list[list[int]]:
    """The KV heads of each layer that may forget the far past: those with the lowest scores over all layers.

    Args:
        scores: [layers][KV heads], higher = keep.
        ratio: share of all KV heads that stream, rounded to a whole number; or
        threshold: heads with a score below it stream.
        min_retrieval: full KV heads that every layer keeps.
        protect: layers that keep all.

    Ties go by layer and head, so that a plan is reproducible.
    """
    order = sorted((x, layer, head) for layer, row in enumerate(scores) for head, x in enumerate(row))
    wanted = len(order) if ratio is None else round(ratio * len(order))
    streaming: list[list[int]] = [[] for _ in scores]
    for x, layer, head in order:
        if wanted == 0 or (threshold is not None and x >= threshold):
            break
        if layer in protect or len(scores[layer]) - len(streaming[layer]) <= min_retrieval:
            continue
        streaming[layer].append(head)
        wanted -= 1
    return [sorted(heads) for heads in streaming]
