"""Gates: their values against brute force in float64, the runtime, what is really skipped, files, gradients."""

from __future__ import annotations

import copy
import math
import random
import statistics
from functools import partial
from itertools import product

import pytest
import torch
from dense import batch, chunked, difference, given
from families import OFF_THE_INTERFACE, TINY, TOKENS, check_both_ways_to_load, double, one_thread  # noqa: F401 (one_thread: a fixture)
from tokenizers_of_bytes import byte_tokenizer
from transformers import AttentionInterface, AttentionMaskInterface

import surgery as package
from surgery.operations.sink_calibration.zero_tuning import first_tokens
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_gated_compute as rows
from surgery.runtime import surgery_gated_compute as skipping
from surgery.runtime.surgery_gated_compute import counted
from surgery.runtime.surgery_gates import Gate, GateState, load_balance, load_balance_loss, prepare, prepare_token

INTERFACE = sorted(name for name in TINY if name not in OFF_THE_INTERFACE and "image" not in name)
FAMILIES = ["llama", "qwen3", "gemma2", "gpt_oss", "olmo2"]


def sizes(model) -> tuple[int, int, int]:
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, text.hidden_size


def entry(model, gate: dict) -> dict:
    """A layer's entry, with the shapes written out: nothing of the runtime is used."""
    heads, kv_heads, hidden = sizes(model)
    units = kv_heads if gate.get("unit") == "kv_group" else heads
    routed = units - len(gate.get("shared", []))
    shapes = {"surgery_router": [routed, hidden], "surgery_router_bias": [routed]} if "router" not in gate else {}
    weighs = gate.get("weighs", True)
    shapes |= {"surgery_router_temperature": [1]} if gate["kind"] == "moh" and weighs else {}
    if gate.get("shared") and weighs:
        shapes |= {"surgery_shared_router": [len(gate["shared"]), hidden], "surgery_balance": [2, hidden]}
    return {"gate": gate, "parameters": shapes}


def moh(shared, active, unit="head") -> dict:
    return {"kind": "moh", "unit": unit, "shared": shared, "active": active}


def by_norm(*settings) -> dict:
    return moh(*settings) | {"router": "norm"}


def choosing(gate: dict) -> dict:
    return gate | {"weighs": False}


def mae(hard: bool, rescale: bool = True) -> dict:
    return {"kind": "mae", "hard": hard, "rescale": rescale}


def gated(base, gates: list[dict | None], seed: int | None = 0, **more):
    """A model with these gates; `seed`: random values in all of their parameters, None: as they come."""
    model = copy.deepcopy(base).eval()
    runtime.patch(model, {"layers": [(entry(base, gate) if gate else {}) | more for gate in gates]})
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "surgery_" in name:
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def brute_force(x, module, gate: dict, heads: int, kv_heads: int) -> list[float]:
    """The gates of one token, x [D] in float64, head by head."""
    parameter = {n: p.detach().double() for n, p in module.named_parameters() if n.startswith("surgery_")}
    if "router" not in gate:
        routers = parameter["surgery_router"], parameter["surgery_router_bias"]
        logits = [float(row @ x + b) for row, b in zip(*routers, strict=True)]

    def softmax(numbers):
        powers = [torch.tensor(n, dtype=torch.float64).exp().item() for n in numbers]
        return [power / sum(powers) for power in powers]

    if gate["kind"] == "mae":
        if gate["hard"]:
            factor = heads / (heads - 1) if gate["rescale"] else 1.0
            return [0.0 if h == max(range(heads), key=logits.__getitem__) else factor for h in range(heads)]
        return [heads / (heads - 1) * (1 - p) for p in softmax(logits)]
    units, shared = kv_heads if gate["unit"] == "kv_group" else heads, gate["shared"]
    routed = [unit for unit in range(units) if unit not in shared]
    if "router" in gate:
        query = module.q_proj.weight.double() @ x
        query = query if module.q_proj.bias is None else query + module.q_proj.bias.double()
        size, per_unit = len(query) // heads, heads // units
        norms = [
            math.sqrt(sum(float(c) ** 2 for c in query[u * per_unit * size : (u + 1) * per_unit * size]))
            for u in routed
        ]
        logits = [norm / statistics.stdev(norms) if len(norms) > 1 else norm for norm in norms]
    best = sorted(range(len(routed)), key=lambda i: (-logits[i], i))[: gate["active"]]
    if not gate.get("weighs", True):
        on = {*shared, *(routed[i] for i in best)}
        return [float(head * units // heads in on) for head in range(heads)]
    temperature = float(parameter["surgery_router_temperature"])
    values = dict.fromkeys(range(units), 0.0)
    for i, p in zip(best, softmax([temperature * logits[i] for i in best]), strict=True):
        values[routed[i]] = gate["active"] * p
    if shared:
        always = softmax([float(row @ x) for row in parameter["surgery_shared_router"]])
        balance = [2 * p for p in softmax([float(row @ x) for row in parameter["surgery_balance"]])]
        values = {unit: value * balance[1] for unit, value in values.items()}
        values |= {unit: balance[0] * len(shared) * p for unit, p in zip(shared, always, strict=True)}
    return [values[head * units // heads] for head in range(heads)]


def dense_logits(base, model, gates, ids, mask) -> torch.Tensor:
    """The stock model in float64; every head's output times its gate, by loops; no attention code of ours."""
    stock, (heads, kv_heads, _) = double(copy.deepcopy(base).eval()), sizes(base)
    inputs, ours = {}, runtime.attention_modules(model)
    text = stock.config
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)

    def take(layer, module, args, kwargs):
        inputs[layer] = args[0] if args else kwargs["hidden_states"]

    for layer, module in enumerate(runtime.attention_modules(stock)):
        module.register_forward_pre_hook(partial(take, layer), with_kwargs=True)

    def attend(module, query, key, value, _mask, scaling=None, softcap=None, s_aux=None, **_):
        layer, length = module.layer_idx, query.shape[2]
        limit = window if window and (kinds is None or kinds[layer] == "sliding_attention") else length
        i, j = torch.arange(length)[:, None], torch.arange(length)
        seen = ((j <= i) & (i - j < limit))[None] & mask.bool()[:, None]
        out = torch.zeros_like(query)
        for row, head in product(range(len(ids)), range(heads)):
            kv = head * key.shape[1] // heads
            scores = query[row, head] @ key[row, kv].T * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            powers = scores.exp() * seen[row]
            total = powers.sum(-1, keepdim=True) + (0 if s_aux is None else s_aux[head].exp())
            out[row, head] = torch.where(mask[row, :, None].bool(), powers @ value[row, kv] / total, 0.0)
        if gates[layer]:
            for row, token in product(range(len(ids)), range(length)):
                values = brute_force(inputs[layer][row, token], ours[layer], gates[layer], heads, kv_heads)
                out[row, :, token] *= torch.tensor(values, dtype=torch.float64)[:, None]
        return out.transpose(1, 2), None

    AttentionInterface.register("gates_reference", attend)
    AttentionMaskInterface.register("gates_reference", lambda **_: None)
    stock.set_attn_implementation("gates_reference")
    with torch.no_grad():
        return stock(**given(stock, ids, mask), use_cache=False).logits


@pytest.fixture(scope="module")
def bases():
    return {name: TINY[name]().eval().requires_grad_(False) for name in FAMILIES}


@pytest.fixture(params=["multiplied", "gathered"])
def path(request, monkeypatch):
    """Everything computed and multiplied by the gate, or only what is on: forced by the constants of the rule."""
    if request.param == "gathered":
        for file, name, value in ((skipping, "ROWS", 1), (skipping, "SHARE", 1.0), (rows, "LEAF", 5)):
            monkeypatch.setattr(file, name, value)
        monkeypatch.setattr(rows, "SHARES", ((12, 6), (0, 4)))
        monkeypatch.setattr(rows, "DECODE_KEYS", 1)
        monkeypatch.setattr(skipping, "DECODE_SAVED", 1)
    else:
        monkeypatch.setattr(skipping, "ROWS", 1 << 30)
    return request.param


GATES = {
    "router alone": [moh([], 3), moh([], 5)],
    "shared": [moh([1, 6], 3), moh([0], 1)],
    "all on": [moh([2], 7), moh([], 8)],
    "groups": [moh([2], 1, "kv_group"), moh([], 3, "kv_group")],
    "norm": [by_norm([1, 6], 3), by_norm([], 2, "kv_group")],
    "norm, never weighed": [choosing(by_norm([1, 6], 3)), choosing(by_norm([], 2, "kv_group"))],
    "never weighed": [choosing(moh([1, 6], 3)), choosing(moh([], 2, "kv_group"))],
    "soft": [mae(False), None],
    "hard": [mae(True), mae(True, False)],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
@torch.no_grad()
def test_values_against_brute_force(bases, family, gates, path):
    """Padded, alone, cached in chunks and token by token."""
    base = bases[family]
    model = gated(base, gates)
    for pads in ((0, 11), (0,)):
        ids, mask = batch(base, pads)
        want = dense_logits(base, model, gates, ids, mask)
        assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
        for chunks in ([45], [20, 1, 24], [7] * 6 + [3]):
            assert difference(chunked(model, ids, mask, chunks), want, mask) <= 1e-4
    plain = base(**given(base, ids, mask), use_cache=False).logits
    assert difference(plain, want, mask) > 1e-3, "the gate changes nothing here: the test has no power"


@pytest.mark.parametrize("seed", range(50))
@torch.no_grad()
def test_random_settings(bases, seed, monkeypatch):
    draw = random.Random(seed)
    base = bases[draw.choice(FAMILIES)]
    heads, kv_heads, _ = sizes(base)
    gates = []
    for _ in range(2):
        unit = draw.choice(["head", "kv_group"])
        units = heads if unit == "head" else kv_heads
        shared = draw.sample(range(units), draw.randint(0, units - 1))
        kind = draw.choice([moh, moh, by_norm])
        routing = kind(shared, draw.randint(1, units - len(shared)), unit)
        gates.append(draw.choice([routing, choosing(routing), mae(draw.random() < 0.7)]))
    model = gated(base, gates, seed)
    ids, mask = batch(base, draw.choice([(0,), (0, 3), (9, 0, 1)]))
    length = draw.randint(2, 45)
    ids, mask = ids[:, :length], mask[:, :length] | (torch.arange(length) == length - 1)
    monkeypatch.setattr(skipping, "SHARE", 1.0)
    monkeypatch.setattr(skipping, "ROWS", draw.choice([1, 20, 1 << 30]))
    monkeypatch.setattr(rows, "LEAF", draw.randint(1, 50))
    monkeypatch.setattr(rows, "SHARES", ((draw.randint(9, 30), draw.randint(1, 9)), (0, draw.randint(1, 5))))
    monkeypatch.setattr(rows, "DECODE_KEYS", draw.choice([1, 20]))
    monkeypatch.setattr(skipping, "DECODE_SAVED", draw.choice([1, 1 << 30]))
    want = dense_logits(base, model, gates, ids, mask)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    cut = draw.randint(1, length - 1)
    assert difference(chunked(model, ids, mask, [cut] + [1] * (length - cut)), want, mask) <= 1e-4


@pytest.mark.parametrize("family", INTERFACE)
@torch.no_grad()
def test_identity_on_every_interface_family(family, path):
    """All heads on, routers with values: the base; cached, and left-padded."""
    base = TINY[family]().eval()
    heads, kv_heads, _ = sizes(base)
    ids, mask = batch(base, (0, 11))
    want = base(**given(base, ids, mask), use_cache=False).logits
    cases = [[moh([1], heads - 1), moh([], kv_heads, "kv_group")], [mae(False), moh([], heads)]]
    if hasattr(runtime.attention_modules(base)[0], "q_proj"):
        cases.append([by_norm([1], heads - 1), by_norm([], kv_heads, "kv_group")])
    for gates in cases:
        model = gated(base, gates, None)
        for module in runtime.attention_modules(model):
            if (
                module.surgery_gate.kind == "moh" and module.surgery_gate.router == "linear"
            ):  # it may choose: with all of them on there is nothing to choose
                module.surgery_router.data.normal_(generator=torch.Generator().manual_seed(1))
        assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-5
        assert difference(chunked(model, ids, mask, [20, 1, 24]), want, mask) <= 1e-5


@torch.no_grad()
def test_gates_of_a_router_that_only_chooses_are_exactly_one_or_zero():
    for shared, active, units in (((), 7, 49), ((3, 5), 5, 12)):
        gate = Gate("moh", (1,) * units, shared, active)
        hidden = torch.randn(40, 16)
        parameters = {name.removeprefix("surgery_"): torch.zeros(shape) for name, shape in gate.shapes(16).items()}
        parameters["router"] = torch.randn(parameters["router"].shape)
        logits = gate.logits(hidden, parameters)
        values = gate.of_heads(gate.weights(hidden, logits, gate.chosen(logits), parameters))
        assert set(values.unique().tolist()) == {0.0, 1.0}
        assert (values.sum(-1) == len(shared) + active).all()


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_the_gate_of_one_token_is_that_of_many(bases, seed):
    """Python's numbers against the tensors, ties included."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shared = draw.sample(range(8), draw.randint(0, 6))
    gate = draw.choice([moh(shared, draw.randint(1, 8 - len(shared))), mae(True), mae(True, False), mae(False)])
    module = runtime.attention_modules(gated(bases["llama"], [gate, None], seed))[0]
    if seed % 3 == 0:  # units that are exactly alike
        for name in ("router", "router_bias", "router_temperature", "shared_router", "balance"):
            if hasattr(module, f"surgery_{name}"):
                getattr(module, f"surgery_{name}").zero_()
    hidden = torch.randn(1, 6, 64, generator=generator)
    prepare(module, hidden, None)
    want = module.surgery_call.gates
    for token in range(6):
        on = prepare_token(module, hidden[0, token])
        got = module.surgery_call.gates
        assert (got[0, 0] - want[0, token]).abs().max() < 1e-5
        assert [bool(x) for x in on] == (want[0, token] != 0).tolist()


@torch.no_grad()
def test_a_router_changed_between_two_tokens_is_heard(bases):
    model = gated(bases["llama"], [moh([1], 3), moh([], 2)])
    other = gated(bases["llama"], [moh([1], 3), moh([], 2)], seed=1)
    one = TOKENS[:1, :1]
    first, want = model(input_ids=one).logits, other(input_ids=one).logits
    assert (first - want).abs().max() > 1e-3
    for (name, parameter), new in zip(model.named_parameters(), other.parameters(), strict=True):
        if "surgery_" in name:
            parameter.copy_(new)
    assert torch.equal(model(input_ids=one).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("way", ["assigned", "data"])
def test_a_router_replaced_between_two_tokens_is_heard(bases, way):
    """By another parameter, or by other memory: neither counts as a new version of the old one."""
    model = gated(bases["llama"], [moh([1], 3), moh([], 2)])
    other = gated(bases["llama"], [moh([1], 3), moh([], 2)], seed=1)
    one = TOKENS[:1, :1]
    first, want = model(input_ids=one).logits, other(input_ids=one).logits
    assert (first - want).abs().max() > 1e-3
    if way == "assigned":
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        for (name, parameter), new in zip(model.named_parameters(), other.parameters(), strict=True):
            if "surgery_" in name:
                parameter.data = new.data.clone()
    assert torch.equal(model(input_ids=one).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("gate", [moh([1], 3), by_norm([1], 3), mae(True), mae(False)])
def test_offloaded_weights(bases, gate):
    """Accelerate brings a module's weights when its forward begins, after the hook that works out the gate."""
    from accelerate import cpu_offload

    model = gated(bases["llama"], [gate, gate])
    want, one = model(input_ids=TOKENS).logits, model(input_ids=TOKENS[:1, :1]).logits
    away = cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for name, p in away.named_parameters() if "surgery_" in name)
    assert torch.equal(away(input_ids=TOKENS).logits, want)
    assert torch.equal(away(input_ids=TOKENS[:1, :1]).logits, one)


@torch.no_grad()
@pytest.mark.parametrize("gate", [moh([1], 3), mae(True)])
def test_autocast_changes_no_choice(bases, gate):
    module = runtime.attention_modules(gated(bases["llama"], [gate, None]).train())[0]
    hidden = torch.randn(1, 400, 64, generator=torch.Generator().manual_seed(0))
    want = prepare(module, hidden, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prepare(module, hidden, None), want)
    assert gate["kind"] == "mae" or module.surgery_call.loss.dtype == torch.float32


def test_gradients_of_gates_and_load_balance():
    """By gradcheck: of the router, its bias, temperature, shared router, balance and the input."""
    generator = torch.Generator().manual_seed(0)
    for gate in (Gate("moh", (1,) * 6, (1, 4), 2), Gate("mae", (1,) * 5, hard=False)):
        shapes = gate.shapes(7)
        tensors = [torch.randn(shape, generator=generator).double().requires_grad_() for shape in shapes.values()]
        hidden = torch.randn(2, 3, 7, generator=generator).double().requires_grad_()

        def function(hidden, *tensors, gate=gate, names=tuple(shapes)):
            parameters = dict(zip([name.removeprefix("surgery_") for name in names], tensors, strict=True))
            logits = gate.logits(hidden, parameters)
            chosen = gate.chosen(logits)
            real = torch.tensor([[True, True, True], [False, True, True]])
            return gate.weights(hidden, logits, chosen, parameters), load_balance(logits, chosen, real)

        assert torch.autograd.gradcheck(function, (hidden, *tensors))


def test_the_choice_has_the_gradient_of_its_formula():
    """1[on] (1 + s - sg(s)), s the softmax of the routed logits times the number that is on."""
    generator, gate = torch.Generator().manual_seed(0), Gate("moh", (1,) * 6, (1, 4), 2)
    logits = torch.randn(5, 4, generator=generator).double().requires_grad_()
    cost, fixed = (torch.randn(5, 6, generator=generator).double() for _ in range(2))
    fixed[:, 2:] *= gate.chosen(logits)
    gates = gate.learning(fixed, logits)
    assert torch.equal(gates, fixed)
    (cost * gates).sum().backward()
    for token in range(5):
        powers = [math.exp(x) for x in logits[token].tolist()]
        s = [2 * power / sum(powers) for power in powers]
        for j in range(4):
            steps = [s[u] * ((u == j) - s[j] / 2) for u in range(4)]
            want = sum(float(cost[token, 2 + u] * fixed[token, 2 + u]) * steps[u] for u in range(4))
            assert float(logits.grad[token, j]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("router", ["fit", "static", "zero"])
@pytest.mark.parametrize("granularity", ["head", "kv_group"])
def test_the_models_loss_alone_moves_every_router_from_the_start(router, granularity):
    """With tau at 0, as the operation leaves it. Training mode changes no logit."""
    tokenizer, model = byte_tokenizer(), TINY["llama"](vocab_size=258)
    step = {"op": "moh", "router": router, "granularity": granularity, "active_ratio": 0.6, "shared_ratio": 0.25}
    step |= {"calibration_samples": 4, "calibration_length": 32}
    package.apply({"version": 1, "name": "x", "operations": [step]}, model, tokenizer=tokenizer)
    ids = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model.eval()(ids).logits
    out = model.train()(ids, labels=ids)
    assert torch.equal(out.logits, plain)
    out.loss.backward()
    for module in runtime.attention_modules(model):
        assert module.surgery_router_temperature.item() == 0
        for name in ("surgery_router", "surgery_router_bias"):
            assert getattr(module, name).grad.abs().max() > 0, name


def test_the_models_loss_alone_moves_the_queries_of_a_router_of_norms():
    """It has no parameters: the gradient of the choice reaches the query projection, which makes the norms."""
    base = TINY["llama"](vocab_size=258)
    model, plain = (copy.deepcopy(base) for _ in range(2))
    package.apply(
        {"version": 1, "name": "x", "operations": [{"op": "moh", "router": "norm", "shared": "first"}]}, model
    )
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in plain.named_parameters()}
    ids = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    gradients, logits = [], []
    for training in (False, True):
        model.zero_grad()
        out = model.train(training)(ids, labels=ids)
        out.loss.backward()
        logits.append(out.logits.detach())
        gradients.append([m.q_proj.weight.grad.clone() for m in runtime.attention_modules(model)])
    assert torch.equal(*logits)
    for fixed, moved in zip(*gradients, strict=True):
        assert (moved - fixed).norm() > 0.01 * fixed.norm()
    with torch.no_grad():
        assert (logits[0] - plain.eval()(ids).logits).abs().max() > 0.01, "some heads are off"


def test_load_balance_by_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, generator=generator).double()
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1, :3] = False
    chosen = Gate("moh", (1,) * 4, (), 2).chosen(logits)
    tokens = [(row, i) for row in range(2) for i in range(5) if real[row, i]]
    total = 0.0
    for unit in range(4):
        share = sum(float(logits[t].exp()[unit] / logits[t].exp().sum()) for t in tokens) / len(tokens)
        on = sum(unit in sorted(range(4), key=lambda u: -logits[t][u])[:2] for t in tokens) / len(tokens)
        total += share * on / 4
    assert load_balance(logits, chosen, real).item() == pytest.approx(16 * total, abs=1e-12)
    assert load_balance(torch.zeros(1, 8, 4), torch.ones(1, 8, 4).bool(), None).item() == pytest.approx(4)


@pytest.mark.parametrize("rescale", [True, False])
def test_hard_gates_of_mae_are_the_mixture_in_training(rescale):
    """The mean over experts, by loops, with the gradient of its formula; in evaluation they are hard."""
    generator, gate = torch.Generator().manual_seed(0), Gate("mae", (1,) * 5, hard=True, rescale=rescale)
    logits = torch.randn(7, 5, generator=generator).double().requires_grad_()
    cost, scale = torch.randn(7, 5, generator=generator).double(), 5 / 4 if rescale else 1.0
    gates = gate.learning(gate.weights(None, logits, gate.chosen(logits), {}), logits)
    (cost * gates).sum().backward()
    for token in range(7):
        powers = [math.exp(x) for x in logits[token].tolist()]
        p = [power / sum(powers) for power in powers]
        for head in range(5):
            mixture = sum(p[expert] * scale for expert in range(5) if expert != head)
            assert float(gates[token, head]) == pytest.approx(mixture, abs=1e-12)
            slope = sum(-float(cost[token, h]) * scale * p[h] * ((h == head) - p[head]) for h in range(5))
            assert float(logits.grad[token, head]) == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("gate", [moh([1], 3), by_norm([1], 3), by_norm([], 2, "kv_group"), mae(True)])
def test_a_token_without_content_gives_no_nan(bases, gate):
    """Its embedding is 0, so that all its queries are 0: equal norms, whose deviation is 0."""
    model = gated(bases["llama"], [gate, gate]).train()
    model.model.embed_tokens.weight.data[5] = 0
    model.requires_grad_(True)
    ids = TOKENS.clone()
    ids[:, 4] = 5
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if gate.get("router"):
        queries = [module.q_proj.weight.grad.abs().max() for module in runtime.attention_modules(model)]
        assert min(queries) > 0


def test_equal_queries_are_no_damage(bases):
    """Heads that are copies of each other have the same norm; the first of them are on."""
    model = gated(bases["llama"], [by_norm([], 3), by_norm([], 2, "kv_group")])
    for module in runtime.attention_modules(model):
        rows = module.q_proj.weight.shape[0] // 8
        module.q_proj.weight.data.copy_(100 * module.q_proj.weight[:rows].repeat(8, 1))
    assert model(input_ids=TOKENS).logits.isfinite().all()


def test_a_router_that_diverges_says_so_where_experts_are_drawn(bases):
    model = gated(bases["llama"], [mae(True), mae(True)]).train()
    module = runtime.attention_modules(model)[0]
    module.surgery_call.draws = True
    module.surgery_router.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model(input_ids=TOKENS)


def test_drawn_experts_lack_one_head_each_and_teach_the_gate_nothing():
    torch.manual_seed(0)
    for gate, counts in ((Gate("mae", (1,) * 4, hard=True, rescale=False), 1.0), (Gate("mae", (1,) * 4), 4 / 3)):
        logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(3, 20_000, 4).clone().requires_grad_()
        gates = gate.drawn(logits)
        assert gates.detach().unique().tolist() == pytest.approx([0.0, counts])
        assert ((gates == 0).sum(-1) == 1).all()
        off, likely = (gates == 0).float().mean((0, 1)), logits[0, 0].softmax(-1)
        assert (off - likely).abs().max() < 0.01  # five standard errors of 60,000 draws
        gates.square().sum().backward()
        assert not logits.grad.any()


def test_mae_has_no_load_balance_and_is_hard_where_it_is_used(bases):
    model = gated(bases["llama"], [mae(True), mae(True)])
    with torch.no_grad():
        hard = model(input_ids=TOKENS).logits
        soft = model.train()(input_ids=TOKENS).logits
        assert (soft - hard).abs().max() > 1e-3
        with pytest.raises(ValueError, match="no layer of this model has a router"):
            load_balance_loss(model)
        assert torch.equal(model.eval()(input_ids=TOKENS).logits, hard)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_router_and_checkpointing_changes_nothing(bases, checkpointing):
    base = bases["llama"]
    model = gated(base, [moh([1, 6], 3), moh([], 2, "kv_group")])
    ids, mask = batch(base, (0, 11))
    plain = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (model, plain):
        each.train()
        out = each(**given(each, ids, mask), labels=ids.masked_fill(mask == 0, -100))
        (out.loss + 0.1 * load_balance_loss(each)).backward()
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        if "surgery_" in name:
            assert one.grad is not None, name
            assert one.grad.abs().max() > 0, name
            assert torch.allclose(one.grad, two.grad, atol=1e-6), name
    copy.deepcopy(model)  # what a forward keeps has a graph


def test_load_balance_loss_says_what_is_missing(bases):
    with pytest.raises(ValueError, match="no layer of this model has a router"):
        load_balance_loss(bases["llama"])
    model = gated(bases["llama"], [moh([], 3), None])
    with pytest.raises(ValueError, match="has not run in training mode"):
        load_balance_loss(model)
    model.train()
    ids, _ = batch(model, (0,))
    with torch.no_grad():
        model(input_ids=ids)
    with pytest.raises(ValueError, match="use_reentrant"):
        load_balance_loss(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_a_router_that_gives_no_number_is_an_error(bases, value, path):
    model = gated(bases["qwen3"], [None, moh([], 3)])
    runtime.attention_modules(model)[1].surgery_router[2, 5] = value
    with pytest.raises(ValueError, match=r"router of layer 1 .* NaN or inf"):
        model(input_ids=TOKENS)


# --- what is really skipped -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_that_are_off_reach_no_product(bases, path):
    """Poison what is off: with the work skipped, heads that are never on may hold NaN in their projections."""
    model = gated(bases["llama"], [moh([], 3), moh([], 3)], None)  # of equal logits the first: heads 0 to 2 are on
    ids, _ = batch(model, (0,))
    want = model(input_ids=ids, use_cache=False).logits
    for module in runtime.attention_modules(model):
        module.q_proj.weight[3 * 8 :] = float("nan")
        module.o_proj.weight[:, 3 * 8 :] = float("nan")
    if path == "multiplied":  # so the poison is one
        with pytest.raises(ValueError, match="NaN"):
            model(input_ids=ids, use_cache=False)
    else:
        assert (model(input_ids=ids, use_cache=False).logits - want).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_output_projection_in_half_precision_rounds_once(dtype):
    """Each of 24 products is rounded, and the sums on their way are not: those made it 3.6 times worse."""
    torch.manual_seed(0)
    heads, size, length = 32, 16, 40
    plain = torch.nn.Linear(heads * size, 64).to(dtype)
    ours = copy.deepcopy(plain)
    ours.__class__, ours.surgery_gate = skipping._Output, Gate("moh", (1,) * heads, (0, 1, 2), 21)
    x, on = torch.randn(1, length, heads, size).to(dtype), torch.rand(length, heads) < 0.7
    on[:, :3] = True
    rows = [[None] if head < 3 else [on[:, head].nonzero()[:, 0]] for head in range(heads)]
    ours.surgery_call = GateState()
    ours.surgery_call.rows = rows
    given = (x * on[None, :, :, None]).flatten(2)
    want = given.double() @ plain.weight.double().T + plain.bias.double()
    errors = [(layer(given) - want).square().mean().sqrt() for layer in (ours, plain)]
    assert errors[0] <= 1.6 * errors[1]


def halved(tokens: list[int], first: int) -> int:
    """Pairs of rows and keys from `first` on: the later half of the rows sees all keys before its own first."""
    if len(tokens) <= rows.LEAF:
        return len(tokens) * (tokens[-1] + 1 - first) if tokens else 0
    later = len(tokens) // 2  # to the nearest number that threads share evenly, if that is some of the rows
    share = (6 if later >= 12 else 4) * torch.get_num_threads()
    nearest = min(range(0, len(tokens) + share, share), key=lambda size: (abs(size - later), -size))
    later = nearest if 0 < nearest < len(tokens) else later
    early, late = tokens[: len(tokens) - later], tokens[len(tokens) - later :]
    return halved(early, first) + halved(late, late[0]) + len(late) * (late[0] - first)


@torch.no_grad()
def test_counted_multiply_adds_are_those_of_brute_force(bases, path):
    base = bases["llama"]
    gates = [moh([1, 6], 3), moh([2], 1, "kv_group")]
    model = gated(base, gates)
    (ids, _), choices = batch(base, (0,)), []

    def see(projection, _):
        choices.append(projection.surgery_call.gates[0] != 0)

    hooks = [module.o_proj.register_forward_pre_hook(see) for module in runtime.attention_modules(model)]
    with counted(model) as work:
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    length, hidden, heads, size = ids.shape[1], 64, 8, 8
    whole = {
        "query projection": 2 * length * hidden * heads * size,
        "output projection": 2 * length * hidden * heads * size,
        "keys and values": 2 * 2 * length * hidden * 4 * size,
        "attention": 2 * 2 * heads * size * length * (length + 1) // 2,
        "router": 0,
    }
    assert work.dense == whole
    assert work.done["router"] == length * hidden * ((6 + 2 + 2) + (3 + 1 + 2))
    if path == "multiplied":
        assert {name: n for name, n in work.done.items() if name != "router"} == {
            name: n for name, n in whole.items() if name != "router"
        }
        return
    on = sum(int(choice.sum()) for choice in choices)
    assert work.done["query projection"] == work.done["output projection"] == on * hidden * size
    pairs = 0
    for choice in choices:
        for pair in range(4):
            tokens = [t for t in range(length) for head in (2 * pair, 2 * pair + 1) if choice[t, head]]
            pairs += halved(tokens, 0)
    assert work.done["attention"] == 2 * size * pairs
    assert work.done["attention"] < 0.7 * whole["attention"]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert work.done["attention"] == 2 * size * pairs, "nothing is counted outside"


@torch.no_grad()
def test_a_token_of_scaled_mae_counts_the_heads_that_are_on(bases, monkeypatch):
    for name, value in (("SHARE", 0.9), ("DECODE_SAVED", 0)):
        monkeypatch.setattr(skipping, name, value)
    monkeypatch.setattr(rows, "DECODE_KEYS", 1)
    model = gated(bases["llama"], [mae(True, rescale=True)] * 2)
    with counted(model) as work:
        model(input_ids=TOKENS[:1, :1], use_cache=False)
    for part in ("query projection", "output projection"):
        assert work.done[part] * 8 == work.dense[part] * 7, part
    assert work.done["attention"] == work.dense["attention"], "a KV head is read for both its heads or for none"


@torch.no_grad()
def test_a_token_leaves_kv_heads_unread_and_counts_it(bases, monkeypatch):
    """4 KV heads of 2 query heads: with 3 heads on, at least 1 of them has none."""
    monkeypatch.setattr(rows, "DECODE_KEYS", 1)
    base = bases["llama"]
    gates = [moh([], 3), moh([0, 7], 1)]
    model, (ids, mask) = gated(base, gates), batch(base, (0,))
    want = dense_logits(base, model, gates, ids, mask)
    cache, unread = model.make_cache(), 0
    model(input_ids=ids[:, :7], **{runtime.CACHE: cache})
    for place in range(7, 24):
        with counted(model) as work:
            found = model(input_ids=ids[:, place : place + 1], **{runtime.CACHE: cache}).logits
        assert (found[0, 0] - want[0, place]).abs().max() < 1e-4
        per_head = 2 * 8 * (place + 1) * 2  # scores and values, head size, keys, query heads
        whole, left = work.dense["attention"], work.dense["attention"] - work.done["attention"]
        assert whole == 2 * 4 * per_head
        assert left % per_head == 0
        assert left >= 2 * per_head
        unread += left // per_head
    assert unread > 2 * 17


@torch.no_grad()
def test_no_work_is_skipped_where_it_does_not_pay_or_gradients_are_wanted(bases):
    model = gated(bases["llama"], [moh([], 3), moh([], 3)])
    ids, _ = batch(model, (0,))
    long = ids.repeat(1, 6)[:, : 2 * skipping.ROWS]

    def skipped(ids, **kwargs) -> bool:
        with counted(model) as work:
            model(input_ids=ids, use_cache=False, **kwargs)
        return work.done["attention"] < work.dense["attention"]

    model.config.max_position_embeddings = 4096
    assert not skipped(ids)
    assert skipped(torch.cat([long] * 3, 1)[:, : skipping.ROWS])
    with torch.enable_grad():
        assert not skipped(torch.cat([long] * 3, 1)[:, : skipping.ROWS])


# --- the rest of Transformers ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_packed_rows_are_separate_rows(bases, path):
    model = gated(bases["qwen3"], [moh([1], 3), mae(True)])
    ids, _ = batch(model, (0,))
    lengths = (13, 1, 31)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    parts = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    assert difference(packed, torch.cat(parts, 1), torch.ones_like(ids)) <= 1e-5


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_a_padded_batch(bases, beams, path):
    model = gated(bases["gpt_oss"], [moh([1], 3), moh([0], 2, "kv_group")])
    ids, mask = batch(model, (0, 11))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": beams}
    made = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(made, model.generate(input_ids=ids, attention_mask=mask, **options, use_cache=False))
    alone = model.generate(input_ids=ids[1:, 11:], attention_mask=mask[1:, 11:], **options)
    assert torch.equal(alone[0, 45 - 11 :], made[1, 45:])


@torch.no_grad()
def test_with_a_head_split_and_a_bias(bases, path):
    """Three terms in one layer: gates times what the other two give."""
    base, split = bases["llama"], {"streaming": [1, 3], "sinks": 2, "window": 5}
    shapes = {"surgery_log_gamma": [8]}
    both = copy.deepcopy(base)
    runtime.patch(both, {"layers": [split | {"parameters": shapes}] * 2})
    model = copy.deepcopy(both)
    runtime.patch(model, {"layers": [entry(base, moh([1], 7))] * 2})
    for one in (both, model):
        for module in runtime.attention_modules(one):
            module.surgery_log_gamma.copy_(torch.linspace(-1, 1, 8))
    ids, mask = batch(base, (0, 11))
    want = both(**given(both, ids, mask), use_cache=False).logits
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-5
    some = copy.deepcopy(model)
    runtime.patch(some, {"layers": [entry(base, moh([0, 1, 2, 3, 4, 5], 1))] * 2})  # 6 stays on, the first of equals
    for module in runtime.attention_modules(both):
        module.o_proj.weight[:, 7 * 8 :] = 0
    want = both(**given(both, ids, mask), use_cache=False).logits
    assert difference(chunked(some, ids, mask, [20, 1, 24]), want, mask) <= 1e-5


def test_peft_trains_and_merges(bases):
    from peft import LoraConfig, get_peft_model

    model = gated(bases["llama"], [moh([1], 3), mae(True)])
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        loss = wrapped(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    wrapped.eval()
    with torch.no_grad():
        want = wrapped(input_ids=TOKENS).logits
        merged = wrapped.merge_and_unload()
        assert (merged(input_ids=TOKENS).logits - want).abs().max() < 1e-4
    assert type(runtime.attention_modules(merged)[0].q_proj) is skipping._Query


@torch.no_grad()
def test_peft_of_skipped_projections(bases, path):
    from peft import LoraConfig, get_peft_model

    model = gated(bases["llama"], [moh([1], 3), moh([], 2)])
    ids, _ = batch(model, (0,))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    wrapped.eval()
    want = wrapped(input_ids=ids).logits
    assert (wrapped.merge_and_unload()(input_ids=ids).logits - want).abs().max() < 1e-4


@torch.no_grad()
def test_compiled_is_eager(bases):
    model = gated(bases["llama"], [moh([1], 3), mae(True)])
    want = model(input_ids=TOKENS, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    assert (compiled(input_ids=TOKENS, use_cache=False).logits - want).abs().max() < 1e-5


# --- files ----------------------------------------------------------------------------------------------------------


def test_saved_files_through_both_doors(bases, tmp_path):

    settings = {"llama": GATES["shared"], "gemma2": GATES["groups"], "gpt_oss": GATES["hard"], "qwen3": GATES["soft"]}
    models = {tmp_path / name: gated(bases[name], gates) for name, gates in settings.items()}
    check_both_ways_to_load(models, tmp_path)


def test_a_missing_router_raises(bases, tmp_path):
    from conftest import edit_tensors

    import surgery

    gated(bases["llama"], GATES["shared"]).save_pretrained(tmp_path / "out")
    edit_tensors(tmp_path / "out", lambda tensors: tensors.pop("model.layers.1.self_attn.surgery_router"))
    with pytest.raises(surgery.SurgeryError, match="surgery_router"):
        surgery.load(tmp_path / "out")


GOOD = {"kind": "moh", "unit": "head", "shared": [1], "active": 3}


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        (GOOD | {"kind": "moa"}, "moh: active, kind, shared, unit; mae: hard, kind, rescale"),
        (GOOD | {"kind": ["moh"]}, "and a gate has"),
        (GOOD | {"top": 1}, "and a gate has"),
        ({"kind": "moh", "active": 3}, "and a gate has"),
        ("moh", "and a gate has"),
        (GOOD | {"unit": "layer"}, "head or kv_group"),
        (GOOD | {"unit": ["head"]}, "head or kv_group"),
        (GOOD | {"shared": [8]}, "some of 0 to 7"),
        (GOOD | {"shared": [1, 1]}, "each once"),
        (GOOD | {"shared": [True]}, "some of 0 to 7"),
        (GOOD | {"shared": 1}, "some of 0 to 7"),
        (GOOD | {"shared": list(range(8))}, "not all"),
        (GOOD | {"router": "best"}, r"router 'best' \(linear or norm\)"),
        (GOOD | {"weighs": 1}, r"weighs 1 \(a bool\)"),
        (GOOD | {"weighs": False}, "whose parameters are"),
        (GOOD | {"active": 0}, "from 1 to the 7 routed"),
        (GOOD | {"active": 8}, "from 1 to the 7 routed"),
        (GOOD | {"active": 2.0}, "it is whole"),
        (GOOD | {"unit": "kv_group", "active": 4}, "from 1 to the 3 routed"),
        ({"kind": "mae", "hard": 1, "rescale": True}, "true or false"),
    ],
)
def test_a_gate_edited_by_hand_is_refused(bases, gate, says):
    named = entry(bases["llama"], GOOD)["parameters"]
    with pytest.raises(ValueError, match=says):
        runtime.patch(copy.deepcopy(bases["llama"]), {"layers": [{"gate": gate, "parameters": named}, {}]})


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"surgery_router": [7, 63]}, r"whose parameters are .*'surgery_router': \[7, 63\].*\[7, 64\]"),
        ({"surgery_balance": [3, 64]}, "surgery_balance"),
        ({"surgery_router_bias": None}, "surgery_router_bias"),
        ({"surgery_gate": [8]}, "other parameters"),
    ],
)
def test_parameters_that_do_not_fit_their_gate_are_refused(bases, parameters, says):
    right = entry(bases["llama"], GOOD)
    named = {name: shape for name, shape in (right["parameters"] | parameters).items() if shape is not None}
    with pytest.raises(ValueError, match=says):
        runtime.patch(copy.deepcopy(bases["llama"]), {"layers": [right | {"parameters": named}, {}]})
    with pytest.raises(ValueError, match=r"without a gate|other parameters"):
        runtime.patch(copy.deepcopy(bases["llama"]), {"layers": [{"parameters": named}, {}]})


# --- what must not meet what is left out ----------------------------------------------------------------------------


@torch.no_grad()
def test_autocast_of_skipped_work(bases, path):
    model = gated(bases["llama"], [moh([1], 3), moh([], 5)])
    ids, _ = batch(model, (0,))
    want = model(input_ids=ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(input_ids=ids).logits
    assert got.isfinite().all()
    assert (got.float() - want).abs().median() < 0.2 * want.std()


@torch.no_grad()
def test_measuring_a_gated_model_sees_every_query(bases, monkeypatch):
    """The queries of heads that are off are not zero when attention itself is measured."""
    model = gated(bases["llama"], [moh([], 3), moh([], 3)])
    pieces, _ = batch(model, (0,))
    want = first_tokens(model, pieces, [0, 0])
    monkeypatch.setattr(skipping, "ROWS", 1)
    for found, expected in zip(first_tokens(model, pieces, [0, 0]), want, strict=True):
        assert torch.allclose(found.score, expected.score, atol=1e-5)
    assert not any(hasattr(module, "surgery_whole") for module in runtime.attention_modules(model))


@torch.no_grad()
def test_a_forward_that_an_error_ended_leaves_nothing(bases, monkeypatch):
    model = gated(bases["llama"], [moh([], 3), moh([], 3)])
    ids, _ = batch(model, (0,))
    long = torch.cat([ids, ids[:, 1:]], dim=1)
    monkeypatch.setattr(skipping, "ROWS", long.shape[1])  # the shorter one computes all
    want = model(input_ids=ids, use_cache=False).logits

    def fail(module, args):
        raise KeyboardInterrupt

    hook = runtime.attention_modules(model)[0].o_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=long, use_cache=False)
    hook.remove()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)


@pytest.mark.parametrize("name", ["surgery_shared_router", "surgery_balance", "surgery_router_temperature"])
@pytest.mark.parametrize("length", [1, 9])
@torch.no_grad()
def test_weights_that_are_no_numbers_are_an_error(bases, name, length):
    model = gated(bases["llama"], [moh([1], 3), moh([1], 3)])
    getattr(runtime.attention_modules(model)[1], name)[0] = float("nan")
    with pytest.raises(ValueError, match=r"router of layer 1 .* NaN or inf"):
        model(input_ids=TOKENS[:1, :length])
