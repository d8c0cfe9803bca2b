"""Two processes (gloo on the CPU) train as one does: the same losses, one writer, one complete folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from families import one_thread  # noqa: F401
from safetensors.torch import load_file

from surgery.errors import TrainingError
from surgery.healing import checkpoints
from surgery.healing.following import read
from surgery.healing.settings import Heal
from surgery.healing.training import arguments
from surgery.report import Report

# `accelerate launch --cpu --num_processes 2` starts one process where no MPI is installed: torchrun starts two.
LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "surgery"]


def test_rows_that_processes_cannot_share(tmp_path):
    with pytest.raises(TrainingError, match="3 processes cannot share the 8 rows") as caught:
        arguments(Heal(steps=1), tmp_path, 1, 3)
    assert "heal.batch_tokens=4608" in caught.value.fix  # 9 rows of 512


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
def test_two_processes_train_as_one(surgery, model, text, tmp_path):
    assert surgery("apply", "mqa", model, "-o", "out", "--no-check", "--no-eval", "-q").code == 0
    settings = [f"data={text}", "length=16", "batch_tokens=64", "steps=50", "learning_rate=0.003", "method=lora"]
    asked = ["heal", "out", *settings, "loss=both", "--base", str(model), "--no-eval", "-q", "-o"]
    assert surgery(*asked, "one", "--no-check").code == 0
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *LAUNCH, *asked, "two"], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert done.stdout.decode().count("changed:") == 1, "one process speaks"
    one, two = (read(tmp_path / name / "healing/metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in two] == list(range(1, 51))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
    report = Report.of(tmp_path / "two")
    assert report.data["heal"]["processes"] == 2
    assert report.data["check"]["passed"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    apart = max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)
    assert apart < 0.01
    assert all(torch.isfinite(tensor.float()).all() for tensor in theirs.values())
    assert not list(tmp_path.glob("two.*"))
    assert not checkpoints.whole(tmp_path / "two/healing")
