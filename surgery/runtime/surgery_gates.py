"""The gate of attention's heads: a weight for each head and token, computed from the layer's input.

    out = sum over heads of g_h(x) W_O^h z_h

    moh   n_s shared heads are always on. Of the other heads, a router turns k (`active`) on for each token.
          g = n_s softmax(W_s x) for shared heads, k softmax(tau (W_r x + b)) over the k heads that are on, and 0 for
          the rest. The two kinds are then multiplied by the two values of 2 softmax(W_0 x). With tau, W_s and W_0 at 0
          every gate is exactly 1 or 0: the router only chooses. In training the choice has a gradient
          (`Gate.learning`), so that a loss of the model moves the router from the first step on. A router of kind
          "norm" has no weights: in place of W_r x + b stands the norm of the unit's query (before norm and RoPE),
          divided by the standard deviation of these norms over the routed heads. Gates that never weigh have no tau,
          W_s and W_0: with a router of kind "norm" they have no parameters, as in MoH's code for LLMs.
    mae   a mixture of H experts, each of which is all heads but one: g_h = H / (H - 1) (1 - softmax(W x + b)_h).
          hard: the head with the largest weight is off, the others are on. Hard gates are soft in training
          (`Gate.learning`), since a choice has no gradient.

A forward pre-hook of the attention module computes the gate. It is a pure function of the module's input, since
gradient checkpointing runs it twice. The attention function multiplies by the gate, and surgery_gated_compute.py
leaves out what would be multiplied by 0. On a CPU the gate of a single token is computed with Python numbers
(`prepare_token`).

Sources: Jin et al. 2024, "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842; Peng et al. 2020,
"A Mixture of h - 1 Heads is Better than h Heads", arXiv 2005.06537. tau and b are not in these papers: with them, a
fitted router can choose heads without weighting them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from threading import get_ident

import torch
from torch.nn.functional import linear

# The parameters of a gate.
PARAMETERS = ("router", "router_bias", "router_temperature", "shared_router", "balance")
ROUTERS = tuple(f"surgery_{name}" for name in PARAMETERS)
# A comparison with NaN would silently choose some heads.
NOT_FINITE = "the router of layer {} gave numbers that are not finite: its weights or its input hold NaN or inf"
FIELDS = {"moh": {"kind", "unit", "shared", "active"}, "mae": {"kind", "hard", "rescale"}}
OPTIONAL = {"moh": {"router", "weighs"}, "mae": set()}
ROUTER_KINDS = ("linear", "norm")


@dataclass(frozen=True)
class Gate:
    """The gate of one layer.

    Attributes:
        kind: "moh" or "mae".
        groups: the number of query heads of each unit: 1, or the query heads of a KV head.
        shared: units that are always on.
        active: how many routed units are on for a token.
        hard, rescale: mae only. hard: the head with the largest weight is off. rescale: the others count H / (H - 1).
        router: "linear", or for moh "norm": the norm of the unit's query.
        weighs: moh only. False: every gate is 1 or 0, also after training.
    """

    kind: str
    groups: tuple[int, ...]
    shared: tuple[int, ...] = ()
    active: int = 0
    hard: bool = False
    rescale: bool = True
    router: str = "linear"
    weighs: bool = True
    _indices: dict = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, entry: dict, groups: list[int]) -> Gate:
        """The gate that a layer's entry `gate` describes; `groups`: how many query heads read each KV head."""
        units = groups if entry.get("unit") == "kv_group" else [1] * sum(groups)
        if entry["kind"] == "moh":
            options = {name: entry[name] for name in OPTIONAL["moh"] if name in entry}
            return cls("moh", tuple(units), tuple(entry["shared"]), entry["active"], **options)
        return cls("mae", tuple(units), hard=entry["hard"], rescale=entry["rescale"])

    @cached_property
    def units(self) -> int:
        return len(self.groups)

    @cached_property
    def routed(self) -> list[int]:
        """The units that the router turns on and off."""
        return [unit for unit in range(self.units) if unit not in self.shared]

    @cached_property
    def on(self) -> int:
        """How many units are on for a token."""
        if self.kind == "mae":
            return self.units - self.hard
        return len(self.shared) + self.active

    def shapes(self, hidden: int) -> dict[str, list[int]]:
        """The gate's parameters, name -> shape; `hidden`: width of the layer's input."""
        shapes = {}
        if self.router == "linear":
            shapes = {"surgery_router": [len(self.routed), hidden], "surgery_router_bias": [len(self.routed)]}
        if self.kind == "moh" and self.weighs:
            shapes["surgery_router_temperature"] = [1]
        if self.shared and self.weighs:
            shapes |= {"surgery_shared_router": [len(self.shared), hidden], "surgery_balance": [2, hidden]}
        return shapes

    def logits(self, hidden: torch.Tensor, parameters: dict, query: torch.Tensor | None = None) -> torch.Tensor:
        """The router's logits [..., routed units], in the dtype of `hidden`.

        Args:
            hidden: [..., D], the layer's input.
            parameters: name without `surgery_` -> tensor.
            query: [..., H * d], the output of the query projection, for a router of kind "norm".
        """
        if self.router == "norm":
            return self._norms(query.to(hidden.dtype))
        return linear(hidden, *(parameters[name].to(hidden.dtype) for name in ("router", "router_bias")))

    def _norms(self, query: torch.Tensor) -> torch.Tensor:
        """The norms of the routed units' queries over their standard deviation, as in MoH's code for LLMs."""
        units = query.unflatten(-1, (sum(self.groups), -1)).split(self.groups, dim=-2)
        norms = torch.stack([torch.linalg.vector_norm(units[unit], dim=(-2, -1)) for unit in self.routed], dim=-1)
        if len(self.routed) == 1:
            return norms
        variance = norms.var(-1, keepdim=True)  # 0 for a token whose queries are 0: the gradient must not be NaN
        return norms / variance.clamp_min(torch.finfo(norms.dtype).tiny).sqrt()

    def chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """Which routed units are on: bool, shaped as `logits`. Equal logits are ordered by index."""
        if (self.kind == "mae" and not self.hard) or self.active == logits.shape[-1]:
            return torch.ones_like(logits, dtype=torch.bool)
        # mae leaves out the first unit of this order, and moh takes the first `active` units.
        count = 1 if self.kind == "mae" else self.active
        first = logits.detach().argsort(dim=-1, descending=True, stable=True)[..., :count]
        picked = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, first, True)
        return ~picked if self.kind == "mae" else picked

    def weights(self, hidden: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor, parameters: dict):
        """The gates [..., units], shared units before routed ones; see `of_heads`.

        Args:
            hidden: [..., D], in the dtype of `logits`.
        """
        if self.kind == "mae":
            if self.hard:
                return chosen.to(logits.dtype) * self._scale
            return (self.units - softmax_times_count(logits)) / (self.units - 1)
        if not self.weighs:
            return torch.nn.functional.pad(chosen.to(logits.dtype), (len(self.shared), 0), value=1.0)
        scores = parameters["router_temperature"].to(logits.dtype) * logits
        routed = softmax_times_count(scores.masked_fill(~chosen, -torch.inf), self.active)
        if not self.shared:
            return routed
        shared, balance = (
            softmax_times_count(linear(hidden, parameters[name].to(hidden.dtype)))
            for name in ("shared_router", "balance")
        )
        return torch.cat([balance[..., :1] * shared, balance[..., 1:] * routed], dim=-1)

    def learning(self, weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gates [..., units] in training, which have a gradient for the router's choice.

        moh: `weights`, equal to the bit. Which units are on has no gradient, and with tau at 0 the weights of those
        that are on have none either. So a routed unit's gate is multiplied by 1 + s - sg(s), where s is the softmax of
        all routed logits times `active`, and sg stops the gradient (a straight-through estimator, as the paper has it
        for LLMs). A unit that helps is then chosen more often.

        mae: the soft gates of the mixture. Without `rescale`, hard gates count 1, and soft ones 1 - softmax: the mean
        of the hard gates if expert h is drawn with probability softmax_h.
        """
        if self.kind == "mae":
            return (1 - logits.softmax(dim=-1)) * self._scale if self.hard else weights
        likely = softmax_times_count(logits, self.active)
        shared, routed = weights.split([len(self.shared), len(self.routed)], dim=-1)
        return torch.cat([shared, routed * (1 + (likely - likely.detach()))], dim=-1)

    def drawn(self, logits: torch.Tensor) -> torch.Tensor:
        """Gates [..., units] of one expert of mae for each token, drawn by its weight. Their gradient is 0."""
        likely = logits.softmax(dim=-1)
        weights = likely.detach().nan_to_num(1.0).flatten(0, -2)  # `prepare` reports NaN; here it would be a crash
        lacks = torch.multinomial(weights, 1).view(*logits.shape[:-1], 1)
        gates = torch.full_like(logits, self._scale, requires_grad=False).scatter_(-1, lacks, 0.0)
        return gates + 0 * likely  # part of the graph, because DDP waits for the gradient of every parameter

    @property
    def _scale(self) -> float:
        """What a head of an expert of mae counts."""
        return self.units / (self.units - 1) if self.rescale or not self.hard else 1.0

    def of_heads(self, units: torch.Tensor) -> torch.Tensor:
        """Spread values [..., units], shared units first, to the query heads in order: [..., query heads]."""
        if units.device not in self._indices:
            order = [*self.shared, *self.routed]
            spread = [order.index(unit) for unit, size in enumerate(self.groups) for _ in range(size)]
            with torch.inference_mode(False):  # kept, and used in training later
                self._indices[units.device] = torch.tensor(spread, device=units.device)
        return units.index_select(-1, self._indices[units.device])


def softmax_times_count(scores: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """count * softmax: exactly 1 where all scores are equal. `count`: how many scores are not -inf (default all)."""
    weights = (scores - scores.detach().amax(dim=-1, keepdim=True)).exp()
    return weights / (weights.sum(dim=-1, keepdim=True) / (count or scores.shape[-1]))


def load_balance(logits: torch.Tensor, used: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """MoH's loss: r^2 times the mean over the r units of (mean softmax weight) * (share of tokens that use the unit).

    It is `active` for a router that treats all units alike, and more for one that prefers some.

    Args:
        logits, used: [batch, n, r], the router's logits, and which units are on.
        real: bool [batch, n], tokens that are no padding; None: all are real.
    """
    share, on = logits.softmax(dim=-1), used.to(logits.dtype)
    if real is not None:
        share, on = share[real], on[real]
    means = share.reshape(-1, share.shape[-1]).mean(dim=0), on.reshape(-1, on.shape[-1]).mean(dim=0)
    return logits.shape[-1] ** 2 * (means[0] * means[1]).mean()


class _Call:
    """The state of one forward. A forward runs in one thread, and a server runs each request in its own thread."""

    gates = on = rows = query = None


def _of_call(name: str) -> property:
    """An attribute of the call that this thread runs; None outside of a call.

    This is not `threading.local`, which code that torch.compile has traced reads wrongly.
    """

    def read(state):
        return getattr(state.calls.get(get_ident()), name, None)

    def write(state, value) -> None:
        setattr(state.calls.setdefault(get_ident(), _Call()), name, value)

    return property(read, write)


class GateState:
    """The gate of the current forward. The attention module and its projections share one object.

    Every thread has its own `gates`, `on`, `rows` and `query` while its forward is in the layer.

    Attributes:
        gates: [batch, n, query heads].
        on: which heads are on: bool of the same shape, or a list for a single token; None: attention computes all.
        rows: for each unit and batch row, the tokens for which the unit is on; None: nothing is left out.
        query: the output of the query projection, if the router has read it and attention has not.
        loss: moh: `load_balance` of the last forward in training mode.
        draws: mae: in training, each token gets one expert that is drawn, and not their mixture.
        packed: the tensors that `prepare_token` keeps from token to token.
        work: the `Work` that counts multiply-adds, or None.
        gathered: the function that the attention function calls where heads are off (surgery_gated_compute.py).
    """

    gates, on, rows, query = map(_of_call, ("gates", "on", "rows", "query"))

    def __init__(self, gathered=None):
        self.gathered = gathered
        self.loss = self.work = self.packed = None
        self.draws = False
        self.calls: dict[int, _Call] = {}  # thread -> its call

    def clear(self) -> None:
        """Forget the state of this thread's forward."""
        self.calls.pop(get_ident(), None)

    def __deepcopy__(self, memo):  # the state has a graph, and a copied model has had no forward
        return GateState(self.gathered)

    def __reduce__(self):
        return GateState, (self.gathered,)


def prepare(
    module, hidden: torch.Tensor, mask: torch.Tensor | None, query: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the gate of the forward that begins, and keep it in `module.surgery_call`.

    Args:
        module: attention module with `surgery_gate`, `surgery_call` and the gate's parameters.
        hidden: [batch, n, D], the layer's input.
        mask: the attention function's mask.
        query: [batch, n, H * d], for a router of kind "norm".

    Returns:
        Which of the routed units are on, bool [batch, n, routed units].

    Raises:
        ValueError: the router gave NaN or inf.
    """
    gate, call = module.surgery_gate, module.surgery_call
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    parameters = parameters_of(module)
    with torch.autocast(hidden.device.type, enabled=False):  # else the choice would use rounded logits
        logits = gate.logits(wide, parameters, query)
        chosen = gate.chosen(logits)
        weights = gate.weights(wide, logits, chosen, parameters)
        if module.training:
            weights = gate.drawn(logits) if call.draws and gate.kind == "mae" else gate.learning(weights, logits)
    finite = logits.isfinite().all() & weights.isfinite().all()
    says = NOT_FINITE.format(module.layer_idx)
    if torch.compiler.is_compiling() or hidden.device.type != "cpu":
        torch._assert_async(finite, says)
    elif not finite:
        raise ValueError(says)
    call.gates, call.rows, call.packed = gate.of_heads(weights).to(hidden.dtype), None, None
    if module.training and gate.kind == "moh":
        real = mask[:, -hidden.shape[1] :] if mask is not None and mask.dtype == torch.bool else None
        call.loss = load_balance(logits, chosen, real)
    return chosen


def parameters_of(module) -> dict[str, torch.Tensor]:
    """The gate's parameters of an attention module, name without `surgery_` -> tensor.

    Accelerate loads offloaded parameters (`device_map`) when the module's own forward begins, and the gate is computed
    before that. So offloaded parameters are read from where Accelerate keeps them.
    """
    tensors = {name: getattr(module, name) for name in ROUTERS if hasattr(module, name)}
    if any(tensor.is_meta for tensor in tensors.values()):
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (weights_map := getattr(each, "weights_map", None)) is not None:
                tensors = {name: weights_map[name].to(each.execution_device) for name in tensors}
    return {name.removeprefix("surgery_"): tensor for name, tensor in tensors.items()}


# The gate of a single token, with Python numbers. When a CPU decodes with a small model, the dozen small tensors of
# `Gate.weights` cost more than the gate saves. With `moh`, SmolLM2-135M decodes 8% faster by these functions.


def prepare_token(module, hidden: torch.Tensor) -> list:
    """`prepare` for a single token, hidden [D], without a gradient.

    Returns:
        Which units are on.
    """
    gate, call = module.surgery_gate, module.surgery_call
    weight, bias, temperature = _packed(module)
    outputs = torch.addmv(bias, weight, hidden.to(weight.dtype)).tolist()
    if not math.isfinite(sum(outputs) + temperature):
        raise ValueError(NOT_FINITE.format(module.layer_idx))
    values, on = gate_of_token(gate, outputs, temperature)
    if gate.units < sum(gate.groups):
        values = [value for value, group in zip(values, gate.groups, strict=True) for _ in range(group)]
    call.gates, call.rows = torch.tensor([[values]], dtype=hidden.dtype), None
    return on


def _packed(module) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Routers [outputs, D], their biases, and the temperature, kept from token to token.

    They are made again after every longer forward (a generation begins with one). They are also made again when a
    parameter was changed or replaced, or has other memory (`load_state_dict(assign=True)`, `.data = ...`).
    """
    call, now = module.surgery_call, _states(module)
    packed = call.packed  # read once: a longer forward in another thread clears it
    if packed is None or packed[0] != now:
        parameters = parameters_of(module)
        wide = torch.promote_types(parameters["router"].dtype, torch.float32)
        routers = [parameters[name] for name in ("router", "shared_router", "balance") if name in parameters]
        routers = routers if any(router.any() for router in routers[1:]) else routers[:1]
        weight = torch.cat(routers).to(wide)
        bias = torch.nn.functional.pad(parameters["router_bias"].to(wide), (0, len(weight) - len(routers[0])))
        made = weight, bias, parameters["router_temperature"].item() if "router_temperature" in parameters else 0.0
        references = [parameter.detach() for parameter in parameters.values()]  # no other tensor gets their memory
        call.packed = packed = now, made, references
    return packed[1]


def _states(module) -> list[tuple]:
    """Values that change when a parameter of the gate does. Tensors made in inference mode have no version counter."""
    parameters = (module._parameters.get(name) for name in ROUTERS)
    return [(p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in parameters if p is not None]


def gate_of_token(gate: Gate, outputs: list[float], temperature: float) -> tuple[list[float], list]:
    """The gates of a single token's units, and which units are on, in order of the units, as Python numbers.

    Args:
        outputs: the router's logits, then those of shared router and balance, which are left out where they are 0.
    """
    logits, more = outputs[: len(gate.routed)], outputs[len(gate.routed) :]
    order = sorted(range(len(logits)), key=logits.__getitem__, reverse=True)  # equal logits by index
    if gate.kind == "mae":
        if not gate.hard:
            return [(gate.units - x) / (gate.units - 1) for x in _softmax_times_count(logits)], [True] * gate.units
        values = [gate.units / (gate.units - 1) if gate.rescale else 1.0] * gate.units
        values[order[0]] = 0.0
        return values, [value > 0 for value in values]
    on = [False] * gate.units
    for unit in (*gate.shared, *(gate.routed[index] for index in order[: gate.active])):
        on[unit] = True
    values = [float(x) for x in on]
    if temperature or more:
        always, first, second = [1.0] * len(gate.shared), 1.0, 1.0
        if more:
            first, second = _softmax_times_count(more[-2:])
            always = _softmax_times_count(more[:-2])
        weights = _softmax_times_count([temperature * logits[index] for index in order[: gate.active]])
        for unit, x in zip(gate.shared, always, strict=True):
            values[unit] = first * x
        for index, x in zip(order, weights, strict=False):
            values[gate.routed[index]] = second * x
    return values, on


def _softmax_times_count(scores: list[float]) -> list[float]:
    most = max(scores)
    powers = [math.exp(score - most) for score in scores]
    mean = sum(powers) / len(powers)
    return [power / mean for power in powers]


def gated_modules(model) -> list:
    """The attention modules that have a gate."""
    return [module for module in model.modules() if hasattr(module, "surgery_gate") and hasattr(module, "layer_idx")]


def load_balance_loss(model) -> torch.Tensor:
    """The load-balance loss of the last forward in training mode: the mean over the layers that have a router of moh.

    Add it to the loss with a small weight (0.01 in the paper) before `backward`.

    Raises:
        ValueError: no layer has such a router, no router has run in training mode, or the router's gradient is lost.
    """
    gated = [module for module in gated_modules(model) if module.surgery_gate.kind == "moh"]
    losses = [module.surgery_call.loss for module in gated]
    if not gated or any(loss is None for loss in losses):
        what = "no layer of this model has a router" if not gated else "the model has not run in training mode yet"
        raise ValueError(f"there is no load-balance loss: {what}")
    routers = [getattr(module, "surgery_router", None) for module in gated]  # None: kind "norm", without weights
    if torch.is_grad_enabled() and any(
        router is not None and router.requires_grad and not loss.requires_grad
        for router, loss in zip(routers, losses, strict=True)
    ):
        raise ValueError(
            "the routers' gradient was lost: run the forward with gradients, and gradient checkpointing with "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
