"""Healing from folder to folder and in memory, with every method: what trains, what is saved, what is said of it."""

from __future__ import annotations

import copy
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, edit_json, edit_record, listing
from families import TINY, TOKENS, load_without_package, one_thread  # noqa: F401
from safetensors.torch import load_file
from tokenizers_of_bytes import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.config.heal import Heal
from surgery.errors import SurgeryError
from surgery.healing.callbacks import read
from surgery.healing.parameters import select_trainable
from surgery.healing.teacher import store
from surgery.healing.trainer import Rows, rate_at
from surgery.io.card_text import NO_NOTES, notes_of
from surgery.report.report import Report
from surgery.runtime.modeling_surgery import attention_modules

SCORED = ("evaluate.windows=1", "evaluate.length=16")
SMALL = ("length=16", "batch_tokens=32", "steps=4", "learning_rate=0.01")
QUICK = ("--no-check", "--no-gate", "-q")
FAST = ("--no-check", "--no-eval", "-q")


@pytest.fixture
def converted(surgery, model, text, tmp_path):
    """`apply RECIPE` of the tiny model, scored on its words."""

    def run(recipe="mqa", *more, out="out"):
        done = surgery("apply", recipe, model, f"evaluate.text={text}", *SCORED, *more, "-o", out, *QUICK)
        assert done.code == 0, done.out + done.err
        return tmp_path / out

    return run


@pytest.fixture
def heal(surgery, model, text, tmp_path):
    """`surgery heal` on the tiny text."""

    def run(out, *more, to="healed", code=0, check=False):
        asked = (f"data={text}", f"evaluate.text={text}", *SMALL, *["--no-check"] * (not check))
        done = surgery("heal", out, *asked, *more, "-o", to, "--base", model, "--no-gate")
        assert done.code == code, done.out + done.err
        done.folder = tmp_path / to
        return done

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after) -> set[str]:
    """Names of the tensors that differ, layers' numbers as N."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    names = (name for name in old if not torch.equal(old[name], new[name]))
    return {".".join("N" if step.isdigit() else step for step in name.split(".")) for name in names}


KEYS = {f"model.layers.N.self_attn.{part}_proj.weight" for part in "kv"}
REST = {f"model.layers.N.self_attn.{part}_proj.weight" for part in "qo"}
REST |= {f"model.layers.N.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


@pytest.mark.parametrize(("method", "wanted"), [("parts", KEYS), ("lora", KEYS | REST), ("full", None)])
def test_each_method_trains_its_own(converted, heal, method, wanted):
    out = converted()
    done = heal(out, f"method={method}", "loss=distill", f"learning_rate={0.002 if method == 'full' else 0.01}")
    found = changed(out, done.folder)
    assert found == wanted or (wanted is None and found > KEYS | REST and "model.embed_tokens.weight" in found)
    config = json.loads((done.folder / "config.json").read_text())
    assert config == json.loads((out / "config.json").read_text()), "native, and stored as it was"
    report = Report.of(done.folder)
    record = report.data["heal"]
    assert (record["steps"], record["tokens"], record["step_tokens"]) == (4, 128, 32)
    assert record["settings"]["data"] == "words.txt", "no folder of this machine"
    assert record["data"]["tokens"] == 400
    assert record["ended_by"] == "steps"
    if method == "lora":
        assert record["merge_moved_logits"] < 1e-4
    curve = read(done.folder / "healing/metrics.jsonl")
    assert [line["step"] for line in curve] == [1, 2, 3, 4]
    assert all(math.isfinite(line["kl"]) and line["loss"] == line["kl"] for line in curve)
    assert curve[-1]["kl"] < curve[0]["kl"]


def test_what_came_back_is_told(converted, heal, tmp_path):
    out = converted()
    unhealed = (out / "README.md").read_text()
    (out / "README.md").write_text(unhealed.replace(NO_NOTES, "Ask us."))
    done = heal(out, "method=parts", "steps=12")
    report = Report.of(done.folder).data
    before, after, record = Report.of(out).data["evaluation"], report["evaluation"], report["heal"]
    kl = (before["kl"]["mean"], after["kl"]["mean"])
    assert record["converted"]["kl"] == kl[0]
    assert record["recovered"]["kl"] == pytest.approx((kl[0] - kl[1]) / kl[0])
    assert kl[1] < kl[0]
    card = (done.folder / "README.md").read_text()
    assert "## Healing" in card
    assert notes_of(card) == "Ask us.", "what its owner wrote into the converted model's card"
    assert "](healing/loss.png)" in card
    assert "What the surgery added or rewrote was trained (2,304 parameters)" in card
    assert f"| KL from the base, mean |  | {kl[0]:.4g} | {kl[1]:.4g} |" in card
    assert "surgery heal OUT " in card
    assert str(tmp_path) not in card
    assert f"healed:    KL to the base: converted {kl[0]:.3f}, healed {kl[1]:.3f}" in done.out
    assert (done.folder / "healing/loss.png").stat().st_size > 0
    assert sorted(path.name for path in (done.folder / "healing").iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_surgical_model_heals_and_keeps_both_doors(converted, heal, model):
    """Routers train, are saved, and load in a fresh process in both ways."""
    out = converted("moh", "calibration_samples=4", "calibration_length=8", "router=random", "shared_ratio=0")
    done = heal(out, "method=lora", "loss=distill", check=True)
    assert {name.rpartition(".")[2] for name in changed(out, done.folder)} > {"surgery_router", "surgery_router_bias"}
    report = Report.of(done.folder).data
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["both ways to load agree"] == "passed"
    assert report["tier"] == "surgical"
    curve = read(done.folder / "healing/metrics.jsonl")
    assert all(line["balance"] > 0 for line in curve)
    assert curve[0]["loss"] == pytest.approx(curve[0]["kl"] + 0.01 * curve[0]["balance"])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_freeze_names_does_not_train(converted, heal, method):
    """Routers and MLPs stay to the bit; the rest trains as before, and the record says what was frozen."""
    out = converted("moh", "calibration_samples=4", "calibration_length=8", "router=random", "shared_ratio=0")
    frozen = heal(out, f"method={method}", "freeze=['*surgery_router*', '*.mlp.up*']", "learning_rate=0.002")
    free = heal(out, f"method={method}", "learning_rate=0.002", to="free")
    moved, all_moved = changed(out, frozen.folder), changed(out, free.folder)
    held = {name for name in all_moved if "surgery_router" in name or ".mlp.up" in name}
    assert {name.rpartition(".")[2] for name in held} >= {"surgery_router", "surgery_router_bias", "weight"}
    assert moved == all_moved - held
    record, other = (Report.of(done.folder).data["heal"] for done in (frozen, free))
    assert record["settings"]["freeze"] == ["*surgery_router*", "*.mlp.up*"]
    assert "freeze" not in other["settings"], "a field that nobody set is not recorded"
    assert record["parameters"] < other["parameters"]


def test_embeddings_are_a_name_in_every_family():
    """The token embeddings and the output head, and nothing else, by the modules that Transformers names so."""
    for family in sorted(TINY):
        model = TINY[family]()
        anatomy, table = Anatomy.of(model), {name: ("F32", tuple(p.shape)) for name, p in model.named_parameters()}
        heal = Heal(method="full", steps=1, freeze=["embeddings"])
        left = select_trainable(heal, anatomy, table, frozenset()).parameters
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        held = {id(parameter) for module in modules for parameter in module.parameters()}
        assert {name for name, p in model.named_parameters() if id(p) in held} == set(table) - set(left), family
    low_rank = Heal(method="lora", steps=1, freeze=["embeddings"])  # where they would not train anyway
    assert select_trainable(low_rank, anatomy, table, frozenset("k")).adapted


def test_wrong_freezes(surgery, refused, converted, model, text):
    asked = (f"data={text}", "steps=2", "length=8", "batch_tokens=8")
    out = converted("mqa", out="merged")
    says = ["'*surgery_router*'", "matches nothing that would train", "model.layers.N.self_attn.k_proj.weight"]
    refused("heal", out, *asked, "freeze=['*surgery_router*']", "-o", "never", "--base", model, says=says)
    refused("heal", out, *asked, "freeze=['*']", "-o", "never", "--base", model, says=["leaves nothing to train"])
    refused("heal", out, *asked, "freeze=mlp", "-o", "never", "--base", model, says=["freeze should be a list"])
    refused("heal", out, *asked, "freeze=['']", "-o", "never", "--base", model, says=["text of some length"])
    gated = converted("mae", "calibration_samples=4", "calibration_length=8", out="gated")
    says = ["freeze leaves no gate to train"]
    held = ("alternate=true", "freeze=['*surgery_*']")
    refused("heal", gated, *asked, *held, "-o", "never", "--base", model, says=says)
    assert surgery("plan", "moh-heal", model, "heal.freeze=['*surgery_router*']").code == 0


def test_the_gates_of_mae_and_the_rest_train_in_turn(converted, heal, monkeypatch):
    """No weight moves in the other's turn, whatever momentum it has; there is no load balance."""
    monkeypatch.setattr("surgery.healing.trainer.rate_at", lambda *_: 1.0)  # so that a longer run begins as a shorter
    out = converted("mae", "calibration_samples=4", "calibration_length=8", "router=random")
    asked = ("method=lora", "alternate=true")
    folders = [heal(out, *asked, f"steps={steps}", to=f"after{steps}").folder for steps in (1, 2, 3)]
    first = changed(out, folders[0])
    assert first, "the gates' turn comes first"
    assert all("surgery_router" in each for each in first)
    second, third = changed(folders[0], folders[1]), changed(folders[1], folders[2])
    assert second
    assert not any("surgery_router" in each for each in second)
    assert third
    assert all("surgery_router" in each for each in third)
    lines = read(folders[2] / "healing/metrics.jsonl")
    assert "balance" not in lines[0]
    assert [line["trains"] for line in lines] == ["gates", "experts", "gates"]
    loss = Report.of(folders[2]).data["heal"]["loss"]
    assert loss == {"first": lines[0]["loss"], "last": lines[2]["loss"], "of": "gates"}, "like with like"
    card = (folders[2] / "README.md").read_text(encoding="utf-8")
    assert "Gates and experts were trained in turn" in card
    assert "in the steps that train the gates" in card


def test_alternating_without_mae_is_refused(refused, converted, surgery, model, text):
    says = ["alternate lets the gates of mae", "has no such gates", "heal.alternate=false"]
    out = converted("moh", "calibration_samples=4", "calibration_length=8", "router=random", "shared_ratio=0")
    asked = (f"data={text}", "steps=2", "length=8", "batch_tokens=8", "alternate=true")
    refused("heal", out, "-o", "healed", "--base", model, *asked, says=says)
    refused("plan", "moh-heal", model, "heal.alternate=true", says=says)
    refused("plan", "mae-heal", model, "heal.method=parts", says=["nothing but the gates trains", "heal.method=lora"])


@pytest.mark.parametrize("method", ["parts", "lora"])
def test_a_layer_wise_start_of_hard_gates_is_refused(converted, refused, model, text, method):
    """It runs the model as in inference, where a choice has no gradient."""
    out = converted("mae", "calibration_samples=4", "calibration_length=8", "router=random")
    asked = (f"data={text}", "steps=2", "length=8", "batch_tokens=8", f"method={method}", "warm_start=64")
    says = ["hard gates of mae only choose", "heal.warm_start=0"]
    refused("heal", out, "-o", "healed", "--base", model, *asked, says=says)


def test_no_expert_is_drawn_after_a_healing_in_memory():
    """Nor in a later one that does not alternate: its gates train."""
    base, tokenizer = TINY["llama"](vocab_size=258), byte_tokenizer()
    model = copy.deepcopy(base)
    step = {"op": "mae", "router": "random"}
    package.apply({"version": 1, "name": "x", "operations": [step], "evaluate": None}, model, tokenizer=tokenizer)
    asked = {"data": "builtin", "steps": 2, "length": 16, "batch_tokens": 32, "precision": "float32"}
    package.heal(model, base, tokenizer=tokenizer, alternate=True, **asked)
    assert not any(module.surgery_call.draws for module in attention_modules(model))
    before = [module.surgery_router.detach().clone() for module in attention_modules(model)]
    package.heal(model, base, tokenizer=tokenizer, **asked)
    for module, old in zip(attention_modules(model), before, strict=True):
        assert not torch.equal(module.surgery_router, old)


def test_apply_heals_in_one_go(surgery, model, text, tmp_path):
    asked = (f"evaluate.text={text}", *SCORED, f"heal.data={text}", *(f"heal.{each}" for each in SMALL))
    done = surgery("apply", "mqa", model, *asked, "heal.method=parts", "-o", "out", "--no-gate")
    assert done.code == 0, done.out + done.err
    assert Report.of(tmp_path / "out").data["check"]["passed"]
    assert "heal (parts): 2,304 parameters train" in done.out
    report = Report.of(tmp_path / "out").data
    assert report["heal"]["converted"]["kl"] > 0
    assert report["recipe"]["heal"]["steps"] == 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))) == ["out"]
    card = (tmp_path / "out/README.md").read_text()
    assert "surgery apply mqa model -o OUT" in card
    assert "surgery heal" not in card, "one command made it"
    separate = surgery("apply", "mqa", model, *asked[:3], "-o", "plain", *FAST)
    assert separate.code == 0
    steps = (f"data={text}", *SMALL, "method=parts")
    assert surgery("heal", "plain", *steps, "-o", "healed", "--base", model, *FAST).code == 0
    assert not changed(tmp_path / "out", tmp_path / "healed"), "two commands give the same weights"


def test_text_of_the_base_a_stored_teacher_and_a_layerwise_start(converted, heal, surgery, monkeypatch):
    out = converted()
    monkeypatch.setitem(store.__kwdefaults__, "dtype", torch.float32)  # float16 has steps: test_healing_teacher
    ways = ("data=self", "teacher=stored", "top_k=64", "warm_start=64", "eval_every=2", "method=parts")
    done = heal(out, *ways)
    record = Report.of(done.folder).data["heal"]
    assert record["data"]["data"] == "text that the base wrote itself"
    assert record["warm_start"]["tokens"] >= 64
    curve = read(done.folder / "healing/metrics.jsonl")
    assert ["held_out_kl" in line for line in curve] == [False, True, False, True]
    live = heal(out, *ways, "teacher=live", to="live")  # all 64 tokens were kept
    one, two = (read(each.folder / "healing/metrics.jsonl") for each in (done, live))
    assert [line["kl"] for line in one] == pytest.approx([line["kl"] for line in two], rel=1e-5)


def test_in_memory(tiny_llama, text):
    """In place, in the dtype that it has; the same weights as from folder to folder follow from the same start."""
    tokenizer, edited = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    report = package.apply("mqa", edited, tokenizer=tokenizer)
    settings = {"data": str(text), "length": 16, "batch_tokens": 32, "steps": 4, "method": "lora", "rank": 2}
    before = {name: tensor.clone() for name, tensor in edited.state_dict().items()}
    healed = package.heal(edited, tiny_llama, settings=settings, tokenizer=tokenizer)
    assert healed.data["heal"]["steps"] == 4
    assert report.data["heal"] == healed.data["heal"], "the report that will be saved with the model"
    assert edited.state_dict().keys() == before.keys(), "no adapter is left"
    assert all(parameter.requires_grad for parameter in edited.parameters())
    assert edited.dtype == torch.bfloat16
    assert edited.model.rotary_emb.inv_freq.dtype == torch.float32, "positions are not rounded"
    assert edited.config.use_cache
    again = AutoModelForCausalLM.from_pretrained(tiny_llama)
    package.apply(
        {"version": 1, "name": "x", "operations": [{"op": "gqa", "kv_heads": 1}], "heal": settings},
        again,
        tokenizer=tokenizer,
    )
    assert all(torch.equal(one, two) for one, two in zip(edited.parameters(), again.parameters(), strict=True))


def test_an_adapter_kept_gives_the_merged_model(converted, heal, model):
    from peft import PeftModel

    out = converted()
    done = heal(out, "method=lora", "keep_adapter=true", "rank=2")
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(stock, done.folder / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        apart = (adapted(tokens).logits - merged(tokens).logits).abs().max()
    assert apart < 0.05, "the merged weights were rounded to bfloat16"
    (done.folder / "healing/runs").mkdir()
    (done.folder / "healing/runs/events.of-this-machine").touch()
    edit_record(done.folder, check={"passed": True, "items": []})
    sent = [file["name"] for file in package.push(done.folder, "me/x", dry_run=True)["files"]]
    assert "adapter/adapter_model.safetensors" in sent
    assert not [name for name in sent if "runs" in name]
    assert str(out.parent) not in (done.folder / "adapter/adapter_config.json").read_text()
    assert "they load on the model as it was before them." in (done.folder / "README.md").read_text()


def test_stock_transformers_finds_the_adapted_model_in_the_merged_one(converted, heal, model, tmp_path):
    """In a process without `surgery`, from what was stored."""
    from peft import PeftModel

    TINY["llama"]().save_pretrained(model)  # in float32
    out = converted()
    done = heal(out, "method=lora", "keep_adapter=true", "rank=2")
    (tmp_path / "fresh").mkdir()
    stored = load_without_package([done.folder], tmp_path / "fresh")[done.folder]
    assert "error" not in stored, stored
    before = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        plain = before(TOKENS).logits
        adapted = PeftModel.from_pretrained(before, done.folder / "adapter").eval()(TOKENS).logits
    assert (adapted - stored["logits"]).abs().max() <= 1e-4
    assert (plain - stored["logits"]).abs().max() > 1e-2


def test_an_adapter_kept_by_a_recipe_has_its_model(surgery, model, text, tmp_path):
    from peft import PeftModel

    asked = (f"heal.data={text}", *(f"heal.{each}" for each in (*SMALL, "rank=2", "keep_adapter=true")))
    assert surgery("apply", "mqa", model, *asked, "-o", "out", *FAST).code == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out.unhealed", dtype=torch.float32)
    PeftModel.from_pretrained(stock, tmp_path / "out/adapter")
    assert "before them, which this recipe makes with `heal=null`." in (tmp_path / "out/README.md").read_text()


def test_healed_twice(converted, heal):
    out = converted()
    once = heal(out, "method=parts", to="once").folder
    twice = heal(once, "method=full", to="twice").folder
    record = Report.of(twice).data["heal"]
    assert record["settings"]["method"] == "full"
    assert [each["settings"]["method"] for each in record["earlier"]] == ["parts"]
    card = (twice / "README.md").read_text()
    assert card.index("surgery heal OUT ") < card.index("surgery heal HEALED1 ")
    assert "| | base | healed before | healed |" in card
    assert "Before that it was trained on 128 tokens of words.txt (parts, distill)" in card


def test_the_gate_ends_it_early(converted, heal):
    out = converted()
    done = heal(out, "method=parts", "eval_every=1", "stop_at_gate=true", "steps=50", "evaluate.max_kl=100")
    record = Report.of(done.folder).data["heal"]
    assert (record["ended_by"], record["steps"]) == ("gate", 1)
    assert "It ended early" in (done.folder / "README.md").read_text()


def test_gradient_checkpointing_computes_again(converted, heal, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    out, calls, forward = converted(), [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x))
    counts = []
    for way in ("false", "true"):
        calls.clear()
        heal(out, "method=full", "loss=ce", f"gradient_checkpointing={way}", to=f"healed-{way}")
        counts.append(sum(calls))
    assert counts == [8, 16]  # with a gradient: four steps of two layers, each twice


@pytest.mark.parametrize("way", ["gradient_checkpointing=true", "precision=bfloat16", "small forwards"])
def test_ways_to_compute(converted, heal, monkeypatch, way):
    """Gradient checkpointing and small forwards change no figure but by rounding; bfloat16 a little."""
    out = converted()
    size = ("method=lora", "batch_tokens=64")
    plain = heal(out, *size, to="plain")
    if way == "small forwards":
        monkeypatch.setattr("surgery.healing.plan.MICRO_TOKENS", 16)  # four forwards of a row, not one of four
    other = heal(out, *size, *[way] * ("=" in way), to="other")
    one, two = (read(each.folder / "healing/metrics.jsonl") for each in (plain, other))
    rough = 0.05 if "bfloat16" in way else 1e-4
    assert [line["kl"] for line in two] == pytest.approx([line["kl"] for line in one], rel=rough)
    rounded = [line["kl"] for line in two] != [line["kl"] for line in one]
    assert rounded == ("bfloat16" in way or "small" in way), "it is another way to compute"
    assert Report.of(other.folder).data["heal"]["bfloat16"] == ("bfloat16" in way)
    assert Report.of(other.folder).data["heal"]["merge_moved_logits"] < 1e-4


def test_the_clock_ends_it(converted, heal):
    done = heal(converted(), "method=parts", "steps=null", "minutes=0.02")
    record = Report.of(done.folder).data["heal"]
    assert record["ended_by"] == "minutes"
    assert record["steps"] >= 1
    rates = [line["learning_rate"] for line in read(done.folder / "healing/metrics.jsonl")]
    assert rates[0] > 0
    assert rates[-1] < 0.01


def test_progress_by_the_clock_is_a_share_of_the_time(converted, tiny_llama, text, tmp_path):
    seen = []
    settings = ("method=parts", "steps=null", "minutes=0.02", f"data={text}", *SMALL[:2], SMALL[3])
    report = {"evaluate": False, "check": False, "progress": lambda *facts: seen.append(facts)}
    package.heal(converted(), tiny_llama, output=tmp_path / "healed", overrides=settings, **report)
    shares = [done for done, total, label in seen if label.startswith("training") and total == 100]
    assert shares[0] == 0
    assert shares[-1] == 100
    assert shares == sorted(shares)


def test_what_is_made_before_the_training_is_not_in_its_time(converted, heal, monkeypatch):
    """The first rate is that of the training's begin, whatever asking a stored teacher took."""
    from surgery.healing import run as running
    from surgery.healing import trainer as schedule

    whole, later = running.store, []
    monkeypatch.setattr(running, "store", lambda *args, **kwargs: later.append(1200) or whole(*args, **kwargs))
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(later)))
    ends = ("eval_every=1", "stop_at_gate=true", "evaluate.max_kl=100")
    done = heal(converted(), "method=parts", "steps=null", "minutes=10", "teacher=stored", "warmup=0", *ends)
    rates = [line["learning_rate"] for line in read(done.folder / "healing/metrics.jsonl")]
    assert rates == pytest.approx([0.01], rel=0.02)


# --- schedule -----------------------------------------------------------------------------------------------


def test_rates():
    assert rate_at(0.0, 0.1) == 0.0
    assert rate_at(0.05, 0.1) == pytest.approx(0.5)
    assert rate_at(0.1, 0.1) == 1.0
    assert rate_at(0.55, 0.1) == pytest.approx(0.5)
    assert rate_at(1.0, 0.1) == pytest.approx(0.0)
    assert rate_at(0.0, 0.0) == 1.0


def test_rows_come_in_shuffled_rounds():
    rows = Rows(list(range(10)), 25, seed=3)
    found = [rows[n] for n in range(25)]
    assert sorted(found[:10]) == sorted(found[10:20]) == list(range(10))
    assert found[:10] != found[10:20]
    assert [Rows(list(range(10)), 25, seed=3)[n] for n in (17, 3, 24)] == [found[n] for n in (17, 3, 24)]


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(converted, refused, text, model):
    """`surgery heal` that must fail, and leave nothing."""
    out = converted()

    def run(*more, says, folder=out, code=2, base=model):
        named = ("--base", base) if base else ()
        return refused("heal", folder, *SMALL, f"data={text}", *more, "-o", "healed", *named, says=says, code=code)

    return run


def test_bad_data(refuse, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("the cat sat on a mat and looked at rain")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": TEXT}) + "\n")
    refuse("data=none.txt", says=["no such text file", "none.txt"])
    refuse("data=empty.txt", says=["empty.txt", "the text file is empty"])
    refuse("data=short.txt", says=["too short: it has 10 tokens, one row has 16"])
    refuse("data=binary.txt", says=["binary.txt"])
    refuse("data=rows.jsonl", says=["no column 'text'", "available: body", "heal.column=body"])
    refuse("data=rows.jsonl", "column=boddy", says=["no column 'boddy'"])


def test_bad_settings(refuse, tmp_path):
    refuse("steps=0", says=["steps should be at least 1; it is 0"])
    refuse("tokens=5", "steps=5", "minutes=null", "tokens=0", says=["tokens should be at least 1; it is 0"])
    refuse("method=loar", says=["method should be 'lora', 'full' or 'parts'; it is 'loar'"])
    refuse("stop_at_gate=true", "eval_every=1", "evaluate.max_kl=null", says=["no limit that can be watched"])
    refuse("length=512", "batch_tokens=512", says=["too short"])
    refuse("length=2048", "batch_tokens=2048", says=["longer than the model, which has 1024 positions"])
    refuse("report_to=tensorbord", says=["cannot report to 'tensorbord'", "did you mean 'tensorboard'?"])
    refuse("evaluate.text=nope.txt", says=["nope.txt: no such text file"])


def test_another_base(refuse, tmp_path, model, surgery):
    import shutil

    other = shutil.copytree(model, tmp_path / "other")
    state = weights(other)
    state["model.norm.weight"] += 1
    from safetensors.torch import save_file

    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    refuse(says=["this is not the base it was made from"], base=other)
    asked = ("method=parts", "loss=ce", "eval_every=1")  # which would train without a base
    refuse(*asked, says=["eval_every compares the model with its base", "--base MODEL"], base=None)
    refuse(says=["the base is not known here (the record names 'model')", "--base MODEL"], base=None)


def test_a_base_of_another_vocabulary(tiny_llama):
    from conftest import LLAMA
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, edited = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    package.apply("mqa", edited, tokenizer=tokenizer)
    other = LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": 70}))
    with pytest.raises(SurgeryError, match="another vocabulary: 70 tokens, the model 64"):
        package.heal(edited, other, steps=1, tokenizer=tokenizer)


def test_a_folder_with_adapters(refuse, converted):
    folder = converted(out="adapted")
    (folder / "adapter_config.json").write_text("{}")
    refuse(says=["this folder carries adapters"], folder=folder)


def test_a_model_with_adapters_or_without_a_surgery(tiny_llama):
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(SurgeryError, match="nothing is known of a surgery"):
        package.heal(plain, tiny_llama, steps=1, tokenizer=tokenizer)
    package.apply("mqa", plain, tokenizer=tokenizer)
    with pytest.raises(SurgeryError, match="needs the tokenizer"):
        package.heal(plain, tiny_llama, steps=1)
    with pytest.raises(SurgeryError, match="for a name or folder"):
        package.heal(plain, tiny_llama, steps=1, tokenizer=tokenizer, output="x")
    adapted = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SurgeryError, match="carries adapters"):
        package.heal(adapted, tiny_llama, steps=1, tokenizer=tokenizer)


def test_an_adapter_that_would_not_hold_what_trains(converted, refused, text, model):
    out = converted("moh", "router=zero", "shared_ratio=0")
    asked = (f"data={text}", *SMALL, "keep_adapter=true", "-o", "healed", "--base", model)
    refused("heal", out, *asked, says=["keep_adapter: an adapter file would not hold", "surgery_router"])


def test_a_composite_is_refused_before_anything_is_written(tmp_path):
    from families import gemma3_image_text

    gemma3_image_text().save_pretrained(tmp_path / "vision")
    with pytest.raises(SurgeryError, match="healing trains text models"):
        package.plan("mqa", tmp_path / "vision", **{"heal.steps": 1})


def test_the_folder_that_is_healed_is_untouched(converted, heal, model):
    out = converted()
    before = listing(out)
    heal(out, "method=full", "loss=ce")
    assert listing(out) == before


def test_an_existing_output(refuse, tmp_path, converted):
    (tmp_path / "healed").mkdir()
    refuse(says=["OUT exists", "--overwrite"])


def test_a_damaged_record(refuse, converted):
    folder = converted(out="odd")
    edit_json(folder / "surgery.json", heal=5)
    refuse(says=["surgery.json is damaged: heal is 5"], folder=folder)


def test_a_trainers_own_checkpoints_carry_the_record(tiny_llama, tmp_path):
    """With the user's Trainer: what it saves is known to surgery, and is what was saved."""
    from transformers import Trainer, TrainingArguments

    tokenizer, edited = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    report = package.apply("mqa", edited, tokenizer=tokenizer)
    rows = [{"input_ids": torch.arange(4, 20), "labels": torch.arange(4, 20)}] * 4
    settings = TrainingArguments(tmp_path / "run", max_steps=2, save_steps=1, report_to="none", disable_tqdm=True)
    Trainer(edited, settings, train_dataset=rows, callbacks=[package.SurgeryCallback(report)]).train()
    found = [Report.of(tmp_path / f"run/checkpoint-{step}").data for step in (1, 2)]
    assert found[0]["files"] != found[1]["files"]
    assert [each["in_memory"]["steps"] for each in found] == [1, 2]
    assert (found[1]["evaluation"], found[1]["check"]) == (None, None)
    assert found[1]["recipe"]["operations"][0]["op"] == "gqa"
    card = (tmp_path / "run/checkpoint-2/README.md").read_text()
    assert "KV heads 3 → 1 in 2 layers" in card
    folder = tmp_path / "run/checkpoint-2"
    edit_record(folder, check={"passed": True, "items": []})
    sent = {file["name"] for file in package.push(folder, "me/x", dry_run=True)["files"]}
    assert "model.safetensors" in sent
    assert not [name for name in sent if name.startswith(("optimizer", "scheduler", "rng_state", "training_args"))]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_latent_attention_heals(converted, heal, text, method):
    """Rows that are stored scaled far down train at their own scale: a step of 1e-2 does not replace them."""
    fields = ("rank=20", "rope=4", f"calibration_text={text}", "calibration_samples=2", "calibration_length=16")
    out = converted("mla", *fields)
    healed = heal(out, f"method={method}").folder
    before, after = (load_file(folder / "model.safetensors") for folder in (out, healed))
    assert json.loads((healed / "config.json").read_text())["model_type"] == "deepseek_v3"
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    rows, moved = before[name][:20].double(), after[name][:20].double() - before[name][:20].double()
    assert rows.square().mean().sqrt() < 1e-5
    assert 1e-4 < moved.norm() / rows.norm() < 1
    same = [
        name for name, tensor in before.items() if name.endswith("proj.weight") and torch.equal(tensor, after[name])
    ]
    assert not same, "attention and MLPs train"
    still = heal(out, f"method={method}", "learning_rate=1e-12", to="still").folder
    for name, tensor in load_file(still / "model.safetensors").items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-12 if "kv_a_proj" in name else 1e-6)
