"""Routers of gates, fitted without gradient on a calibration text, layer by layer.

What each unit (a query head, or the query heads of a KV head) is worth to a token is measured, and predicted from the
layer's input by ridge regression, in float64 and closed form, from streamed second moments: no activation is kept.
The strength of the ridge is the one that predicts best on sequences held back. A layer is measured on what the gated
layers before it give.

    energy   log ||o_u||^2, o_u = W_O^u z_u what the unit adds to the residual stream
    damage   the growth of the layer's error ||sum of o over what is off||^2 when the unit is off, too, as a share of
             ||sum of all o||^2; the others are off with the chance that the gate gives them: e_u + 2 p o_u (o - o_u)

Source of the first: Jin et al. 2024, "MoH", arXiv 2410.11842, whose LLM form turns heads on by a norm, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.weights import unpack
from surgery.calibration.layerwise import Layerwise
from surgery.runtime.surgery_gates import Gate

SCORES = ("energy", "damage")
ROUTERS = ("fit", "static", "random", "zero")
GRID = tuple(10.0**power for power in range(-6, 3))  # strengths of the ridge, relative to the inputs' mean variance


class Moments:
    """Sums over tokens of a regression with intercept, in float64.

    Attributes:
        xx: [D + 1, D + 1], xy: [D + 1, outputs], yy: [outputs]; the last input is 1.
    """

    def __init__(self, inputs: int, outputs: int, device=None):
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.yy = torch.zeros(outputs, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens: x [n, D], y [n, outputs]."""
        x, y = torch.nn.functional.pad(x.double(), (0, 1), value=1.0), y.double()
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum(0)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.xx) - 1, len(self.yy), self.xx.device)
        total.xx, total.xy, total.yy = self.xx + other.xx, self.xy + other.xy, self.yy + other.yy
        return total

    @property
    def means(self) -> torch.Tensor:
        """Mean of each output."""
        return self.xy[-1] / self.xx[-1, -1]

    def solutions(self, grid) -> list[torch.Tensor]:
        """For each strength the coefficients [D + 1, outputs] that are least in squared error + strength * |W|^2."""
        count, mean = self.xx[-1, -1], self.xx[-1, :-1] / self.xx[-1, -1]
        covariance = self.xx[:-1, :-1] / count - torch.outer(mean, mean)
        cross = self.xy[:-1] / count - torch.outer(mean, self.means)
        values, vectors = torch.linalg.eigh(covariance)
        unit, turned = values.clamp(min=0).mean(), vectors.T @ cross
        found = []
        for strength in grid:
            weights = vectors @ (turned / (values.clamp(min=0) + strength * unit + 1e-300)[:, None])
            found.append(torch.cat([weights, (self.means - mean @ weights)[None]]))
        return found

    def errors(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Squared error of each output, summed over tokens."""
        fitted = (coefficients * (self.xx @ coefficients)).sum(0)
        return self.yy - 2 * (coefficients * self.xy).sum(0) + fitted


def ridge(fit: Moments, held: Moments, grid=GRID) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Ridge regression, its strength chosen on `held`, then solved on both.

    Returns:
        Weights [outputs, D], bias [outputs]; and a record: the strength, and the share of the variance between tokens
        that it explains on `held` (below 0: worse than each output's mean over `fit`).
    """
    errors = [held.errors(solution).sum().item() for solution in fit.solutions(grid)]
    best = min(range(len(grid)), key=errors.__getitem__)
    constant = torch.zeros_like(fit.xy)
    constant[-1] = fit.means
    record = {"ridge": grid[best], "explained": 1 - errors[best] / max(held.errors(constant).sum().item(), 1e-300)}
    (solution,) = (fit + held).solutions([grid[best]])
    return solution[:-1].T, solution[-1], record


def worth(heads: torch.Tensor, output: torch.Tensor, groups: tuple[int, ...], score: str, chance: float):
    """What each unit is worth to each token: [n, units] in float64.

    Args:
        heads: [n, H * d], what the heads give to the output projection.
        output: [D, H, d], the output projection.
        groups: query heads of each unit.
        score: of `SCORES`.
        chance: of damage, that another unit is off, too.
    """
    size = output.shape[-1]
    wide, each = heads.double(), [group * size for group in groups]
    gram = output.double().flatten(1)
    gram = gram.T @ gram
    together = [part.sum(-1) for part in ((wide @ gram) * wide).split(each, dim=-1)]
    alone, begin = [], 0
    for width in each:
        part, own = wide[:, begin : begin + width], slice(begin, begin + width)
        alone.append(((part @ gram[own, own]) * part).sum(-1))
        begin += width
    energy, whole = torch.stack(alone, dim=-1), torch.stack(together, dim=-1)
    if score == "energy":
        return energy.clamp(min=1e-30).log()
    return (energy + 2 * chance * (whole - energy)) / whole.sum(-1, keepdim=True).clamp(min=1e-30)


@dataclass
class Planned:
    """What is known of a layer's gate before it is measured: all of it but which units are shared."""

    gate: Gate
    shared: int


def route(
    model,
    anatomy: Anatomy,
    planned: dict[int, Planned],
    sequences: torch.Tensor,
    *,
    score: str,
    router: str,
    seed: int = 0,
    progress=None,
) -> tuple[dict[int, tuple[Gate, dict]], list[dict]]:
    """Gates and their parameters, the model left as it was.

    Args:
        planned: layer -> what is known of its gate.
        sequences: tokens, long [samples, length]; every fourth is held back for the strength of the ridge.
        score: of `SCORES`.
        router: "fit"; "static": every token as the mean; "random", "zero".

    Returns:
        Layer -> its gate with the shared units, and the parameters that are not 0 (name without `surgery_` ->
        float64); and a record of each of these layers.
    """
    modes, found, records = [(module, module.training) for module in model.modules()], {}, []
    draw = torch.Generator().manual_seed(seed)
    try:
        model.eval()
        with torch.no_grad():
            run = Layerwise(model, anatomy, sequences)
            for facts in anatomy.layers:
                made = None
                if facts.index in planned:
                    moments = _measure(model, facts, run, planned[facts.index].gate, score)
                    gate, parameters, record = _route_layer(planned[facts.index], moments, router, draw)
                    made = found[facts.index] = (gate, parameters)
                    name = facts.query_name if gate.units == facts.heads else facts.kv_name
                    records.append({"layer": facts.index, "shared": [*map(name, gate.shared)]} | record)
                if facts.index < max(planned):
                    _advance(model, facts, run, made)
                if progress:
                    progress(facts.index + 1, len(anatomy.layers), "routers")
    finally:
        for module, mode in modes:
            module.training = mode
    return found, records


def _measure(model, facts, run: Layerwise, gate: Gate, score: str) -> tuple[Moments, Moments]:
    """Moments of inputs and worths of one layer, on the sequences to fit and on those held back."""
    module, inputs = model.get_submodule(facts.path), []
    tensors = {name: module.get_parameter(name).detach() for name in facts.tensor_names}
    output = unpack(facts, tensors).o
    chance = max(gate.units - gate.on - 1, 0) / max(gate.units - 1, 1)

    def keep(_, args, kwargs):
        inputs.append(args[0] if args else kwargs["hidden_states"])

    moments, hook = [], module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for number, heads in enumerate(run.heads(facts.index)):
            x, y = inputs.pop().flatten(0, -2), worth(heads, output, gate.groups, score, chance)
            if not moments:
                moments = [Moments(x.shape[-1], gate.units, x.device) for _ in range(2)]
            moments[number % 4 == 3].add(x, y)
    finally:
        hook.remove()
    return moments[0], moments[1]


def _route_layer(planned: Planned, moments: tuple[Moments, Moments], router: str, draw) -> tuple[Gate, dict, dict]:
    """The gate, its parameters and a record of one layer."""
    fit, held = moments
    means, gate = (fit + held).means, planned.gate
    shared = sorted(means.argsort(descending=True, stable=True)[: planned.shared].tolist())
    gate = Gate(gate.kind, gate.groups, tuple(shared), gate.active, gate.hard, gate.rescale)
    routed = [unit for unit in range(gate.units) if unit not in shared]
    weights, bias, record = torch.zeros(len(means), len(fit.xx) - 1).to(means), torch.zeros_like(means), {}
    if router == "fit":
        weights, bias, record = ridge(fit, held)
        bias = bias - bias[routed].mean()  # the same for all units: it changes no choice, and keeps numbers small
        weights = weights - weights[routed].mean(0)
    elif router == "static":
        bias = means - means[routed].mean()
    elif router == "random":
        weights = (torch.randn(weights.shape, generator=draw, dtype=torch.float64) * weights.shape[1] ** -0.5).to(
            means
        )
    sign = -1.0 if gate.kind == "mae" else 1.0  # its router weighs the experts that lack a head
    return gate, {"router": sign * weights[routed], "router_bias": sign * bias[routed]}, record


def _advance(model, facts, run: Layerwise, made: tuple[Gate, dict] | None) -> None:
    """Put the text through a layer as its gate will leave it."""
    if made is None:
        run.advance(facts.index)
        return
    (gate, parameters), gates = made, []
    parameters = {"router_temperature": torch.zeros(1)} | parameters

    def choose(_, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).float()
        named = {name: tensor.to(hidden) for name, tensor in parameters.items()}
        if gate.shared:
            zero = hidden.new_zeros(max(2, len(gate.shared)), hidden.shape[-1])
            named |= {"shared_router": zero[: len(gate.shared)], "balance": zero[:2]}
        logits = gate.logits(hidden, named)
        gates.append(gate.of_heads(gate.weights(hidden, logits, gate.chosen(logits), named)))

    def silence(_, args):
        each = args[0].unflatten(-1, (-1, facts.head_dim))
        return ((each * gates.pop().to(each)[..., None]).flatten(-2), *args[1:])

    hooks = [
        model.get_submodule(facts.path).register_forward_pre_hook(choose, with_kwargs=True),
        run.outputs[facts.index].register_forward_pre_hook(silence),
    ]
    try:
        run.advance(facts.index)
    finally:
        for hook in hooks:
            hook.remove()
