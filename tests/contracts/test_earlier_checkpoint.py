"""A checkpoint that an earlier version wrote, all terms but sparse prefill in it, with the code of that day."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from families import stranger

import surgery as package

ARCHIVE = Path(__file__).parents[1] / "support" / "checkpoint-0.1.0.zip"
ASK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True)
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 99)[None]).logits[0, -1]
print("ANSWER", json.dumps([type(model).__name__, logits.tolist()]))
"""


@pytest.fixture
def earlier(tmp_path) -> tuple[Path, torch.Tensor]:
    """The folder, and the logits of the last of the tokens 3 to 98 as that version gave them."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path / "earlier")
    expected = tmp_path / "earlier" / "expected.json"
    logits = torch.tensor(json.loads(expected.read_text()))
    expected.unlink()
    return tmp_path / "earlier", logits


def test_it_loads_with_the_package_and_says_the_same(earlier, tmp_path):
    folder, expected = earlier
    model = package.load(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 99)[None]).logits[0, -1]
    assert (logits - expected).abs().max() <= 1e-4
    model.save_pretrained(tmp_path / "again")  # with the code of this version
    with torch.no_grad():
        again = package.load(tmp_path / "again")(input_ids=torch.arange(3, 99)[None]).logits[0, -1]
    assert torch.equal(again, logits)


def test_it_loads_by_its_own_code_without_the_package(earlier, tmp_path):
    folder, expected = earlier
    python = stranger(tmp_path / "env")
    done = subprocess.run([python, "-P", "-c", ASK, folder], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    name, logits = json.loads(done.stdout.partition("ANSWER")[2])
    assert name == "SurgeryLlamaForCausalLM"
    assert (torch.tensor(logits) - expected).abs().max() <= 1e-4


def test_check_passes_and_notes_whose_code_it_is(earlier, surgery):
    ran = surgery("check", earlier[0], "--json")
    assert ran.code == 0, ran.out
    items = {item["name"]: item for item in ran.json["items"]}
    assert items["runtime files"]["status"] == "noted"
    assert "another version's (surgery 0.1.0), as it was written" in items["runtime files"]["detail"]
    assert items["loads with surgery.load"]["status"] == "passed"
