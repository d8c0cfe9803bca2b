"""Type checkers find no fault in a user's script and in an operation of theirs, with the package as installed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

import surgery

SCRIPT = Path(__file__).parent / "support" / "typed_script.py"
SPOILT = {
    "anatomy.with_kv_heads(1)": "anatomy.with_kv_heads('1')",
    "*plan.notes": "*plan.nodes",
    "samples=1, secret": "sampels=1, secret",
    "windows=2, length=128": "windows='2', length=128",
    "surgery.check(folder)": "surgery.check(surgery.load(folder))",
}
ROOT = Path(surgery.__file__).parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An interpreter that has this very package as an editable install, and what else is installed here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(with_pip=False).create(folder)
    (site,) = folder.glob("[Ll]ib/**/site-packages")
    (site / "here.pth").write_text(f"{ROOT}\n{sysconfig.get_paths()['purelib']}\n")
    (found,) = [file for name in ("bin/python", "Scripts/python.exe") if (file := folder / name).exists()]
    return found


def checked(*command: str | Path) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def spoilt(tmp_path: Path) -> Path:
    """The script with mistakes that only a typed package lets a checker find."""
    text = SCRIPT.read_text(encoding="utf-8")
    for right, wrong in SPOILT.items():
        assert right in text
        text = text.replace(right, wrong)
    file = tmp_path / "spoilt.py"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_users_script_has_no_type_errors(checker, python, tmp_path):
    if find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    options = {
        "mypy": ("--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache"),
        "pyright": ("--pythonpath", python),
    }[checker]
    done = checked(checker, *options, SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr
    done = checked(checker, *options, spoilt(tmp_path))
    assert done.returncode == 1
    assert "with_kv_heads" in done.stdout
    assert "nodes" in done.stdout
    assert "sampels" in done.stdout
    assert done.stdout.count(" error") >= len(SPOILT), done.stdout


def test_the_package_says_that_it_is_typed():
    assert (Path(surgery.__file__).parent / "py.typed").is_file()
