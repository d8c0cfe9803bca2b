"""Everything that can be refused before a base is fetched, a file is written or anything is trained.

What healing needs is imported where a recipe heals: it takes seconds, which a conversion alone should not wait for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import stored_dtypes
from surgery.config.options import ENGINES, RunOptions
from surgery.errors import OutputExistsError, SurgeryError, UnsupportedModelError
from surgery.evaluation.run import refuse_unscorable
from surgery.io.files import REPORT, read_json
from surgery.io.output_folder import OutputFolder, machine_errors, output_path, refuse_small_disk, refuse_to_replace
from surgery.io.pickle import only_pickled

if TYPE_CHECKING:
    from surgery.config.evaluate import Evaluate
    from surgery.config.heal import Heal
    from surgery.conversion.plan import Plan


def preflight(plan: Plan, base: Path, output: str | Path, options: RunOptions) -> None:
    """Show the plan, and refuse what would fail only after expensive work.

    Args:
        plan: of the whole recipe, its healing included; `make_plan` has refused what does not fit the model.
        base: a folder with the base's config and tokenizer; its weights may not be there yet.
        output: the final folder.

    Raises:
        SurgeryError: the engine cannot convert this, the output is taken, the evaluation cannot be scored, or the
            healing cannot run as asked.
        MachineError: the disk is too small.
    """
    out, recipe = output_path(output), plan.recipe
    uses_streaming_engine(plan, options.engine)
    OutputFolder(out, base, "")  # it may not be the base, lie in it or hold it
    if recipe.heal is not None:
        _refuse_taken_for_healing(out, options)
    if options.on_plan:
        options.on_plan(plan)
    if options.evaluate and recipe.evaluate is not None:
        refuse_unscorable(base, recipe.evaluate)
    if recipe.heal is not None:
        from surgery.healing.validate import refuse_early

        _refuse_pickle_for_healing(base, options)
        refuse_early(recipe.heal, recipe.evaluate, base)
    else:
        _refuse_foreign(out, options)
    _refuse_small_disk(plan, out)


def uses_streaming_engine(plan: Plan, engine: str) -> bool:
    """Whether the streaming engine converts this plan, and not the loaded one.

    Raises:
        SurgeryError: the engine cannot convert this plan, or would change the dtype of some weights.
    """
    streaming = plan.streams if engine == "auto" else engine == "streaming"
    if streaming and not plan.streams:
        raise SurgeryError("an operation of this recipe needs the loaded engine", fix="leave --engine out")
    dtypes = stored_dtypes(plan.before)
    if not streaming and len(dtypes) > 1:
        raise UnsupportedModelError(
            f"the loaded engine would store all weights in one dtype, and this checkpoint has {', '.join(dtypes)}",
            where=plan.source,
            fix="use the streaming engine (leave --engine out)"
            if plan.streams
            else "this recipe needs the loaded engine: store the model in one dtype first "
            "(from_pretrained(..., dtype=...), save_pretrained)",
        )
    return streaming


def preflight_in_memory(heal: Heal, judged_by: Evaluate | None, model, tokenizer) -> str | None:
    """Refuse a healing of a loaded model before the model is edited.

    Returns:
        Where the model was loaded from: its weights there are the base's. None where the healing needs no base.
    """
    from surgery.healing.validate import base_of_memory, refuse_early

    base = base_of_memory(model, heal)
    if tokenizer is None:
        raise SurgeryError("healing needs the tokenizer", fix="surgery.apply(recipe, model, tokenizer=tokenizer)")
    refuse_early(heal, judged_by, model, tokenizer)
    return base


def refuse_output_and_engine(output: str | Path | None, options: RunOptions) -> None:
    """Raise where a folder is to be converted and no output is named, or by an engine that does not exist."""
    if output is None:
        raise SurgeryError("no output folder was named", fix="output='out'")
    if options.engine not in ENGINES:
        raise SurgeryError(f"unknown engine {options.engine!r}", exists=", ".join(ENGINES))
    refuse_taken(output_path(output), options)


def refuse_taken(out: Path, options: RunOptions) -> None:
    """Raise where OUT exists and the options say neither that it is replaced nor that it is gone on from.

    This is known before anything is worked out; whether a run that resumes fits OUT is known only with its plan.
    """
    if not os.path.lexists(out) or options.overwrite or options.resume:
        return
    resume = "--resume to go on with its check and scores, or " if _is_unjudged(out) else ""
    raise SurgeryError("OUT exists", where=str(out), fix=f"choose another name, or add {resume}--overwrite")


def _is_unjudged(out: Path) -> bool:
    """Whether OUT is a result of ours whose run was stopped before it was checked or scored."""
    try:
        record = read_json(out / REPORT)
    except (OSError, SurgeryError):
        return False
    return record.get("check") is None or record.get("evaluation") is None


def unhealed_folder(out: Path) -> Path:
    """Where the converted model stands until its healing is complete."""
    return out.with_name(f"{out.name}.unhealed")


def _refuse_taken_for_healing(out: Path, options: RunOptions) -> None:
    unfinished = options.resume and unhealed_folder(out).exists()
    if os.path.lexists(out) and not options.overwrite and not unfinished:
        raise OutputExistsError("OUT exists", where=str(out), fix="choose another name, or add --overwrite")
    if os.path.lexists(out) and options.overwrite:
        refuse_to_replace(out)


def _refuse_foreign(out: Path, options: RunOptions) -> None:
    """Raise where OUT is something else than a result of ours; of a result, `OutputFolder` says how to go on."""
    if os.path.lexists(out) and options.overwrite:
        refuse_to_replace(out)
    elif os.path.lexists(out) and not os.path.isfile(out / REPORT):
        raise OutputExistsError("OUT exists", where=str(out), fix="choose another name, or add --overwrite")


def _refuse_pickle_for_healing(base: Path, options: RunOptions) -> None:
    if options.allow_pickle and only_pickled(base):
        raise SurgeryError(
            "the base's weights are a pickle, and healing loads the base again",
            where=str(base),
            fix="save it as safetensors first (from_pretrained, save_pretrained), and name that folder",
            code="unsafe-weights",
        )


def _refuse_small_disk(plan: Plan, out: Path) -> None:
    """Raise where a first run would fill the disk. Of one that resumes, `OutputFolder` knows what is written."""
    needed, heal = plan.output_bytes, plan.heal
    earlier = [out.with_name(f"{name}.partial") for name in (out.name, unhealed_folder(out).name)]
    if heal is not None:
        needed += plan.output_bytes + heal.disk_bytes + heal.teacher_bytes
        earlier.append(unhealed_folder(out))
    if not any(map(os.path.lexists, [out, *earlier])):
        with machine_errors(out):
            refuse_small_disk(out.parent, needed)
