"""What moh and mae share: the text they measure on, and gates put into a model."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from surgery.calibration.head_scores import unsupported
from surgery.errors import SurgeryError
from surgery.operations.base import Context, Operation

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer_anatomy import LayerAnatomy
    from surgery.operations.moh.router import Planned
    from surgery.runtime.surgery_gates import Gate

FITTED = "The router was fitted on one text, without training."
Whole = Annotated[int, Field(ge=0, strict=True)]


class Gated(Operation):
    """A gate for each head and token, chosen by a router on the layer's input."""

    term: ClassVar[str | None] = "gate"

    keep_first_layers: Whole = Field(0, description="Layers at the begin that keep all heads on.")
    score: Literal["energy", "damage"] = Field(
        "energy",
        description="What a head is worth to a token: energy of its output (best where most heads are on), or damage, "
        "the growth of the layer's error without it (best where half of them are).",
    )
    router: Literal["fit", "static", "random", "zero"] = Field(
        "fit",
        description="fit: ridge regression of the score on the layer's input; static: the same heads for all tokens; "
        "random (a control); zero (for training).",
    )
    calibration_samples: int = Field(32, ge=4, strict=True, description="Pieces of text; every fourth is held back.")
    calibration_length: int = Field(512, ge=8, strict=True, description="Tokens in a piece.")
    text: str = Field("builtin", description="'builtin' (calibration part of Python's reference) or a text file.")
    seed: Whole = Field(0, description="Seed of router: random.")

    @property
    def _measures(self) -> bool:
        return self.router in ("fit", "static")

    def caveats(self) -> tuple[str, ...]:
        return tuple(line for line in self.limits if self._measures or not line.startswith(FITTED))

    def problems(self, anatomy: Anatomy) -> list[str]:
        if reason := unsupported(anatomy):
            return [f"{self.op}: {reason.replace('split', 'gated')}"]
        count = len(anatomy.layers)
        if self.keep_first_layers >= count:
            return [f"{self.op}: keep_first_layers {self.keep_first_layers} leaves none of the {count} layers"]
        return []

    def _layers(self, anatomy: Anatomy) -> list[LayerAnatomy]:
        """The layers that get a gate."""
        return list(anatomy.layers[self.keep_first_layers :])

    def _notes(self, anatomy: Anatomy, counts: list[tuple[int, int]]) -> list[str]:
        """What is computed all the same, and what is measured.

        Args:
            counts: of each gated layer, how many of its units are on for a token, and how many it has.
        """
        from surgery.runtime.surgery_skipping import SHARE

        notes = []
        if whole := sum(on > SHARE * units for on, units in counts):
            where = f"{whole} of {len(counts)} layers"
            notes.append(f"no work is skipped in {where}: with more than {SHARE:.0%} on, computing all is faster")
        if whole < len(counts):
            notes += _still_computed(anatomy)
        if self._measures:
            notes.append(
                f"which heads a token needs is measured on text ({self.score}) and fitted to the layer's input"
            )
        return notes

    def _parameters(self, anatomy: Anatomy, gates: list[Gate]) -> int:
        """How many numbers these gates add to the weights."""
        hidden = anatomy.config.get_text_config().hidden_size
        return sum(prod(shape) for gate in gates for shape in gate.shapes(hidden).values())

    def _place(self, model, anatomy: Anatomy, planned: dict[int, Planned], context: Context) -> dict:
        """Measure, put the gates into the model and give their parameters values; a record."""
        import torch

        from surgery.data.passkeys import calibration_pieces
        from surgery.operations.moh.router import route
        from surgery.runtime.modeling_surgery import attention_modules, patch

        if self._measures or any(layer.shared for layer in planned.values()):
            tokenizer = context.tokenizer_for("calibration text needs the tokenizer", self.op)
            asked = self.text, self.calibration_length, self.calibration_samples
            sequences = calibration_pieces(model, tokenizer, *asked)
            settings = {"score": self.score, "router": self.router, "seed": self.seed}
            found, records = route(model, anatomy, planned, sequences, **settings, progress=context.progress)
        else:
            found, records = unmeasured(model, planned, self.router, self.seed), []
        try:
            entries = [self._entry(found.get(layer.index), model) for layer in anatomy.layers]
            patch(model, {"layers": entries})
        except ValueError as error:
            raise SurgeryError(f"{self.op}: {error}", where=type(model).__name__) from None
        with torch.no_grad():
            for module in attention_modules(model):
                for name, values in found.get(module.layer_idx, (None, {}))[1].items():
                    parameter = getattr(module, f"surgery_{name}")
                    parameter.copy_(values.to(parameter))
        return {"layers": records} if records else {}

    def _entry(self, found, model) -> dict[str, Any]:
        """A layer's entry in the `surgery` block."""
        if found is None:
            return {}
        gate, _ = found
        if gate.kind == "mae":
            said = {"kind": "mae", "hard": gate.hard, "rescale": gate.rescale}
        else:
            unit = getattr(self, "granularity", "head")
            said = {"kind": "moh", "unit": unit, "shared": list(gate.shared), "active": gate.active}
        return {"gate": said, "parameters": gate.shapes(model.config.get_text_config().hidden_size)}


def _still_computed(anatomy: Anatomy) -> list[str]:
    """What is computed for all heads in layers that skip work."""
    layer, notes = anatomy.layers[0], []
    if layer.layout.qkv or layer.layout.q != "q_proj" or layer.layout.conv1d:
        notes.append(f"no work is skipped in the query projection: {anatomy.model_type} makes it with others")
    elif layer.qk_norm == "whole":
        notes.append("no work is skipped in the query projection: the QK-norm spans all heads")
    if layer.layout.o != "o_proj":
        notes.append(f"no work is skipped in the output projection, which is {layer.layout.o} here")
    if any(layer.window or layer.streaming or layer.soft_cap or layer.layout.sinks for layer in anatomy.layers):
        notes.append("attention of layers with windows, streaming heads, a soft-cap or sinks computes all heads")
    return notes


def unmeasured(model, planned: dict[int, Planned], router: str, seed: int) -> dict:
    """What `route` gives where nothing is measured: no shared units, the router random or zero."""
    import torch

    hidden, draw = model.config.get_text_config().hidden_size, torch.Generator().manual_seed(seed)
    found = {}
    for layer, plan in planned.items():
        values = torch.randn(plan.gate.units, hidden, generator=draw, dtype=torch.float64) * hidden**-0.5
        found[layer] = (plan.gate, {"router": values} if router == "random" else {})
    return found
