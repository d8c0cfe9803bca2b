"""The operations `moh` and `mae`, and their base class, which measures on text and puts gates into a model.

moh is a mixture of heads. Shared heads are on for every token; from the other heads a router chooses some for each
token. Source: Jin et al. 2024, "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842. Unlike in
its code, a measurement chooses the shared heads, the router is fitted to data without training, and heads that are off
are not computed.

mae is a mixture of h - 1 heads. For each token, the head that the token needs least is off; with soft weights, each
head has its own weight. Source: Peng et al. 2020, "A Mixture of h - 1 Heads is Better than h Heads", arXiv 2005.06537.
Unlike there, the weights are computed from each token and not from the mean of a text, which a decoder does not know
yet.
"""

from __future__ import annotations

from math import ceil, prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from surgery.calibration.cost import activation_bytes, forward_flops
from surgery.calibration.head_scores import unsupported
from surgery.data.text import BUILTIN
from surgery.operations.base import (
    SURGICAL,
    ApplyContext,
    InWords,
    Measurement,
    Operation,
    PlannedChange,
    Seed,
    WholeNumber,
    give_entries,
)

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.operations.moh.router import Planned
    from surgery.runtime.surgery_gates import Gate

FITTED = "The router was fitted on one text, without training."
SKIPPED = (
    "Work is skipped where no gradients are needed: in prompts from 512 tokens on, and in decoding on a CPU (by the "
    "projections of wide models, and from 2k tokens on by the attention of KV heads whose heads are all off). "
    "Attention on a GPU, or on a batch with padding, computes all heads."
)
SKIPPED_BY_NORM = (
    "Work is skipped where no gradients are needed, in prompts from 512 tokens on: by attention and the output "
    "projection. Decoding skips nothing. Attention on a GPU, or on a batch with padding, computes all heads."
)


class Gated(Operation):
    """A gate for each head and token, chosen by a router on the layer's input."""

    term: ClassVar[str | None] = "gate"
    purpose: ClassVar[str] = "training"
    TEXTS: ClassVar[tuple[str, ...]] = (BUILTIN,)

    keep_first_layers: WholeNumber = Field(0, description="Layers at the beginning that keep all heads on.")
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
    seed: Seed = Field(0, description="Seed of router: random.")

    @property
    def _measures(self) -> bool:
        return self.router in ("fit", "static")

    def limitations(self) -> tuple[str, ...]:
        return tuple(line for line in self.LIMITATIONS if self._measures or not line.startswith(FITTED))

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
        """Notes on work that is not skipped, and on what is measured.

        Args:
            counts: for each gated layer, the number of units that are on for a token, and the number of all units.
        """
        from surgery.runtime.surgery_gated_compute import SHARE

        notes = []
        if full_layers := sum(on > SHARE * units for on, units in counts):
            where = f"{full_layers} of {len(counts)} layers"
            notes.append(f"no work is skipped in {where}: with more than {SHARE:.0%} on, computing all is faster")
        if full_layers < len(counts):
            notes += _still_computed(anatomy, self.router)
        if self._measures:
            notes.append(
                f"which heads a token needs is measured on text ({self.score}) and fitted to the layer's input"
            )
        return notes

    def _parameters(self, anatomy: Anatomy, gates: list[Gate]) -> int:
        """How many numbers these gates add to the weights."""
        hidden = anatomy.config.get_text_config().hidden_size
        return sum(prod(shape) for gate in gates for shape in gate.shapes(hidden).values())

    def _measurements(self, anatomy: Anatomy) -> tuple[Measurement, ...]:
        """Cost of sending the text through each layer of the base, its heads one by one, and the gated layer."""
        length = min(self.calibration_length, anatomy.positions or self.calibration_length)
        flops = 3 * forward_flops(anatomy, self.calibration_samples * length, length)
        hidden = anatomy.config.get_text_config().hidden_size
        states = 2 * 4 * self.calibration_samples * length * hidden
        sums = 4 * 8 * (hidden + 1) ** 2  # of two parts of the text, their total, and what solves it; in float64
        on_gpu = states + sums + activation_bytes(anatomy, length)
        return (Measurement("fitting routers", flops, states, memory_on_gpu=on_gpu),)

    def _install_gates(self, model, anatomy: Anatomy, planned: dict[int, Planned], context: ApplyContext) -> dict:
        """Measure, put the gates into the model and set their parameters; returns a record."""
        import torch

        from surgery.data.calibration_text import calibration_sequences
        from surgery.operations.moh.router import route
        from surgery.runtime.modeling_surgery import attention_modules

        if self._measures or any(layer.shared for layer in planned.values()):
            tokenizer = context.tokenizer_for("calibration text needs the tokenizer", self.op)
            text_settings = self.text, self.calibration_length, self.calibration_samples
            sequences = calibration_sequences(model, tokenizer, *text_settings)
            settings = {"score": self.score, "router": self.router, "seed": self.seed}
            routed, records = route(model, anatomy, planned, sequences, **settings, progress=context.progress)
        else:
            routed, records = unmeasured(model, planned, self.router, self.seed), []
        give_entries(model, [self._entry(routed.get(layer.index), model) for layer in anatomy.layers], self.op)
        with torch.no_grad():
            for module in attention_modules(model):
                for name, values in routed.get(module.layer_idx, (None, {}))[1].items():
                    parameter = getattr(module, f"surgery_{name}")
                    parameter.copy_(values.to(parameter))
        return {"layers": records} if records else {}

    def _entry(self, routed, model) -> dict[str, Any]:
        """A layer's entry in the `surgery` block."""
        if routed is None:
            return {}
        gate, _ = routed
        if gate.kind == "mae":
            gate_entry = {"kind": "mae", "hard": gate.hard, "rescale": gate.rescale}
        else:
            unit = getattr(self, "granularity", "head")
            gate_entry = {"kind": "moh", "unit": unit, "shared": list(gate.shared), "active": gate.active}
            gate_entry |= {"router": gate.router} if gate.router != "linear" else {}
            gate_entry |= {} if gate.weighs else {"weighs": False}
        return {"gate": gate_entry, "parameters": gate.shapes(model.config.get_text_config().hidden_size)}


class Moh(Gated):
    """A router turns on as many heads, or KV groups, as `active_ratio` says."""

    summary: ClassVar[str] = "Mixture of heads (MoH): a router turns heads on for each token."
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "Keys and values are computed and kept for every token. The cache is as large as before.",
        FITTED + " Heads that only rare text needs may be off when it comes.",
        SKIPPED,
        SKIPPED_BY_NORM,
    )

    LATER: ClassVar[tuple[str, ...]] = ("shared",)

    op: Literal["moh"] = "moh"
    router: Literal["fit", "static", "random", "zero", "norm"] = Field(
        "fit",
        description="fit: ridge regression of the score on the layer's input; static: the same heads for all tokens; "
        "random (a control); zero (for training); norm: the norm of the head's query, as in MoH's code for LLMs.",
    )
    gates: Literal["choose", "weigh"] = Field(
        "choose",
        description="choose: the heads that are on count fully (a router with weights may learn to weigh them in "
        "training); weigh: by the softmax of the router.",
    )
    shared: Literal["measured", "first"] = Field(
        "measured",
        description="Which heads are on for all tokens. first: those of the lowest numbers, as in the paper.",
    )
    active_ratio: float = Field(0.67, gt=0, le=1, description="Share of the heads that are on for a token.")
    shared_ratio: float = Field(0.25, ge=0, lt=1, description="Share of the heads that are on for all tokens.")
    granularity: Literal["head", "kv_group"] = Field(
        "head", description="What the router turns on: single query heads, or those of a KV head together."
    )

    def problems(self, anatomy: Anatomy) -> list[str]:
        problems = super().problems(anatomy)
        if problems:
            return problems
        layout = anatomy.layers[0].layout
        if self.router == "norm" and (layout.qkv or layout.q != "q_proj"):
            return [
                f"moh: router: norm reads the output of a query projection (q_proj), and {anatomy.model_type} makes "
                f"queries in {layout.qkv or layout.q}; take router: fit"
            ]
        if 0 < self.shared_ratio >= self.active_ratio:
            return [
                f"moh: shared_ratio {self.shared_ratio:g} is not less than active_ratio {self.active_ratio:g}: shared "
                "heads are among those that are on, and the router chooses at least one more"
            ]
        units = "KV groups" if self.granularity == "kv_group" else "query heads"
        for layer, (on, _) in zip(self._layers(anatomy), self._counts(anatomy), strict=True):
            if on < 1:
                problems.append(
                    f"moh: active_ratio {self.active_ratio:g} of {self._units(layer)} {units} leaves layer "
                    f"{layer.index} none that is on; give at least 1/{self._units(layer)}, "
                    f"{ceil(1000 / self._units(layer)) / 1000:g}"
                )
        return problems[:1]

    def _units(self, layer: LayerAnatomy) -> int:
        return layer.kv_heads if self.granularity == "kv_group" else layer.heads

    def _counts(self, anatomy: Anatomy) -> list[tuple[int, int]]:
        """(units that are on, shared units among them) of each gated layer.

        The rounding error of a layer is carried to the next layer, so that the ratios hold over all layers.
        """
        counts, want_on, want_shared = [], 0.0, 0.0
        for layer in self._layers(anatomy):
            units = self._units(layer)
            want_on += self.active_ratio * units
            want_shared += self.shared_ratio * units
            on = min(units, _round(want_on))
            shared = max(0, min(on - 1, _round(want_shared)))
            want_on, want_shared = want_on - on, want_shared - shared
            counts.append((on, shared))
        return counts

    def limitations(self) -> tuple[str, ...]:
        wrong = SKIPPED if self.router == "norm" else SKIPPED_BY_NORM
        return tuple(line for line in super().limitations() if line != wrong)

    def milder(self) -> str:
        return f"active_ratio={(1 + self.active_ratio) / 2:.2g}" if self.active_ratio < 0.95 else ""

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        layers, counts = self._layers(anatomy), self._counts(anatomy)
        units = sum(self._units(layer) for layer in layers)
        on, shared = (sum(column) for column in zip(*counts, strict=True))
        name = "KV groups" if self.granularity == "kv_group" else "query heads"
        each = sorted({(f"{a} of {self._units(layer)}", s) for layer, (a, s) in zip(layers, counts, strict=True)})
        shown = ", ".join(f"{a} ({s} shared)" for a, s in each[:4]) + (", ..." if len(each) > 4 else "")
        weighed = ", weighed by the router" if self.gates == "weigh" else ""
        line = (
            f"{on} of {units} {name} are on for a token ({on / units:.1%}){weighed}, "
            f"{shared} of them for every token; a layer has {shown}"
        )
        router = f"{len(layers)} of {len(anatomy.layers)} layers have a router: {self.router}"
        measured = self._measures or (shared > 0 and self.shared == "measured")
        notes = self._notes(anatomy, [(on, self._units(layer)) for layer, (on, _) in zip(layers, counts, strict=True)])
        gates = [self._gate(layer, *pair, tuple(range(pair[1]))) for layer, pair in zip(layers, counts, strict=True)]
        more = self._parameters(anatomy, gates)
        details = {"parameters": more, "measurements": self._measurements(anatomy) if measured else ()}
        return PlannedChange(anatomy, (line, router), SURGICAL, tuple(notes), measured=measured, **details)

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        on = sum(active for active, _ in self._counts(before))
        of = sum(self._units(layer) for layer in self._layers(before))
        units = "KV groups" if self.granularity == "kv_group" else "query heads"
        return InWords(
            f"{on / of:.0%} of its {units} on for a token (MoH)",
            f"A router in each layer now chooses for every token which {units} are on: {on} of {of}.",
            "Attention does less work in long prompts; the cache is as large as before.",
            "Use it as a start for training a mixture of heads, or where long prompts are what takes the time.",
            "Do not use it to save memory.",
        )

    def _gate(self, layer: LayerAnatomy, on: int, shared: int, which: tuple[int, ...] = ()) -> Gate:
        """A layer's gate; `which` names the shared units, which are not known before measuring."""
        from surgery.architecture.layer import groups_of
        from surgery.runtime.surgery_gates import Gate

        groups = [len(group) for group in groups_of(layer)]
        units = tuple(groups) if self.granularity == "kv_group" else (1,) * layer.heads
        norm = self.router == "norm"
        kind = {"router": "norm", "weighs": self.gates == "weigh"} if norm else {}
        return Gate("moh", units, which, on - shared, **kind)

    def apply(self, model, context: ApplyContext) -> dict:
        from surgery.architecture.anatomy import Anatomy
        from surgery.operations.moh.router import Planned

        anatomy = Anatomy.of(model)
        counts = zip(self._layers(anatomy), self._counts(anatomy), strict=True)
        weight, planned = 1.0 if self.gates == "weigh" else 0.0, {}
        for layer, (on, shared) in counts:
            first, measured = (tuple(range(shared)), 0) if self.shared == "first" else ((), shared)
            planned[layer.index] = Planned(self._gate(layer, on, shared, first), measured, weight)
        return self._install_gates(model, anatomy, planned, context)


class Mae(Gated):
    """Experts are all heads but one; a router weighs them, or chooses one."""

    summary: ClassVar[str] = "Mixture of h - 1 heads (MAE): for each token one head is off, or heads are weighed."
    purpose: ClassVar[str] = "exact"
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "In training mode hard weights are soft, since a choice has no gradient: the outputs differ from inference.",
        "Soft weights skip no work. Hard weights skip one head, and only in layers with four heads or fewer: with "
        "more, computing all heads costs less. The cache is as large as before.",
        FITTED,
    )

    op: Literal["mae"] = "mae"
    hard: bool = Field(
        True, description="One head is off; false: soft weights of all experts, identity at router: zero."
    )
    rescale: bool = Field(False, description="Hard: the heads that are on count H / (H - 1), as in the paper.")

    def problems(self, anatomy: Anatomy) -> list[str]:
        problems = super().problems(anatomy)
        if not problems and any(layer.heads < 2 for layer in self._layers(anatomy)):
            problems.append("mae: a layer with a single query head has none to leave out")
        if self.rescale and not self.hard:
            problems.append("mae: rescale is for hard: true; soft weights are scaled by themselves")
        return problems

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        layers = self._layers(anatomy)
        heads = sum(layer.heads for layer in layers)
        what = "the query heads are weighed for each token"
        if self.hard:
            what = f"{heads - len(layers)} of {heads} query heads are on for a token, all but one in each layer"
            what += ", scaled by H / (H - 1)" if self.rescale else ""
        router = f"{len(layers)} of {len(anatomy.layers)} layers have a router: {self.router}"
        notes = self._notes(anatomy, [(layer.heads - 1, layer.heads) for layer in layers])
        notes = notes if self.hard else ["soft weights turn nothing off: no work is skipped"]
        more = self._parameters(anatomy, [self._gate(layer) for layer in layers])
        details = {"parameters": more, "measurements": self._measurements(anatomy) if self._measures else ()}
        return PlannedChange(anatomy, (what, router), SURGICAL, tuple(notes), measured=self._measures, **details)

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        how = "turns one head off" if self.hard else "weighs the heads"
        return InWords(
            "a mixture of its heads (MAE)",
            f"A router in each layer now {how} for every token.",
            use="Use it as a start for training a mixture of heads.",
            avoid="Do not use it to save memory or time: it saves neither worth mentioning.",
        )

    def _gate(self, layer: LayerAnatomy) -> Gate:
        from surgery.runtime.surgery_gates import Gate

        return Gate("mae", (1,) * layer.heads, hard=self.hard, rescale=self.rescale)

    def apply(self, model, context: ApplyContext) -> dict:
        from surgery.architecture.anatomy import Anatomy
        from surgery.operations.moh.router import Planned

        anatomy = Anatomy.of(model)
        planned = {layer.index: Planned(self._gate(layer), 0) for layer in self._layers(anatomy)}
        return self._install_gates(model, anatomy, planned, context)


def _round(value: float) -> int:
    """The nearest whole number, halves up. The 1e-9 keeps rounding errors in sums of ratios from deciding."""
    return int(value + 0.5 + 1e-9)


def _still_computed(anatomy: Anatomy, router: str) -> list[str]:
    """Notes on work that is done for all heads, even in layers that skip work."""
    layer, notes = anatomy.layers[0], []
    if router == "norm":
        notes.append("no work is skipped in the query projection, whose output the router reads, nor in decoding")
    elif layer.layout.qkv or layer.layout.q != "q_proj" or layer.layout.conv1d:
        notes.append(f"no work is skipped in the query projection: {anatomy.model_type} makes it with others")
    elif layer.qk_norm == "whole":
        notes.append("no work is skipped in the query projection: the QK-norm spans all heads")
    if layer.layout.o != "o_proj":
        notes.append(f"no work is skipped in the output projection, which is {layer.layout.o} here")
    if any(layer.window or layer.streaming or layer.soft_cap or layer.layout.sinks for layer in anatomy.layers):
        notes.append("attention of layers with windows, streaming heads, a soft-cap or sinks computes all heads")
    return notes


def unmeasured(model, planned: dict[int, Planned], router: str, seed: int) -> dict:
    """The gates of `route` if nothing is measured: shared units are known, and the router is not fitted."""
    import torch

    hidden, draw = model.config.get_text_config().hidden_size, torch.Generator().manual_seed(seed)
    routed = {}
    for layer, plan in planned.items():
        values = torch.randn(len(plan.gate.routed), hidden, generator=draw, dtype=torch.float64) * hidden**-0.5
        routed[layer] = (plan.gate, ({"router": values} if router == "random" else {}) | plan.start)
    return routed
