"""One training from data to merged weights: what the folder-to-folder way and the way in memory have in common."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import PrinterCallback, set_seed

from surgery.architecture.anatomy import Anatomy
from surgery.data.packing import Packed
from surgery.errors import SurgeryError, TrainingError
from surgery.healing.callbacks import METRICS, Follow, read
from surgery.healing.checkpoints import facts_of, remove_cut_off, whole
from surgery.healing.contexts import (
    checkpointed,
    enough_memory,
    own_precision,
    products,
    unprepared,
    use_bfloat16,
    without_attention_dropout,
)
from surgery.healing.held_out import HeldOut
from surgery.healing.job import Job, rows_of, settled
from surgery.healing.layerwise_distillation import warm_start
from surgery.healing.lora import adapt, bare, freeze, merge
from surgery.healing.parameters import Table, Trained, choose, summed_up
from surgery.healing.processes import processes
from surgery.healing.schedule import Clock, Rows
from surgery.healing.sharding import Engine, put, training
from surgery.healing.teacher import LiveTeacher, StoredTeacher, Teacher
from surgery.healing.teacher_cache import store
from surgery.healing.trainer import HealTrainer, arguments
from surgery.healing.weighted_gqa import add_mixing, folded, inside, merges, orders_of, planned, unmix
from surgery.io.files import read_json, write_json
from surgery.io.loading import read_config
from surgery.io.model_folder import model_table
from surgery.machine.transformers_logging import quiet_transformers

if TYPE_CHECKING:
    from surgery.config.heal import Heal

ENDLESS = 1_000_000  # steps, where the clock ends the training
STARTED = "warm-start.json"
TEACHER = "teacher"  # folder of a stored one
CURVE_ENDS = 5  # lines of metrics that the record's first and last loss are means of; a quarter of them at most


def train(model, job: Job) -> dict:
    """Heal a model in place, adapters merged; what was done, for the record.

    Args:
        model: converted, in float32.

    Raises:
        SurgeryError: data, settings or model are at fault.
        TrainingError: NaN, or an unfinished run of something else; checkpoints are kept.
        MachineError: disk or memory.
    """
    job.heal, began = settled(job), time.time()
    heal = job.heal
    refuse_vocabulary(model, job.base)
    mixing, orders = _mixing(model, job)
    trained = trained_of(model, heal, job.rewritten, mixing)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    use_cache = model.config.use_cache
    job.run.mkdir(parents=True, exist_ok=True)
    with (
        enough_memory(heal, job.in_memory),
        own_precision(heal),
        without_attention_dropout(model),
        checkpointed(model, heal.gradient_checkpointing),
    ):
        watch = _watch(job)  # before a text is written, which takes longest: it may refuse
        text, packed = rows_of(model, job, trained)
        set_seed(heal.seed)
        record = {"data": text, "parameters": trained.count, "adapted": len(trained.adapted)}
        record |= {"in_full": summed_up(set(trained.parameters) - mixing.keys())}
        student = None
        try:
            if mixing:
                add_mixing(model, job.base, heal.mixing, orders)
                trained = replace(trained, parameters=inside(model, trained.parameters))
            record["warm_start"] = _start(model, job, packed, trained)
            student = _prepared(model, heal, trained)
            record |= _loop(student, model, job, packed, watch)
            if mixing:
                record["mixing"] = folded(model)
            if heal.method == "lora":
                if heal.keep_adapter and job.adapter is not None and processes().is_main_process:
                    _keep_adapter(student, job)
                model, record["merge_moved_logits"] = merge(student, model.config.get_text_config().vocab_size)
        except BaseException:  # a model in memory is a plain one again
            if heal.method == "lora" and student is not None:
                student.unload()
            unmix(model)
            raise
        finally:
            model.config.use_cache = use_cache
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    return record | {"wall_seconds": round(time.time() - began, 1)}


def _mixing(model, job: Job) -> tuple[Table, list[list[int]] | None]:
    """The mixing weights that are asked for, and the order of the base's heads in the groups."""
    if job.heal.mixing == "none":
        return {}, None
    ours = Anatomy.of(model)
    orders = orders_of(job.operations, ours)
    return planned(merges(ours, Anatomy.of(job.base), orders), job.heal.mixing), orders


def trained_of(model, heal: Heal, rewritten: frozenset[str], mixing: Table) -> Trained:
    """What of a model in memory trains; see `trained.choose`. `mixing`: weights that it does not have yet."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    def is_linear(path: str) -> bool:
        return isinstance(model.get_submodule(path), nn.Linear | Conv1D)

    found = choose(heal, Anatomy.of(model), model_table(model) | mixing, rewritten, is_linear)
    if heal.keep_adapter and (names := bare(model, found)):
        raise SurgeryError(
            f"keep_adapter: an adapter file would not hold {names[0]} and {len(names) - 1} more that train",
            where="heal",
            fix="heal.keep_adapter=false: the merged model has them",
        )
    return found


def refuse_vocabulary(model, base) -> None:
    """Raise where a teacher knows other tokens."""
    if base is None:
        return
    ours, theirs = (config.get_text_config().vocab_size for config in (model.config, read_config(base)))
    if ours != theirs:
        raise SurgeryError(
            f"the base has another vocabulary: {theirs} tokens, the model {ours}",
            where="heal",
            fix="name the model that it was made from: --base MODEL",
        )


def _watch(job: Job) -> HeldOut | None:
    """The held-out text, if it is to be scored while the model trains."""
    if not job.heal.eval_every:
        return None
    if job.base is None or job.evaluate is None:
        missing = "its base: --base MODEL" if job.base is None else "a recipe that evaluates: evaluate.text=builtin"
        raise SurgeryError("eval_every scores the model beside its base", where="heal", fix=f"name {missing}")
    base = job.base_model()
    with products(job.heal, base.device):  # as the student, while it trains
        return HeldOut(base, job.tokenizer, job.evaluate, job.heal.stop_at_gate)


def _start(model, job: Job, packed: Packed, trained: Trained) -> dict | None:
    """The layer-wise start, if one is asked for; where a checkpoint has its weights already, its record alone."""
    file = job.run / STARTED
    if not job.heal.warm_start:
        return None
    if whole(job.run) and file.is_file():
        return read_json(file)
    model.to(processes().device)
    record = warm_start(model, job.base_model(), packed, job.heal, trained.parameters, job.progress)
    if processes().is_main_process:
        write_json(file, record)
    return record


def _prepared(model, heal: Heal, trained: Trained):
    """The model with what trains set to train."""
    if heal.method == "lora":
        return adapt(model, heal, trained)
    freeze(model, trained.parameters)
    return model


def _teacher(job: Job, packed: Packed) -> Teacher:
    """Who gives the loss: the text alone, the base beside it, or what the base said of these rows before."""
    heal = job.heal
    if heal.loss == "ce" and not heal.hidden:
        job.forget_base()  # it may have written the text
        return Teacher()
    if heal.teacher == "live":
        return LiveTeacher(job.base_model())
    folder = job.run / TEACHER
    with processes().main_process_first():
        kept = {"top_k": heal.top_k, "temperature": heal.temperature}
        base = job.base_model()
        within = products(heal, base.device)
        store(base, _read_rows(packed, heal), folder, **kept, progress=job.progress, within=within)
    job.forget_base()
    return StoredTeacher(folder)


def _read_rows(packed: Packed, heal: Heal) -> Packed:
    """The rows that a training of so many steps will read: of a long text these may be few."""
    if not heal.planned_steps or (count := heal.planned_steps * heal.rows) >= len(packed):
        return packed
    rows = Rows(packed, count, heal.seed)
    return packed.some(sorted(rows.place(number) for number in range(count)))


def _loop(student, plain, job: Job, packed: Packed, watch: HeldOut | None) -> dict:
    heal, state, clock = job.heal, processes(), Clock(job.heal.minutes)
    engine, original = Engine.here(), student
    if "weights" in engine.shared:  # what is shared out is a copy: this model gets the whole tensors at the end
        student, plain = copy.deepcopy((student.cpu(), plain))
    steps = heal.planned_steps or ENDLESS
    with state.main_process_first():
        if state.is_main_process:
            remove_cut_off(job.run)
        last = (whole(job.run) or [None])[-1]
    facts = facts_of(last) if last else {"seconds": 0.0, "shared": list(engine.shared)}
    if facts.get("ended"):  # by the clock or the gate: nothing is left to train
        steps = facts["step"]
    if facts.get("shared", []) != list(engine.shared):
        raise TrainingError(
            "the checkpoint's optimizer is stored as another engine shares it out",
            where=str(last),
            exists=f"shared out there: {', '.join(facts.get('shared', [])) or 'nothing'}",
            fix="the accelerate config that it began with, or start anew with --overwrite",
        )
    teacher = _teacher(job, packed)
    progress = job.progress if state.is_main_process else None
    follow = Follow(heal, job.run, heal.planned_steps, watch, facts["seconds"], progress)
    with quiet_transformers(), unprepared(student):  # what the Trainer would say is in metrics.jsonl
        trainer = HealTrainer(
            model=student,
            args=arguments(heal, job.run, steps, state.num_processes, plain.config.get_text_config().vocab_size),
            train_dataset=Rows(packed, steps * heal.rows, heal.seed),
            callbacks=[follow],
            heal=heal,
            plain=plain,
            teacher=teacher,
            clock=clock,
            in_memory=job.in_memory,
        )
        trainer.remove_callback(PrinterCallback)
        follow.trainer, trainer.ended = trainer, facts.get("ended", "")
        clock.start(facts["seconds"])  # the first rate is made before the training begins
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            trained = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if student is not original:
        for name, tensor in training(trained):
            put(original.get_parameter(name), tensor)
    curve = [line["loss"] for line in read(job.run / METRICS)]
    ends, done = max(1, min(CURVE_ENDS, len(curve) // 4)), trainer.state.global_step
    return {
        "steps": done,
        "step_tokens": heal.rows * heal.length,
        "tokens": done * heal.rows * heal.length,
        "minutes": round(clock.seconds / 60, 2),
        "ended_by": trainer.ended or "steps",
        "loss": {"first": _mean(curve[:ends]), "last": _mean(curve[-ends:])},
        "processes": state.num_processes,
        "engine": engine.name,
        "device": state.device.type,
        "bfloat16": use_bfloat16(heal),
        "resumed": last is not None,
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _keep_adapter(student, job: Job) -> None:
    """Save the adapter, without the folder of this machine that peft notes: the card says what it loads on."""
    student.save_pretrained(job.adapter)
    file = job.adapter / "adapter_config.json"
    write_json(file, read_json(file) | {"base_model_name_or_path": None})
    (job.adapter / "README.md").unlink(missing_ok=True)
