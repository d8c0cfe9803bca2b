"""The Python API in scripts that are odd: models in other states, calls in another order, objects of a user's own."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import threading
import warnings
from pathlib import Path
from typing import Literal

import numpy
import pytest
import torch
import transformers
from families import TINY
from tokenizers_of_bytes import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery import SurgeryError

MERGE = {"op": "gqa", "kv_heads": 2, "method": "mean"}
TURNED = MERGE | {"align": "procrustes", "grouping": "similarity"}
SPLIT = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 4}
GAMMA = {"op": "sink_calibration", "method": "zero_tuning", "gamma": 2.0}
GATES = {"op": "moh", "router": "random", "active_ratio": 0.5, "shared_ratio": 0.0, "seed": 3}
MASK = {"op": "head_mask", "values": {0: {1: 0.0}}}
STEPS = {"merged": MERGE, "turned": TURNED, "split": SPLIT, "weighted": GAMMA, "gated": GATES, "masked": MASK}
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(3))
FEW = {"windows": 1, "length": 32}


def recipe(*steps, **more) -> dict:
    return {"version": 1, "name": "x", "operations": list(steps), "evaluate": None} | more


def logits(model, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- states of a model ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_a_model_that_trains(name):
    """Its mode stays, and what was frozen stays frozen; the weights are those of a model in eval mode."""
    model, other = TINY["llama"]().train(), TINY["llama"]()
    frozen = {key for key, parameter in model.named_parameters() if "mlp" in key or "q_proj" in key}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key not in frozen)
    surgery.apply(recipe(STEPS[name]), model)
    surgery.apply(recipe(STEPS[name]), other)
    assert all(module.training for module in model.modules())
    assert {key for key, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert same(state(model), state(other))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(name, way):
    """A copy says the same, and stays as it is when the first one is changed."""
    model = TINY["llama"]()
    surgery.apply(recipe(STEPS[name]), model)
    expected = logits(model)
    if way == "deepcopy":
        made = copy.deepcopy(model)
    elif way == "pickle":
        made = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        made = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.config.surgery = None
    assert torch.equal(logits(made), expected)
    cached = made.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=299)
    assert torch.equal(cached, made.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0,
                                             eos_token_id=299))  # fmt: skip


@pytest.mark.parametrize("name", ["merged", "split", "gated"])
def test_hooks_of_a_users_own(name):
    """What was hooked to modules before is called after as well."""
    model, called = TINY["llama"](), []
    for path in ("model.layers.0.self_attn", "model.layers.1.self_attn.k_proj", "model.layers.0.self_attn.o_proj", ""):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda *_, path=path: called.append(path))
        module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
    logits(model)
    before, called[:] = sorted(called), []
    surgery.apply(recipe(STEPS[name]), model)
    logits(model)
    assert sorted(called) == before


@pytest.mark.parametrize("name", STEPS)
def test_a_model_that_was_compiled_in_place(name):
    """Compiled and run before its surgery, it says afterwards what a model says that was never compiled."""
    model, other = TINY["llama"](), TINY["llama"]()
    model.compile(backend="eager")
    logits(model)
    for each in (model, other):
        surgery.apply(recipe(STEPS[name]), each)
    assert torch.allclose(logits(model, use_cache=False), logits(other, use_cache=False), atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", STEPS)
def test_double_precision(name):
    """Every term is computed in float64, where the model is: float32 would be off by 10^-7."""
    model = TINY["llama"]().double()
    other = copy.deepcopy(model)
    step = {"merged": MERGE | {"kv_heads": 4}, "turned": TURNED | {"kv_heads": 4}, "split": SPLIT | {"window": 64},
            "weighted": GAMMA | {"gamma": 1.0}, "gated": GATES | {"active_ratio": 1.0, "shared_ratio": 0.0},
            "masked": MASK | {"values": {}}}[name]  # fmt: skip
    surgery.apply(recipe(step), model)
    assert model.dtype == torch.float64
    assert (logits(model) - logits(other)).abs().max() <= 1e-12 * logits(other).std()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_another_default_dtype(name, dtype):
    """What a script has as its default changes no weight."""
    model, other = TINY["llama"](), TINY["llama"]()
    surgery.apply(recipe(STEPS[name]), other)
    torch.set_default_dtype(dtype)
    try:
        surgery.apply(recipe(STEPS[name]), model)
        got = logits(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(state(model), state(other))
    assert torch.allclose(got, logits(other), atol=1e-5)


def spoilt(how: str):
    model = TINY["llama"]()
    owner = model.model.layers[1].self_attn
    if how == "weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.weight_norm(owner.k_proj)
    elif how == "pruned":
        import torch.nn.utils.prune as prune

        prune.l1_unstructured(owner.v_proj, "weight", amount=0.5)
    elif how == "quantised":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            owner.q_proj = torch.ao.quantization.quantize_dynamic(
                torch.nn.Sequential(owner.q_proj), {torch.nn.Linear}, dtype=torch.qint8
            )[0]
    elif how == "one weight for two":
        owner.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight
    elif how == "one layer twice":
        model.model.layers[1] = model.model.layers[0]
    elif how == "a layer less":
        del model.model.layers[1]
    elif how == "no projection":
        owner.k_proj = None
    elif how == "another shape":
        owner.k_proj = torch.nn.Linear(64, 40, bias=False)
    elif how == "a buffer":
        weight = owner.k_proj.weight.detach()
        del owner.k_proj.weight
        owner.k_proj.register_buffer("weight", weight)
    return model


@pytest.mark.parametrize("name", ["merged", "masked", "split"])
@pytest.mark.parametrize(
    "how",
    ["weight_norm", "pruned", "quantised", "one weight for two", "one layer twice", "a layer less", "no projection",
     "another shape", "a buffer"],
)  # fmt: skip
def test_models_that_were_changed_by_hand(how, name):
    """They are refused in one sentence, and stay as they are."""
    model = spoilt(how)
    before, kind = state(model), type(model)
    with pytest.raises(SurgeryError):
        surgery.apply(recipe(STEPS[name]), model)
    assert type(model) is kind
    assert same(state(model), before)


class Mine(transformers.LlamaForCausalLM):
    """A user's own class."""


def test_a_class_of_a_users_own(tmp_path):
    """Weights are rewritten; what needs a class that Transformers can find again is refused, and nothing changes."""
    model = Mine(TINY["llama"]().config)
    before = state(model)
    with pytest.raises(SurgeryError, match="Mine is not a causal language model of Transformers"):
        surgery.apply(recipe(SPLIT), model)
    assert type(model) is Mine
    assert same(state(model), before)
    report = surgery.apply(recipe(MERGE), model)
    assert type(model) is Mine
    surgery.save(model, tmp_path / "out", report)
    assert surgery.load(tmp_path / "out").config.num_key_value_heads == 2


# --- what a script has set ------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_generators_of_a_script(base, tmp_path, name):
    """Random numbers that a script draws after a surgery, a check or a score are those that it would have drawn."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    surgery.apply(recipe(STEPS[name]), model)
    surgery.apply(recipe(STEPS[name]), base, output=tmp_path / "out", check=False, evaluate=False)
    surgery.load(tmp_path / "out")
    surgery.evaluate(model, base, tokenizer=byte_tokenizer(), **FEW)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(numpy.random.get_state())) == before[1:]


@pytest.mark.parametrize("name", ["turned", "split", "gated"])
def test_warnings_that_are_errors(base, tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch|importlib|huggingface_hub|transformers")
        warnings.filterwarnings("ignore", message=".*(swigvarlink|SwigPy|past_key_values).*")
        model = AutoModelForCausalLM.from_pretrained(base)
        surgery.apply(recipe(STEPS[name]), model)
        surgery.apply(recipe(STEPS[name]), base, output=tmp_path / "out", check=False, evaluate=False)
        surgery.evaluate(tmp_path / "out", base, **FEW)


def test_settings_of_a_script_stay(base, tmp_path):
    transformers.logging.set_verbosity(transformers.logging.DEBUG)
    threads = torch.get_num_threads()
    try:
        surgery.apply(recipe(SPLIT), base, output=tmp_path / "out", check=False, evaluate=False)
        surgery.evaluate(tmp_path / "out", base, **FEW)
        assert transformers.logging.get_verbosity() == transformers.logging.DEBUG
        assert torch.get_num_threads() == threads
        assert torch.get_default_dtype() == torch.float32
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("name", STEPS)
def test_threads_with_a_model_each(base, tmp_path, name):
    """Four threads edit a model each, and convert a folder where no model is loaded for it (Transformers loads only
    one at a time): each result is that of one thread alone."""
    expected, found, faults = TINY["llama"](), {}, []
    surgery.apply(recipe(STEPS[name]), expected)
    models = [TINY["llama"]() for _ in range(4)]

    def work(number: int) -> None:
        try:
            surgery.apply(recipe(STEPS[name]), models[number])
            out = tmp_path / f"out{number}"
            surgery.apply(recipe(TURNED), base, output=out, check=False, evaluate=False)
            found[number] = state(models[number]), json.loads((out / "surgery.json").read_text())["files"]
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    assert all(same(weights, state(expected)) for weights, _ in found.values())
    assert len({json.dumps(files) for _, files in found.values()}) == 1


# --- calls in another order -----------------------------------------------------------------------


def test_the_base_file_is_not_written_through_memory(base):
    """Weights are changed in place, and may be maps of the file that they were read from."""
    before = (base / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    surgery.apply(recipe(MASK, TURNED | {"kv_heads": 4}), model)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    assert (base / "model.safetensors").read_bytes() == before


def test_apply_twice_and_save_twice(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    first = surgery.apply(recipe(MERGE), model)
    second = surgery.apply(recipe(SPLIT), model)
    with pytest.raises(SurgeryError, match="the report is of"):
        surgery.save(model, tmp_path / "a", first)
    with pytest.raises(SurgeryError, match=r"sets the visibility .* already"):
        surgery.apply(recipe(SPLIT), model)
    surgery.save(model, tmp_path / "a", second)
    with pytest.raises(SurgeryError, match="OUT exists"):
        surgery.save(model, tmp_path / "a", second)
    again = surgery.save(model, tmp_path / "a", second, overwrite=True)
    other = surgery.save(model, str(tmp_path / "b"), second)
    assert again.data["files"] == other.data["files"]
    assert [entry["recipe"]["name"] for entry in other.data["history"]] == ["x"]
    assert torch.equal(logits(surgery.load(tmp_path / "a")), logits(surgery.load(tmp_path / "b")))
    assert torch.allclose(logits(surgery.load(tmp_path / "a")), logits(model.eval()), atol=1e-4)


def test_save_after_a_surgery_that_failed(tmp_path):
    model = TINY["llama"]()
    before = state(model)
    report = surgery.apply(recipe(MERGE | {"kv_heads": 4}), model)
    with pytest.raises(SurgeryError):
        surgery.apply(recipe(SPLIT | {"protect_layers": [7]}), model)
    surgery.save(model, tmp_path / "out", report)
    assert same(state(surgery.load(tmp_path / "out")), before)


def hold_itself(data: dict) -> None:
    data["mine"] = data


EDITS = {
    "emptied": lambda data: data.clear(),
    "without a base": lambda data: data.pop("base"),
    "without a recipe": lambda data: data.pop("recipe"),
    "a recipe of nothing": lambda data: data.update(recipe=None),
    "another format": lambda data: data.update(format=2),
    "changes that are no list": lambda data: data["plan"].update(changes=5),
    "seeds that are no mapping": lambda data: data.update(seeds=5),
    "a record that is no mapping": lambda data: data["operations"][0].update(record=5),
    "another's origin": lambda data: data.update(in_memory={"heads": 5}),
    "a tensor": lambda data: data.update(mine=torch.ones(2)),
    "a set": lambda data: data["plan"].update(mine={1, 2}),
    "half a letter": lambda data: data.update(mine="\ud800"),
    "half a letter as a key": lambda data: data.update(mine={"\ud800": 1}),
    "NaN": lambda data: data.update(mine=[float("nan")]),
    "a number of 5,000 digits": lambda data: data.update(mine=10**5000),
    "itself": hold_itself,
}


@pytest.mark.parametrize("name", EDITS)
def test_reports_that_were_edited(tmp_path, name):
    """What cannot be written is refused in one sentence, and nothing is left on the disk."""
    model = TINY["llama"]()
    report = surgery.apply(recipe(MERGE), model)
    EDITS[name](report.data)
    with pytest.raises(SurgeryError):
        surgery.save(model, tmp_path / "out", report)
    assert not list(tmp_path.iterdir())


def test_a_saved_report_that_is_edited(tmp_path):
    """What cannot be written leaves record and card as they were."""
    model = TINY["llama"]()
    surgery.save(model, tmp_path / "out", surgery.apply(recipe(MERGE), model))
    report = surgery.Report.of(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in report.folder.iterdir()}
    report.data |= {"mine": float("inf"), "surgery_version": "another"}
    with pytest.raises(SurgeryError, match="mine is inf"):
        report.save()
    assert {path.name: path.read_bytes() for path in report.folder.iterdir()} == before


NOTES = {
    "words": ({"seed": 5, "words": "\u03b1\n"}, {"seed": 5, "words": "\u03b1\n"}),
    "numbers as keys": ({10: 1, 2: (1.5,), "a": None}, {"10": 1, "2": [1.5], "a": None}),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_note_in_a_report_is_kept(tmp_path, name):
    model, (note, expected) = TINY["llama"](), NOTES[name]
    report = surgery.apply(recipe(MERGE), model)
    report.data["mine"] = note
    surgery.save(model, tmp_path / "out", report)
    assert surgery.Report.of(tmp_path / "out").data["mine"] == expected
    assert surgery.check(tmp_path / "out").intact


def test_a_recipe_that_changes_while_it_is_carried_out(base, tmp_path):
    """What was planned is done and recorded."""
    data = recipe(MERGE)

    def spoil(*_):
        data["operations"][0]["kv_heads"] = 1
        data["operations"].append(SPLIT)
        data["name"] = "other"

    report = surgery.apply(data, base, output=tmp_path / "out", check=False, evaluate=False, on_plan=spoil)
    assert report.data["recipe"]["name"] == "x"
    assert surgery.load(tmp_path / "out").config.num_key_value_heads == 2


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("which", ["on_plan", "progress"])
def test_callbacks_that_raise(base, tmp_path, error, which):
    """Their error comes out; what is left is nothing, or goes on with resume=True."""

    def call(*_):
        raise error("mine")

    with pytest.raises(error, match="mine"):
        surgery.apply(recipe(MERGE), base, output=tmp_path / "out", check=False, evaluate=False, **{which: call})
    assert not (tmp_path / "out").exists()
    report = surgery.apply(recipe(MERGE), base, output=tmp_path / "out", check=False, evaluate=False, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
    assert report.folder == tmp_path / "out"


# --- arguments ------------------------------------------------------------------------------------

ARGUMENTS = {
    "overrides None": {"overrides": None},
    "overrides of numbers": {"overrides": [5]},
    "overrides a number": {"overrides": 5},
    "overrides of bytes": {"overrides": [b"kv_heads=2"]},
    "overrides that are bytes": {"overrides": b"kv_heads=2"},
    "progress a number": {"progress": 5},
    "on_plan a text": {"on_plan": "plan"},
    "engine None": {"engine": None},
    "engine a number": {"engine": 5},
    "an unknown field": {"kv_head": 2},
    "a field of another kind": {"kv_heads": object()},
    "a Path of no method": {"method": Path("mean/of")},
    "an array as a field": {"kv_heads": numpy.int64(2)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_another_kind(base, tmp_path, name):
    options = {"output": tmp_path / "out", "check": False, "evaluate": False} | ARGUMENTS[name]
    with pytest.raises(SurgeryError):
        surgery.apply(recipe(MERGE), base, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("engine", ["streaming", "loaded", "streeming"])
def test_a_model_in_memory_has_no_engine(engine):
    model = TINY["llama"]()
    with pytest.raises(SurgeryError, match="engine: for a name or folder"):
        surgery.apply(recipe(MERGE), model, engine=engine)
    assert not hasattr(model.config, "surgery")


def test_a_path_counts_as_its_text(base):
    assert surgery.plan(recipe(MERGE), base, method=Path("mean")).recipe.operations[0].method == "mean"


OF_HEAL = {
    "overrides a text": {"overrides": "steps=1"},
    "progress a number": {"progress": 5},
    "on_plan a text": {"on_plan": "plan"},
    "a tensor as a field": {"steps": torch.ones(1)},
}


@pytest.mark.parametrize("name", OF_HEAL)
def test_arguments_of_heal_of_another_kind(name):
    model = TINY["llama"]()
    surgery.apply(recipe(MERGE), model)
    with pytest.raises(SurgeryError) as fault:
        surgery.heal(model, TINY["llama"](), tokenizer=byte_tokenizer(), **OF_HEAL[name])
    assert fault.value.where in ("overrides", "progress", "on_plan", "steps")


def test_one_override_as_a_text(base):
    """It is taken as the one that it is, or the sentence says that a list is wanted."""
    said = ""
    try:
        made = surgery.plan(recipe(MERGE), base, overrides="kv_heads=1")
    except SurgeryError as fault:
        said = str(fault)
    assert "'k'" not in said
    assert said or made.recipe.operations[0].kv_heads == 1


LOADS = {
    "half": {"dtype": torch.float16},
    "half as text": {"dtype": "float16"},
    "a device": {"device_map": "cpu"},
    "a device by module": {"device_map": {"": "cpu"}},
    "with what was loaded": {"output_loading_info": True},
    "a word that nobody knows": {"bogus": 1},
    "a dtype that nobody knows": {"dtype": "float7"},
    "flash": {"attn_implementation": "flash_attention_2"},
    "eager": {"attn_implementation": "eager"},
    "a subfolder": {"subfolder": "there"},
    "a revision": {"revision": "there"},
    "no safetensors": {"use_safetensors": False},
    "tensor parallel": {"tp_plan": "auto"},
    "a config of another": {"config": transformers.LlamaConfig(num_hidden_layers=1)},
    "a variant": {"variant": "fp16"},
    "weights of one's own": {"state_dict": {}},
    "one head for all": {"num_key_value_heads": 1},
    "other positions": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    for name, step in (("native", MERGE), ("surgical", SPLIT)):
        surgery.apply(recipe(step), tiny, output=root / name, check=False, evaluate=False)
    return root


@pytest.mark.parametrize("kind", ["native", "surgical"])
@pytest.mark.parametrize("name", LOADS)
def test_arguments_of_load(checkpoints, kind, name):
    """A model of these weights, or one sentence; never one whose surgery fell off."""
    try:
        got = surgery.load(checkpoints / kind, **LOADS[name])
    except (SurgeryError, ValueError):
        assert name not in ("half", "half as text", "a device", "a device by module", "with what was loaded")
        return
    model = got[0] if name == "with what was loaded" else got
    assert model.dtype == (torch.float16 if name.startswith("half") else torch.float32)
    assert hasattr(model, "make_cache") == (kind == "surgical")
    if name != "other positions":
        expected = logits(surgery.load(checkpoints / kind))
        assert (logits(model).float() - expected).abs().max() <= (0.05 if name.startswith("half") else 1e-5)


# --- scoring --------------------------------------------------------------------------------------


def test_a_model_against_itself(base):
    """The same object, two objects and a folder: no distance, and modes and grads as they were."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).train(), AutoTokenizer.from_pretrained(base)
    other = copy.deepcopy(model)
    figures = [surgery.evaluate(model, each, tokenizer=tokenizer, **FEW) for each in (model, other, base, str(base))]
    for result in figures:
        assert result.kl["mean"] == 0.0
        assert result.top1_agreement == 1.0
        assert result.out.perplexity == figures[0].out.perplexity
    assert model.training
    assert other.training
    assert all(parameter.grad is None for parameter in model.parameters())


TOKENIZERS = {
    "cut to five tokens": lambda t: t.backend_tokenizer.enable_truncation(5),
    "filled to a thousand": lambda t: t.backend_tokenizer.enable_padding(length=1000),
    "made for ten tokens": lambda t: setattr(t, "model_max_length", 10),
    "padding on the left": lambda t: setattr(t, "padding_side", "left"),
    "cutting on the left": lambda t: setattr(t, "truncation_side", "left"),
    "no end": lambda t: setattr(t, "eos_token", None),
    "no begin": lambda t: setattr(t, "bos_token", None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_were_set(base, name):
    """Settings for batches change no figure of a text."""
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = surgery.evaluate(model, tokenizer=byte_tokenizer(), **FEW)
    tokenizer = byte_tokenizer()
    TOKENIZERS[name](tokenizer)
    result = surgery.evaluate(model, tokenizer=tokenizer, **FEW)
    assert result.out.perplexity == expected.out.perplexity
    assert result.text["tokens"] == expected.text["tokens"]


# --- operations of a user's own -------------------------------------------------------------------


class Odd(surgery.Operation):
    """An operation whose members a test replaces."""

    op: Literal["odd"] = "odd"

    def plan(self, anatomy):
        return surgery.PlannedChange(anatomy, ("something",))

    def apply(self, model, context):
        return {}


@pytest.fixture
def odd(monkeypatch):
    monkeypatch.setitem(__import__("surgery.operations", fromlist=["x"]).BUILTIN, "odd", "odd:Odd")
    import sys
    import types

    module = types.ModuleType("surgery.operations.odd")
    module.Odd = Odd
    monkeypatch.setitem(sys.modules, "surgery.operations.odd", module)

    def set_member(name, value):
        monkeypatch.setattr(Odd, name, value)

    return set_member


def raises(*_):
    raise ValueError("mine")


def planned(**members):
    return lambda self, anatomy: surgery.PlannedChange(**({"after": anatomy, "lines": ("something",)} | members))


MEMBERS = {
    "problems as one text": ("problems", lambda self, anatomy: "it is too hot"),
    "problems that are None": ("problems", lambda self, anatomy: None),
    "problems that are numbers": ("problems", lambda self, anatomy: [5]),
    "problems before as one text": ("problems_before", lambda self, anatomy: "it is too hot"),
    "a plan of nothing": ("plan", lambda self, anatomy: None),
    "a plan without lines": ("plan", planned(lines=None)),
    "a plan of one line as a text": ("plan", planned(lines="something")),
    "a plan of another tier": ("plan", planned(tier="mine")),
    "a plan of no time": ("plan", planned(seconds=None)),
    "a plan of a config": ("plan", lambda self, anatomy: surgery.PlannedChange(anatomy.config, ("something",))),
    "a record that is None": ("apply", lambda self, model, context: None),
    "a record that is a list": ("apply", lambda self, model, context: [1]),
    "a record with a tensor": ("apply", lambda self, model, context: {"x": torch.ones(1)}),
    "a record with numbers as keys": ("apply", lambda self, model, context: {0: {1: 2.0}, 10: 1, 2: 3}),
    "a record that is NaN": ("apply", lambda self, model, context: {"x": float("nan")}),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_of_another_form(odd, base, tmp_path, name):
    """The author is told what is wrong in one sentence, or the result can be read again."""
    member, value = MEMBERS[name]
    odd(member, value)
    try:
        surgery.apply(recipe({"op": "odd"}), base, output=tmp_path / "out", check=False, evaluate=False)
    except SurgeryError as fault:
        said = str(fault)
        assert {path.name for path in tmp_path.iterdir()} == {"base"}
    else:
        said = "odd"
        assert surgery.Report.of(tmp_path / "out").data["operations"]
        assert surgery.Report.of(tmp_path / "out").intact
        json.loads((tmp_path / "out/surgery.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert "odd" in said or "too hot" in said


def test_a_record_of_another_form_leaves_a_model_in_memory_as_it_was(odd, monkeypatch):
    odd("apply", lambda self, model, context: {"x": float("inf")})
    model = TINY["llama"]()
    before = state(model)
    monkeypatch.setattr(Odd, "term", "bias")
    with pytest.raises(SurgeryError, match="odd: its record is no JSON: x is inf") as fault:
        surgery.apply(recipe(SPLIT, {"op": "odd"}), model)
    assert "tell its authors" in fault.value.fix
    assert type(model) is transformers.LlamaForCausalLM
    assert same(state(model), before)


@pytest.mark.parametrize("member", ["problems", "plan", "apply"])
def test_members_that_raise(odd, base, tmp_path, member):
    """Their own error comes out; the model in memory and the folder are as they were."""
    odd(member, raises)
    model = AutoModelForCausalLM.from_pretrained(base)
    before, kind = state(model), type(model)
    with pytest.raises((ValueError, SurgeryError), match="mine"):
        surgery.apply(recipe(MASK, {"op": "odd"}) if member != "apply" else recipe({"op": "odd"}), model)
    assert type(model) is kind
    assert same(state(model), before)
    with pytest.raises((ValueError, SurgeryError), match="mine"):
        surgery.apply(recipe({"op": "odd"}), base, output=tmp_path / "out", check=False, evaluate=False)
    assert not (tmp_path / "out").exists()


def test_a_class_without_a_name_for_recipes():
    class Nameless(surgery.Operation):
        x: int = 1

    with pytest.raises(ValueError, match="op"):
        Nameless()
