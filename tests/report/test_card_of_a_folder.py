"""A card beside its checkpoint: its examples run, its owner may write into it, and a push changes one name in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import surgery
from surgery.io import hub, manifest
from surgery.io.card_text import BEGIN, END, NO_NOTES, named, notes_block, notes_of, without_notes
from surgery.report.report import Report

RECIPES = {
    "native": {"op": "gqa", "kv_heads": 1, "method": "mean"},
    "surgical": {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 8},
}
NOTES = "Trained on *our* forum.\n\n- ask us\n- `surgery` is fine"


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cards")
    for name, step in RECIPES.items():
        recipe = {"version": 1, "name": name, "operations": [step], "evaluate": None}
        surgery.apply(recipe, str(tiny), output=root / name, check=False, evaluate=False)
    return {name: root / name for name in RECIPES}


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["native"], tmp_path / "out"))


def faults(folder: Path) -> list[str]:
    report = Report.of(folder)
    return manifest.differences(folder, report.data, report.intact)


def edit(folder: Path, old: str, new: str) -> None:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    assert text.count(old) == 1
    card.write_text(text.replace(old, new), encoding="utf-8")


def examples(folder: Path) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [block.replace('"OWNER/NAME"', json.dumps(str(folder))) for block in blocks]


@pytest.mark.parametrize(("tier", "count"), [("native", 1), ("surgical", 2)])
def test_the_examples_run_and_generate(folders, tier, count, tmp_path):
    scripts = examples(folders[tier])
    assert len(scripts) == count
    chat = "apply_chat_template" in scripts[0]
    assert chat == (folders[tier] / "chat_template.jinja").exists()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    for script in scripts:
        assert "surgery.register()" in script or "trust_remote_code=True" in script or tier == "native"
        probe = "\nprint('TOKENS', output.shape[1] - inputs['input_ids'].shape[1], type(model).__name__)"
        done = subprocess.run(
            [sys.executable, "-c", script + probe], env=env, input="", capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-1500:]
        tokens, name = done.stdout.partition("TOKENS ")[2].split()
        assert int(tokens) > 0
        assert name == ("LlamaForCausalLM" if tier == "native" else "SurgeryLlamaForCausalLM")


def test_without_a_chat_template_the_example_completes_a_text(folder):
    report = Report.of(folder)
    for name in ("chat_template.jinja", "README.md"):
        (folder / name).unlink()
    report.save()
    (script,) = examples(folder)
    assert "apply_chat_template" not in script
    assert 'tokenizer("The capital of France is", return_tensors="pt")' in script


def test_an_owner_may_write_notes_and_nothing_else(folder):
    assert faults(folder) == []
    edit(folder, NO_NOTES, NOTES)
    assert faults(folder) == []
    for old, new in (
        ("## Limits", "## No limits"),
        (NOTES, f"{NOTES}\n<!--"),
        (END, ""),
        (BEGIN, f"{BEGIN}\n{BEGIN}"),
        (f"{END}\n\n## How it was made", f"## How it was made\n\n{END}"),
    ):
        kept = (folder / "README.md").read_text(encoding="utf-8")
        edit(folder, old, new)
        assert [fault for fault in faults(folder) if fault.startswith("README.md is not the file")], new
        (folder / "README.md").write_text(kept, encoding="utf-8")
    assert faults(folder) == []


def test_notes_stay_when_the_card_is_written_again(folder):
    edit(folder, NO_NOTES, NOTES)
    report = Report.of(folder)
    report.data["gate"] |= {"status": "failed", "reasons": ["it is bad"]}
    report.save()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "it is bad" in card
    assert notes_of(card) == NOTES
    assert report.data["owner_notes"] == NOTES
    assert faults(folder) == []
    edit(folder, NOTES, "")
    assert faults(folder) == []
    Report.of(folder).save()
    assert notes_block("") in (folder / "README.md").read_text(encoding="utf-8")
    assert "owner_notes" not in Report.of(folder).data


def test_a_push_changes_the_name_in_the_card_and_says_so_in_the_record(folder, tmp_path):
    edit(folder, NO_NOTES, NOTES)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = Report.of(folder)
    changed = hub._with_name(folder, report.data, "me/model")
    assert set(changed) == {"README.md", "surgery.json"}
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}, "the folder stays as it is"
    old, new = before["README.md"].decode(), changed["README.md"].decode()
    assert new == old.replace('"OWNER/NAME"', '"me/model"')
    assert new != old
    record = json.loads(changed["surgery.json"])
    differing = {key for key in record if record[key] != report.data.get(key)}
    assert differing == {"repository", "other_files", "record_sha256"}
    assert record["repository"] == "me/model"

    there = Path(shutil.copytree(folder, tmp_path / "downloaded"))
    for name, content in changed.items():
        (there / name).write_bytes(content)
    assert faults(there) == []
    Report.of(there).save()
    assert 'name = "me/model"' in (there / "README.md").read_text(encoding="utf-8"), "also when it is written again"
    again = hub._with_name(there, Report.of(there).data, "you/other")
    assert 'name = "you/other"' in again["README.md"].decode()
    assert hub._with_name(there, Report.of(there).data, "me/model") == {}, "it has this name already"


def test_a_base_that_was_converted_does_not_bring_its_places_along():
    from surgery.report.card import render_card

    base = f'# A card of ours\n\n{notes_block("their notes")}\n\nname = "OWNER/NAME"'
    card = render_card({}, base)
    assert card.count(BEGIN) == card.count(END) == 1
    assert notes_of(card) == ""
    assert "their notes" in card
    assert named(card, "me/model").endswith('name = "OWNER/NAME"\n'), "the base's own words"
    assert without_notes(card) == card
