"""The preflight: refuses a run that cannot succeed before a base is downloaded, a file is written or anything trains.

Healing modules are imported only if a recipe heals: the import takes seconds, which a conversion alone should not
wait for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import stored_dtypes
from surgery.config.options import ENGINES, RunOptions
from surgery.conversion.estimate import DeviceUse
from surgery.errors import OutputExistsError, SurgeryError, UnsupportedModelError
from surgery.evaluation.run import refuse_unscorable
from surgery.io.files import REPORT, read_json
from surgery.io.output_folder import (
    OutputFolder,
    machine_errors,
    output_path,
    overlap,
    refuse_small_disk,
    refuse_to_replace,
)
from surgery.io.pickle import only_pickled
from surgery.machine.placement import AUTO, current

if TYPE_CHECKING:
    from surgery.config.evaluate import Evaluate
    from surgery.config.heal import Heal
    from surgery.conversion.plan import Plan


def preflight(plan: Plan, base: Path, output: str | Path, options: RunOptions) -> None:
    """Show the plan, and refuse a run that would otherwise fail after expensive work.

    Args:
        plan: the plan of the whole recipe, including its healing. `make_plan` has verified that it fits the model.
        base: a folder with the base's config and tokenizer; its weights may not be downloaded yet.
        output: the final folder.

    Raises:
        SurgeryError: the engine cannot convert this, the output is taken, the evaluation cannot be scored, or the
            healing cannot run as asked.
        MachineError: the disk is too small.
    """
    out, recipe = output_path(output), plan.recipe
    uses_streaming_engine(plan, options.engine)
    OutputFolder(out, base, "")  # raises if it is the base, lies in it or contains it
    if recipe.heal is not None:
        _refuse_taken_for_healing(out, options)
    if current().device != AUTO:
        DeviceUse.of(plan, scored=False)  # raises where the device that was named has no room
    if options.on_plan:
        options.on_plan(plan)
    if options.evaluate and recipe.evaluate is not None:
        refuse_unscorable(base, recipe.evaluate, plan.after)
    if recipe.heal is not None:
        from surgery.healing.validate import refuse_early

        _refuse_pickle_for_healing(base, options)
        refuse_early(recipe.heal, recipe.evaluate, base)
    else:
        _refuse_foreign(out, options)
    _refuse_small_disk(plan, out)


def uses_streaming_engine(plan: Plan, engine: str) -> bool:
    """Whether the streaming engine converts this plan; False: the loaded engine does.

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
    """Refuse a healing of a loaded model that cannot run, before the model is edited.

    Returns:
        The place that the model was loaded from, where the base's weights are; None if the healing needs no base.
    """
    from surgery.healing.models import base_of_memory
    from surgery.healing.validate import refuse_early

    base = base_of_memory(model, heal)
    if tokenizer is None:
        raise SurgeryError("healing needs the tokenizer", fix="surgery.apply(recipe, model, tokenizer=tokenizer)")
    refuse_early(heal, judged_by, model, tokenizer)
    return base


def refuse_output_and_engine(output: str | Path | None, model: str, options: RunOptions) -> None:
    """Raise if a conversion into a folder has no output, an unknown engine, or an output that is taken."""
    if output is None:
        raise SurgeryError("no output folder was named", fix="output='out'")
    if options.engine not in ENGINES:
        raise SurgeryError(f"unknown engine {options.engine!r}", exists=", ".join(ENGINES))
    if not _is_refused_anyway(output_path(output), model):
        refuse_taken(output_path(output), options)


def _is_refused_anyway(out: Path, model: str) -> bool:
    """Whether OUT is a root, or it and the model folder lie in one another: `OutputFolder` says what is wrong then."""
    try:
        return os.path.realpath(out) == os.path.realpath(out.parent) or overlap(out, Path(model))
    except (OSError, ValueError):  # no such names; whoever opens them reports it
        return True


def refuse_taken(out: Path, options: RunOptions) -> None:
    """Raise if OUT exists and the options ask neither to replace it nor to resume.

    This needs no plan. Whether a resumed run fits OUT is verified later, with its plan.
    """
    if not os.path.lexists(out) or options.overwrite or options.resume or is_unjudged(out):
        return
    raise OutputExistsError("OUT exists", where=str(out), fix="choose another name, or add --overwrite")


def is_unjudged(out: Path) -> bool:
    """Whether OUT is a result of ours that was not checked or not scored: --resume may go on with that."""
    try:
        record = read_json(out / REPORT)
    except (OSError, SurgeryError):
        return False
    return record.get("check") is None or record.get("evaluation") is None


def unhealed_folder(out: Path) -> Path:
    """The folder of the converted model until its healing is complete."""
    return out.with_name(f"{out.name}.unhealed")


def _refuse_taken_for_healing(out: Path, options: RunOptions) -> None:
    unfinished = options.resume and unhealed_folder(out).exists()
    if os.path.lexists(out) and not options.overwrite and not unfinished:
        raise OutputExistsError("OUT exists", where=str(out), fix="choose another name, or add --overwrite")
    if os.path.lexists(out) and options.overwrite:
        refuse_to_replace(out)


def _refuse_foreign(out: Path, options: RunOptions) -> None:
    """Raise if OUT is something other than a result of ours. For a result, `OutputFolder` says how to continue."""
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
    """Raise if a first run would fill the disk. For a resumed run, `OutputFolder` knows what is already written."""
    needed, heal = plan.output_bytes, plan.heal
    earlier = [out.with_name(f"{name}.partial") for name in (out.name, unhealed_folder(out).name)]
    if heal is not None:
        needed += plan.output_bytes + heal.disk_bytes + heal.teacher_bytes
        earlier.append(unhealed_folder(out))
    if not any(map(os.path.lexists, [out, *earlier])):
        with machine_errors(out):
            refuse_small_disk(out.parent, needed)
