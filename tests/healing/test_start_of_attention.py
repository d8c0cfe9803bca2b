"""The layer-wise start of all of attention: what it fits with every method, that it is kept, restored and counted."""

from __future__ import annotations

import pytest
import torch
from families import TINY, one_thread  # noqa: F401 (a fixture)
from killed import killed_at
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery as package
from surgery.api import heal as run_heal
from surgery.architecture.anatomy import Anatomy
from surgery.config.heal import Heal
from surgery.errors import SurgeryError
from surgery.healing import layerwise_distillation as fitting
from surgery.healing import run as running
from surgery.healing import trainer as training
from surgery.healing.parameters import select_trainable
from surgery.healing.plan import HealPlan
from surgery.io.model_folder import model_table

SMALL = ("length=16", "batch_tokens=32", "steps=4", "checkpoint_every=2", "learning_rate=0.01")
START = ("warm_start=640", "warm_start_of=attention")
QUICK = ("--no-check", "--no-eval", "-q")
ATTENTION = {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qkvo"}


@pytest.fixture(autouse=True)
def small_steps():
    """Ten steps where a model that is not tiny takes one."""
    with pytest.MonkeyPatch.context() as patch:  # one that no test undoes
        patch.setattr(fitting, "STEP_TOKENS", 64)
        yield


@pytest.fixture
def out(surgery, model, tmp_path):
    assert surgery("apply", "mqa", model, "-o", "out", *QUICK).code == 0
    return tmp_path / "out"


@pytest.fixture
def healing(out, model, text, tmp_path):
    def run(to="healed", *more, **options):
        asked = [*SMALL, *START, f"data={text}", *more]
        given = {"check": False, "evaluate": False, "base": model} | options
        return run_heal(out, output=tmp_path / to, overrides=asked, **given)

    return run


def of_layers(ends):
    return {f"model.layers.{layer}.self_attn.{end}" for layer in (0, 1) for end in ends}


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def started(heal, model, rewritten=frozenset("kv"), more=None):
    anatomy = Anatomy.of(model)
    return select_trainable(heal, anatomy, model_table(model) | (more or {}), rewritten)


def settings(method="lora", **fields):
    return Heal(**({"method": method, "steps": 1, "warm_start": 64, "warm_start_of": "attention"} | fields))


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_parameter_of_attention_is_fitted_in_every_family(family):
    """Against the module's own parameters; what a surgery added, and sinks, are no projections."""
    model = TINY[family]()
    names = {name for name, _ in model.named_parameters()}
    paths = tuple(f"{layer.path}." for layer in Anatomy.of(model).layers)
    inside = {name for name in names if name.startswith(paths) and not name.endswith("sinks")}
    for method in ("lora", "full"):
        trained = started(settings(method), model, frozenset("kv"))
        fitted = {*trained.parameters, *trained.started} & inside
        assert fitted == inside, inside - fitted
        assert not set(trained.parameters) & set(trained.started)
    assert not started(settings(), model, frozenset("kv")).count > sum(p.numel() for p in model.parameters())
    assert not started(settings(warm_start_of="trained"), model).started
    assert started(settings(warm_start_of="trained"), model).count == started(settings(), model).count


def test_freeze_holds_for_the_start_too():
    model = TINY["llama"]()
    trained = started(settings(freeze=["*o_proj*"]), model)
    assert set(trained.started) == of_layers(["q_proj.weight"])
    parts = started(settings("parts", freeze=["*.q_proj.*"]), model)
    assert set(parts.started) == of_layers(["o_proj.weight"])
    with pytest.raises(SurgeryError, match="matches nothing that would train"):
        started(settings("parts", freeze=["*.q_proj.*"], warm_start_of="trained"), model)


def test_with_lora_it_fits_what_later_trains_by_updates(healing, out, tmp_path):
    """The start is nearer than that of K and V alone; without a rate, its weights are the result's."""
    record = healing("healed", "learning_rate=1e-12").data["heal"]
    assert changed(out, tmp_path / "healed") == ATTENTION
    assert set(record["in_full"]) == {f"model.layers.N.self_attn.{part}_proj.weight" for part in "kv"}
    assert set(record["started"]["names"]) == {f"model.layers.N.self_attn.{part}_proj.weight" for part in "qo"}
    assert record["started"]["parameters"] == 2 * 2 * 72 * 72
    alone = healing("alone", "learning_rate=1e-12", "warm_start_of=trained").data["heal"]
    assert "started" not in alone
    assert alone["parameters"] == record["parameters"], "what trains is the same"
    found = [sum(layer["after"] for layer in each["warm_start"]["layers"]) for each in (record, alone)]
    assert found[0] < found[1]
    card = (tmp_path / "healed/README.md").read_text()
    assert "which also changed 20,736 other parameters" in card
    assert "which also changed" not in (tmp_path / "alone/README.md").read_text()


@pytest.mark.parametrize("method", ["lora", "parts"])
@pytest.mark.parametrize("step", [1, 3])
def test_it_goes_on_to_the_same_weights(healing, monkeypatch, tmp_path, method, step):
    """A checkpoint lacks what only the start changed; it is read, and not fitted again."""
    healing("whole", f"method={method}")
    with killed_at(step):
        healing("healed", f"method={method}")
    calls, fit = [], running.warm_start
    monkeypatch.setattr(running, "warm_start", lambda *args, **kwargs: calls.append(1) or fit(*args, **kwargs))
    record = healing("healed", f"method={method}", resume=True).data["heal"]
    assert record["resumed"] == (step == 3)
    assert len(calls) == (step == 1), "the first checkpoint is of step 2"
    one, two = (weights(tmp_path / name) for name in ("healed", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in (tmp_path / "healed/healing").iterdir()) == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize("way", [{"method": "lora"}, {"method": "parts"}, {"mixing": "head"}], ids=str)
def test_a_failed_healing_in_memory_leaves_the_model_as_it_was(tiny_llama, text, monkeypatch, way):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    package.apply("mqa", model, tokenizer=tokenizer)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    moved = []

    def broken(self, *args, **kwargs):
        moved.append(not torch.equal(_weight(self.plain), before["model.layers.0.self_attn.q_proj.weight"]))
        self._stop("the loss is not a number")

    monkeypatch.setattr(training.HealTrainer, "compute_loss", broken)
    asked = {"length": 16, "batch_tokens": 32, "steps": 2, "data": str(text), "warm_start": 640}
    with pytest.raises(SurgeryError, match="not a number in step 1"):
        package.heal(model, tiny_llama, tokenizer=tokenizer, warm_start_of="attention", **asked, **way)
    assert moved == [True], "the start had changed q"
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def _weight(model):
    names = ("q_proj.weight", "q_proj.base_layer.weight")
    return next(p for name, p in model.named_parameters() if "layers.0." in name and name.endswith(names)).detach()


@pytest.mark.parametrize("method", ["parts", "lora"])
def test_mixed_heads_are_fitted_as_mixtures(healing, out, method, tmp_path):
    """q and o are fitted, and of K and V what trains."""
    record = healing("healed", f"method={method}", "mixing=head", "learning_rate=1e-12").data["heal"]
    assert set(record["started"]["names"]) == {f"model.layers.N.self_attn.{part}_proj.weight" for part in "qo"}
    assert changed(out, tmp_path / "healed") >= of_layers(["q_proj.weight", "o_proj.weight"])
    assert record["mixing"]["largest"] > 0
    assert record["mixing"]["moved_logits"] <= 1e-4


def test_with_parts_k_and_v_change_by_their_mixture_alone(tiny_llama, text):
    """In float32, by least squares over the base's heads."""
    base, student = (AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    package.apply("mqa", student, tokenizer=tokenizer)
    old = {name: tensor.clone() for name, tensor in student.named_parameters()}
    asked = {"length": 16, "batch_tokens": 32, "steps": 1, "data": str(text), "learning_rate": 1e-12}
    asked |= {"mixing": "head", "method": "parts", "warm_start": 1280, "warm_start_of": "attention"}
    package.heal(student, base, tokenizer=tokenizer, **asked)
    for name in of_layers(["k_proj.weight", "v_proj.weight"]):
        heads = base.get_parameter(name).detach().view(3, -1).T
        moved = (student.get_parameter(name).detach() - old[name]).flatten()
        left = moved - heads @ torch.linalg.lstsq(heads, moved[:, None]).solution[:, 0]
        assert moved.norm() > 1e-4
        assert left.norm() <= 1e-3 * moved.norm(), "a sum of the base's heads"
    for name in of_layers(["q_proj.weight", "o_proj.weight"]):
        assert not torch.equal(student.get_parameter(name), old[name])


def test_the_plan_counts_it(surgery, model):
    asked = ("heal.method=lora", "heal.warm_start=64", "heal.length=64")
    shown = " ".join(surgery("plan", "gqa-distill", model, *asked, "heal.warm_start_of=attention").out.split())
    assert "heal: the layer-wise start changes 20,736 further parameters of attention" in shown
    assert "further parameters" not in surgery("plan", "gqa-distill", model, *asked).out
    base = Anatomy.of(model)
    table = model_table(AutoModelForCausalLM.from_pretrained(model))
    plans = [
        HealPlan.of(settings(**more), base, table, frozenset(), base=base)
        for more in ({}, {"method": "full", "warm_start_of": "trained"})
    ]
    of_attention = sum(p[1][0] * p[1][1] for name, p in table.items() if "self_attn" in name)
    assert plans[0].fitted == plans[0].started == plans[1].fitted == of_attention
    assert plans[0].memory["layer-wise start"] == max(0, 12 * (of_attention - plans[0].trained.count))
    assert plans[0].to_dict()["started"] == of_attention
    assert plans[1].started == plans[1].memory["layer-wise start"] == 0
    assert plans[0].disk_bytes == 4 * of_attention + plans[0].checkpoint_bytes * 3
    assert "started" not in plans[1].to_dict()


def test_it_needs_a_start_and_no_adapter_file():
    with pytest.raises(ValueError, match=r"heal.warm_start_of is read with warm_start"):
        Heal(method="lora", steps=1, warm_start_of="attention")
    with pytest.raises(ValueError, match=r"an adapter file would not hold what heal.warm_start makes of attention"):
        settings(keep_adapter=True)
    with pytest.raises(ValueError, match="warm_start_of"):
        settings(warm_start_of="all")
    assert "warm_start_of" not in Heal(method="lora", steps=1, warm_start=64).identity()
    assert settings().identity()["warm_start_of"] == "attention"


def test_lora_without_a_merge_can_start_now(surgery, model, text, tmp_path):
    """A split of heads rewrites nothing: with lora there was nothing to fit (see test_resume)."""
    assert surgery("apply", "streaming", model, "evaluate.length=512", "-o", "split", *QUICK).code == 0
    asked = ("heal", "split", *SMALL, *START, f"data={text}", "--base", model, "-o", "healed", *QUICK)
    done = surgery(*asked)
    assert done.code == 0, done.err
