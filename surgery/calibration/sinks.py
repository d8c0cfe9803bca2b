"""Where the attention sinks of a model are, how much attention they take, and what marks them.

Sinks besides the first token are found for each head and text by the rule of ACT (Yu et al. 2024, arXiv 2406.15765):
the mean weight that a key gets from the queries that see it, its column mean, is above alpha / N. Massive activations
are those of Sun et al. 2024 (arXiv 2402.17762): above 100, and 1000 times the median of their hidden states.

Streamed: attention weights are held for one block of queries of one text, never a whole map.

The attention sinks of a model by name: text, tokenizer and model for `sink_map`.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from surgery.calibration.attention_hook import AttentionHook, hook_attention
from surgery.calibration.layerwise import decoder_layers
from surgery.data.text import BUILTIN, begin_of_text, fitting_length, load_text, windows
from surgery.errors import SurgeryError
from surgery.runtime.surgery_attention import surgery_attention

ALPHA, MAGNITUDE, RATIO = 5.0, 100.0, 1000.0
BLOCK = 128  # queries whose weights are held at once


@dataclass(frozen=True)
class SinkMap:
    """What was found, means over texts. Masses are of the queries after a text's first real token.

    Attributes:
        first, others, learned: [layers][heads], share of the softmax that the first token, the other sinks and the
            base's learned sink take (`learned`: None where it has none).
        sinks: [layers][heads], other sinks in a text.
        first_value: [layers][KV heads], norm of the first token's value over the median of the text's other tokens.
        other_values: [layers][heads], the same of the other sinks, mean; None where a head has none.
        tokens: tokens that are other sinks, the most marked first: token, id, marks (by how many heads and texts),
            places and occurrences (where any head marks it, of all judged), positions (those marked most).
        residual: of each layer's output: largest magnitude, its ratio to the median, its channel.
        massive: channel, layers, magnitude, ratio and the places (token, position, count) of massive activations.
        texts, length, alpha: what was measured.
    """

    first: list[list[float]]
    others: list[list[float]]
    learned: list[list[float]] | None
    sinks: list[list[float]]
    first_value: list[list[float]]
    other_values: list[list[float | None]]
    tokens: list[dict]
    residual: list[dict]
    massive: list[dict]
    texts: int
    length: int
    alpha: float

    def to_dict(self) -> dict:
        return asdict(self)


def received(seen: AttentionHook, module, query, key, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention weight that each key of one text gets.

    Args:
        seen, module: as `hook_attention` gives them; `kwargs` are those of the attention call.
        query: [1, heads, n, head_dim]. key: [1, KV heads, n, head_dim].

    Returns:
        [heads, n], summed over all queries, float64, and [heads], what the first query gives to itself.
    """
    length, total, own = query.shape[2], 0.0, None
    for begin in range(0, length, BLOCK):
        rows = torch.arange(begin, min(begin + BLOCK, length))
        weights = seen.weights(module, query, key, rows, **kwargs)[0]
        own = weights[:, 0, 0].double() if own is None else own
        total = total + weights.double().sum(1)
    return total, own


def queries_of_keys(length: int, limit: int | None, device=None) -> torch.Tensor:
    """How many queries see each key of a text, long [length]. `limit`: the base's own sliding window."""
    left = length - torch.arange(length, device=device)
    return left if limit is None else left.clamp(max=limit)


def other_sinks(total: torch.Tensor, limit: int | None, alpha: float = ALPHA) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys are sinks: their mean weight is above alpha / N, N what a query sees at most. The first never is one.

    Keys that fewer than N / 2 queries see are not judged: as few neighbours as the last keys have look at any key.

    Args:
        total: [heads, n] of `received`.
        limit: the base's own sliding window.

    Returns:
        bool [heads, n], and which keys are judged, bool [n].
    """
    length = total.shape[-1]
    span, queries = min(length, limit or length), queries_of_keys(length, limit, total.device)
    judged = 2 * queries >= span
    judged[0] = False
    return judged & (total / queries > alpha / span), judged


def real_tokens(pieces: torch.Tensor, mask: torch.Tensor | None) -> list[slice]:
    """The slots of each text's real tokens: those that a mask [texts, length] gives 1, without holes."""
    if mask is None:
        return [slice(0, pieces.shape[1])] * len(pieces)
    found = []
    for row in mask.bool():
        slots = row.nonzero()[:, 0]
        if len(slots) < 2 or len(slots) != slots[-1] - slots[0] + 1:
            raise SurgeryError("a text must have at least 2 tokens, and padding only before and after them")
        found.append(slice(int(slots[0]), int(slots[-1]) + 1))
    return found


def sink_map(
    model, pieces: torch.Tensor, *, mask=None, tokenizer=None, alpha: float = ALPHA, batch: int = 1, progress=None
) -> SinkMap:
    """Measure a model's attention sinks.

    Args:
        model: in memory; it is left as it was.
        pieces: tokens, long [texts, length].
        mask: [texts, length], 1 for a real token; None: all are. Padding may be on either side.
        tokenizer: to name tokens; None: by number.
        alpha: a key is a sink where its mean weight is above alpha / N.
        batch: texts in one forward.
        progress: called with done, total and a label.

    Raises:
        SurgeryError: the heads of this model cannot be measured, or a surgery has changed its attention already.
    """
    spans = real_tokens(pieces, mask)

    def attention(module, query, key, value, attention_mask, **kwargs):
        found = layers[module.layer_idx]
        for row, text in enumerate(here):
            each = slice(row, row + 1)
            q, k, v = (part[each, :, spans[text]] for part in (query, key, value))
            total, own = received(seen, module, q, k, **kwargs)
            marked, judged = other_sinks(total, seen.windows[module.layer_idx], alpha)
            found.add(total, own, marked, v[0])
            marks[text, spans[text]] += marked.sum(0).cpu()
            may[text, spans[text]] |= judged.cpu()
        return surgery_attention(module, query, key, value, attention_mask, **kwargs)

    with hook_attention(model, attention) as seen, torch.no_grad():
        if any(getattr(module, "surgery_parameters", ()) for module in seen.modules):
            raise SurgeryError("a surgery set a bias or virtual keys in this model: measure its base")
        layers = [_Layer() for _ in seen.modules]
        marks, may = torch.zeros_like(pieces), torch.zeros_like(pieces, dtype=torch.bool)
        residual = _Residual(pieces, spans, len(layers))
        with residual.watch(model, seen):
            for begin in range(0, len(pieces), batch):
                here = residual.here = range(begin, min(begin + batch, len(pieces)))
                model.base_model(**_given(model, pieces, mask, list(here)), use_cache=False)
                if progress:
                    progress(here[-1] + 1, len(pieces), "sinks")

    def name(token: int) -> str:
        return str(token) if tokenizer is None else tokenizer.decode([token])

    tables = [layer.means() for layer in layers]
    learned = [table["learned"] for table in tables]
    return SinkMap(
        **{key: [table[key] for table in tables] for key in tables[0] if key != "learned"},
        learned=learned if any(max(row) > 1e-6 for row in learned) else None,
        tokens=_tokens(pieces, spans, marks, may, name),
        residual=residual.largest,
        massive=residual.massive(name),
        texts=len(pieces),
        length=pieces.shape[1],
        alpha=alpha,
    )


def _given(model, pieces: torch.Tensor, mask: torch.Tensor | None, rows: list[int]) -> dict[str, torch.Tensor]:
    """Arguments of a forward on some texts."""
    given = {"input_ids": pieces[rows].to(model.device)}
    if mask is not None:
        real = mask[rows].long().to(model.device)
        given |= {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    return given


class _Layer:
    """Sums over the texts of one layer."""

    def __init__(self):
        self.rows: dict[str, list[torch.Tensor]] = {}

    def add(self, total, own, marked, value) -> None:
        """Take one text: [heads, n] received and whether it is a sink, values [KV heads, n, head_dim]."""
        queries, heads = total.shape[1] - 1, len(total)
        norms = value.double().norm(dim=-1)
        norms = norms / norms[:, 1:].median(dim=-1, keepdim=True).values
        own_norms, count = norms.repeat_interleave(heads // len(norms), dim=0), marked.sum(-1)
        found = {
            "first": (total[:, 0] - own) / queries,
            "others": (total * marked).sum(-1) / queries,
            "learned": 1 - (total.sum(-1) - own) / queries,
            "sinks": count.double(),
            "first_value": norms[:, 0],
            "other_values": torch.where(count > 0, (own_norms * marked).sum(-1) / count.clamp(min=1), torch.nan),
        }
        for name, row in found.items():
            self.rows.setdefault(name, []).append(row.cpu())

    def means(self) -> dict[str, list]:
        found = {name: torch.stack(rows).nanmean(0).tolist() for name, rows in self.rows.items()}
        return found | {"other_values": [None if x != x else x for x in found["other_values"]]}


class _Residual:
    """Large values of the residual stream, after each decoder layer."""

    def __init__(self, pieces, spans, layers: int):
        self.pieces, self.spans, self.here = pieces, spans, range(0)
        self.largest = [{"magnitude": 0.0, "ratio": 0.0, "channel": 0} for _ in range(layers)]
        self.channels: dict[int, dict] = {}

    @contextmanager
    def watch(self, model, seen: AttentionHook):
        blocks = decoder_layers(model, seen.anatomy)
        hooks = [block.register_forward_hook(self._hook(number)) for number, block in enumerate(blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer: int):
        def after(_, args, out):
            for row, text in enumerate(self.here):
                self._add(layer, text, (out[0] if isinstance(out, tuple) else out)[row, self.spans[text]])

        return after

    def _add(self, layer: int, text: int, hidden: torch.Tensor) -> None:
        """Take a text's hidden states [n, channels] after a layer."""
        sizes = hidden.float().abs()
        ratios = sizes / sizes.median().clamp(min=torch.finfo(torch.float32).tiny)
        place = int(ratios.argmax())
        if ratios.flatten()[place] > self.largest[layer]["ratio"]:
            size, ratio = sizes.flatten()[place].item(), ratios.flatten()[place].item()
            self.largest[layer] = {"magnitude": size, "ratio": ratio, "channel": place % hidden.shape[1]}
        for position, channel in ((sizes > MAGNITUDE) & (ratios >= RATIO)).nonzero().tolist():
            new = {"channel": channel, "layers": [], "magnitude": 0.0, "ratio": 0.0, "places": Counter()}
            found = self.channels.setdefault(channel, new)
            found["layers"] = sorted({*found["layers"], layer})
            found["magnitude"] = max(found["magnitude"], sizes[position, channel].item())
            found["ratio"] = max(found["ratio"], ratios[position, channel].item())
            found["places"][int(self.pieces[text, self.spans[text]][position]), position] += 1

    def massive(self, name) -> list[dict]:
        found = sorted(self.channels.values(), key=lambda channel: -channel["ratio"])
        for channel in found:
            places = channel["places"].most_common(8)
            channel["places"] = [{"token": name(t), "position": p, "count": count} for (t, p), count in places]
        return found


def _tokens(pieces, spans, marks, may, name, most: int = 16) -> list[dict]:
    """The tokens that heads mark as sinks; marks [texts, length], how many (layer, head) do."""
    facts: dict[int, dict] = {}
    for text, span in enumerate(spans):
        rows = zip(pieces[text, span].tolist(), marks[text, span].tolist(), may[text, span].tolist(), strict=True)
        for position, (token, count, judged) in enumerate(rows):
            if not judged:
                continue
            found = facts.setdefault(token, {"marks": 0, "places": 0, "occurrences": 0, "positions": Counter()})
            found["occurrences"] += 1
            found["marks"] += count
            found["places"] += count > 0
            if count:
                found["positions"][position] += count
    order = sorted((token for token in facts if facts[token]["marks"]), key=lambda t: (-facts[t]["marks"], t))
    return [
        {"token": name(token), "id": token}
        | facts[token]
        | {"positions": [place for place, _ in facts[token]["positions"].most_common(3)]}
        for token in order[:most]
    ]


def survey_sinks(
    name: str, *, text=BUILTIN, samples: int = 8, length: int = 512, progress=None
) -> tuple[SinkMap, dict]:
    """Load a model and find its sinks.

    Args:
        name: a folder, `smollm2-135m` or a Hub id.
        text: see `load_text`; of the built-in text the calibration part.
        samples, length: pieces of text, and tokens in each (cut to the model's positions).
        progress: called with done, total and a label.

    Returns:
        What was found, and facts for people: model, text, and `bos`: the token, and whether the tokenizer adds it.

    Raises:
        SurgeryError: the model or the text cannot be read or measured.
    """
    from surgery.io.hub import resolve
    from surgery.io.loading import load_model, read_tokenizer
    from surgery.machine.transformers_logging import quiet_transformers

    source, text = resolve(name), load_text(text, part="calibration")
    with quiet_transformers():
        model, tokenizer = load_model(source.path), read_tokenizer(source.path)
    pieces = windows(text, tokenizer, fitting_length(model, length), samples)
    found = sink_map(model, pieces, tokenizer=tokenizer, progress=progress)
    bos = {"token": tokenizer.bos_token, "added": bool(begin_of_text(tokenizer))}
    return found, {"model": source.name, "text": text.title, "sha256": text.sha256[:12], "bos": bos}
