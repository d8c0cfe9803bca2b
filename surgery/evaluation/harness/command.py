"""lm-eval's own command, which others run: the words of it, and a run of it that cannot import this package."""

from __future__ import annotations

import glob
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.evaluation.harness.answers import scores_of
from surgery.evaluation.harness.task_set import Asking, ItemScore, TaskSet


def run_alone(folder: Path, tasks: TaskSet, asking: Asking) -> dict[str, list[ItemScore]]:
    """Run the same tasks by lm-eval's own command, in a process that cannot import this package.

    The command loads the folder with trust_remote_code, and so runs the code in it, as it does for anybody who
    downloads the model.

    Returns:
        As `surgery.evaluation.harness.answers.run`.

    Raises:
        SurgeryError: the command fails.
    """
    with tempfile.TemporaryDirectory() as out:
        arguments = command(str(folder), tasks, asking)[1:]
        arguments += ["--output_path", out, "--log_samples"]
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ALONE, *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            raise SurgeryError(
                f"lm_eval cannot run this model alone: {last[:240]}",
                where=str(folder),
                fix=f"see what it prints: {shlex.join(['lm_eval', *arguments[:-3]])}",
            )
        return {name: scores_of(_samples(Path(out), name)) for name in tasks.loaded["tasks"]}


# `surgery` = None makes every import of this package fail.
_ALONE = (
    "import runpy, sys; sys.modules['surgery'] = None; sys.argv[0] = 'lm_eval'; "
    "runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)"
)


def _samples(folder: Path, name: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"samples_{glob.escape(name)}_[0-9][0-9][0-9][0-9]-*.jsonl")  # a name may end with _2
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def command(model: str, tasks: TaskSet, asking: Asking) -> list[str]:
    """The command of lm-eval that runs the same tasks on a folder or a model of the Hub."""
    words = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}", "trust_remote_code=True"]
    words += ["--tasks", *tasks.named, "--batch_size", str(asking.batch)]
    words += ["--include_path", tasks.folder] if tasks.folder else []
    words += ["--metadata", json.dumps({"max_seq_lengths": list(tasks.lengths)})] if tasks.lengths else []
    words += ["--num_fewshot", str(asking.fewshot)] if asking.fewshot is not None else []
    words += ["--apply_chat_template"] if asking.chat else []
    if len(tasks.lengths) > 1:
        return [*words, "--samples", json.dumps(tasks.items(asking.limit))]
    return [*words, *(["--limit", str(asking.limit)] if asking.limit is not None else [])]
