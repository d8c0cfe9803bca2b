"""The output folder: complete or absent, the old one kept until the new one is whole, nothing of the user's lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import filelock
import pytest
from conftest import edit_tensors, listing
from safetensors.torch import load_file, save_file

from surgery.conversion import streaming as shards
from surgery.io import output_folder as output

FAST = ("--no-check", "--no-eval")
NAMES = ("a-1.safetensors", "a-2.safetensors", "a-3.safetensors")
DATED = ("surgery.json", "README.md")  # they hold the time


@pytest.fixture
def apply(surgery):
    """`surgery apply mqa MODEL -o out` without check and evaluation; more arguments may follow."""

    def run(model, *more, out="out"):
        return surgery("apply", "mqa", model, "-o", out, *FAST, *more)

    return run


@pytest.fixture
def sharded(model) -> Path:
    """The tiny model in three shards."""
    tensors = load_file(model / "model.safetensors")
    weight_map = {name: NAMES[i * 3 // len(tensors)] for i, name in enumerate(sorted(tensors))}
    for file in NAMES:
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, model / file, {"format": "pt"})
    (model / "model.safetensors").unlink()
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def undated(folder: Path) -> dict[str, str]:
    return {name: fact for name, fact in listing(folder).items() if name not in DATED}


def fail_at(monkeypatch, call: int, error: BaseException) -> None:
    """Let the `call`th shard fail when it is put on disk."""
    calls, real = [], os.fsync

    def fsync(number):
        calls.append(number)
        if len(calls) == call:
            raise error
        return real(number)

    monkeypatch.setattr(shards.os, "fsync", fsync)


# --- where OUT may be ---------------------------------------------------------------------------------------


def folder_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


OCCUPIED = {
    "a folder": folder_with_a_file,
    "a file": lambda path: path.write_text("x"),
    "an empty folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": lambda path: (folder_with_a_file(path.with_name("home")), path.symlink_to("home")),
}


@pytest.mark.parametrize("kind", OCCUPIED)
def test_out_exists(refused, model, tmp_path, kind):
    OCCUPIED[kind](tmp_path / "out")
    says = ["out: OUT exists", "choose another name, or add --overwrite"]
    refused("apply", "mqa", model, "-o", "out", *FAST, says=says)


@pytest.mark.parametrize(
    "out", ["model", "model/out", "model/../model", ".", "./model/", "model/deep/er", "..", "link", "link/out"]
)
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_out_and_the_model_folder_are_apart(refused, model, tmp_path, out, flags):
    (tmp_path / "link").symlink_to("model")
    says = ["may not be the model folder, lie in it or hold it", "choose another folder (-o)"]
    refused("apply", "mqa", model, "-o", out, *FAST, *flags, says=says)


@pytest.mark.parametrize("suffix", ["partial", "replaced"])
def test_a_model_that_lies_where_overwrite_would_clear_is_safe(refused, model, suffix):
    base = model.rename(model.with_name(f"out.{suffix}"))
    refused("apply", "mqa", base, "-o", "out", *FAST, "--overwrite", says=["may not be the model folder"])


def test_a_file_in_the_way_of_the_parent(refused, model, tmp_path):
    (tmp_path / "notes").write_text("x")
    says = ["notes", "a part of this path is a file, not a folder", "choose another folder (-o)"]
    refused("apply", "mqa", model, "-o", "notes/out", *FAST, says=says, code=5)
    refused("apply", "mqa", model, "-o", "notes/deep/er/out", *FAST, says=says, code=5)


def test_no_permission(refused, model, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    says = ["out.partial: no permission here", "choose another folder (-o)"]
    refused("apply", "mqa", model, "-o", "out", *FAST, "--resume", says=["no permission here"], code=5)
    refused("apply", "mqa", model, "-o", "deep/out", *FAST, says=says[1:], code=5)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(refused, model, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    refused("apply", "mqa", model, "-o", "closed/out", *FAST, says=["no permission here"], code=5)


def test_a_model_that_may_not_be_read(refused, model, monkeypatch):
    real = open

    def closed(file, *args, **kwargs):
        if str(file).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", closed)
    refused("apply", "mqa", model, "-o", "out", *FAST, says=["model.safetensors", "Permission denied"], code=5)


def test_a_name_too_long(refused, model):
    refused("apply", "mqa", model, "-o", "x" * 400, *FAST, says=["system refused"], code=5)


def test_the_disk_is_too_small(refused, model, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    says = ["the disk is too small", "GB are needed, 0.00 GB are free", "free some space or write elsewhere (-o)"]
    refused("apply", "mqa", model, "-o", "deep/out", *FAST, says=says, code=5)


def test_no_output_was_named(refused, model):
    refused("apply", "mqa", model, says=["no output folder was named", "add -o OUT"])


def test_an_unknown_engine(refused, model):
    says = ["unknown engine 'fast'", "auto, streaming, loaded"]
    refused("apply", "mqa", model, "-o", "out", "--engine", "fast", says=says)


def test_missing_parents_are_made(apply, model, tmp_path):
    assert apply(model, out="deep/er/out").code == 0
    assert (tmp_path / "deep/er/out/surgery.json").is_file()
    assert [p.name for p in (tmp_path / "deep/er").iterdir()] == ["out"], "no lock, no .partial"


# --- unfinished runs ----------------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_is_done_and_resume_completes_it(apply, sharded, tmp_path, monkeypatch):
    base = listing(sharded)
    fail_at(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    stopped = apply(sharded, "--json")
    assert stopped.code == 5
    assert stopped.json["error"] == "the disk is full"
    assert stopped.json["fix"] == "free some space, then run the same command with --resume"
    assert not (tmp_path / "out").exists()
    first = tmp_path / "out.partial" / NAMES[0]
    written = first.stat().st_mtime_ns, first.stat().st_ino
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.partial"], "no lock is left"

    again = apply(sharded)
    assert again.code == 2, "without --resume nothing is assumed"
    assert "an unfinished run left OUT.partial" in again.err
    assert "--resume to go on from it, or --overwrite to start again" in again.err

    assert apply(sharded, "--resume").code == 0
    finished = tmp_path / "out" / NAMES[0]
    assert (finished.stat().st_mtime_ns, finished.stat().st_ino) == written, "the finished shard was not written again"
    assert not (tmp_path / "out.partial").exists()
    assert apply(sharded, out="fresh").code == 0
    assert undated(tmp_path / "out") == undated(tmp_path / "fresh")
    assert listing(sharded) == base


def test_a_finished_shard_that_was_damaged_is_written_again(apply, sharded, tmp_path, monkeypatch):
    fail_at(monkeypatch, 3, OSError(errno.ENOSPC, "No space left on device"))
    assert apply(sharded).code == 5
    with (tmp_path / "out.partial" / NAMES[0]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    (tmp_path / "out.partial" / NAMES[1]).unlink()
    assert apply(sharded, "--resume").code == 0
    assert apply(sharded, out="fresh").code == 0
    assert undated(tmp_path / "out") == undated(tmp_path / "fresh")


def test_overwrite_starts_anew(apply, sharded, tmp_path, monkeypatch):
    fail_at(monkeypatch, 2, OSError(errno.EIO, "Input/output error"))
    assert apply(sharded).code == 5
    (tmp_path / "out.partial/stray.bin").write_bytes(b"x")
    assert apply(sharded, "--overwrite").code == 0
    assert not (tmp_path / "out/stray.bin").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("progress", ["{}", "broken", "[]", '{"plan": "of another version", "done": {}}'])
def test_a_partial_of_another_conversion_is_not_gone_on_from(refused, model, tmp_path, progress):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/surgery-progress.json").write_text(progress)
    says = ["OUT.partial is of another conversion", "out.partial", "--overwrite"]
    refused("apply", "mqa", model, "-o", "out", *FAST, "--resume", says=says)


def test_resume_of_other_settings_is_refused(surgery, refused, sharded, monkeypatch):
    fail_at(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    assert surgery("apply", "mqa", sharded, "-o", "out", *FAST).code == 5
    args = ("apply", "mqa", sharded, "method=first", "-o", "out", *FAST, "--resume")
    refused(*args, says=["OUT.partial is of another conversion"])


def test_resume_of_a_pickled_base(surgery, sharded, tmp_path, monkeypatch):
    import torch

    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    for file in NAMES:
        torch.save(load_file(sharded / file), sharded / f"{file[:3]}.bin")
        (sharded / file).unlink()
    (sharded / "model.safetensors.index.json").unlink()
    index = {"weight_map": {name: f"{file[:3]}.bin" for name, file in weight_map.items()}}
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    fail_at(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    args = ("apply", "mqa", sharded, "-o", "out", *FAST, "--allow-pickle")
    assert surgery(*args).code == 5
    assert surgery(*args, "--resume").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_resume_with_nothing_to_resume_is_a_plain_run(apply, model):
    assert apply(model, "--resume").code == 0


def test_interrupted_is_130_and_resumes(apply, sharded, tmp_path, monkeypatch):
    fail_at(monkeypatch, 2, KeyboardInterrupt())
    assert apply(sharded).code == 130
    assert not (tmp_path / "out").exists()
    assert apply(sharded, "--resume").code == 0


KILLED = """
import os, signal, sys
from surgery.cli import main as cli
import {module} as module
calls, real = [], module.os.{function}
def dying(*args):
    calls.append(args)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
module.os.{function} = dying
cli.main(sys.argv[1:])
"""


def killed(folder: Path, *args, **where) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED.format(**where), *map(str, args)], cwd=folder, check=False)
    assert done.returncode == -9


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_while_writing(apply, refused, sharded, tmp_path):
    base = listing(sharded)
    call = {"module": "surgery.conversion.streaming", "function": "fsync", "call": 2}
    killed(tmp_path, "apply", "mqa", sharded, "-o", "out", *FAST, **call)
    assert not (tmp_path / "out").exists()
    assert listing(sharded) == base
    (tmp_path / ".out.lock").unlink(missing_ok=True)  # a killed run cannot; the lock itself went with the process
    refused("apply", "mqa", sharded, "-o", "out", *FAST, says=["an unfinished run left OUT.partial", "--resume"])
    assert apply(sharded, "--resume").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    assert not list((tmp_path / "out").glob("*.unfinished"))


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_between_the_two_renames(apply, model, tmp_path):
    assert apply(model).code == 0
    old = listing(tmp_path / "out")
    call = {"module": "surgery.io.output_folder", "function": "rename", "call": 2}
    killed(tmp_path, "apply", "mqa", model, "-o", "out", *FAST, "--overwrite", **call)
    assert not (tmp_path / "out").exists(), "the one moment without OUT; OUT.replaced has it"
    again = apply(model)
    assert again.code == 2
    assert "OUT exists" in again.err
    assert listing(tmp_path / "out") == old, "the old OUT is back"
    assert apply(model, "--overwrite").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.skipif(os.name == "nt", reason="no ulimit")
def test_a_real_limit_of_the_system(sharded, tmp_path):
    """A file that may not grow: the system's own error, not a patched one."""
    command = f'ulimit -f 8; exec "{sys.executable}" -m surgery apply mqa model -o out --no-check --no-eval --json'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "--resume" in json.loads(done.stdout)["fix"]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_share_an_out(refused, apply, model, tmp_path):
    with filelock.FileLock(tmp_path / ".out.lock"):
        refused("apply", "mqa", model, "-o", "out", *FAST, says=["another run is writing this folder"], code=5)
    assert apply(model).code == 0


# --- overwrite ----------------------------------------------------------------------------------------------


def test_overwrite_replaces_the_whole_folder(apply, model, tmp_path):
    (model / "LICENSE").write_text("of the old one")
    assert apply(model).code == 0
    (model / "LICENSE").unlink()
    assert apply(model, "--overwrite", "method=first").code == 0
    assert not (tmp_path / "out/LICENSE").exists()
    assert json.loads((tmp_path / "out/surgery.json").read_text())["overrides"] == ["method=first"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_overwrite_keeps_the_old_one_if_the_new_one_fails(apply, refused, model, tmp_path, monkeypatch):
    assert apply(model).code == 0
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(model, lambda tensors: tensors[name].view(-1)[0].fill_(float("nan")))
    refused("apply", "mqa", model, "-o", "out", *FAST, "--overwrite", says=[f"{name} holds NaN"])
    old = listing(tmp_path / "out")
    edit_tensors(model, lambda tensors: tensors[name].zero_())
    fail_at(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    assert apply(model, "--overwrite").code == 5
    assert listing(tmp_path / "out") == old


def test_a_rename_that_fails_brings_the_old_one_back(apply, model, tmp_path, monkeypatch):
    assert apply(model).code == 0
    old, real = listing(tmp_path / "out"), os.rename

    def rename(source, target):
        if Path(source).name == "out.partial":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "rename", rename)
        assert apply(model, "--overwrite").code == 5
    assert listing(tmp_path / "out") == old
    assert apply(model, "--overwrite", "--resume").code == 0


@pytest.mark.parametrize("kind", ["a folder", "a link to a folder", "a file", "a dangling link"])
def test_overwrite_leaves_alone_what_surgery_did_not_write(refused, model, tmp_path, kind):
    OCCUPIED[kind](tmp_path / "out")
    says = ["--overwrite replaces", "surgery wrote", "choose another name (-o), or move it away yourself"]
    refused("apply", "mqa", model, "-o", "out", *FAST, "--overwrite", says=says)


def test_overwrite_of_an_empty_folder(apply, model, tmp_path):
    OCCUPIED["an empty folder"](tmp_path / "out")
    assert apply(model, "--overwrite").code == 0
    assert (tmp_path / "out/surgery.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_link_to_a_folder_of_ours_is_not_overwritten(refused, apply, model, tmp_path):
    assert apply(model, out="first").code == 0
    (tmp_path / "out").symlink_to("first")
    says = ["--overwrite replaces a folder that surgery wrote, and this is a link"]
    refused("apply", "mqa", model, "-o", "out", *FAST, "--overwrite", says=says)


@pytest.mark.parametrize("suffix", ["partial", "replaced"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)], ids=["plain", "overwrite", "resume"])
def test_a_users_folder_of_our_name_is_neither_moved_nor_removed(refused, apply, model, tmp_path, suffix, flags):
    folder_with_a_file(tmp_path / f"out.{suffix}")
    says = [f"out.{suffix}: surgery needs this name while it writes OUT, and did not write what is there", "move it"]
    refused("apply", "mqa", model, "-o", "out", *FAST, *flags, says=says)
    if flags == ("--overwrite",):  # the same where there is an OUT to replace
        (tmp_path / f"out.{suffix}").rename(tmp_path / "mine")
        assert apply(model).code == 0
        (tmp_path / "mine").rename(tmp_path / f"out.{suffix}")
        refused("apply", "mqa", model, "-o", "out", *FAST, *flags, says=says)


@pytest.mark.parametrize("kind", ["a file", "a dangling link", "a link to a folder"])
def test_a_file_or_link_of_our_name_stays(refused, model, tmp_path, kind):
    for suffix in ("partial", "replaced"):
        OCCUPIED[kind](tmp_path / f"out.{suffix}")
        refused("apply", "mqa", model, "-o", "out", *FAST, "--overwrite", says=[f"out.{suffix}: surgery needs"])
        (tmp_path / f"out.{suffix}").unlink()
        shutil.rmtree(tmp_path / "home", ignore_errors=True)


@pytest.mark.parametrize("suffix", ["partial", "replaced"])
def test_a_removal_that_was_killed_is_known_as_ours(apply, model, tmp_path, monkeypatch, suffix):
    assert apply(model).code == 0
    target = tmp_path / f"out.{suffix}"
    (tmp_path / "out").rename(target)
    (target / "sub").mkdir()

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            output.remove_own(target)
    assert target.exists()
    assert apply(model, "--overwrite").code == 0, "and what was half removed did not become OUT"
    assert (tmp_path / "out/surgery.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


# --- killed after OUT was complete --------------------------------------------------------------------------


def test_resume_of_a_complete_out_goes_on_with_the_check(surgery, apply, model, tmp_path):
    assert apply(model).code == 0
    weights = tmp_path / "out/model.safetensors"
    written = weights.stat().st_mtime_ns, weights.stat().st_ino
    assert json.loads((tmp_path / "out/surgery.json").read_text())["check"] is None
    done = surgery("apply", "mqa", model, "-o", "out", "--no-eval", "--resume")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out/surgery.json").read_text())["check"]["passed"] is True
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == written


def test_out_exists_names_resume_where_it_would_help(refused, apply, model):
    assert apply(model).code == 0
    says = ["OUT exists", "add --resume to go on with its check and scores, or --overwrite"]
    refused("apply", "mqa", model, "-o", "out", *FAST, says=says)
    other = refused("apply", "mqa", model, "method=first", "-o", "out", *FAST, says=["OUT exists"])
    assert "--resume" not in other.err
    refused("apply", "mqa", model, "method=first", "-o", "out", *FAST, "--resume", says=["OUT exists"])


# --- what is in it ------------------------------------------------------------------------------------------

CARRIED = {
    "LICENSE": "terms", "License.md": "terms", "NOTICE": "notice", "USE_POLICY.md": "policy", "chart.png": "picture",
    "modeling_custom.py": "code", "chat_template.jinja": "{{ x }}", "chat_templates/tool.jinja": "{{ y }}",
    "generation_config.json": "{}", "preprocessor_config.json": "{}", "tokenizer.model": "pieces",
}  # fmt: skip
LEFT = [
    "adapter_model.bin", "checkpoint-1/optimizer.pt", "consolidated.00.pth", "model.gguf",
    "onnx/model.onnx", "original/x.pth", "params.json", "pytorch_model.bin", "training_args.bin",
]  # fmt: skip
HIDDEN = [".git/config", ".cache/huggingface/x", ".env"]


def put(folder: Path, name: str, content: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content, encoding="utf-8")


def test_the_allow_list(apply, model, tmp_path):
    for name, content in CARRIED.items():
        put(model, name, content)
    for name in LEFT + HIDDEN:
        put(model, name, f"not for the output: {name}")
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")
    put(
        model, "README.md", "---\nlicense: mit\nlanguage: en\nlibrary_name: peft\n---\n# The base\n\nIt scores 99 %.\n"
    )
    blobs = tmp_path / "models--me--it/blobs"  # as the Hub's cache is made
    blobs.mkdir(parents=True)
    (model / "tokenizer.json").rename(blobs / "0a1b")
    (model / "tokenizer.json").symlink_to("../models--me--it/blobs/0a1b")
    before = listing(tmp_path)
    assert apply(model, "--json").code == 0
    out = tmp_path / "out"
    for name, content in CARRIED.items():
        assert (out / name).read_text() == content
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "tokenizer.json").read_bytes() == (blobs / "0a1b").read_bytes()
    ours = {"README.md", "base-card.md", "config.json", "model.safetensors", "surgery.json", "chat_templates"}
    assert set(listing(out)) == ours | set(CARRIED) | {"tokenizer.json", "tokenizer_config.json"}
    report = json.loads((out / "surgery.json").read_text())
    assert report["left_behind"] == sorted([*LEFT, "adapter_model.safetensors"])
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "library_name: transformers" in card
    assert "It scores 99 %." in card
    assert "every score in it is the base's" in card.lower()
    assert "base-card.md" not in report["left_behind"]
    after = {name: fact for name, fact in listing(tmp_path).items() if name.split("/")[0] != "out"}
    assert after == before, "the base is untouched"


def test_nothing_private_is_published(surgery, model, text, tmp_path, monkeypatch):
    secret = "hf_" + "Zz9Yy8Xx7Ww6" * 2
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("SURGERY_TEST_VARIABLE", "value-of-a-variable")
    settings = (f"evaluate.text={text}", "evaluate.windows=1", "evaluate.length=16")
    done = surgery("apply", "mqa", model, *settings, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"words.txt" in everything
    for private in (secret, "value-of-a-variable", str(tmp_path), str(Path.home()) + "/", tmp_path.name, "/tmp/"):
        assert private.encode() not in everything, private


def test_a_second_surgery_keeps_the_history(surgery, model, tmp_path):
    for args in (
        ("gqa", model, "-o", "one", "kv_heads=3"),
        ("expand-kv", "one", "-o", "two"),
        ("mqa", "two", "-o", "three"),
    ):
        assert surgery("apply", *args, *FAST).code == 0
    report = json.loads((tmp_path / "three/surgery.json").read_text())
    assert [old["recipe"]["name"] for old in report["history"]] == ["gqa", "expand-kv"]
    assert [old["base"]["name"] for old in report["history"]] == ["model", "one"]
    assert all("history" not in old for old in report["history"])
    assert report["base"]["name"] == "two"
    assert "earlier surgeries" in (tmp_path / "three/README.md").read_text()


@pytest.mark.parametrize("content", ["[]", "broken", "7"])
def test_a_foreign_surgery_json_in_the_base_is_no_history(apply, model, tmp_path, content):
    (model / "surgery.json").write_text(content)
    assert apply(model).code == 0
    assert json.loads((tmp_path / "out/surgery.json").read_text())["history"] == []
