"""What is asked of a training, and the rows that it reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.data.documents import SELF, Packed, documents
from surgery.data.packing import reads_apart
from surgery.errors import TrainingError
from surgery.healing.contexts import products, use_bfloat16
from surgery.healing.losses import cross_entropy
from surgery.healing.plan import micro_rows
from surgery.healing.processes import processes
from surgery.io.files import read_json, write_json
from surgery.io.loading import load_model
from surgery.machine.transformers_logging import quiet_transformers

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.config.recipe import Evaluate
    from surgery.healing.parameters import Trained

ROUNDS = 4  # that the clock's training makes over the base's own text: writing it takes longer than training on it
RUN = "run.json"  # what a run is of, for --resume


@dataclass
class Job:
    """What is asked of a training besides the model.

    Attributes:
        base: folder of the unconverted model, or that model; None where nothing asks it.
        rewritten: projections that the surgery rewrote (`trained.touched`).
        run: folder of checkpoints and metrics.
        operations: of the surgery, with their records; what mixing weights must know of it.
        identity: of settings, model and base; a run that goes on must have the same.
        evaluate: text and limits of the recipe, for held-out scores while it trains.
        adapter: where the adapter is kept, if `heal.keep_adapter`.
        in_memory: the model is the user's: an error leaves it as it was, and there is no run to go on from.
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
    progress: Callable[[int, int, str], None] | None = None
    _base: list = field(default_factory=list)

    def base_model(self):
        """The base in memory. From a folder it is loaded once, in bfloat16 where products are."""
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
        """Give its memory back."""
        self._base.clear()


def settled(job: Job) -> Heal:
    """The settings with the precision that this run has, also on another machine that goes on with it."""
    file = job.run / RUN
    known = read_json(file).get("precision") if file.is_file() else None
    here = "bfloat16" if use_bfloat16(job.heal) else "float32"
    return job.heal.model_copy(update={"precision": known or here})


def rows_of(model, job: Job, trained: Trained) -> tuple[dict, Packed]:
    """What is said of the data, and their rows.

    Raises:
        SurgeryError: of `documents`.
        TrainingError: the folder's checkpoints are of another run, or were trained on other data.
    """
    heal, file, state = job.heal, job.run / RUN, processes()
    with state.main_process_first():  # the others find what it wrote: its file, and the base's text
        known = read_json(file) if file.is_file() else {}
        if known and known.get("identity") != job.identity:
            raise TrainingError(
                "the checkpoints are of another training (recipe, model or base differ)",
                where=str(job.run),
                fix="finish that one with its own command, or start anew with --overwrite",
            )
        rows, source = known.get("rows") or _rows_needed(model, heal, trained), job.base
        facts = {"identity": job.identity, "rows": rows, "precision": heal.precision}
        if not known and state.is_main_process:  # the base may write for hours now
            write_json(file, facts)
        found = documents(
            heal,
            job.tokenizer,
            job.base_model() if heal.data == SELF else model if source is None else source,
            rows_needed=rows,
            folder=job.run if heal.data == SELF else None,
            progress=job.progress,
        )
        packed = Packed(found, heal.length, apart=reads_apart(model))
        facts["data"] = packed.sha256
        if known.get("data", facts["data"]) != facts["data"]:
            raise TrainingError(
                "the data are not those that the checkpoints were trained on",
                where=f"heal.data: {heal.data}",
                fix="put them back as they were, or start anew with --overwrite",
            )
        if "data" not in known and state.is_main_process:
            write_json(file, facts)
    return found.facts | {"rows": len(packed)}, packed


def _rows_needed(model, heal: Heal, trained: Trained) -> int:
    """Rows that the training will read; by the clock, as many as this machine could at most."""
    if heal.planned_steps is not None:
        return heal.planned_steps * heal.rows
    vocabulary = model.config.get_text_config().vocab_size
    rows = micro_rows(heal.rows, heal.length, vocabulary)
    # Gradients of what trains, not of all weights: nobody has planned the memory of those.
    there = dict(model.named_parameters())  # mixing weights are not yet
    names = [name for name in trained.parameters if name in there] or [
        f"{name}.weight" for name in trained.adapted[:1]
    ]
    wanted = [there[name].requires_grad_() for name in names or list(there)[-1:]]
    batch = torch.randint(vocabulary, (rows, heal.length), generator=torch.Generator().manual_seed(0))
    batch = batch.to(processes().device)
    model.to(processes().device).train()
    for _ in range(2):  # the first is slower
        began = time.monotonic()
        with products(heal, model.device):
            loss = cross_entropy(model(input_ids=batch, use_cache=False).logits, batch)
        torch.autograd.grad(loss, wanted, allow_unused=True)
        seconds = time.monotonic() - began
    steps = max(1, int(60 * heal.minutes / seconds * rows / heal.rows))
    return max(1, steps // (ROUNDS if heal.data == SELF else 1)) * heal.rows
