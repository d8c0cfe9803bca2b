"""Two processes (gloo on the CPU) train as one does: the same losses, one writer, one complete folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from families import one_thread  # noqa: F401
from safetensors.torch import load_file

from surgery.architecture.anatomy import Anatomy
from surgery.config.heal import Heal
from surgery.errors import SurgeryError, TrainingError
from surgery.healing import trainer as checkpoints
from surgery.healing.callbacks import read
from surgery.healing.distributed import Engine
from surgery.healing.plan import HealPlan
from surgery.healing.trainer import arguments
from surgery.io.model_folder import tensor_table
from surgery.report.report import Report

SUPPORT = Path(__file__).parents[1] / "support"
CONFIGS = Path(__file__).parents[2] / "examples/accelerate"
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file"]
LAUNCH = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "surgery"],
    "accelerate": [*ACCELERATE, str(CONFIGS / "cpu.yaml"), "-m", "surgery"],
    "memory": [
        *["-m", "torch.distributed.run", "--nproc_per_node", "2"],
        str(SUPPORT / "heal_in_memory.py"),
    ],
    "fsdp": [
        *[*ACCELERATE, str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2", "--main_process_port", "0"],
        str(SUPPORT / "fsdp_on_cpu.py"),
    ],
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}


def test_rows_that_processes_cannot_share(tmp_path):
    with pytest.raises(TrainingError, match="3 processes cannot share the 8 rows") as caught:
        arguments(Heal(steps=1), tmp_path, 1, 3)
    assert "heal.batch_tokens=4608" in caught.value.fix  # 9 rows of 512


def test_the_memory_of_each_process(model):
    """What an engine shares out is divided, the base and what a forward takes are not."""
    anatomy, table = Anatomy.of(model), tensor_table(model)
    heal = Heal(steps=1, method="full", length=16, batch_tokens=128)
    plans = {
        name: HealPlan.of(heal, anatomy, table, frozenset("kv"), base=anatomy, engine=engine)
        for name, engine in {
            "one": Engine(),
            "ddp": Engine("copies (DDP)", 4),
            "zero2": Engine("ZeRO-2", 4, ("optimizer", "gradients")),
            "fsdp": Engine("FSDP", 4, ("optimizer", "gradients", "weights")),
        }.items()
    }
    count = sum(torch.Size(shape).numel() for _, shape in table.values())
    one, ddp, zero2, fsdp = (plans[name].memory for name in ("one", "ddp", "zero2", "fsdp"))
    assert (one["weights"], one["gradients"], one["optimizer"], one["base"]) == tuple(count * n for n in (4, 4, 8, 4))
    assert one["logits"] == 128 * 64 * 4 * 3
    assert ddp == one | {"logits": one["logits"] / 4, "activations": one["activations"] / 4}, "rows are shared"
    assert zero2 == ddp | {"gradients": count, "optimizer": 2 * count}
    assert fsdp == zero2 | {"weights": count}
    assert plans["fsdp"].memory_bytes == sum(fsdp.values())
    assert plans["fsdp"].to_dict()["memory"] == fsdp


def test_the_plan_says_what_engines_would_share(surgery, model, monkeypatch):
    done = surgery("plan", "mqa", model, "heal.steps=1", "heal.data=builtin")
    said = " ".join(done.out.split())
    assert "of memory in each process" in said
    assert not [part for part in ("weights", "gradients", "optimizer", "base", "logits") if f"{part} " not in said]
    assert "ZeRO-2 shares" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "in each of 2 processes (copies (DDP))" in " ".join(
        surgery("plan", "mqa", model, "heal.steps=1", "heal.data=builtin").out.split()
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ["on CPUs it would train whole copies", "use_cpu: true"]),
        ({"FSDP_VERSION": "1"}, ["FSDP's first version", "fsdp_version: 2"]),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, ["the models of all processes but the first empty"]),
    ],
)
def test_an_engine_that_would_do_something_else_is_refused(monkeypatch, change, says):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, value in (FSDP | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SurgeryError) as caught:
        Engine.here()
    assert not [words for words in says if words not in str(caught.value)]


def test_engines_are_known_by_their_launcher(monkeypatch):
    assert Engine.here() == Engine()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Engine.here() == Engine("copies (DDP)", 4)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for stage, shared in (("2", {"optimizer", "gradients"}), ("3", {"optimizer", "gradients", "weights"})):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        engine = Engine.here()
        assert (engine.name, engine.processes, set(engine.sharded)) == (f"ZeRO-{stage}", 4, shared)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true")
    with pytest.raises(SurgeryError, match="zero3_init_flag"):
        Engine.here()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_are_accelerates(file):
    """Every key is one that accelerate reads, and none is what we refuse."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_machines == 1
    text = yaml.safe_load(file.read_text())
    kind = text["distributed_type"]
    assert config.distributed_type == kind
    if kind == "FSDP":
        assert text["fsdp_config"]["fsdp_version"] == 2
        assert text["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] is False
    if kind == "DEEPSPEED":
        assert text["deepspeed_config"]["zero3_init_flag"] is False


@pytest.fixture
def both(surgery, model, text, tmp_path):
    """Heal in one process and in two, which may be stopped and go on; what the two said, and their report."""

    def run(how: str, *more, recipe="mqa", length=16, steps: int = 20, stop: int | None = None, rough: float = 1e-3):
        if not (tmp_path / "out").exists():
            assert surgery("apply", recipe, model, "-o", "out", "--no-check", "--no-eval", "-q").code == 0
        rows = [f"length={length}", f"batch_tokens={4 * length}"]
        settings = [f"data={text}", *rows, f"steps={steps}", "learning_rate=0.003"]
        settings += ["precision=float32", *more]
        asked = ["heal", "out", *settings, "loss=both", "--base", str(model), "--no-eval", "-q", "-o"]
        assert surgery(*asked, "one", "--no-check").code == 0
        if stop is not None:
            two(how, [*asked, "two"], tmp_path, code=1, STOP_AT=str(stop))
        done = two(how, [*asked, "two", *["--resume"] * (stop is not None)], tmp_path)
        assert done.stdout.decode().count("changed:") == 1, "one process speaks"
        one, two_ = (read(tmp_path / name / "healing/metrics.jsonl") for name in ("one", "two"))
        assert [line["step"] for line in two_] == list(range(1, steps + 1))
        assert [line["loss"] for line in two_] == pytest.approx([line["loss"] for line in one], rel=rough)
        assert [line["gradient_norm"] for line in two_] == pytest.approx(
            [line["gradient_norm"] for line in one], rel=20 * rough
        )
        report = Report.of(tmp_path / "two")
        assert report.data["heal"]["processes"] == 2
        assert report.data["check"]["passed"]
        ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        assert ours.keys() == theirs.keys()
        apart = max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)
        assert apart < 0.01
        assert all(torch.isfinite(tensor.float()).all() for tensor in theirs.values())
        assert not list(tmp_path.glob("two.*"))
        assert not checkpoints.complete_checkpoints(tmp_path / "two/healing")
        return report, done.stdout.decode()

    return run


def two(how: str, asked: list[str], folder: Path, code: int = 0, **more):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    done = subprocess.run([sys.executable, *LAUNCH[how], *asked], cwd=folder, env=env, capture_output=True)
    assert done.returncode == code, done.stdout.decode()[-2000:] + done.stderr.decode()[-4000:]
    return done


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
@pytest.mark.parametrize("how", ["torchrun", "accelerate"])
def test_two_processes_train_as_one(both, how):
    report, _ = both(how, "method=lora", steps=50)
    assert report.data["heal"]["engine"] == "copies (DDP)"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
def test_two_processes_heal_one_model_in_memory(model, tmp_path):
    """By the clock and on text of the base, which the first of them writes: both end with the same weights."""
    said = two("memory", [str(model)], tmp_path).stdout.decode()
    ours, theirs = (line for line in said.splitlines() if line.startswith("healed 2 "))
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
def test_two_processes_make_the_same_rows_and_the_same_start(both):
    """Rows in which something comes back, weights by the base, and a start of parameters that then do not train."""
    start = ("warm_start=64", "warm_start_of=attention")
    asked = ("method=parts", "length=64", "batch_tokens=128", "recall=0.4", "sure=0.5", "precision=float32", *start)
    report, _ = both("torchrun", *asked, steps=10)
    assert report.data["heal"]["data"]["recall"]["rows"] > 0
    assert report.data["heal"]["started"]["parameters"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
def test_two_processes_in_bfloat16(both):
    report, _ = both("torchrun", "method=full", "precision=bfloat16", rough=1e-2)
    assert report.data["heal"]["bfloat16"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        (("method=full",), None),
        (("method=lora",), None),
        (("method=parts", "mixing=head", "checkpoint_every=8"), 13),
    ],
    ids=["full", "lora", "mixing, stopped"],
)
def test_shared_out_weights_train_as_whole_ones(both, settings, stop):
    """torch's FSDP2, on CPUs."""
    report, said = both("fsdp", *settings, stop=stop)
    assert said.count("shared out: True") == 2
    assert report.data["heal"]["engine"] == "FSDP"
    assert report.data["heal"]["resumed"] == (stop is not None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
@pytest.mark.parametrize("how", ["torchrun", "fsdp"])
def test_two_processes_switch_to_full_attention_in_the_same_step(both, tmp_path, how):
    step = {"op": "sparse_prefill", "method": "block_topk", "exact": True, "block": 16, "top": 1, "dense_below": 0}
    recipe = {"version": 1, "name": "moba", "operations": [step], "evaluate": None}
    (tmp_path / "moba.yaml").write_text(yaml.safe_dump(recipe))
    settings = ("method=full", "full_from=0.5", "checkpoint_every=2")
    report, _ = both(how, *settings, recipe="moba.yaml", length=64, steps=8, stop=5 if how == "fsdp" else None)
    one, two_ = (read(tmp_path / name / "healing/metrics.jsonl") for name in ("one", "two"))
    assert (
        [line["full_attention"] for line in one]
        == [line["full_attention"] for line in two_]
        == [False] * 4 + [True] * 4
    )
    assert report.data["heal"]["attention"]["text_loss"] == pytest.approx(
        Report.of(tmp_path / "one").data["heal"]["attention"]["text_loss"], rel=1e-3
    )
