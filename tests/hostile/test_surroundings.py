"""What surrounds the command: streams that are closed or full, limits of the system, a folder that is gone."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

COMMAND = [sys.executable, "-m", "surgery"]
QUICK = ("--no-check", "--no-eval")
MEAN = ("kv_heads=2", "method=mean")


def shell(line: str, folder, *arguments) -> subprocess.CompletedProcess:
    """Run a line of shell, in which "$@" is the command."""
    words = ["sh", "-c", line, "sh", *COMMAND, *map(str, arguments)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


@contextmanager
def largest_file(size: int):
    """No file may be larger, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_streams_that_are_closed(base, tmp_path):
    """A daemon has none: no file that is written may take the number of a stream and get what is printed."""
    done = shell('"$@" <&- >&- 2>&-', tmp_path, "apply", "gqa", base, *MEAN, "-o", "out", *QUICK)
    assert done.returncode == 0
    record = json.loads((tmp_path / "out/surgery.json").read_text())
    assert record["recipe"]["name"] == "gqa"
    from surgery import load

    assert load(tmp_path / "out").config.num_key_value_heads == 2


@pytest.mark.parametrize("line", ['"$@" >/dev/full', '"$@" >/dev/full 2>/dev/full'])
def test_a_full_stdout(base, tmp_path, line):
    done = shell(line, tmp_path, "inspect", base, "--json")
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    assert done.stderr in ("error: the system refused: No space left on device\n", "")


def test_a_working_folder_that_is_gone(base, tmp_path):
    done = shell('mkdir gone && cd gone && rmdir ../gone && exec "$@"', tmp_path, "inspect", base)
    assert done.returncode == 5
    assert done.stderr.startswith("error: the folder that you are in no longer exists\n  to fix: ")


@pytest.mark.parametrize(
    ("scheme", "variable"), [("foo", "HTTPS_PROXY"), ("ftp", "all_proxy")], ids=["https", "every protocol"]
)
def test_a_proxy_of_an_unknown_scheme(surgery, refused, monkeypatch, scheme, variable):
    import huggingface_hub

    monkeypatch.setenv(variable, f"{scheme}://me:password@proxy")
    huggingface_hub.close_session()  # it keeps the proxies that it was made with
    try:
        ran = refused(
            "inspect", "owner/name", says=[f"available: {variable}", "the proxy that the environment"], code=5
        )
    finally:
        huggingface_hub.close_session()
    assert "password" not in ran.err


@pytest.mark.parametrize("engine", ["streaming", "loaded"])
def test_a_file_larger_than_the_system_allows(surgery, base, engine):
    """The limit of a FAT32 disk, or `ulimit -f`: the run waits for --resume, as on a full disk."""
    arguments = ("apply", "gqa", base, *MEAN, "-o", "out", "--engine", engine, *QUICK)
    with largest_file(100_000):
        ran = surgery(*arguments)
    assert (ran.code, "Traceback" in ran.err) == (5, False), ran.err
    assert "a file would be larger than this disk or your limit" in ran.err
    assert "--resume" in ran.err
    assert surgery(*arguments, "--resume").code == 0


def test_a_file_of_healing_larger_than_the_system_allows(surgery, base, tmp_path):
    assert surgery("apply", "gqa", base, *MEAN, "-o", "out", *QUICK).code == 0
    arguments = ("heal", "out", "--base", base, "-o", "healed", "method=full", "steps=1", "length=16", "data=builtin")
    with largest_file(100_000):
        ran = surgery(*arguments, *QUICK)
    assert (ran.code, "Traceback" in ran.err) == (5, False), ran.err
    assert "a file would be larger than this disk or your limit" in ran.err
    assert surgery(*arguments, *QUICK, "--resume").code == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=["python", "torch", "cuda"],
)
def test_too_little_memory(surgery, base, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("surgery.evaluation.probes.perplexity.Perplexity.measure", fail)
    ran = surgery("eval", base)
    assert (ran.code, ran.out, "Traceback" in ran.err) == (5, "", False)
    assert ran.err.startswith("error: out of memory\n")


def test_other_errors_are_still_called_bugs(surgery, base, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("surgery.evaluation.probes.perplexity.Perplexity.measure", fail)
    ran = surgery("eval", base)
    assert ran.code == 1
    assert "Traceback" in ran.err


def test_a_recipe_on_a_full_disk(surgery, tmp_path):
    with largest_file(100):
        ran = surgery("cp", "gqa")
    assert (ran.code, ran.err.count("error: ")) == (5, 1)
    assert not any(tmp_path.iterdir()), "half a recipe"
    assert surgery("cp", "gqa").code == 0


@pytest.mark.parametrize("json_asked", [(), ("--json",)])
def test_ctrl_c_while_a_library_is_read(surgery, monkeypatch, json_asked):
    """numpy makes an ImportError of it."""

    def read(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy could not be read") from None

    monkeypatch.setattr("surgery.io.hub.resolve", read)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
    try:
        ran = surgery("inspect", "anything", *json_asked)
        assert (ran.code, ran.out, ran.err) == (130, "", "interrupted\n")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
