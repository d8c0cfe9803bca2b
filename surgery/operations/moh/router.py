"""Routers of gates, fitted layer by layer on a calibration text, without gradients.

A unit is a query head, or all query heads of a KV head. The score of each unit is measured for each token, and a ridge
regression predicts it from the layer's input. The regression is solved in closed form in float64, from streamed
second moments, so no activations are kept. The strength of the ridge is the one that predicts best on held-out
sequences. Each layer is measured on the outputs of the gated layers before it.

    energy   log ||o_u||^2, where o_u = W_O^u z_u is the unit's contribution to the residual stream
    damage   the growth of the layer's error ||sum of o over units that are off||^2 when the unit is off, too, as a
             share of ||sum of all o||^2. Another unit is off with probability p, which the gate determines. With
             o the sum of all contributions, the growth is ||o_u||^2 + 2 p o_u (o - o_u).

Source of energy: Jin et al. 2024, "MoH", arXiv 2410.11842, whose form for LLMs also turns heads on by a norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.weights import unpack
from surgery.calibration.layerwise import Layerwise
from surgery.errors import ModelError
from surgery.machine.placement import exact
from surgery.machine.progress import begin
from surgery.runtime.surgery_gates import Gate

SCORES = ("energy", "damage")
GRID = tuple(10.0**power for power in range(-6, 3))  # strengths of the ridge, relative to the inputs' mean variance


class RegressionSums:
    """Sums over tokens of a regression with intercept, in float64.

    Attributes:
        xx: [D + 1, D + 1], xy: [D + 1, outputs], yy: [outputs]. The last input is the constant 1.
    """

    def __init__(self, inputs: int, outputs: int, device=None):
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.yy = torch.zeros(outputs, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens: x [n, D], y [n, outputs]."""
        x, y = torch.nn.functional.pad(exact(x), (0, 1), value=1.0), exact(y)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum(0)

    def __add__(self, other: RegressionSums) -> RegressionSums:
        total = RegressionSums(len(self.xx) - 1, len(self.yy), self.xx.device)
        total.xx, total.xy, total.yy = self.xx + other.xx, self.xy + other.xy, self.yy + other.yy
        return total

    @property
    def means(self) -> torch.Tensor:
        """Mean of each output."""
        return self.xy[-1] / self.xx[-1, -1]

    def solutions(self, grid) -> list[torch.Tensor]:
        """The coefficients [D + 1, outputs] with the least squared error + strength * |W|^2, for each strength."""
        count, mean = self.xx[-1, -1], self.xx[-1, :-1] / self.xx[-1, -1]
        covariance = self.xx[:-1, :-1] / count - torch.outer(mean, mean)
        cross = self.xy[:-1] / count - torch.outer(mean, self.means)
        values, vectors = torch.linalg.eigh(covariance)
        unit, rotated_cross = values.clamp(min=0).mean(), vectors.T @ cross
        solutions = []
        for strength in grid:
            weights = vectors @ (rotated_cross / (values.clamp(min=0) + strength * unit + 1e-300)[:, None])
            solutions.append(torch.cat([weights, (self.means - mean @ weights)[None]]))
        return solutions

    def errors(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Squared error of each output, summed over tokens."""
        fitted = (coefficients * (self.xx @ coefficients)).sum(0)
        return self.yy - 2 * (coefficients * self.xy).sum(0) + fitted


def ridge(train: RegressionSums, validation: RegressionSums, grid=GRID) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Ridge regression. Its strength is chosen on `validation`; then it is solved on both sets.

    Returns:
        Weights [outputs, D], bias [outputs], and a record. The record has the strength, and the share of the variance
        between tokens that is explained on `validation` (below 0: worse than each output's mean over `train`).
    """
    errors = [validation.errors(solution).sum().item() for solution in train.solutions(grid)]
    best = min(range(len(grid)), key=errors.__getitem__)
    constant = torch.zeros_like(train.xy)
    constant[-1] = train.means
    record = {
        "ridge": grid[best],
        "explained": 1 - errors[best] / max(validation.errors(constant).sum().item(), 1e-300),
    }
    (solution,) = (train + validation).solutions([grid[best]])
    return solution[:-1].T, solution[-1], record


def worth(heads: torch.Tensor, output: torch.Tensor, groups: tuple[int, ...], score: str, chance: float):
    """The score of each unit for each token: [n, units] in float64.

    Args:
        heads: [n, H * d], the heads' outputs, which the output projection reads.
        output: [D, H, d], the output projection.
        groups: number of query heads of each unit.
        score: one of `SCORES`.
        chance: for "damage", the probability that another unit is off, too.
    """
    size = output.shape[-1]
    wide, widths = exact(heads), [group * size for group in groups]
    gram = exact(output).to(wide.device).flatten(1)
    gram = gram.T @ gram
    dots = [outputs.sum(-1) for outputs in ((wide @ gram) * wide).split(widths, dim=-1)]
    energies, begin = [], 0
    for width in widths:
        outputs, own = wide[:, begin : begin + width], slice(begin, begin + width)
        energies.append(((outputs @ gram[own, own]) * outputs).sum(-1))
        begin += width
    energy, dot_with_sum = torch.stack(energies, dim=-1), torch.stack(dots, dim=-1)
    if score == "energy":
        return energy.clamp(min=1e-30).log()
    return (energy + 2 * chance * (dot_with_sum - energy)) / dot_with_sum.sum(-1, keepdim=True).clamp(min=1e-30)


@dataclass
class Planned:
    """A layer's gate before the measurement.

    Attributes:
        gate: the gate, without the shared units that the measurement chooses.
        shared: the number of these units.
        temperature: tau of the gate at its start; 0: units that are on count fully.
    """

    gate: Gate
    shared: int
    temperature: float = 0.0

    @property
    def start(self) -> dict[str, torch.Tensor]:
        """The parameters that are not 0 and that no measurement determines."""
        return {"router_temperature": torch.tensor([self.temperature])} if self.temperature else {}


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
    """Fit the gates of a model and their parameters; the model is not changed.

    Args:
        planned: layer -> its planned gate; other layers get no gate.
        sequences: tokens, long [samples, length]; every fourth is held out to choose the strength of the ridge.
        score: one of `SCORES`.
        router: "fit"; "static" (every token gets the mean scores); "random"; "zero"; "norm" (has no weights).
        seed: seed of the random router.
        progress: called with done, total and a label.

    Returns:
        A dict and a list of records, one for each gated layer. The dict maps a layer to its gate with the shared
        units, and to the parameters that are not 0 (name without `surgery_` -> float64).
    """
    modes, gates, records = [(module, module.training) for module in model.modules()], {}, []
    generator = torch.Generator().manual_seed(seed)
    try:
        model.eval()
        with torch.no_grad():
            run = Layerwise(model, anatomy, sequences)
            begin(progress, "fitting routers", len(anatomy.layers))
            for layer in anatomy.layers:
                routed = None
                if layer.index in planned:
                    moments = _measure(model, layer, run, planned[layer.index].gate, score)
                    gate, parameters, record = _route_layer(
                        layer.index, planned[layer.index], moments, router, generator
                    )
                    routed = gates[layer.index] = (gate, parameters)
                    name = layer.query_name if gate.units == layer.heads else layer.kv_name
                    records.append({"layer": layer.index, "shared": [*map(name, gate.shared)]} | record)
                if layer.index < max(planned):
                    _advance(model, layer, run, routed)
                if progress:
                    progress(layer.index + 1, len(anatomy.layers), "fitting routers")
    finally:
        for module, mode in modes:
            module.training = mode
    return gates, records


def _measure(model, layer, run: Layerwise, gate: Gate, score: str) -> tuple[RegressionSums, RegressionSums]:
    """RegressionSums of one layer's inputs and its units' scores, on the training and on the held-out sequences."""
    module, inputs = model.get_submodule(layer.path), []
    tensors = {name: module.get_parameter(name).detach() for name in layer.tensor_names}
    output = unpack(layer, tensors).o
    chance = max(gate.units - gate.on - 1, 0) / max(gate.units - 1, 1)

    def record_input(_, args, kwargs):
        inputs.append(args[0] if args else kwargs["hidden_states"])

    moments, hook = [], module.register_forward_pre_hook(record_input, with_kwargs=True)
    try:
        for index, heads in enumerate(run.heads(layer.index)):
            x, y = inputs.pop().flatten(0, -2), worth(heads, output, gate.groups, score, chance)
            if not moments:
                moments = [RegressionSums(x.shape[-1], gate.units, y.device) for _ in range(2)]
            moments[index % 4 == 3].add(x, y)
    finally:
        hook.remove()
    return moments[0], moments[1]


def _route_layer(
    layer: int, planned: Planned, moments: tuple[RegressionSums, RegressionSums], router: str, generator
) -> tuple[Gate, dict, dict]:
    """One layer's gate with its shared units, the gate's parameters, and a record.

    Raises:
        SurgeryError: the fitted parameters are not finite.
    """
    train, validation = moments
    means, gate = (train + validation).means, planned.gate
    shared = list(gate.shared) or sorted(means.argsort(descending=True, stable=True)[: planned.shared].tolist())
    gate = replace(gate, shared=tuple(shared), _indices={})
    if gate.router == "norm":
        return gate, planned.start, {}
    routed = [unit for unit in range(gate.units) if unit not in shared]
    weights, bias, record = torch.zeros(len(means), len(train.xx) - 1).to(means), torch.zeros_like(means), {}
    if router == "fit":
        weights, bias, record = ridge(train, validation)
        bias = bias - bias[routed].mean()  # a shift of all units changes no choice; this keeps numbers small
        weights = weights - weights[routed].mean(0)
    elif router == "static":
        bias = means - means[routed].mean()
    elif router == "random":
        weights = (torch.randn(weights.shape, generator=generator, dtype=torch.float64) * weights.shape[1] ** -0.5).to(
            means
        )
    if not (weights.isfinite().all() and bias.isfinite().all()):
        raise ModelError(
            f"the router's fit to the calibration text is not finite in layer {layer}",
            fix="more text (calibration_samples, calibration_length), text of another kind, or router=static",
        )
    sign = -1.0 if gate.kind == "mae" else 1.0  # MAE's router weighs experts, and each expert lacks one head
    fitted = {"router": sign * weights[routed], "router_bias": sign * bias[routed]}
    return gate, fitted | planned.start, record


def _advance(model, layer, run: Layerwise, routed: tuple[Gate, dict] | None) -> None:
    """Run a layer with its gate on the text; `routed`: the gate and its parameters, None for a layer without."""
    if routed is None:
        run.advance(layer.index)
        return
    (gate, parameters), gates = routed, []
    parameters = {"router_temperature": torch.zeros(1)} | parameters

    def choose(module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        hidden, query = states.float(), module.q_proj(states) if gate.router == "norm" else None
        tensors = {name: tensor.to(hidden) for name, tensor in parameters.items()}
        if gate.shared:
            zero = hidden.new_zeros(max(2, len(gate.shared)), hidden.shape[-1])
            tensors |= {"shared_router": zero[: len(gate.shared)], "balance": zero[:2]}
        logits = gate.logits(hidden, tensors, query)
        gates.append(gate.of_heads(gate.weights(hidden, logits, gate.chosen(logits), tensors)))

    def weigh_heads(_, args):
        heads = args[0].unflatten(-1, (-1, layer.head_dim))
        return ((heads * gates.pop().to(heads)[..., None]).flatten(-2), *args[1:])

    hooks = [
        model.get_submodule(layer.path).register_forward_pre_hook(choose, with_kwargs=True),
        run.outputs[layer.index].register_forward_pre_hook(weigh_heads),
    ]
    try:
        run.advance(layer.index)
    finally:
        for hook in hooks:
            hook.remove()
