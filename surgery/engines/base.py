"""The contract of an engine: what it cannot express, the file that it reads, and its answers to token ids."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.errors import SurgeryError, nearest

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy


# The nearest that engines without a part of the runtime can run.
WEIGHTS_ALONE = "gqa and prune-heads, which change weights alone"
NO_LATENT = "gqa, which merges KV heads; or this result in Transformers"
SAME_WEIGHTS = "the base, whose weights are the same"


@dataclass(frozen=True)
class Obstacle:
    """Something in a checkpoint that an engine cannot express.

    Attributes:
        what: the feature, and why the engine cannot hold it, in one sentence.
        nearest: the nearest thing that the engine can hold.
    """

    what: str
    nearest: str


@dataclass(frozen=True)
class EngineQuestion:
    """What an engine is asked.

    Attributes:
        prompt: token ids with which the text begins.
        generate: number of tokens to generate after them, greedily.
        best: number of log-probabilities to return for each generated token, the largest ones.
        text: a text to be split into tokens by the file's own vocabulary.
        cache_bytes: bytes that the keys and values of all these tokens take in float32.
        pieces: ids of tokens that are no whole characters. An engine that answers in text may leave such tokens out;
            it must then generate others.
    """

    prompt: list[int]
    generate: int
    best: int
    text: str
    cache_bytes: int = 0
    pieces: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class EngineAnswers:
    """What an engine computed.

    Attributes:
        generated: ids of the generated tokens.
        best: for each of them, the most probable ids with their log-probabilities, the largest first. NaN is kept.
        text_tokens: the tokens of the question's text.
        cache_bytes: bytes of one token in a cache of the engine, as the engine counts them; None: it does not say.
        number_bytes: bytes of a number in that cache.
    """

    generated: list[int]
    best: list[list[tuple[int, float]]] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    cache_bytes: int | None = None
    number_bytes: int = 4


class ServingEngine(ABC):
    """An engine that serves models.

    Attributes:
        name: as in `--for NAME`.
        types: number format of the written weights -> bytes of one weight at most. The first is the default, and is
            exact.
        suffix: how the name of the file ends; "" if the engine reads a folder.
        packages: the packages on PyPI without which nothing can be written or run; the first one holds the engine.
            () if the engine lives in an environment of its own, where `version` looks for it.
        extra: the extra of this package that installs them.
    """

    name: ClassVar[str]
    types: ClassVar[dict[str, float]]
    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""

    @abstractmethod
    def obstacles(self, anatomy: Anatomy) -> list[Obstacle]:
        """What this engine cannot express of a checkpoint; []: it can hold all of it."""

    @abstractmethod
    def write(self, folder: Path, anatomy: Anatomy, kind: str, file: Path) -> dict[str, Any]:
        """Write the engine's file or folder.

        Args:
            folder: the checkpoint.
            anatomy: its anatomy, without obstacles.
            kind: one of `types`.
            file: the path to write to; nothing is there.

        Returns:
            What the record says of it beyond size and hash: "architecture", the architecture's name in the engine if
            it is not the family's own, and "context", the most tokens if the file takes fewer than the model.

        Raises:
            SurgeryError: the engine's converter does not know a part of the checkpoint.
        """

    @abstractmethod
    def ask(self, file: Path, question: EngineQuestion) -> EngineAnswers:
        """Run the file in a process of the engine, with a float32 cache.

        Raises:
            CheckError: the engine cannot open or run the file.
        """

    @abstractmethod
    def command(self, file: str) -> str:
        """A command that runs the file, for people."""

    def version(self) -> str:
        """The installed version of the engine.

        Raises:
            SurgeryError: a package is missing.
        """
        missing = [name for name in self.packages if not _installed(name)]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise SurgeryError(
                f"{self.name} needs {' and '.join(missing)}, which {verb} not installed",
                where=f"--for {self.name}",
                fix=f"pip install 'attention-surgery[{self.extra}]'",
                code="missing-package",
            )
        return f"{self.packages[0]} {importlib.metadata.version(self.packages[0])}"

    def type_named(self, kind: str | None) -> str:
        """One of `types`, by its name. None: the default.

        Raises:
            SurgeryError: there is no such type.
        """
        if kind is not None and kind not in self.types:
            close = nearest(kind, self.types) or self.exact
            raise SurgeryError(
                f"{self.name} has no type {kind!r}",
                where="--type",
                exists=", ".join(self.types),
                fix=f"--type {close}",
            )
        return kind or self.exact

    def disk_bytes(self, anatomy: Anatomy, kind: str) -> int:
        """Bytes on disk of what is written, about."""
        return int(self.types[kind] * anatomy.parameters)

    @property
    def exact(self) -> str:
        """The type that does not round float32 weights; it is the default."""
        return next(iter(self.types))


def per_layer(anatomy: Anatomy) -> bool:
    """Whether no stock config can give the numbers of heads."""
    return anatomy.surgical or not anatomy.alike


def other_width(anatomy: Anatomy) -> bool:
    """Whether the query heads of a layer together are narrower or wider than the hidden states."""
    hidden = anatomy.config.get_text_config().hidden_size
    return any(layer.heads * layer.head_dim != hidden for layer in anatomy.layers)


def some_slide(anatomy: Anatomy) -> bool:
    """Whether some layers have a sliding window and others have none."""
    return len({layer.window is None for layer in anatomy.layers}) > 1


def unlike_stock(anatomy: Anatomy) -> tuple[str, str]:
    """Of layers that are `per_layer`: what no stock config can give, and the nearest that one can."""
    if anatomy.alike:
        return f"numbers of heads that no stock {anatomy.model_type} has", "the base"
    uniform = "the same numbers of heads in every layer (gqa kv_heads=N, or prune-heads per_layer=N)"
    return "layers with different numbers of heads", uniform


def parts_of(anatomy: Anatomy, reasons: dict[str, tuple[str, str]]) -> list[Obstacle]:
    """The parts of the runtime that a checkpoint uses, as obstacles. No engine computes them.

    Args:
        reasons: part of the runtime -> why the engine cannot express it, and the nearest that it can.
    """
    used = dict.fromkeys(name for layer in anatomy.layers for name in layer.parts)
    return [Obstacle(*reasons.get(name, (f"{name}, which only this package computes", "the base"))) for name in used]


def stock_names(anatomy: Anatomy) -> dict[str, Any]:
    """The fields of a config.json by which programs know the family, of a model that computes what the family does."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = anatomy.model_type
    return {"model_type": kind, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]}


def obstacles_of_latent(anatomy: Anatomy, scaled: str, activation: str) -> list[Obstacle]:
    """What engines that know DeepSeek's latent attention cannot express of a result with it.

    Args:
        scaled: why the engine cannot scale RoPE as the base does.
        activation: why it cannot compute another MLP than DeepSeek's.
    """
    config, found = anatomy.config, []
    if (kind := (config.rope_parameters or {}).get("rope_type", "default")) != "default":
        found.append(Obstacle(f"latent attention with {kind} RoPE: {scaled}", NO_LATENT))
    if not getattr(config, "rope_interleave", True):
        found.append(Obstacle("latent attention whose rotated channels lie in halves: it takes pairs", NO_LATENT))
    if getattr(config, "attention_bias", False) or any(layer.biases for layer in anatomy.layers):
        found.append(Obstacle("latent attention with biases: it has no place for them", NO_LATENT))
    elif anatomy.latent and anatomy.latent.queries:
        what = "latent attention whose queries are made of a vector of their own: only those of one projection are"
        found.append(Obstacle(f"{what} written", NO_LATENT))
    if getattr(config, "first_k_dense_replace", len(anatomy.layers)) < len(anatomy.layers):
        found.append(Obstacle("latent attention beside experts: only dense layers are written", NO_LATENT))
    if (act := config.hidden_act) != "silu":
        found.append(Obstacle(f"latent attention, and {act} as the MLP's activation: {activation}", NO_LATENT))
    return found


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
