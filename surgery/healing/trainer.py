"""The training loop: Transformers' Trainer with a teacher's loss, checkpoints that survive a kill, and a clock.

A checkpoint has the parameters that train, for every method, and the Trainer's state: optimiser, schedule and random
numbers. A run on a CPU that resumes from it ends with the same weights, bit for bit.

A checkpoint is a folder `checkpoint-STEP` that the Trainer fills. Its last file, COMPLETE, is written atomically, and
lists the other files with their sizes. A folder without it, or with a file of another size, is incomplete and ignored.

The learning rate, the clock and the order of rows are also here.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from surgery.data.packing import arguments as forward_arguments
from surgery.errors import MachineError, TrainingError
from surgery.healing import distributed as sharding
from surgery.healing.contexts import overwrite_hint, use_bfloat16
from surgery.healing.distributed import on_cpu
from surgery.healing.losses.base import predicts
from surgery.healing.parameters import SURGERY
from surgery.healing.plan import micro_rows, rows_each
from surgery.healing.sparse_attention import full_attention, sparse_modules, text_losses
from surgery.healing.weighted_gqa import HEADS
from surgery.io.files import write_json
from surgery.io.output_folder import disk_full
from surgery.runtime.surgery_gates import ROUTERS, gated_modules, load_balance_loss, parameters_of

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.healing.teacher import Teacher


# Logits and log-weights need a higher rate: for the same effect, a weight of a projection changes by far less.
SCALAR_RATE = 10.0
# The surgery's own parameters that are weights of projections: routers, and the base's heads of a mixture (WGQA).
WEIGHTS_OF_PROJECTIONS = (
    *(name for name in ROUTERS if not name.endswith(("bias", "temperature"))),
    HEADS,
)


class HealTrainer(Trainer):
    """A Trainer whose loss a teacher gives, as a mean over the tokens that a step predicts.

    Args:
        heal: the settings.
        plain: the Transformers model itself, even if `model` wraps it in adapters.
        teacher: gives the loss and its terms.
        clock: counts the seconds, and ends the training after `heal.minutes`.
        in_memory: the model is the user's, and there is no run to resume.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args, heal: Heal, plain, teacher: Teacher, clock: Clock, in_memory: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.heal, self.plain, self.teacher, self.clock, self.in_memory = heal, plain, teacher, clock, in_memory
        self.ended = ""  # what ended the training before its last step
        self.model_accepts_loss_kwargs = True  # else the Trainer would also divide by the number of forwards in a step
        self.gated = gated_modules(plain)
        self.routed = any(map(_router_trains, self.gated))
        self.sparse = sparse_modules(plain)
        self.attends_full = False  # whether this step's attention is full (`heal.full_from`)
        self.sums: dict[str, float] = {}
        self.means: dict[str, float] = {}
        self.norm = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This forward's term of the mean loss over the tokens of a step; a scalar."""
        try:
            outputs = model(**forward_arguments(type(self.plain), inputs, self.heal.reads_states))
        except ValueError as error:  # a router refuses NaN before the loss is computed
            if "not finite" not in str(error):
                raise
            self._stop(str(error).partition(":")[0])
        loss, terms = self.teacher.loss(outputs, inputs, self.heal, num_items_in_batch)
        if self.routed and self.heal.balance:
            share = predicted(inputs["labels"]) / num_items_in_batch
            balance = share * load_balance_loss(self.plain).to(loss.device)
            terms = terms | {"balance": balance.item()}
            loss = loss + self.heal.balance * balance
        if not loss.isfinite():
            self._stop("the loss is not a number")
        for name, value in (terms | {"loss": loss.item()}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        # Gradients are averaged over processes, but this loss is a term of a sum.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """The number of tokens that a step predicts, over all its forwards and processes."""
        count = sum(predicted(batch["labels"]) for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(count, device=device), reduction="sum")

    def step_means(self) -> dict[str, float]:
        """The loss of the last step and its terms: means over the step's tokens in all processes."""
        names, values = zip(*sorted(self.sums.items()), strict=True)
        totals = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.args.device), "sum")
        self.sums, self.means = {}, dict(zip(names, totals.tolist(), strict=True))
        return self.means

    @staticmethod
    def trains_gates(done: int) -> bool:
        """Whether the step after `done` steps is the gates' turn; the others' comes after it (`heal.alternate`)."""
        return done % 2 == 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A forward and a backward. Where gates and the rest take turns, each expert of the rest's turn is drawn."""
        for module in self.gated:
            module.surgery_call.draws = self.heal.alternate and not self.trains_gates(self.state.global_step)
        try:
            with full_attention(self.sparse if self.attends_full else []):
                return super().training_step(model, inputs, num_items_in_batch)
        finally:  # the model is its owner's again
            for module in self.gated:
                module.surgery_call.draws = False

    def text_losses(self, model) -> dict[str, float]:
        """The loss under sparse and under full attention, on the training rows of the step that would come next."""
        begin = self.state.global_step * self.heal.rows
        rows = [self.train_dataset[begin + row] for row in range(self.heal.rows)]
        each = self.args.per_device_train_batch_size
        batches = (self.data_collator(rows[first : first + each]) for first in range(0, len(rows), each))
        return text_losses(model, self.plain, map(self._prepare_inputs, batches), self.sparse)

    def _clip_grad_norm(self, model):
        if self.heal.alternate:
            for name, parameter in self.model.named_parameters():
                if _is_router(name) != self.trains_gates(self.state.global_step):
                    parameter.grad = None
        norm = super()._clip_grad_norm(model)
        if norm is None:  # DeepSpeed knows the norm only after the step
            return norm
        self.norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not torch.isfinite(torch.tensor(self.norm)):  # this step would spoil every weight
            self._stop("the gradient is not a number")
        return norm

    def _stop(self, what: str) -> None:
        checkpoints = [] if self.in_memory else complete_checkpoints(Path(self.args.output_dir))
        otherwise = "" if self.in_memory else "no checkpoint yet"
        raise TrainingError(
            f"{what} in step {self.state.global_step + 1}",
            where="heal",
            exists=f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else otherwise,
            fix=f"a lower heal.learning_rate (now {self.heal.rate:g}), heal.precision=float32, or other data"
            + overwrite_hint(self.in_memory),
        )

    def log(self, logs, start_time=None) -> None:
        """Report the means of the loss's terms as well."""
        super().log(logs | {name: mean for name, mean in self.means.items() if name != "loss"}, start_time)

    def create_optimizer(self, model=None):
        """The optimiser over `parameter_groups`."""
        model = self.model if model is None else model
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = kind(parameter_groups(model, self.heal), **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The schedule of `rate_at`, by steps or by the clock."""
        if self.lr_scheduler is None:
            steps, heal, clock = num_training_steps, self.heal, self.clock

            def factor(step: int) -> float:
                # With the clock, the fraction at the beginning of the step; `HealCallback` corrects it before the end.
                return rate_at(clock.fraction if clock.limit else (step + 0.5) / steps, heal.warmup)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)  # `Rows` has shuffled them

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Save the parameters that train, with any engine. If they are sharded, every process must call this."""
        tensors = {
            name: each.contiguous()
            for name, each in sharding.trainable_tensors(self.accelerator.unwrap_model(self.model))
        }
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(tensors, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        model = self.accelerator.unwrap_model(model or self.model)
        known = {name: p for name, p in model.named_parameters() if p.requires_grad}
        stored = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        if stored.keys() != known.keys():
            what = "the checkpoint holds other parameters than those that train"
            raise TrainingError(what, where=str(resume_from_checkpoint), fix="start again with --overwrite")
        for name, tensor in stored.items():
            sharding.put(known[name], tensor)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                sharded = sharding.Engine.here().sharded
                record = {"step": self.state.global_step, "seconds": self.clock.seconds, "ended": self.ended}
                complete(folder, **record, shared=list(sharded))
        if self.args.should_save:
            keep_newest(folder.parent, self.heal.keep_checkpoints)


def _is_router(name: str) -> bool:
    """Whether a parameter of this name is one of a gate."""
    return any(router in name for router in ROUTERS)


def _router_trains(module) -> bool:
    """Whether the load of an attention module's router of moh changes in the training."""
    if module.surgery_gate.kind != "moh":
        return False
    queries = module.q_proj.parameters() if module.surgery_gate.router == "norm" else ()
    return any(parameter.requires_grad for parameter in (*parameters_of(module).values(), *queries))


def predicted(labels: torch.Tensor) -> torch.Tensor:
    """The number of tokens that labels [rows, length] predict."""
    return predicts(labels).sum()


def parameter_groups(model, heal: Heal) -> list[dict]:
    """The parameters that train, in groups with their own learning rate and weight decay.

    The groups are matrices, vectors, and the surgery's own logits and scalars.
    """
    groups = {"matrices": [], "vectors": [], "scalars": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            leaf = name.rpartition(".")[2]
            scalar = leaf.startswith(SURGERY) and leaf not in WEIGHTS_OF_PROJECTIONS
            matrix = parameter.ndim > 1 and ".parametrizations.bias." not in name  # of several heads a bias has more
            groups["scalars" if scalar else "matrices" if matrix else "vectors"].append(parameter)
    settings = {
        "matrices": {"lr": heal.rate, "weight_decay": heal.weight_decay},
        "vectors": {"lr": heal.rate, "weight_decay": 0.0},
        "scalars": {"lr": SCALAR_RATE * heal.rate, "weight_decay": 0.0},
    }
    return [{"params": params} | settings[name] for name, params in groups.items() if params]


def arguments(heal: Heal, run: Path, steps: int, processes: int, vocabulary: int = 0) -> TrainingArguments:
    """The Trainer's arguments; raises as `rows_each`."""
    rows = rows_each(heal, processes)
    micro = micro_rows(rows, heal.length, vocabulary)
    result = TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        learning_rate=heal.rate,
        max_grad_norm=heal.clip,
        bf16=use_bfloat16(heal),
        use_cpu=on_cpu(),
        logging_strategy="no" if heal.report_to == "none" else "steps",
        logging_steps=1,
        report_to=heal.report_to,
        save_strategy="steps" if heal.checkpoint_every else "no",
        save_steps=heal.checkpoint_every or 1,
        seed=heal.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_broadcast_buffers=False,  # buffers are the same in all processes, and mixed heads are large
        label_names=["labels"],
    )
    # With several GPUs, one process would run copies of the model, and their gates would be lost.
    result._n_gpu = min(1, result.n_gpu)
    return result


COMPLETE = "complete.json"
WEIGHTS = "trainable.safetensors"


def complete(folder: Path, **record) -> None:
    """Mark a checkpoint as complete, with a record of it."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / COMPLETE, record | {"files": sizes})


def checkpoint_record(folder: Path) -> dict | None:
    """The record that `complete` wrote; None for an incomplete checkpoint."""
    with suppress(OSError, ValueError, KeyError, AttributeError):
        record = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        if all((folder / name).stat().st_size == size for name, size in record["files"].items()):
            return record
    return None


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _all(run) if checkpoint_record(path) is not None]


def remove_cut_off(run: Path) -> None:
    """Remove incomplete checkpoints, which a kill leaves: the Trainer would write into them again."""
    for path in _all(run):
        if checkpoint_record(path) is None:
            shutil.rmtree(path)


def keep_newest(run: Path, count: int) -> None:
    """Remove all but the newest complete checkpoints. COMPLETE is removed first: a folder without it is ignored."""
    for path in complete_checkpoints(run)[:-count]:
        (path / COMPLETE).unlink()
        shutil.rmtree(path)


def _all(run: Path) -> list[Path]:
    folders = [path for path in run.glob("checkpoint-*") if path.is_dir() and re.fullmatch(r"\d+", _step(path))]
    return sorted(folders, key=lambda path: int(_step(path)))


def _step(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A context for writing a checkpoint. If this fails, its folder is removed, and the error names what remains.

    Raises:
        MachineError: the disk is full, or the system refuses to write.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        full = disk_full(error)
        if not full and not isinstance(error, OSError):
            raise
        checkpoints = complete_checkpoints(folder.parent)
        raise MachineError(
            f"a checkpoint could not be written: {'the disk is full' if full else error}",
            where=str(folder),
            exists=f"the last whole checkpoint is {checkpoints[-1].name}" if checkpoints else "no checkpoint yet",
            fix="free some space, then run the same command with --resume",
        ) from error


def rate_at(fraction: float, warmup: float) -> float:
    """The learning rate as a share of its maximum: it rises to 1 during `warmup`, and then falls to 0 as a cosine.

    Args:
        fraction: the share of the training that is over, 0 to 1.
    """
    if fraction < warmup:
        return fraction / warmup
    over = min(1.0, (fraction - warmup) / (1 - warmup))
    return 0.5 * (1 + math.cos(math.pi * over))


class Clock:
    """A clock of the training's seconds, including those before a resume.

    Args:
        minutes: when the time is over; None: never.
    """

    def __init__(self, minutes: float | None = None):
        self.limit = None if minutes is None else 60 * minutes
        self.earlier, self.began = 0.0, time.monotonic()

    def start(self, earlier: float = 0.0) -> None:
        """Start counting at `earlier`, the seconds of training before a resume."""
        self.earlier, self.began = earlier, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.earlier + time.monotonic() - self.began

    @property
    def fraction(self) -> float:
        """The share of the time that is over; only with a limit."""
        return min(1.0, self.seconds / self.limit)


class Rows(torch.utils.data.Dataset):
    """`count` rows of a data set in shuffled rounds. The n-th row is the same in every process and run.

    Rows in which something comes back (`Packed.repeating`) are spread evenly among the others, so that every step and
    every short training has its share of them.

    Args:
        packed: rows by index.
        count: total number of rows. When all rows of the data are used, the next round begins, shuffled again.
        seed: the seed of the order.
    """

    def __init__(self, packed, count: int, seed: int):
        self.packed, self.count, self.seed = packed, count, seed
        self._round: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return self.packed[self.row(index)]

    def row(self, index: int) -> int:
        """The row of the data at an index of the shuffled rounds."""
        round_index, position = divmod(index, len(self.packed))
        if self._round[0] != round_index:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + round_index)
            order = torch.randperm(len(self.packed), generator=generator).tolist()
            self._round = (round_index, _spread(order, getattr(self.packed, "repeating", None)))
        return self._round[1][position]


def _spread(order: list[int], repeating: torch.Tensor | None) -> list[int]:
    """The order with the repeating rows evenly among the others; each kind keeps its order."""
    if repeating is None or not repeating.any():
        return order
    marks = repeating.tolist()
    plain, others = ([row for row in order if marks[row] == kind] for kind in (False, True))
    rows, count = len(order), len(others)
    due = [(2 * position * count + rows) // (2 * rows) for position in range(rows + 1)]  # of the first rows, rounded
    return [others[due[i]] if due[i + 1] > due[i] else plain[i - due[i]] for i in range(rows)]
