"""`surgery score` and `surgery inspect --heads` through the command."""

from __future__ import annotations

import json

import pytest
from recalls import plant_answers

from surgery.calibration.head_scores import HeadScores
from surgery.cli.render.heads import HeadMap, tenth_of
from surgery.operations.head_scorers.scorers import METHODS

SPLIT = ("--no-check", "--no-eval", "sinks=2", "window=6")


@pytest.fixture
def score(surgery, model, text):
    """`surgery score` of the tiny model on a text that it knows."""
    small = ("--sinks", 2, "--window", 6, "--samples", 2, "--length", 190, "--text", text)

    def run(*args):
        return surgery("score", model, *small, *args)

    return run


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_file_that_apply_takes(score, surgery, model, method, tmp_path, monkeypatch):
    plant_answers(monkeypatch)
    done = score("--method", method, "-o", "scores.json", *(["--steps", 2] if method == "gates" else []))
    assert done.code == 0, done.err
    assert "wrote scores.json" in done.out
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["method"] == method
    assert [len(row) for row in found["scores"]] == [3, 3]
    assert found["origin"]["model"]["name"] == "model"
    rows = [line for line in done.out.splitlines() if line.startswith("head ")]
    tenths = tenth_of(found["scores"])
    assert rows == [f"head {head:<4}{tenths[0, head]}{tenths[1, head]}" for head in range(3)]
    applied = surgery("apply", "duo-attention", model, "-o", "out", "scores=scores.json", *SPLIT)
    assert applied.code == 0, applied.err
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())["operations"][0]["record"]
    assert record["scores"] == found
    low = sorted((x, layer, head) for layer, row in enumerate(found["scores"]) for head, x in enumerate(row))[:3]
    assert sorted((layer, head) for layer, row in enumerate(record["streaming"]) for head in row) == sorted(
        (layer, head) for _, layer, head in low
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "scores.json", "words.txt"]


def test_settings_as_key_value(score, surgery, model, tmp_path):
    """Any setting of a method can be typed. A wrong one, or one that is given twice, is refused."""
    typed = ("--method", "gates", "preset=paper", "steps=2", "keys=1", "words=2", "train_sinks=1", "-o", "s.json")
    refused = score(*typed)
    assert refused.code == 2, "the paper's window is wider than 190 tokens"
    assert "no far past" in refused.err
    assert score(*typed, "train_window=7").code == 0
    origin = json.loads((tmp_path / "s.json").read_text())["origin"]
    assert (origin["preset"], origin["steps"], origin["words"], origin["rate"]) == ("paper", 2, 2, 0.02)
    for more, says in [
        (["stepz=3"], "did you mean 'steps'"),
        (["rate=0.0"], "rate should be greater than 0"),
        (["samples=3"], "samples= and --samples are two ways"),
        (["rate"], "key=value"),
        (["words=2"], "given twice"),
    ]:
        refused = surgery("score", model, "--samples", 2, *typed, *more, "--overwrite")
        assert (refused.code, says in refused.err) == (2, True), refused.err
    scoring = ("scores=gates", "scoring.preset=paper", "scoring.steps=2", "scoring.train_sinks=1", "scoring.words=2")
    short = ("calibration_samples=2", "scoring.train_window=7", "scoring.keys=1", "sinks=2", "window=6")
    applied = surgery("apply", "duo-attention", model, *scoring, *short, "-o", "out", "--no-check", "--no-eval")
    assert applied.code == 0, applied.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "chosen by the score `gates`" in card
    assert "preset `paper`, but samples 2, keys 1, words 2, steps 2, train_sinks 1, train_window 7" in card
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert record["recipe"]["operations"][0]["scoring"]["preset"] == "paper"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["scores=gates", "scoring.presett=paper"], "did you mean 'preset'"),
        (["scores=gates", "scoring.window=3"], "window cannot be set here"),
        (["scores=gates", "scoring.samples=3", "calibration_samples=3"], "two ways to say the same"),
        (["scores=far-mass", "scoring.preset=paper"], "far-mass takes no preset"),
        (["scores=gates", "scoring=3"], "scoring should be a mapping"),
        (["scores=gates", "scoring.text=none.txt"], "no such text file: 'none.txt'"),
        (["scores=mine.json", "scoring.keys=3"], "drop scoring"),
        (["scores=gates", "scorin.keys=3"], "no field 'scorin.keys'"),
    ],
)
def test_wrong_settings_of_a_scorer_in_a_recipe(surgery, model, tmp_path, overrides, says):
    HeadScores("mine", [[0.0] * 3] * 2).save(tmp_path / "mine.json")
    refused = surgery("plan", "duo-attention", model, "sinks=2", "window=6", *overrides)
    assert refused.code == 2
    assert says in refused.err


def test_json_is_the_file(score, tmp_path):
    done = score("-o", "new/scores.json", "--json")
    assert done.code == 0, done.err
    assert done.json == json.loads((tmp_path / "new" / "scores.json").read_text())
    assert done.json["origin"]["sinks"] == 2


def test_query_heads_through_the_command(score, surgery, refused, model, tmp_path, monkeypatch):
    failed = score("--method", "retrieval", "-o", "s.json")
    assert failed.code == 2
    assert "repeats none of" in failed.err
    assert not (tmp_path / "s.json").exists()
    plant_answers(monkeypatch, lambda sequence: range(6))  # most of the first passkey of every sequence
    done = score("--method", "retrieval", "--per", "heads", "-o", "s.json")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["format"], found["per"], [len(row) for row in found["scores"]]) == (2, "heads", [9, 9])
    assert found["origin"]["left_out"] > 0
    flat = [x for row in found["scores"] for x in row]
    above = sum(x > 0.1 for x in flat)
    assert f"above 0.1: {above} of 18 query heads ({above / 18:.1%})" in done.out
    assert f"left out, since the model fails them: {found['origin']['left_out']} of" in done.out
    assert len([line for line in done.out.splitlines() if line.startswith("head ")]) == 9
    spoken = score("--method", "far-mass", "--per", "heads", "--threshold", "0.05", "-o", "f.json", "--json").json
    file = json.loads((tmp_path / "f.json").read_text())
    assert {key: value for key, value in spoken.items() if key != "heads_above"} == file
    highest = max((x, -layer, -head) for layer, row in enumerate(file["scores"]) for head, x in enumerate(row))
    assert spoken["heads_above"]["threshold"] == 0.05
    first = spoken["heads_above"]["top"][0]
    assert (first["score"], -first["layer"], -first["head"]) == highest
    assert "heads_above" not in score("-o", "g.json", "--json").json
    says = ["these are scores of query heads", "--per kv-heads"]
    refused("plan", "duo-attention", model, "scores=s.json", says=says)
    refused("apply", "duo-attention", model, "-o", "out", "scores=s.json", says=says)
    seen = surgery("inspect", model, "--heads", "--scores", "s.json", "--json").json
    assert [layer["heads"] for layer in seen["layers"]] == [9, 9]
    assert seen["layers"][1]["scores"] == found["scores"][1]
    assert surgery("apply", "duo-attention", model, "-o", "out", "scores=far-mass", *SPLIT).code == 0
    split = surgery("inspect", "out", "--heads", "--scores", "s.json", "--json").json
    streaming = json.loads((tmp_path / "out/surgery.json").read_text())["operations"][0]["record"]["streaming"]
    for layer, kv_heads in zip(split["layers"], streaming, strict=True):
        assert layer["streaming"] == [3 * head + i for head in kv_heads for i in range(3)]
    assert "18 query heads stream" in surgery("inspect", "out", "--heads", "--scores", "s.json").out


def test_a_file_is_not_replaced_unasked(score, tmp_path):
    (tmp_path / "scores.json").write_text("mine")
    refused = score("-o", "scores.json")
    assert (refused.code, (tmp_path / "scores.json").read_text()) == (2, "mine")
    assert "--overwrite" in refused.err
    assert score("-o", "scores.json", "--overwrite").code == 2, "it is no score file"
    assert (tmp_path / "scores.json").read_text() == "mine"
    (tmp_path / "scores.json").unlink()
    assert score("-o", "scores.json").code == 0
    assert score("-o", "scores.json").code == 2
    assert score("-o", "scores.json", "--overwrite").code == 0
    assert json.loads((tmp_path / "scores.json").read_text())["method"] == "far-mass"


def test_a_stopped_optimisation_goes_on(score, tmp_path, monkeypatch):
    from surgery.operations.head_scorers import learned_gates as gates

    gates_of = ("--method", "gates", "--steps", 5)
    assert score(*gates_of, "-o", "whole.json").code == 0
    step = gates._Run.step

    def stops(self, *args):
        if len(self.losses) == 3:
            raise MemoryError
        step(self, *args)

    monkeypatch.setattr(gates._Run, "step", stops)
    assert score(*gates_of, "-o", "scores.json").code == 5
    assert not (tmp_path / "scores.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    again = score(*gates_of, "-o", "scores.json")
    assert again.code == 2
    assert "--resume" in again.err
    other = score("--method", "gates", "--steps", 6, "-o", "scores.json", "--resume")
    assert other.code == 2
    assert "another steps" in other.err
    assert score(*gates_of, "-o", "scores.json", "--resume").code == 0
    assert (tmp_path / "scores.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not (tmp_path / "scores.json.state").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), ["-o scores.json"]),
        (("-o", "s.json", "--method", "gate"), ["gate", "far-mass, retrieval, gates, fisher, ablation"]),
        (("-o", "s.json", "--steps", "5"), ["far-mass takes no steps"]),
        (("-o", "s.json", "--resume"), ["no steps to go on from"]),
        (("-o", "s.json", "--method", "gates", "state=x"), ["gates takes no state", "--resume"]),
        (("-o", "s.json", "--window", "1000"), ["no far past", "smaller window"]),
        (("-o", "s.json", "--text", "none.txt"), ["no such text file"]),
        (("-o", "model"), ["exists"]),
        (("-o", "s.json", "--per", "query"), ["not measured per 'query'", "kv-heads, heads"]),
        (("-o", "s.json", "--per", "heads", "--method", "gates"), ["gates has no score for each query head"]),
        (("-o", "s.json", "--threshold", "nan"), ["a threshold is a number"]),
        (("-o", "s.json", "--plot", "s.jpg"), [".png, .svg or .pdf"]),
    ],
)
def test_bad_use(refused, model, args, says):
    refused("score", model, *args, says=says)


def test_pictures(score, surgery, model, tmp_path):
    pytest.importorskip("matplotlib")
    done = score("--method", "gates", "--steps", 3, "-o", "s.json", "--plot", "s.png")
    assert done.code == 0, done.err
    for name in ("s.png", "s-loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"wrote {name}" in done.out
    seen = surgery("inspect", model, "--heads", "--scores", "s.json", "--plot", "map.png")
    assert seen.code == 0, seen.err
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_map_of_a_split_and_of_scores(score, surgery, model, tmp_path):
    HeadScores("far-mass", [[0.1, 0.9, 0.2], [0.8, 0.3, 0.7]], {}).save(tmp_path / "s.json")
    assert surgery("apply", "duo-attention", model, "-o", "out", "scores=s.json", *SPLIT).code == 0
    seen = surgery("inspect", "out", "--heads")
    assert seen.code == 0, seen.err
    rows = [line for line in seen.out.splitlines() if line.startswith("head ")]
    assert rows[:3] == ["head 0   ·#", "head 1   #·", "head 2   ·#"], "the three lowest stream"
    assert rows[3:] == ["head 0   06", "head 1   83", "head 2   15"]
    assert "3 of 6 KV heads stream" in seen.out
    assert "2 sinks + 6 tokens" in seen.out
    data = surgery("inspect", "out", "--heads", "--json").json
    assert [layer["streaming"] for layer in data["layers"]] == [[0, 2], [1]]
    assert [layer["scores"] for layer in data["layers"]] == [[0.1, 0.9, 0.2], [0.8, 0.3, 0.7]]
    base = surgery("inspect", model, "--heads", "--scores", "s.json")
    assert [line for line in base.out.splitlines() if line.startswith("head ")] == rows[3:]
    (tmp_path / "out" / "surgery.json").unlink()
    bare = surgery("inspect", "out", "--heads")
    assert [line for line in bare.out.splitlines() if line.startswith("head ")] == rows[:3], "the split alone"


def test_the_map_of_a_pruned_model_has_the_bases_numbers(surgery, model, tmp_path):
    """KV head 0 of layer 0 and KV head 1 of layer 1 are gone: their places stay blank, the others keep their names."""
    HeadScores("far-mass", [[0.1, 0.9, 0.2], [0.8, 0.3, 0.7]], {}).save(tmp_path / "s.json")
    split = {"op": "duo_attention", "scores": "s.json", "streaming_ratio": 0.5, "sinks": 2, "window": 6}
    prune = {"op": "prune_heads", "heads": [[0, 1, 2], [3, 4, 5]], "refit": False}
    recipe = {"version": 1, "name": "both", "operations": [split, prune]}
    (tmp_path / "both.yaml").write_text(json.dumps(recipe))
    done = surgery("apply", "both.yaml", model, "-o", "out", "--no-eval", "--no-check")
    assert done.code == 0, done.err
    seen = surgery("inspect", "out", "--heads")
    assert seen.code == 0, seen.err
    assert [line.rstrip() for line in seen.out.splitlines() if line.startswith("head ")] == [
        "head 0    #",
        "head 1   #",
        "head 2   ·#",
    ]
    assert "1 of 4 KV heads stream" in seen.out
    data = surgery("inspect", "out", "--heads", "--json").json["layers"]
    assert [(layer["numbers"], layer["streaming"]) for layer in data] == [([1, 2], [2]), ([0, 2], [])]
    HeadScores("file", [[0.5, 0.1], [0.2, 0.9]], {}).save(tmp_path / "t.json")
    shaded = surgery("inspect", "out", "--heads", "--scores", "t.json").out
    rows = [line.rstrip() for line in shaded.splitlines() if line.startswith("head ")]
    assert rows[3:] == ["head 0    2", "head 1   5", "head 2   07"]
    pytest.importorskip("matplotlib")
    drawn = surgery("inspect", "out", "--heads", "--scores", "t.json", "--plot", "map.png")
    assert drawn.code == 0, drawn.err


def test_a_base_without_scores_has_no_map(refused, model, tmp_path):
    refused("inspect", model, "--heads", says=["surgery score"])
    refused("inspect", model, "--plot", "x.png", says=["--heads"])
    refused("inspect", model, "--heads", "--scores", "none.json", says=["no such score file"])


def test_scores_of_another_model_are_a_problem_of_the_plan(refused, model, tmp_path):
    facts = {"name": "org/other", "hash": "0" * 12, "model_type": "qwen3"}
    HeadScores("gates", [[0.1] * 3] * 2, {"model": facts}).save(tmp_path / "s.json")
    says = ["org/other", "0" * 12, "model_type"]
    refused("plan", "duo-attention", model, "scores=s.json", says=says)
    refused("apply", "duo-attention", model, "-o", "out", "scores=s.json", says=says)
    refused("inspect", model, "--heads", "--scores", "s.json", says=says)
    HeadScores("gates", [[0.1] * 4] * 2, {}).save(tmp_path / "s.json")
    refused("plan", "duo-attention", model, "scores=s.json", says=["2 x 4", "2 x 3"])


def test_a_surgical_model_is_not_scored(refused, surgery, model, tmp_path):
    HeadScores("file", [[0.1, 0.2, 0.3]] * 2, {}).save(tmp_path / "s.json")
    assert surgery("apply", "duo-attention", model, "-o", "out", "scores=s.json", *SPLIT).code == 0
    refused("score", "out", "-o", "t.json", says=["split already"])


def test_many_layers_are_cut_into_lines(capsys):
    from surgery.cli.render.heads import show

    show(HeadMap("big", [[0, 1]] * 70, [[0]] * 70, "4 sinks + 8 tokens"))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.removeprefix("head 0   ") for line in lines if line.startswith("head 0")] == ["·" * 60, "·" * 10]
    assert lines[0].split() == ["layer", "0", "10", "20", "30", "40", "50"]
