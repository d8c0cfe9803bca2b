"""Both engines: what a rewrite gives is checked, dtypes are kept or refused, an error changes nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import edit_json, edit_tensors
from fake_hub import FakeHub
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, StableLmConfig, StableLmForCausalLM

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.config.recipe import Recipe
from surgery.conversion import streaming as shards
from surgery.conversion.plan import make_plan
from surgery.errors import SurgeryError
from surgery.io.safetensors import Checkpoint, stored_bytes
from surgery.operations.base import PlannedChange, WeightRewrite
from surgery.operations.expand import Expand

FAST = ("--no-check", "--no-eval")
WEIGHTS = "model.safetensors"
PARTS = "model.layers.{}.self_attn.{}_proj.weight"


def recipe(*operations: dict) -> dict:
    return {"version": 1, "name": "test", "operations": list(operations), "evaluate": None}


MQA = recipe({"op": "gqa", "kv_heads": 1})


def convert(steps, folder: Path, output: Path, **options):
    return surgery.apply(steps, str(folder), output=output, check=False, evaluate=False, **options)


RETURNS = {
    "nothing": lambda layer: None,
    "undeclared and read": lambda layer: (layer, {"sum": layer.q.sum().item()}),
    "no record": lambda layer: layer,
    "no layer": lambda layer: ({}, {}),
    "a tensor in the record": lambda layer: (layer, {"x": layer.k}),
    "NaN in the record": lambda layer: (layer, {"x": [float("nan")]}),
    "a list as the record": lambda layer: (layer, [1]),
}


class Odd(WeightRewrite):
    """A third party's rewrite with a fault."""

    op: Literal["odd"] = "odd"
    fault: str = "none"

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ("k", "v") if "undeclared" in self.fault else ("q", "k", "v", "o")

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        return PlannedChange(anatomy, ("nothing",))

    def rewrite(self, layer, target):
        if self.fault == "raises" and layer.anatomy.index == 1:
            raise SurgeryError("the last layer is not to its taste")
        if self.fault in RETURNS:
            return RETURNS[self.fault](layer)
        changes = {
            "dtype": lambda: {"v": layer.v.double()},
            "shape of o": lambda: {"o": layer.o[:-1]},
            "hidden size of k": lambda: {"k": layer.k[..., :-1]},
            "a part more": lambda: {"k_bias": layer.k[..., 0]},
            "an undeclared q": lambda: {"q": torch.ones(layer.q.shape, dtype=layer.q.dtype)},
            "k from an undeclared q": lambda: {"k": layer.q[: len(layer.k)]},
            "facts": lambda: {"anatomy": Anatomy.with_kv_heads(Anatomy("", (layer.anatomy,)), 1).layers[0]},
        }
        return layer.replace(**changes.get(self.fault, dict)()), {}


def odd(fault: str, *before) -> Recipe:
    return Recipe.model_construct(
        version=1, name="odd", description="", operations=[*before, Odd(fault=fault)], heal=None, evaluate=None
    )


@pytest.fixture
def foreign(monkeypatch):
    """Recipes with `Odd`, as an entry point would bring it."""
    monkeypatch.setattr("surgery.config.recipe.load", lambda recipe, *args, **kwargs: recipe)
    monkeypatch.setattr(
        Recipe, "to_dict", lambda self: {"name": self.name, "evaluate": None, "operations": [str(self.operations)]}
    )


FAULTS = {
    "dtype": "v is torch.float64, and torch.bfloat16 is stored",
    "shape of o": "o has shape [71, 9, 8], and [72, 9, 8] is planned",
    "hidden size of k": "k has shape [3, 8, 71], and [3, 8, 72] is planned",
    "a part more": "the parts k_bias came or went",
    "an undeclared q": "q has new values, and rewritten_projections does not name it",
    "k from an undeclared q": "k has no values: it was made from a projection that rewritten_projections",
    "facts": "its anatomy is not that of the target",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("engine", ["streaming", "loaded"])
def test_a_rewrite_of_another_form_is_its_authors_fault(foreign, model, tmp_path, fault, engine):
    with pytest.raises(SurgeryError, match="tell its authors") as caught:
        convert(odd(fault), model, tmp_path / "out", engine=engine)
    assert FAULTS[fault] in caught.value.what
    assert caught.value.what.startswith("odd: layer 0: ")
    assert caught.value.where == __name__
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("fault", RETURNS)
@pytest.mark.parametrize("engine", ["streaming", "loaded"])
def test_a_rewrite_that_returns_something_else_is_its_authors_fault(foreign, model, tmp_path, fault, engine):
    with pytest.raises(SurgeryError, match="tell its authors") as caught:
        convert(odd(fault), model, tmp_path / "out", engine=engine)
    says = ("odd: rewrite returns ", "odd: its record is ", "odd: layer 0: rewrite reads a projection that rewritten_")
    assert caught.value.what.startswith(says)
    assert caught.value.where == __name__
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_rewrite_of_ours_of_another_form_is_a_bug(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Expand, "rewrite", lambda self, layer, target: (layer, {}))
    with pytest.raises(TypeError, match="expand: layer 0"):
        convert(recipe({"op": "expand"}), model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bytes_that_the_header_does_not_promise_get_no_name(model, tmp_path, monkeypatch):
    real = shards.tensor_chunks
    monkeypatch.setattr(shards, "tensor_chunks", lambda tensor: real(tensor.double()))
    with pytest.raises(RuntimeError, match=r"model.safetensors: .* its header promises"):
        convert(MQA, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / WEIGHTS).exists()


def test_new_norms_have_the_dtype_of_their_siblings(tmp_path):
    """StableLM has a norm for each head: F32 norms beside BF16 weights stay F32 when heads are added."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 2}
    config = StableLmConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, qk_layernorm=True)
    base, out = tmp_path / "base", tmp_path / "out"
    StableLmForCausalLM(config).to(torch.bfloat16).save_pretrained(base)

    def change(tensors):
        for name in [n for n in tensors if "layernorm.norms" in n]:
            tensors[name] = torch.rand_like(tensors[name].float())

    edit_tensors(base, change)
    plan = surgery.plan(recipe({"op": "expand"}), base)
    convert(recipe({"op": "expand"}), base, out)
    new = load_file(out / WEIGHTS)
    norms = [new[f"model.layers.1.self_attn.k_layernorm.norms.{head}.weight"] for head in range(4)]
    assert {norm.dtype for norm in norms} == {torch.float32}
    assert torch.equal(norms[0], norms[1])
    assert not torch.equal(norms[1], norms[2])
    assert new[PARTS.format(0, "k")].dtype == torch.bfloat16
    assert plan.output_bytes == sum(tensor.nbytes for tensor in new.values())


MIXED = {"k": torch.float16, "v": torch.float64, "o": torch.bfloat16, "q": torch.float32}


@pytest.fixture
def mixed(model) -> Path:
    def change(tensors):
        for part, dtype in MIXED.items():
            for layer in range(2):
                name = PARTS.format(layer, part)
                tensors[name] = tensors[name].to(dtype)

    edit_tensors(model, change)
    return model


def test_the_streaming_engine_keeps_mixed_dtypes_and_counts_their_bytes(mixed, tmp_path):
    plan = surgery.plan(MQA, mixed)
    convert(MQA, mixed, tmp_path / "out")
    new = load_file(tmp_path / "out" / WEIGHTS)
    assert {part: new[PARTS.format(1, part)].dtype for part in MIXED} == MIXED
    assert plan.output_bytes == sum(tensor.nbytes for tensor in new.values())


@pytest.mark.parametrize(
    ("name", "args", "fix"),
    [
        ("mqa", ("--engine", "loaded"), "use the streaming engine (leave --engine out)"),
        ("duo-attention", (), "store the model in one dtype first"),
    ],
)
def test_the_loaded_engine_refuses_mixed_dtypes(refused, mixed, name, args, fix):
    says = ["would store all weights in one dtype, and this checkpoint has BF16, F16, F32, F64", fix]
    refused("apply", name, mixed, "-o", "out", *FAST, *args, says=says)


def test_the_loaded_engine_keeps_a_dtype_that_the_config_does_not_name(model, tmp_path):
    edit_json(model / "config.json", dtype="float32")
    for engine in ("streaming", "loaded"):
        convert(MQA, model, tmp_path / engine, engine=engine)
    streamed, loaded = (load_file(tmp_path / engine / WEIGHTS) for engine in ("streaming", "loaded"))
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert streamed.keys() == loaded.keys()
    assert all(torch.equal(streamed[name], loaded[name]) for name in streamed)


def test_bytes_of_any_dtype():
    assert stored_bytes("F4", (3, 2)) == 3
    assert stored_bytes("U8", ()) == 1
    assert stored_bytes("F64", (2, 5)) == 80


def test_an_error_in_a_later_operation_leaves_the_model_as_it_was(foreign, model):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    first = Expand()
    with pytest.raises(SurgeryError, match="not to its taste"):
        surgery.apply(odd("raises", first), loaded)
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.config.num_key_value_heads == 3
    assert loaded.model.layers[0].self_attn.k_proj.out_features == 24


def test_two_operations_in_memory_are_what_they_are_on_disk(model, tmp_path):
    steps = recipe({"op": "expand", "kv_heads": 9}, {"op": "gqa", "kv_heads": 1})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    report = surgery.apply(steps, loaded)
    assert len(report.data["operations"]) == 2
    convert(steps, model, tmp_path / "out")
    new = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in new.items())


def test_a_family_without_a_number_gets_no_null_in_its_config():
    from transformers import GPTJConfig

    anatomy = Anatomy.of(GPTJConfig(n_embd=32, n_head=4, n_layer=1))
    with pytest.raises(SurgeryError, match="gptj has no KV-head number"):
        anatomy.with_kv_heads(1)
    assert anatomy.with_kv_heads(4).edits == {}


def test_a_file_that_ends_while_it_is_read(model):
    checkpoint = Checkpoint(model)
    info = max(checkpoint.tensors.values(), key=lambda info: info.start)
    os.truncate(model / WEIGHTS, info.start + info.size // 2)
    with pytest.raises(SurgeryError, match="ended while"):
        checkpoint.read(info.name)
    with pytest.raises(SurgeryError, match="ended while"):
        list(checkpoint.chunks(info))


def test_the_loaded_engine_is_quiet_in_a_pipe(surgery, model):
    done = surgery("apply", "mqa", model, "-o", "out", *FAST, "--engine", "loaded", "--quiet")
    assert done.code == 0
    assert done.err == ""


# --- from the Hub -------------------------------------------------------------------------------------------


@pytest.fixture
def on_hub(model, tmp_path):
    """`surgery apply` of org/tiny in a process of its own; and the Hub's log."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    with FakeHub() as fake:
        fake.add("org/tiny", {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()})
        env |= {"HF_ENDPOINT": fake.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}

        def run(name: str, *args: str):
            command = [sys.executable, "-m", "surgery", "apply", name, "org/tiny", "-o", "out", *FAST, *args]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            whole = [entry for entry in fake.requests("GET", WEIGHTS) if not entry[2]]
            return done, whole

        yield run


def test_what_is_refused_is_not_downloaded(on_hub, tmp_path):
    done, whole = on_hub("gqa", "kv_heads=7")
    assert done.returncode == 2, done.stderr
    assert "cannot become 7" in done.stderr
    assert whole == []
    done, whole = on_hub("duo-attention", "--engine", "streaming")
    assert done.returncode == 2
    assert whole == []
    (tmp_path / "out").mkdir()
    done, whole = on_hub("mqa")
    assert "OUT exists" in done.stderr
    assert whole == []
    (tmp_path / "out").rmdir()
    done, whole = on_hub("mqa")
    assert done.returncode == 0, done.stderr
    assert len(whole) == 1


def test_a_model_from_the_hub_keeps_its_name_and_commit(on_hub, tmp_path):
    done, _ = on_hub("mqa", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/surgery.json").read_text())
    assert report["base"]["name"] == "org/tiny"
    assert len(report["base"]["revision"]) == 40


def test_a_plan_from_headers_is_the_plan_from_files(model):
    checkpoint = Checkpoint(model)
    table = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    plan = surgery.plan(MQA, model)
    assert make_plan(plan.recipe, Anatomy.of(model, table), plan.source).to_dict() == plan.to_dict()


def test_the_loaded_engine_takes_no_weights_that_others_left(surgery, model, tmp_path, monkeypatch):
    command = ("apply", "mqa", model, "-o", "out", "--engine", "loaded", "--no-check", "--no-eval")

    def full(self, *args, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert surgery(*command).code == 5
    for name in ("m-1.safetensors", "model-00001-of-00002.safetensors"):
        shutil.copyfile(model / "model.safetensors", tmp_path / "out.partial" / name)
    done = surgery(*command, "--resume")
    assert done.code == 0, done.err
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert list(json.loads((tmp_path / "out/surgery.json").read_text())["files"]) == ["model.safetensors"]


UNREAD = {  # operations -> the projections of which nothing is read, where each is a weight of its own
    "mqa": ([{"op": "gqa", "kv_heads": 1, "method": "mean"}], "qo"),
    "mqa, aligned": ([{"op": "gqa", "kv_heads": 1, "method": "mean", "align": "procrustes"}], ""),
    "mqa by similarity": ([{"op": "gqa", "kv_heads": 1, "method": "mean", "grouping": "similarity"}], ""),
    "a head off": ([{"op": "head_mask", "values": {0: {1: 0.5}}}], "qkv"),
    "both": ([{"op": "head_mask", "values": {0: {1: 0.5}}}, {"op": "gqa", "kv_heads": 1, "method": "mean"}], "q"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_streaming_reads_what_it_rewrites_alone(model, tmp_path, monkeypatch, case):
    steps, unread = UNREAD[case]
    convert(recipe(*steps), model, tmp_path / "loaded", engine="loaded")
    read, original = set(), Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.add(name) or original(self, name))
    convert(recipe(*steps), model, tmp_path / "out", engine="streaming")
    names = {name for name in Checkpoint(model).tensors if ".self_attn." in name}
    assert names - read == {name for name in names if name.rpartition(".self_attn.")[2][0] in unread}
    expected, got = load_file(tmp_path / "loaded" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert expected.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cut", [1, 3, 7, 8, 64])
def test_a_range_is_judged_however_it_is_cut(dtype, cut):
    """Pieces of any size, as a file system may copy them; the last value of all is the bad one."""
    good = torch.arange(24, dtype=dtype)
    for value in (None, float("nan"), float("-inf")):
        tensor = good.clone()
        if value is not None:
            tensor[-1] = value
        data = bytearray(tensor.view(torch.uint8).numpy().tobytes())
        judge = shards.FiniteRange("model.layers.0.self_attn.q_proj.weight", dtype)

        def judge_all(judge=judge, data=data):
            for start in range(0, len(data), cut):
                judge.add(memoryview(data)[start : start + cut])

        if value is None:
            judge_all()
            assert judge.rest == b""
        else:
            with pytest.raises(SurgeryError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight holds NaN"):
                judge_all()
