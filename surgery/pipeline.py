"""A recipe with a `heal:` block, from folder to folder: convert, score, heal, check, score again, in one go.

The converted model stands in OUT.unhealed until OUT is complete: a run that was stopped goes on from there. It stays
where an adapter is kept, which loads on it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from surgery.config.heal_overrides import published
from surgery.conversion.convert import convert
from surgery.errors import SurgeryError
from surgery.healing.distributed import Ranks
from surgery.healing.heal import finish, heal_folder
from surgery.healing.plan import refuse_unhealable
from surgery.healing.validate import refuse_early
from surgery.io.files import published_recipe
from surgery.io.output_folder import remove_own
from surgery.io.pickle import only_pickled
from surgery.report.lineage import another_base
from surgery.report.report import Report


def apply_and_heal(
    recipe,
    model: str,
    output: str | Path,
    *,
    engine: str,
    check: bool,
    evaluate: bool,
    gate: bool,
    resume: bool,
    overwrite: bool,
    allow_pickle: bool,
    progress=None,
    on_plan=None,
    refuse=None,
) -> Report | None:
    """As `surgery.apply`; None in all processes but the first."""
    from surgery.evaluation.run import evaluate_report

    ranks, out = Ranks(), Path(os.path.abspath(output))
    unhealed = out.with_name(f"{out.name}.unhealed")
    if resume and not overwrite and (done := _finished(out, unhealed, recipe, model)):
        return done if ranks.first else None

    def refuse_all(folder: Path) -> None:
        if refuse:
            refuse(folder)
        if allow_pickle and only_pickled(folder):
            raise SurgeryError(
                "the base's weights are a pickle, and healing loads the base again",
                where=str(folder),
                fix="save it as safetensors first (from_pretrained, save_pretrained), and name that folder",
            )
        refuse_early(recipe.heal, folder)

    if os.path.lexists(out) and not overwrite and not (resume and unhealed.exists()):
        raise SurgeryError("OUT exists", where=str(out), fix="choose another name, or add --overwrite")

    def announce(plan) -> None:
        whole = replace(plan, recipe=recipe)
        refuse_unhealable(whole.after, whole.source)
        _ = whole.heal  # a method that would train nothing is refused before anything is written
        if on_plan:
            on_plan(whole)

    if ranks.first:
        converted, base = convert(
            recipe.model_copy(update={"heal": None}),
            model,
            unhealed,
            overrides=recipe.overrides,
            engine=engine,
            resume=resume,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            progress=progress,
            on_plan=announce,
            refuse=refuse_all,
        )
        if evaluate and recipe.evaluate is not None and converted.data["evaluation"] is None:
            evaluate_report(converted, base, recipe.evaluate, progress, allow_pickle)
            converted.save()
    ranks.wait()
    if not ranks.first:
        converted, base = Report.of(unhealed), None
    settings = {"resume": resume, "overwrite": overwrite, "progress": progress}
    named = str(base) if base is not None else model
    healed, source = heal_folder(unhealed, converted, named, recipe.heal, recipe.evaluate, out, **settings)
    if healed is not None:
        finish(healed, unhealed, source, recipe.evaluate if evaluate else None, check, gate, progress)
        if not recipe.heal.keeps_adapter:
            remove_own(unhealed)
    return healed


def _finished(out: Path, unhealed: Path, recipe, model: str) -> Report | None:
    """The report of an OUT that this very recipe made of this model, if nothing is left to do."""
    if unhealed.exists() or not (out / "surgery.json").is_file():
        return None
    report = Report.of(out)
    asked = published_recipe(recipe.to_dict()) | {"heal": published(recipe.heal)}
    same = report.data["recipe"] == asked and not another_base(report.data["base"], model)
    return report if same else None
