"""`heal.loss` as words, names and weights: what is taken and refused, and what plan, schema, card and metrics say."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from families import one_thread  # noqa: F401 (a fixture)
from safetensors.torch import load_file

from surgery.config import recipe as recipes
from surgery.config.heal import Heal
from surgery.config.heal_overrides import settings
from surgery.errors import SurgeryError
from surgery.healing import losses
from surgery.healing.callbacks import read
from surgery.healing.losses import objective
from surgery.healing.losses.base import (
    BASE_LOGITS,
    BASE_STATES,
    BaseLogits,
    BaseTopK,
    Chunk,
    LogitLoss,
    LossInputs,
    StateLoss,
)
from surgery.healing.teacher import top_k_and_rest
from surgery.report.card import render_card
from surgery.report.report import Report

MANY = {"hidden": 0.1, "kl": 1, "ce": 0.5}
METRICS = {"step", "tokens", "seconds", "loss", "balance", "learning_rate", "gradient_norm", "tokens_per_second"}


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({"loss": "ce"}, {"ce": 1.0}),
        ({"loss": "distill"}, {"kl": 1.0}),
        ({"loss": "both", "mix": 0.3}, {"ce": 0.3, "kl": 0.7}),
        ({"loss": "ce", "hidden": 0.2}, {"ce": 1.0, "hidden": 0.2}),
        ({"loss": "both", "hidden": 0.1}, {"ce": 0.5, "kl": 0.5, "hidden": 0.1}),
        ({"loss": "kl"}, {"kl": 1.0}),
        ({"loss": MANY}, {"ce": 0.5, "kl": 1.0, "hidden": 0.1}),
        ({"loss": {"kl": "1e-1", "ce": 0}}, {"kl": 0.1}),  # YAML 1.1 reads 1e-1 as text
    ],
)
def test_every_spelling_is_weights_in_one_order(fields, weights):
    heal = Heal(steps=1, **fields)
    assert heal.weights == weights
    assert list(heal.weights) == [name for name in losses.LOSSES if name in weights], "sums do not depend on spelling"
    assert Heal(**heal.model_dump()) == heal


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ({"kl": -1}, "the weight of kl should be a number from 0 to 1,000,000; it is -1"),
        ({"kl": math.nan}, "the weight of kl should be a number from 0 to 1,000,000; it is nan"),
        ({"kl": math.inf}, "from 0 to 1,000,000; it is inf"),
        ({"kl": "nan"}, "from 0 to 1,000,000; it is nan"),
        ({"kl": 10**400}, "the weight of kl should be a number"),
        ({"kl": 1e300}, "from 0 to 1,000,000; it is 1e.300"),
        ({"kl": True}, "from 0 to 1,000,000; it is True"),
        ({"kl": None}, "from 0 to 1,000,000; it is None"),
        ({"kl": 0, "ce": 0.0}, "all weights are 0"),
        ({}, "it names no loss"),
        ({"kll": 1}, "unknown loss 'kll'"),
        ({1: 1}, "unknown loss 1"),
        (["kl"], "'both', the name of a loss, or weights of losses; it is \\['kl'\\]"),
        (None, "or weights of losses; it is None"),
    ],
)
def test_weights_that_cannot_be_are_refused(loss, says):
    with pytest.raises(ValueError, match=says):
        Heal(steps=1, loss=loss)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"loss": {"kl": 1}, "hidden": 0.1}, "hidden is read with a word as loss .ce, distill, both., .* {kl: 1}"),
        ({"loss": "hidden", "hidden": 0.1}, "hidden is read with a word as loss"),
        ({"loss": {"kl": 1}, "mix": 0.3}, "mix is read with loss: both, and this is {kl: 1}"),
        ({"loss": {"ce": 1}, "temperature": 2}, "temperature is read by distillation, and this is loss: {ce: 1}"),
        ({"loss": {"ce": 1}, "teacher": "stored"}, "teacher is read where a teacher is asked, and loss: {ce: 1}"),
        ({"loss": {"kl": 1, "hidden": 1}, "teacher": "stored"}, "heal.loss: hidden needs the base's hidden states"),
        ({"hidden": 1, "teacher": "stored"}, "heal.hidden needs the base's hidden states, which teacher: stored"),
    ],
)
def test_fields_that_no_loss_reads_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Heal(steps=1, **fields)


def test_what_a_loss_says_of_itself_is_what_the_training_asks():
    def asks(loss):
        heal = Heal(steps=1, loss=loss, data="builtin")
        assert heal.needs_base == bool(heal.loss_needs)
        return heal.loss_needs, heal.reads_probabilities, heal.reads_states

    assert asks({"ce": 2}) == (set(), False, False)
    assert asks("kl") == ({BASE_LOGITS}, True, False)
    assert asks({"ce": 1, "hidden": 1}) == ({BASE_STATES}, False, True)
    assert asks({"kl": 1, "hidden": 1}) == ({BASE_LOGITS, BASE_STATES}, True, True)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_entry_of_the_registry_keeps_the_contract(name):
    loss = losses.find(name)
    assert isinstance(loss, LogitLoss | StateLoss)
    assert name not in METRICS, "its mean is a column of metrics.jsonl"
    for words in (loss.summary, loss.goal, loss.method):
        assert len(words) > 5
    assert loss.needs <= {BASE_LOGITS, BASE_STATES}
    assert (BASE_STATES in loss.needs) == isinstance(loss, StateLoss)
    if BASE_STATES in loss.needs:
        assert loss.not_stored == BASE_STATES, "a stored teacher keeps no hidden states"
    assert losses.goals(name) == f"{loss.goal} ({loss.method})"
    kinds = recipes.schema()["$defs"]
    for method in ("Lora", "Full", "Parts"):
        field = kinds[method]["properties"]["loss"]
        assert field["default"] == "distill"
        word, weights = field["anyOf"]
        assert {name, "ce", "distill", "both"} <= set(word["enum"])
        bounds = {"type": "number", "minimum": 0, "maximum": 1e6}
        assert weights["properties"][name] == bounds | {"description": loss.summary}
        assert weights["additionalProperties"] is False


def test_an_unknown_name_is_refused_by_the_registry():
    with pytest.raises(SurgeryError, match="unknown loss 'hiden'") as caught:
        losses.find("hiden")
    assert caught.value.fix == "did you mean 'hidden'?"


def test_the_registry_and_the_settings_import_no_torch():
    code = (
        "import sys; from surgery.config import recipe; from surgery.healing import losses;"
        "recipe.load('gqa', ['heal.steps=1', 'heal.loss={kl: 1, hidden: 1}']); recipe.schema();"
        "[losses.find(name) for name in losses.LOSSES]; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


class Squares(LogitLoss):
    """Σ (z − target)² of each row: a loss that does not know its gradient."""

    summary, goal, method = "Squares.", "the base's logits", "squared distance"

    def rows(self, chunk, inputs):
        return (chunk.logits - inputs.base.flat[chunk.rows].to(chunk.logits)).square().sum(-1)


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["chunks of a row", "one chunk"])
def test_a_loss_without_a_gradient_gets_autograds(monkeypatch, size):
    monkeypatch.setitem(objective.CHUNK, "cpu", size)
    generator = torch.Generator().manual_seed(0)
    student, base = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = torch.rand(2, 5, generator=generator) > 0.3
    inputs = LossInputs(kept, torch.randint(7, (2, 5), generator=generator), BaseLogits(base))
    student.requires_grad_()
    asked = {"squares": (0.5, Squares()), "kl": (2.0, losses.find("kl"))}
    loss, means = objective.measure(student, asked, inputs)
    assert means["squares"].item() == pytest.approx((student - base).square().sum(-1)[kept].mean().item(), rel=1e-12)
    (found,) = torch.autograd.grad(loss, student)
    log_q, log_p = student.log_softmax(-1), base.log_softmax(-1)
    rows = 0.5 * (student - base).square().sum(-1) + 2.0 * (log_p.exp() * (log_p - log_q)).sum(-1)
    (want,) = torch.autograd.grad(rows[kept].mean(), student)
    assert (found - want).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda x: objective.measure(x, asked, inputs)[0], [student])
    with torch.no_grad():
        assert objective.measure(student, asked, inputs)[0].item() == pytest.approx(loss.item(), rel=1e-14)


@pytest.mark.parametrize("name", [name for name in losses.LOSSES if isinstance(losses.find(name), LogitLoss)])
@pytest.mark.parametrize("stored", [False, True], ids=["the base's logits", "a stored teacher"])
def test_every_gradient_is_that_of_finite_differences(name, stored):
    generator = torch.Generator().manual_seed(1)
    student, base = (3 * torch.randn(1, 6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = losses.find(name)
    if stored and loss.not_stored:
        pytest.skip("refused with a stored teacher")
    given = BaseTopK(*(part[None] for part in top_k_and_rest(base[0], 4, 1.7))) if stored else BaseLogits(base)
    labels = torch.randint(9, (1, 6), generator=generator)
    inputs = LossInputs(torch.ones(1, 6, dtype=torch.bool), labels, given, temperature=1.7)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective.measure(x, {name: (0.7, loss)}, inputs)[0], [student])
    with torch.no_grad():
        rows = loss.rows(Chunk(slice(0, 6), student[0]), inputs)
    assert objective.measure(student, {name: (1.0, loss)}, inputs)[0].item() == pytest.approx(rows.mean().item())


def test_a_loss_of_neither_kind_is_its_authors_fault():
    with pytest.raises(TypeError, match="defines neither rows nor rows_and_slopes"):
        type("Empty", (LogitLoss,), {})


def test_hidden_states_alone_are_a_loss():
    generator = torch.Generator().manual_seed(2)
    states = tuple(torch.randn(1, 4, 3, generator=generator, requires_grad=True) for _ in range(2))
    theirs = tuple(torch.randn(1, 4, 3, generator=generator) for _ in range(2))
    inputs = LossInputs(torch.ones(1, 4, dtype=torch.bool), states=states, base_states=theirs)
    loss, means = objective.measure(torch.zeros(1, 4, 5), {"hidden": (0.5, losses.find("hidden"))}, inputs)
    want = sum(((s - t).square().sum(-1) / t.square().sum(-1)).mean() for s, t in zip(states, theirs, strict=True)) / 2
    assert means["hidden"].item() == pytest.approx(want.item(), rel=1e-6)
    assert loss.item() == pytest.approx(0.5 * want.item(), rel=1e-6)
    loss.backward()
    assert all(state.grad.abs().sum() > 0 for state in states)


def test_weights_of_a_command_stand_in_place_of_the_recipes_word():
    known = {"heal": Heal(steps=3, loss="both", mix=0.3, hidden=0.1).model_dump(), "evaluate": None}
    heal, _ = settings(known, overrides=["loss={kl: 1, ce: 0.5}"])
    assert heal == Heal(steps=3, loss={"kl": 1, "ce": 0.5})  # mix and hidden of the recipe go with its word
    assert settings(known, loss={"kl": 2})[0].weights == {"kl": 2.0}
    assert recipes.load("gqa", ["heal.steps=3", "heal.loss={kl: 1}"]).heal.weights == {"kl": 1.0}
    with pytest.raises(SurgeryError, match="hidden is read with a word"):
        settings(known, overrides=["loss={kl: 1}", "hidden=0.2"])
    for broken in ("[1]", "7", "{kl: {ce: 1}}", "{kl: }"):
        with pytest.raises(SurgeryError, match="loss"):
            settings(known, overrides=[f"loss={broken}"])


FILE = """version: 1
name: mine
operations:
  - {op: gqa, kv_heads: 1}
heal:
  steps: 2
  loss: LOSS
"""


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ("{kll: 1}", ["mine.yaml:7: heal.loss names an unknown loss 'kll'", "ce, kl", "did you mean 'kl'?"]),
        ("{kl: -1}", ["mine.yaml:7: heal.loss: the weight of kl should be a number from 0 to 1,000,000; it is -1"]),
        ("{kl: .nan}", ["mine.yaml:7: heal.loss: the weight of kl", "it is nan"]),
        ("{kl: 0}", ["mine.yaml:7: heal.loss: all weights are 0"]),
        ("distil", ["loss should be 'ce', 'distill' or 'both'", "it is 'distil'", "did you mean 'distill'?"]),
        ("{kl: 1, hidden: 1}\n  teacher: stored", ["heal.loss: hidden needs the base's hidden states"]),
    ],
)
def test_bad_losses_name_their_line(refused, model, tmp_path, loss, says):
    (tmp_path / "mine.yaml").write_text(FILE.replace("LOSS", loss))
    refused("plan", "mine.yaml", model, says=says)


def test_a_loss_that_needs_a_base_where_there_is_none(surgery, refused, model, text, tmp_path):
    quick = ("--no-check", "--no-eval", "-q")
    assert surgery("apply", "mqa", model, "-o", "out", *quick).code == 0
    asked = ("heal", "out", f"data={text}", "length=16", "batch_tokens=32", "steps=1", "-o", "healed", "--no-eval")
    refused(*asked, "loss={kl: 1}", says=["the base is not known here", "--base MODEL"])
    refused(*asked, "loss={ce: 1, hidden: 1}", says=["the base is not known here", "--base MODEL"])
    assert surgery(*asked, "loss={ce: 2}", "method=parts", "--no-check").code == 0  # asks no base


def test_weights_from_plan_to_card(surgery, model, text, tmp_path):
    """One run: plan, metrics, record and card; and its halves' weights give the same file."""
    quick = ("--no-check", "--no-gate", "-q")
    assert surgery("apply", "mqa", model, "-o", "out", *quick, "--no-eval").code == 0
    asked = ("heal", "out", f"data={text}", "length=16", "batch_tokens=32", "steps=2", "method=parts")
    more = ("--base", model, *quick, "--no-eval")
    shown = surgery("plan", "mqa", model, "heal.steps=2", "heal.loss={kl: 1, ce: 0.5}", "heal.method=parts")
    assert "towards the next token of the text and the base's probabilities ({ce: 0.5, kl: 1})" in shown.out
    assert surgery(*asked, "loss={hidden: 0.1, kl: 0.5, ce: 0.5}", "-o", "weights", *more).code == 0
    assert surgery(*asked, "loss=both", "hidden=0.1", "-o", "words", *more).code == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("weights", "words"))
    assert all(torch.equal(one[name], other[name]) for name in one), "words are weights"
    for line in read(tmp_path / "weights/healing/metrics.jsonl"):
        total = 0.5 * line["ce"] + 0.5 * line["kl"] + 0.1 * line["hidden"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    record = Report.of(tmp_path / "weights").data["heal"]
    assert record["settings"]["loss"] == {"ce": 0.5, "kl": 0.5, "hidden": 0.1}
    card = (tmp_path / "weights/README.md").read_text()
    goals = "the next token of the text, the base's probabilities and the base's hidden states"
    assert f"towards {goals}" in card
    assert surgery("heal", "weights", f"data={text}", "loss=ce", "-o", "again", *more).code == 0
    assert "{ce: 0.5, kl: 0.5, hidden: 0.1}" in (tmp_path / "again/README.md").read_text()  # what it was healed with
    data = Report.of(tmp_path / "again").data
    data["heal"]["settings"]["loss"] = {"newer": 1, "ce": 1}
    assert "towards the next token of the text" in render_card(data, None), "a newer version's record has a card too"
