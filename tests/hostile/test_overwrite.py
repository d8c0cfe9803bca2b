"""`--overwrite` replaces a folder that surgery wrote, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import surgery

MEAN = {"version": 1, "name": "mean", "operations": [{"op": "gqa", "kv_heads": 2, "method": "mean"}], "evaluate": None}
HEAL = MEAN | {"heal": {"steps": 1, "length": 16, "batch_tokens": 16, "data": "builtin", "loss": "ce"}}
QUICK = {"check": False, "evaluate": False, "overwrite": True}


def a_file(out: Path) -> None:
    out.write_text("my thesis")


def an_empty_file(out: Path) -> None:
    out.touch()


def a_link(out: Path) -> None:
    (out.parent / "target").mkdir()
    (out.parent / "target/mine.txt").write_text("mine")
    out.symlink_to(out.parent / "target")


def a_dangling_link(out: Path) -> None:
    out.symlink_to("nowhere")


def a_pipe(out: Path) -> None:
    os.mkfifo(out)


def a_folder(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


def state(folder: Path) -> dict:
    """Everything below a folder: what it is, and its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = os.lstat(path)
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[path.relative_to(folder).as_posix()] = (info.st_mode, content)
    return found


@pytest.mark.parametrize("recipe", [MEAN, HEAL], ids=["converted", "healed"])
@pytest.mark.parametrize("make", [a_file, an_empty_file, a_link, a_dangling_link, a_pipe, a_folder])
def test_what_is_no_folder_of_ours_stays(tiny, tmp_path, make, recipe):
    make(tmp_path / "out")
    before = state(tmp_path)
    with pytest.raises(surgery.SurgeryError, match="--overwrite replaces"):
        surgery.apply(recipe, str(tiny), output=tmp_path / "out", **QUICK)
    assert state(tmp_path) == before


def test_an_empty_folder_and_one_of_ours_are_replaced(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    first = surgery.apply(MEAN, str(tiny), output=tmp_path / "out", **QUICK)
    second = surgery.apply(MEAN, str(tiny), output=tmp_path / "out", **QUICK)
    assert first.data["files"] == second.data["files"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


MINE = ["my_notes.txt", "runs/loss.png", ".git/HEAD", "checkpoint-3/optimizer.pt", "extra.safetensors"]


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("recipe", [MEAN, HEAL], ids=["converted", "healed"])
def test_files_of_the_users_in_out_are_kept(tiny, tmp_path, name, recipe):
    surgery.apply(MEAN, str(tiny), output=tmp_path / "out", **QUICK)
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    before = state(tmp_path)
    with pytest.raises(surgery.SurgeryError, match=f"would remove what surgery did not write: {name}"):
        surgery.apply(recipe, str(tiny), output=tmp_path / "out", **QUICK)
    assert state(tmp_path) == before
    shutil.rmtree(tmp_path / "out" / name.split("/")[0]) if "/" in name else (tmp_path / "out" / name).unlink()
    surgery.apply(MEAN, str(tiny), output=tmp_path / "out", **QUICK)


def test_scores_replace_scores_alone(tiny, tmp_path, surgery):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "notes.json").write_text('{"format": 1, "mine": true}')
    for file in ("model/config.json", "notes.json"):
        before = state(tmp_path)
        ran = surgery("score", "model", "-o", file, "--samples", "1", "--length", "300", "--overwrite")
        assert ran.code == 2
        assert "--overwrite replaces a score file, and this is not one" in ran.err
        assert state(tmp_path) == before


def test_a_base_named_by_a_relative_path_is_not_replaced_from_another_folder(tiny, tmp_path, monkeypatch):
    """`_name_or_path` of the config was read relative to a folder that had changed."""
    surgery.apply(MEAN, str(tiny), output=tmp_path / "model", **QUICK)
    again = MEAN | {"operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    (tmp_path / "sub").mkdir()
    for load in (surgery.load, AutoModelForCausalLM.from_pretrained):
        monkeypatch.chdir(tmp_path)
        model = load("model")
        report = surgery.apply(again, model)
        monkeypatch.chdir(tmp_path / "sub")
        before = state(tmp_path / "model")
        with pytest.raises(surgery.SurgeryError, match="may not be the model folder"):
            surgery.save(model, tmp_path / "model", report, overwrite=True)
        assert state(tmp_path / "model") == before
