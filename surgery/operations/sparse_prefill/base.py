"""The base class of the methods of `sparse_prefill`.

A prompt's queries read only the blocks of keys that an estimator keeps; decoding stays dense. Each method is a class
in `methods.py` or `by_head.py`. `operation.py` lists them.

Source of delta: Willette et al. 2025, "Delta Attention", arXiv 2505.11254.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from surgery.errors import any_of
from surgery.operations.base import (
    SURGICAL,
    ApplyContext,
    InWords,
    Measurement,
    Operation,
    PlannedChange,
    WholeNumber,
    give_entries,
    whole_keys,
)
from surgery.operations.variants import Variants, keys_of

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.operations.sparse_prefill.pattern_search import Patterns

Share = Annotated[float, Field(gt=0, le=1)]
FromOne = Annotated[int, Field(ge=1, strict=True)]
LENGTHS = (8192, 32768)  # lengths of prompts, in tokens, for which a plan says how much is read
NOT_OF_A_LAYER = {
    "op",
    "layers",
    "last_layers_full",
    "heads",
    "per_layer",
    "calibration_samples",
    "calibration_length",
}
HELD = "visibility in prefill"  # not the term "visibility", which duo_attention sets for prefill and decoding


class SparsePrefill(Variants, Operation):
    """Block-sparse attention in prefill, for the heads that see all."""

    summary: ClassVar[str] = "Sparse prefill: a long prompt's queries read the blocks of keys that an estimator keeps."
    purpose: ClassVar[str] = "prompt"
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "Only prefill is sparse. The cache keeps every key, decoding reads all of them, and a prompt of up to "
        "dense_below tokens is computed as in the base.",
        "Loss on text is a weak test of it. What is lost shows when decoding meets keys that a sparse prefill made. "
        "A recall test, where this card has one, tests that.",
    )
    term: ClassVar[str | None] = HELD
    LATER: ClassVar[tuple[str, ...]] = ("last_layers_full",)

    op: Literal["sparse_prefill"] = "sparse_prefill"
    method: str = Field(description="How the blocks that are read are chosen.")
    block: Annotated[int, Field(ge=16, strict=True)] = Field(128, description="Tokens in a block, a power of two.")
    dense_below: WholeNumber = Field(1024, description="Blocks of queries that end by this position read all keys.")
    last_rows_dense: WholeNumber = Field(0, description="So do the last queries of a prompt, so many (whole blocks).")
    delta: FromOne | None = Field(
        None, description="Compute every n-th row densely and correct the others by it (Delta attention); null: no."
    )
    layers: list[WholeNumber] | None = Field(None, description="Layers that become sparse; default all that see all.")
    last_layers_full: WholeNumber = Field(0, description="So many last layers stay full; not together with layers.")
    heads: Literal["all", "retrieval"] = Field(
        "all", description="all: every head that sees all; retrieval: those that a head split before it left so."
    )
    per_layer: Annotated[dict[WholeNumber, dict[str, Any]], BeforeValidator(whole_keys)] = Field(
        {}, description="layer: {field: value}, what differs in a layer; any field but layers, heads and this one."
    )

    @classmethod
    def misplaced(cls, keys: list[str]) -> list[tuple[str, str]]:
        method = cls.own_method()
        return [(key, f"{method} has no setting {key!r}; {any_of(cls.readers(key))} has it") for key in keys]

    def problems(self, anatomy: Anatomy) -> list[str]:
        return [f"sparse_prefill: {problem}" for problem in self._problems(anatomy)]

    def _problems(self, anatomy: Anatomy) -> list[str]:
        if reason := anatomy.runtime_problem():
            return [f"{reason}, so its prefill cannot become sparse"]
        count = len(anatomy.layers)
        for name, layers in (("layers", self.layers or []), ("per_layer", self.per_layer)):
            if wrong := sorted(layer for layer in layers if layer >= count):
                return [f"{name} {wrong}: there are layers 0 to {count - 1}"]
        if self.layers is not None and self.last_layers_full:
            return ["layers names the layers that become sparse: drop last_layers_full, or layers"]
        if self.last_layers_full >= count:
            return [f"last_layers_full is {self.last_layers_full}, and there are {count} layers: none becomes sparse"]
        if self.layers == []:
            return ["layers must not be empty; leave them out for all"]
        if narrow := [i for i in self.layers or [] if anatomy.layers[i].window is not None]:
            return [f"layers {narrow} see a sliding window of the base's own: there is nothing to make sparse in them"]
        if wrong := sorted(set(self.per_layer) - self.term_layers(anatomy)):
            return [f"per_layer {wrong}: sparse prefill is for layers {sorted(self.term_layers(anatomy))} here"]
        if not self.term_layers(anatomy):
            return ["no head of these layers sees all: there is nothing to make sparse"]
        if self.heads == "retrieval" and not any(layer.streaming for layer in anatomy.layers):
            return [
                "heads: retrieval needs streaming heads; there are none: put duo_attention before it, or heads: all"
            ]
        return self.problems_of_search(anatomy) or self._faults_of_settings(anatomy)

    @property
    def unchanged_within(self) -> int:
        entries = [self._entry({}), *(self._entry(changes) for changes in self.per_layer.values())]
        return min(map(self._dense_until, entries))

    def _dense_until(self, entry: dict[str, Any]) -> int:
        """The length up to which a layer with this entry reads all of a prompt, whatever the text."""
        return entry["dense_below"] // entry["block"] * entry["block"]

    @property
    def searches(self) -> bool:
        """Whether settings are searched by measuring the model on text."""
        return False

    def problems_of_search(self, anatomy: Anatomy) -> list[str]:
        """Why settings cannot be searched for such a model."""
        return []

    def problems_of_layer(self, changes: dict[str, Any]) -> list[str]:
        """Why a layer cannot have these own settings (`per_layer`)."""
        return []

    def with_patterns(self, entry: dict[str, Any], patterns: list[dict[str, Any]]) -> dict[str, Any]:
        """An entry with the patterns that a search found; unchanged if the method searches nothing."""
        return entry

    def search(self, model: Any, context: ApplyContext) -> Patterns:
        """Search the patterns of all layers."""
        raise TypeError(f"method {self.method} searches nothing")

    def _faults_of_settings(self, anatomy: Anatomy) -> list[str]:
        from surgery.runtime.surgery_sparse_prefill import problem_of

        own, found = set(self._entry({})), []
        known = own | set(keys_of(SparsePrefill)) - NOT_OF_A_LAYER
        for layer, changes in sorted(self.per_layer.items()):
            for name in sorted(set(changes) - known):
                found.append(f"per_layer {layer}: there is no field {name!r}; available: {', '.join(sorted(known))}")
            found += [f"per_layer {layer}: {problem}" for problem in self.problems_of_layer(changes)]
        for layer in sorted(self.term_layers(anatomy)) if not found else []:
            where = f"per_layer {layer}: " if layer in self.per_layer else ""
            entry, heads = self._entry(self.per_layer.get(layer, {})), anatomy.layers[layer].heads
            problem = problem_of(self.with_patterns(entry, [{"method": "streaming"}] * heads), heads)
            if problem and where + problem not in found:
                found.append(where + problem)
        return found

    def term_layers(self, anatomy: Anatomy) -> set[int]:
        """The requested layers that have a head which sees all keys."""
        begin = len(anatomy.layers) - self.last_layers_full
        full = [x.index for x in anatomy.layers[:begin] if x.window is None and len(x.streaming) < x.kv_heads]
        return set(full if self.layers is None else self.layers) & set(full)

    def _entry(self, changes: dict[str, Any]) -> dict[str, Any]:
        """The value of `sparse` in a layer's entry of the `surgery` block.

        Args:
            changes: the layer's settings in `per_layer`. A rule among them (gamma, density or alpha) replaces the rule
                for all layers. If they name another method, the settings of this method do not apply.
        """
        rules, of_any = {"gamma", "density", "alpha"}, {"method", "block", "dense_below", "last_rows_dense", "delta"}
        own = self.model_dump(exclude=NOT_OF_A_LAYER, exclude_none=True)
        if changes.get("method", self.method) != self.method:
            own = {name: value for name, value in own.items() if name in of_any}
        elif rules & set(changes):
            own = {name: value for name, value in own.items() if name not in rules}
        return {name: value for name, value in (own | changes).items() if value is not None}

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        from surgery.runtime.surgery_estimators import estimator

        layers = self.term_layers(anatomy)
        entries = {layer: self._entry(self.per_layer.get(layer, {})) for layer in layers}
        first = self._entry({})
        lines = [f"{self._line(first)}, in {len(layers)} of {len(anatomy.layers)} layers"]
        if self.per_layer:
            lines.append(f"with settings of their own: layers {', '.join(map(str, sorted(self.per_layer)))}")
        if self.last_layers_full:
            lines.append(f"the last {self.last_layers_full} layers stay full")
        searched = "which pattern a head gets is searched on calibration text"
        notes = [searched] if self.searches else self._shares_read(first, anatomy)
        if split := sum(len(anatomy.layers[layer].streaming) for layer in layers):
            notes.append(f"{split} KV heads of these layers stream: they keep their sinks + window")
        kept = [layer.index for layer in anatomy.layers if layer.window is not None]
        if kept and self.layers is None:
            notes.append(f"{len(kept)} layers keep the base's own sliding window")
        free = [entry["method"] for entry in entries.values() if not estimator(entry["method"]).chunk_exact]
        if free or any(entry["last_rows_dense"] for entry in entries.values()):
            notes.append(
                f"{', '.join(sorted(set(free))) or 'last_rows_dense'} looks at the last queries of a call: a prompt "
                "that comes in chunks gets other blocks than in one piece"
            )
        else:
            notes.append(self._chunks())
        longest = anatomy.positions
        if longest and longest <= max(self.dense_below, self.block, self.unchanged_within):
            notes.append(f"this model takes {longest} tokens: no prompt becomes sparse")
        after = [
            layer.with_entry(sparse=entries[layer.index]) if layer.index in entries else layer
            for layer in anatomy.layers
        ]
        details = {"measured": self.searches, "measurements": self.measurements(anatomy)}
        return PlannedChange(replace(anatomy, layers=tuple(after)), tuple(lines), SURGICAL, tuple(notes), **details)

    def measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """The stages that a method which searches runs."""
        return ()

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        least = f"{self.dense_below:,} tokens"
        return InWords(
            f"sparse prefill ({self.method})",
            "In a long prompt a query now reads only the blocks of keys that matter; decoding reads all, as before.",
            f"Prompts of more than {least} take less work; the cache is as large as before.",
            "Use it where prompts of many thousand tokens are what takes the time.",
            f"Do not use it for prompts of up to {least}: nothing changes there.",
        )

    def _line(self, entry: dict[str, Any]) -> str:
        """What a layer with this entry does, with its settings."""
        own = {name: value for name, value in entry.items() if name not in ("method", "block", "dense_below")}
        said = "".join(f", {name} {value}" for name, value in own.items() if value)
        return f"prompts beyond {self.dense_below:,} tokens: {self.method} chooses blocks of {self.block} keys{said}"

    def _chunks(self) -> str:
        """A note on prompts in chunks."""
        return (
            f"a prompt in chunks gets what it gets in one piece where chunks end at multiples of {self.block} "
            "tokens, counted from a row's first real one; queries of a block that was cut read all keys"
        )

    def _shares_read(self, entry: dict[str, Any], anatomy: Anatomy) -> list[str]:
        """Notes on how much of a prompt is read, if the settings alone determine it."""
        return [self._read(entry)]

    def _read(self, entry: dict[str, Any]) -> str:
        """How much of a prompt is read, if the settings alone determine it."""
        import torch

        from surgery.runtime.surgery_estimators import estimator
        from surgery.runtime.surgery_sparse_prefill import Sparse

        sparse = Sparse.of(entry)
        if "density" not in entry and estimator(self.method).reads_text:
            return "how many blocks are read follows from the text"
        heads = max([len(value) for value in entry.values() if isinstance(value, list)], default=1)
        shares = []
        for length in LENGTHS:
            kept = sparse.kept(torch.zeros(1, heads, length, 1), torch.zeros(1, 1, length, 1), 1.0)
            rows = kept.shape[-1]
            shares.append(f"{kept.float().mean((0, 1)).sum() / (rows * (rows + 1) / 2):.0%} at {length:,} tokens")
        return f"of the blocks before a query, {' and '.join(shares)} are read"

    def apply(self, model, context: ApplyContext) -> dict:
        from surgery.architecture.anatomy import Anatomy

        anatomy = Anatomy.of(model)  # which heads stream may have been measured since the plan was made
        layers = self.term_layers(anatomy)
        entries = {layer: self._entry(self.per_layer.get(layer, {})) for layer in layers}
        record: dict[str, Any] = {"method": self.method, "layers": sorted(layers)}
        if self.searches:
            found = self.search(model, context)
            entries = {layer: self.with_patterns(entry, found.layers[layer]) for layer, entry in entries.items()}
            record |= {"recovered": found.recovered, "read": found.cost, "origin": found.origin}
        changed = [{"sparse": entries[i]} if i in layers else {} for i in range(len(anatomy.layers))]
        give_entries(model, changed, self.op)
        return record
