"""Processes of an engine: a script of this folder, run by the interpreter that has the engine."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from surgery.engines.base import EngineAnswers, EngineQuestion
from surgery.errors import CheckError, MachineError

KILLED = -9  # what a process ends with that the system has killed, mostly since memory ran out
HOURS = 2.0  # for which a process may run; one that hangs says nothing
PLAINEST = "error loading model"  # of llama.cpp's lines, the one that says why
RAISED = re.compile(r"(?:\[\w+\]: )?[\w.]+(?:Error|Exception): ")  # how the last line of a traceback begins
SHOWN = 300  # characters of a reason
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONIOENCODING": "utf-8"}


def run_script(
    script: str,
    arguments: list[str],
    engine: str,
    *,
    stdin: str = "",
    python: str = sys.executable,
    hours: float = HOURS,
) -> subprocess.CompletedProcess[str]:
    """Run a file of this folder as a process that never reaches the network.

    Args:
        script: the file's name.
        engine: the engine's name, for messages.
        python: the interpreter that runs it.
        hours: for which it may run.

    Raises:
        MachineError: it did not end in time. It was stopped, with the processes that it began.
    """
    command = [python, "-P", str(Path(__file__).with_name(script)), *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=_environment(python),
        start_new_session=True,  # so that all of its processes can be stopped
    ) as process:
        try:
            out, said = process.communicate(stdin, timeout=3600 * hours)
        except subprocess.TimeoutExpired:
            _stop(process)
            raise MachineError(
                f"a process of {engine} did not end within {hours:g} hours, and was stopped",
                fix="end other programs and try again, or use a faster machine; if it hangs again, report it",
            ) from None
        except BaseException:  # Ctrl-C, which does not reach another session
            _stop(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, said)


def _stop(process: subprocess.Popen[str]) -> None:
    """End a process and those that it began, where the system can."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):  # Windows; or it has ended
        process.kill()


def _environment(python: str) -> dict[str, str]:
    """The variables of a process. Another interpreter must find its own packages, whatever this one was told."""
    inherited = os.environ if python == sys.executable else os.environ.keys() - {"PYTHONPATH", "PYTHONHOME"}
    return {name: os.environ[name] for name in inherited} | OFFLINE


def ask_script(
    script: str, engine: str, job: dict[str, Any], question: EngineQuestion, python: str = sys.executable
) -> EngineAnswers:
    """Let a script answer a question: it reads a JSON object from stdin and writes one to the file that it is given.

    Args:
        script: the file's name.
        engine: the engine's name, for messages.
        job: what the script gets beside the question and the number of threads.
        python: the interpreter that runs it.

    Raises:
        CheckError: it failed, or wrote nothing.
        MachineError: the system ended it, or it did not end in time.
    """
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        answers = Path(scratch) / "answers.json"
        asked = asdict(question) | {"threads": torch.get_num_threads()} | job
        done = run_script(script, [str(answers)], engine, stdin=json.dumps(asked), python=python)
        refuse_killed(done, engine)
        if done.returncode or not answers.is_file():
            raise CheckError(
                f"{engine} cannot run this result: {reason(done)}",
                fix="do not use it; it is kept for a report. Export again",
            )
        data = json.loads(answers.read_text(encoding="utf-8"))
    best = [[(token, math.nan if value is None else value) for token, value in row] for row in data["best"]]
    return EngineAnswers(data["generated"], best, data["text_tokens"], data.get("cache_bytes"))


def refuse_killed(done: subprocess.CompletedProcess[str], engine: str) -> None:
    """Raise where the system ended a process: that says nothing of the checkpoint or what was written."""
    if done.returncode == KILLED:
        raise MachineError(
            f"the system ended a process of {engine}, which happens when memory runs out",
            fix="end other programs, or use a machine with more memory",
            code="out-of-memory",
        )


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line in which a process says why it failed, or the number with which it ended.

    That is llama.cpp's own reason, else the exception that was raised last, else the last line that speaks of an
    error. After "1 validation error for ModelConfig" the next line says what is wrong.
    """
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    own = [line for line in lines if PLAINEST in line][:1]
    raised = [
        f"{line}: {after}" if "validation error" in line else line
        for line, after in pairwise([*lines, ""])
        if RAISED.match(line)
    ]
    errors = [line for line in lines if "error" in line.lower()]
    line = (own or raised[-1:] or errors[-1:] or lines[-1:] or [f"the process ended with {done.returncode}"])[0]
    return line if len(line) <= SHOWN else f"{line[:SHOWN]} ..."
