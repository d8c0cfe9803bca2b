"""Healing with sparse prefill: which steps have full attention, what resumes, and the loss under both at the end."""

from __future__ import annotations

import copy

import pytest
import torch
from families import TINY, one_thread  # noqa: F401 (a fixture)
from killed import killed_at
from safetensors.torch import load_file
from tokenizers_of_bytes import byte_tokenizer

import surgery as package
from surgery.api import heal as run_heal
from surgery.architecture.anatomy import Anatomy
from surgery.data.packing import Packed
from surgery.errors import SurgeryError
from surgery.healing.callbacks import HealCallback, read
from surgery.healing.sparse_attention import keys_read
from surgery.healing.trainer import Clock, HealTrainer
from surgery.report.report import Report
from surgery.runtime.modeling_surgery import attention_modules

STEP = {"op": "sparse_prefill", "method": "block_topk", "exact": True, "block": 16, "top": 1, "dense_below": 0}
ROWS = ("length=64", "batch_tokens=128", "learning_rate=0.01", "method=full", "precision=float32")
QUICK = {"check": False, "evaluate": False}


def recipe(**fields) -> dict:
    return {"version": 1, "name": "moba", "operations": [STEP | fields], "evaluate": None}


@pytest.fixture
def healing(model, text, tmp_path):
    """Heal a converted tiny model; what `fields` change of the step makes another converted model."""

    def run(to: str, *more, steps: int = 8, fields=None, **options):
        out = tmp_path / ("out" if fields is None else f"out-{to}")
        if not out.exists():
            package.apply(recipe(**fields or {}), model, output=out, check=False)
        settings = [*ROWS, f"data={text}", f"steps={steps}", *more]
        return run_heal(out, model, output=tmp_path / to, overrides=settings, **QUICK | options)

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, two) -> bool:
    ours, theirs = weights(one), weights(two)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines(folder) -> list[dict]:
    return read(folder / "healing/metrics.jsonl")


def test_never_and_always(healing, tmp_path):
    """1 is what no switch gives, to the bit. 0 is what a model gives that is sparse at no length of these rows."""
    healing("plain")
    healing("one", "full_from=1")
    healing("zero", "full_from=0")
    healing("dense", fields={"dense_below": 1024})
    assert same(tmp_path / "plain", tmp_path / "one")
    assert same(tmp_path / "zero", tmp_path / "dense")
    assert not same(tmp_path / "plain", tmp_path / "zero")
    assert "full_attention" not in lines(tmp_path / "plain")[0]
    assert not any(line["full_attention"] for line in lines(tmp_path / "one"))
    assert all(line["full_attention"] for line in lines(tmp_path / "zero"))
    assert "full_from" not in Report.of(tmp_path / "plain").data["heal"]["settings"], "nobody set it"


@pytest.mark.parametrize(("share", "sparse"), [(0.7, 7), (0.75, 8), (0.9, 9), (0.01, 1)])
def test_the_switch_is_at_its_share_of_the_steps(healing, tmp_path, share, sparse):
    """7 of 10 steps, though 0.7 * 10 is more than 7 in floating point; a step that is begun is sparse as a whole."""
    report = healing("healed", f"full_from={share}", steps=10)
    assert [line["full_attention"] for line in lines(tmp_path / "healed")] == [False] * sparse + [True] * (10 - sparse)
    record = report.data["heal"]["attention"]
    assert (record["sparse_steps"], record["full_steps"]) == (sparse, 10 - sparse)


def test_up_to_the_switch_it_is_the_sparse_training(healing, tmp_path):
    healing("plain")
    healing("half", "full_from=0.5")
    plain, half = ([line["loss"] for line in lines(tmp_path / name)] for name in ("plain", "half"))
    assert half[:4] == plain[:4]
    assert all(one != other for one, other in zip(half[4:], plain[4:], strict=True))


@pytest.mark.parametrize("stopped", [3, 5, 7])
def test_a_resumed_run_switches_where_the_whole_one_did(healing, tmp_path, stopped):
    asked = ("full_from=0.6", "checkpoint_every=2")  # full from the sixth step on
    healing("whole", *asked)
    with killed_at(stopped):
        healing("healed", *asked)
    report = healing("healed", *asked, resume=True)
    assert report.data["heal"]["resumed"]
    assert same(tmp_path / "healed", tmp_path / "whole")
    attention = [each.data["heal"]["attention"] for each in (report, Report.of(tmp_path / "whole"))]
    assert attention[0] == attention[1]


def test_by_the_clock(healing, monkeypatch, tmp_path):
    """A step is full if it begins after this share of the time."""
    shares = iter([i / 16 for i in range(200)])
    seen = [0.0]

    def fraction(self):
        seen[0] = next(shares)
        return seen[0]

    monkeypatch.setattr(Clock, "fraction", property(fraction))
    began, at, whole = [], [], HealCallback.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        result = whole(self, args, state, control, **kwargs)
        began.append(self.fraction_at_start)
        at.append(self.trainer.attends_full)
        return result

    monkeypatch.setattr(HealCallback, "on_step_begin", on_step_begin)
    healing("healed", "minutes=1", "full_from=0.5", steps="null")
    assert at == [share >= 0.5 for share in began]
    assert {True, False} == set(at)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_computes_the_same_attention_again(model, text, tmp_path, method):
    """Its forward runs a second time inside the backward pass of a step."""
    package.apply(recipe(), model, output=tmp_path / "out", check=False)
    rows = [each for each in ROWS if not each.startswith("method")]
    for name, more in (("plain", ()), ("again", ("gradient_checkpointing=true",))):
        asked = [*rows, f"data={text}", "steps=4", "full_from=0.5", f"method={method}", *more]
        run_heal(tmp_path / "out", model, output=tmp_path / name, overrides=asked, **QUICK)
    one, two = weights(tmp_path / "plain"), weights(tmp_path / "again")
    assert all((one[name].float() - two[name].float()).abs().max() <= 1e-3 for name in one)
    assert [line["loss"] for line in lines(tmp_path / "plain")] == pytest.approx(
        [line["loss"] for line in lines(tmp_path / "again")], rel=1e-5
    )


def test_the_losses_at_the_end_are_those_of_the_healed_model(monkeypatch):
    """On the rows that a next step would read, by the model as it leaves the training, sparse and full."""
    base, tokenizer, rows = TINY["llama"](vocab_size=258), byte_tokenizer(), []
    model = copy.deepcopy(base)
    package.apply(recipe(), model, tokenizer=tokenizer)
    whole = HealTrainer.text_losses

    def text_losses(self, found):
        begin = self.state.global_step * self.heal.rows
        rows.extend(self.train_dataset[begin + row] for row in range(self.heal.rows))
        return whole(self, found)

    monkeypatch.setattr(HealTrainer, "text_losses", text_losses)
    asked = {"data": "builtin", "steps": 3, "length": 64, "batch_tokens": 128, "precision": "float32"}
    report = package.heal(model, base, tokenizer=tokenizer, full_from=0.5, method="full", **asked)
    found = report.data["heal"]["attention"]["text_loss"]
    assert all(module.surgery_sparse for module in attention_modules(model)), "it is as sparse as it was"
    want = {}
    for name in ("sparse", "full"):
        if name == "full":
            for module in attention_modules(model):
                module.surgery_sparse = None
        total = count = 0.0
        for row in rows:
            positions = row["position_ids"][None]
            with torch.no_grad():
                logits = model(input_ids=row["input_ids"][None], position_ids=positions, use_cache=False).logits[0]
            for i, label in enumerate(row["labels"][1:].tolist()):
                if label >= 0:
                    total -= float(logits[i].double().log_softmax(-1)[label])
                    count += 1
        want[name] = total / count
    assert (found["sparse"], found["full"], found["tokens"]) == pytest.approx((want["sparse"], want["full"], count))
    assert abs(want["sparse"] - want["full"]) > 1e-5


def test_the_card_and_the_plan_say_it(healing, surgery, model, text, tmp_path):
    report = healing("healed", "full_from=0.75")
    card = (tmp_path / "healed/README.md").read_text()
    loss = report.data["heal"]["attention"]["text_loss"]
    assert "Attention was sparse in 6 steps and full in the last 2." in card
    assert f"a loss of {loss['sparse']:.3f} nats a token with sparse attention and of {loss['full']:.3f} with" in card
    assert "in the steps with sparse attention." in card
    read = report.data["heal"]["keys_read"]["share"]
    assert f"In its documents a query reads {read:.0%} of the keys before it, in 2 of 2 layers." in card
    short = healing("short", "length=16", "batch_tokens=32").data["heal"]["keys_read"]
    assert short["share"] == 1
    assert (
        "reads 100% of the keys before it, in 2 of 2 layers: they are too short to be read"
        in (tmp_path / "short/README.md").read_text()
    )
    curve = [line["loss"] for line in lines(tmp_path / "healed")]
    assert report.data["heal"]["loss"] == {"first": curve[0], "last": curve[5]}, (
        "of six sparse steps, not of full ones"
    )
    assert (tmp_path / "healed/healing/loss.png").is_file()
    done = surgery(
        "plan", "moba-heal", model, "sparse_prefill.last_layers_full=0", "heal.length=1024", "heal.steps=10"
    )
    said = " ".join(done.out.split())
    assert "heal: attention is sparse at first, and full in the last 1 of 10 steps" in said
    assert "heal: in a row of 1,024 tokens, if it is one document, a query reads" in said
    timed = surgery("plan", "moba-heal", model, "sparse_prefill.last_layers_full=0", "heal.length=1024",
                    "heal.tokens=null", "heal.minutes=5")  # fmt: skip
    assert "and full in the last 10% of the time" in " ".join(timed.out.split())


@pytest.mark.parametrize("top", [1, 2, 3])
def test_how_much_of_the_documents_is_read(top):
    """By loops over their queries, which read their own block up to themselves and so many blocks before it."""
    model = TINY["llama"]()
    package.apply(recipe(top=top), model)
    lengths = [64, 20, 44, 7, 5, 52, 64]  # four rows of 64
    read = pairs = 0
    for length in lengths:
        for place in range(length):
            block, inside = divmod(place, 16)
            read += inside + 1 + 16 * min(block, top - 1)
            pairs += place + 1
    rows = Packed([[1] * length for length in lengths], 64)
    found = keys_read(Anatomy.of(model), rows)["keys_read"]
    assert found == {"share": pytest.approx(read / pairs, abs=1e-12), "layers": 2, "of": 2}
    assert keys_read(Anatomy.of(TINY["llama"]()), rows) == {}


@pytest.mark.parametrize("share", ["-0.1", "1.1", "'much'", "true"])
def test_a_share_that_is_none(refused, model, share):
    refused("plan", "moba-heal", model, f"heal.full_from={share}", says=["full_from"])


def test_a_switch_where_nothing_is_sparse_is_refused(refused, surgery, model, text, tmp_path):
    says = ["full_from switches sparse prefill off, and no layer of this model has it", "heal.full_from=null"]
    refused("plan", "gqa-distill", model, "heal.full_from=0.9", "heal.length=1024", says=says)
    assert surgery("apply", "mqa", model, "-o", "out", "--no-check", "--no-eval", "-q").code == 0
    asked = (f"data={text}", "steps=2", "length=16", "batch_tokens=16", "full_from=0.9")
    refused("heal", "out", "-o", "healed", "--base", model, *asked, says=says)
    base = TINY["llama"](vocab_size=258)
    edited, step = copy.deepcopy(base), {"op": "moh", "router": "random"}
    plain = {"version": 1, "name": "x", "operations": [step], "evaluate": None}
    package.apply(plain, edited, tokenizer=byte_tokenizer())
    with pytest.raises(SurgeryError, match="no layer of this model has it"):
        package.heal(edited, base, tokenizer=byte_tokenizer(), steps=1, full_from=0.5, data="builtin", length=16)


def test_rows_that_are_read_whole_are_refused(healing, tmp_path):
    with pytest.raises(
        SurgeryError, match="rows of 64 tokens are read whole anyway: attention is sparse beyond 64"
    ) as caught:
        healing("healed", "full_from=0.5", fields={"top": 4})
    assert caught.value.fix == "heal.length=256, or heal.full_from=null"
    assert not (tmp_path / "healed").exists()
