"""Weighted GQA from recipe to result: what trains, that the fold is verified and native, and what cannot be mixed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import edit_json
from families import CONVERTIBLE, TINY, one_thread  # noqa: F401
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery as package
from surgery.api import heal as run_heal
from surgery.architecture.anatomy import Anatomy
from surgery.config.heal import Heal
from surgery.errors import SurgeryError
from surgery.healing import trainer as checkpoints
from surgery.healing.callbacks import HealCallback, read
from surgery.healing.parameters import select_trainable
from surgery.healing.plan import HealPlan
from surgery.healing.weighted_gqa import add_mixing, merges, mixing_table, names_while_mixed, orders_of
from surgery.io.model_folder import model_table
from surgery.operations import find
from surgery.report.report import Report

SMALL = ("length=16", "batch_tokens=32", "steps=4", "learning_rate=0.01")
FAST = ("--no-check", "--no-eval", "-q")
KEYS = {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "kv"}


class Killed(BaseException):
    """What stops a run in its process, as a signal would."""


@pytest.fixture
def out(surgery, model, tmp_path):
    assert surgery("apply", "mqa", model, "-o", "out", *FAST).code == 0
    return tmp_path / "out"


@pytest.fixture
def healing(out, model, text, tmp_path):
    def run(to="healed", *more, **options):
        settings = [*SMALL, "mixing=head", "method=parts", f"data={text}", *more]
        given = {"check": False, "evaluate": False, "base": model} | options
        return run_heal(out, output=tmp_path / to, overrides=settings, **given)

    return run


def weights(folder):
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def changed(before, after) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys(), "native: no name of a mixture is left"
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("per", ["head", "channel"])
def test_the_recipe_from_plan_to_a_native_result(surgery, model, text, tmp_path, per):
    asked = (f"heal.data={text}", *(f"heal.{each}" for each in SMALL), "heal.method=parts", f"heal.mixing={per}")
    asked += (f"evaluate.text={text}", "evaluate.windows=1", "evaluate.length=16")
    count = 2 * 2 * 3 * (8 if per == "channel" else 1)  # layers, K and V, heads of the base, channels
    shown = surgery("plan", "wgqa", model, *asked)
    assert f"heal (parts): {count} parameters train" in shown.out
    said = f"{count} of them mix the base's K and V heads (one for each {per}), folded after"
    assert said in " ".join(shown.out.split())
    done = surgery("apply", "wgqa", model, *asked, "-o", "out", "--no-gate")
    assert done.code == 0, done.out + done.err
    report = Report.of(tmp_path / "out").data
    assert report["check"]["passed"]
    assert report["tier"] == "native"
    record = report["heal"]
    assert record["parameters"] == record["mixing"]["weights"] == count
    assert record["mixing"]["moved_logits"] <= 1e-4
    assert record["mixing"]["largest"] > 0.01
    curve = read(tmp_path / "out/healing/metrics.jsonl")
    assert curve[-1]["kl"] < curve[0]["kl"]
    assert surgery("apply", "mqa", model, "-o", "plain", *FAST).code == 0
    assert changed(tmp_path / "plain", tmp_path / "out") == KEYS
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_key_value_heads"] == 1
    card = (tmp_path / "out/README.md").read_text()
    assert "Weights that mix the base's K and V heads were trained and folded" in card
    base, mean, healed = (weights(tmp_path / name) for name in ("model", "plain", "out"))
    for name in KEYS:  # the change is a sum of the base's heads: per channel, as many unknowns as heads
        heads, moved = base[name].view(3, 8, 72), (healed[name] - mean[name]).view(8, 72)
        for channel in range(8):
            best = torch.linalg.lstsq(heads[:, channel].T, moved[channel][:, None]).solution
            left = moved[channel] - (heads[:, channel].T @ best)[:, 0]
            assert left.norm() < 0.02 * moved.norm()  # stored in bfloat16


def test_a_healing_of_its_own_is_the_recipes(surgery, model, text, healing, tmp_path):
    healing()
    asked = (f"heal.data={text}", *(f"heal.{each}" for each in SMALL), "heal.method=parts")
    assert surgery("apply", "wgqa", model, *asked, "-o", "one", *FAST).code == 0
    assert not changed(tmp_path / "one", tmp_path / "healed")
    one, two = (read(tmp_path / name / "healing/metrics.jsonl") for name in ("one", "healed"))
    assert [line["loss"] for line in one] == [line["loss"] for line in two]


def test_the_start_is_the_conversions(healing):
    """A rate of next to nothing: the first loss is that of a healing without mixing, and nothing moves."""
    mixed, plain = healing("a", "learning_rate=1e-12"), healing("b", "learning_rate=1e-12", "mixing=none")
    first = [read(each.folder / "healing/metrics.jsonl")[0]["loss"] for each in (mixed, plain)]
    assert first[0] == first[1]
    assert not changed(mixed.folder.parent / "out", mixed.folder)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_train_the_heads_beside(healing, out, method):
    report = healing("healed", f"method={method}", "gradient_checkpointing=true", "learning_rate=0.002")
    record = report.data["heal"]
    assert record["mixing"]["largest"] > 0.001
    assert record["mixing"]["moved_logits"] <= 1e-4
    assert changed(out, report.folder) > KEYS
    if method == "lora":
        assert record["merge_moved_logits"] < 1e-4
        names = {f"model.layers.N.self_attn.{part}_proj.weight" for part in "kv"}
        assert set(record["in_full"]) == names, "as they are called in the result"


def test_a_layerwise_start_trains_the_mixture(healing, out):
    layers = healing("healed", "warm_start=128").data["heal"]["warm_start"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert any(layer["after"] < layer["before"] for layer in layers)


@pytest.mark.parametrize("method", ["parts", "lora"])
def test_a_kill_is_survived(healing, monkeypatch, tmp_path, method):
    how = (f"method={method}", "steps=8", "checkpoint_every=2")
    healing("whole", *how)
    begun = HealCallback.on_step_begin

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed
        return begun(self, args, state, control, **kwargs)

    monkeypatch.setattr(HealCallback, "on_step_begin", stop)
    with pytest.raises(Killed):
        healing("healed", *how)
    monkeypatch.undo()
    last = checkpoints.complete_checkpoints(tmp_path / "healed.partial/healing")[-1]
    held = load_file(last / checkpoints.WEIGHTS)
    mixing = [tensor for name, tensor in held.items() if name.endswith("surgery_mixing")]
    assert len(mixing) == 4
    assert all(tensor.abs().max() > 0 for tensor in mixing)
    assert not [name for name in held if "heads" in name], "the base's heads are read again"
    healing("healed", *how, resume=True)
    assert not changed(tmp_path / "whole", tmp_path / "healed")
    one, two = (read(tmp_path / name / "healing/metrics.jsonl") for name in ("whole", "healed"))
    assert [(line["step"], line["loss"]) for line in one] == [(line["step"], line["loss"]) for line in two]


def test_layers_of_their_own_number_of_heads(surgery, model, text, tmp_path):
    """Surgical tier: the layer that kept its heads has no weights, and stays."""
    asked = ("gqa", model, "kv_heads=[3, 1]", "method=mean")
    assert surgery("apply", *asked, "-o", "two", *FAST).code == 0
    how = (*SMALL, "mixing=head", "method=parts", f"data={text}", "--base", model, "-o", "healed")
    done = surgery("heal", "two", *how, "--no-eval", "-q")
    assert done.code == 0, done.out + done.err
    assert Report.of(tmp_path / "healed").data["check"]["passed"]
    assert changed(tmp_path / "two", tmp_path / "healed") == {name for name in KEYS if ".1." in name}


def test_in_memory(tiny_llama, text):
    tokenizer, edited = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    base = copy.deepcopy(edited).float()
    package.apply("mqa", edited, tokenizer=tokenizer)
    before = {name: tensor.clone() for name, tensor in edited.state_dict().items()}
    settings = {"data": str(text), "length": 16, "batch_tokens": 32, "steps": 2, "method": "parts", "mixing": "head"}
    report = package.heal(edited, base, settings=settings | {"learning_rate": 0.01}, tokenizer=tokenizer)
    assert report.data["heal"]["mixing"]["weights"] == 12
    after = edited.state_dict()
    assert list(after) == list(before)
    assert {name for name in after if not torch.equal(after[name], before[name])} == KEYS
    again = AutoModelForCausalLM.from_pretrained(tiny_llama)
    recipe = {"version": 1, "name": "x", "operations": [{"op": "gqa", "kv_heads": 1}]}
    package.apply(recipe | {"heal": settings | {"learning_rate": 0.01}}, again, tokenizer=tokenizer)
    assert all(torch.equal(one, two) for one, two in zip(edited.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("heads", "step"), [("frozen", 0), ("frozen", 1), ("train", 1)])
def test_a_training_that_fails_leaves_the_model_as_it_was(tiny_llama, text, monkeypatch, heads, step):
    tokenizer, edited = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    package.apply("mqa", edited, tokenizer=tokenizer)
    before = {name: tensor.clone() for name, tensor in edited.state_dict().items()}

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(HealCallback, "on_step_begin", stop)
    settings = {"data": str(text), "length": 16, "batch_tokens": 32, "steps": 2, "mixing": "head"}
    with pytest.raises(Killed):
        package.heal(edited, tiny_llama, settings=settings | {"mixing_heads": heads}, tokenizer=tokenizer)
    after = edited.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "starcoder2", "olmo2"])
@pytest.mark.parametrize("per", ["head", "channel", "row"])
def test_the_plan_names_what_is_added(family, per):
    base = TINY[family]()
    student = copy.deepcopy(base)
    package.apply("gqa", student, kv_heads=2, method="mean")
    anatomy, table = Anatomy.of(student), model_table(student)
    weights_of = mixing_table(merges(anatomy, Anatomy.of(base)), per, student.config.get_text_config().hidden_size)
    heal = Heal(steps=1, method="full", mixing=per)
    names = select_trainable(heal, anatomy, table | weights_of, frozenset("kv")).parameters
    assert add_mixing(student, base, per) == list(weights_of)
    assert {name: (shape) for name, (_, shape) in weights_of.items()} == {
        name: tuple(student.get_parameter(name).shape) for name in weights_of
    }
    assert set(names_while_mixed(student, names)) == {name for name, _ in student.named_parameters()}
    assert model_table(student).keys() == table.keys() | weights_of.keys(), "mixed weights keep their names"
    assert Anatomy.of(student).layers == anatomy.layers


@pytest.mark.parametrize("family", ["llama", "qwen2", "starcoder2"])
@pytest.mark.parametrize("method", ["full", "lora", "parts"])
def test_the_plan_names_the_heads_that_train(family, method):
    """The base's heads and their weights train in place of K and V."""
    base = TINY[family]()
    student = copy.deepcopy(base)
    package.apply("gqa", student, kv_heads=2, method="mean")
    anatomy, table = Anatomy.of(student), model_table(student)
    added = mixing_table(merges(anatomy, Anatomy.of(base)), "head", student.config.hidden_size, train_heads=True)
    heal = Heal(steps=1, method=method, mixing="head", mixing_heads="train")
    chosen = select_trainable(heal, anatomy, table | added, frozenset("kv"))
    assert set(add_mixing(student, base, train_heads=True)) == set(added)
    assert {name: shape for name, (_, shape) in added.items()} == {
        name: tuple(student.get_parameter(name).shape) for name in added
    }
    assert set(added) <= set(chosen.parameters)
    assert not [name for name in chosen.parameters if name.endswith(("k_proj.weight", "v_proj.weight", "v_proj.bias"))]
    assert not [path for path in chosen.adapted if path.endswith(("k_proj", "v_proj"))]
    if method == "full":
        rest = {name for name in table if not any(part in name for part in ("k_proj", "v_proj"))}
        assert set(chosen.parameters) == rest | set(added)


@pytest.mark.parametrize("method", ["full", "lora", "parts"])
def test_heads_train_jointly_with_their_weights(healing, out, method, monkeypatch, tmp_path):
    """The loss falls, the result is native, a killed run goes on, and weights and heads both moved."""
    how = (f"method={method}", "mixing_heads=train", "learning_rate=0.0005", "steps=6", "checkpoint_every=2")
    begun, kept = HealCallback.on_step_begin, {}

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            model = kwargs["model"]
            kept.update({n: p.detach().clone() for n, p in model.named_parameters() if "surgery_" in n})
            raise Killed
        return begun(self, args, state, control, **kwargs)

    whole = healing("whole", *how)
    monkeypatch.setattr(HealCallback, "on_step_begin", stop)
    with pytest.raises(Killed):
        healing("healed", *how)
    monkeypatch.undo()
    healing("healed", *how, resume=True)
    assert not changed(tmp_path / "whole", tmp_path / "healed")
    assert {name.rpartition(".")[2] for name in kept} == {"surgery_mixing", "surgery_heads"}
    base = weights(tmp_path / "model")
    for name, value in kept.items():
        if name.endswith("mixing"):
            assert (value - 1 / 3).abs().max() > 1e-4
        else:
            plain = name.partition("model.layers")[2].replace(".parametrizations.weight.0.surgery_heads", ".weight")
            assert (value.flatten(0, 2) - base[f"model.layers{plain}"]).abs().max() > 1e-4
    curve = read(whole.folder / "healing/metrics.jsonl")
    assert curve[-1]["kl"] < curve[0]["kl"]
    assert whole.data["heal"]["mixing"]["weights"] == 12
    assert whole.data["heal"]["settings"]["mixing_heads"] == "train"
    assert changed(out, whole.folder) >= KEYS


def test_heads_that_train_need_a_mixture(surgery, refused, model, text, out):
    asked = ("mixing_heads=train", f"data={text}", *SMALL, "-o", "never", "--base", model)
    refused("heal", out, *asked, says=["mixing_heads is read with mixing: head, channel or row"])
    shown = surgery("plan", "wgqa", model, f"heal.data={text}", "heal.mixing_heads=train", "heal.mixing=row").out
    said = "864 of them mix the base's K and V heads (one for each input channel and head), folded after; these heads"
    assert said in " ".join(shown.split())


def test_the_order_of_grouped_heads_is_read_from_the_record(model):
    operation = find("gqa")
    assert operation is not None
    anatomy = Anatomy.of(model)
    paths = [layer.path for layer in anatomy.layers]
    steps = [{"op": "moh"}, {"op": "gqa", "record": {paths[1]: {"kv_head_order": [2, 0, 1]}}}]
    assert orders_of(steps, anatomy) == [[0, 1, 2], [2, 0, 1]]
    assert orders_of([{"op": "gqa", "kv_heads": 1}], anatomy) is None


def test_the_plan_counts(model):
    anatomy = Anatomy.of(model)
    student = AutoModelForCausalLM.from_pretrained(model)
    package.apply("mqa", student)
    after, table, steps = Anatomy.of(student), model_table(student), [{"op": "gqa", "kv_heads": 1}]
    heal = Heal(steps=1, method="parts", loss="ce", data="builtin")
    plain = HealPlan.of(heal.model_copy(update={"warm_start": 8}), after, table, frozenset("kv"), base=anatomy)
    mixing = heal.model_copy(update={"mixing": "head"})
    plan = HealPlan.of(mixing, after, table, frozenset("kv"), base=anatomy, operations=steps)
    assert (plan.trained.count, plan.parameters) == (12, plain.parameters)
    heads = 2 * 2 * 3 * 8 * 72
    saved = 12 * (plain.trained.count - 12)
    assert plan.memory_bytes == plain.memory_bytes - saved + 4 * heads


@pytest.mark.parametrize(
    ("recipe", "asked", "says"),
    [
        (
            "wgqa",
            ("kv_heads=3",),
            ["every layer has the base's 3 KV heads: there is nothing to mix", "heal.mixing=none"],
        ),
        ("duo-attention", ("heal.steps=1", "heal.mixing=head"), ["KV heads that one gqa has merged", "here: none"]),
        ("prune-heads", ("heal.steps=1", "heal.mixing=head"), ["operations that change heads here: prune_heads"]),
        ("wgqa", ("heal.mixing=heads",), ["mixing should be 'none', 'head', 'channel' or 'row'; it is 'heads'"]),
        ("wgqa", ("heal.keep_adapter=true",), ["would not hold what heal.mixing makes"]),
    ],
)
def test_what_cannot_be_mixed_is_said_by_the_plan(surgery, model, recipe, asked, says):
    done = surgery("plan", recipe, model, *asked)
    assert done.code == 2, done.out
    said = " ".join(done.err.split())
    assert not [words for words in says if words not in said], said
    assert "Traceback" not in done.err


def test_fused_projections_and_twice_grouped_heads_are_refused(surgery, tmp_path):
    CONVERTIBLE["phi3"]().save_pretrained(tmp_path / "phi3")
    done = surgery("plan", "wgqa", "phi3", "kv_heads=2")
    assert (done.code, "q, k and v in one matrix" in " ".join(done.err.split())) == (2, True), done.err
    assert "heal.mixing=none: the matrix trains as it is" in " ".join(done.err.split())
    steps = [{"op": "gqa", "kv_heads": 2}, {"op": "gqa", "kv_heads": 1}]
    with pytest.raises(SurgeryError, match="that one gqa has merged"):
        orders_of(steps, None)


def test_a_base_that_is_not_known_is_asked_for(out, surgery, text):
    edit_json(out / "surgery.json", base=json.loads((out / "surgery.json").read_text())["base"] | {"hub_id": None})
    done = surgery("heal", out, *SMALL, f"data={text}", "mixing=head", "loss=ce", "-o", "healed", *FAST)
    assert done.code == 2
    assert "--base MODEL" in done.err
