"""The Python API, second round: objects that are no models, modes of modules, threads, pickles, a Hub of one's own."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from conftest import edit_record
from fake_hub import GOOD, READ_ONLY, FakeHub
from families import TINY
from tokenizers_of_bytes import byte_tokenizer

import surgery
from surgery import SurgeryError
from surgery.data.text import Text

MERGE = {"op": "gqa", "kv_heads": 2, "method": "mean"}
SPLIT = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 4}
QUICK = {"check": False, "evaluate": False}
HELLO = Text("a greeting", "0" * 64, "Hello!")
WORDS = Text("words", "0" * 64, "the quick brown fox jumps over the lazy dog. " * 40)
FEW = {"windows": 1, "length": 32, "text": WORDS}
TOKENIZER = byte_tokenizer(chat=True)


def recipe(*steps, **more) -> dict:
    return {"version": 1, "name": "x", "operations": list(steps), "evaluate": None} | more


def tiny():
    return TINY["llama"](vocab_size=300, max_position_embeddings=1024)


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- objects that are something else --------------------------------------------------------------

NO_MODEL = {
    "None": None,
    "a number": 5,
    "a config's class": transformers.LlamaConfig,
    "a model's class": transformers.LlamaForCausalLM,
    "a layer": torch.nn.Linear(2, 2),
    "a mapping": {},
    "a tokenizer": TOKENIZER,
    "weights": {"a": torch.ones(1)},
    "a recipe": recipe(MERGE),
}


@pytest.mark.parametrize("name", NO_MODEL)
@pytest.mark.parametrize("call", ["Anatomy.of", "plan", "apply", "evaluate", "heal"])
def test_what_is_no_model(name, call):
    value = NO_MODEL[name]
    calls = {
        "Anatomy.of": lambda: surgery.Anatomy.of(value),
        "plan": lambda: surgery.plan(recipe(MERGE), value),
        "apply": lambda: surgery.apply(recipe(MERGE), value),
        "evaluate": lambda: surgery.evaluate(value, tokenizer=TOKENIZER, **FEW),
        "heal": lambda: surgery.heal(value, tokenizer=TOKENIZER, steps=1),
    }
    with pytest.raises(SurgeryError):
        calls[call]()


@pytest.mark.parametrize("value", [None, 5, b"x", [], {}, object()])
def test_what_is_no_folder(value):
    for call in (surgery.Report.of, surgery.check, surgery.load, lambda path: surgery.push(path, "a/b", dry_run=True)):
        with pytest.raises(SurgeryError):
            call(value)


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("second")
    for name, step in (("native", MERGE), ("surgical", SPLIT)):
        surgery.apply(recipe(step), tiny, output=root / name, **QUICK)
    return root


@pytest.mark.parametrize("memory", ["1", float("nan"), float("inf"), -1, True, [1]])
def test_memory_that_is_no_number_of_bytes(checkpoints, memory):
    before = (checkpoints / "native/surgery.json").read_bytes()
    with pytest.raises(SurgeryError, match="memory"):
        surgery.check(checkpoints / "native", memory=memory)
    assert (checkpoints / "native/surgery.json").read_bytes() == before


@pytest.mark.parametrize("value", [None, 5, "report", {"format": 1}])
def test_a_callback_of_no_report(value):
    with pytest.raises(SurgeryError, match="Report"):
        surgery.SurgeryCallback(value)


@pytest.mark.parametrize("probe", [5, b"chat", "chat ", object(), ["chat"], {"chat": {}}])
def test_probes_that_are_none(probe):
    with pytest.raises(SurgeryError) as fault:
        surgery.evaluate(tiny(), probe=probe, tokenizer=TOKENIZER)
    assert "probe" in str(fault.value)
    assert len(str(fault.value)) < 2000


def test_a_probes_class_in_place_of_a_probe():
    from surgery.evaluation.probes.chat import Chat

    with pytest.raises(SurgeryError, match="probe"):
        surgery.evaluate(tiny(), probe=Chat, tokenizer=TOKENIZER)
    assert surgery.evaluate(tiny(), probe=Chat(tokens=1, requests=HELLO), tokenizer=TOKENIZER).status == "done"


# --- reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["surgical", "native"])
def test_a_report_from_the_folder_of_another_model(checkpoints, tmp_path, name):
    """Tier and heads of a report that was read from a folder are held against the model as well."""
    model = tiny()
    surgery.apply(recipe(SPLIT if name == "native" else MERGE), model)
    with pytest.raises(SurgeryError, match="report"):
        surgery.save(model, tmp_path / "out", surgery.Report.of(checkpoints / name))
    assert not list(tmp_path.iterdir())


def test_a_report_of_a_base_that_was_not_changed(tmp_path):
    """The report is of heads that a plain model has not."""
    report = surgery.apply(recipe(MERGE), tiny())
    with pytest.raises(SurgeryError, match="report"):
        surgery.save(tiny(), tmp_path / "out", report)
    assert not list(tmp_path.iterdir())


def test_a_report_from_the_folder_of_this_model(checkpoints, tmp_path):
    """A checkpoint that was loaded and trained on is saved with the report of its folder."""
    for name in ("native", "surgical"):
        model = surgery.load(checkpoints / name)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
        surgery.save(model, tmp_path / name, surgery.Report.of(checkpoints / name))
        assert same(state(surgery.load(tmp_path / name)), state(model))


OBJECTS = {
    "a plan": lambda base: surgery.plan(recipe(MERGE), base),
    "a recipe": lambda base: surgery.plan(recipe(MERGE), base).recipe,
    "an anatomy": lambda base: surgery.Anatomy.of(base),
    "a layer": lambda base: surgery.Anatomy.of(base).layers[0],
    "a report": lambda base: surgery.apply(recipe(MERGE), tiny()),
    "a result": lambda base: surgery.evaluate(base, **FEW),
    "a result of chat": lambda base: surgery.evaluate(base, probe="chat", tokens=1, requests=HELLO),
    "an error": lambda base: SurgeryError("x", where="y", exists="z", fix="w", others=(SurgeryError("v"),)),
    "an error of a gate": lambda base: surgery.GateError("x", where="y"),
    "an error of a check": lambda base: surgery.CheckError("x", fix="y"),
    "an error of the machine": lambda base: surgery.MachineError("x"),
}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_of_what_a_script_gets(base, name, way):
    """They go through a queue of processes, and say the same afterwards."""
    value = OBJECTS[name](base)
    made = pickle.loads(pickle.dumps(value)) if way == "pickle" else copy.deepcopy(value)
    assert type(made) is type(value)
    if isinstance(value, Exception):
        assert str(made) == str(value)
        assert made.exit_code == value.exit_code
    elif hasattr(value, "to_dict"):
        assert made.to_dict() == value.to_dict()


def test_everything_that_is_exported():
    names = {name: getattr(surgery, name) for name in surgery.__all__}
    assert set(dir(surgery)) == set(names)
    assert all(value is not None for value in names.values())
    scope: dict = {}
    exec("from surgery import *", scope)
    assert names.keys() - {"__version__"} <= scope.keys()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        surgery.nothing  # noqa: B018
    for name in (
        "apply",
        "check",
        "evaluate",
        "heal",
        "load",
        "plan",
        "push",
        "save",
        "register",
        "Anatomy",
        "Report",
    ):
        assert names[name].__doc__


# --- modes of modules -----------------------------------------------------------------------------


def mixed():
    """A model that trains, but for its first layer and its norm."""
    model = tiny().train()
    model.model.layers[0].eval()
    model.model.norm.eval()
    return model


def modes(model) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


SCORES = {
    "perplexity": FEW,
    "chat": {"tokens": 1, "requests": HELLO},
}


@pytest.mark.parametrize("probe", SCORES)
@pytest.mark.parametrize("role", ["out", "base"])
def test_a_model_of_which_a_part_trains(probe, role):
    """A score leaves every module in the mode that it had, not all of them in the model's own."""
    model = mixed()
    before, pair = modes(model), (model, tiny()) if role == "out" else (tiny(), model)
    surgery.evaluate(*pair, probe=probe, tokenizer=TOKENIZER, **SCORES[probe])
    assert modes(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_score_that_is_stopped(error):
    model = mixed()
    before = modes(model)

    def progress(*_):
        raise error("mine")

    with pytest.raises(error, match="mine"):
        surgery.evaluate(model, tokenizer=TOKENIZER, progress=progress, **FEW)
    assert modes(model) == before


def closed_form():
    return MERGE | {"method": "closed_form", "calibration_samples": 2, "calibration_length": 32}


@pytest.mark.parametrize("step", [MERGE, SPLIT, closed_form()], ids=["merged", "split", "measured"])
def test_a_surgery_of_a_model_of_which_a_part_trains(step):
    model = mixed()
    before = modes(model)
    surgery.apply(recipe(step), model, tokenizer=TOKENIZER)
    assert {name: value for name, value in modes(model).items() if name in before} == before


@pytest.mark.parametrize("fails", [False, True])
def test_healing_a_model_of_which_a_part_trains(tmp_path, fails):
    """What trains, what is frozen and every mode are afterwards as before, whether it ends well or not."""
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    model, base = tiny(), tiny()
    surgery.apply(recipe(MERGE), model)
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    before = modes(model), {name: p.requires_grad for name, p in model.named_parameters()}, state(model)
    settings = {"method": "parts", "data": str(tmp_path / "t.txt"), "length": 16, "batch_tokens": 32, "steps": 1}
    call = {"tokenizer": TOKENIZER, "evaluate": False, "precision": "float32", **settings}
    if fails:
        with pytest.raises(SurgeryError):
            surgery.heal(model, base, **call | {"temperature": 1e30})
        assert same(state(model), before[2])
    else:
        surgery.heal(model, base, **call)
        assert not same(state(model), before[2])
    assert modes(model) == before[0]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before[1]


# --- data of a healing ----------------------------------------------------------------------------

DATA = {
    "half a letter": ('{"text": "\\ud800 the quick brown fox jumps over the lazy dog"}\n' * 20, "j.jsonl:1"),
    "half a letter in a conversation": (
        '{"text": [{"role": "user", "content": "hi \\udfff the quick brown fox"}]}\n' * 20, "j.jsonl:1"),
    "numbers": ('{"text": 5}\n' * 20, "holds no text"),
    "a list in place of an object": ("[1]\n" * 20, "holds no JSON object"),
    "NaN": ('{"text": NaN}\n' * 20, "j.jsonl:1"),
    "a column less in the last line": ('{"text": "the quick brown fox"}\n' * 20 + '{"txt": "a"}\n', "j.jsonl:21"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_lines_that_hold_no_text(tmp_path, name):
    """The line is named, and the model stays as it was."""
    content, says = DATA[name]
    (tmp_path / "j.jsonl").write_text(content)
    model = tiny()
    surgery.apply(recipe(MERGE), model)
    before = state(model)
    with pytest.raises(SurgeryError) as fault:
        surgery.heal(model, tiny(), tokenizer=TOKENIZER, evaluate=False, precision="float32", method="parts", steps=1,
                     data=str(tmp_path / "j.jsonl"), length=16, batch_tokens=32,
                     chat="conversation" in name)  # fmt: skip
    assert says in str(fault.value)
    assert same(state(model), before)


@pytest.mark.parametrize(("loss", "top_k"), [("both", 10**9)])
def test_a_stored_teacher_that_keeps_all_is_the_live_one(checkpoints, tiny, tmp_path, top_k, loss):
    """All probabilities of 300 tokens on disk, or the base beside: the same weights but for rounding."""
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    settings = {"method": "parts", "data": str(tmp_path / "t.txt"), "length": 16, "batch_tokens": 32, "steps": 2}
    call = settings | {"precision": "float32", "loss": loss} | QUICK
    for name, more in (("live", {}), ("stored", {"teacher": "stored", "top_k": top_k})):
        surgery.heal(checkpoints / "native", tiny, output=tmp_path / name, **call, **more)
    live, stored = (state(surgery.load(tmp_path / name)) for name in ("live", "stored"))
    plain = state(surgery.load(checkpoints / "native"))
    moved = max((live[name] - plain[name]).abs().max() for name in live)
    apart = torch.cat([(live[name] - stored[name]).abs().flatten() for name in live]) > 0.05 * moved
    assert moved > 0
    assert apart.sum() <= 4, "Adam turns a weight whose gradient is rounding this way or that"


# --- threads --------------------------------------------------------------------------------------


def in_threads(*calls) -> list:
    """What each call gave or raised, all of them at once."""
    results: list = [None] * len(calls)
    ready = threading.Barrier(len(calls))

    def work(number, call):
        ready.wait()
        try:
            results[number] = call()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_threads_that_write_one_folder(base, tmp_path):
    """One wins, the other is told; the folder is whole."""
    call = lambda: surgery.apply(recipe(MERGE), base, output=tmp_path / "out", **QUICK)  # noqa: E731
    results = in_threads(call, call, call)
    reports = [each for each in results if isinstance(each, surgery.Report)]
    assert len(reports) == 1
    assert all(isinstance(each, SurgeryError) for each in results if each is not reports[0]), results
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
    assert surgery.load(tmp_path / "out").config.num_key_value_heads == 2


def test_threads_that_score_one_model():
    """Each gets the figures that it would get alone, and the model keeps its modes."""
    model, base = tiny().train(), tiny()
    surgery.apply(recipe(SPLIT), model)
    expected = surgery.evaluate(model, base, tokenizer=TOKENIZER, **FEW).to_dict()
    results = in_threads(*[lambda: surgery.evaluate(model, base, tokenizer=TOKENIZER, **FEW).to_dict()] * 3)
    assert all(each == expected for each in results), results
    assert model.training


def test_scores_that_overlap():
    """The first to end does not put a model that another thread still scores back into training."""
    from surgery.io.loading import eval_mode

    model = mixed()
    before, (first, second) = modes(model), (eval_mode(model), eval_mode(model))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(modes(model).values())
    second.__exit__(None, None, None)
    assert modes(model) == before


def test_plans_in_threads(base):
    results = in_threads(*[lambda: surgery.plan("gqa", base, kv_heads=2).changes] * 6)
    assert all(each == results[0] for each in results), results
    assert results[0]


# --- a Hub of one's own ---------------------------------------------------------------------------

PUSHES = """
import json, os, sys, surgery
from pathlib import Path
answers = {}
for name, (repo, options) in json.loads(sys.stdin.read()).items():
    os.environ["HF_TOKEN"] = options.pop("token")
    try:
        done = surgery.push(sys.argv[1], repo, **options)
        keys = ("repo", "visibility", "created", "removed", "warnings")
        answers[name] = {key: done[key] for key in keys if key in done}
    except surgery.SurgeryError as error:
        answers[name] = {"error": str(error), "code": error.exit_code}
    except BaseException as error:
        answers[name] = {"traceback": repr(error)}
print(json.dumps(answers))
"""


def pushed(hub, out: Path, pushes: dict, home: Path) -> dict:
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    env |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    given = json.dumps({name: [repo, {"token": GOOD} | more] for name, (repo, more) in pushes.items()})
    command = [sys.executable, "-c", PUSHES, str(out)]
    ran = subprocess.run(command, input=given, env=env, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_pushes_to_a_hub(checkpoints, tmp_path):
    out = tmp_path / "out"
    import shutil

    shutil.copytree(checkpoints / "surgical", out)
    edit_record(out, check={"passed": True, "items": []})
    with FakeHub() as hub:
        hub.add("me/foreign", {"model.safetensors": b"theirs"})
        hub.add(
            "me/ours", {"surgery.json": b"{}", "old.safetensors": b"old", "sub/x.safetensors": b"x", "a.txt": b"a"}
        )
        answers = pushed(hub, out, {
            "new": ["me/new", {}],
            "again": ["me/new", {"message": "line\n\nbody \u03b1"}],
            "public later": ["me/new", {"public": True}],
            "no owner": ["bare", {}],
            "foreign": ["me/foreign", {}],
            "foreign branch": ["me/foreign", {"revision": "mine"}],
            "ours": ["me/ours", {}],
            "dots": ["me/..", {}],
            "a path": ["me/a/b", {}],
            "nothing": ["", {}],
            "a number": [5, {}],
            "no message": ["me/new", {"message": ""}],
            "a number as message": ["me/new", {"message": 5}],
            "a number as branch": ["me/new", {"revision": 5}],
            "not allowed": ["me/other", {"token": READ_ONLY}],
            "a branch of dots": ["me/new", {"revision": "a..b"}],
        }, tmp_path / "home")  # fmt: skip
        assert not [name for name, answer in answers.items() if "traceback" in answer], answers
        assert answers["new"]["created"]
        assert not answers["again"]["created"]
        assert answers["public later"]["visibility"] == "private"
        assert any("stays private" in word for word in answers["public later"]["warnings"])
        assert answers["no owner"]["repo"] == "me/bare"
        assert "not ours" in answers["foreign"]["error"]
        assert hub.repos["me/foreign"].files() == {"model.safetensors": b"theirs"}
        assert "surgery.json" in hub.repos["me/foreign"].files("mine")
        assert answers["ours"]["removed"] == ["old.safetensors"]
        assert {"sub/x.safetensors", "a.txt"} <= hub.repos["me/ours"].files().keys()
        sent = hub.repos["me/new"].files()
        here = {path.name: path.read_bytes() for path in out.iterdir()}
        card, record = (here.pop(name).decode() for name in ("README.md", "surgery.json"))
        assert sent.pop("README.md").decode() == card.replace("OWNER/NAME", "me/new"), (
            "what is sent names the repository"
        )
        known, pushed_record = json.loads(record), json.loads(sent.pop("surgery.json"))
        assert pushed_record.pop("repository") == "me/new"
        for each in (known, pushed_record):  # the hash of the card, and the record's own
            each.pop("record_sha256", None)
            del each["other_files"]["README.md"]
        assert pushed_record == known
        assert {name: sent[name] for name in sent if name != ".gitattributes"} == here
        for name in ("dots", "a path", "nothing", "a number", "a number as message", "a number as branch"):  # usage
            assert answers[name].get("code") == 2, (name, answers[name])
        read_only = answers["not allowed"]
        assert read_only["code"] in (2, 5)
        assert READ_ONLY not in read_only["error"]
        assert "me/other" not in hub.repos
