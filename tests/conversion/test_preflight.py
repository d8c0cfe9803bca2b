"""What is refused before anything is written, and that options reach those who read them."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections import namedtuple

import pytest
import torch
from families import one_thread  # noqa: F401 (a fixture)

import surgery as package
from surgery.config.options import RunOptions
from surgery.conversion import preflight
from surgery.errors import MachineError
from surgery.io.output_folder import SPARE_BYTES

FAST = ("--no-check", "--no-eval", "-q")
HEAL = ("heal.steps=2", "heal.length=16", "heal.batch_tokens=32", "heal.data=builtin")


def disk_of(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))


def test_options_are_the_keywords_of_the_public_functions():
    fields = {field.name: field.default for field in dataclasses.fields(RunOptions)}
    for function in (package.apply, package.heal):
        given = {n: p for n, p in inspect.signature(function).parameters.items() if n in fields}
        assert all(parameter.default == fields[name] for name, parameter in given.items())
        assert set(fields) - set(given) <= ({"engine", "allow_pickle"} if function is package.heal else set())


def test_every_argument_of_the_public_functions_has_a_type():
    from surgery import api

    for name in ("plan", "apply", "heal", "check", "evaluate", "evaluate_needles", "evaluate_choices", "load"):
        signature = inspect.signature(getattr(api, name))
        untyped = [n for n, p in signature.parameters.items() if p.annotation is inspect.Parameter.empty]
        assert (untyped, signature.return_annotation is not inspect.Signature.empty) == ([], True), name


def test_a_healing_that_will_not_fit_on_the_disk_is_refused_before_the_model_is_converted(
    refused, surgery, model, monkeypatch
):
    """Twice the model and its checkpoints are needed; there is room for the converted model alone."""
    plan = package.plan("mqa", model, overrides=HEAL)
    both = 2 * plan.output_bytes + plan.heal.disk_bytes
    asked = ("apply", "mqa", model, *HEAL, "-o", "out", *FAST)
    disk_of(monkeypatch, both + SPARE_BYTES - 1)
    refused(*asked, says=["the disk is too small", "free some space"], code=5)
    disk_of(monkeypatch, both + SPARE_BYTES)
    assert surgery(*asked).code == 0


def test_the_disk_is_asked_of_the_nearest_folder_that_exists(tmp_path, monkeypatch, model):
    seen = []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: seen.append(path) or usage(1, 1, 0))
    plan = package.plan("mqa", model)
    with pytest.raises(MachineError, match="the disk is too small") as caught:
        preflight.preflight(plan, model, tmp_path / "a/b/out", RunOptions(evaluate=False))
    assert seen == [tmp_path]
    assert caught.value.where == str(tmp_path / "a/b")


@pytest.mark.parametrize("more", [(), HEAL])
def test_a_folder_that_is_not_ours_is_refused(refused, model, tmp_path, more):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    refused("apply", "mqa", model, *more, "-o", "out", *FAST, says=["out: OUT exists", "add --overwrite"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("heal.eval_every=1", "evaluate=null"), ["eval_every compares the model with its base", "a recipe that"]),
        (
            ("heal.eval_every=1", "heal.stop_at_gate=true", "evaluate={needles: 4, min_needles: 0.5}"),
            ["stop_at_gate: the recipe has no limit that can be watched", "max_kl"],
        ),
    ],
)
def test_a_healing_that_cannot_be_watched_is_refused_before_the_model_is_converted(refused, model, more, says):
    refused("apply", "mqa", model, *HEAL, *more, "-o", "out", *FAST, says=says)


def test_a_model_in_memory_is_not_edited_where_its_healing_cannot_be_watched(model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    overrides = [*HEAL, "heal.eval_every=1", "evaluate=null"]
    with pytest.raises(package.SurgeryError, match="eval_every compares the model"):
        package.apply("mqa", loaded, tokenizer=tokenizer, overrides=overrides)
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_healed_folder_may_not_be_its_base_nor_lie_in_it(refused, model):
    for out in (model, f"{model}/out"):
        refused("apply", "mqa", model, *HEAL, "-o", out, "--overwrite", *FAST, says=["may not be the model folder"])


def test_the_plan_is_shown_once_and_before_what_is_refused(model, tmp_path):
    plans = []
    with pytest.raises(package.SurgeryError, match="no such text file"):
        package.apply("mqa", model, output=tmp_path / "out", heal={"steps": 1, "data": "no.txt"}, on_plan=plans.append)
    assert [plan.recipe.heal.steps for plan in plans] == [1]
    quick = {"check": False, "evaluate": False, "gate": False}
    settings = {"steps": 1, "length": 16, "batch_tokens": 16, "data": "builtin", "method": "parts"}
    report = package.apply("mqa", model, output=tmp_path / "out", heal=settings, on_plan=plans.append, **quick)
    assert len(plans) == 2
    assert report.folder == tmp_path / "out"
    assert report.data["gate"]["status"] in ("skipped", "not run")
    assert not (tmp_path / "out.unhealed").exists()
