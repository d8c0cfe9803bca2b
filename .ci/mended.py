#!/usr/bin/env python
"""Print the result of each fixed defect's test before and after the fix.

    python .ci/mended.py [DEFECT ...]

A commit that fixes a defect names the defect and its test in a line of its message: "Mends: D1 tests/... [-k words]".
The test is run on that commit. It is also run on the parent of that commit, with the commit's tests. There it should
fail.
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT, CASE_LIMIT, MEMORY = 900, 60, 12 << 30  # seconds for a run, seconds for one test, bytes
PLUGIN = f"""# A test that hangs on the parent has failed.
import signal
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    def stop(*_):
        raise TimeoutError("no end within {CASE_LIMIT} s")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm({CASE_LIMIT})
    try:
        return (yield)
    finally:
        signal.alarm(0)
"""


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def mends() -> list[tuple[str, str, list[str]]]:
    """(defect, commit, arguments of pytest) for each fix, oldest first."""
    found = []
    for entry in git("log", "--reverse", "--format=%H%x00%B%x01").split("\x01"):
        commit, _, message = entry.strip().partition("\x00")
        for defect, words in re.findall(r"^Mends: (\S+) (.+)$", message, re.MULTILINE):
            head, keyword, rest = words.partition(" -k ")
            found.append((defect, commit, [*shlex.split(head), *(["-k", rest] if keyword else [])]))
    return found


def run(tree: Path, arguments: list[str]) -> str:
    """Run pytest in a tree; its last line of results."""
    (tree / "case_limit.py").write_text(PLUGIN)
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "case_limit", *arguments]
    options = {"cwd": tree, "env": env, "capture_output": True, "text": True, "timeout": LIMIT}
    try:
        done = subprocess.run(
            command, **options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, [MEMORY] * 2)
        )
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT} s"
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= ")) if lines else (done.stdout + done.stderr)[-200:]


def tree_of(commit: str, folder: Path, tests: str) -> Path:
    """Extract the files of a commit into a folder, with the tests of the commit `tests`."""
    for what, paths in ((commit, ()), (tests, ("tests", "pyproject.toml"))):
        archive = subprocess.run(["git", "archive", what, *paths], cwd=ROOT, check=True, capture_output=True).stdout
        if paths:
            shutil.rmtree(folder / "tests")
        folder.mkdir(exist_ok=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def main() -> None:
    wanted = set(sys.argv[1:])
    for defect, commit, arguments in mends():
        if wanted and defect not in wanted:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            before = run(tree_of(f"{commit}^", Path(scratch) / "before", commit), arguments)
            after = run(tree_of(commit, Path(scratch) / "after", commit), arguments)
        print(
            f"{defect:4} {commit[:7]} {' '.join(arguments)}\n     before: {before}\n     after:  {after}", flush=True
        )


if __name__ == "__main__":
    main()
