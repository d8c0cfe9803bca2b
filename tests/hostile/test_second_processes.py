"""Processes and disks, second round: copies in the kernel, runs that left odd states, threads, homes, encodings."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
from conftest import listing
from safetensors.torch import load_file, save_file

import surgery as library
from surgery import MachineError, SurgeryError
from surgery.io import manifest
from surgery.io.ranges import RangeCopier

QUICK = ("--no-check", "--no-eval")
MEAN = ("kv_heads=2", "method=mean")
MERGE = {"version": 1, "name": "x", "operations": [{"op": "gqa", "kv_heads": 2, "method": "mean"}], "evaluate": None}


def made(surgery, base, out, *more):
    return surgery("apply", "gqa", base, *MEAN, "-o", out, *QUICK, *more)


def one_sentence(ran, code: int) -> None:
    assert ran.code == code, ran.err[-400:]
    assert ran.err.startswith("error: ")
    assert ran.err.count("error:") == 1
    assert "Traceback" not in ran.err


# --- ranges of files ------------------------------------------------------------------------------

CONTENT = bytes(range(251)) * 4000
RANGES = [(0, 10), (5, 5), (len(CONTENT) - 1, 1), (100, 131_072), (100, 131_073), (7, 0), (1, 900_000), (3, 1)]


def copied(folder: Path, ranges=RANGES, mode: str = "wb", begin: bytes = b"") -> tuple[bytes, bytes]:
    """What was yielded, and what stands in the target."""
    (folder / "s").write_bytes(CONTENT)
    (folder / "t").write_bytes(begin)
    with open(folder / "s", "rb", buffering=0) as source, open(folder / "t", mode, buffering=0) as target:
        target.seek(0, os.SEEK_END)
        copier, seen = RangeCopier(source, target), bytearray()
        for start, size in ranges:
            for data in copier.copy(start, size):
                seen += data
        assert target.tell() == len(begin) + len(seen)
    return bytes(seen), (folder / "t").read_bytes()


def wanted(ranges=RANGES) -> bytes:
    return b"".join(CONTENT[start : start + size] for start, size in ranges)


def always(number: int):
    def way(real):
        def call(*_, **__):
            raise OSError(number, os.strerror(number))

        return call

    return way


def after(calls: int, number: int):
    def way(real):
        left = [calls]

        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return call

    return way


def nothing(real):
    return lambda *_, **__: 0


def little(real):
    def copy_file_range(source, target, count, **options):
        return real(source, target, min(count, 777), **options)

    return copy_file_range


def little_sent(real):
    return lambda target, source, offset, count: real(target, source, offset, min(count, 777))


SYSTEMS = {
    "as it is": {},
    "no call of the kernel": {"copy_file_range": None, "sendfile": None},
    "another disk": {"copy_file_range": always(errno.EXDEV)},
    "two ways that do not work": {"copy_file_range": always(errno.ENOSYS), "sendfile": always(errno.EINVAL)},
    "a way that stops working": {"copy_file_range": after(3, errno.EINVAL), "sendfile": after(2, errno.EINVAL)},
    "a little at a time": {"copy_file_range": little},
    "a little at a time, sent": {"copy_file_range": always(errno.EXDEV), "sendfile": little_sent},
    "a disk that says it copied nothing": {"copy_file_range": nothing},
    "two ways that copy nothing": {"copy_file_range": nothing, "sendfile": nothing},
    "a rule of a sandbox": {"copy_file_range": always(errno.EACCES)},
    "no file for this call": {"copy_file_range": always(errno.ENOTTY), "sendfile": always(errno.EACCES)},
}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("mode", ["r+b", "ab"])
def test_ranges_are_copied_whatever_the_system_can(tmp_path, monkeypatch, name, mode):
    for call, way in SYSTEMS[name].items():
        monkeypatch.delattr(os, call) if way is None else monkeypatch.setattr(os, call, way(getattr(os, call)))
    assert copied(tmp_path, mode=mode, begin=b"header") == (wanted(), b"header" + wanted())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_is_not_asked_in_another_way(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "copy_file_range", always(number)(os.copy_file_range))
    with pytest.raises(OSError) as fault:
        copied(tmp_path)
    assert fault.value.errno == number


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("ranges", [[(len(CONTENT) - 9, 10)], [(len(CONTENT) + 5, 1)]], ids=["over", "beyond"])
def test_a_source_that_ends_is_an_error_in_every_way(tmp_path, monkeypatch, name, ranges):
    for call, way in SYSTEMS[name].items():
        monkeypatch.delattr(os, call) if way is None else monkeypatch.setattr(os, call, way(getattr(os, call)))
    with pytest.raises(EOFError):
        copied(tmp_path, ranges)


@pytest.mark.parametrize("name", ["a disk that says it copied nothing", "a rule of a sandbox"])
def test_a_conversion_on_such_a_disk(surgery, base, tmp_path, monkeypatch, name):
    """The same bytes as anywhere."""
    assert made(surgery, base, "plain").code == 0
    for call, way in SYSTEMS[name].items():
        monkeypatch.setattr(os, call, way(getattr(os, call)))
    ran = made(surgery, base, "out")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()


def once(act):
    done = []

    def progress(*_):
        if not done:
            done.append(1)
            act()

    return progress


def test_a_base_that_is_cut_while_it_is_read(base, tmp_path):
    """One sentence, and no OUT."""

    def cut():
        with open(base / "model.safetensors", "r+b") as file:
            file.truncate(2000)

    with pytest.raises(SurgeryError, match="ended while it was read"):
        library.apply(MERGE, base, output=tmp_path / "out", check=False, evaluate=False, progress=once(cut))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system")
def test_base_and_output_on_two_file_systems(surgery, base, tmp_path):
    other = Path("/dev/shm") / f"surgery-{os.getpid()}"
    other.mkdir()
    try:
        shutil.copytree(base, other / "base")
        for name, model, out in (("there", base, other / "out"), ("back", other / "base", tmp_path / "out")):
            assert made(surgery, model, out).code == 0, name
        assert (other / "out/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    finally:
        shutil.rmtree(other)


# --- states that a run may leave ------------------------------------------------------------------


def interrupt(_) -> None:
    raise KeyboardInterrupt


def sharded(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    index = {name: f"m-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in index if index[name] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture(scope="module")
def left(tiny, tmp_path_factory) -> Path:
    """A base of three shards, what becomes of it, and OUT.partial of a run that was stopped when all were written."""
    root = tmp_path_factory.mktemp("left")
    sharded(Path(shutil.copytree(tiny, root / "base")))
    library.apply(MERGE, root / "base", output=root / "plain", check=False, evaluate=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.io.output_folder.OutputFolder._finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            library.apply(MERGE, root / "base", output=root / "out", check=False, evaluate=False)
    return root


@pytest.fixture
def stopped(left, tmp_path) -> Path:
    """A copy of these in `tmp_path`; its OUT.partial."""
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out.partial"


def progress_of(partial: Path) -> dict:
    return json.loads((partial / "surgery-progress.json").read_text())


def note(partial: Path, **fields) -> None:
    (partial / "surgery-progress.json").write_text(json.dumps(progress_of(partial) | fields))


def cut(partial: Path) -> None:
    with open(partial / "m-1.safetensors", "r+b") as file:
        file.truncate(100)


def zeroed(partial: Path) -> None:
    file = partial / "m-1.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


def exchanged(partial: Path) -> None:
    one, other = ((partial / f"m-{n}.safetensors").read_bytes() for n in (0, 1))
    (partial / "m-0.safetensors").write_bytes(other)
    (partial / "m-1.safetensors").write_bytes(one)


def a_folder(partial: Path) -> None:
    (partial / "m-1.safetensors").unlink()
    (partial / "m-1.safetensors").mkdir()


def a_file_of_another_plan(partial: Path) -> None:
    shutil.copyfile(partial / "m-0.safetensors", partial / "m-9.safetensors")
    done = progress_of(partial)["done"]
    note(partial, done=done | {"m-9.safetensors": done["m-0.safetensors"]})


def a_file_that_is_not_noted(partial: Path) -> None:
    (partial / "m-9.safetensors").write_bytes(b"x" * 100)


def a_path_that_leaves(partial: Path) -> None:
    (partial.parent / "mine.txt").write_text("mine")
    digest = "5b3b0ffe7d1bf0a0b3ac7b0fae7f0f1ff9ad8ad0b8ae2e4c7c3d3fbb4f0a1f05"
    note(partial, done=progress_of(partial)["done"] | {"../mine.txt": {"sha256": digest, "bytes": 4}})


STATES = {
    "nothing changed": lambda partial: None,
    "a shard that was cut": cut,
    "a shard of zeros": zeroed,
    "two shards exchanged": exchanged,
    "a shard that is a folder": a_folder,
    "a shard less": lambda partial: (partial / "m-1.safetensors").unlink(),
    "the index less": lambda partial: (partial / "model.safetensors.index.json").unlink(),
    "the config less": lambda partial: (partial / "config.json").unlink(missing_ok=True),
    "a file of another plan": a_file_of_another_plan,
    "a file that nobody noted": a_file_that_is_not_noted,
    "a path that leaves the folder": a_path_that_leaves,
    "half a shard beside": lambda partial: (partial / "m-1.safetensors.unfinished").write_bytes(b"x"),
    "no records": lambda partial: note(partial, records=None),
    "records of no step": lambda partial: note(partial, records=[]),
    "records of many steps": lambda partial: note(partial, records=[{}, {}, {}]),
    "records of numbers": lambda partial: note(partial, records=[5]),
    "records of layers that are none": lambda partial: note(partial, records=[{"nowhere": {"a": 1}}]),
    "sizes of text": lambda partial: note(partial, done={n: i | {"bytes": "x"} for n, i in
                                                         progress_of(partial)["done"].items()}),
    "no sizes": lambda partial: note(partial, done={n: {"sha256": i["sha256"]} for n, i in
                                                    progress_of(partial)["done"].items()}),
    "hashes of numbers": lambda partial: note(partial, done={n: {"sha256": 5} for n in progress_of(partial)["done"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_resumed_from_a_mixed_state(surgery, tmp_path, stopped, name):
    """The same files as of a run that was never stopped; or one sentence, and OUT is not made."""
    STATES[name](stopped)
    (tmp_path / "r.json.yaml").write_text(json.dumps(MERGE))
    ran = surgery("apply", "r.json.yaml", tmp_path / "base", "-o", "out", *QUICK, "--resume")
    if ran.code:
        one_sentence(ran, ran.code)
        assert ran.code in (2, 5)
        assert not (tmp_path / "out").exists()
        assert name not in ("nothing changed", "a shard that was cut", "a shard less", "half a shard beside")
        return
    out, plain = tmp_path / "out", tmp_path / "plain"
    weights = {path.name for path in out.iterdir() if "safetensors" in path.name}
    assert weights == {path.name for path in plain.iterdir() if "safetensors" in path.name}
    for file in weights:
        assert (out / file).read_bytes() == (plain / file).read_bytes(), file
    report, other = library.Report.of(out), library.Report.of(plain)
    assert report.data["files"] == other.data["files"]
    assert report.data["operations"] == other.data["operations"]
    assert manifest.differences(out, report.data, report.intact) == []
    assert not (tmp_path / "out.partial").exists()


def test_resumed_with_nothing_to_resume(surgery, base, tmp_path):
    """The command may be repeated as it is: from nothing, from an end, and with --overwrite."""
    assert made(surgery, base, "out", "--resume").code == 0
    first = listing(tmp_path / "out")
    assert made(surgery, base, "out", "--resume").code == 0
    assert made(surgery, base, "out", "--resume", "--overwrite").code in (0, 2)
    after = listing(tmp_path / "out")
    assert {name: value for name, value in after.items() if "safetensors" in name} == {
        name: value for name, value in first.items() if "safetensors" in name
    }


def test_a_stored_teacher_that_was_damaged(base, tmp_path):
    """A run that goes on reads what the base said again where the store is not whole."""
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    library.apply(MERGE, base, output=tmp_path / "out", check=False, evaluate=False)
    settings = {"method": "parts", "data": str(tmp_path / "t.txt"), "length": 16, "batch_tokens": 32, "steps": 2,
                "teacher": "stored", "precision": "float32", "check": False, "evaluate": False}  # fmt: skip
    library.heal(tmp_path / "out", base, output=tmp_path / "plain", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.io.output_folder.OutputFolder._finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            library.heal(tmp_path / "out", base, output=tmp_path / "healed", **settings)
    for path in (tmp_path / "healed.partial").rglob("*"):
        if path.is_file() and "teacher" in path.relative_to(tmp_path).as_posix():
            path.write_bytes(path.read_bytes()[:50])
    library.heal(tmp_path / "out", base, output=tmp_path / "healed", resume=True, **settings)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "healed"))
    assert all(one[name].equal(other[name]) for name in one)


# --- threads and signals --------------------------------------------------------------------------


def test_a_conversion_in_a_thread(base, tmp_path):
    """Signals belong to the main thread; a server converts in another one."""
    results = []

    def work():
        results.append(library.apply(MERGE, base, output=tmp_path / "out", check=False, evaluate=False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].folder == tmp_path / "out"


def test_a_system_without_threads(surgery, base, tmp_path, monkeypatch):
    """A limit of processes (ulimit -u, a container's) is the machine's fault: one sentence, and --resume goes on."""
    with monkeypatch.context() as patch:

        def start(_):
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", start)
        ran = made(surgery, base, "out")
    if ran.code:
        one_sentence(ran, 5)
        assert not (tmp_path / "out").exists()
    assert made(surgery, base, "out", "--resume").code == 0 or (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_handlers_of_a_script_stay(base, tmp_path, number):
    """A script's own handlers are in place after every call, also one that fails."""

    def mine(*_):
        pass

    before = signal.signal(number, mine)
    try:
        library.apply(MERGE, base, output=tmp_path / "out", check=False, evaluate=False)
        with pytest.raises(SurgeryError):
            library.apply(MERGE, base, output=tmp_path / "out", check=False, evaluate=False)
        library.evaluate(base, windows=1, length=32)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


# --- surroundings ---------------------------------------------------------------------------------

ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "utf-16"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("arguments", [("plan",), ("nothing",)], ids=lambda words: words[0])
def test_terminals_of_other_letters(base, tmp_path, monkeypatch, encoding, arguments):
    """A console that has no arrow shows something in its place: no UnicodeEncodeError."""
    from surgery.cli.main import main

    monkeypatch.chdir(tmp_path)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    more = {"plan": ["gqa", str(base), *MEAN], "inspect": [str(base)]}.get(arguments[0], [])
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *more])
    for stream in streams.values():
        stream.flush()
    said = streams["stderr"].buffer.getvalue().decode(encoding, "replace")
    assert (stopped.value.code or 0) == (2 if arguments == ("nothing",) else 0), said
    assert "Traceback" not in said


def test_homes_and_caches_that_are_files(surgery, base, tmp_path, monkeypatch):
    """Nothing that a conversion of a local folder needs lies in a home or a cache."""
    (tmp_path / "file").write_text("mine")
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "SURGERY_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    assert made(surgery, base, "out").code == 0
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_standard_stream_that_is_not_there(surgery, base, tmp_path, monkeypatch, stream):
    """A script that was started without one of them."""
    monkeypatch.setattr(sys, stream, None)
    report = library.apply(MERGE, base, output=tmp_path / "out", check=False, evaluate=False)
    assert report.folder == tmp_path / "out"


def test_a_full_disk_in_the_last_rename(surgery, base, tmp_path, monkeypatch):
    """The old OUT is in its place again, the new one waits for --resume."""
    assert made(surgery, base, "out").code == 0
    before, real = listing(tmp_path / "out"), os.rename

    def rename(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        ran = surgery("apply", "gqa", base, "kv_heads=1", "method=mean", "-o", "out", *QUICK, "--overwrite")
    one_sentence(ran, 5)
    assert listing(tmp_path / "out") == before
    again = surgery("apply", "gqa", base, "kv_heads=1", "method=mean", "-o", "out", *QUICK, "--overwrite", "--resume")
    assert again.code == 0, again.err
    assert library.load(tmp_path / "out").config.num_key_value_heads == 1
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_a_machine_error_says_the_path(base, tmp_path):
    (tmp_path / "parent").write_text("a file")
    with pytest.raises(MachineError) as fault:
        library.apply(MERGE, base, output=tmp_path / "parent/out", check=False, evaluate=False)
    assert str(tmp_path / "parent") in str(fault.value)
