"""The order of an export, with an engine whose answers are Transformers' own. llama.cpp is not needed here."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_export_refusals import UNIFORM, export, installed, make, native, out, passed  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM

import surgery as package
from surgery.engines import llama_cpp, process, proof, run
from surgery.engines.base import EngineAnswers, EngineQuestion
from surgery.engines.llama_cpp import LlamaCpp, cache_bytes
from surgery.errors import MachineError
from surgery.io import manifest
from surgery.report.report import Report


@pytest.fixture
def engine(monkeypatch, out):
    """An engine that writes a few bytes and answers as Transformers does; `engine.change` changes the answers."""

    def write(self, folder, anatomy, kind, file):
        file.write_bytes(b"GGUF")
        return {}

    def ask(self, file, question):
        engine.questions.append(question)
        model, tokens, best = AutoModelForCausalLM.from_pretrained(out).eval(), [*question.prompt], []
        for _ in range(question.generate):
            with torch.no_grad():
                values, ids = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1).topk(50)
            best.append([*zip(ids.tolist(), values.tolist(), strict=True)])
            tokens.append(int(ids[0]))
        generated = tokens[len(question.prompt) :]
        text = [byte_id(letter) for letter in question.text.encode()]
        return engine.change(EngineAnswers(generated, best, text))

    def byte_id(byte: int) -> int:
        vocabulary = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        return vocabulary[bytes_as_letters[byte]]

    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_as_letters, engine = bytes_to_unicode(), SimpleNamespace(questions=[], change=lambda answers: answers)
    monkeypatch.setattr(LlamaCpp, "write", write)
    monkeypatch.setattr(LlamaCpp, "ask", ask)
    return engine


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_agrees(surgery, engine, tmp_path):
    theirs = tmp_path / "f.gguf.unfinished"
    theirs.write_text("a file of somebody else")
    ran = surgery(*export())
    assert ran.code == 0, ran.err
    assert names(tmp_path) == ["f.gguf", "f.gguf.unfinished", "out"]
    assert theirs.read_text() == "a file of somebody else"
    (entry,) = json.loads((tmp_path / "out" / "surgery.json").read_text())["exports"]
    assert (entry["tokens"], entry["same_best"], entry["same_text_tokens"]) == (64, 64, True)
    assert entry["largest_difference"] < 1e-5
    assert [len(question.prompt) for question in engine.questions] == [64]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda made: replace(made, generated=made.generated[:3], best=made.best[:3]), "answered for 3 of 64 tokens"),
        (lambda made: replace(made, generated=[], best=[]), "answered for 0 of 64 tokens"),
        (lambda made: replace(made, text_tokens=made.text_tokens[1:]), "splits a sentence into other tokens"),
        (lambda made: replace(made, best=[[(7, -0.5)]] * 64), "log-probabilities differ by"),
    ],
)
def test_answers_that_prove_nothing(surgery, engine, tmp_path, change, says):
    engine.change = change
    ran = surgery(*export())
    assert ran.code == 4, ran.out
    assert says in ran.err
    assert ran.err.count("error:") == 1
    assert names(tmp_path) == ["f.gguf.failed", "out"]


def test_a_file_that_appears_meanwhile_is_kept(surgery, engine, tmp_path):
    def other_file(answers):
        (tmp_path / "f.gguf").write_text("of another run")
        return answers

    engine.change = other_file
    ran = surgery(*export())
    assert ran.code == 2
    assert "f.gguf exists" in ran.err
    assert (tmp_path / "f.gguf").read_text() == "of another run"
    assert names(tmp_path) == ["f.gguf", "out"]


def test_what_another_command_records_meanwhile_is_kept(surgery, engine, tmp_path):
    theirs = {"engine": "vllm", "file": "served", "version": "1", "type": "as-saved", "sha256": "0"}

    def recorded(answers):
        run._record(Report.of(tmp_path / "out"), theirs)
        return answers

    engine.change = recorded
    assert surgery(*export()).code == 0
    record = json.loads((tmp_path / "out/surgery.json").read_text())
    assert [each["file"] for each in record["exports"]] == ["served", "f.gguf"]
    assert manifest.differences(tmp_path / "out", record, True) == []
    assert surgery(*export("--overwrite")).code == 0, "the folder can still be exported"


def test_a_folder_that_changes_meanwhile(surgery, engine, tmp_path):
    def changed(answers):
        config = tmp_path / "out/config.json"
        config.write_text(f"{config.read_text()} ")
        return answers

    engine.change = changed
    ran = surgery(*export())
    assert ran.code == 2
    assert "config.json" in ran.err
    assert names(tmp_path) == ["out"]


def test_a_small_disk_and_a_small_memory(refused, engine, monkeypatch):
    monkeypatch.setattr(run, "too_big", lambda weights: f"needs {weights} bytes")
    anatomy = package.Anatomy.of("out")
    needed = 4 * anatomy.parameters + anatomy.kv_bytes_at(64 + 64)
    refused(*export(), says=["the comparison in float32 needs", f"{needed} bytes", "more memory"], code=5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    refused(*export(), says=["the disk is too small", "0.00 GB are free"], code=5)


@pytest.mark.parametrize("positions", [2, 3, 100, 128, 300])
def test_a_question_fits_the_file(out, positions):
    question, _ = proof.make_question(out, positions)
    assert len(question.prompt) + question.generate <= max(positions, 3)
    if positions >= 128:
        assert (len(question.prompt), question.generate) == (64, 64)


def test_a_question_reaches_beyond_the_window(out):
    assert proof.make_question(out, 100, words=300)[0].best == 300, "no engine gives more than there are"
    question, _ = proof.make_question(out, 1000, window=200)
    assert (len(question.prompt), question.generate) == (264, 64)
    question, _ = proof.make_question(out, None, window=100_000)
    assert len(question.prompt) == proof.LONGEST
    question, _ = proof.make_question(out, 200, window=200)
    assert (len(question.prompt), question.generate) == (136, 64)


@pytest.fixture
def converter(monkeypatch):
    """What the converter is given: name of each file -> its text. It ends with `converter["code"]`."""
    seen: dict = {"code": 0}

    def ran(script, arguments, engine):
        staged = Path(arguments[0])
        seen["files"] = {path.name: path.read_text("utf-8", "replace") for path in staged.iterdir()}
        Path(arguments[arguments.index("--outfile") + 1]).write_bytes(b"GGUF")
        return subprocess.CompletedProcess([], seen["code"], "", seen.get("says", ""))

    monkeypatch.setattr(llama_cpp, "run_script", ran)
    return seen


def test_the_converter_gets_no_code(refused, out, converter):
    """It loads tokenizers with trust_remote_code=True."""
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((out / name).read_text(encoding="utf-8"))
        (out / name).write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": ["x--y.Z", None]}}))
    (out / "code.py").write_text("raise SystemExit('this was run')")
    anatomy = package.Anatomy.of(out)
    LlamaCpp().write(out, anatomy, "f32", out.with_name("f.gguf"))
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= set(converter["files"])
    assert not {"code.py", "surgery.json"} & set(converter["files"])
    assert not [name for name in converter["files"] if "auto_map" in converter["files"][name]]
    assert json.loads(converter["files"]["config.json"])["num_key_value_heads"] == 1


@pytest.mark.parametrize(
    ("family", "fields", "context"),
    [
        ("Mistral", {"sliding_window": 50}, 50),
        ("Phi3", {"sliding_window": 50}, 50),
        ("SmolLM3", {"sliding_window": 50, "use_sliding_window": True, "no_rope_layers": [1, 0]}, 50),
        ("Qwen2", {"sliding_window": 50, "use_sliding_window": False}, None),
        ("Mistral", {"sliding_window": 500}, None),
        ("Gemma2", {"sliding_window": 50, "head_dim": 16}, None),
    ],
)
def test_a_window_that_the_engine_ignores_bounds_the_context(tmp_path, converter, family, fields, context):
    made = make(tmp_path / "out", family, UNIFORM, pad_token_id=0, **fields)
    facts = LlamaCpp().write(made, package.Anatomy.of(made), "f32", tmp_path / "f.gguf")
    assert facts.get("context") == context
    assert json.loads(converter["files"]["config.json"])["max_position_embeddings"] == (context or 128)


def test_a_process_that_the_system_ended(refused, out, converter):
    converter["code"] = -9
    refused(*export(), says=["ended a process of llama.cpp", "memory runs out"], code=5)


def test_a_family_whose_vocabulary_is_read_from_another_file(refused, out, converter):
    """Gemma and Phi 3, whose converter reads tokenizer.model alone."""
    converter |= {"code": 1, "says": "FileNotFoundError: File not found: /x/.f.gguf/out/tokenizer.model"}
    says = ["out: llama.cpp's converter needs the file tokenizer.model", "into the base's folder"]
    done = refused(*export(), says=says)
    assert ".f.gguf" not in done.err


LINE = "0.01.3 I llama_kv_cache: size = {} MiB ( {} cells,  30 layers,  1/1 seqs), K (f16):    9.75 MiB\n"


def test_the_size_of_llama_cpps_cache():
    """Its own words: a cache for all layers; one for full layers and one for those with a window; none."""
    whole, window = LINE.format("  19.50", " 1024"), LINE.format("   1.00", "  256")
    assert cache_bytes(f"noise\n{whole}") == 19_968
    assert cache_bytes(whole + window) == 19_968 + 4096
    assert cache_bytes(LINE.format("0.00", "0") + "llama_kv_cache: size unknown") is None


def runs(state: Path) -> bool:
    """Whether the process with this file of /proc runs; a zombie does not."""
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_hangs_ends_with_those_that_it_began(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "__file__", str(tmp_path / "process.py"))
    begun = tmp_path / "begun"
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    hanging = f"import pathlib, subprocess, sys, time\npathlib.Path({str(begun)!r}).write_text(str({child}.pid))\n"
    hanging += "time.sleep(600)\n"
    (tmp_path / "hanging.py").write_text(hanging)
    with pytest.raises(MachineError, match=r"a process of vllm did not end within 0\.002 hours, and was stopped"):
        process.run_script("hanging.py", [], "vllm", hours=0.002)
    state, last = Path(f"/proc/{begun.read_text()}/stat"), time.monotonic() + 20
    while runs(state) and time.monotonic() < last:
        time.sleep(0.05)  # the system ends it when `run_script` may have returned already
    assert not runs(state)


@pytest.mark.parametrize("fault", ["hangs", "fails", "says nothing"])
def test_the_proof_holds_where_the_cache_cannot_be_counted(monkeypatch, tmp_path, fault):
    def ran(script, arguments, engine, **options):
        if fault == "hangs":
            raise MachineError("a process of llama.cpp did not end")
        return subprocess.CompletedProcess([], int(fault == "fails"), "", "" if fault == "says nothing" else LINE)

    answers = EngineAnswers([1], [[(1, -0.5)]], [])
    monkeypatch.setattr(llama_cpp, "ask_script", lambda *args: answers)
    monkeypatch.setattr(llama_cpp, "run_script", ran)
    found = LlamaCpp().ask(tmp_path / "f.gguf", EngineQuestion([1], 1, 1, ""))
    assert (found.generated, found.best, found.cache_bytes) == ([1], answers.best, None)
