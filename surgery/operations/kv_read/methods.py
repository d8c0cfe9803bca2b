"""Readers of `kv_read`: which keys a decoding step reads.

A reader is a file of the runtime (surgery/runtime/surgery_kv_read_*.py), which names its source, and a class here with
its settings. A test compares the defaults of the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from surgery.calibration.cost import Measurement, forward_flops
from surgery.data.text import CALIBRATION_TEXTS_ARE, CalibrationText
from surgery.operations.base import ApplyContext, Count, Length, Seed
from surgery.operations.kv_read.base import MOST_READ, KVRead

if TYPE_CHECKING:
    import torch

    from surgery.architecture.anatomy import Anatomy

Share = Annotated[float, Field(ge=0, le=1)]
EVERY = "A choice is made anew before it is so many tokens old."


class ReadingSome(KVRead):
    """A reader that reads a fixed number of keys besides sinks and recent tokens."""

    keys: Count = Field(1024, le=MOST_READ, description="Keys that a step reads besides sinks and recent tokens.")

    @property
    def reads(self) -> str:
        return f"{self.sinks + self.recent + self.keys:,} keys"

    @property
    def least(self) -> int:
        return self.sinks + self.recent + self.keys


class RankingReading(ReadingSome):
    """A reader that ranks keys by weights of attention."""

    group: Literal["sum", "max"] = Field(
        "sum", description="How the weights of a KV head's query heads are put together."
    )


class TokenSelectReading(RankingReading):
    """One set of keys for all heads, by a soft vote, kept while queries are alike (TokenSelect)."""

    method: Literal["tokenselect"] = "tokenselect"
    every: Count = Field(32, description=EVERY)
    similarity: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.9, description="Cosine of two queries above which the last choice is used again."
    )

    @property
    def reads(self) -> str:
        return f"{super().reads}, and all keys where it chooses anew"


class LokiReading(RankingReading):
    """Rank the keys in a few directions, which a calibration text gives (Loki)."""

    method: Literal["loki"]
    dims: Count = Field(16, description="Number of directions, at most the size of a head.")
    calibration_text: str = Field("builtin", description=CALIBRATION_TEXTS_ARE)
    calibration_samples: Count = Field(16, description="Sequences of it.")
    calibration_length: Length = Field(512, description="Tokens in each.")

    @property
    def reads(self) -> str:
        return f"{super().reads}, and the projections of all"

    def parameters(self, anatomy: Anatomy, layer: int) -> dict[str, list[int]]:
        from surgery.runtime.surgery_kv_read import BASIS

        size = anatomy.layers[layer].head_dim
        return {BASIS: [anatomy.layers[layer].kv_heads, size, min(self.dims, size)]}

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        length = min(self.calibration_length, anatomy.positions or self.calibration_length)
        flops = self.calibration_samples * forward_flops(anatomy, length, length)
        return (Measurement("measuring keys", flops, passes=self.calibration_samples),)

    def measure(self, model, context: ApplyContext) -> tuple[list[torch.Tensor], dict[str, Any]]:
        from surgery.operations.kv_read.key_directions import key_directions

        text = CalibrationText(self.calibration_text, self.calibration_length, self.calibration_samples)
        what = "ranking keys needs a calibration text, and so the tokenizer"
        sequences, source = context.calibration(model, text, self.op, what)
        return key_directions(model, sequences, self.dims, context.progress), {"calibration": source}


class RecycledReading(RankingReading):
    """Read all keys at some steps, and in between what weighed most at the last of them (Recycled Attention)."""

    method: Literal["recycled"]
    every: Count = Field(32, description="Steps from one that reads all to the next.")

    @property
    def reads(self) -> str:
        return f"{super().reads}, and every {self.every} steps all"


class TreeReading(ReadingSome):
    """Search the keys like a tree, in time that grows with log N (HiP)."""

    method: Literal["tree"]
    block: Count = Field(16, description="Tokens of a block; the keys are read in whole blocks.")


class AdaptiveReading(KVRead):
    """Read the far keys where a Gaussian model of their scores says that they matter (QAdA)."""

    method: Literal["adaptive"]
    share: Share = Field(0.1, description="Of the weight: the far keys are read where they are expected to have more.")

    @property
    def reads(self) -> str:
        return f"{self.sinks + self.recent:,} keys, or all"


class IndexReading(RankingReading):
    """Read the keys with the largest weights, by an exact search of all: what others come near to."""

    method: Literal["index"]

    @property
    def reads(self) -> str:
        return f"all keys, and the values of {self.least:,}"


class ThresholdReading(KVRead):
    """Leave out keys whose weight is far below the largest."""

    method: Literal["threshold"]
    threshold: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.001, description="Part of the largest weight from which a key is read."
    )

    @property
    def reads(self) -> str:
        return f"all keys, and the values of those with at least {self.threshold:g} of the largest weight"


class RandomReading(ReadingSome):
    """Read random keys: a control."""

    method: Literal["random"]
    seed: Seed = Field(0, description="Seed of the draw.")
