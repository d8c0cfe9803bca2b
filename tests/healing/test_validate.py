"""What is refused before hours of work, and a model in memory that is left as it was."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from conftest import edit_tensors
from families import TINY, one_thread  # noqa: F401
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery as package
from surgery.config.heal import Heal
from surgery.config.heal_overrides import settings
from surgery.errors import SurgeryError
from surgery.healing import run as job
from surgery.healing import run as running
from surgery.healing import trainer as training
from surgery.healing import validate as beforehand
from surgery.healing.contexts import use_bfloat16
from surgery.healing.heal import _remove_working_files, _trainable_anatomy
from surgery.healing.models import base_of_memory, report_in_memory
from surgery.healing.parameters import TrainableParameters

SMALL = {"length": 16, "batch_tokens": 32, "steps": 2}


@pytest.fixture
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def edited(tiny_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    package.apply("mqa", model, tokenizer=tokenizer)
    return model


WAYS = [{"method": way} for way in ("parts", "full", "lora")]
WAYS += [{"mixing": "head"}, {"method": "parts", "warm_start": 64}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_failed_healing_in_memory_leaves_the_model_as_it_was(edited, tiny_llama, tokenizer, text, monkeypatch, way):
    """In the third step, when weights have changed."""
    before = {name: tensor.clone() for name, tensor in (*edited.named_parameters(), *edited.named_buffers())}
    asked = SMALL | {"data": str(text), "steps": 4, "checkpoint_every": 1, "learning_rate": 0.1} | way
    whole = training.HealTrainer.compute_loss

    def broken(self, *args, **kwargs):
        assert self.args.save_strategy != "steps", "nobody could go on from a temporary folder"
        if self.state.global_step == 2:
            self._stop("the loss is not a number")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(training.HealTrainer, "compute_loss", broken)
    with pytest.raises(SurgeryError, match="not a number in step 3") as told:
        package.heal(edited, tiny_llama, tokenizer=tokenizer, **asked)
    assert not [word for word in ("checkpoint", "--overwrite") if word in str(told.value)]
    monkeypatch.undo()
    after = dict((*edited.named_parameters(), *edited.named_buffers()))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    assert all(parameter.requires_grad for parameter in edited.parameters())
    assert not edited.training


def test_a_foreign_tokenizer_is_refused_and_more_words_are_not(edited, tiny_llama, tokenizer, text):
    """A base in a folder, in memory, and none but the one that the model came from."""
    given = SMALL | {"data": str(text), "method": "parts", "loss": "ce"}
    foreign, larger = (copy.deepcopy(tokenizer) for _ in range(2))
    order = json.loads(foreign.backend_tokenizer.to_str())
    words = order["model"]["vocab"]
    words["cat"], words["dogs"] = words["dogs"], words["cat"]
    foreign = type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(order)))
    for base in (tiny_llama, AutoModelForCausalLM.from_pretrained(tiny_llama), None):
        with pytest.raises(SurgeryError, match="another tokenizer than the base's: 2 of its"):
            package.heal(edited, base, tokenizer=foreign, **given)
    larger.add_tokens(["zebra"])
    package.heal(edited, tiny_llama, tokenizer=larger, **given)


def test_scores_of_before_are_not_of_the_healed_model(edited, tiny_llama, tokenizer, text):
    report = report_in_memory(edited)
    report.data |= {"evaluation": {"status": "done"}, "check": {"passed": True, "items": []}}
    healed = package.heal(edited, tiny_llama, tokenizer=tokenizer, data=str(text), method="parts", loss="ce", **SMALL)
    assert healed.data is report.data
    assert (healed.data["evaluation"], healed.data["check"]) == (None, None)
    assert healed.data["seeds"]["heal"] == 0


@pytest.mark.parametrize(
    "way", [{"method": "lora"}, {"mixing": "head", "method": "parts"}, {"mixing": "head"}], ids=str
)
def test_a_failed_merge_in_memory_leaves_the_model_as_it_was(edited, tiny_llama, tokenizer, text, monkeypatch, way):
    """The training is through: what was merged or folded is taken back, whatever of it was done."""
    before = {name: tensor.clone() for name, tensor in edited.named_parameters()}
    monkeypatch.setattr("surgery.healing.lora.TOLERANCE", -1.0)
    monkeypatch.setattr("surgery.healing.weighted_gqa.TOLERANCE", -1.0 if way.get("method") == "parts" else 1.0)
    asked = SMALL | {"data": str(text), "gradient_checkpointing": True, "learning_rate": 0.1} | way
    with pytest.raises(SurgeryError, match="moved the logits"):
        package.heal(edited, tiny_llama, tokenizer=tokenizer, **asked)
    after = dict(edited.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not edited.is_gradient_checkpointing


def test_a_base_that_is_none(edited, tiny_llama, tokenizer, text, tmp_path):
    with pytest.raises(SurgeryError, match="the base is this very model"):
        package.heal(edited, edited, tokenizer=tokenizer, data=str(text), **SMALL)
    package.apply("mqa", tiny_llama, output=tmp_path / "out", check=False, evaluate=False)
    with pytest.raises(
        SurgeryError, match="base is a loaded LlamaForCausalLM, and healing a folder needs its base on disk"
    ):
        package.heal(tmp_path / "out", edited, output=tmp_path / "healed", data=str(text), **SMALL)


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_a_launchers_precision_is_not_ours(edited, tiny_llama, tokenizer, text, monkeypatch, asked):
    """accelerate launch sets this; what heal says is what is done and written down."""
    seen, name = [], "ACCELERATE_MIXED_PRECISION"
    monkeypatch.setenv(name, "no" if asked == "bfloat16" else "bf16")
    whole = training.HealTrainer.compute_loss

    def watched(self, *args, **kwargs):
        seen.append((self.accelerator.mixed_precision, torch.is_autocast_enabled("cpu")))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(training.HealTrainer, "compute_loss", watched)
    settings = SMALL | {"data": str(text), "method": "parts", "precision": asked}
    healed = package.heal(edited, tiny_llama, tokenizer=tokenizer, **settings)
    rough = asked == "bfloat16"
    assert healed.data["heal"]["bfloat16"] == rough
    assert {precision for precision, _ in seen} == {"bf16" if rough else "no"}
    assert os.environ[name] == ("no" if rough else "bf16")


@pytest.mark.parametrize("method", ["full", "parts", "lora"])
def test_mixed_precision_leaves_the_models_forward(edited, tiny_llama, tokenizer, text, method):
    ids = torch.tensor([[1, 5, 9]])
    package.heal(edited, tiny_llama, tokenizer=tokenizer, **SMALL, method=method, data=str(text), precision="bfloat16")
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(edited).keys()
    assert isinstance(edited(ids, return_dict=False), tuple)
    assert edited(ids).logits.dtype == edited.dtype


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_every_model_that_runs_computes_in_the_same_precision(tiny_llama, edited, tokenizer, text, monkeypatch, asked):
    """Clock, layer-wise start, teacher beside or stored, student, held-out text: both models."""
    from transformers.models.llama.modeling_llama import LlamaModel

    seen, whole = [], LlamaModel.forward

    def watched(self, *args, **kwargs):
        weight = self.embed_tokens.weight
        seen.append((self.config.num_key_value_heads, weight.dtype, torch.is_autocast_enabled("cpu")))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    monkeypatch.setattr(job, "isolates_documents", lambda model: True)  # which compares what rounding would hide
    asked_for = SMALL | {"data": str(text), "precision": asked, "warm_start": 64, "method": "parts"}
    report_in_memory(edited).data["recipe"]["evaluate"] = {"text": str(text), "length": 16, "windows": 2}
    for way in ({"teacher": "stored"}, {"eval_every": 1}, {"steps": None, "minutes": 0.01}):
        package.heal(edited, tiny_llama, tokenizer=tokenizer, **asked_for | way)
    teacher, rough = getattr(torch, asked), asked == "bfloat16"
    assert set(seen) == {(1, torch.float32, rough), (3, teacher, rough)}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a machine without an accelerator")
@pytest.mark.parametrize("known", [{}, {"avx512_bf16": False}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_a_cpu_with_bfloat16_computes_in_it(known, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known, raising=False)
    assert use_bfloat16(Heal(steps=1)) == any(known.values())
    assert not use_bfloat16(Heal(steps=1, precision="float32"))
    assert use_bfloat16(Heal(steps=1, precision="bfloat16"))


def test_in_memory_it_is_refused_before_the_model_is_edited(tiny_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    recipe = {"version": 1, "name": "x", "operations": [{"op": "gqa", "kv_heads": 1}]}
    for data, given, says in (("nope.txt", tokenizer, "no such text file"), ("builtin", None, "needs the tokenizer")):
        with pytest.raises(SurgeryError, match=says):
            package.apply(recipe | {"heal": SMALL | {"data": data}}, model, tokenizer=given)
    assert model.config.num_key_value_heads == 3


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("heal.data=nope.txt", ["nope.txt", "no such text file"]),
        ("heal.report_to=paper", ["cannot report to 'paper'"]),
        ("heal.chat=true", ["no chat template"]),
        ("heal.data=[builtin, conversations]", ["no chat template", "heal.data=self and heal.chat=false"]),
        (
            ("heal.data=[self, conversations]", "heal.chat=true"),
            ["with heal.chat: true, self is conversations too", "heal.chat=false"],
        ),
        (("heal.data=conversations", "heal.chat=true"), ["conversations are conversations", "heal.chat=false"]),
        ("heal.seed=-1", ["seed should be at least 0", "a whole number from 0, up to 4,294,967,295"]),
        ("heal.length=2000", ["rows of 2000 tokens are longer than the model"]),
    ],
)
def test_a_recipe_is_refused_before_it_converts(refused, model, setting, says):
    """`refused` sees that no file was written."""
    settings = [setting] if isinstance(setting, str) else setting
    refused("apply", "mqa", model, "heal.steps=1", *settings, "-o", "out", "--no-check", "--no-eval", says=says)


def test_who_is_reported_to_must_be_there(monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["wandb"])
    beforehand.refuse_settings(Heal(steps=1, length=16, report_to="wandb"), None)
    with pytest.raises(SurgeryError, match="trackio is not installed"):
        beforehand.refuse_settings(Heal(steps=1, length=16, report_to="trackio"), None)


def test_what_watches_is_looked_at_before_a_text_is_written(edited, tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr("surgery.data.documents.sample", None)
    watched = SMALL | {"eval_every": 1, "stop_at_gate": True}
    with pytest.raises(SurgeryError, match="no limit that can be watched"):
        package.heal(edited, tiny_llama, tokenizer=tokenizer, overrides=["evaluate.max_kl=null"], **watched)


def test_settings_of_another_kind():
    with pytest.raises(SurgeryError, match="settings is 'parts'"):
        settings({}, "parts")


def test_a_rope_table_of_an_old_checkpoint_is_no_second_dtype(model):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(model, lambda tensors: tensors.update({name: torch.ones(4)}))
    _trainable_anatomy(model)
    edit_tensors(model, lambda tensors: tensors.update({"model.norm.weight": torch.ones(72)}))
    with pytest.raises(SurgeryError, match="in one dtype, and this checkpoint has BF16, F32"):
        _trainable_anatomy(model)


# --- while it trains ----------------------------------------------------------------------------------------


def test_attention_dropout_of_a_surgical_models_base(tokenizer, text):
    """GPT-2 has it in its config, and the surgical attention refuses it."""
    model, base = TINY["gpt2"](vocab_size=64), TINY["gpt2"](vocab_size=64)
    package.apply("duo-attention", model, tokenizer=tokenizer, streaming_ratio=0.5, sinks=2, window=8)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert max(rates) > 0
    healed = package.heal(model, base, tokenizer=tokenizer, data=str(text), method="full", **SMALL)
    assert healed.data["heal"]["steps"] == 2
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == rates


def test_a_router_of_nan_is_said(tiny_llama, tokenizer, text):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    package.apply("moh", model, tokenizer=tokenizer, router="zero", shared_ratio=0)
    model.model.layers[1].self_attn.surgery_router.data[0] = float("nan")
    with pytest.raises(SurgeryError, match="the router of layer 1 gave numbers that are not finite in step 1"):
        package.heal(model, tiny_llama, tokenizer=tokenizer, data=str(text), loss="ce", method="parts", **SMALL)


@pytest.mark.parametrize("method", ["parts", "lora", "full"])
def test_the_directions_of_loki_do_not_train(tiny_llama, tokenizer, text, method):
    """A step of decoding ranks keys by them, without a gradient."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    read = {"op": "kv_read", "method": "loki", "calibration_text": str(text), "calibration_length": 32}
    recipe = {"version": 1, "name": "read", "operations": [read | {"calibration_samples": 2}]}
    package.apply(recipe, model, tokenizer=tokenizer)
    basis = {name: weight.clone() for name, weight in model.named_parameters() if name.endswith("surgery_read_basis")}
    assert basis
    asked = {"tokenizer": tokenizer, "data": str(text), "method": method, **SMALL}
    if method == "parts":
        with pytest.raises(SurgeryError, match="parts trains what the surgery added or rewrote, and that is nothing"):
            package.heal(model, tiny_llama, **asked)
    else:
        package.heal(model, tiny_llama, **asked)
    for name, weight in basis.items():
        assert torch.equal(weight, model.get_parameter(name))


def test_a_model_without_a_name_takes_no_record_of_the_working_folder(tmp_path, monkeypatch, tiny_llama):
    package.apply("gqa", tiny_llama, output=tmp_path / "out", method="mean", check=False, evaluate=False)
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(SurgeryError, match="nothing is known of a surgery on this model"):
        report_in_memory(TINY["llama"]())


def test_the_base_of_a_model_of_the_hub_is_at_its_revision():
    model = TINY["llama"]()
    model.config._name_or_path = "owner/name"
    assert base_of_memory(model, Heal(steps=1)) == "owner/name"
    model.config._commit_hash = "0123abc"
    assert base_of_memory(model, Heal(steps=1)) == "owner/name@0123abc"


def test_by_the_clock_only_what_trains_gets_gradients():
    model, seen = TINY["llama"](), []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: seen.append(name))
    heal = Heal(minutes=0.001, length=16, batch_tokens=32)
    names = ("model.layers.1.self_attn.k_proj.weight",)
    assert job._rows_needed(model, heal, TrainableParameters(names, (), 0)) >= 2
    assert set(seen) == set(names)
    job._rows_needed(model, heal, TrainableParameters((), ("model.layers.0.mlp.up_proj",), 0))
    assert set(seen) == {*names, "model.layers.0.mlp.up_proj.weight"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_base_that_only_wrote_the_text_is_let_go(tmp_path):
    made = job.HealRun(Heal(steps=1, loss="ce"), None, None, frozenset(), tmp_path)
    made._base.append("the base")
    running._teacher(made, None)
    assert not made._base


def test_what_is_kept_of_a_run(tmp_path):
    for name in ("runs/host/events.1", "checkpoint-2/complete.json", "teacher/teacher.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "metrics.jsonl").touch()
    _remove_working_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "runs"]
