"""Where attention is in a model: the anatomy that every operation plans with.

`Anatomy.of(x)` reads a checkpoint folder (its config and the safetensors headers, no weight), a loaded model
or a bare config. Attention that is missing, incomplete or of an unknown form is an error. A family that is not in the
table but has the common form is marked as a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.architecture.detect import read_anatomy
from surgery.architecture.families import FAMILIES, with_query_vector
from surgery.architecture.layer import BYTES, Latent, LayerAnatomy, groups_of
from surgery.errors import ModelError, RecipeMismatchError
from surgery.io.safetensors import TORCH_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from surgery.runtime.surgery_config import HeadCost


@dataclass(frozen=True)
class Anatomy:
    """The attention of one model.

    Attributes:
        model_type: model_type of the (text) model.
        layers: one entry for each layer.
        guess: whether the family is unknown and was understood by the shapes of its tensors.
        composite: model_type of the whole model if it has parts other than the text model; else None.
        dtype: dtype of the weights, in safetensors' spelling.
        config: the Transformers config of the text model.
        edits: text config field -> value, where this anatomy differs from the config as read.
        tensors: every stored tensor, name -> (dtype, shape); {} if only a config was given.
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
    def of(cls, source: str | Path | PreTrainedModel | PreTrainedConfig, tensors: dict | None = None) -> Anatomy:
        """Anatomy of a checkpoint folder, a loaded model or a config.

        Args:
            source: folder path, `PreTrainedModel` or `PreTrainedConfig`.
            tensors: name -> (dtype, shape), if the caller already knows them.

        Raises:
            SurgeryError: no attention was found, or only part of it, or its form is not known.
        """
        from surgery.io import model_folder as folder

        if isinstance(source, type) or (hasattr(source, "named_parameters") and not hasattr(source, "config")):
            what = (
                f"{source.__name__} is a class"
                if isinstance(source, type)
                else f"{type(source).__name__} has no config"
            )
            raise ModelError(f"{what}, not a model", fix="give a folder, a loaded model or its config")
        if isinstance(source, str | Path):
            config, where = folder.settled_config(Path(source)), str(source)
            tensors = tensors if tensors is not None else folder.tensor_table(Path(source))
        elif hasattr(source, "named_parameters"):
            config, where, tensors = source.config, type(source).__name__, folder.model_table(source)
        else:
            config, where, tensors = source, type(source).__name__, tensors or {}
        return cls(**read_anatomy(config, tensors, where))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes by which keys and values in the cache grow with each token, in the checkpoint's dtype."""
        return round(self._kv_bytes(lambda head: head.growing))

    @property
    def kv_bytes_fixed(self) -> int:
        """Bytes of the cache that do not depend on the length of the text: sinks, windows, what a policy keeps."""
        return round(self._kv_bytes(lambda head: head.fixed))

    def kv_bytes_at(self, tokens: int) -> int:
        """Bytes of the cache of a text of so many tokens. A window that the text does not fill holds the text."""
        return round(self._kv_bytes(lambda head: max(head.growing * tokens + min(head.fixed, tokens), 0)))

    def _kv_bytes(self, tokens: Callable[[HeadCost], float]) -> float:
        """Bytes of keys and values in the cache; `tokens` says how many tokens of a KV head count."""
        size = BYTES.get(self.dtype, 2)
        costs = ((layer.kv_width * size, head) for layer in self.layers for head in layer.kv_cost(self.positions))
        return sum((width + head.beside) * tokens(head) for width, head in costs)

    @property
    def positions(self) -> int | None:
        """The most tokens that the model takes; None: its config names no limit."""
        return positions_of(self.config)

    @property
    def surgical(self) -> bool:
        """Whether this is a checkpoint with a `surgery` block."""
        return getattr(self.config, "surgery", None) is not None

    @property
    def alike(self) -> bool:
        """Whether all layers have the same numbers of heads, and each KV head is read by equally many query heads."""
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
        """Why a stock checkpoint of this family cannot have these numbers of heads at the present head size, or ""."""
        if self.guess or not self.layers[0].layout.head_dim:
            reason = "is not a known family" if self.guess else "divides its hidden size by its heads"
            return f"{self.model_type} {reason}: a head's size cannot be kept when heads go"
        if self.layers[0].qk_norm == "shared" and self.model_type == "phi":
            return "phi makes its QK-norm as wide as its hidden size divided by its heads"
        try:  # some configs refuse what their own forward would run (llama: heads that do not divide the hidden size)
            config = self.config.from_dict(self.config.to_dict() | self._heads_edits(heads, kv_heads))
            getattr(config, "validate", bool)()  # a surgical config does not validate itself when it is made
        except Exception as error:
            reason = str(error).strip().splitlines()[-1].strip()
            return f"the config of {self.model_type} refuses {heads} query heads ({reason})"
        return ""

    def _heads_edits(self, heads: int, kv_heads: int) -> dict[str, int]:
        size, kv_field = self.layers[0].head_dim, self.layers[0].layout.kv_field
        return {"num_attention_heads": heads, "head_dim": size} | ({kv_field: kv_heads} if kv_field else {})

    def runtime_problem(self) -> str:
        """Why the surgical tier cannot serve this model; "" if it can."""
        if self.guess:
            return f"{self.model_type} is not a known family"
        if self.latent:
            return f"this {self.model_type} has latent attention, whose heads have no keys and values of their own"
        if not (layout := self.layers[0].layout).interface:
            since = layout.since and f" (from version {layout.since} on it does)"
            return f"{self.model_type} does not use the attention interface of the installed Transformers{since}"
        if self.layers[0].positions == "alibi":
            return (
                f"this {self.model_type} has ALiBi, which is a part of the mask; the surgical tier makes its own masks"
            )
        if getattr(self.config, "output_attentions", False):
            return "output_attentions: true, as its config says, asks for weights that the surgical tier never holds"
        return "composites (vision + text) are not supported by the surgical tier" if self.composite else ""

    def shapes_problem(self) -> str:
        """Why the layers of this model cannot have different numbers of heads, even on the surgical tier, or ""."""
        layout = self.layers[0].layout
        if reason := self.runtime_problem():
            return reason
        counted = layout.qkv or not layout.head_dim or layout.kv_field != "num_key_value_heads"
        if counted or self.layers[0].norm_per_head:
            return f"the forward of {self.model_type} counts heads by its config, one number for all layers"
        return ""

    def with_kv_heads(self, kv_heads: int) -> Anatomy:
        """This anatomy with `kv_heads` KV heads in every layer, and the config edits for that.

        Raises:
            SurgeryError: the family's config has no such number (operations ask `kv_heads_problem` first).
        """
        layout = self.layers[0].layout
        if layout.kv_field is None and kv_heads != self.layers[0].kv_heads:
            raise RecipeMismatchError(self.kv_heads_problem(kv_heads))
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
        """This anatomy with the given number of KV heads in each layer. Different numbers need the surgical tier."""
        if len(set(kv_heads)) == 1:
            return self.with_kv_heads(kv_heads[0])
        pairs = zip(self.layers, kv_heads, strict=True)
        layers = (old if old.kv_heads == n else replace(old, kv_heads=n, kv_numbers=()) for old, n in pairs)
        return replace(self, layers=tuple(layers))

    def with_layers(self, layers: list[LayerAnatomy], stock: bool) -> Anatomy:
        """This anatomy with other layers. `stock`: all are alike, and the config gets their numbers of heads."""
        first_layer = layers[0]
        edits = self._heads_edits(first_layer.heads, first_layer.kv_heads) if stock else {}
        return replace(self, layers=tuple(layers), edits=self.edits | edits)

    def with_latent(self, latent: Latent, config: dict[str, Any]) -> Anatomy:
        """This anatomy with latent attention in every layer, as a stock model of another family.

        Args:
            config: the fields of its config that differ from the base's, with its `model_type`.
        """
        layout = FAMILIES[config["model_type"]]
        made = {
            "kv_heads": 1,
            "head_dim": latent.nope + latent.rope,
            "rotary": latent.rope,
            "layout": with_query_vector(layout) if latent.queries else layout,
            "latent": latent,
            "biases": "qko" if config["attention_bias"] else "",
        }
        layers = tuple(replace(layer, **made) for layer in self.layers)
        return replace(self, model_type=config["model_type"], layers=layers, edits=self.edits | config)

    def with_windows(self, sliding: Collection[int], window: int, config: dict[str, Any]) -> Anatomy:
        """This anatomy with a window in the layers `sliding`, as a stock model, perhaps of another family.

        Args:
            config: the fields of its config that differ from the base's.
        """
        model_type = config.get("model_type", self.model_type)
        layers = tuple(
            replace(layer, window=window if layer.index in sliding else None, layout=FAMILIES[model_type])
            for layer in self.layers
        )
        return replace(self, model_type=model_type, layers=layers, edits=self.edits | config)

    @property
    def latent(self) -> Latent | None:
        """The latent attention of its layers, which are alike; None: they have none."""
        return self.layers[0].latent

    def with_streaming(self, streaming: list[list[int]], sinks: int, window: int) -> Anatomy:
        """This anatomy with a head split: the listed KV heads of each layer see only sinks and window."""
        layers = tuple(
            layer.with_entry(streaming=list(heads), sinks=sinks, window=window)
            for layer, heads in zip(self.layers, streaming, strict=True)
        )
        return replace(self, layers=layers)

    def entries_problem(self) -> str:
        """Why the runtime refuses what operations have set in a layer together; "" if it does not."""
        for layer in self.layers:
            groups = [len(group) for group in groups_of(layer)]
            for part in layer.parts.values():
                if fault := part.validation_error(self.config, layer.entry, groups):
                    return f"layer {layer.index} {fault}"
        return ""

    @property
    def terms(self) -> dict[str, set[int]]:
        """The terms of the attention equation that a surgery has already set -> the indices of the layers."""
        layers_by_term: dict[str, set[int]] = {}
        for layer in self.layers:
            for part in layer.parts.values():
                for term in part.terms(layer.entry):
                    layers_by_term.setdefault(term, set()).add(layer.index)
        return layers_by_term

    @property
    def descriptions(self) -> dict[str, list[str]]:
        """What the parts of the runtime do, in words: title -> the words of each layer."""
        words_by_title: dict[str, list[str]] = {}
        for layer in self.layers:
            for part in layer.parts.values():
                if (description := part.describe(layer.entry)) is not None:
                    words_by_title.setdefault(description[0], []).append(description[1])
        return words_by_title

    def to_dict(self) -> dict:
        """The anatomy as plain data, for `--json`."""
        keys = (
            "index", "path", "heads", "kv_heads", "head_dim", "rotary", "positions", "qk_norm", "window", "soft_cap",
        )  # fmt: skip
        layers = [
            {key: getattr(layer, key) for key in (*keys, "biases", "dtype")}
            | {
                "sparse": layer.entry.get("sparse"),
                "sinks": bool(layer.layout.sinks),
                "streaming": layer.split_info,
                "query_groups": layer.query_groups,
            }
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
        """A config.json with this anatomy's edits; everything else is unchanged, but for code of another family."""
        if self.edits.get("model_type", raw.get("model_type")) != raw.get("model_type"):
            raw = {name: value for name, value in raw.items() if name != "auto_map"}
        if self.composite and "text_config" in raw:
            return raw | {"text_config": raw["text_config"] | self.edits}
        return raw | self.edits


def positions_of(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model with this config takes; None: the config names no limit."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if longest and longest > 0 else None


def stored_dtypes(anatomy: Anatomy) -> list[str]:
    """The floating-point dtypes of the stored weights, sorted. RoPE tables of old checkpoints do not count, since they
    are not loaded.
    """
    names = {dtype for name, (dtype, _) in anatomy.tensors.items() if not name.endswith(".inv_freq")}
    return sorted(names & set(TORCH_NAMES))
