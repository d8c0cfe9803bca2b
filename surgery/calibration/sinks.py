"""The attention sinks of a model: where they are, how much attention they take, and which activations mark them.

Sinks other than the first token are found for each head and text by ACT's rule (Yu et al. 2024, arXiv 2406.15765): a
key is a sink if its column mean, the mean weight that it gets from the queries that see it, is above alpha / N.
The sink rate of a position is that of Gu et al. 2024 (arXiv 2410.10781): the share of heads and texts in which the key
there has a column mean above epsilon, among the first T tokens.
Massive activations are those of `surgery.calibration.massive`.

Memory holds the attention weights of one block of queries of one text, never a full map.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from surgery.calibration.attention_hook import AttentionHook, hook_attention
from surgery.calibration.layerwise import decoder_layers
from surgery.calibration.massive import MAGNITUDE, RATIO, relative_sizes
from surgery.calibration.scoring import inputs_of
from surgery.data.text import BUILTIN, begin_of_text, fitting_length, load_text, windows
from surgery.errors import SettingError, TextError, UnsupportedModelError
from surgery.machine.placement import exact
from surgery.machine.progress import begin
from surgery.runtime.surgery_attention import surgery_attention

ALPHA = 5.0
EPSILON, RATED = 0.3, 64  # of the sink rate, as in the paper: the threshold, and the number of tokens T
BLOCK = 128  # queries whose weights are in memory at once


@dataclass(frozen=True)
class SinkRules:
    """When a key counts as a sink.

    Attributes:
        alpha: a key other than the first is a sink if its mean weight is above alpha / N.
        epsilon, rated: threshold of the sink rate, and the number of first tokens that it reads; None: 64, or as many
            as the shortest text has.
    """

    alpha: float = ALPHA
    epsilon: float = EPSILON
    rated: int | None = None

    def rated_tokens(self, spans: list[slice]) -> int:
        """How many tokens the sink rate reads of texts with these slices of real tokens.

        Raises:
            SurgeryError: epsilon is no share, or a text is shorter than the tokens that were asked for.
        """
        if not 0 < self.epsilon < 1:
            raise SettingError(
                f"the threshold of the sink rate is {self.epsilon:g}",
                exists="a share between 0 and 1; the paper has 0.3",
            )
        shortest = min(span.stop - span.start for span in spans)
        if self.rated is not None and not 1 <= self.rated <= shortest:
            raise TextError(
                f"the sink rate reads the first {self.rated} tokens, and the shortest text has {shortest}",
                fix=f"at most {shortest} tokens, or longer texts",
            )
        return self.rated or min(RATED, shortest)


@dataclass(frozen=True)
class SinkMap:
    """The sinks of a model, as means over texts. Shares are averaged over the queries after a text's first real token.

    Attributes:
        first, others, learned: [layers][heads], share of the softmax of the first token, of the other sinks, and of
            the base's learned sink (`learned`: None if it has none).
        sinks: [layers][heads], number of other sinks in a text.
        first_value: [layers][KV heads], norm of the first token's value over the median of the text's other tokens.
        other_values: [layers][heads], the mean of this ratio over the other sinks; None if a head has no other sink.
        tokens: tokens that are other sinks, those with most marks first: token, id, marks (number of heads and texts),
            places (positions where any head marks it), occurrences (all judged positions), positions (the three with
            most marks).
        residual: for each layer's output: largest ratio to the median, with its magnitude and channel.
        massive: channel, layers, magnitude, ratio and places (token, position, count) of massive activations.
        rates: [layers][T], the sink rate of each of the first T positions: the share of heads and texts.
        texts, length, alpha, epsilon: number of texts, tokens in each, and the two thresholds.
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
    rates: list[list[float]]
    texts: int
    length: int
    alpha: float
    epsilon: float

    def to_dict(self) -> dict:
        """All attributes as plain data."""
        return asdict(self)


def received(hook: AttentionHook, module, query, key, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention weight that each key of one text receives.

    Args:
        hook, module: the result of `hook_attention`, and an attention module; `kwargs` are those of its call.
        query: [1, heads, n, head_dim]. key: [1, KV heads, n, head_dim].

    Returns:
        The weight of each key, summed over all queries, float64 [heads, n]; and the weight of the first query on
        itself, [heads].
    """
    length, total, own = query.shape[2], 0.0, None
    for first in range(0, length, BLOCK):
        rows = torch.arange(first, min(first + BLOCK, length))
        weights = hook.weights(module, query, key, rows, **kwargs)[0]
        weights = exact(weights)
        own = weights[:, 0, 0] if own is None else own
        total = total + weights.sum(1)
    return total, own


def column_means(hook: AttentionHook, module, query, key, count: int, **kwargs) -> torch.Tensor:
    """The mean weight of each of the first `count` keys over the queries up to there that come at or after it.

    Args: as for `received`.

    Returns:
        float64 [heads, count].
    """
    near = query[:, :, :count], key[:, :, :count]
    total = received(hook, module, *near, **kwargs)[0]
    return total / torch.arange(count, 0, -1, device=total.device)


def queries_of_keys(length: int, limit: int | None, device=None) -> torch.Tensor:
    """The number of queries that see each key of a text, long [length]. `limit`: the base's own sliding window."""
    left = length - torch.arange(length, device=device)
    return left if limit is None else left.clamp(max=limit)


def other_sinks(total: torch.Tensor, limit: int | None, alpha: float = ALPHA) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the keys that are sinks: their mean weight is above alpha / N, where N is the most keys that a query sees.

    The first key is never counted. Keys that fewer than N / 2 queries see are not judged, since the few queries right
    after a key always attend to it.

    Args:
        total: [heads, n], from `received`.
        limit: the base's own sliding window.

    Returns:
        Which keys are sinks, bool [heads, n], and which keys are judged, bool [n].
    """
    length = total.shape[-1]
    span, queries = min(length, limit or length), queries_of_keys(length, limit, total.device)
    judged = 2 * queries >= span
    judged[0] = False
    return judged & (total / queries > alpha / span), judged


def real_tokens(sequences: torch.Tensor, mask: torch.Tensor | None) -> list[slice]:
    """The slice of each text's real tokens, where the mask [texts, length] is 1; a gap raises a SurgeryError."""
    if mask is None:
        return [slice(0, sequences.shape[1])] * len(sequences)
    spans = []
    for row in mask.bool():
        slots = row.nonzero()[:, 0]
        if len(slots) < 2 or len(slots) != slots[-1] - slots[0] + 1:
            raise TextError("a text must have at least 2 tokens, and padding only before and after them")
        spans.append(slice(int(slots[0]), int(slots[-1]) + 1))
    return spans


def sink_map(
    model, sequences: torch.Tensor, *, mask=None, tokenizer=None, rules=SinkRules(), batch: int = 1, progress=None
) -> SinkMap:
    """Measure a model's attention sinks.

    Args:
        model: in memory; it is not changed.
        sequences: tokens, long [texts, length].
        mask: [texts, length], 1 for a real token; None: all are real. Padding may be on either side.
        tokenizer: gives the text of tokens; None: tokens are shown as their ids.
        rules: a `SinkRules`.
        batch: texts in one forward pass.
        progress: called with done, total and a label.

    Raises:
        SurgeryError: the heads cannot be measured, a surgery set a bias or virtual keys, or as `rules` raises it.
    """
    spans = real_tokens(sequences, mask)
    count = rules.rated_tokens(spans)

    def attention(module, query, key, value, attention_mask, **kwargs):
        layer = layers[module.layer_idx]
        for row, text in enumerate(texts):
            one = slice(row, row + 1)
            q, k, v = (tensor[one, :, spans[text]] for tensor in (query, key, value))
            total, own = received(hook, module, q, k, **kwargs)
            marked, judged = other_sinks(total, hook.windows[module.layer_idx], rules.alpha)
            layer.add(total, own, marked, v[0])
            layer.rate(column_means(hook, module, q, k, count, **kwargs) > rules.epsilon)
            marks[text, spans[text]] += marked.sum(0).cpu()
            eligible[text, spans[text]] |= judged.cpu()
        return surgery_attention(module, query, key, value, attention_mask, **kwargs)

    with hook_attention(model, attention) as hook, torch.no_grad():
        if any(getattr(module, "surgery_parameters", ()) for module in hook.modules):
            raise UnsupportedModelError("a surgery set a bias or virtual keys in this model: measure its base")
        layers = [_Layer() for _ in hook.modules]
        marks, eligible = torch.zeros_like(sequences), torch.zeros_like(sequences, dtype=torch.bool)
        residual = _Residual(sequences, spans, len(layers))
        with residual.watch(model, hook):
            begin(progress, "measuring sinks", len(sequences))
            for start in range(0, len(sequences), batch):
                texts = residual.texts = range(start, min(start + batch, len(sequences)))
                model.base_model(**_inputs(model, sequences, mask, list(texts)), use_cache=False)
                if progress:
                    progress(texts[-1] + 1, len(sequences), "measuring sinks")

    def name(token: int) -> str:
        return str(token) if tokenizer is None else tokenizer.decode([token])

    return SinkMap(
        **_means(layers),
        tokens=_tokens(sequences, spans, marks, eligible, name),
        residual=residual.largest,
        massive=residual.massive(name),
        texts=len(sequences),
        length=sequences.shape[1],
        alpha=rules.alpha,
        epsilon=rules.epsilon,
    )


def _means(layers: list[_Layer]) -> dict[str, list | None]:
    """The figures of each layer, name -> [layers][...]."""
    tables = [layer.means() for layer in layers]
    found = {name: [table[name] for table in tables] for name in tables[0]}
    return found | {"learned": found["learned"] if any(max(row) > 1e-6 for row in found["learned"]) else None}


def _inputs(model, sequences: torch.Tensor, mask: torch.Tensor | None, rows: list[int]) -> dict[str, torch.Tensor]:
    """The arguments of a forward pass on some texts."""
    ids = sequences[rows].to(model.device)
    return {"input_ids": ids} if mask is None else inputs_of(model.base_model, ids, mask[rows].long().to(model.device))


class _Layer:
    """Figures of one layer, collected over the texts."""

    def __init__(self):
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.above: list[torch.Tensor] = []

    def rate(self, above: torch.Tensor) -> None:
        """Add which keys of a text's beginning have a column mean above epsilon: bool [heads, T]."""
        self.above.append(above.cpu())

    def add(self, total, own, marked, value) -> None:
        """Add one text: results of `received` and `other_sinks`, and the values [KV heads, n, head_dim]."""
        queries, heads, marked = total.shape[1] - 1, len(total), marked.to(total.device)
        norms = exact(value).norm(dim=-1)
        norms = norms / norms[:, 1:].median(dim=-1, keepdim=True).values
        own_norms, count = norms.repeat_interleave(heads // len(norms), dim=0), marked.sum(-1)
        figures = {
            "first": (total[:, 0] - own) / queries,
            "others": (total * marked).sum(-1) / queries,
            "learned": 1 - (total.sum(-1) - own) / queries,
            "sinks": exact(count),
            "first_value": norms[:, 0],
            "other_values": torch.where(count > 0, (own_norms * marked).sum(-1) / count.clamp(min=1), torch.nan),
        }
        for name, row in figures.items():
            self.rows.setdefault(name, []).append(row.cpu())

    def means(self) -> dict[str, list]:
        """The mean of each figure over the texts, [heads] or [KV heads], None if a head has no value; `rates`: [T]."""
        means = {name: torch.stack(rows).nanmean(0).tolist() for name, rows in self.rows.items()}
        means["rates"] = torch.stack(self.above).double().mean((0, 1)).tolist()
        return means | {"other_values": [None if x != x else x for x in means["other_values"]]}


class _Residual:
    """Large values of the residual stream, after each decoder layer."""

    def __init__(self, sequences, spans, layers: int):
        self.sequences, self.spans, self.texts = sequences, spans, range(0)
        self.largest = [{"magnitude": 0.0, "ratio": 0.0, "channel": 0} for _ in range(layers)]
        self.channels: dict[int, dict] = {}

    @contextmanager
    def watch(self, model, hook: AttentionHook):
        """Record the output of every decoder layer while the context is open; `texts`: those of the forward pass."""
        blocks = decoder_layers(model, hook.anatomy)
        handles = [block.register_forward_hook(self._hook(layer)) for layer, block in enumerate(blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int):
        def after(_, args, out):
            for row, text in enumerate(self.texts):
                self._add(layer, text, (out[0] if isinstance(out, tuple) else out)[row, self.spans[text]])

        return after

    def _add(self, layer: int, text: int, hidden: torch.Tensor) -> None:
        """Add a text's hidden states [n, channels] after a layer."""
        sizes, ratios = relative_sizes(hidden)
        index = int(ratios.argmax())
        if ratios.flatten()[index] > self.largest[layer]["ratio"]:
            size, ratio = sizes.flatten()[index].item(), ratios.flatten()[index].item()
            self.largest[layer] = {"magnitude": size, "ratio": ratio, "channel": index % hidden.shape[1]}
        for position, channel in ((sizes > MAGNITUDE) & (ratios >= RATIO)).nonzero().tolist():
            new = {"channel": channel, "layers": [], "magnitude": 0.0, "ratio": 0.0, "places": Counter()}
            entry = self.channels.setdefault(channel, new)
            entry["layers"] = sorted({*entry["layers"], layer})
            entry["magnitude"] = max(entry["magnitude"], sizes[position, channel].item())
            entry["ratio"] = max(entry["ratio"], ratios[position, channel].item())
            entry["places"][int(self.sequences[text, self.spans[text]][position]), position] += 1

    def massive(self, name) -> list[dict]:
        """The channels with massive activations, the largest ratio first; `name` turns a token id into text."""
        channels = sorted(self.channels.values(), key=lambda channel: -channel["ratio"])
        for channel in channels:
            most_common = channel["places"].most_common(8)
            channel["places"] = [{"token": name(t), "position": p, "count": count} for (t, p), count in most_common]
        return channels


def _tokens(sequences, spans, marks, eligible, name, most: int = 16) -> list[dict]:
    """The tokens that heads mark as sinks; `marks` [texts, length] has the number of heads, over all layers."""
    counts: dict[int, dict] = {}
    for text, span in enumerate(spans):
        rows = zip(*(table[text, span].tolist() for table in (sequences, marks, eligible)), strict=True)
        for position, (token, count, judged) in enumerate(rows):
            if not judged:
                continue
            entry = counts.setdefault(token, {"marks": 0, "places": 0, "occurrences": 0, "positions": Counter()})
            entry["occurrences"] += 1
            entry["marks"] += count
            entry["places"] += count > 0
            if count:
                entry["positions"][position] += count
    order = sorted((token for token in counts if counts[token]["marks"]), key=lambda t: (-counts[t]["marks"], t))
    return [
        {"token": name(token), "id": token}
        | counts[token]
        | {"positions": [position for position, _ in counts[token]["positions"].most_common(3)]}
        for token in order[:most]
    ]


def survey_sinks(
    name: str, *, text=BUILTIN, samples: int = 8, length: int = 512, rules=SinkRules(), progress=None
) -> tuple[SinkMap, dict]:
    """Load a model by its name and measure its sinks.

    Args:
        name: a folder, `smollm2-135m` or a Hub id.
        text: see `load_text`; the calibration part of the built-in text is used.
        samples, length: number of samples of the text, and tokens in each (cut to the model's positions).
        rules: a `SinkRules`.
        progress: called with done, total and a label.

    Returns:
        The sinks, and a dict with model, text, and `bos` (the token, and whether the tokenizer adds it).

    Raises:
        SurgeryError: the model or the text cannot be read or measured.
    """
    from surgery.io.hub import resolve
    from surgery.io.loading import load_for_run, read_config, read_tokenizer

    source, text = resolve(name), load_text(text, part="calibration")
    tokenizer, length = read_tokenizer(source.path), fitting_length(read_config(source.path), length)
    sequences = windows(text, tokenizer, length, samples)
    rules.rated_tokens([slice(0, sequences.shape[1])])  # raises before the model is loaded
    model = load_for_run(source.path)
    sinks = sink_map(model, sequences, tokenizer=tokenizer, rules=rules, progress=progress)
    bos = {"token": tokenizer.bos_token, "added": bool(begin_of_text(tokenizer))}
    return sinks, {"model": source.name, "text": text.title, "sha256": text.sha256[:12], "bos": bos}
