"""One training from data to merged weights, which healing of a folder and healing in memory share.

`HealRun` holds the settings of a training; `rows_of` gives the rows that it reads.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, set_seed

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.latent import vectors_at_scale
from surgery.calibration.gradients import with_gradients
from surgery.data.documents import documents
from surgery.data.packing import Packed, isolates_documents
from surgery.data.recall_rows import training_rows
from surgery.data.text import RECALL_ROWS, WRITTEN
from surgery.errors import ModelMismatchError, OtherTrainingError, SettingError
from surgery.healing.callbacks import METRICS, HealCallback, HeldOutEvaluator, read
from surgery.healing.contexts import (
    autocast_products,
    checkpointed,
    enough_memory,
    own_precision,
    unprepared,
    use_bfloat16,
    without_attention_dropout,
)
from surgery.healing.distributed import Engine, processes, put, trainable_tensors
from surgery.healing.layerwise_distillation import warm_start
from surgery.healing.lora import adapt, bare, freeze, merge
from surgery.healing.losses.ce import cross_entropy
from surgery.healing.parameters import Table, TrainableParameters, select_trainable, summed_up
from surgery.healing.plan import micro_rows
from surgery.healing.record import of_metrics
from surgery.healing.sparse_attention import keys_read
from surgery.healing.teacher import LiveTeacher, StoredTeacher, Teacher, store
from surgery.healing.trackers import Trackers
from surgery.healing.trainer import (
    Clock,
    HealTrainer,
    Rows,
    arguments,
    checkpoint_record,
    complete_checkpoints,
    remove_cut_off,
)
from surgery.healing.weighted_gqa import (
    add_mixing,
    fold_and_check,
    merges,
    mixing_table,
    names_while_mixed,
    orders_of,
    unmix,
)
from surgery.io.files import read_json, write_json
from surgery.io.loading import load_model, read_config
from surgery.io.model_folder import model_table
from surgery.io.output_folder import machine_errors
from surgery.machine.transformers_logging import quiet_transformers

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.config.recipe import Evaluate


ENDLESS = 1_000_000  # number of steps where the clock ends the training
STARTED, STARTED_WEIGHTS = "warm-start.json", "warm-start.safetensors"
TEACHER = "teacher"  # folder of a stored teacher


def train(model, job: HealRun) -> dict:
    """Heal a model in place, with adapters merged, and return the record of the training.

    Args:
        model: the converted model, in float32.

    Raises:
        SurgeryError: data, settings or model are at fault.
        TrainingError: NaN, or an unfinished run with other settings or data; checkpoints are kept.
        MachineError: disk or memory is full.
    """
    job.heal, began = with_known_precision(job), time.time()
    heal = job.heal
    refuse_vocabulary(model, job.base)
    mixing, orders = _mixing(model, job)
    trained = trained_of(model, heal, job.rewritten, mixing)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    use_cache = model.config.use_cache
    job.run.mkdir(parents=True, exist_ok=True)
    with (
        with_gradients(),
        vectors_at_scale(model),
        enough_memory(heal, job.in_memory),
        own_precision(heal),
        without_attention_dropout(model),
        checkpointed(model, heal.gradient_checkpointing),
    ):
        held_out = _held_out_evaluator(job)  # first: it may raise, and generating a text takes longest
        text, packed = rows_of(model, job, trained)
        set_seed(heal.seed)
        record = {"data": text, "parameters": trained.count, "adapted": len(trained.adapted)}
        record |= keys_read(Anatomy.of(model), packed)
        record |= {"in_full": summed_up(set(trained.parameters) - mixing.keys())}
        if trained.started:
            count = sum(model.get_parameter(name).numel() for name in trained.started)
            record["started"] = {"parameters": count, "names": summed_up(trained.started)}
        student = None
        try:
            if mixing:
                add_mixing(model, job.base, heal.mixing, orders, heal.mixing_heads == "train")
                trained = replace(trained, parameters=names_while_mixed(model, trained.parameters))
            record["warm_start"] = _layerwise_start(model, job, packed, trained)
            student = _prepared(model, heal, trained)
            record |= _loop(student, model, job, packed, held_out)
            if mixing:
                record["mixing"] = fold_and_check(model)
            if heal.method == "lora":
                if heal.keeps_adapter and job.adapter is not None and processes().is_main_process:
                    _keep_adapter(student, job)
                model, record["merge_moved_logits"] = merge(student, model.config.get_text_config().vocab_size)
        except BaseException:  # a model in memory becomes a plain one again
            if heal.method == "lora" and student is not None:
                student.unload()
            unmix(model)
            raise
        finally:
            model.config.use_cache = use_cache
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    return record | {"wall_seconds": round(time.time() - began, 1)}


def _mixing(model, job: HealRun) -> tuple[Table, list[list[int]] | None]:
    """The table of the mixing weights that `heal.mixing` asks for, and the order of the base's heads in the groups."""
    if job.heal.mixing == "none":
        return {}, None
    ours = Anatomy.of(model)
    orders = orders_of(job.operations, ours)
    hidden, trains = ours.config.get_text_config().hidden_size, job.heal.mixing_heads == "train"
    return mixing_table(merges(ours, Anatomy.of(job.base), orders), job.heal.mixing, hidden, trains), orders


def trained_of(model, heal: Heal, rewritten: frozenset[str], mixing: Table) -> TrainableParameters:
    """The trainable parameters of a model in memory (`select_trainable`). `mixing`: weights that will be added."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    def is_linear(path: str) -> bool:
        return isinstance(model.get_submodule(path), nn.Linear | Conv1D)

    trainable = select_trainable(heal, Anatomy.of(model), model_table(model) | mixing, rewritten, is_linear)
    if heal.keeps_adapter and (names := bare(model, trainable)):
        raise SettingError(
            f"keep_adapter: an adapter file would not hold {names[0]} and {len(names) - 1} more that train",
            where="heal",
            fix="heal.keep_adapter=false: the merged model has them",
        )
    return trainable


def refuse_vocabulary(model, base) -> None:
    """Raise where the base has another vocabulary."""
    if base is None:
        return
    ours, theirs = (config.get_text_config().vocab_size for config in (model.config, read_config(base)))
    if ours != theirs:
        raise ModelMismatchError(
            f"the base has another vocabulary: {theirs} tokens, the model {ours}",
            where="heal",
            fix="name the model that it was made from: --base MODEL",
        )


def _held_out_evaluator(job: HealRun) -> HeldOutEvaluator | None:
    """The evaluator of held-out text, if the model is to be scored while it trains."""
    if not job.heal.eval_every:
        return None
    if job.base is None:
        fix = "name its base: --base MODEL"
        raise SettingError("eval_every compares the model with its base", where="heal", fix=fix)
    base = job.base_model()
    with autocast_products(job.heal, base.device):  # in the student's training precision
        return HeldOutEvaluator(base, job.tokenizer, job.evaluate)


def _layerwise_start(model, job: HealRun, packed: Packed, trained: TrainableParameters) -> dict | None:
    """Run the layer-wise distillation if `heal` asks for it, or read its result where there is a checkpoint.

    A checkpoint has the parameters that train. What only this start fits (`trained.started`) has a file of its own.
    """
    file, weights = job.run / STARTED, job.run / STARTED_WEIGHTS
    if not job.heal.warm_start:
        return None
    model.to(processes().device)
    if complete_checkpoints(job.run) and file.is_file() and (weights.is_file() or not trained.started):
        for name, tensor in load_file(weights).items() if trained.started else ():
            model.get_parameter(name).data.copy_(tensor)
        return read_json(file)
    fitted = [*trained.parameters, *trained.started]
    record = warm_start(model, job.base_model(), packed, job.heal, fitted, job.progress)
    if processes().is_main_process:
        if trained.started:
            with machine_errors(job.run):
                save_file({name: model.get_parameter(name).detach().cpu() for name in trained.started}, weights)
        write_json(file, record)
    return record


def _prepared(model, heal: Heal, trained: TrainableParameters):
    """Prepare the model for training: add adapters, or freeze the parameters that do not train."""
    if heal.method == "lora":
        return adapt(model, heal, trained)
    freeze(model, trained.parameters)
    return model


def _teacher(job: HealRun, packed: Packed) -> Teacher:
    """The teacher of the losses: none is needed, or the base in memory, or its stored probabilities."""
    heal = job.heal
    if not heal.loss_needs:
        job.forget_base()  # it may be loaded, for generating the text
        return Teacher()
    if heal.teacher == "live":
        return LiveTeacher(job.base_model())
    folder = job.run / TEACHER
    with processes().main_process_first():
        distribution = {"top_k": heal.top_k, "temperature": heal.temperature}
        base = job.base_model()
        within = autocast_products(heal, base.device)
        store(base, _read_rows(packed, heal), folder, **distribution, progress=job.progress, within=within)
    job.forget_base()
    return StoredTeacher(folder)


def _read_rows(packed: Packed, heal: Heal) -> Packed:
    """The rows that the planned steps read, which may be few of a long text's."""
    if not heal.planned_steps or (count := heal.planned_steps * heal.rows) >= len(packed):
        return packed
    rows = Rows(packed, count, heal.seed)
    return packed.select(sorted(rows.row(step_row) for step_row in range(count)))


def _refuse_other_engine(checkpoint: dict, engine: Engine, folder: Path | None) -> None:
    """Raise where a checkpoint's optimizer is shared out otherwise than this engine does it."""
    if checkpoint.get("shared", []) != list(engine.sharded):
        raise OtherTrainingError(
            "the checkpoint's optimizer was saved by another engine, which shares it out in another way",
            where=str(folder),
            exists=f"shared out there: {', '.join(checkpoint.get('shared', [])) or 'nothing'}",
            fix="use the accelerate config that it began with, or start again with --overwrite",
        )


def _loop(student, plain, job: HealRun, packed: Packed, held_out: HeldOutEvaluator | None) -> dict:
    heal, state, clock = job.heal, processes(), Clock(job.heal.minutes)
    engine, original = Engine.here(), student
    if "weights" in engine.sharded:  # shard a copy: this model gets the full tensors at the end
        student, plain = copy.deepcopy((student.cpu(), plain))
    steps = heal.planned_steps or ENDLESS
    with state.main_process_first():
        if state.is_main_process:
            remove_cut_off(job.run)
        last = (complete_checkpoints(job.run) or [None])[-1]
    checkpoint = checkpoint_record(last) if last else {"seconds": 0.0, "shared": list(engine.sharded)}
    if checkpoint.get("ended"):  # clock or gate ended the run: there is nothing left to train
        steps = checkpoint["step"]
    _refuse_other_engine(checkpoint, engine, last)
    teacher = _teacher(job, packed)
    progress = job.progress if state.is_main_process else None
    callback = HealCallback(heal, job.run, heal.planned_steps, held_out, checkpoint["seconds"], progress)
    # In memory, a tracker writes where any script's does, since the run's folder is temporary.
    written = Path() if job.in_memory else job.run
    with quiet_transformers(), unprepared(student):  # metrics.jsonl has the Trainer's messages
        trainer = HealTrainer(
            model=student,
            args=arguments(heal, written, steps, state.num_processes, plain.config.get_text_config().vocab_size),
            train_dataset=Rows(packed, steps * heal.rows, heal.seed),
            callbacks=[callback],
            heal=heal,
            plain=plain,
            teacher=teacher,
            clock=clock,
            in_memory=job.in_memory,
        )
        trainer.remove_callback(PrinterCallback)
        job.trackers = Trackers(trainer, state.is_main_process)
        callback.trainer, trainer.ended = trainer, checkpoint.get("ended", "")
        clock.start(checkpoint["seconds"])  # the first rate is computed before the training begins
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            trained = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if student is not original:
        for name, tensor in trainable_tensors(trained):
            put(original.get_parameter(name), tensor)
    done = trainer.state.global_step
    return {
        "steps": done,
        "step_tokens": heal.rows * heal.length,
        "tokens": done * heal.rows * heal.length,
        "minutes": round(clock.seconds / 60, 2),
        "ended_by": trainer.ended or "steps",
        **of_metrics(read(job.run / METRICS)),
        "processes": state.num_processes,
        "engine": engine.name,
        "device": state.device.type,
        "bfloat16": use_bfloat16(heal),
        "resumed": last is not None,
    }


def _keep_adapter(student, job: HealRun) -> None:
    """Save the adapter, without the local path that peft records; the card names the model that it belongs to."""
    student.save_pretrained(job.adapter)
    file = job.adapter / "adapter_config.json"
    write_json(file, read_json(file) | {"base_model_name_or_path": None})
    (job.adapter / "README.md").unlink(missing_ok=True)


ROUNDS = 4  # rounds over the base's own text with the clock: generating takes longer than training on it
RUN = "run.json"  # identifies a run, for --resume


@dataclass
class HealRun:
    """The settings and data of a training, without the model.

    Attributes:
        base: folder of the unconverted model, or that model; None where nothing reads it.
        rewritten: projections that the surgery rewrote (`parameters.touched`).
        run: folder of checkpoints and metrics.
        operations: the operations of the surgery with their records, for mixing weights.
        identity: hash of settings, model and base; a resumed run must have the same hash.
        evaluate: text and limits of the recipe, for held-out scores during the training.
        adapter: the folder in which the adapter is kept with `heal.keep_adapter`.
        in_memory: the model is the user's: an error restores it, and there is no run to resume.
        trackers: what the training reported to; `train` sets it, and the caller closes it.
    """

    heal: Heal
    base: Any
    tokenizer: Any
    rewritten: frozenset[str]
    run: Path
    operations: list[dict] = field(default_factory=list)
    identity: str = ""
    evaluate: Evaluate | None = None
    adapter: Path | None = None
    in_memory: bool = False
    trackers: Trackers | None = None
    progress: Callable[[int, int, str], None] | None = None
    _base: list = field(default_factory=list)

    def base_model(self):
        """The base in memory. A folder is loaded once, in bfloat16 if products are computed in it."""
        if not self._base:
            if isinstance(self.base, str | Path):
                with quiet_transformers():
                    dtype = torch.bfloat16 if use_bfloat16(self.heal) else torch.float32
                    model = load_model(self.base, dtype=dtype)
                self._base.append(model.to(processes().device).eval().requires_grad_(False))
            else:
                self._base.append(self.base)
        return self._base[0]

    def forget_base(self) -> None:
        """Free the base's memory."""
        self._base.clear()


def with_known_precision(job: HealRun) -> Heal:
    """The settings with the precision that this run began with, even if another machine resumes it."""
    file = job.run / RUN
    known = read_json(file).get("precision") if file.is_file() else None
    here = "bfloat16" if use_bfloat16(job.heal) else "float32"
    return job.heal.model_copy(update={"precision": known or here})


def rows_of(model, job: HealRun, trained: TrainableParameters) -> tuple[dict, Packed]:
    """The record of the data, and the rows.

    Raises:
        SurgeryError: as `documents` raises it.
        TrainingError: the folder's checkpoints belong to another run, or were trained on other data.
    """
    heal, file, state = job.heal, job.run / RUN, processes()
    with state.main_process_first():  # the others read its files: RUN and the base's text
        known = read_json(file) if file.is_file() else {}
        if known and known.get("identity") != job.identity:
            raise OtherTrainingError(
                "the checkpoints belong to another training (recipe, model or base differ)",
                where=str(job.run),
                fix="finish that one with its own command, or start again with --overwrite",
            )
        writes, least = heal.base_writes, RECALL_ROWS if heal.recall else 1
        rows = known.get("rows") or max(least, _rows_needed(model, heal, trained))
        run_record = {"identity": job.identity, "rows": rows, "precision": heal.precision}
        if not known and state.is_main_process:  # the base may now generate text for hours
            write_json(file, run_record)
        base = job.base_model() if writes else model if job.base is None else job.base
        folder = job.run if writes else None
        texts = documents(heal, job.tokenizer, base, rows_needed=rows, folder=folder, progress=job.progress)
        packed, recall = training_rows(texts, job.tokenizer, heal, isolates_documents(model))
        if known.get("data", packed.sha256) != packed.sha256:
            fix = "start again with --overwrite"  # the base's own text is another version's
            raise OtherTrainingError(
                "the data are not the data that the checkpoints were trained on",
                where=f"heal.data: {', '.join(heal.sources)}",
                fix=fix if set(heal.sources) <= set(WRITTEN) else f"put them back as they were, or {fix}",
            )
        if "data" not in known and state.is_main_process:
            write_json(file, run_record | {"data": packed.sha256})
    return texts.record | {"rows": len(packed)} | recall, packed


def _rows_needed(model, heal: Heal, trained: TrainableParameters) -> int:
    """How many rows the training reads; with the clock, the most that this machine could read."""
    if heal.planned_steps is not None:
        return heal.planned_steps * heal.rows
    vocabulary = model.config.get_text_config().vocab_size
    rows = micro_rows(heal.rows, heal.length, vocabulary)
    # Only parameters that train get gradients: the plan has no memory for gradients of all weights.
    parameters = dict(model.named_parameters())  # mixing weights do not exist yet
    names = [name for name in trained.parameters if name in parameters] or [
        f"{name}.weight" for name in trained.adapted[:1]
    ]
    wanted = [parameters[name].requires_grad_() for name in names or list(parameters)[-1:]]
    batch = torch.randint(vocabulary, (rows, heal.length), generator=torch.Generator().manual_seed(0))
    batch = batch.to(processes().device)
    model.to(processes().device).train()
    for _ in range(2):  # the first forward is slower
        began = time.monotonic()
        with autocast_products(heal, model.device):
            loss = cross_entropy(model(input_ids=batch, use_cache=False).logits, batch)
        torch.autograd.grad(loss, wanted, allow_unused=True)
        seconds = time.monotonic() - began
    steps = max(1, int(60 * heal.minutes / seconds * rows / heal.rows))
    return max(1, steps // (ROUNDS if heal.base_writes else 1)) * heal.rows * processes().num_processes
