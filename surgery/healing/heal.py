"""Healing of a converted folder into a new folder, or of a converted model in memory, in place.

`surgery heal` checks the following before it trains, in this order. (`surgery apply` checks 3 to 6 and the data before
it converts: conversion/preflight.py.)

1. The command and the recipe: an output, a surgery.json of ours, the settings (config/heal_overrides.py,
   config/heal.py).
2. The folder: the headers of its weights, a known anatomy, one dtype, no adapter (`_trainable_anatomy`).
3. The base, where training or scores need it: it is known, is the record's, and can be scored (`_scorable_base`).
4. The settings: rows for each process, the tracker that metrics are reported to, scores during training
   (`refuse_settings`).
5. The plan: rows fit the model's positions, something trains, mixing fits, the launcher's engine works
   (`HealPlan.of`). The plan is shown here.
6. The output folder: not in or around model or base, not taken, room on the disk (io/output_folder.py).
7. With the model loaded (run.py): the base's vocabulary, mixing, the parameters that train, whether an adapter can be
   kept, the held-out text, the unfinished run that --resume continues, the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from surgery.architecture.anatomy import Anatomy, stored_dtypes
from surgery.config.heal_overrides import settings as read_settings
from surgery.config.recipe import recorded
from surgery.data.text import SELF_TEXT
from surgery.errors import ModelMismatchError, SurgeryError, UnsupportedModelError
from surgery.evaluation.run import refuse_unscorable
from surgery.healing import record as records
from surgery.healing.contexts import in_float32, restore_weights_on_error
from surgery.healing.distributed import Ranks
from surgery.healing.models import base_folder, converted_model, report_in_memory, rewritten_by, save_as_stored
from surgery.healing.plan import HealPlan, refuse_unhealable
from surgery.healing.validate import refuse_settings
from surgery.io.card_text import notes_of
from surgery.io.files import CARD, published_override
from surgery.io.loading import read_tokenizer
from surgery.io.model_folder import carry_files, model_table
from surgery.io.output_folder import OutputFolder, weight_files
from surgery.io.safetensors import WEIGHT_INDEX, Checkpoint
from surgery.machine.placement import refuse_for_loaded
from surgery.machine.progress import begin
from surgery.report.report import Report

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.config.options import RunOptions
    from surgery.config.recipe import Evaluate
    from surgery.healing.run import HealRun
    from surgery.healing.trackers import Trackers


EDITED_BASE = "the base is this very model, which was edited in place"
RUN, ADAPTER = "healing", "adapter"  # folders in OUT
# Files of RUN that stay after the training. `runs` is tensorboard's, and is never pushed.
KEPT_FILES = ("metrics.jsonl", "loss.png", "runs")


class HealedFolder(NamedTuple):
    """What `heal_folder` returns.

    Attributes:
        report: None in all processes but the first.
        base: the base's folder; None if it is unknown.
        trackers: what the training reported to, which waits for the scores; the caller closes it. None if nothing was
            left to train.
    """

    report: Report | None
    base: Path | None
    trackers: Trackers | None = None


def heal_folder(
    report: Report,
    base: str | Path | None,
    heal: Heal,
    judged_by: Evaluate | None,
    output: str | Path,
    options: RunOptions,
    overrides: Sequence[str] | None = None,
) -> HealedFolder:
    """Train a folder that surgery wrote, and write the healed one.

    Args:
        report: the folder's report.
        base: the model that the folder was converted from; default the one that the report names.
        overrides: the overrides of `surgery heal`; None where the healing is part of a recipe.
        others: as for `surgery.heal`.
    """
    from surgery.healing.run import HealRun, train

    folder, resume, overwrite = report.folder, options.resume, options.overwrite
    ranks, weights = Ranks(), Checkpoint(folder)
    anatomy, rewritten = _trainable_anatomy(folder), rewritten_by(report.data)
    source = _scorable_base(report, base, heal, judged_by if options.evaluate else None, anatomy)
    table = {name: (info.dtype, info.shape) for name, info in weights.tensors.items()}
    refuse_settings(heal, judged_by)
    plan = HealPlan.of(heal, anatomy, table, rewritten, **_settings_of_plan(report, heal, source))
    if options.on_plan and ranks.first:
        options.on_plan(plan)
    identity = _identity(heal, report, source if heal.needs_base or heal.eval_every else None)
    out = OutputFolder(output, folder, identity, resume=resume, overwrite=overwrite, preserve=f"{RUN}/{SELF_TEXT}-*")
    if source is not None:
        out.refuse_nesting(source)
    if resume and not overwrite and out.is_same_conversion():  # it stopped during its check or score
        return HealedFolder(Report.of(out.out) if ranks.first else None, source)
    needed = weights.size + plan.disk_bytes + plan.teacher_bytes - (_bytes_in(out.partial) if resume else 0)
    with ranks.opened(out, max(0, needed)) as partial, _mark_resumable(partial / RUN):
        model, dtype = converted_model(folder, anatomy)
        job = HealRun(
            heal,
            source,
            read_tokenizer(folder),
            rewritten,
            partial / RUN,
            operations=report.data["operations"],
            identity=identity,
            evaluate=judged_by,
            adapter=partial / ADAPTER,
            progress=options.progress if ranks.first else None,
        )
        training = train(model, job)
        if overrides is not None:
            training["overrides"] = [published_override(text) for text in overrides]
        if ranks.first:
            begin(job.progress, "writing")
            save_as_stored(model, partial, dtype)
            _document(partial, report, job, heal, training)
    job.trackers.moved(out.out / RUN)
    return HealedFolder(Report.of(out.out) if ranks.first else None, source, job.trackers)


def _settings_of_plan(report: Report, heal: Heal, base: Path | None) -> dict[str, Any]:
    """The keyword arguments of `HealPlan.of` that follow from a folder's report and its base."""
    recipe = recorded(report.data)
    return {
        "base": Anatomy.of(base) if base is not None else None,
        "operations": report.data["operations"],
        "note": recipe.too_short(heal.length, "rows", "heal.length") if recipe else "",
    }


def _scorable_base(
    report: Report, base: str | Path | None, heal: Heal, scored_by: Evaluate | None, anatomy: Anatomy
) -> Path | None:
    """The base's folder, where training or scores need the base. Raises where the base cannot be scored as asked."""
    wanted = scored_by is not None or bool(heal.eval_every)
    source = base_folder(report.data, base, needed=heal.needs_base, wanted=wanted)
    if scored_by is not None and source is not None:
        refuse_unscorable(source, scored_by, anatomy)
    return source


def _document(partial: Path, report: Report, job: HealRun, heal: Heal, training: dict) -> None:
    """Add record, curve and the other files of the converted folder to the healed weights.

    Args:
        report: the converted folder's report.
        training: the record that `train` returned.
    """
    data = records.report_after_healing(report.data, heal, job.evaluate) | {"plan_hash": job.identity}
    records.draw(job.run, heal, data["gate"]["limits"])
    data["heal"] = records.new_record(heal, training, report.data.get("heal"))
    if (card := report.folder / CARD).is_file():
        data["owner_notes"] = notes_of(card.read_text(encoding="utf-8", errors="replace"))
    files = weight_files(partial) | weight_files(partial, ADAPTER)
    data |= {"files": files, "left_behind": carry_files(report.folder, partial, _files(Checkpoint(report.folder)))}
    Report(data, partial).save()
    _remove_working_files(job.run)
    Report(data, partial).save(list_files=True)  # lists the files that stay


def compare(healed: Report, converted: Path, base: Path, judged_by: Evaluate, options: RunOptions) -> None:
    """Record how much of the converted model's damage the healing recovered.

    Args:
        healed: the healed model's report, which has scores by `judged_by`.
        converted: the folder before the training. It is scored here if its own scores are from another text.
    """
    before, after = Report.of(converted).data["evaluation"], healed.data["evaluation"]
    if not before or before.get("text") != after.get("text") or before.get("status") != "done":
        before = judged_by.main.measure(converted, base, progress=options.progress).to_dict()
    healed.data["heal"] |= records.recovery(before, after)


def _trainable_anatomy(folder: Path) -> Anatomy:
    """The anatomy of a folder. Raises where the model cannot be trained, or not be saved as it was stored."""
    anatomy = Anatomy.of(folder)
    refuse_unhealable(anatomy, str(folder))
    if (folder / "adapter_config.json").is_file():
        what = "this folder carries adapters, which would no longer fit the new weights"
        raise SurgeryError(
            what, where=str(folder), fix="merge them first: model.merge_and_unload(), or move them away"
        )
    dtypes = stored_dtypes(anatomy)
    if len(dtypes) != 1:
        raise UnsupportedModelError(
            f"healing stores all weights in one dtype, and this checkpoint has {', '.join(dtypes) or 'none'}",
            where=str(folder),
            fix="store the model in one dtype first (from_pretrained(..., dtype=...), save_pretrained)",
        )
    return anatomy


def _identity(heal: Heal, report: Report, source: Path | None) -> str:
    """A hash of what a resumed run must have in common with the earlier run: settings, weights, base, version."""
    from surgery.version import __version__

    files = {name: entry["sha256"] for name, entry in report.data["files"].items()}
    base = Checkpoint(source).fingerprint() if source is not None else ""
    identity = {"heal": heal.identity(), "files": files, "base": base, "version": __version__}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _files(weights: Checkpoint) -> set[str]:
    return {shard.file for shard in weights.shards} | ({WEIGHT_INDEX} if weights.index else set())


@contextmanager
def _mark_resumable(run: Path) -> Iterator[None]:
    """Mark an error as resumable where checkpoints, the base's text or a stored teacher remain for --resume."""
    from surgery.healing.run import TEACHER
    from surgery.healing.trainer import complete_checkpoints

    try:
        yield
    except SurgeryError as error:
        error.resumable = error.resumable or any(
            (complete_checkpoints(run), (run / TEACHER).exists(), *run.glob(f"{SELF_TEXT}-*"))
        )
        raise


def _remove_working_files(run: Path) -> None:
    """Remove all files of a training's folder but `KEPT_FILES`."""
    for path in run.iterdir():
        if path.name not in KEPT_FILES:
            shutil.rmtree(path) if path.is_dir() else os.remove(path)


def heal_model(
    model, base, settings: Heal | dict | None, overrides: Sequence[str], tokenizer, options: RunOptions
) -> Report:
    """Train a converted model in memory, in place; arguments as for `surgery.heal`."""
    from accelerate.utils import broadcast_object_list

    from surgery.healing.distributed import processes
    from surgery.healing.run import HealRun, train, trained_of
    from surgery.healing.trackers import close_earlier

    refuse_for_loaded()
    report = report_in_memory(model)
    heal, judged_by = read_settings(report.data["recipe"], settings, overrides)
    if not callable(tokenizer):
        raise SurgeryError("healing needs the tokenizer", fix="surgery.heal(model, base, tokenizer=tokenizer)")
    anatomy, rewritten = Anatomy.of(model), rewritten_by(report.data)
    refuse_unhealable(anatomy, type(model).__name__)
    refuse_settings(heal, judged_by)
    source = base if base is not None and not isinstance(base, str | Path) else None
    if source is None:
        source = base_folder(report.data, base, needed=heal.needs_base, wanted=bool(heal.eval_every))
    elif source is model:
        fix = "load it again: AutoModelForCausalLM.from_pretrained(BASE)"
        raise SurgeryError(EDITED_BASE, where=type(model).__name__, fix=fix)
    _refuse_tokenizer(tokenizer, source if source is not None else model)
    operations = report.data["operations"]
    before = Anatomy.of(source) if source is not None else None
    plan = HealPlan.of(heal, anatomy, model_table(model), rewritten, base=before, operations=operations)
    trained = trained_of(model, heal, rewritten, plan.mixing)
    if options.on_plan:
        options.on_plan(plan)
    close_earlier(model)
    run_settings = heal.model_copy(update={"checkpoint_every": 0})  # a run in a temporary folder cannot be resumed
    with (
        restore_weights_on_error(model, trained, bool(plan.mixing)),
        in_float32(model),
        tempfile.TemporaryDirectory(prefix="surgery-") as temporary,
    ):
        # One folder for all processes, which run on one machine.
        run = broadcast_object_list([temporary])[0] if processes().num_processes > 1 else temporary
        optional = {"operations": operations, "evaluate": judged_by, "progress": options.progress, "in_memory": True}
        job = HealRun(run_settings, source, tokenizer, rewritten, Path(run), **optional)
        training = train(model, job)
        processes().wait_for_everyone()  # else the first would remove the folder that others use
    if job.trackers.faults:
        training["tracker_faults"] = job.trackers.faults
    job.trackers.keep_open(model)
    earlier = report.data.get("heal")
    # The record's check and scores are from before the training.
    report.data.update(records.report_after_healing(report.data, heal, judged_by))
    report.data["heal"] = records.new_record(heal, training, earlier)
    return report


def _refuse_tokenizer(tokenizer, base) -> None:
    """Raise where words have other tokens than in the base's own tokenizer, if this machine has that tokenizer.

    Args:
        base: folder of the base, or a loaded model.
    """
    folder = Path(base if isinstance(base, Path) else getattr(base.config, "_name_or_path", "") or "nowhere")
    if not folder.is_dir():
        return
    try:
        words = read_tokenizer(folder).get_vocab()
    except SurgeryError:  # the base has no tokenizer
        return
    ours = tokenizer.get_vocab()
    other = sum(ours.get(word) != token for word, token in words.items())
    if other:
        raise ModelMismatchError(
            f"this is another tokenizer than the base's: {other:,} of its {len(words):,} words have other numbers",
            where=type(tokenizer).__name__,
            fix=f"AutoTokenizer.from_pretrained({str(folder)!r})",
        )
