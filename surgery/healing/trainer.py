"""The training loop: Transformers' Trainer with the loss of a teacher, checkpoints that survive any kill, and a clock.

A checkpoint keeps the parameters that train, whatever the method, and what the Trainer adds: optimiser, schedule,
random numbers. From it a run on a CPU goes on to the same weights, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from surgery.data.packing import arguments as called_with
from surgery.errors import TrainingError
from surgery.healing import losses, sharding
from surgery.healing.checkpoints import WEIGHTS, complete, keep_newest, whole, writing
from surgery.healing.contexts import anew, use_bfloat16
from surgery.healing.parameters import SURGERY
from surgery.healing.plan import micro_rows, rows_each
from surgery.healing.processes import on_cpu
from surgery.healing.schedule import Clock, rate_at
from surgery.runtime.surgery_gates import ROUTERS, load_balance_loss

if TYPE_CHECKING:
    from surgery.config.heal import Heal
    from surgery.healing.teacher import Teacher

# A logit or a log-weight moves by far less than a weight of a projection that has as much effect.
SCALAR_RATE = 10.0
MATRICES = tuple(name for name in ROUTERS if name in ("surgery_router", "surgery_shared_router", "surgery_balance"))


class HealTrainer(Trainer):
    """A Trainer whose loss is a teacher's, a mean over the tokens that a step predicts.

    Args:
        heal: the settings.
        plain: the Transformers model, which adapters may be around.
        teacher: gives the loss and its parts.
        clock: counts the seconds; ends the training where `heal.minutes` says so.
        in_memory: there is no run that could be begun anew.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args, heal: Heal, plain, teacher: Teacher, clock: Clock, in_memory: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.heal, self.plain, self.teacher, self.clock, self.in_memory = heal, plain, teacher, clock, in_memory
        self.ended = ""  # by what, before its last step
        self.model_accepts_loss_kwargs = True  # else the Trainer would divide by the forwards of a step again
        self.routed = any("surgery_router" in name and p.requires_grad for name, p in self.model.named_parameters())
        self.sums: dict[str, float] = {}
        self.means: dict[str, float] = {}
        self.norm = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the tokens of a step: this forward's share of it."""
        try:
            outputs = model(**called_with(type(self.plain), inputs, self.heal.hidden > 0))
        except ValueError as error:  # a router is worked out from what was NaN before the loss is
            if "not finite" not in str(error):
                raise
            self._stop(str(error).partition(":")[0])
        loss, parts = self.teacher.loss(outputs, inputs, self.heal, num_items_in_batch)
        if self.routed and self.heal.balance:
            share = predicted(inputs["labels"]) / num_items_in_batch
            balance = share * load_balance_loss(self.plain).to(loss.device)
            parts = parts | {"balance": balance.item()}
            loss = loss + self.heal.balance * balance
        if not loss.isfinite():
            self._stop("the loss is not a number")
        for name, value in (parts | {"loss": loss.item()}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        loss = loss * self.accelerator.num_processes  # their gradients are averaged, and this is a part of a sum
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Tokens predicted in a step, over all its forwards and processes."""
        count = sum(predicted(batch["labels"]) for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(count, device=device), reduction="sum")

    def step_means(self) -> dict[str, float]:
        """Loss and its parts of the step that ended, means over its tokens in all processes."""
        names, values = zip(*sorted(self.sums.items()), strict=True)
        totals = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.args.device), "sum")
        self.sums, self.means = {}, dict(zip(names, totals.tolist(), strict=True))
        return self.means

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if norm is None:  # DeepSpeed knows it after the step
            return norm
        self.norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not torch.isfinite(torch.tensor(self.norm)):  # the next step would spoil every weight
            self._stop("the gradient is not a number")
        return norm

    def _stop(self, what: str) -> None:
        kept = whole(Path(self.args.output_dir))
        there = "" if self.in_memory else "no checkpoint yet"
        raise TrainingError(
            f"{what} in step {self.state.global_step + 1}",
            where="heal",
            exists=f"the last good checkpoint is {kept[-1]}" if kept else there,
            fix=f"a lower heal.learning_rate (now {self.heal.rate:g}), heal.precision=float32, or other data"
            + anew(self.in_memory),
        )

    def log(self, logs, start_time=None) -> None:
        super().log(logs | {name: mean for name, mean in self.means.items() if name != "loss"}, start_time)

    def create_optimizer(self, model=None):
        model = self.model if model is None else model
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = kind(parameter_groups(model, self.heal), **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            steps, heal, clock = num_training_steps, self.heal, self.clock

            def factor(step: int) -> float:
                # By the clock, what is known when the step begins; `Follow` knows better before it ends.
                return rate_at(clock.fraction if clock.limit else (step + 0.5) / steps, heal.warmup)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)  # `Rows` has shuffled them

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """What trains, of whatever engine: where processes hold a part each, all of them give theirs."""
        tensors = {
            name: each.contiguous() for name, each in sharding.training(self.accelerator.unwrap_model(self.model))
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
            raise TrainingError(what, where=str(resume_from_checkpoint), fix="start anew with --overwrite")
        for name, tensor in stored.items():
            sharding.put(known[name], tensor)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shared = sharding.Engine.here().shared
                facts = {"step": self.state.global_step, "seconds": self.clock.seconds, "ended": self.ended}
                complete(folder, **facts, shared=list(shared))
        if self.args.should_save:
            keep_newest(folder.parent, self.heal.keep_checkpoints)


def predicted(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens of [rows, length] are predicted."""
    return losses.predicts(labels).sum()


def parameter_groups(model, heal: Heal) -> list[dict]:
    """What trains, by learning rate and weight decay: matrices; vectors; the surgery's own logits and scalars."""
    groups = {"matrices": [], "vectors": [], "scalars": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            leaf = name.rpartition(".")[2]
            scalar = leaf.startswith(SURGERY) and leaf not in MATRICES
            groups["scalars" if scalar else "matrices" if parameter.ndim > 1 else "vectors"].append(parameter)
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
    made = TrainingArguments(
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
        ddp_broadcast_buffers=False,  # they are alike everywhere, and the heads that are mixed are large
        label_names=["labels"],
    )
    made._n_gpu = min(1, made.n_gpu)  # several GPUs of one process would run copies of the model, whose gates are lost
    return made
