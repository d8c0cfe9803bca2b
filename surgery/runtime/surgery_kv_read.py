"""Decoding steps that read a part of the cache, and the interface of a reader, which says which part.

An entry of the `surgery` block may hold `read`: a name, the settings of the reader, and perhaps `heads`, the indices
of the KV heads that read so (left out: all that see every token):

    {"name": "index", "keys": 1024, "sinks": 4, "recent": 128, "group": "sum"}

The cache stays whole. A call of one query behind a past is a step, and reads a part; a call of more is a prompt or a
chunk of one, and reads all. So do calls without a cache. A step always reads the first `sinks` tokens of a row and the
last `recent` ones. A reader chooses among the others, for each KV head: its query heads read the same keys, as they do
in the cache. Keys are ranked by the model's own scores, without the biases of other parts.

A new reader is one file: a subclass of `Reader` whose fields are its settings, with `READER = YourReader` at its end,
and a line in `surgery_config.FILES`, `"read.<name>": "<file>"`. surgery_kv_read_index.py is a short example.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .surgery_config import FILES, KV_HEADS, HeadCost, Parameter, Part, is_whole, used_parts
from .surgery_kept_store import KeptStore
from .surgery_kv_entry import fault_of_heads, heads_under, remaining_heads, rule_of
from .surgery_stores import KeyValues, Scoring, rows_at
from .surgery_visibility import Visibility

COPY = 3  # keys that attention passes over in the time in which one is copied and read
BASIS = "surgery_read_basis"  # parameter: for each KV head, the directions [head_dim, dims] in which keys are ranked


@dataclass
class DecodingStep:
    """One decoding step of the heads of one kind in one layer, as a reader sees it.

    Attributes:
        layer: index of the layer.
        kv_heads: indices of these KV heads in the layer.
        query: [batch, KV heads, group, head_dim], after RoPE.
        keys, values: [batch, KV heads, N, head_dim], all that is stored; the step's own token is the last.
        positions: long [1 or batch, N], counted from a row's first real token; -1 for padding.
        scoring: the factor on the scores and their cap.
        store: has what the reader noted with the keys (`notes`), and of the last steps (`state`).
        parameters: the reader's parameters, of these KV heads.
    """

    layer: int
    kv_heads: list[int]
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scoring: Scoring
    store: KeptStore
    parameters: dict[str, torch.Tensor]

    def weights(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The softmax of q.k over all real keys, [batch, KV heads, group, N], in float32 or better.

        Args:
            query, keys: those of the step, or shorter vectors that stand for them.
        """
        scores = self.scores(query, keys)
        if self.scoring.mask is not None:
            scores = scores.masked_fill((self.positions < 0)[:, None, None], -torch.inf)
        return scores.softmax(-1)

    def scores(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The scaled scores, with their cap; arguments and shape as for `weights`."""
        product = (query * self.scoring.scale) @ keys.mT  # which spares a pass over all scores
        scores = product.to(torch.promote_types(product.dtype, torch.float32))
        cap = self.scoring.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    @property
    def now(self) -> torch.Tensor:
        """The position of the step's token, long [1 or batch]."""
        return self.positions[:, -1]


@dataclass
class Reader:
    """The base class of readers.

    Attributes:
        sinks: first tokens of a row that every step reads.
        recent: last tokens that every step reads.
    """

    sinks: int = 4
    recent: int = 128

    def choose(self, step: DecodingStep) -> torch.Tensor | None:
        """The slots of the keys that a step reads, long [batch, KV heads, m], -1 for none; None: all."""
        raise NotImplementedError

    def noted(self, keys: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is noted with new keys [batch, KV heads, n, head_dim]: name -> [batch, KV heads, n, ...]."""
        return {}

    @property
    def least(self) -> int:
        """A step behind no more tokens reads all."""
        return self.sinks + self.recent

    def parameter_shapes(self, kv_heads: int, head_dim: int) -> dict[str, list[int]]:
        """The shapes of the reader's parameters, by their names in the checkpoint."""
        return {}

    def problem(self) -> str:
        """The error in the settings, "" if there is none."""
        for name, smallest in (("sinks", 0), ("recent", 1)):
            if not is_whole(getattr(self, name), smallest):
                return f"{name} is {getattr(self, name)!r}, and must be whole and from {smallest}"
        return ""

    def always(self, step: DecodingStep) -> torch.Tensor:
        """The keys that every step reads, bool [1 or batch, N]."""
        positions = step.positions
        near = positions > step.now[:, None] - self.recent
        return (positions >= 0) & (near | (positions < self.sinks))

    def near(self, step: DecodingStep) -> torch.Tensor:
        """The slots of the keys that every step reads, long [batch, m], -1 for none."""
        batch, end = step.keys.shape[0], step.keys.shape[2]
        start = end - 1 - step.now[:, None]  # [1 or batch, 1], the slot of a row's first real token
        sinks = start + torch.arange(self.sinks, device=start.device)
        recent = torch.arange(max(end - self.recent, 0), end, device=start.device)[None]
        sinks = sinks.masked_fill(sinks >= recent[:, :1], -1)  # a recent token is no sink besides
        recent = recent.masked_fill(recent < start, -1)
        return torch.cat([sinks, recent.expand(len(sinks), -1)], dim=-1).expand(batch, -1)

    def best(self, step: DecodingStep, scores: torch.Tensor, count: int) -> torch.Tensor:
        """The slots of what every step reads, and of the `count` other keys with the highest scores.

        Args:
            scores: [batch, KV heads, N].
        """
        scores = scores.masked_fill(self.always(step)[:, None], torch.inf)
        if step.scoring.mask is not None:
            scores = scores.masked_fill((step.positions < 0)[:, None], -torch.inf)
        top = scores.topk(min(count + self.sinks + self.recent, scores.shape[-1]), dim=-1)
        return top.indices.masked_fill(top.values == -torch.inf, -1)


@dataclass
class SomeKeys(Reader):
    """A reader that reads a fixed number of keys besides sinks and recent tokens.

    Attributes:
        keys: so many.
    """

    keys: int = 1024

    @property
    def least(self) -> int:
        return self.sinks + self.recent + self.keys

    def problem(self) -> str:
        if not is_whole(self.keys, 1):
            return f"keys is {self.keys!r}, and must be whole and from 1"
        return super().problem()


@dataclass
class RankedKeys(SomeKeys):
    """A reader that ranks keys by weights of attention.

    Attributes:
        group: how the weights of the query heads of a KV head are put together: their "sum" or "max".
    """

    group: str = "sum"

    def of_group(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of a KV head [batch, KV heads, N] from those of its query heads [batch, KV heads, group, N]."""
        return weights.sum(2) if self.group == "sum" else weights.amax(2)

    def problem(self) -> str:
        return super().problem() or (
            "" if self.group in ("sum", "max") else f"group is {self.group!r}; it is sum or max"
        )


def reader_of(entry: dict) -> Reader:
    """The reader that a layer's entry `read` describes.

    Raises:
        ValueError: as of `rule_of`.
    """
    return rule_of("read", entry)


class LayerReader:
    """The reader of one layer, as the attention function calls it."""

    def __init__(self, reader: Reader, layer: int):
        self.reader, self.layer = reader, layer

    def attend(self, module, kind: int, query, view: KeyValues, terms, scoring: Scoring, attend) -> torch.Tensor:
        """Attention of the heads of one kind to what a step reads; arguments as for `LayerPolicy.attend`."""
        if view.store is None:
            if query.shape[2] < view.keys.shape[2]:
                raise ValueError("this surgery notes in the model's own cache what it reads: leave the cache out")
            return attend(query, view, terms)
        heads = module.surgery_heads
        parameters = {
            name.removeprefix("surgery_read_"): heads.split_keys(getattr(module, name)[None])[kind][0]
            for name in module.surgery_parameters
            if name.startswith("surgery_read_")
        }
        with view.store.on(query.device):
            noted = self.reader.noted(view.keys, parameters)
            whole, past = view.store.add(view.keys, view.values, **noted), view.store.seen - view.new
            whole.prompt_slots = view.prompt_slots
            if query.shape[2] > 1 or past == 0 or whole.end <= self.reader.least:  # of every row
                return attend(query, whole, terms)
            with torch.no_grad():
                _, kv_heads = heads.spec[1][kind]
                grouped = query.unflatten(1, (len(kv_heads), -1)).squeeze(3)
                positions = scoring.positions(0, whole.end, query.device)
                shown = whole.keys, whole.values, positions, scoring, view.store, parameters
                slots = self.reader.choose(DecodingStep(self.layer, kv_heads, grouped, *shown))
            return attend(query, whole if slots is None else _read(whole, slots), terms)


def _read(whole: KeyValues, slots: torch.Tensor) -> KeyValues:
    """The view of some keys of a view.

    Args:
        slots: long [batch, KV heads, m], -1 for none.
    """
    (*heads, end, _), width = whole.keys.shape, slots.shape[-1]
    if COPY * width >= end:
        read = torch.zeros(*heads, end + 1, dtype=torch.bool, device=slots.device)
        read = read.scatter(2, slots.masked_fill(slots < 0, end), True)[..., :end]
        slots = torch.arange(end, device=slots.device).masked_fill(~read, -1)
        return replace(whole, slots=slots, gaps=True, store=None)
    slots = slots.sort(dim=-1).values
    keys, values = (rows_at(tensor, slots.clamp(min=0)) for tensor in (whole.keys, whole.values))
    return replace(whole, keys=keys, values=values, slots=slots, gaps=bool((slots < 0).any()), store=None)


class ReaderPart(Part):
    """A reader for the decoding steps of full heads. An entry has `read` (see the module's docstring)."""

    keys = ("read",)
    parameters = {BASIS: Parameter(0.0, KV_HEADS)}  # noqa: RUF012

    def kv_cost(self, layer: dict, heads: list[HeadCost]) -> list[HeadCost]:
        if BASIS not in layer.get("parameters", {}):
            return heads
        _, size, dims = layer["parameters"][BASIS]  # a projection of each key stands beside it
        under = heads_under(layer, "read", len(heads))
        more = 1 + dims / (2 * size)
        return [
            cost._replace(growing=cost.growing * more) if cost.growing and head in under else cost
            for head, cost in enumerate(heads)
        ]

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        try:
            reader = reader_of(layer["read"])
        except (ValueError, TypeError) as error:
            return f"has a reader that cannot be: {error}"
        if fault := fault_of_heads(layer, "read", len(groups)):
            return fault
        if shared := heads_under(layer, "read", len(groups)) & heads_under(layer, "policy", len(groups)):
            return f"has a reader and a policy for KV heads {sorted(shared)}: a policy leaves a step nothing to choose"
        text, named = config.get_text_config(), layer.get("parameters", {})
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        right = reader.parameter_shapes(len(groups), size)
        own = {name: shape for name, shape in named.items() if name in self.parameters}
        if own != right:
            return f"has a reader whose parameters are {own}; they are {right}"
        for name, part in used_parts(layer).items():
            if part.by_slots and not part.of_prompts:
                return f"has a reader and {name}, which needs all keys in order"
            if part.by_first_token(layer) and not reader.sinks:
                return f"has {name}, which needs the first token, and a reader that may not read it: sinks from 1"
        return ""

    def methods(self, layer: dict) -> set[str]:
        return {f"read.{layer['read']['name']}"} & set(FILES)

    def visibilities(self, layer: dict, heads: list[Visibility]) -> list[Visibility]:
        under = heads_under(layer, "read", len(heads))
        return [
            replace(seen, keeper="read")
            if head in under and seen.simplified().window is None and not seen.keeper
            else seen
            for head, seen in enumerate(heads)
        ]

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        if "read" in layer:
            module.surgery_keepers["read"] = LayerReader(reader_of(layer["read"]), module.layer_idx)

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("visibility in decoding",)

    def after_heads_change(self, layer: dict, queries: list[int], kv_heads: list[int]) -> dict:
        return {"read": remaining_heads(layer["read"], kv_heads)}

    def by_prompt(self, layer: dict) -> bool:
        return True

    def in_own_cache(self, layer: dict) -> bool:
        return True

    def describe(self, layer: dict) -> tuple[str, str]:
        return "what a decoding step reads", layer["read"]["name"]

    def display_key(self, layer: dict):
        return layer["read"]

    def probe_length(self, layer: dict, least: int) -> int:
        return max(least, reader_of(layer["read"]).least + 16)


PART = ReaderPart()
