"""The layer-wise start: its error against a computation of its own, what it may change, every family and tier."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from families import TINY, attention_modules, one_thread  # noqa: F401 (one_thread: a fixture)

import surgery
from surgery.data.packing import Packed
from surgery.errors import SurgeryError
from surgery.healing import layerwise_distillation as fitting
from surgery.healing.layerwise_distillation import warm_start
from surgery.runtime import modeling_surgery as runtime

LENGTH = 24


@pytest.fixture
def quick_steps(monkeypatch):
    """Many small steps: the default is for models that are not tiny."""
    monkeypatch.setattr(fitting, "RATE", 1e-2)
    monkeypatch.setattr(fitting, "STEP_TOKENS", 10 * LENGTH)


def heal(tokens=20_000, seed=0, precision="float32"):
    return SimpleNamespace(warm_start=tokens, seed=seed, length=LENGTH, precision=precision)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 60, (60,), generator=generator).tolist()
    return Packed([torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths], LENGTH)


def attention_names(model, ends=("",)) -> set[str]:
    inside = {id(p) for module in attention_modules(model) for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside and name.endswith(tuple(ends))}


def disturbed(base, seed=0, share=0.3):
    """A copy whose attention is off by 30%."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name in attention_names(model):
            p.data += share * p.data.std().nan_to_num(1.0) * torch.randn(p.shape, generator=generator)
    return model


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def errors(record, when):
    return [layer[when] for layer in record["layers"]]


def test_the_error_is_that_of_the_attention_on_the_bases_input(rows):
    """By the attention modules alone, called one by one with what the base's were called with; rows one by one."""
    base = TINY["llama"]()
    student = disturbed(base)
    record = warm_start(student, base, rows, heal(0), attention_names(student))
    held = range(0, len(rows), 8)
    assert record["held_back"] == len(held) * LENGTH
    assert record["steps"] == record["tokens"] == 0
    wanted = [0.0, 0.0]
    starts = range(0, len(held), 2048 // LENGTH)
    for start in starts:  # the error is a share of the energy of as many rows as a step has
        numbers = held[start : start + 2048 // LENGTH]
        lost, energy = [0.0, 0.0], [0.0, 0.0]
        for number in numbers:
            calls = []
            hooks = [
                module.register_forward_hook(
                    lambda _, args, kwargs, out, to=calls: to.append((args, kwargs, out[0])), with_kwargs=True
                )
                for module in attention_modules(base)
            ]
            item = {name: rows[number][name][None] for name in ("input_ids", "position_ids")}
            with torch.no_grad():
                states = base(**item, use_cache=False, output_hidden_states=True).hidden_states
            for hook in hooks:
                hook.remove()
            for layer, (args, kwargs, out) in enumerate(calls):
                with torch.no_grad():
                    ours = attention_modules(student)[layer](*args, **kwargs)[0]
                rms = states[layer].double().square().mean(-1)
                lost[layer] += ((ours - out).double().square().sum(-1) / rms).sum().item()
                energy[layer] += (out.double().square().sum(-1) / rms).sum().item()
        for layer in (0, 1):
            wanted[layer] += lost[layer] / energy[layer] * len(numbers) / len(held)
    assert errors(record, "before") == pytest.approx(wanted, rel=1e-4)
    assert errors(record, "after") == errors(record, "before")


@pytest.mark.usefixtures("quick_steps")
def test_it_brings_attention_nearer_and_changes_nothing_else(rows):
    base = TINY["llama"]()
    student = disturbed(base)
    trainable = attention_names(student, ("k_proj.weight", "v_proj.weight"))
    trainable |= {"model.layers.0.mlp.up_proj.weight"}  # no attention: not touched
    student.train()
    student.requires_grad_(False)
    before, of_base = state(student), state(base)
    seen = []
    record = warm_start(student, base, rows, heal(), trainable, progress=lambda *facts: seen.append(facts))
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    assert all(layer["after"] < 0.8 * layer["before"] and not layer["kept"] for layer in record["layers"])
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable - {"model.layers.0.mlp.up_proj.weight"}
    assert all(torch.equal(p, of_base[name]) for name, p in base.named_parameters())
    assert student.training
    assert not base.training
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())
    assert all(p.requires_grad for p in base.parameters())
    assert "forward" not in vars(student.model.layers[0])
    assert not any(module._forward_hooks for model in (student, base) for module in model.modules())
    assert record["tokens"] == seen[-1][0] == seen[-1][1] >= 20_000


@pytest.mark.usefixtures("quick_steps")
def test_in_bfloat16_it_comes_as_near(rows):
    """Each step with the weights of the one before: autocast keeps what it has rounded."""
    base, found = TINY["llama"](), []
    for precision in ("float32", "bfloat16"):
        student = disturbed(base)
        record = warm_start(student, base, rows, heal(6000, precision=precision), attention_names(student))
        found.append(sum(errors(record, "after")) / sum(errors(record, "before")))
    assert found[0] != found[1], "it is another way to compute"
    assert found[1] < 0.5
    assert found[1] == pytest.approx(found[0], rel=0.2)


@pytest.mark.usefixtures("quick_steps")
def test_it_finds_the_base_again(rows):
    """Only V is off: a linear fit that has a perfect answer."""
    base = TINY["llama"]()
    student = copy.deepcopy(base)
    for module in attention_modules(student):
        module.v_proj.weight.data += 0.05 * torch.randn(
            module.v_proj.weight.shape, generator=torch.Generator().manual_seed(2)
        )
    record = warm_start(student, base, rows, heal(60_000), attention_names(student, ("v_proj.weight",)))
    assert all(layer["after"] < 1e-3 * layer["before"] for layer in record["layers"])


def test_a_layer_is_fitted_to_the_bases_input_not_to_the_students(rows):
    """Whatever the student's first layer does, the second one's fit is the same to the bit."""
    base, found = TINY["llama"](), []
    for seed in (1, 2):
        student = disturbed(base)
        for p in attention_modules(student)[0].parameters():
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        warm_start(student, base, rows, heal(), attention_names(student))
        found.append([p.detach().clone() for p in attention_modules(student)[1].parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_mlps_and_the_head_of_the_student_do_not_run(rows):
    base = TINY["llama"]()
    student, ran = disturbed(base), []
    for module in [student.lm_head, *(layer.mlp for layer in student.model.layers)]:
        module.register_forward_hook(lambda *_: ran.append(1))
    warm_start(student, base, rows, heal(4000), attention_names(student))
    assert not ran


def test_what_is_right_already_stays_so(rows):
    """Its gradients are rounding errors, and AdamW would make whole steps of them."""
    base = TINY["llama"]()
    student = copy.deepcopy(base)
    record = warm_start(student, base, rows, heal(4000), attention_names(student))
    assert all(layer["kept"] and layer["after"] == layer["before"] < 1e-10 for layer in record["layers"])
    assert all(torch.equal(p, base.get_parameter(name)) for name, p in student.named_parameters())


def test_the_same_run_gives_the_same_weights(rows):
    base, found = TINY["llama"](), []
    for seed in (0, 0, 1):
        student = disturbed(base)
        warm_start(student, base, rows, heal(8000, seed), attention_names(student))
        found.append(state(student))
    same, other = ([torch.equal(found[0][n], found[i][n]) for n in attention_names(base)] for i in (1, 2))
    assert all(same)
    assert not all(other)


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family(family, rows):
    base = TINY[family]()
    student = disturbed(base)
    record = warm_start(student, base, rows, heal(12_000), attention_names(student))
    assert len(record["layers"]) == 2
    assert all(layer["after"] < layer["before"] for layer in record["layers"]), record


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(TINY))
def test_a_base_in_bfloat16(family, precision, rows):
    """The student's weights are float32; errors are those beside the base in float32, roughly. On a GPU: bfloat16."""
    base = TINY[family]()
    student, rounded = disturbed(base), copy.deepcopy(base).bfloat16()
    names = attention_names(student)
    asked = [(base, heal(0)), (rounded, heal(0, precision=precision))]
    exact, rough = (errors(warm_start(student, each, rows, how, names), "before") for each, how in asked)
    assert rough == pytest.approx(exact, rel=0.1)
    assert rough != exact
    record = warm_start(student, rounded, rows, heal(4000, precision=precision), names)
    assert all(layer["after"] < layer["before"] for layer in record["layers"]), record


@pytest.mark.usefixtures("quick_steps")
def test_fewer_kv_heads(rows):
    base = TINY["llama"]()
    student = copy.deepcopy(base)
    surgery.apply("gqa", student, kv_heads=1, method="mean")
    assert (
        attention_modules(student)[0].k_proj.weight.shape[0] * 4 == attention_modules(base)[0].k_proj.weight.shape[0]
    )
    record = warm_start(student, base, rows, heal(60_000), attention_names(student))
    # Four heads that have nothing in common in one: what q and o cannot mend is lost.
    assert all(layer["after"] < 0.8 * layer["before"] for layer in record["layers"]), record


def surgical(base, entry: dict):
    model = copy.deepcopy(base).eval()
    runtime.patch(model, {"layers": [entry, entry]})
    return model


@pytest.mark.usefixtures("quick_steps")
def test_routers_and_sinks(rows):
    """What the surgery added trains: a gate's router, and learned sinks beside a window."""
    base = TINY["llama"]()
    gate = {"kind": "moh", "unit": "head", "shared": [0, 1], "active": 3}
    shapes = {"surgery_router": [6, 64], "surgery_router_bias": [6], "surgery_router_temperature": [1]}
    shapes |= {"surgery_shared_router": [2, 64], "surgery_balance": [2, 64]}
    sinks = {"streaming": [0, 1, 2, 3], "sinks": 0, "window": 4, "parameters": {"surgery_sink_logit": [8, 1]}}
    for entry in ({"gate": gate, "parameters": shapes}, sinks):
        student = surgical(base, entry)
        generator = torch.Generator().manual_seed(4)
        added = {name for name, _ in student.named_parameters() if "surgery_" in name}
        for name in added:
            p = student.get_parameter(name)
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
        before = state(student)
        record = warm_start(student, base, rows, heal(12_000), added)
        assert all(layer["after"] < layer["before"] for layer in record["layers"]), record
        changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
        assert changed <= added
        assert changed


def test_layers_without_anything_to_train_are_passed_over(rows):
    base = TINY["llama"]()
    student = disturbed(base)
    names = {name for name in attention_names(student) if ".layers.1." in name}
    record = warm_start(student, base, rows, heal(4000), names)
    assert [layer["layer"] for layer in record["layers"]] == [1]
    whole = disturbed(base)
    both = warm_start(whole, base, rows, heal(4000), attention_names(whole))
    assert record["layers"][0] == both["layers"][1]


def test_what_cannot_be_done_is_refused(rows):
    base = TINY["llama"]()
    student = disturbed(base)
    names = attention_names(student)
    with pytest.raises(SurgeryError, match="nothing to train"):
        warm_start(student, base, rows, heal(), {"model.layers.0.mlp.up_proj.weight"})
    with pytest.raises(SurgeryError, match="needs 2 rows at least, there is 1"):
        warm_start(student, base, Packed([list(range(3, 3 + LENGTH))], LENGTH), heal(), names)
    with pytest.raises(SurgeryError, match="the model has 2 layers, the base 3"):
        warm_start(student, TINY["llama"](num_hidden_layers=3), rows, heal(), names)
    attention_modules(student)[1].k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SurgeryError, match="layer 1's attention gave numbers that are not finite"):
        warm_start(student, base, rows, heal(), names)
    assert "forward" not in vars(student.model.layers[0])
