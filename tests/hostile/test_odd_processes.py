"""Processes and file systems that are odd: names, links, limits, terminals, and others who write at the same time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import edit_tensors, listing
from families import TINY
from safetensors.torch import load_file, save_file
from tokenizers_of_bytes import byte_tokenizer

import surgery as library
from surgery import MachineError, SurgeryError
from surgery.io import files as io_files
from surgery.io import manifest

COMMAND = [sys.executable, "-m", "surgery"]
QUICK = ("--no-check", "--no-eval")
MEAN = ("kv_heads=2", "method=mean")
MERGE = {"version": 1, "name": "x", "operations": [{"op": "gqa", "kv_heads": 2, "method": "mean"}], "evaluate": None}
SPLIT = ("sinks=2", "window=6")


def made(surgery, base, out, *more):
    return surgery("apply", "gqa", base, *MEAN, "-o", out, *QUICK, *more)


def one_sentence(ran, code: int) -> None:
    assert ran.code == code, ran.err[-400:]
    assert ran.err.startswith("error: ")
    assert ran.err.count("error:") == 1
    assert "Traceback" not in ran.err


@contextmanager
def limit(kind: int, size: int):
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


# --- modes and names ------------------------------------------------------------------------------


MODES = [(engine, mask) for engine in ("streaming", "loaded") for mask in (0o000, 0o022, 0o027, 0o077)]


@pytest.mark.parametrize(("engine", "mask"), MODES)
def test_umask(surgery, base, tmp_path, mask, engine):
    """Files and folders have the mode that the user asks of every program."""
    (base / "LICENSE").write_text("free")
    before = os.umask(mask)
    try:
        assert made(surgery, base, "parent/out", "--engine", engine).code == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "parent").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o666 & ~mask}, modes
    assert (tmp_path / "parent/out").stat().st_mode & 0o777 == 0o777 & ~mask


NAMES = [
    " a b ",
    "a\nb",
    "-out",
    "--json",
    "a=b",
    "$HOME `id`",
    "\u6a21\u578b",
    "~",
    "out.partial",
    ".out",
    "x" * 240,
    "out.yaml",
]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_odd_names(surgery, base, tmp_path, name):
    """The folder has the name that was given, to the letter, and nothing else is left beside it."""
    assert surgery("apply", "gqa", base, *MEAN, f"--output={name}", *QUICK).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"base", name}
    assert surgery("inspect", f"./{name}/").code == 0
    assert surgery("apply", "gqa", base, *MEAN, f"--output={name}/", *QUICK, "--overwrite").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"base", name}


@pytest.mark.parametrize(
    "name", ["/proc/out", "/sys/out", "/dev/null/out", "/dev/full", "x" * 250, "a/" * 2100 + "out", "", "."]
)
def test_outputs_that_cannot_be(surgery, base, tmp_path, name):
    ran = surgery("apply", "gqa", base, *MEAN, f"--output={name}", *QUICK)
    assert ran.code in (2, 5)
    one_sentence(ran, ran.code)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("name", ["output", "folder", "model", "base"])
def test_paths_with_a_zero_byte(base, tmp_path, name):
    bad = f"{tmp_path}/a\0b"
    calls = {
        "output": lambda: library.apply(MERGE, base, output=bad, check=False, evaluate=False),
        "folder": lambda: library.check(bad),
        "model": lambda: library.plan(MERGE, bad),
        "base": lambda: library.evaluate(base, bad, windows=1, length=32),
    }
    with pytest.raises(SurgeryError):
        calls[name]()
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


# --- links ----------------------------------------------------------------------------------------


@pytest.fixture
def two(base, tmp_path, monkeypatch) -> Path:
    """`link/../base` is elsewhere/base to the system, and base to who reads it as text. They differ in one weight."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere/sub").mkdir(parents=True)
    shutil.copytree(base, tmp_path / "elsewhere/base")
    edit_tensors(base, lambda tensors: tensors["model.norm.weight"].fill_(7.0))
    (tmp_path / "link").symlink_to("elsewhere/sub")
    return Path("link/../base")


@pytest.mark.parametrize(
    "engine",
    [
        "streaming",
        "loaded",
    ],
)
def test_a_model_behind_a_link_and_two_dots(surgery, two, tmp_path, engine):
    """Both engines read the folder that the system finds, which is also the one that was planned."""
    assert surgery("apply", "gqa", two, *MEAN, "-o", "out", "--engine", engine, *QUICK).code == 0
    assert not (load_file(tmp_path / "out/model.safetensors")["model.norm.weight"] == 7.0).any()


def test_load_behind_a_link_and_two_dots(two):
    assert Path(two, "config.json").is_file()
    assert not (library.load(two).model.norm.weight == 7.0).any()


def test_an_output_below_a_link(surgery, base, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert made(surgery, base, "link/out").code == 0
    assert (tmp_path / "real/out/surgery.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "real", "link"}


@pytest.mark.parametrize("target", ["gone/away", "parent"])
def test_an_output_below_a_link_that_leads_nowhere(surgery, base, tmp_path, target):
    (tmp_path / "parent").symlink_to(target)
    one_sentence(made(surgery, base, "parent/out"), 5)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "parent"}


@pytest.mark.parametrize("verb", ["inspect", "eval"])
def test_a_model_that_is_a_link_to_itself(surgery, tmp_path, verb):
    (tmp_path / "m").symlink_to("m")
    one_sentence(surgery(verb, "./m"), 2)


@pytest.mark.parametrize("kind", ["a link", "a file"])
@pytest.mark.parametrize("name", [".out.lock"])
def test_a_lock_that_is_a_users_file(surgery, base, tmp_path, name, kind):
    """What a link of that name points to is neither emptied nor removed."""
    (tmp_path / "mine.txt").write_text("mine")
    if kind == "a link":
        (tmp_path / name).symlink_to("mine.txt")
    else:
        os.link(tmp_path / "mine.txt", tmp_path / name)
    made(surgery, base, "out")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["a link", "a file"])
def test_a_users_file_beside_what_is_written(surgery, tmp_path, kind):
    """`surgery cp gqa` makes gqa.yaml, and touches nothing else."""
    mine = tmp_path / "gqa.yaml.unfinished"
    if kind == "a link":
        (tmp_path / "mine.txt").write_text("mine")
        mine.symlink_to("mine.txt")
    else:
        mine.write_text("mine")
    before = listing(tmp_path)
    assert surgery("cp", "gqa").code == 0
    after = listing(tmp_path)
    assert not after.pop("gqa.yaml").startswith("->")
    assert after == before


# --- others who write at the same time ------------------------------------------------------------


def once(act):
    """A progress callback that acts when it is first called."""
    done = []

    def progress(*_):
        if not done:
            done.append(1)
            act()

    return progress


def test_a_folder_that_appears_at_out(base, tmp_path):
    """Who did not say --overwrite loses nothing, however long the run takes."""
    out = tmp_path / "out"

    def appear():
        out.mkdir()
        (out / "thesis.tex").write_text("mine")

    with pytest.raises(SurgeryError):
        library.apply(MERGE, base, output=out, check=False, evaluate=False, progress=once(appear))
    assert (out / "thesis.tex").read_text() == "mine"


def test_a_file_that_appears_in_out(base, tmp_path):
    """A file of the user's refuses --overwrite before the run, and so it does at its end."""
    out = tmp_path / "out"
    library.apply(MERGE, base, output=out, check=False, evaluate=False)
    act = once(lambda: (out / "notes.txt").write_text("mine"))
    with pytest.raises(SurgeryError):
        library.apply(MERGE, base, output=out, check=False, evaluate=False, overwrite=True, progress=act)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["out.partial", "base", "parent"])
def test_a_folder_that_goes_away(base, tmp_path, what):
    """One sentence, and nothing is called OUT; or OUT is made anew, and whole."""
    target = {"out.partial": "parent/out.partial", "base": "base", "parent": "parent"}[what]
    out = tmp_path / "parent/out"
    out.parent.mkdir()
    tensors = load_file(base / "model.safetensors")
    index = {name: f"m-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in index if index[name] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    act = once(lambda: shutil.rmtree(tmp_path / target))
    try:
        report = library.apply(MERGE, base, output=out, check=False, evaluate=False, progress=act)
    except MachineError:
        assert not out.exists()
    else:
        assert what != "base"
        assert manifest.differences(out, report.data, report.intact) == []


def stopped(surgery, base, monkeypatch):
    """A run that was stopped after its first tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "surgery.conversion.streaming.refuse_non_finite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert made(surgery, base, "out").code == 130


OTHER_RUNS = {
    "another engine": ("--engine", "loaded"),
    "another number": ("kv_heads=1",),
    "another method": ("method=first",),
    "another seed": ("seed=1",),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_resumed_with_another_option(surgery, base, tmp_path, monkeypatch, name):
    """It is another conversion: refused, and what is there stays for its own command."""
    stopped(surgery, base, monkeypatch)
    before = listing(tmp_path)
    one_sentence(made(surgery, base, "out", *OTHER_RUNS[name], "--resume"), 2)
    assert listing(tmp_path) == before
    assert made(surgery, base, "out", "--resume").code == 0
    assert library.load(tmp_path / "out").config.num_key_value_heads == 2


def test_resumed_after_the_base_was_moved_and_trained(surgery, base, tmp_path, monkeypatch):
    """The same weights elsewhere are the same base; other weights in its place are not."""
    stopped(surgery, base, monkeypatch)
    moved = base.rename(tmp_path / "moved")
    edit_tensors(Path(shutil.copytree(moved, base)), lambda tensors: tensors["model.norm.weight"].fill_(7.0))
    one_sentence(made(surgery, base, "out", "--resume"), 2)
    assert made(surgery, moved, "out", "--resume").code == 0


@pytest.mark.parametrize("when", [0, -(10**9), 4 * 10**9, 2**40])
def test_files_of_another_time(surgery, base, tmp_path, when):
    """Nothing depends on the dates of files: a clock that was wrong changes no result, and no --resume."""
    for path in (base, *base.iterdir()):
        os.utime(path, (when, when))
    assert made(surgery, base, "out").code == 0
    first = json.loads((tmp_path / "out/surgery.json").read_text())["files"]
    for path in (tmp_path / "out").iterdir():
        os.utime(path, (when, when))
    assert made(surgery, base, "out", "--overwrite").code == 0
    assert json.loads((tmp_path / "out/surgery.json").read_text())["files"] == first


def test_a_clock_that_runs_backwards(surgery, base, monkeypatch):
    begin = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(begin)))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(begin)))
    assert made(surgery, base, "out").code == 0
    assert surgery("eval", "out", "--base", base, "--windows", "1", "--length", "32").code == 0


# --- limits of the system -------------------------------------------------------------------------


def sharded(base: Path, count: int) -> None:
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    index = {name: f"m-{i % count}.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in names if index[name] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("engine", ["streaming", "loaded"])
def test_few_file_descriptors(surgery, base, engine):
    """Shards are opened one after the other: twenty of them need no more descriptors than two."""
    sharded(base, 20)
    made(surgery, base, "warm")
    taken = max(map(int, os.listdir("/proc/self/fd")))
    with limit(resource.RLIMIT_NOFILE, taken + 8):
        ran = made(surgery, base, "out", "--engine", engine)
    assert ran.code == 0, ran.err[-300:]


def test_no_file_descriptors(surgery, base, tmp_path):
    """The system's refusal is one sentence."""
    made(surgery, base, "warm")
    taken = len(os.listdir("/proc/self/fd")) - 1
    with limit(resource.RLIMIT_NOFILE, taken):
        ran = made(surgery, base, "out")
    one_sentence(ran, 5)
    assert not (tmp_path / "out").exists()


ERRORS = [
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ENOMEM,
    errno.EINVAL,
    errno.ETIMEDOUT,
    errno.ENODEV,
]


@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_errors_of_a_disk(surgery, base, tmp_path, monkeypatch, number):
    """A quota, a network disk that went away, a disk that failed: one sentence, and --resume goes on."""
    with pytest.MonkeyPatch.context() as patch:

        def fail(_):
            raise OSError(number, os.strerror(number))

        patch.setattr(os, "fsync", fail)
        ran = made(surgery, base, "out")
    one_sentence(ran, 5)
    assert not (tmp_path / "out").exists()
    assert made(surgery, base, "out", "--resume").code == 0


@pytest.mark.parametrize(
    "number",
    [errno.ENOLCK, errno.EIO, errno.ENOSYS],
    ids=lambda number: errno.errorcode[number],
)
def test_a_disk_without_locks(surgery, base, tmp_path, monkeypatch, number):
    """Some network disks have none: it works without, or one sentence says so."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    ran = made(surgery, base, "out")
    assert ran.code in (0, 5), ran.err[-300:]
    assert "Traceback" not in ran.err


def test_no_folder_for_temporary_files(surgery, base, monkeypatch):
    """A container may have no /tmp, and a working folder that is read-only."""
    assert made(surgery, base, "out").code == 0
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    one_sentence(surgery("eval", "out", "--base", base, "--windows", "1", "--length", "32"), 5)


def test_a_tmpdir_that_is_not_there(surgery, base, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert made(surgery, base, "out").code == 0
    assert surgery("eval", "out", "--base", base, "--windows", "1", "--length", "32").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


@pytest.mark.parametrize("verb", ["check", "eval"])
def test_a_result_that_cannot_be_recorded(surgery, base, tmp_path, monkeypatch, verb):
    """A checkpoint on a disk for reading alone: one sentence, and its record is as it was."""
    from surgery.evaluation import check

    assert made(surgery, base, "out").code == 0
    before = listing(tmp_path)
    monkeypatch.setattr(check, "check_loading", lambda *_, **__: [])

    def fail(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "surgery.json")

    monkeypatch.setattr(io_files.os, "replace", fail)
    command = {"check": ("check", "out"), "eval": ("eval", "out", "--base", base, "--windows", "8", "--length", "512")}
    ran = surgery(*command[verb])
    assert ran.code in (0, 5)
    assert "Traceback" not in ran.err
    monkeypatch.undo()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("columns", ["0", "1", "-5", "many", "100000", ""])
@pytest.mark.parametrize("term", ["dumb", "", "xterm-256color"])
def test_terminals_of_odd_sizes(surgery, base, monkeypatch, columns, term):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    monkeypatch.setenv("TERM", term)
    for command in (("inspect", base), ("plan", "gqa", base, *MEAN), ("ls",)):
        ran = surgery(*command)
        assert ran.code == 0
        assert "Traceback" not in ran.err


# --- processes of their own -----------------------------------------------------------------------


def test_an_environment_of_nothing(base, tmp_path):
    """No HOME, no PATH, no locale, a cache that cannot be written, streams in ASCII: apply and its check work."""
    folder = base.rename(tmp_path / "mod\u00e8le \u03b1")
    (folder / "LICENSE").write_text("\u00a9 \u6a21", encoding="utf-8")
    (tmp_path / "r\u00e9.yaml").write_text(
        "version: 1\nname: \u03b1\noperations: [{op: gqa, kv_heads: 2, method: mean}]\nevaluate: null\n",
        encoding="utf-8",
    )
    env = {
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "LC_ALL": "POSIX",
        "PYTHONIOENCODING": "ascii:strict", "HF_HOME": "/proc/none", "SURGERY_CACHE": "/proc/none",
        "OMP_NUM_THREADS": "1", "TMPDIR": "/proc/none",
    }  # fmt: skip
    command = [*COMMAND, "apply", "r\u00e9.yaml", folder.name, "-o", "r\u00e9sultat"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert b"Traceback" not in done.stderr
    record = json.loads((tmp_path / "r\u00e9sultat/surgery.json").read_text(encoding="utf-8"))
    assert (record["base"]["name"], record["recipe"]["name"]) == ("mod\u00e8le \u03b1", "\u03b1")
    assert record["check"]["passed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_ended_while_it_is_checked(surgery, base, tmp_path, number):
    """OUT is whole by then: it stays, and --resume does the rest."""
    command = [*COMMAND, "apply", "gqa", str(base), *MEAN, "-o", "out", "--no-eval", "--quiet"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup has it ignored
    ) as run:
        for _ in range(2000):
            if (tmp_path / "out").exists() or run.poll() is not None:
                break
            time.sleep(0.01)
        run.send_signal(number)
        said = run.stdout.read()
    assert run.returncode == -number
    assert b"Traceback" not in said
    assert json.loads((tmp_path / "out/surgery.json").read_text())["check"] is None
    ran = surgery("apply", "gqa", base, *MEAN, "-o", "out", "--no-eval", "--quiet", "--resume")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out/surgery.json").read_text())["check"]["passed"]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_a_terminal_that_hangs_up(base, tmp_path):
    """Its window is closed while the plan is printed: no traceback, and nothing is called OUT that is not whole."""
    leader, follower = pty.openpty()
    command = [*COMMAND, "apply", "gqa", str(base), *MEAN, "-o", "out", *QUICK]
    run = subprocess.Popen(command, cwd=tmp_path, stdin=follower, stdout=follower, stderr=subprocess.PIPE)
    os.close(follower)
    os.read(leader, 1)
    os.close(leader)
    said = run.communicate(timeout=60)[1]
    assert b"Traceback" not in said
    assert not (tmp_path / "out").exists() or (tmp_path / "out/surgery.json").is_file()
    assert not (tmp_path / "out/surgery-progress.json").exists()


def test_surgical_models_of_the_same_name(tmp_path):
    """Two folders that are swapped under one path: each load has the weights that lie there then."""
    found = []
    for number in range(2):
        model = TINY["llama"]()
        with torch.no_grad():
            model.model.norm.weight.fill_(1.0 + number)
        model.save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        library.apply(
            MERGE | {"operations": [{"op": "duo_attention", "streaming_ratio": 1.0, "sinks": number, "window": 3}]},
            tmp_path / "base", output=tmp_path / "out", check=False, evaluate=False, overwrite=True,
        )  # fmt: skip
        found.append(library.load(tmp_path / "out"))
    assert [float(model.model.norm.weight[0]) for model in found] == [1.0, 2.0]
    assert [model.config.surgery["layers"][0]["sinks"] for model in found] == [0, 1]
