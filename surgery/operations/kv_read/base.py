"""The base class of the readers of `kv_read`: decoding steps that read a part of the cache.

Each reader is a class in `methods.py`; `operation.py` lists them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from surgery.calibration.head_scores import unsupported
from surgery.machine.placement import LAYERS, PASSES, Use
from surgery.operations.base import (
    SURGICAL,
    ApplyContext,
    Count,
    InWords,
    Measurement,
    Operation,
    PlannedChange,
    WholeNumber,
    give_entries,
)
from surgery.operations.variants import Variants

if TYPE_CHECKING:
    import torch

    from surgery.architecture.anatomy import Anatomy

MOST_READ = 1 << 20  # most keys of a step
NOT_OF_A_READER = {"op", "method", "layers", "calibration_text", "calibration_samples", "calibration_length"}


class KVRead(Variants, Operation):
    """A decoding step reads sinks, recent tokens, and the keys that a reader chooses among the others."""

    summary: ClassVar[str] = "Sparse decoding: the cache stays whole, and a step reads the keys that a reader chooses."
    purpose: ClassVar[str] = "decoding"
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "The cache is as large as before, and prompts are read whole: only steps that decode read less. Loss on text "
        "in one call shows nothing of it. A recall test, where this card has one, does.",
        "It needs the cache that this model makes itself. Assisted decoding is refused, since it checks several "
        "tokens in one call, which would read all.",
    )
    term: ClassVar[str | None] = "visibility in decoding"

    op: Literal["kv_read"] = "kv_read"
    method: str = Field(description="The reader: which keys a step reads.")
    sinks: WholeNumber = Field(4, le=MOST_READ, description="First tokens of a sequence that every step reads.")
    recent: Count = Field(128, le=MOST_READ, description="Last tokens that every step reads.")
    layers: list[WholeNumber] | None = Field(
        None, description="Layers whose steps read less; default all that see all."
    )

    @property
    def least(self) -> int:
        """A step behind no more tokens reads all."""
        return self.sinks + self.recent

    @property
    def reads(self) -> str:
        """What a step reads, in words."""
        raise TypeError(f"method {self.method} of kv_read reads nothing")

    def parameters(self, anatomy: Anatomy, layer: int) -> dict[str, list[int]]:
        """The shapes of the parameters that a layer gets."""
        return {}

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """What is measured before."""
        return ()

    def measure(self, model, context: ApplyContext) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """The values of the parameter of each layer, [] if there is none, and a record of what was measured."""
        return [], {}

    def problems(self, anatomy: Anatomy) -> list[str]:
        from surgery.runtime.surgery_kv_read import reader_of

        problems = [f"kv_read: {reason}"] if (reason := unsupported(anatomy)) else []
        count = len(anatomy.layers)
        if wrong := [i for i in self.layers or [] if i >= count]:
            problems.append(f"kv_read: layers {wrong}: there are layers 0 to {count - 1}")
        try:
            reader_of(self._reader())
        except ValueError as error:
            problems.append(f"kv_read: {error}")
        if not problems and not self.term_layers(anatomy):
            problems.append("kv_read: no head of these layers sees all tokens: their steps read few already")
        if not problems and (problem := self.plan(anatomy).after.entries_problem()):
            problems.append(f"kv_read: {problem}")
        return problems

    def problems_after(self, later: Anatomy) -> list[str]:
        return [f"kv_read: {problem}"] if (problem := later.entries_problem()) else []

    def term_layers(self, anatomy: Anatomy) -> set[int]:
        """The requested layers that have a head whose cache grows."""
        full = {layer.index for layer in anatomy.layers if self._heads(anatomy, layer.index)}
        return full if self.layers is None else full & {*self.layers}

    @staticmethod
    def _heads(anatomy: Anatomy, layer: int) -> list[int]:
        """The KV heads of a layer that see all tokens and keep every key."""
        own = anatomy.layers[layer]
        if own.window is not None:
            return []
        policy = own.entry.get("policy")
        evicting = [] if policy is None else policy.get("heads", range(own.kv_heads))
        return [head for head in range(own.kv_heads) if head not in {*own.streaming, *evicting}]

    @property
    def model_use(self) -> Use:
        return PASSES if "calibration_text" in type(self).model_fields else LAYERS

    def _reader(self) -> dict[str, Any]:
        return {"name": self.method, **self.model_dump(exclude=NOT_OF_A_READER)}

    def _entry(self, anatomy: Anatomy, layer: int) -> dict[str, Any]:
        """What a layer's entry of the `surgery` block gets, but for parameters."""
        heads = self._heads(anatomy, layer)
        whole = len(heads) == anatomy.layers[layer].kv_heads
        return {"read": self._reader() | ({} if whole else {"heads": heads})}

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        layers, after, numbers = self.term_layers(anatomy), [], 0
        for layer in anatomy.layers:
            if layer.index not in layers:
                after.append(layer)
                continue
            shapes = self.parameters(anatomy, layer.index)
            named = {"parameters": layer.entry.get("parameters", {}) | shapes} if shapes else {}
            after.append(layer.with_entry(**self._entry(anatomy, layer.index), **named))
            numbers += sum(rows * columns * depth for rows, columns, depth in shapes.values())
        line = f"a decoding step reads {self.reads} ({self.method}), in {len(layers)} of {len(anatomy.layers)} layers"
        notes = ["the cache stays whole, and a prompt is read as in the base"]
        if anatomy.positions and anatomy.positions <= self.least:
            notes.append(f"this model takes {anatomy.positions} tokens: every step reads all")
        kept = [layer.index for layer in anatomy.layers if layer.window is not None]
        if kept and self.layers is None:
            notes.append(f"{len(kept)} layers keep the base's own sliding window")
        return PlannedChange(
            replace(anatomy, layers=tuple(after)),
            (line,),
            SURGICAL,
            tuple(notes),
            parameters=numbers,
            measurements=self.measurements(anatomy),
        )

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        return InWords(
            f"sparse decoding ({self.method})",
            f"A decoding step now reads {self.reads} of a long text; the cache holds all, as before.",
            "Steps behind a long text read less memory.",
            "Use it where long texts make decoding slow.",
            f"Do not use it for texts of up to {self.least:,} tokens: nothing changes there.",
        )

    def apply(self, model, context: ApplyContext) -> dict:
        from surgery.runtime.modeling_surgery import attention_modules

        before, layers = context.before, self.term_layers(context.before)
        values, record = self.measure(model, context)
        shapes = [self.parameters(before, layer.index) for layer in before.layers]
        entries = [
            self._entry(before, i) | ({"parameters": shapes[i]} if shapes[i] else {}) if i in layers else {}
            for i in range(len(before.layers))
        ]
        give_entries(model, entries, self.op)
        if values:
            for module, value, named in zip(attention_modules(model), values, shapes, strict=True):
                for name in named if module.layer_idx in layers else ():
                    getattr(module, name).data.copy_(value)
        return record | {"layers": sorted(layers)}
