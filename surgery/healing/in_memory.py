"""Healing of a converted model in memory, in place."""

from __future__ import annotations

import tempfile
from pathlib import Path

from surgery.architecture.anatomy import Anatomy
from surgery.config.heal_overrides import settings as read_settings
from surgery.errors import SurgeryError
from surgery.healing import record as records
from surgery.healing.contexts import in_float32, put_back
from surgery.healing.plan import HealPlan, refuse_unhealable
from surgery.healing.source import base_folder, of_memory, rewritten_by
from surgery.healing.validate import refuse_settings
from surgery.io.loading import read_tokenizer
from surgery.io.model_folder import model_table
from surgery.report.report import Report


def heal_in_memory(model, base, given, overrides, tokenizer, progress, on_plan, fields) -> Report:
    """As `surgery.heal` of a loaded model."""
    from accelerate.utils import broadcast_object_list

    from surgery.healing.processes import processes
    from surgery.healing.run import Job, train, trained_of

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
        put_back(model, trained, bool(plan.mixing)),
        in_float32(model),
        tempfile.TemporaryDirectory(prefix="surgery-") as own,
    ):
        # One folder for all processes; they are of one machine.
        run = broadcast_object_list([own])[0] if processes().num_processes > 1 else own
        more = {"operations": operations, "evaluate": judged_by, "progress": progress, "in_memory": True}
        job = Job(run_settings, source, tokenizer, rewritten, Path(run), **more)
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
