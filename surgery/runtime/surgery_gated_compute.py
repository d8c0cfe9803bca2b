"""Gated attention that computes only what its gate turns on: query projection, attention and output projection.

A unit is a query head, or all query heads of a KV head. For each unit, the tokens for which it is on are gathered. The
query projection computes their rows and leaves zeros elsewhere, so that the model's own norms and RoPE apply
unchanged. Attention runs on the gathered rows, and the output projection reads only them. Keys and values are computed
for all tokens, since later tokens need them. Nothing is approximated.

This applies only without gradients and autocast. The constants below decide whether it costs less than computing
everything and multiplying by 0: in `before` for projections and prefill, in `pays` for attention of a single token.

For full heads on a CPU, causal attention also runs only for the query rows that the gate turns on. The rows of all
query heads of a KV head are gathered in the order of their tokens. All rows of the later half see the keys before the
first row of this half, in one product without a mask. Two problems of half the size remain, and so on, down to a few
rows that attend under a mask. Two outputs are merged by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import linear

from .surgery_attention import fused, written_out
from .surgery_config import Parameter, Part
from .surgery_gates import FIELDS, OPTIONAL, ROUTER_KINDS, ROUTERS, Gate, GateState, prepare, prepare_token
from .surgery_kernels import kernel_for
from .surgery_stores import KeyValues
from .surgery_visibility import Visibility, slices

# Below ROWS rows, or where more than this SHARE of the units is on, everything is computed and multiplied by the gate.
# Measured on one block of SmolLM2's shape on one thread (bench_gates.py): with 78% of the units on, a block took as
# long as the base's at 2k and 4k tokens; with 44% on, it took less from 512 tokens on.
ROWS, SHARE = 512, 0.75
# For a single token, projections leave out the heads that are off if (number of heads off) * (hidden size) is at least
# this. Below it, reading all weights costs less than the two or three smaller products that replace one.
DECODE_SAVED = 8192
NONE = ()  # no token


class Work:
    """Multiply-adds of the layers that have a gate or sparse prefill.

    Attributes:
        done: component -> multiply-adds that ran. The components of a gate are "router", "keys and values", "query
            projection", "attention" and "output projection". Those of sparse prefill are "attention" and "estimator".
        dense: component -> multiply-adds that would run without gate and sparse prefill.

    Attention counts, for every computed row, the keys that it is multiplied with, once for scores and once for values.
    Where all rows are computed, a row counts the keys that it sees; in sparse prefill, only those in the blocks that
    it reads. The estimator counts its matrix products.
    """

    def __init__(self):
        self.done: dict[str, int] = {}
        self.dense: dict[str, int] = {}

    def add(self, component: str, done: int, dense: int) -> None:
        self.done[component] = self.done.get(component, 0) + done
        self.dense[component] = self.dense.get(component, 0) + dense

    def add_seen(self, view: KeyValues, query: torch.Tensor, on: torch.Tensor | None = None) -> None:
        """Count the attention of heads [batch, heads, n, d] to a view; `on`: bool [batch, n, heads], rows that ran."""
        (batch, heads, length, size), visibility, end = query.shape, view.visibility, view.end
        bounds = [end] + ([] if visibility.window is None else [visibility.window + visibility.sinks])
        most = min(bounds + ([] if visibility.limit is None else [visibility.limit]))
        pairs = batch * heads * sum(min(position + 1, most) for position in range(end - length, end))
        computed, at = pairs, torch.arange(end - length, end, device=query.device)
        if on is not None:
            computed = int((on * (at[:, None] + 1).clamp(max=most)).sum())
        if view.slots is not None:  # a policy has dropped some keys
            seen = (view.slots[..., None] <= at) & (view.slots[..., None] >= 0)
            computed = int(seen.sum()) * (heads // view.slots.shape[1])
        if view.archive is not None:
            computed += int((view.archive.slots >= 0).sum()) * length * (heads // view.keys.shape[1])
        self.add("attention", 2 * size * computed, 2 * size * pairs)


@contextmanager
def counted(model) -> Iterator[Work]:
    """Count the multiply-adds of every forward in a block: `with counted(model) as work: model(...)`."""
    names = ("surgery_call", "surgery_sparse")
    modules = [module for module in model.modules() if any(getattr(module, name, None) for name in names)]
    calls, work = [module.surgery_call for module in modules if hasattr(module, "surgery_call")], Work()
    try:
        for call in calls:
            call.work = work
        for module in modules:
            module.surgery_work = work
        yield work
    finally:
        for call in calls:
            call.work = None
        for module in modules:
            del module.surgery_work


class _Projection(torch.nn.Linear):
    """A projection that computes only the rows that are on, where `GateState.rows` lists them."""

    component = ""

    def forward(self, x):
        call, dense = self.surgery_call, x.shape[:-1].numel() * self.weight.numel()
        out, done = (super().forward(x), dense) if call.rows is None else self.gathered(x, call.rows)
        if call.work is not None:
            call.work.add(self.component, done, dense)
        return out


class _Query(_Projection):
    """The query projection; rows that are off are zero."""

    component = "query projection"

    def forward(self, x):
        call = self.surgery_call
        if call.query is None:
            return super().forward(x)
        out, call.query = call.query, None  # the router has read it already
        return out

    def gathered(self, x, rows):
        out, done = x.new_zeros(*x.shape[:-1], self.out_features), 0
        room = x.new_empty(x.shape[1:])  # reused for all heads: allocation costs more than the copy
        for begin, end, row, index in _channels(self.surgery_gate, rows, self.out_features):
            inputs = x[row] if index is None else torch.index_select(x[row], 0, index, out=room[: len(index)])
            made = linear(inputs, self.weight[begin:end], None if self.bias is None else self.bias[begin:end])
            done += made.numel() * self.in_features
            if index is None:
                out[row, :, begin:end] = made
            else:
                out[row, :, begin:end].index_copy_(0, index, made)
        return out, done


class _Output(_Projection):
    """The output projection; channels that are off are not read."""

    component = "output projection"

    def gathered(self, x, rows):
        wide = torch.promote_types(x.dtype, torch.float32)  # partial sums are not rounded to half precision
        out, done = x.new_zeros(*x.shape[:-1], self.out_features, dtype=wide), 0
        if self.bias is not None:
            out += self.bias
        room = x.new_empty(out.shape[1:])
        for begin, end, row, index in _channels(self.surgery_gate, rows, self.in_features):
            inputs, weight = x[row, :, begin:end], self.weight[:, begin:end].T
            inputs = inputs if index is None else inputs.index_select(0, index)
            done += inputs.numel() * self.out_features
            made = torch.mm(inputs, weight, out=room[: len(inputs)])
            if index is None:
                out[row] += made
            else:
                out[row].index_add_(0, index, made.to(wide))
        return out.to(x.dtype), done


def _channels(gate: Gate, rows: list, width: int):
    """Yield (first channel, last channel + 1, batch row, its tokens or None for all) of every unit that is on.

    Neighbouring units that are on for all tokens of the batch are merged.
    """
    size, begin, end = width // sum(gate.groups), 0, 0
    for unit, group in enumerate(gate.groups):
        end += group * size
        if rows[unit][0] is None and unit + 1 < gate.units and rows[unit + 1][0] is None:
            continue
        for row, index in enumerate(rows[unit]):
            if index is None or len(index):
                yield begin, end, row, index
        begin = end


def _attach(module, layer: dict, groups: list[int]) -> None:
    """Give an attention module the gate that its entry in the surgery block names.

    Its query and output projections are replaced by ones that leave out what is off. This needs separate `q_proj` and
    `o_proj` of the heads' size, and no norm over all heads between query projection and attention.
    """
    if "gate" not in layer:
        _detach(module)
        return
    module.surgery_gate, module.surgery_call = Gate.of(layer["gate"], groups), GateState(gathered)
    if before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
    query, output = (getattr(module, name, None) for name in ("q_proj", "o_proj"))
    for projection, cls in ((query, _Query), (output, _Output)):
        if type(projection) not in (torch.nn.Linear, cls) or (cls is _Query and _mixed(module, query, output)):
            continue
        projection.__class__ = cls
        projection.surgery_call, projection.surgery_gate = module.surgery_call, module.surgery_gate


def _validation_error(config, layer: dict, groups: list[int]) -> str:
    """The error in the gate of a layer's entry, "" if there is none; arguments as for `Part.validation_error`."""
    named = layer.get("parameters", {})
    if "gate" not in layer:
        return f"has {', '.join(sorted(set(named) & set(ROUTERS)))} without a gate"
    gate = layer["gate"]
    kind = gate.get("kind") if isinstance(gate, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS or set(gate) - OPTIONAL[kind] != FIELDS[kind]:
        kinds = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in FIELDS.items())
        return f"has the gate {gate}, and a gate has ({kinds})"
    if kind == "mae":
        if not (isinstance(gate["hard"], bool) and isinstance(gate["rescale"], bool)) or sum(groups) < 2:
            return "has a gate of kind mae whose hard and rescale are not true or false, or fewer than two heads"
    else:
        if gate["unit"] not in ("head", "kv_group"):
            return f"has a gate with unit {gate['unit']!r}, which is head or kv_group"
        router, weighs = gate.get("router", "linear"), gate.get("weighs", True)
        if router not in ROUTER_KINDS or type(weighs) is not bool:
            return f"has a gate with router {router!r} ({' or '.join(ROUTER_KINDS)}) and weighs {weighs!r} (a bool)"
        count, shared = len(groups) if gate["unit"] == "kv_group" else sum(groups), gate["shared"]
        valid = isinstance(shared, list) and all(type(unit) is int and 0 <= unit < count for unit in shared)
        if not valid or len({*shared}) < len(shared) or len(shared) >= count:
            return f"has a gate with shared {shared}; they are some of 0 to {count - 1}, each once, and not all"
        routed = count - len(shared)
        if type(gate["active"]) is not int or not 1 <= gate["active"] <= routed:
            return f"has a gate with active {gate['active']!r}; it is whole, from 1 to the {routed} routed"
    right = Gate.of(gate, groups).shapes(config.get_text_config().hidden_size)
    wrong = {name: named.get(name) for name in ROUTERS if named.get(name) != right.get(name)}
    return f"has a gate whose parameters are {wrong}; they are {right}" if wrong else ""


def _detach(module) -> None:
    """Undo `_attach` if there was a gate. The parameters stay; the hooks stay, and do nothing without a gate."""
    for owner in (module, *module.children()):
        if isinstance(owner, _Projection):
            owner.__class__ = torch.nn.Linear
        for name in ("surgery_gate", "surgery_call"):
            if hasattr(owner, name):
                delattr(owner, name)


def _mixed(module, query, output) -> bool:
    """Whether the channels of one head in the query projection's output are not exactly that head's query."""
    norm = getattr(getattr(module, "q_norm", None), "weight", None)
    spans_heads = norm is not None and norm.dim() == 1 and len(norm) == query.out_features
    return spans_heads or not isinstance(output, torch.nn.Linear) or output.in_features != query.out_features


def before(module, args, kwargs) -> None:
    """Forward pre-hook of an attention module: compute the call's gate, and decide what need not be computed."""
    if not hasattr(module, "surgery_gate"):
        return
    gate, call, hidden = module.surgery_gate, module.surgery_call, args[0] if args else kwargs["hidden_states"]
    call.clear()  # an earlier forward may have ended in an error
    batch, length = hidden.shape[:2]
    saves = gate.on <= SHARE * gate.units and not getattr(module, "surgery_whole", False)
    saves &= not (torch.is_grad_enabled() or module.training or torch.compiler.is_compiling())
    saves &= not torch.is_autocast_enabled(hidden.device.type)  # rows of two dtypes would meet
    saves &= length == 1 or getattr(module, "surgery_sparse", None) is None  # estimators read all queries
    saves &= length == 1 or not getattr(module, "surgery_reads_map", False)  # so does a search for sinks
    saves &= not getattr(module, "surgery_keepers", None)  # and so does what chooses keys
    query = None
    if gate.router == "norm":
        query = module.q_proj(hidden)
        call.query = query if type(module.q_proj) is _Query else None  # another one, as peft's, is called again
    if saves and batch * length == 1 and hidden.device.type == "cpu" and query is None:
        units = prepare_token(module, hidden[0, 0])
        call.on = [on for on, group in zip(units, gate.groups, strict=True) for _ in range(group)]
        if hidden.shape[2] * (len(call.on) - sum(call.on)) >= DECODE_SAVED:
            call.rows = [[None if on else NONE] for on in units]
    else:
        chosen = prepare(module, hidden, kwargs.get("attention_mask"), query)
        if saves and batch * length >= ROWS:
            call.on = gate.of_heads(torch.cat([chosen.new_ones(batch, length, len(gate.shared)), chosen], dim=-1))
            flat = chosen.permute(2, 0, 1).reshape(-1, length)
            tokens = iter(flat.nonzero()[:, 1].split(flat.sum(1).tolist()))
            always = [unit in gate.shared for unit in range(gate.units)]
            call.rows = [[None if on else next(tokens) for _ in range(batch)] for on in always]
    if call.work is not None:
        _count_inputs(module, call.work, batch * length)


def after(module, args, output) -> None:
    """Forward hook of an attention module: clear the call's state."""
    if hasattr(module, "surgery_call"):
        module.surgery_call.clear()


def _count_inputs(module, work: Work, tokens: int) -> None:
    """Count the router, and the projections that do not count themselves (`_Projection`)."""
    weights = [module.get_parameter(name) for name in ROUTERS if hasattr(module, name)]
    work.add("router", tokens * sum(weight.numel() for weight in weights if weight.dim() == 2), 0)
    stock = {"k_proj": "keys and values", "v_proj": "keys and values"}
    stock |= {"q_proj": _Query.component, "o_proj": _Output.component}
    for name, component in stock.items():
        projection = getattr(module, name, None)
        if isinstance(projection, torch.nn.Linear) and not isinstance(projection, _Projection):
            work.add(component, *[tokens * projection.weight.numel()] * 2)


# The next two are from the times of one block of SmolLM2's shape (examples/benchmarks/bench_gates.py).
LEAF = 384  # up to this many gathered query rows attend together under a mask
# Pairs (least, share): from `least` query rows on, the kernel gives a thread `share` rows at a time. If the number of
# rows is no multiple of `share` for all threads, some threads have no work.
SHARES = ((768, 256), (0, 64))
DECODE_KEYS = 2048  # from this many keys on, a single token does not read KV heads whose query heads are all off


def pays(query, keys) -> bool:
    """Whether computing attention only for the heads that are on (`GateState.on`) is worth it for these queries."""
    return query.shape[2] > 1 or keys.shape[2] >= DECODE_KEYS


def gathered(module, query, key, value, scaling, options) -> torch.Tensor | None:
    """Attention of the rows that the gate turns on, times the gate; None where all rows must be computed."""
    if isinstance(key, list):
        key, value = key[0].keys, key[0].values
    plain = module.surgery_heads.visibilities == [Visibility()] and options == {"softcap": None, "s_aux": None}
    plain = plain and (getattr(module, "surgery_sparse", None) is None or query.shape[2] == 1)
    kernel = kernel_for("gathered_heads", query, key, value, plain=query.shape[2] == 1)  # the attention function's
    if kernel or not plain or module.surgery_corrections or not pays(query, key) or written_out(query, key, value):
        return None
    return attend(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)


def attend(module, query, keys, values, scale) -> torch.Tensor | None:
    """Causal attention of the rows that are on, times their gates.

    Args:
        query: [batch, heads, n, head_dim].
        keys, values: [batch, KV heads, N, head_dim]; the last n belong to the queries' own tokens. No padding.

    Returns:
        [batch, n, heads, head_dim], 0 where a head is off; None for a single token that needs every KV head.
    """
    call, (batch, heads, length, size) = module.surgery_call, query.shape
    if isinstance(call.on, list):
        return _attend_token(module, query, keys, values, scale)
    past, out, pairs = keys.shape[2] - length, query.new_zeros(batch, length, heads, size), 0
    group = heads // keys.shape[1]
    for row in range(batch):
        by_token, gates = query[row].transpose(0, 1).reshape(-1, size), call.gates[row].flatten()
        for kv_head in range(keys.shape[1]):
            first = kv_head * group
            token, head = call.on[row, :, first : first + group].nonzero(as_tuple=True)
            if not len(token):
                continue
            kv_slice, row_index = (slice(row, row + 1), slice(kv_head, kv_head + 1)), token * heads + head + first
            rows = by_token.index_select(0, row_index)
            wide = torch.promote_types(rows.dtype, torch.float32)  # of the kernel's log-sum-exps
            made, lse = torch.empty_like(rows), rows.new_empty(len(rows), dtype=wide)
            pairs += _attend_rows(rows, past + token, keys[kv_slice], values[kv_slice], 0, scale, (made, lse))
            out[row].view(-1, size).index_copy_(0, row_index, made.mul_(gates.index_select(0, row_index)[:, None]))
    if call.work is not None:
        dense = batch * heads * (length * past + length * (length + 1) // 2)
        call.work.add("attention", 2 * size * pairs, 2 * size * dense)
    return out


def _attend_token(module, query, keys, values, scale) -> torch.Tensor | None:
    """`attend` for one token. All heads of a KV head with a head that is on are computed: they read the same keys.

    Returns None where every KV head has a head that is on.
    """
    call, (kv_heads, length, size) = module.surgery_call, keys.shape[1:]
    group = len(call.on) // kv_heads
    used = [head for head in range(kv_heads) if any(call.on[head * group : (head + 1) * group])]
    if len(used) == kv_heads:
        return None
    rows = query.reshape(1, kv_heads, group, size)
    out = torch.zeros_like(rows)
    for heads in slices(used) if used else ():
        near = (tensor[:, heads] for tensor in (rows, keys, values))
        out[:, heads] = fused(*near, scale, with_lse=True)[0]
    if call.work is not None:
        work = 2 * size * length * group
        call.work.add("attention", work * len(used), work * kv_heads)
    return out.reshape(query.shape).transpose(1, 2).mul_(call.gates[..., None])


def _attend_rows(query, positions, keys, values, first: int, scale, into: tuple) -> int:
    """Attention of some rows of a KV head's queries to the keys from `first` on.

    Args:
        query: [r, head_dim], the queries of the tokens at `positions` (long [r], non-decreasing, from `first` on).
        keys, values: [1, 1, N, head_dim].
        into: buffers [r, head_dim] for the output and [r] for the log-sum-exp.

    Returns:
        The number of pairs of a row and a key that were multiplied.
    """
    count, (out, lse) = len(query), into
    if count <= LEAF:
        end = int(positions[-1]) + 1
        late = torch.arange(first, end) > positions[:, None]
        bias = torch.zeros(late.shape, dtype=query.dtype).masked_fill_(late, -torch.inf)
        for target, result in zip((out, lse), _kernel(query, keys, values, first, end, scale, bias), strict=True):
            target.copy_(result)
        return count * (end - first)
    half = count - _later_half(count)
    middle = int(positions[half])
    pairs = _attend_rows(query[:half], positions[:half], keys, values, first, scale, (out[:half], lse[:half]))
    late = query[half:], positions[half:], out[half:], lse[half:]
    pairs += _attend_rows(*late[:2], keys, values, middle, scale, late[2:])
    if middle > first:
        early, early_lse = _kernel(late[0], keys, values, first, middle, scale)
        late[2].lerp_(early, torch.sigmoid(early_lse - late[3])[:, None].to(out.dtype))
        torch.logaddexp(late[3], early_lse, out=late[3])
        pairs += (count - half) * (middle - first)
    return pairs


def _later_half(count: int) -> int:
    """The size of the later half of `count` rows: a number near half that the threads can share evenly, if any."""
    half = count // 2
    multiple = next(share for least, share in SHARES if half >= least) * torch.get_num_threads()
    even = (half + multiple // 2) // multiple * multiple
    return even if 0 < even < count else half


def _kernel(query, keys, values, first: int, end: int, scale, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [r, head_dim] and log-sum-exp [r] of the CPU's flash attention to the keys from `first` to `end` - 1."""
    near = (tensor[:, :, first:end] for tensor in (keys, values))
    seen = None if bias is None else bias[None, None]
    out, lse = fused(query[None, None], *near, scale, with_lse=True, seen=seen)
    return out[0, 0], lse[0, 0]


class Gates(Part):
    """Gates: which heads are on for a token, and with which weight.

    An entry has `gate`: {"kind": "moh", "unit": "head" or "kv_group", "shared": [units that are always on], "active":
    number of routed units that are on}, or {"kind": "mae", "hard": ..., "rescale": ...}. A gate of kind "moh" may have
    "router": "norm" (else it is "linear") and "weighs": false (else it is true).
    """

    keys = ("gate",)
    parameters = dict.fromkeys(ROUTERS, Parameter(0.0))

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        return _validation_error(config, layer, groups)

    def methods(self, layer: dict) -> set[str]:
        return {"kernel.gathered_heads"}

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        _attach(module, layer, groups)

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("gate",)


PART = Gates()
