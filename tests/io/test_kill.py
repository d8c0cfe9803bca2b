"""kill -9 at any moment: OUT is complete or absent, the base is untouched, --resume gives what an unhurt run gives.

The killed process is a real one that runs the real command. To be killed while it writes, and not during seconds of
imports, it is forked from a process that has imported everything (where there is no fork: started anew each time).
Moments are drawn from the time between the first sight of OUT.partial and the end, which is measured first.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
make_checkpoint = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "make_checkpoint.py"))["make_checkpoint"]

MQA = ("mqa",)
REORDERED = ("mqa", "kv_heads=2", "grouping=similarity")  # leaves a record of every layer in surgery.json
FAST = ("--no-check", "--no-eval", "--quiet")
FORKS = sys.platform == "linux"
SERVER = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background is started with it ignored
import surgery
from surgery.cli import main as cli
surgery.plan("mqa", sys.argv[1])  # imports what a conversion imports; nothing is computed, so no threads are lost
import surgery.conversion.convert, torch
print("ready", flush=True)
for line in sys.stdin:
    if pid := os.fork():
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        cli.main(json.loads(line))
    except SystemExit as end:
        os._exit(end.code or 0)
"""


class Run:
    """One run of the command, which may be killed."""

    def __init__(self, args: list[str], server: subprocess.Popen | None):
        self.server, self.code = server, None
        if server is None:
            self.process = subprocess.Popen([sys.executable, "-m", "surgery", *args], stdout=subprocess.DEVNULL)
            self.pid = self.process.pid
        else:
            server.stdin.write(json.dumps(args) + "\n")
            server.stdin.flush()
            self.pid = int(server.stdout.readline())

    def alive(self) -> bool:
        if self.server is None:
            return self.process.poll() is None
        return os.path.exists(f"/proc/{self.pid}/fd/0")  # a zombie has no files

    def signal(self, signum: int) -> None:
        if self.server is None:
            self.process.send_signal(signum)
        elif self.alive():
            os.kill(self.pid, signum)

    def kill(self) -> int:
        if os.name == "nt":
            self.process.terminate()
        else:
            self.signal(signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        self.code = int(self.server.stdout.readline()) if self.server else self.process.wait()
        return self.code


@dataclass
class Bench:
    """A base checkpoint, the result of an unhurt run, and how long that run wrote."""

    folder: Path
    base: Path
    recipe: tuple[str, ...]
    server: subprocess.Popen | None
    base_files: dict[str, str] = field(default_factory=dict)
    result: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def partial(self) -> Path:
        return self.folder / "out.partial"

    def start(self, *options: str) -> Run:
        recipe, *overrides = self.recipe
        return Run(["apply", recipe, str(self.base), *overrides, "-o", str(self.out), *FAST, *options], self.server)

    def measure(self) -> None:
        """An unhurt run."""
        self.base_files = hashes(self.base)
        run = self.start()
        assert until(self.partial.exists, run)
        began = time.monotonic()
        assert run.wait() == 0
        self.seconds = time.monotonic() - began
        self.result = hashes(self.out)
        shutil.rmtree(self.out)

    def kill(self, moment: float | str, *options: str) -> bool:
        """Kill a run after a share of the writing time, or when a file is there; whether OUT.partial was there too.

        What must hold then, holds.
        """
        run = self.start(*options)
        until(self.partial.exists, run)
        if isinstance(moment, str):
            until((self.partial / moment).exists, run)
        else:
            time.sleep(moment * self.seconds)
        code = run.kill()
        assert code == 0 or os.name == "nt" or code == -signal.SIGKILL
        assert hashes(self.base) == self.base_files
        if self.out.exists():
            assert hashes(self.out) == self.result
        return code != 0 and self.partial.exists()

    def finish(self) -> None:
        """--resume completes what is not complete, and leaves nothing else behind."""
        if not self.out.exists():
            assert self.start("--resume").wait() == 0
            assert sorted(path.name for path in self.folder.iterdir()) == ["base", "out"]
            assert not list(self.out.glob("*.unfinished"))
            assert not (self.out / "surgery-progress.json").exists()
        assert hashes(self.out) == self.result
        assert hashes(self.base) == self.base_files
        shutil.rmtree(self.out)
        (self.folder / ".out.lock").unlink(missing_ok=True)  # of a run that was killed after its last rename


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file; of surgery.json and the card, which hold the time of the run, what else they say."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes() if path.suffix in (".json", ".md") else None
        if path.name == "surgery.json":
            report = json.loads(data)
            del report["other_files"]["README.md"]
            data = json.dumps(report | {"created": "", "record_sha256": "", "timing": None}, sort_keys=True).encode()
        if data is not None:
            digests[path.name] = hashlib.sha256(data).hexdigest()
        else:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    digests.pop("README.md", None)
    return digests


def until(what: Callable[[], bool], run: Run) -> bool:
    """Wait until something is so, or the run has ended."""
    while not what():
        if not run.alive():
            return what()
        time.sleep(0.0005)
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The process that is forked; None where every run is started anew."""
    if not FORKS:
        yield None
        return
    tiny = make_checkpoint(tmp_path_factory.mktemp("tiny"), 0, hidden=64, heads=4, kv_heads=2, mlp=128, vocab=128)
    command = [sys.executable, "-c", SERVER, str(tiny)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


@pytest.fixture
def bench(tmp_path, server):
    """A function that makes a `Bench` of so many MiB in about 8 shards."""

    def make(mebibytes: int, recipe: tuple[str, ...]) -> Bench:
        shape = {"hidden": 1024, "heads": 16, "kv_heads": 8, "mlp": 4096, "vocab": 8192}
        base = make_checkpoint(tmp_path / "base", mebibytes << 20, shards=8, **shape)
        made = Bench(tmp_path, base, recipe, server)
        made.measure()
        return made

    return make


def killed_and_resumed(bench: Bench, count: int, chain: int) -> int:
    """Kill runs at random moments, every fourth while its last small files are written.

    The first half is resumed to the end after each kill; the others resume one another, `chain` kills in a row, and
    have less to write each time.

    Returns:
        How many were killed while OUT.partial was there.
    """
    rng, hits, kills = random.Random(1), 0, 0
    while kills < count:
        chained = kills >= count // 2
        for _ in range(min(chain, count - kills) if chained else 1):
            moment = rng.random() * 0.8 / (chain / 2 if chained else 1)
            last = rng.choice(["config.json", "surgery.json"])
            hits += bench.kill(last if kills % 4 == 3 else moment, *(["--resume"] if bench.partial.exists() else []))
            kills += 1
            if bench.out.exists():
                break
        bench.finish()
    return hits


@pytest.mark.slow
def test_twenty_kills(bench):
    """Half a GiB: the criterion that the project set itself."""
    hits = killed_and_resumed(bench(512, MQA), count=20, chain=5)
    print(f"{hits} of 20 kills while OUT.partial was there")
    assert hits >= 15


def test_a_few_kills(bench):
    """Large enough that two shards are written at a time; the records of finished layers must survive."""
    assert killed_and_resumed(bench(192, REORDERED), count=4, chain=2) >= 2


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to one process")
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["plain", "json"])
def test_ctrl_c(bench, options):
    """Exit code 130 and an OUT.partial that can be resumed."""
    work = bench(192, MQA)
    run = work.start(*options)
    assert until(work.partial.exists, run)
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    assert work.partial.exists()
    assert not work.out.exists()
    work.finish()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_stopped_between_the_two_renames_of_overwrite(bench, monkeypatch, error):
    """The one moment without OUT: the old one is OUT.replaced, and comes back."""
    import surgery
    from surgery.io import output_folder as output

    work = bench(1, MQA)
    assert work.start().wait() == 0
    real, renames = os.rename, []

    def rename(source, target):
        renames.append(source)
        if len(renames) == 2:
            raise error
        real(source, target)

    options = {"output": work.out, "check": False, "evaluate": False, "overwrite": True}
    with monkeypatch.context() as patch:
        patch.setattr(output.os, "rename", rename)
        with pytest.raises(error):
            surgery.apply("mqa", work.base, method="first", **options)
    assert not work.out.exists()
    assert hashes(work.folder / "out.replaced") == work.result

    assert work.start("--resume").wait() == 2, "OUT is there again, and may not be replaced"
    assert hashes(work.out) == work.result
    surgery.apply("mqa", work.base, method="first", resume=True, **options)
    assert json.loads((work.out / "surgery.json").read_text())["recipe"]["operations"][0]["method"] == "first"
    assert not work.partial.exists()
    assert not (work.folder / "out.replaced").exists()
    assert hashes(work.out) != work.result
