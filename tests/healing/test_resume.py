"""A training that is stopped in any way goes on to the same weights, bit for bit; what cannot go on says why."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import listing
from families import one_thread  # noqa: F401
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from surgery.api import heal as run_heal
from surgery.errors import MachineError, SurgeryError, TrainingError
from surgery.healing import trainer as checkpoints
from surgery.healing import trainer as training
from surgery.healing.callbacks import HealCallback, read
from surgery.io.files import read_json

SETTINGS = ("length=16", "batch_tokens=32", "steps=8", "checkpoint_every=2", "learning_rate=0.01")
QUICK = ("--no-check", "--no-eval", "-q")


class Killed(BaseException):
    """What stops a run in its process, as a signal would: nothing of ours catches it."""


@pytest.fixture
def out(surgery, model, tmp_path):
    assert surgery("apply", "mqa", model, "-o", "out", *QUICK).code == 0
    return tmp_path / "out"


@pytest.fixture
def healing(out, model, text, tmp_path):
    def run(to="healed", *more, **options):
        settings = [*SETTINGS, f"data={text}", *more]
        quick = {"check": False, "evaluate": False}
        return run_heal(out, options.pop("base", model), output=tmp_path / to, overrides=settings, **quick | options)

    return run


@pytest.fixture
def stop(monkeypatch):
    """Stop the training after a step, in the middle of the line of metrics that is written then."""

    def after(step: int, error: BaseException):
        begun = HealCallback.on_step_begin

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                with open(self.file, "a") as file:
                    file.write('{"step": 99, "lo')
                raise error
            return begun(self, args, state, control, **kwargs)

        monkeypatch.setattr(HealCallback, "on_step_begin", on_step_begin)

    return after


def same(one, two) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def curve(folder) -> list[tuple]:
    return [(line["step"], line["loss"], line["learning_rate"]) for line in read(folder / "healing/metrics.jsonl")]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("step", [1, 5])
def test_it_goes_on_to_the_same_weights(healing, stop, monkeypatch, tmp_path, method, step):
    """Dropout draws random numbers in every step of lora."""
    more = (f"method={method}", *["dropout=0.1"] * (method == "lora"))
    healing("whole", *more)
    stop(step, Killed())
    with pytest.raises(Killed):
        healing("healed", *more)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "healed").exists()
    report = healing("healed", *more, resume=True)
    assert report.data["heal"]["resumed"] == (step == 5)  # the first checkpoint is of step 2
    assert same(tmp_path / "healed", tmp_path / "whole")
    assert curve(tmp_path / "healed") == curve(tmp_path / "whole")
    assert [step for step, *_ in curve(tmp_path / "healed")] == list(range(1, 9)), "no line twice"


@pytest.mark.parametrize("begun", [True, False])
def test_it_goes_on_in_its_precision_on_another_machine(healing, stop, monkeypatch, tmp_path, begun):
    """`auto` is settled where the training begins."""

    def on(bfloat16: bool) -> None:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": bfloat16}, raising=False)

    on(begun)
    healing("whole", "method=full")
    stop(5, Killed())
    with pytest.raises(Killed):
        healing("healed", "method=full")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    on(not begun)
    assert healing("healed", "method=full", resume=True).data["heal"]["bfloat16"] == begun
    assert same(tmp_path / "healed", tmp_path / "whole")
    healing("other", "method=full")
    assert not same(tmp_path / "other", tmp_path / "whole"), "the precision changes something"


def test_its_precision_is_known_before_the_base_writes(healing, monkeypatch, tmp_path):
    """Which may take hours, and its text is of the base in that precision."""

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr("surgery.healing.run.documents", killed)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    with pytest.raises(Killed):
        healing("healed", "method=full", "data=self")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert healing("healed", "method=full", "data=self", resume=True).data["heal"]["bfloat16"]


def test_it_goes_on_beside_a_copy_of_the_base(healing, stop, monkeypatch, model, tmp_path):
    """Another machine has other times of change, and another path. Another model is refused."""
    healing("whole", "method=full")
    stop(5, Killed())
    with pytest.raises(Killed):
        healing("healed", "method=full")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    copied = shutil.copytree(model, tmp_path / "copied", copy_function=shutil.copyfile)
    other = shutil.copytree(copied, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SurgeryError, match="this is not the base it was made from"):
        healing("healed", "method=full", resume=True, base=other)
    assert healing("healed", "method=full", resume=True, base=copied).data["heal"]["resumed"]
    assert same(tmp_path / "healed", tmp_path / "whole")


def cut_off(partial, how: str) -> None:
    last = sorted((partial / "healing").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-1]
    assert last.name == "checkpoint-4"
    if how == "unmarked":
        (last / checkpoints.COMPLETE).unlink()
    else:
        with open(last / checkpoints.WEIGHTS, "r+b") as file:
            file.truncate(100)


@pytest.mark.parametrize("how", ["unmarked", "short"])
def test_a_checkpoint_that_was_cut_off_counts_as_none(healing, stop, monkeypatch, tmp_path, how):
    healing("whole", "method=parts")
    stop(5, Killed())
    with pytest.raises(Killed):
        healing("healed", "method=parts")
    monkeypatch.undo()
    cut_off(tmp_path / "healed.partial", how)
    healing("healed", "method=parts", resume=True)  # from step 2
    assert same(tmp_path / "healed", tmp_path / "whole")
    assert [step for step, *_ in curve(tmp_path / "healed")] == list(range(1, 9))


def test_checkpoints_are_kept_so_many_deep(healing, stop, tmp_path):
    stop(7, Killed())
    with pytest.raises(Killed):
        healing("healed", "method=parts", "keep_checkpoints=2")
    run = tmp_path / "healed.partial/healing"
    assert [path.name for path in checkpoints.complete_checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]


def test_another_run_does_not_go_on(healing, stop, monkeypatch, text, tmp_path):
    stop(3, Killed())
    with pytest.raises(Killed):
        healing("healed", "method=parts")
    before = listing(tmp_path / "healed.partial")
    monkeypatch.undo()
    for more in (("method=full",), ("method=parts", "steps=9")):
        with pytest.raises(SurgeryError, match="of another conversion"):
            healing("healed", *more, resume=True)
    with pytest.raises(SurgeryError, match="an unfinished run left"):
        healing("healed", "method=parts")
    words = text.read_text()
    text.write_text(words.replace("cat", "mat"))
    with pytest.raises(TrainingError, match="the data are not the data that the checkpoints were trained on"):
        healing("healed", "method=parts", resume=True)
    text.unlink()
    with pytest.raises(SurgeryError, match="no such text file"):
        healing("healed", "method=parts", resume=True)
    after = listing(tmp_path / "healed.partial")
    assert {name: hash for name, hash in after.items() if "checkpoint" in name} == {
        name: hash for name, hash in before.items() if "checkpoint" in name
    }, "no error takes checkpoints away"
    text.write_text(words)
    healing("healed", "method=parts", resume=True)


def test_nan_stops_and_keeps_the_last_good_checkpoint(healing, monkeypatch, tmp_path):
    whole = training.HealTrainer.compute_loss

    def poisoned(self, model, *args, **kwargs):
        if self.state.global_step == 4:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("nan")
        return whole(self, model, *args, **kwargs)

    monkeypatch.setattr(training.HealTrainer, "compute_loss", poisoned)
    with pytest.raises(TrainingError) as caught:
        healing("healed", "method=parts", "checkpoint_every=3")
    error = caught.value
    assert error.what == "the loss is not a number in step 5"
    assert error.exists == f"the last good checkpoint is {tmp_path / 'healed.partial/healing/checkpoint-3'}"
    assert "heal.learning_rate (now 0.01)" in error.fix
    state = load_file(tmp_path / "healed.partial/healing/checkpoint-3" / checkpoints.WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_gradient_that_is_no_number_changes_nothing(healing, monkeypatch, tmp_path):
    whole, held = training.HealTrainer._clip_grad_norm, []

    def poisoned(self, model):
        if self.state.global_step == 3:
            held.extend((p, p.detach().clone()) for p in model.parameters() if p.requires_grad)
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return whole(self, model)

    monkeypatch.setattr(training.HealTrainer, "_clip_grad_norm", poisoned)
    with pytest.raises(TrainingError, match="the gradient is not a number in step 4"):
        healing("healed", "method=parts")
    assert held
    assert all(torch.equal(parameter, before) for parameter, before in held)


def test_out_of_memory_names_three_knobs(healing, monkeypatch, tmp_path):
    def full(self, *args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(training.HealTrainer, "compute_loss", full)
    with pytest.raises(MachineError) as caught:
        healing("healed", "method=parts")
    assert not [knob for knob in ("batch_tokens", "gradient_checkpointing", "length") if knob not in caught.value.fix]


def test_disk_full_loses_no_checkpoint(healing, monkeypatch, tmp_path):
    healing("whole", "method=parts")
    whole, calls = training.save_file, []

    def full(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(tensors, path, **kwargs)

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(MachineError) as caught:
        healing("healed", "method=parts")
    assert "the disk is full" in caught.value.what
    assert caught.value.exists == "the last whole checkpoint is checkpoint-4"
    assert "--resume" in caught.value.fix
    assert not (tmp_path / "healed.partial/healing/checkpoint-6").exists()
    monkeypatch.undo()
    healing("healed", "method=parts", resume=True)
    assert same(tmp_path / "healed", tmp_path / "whole")


def test_killed_when_all_steps_are_done(healing, monkeypatch, tmp_path):
    """Between the last checkpoint and the model's own file; half of that file is there."""
    from surgery.healing import heal

    healing("whole", "method=lora")

    def save(model, folder, dtype):
        (folder / "model.safetensors").write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(heal, "save_as_stored", save)
    with pytest.raises(Killed):
        healing("healed", "method=lora")
    monkeypatch.undo()
    healing("healed", "method=lora", resume=True)
    assert same(tmp_path / "healed", tmp_path / "whole")
    assert curve(tmp_path / "healed") == curve(tmp_path / "whole")


def test_what_the_gate_ended_is_not_trained_on(healing, monkeypatch, tmp_path):
    """Its last step is a checkpoint, whatever checkpoint_every says, and the run that goes on has nothing to train."""
    from surgery.healing import heal

    asked = ("method=parts", "eval_every=3", "stop_at_gate=true", "evaluate.max_kl=100", "checkpoint_every=50")
    asked += (f"evaluate.text={tmp_path / 'words.txt'}", "evaluate.windows=1", "evaluate.length=16")
    assert healing("whole", *asked).data["heal"]["ended_by"] == "gate"
    error = Exception("I/O error: No space left on device (os error 28)")  # as safetensors says it

    def full(*_):
        raise error

    monkeypatch.setattr(heal, "save_as_stored", full)
    with pytest.raises(MachineError, match=r"the disk is full(.|\n)*--resume"):
        healing("healed", *asked)
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path / "healed.partial/healing")] == [
        "checkpoint-3"
    ]
    monkeypatch.undo()
    record = healing("healed", *asked, resume=True).data["heal"]
    assert (record["ended_by"], record["steps"], record["resumed"]) == ("gate", 3, True)
    assert same(tmp_path / "healed", tmp_path / "whole")
    assert curve(tmp_path / "healed") == curve(tmp_path / "whole")


@pytest.mark.parametrize("data", ["self", "conversations"])
def test_what_the_base_wrote_outlives_a_failure_and_another_setting(healing, out, monkeypatch, tmp_path, data):
    """It takes hours with a real model."""
    from surgery.data import generated as self_text
    from surgery.healing import run as running

    def broken(*_):
        raise SurgeryError("models of different depth")

    asked = ("method=parts", f"data={data}")
    if data == "conversations":
        tokenizer = AutoTokenizer.from_pretrained(out)
        tokenizer.chat_template = "{% for m in messages %}cat {{ m.content }}</s>{% endfor %}"
        tokenizer.save_pretrained(out)
    monkeypatch.setattr(running, "warm_start", broken)
    with pytest.raises(SurgeryError, match="different depth"):
        healing("healed", *asked, "warm_start=64")
    monkeypatch.undo()
    written, write = [], self_text._write
    monkeypatch.setattr(self_text, "_write", lambda *args: written.append(1) or write(*args))
    texts = {path: path.stat().st_ino for path in (tmp_path / "healed.partial/healing").glob("self-text-*")}
    assert texts
    with pytest.raises(SurgeryError, match="an unfinished run left"):
        healing("healed", *asked)
    report = healing("healed", *asked, overwrite=True)
    assert not written
    assert not report.data["heal"]["resumed"]
    assert sorted(path.name for path in (tmp_path / "healed/healing").iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_stored_teacher_is_asked_about_the_rows_that_are_read(healing, stop, tmp_path):
    """16 of the 25 of this text; a run to its end finds all that it asks for."""
    stop(5, Killed())
    with pytest.raises(Killed):
        healing("healed", "method=parts", "teacher=stored")
    facts = read_json(tmp_path / "healed.partial/healing/teacher/teacher.json")
    assert facts["rows"] == 16


def test_a_layerwise_start_that_has_nothing_to_fit_is_refused_first(surgery, refused, model, text, tmp_path):
    assert surgery("apply", "streaming", model, "evaluate.length=512", "-o", "split", *QUICK).code == 0
    asked = ("heal", "split", *SETTINGS, f"data={text}", "warm_start=64", "--base", model, "-o", "healed")
    refused(*asked, says=["a layer-wise start has nothing to train", "heal.warm_start_of=attention"])
    said = ["a layer-wise start has nothing to train", "heal.method=full, or freeze less"]
    refused(*asked, "warm_start_of=attention", 'freeze=["*self_attn*"]', says=said)
    assert not list(tmp_path.glob("healed*"))


def test_apply_goes_on_with_its_healing(surgery, model, text, stop, monkeypatch, tmp_path):
    asked = ("apply", "mqa", model, *(f"heal.{each}" for each in (*SETTINGS, "method=parts")), f"heal.data={text}")
    assert surgery(*asked, "-o", "whole", *QUICK).code == 0
    stop(5, Killed())
    with pytest.raises(Killed):
        _main(*asked, "-o", "out", *QUICK)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("out")} == {"out.partial", "out.unhealed"}
    again = surgery(*asked, "-o", "out", *QUICK)
    assert again.code == 2
    assert "--resume" in again.err
    assert surgery(*asked, "-o", "out", *QUICK, "--resume").code == 0
    assert same(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out.unhealed").exists()
    assert surgery(*asked, "-o", "out", *QUICK, "--resume").code == 0, "nothing is left to do"


def _main(*args) -> None:
    from surgery.cli.main import app

    app([str(arg) for arg in args], standalone_mode=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a signal that cannot be caught")
def test_killed_ten_times(out, model, text, tmp_path):
    """A process of its own, killed at random moments, ten times."""
    settings = [*SETTINGS, "steps=100", "checkpoint_every=1", f"data={text}", "method=lora", "dropout=0.1"]
    command = [sys.executable, "-m", "surgery", "heal", str(out), *settings, "--base", str(model), *QUICK, "-o"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    healed, draw, kills, inside = tmp_path / "healed", random.Random(0), 0, 0
    partial = tmp_path / "healed.partial/healing"
    while kills < 10:
        options = ["--resume"] if (tmp_path / "healed.partial").exists() else []
        run = subprocess.Popen([*command, str(healed), *options])
        until = _newest(partial) + draw.randint(1, 5)  # by steps: a time that is right here is none elsewhere
        while run.poll() is None and _newest(partial) < until:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        if kills % 2 and run.poll() is None:  # inside a write: a checkpoint is there that is not whole
            until = time.monotonic() + 5
            while run.poll() is None and time.monotonic() < until and not _unfinished(partial):
                pass
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            kills += 1
        run.wait()
        inside += bool(_unfinished(partial))
        if healed.exists():
            break
    if not healed.exists():
        subprocess.run([*command, str(healed), "--resume"], check=True)
    assert kills == 10
    assert inside >= 1
    assert same(healed, tmp_path / "whole")
    assert [step for step, *_ in curve(healed)] == list(range(1, 101))


def _newest(run) -> int:
    """The step of the newest checkpoint, a whole one or one that is being written."""
    found = checkpoints._all(run) if run.exists() else []
    return int(found[-1].name.rpartition("-")[2]) if found else 0


def _unfinished(run) -> list:
    """Checkpoints that were being written; of one that was being removed, a newer one is whole."""
    if not run.exists():
        return []
    found, marks = checkpoints._all(run), []
    for path in found:
        marks = [*marks, path] if checkpoints.checkpoint_record(path) is None else []
    return marks
