"""For a user's own Trainer: checkpoints that carry the record of the surgery, as `check` and `push` need it."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback

from surgery.io.output_folder import weight_files
from surgery.report.report import Report


class SurgeryCallback(TrainerCallback):
    """Writes surgery.json and the card into every checkpoint of a whole model that a Trainer saves.

    A Trainer saves the model alone: where it came from, what was changed and what the files' hashes are would be lost.
    What the training did to the model is not known here, so the record has no scores: `surgery eval` measures them.

        trainer = Trainer(model, ..., callbacks=[surgery.SurgeryCallback(report)])

    Args:
        report: what `surgery.apply` returned for this model.
    """

    def __init__(self, report: Report):
        self.report = report

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and (files := weight_files(folder)) and (folder / "config.json").is_file():
            known = self.report.data
            gate = {"status": "not run", "limits": known["gate"]["limits"]}
            now = {"files": files, "check": None, "evaluation": None, "gate": gate, "code": None}
            in_memory = {"class": (known.get("in_memory") or {}).get("class"), "steps": state.global_step}
            Report(known | now | {"in_memory": in_memory}, folder).save()
