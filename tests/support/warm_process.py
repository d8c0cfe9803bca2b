"""Fresh processes that need not import torch and Transformers again: a process that has done so forks for each.

`check` loads a checkpoint in a process of its own, which spends nearly all of its time on importing two libraries. The
suite checks some hundred folders. Here one process for each worker of the suite imports them, and nothing else; every
check is a fork of it. So a check still sees no state of a test or of another check, and no `surgery` that it did not
ask for. Tests marked `real_process` start a process from nothing, as users do.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OFFLINE = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class WarmPython:
    """Stands in for `subprocess` in the module that starts the processes."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self) -> None:
        self.server: subprocess.Popen | None = None

    def run(self, command: list[str], *, input: str, env: dict[str, str], timeout: float | None = None, **ways):
        """As `subprocess.run([python, "-P", FILE], input=..., env=..., capture_output=True, text=True)`."""
        python, safe_path, file = command
        assert (python, safe_path) == (sys.executable, "-P")
        assert ways == {"capture_output": True, "text": True, "encoding": "utf-8"}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "in").write_text(input, encoding="utf-8")
            began = time.monotonic()
            code = self._ask({"file": file, "streams": folder, "env": env, "cwd": os.getcwd()})
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(command, timeout)
            out, err = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(command, code, out, err)

    def _ask(self, request: dict) -> int:
        if self.server is None or self.server.poll() is not None:
            command = [sys.executable, "-P", __file__]
            self.server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | OFFLINE
            )
            atexit.register(self.server.kill)
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


def serve() -> None:
    """Fork for each request on stdin, wait, and print its exit code."""
    import torch  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        GenerationConfig,
        LlamaForCausalLM,
    )

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(request: dict) -> None:
    """Run the file as the program of this process."""
    import runpy

    from transformers import dynamic_module_utils

    code = 1
    try:
        os.environ.clear()
        os.environ.update(request["env"])
        dynamic_module_utils.HF_MODULES_CACHE = request["env"]["HF_MODULES_CACHE"]  # was read at the import
        os.chdir(request["cwd"])
        new = os.O_CREAT | os.O_WRONLY
        for number, (name, way) in enumerate([("in", os.O_RDONLY), ("out", new), ("err", new)]):
            os.dup2(os.open(os.path.join(request["streams"], name), way), number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, way, encoding="utf-8") for n, way in enumerate("rww"))
        sys.argv = [request["file"]]
        runpy.run_path(request["file"], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
