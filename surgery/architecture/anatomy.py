"""Where attention is in a model: the facts every operation plans with.

`Anatomy.of(x)` reads a checkpoint folder (its config and the safetensors headers, no weight), a loaded model
or a bare config. What it does not understand it names: zero matches and partial matches are errors, a family
that is only *like* a known one is said to be a guess.

The facts of one attention layer, as plain as its family's row and its checkpoint say them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from surgery.architecture.families import Family
from surgery.errors import SurgeryError
from surgery.io.safetensors import DTYPE_BITS, TORCH_NAMES

BYTES = {dtype: DTYPE_BITS[dtype] // 8 for dtype in TORCH_NAMES}


@dataclass(frozen=True)
class Anatomy:
    """The attention of one model.

    Attributes:
        model_type: of the (text) model, `composite` the model_type of the whole where it has other parts.
        layers: one entry a layer.
        guess: the family is unknown and was understood by its shape.
        edits: what differs from the config as read, text config field -> value.
        tensors: every stored tensor, name -> (dtype, shape); empty if only a config was given.
    """

    model_type: str
    layers: tuple[LayerAnatomy, ...]
    guess: bool = False
    composite: str | None = None
    dtype: str = ""
    config: Any = None
    edits: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, source, tensors: dict | None = None) -> Anatomy:
        """Anatomy of a checkpoint folder, a loaded model or a config.

        Args:
            source: folder path, `PreTrainedModel` or `PreTrainedConfig`.
            tensors: name -> (dtype, shape) where the caller already knows them.

        Raises:
            SurgeryError: no attention found, only part of it, or of a form that is not understood.
        """
        from surgery.architecture.detect import read_anatomy
        from surgery.io import model_folder as folder

        if isinstance(source, str | Path):
            config, where = folder.load_config(Path(source)), str(source)
            tensors = tensors if tensors is not None else folder.tensor_table(Path(source))
        elif hasattr(source, "named_parameters"):
            config, where, tensors = source.config, type(source).__name__, folder.model_table(source)
        else:
            config, where, tensors = source, type(source).__name__, tensors or {}
        return read_anatomy(config, tensors, where)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values by which the cache grows with each token, in the checkpoint's dtype."""
        size = BYTES.get(self.dtype, 2)
        return sum(2 * (layer.kv_heads - len(layer.streaming)) * layer.head_dim * size for layer in self.layers)

    @property
    def kv_bytes_fixed(self) -> int:
        """Bytes of sinks and windows of streaming heads: what the cache holds however long the text is."""
        streams = (2 * len(x.streaming) * (x.sinks + x.streaming_window) * x.head_dim for x in self.layers)
        return BYTES.get(self.dtype, 2) * sum(streams)

    @property
    def surgical(self) -> bool:
        """Whether this is a checkpoint with a `surgery` block."""
        return getattr(self.config, "surgery", None) is not None

    @property
    def alike(self) -> bool:
        """Whether all layers have the same heads, each KV head read by equally many."""
        shapes = {(layer.heads, layer.kv_heads, layer.query_groups) for layer in self.layers}
        return len(shapes) == 1 and not self.layers[0].query_groups

    @property
    def parameters(self) -> int:
        """Number of stored values (tied tensors once); 0 if only the config is known."""
        return sum(prod(shape) for _, shape in self.tensors.values())

    def kv_heads_problem(self, kv_heads: int) -> str:
        """Why a stock checkpoint of this family cannot have `kv_heads` KV heads; "" if it can."""
        layer = self.layers[0]
        if layer.layout.kv_field is None:
            return (
                f"{self.model_type} has no KV-head number: its config accepts num_key_value_heads and the forward "
                f"ignores it, so every stock {self.model_type} has {layer.heads} KV heads"
            )
        old_falcon = layer.layout.kv_field == "falcon" and not self.config.new_decoder_architecture
        if old_falcon and kv_heads not in (1, layer.heads):
            return (
                f"this falcon (old decoder) has a switch, multi_query, and no number: 1 KV head or {layer.heads} "
                f"are possible, {kv_heads} are not"
            )
        return ""

    def heads_problem(self, heads: int, kv_heads: int) -> str:
        """Why a stock checkpoint of this family cannot have so many heads of the size they have; "" if it can."""
        if self.guess or not self.layers[0].layout.head_dim:
            reason = "is not a known family" if self.guess else "divides its hidden size by its heads"
            return f"{self.model_type} {reason}: a head's size cannot be kept when heads go"
        if self.layers[0].qk_norm == "shared" and self.model_type == "phi":
            return "phi makes its QK-norm as wide as its hidden size divided by its heads"
        try:  # some configs refuse what their own forward would run (llama: heads that do not divide the hidden size)
            config = type(self.config).from_dict(self.config.to_dict() | self._heads_edits(heads, kv_heads))
            getattr(config, "validate", bool)()  # of a surgical model, making it does not
        except Exception as error:
            reason = str(error).strip().splitlines()[-1].strip()
            return f"the config of {self.model_type} refuses {heads} query heads ({reason})"
        return ""

    def _heads_edits(self, heads: int, kv_heads: int) -> dict[str, int]:
        size, field = self.layers[0].head_dim, self.layers[0].layout.kv_field
        return {"num_attention_heads": heads, "head_dim": size} | ({field: kv_heads} if field else {})

    def runtime_problem(self) -> str:
        """Why the surgical tier cannot serve this model; "" if it can."""
        if self.guess:
            return f"{self.model_type} is not a known family"
        if not (layout := self.layers[0].layout).interface:
            since = layout.since and f" (from version {layout.since} on it does)"
            return f"{self.model_type} does not use the attention interface of the installed Transformers{since}"
        if getattr(self.config, "output_attentions", False):
            return "output_attentions: true, as its config says, asks for weights that the surgical tier never holds"
        return "composites (vision + text) are not supported by the surgical tier" if self.composite else ""

    def shapes_problem(self) -> str:
        """Why the layers of this model cannot differ in their heads, even on the surgical tier; "" if they can."""
        layout = self.layers[0].layout
        if reason := self.runtime_problem():
            return reason
        counted = layout.qkv or not layout.head_dim or layout.kv_field != "num_key_value_heads"
        if counted or self.layers[0].norm_per_head:
            return f"the forward of {self.model_type} counts heads by its config, one number for all layers"
        return ""

    def with_kv_heads(self, kv_heads: int) -> Anatomy:
        """This anatomy with `kv_heads` KV heads in every layer, and the config edits that say so.

        Raises:
            SurgeryError: the family's config has no number for it (an operation asks `kv_heads_problem` first).
        """
        layout = self.layers[0].layout
        if layout.kv_field is None and kv_heads != self.layers[0].kv_heads:
            raise SurgeryError(self.kv_heads_problem(kv_heads))
        if layout.kv_field is None:
            return self
        edits = {layout.kv_field: kv_heads}
        if layout.kv_field == "falcon":
            edits = {"num_kv_heads": kv_heads}
            if not self.config.new_decoder_architecture:
                multi = kv_heads == 1 and self.layers[0].heads > 1
                layout = replace(layout, layout="rows" if multi else "grouped")
                edits = {"multi_query": multi, "num_kv_heads": self.layers[0].heads}
        layers = tuple(replace(layer, kv_heads=kv_heads, kv_numbers=(), layout=layout) for layer in self.layers)
        return replace(self, layers=layers, edits=self.edits | edits)

    def with_kv_heads_by_layer(self, kv_heads: list[int]) -> Anatomy:
        """This anatomy with so many KV heads in each layer; where they differ, the surgical tier alone has them."""
        if len(set(kv_heads)) == 1:
            return self.with_kv_heads(kv_heads[0])
        pairs = zip(self.layers, kv_heads, strict=True)
        made = (old if old.kv_heads == n else replace(old, kv_heads=n, kv_numbers=()) for old, n in pairs)
        return replace(self, layers=tuple(made))

    def with_layers(self, layers: list[LayerAnatomy], stock: bool) -> Anatomy:
        """This anatomy with other heads; `stock`: all layers alike, and the config says so."""
        first = layers[0]
        edits = self._heads_edits(first.heads, first.kv_heads) if stock else {}
        return replace(self, layers=tuple(layers), edits=self.edits | edits)

    def with_streaming(self, streaming: list[list[int]], sinks: int, window: int) -> Anatomy:
        """This anatomy with these KV heads of each layer seeing sinks + window."""
        layers = tuple(
            replace(layer, streaming=tuple(heads), sinks=sinks, streaming_window=window)
            for layer, heads in zip(self.layers, streaming, strict=True)
        )
        return replace(self, layers=layers)

    def to_dict(self) -> dict:
        """Plain data, for `--json`."""
        keys = (
            "index", "path", "heads", "kv_heads", "head_dim", "rotary", "positions", "qk_norm", "window", "soft_cap",
        )  # fmt: skip
        layers = [
            {key: getattr(layer, key) for key in (*keys, "biases", "dtype", "sparse")}
            | {"sinks": bool(layer.layout.sinks), "streaming": layer.split_facts, "query_groups": layer.query_groups}
            for layer in self.layers
        ]
        return {
            "model_type": self.model_type,
            "composite": self.composite,
            "guess": self.guess,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes_fixed": self.kv_bytes_fixed,
            "interface": self.layers[0].layout.interface,
            "layers": layers,
        }

    def edit_config(self, raw: dict) -> dict:
        """A config.json with this anatomy's edits, everything else as it stands."""
        if self.composite and "text_config" in raw:
            return raw | {"text_config": raw["text_config"] | self.edits}
        return raw | self.edits


def stored_dtypes(anatomy: Anatomy) -> list[str]:
    """The floating-point dtypes of the stored weights, sorted; RoPE tables of old checkpoints are not loaded."""
    names = {dtype for name, (dtype, _) in anatomy.tensors.items() if not name.endswith(".inv_freq")}
    return sorted(names & set(TORCH_NAMES))


@dataclass(frozen=True)
class LayerAnatomy:
    """One attention layer.

    Attributes:
        index, path: the layer's number and its attention module's path in this file or model.
        heads, kv_heads, head_dim: query heads, KV heads, channels of one head.
        rotary: channels that RoPE turns (0: none; less than head_dim: partial).
        positions: "half", "interleaved", "learned", "alibi", "none" or "unknown" (a guessed family).
        qk_norm: None, "shared", "per head", "modules" or "whole" (see families.py).
        window: sliding window in tokens, or None for full attention.
        soft_cap: cap on the scores, or None.
        biases: which of "q", "k", "v", "o" have a bias (letters in that order).
        dtype: of the projections, in safetensors' spelling; "" when only the config is known.
        layout: the family's row, with Falcon's variants settled.
        query_groups: query heads that read each KV head, where they are not equally many; else ().
        query_numbers, kv_numbers: what the base calls these heads, where some of its heads are gone; else ().
        streaming: KV heads that see only `sinks` first tokens and the last `streaming_window` (head split).
        sparse: settings of sparse prefill, as in the `surgery` block; None: prefill is dense.
    """

    index: int
    path: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    positions: str
    qk_norm: str | None
    window: int | None
    soft_cap: float | None
    biases: str
    dtype: str
    layout: Family
    query_groups: tuple[int, ...] = ()
    query_numbers: tuple[int, ...] = ()
    kv_numbers: tuple[int, ...] = ()
    streaming: tuple[int, ...] = ()
    sinks: int = 0
    streaming_window: int = 0
    sparse: dict[str, Any] | None = None

    @property
    def group(self) -> int:
        """Query heads that share one KV head, where they are equally many for each."""
        return self.heads // self.kv_heads

    def query_name(self, head: int) -> int:
        """The base's number of a query head."""
        return self.query_numbers[head] if self.query_numbers else head

    def kv_name(self, head: int) -> int:
        """The base's number of a KV head."""
        return self.kv_numbers[head] if self.kv_numbers else head

    @property
    def split_facts(self) -> dict | None:
        """The head split as plain data, heads by the base's numbers; None where all heads are full."""
        if not self.streaming:
            return None
        return {
            "kv_heads": [self.kv_name(head) for head in self.streaming],
            "sinks": self.sinks,
            "window": self.streaming_window,
        }

    @property
    def norm_per_head(self) -> bool:
        return self.qk_norm in ("per head", "modules", "whole")

    @property
    def tensor_names(self) -> list[str]:
        """Stored tensors of this layer that follow its heads, relative to the attention module."""
        layout = self.layout
        projections = {layout.qkv: "qkv"} if layout.qkv else {layout.q: "q", layout.k: "k", layout.v: "v"}
        names = [f"{name}.weight" for name in [*projections, layout.o]]
        names += [f"{name}.bias" for name, part in projections.items() if part[0] in self.biases]
        if self.norm_per_head:
            names += norm_names(self, "q_norm", self.heads) + norm_names(self, "k_norm", self.kv_heads)
        return [*names, layout.sinks] if layout.sinks else names


def groups_of(facts: LayerAnatomy) -> list[list[int]]:
    """The query heads that read each KV head of a layer."""
    sizes = facts.query_groups or [facts.group] * facts.kv_heads
    firsts = [sum(sizes[:head]) for head in range(len(sizes))]
    return [list(range(first, first + size)) for first, size in zip(firsts, sizes, strict=True)]


def query_names(facts: LayerAnatomy) -> list[int]:
    """The base's numbers of a layer's query heads, in the order in which they are stored."""
    return [facts.query_name(head) for head in range(facts.heads)]


def shown_names(names: list[int]) -> str:
    """Heads for people: "0 to 8", or the list where some are gone."""
    return f"0 to {names[-1]}" if names == list(range(len(names))) else ", ".join(map(str, names))


def norm_names(facts: LayerAnatomy, part: str, heads: int) -> list[str]:
    """Names of the tensors of a norm with one row per head, relative to the attention module."""
    name = getattr(facts.layout, part)
    if facts.qk_norm == "modules":
        return [f"{name}.norms.{head}.weight" for head in range(heads)]
    return [f"{name}.weight"]
