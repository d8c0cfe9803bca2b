"""What a conversion has imported when it begins to write, and what it never imports."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers_of_bytes import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
make_checkpoint = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "make_checkpoint.py"))["make_checkpoint"]
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "peft", "datasets", "accelerate")
# Runs the command and prints, as JSON, which of HEAVY were imported when a folder of the name of OUT.partial was made
# (the first entry of `began`: when it really was) and at the end.
SCRIPT = """
import json, os, sys
heavy, args, began = sys.argv[1].split(","), sys.argv[2:], []

def imported():
    return [name for name in heavy if name in sys.modules]

def note(event, arguments):
    if event == "os.mkdir" and str(arguments[0]).endswith(".partial"):
        began.append(imported())

sys.addaudithook(note)
from surgery.cli.main import main
try:
    main(args)
except SystemExit as end:
    print(json.dumps({"began": began, "ended": imported(), "code": end.code or 0}))
"""


@pytest.fixture
def base(tmp_path):
    return make_checkpoint(tmp_path / "base", 0, shards=2, hidden=64, heads=4, kv_heads=2, mlp=128, vocab=128)


def apply(base: Path) -> dict:
    return run("apply", "mqa", str(base), "-o", str(base.parent / "out"), "--no-check", "--no-eval", "--json")


def run(*args: str) -> dict:
    command = [sys.executable, "-c", SCRIPT, ",".join(HEAVY), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_plain_base_is_planned_without_torch_and_converted_without_transformers(base):
    """PyTorch is imported while the first tensors are copied: they need it to compute others, and no earlier."""
    found = apply(base)
    assert found["code"] == 0
    assert found["began"][0] == []
    assert "torch" in found["ended"]
    assert "transformers" not in found["ended"]


def test_a_base_with_a_chat_template_begins_as_early(base):
    """The probe of short requests would read the tokenizer, by Transformers, to estimate its time; it is not asked."""
    byte_tokenizer(chat=True).save_pretrained(base)
    found = apply(base)
    assert found["code"] == 0
    assert found["began"][0] == []
    assert "transformers" not in found["ended"]


def test_a_plan_of_a_plain_base_imports_neither(base):
    ran = run("plan", "mqa", str(base), "--json")
    assert ran == {"began": [], "ended": ["torch", "numpy"], "code": 0}, (
        "the estimate measures torch's speed at the end"
    )


def test_any_other_base_is_read_by_transformers(base):
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | {"partial_rotary_factor": 1.0}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "transformers" in apply(base)["began"][0]


def test_what_torch_cannot_be_imported_for_ends_the_run(base, monkeypatch):
    """An error of the import is an error of the run, which leaves no OUT."""
    fake = base.parent / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("raise MemoryError('out of memory')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{fake}{os.pathsep}{ROOT}")
    assert apply(base)["code"] == 5
    assert not (base.parent / "out").exists()
    assert (base.parent / "out.partial").exists()
