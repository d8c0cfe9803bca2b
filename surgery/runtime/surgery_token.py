"""The gate of a single token, in Python's numbers.

While a CPU decodes with a small model, the dozen of little tensors that `Gate.weights` makes would cost more than what
the gate saves. What is computed is the same.
"""

from __future__ import annotations

import math

import torch

from .surgery_gates import NOT_FINITE, ROUTERS, Gate, parameters_of


def prepare_token(module, hidden: torch.Tensor) -> list:
    """`prepare` for a single token, hidden [D], without a gradient.

    Returns:
        Which units are on.
    """
    gate, call = module.surgery_gate, module.surgery_call
    weight, bias, temperature = _packed(module)
    numbers = torch.addmv(bias, weight, hidden.to(weight.dtype)).tolist()
    if not math.isfinite(sum(numbers) + temperature):
        raise ValueError(NOT_FINITE.format(module.layer_idx))
    values, on = gate_of_token(gate, numbers, temperature)
    if gate.units < sum(gate.groups):
        values = [value for value, group in zip(values, gate.groups, strict=True) for _ in range(group)]
    call.gates, call.rows = torch.tensor([[values]], dtype=hidden.dtype), None
    return on


def _packed(module) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Routers [numbers, D], their biases, and the temperature, kept from token to token.

    They are made anew after every longer forward, as one begins every generation, and when a parameter was changed, or
    another one or other memory took its place (`load_state_dict(assign=True)`, `.data = ...`).
    """
    call, now = module.surgery_call, _states(module)
    if call.packed is None or call.packed[0] != now:
        parameters = parameters_of(module)
        wide = torch.promote_types(parameters["router"].dtype, torch.float32)
        routers = [parameters[name] for name in ("router", "shared_router", "balance") if name in parameters]
        routers = routers if any(router.any() for router in routers[1:]) else routers[:1]
        weight = torch.cat(routers).to(wide)
        bias = torch.nn.functional.pad(parameters["router_bias"].to(wide), (0, len(weight) - len(routers[0])))
        made = weight, bias, parameters["router_temperature"].item() if "router_temperature" in parameters else 0.0
        kept = [parameter.detach() for parameter in parameters.values()]  # no other tensor gets this memory
        call.packed = now, made, kept
    return call.packed[1]


def _states(module) -> list[tuple]:
    """What changes when a parameter of the gate does; tensors made in inference mode count no versions."""
    held = (module._parameters.get(name) for name in ROUTERS)
    return [(p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in held if p is not None]


def gate_of_token(gate: Gate, numbers: list[float], temperature: float) -> tuple[list[float], list]:
    """The gates of a single token and which are on, of the units in order, as Python's numbers.

    Args:
        numbers: the router's logits, then those of shared router and balance; without these where they are 0.
    """
    logits, more = numbers[: len(gate.routed)], numbers[len(gate.routed) :]
    order = sorted(range(len(logits)), key=logits.__getitem__, reverse=True)  # of equal ones the first
    if gate.kind == "mae":
        if not gate.hard:
            return [(gate.units - x) / (gate.units - 1) for x in _softmax_times_count(logits)], [True] * gate.units
        values = [gate.units / (gate.units - 1) if gate.rescale else 1.0] * gate.units
        values[order[0]] = 0.0
        return values, [value > 0 for value in values]
    on = [False] * gate.units
    for unit in (*gate.shared, *(gate.routed[place] for place in order[: gate.active])):
        on[unit] = True
    values = [float(x) for x in on]
    if temperature or more:
        always, first, second = [1.0] * len(gate.shared), 1.0, 1.0
        if more:
            first, second = _softmax_times_count(more[-2:])
            always = _softmax_times_count(more[:-2])
        weights = _softmax_times_count([temperature * logits[place] for place in order[: gate.active]])
        for unit, x in zip(gate.shared, always, strict=True):
            values[unit] = first * x
        for place, x in zip(order, weights, strict=False):
            values[gate.routed[place]] = second * x
    return values, on


def _softmax_times_count(scores: list[float]) -> list[float]:
    most = max(scores)
    powers = [math.exp(score - most) for score in scores]
    mean = sum(powers) / len(powers)
    return [power / mean for power in powers]
