"""Calibrate the attention sinks: another weight for the first token or for others, or virtual keys in its place.

Sources: Han et al. 2025, "ZeroTuning", arXiv 2505.11739 (zero_tuning); Yu et al. 2024, "Hidden Attention Sinks", arXiv
2406.15765 (act); gpt_oss's learned sinks (learned); Sun et al. 2024, "Massive Activations in Large Language Models",
arXiv 2402.17762 (kv_bias: explicit k' and v').
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from surgery.architecture.layer import groups_of, query_names, shown_names
from surgery.calibration.head_scores import UNEQUAL, unsupported
from surgery.errors import SurgeryError
from surgery.operations.base import SURGICAL, ApplyContext, Operation, PlannedChange, WholeNumber

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy

Gamma = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Grid = Annotated[list[Gamma], Field(min_length=1)]
Beta = Annotated[float, Field(gt=0, le=1)]
BETA, THRESHOLD = 0.4, 5.0  # ACT's own
USED_BY = dict.fromkeys(("gamma", "groups", "grid", "labelled"), ("zero_tuning",))  # of the fields, by methods
USED_BY |= {"beta": ("act",), "threshold": ("act",), "objective": ("zero_tuning", "act")}
USED_BY |= {"logit": ("learned",), "value": ("learned",), "start": ("learned", "kv_bias")}
OF_TEXT = ("text", "calibration_samples", "calibration_length")


class SinkCalibration(Operation):
    """One term of one method: a bias on the first token's score or other sinks', or one virtual key for each head."""

    summary: ClassVar[str] = (
        "Another weight for the first token (ZeroTuning) or other sinks (ACT), or virtual keys: learned, k' and v'."
    )
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "The sink was calibrated on one text or set of questions; a setting is kept only where its gain on text "
        "held back from the search is more than two standard errors, and the record in surgery.json "
        "says what was found.",
    )

    op: Literal["sink_calibration"] = "sink_calibration"
    method: Literal["zero_tuning", "act", "learned", "kv_bias"] = Field(
        description="zero_tuning: first token's weight times gamma; act: other sinks' weight times beta; learned: a "
        "logit, with a value or none; kv_bias: a key and a value."
    )
    layers: list[WholeNumber] | None = Field(None, description="Layers that are changed; default all.")
    heads: list[WholeNumber] | None = Field(
        None, description="Query heads that are changed in these layers; default all."
    )
    exclude: list[Annotated[list[WholeNumber], Field(min_length=2, max_length=2)]] = Field(
        [], description="Pairs [layer, query head] that stay as they are."
    )
    gamma: Gamma | None = Field(None, description="zero_tuning: the same for all these heads; default: searched.")
    groups: Literal["uniform", "layers", "heads"] = Field(
        "heads",
        description="zero_tuning, searched: one gamma, one a layer, or gamma and 1 / gamma for heads by their slope.",
    )
    grid: Grid | None = Field(None, description="Values of gamma that are tried; default 1.1 to 2, and 1 over them.")
    objective: Literal["ce", "entropy"] = Field(
        "ce", description="What is lowered: cross-entropy of the text, or entropy of the predictions (no labels)."
    )
    beta: Beta | None = Field(
        None,
        description=f"act: what is left of the weight on other sinks, in heads that gain from it; default {BETA}.",
    )
    threshold: Gamma | None = Field(
        None, description=f"act: a sink's mean weight is above this / N tokens; default {THRESHOLD:g}."
    )
    start: Literal["fit", "identity"] = Field(
        "fit",
        description="learned, kv_bias: fit: take the place of the first token where a head lost it; identity: change "
        "nothing, for training.",
    )
    logit: float | None = Field(
        None, allow_inf_nan=False, description="learned: this logit for every query of these heads, in place of a fit."
    )
    value: Literal["zero", "fit"] = Field("fit", description="learned, fitted: no value, or the first token's mean.")
    calibration_samples: int = Field(16, ge=4, description="Pieces of text; every second one is held back.")
    calibration_length: int = Field(512, ge=8, description="Tokens in a piece.")
    text: str = Field("builtin", description="'builtin' (calibration part of Python's reference) or a text file.")
    labelled: str | None = Field(
        None,
        min_length=1,
        description="zero_tuning, searched: a JSONL file of questions (prompt, choices, answer) in place of text; "
        "what is lowered is -log of the right choice's share, and every second question is held back.",
    )

    @property
    def term(self) -> str:  # type: ignore[override]
        return "bias" if self.method in ("zero_tuning", "act") else "virtual keys"

    @property
    def _fits(self) -> bool:
        return self.term == "virtual keys" and self.start == "fit" and self.logit is None

    @property
    def _measures(self) -> bool:
        open_setting = {"zero_tuning": self.gamma is None, "act": self.beta != 1}
        return open_setting.get(self.method, self._fits)

    def limitations(self) -> tuple[str, ...]:
        return self.LIMITATIONS if self._measures else ()

    def problems(self, anatomy: Anatomy) -> list[str]:
        from surgery.data.questions import faults_of

        if reason := unsupported(anatomy):
            return [f"sink_calibration: {reason}"]
        found, count = [], len(anatomy.layers)
        if wrong := [layer for layer in self.layers or [] if layer >= count]:
            found.append(f"layers {wrong}: there are layers 0 to {count - 1}")
        chosen = [anatomy.layers[i] for i in self._layers(anatomy) if i < count]
        for names in map(query_names, chosen):
            if wrong := [head for head in self.heads or [] if head not in names]:
                found.append(f"heads {wrong}: a layer has query heads {shown_names(names)}")
                break
        if [] in (self.layers, self.heads):
            found.append("layers and heads must not be empty; leave them out for all")
        layers = dict(enumerate(anatomy.layers))
        if wrong := [
            pair for pair in self.exclude if pair[0] not in layers or pair[1] not in query_names(layers[pair[0]])
        ]:
            found.append(f"exclude {wrong}: there are no such layers and query heads")
        if not found and not any(map(self._heads, chosen)):
            found.append("exclude leaves no head")
        found += self._unused()
        if self.labelled is not None:
            found += faults_of(self.labelled)
            if self.gamma is not None or self.objective != "ce":
                found.append("labelled is for a gamma that is searched, with objective: ce")
        if self._measures and self.method != "zero_tuning" and any(layer.query_groups for layer in anatomy.layers):
            found.append(f"{self.method}: {UNEQUAL}: calibrate before pruning, or prune whole KV groups")
        if not found:
            found += self._problems_of_visibility(anatomy)
        return [f"sink_calibration: {problem}" for problem in found]

    def _unused(self) -> Iterator[str]:
        """Fields that were given and would do nothing."""
        given = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        for name in given:
            if self.method not in (methods := USED_BY.get(name, (self.method,))):
                yield f"{name} is for method: {' or '.join(methods)}, not {self.method}"
        if self.gamma is not None and {"grid", "groups", "objective"} & {*given}:
            yield "grid, groups and objective are for a gamma that is searched: drop them, or gamma"
        if self.start == "identity" and {"logit", "value"} & {*given}:
            yield "logit and value are for start: fit"
        if self.logit is not None and "value" in given:
            yield "value is fitted, and logit takes the place of a fit: drop one of them"
        if (of_text := [name for name in OF_TEXT if name in given]) and (self.labelled or not self._measures):
            why = "labelled takes its place" if self.labelled else "nothing is measured here"
            yield f"calibration text, and {why}: drop {' and '.join(of_text)}"

    def problems_after(self, later: Anatomy) -> list[str]:
        if self.method != "zero_tuning" or not (found := self._problems_of_visibility(later)):
            return []
        return [f"sink_calibration before duo_attention: {found[0]}"]

    def _problems_of_visibility(self, anatomy: Anatomy) -> list[str]:
        """Why the chosen heads and the first token do not go together."""
        lost = {layer.index: self._lost(layer) for layer in anatomy.layers if layer.index in self._layers(anatomy)}
        lost = {layer: heads for layer, heads in lost.items() if heads}
        if self.method == "zero_tuning" and lost:
            layer, heads = next(iter(lost.items()))
            named = [anatomy.layers[layer].query_name(head) for head in heads]
            return [
                f"zero_tuning: heads {named} of layer {layer} stream without sinks, so "
                "the first token leaves their window: keep sinks (duo_attention.sinks from 1), or leave them out"
            ]
        if not self._fits:
            return []
        if not lost:
            return [
                f"{self.method}: start: fit puts virtual keys in place of a first token that a head no longer sees, "
                "and these heads see it: split them before (duo_attention with sinks: 0), or start: identity"
            ]
        window = max(layer.streaming_window for layer in anatomy.layers if layer.index in lost)
        positions = getattr(anatomy.config.get_text_config(), "max_position_embeddings", None)
        if (positions or window + 2) < window + 2:  # pieces of text are cut to them
            return [f"the model has no positions behind the window of {window} tokens: choose a smaller window"]
        if self.calibration_length < window + 2:
            what = f"calibration_length {self.calibration_length} does not leave the window of {window} tokens"
            return [f"{what}, so that nothing can be fitted: give more than {window + 1}"]
        return []

    def term_layers(self, anatomy: Anatomy) -> set[int]:
        return set(self._layers(anatomy))

    def _layers(self, anatomy: Anatomy) -> list[int]:
        return list(range(len(anatomy.layers))) if self.layers is None else sorted(set(self.layers))

    def _heads(self, layer: LayerAnatomy) -> list[int]:
        """The places of the chosen query heads in a layer; they are chosen by the base's numbers."""
        chosen = (name for name in query_names(layer) if self.heads is None or name in self.heads)
        return [query_names(layer).index(name) for name in chosen if [layer.index, name] not in self.exclude]

    def _lost(self, layer: LayerAnatomy) -> list[int]:
        """The chosen query heads of a layer that saw the first token of a long text in the base, and do no more."""
        narrower = bool(layer.window) and layer.window <= layer.streaming_window  # the base's own
        if not layer.streaming or layer.sinks or narrower:
            return []
        owner = [kv_head for kv_head, group in enumerate(groups_of(layer)) for _ in group]
        return [head for head in self._heads(layer) if owner[head] in layer.streaming]

    def _targets(self, anatomy: Anatomy) -> dict[int, list[int]]:
        """Layer -> query heads whose parameters get values."""
        pick = self._lost if self._fits else self._heads
        found = {i: pick(anatomy.layers[i]) for i in self._layers(anatomy)}
        return {layer: heads for layer, heads in found.items() if heads}

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        targets = self._targets(anatomy)
        many = f"{sum(map(len, targets.values()))} query heads in {len(targets)} layers"
        notes = []
        if self.method == "zero_tuning":
            aim = "right choices" if self.labelled else self.objective
            how = f"gamma {self.gamma:g}" if self.gamma else f"gamma searched ({self.groups}, {aim})"
            line = f"the first token's weight in {many}: {how}"
            if any(anatomy.layers[i].window for i in targets):
                notes.append("where the base has a sliding window, the first token is weighted while it is seen")
        elif self.method == "act":
            how = f"{self.beta or BETA:g} of their weight is left, the heads by their slope ({self.objective})"
            line = f"sinks other than the first token in up to {many}: {how}"
            notes.append("sinks are known by a probe on a token's value; the record says how well it agrees with ACT")
        elif self._fits:
            what = "a key and a value" if self.method == "kv_bias" else f"a logit, value {self.value}"
            line = f"virtual keys in place of the lost first token in {many}: {what}, measured"
        else:
            logit = "that changes nothing" if self.logit is None else f"of logit {self.logit:g}"
            line = f"a virtual key {logit} in {many} ({self.method})"
        if self._measures:
            notes.append("a setting that is not two standard errors better than none on text held back is not kept")
        entries = (self._entry(layer, targets).get("parameters", {}) for layer in anatomy.layers)
        more = sum(map(prod, (shape for entry in entries for shape in entry.values())))
        return PlannedChange(anatomy, (line,), SURGICAL, tuple(notes), measured=self._measures, parameters=more)

    def apply(self, model, context: ApplyContext) -> dict:
        from surgery.architecture.anatomy import Anatomy
        from surgery.operations.sink_calibration.act import calibrate_sinks
        from surgery.operations.sink_calibration.virtual_keys import fit_virtual_keys, set_logit
        from surgery.operations.sink_calibration.zero_tuning import search_gamma
        from surgery.runtime.modeling_surgery import patch

        anatomy = Anatomy.of(model)  # which heads stream may have been measured since the plan was made
        targets = self._targets(anatomy)
        pieces = self._pieces(model, context) if self._measures else None
        try:
            patch(model, {"layers": [self._entry(layer, targets) for layer in anatomy.layers]})
        except ValueError as error:
            raise SurgeryError(f"sink_calibration: {error}", where=type(model).__name__) from None
        if self.method == "zero_tuning":
            return search_gamma(model, self, targets, pieces, context)
        if self.method == "act":
            record = {"method": self.method, "beta": self.beta or BETA, "threshold": self.threshold or THRESHOLD}
            if pieces is not None:  # else beta is 1
                given = {"beta": record["beta"], "alpha": record["threshold"], "objective": self.objective}
                record |= calibrate_sinks(model, targets, pieces, **given, progress=context.progress)
                for layer, heads in record["heads"].items():
                    heads[:] = map(anatomy.layers[int(layer)].query_name, heads)
            return record
        record = {"method": self.method, "start": self.start}
        if self._fits:
            return record | fit_virtual_keys(model, anatomy, targets, pieces, context.progress)
        if self.logit is not None:
            set_logit(model, targets, self.logit)
        return record | {"logit": self.logit}

    def _pieces(self, model, context: ApplyContext):
        from surgery.calibration.scoring import fitting_questions
        from surgery.data.passkeys import calibration_sequences

        tokenizer = context.tokenizer_for("calibration needs the tokenizer", self.op)
        if self.labelled is not None:
            return fitting_questions(self.labelled, tokenizer, model)
        asked = self.text, self.calibration_length, self.calibration_samples
        return calibration_sequences(model, tokenizer, *asked)

    def _entry(self, layer: LayerAnatomy, targets: dict[int, list[int]]) -> dict[str, Any]:
        """A layer's entry in the `surgery` block. Keys and values are per KV head, as the first token's are."""
        if layer.index not in targets:
            return {}
        if self.method == "zero_tuning":
            return {"parameters": {"surgery_log_gamma": [layer.heads]}}
        if self.method == "act":
            probe = [layer.heads, layer.head_dim + 2]  # for a value, its norm, and 1
            return {"parameters": {"surgery_log_beta": [layer.heads], "surgery_sink_probe": probe}}
        shapes = {"surgery_sink_logit": [layer.heads, 1]}
        if self.method == "kv_bias" or (self._fits and self.value == "fit"):
            shapes["surgery_value"] = [layer.kv_heads, 1, layer.head_dim]
        if self.method == "kv_bias":
            shapes["surgery_key"] = [layer.kv_heads, 1, layer.head_dim]
        return {"parameters": shapes} | ({"stand_in": True} if self._fits else {})
