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

ROOT = Path(__file__).resolve().parents[1]
make_checkpoint = runpy.run_path(str(ROOT / "examples" / "make_checkpoint.py"))["make_checkpoint"]

MQA = ("mqa",)
REORDERED = ("gqa", "kv_heads=2", "grouping=similarity")  # leaves a record of every layer in surgery.json
FAST = ("--no-check", "--no-eval", "--quiet")
FORKS = sys.platform == "linux"
SERVER = """
import json, os, sys
import surgery
from surgery import cli
surgery.plan("mqa", sys.argv[1])  # imports what a conversion imports; nothing is computed, so no threads are lost
import surgery.conversion
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

    def signal(self, number: int) -> None:
        if self.server is None:
            self.process.send_signal(number)
        elif self.alive():
            os.kill(self.pid, number)

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

    def kill(self, moment: Callable[[Run], object], *options: str) -> bool:
        """Kill a run at a moment; whether it was hit while OUT.partial was there. What must hold then, holds."""
        run = self.start(*options)
        until(self.partial.exists, run)
        moment(run)
        code = run.kill()
        hit = code != 0 and self.partial.exists()
        assert code == 0 or os.name == "nt" or code == -signal.SIGKILL
        assert hashes(self.base) == self.base_files
        if self.out.exists():
            assert hashes(self.out) == self.result
        return hit

    def finish(self) -> None:
        """--resume completes what is not complete, and leaves nothing else behind."""
        if not self.out.exists():
            assert self.start("--resume").wait() == 0
        assert hashes(self.out) == self.result
        assert hashes(self.base) == self.base_files
        left = [path.name for path in (*self.folder.iterdir(), *self.out.iterdir())]
        assert not [name for name in left if name.endswith((".partial", ".unfinished", ".replaced", "progress.json"))]
        shutil.rmtree(self.out)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file; of surgery.json and the card, which hold the time of the run, what else they say."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes() if path.suffix in (".json", ".md") else None
        if path.name == "surgery.json":
            report = json.loads(data)
            data = json.dumps(report | {"created": ""}, sort_keys=True).encode()
        if data is not None:
            found[path.name] = hashlib.sha256(data).hexdigest()
        else:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    found.pop("README.md", None)
    return found


def until(what: Callable[[], bool], run: Run) -> bool:
    """Wait until something is so, or the run has ended."""
    while not what():
        if not run.alive():
            return what()
        time.sleep(0.0005)
    return True


@pytest.fixture
def bench(tmp_path):
    """A function that makes a `Bench`; the server that it starts ends with the test."""
    servers = []

    def make(mebibytes: int, recipe: tuple[str, ...]) -> Bench:
        shape = {"hidden": 1024, "heads": 16, "kv_heads": 8, "mlp": 4096, "vocab": 8192}
        base = make_checkpoint(tmp_path / "base", mebibytes << 20, shards=8, **shape)
        server = None
        if FORKS:
            server = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            servers.append(server)
            assert server.stdout.readline() == "ready\n"
        made = Bench(tmp_path, base, recipe, server)
        made.measure()
        return made

    yield make
    for server in servers:
        server.stdin.close()
        server.wait()
        server.stdout.close()


def moments(bench: Bench, count: int, seed: int) -> list[Callable[[Run], object]]:
    """Moments spread over the writing time at random, every fifth while the last files are written."""
    rng = random.Random(seed)

    def sleep(share: float) -> Callable[[Run], object]:
        return lambda run: time.sleep(share * bench.seconds)

    def finishing(name: str) -> Callable[[Run], object]:
        return lambda run: until((bench.partial / name).exists, run)

    shares = [(number + rng.random()) / count * 0.9 for number in range(count)]
    last = [finishing("config.json"), finishing("surgery.json")]
    drawn = [last[n // 5 % 2] if n % 5 == 4 else sleep(share) for n, share in enumerate(shares)]
    rng.shuffle(drawn)
    return drawn


def killed_and_resumed(bench: Bench, count: int, chain: int) -> int:
    """Kill `count` runs: the first half resumed after each kill, the rest in chains of kills; how many were hit."""
    hits = 0
    for number, moment in enumerate(moments(bench, count, seed=1)):
        chained = number >= count // 2
        if chained:  # a resumed run has less to write: the moment comes sooner
            moment = sooner(moment, chain)
        hits += bench.kill(moment, *(["--resume"] if bench.partial.exists() else []))
        if not chained or number % chain == chain - 1 or bench.out.exists():
            bench.finish()
    if bench.partial.exists():
        bench.finish()
    return hits


def sooner(moment: Callable[[Run], object], times: int) -> Callable[[Run], object]:
    def shortened(run: Run) -> None:
        real = time.sleep
        time.sleep = lambda seconds: real(seconds / times if seconds > 0.001 else seconds)
        try:
            moment(run)
        finally:
            time.sleep = real

    return shortened
