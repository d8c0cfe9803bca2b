"""`surgery.heal`: from a converted folder to a healed one, or a converted model in memory, healed in place.

Healing of a converted model in memory, in place.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy, stored_dtypes
from surgery.config.heal_overrides import settings as read_settings
from surgery.config.overrides import as_text
from surgery.data.text import SELF_TEXT
from surgery.errors import SurgeryError
from surgery.evaluation.run import evaluate_report, refuse_unscorable
from surgery.healing import record as records
from surgery.healing.contexts import in_float32, restore_weights_on_error
from surgery.healing.plan import HealPlan, refuse_unhealable
from surgery.healing.validate import (
    base_folder,
    converted_model,
    of_memory,
    refuse_settings,
    rewritten_by,
    save_as_stored,
)
from surgery.io.files import published_override
from surgery.io.loading import read_tokenizer
from surgery.io.model_folder import carry_files, model_table
from surgery.io.output_folder import OutputFolder, weight_files
from surgery.io.safetensors import WEIGHT_INDEX, Checkpoint
from surgery.machine.progress import Progress
from surgery.report.report import Report

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.config.recipe import Evaluate


RUN, ADAPTER = "healing", "adapter"  # folders in OUT
KEPT = ("metrics.jsonl", "loss.png", "runs")  # of RUN, when the training is over; runs: tensorboard's, never pushed


def heal(
    model,
    base=None,
    *,
    output: str | Path | None = None,
    settings: Heal | dict | None = None,
    overrides: Sequence[str] = (),
    tokenizer=None,
    check: bool = True,
    evaluate: bool = True,
    gate: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[HealPlan], None] | None = None,
    **fields,
) -> Report:
    """Train a converted model, and say how much of the damage came back.

    A folder that `surgery.apply` wrote becomes a new folder, `output`: checked, scored beside base and converted model
    on the text of its recipe, and documented. A model in memory is trained in place; `surgery.save` writes it. If that
    fails it is left as it was, by a copy in main memory of what trains and of what low-rank updates are merged into.

    Args:
        model: the folder, or a model that `surgery.apply` edited.
        base: what it was made from: folder, name or Hub id, or of a loaded model a loaded one (which is left frozen);
            default what its record names.
        settings: as the `heal:` block of a recipe; default the block of its own recipe.
        overrides: "key=value" texts; `fields` are the same as keywords (`method="full", tokens=1e6`).
        tokenizer: of a model in memory.
        check, evaluate, gate: what is done with the result.
        resume: go on from the last whole checkpoint of an unfinished run of the same settings, data and models.
        overwrite: replace OUT, and begin anew where an unfinished run is; text that the base wrote for it is used.
        progress: called with done, total and a label.
        on_plan: called with what will train before anything is done.

    Raises:
        SurgeryError: settings, data or models are at fault.
        TrainingError: it cannot go on (NaN, other data than before); checkpoints are kept.
        MachineError: disk or memory; `resume=True` goes on.
    """
    if not isinstance(model, str | Path):
        given = {"output": output, "resume": resume, "overwrite": overwrite}
        if names := [name for name in given if given[name]]:
            raise SurgeryError(f"{', '.join(names)}: for a folder, and this is a loaded model, healed in place")
        return heal_in_memory(model, base, settings, overrides, tokenizer, progress, on_plan, fields)
    if base is not None and not isinstance(base, str | Path):
        raise SurgeryError(
            f"base is a loaded {type(base).__name__}, and a folder is healed beside a base on disk",
            fix="name its folder or Hub id; or load the model too: surgery.load(folder)",
        )
    if output is None:
        raise SurgeryError("no output folder was named", fix="output='healed'")
    folder = Path(model)
    report = Report.of(folder)
    asked, judged_by = read_settings(report.data["recipe"], settings, overrides, **fields)
    healed, source = heal_folder(
        folder,
        report,
        base,
        asked,
        judged_by,
        output,
        overrides=[*overrides, *(as_text(key, value) for key, value in fields.items())],
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        on_plan=on_plan,
        refuse=(lambda source: refuse_unscorable(source, judged_by)) if evaluate and judged_by is not None else None,
    )
    if healed is not None:
        finish(healed, folder, source, judged_by if evaluate else None, check, gate, progress)
    return healed


def heal_folder(
    folder: Path,
    report: Report,
    base,
    asked: Heal,
    judged_by: Evaluate | None,
    output: str | Path,
    *,
    overrides: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_plan=None,
    refuse=None,
) -> tuple[Report | None, Path | None]:
    """Train and write the healed folder; arguments as for `heal`.

    Args:
        overrides: as typed in a command of its own; None where the healing is a part of a recipe.
        refuse: called with the base's folder, where there is one, before anything is written; may raise. None: the
            result is not scored beside it.

    Returns:
        The report, saved with the folder (None in all processes but the first), and the base's folder.
    """
    from surgery.healing.distributed import Ranks
    from surgery.healing.run import HealRun, train
    from surgery.io.loading import read_tokenizer

    ranks, weights = Ranks(), Checkpoint(folder)
    source = base_folder(
        report.data, base, needed=asked.needs_base, wanted=refuse is not None or bool(asked.eval_every)
    )
    if refuse and source is not None:
        refuse(source)
    anatomy, rewritten = _refused(folder), rewritten_by(report.data)
    table = {name: (info.dtype, info.shape) for name, info in weights.tensors.items()}
    refuse_settings(asked, anatomy.config)
    before = Anatomy.of(source) if source is not None else None
    plan = HealPlan.of(asked, anatomy, table, rewritten, base=before, operations=report.data["operations"])
    if on_plan and ranks.first:
        on_plan(plan)
    identity = _identity(asked, report, source if asked.needs_base or asked.eval_every else None)
    out = OutputFolder(output, folder, identity, resume=resume, overwrite=overwrite, spared=f"{RUN}/{SELF_TEXT}-*")
    if source is not None:
        out.refuse_nesting(source)
    if resume and not overwrite and out.holds_the_same():  # stopped while it was checked or scored
        return (Report.of(out.out) if ranks.first else None), source
    needed = weights.size + plan.disk_bytes + plan.teacher_bytes - (_bytes_in(out.partial) if resume else 0)
    with ranks.opened(out, max(0, needed)) as partial, _keeping(partial / RUN):
        model, dtype = converted_model(folder, anatomy)
        job = HealRun(
            asked,
            source,
            read_tokenizer(folder),
            rewritten,
            partial / RUN,
            operations=report.data["operations"],
            identity=identity,
            evaluate=judged_by,
            adapter=partial / ADAPTER,
            progress=progress if ranks.first else None,
        )
        facts = train(model, job)
        if overrides is not None:
            facts["overrides"] = [published_override(text) for text in overrides]
        if ranks.first:
            save_as_stored(model, partial, dtype)
            records.draw(partial / RUN)
            data = records.renewed(report.data, asked, judged_by) | {"plan_hash": identity}
            data["heal"] = records.made(asked, facts, report.data.get("heal"))
            files = weight_files(partial) | weight_files(partial, ADAPTER)
            data |= {"files": files, "left_behind": carry_files(folder, partial, _files(weights))}
            Report(data, partial).save()
            _tidy(partial / RUN)
    return (Report.of(out.out) if ranks.first else None), source


def finish(
    healed: Report,
    folder: Path,
    base: Path | None,
    judged_by: Evaluate | None,
    check: bool,
    gate: bool,
    progress: Progress | None,
) -> None:
    """Check the healed folder, score it beside base and converted model, and write both into record and card."""
    from surgery.evaluation.check import check_folder, to_dict
    from surgery.evaluation.perplexity import evaluate

    gc.collect()  # the trained model and the base beside it, which a cycle may hold
    if check:
        healed.data["check"] = to_dict(check_folder(healed.folder, None, progress=progress))
        healed.save()
    if judged_by is not None and base is not None and (not check or healed.data["check"]["passed"]):
        evaluate_report(healed, base, judged_by, progress)
        before, after = Report.of(folder).data["evaluation"], healed.data["evaluation"]
        if not before or before.get("text") != after.get("text") or before.get("status") != "done":
            size = {"windows": judged_by.windows, "length": judged_by.length}
            before = evaluate(folder, base, text=judged_by.text, **size, progress=progress).to_dict()
        healed.data["heal"] |= records.compared(before, after)
    if not gate and healed.data["gate"]["limits"]:
        healed.data["gate"]["status"] = "skipped"
    healed.save()


def _refused(folder: Path) -> Anatomy:
    """The anatomy of a folder; raises where it cannot be trained and saved as it was stored."""
    anatomy = Anatomy.of(folder)
    refuse_unhealable(anatomy, str(folder))
    if (folder / "adapter_config.json").is_file():
        what = "this folder carries adapters, which would no longer fit the new weights"
        raise SurgeryError(
            what, where=str(folder), fix="merge them first: model.merge_and_unload(), or move them away"
        )
    dtypes = stored_dtypes(anatomy)
    if len(dtypes) != 1:
        raise SurgeryError(
            f"healing stores all weights in one dtype, and this checkpoint has {', '.join(dtypes) or 'none'}",
            where=str(folder),
            fix="store the model in one dtype first (from_pretrained(..., dtype=...), save_pretrained)",
        )
    return anatomy


def _identity(asked: Heal, report: Report, source: Path | None) -> str:
    """What a run must share with one that it goes on from: settings, weights, base, version."""
    from surgery.version import __version__

    files = {name: facts["sha256"] for name, facts in report.data["files"].items()}
    base = Checkpoint(source).fingerprint() if source is not None else ""
    facts = {"heal": asked.identity(), "files": files, "base": base, "version": __version__}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _files(weights: Checkpoint) -> set[str]:
    return {shard.file for shard in weights.shards} | ({WEIGHT_INDEX} if weights.index else set())


@contextmanager
def _keeping(run: Path) -> Iterator[None]:
    """No error takes away checkpoints, text of the base or a stored teacher: what is mended goes on with --resume."""
    from surgery.healing.run import TEACHER
    from surgery.healing.trainer import whole

    try:
        yield
    except SurgeryError as error:
        error.resumable = error.resumable or any((whole(run), (run / TEACHER).exists(), *run.glob(f"{SELF_TEXT}-*")))
        raise


def _tidy(run: Path) -> None:
    """Of a training's folder, keep what a reader of the result may want."""
    for path in run.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else os.remove(path)


def heal_in_memory(model, base, given, overrides, tokenizer, progress, on_plan, fields) -> Report:
    """As `surgery.heal` of a loaded model."""
    from accelerate.utils import broadcast_object_list

    from surgery.healing.distributed import processes
    from surgery.healing.run import HealRun, train, trained_of

    report = of_memory(model)
    asked, judged_by = read_settings(report.data["recipe"], given, overrides, **fields)
    if not callable(tokenizer):
        raise SurgeryError("healing needs the tokenizer", fix="surgery.heal(model, base, tokenizer=tokenizer)")
    anatomy, rewritten = Anatomy.of(model), rewritten_by(report.data)
    refuse_unhealable(anatomy, type(model).__name__)
    refuse_settings(asked, model.config)
    source = base if base is not None and not isinstance(base, str | Path) else None
    if source is None:
        source = base_folder(report.data, base, needed=asked.needs_base, wanted=bool(asked.eval_every))
    elif source is model:
        raise SurgeryError(
            "the base is this very model, which was edited in place",
            where=type(model).__name__,
            fix="load it again: AutoModelForCausalLM.from_pretrained(BASE)",
        )
    _refuse_tokenizer(tokenizer, source if source is not None else model)
    operations, table = report.data["operations"], model_table(model)
    before = Anatomy.of(source) if source is not None else None
    plan = HealPlan.of(asked, anatomy, table, rewritten, base=before, operations=operations)
    trained = trained_of(model, asked, rewritten, plan.mixing)
    if on_plan:
        on_plan(plan)
    run_settings = asked.model_copy(update={"checkpoint_every": 0})  # nobody could go on from a temporary folder
    with (
        restore_weights_on_error(model, trained, bool(plan.mixing)),
        in_float32(model),
        tempfile.TemporaryDirectory(prefix="surgery-") as own,
    ):
        # One folder for all processes; they are of one machine.
        run = broadcast_object_list([own])[0] if processes().num_processes > 1 else own
        more = {"operations": operations, "evaluate": judged_by, "progress": progress, "in_memory": True}
        job = HealRun(run_settings, source, tokenizer, rewritten, Path(run), **more)
        facts = train(model, job)
        processes().wait_for_everyone()  # or the first would take the folder away from the others
    earlier = report.data.get("heal")
    # What was checked and measured was the model before.
    report.data.update(records.renewed(report.data, asked, judged_by))
    report.data["heal"] = records.made(asked, facts, earlier)
    return report


def _refuse_tokenizer(tokenizer, known) -> None:
    """Raise where words have other numbers than in the base's own tokenizer, where that is on this machine.

    Args:
        known: folder of the base, or a loaded model.
    """
    folder = Path(known if isinstance(known, Path) else getattr(known.config, "_name_or_path", "") or "nowhere")
    if not folder.is_dir():
        return
    try:
        base = read_tokenizer(folder).get_vocab()
    except SurgeryError:  # it has none
        return
    ours = tokenizer.get_vocab()
    other = sum(ours.get(word) != number for word, number in base.items())
    if other:
        raise SurgeryError(
            f"this is another tokenizer than the base's: {other:,} of its {len(base):,} words have other numbers",
            where=type(tokenizer).__name__,
            fix=f"AutoTokenizer.from_pretrained({str(folder)!r})",
        )
