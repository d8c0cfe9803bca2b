"""What a training reports to gets the scores and the gate too, in the same run; one that fails costs no result."""

from __future__ import annotations

import gc
import json
import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import yaml
from families import one_thread  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import surgery as package
from surgery.errors import MachineError
from surgery.healing.trackers import Tracker, figures
from surgery.report.report import Report

STEPS = 3
SMALL = {"method": "parts", "loss": "distill", "length": 16, "batch_tokens": 32, "steps": STEPS, "learning_rate": 0.01}


class Notebook(TrainerCallback):
    """A tracker that keeps what it is told: (event, step, logs)."""

    lines: ClassVar[list[tuple]]
    fails: ClassVar[set[tuple[str, int]]] = set()  # (event, step) at which it raises

    def __init__(self):
        type(self).lines = []

    def _note(self, event, state, logs=None):
        if (event, state.global_step) in self.fails:
            raise ConnectionError("the service is gone: https://me:SECRET@tracker")
        self.lines.append((event, state.global_step, dict(logs or {})))

    def on_train_begin(self, args, state, control, **kwargs):
        self._note("begin", state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._note("log", state, logs)

    def on_train_end(self, args, state, control, **kwargs):
        self._note("end", state)


@pytest.fixture
def notebook(monkeypatch):
    """`heal.report_to: notebook`."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "notebook", Notebook)
    monkeypatch.setattr(
        "transformers.integrations.get_available_reporting_integrations", lambda: ["notebook", "tensorboard"]
    )
    monkeypatch.setattr(Notebook, "fails", set())
    return Notebook


@pytest.fixture
def healed(surgery, model, text, tmp_path):
    """`apply` of a recipe that heals, with a gate on the KL."""

    def run(tracker, *options, limit=9.0, code=0):
        recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
        recipe |= {"heal": SMALL | {"data": text.name, "report_to": tracker}}
        recipe |= {"evaluate": {"text": text.name, "windows": 1, "length": 16, "max_kl": limit}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        done = surgery("apply", "r.yaml", model, "-o", "out", "--no-check", *options)
        assert done.code == code, done.out + done.err
        done.report = Report.of(tmp_path / "out")
        return done

    return run


def expected(report) -> dict[str, float]:
    """The scores of a record, taken from it by hand."""
    evaluation, heal = report.data["evaluation"], report.data["heal"]
    values = {"eval_kl": evaluation["kl"]["mean"], "eval_kl_unhealed": heal["converted"]["kl"]}
    values |= {"eval_perplexity": evaluation["out"]["perplexity"]}
    values |= {"eval_perplexity_base": evaluation["base"]["perplexity"]}
    values |= {"eval_perplexity_unhealed": heal["converted"]["perplexity"]}
    values |= {"eval_loss": math.log(values["eval_perplexity"]), "eval_recovered_kl": heal["recovered"]["kl"]}
    return values | {"eval_loss_base": math.log(values["eval_perplexity_base"])}


@pytest.mark.parametrize(("limit", "code", "passed"), [(9.0, 0, 1.0), (1e-9, 3, 0.0)])
def test_scores_and_gate_come_before_the_end(healed, notebook, limit, code, passed):
    done = healed("notebook", limit=limit, code=code)
    events = [(event, step) for event, step, _ in notebook.lines]
    assert events[0] == ("begin", 0)
    assert events[-2:] == [("log", STEPS), ("end", STEPS)], "the last figures, then the end"
    assert [event for event, _ in events].count("end") == 1
    trained = [step for event, step, logs in notebook.lines if "kl" in logs]
    assert sorted(set(trained)) == [1, 2, 3], "the training's own figures as before"
    told = notebook.lines[-2][2]
    assert told["eval_gate_passed"] == passed
    wanted = expected(done.report)
    assert {name: told[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    assert all(name.startswith("eval_") and math.isfinite(value) for name, value in told.items())


def test_without_scores_the_run_is_ended_all_the_same(healed, notebook):
    healed("notebook", "--no-eval")
    assert [event for event, *_ in notebook.lines][-1] == "end"
    assert not any(name.startswith("eval_") for *_, logs in notebook.lines for name in logs)


def test_a_skipped_gate_has_no_verdict(healed, notebook):
    healed("notebook", "--no-gate", limit=1e-9)
    assert "eval_gate_passed" not in notebook.lines[-2][2]
    assert "eval_perplexity" in notebook.lines[-2][2]


@pytest.mark.parametrize(
    ("fails", "last"),
    [(("log", 2), "nothing was reported to it after step 2"), (("end", STEPS), "after step 3")],
)
def test_a_tracker_that_fails_costs_no_result(healed, notebook, monkeypatch, caplog, fails, last):
    monkeypatch.setattr(Notebook, "fails", {fails})
    done = healed("notebook")
    assert done.report.data["heal"]["steps"] == STEPS
    assert done.report.gate == "passed"
    (fault,) = done.report.data["heal"]["tracker_faults"]
    assert fault.startswith("Notebook: ConnectionError; nothing was reported to it after step ")
    assert last in fault
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Notebook: ConnectionError: the service is gone: ")
    assert said.endswith(f"{last}. The result is not affected.")
    assert fault in " ".join(str(done.report).split())
    assert "SECRET" not in json.dumps(done.report.data), "the record is published"


def test_a_tracker_that_fails_before_the_first_step_is_an_error(surgery, model, text, tmp_path, notebook, monkeypatch):
    assert surgery("apply", "mqa", model, "-o", "out", "--no-check", "--no-eval", "-q").code == 0
    monkeypatch.setattr(Notebook, "fails", {("begin", 0)})
    with pytest.raises(MachineError, match=r"the tracker cannot begin: Notebook: .*the service is gone"):
        package.heal(tmp_path / "out", model, output=tmp_path / "h", data=str(text), report_to="notebook", **SMALL)
    assert not (tmp_path / "h").exists()


def test_a_score_of_a_model_in_memory_joins_its_run(tiny_llama, text, notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = (each.from_pretrained(tiny_llama) for each in (AutoModelForCausalLM, AutoTokenizer))
    asked = {"text": str(text), "windows": 1, "length": 16, "max_kl": 9.0}
    report = package.apply(
        {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1}], "evaluate": asked},
        model, tokenizer=tokenizer,
    )  # fmt: skip
    package.heal(model, tiny_llama, tokenizer=tokenizer, data=str(text), report_to="notebook", **SMALL)
    assert "end" not in [event for event, *_ in notebook.lines]
    package.evaluate(model, tiny_llama, report=report, tokenizer=tokenizer)
    event, step, told = notebook.lines[-1]
    assert (event, step, told["eval_gate_passed"]) == ("log", STEPS, 1.0)
    assert told["eval_kl"] == report.kl
    before = len(notebook.lines)
    package.evaluate(model, tiny_llama, report=report, tokenizer=tokenizer)
    assert len(notebook.lines) == before, "what was reported is not repeated"
    del model
    gc.collect()
    assert notebook.lines[-1][0] == "end"
    assert [event for event, *_ in notebook.lines].count("end") == 1


def test_one_without_figures_ends_with_the_training():
    """As CodeCarbon, which would otherwise count what scoring costs."""
    ends = []

    class Meter(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            ends.append(1)

    tracker = Tracker(Meter(), waits=True)
    tracker.on_train_end(SimpleNamespace(output_dir="x"), SimpleNamespace(global_step=1), None)
    assert ends == [1]
    tracker.close()
    assert ends == [1]


def test_figures_of_tasks_have_their_names():
    row = {"metric": "acc", "of": 4, "out": 0.5, "base": 0.75, "drop": 0.25}
    evaluation = {"status": "done", "out": {"perplexity": math.inf}, "base": {}, "kl": None}
    evaluation |= {"tasks": {"status": "done", "tasks": {"piqa": row, "niah_single_1 4096": row}}}
    values = figures({"evaluation": evaluation, "gate": {"status": "not run"}})
    assert values == {
        "piqa_acc": 0.5, "piqa_acc_base": 0.75, "niah_single_1_4096_acc": 0.5, "niah_single_1_4096_acc_base": 0.75
    }  # fmt: skip
    assert figures({"evaluation": None, "gate": {"status": "not run"}}) == {}


# --- tensorboard, which writes files --------------------------------------------------------------------------------


def scalars(folder) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard itself reads the one run below a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (run,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    events = accumulator.EventAccumulator(str(run)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_has_training_scores_and_gate_in_one_run(healed, tmp_path, surgery, model):
    pytest.importorskip("tensorboard")
    done = healed("tensorboard")
    assert not list(tmp_path.glob("out.partial*")), "nothing is written where the folder was"
    found = scalars(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/healing/metrics.jsonl").read_text().splitlines()]
    assert found["train/kl"] == pytest.approx({line["step"]: line["kl"] for line in lines}, rel=1e-5)
    for name, value in expected(done.report).items():
        assert found[name.replace("eval_", "eval/")] == pytest.approx({STEPS: value}, rel=1e-5)
    assert found["eval/gate_passed"] == {STEPS: 1.0}
    checked = surgery("check", "out", "--base", model)
    assert checked.code == 0, checked.out + checked.err


def test_tensorboard_in_memory_writes_where_scripts_do(tiny_llama, text, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = (each.from_pretrained(tiny_llama) for each in (AutoModelForCausalLM, AutoTokenizer))
    asked = {"text": str(text), "windows": 1, "length": 16}
    report = package.apply(
        {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1}], "evaluate": asked},
        model, tokenizer=tokenizer,
    )  # fmt: skip
    package.heal(model, tiny_llama, tokenizer=tokenizer, data=str(text), report_to="tensorboard", **SMALL)
    package.evaluate(model, tiny_llama, report=report, tokenizer=tokenizer)
    found = scalars(tmp_path / "runs")
    assert set(found["train/kl"]) == {1, 2, 3}
    assert found["eval/perplexity"] == pytest.approx({STEPS: report.perplexity}, rel=1e-5)
