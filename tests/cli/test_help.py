"""`--help`: no line is cut, names as they are typed, sections, other terminals and places."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from surgery.cli.main import VERBS

LONGEST = 58  # a line of `surgery --help` that fits 80 columns


@pytest.mark.parametrize("verb", VERBS)
def test_the_line_of_a_verb(verb):
    _, line = VERBS[verb]
    assert len(line) <= LONGEST
    assert line[0].isupper()
    assert line.endswith(".")


def test_the_first_screen(surgery):
    shown = surgery("--help")
    assert surgery("-h").out == shown.out
    assert "..." not in shown.out.replace("[OPTIONS] ...", "")
    assert shown.out.splitlines()[-1] == "Start with: surgery apply duo-attention smollm2-135m -o out"
    for verb, (_, line) in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(line)}$", shown.out, re.M)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", ["30", "80", "200"])
def test_no_noise_at_any_width(surgery, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", columns)
    shown = surgery(verb, "-h").out
    for noise in ("{", "}", "<str>", "<int", "x>=", "list[str]", "[required]"):
        assert noise not in shown
    assert f"Usage: surgery {verb}" in shown


def test_sections(surgery):
    shown = surgery("eval", "--help").out
    sections = re.findall(r"^(\S.*):$", shown, re.M)
    assert sections == [
        *("Arguments", "Options", "Perplexity (the usual measure)"),
        *("Needles (with --needles)", "Choices (with --choices)", "Tasks (with --tasks or --ruler)"),
    ]
    needles = shown[shown.index("Needles (with") : shown.index("Choices (with")]
    assert "--depths N" in needles
    assert "--choice-items" not in needles


def run(*args: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "surgery", *args], text=True, check=False, **settings)


@pytest.mark.skipif(os.name == "nt", reason="a pseudo-terminal")
@pytest.mark.parametrize("args", [["--help"], ["ls"], ["ls", "gqa"]])
def test_colour_in_a_terminal_unless_one_asks_for_none(args):
    import pty

    def shown(**more: str) -> str:
        lead, follow = pty.openpty()
        env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        process = subprocess.Popen(
            [sys.executable, "-m", "surgery", *args], stdout=follow, env=env | {"TERM": "xterm-256color"} | more
        )
        os.close(follow)
        text = b""
        while True:
            try:
                piece = os.read(lead, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not piece:
                break
            text += piece
        assert process.wait() == 0
        os.close(lead)
        return text.decode()

    coloured = re.compile(r"\x1b\[(\d+;)*3\d")
    assert coloured.search(shown())
    assert not coloured.search(shown(NO_COLOR="1"))


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
@pytest.mark.parametrize("args", ["ls gqa", "ls --all", "--help"])
def test_closed_and_short_outputs(args):
    command = f"'{sys.executable}' -m surgery {args}"
    closed = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True, check=False)
    assert (closed.returncode, closed.stderr) == (0, "")
    short = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True, check=False)
    assert short.stderr == ""
    assert len(short.stdout.splitlines()) == 1


def test_cp_prints(surgery, tmp_path):
    from surgery.config.recipe import shipped

    assert surgery("cp", "gqa", "-").out == shipped()["gqa"].read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == []
