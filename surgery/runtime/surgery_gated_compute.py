"""What a gate turns off is not computed: query projection, attention and output projection of the tokens that are on.

Of each unit (a query head, or the query heads of a KV head) the tokens that have it on are gathered. The query
projection computes their rows and leaves zeros elsewhere, so that norms and RoPE stay the model's own; attention runs
on the gathered rows, and the output projection multiplies them. Keys and values are made for all tokens: later ones
need them. Nothing is approximated.

Only without gradients and autocast. Whether this costs less than computing all and multiplying by 0 is decided by the
constants below: for projections and prefill in `before`, for attention of a single token in `pays`.

Causal attention of the query rows that a gate has on, and of no others: for full heads on a CPU.

The rows of all query heads of a KV head are gathered in the order of their tokens. The later half sees all keys before
its own first row's, in one product without a mask; what is left are two problems of half the size, down to a few rows
that need a mask. Two outputs meet by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import linear

from .surgery_attention import fused, written_out
from .surgery_config import Parameter, Part
from .surgery_gates import FIELDS, ROUTERS, Gate, GateState, prepare, prepare_token
from .surgery_stores import KeyValues
from .surgery_visibility import Visibility, slices

# Below so many rows, or where more than this share of the units is on, all is computed and multiplied by the gate.
# From times of one block of SmolLM2's shape on one thread (bench_gates.py): with 78% on, a block took as long as the
# base's at 2k and 4k tokens; with 44% on, less from 512 tokens.
ROWS, SHARE = 512, 0.75
# Of a single token: heads that are off times hidden size, from which projections leave them out. Below it the weights
# that are not read cost less than the two or three smaller products that take the place of one.
DECODE_SAVED = 8192
NONE = ()  # no token


class Work:
    """Multiply-adds of the layers that have a gate or sparse prefill: what ran, and what runs without it.

    Attributes:
        done, dense: "router", "keys and values", "query projection", "attention" and "output projection" of a gate,
            "attention" and "estimator" of sparse prefill -> a number.
            Attention: of every row that was computed, all keys that it was multiplied with, for scores and for
            values. Where all rows are computed, each counts the keys that it sees; in sparse prefill, those of them
            in the blocks that it reads. Estimator: its matrix products.
    """

    def __init__(self):
        self.done: dict[str, int] = {}
        self.dense: dict[str, int] = {}

    def add(self, component: str, done: int, dense: int) -> None:
        self.done[component] = self.done.get(component, 0) + done
        self.dense[component] = self.dense.get(component, 0) + dense

    def add_seen(self, view: KeyValues, query: torch.Tensor) -> None:
        """Attention of the heads of a view whose rows [batch, heads, n, d] were all computed."""
        (batch, heads, length, size), visibility, end = query.shape, view.visibility, view.end
        bounds = [end] + ([] if visibility.window is None else [visibility.window + visibility.sinks])
        most = min(bounds + ([] if visibility.limit is None else [visibility.limit]))
        pairs = batch * heads * sum(min(position + 1, most) for position in range(end - length, end))
        computed = pairs
        if view.slots is not None:  # a policy has dropped some
            at = torch.arange(end - length, end, device=query.device)
            seen = (view.slots[..., None] <= at) & (view.slots[..., None] >= 0)
            computed = int(seen.sum()) * (heads // view.slots.shape[1])
        self.add("attention", 2 * size * computed, 2 * size * pairs)


@contextmanager
def counted(model) -> Iterator[Work]:
    """Count the multiply-adds of every forward inside: `with counted(model) as work: model(...)`."""
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
    """A projection that computes the rows of heads that are on, where `GateState.rows` says which."""

    component = ""

    def forward(self, x):
        call, dense = self.surgery_call, x.shape[:-1].numel() * self.weight.numel()
        out, done = (super().forward(x), dense) if call.rows is None else self.gathered(x, call.rows)
        if call.work is not None:
            call.work.add(self.component, done, dense)
        return out


class _Query(_Projection):
    """The rows of what is off are zero."""

    component = "query projection"

    def gathered(self, x, rows):
        out, done = x.new_zeros(*x.shape[:-1], self.out_features), 0
        room = x.new_empty(x.shape[1:])  # one for all heads: new memory costs more than what is put there
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
    """The channels of what is off are not read."""

    component = "output projection"

    def gathered(self, x, rows):
        wide = torch.promote_types(x.dtype, torch.float32)  # of many sums, none is rounded to half precision
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
    """(first channel, last + 1, batch row, its tokens or None for all) of everything that is on.

    Neighbours that are on for all tokens of the batch come as one.
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

    Its projections become ones that leave out what is off, where the module shows how they are made: separate ones
    of the heads' size, and no norm that spans all heads between query projection and attention.
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
    """What is wrong with the gate in a layer's entry, "" if nothing; arguments as of `Part.validation_error`."""
    named = layer.get("parameters", {})
    if "gate" not in layer:
        return f"has {', '.join(sorted(set(named) & set(ROUTERS)))} without a gate"
    gate = layer["gate"]
    kind = gate.get("kind") if isinstance(gate, dict) else None
    if not isinstance(kind, str) or set(gate) != FIELDS.get(kind):
        kinds = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in FIELDS.items())
        return f"has the gate {gate}, and a gate has ({kinds})"
    if kind == "mae":
        if not (isinstance(gate["hard"], bool) and isinstance(gate["rescale"], bool)) or sum(groups) < 2:
            return "has a gate of kind mae whose hard and rescale are not true or false, or fewer than two heads"
    else:
        if gate["unit"] not in ("head", "kv_group"):
            return f"has a gate with unit {gate['unit']!r}, which is head or kv_group"
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
    """Undo `_attach`, where there was a gate; the parameters stay, and the hooks, which then do nothing."""
    for owner in (module, *module.children()):
        if isinstance(owner, _Projection):
            owner.__class__ = torch.nn.Linear
        for name in ("surgery_gate", "surgery_call"):
            if hasattr(owner, name):
                delattr(owner, name)


def _mixed(module, query, output) -> bool:
    """Whether a row of the query projection is not one head's alone, as attention gets it."""
    norm = getattr(getattr(module, "q_norm", None), "weight", None)
    spans_heads = norm is not None and norm.dim() == 1 and len(norm) == query.out_features
    return spans_heads or not isinstance(output, torch.nn.Linear) or output.in_features != query.out_features


def before(module, args, kwargs) -> None:
    """Forward pre-hook of an attention module: the gate of this call, and what it lets be left out."""
    if not hasattr(module, "surgery_gate"):
        return
    gate, call, hidden = module.surgery_gate, module.surgery_call, args[0] if args else kwargs["hidden_states"]
    call.clear()  # of a forward that an error ended
    batch, length = hidden.shape[:2]
    saves = gate.on <= SHARE * gate.units and not getattr(module, "surgery_whole", False)
    saves &= not (torch.is_grad_enabled() or module.training or torch.compiler.is_compiling())
    saves &= not torch.is_autocast_enabled(hidden.device.type)  # rows of two dtypes would meet
    saves &= length == 1 or getattr(module, "surgery_sparse", None) is None  # which weighs the queries of all heads
    saves &= getattr(module, "surgery_policy", None) is None  # and so does this
    if saves and batch * length == 1 and hidden.device.type == "cpu":
        units = prepare_token(module, hidden[0, 0])
        call.on = [on for on, group in zip(units, gate.groups, strict=True) for _ in range(group)]
        if hidden.shape[2] * (len(call.on) - sum(call.on)) >= DECODE_SAVED:
            call.rows = [[None if on else NONE] for on in units]
    else:
        chosen = prepare(module, hidden, kwargs.get("attention_mask"))
        if saves and batch * length >= ROWS:
            call.on = gate.of_heads(torch.cat([chosen.new_ones(batch, length, len(gate.shared)), chosen], dim=-1))
            flat = chosen.permute(2, 0, 1).reshape(-1, length)
            on_tokens = iter(flat.nonzero()[:, 1].split(flat.sum(1).tolist()))
            units = range(gate.units)
            call.rows = [[None if unit in gate.shared else next(on_tokens) for _ in range(batch)] for unit in units]
    if call.work is not None:
        _count_inputs(module, call.work, batch * length)


def after(module, args, output) -> None:
    """Forward hook of an attention module: what was kept for this call may go."""
    if hasattr(module, "surgery_call"):
        module.surgery_call.clear()


def _count_inputs(module, work: Work, tokens: int) -> None:
    """Count the router, and the projections that are not ours to count."""
    weights = [module.get_parameter(name) for name in ROUTERS if hasattr(module, name)]
    work.add("router", tokens * sum(weight.numel() for weight in weights if weight.dim() == 2), 0)
    stock = {"k_proj": "keys and values", "v_proj": "keys and values"}
    stock |= {"q_proj": _Query.component, "o_proj": _Output.component}
    for name, component in stock.items():
        projection = getattr(module, name, None)
        if isinstance(projection, torch.nn.Linear) and not isinstance(projection, _Projection):
            work.add(component, *[tokens * projection.weight.numel()] * 2)


# Both from the times of one block of SmolLM2's shape (examples/benchmarks/bench_gates.py).
LEAF = 384  # gathered query rows that attend together under a mask
# How many query rows the kernel gives a thread at a time, and from how many rows on. What is not a multiple of it for
# all threads leaves some of them without work.
SHARES = ((768, 256), (0, 64))
DECODE_KEYS = 2048  # keys from which a single token leaves KV heads unread that it has no use for


def pays(query, keys) -> bool:
    """Whether attention of these queries is done for the heads that are on alone, where `GateState.on` says which."""
    return query.shape[2] > 1 or keys.shape[2] >= DECODE_KEYS


def gathered(module, query, key, value, scaling, options) -> torch.Tensor | None:
    """Attention of the rows that the gate has on, times the gate; None where all rows must be computed."""
    if isinstance(key, list):
        key, value = key[0].keys, key[0].values
    plain = module.surgery_heads.visibilities == [Visibility()] and options == {"softcap": None, "s_aux": None}
    plain = plain and (getattr(module, "surgery_sparse", None) is None or query.shape[2] == 1)
    if not plain or module.surgery_corrections or not pays(query, key) or written_out(query, key, value):
        return None
    return attend(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)


def attend(module, query, keys, values, scale) -> torch.Tensor | None:
    """Causal attention of the rows that are on, times their gates.

    Args:
        query: [batch, heads, n, head_dim]; keys, values: [batch, KV heads, N, head_dim], the last n of them of the
            queries' own tokens. No padding.

    Returns:
        [batch, n, heads, head_dim], 0 where a head is off; None for a token of which no key can be left unread.
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
            made, lse = torch.empty_like(rows), rows.new_empty(len(rows), dtype=_lse_dtype(rows))
            pairs += _attend_rows(rows, past + token, keys[kv_slice], values[kv_slice], 0, scale, (made, lse))
            out[row].view(-1, size).index_copy_(0, row_index, made.mul_(gates.index_select(0, row_index)[:, None]))
    if call.work is not None:
        dense = batch * heads * (length * past + length * (length + 1) // 2)
        call.work.add("attention", 2 * size * pairs, 2 * size * dense)
    return out


def _attend_token(module, query, keys, values, scale) -> torch.Tensor | None:
    """`attend` for one token: all heads of the KV heads that have one on, since they read the same keys.

    None where that is every KV head: then there is nothing to leave out.
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
        query: [r, head_dim], of the tokens at `positions` (long [r], not falling, from `first` on).
        keys, values: [1, 1, N, head_dim].
        into: [r, head_dim] and [r], where output and log-sum-exp are put.

    Returns:
        With how many keys the rows were multiplied, all together.
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
    """How many of so many rows are the later half: what the threads share evenly, if it comes near."""
    half = count // 2
    multiple = next(share for least, share in SHARES if half >= least) * torch.get_num_threads()
    even = (half + multiple // 2) // multiple * multiple
    return even if 0 < even < count else half


def _lse_dtype(query) -> torch.dtype:
    """What the kernel gives log-sum-exps in."""
    return torch.promote_types(query.dtype, torch.float32)


def _kernel(query, keys, values, first: int, end: int, scale, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [r, head_dim] and log-sum-exp [r] of the CPU's flash attention to the keys from `first` to `end` - 1."""
    near = (tensor[:, :, first:end] for tensor in (keys, values))
    seen = None if bias is None else bias[None, None]
    out, lse = fused(query[None, None], *near, scale, with_lse=True, seen=seen)
    return out[0, 0], lse[0, 0]


class Gates(Part):
    """Which heads are on for a token, and how much they count.

    An entry has `gate`: {"kind": "moh", "unit": "head" or "kv_group", "shared": [units that are always on], "active":
    routed units that are on}, or {"kind": "mae", "hard": ..., "rescale": ...}.
    """

    keys = ("gate",)
    parameters = dict.fromkeys(ROUTERS, Parameter(0.0))

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        return _validation_error(config, layer, groups)

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        _attach(module, layer, groups)

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("gate",)


PART = Gates()
