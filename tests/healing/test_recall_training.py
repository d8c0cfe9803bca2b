"""`heal.recall` from settings to card: the rows that train, records, resume, stored teacher, what is refused."""

from __future__ import annotations

import pytest
from conftest import TEXT
from families import one_thread  # noqa: F401 (a fixture)
from killed import killed_at
from safetensors.torch import load_file

from surgery.api import heal as run_heal
from surgery.config.heal import Heal
from surgery.data import text_sources
from surgery.data.text import load_text
from surgery.healing import trainer as training
from surgery.io.files import read_json

SMALL = ("length=64", "batch_tokens=128", "steps=4", "checkpoint_every=2", "learning_rate=0.01", "method=parts")
QUICK = ("--no-check", "--no-eval", "-q")


@pytest.fixture
def long_text(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(" ".join([TEXT] * 4))
    return file


@pytest.fixture
def out(surgery, model, tmp_path):
    assert surgery("apply", "mqa", model, "-o", "out", *QUICK).code == 0
    return tmp_path / "out"


@pytest.fixture
def healing(out, model, long_text, tmp_path):
    def run(to="healed", *more, **options):
        asked = [*SMALL, f"data={long_text}", "recall=0.25", *more]
        given = {"check": False, "evaluate": False, "base": model} | options
        return run_heal(out, output=tmp_path / to, overrides=asked, **given)

    return run


def same(one, two) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    return all((ours[name] == theirs[name]).all() for name in ours)


def test_rows_are_recorded_and_trained_on(healing, monkeypatch, tmp_path):
    read, whole = [], training.HealTrainer.compute_loss

    def seen(self, model, inputs, *args, **kwargs):
        read.extend(map(tuple, inputs["input_ids"].tolist()))
        return whole(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(training.HealTrainer, "compute_loss", seen)
    report = healing()
    data = report.data["heal"]["data"]
    repeating = data["recall"]["rows"]
    assert report.data["heal"]["settings"]["recall"] == 0.25
    assert repeating / data["rows"] == pytest.approx(0.25, abs=0.04)
    assert repeating == sum(count for kind, count in data["recall"].items() if kind != "rows")
    assert len(read) == 8
    plain = healing("plain", "recall=0")
    assert "recall" not in plain.data["heal"]["data"]
    card = (tmp_path / "healed/README.md").read_text()
    assert (
        f"In {repeating:,} of the {data['rows']:,} rows something said earlier in the row comes back (passage" in card
    )
    assert "comes back" not in (tmp_path / "plain/README.md").read_text()
    assert not same(tmp_path / "healed", tmp_path / "plain")


def test_it_goes_on_to_the_same_weights(healing, tmp_path):
    healing("whole")
    with killed_at(3):
        healing()
    run = read_json(tmp_path / "healed.partial/healing/run.json")
    assert healing(resume=True).data["heal"]["resumed"]
    assert same(tmp_path / "healed", tmp_path / "whole")
    healing("other", "recall=0.5")
    assert len(run["data"]) == 64


def test_a_stored_teacher_and_a_layerwise_start_know_these_rows(healing):
    record = healing("healed", "teacher=stored", "top_k=64", "warm_start=128").data["heal"]
    assert record["steps"] == 4
    assert record["warm_start"]["tokens"] >= 128


def test_text_of_the_base(healing, surgery, model, tmp_path):
    data = healing("healed", "data=self", "steps=8", "recall=0.4").data["heal"]["data"]
    assert data["recall"]["rows"] >= 1
    assert data["data"] == "text that the base wrote itself"


def test_several_texts(healing, surgery, model, long_text, monkeypatch, tmp_path):
    """The base's text, the built-in and two files: recorded, on the card, resumed to the same end, healed again."""
    (tmp_path / "two").mkdir()
    (tmp_path / "two/long.txt").write_text("mat " * 2000)
    monkeypatch.setattr(
        text_sources, "load_text", lambda name, part=None: load_text(long_text if name == "builtin" else name)
    )
    texts = (f"data=[self, builtin, {long_text}, {tmp_path / 'two/long.txt'}]", "self_tokens=192", "steps=12")
    whole = healing("whole", *texts).data["heal"]
    own, *files = whole["data"]["sources"]
    assert 192 <= own["tokens"] < 384
    assert all(0 <= each["tokens"] - (12 * 128 - 192) // 3 < 64 for each in files)
    assert whole["data"]["recall"]["rows"] > 0
    names = ["self", "builtin", f"{tmp_path.name}/long.txt", "two/long.txt"]
    assert whole["settings"]["data"] == names, "no more of this machine's folders than tells two files apart"
    card = (tmp_path / "whole/README.md").read_text()
    named = [f"{each['data']} (sha256 `{each['sha256'][:12]}`, {each['tokens']:,} tokens)" for each in (own, *files)]
    assert all(words in card for words in named)
    assert f"'data=[{', '.join(names)}]'" in card
    assert str(tmp_path) not in card
    with killed_at(5):
        healing("healed", *texts)
    assert healing("healed", *texts, resume=True).data["heal"]["resumed"]
    assert same(tmp_path / "healed", tmp_path / "whole")
    again = run_heal(tmp_path / "whole", output=tmp_path / "again", overrides=["steps=1", "data=self"], base=model)
    assert again.data["heal"]["earlier"][0]["settings"]["data"] == names
    shown = surgery("plan", "gqa-distill", model, f"heal.data=[self, {long_text}]", "heal.length=64").out
    assert f"on self, {long_text}, " in " ".join(shown.split())


def test_the_plan_names_them(surgery, model, long_text):
    asked = ("heal.length=64", "heal.batch_tokens=128", "heal.tokens=1280", f"heal.data={long_text}")
    shown = " ".join(surgery("plan", "gqa-distill", model, "heal.recall=0.25", *asked).out.split())
    assert "heal: in 25% of the rows something said earlier comes back, 5 of 20 rows" in shown
    plan = surgery("plan", "gqa-distill", model, "heal.recall=0.25", *asked, "--json").json["heal"]
    assert (plan["recall_rows"], plan["settings"]["recall"]) == (5, 0.25)
    fits = ("heal.recall=0.25", "heal.length=1024")
    clock = " ".join(surgery("plan", "gqa-distill", model, *fits, "heal.minutes=1").out.split())
    assert "in 25% of the rows something said earlier comes back (passages" in clock
    assert "comes back" not in surgery("plan", "gqa-distill", model, "heal.recall=0", *asked).out


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("heal.length=2048",), ["rows of 2048 tokens are longer than the model", "heal.length=1024"]),
        (("heal.length=32",), ["heal.length 32 is too short for heal.recall", "heal.length=64"]),
        (
            ("heal.self_tokens=100", "heal.data=self", "heal.length=64"),
            ["fewer than 192, the 3 rows that heal.recall needs (heal.length 64)", "heal.self_tokens=192"],
        ),
        (("heal.self_tokens=640",), ["heal.self_tokens is read with data: self or conversations"]),
        (("heal.data=[self, nope.txt]", "heal.length=64"), ["no such text file", "nope.txt"]),
        (("heal.data=conversations",), ["data: conversations has none", "heal.data='[self, conversations]'"]),
        (("heal.chat=true",), ["with chat: true rows are conversations", "heal.recall=0"]),
        (("heal.recall=1",), ["recall", "less than 1"]),
        (("heal.recall=-0.5",), ["recall", "at least 0"]),
        (("heal.recall=often",), ["recall"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(refused, model, long_text, asked, says):
    recall = () if "recall=" in asked[0] else ("heal.recall=0.25",)
    refused("apply", "gqa-distill", model, f"heal.data={long_text}", *recall, *asked, "-o", "x", says=says)


def test_a_text_that_is_too_short_is_refused_before_the_conversion(refused, surgery, model, text, tmp_path):
    asked = (f"heal.data={text}", "heal.recall=0.25", "heal.length=256", "heal.batch_tokens=256")
    says = ["too short for heal.recall: it has 400 tokens", "need about 768", "heal.recall=0"]
    refused("apply", "gqa-distill", model, *asked, "-o", "x", says=says)


def test_only_who_sets_it_records_it():
    assert "recall" not in Heal(method="full", steps=1).identity()
    assert Heal(method="full", steps=1, recall=0.2).identity()["recall"] == 0.2
