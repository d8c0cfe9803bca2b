"""The plan of a healing: what trains, for how long, and estimates of memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from surgery.calibration.cost import GRADIENT
from surgery.errors import SettingError, TrainingError, UnsupportedModelError
from surgery.healing import losses
from surgery.healing.distributed import Engine
from surgery.healing.parameters import Table, TrainableParameters, count_of, select_trainable, summed_up
from surgery.healing.sparse_attention import plan_lines, refuse_without_sparse, switch_step
from surgery.io.printing import Printed
from surgery.operations.base import Measurement

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.config.heal import Heal

WIDTHS = 16, 4  # activations of a token that a layer keeps for its gradient, in hidden sizes and in intermediate sizes
MOMENTS = 2  # AdamW keeps two moments of each parameter
MICRO_TOKENS = 4096  # most tokens of one forward
# Most values of one forward's logits: 1 GiB in float32. Their gradient and a teacher's logits are as large.
MICRO_LOGITS = 1 << 28


@dataclass(frozen=True, repr=False)
class HealPlan(Printed):
    """The plan of a healing for one model. `print(plan)` shows it in a few lines.

    Attributes:
        trained: the parameters that train.
        parameters: number of the model's parameters.
        base_parameters: number of the base's parameters if the base is in memory too, else 0.
        engine: the engine of the processes.
        mixing: table of the mixing weights, which are no parameters of the result.
        mixed: how many numbers the mixed heads of the base have, which are in memory during the training.
        note: a note for the user on the rows, or "".
        attention: lines on the attention of a model with sparse prefill.
        fitted: how many numbers the layer-wise start fits.
        started: how many of them do not train afterwards, or only by low-rank updates.
    """

    heal: Heal
    trained: TrainableParameters
    parameters: int
    base_parameters: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    mixing: Table = field(default_factory=dict)
    mixed: int = 0
    engine: Engine = field(default_factory=Engine)
    note: str = ""
    attention: tuple[str, ...] = ()
    fitted: int = 0
    started: int = 0

    @classmethod
    def of(
        cls,
        heal: Heal,
        anatomy: Anatomy,
        table: Table,
        rewritten: frozenset[str],
        more: int = 0,
        *,
        base: Anatomy | None = None,
        operations: Sequence[dict] = (),
        note: str = "",
        engine: Engine | None = None,
    ) -> HealPlan:
        """The plan for a converted model; arguments as for `select_trainable`.

        Args:
            base: anatomy of the model before the surgery; None if unknown.
            operations: the operations of the surgery, from its record or its recipe.
            note: see the attribute.
            engine: default the engine that launched this process.

        Raises:
            SurgeryError: as `select_trainable` and `weighted_gqa.merges` raise it.
        """
        engine = engine or Engine.here()
        config = anatomy.config.get_text_config()
        mixing, mixed = _mixing(heal, anatomy, base, operations)
        hidden = getattr(config, "hidden_size", 0) or 0
        trained = select_trainable(heal, anatomy, table | mixing, rewritten, more=more)
        _refuse_long_rows(heal, config)
        _refuse_alternating(heal, operations, trained, engine, more)
        refuse_without_sparse(heal, anatomy)
        paths = tuple(layer.path for layer in anatomy.layers)
        fitted = [name for name in (*trained.parameters, *trained.started) if name.startswith(paths)]
        _refuse_start(heal, operations, fitted, more)
        return cls(
            heal,
            trained,
            sum(prod(shape) for _, shape in table.values()) + more,
            base.parameters if base is not None and heal.needs_base else 0,
            hidden,
            getattr(config, "intermediate_size", None) or 4 * hidden,
            len(anatomy.layers),
            getattr(config, "vocab_size", 0) or 0,
            mixing,
            mixed,
            engine,
            note,
            plan_lines(heal, anatomy),
            count_of(fitted, table | mixing) if heal.warm_start else 0,
            count_of(trained.started, table),
        )

    @property
    def mixing_count(self) -> int:
        """How many mixing weights there are."""
        from surgery.healing.weighted_gqa import weights_of

        return weights_of(self.mixing)

    @property
    def micro_tokens(self) -> int:
        """Tokens of one forward in one process."""
        rows = max(1, self.heal.rows // self.engine.processes)
        return micro_rows(rows, self.heal.length, self.vocabulary) * self.heal.length

    @property
    def memory(self) -> dict[str, int]:
        """Bytes in each process, in float32: a shard of what the engine shards, and all of the rest.

        In bfloat16, activations take half as much. The backward pass then reads rounded copies of the frozen weights,
        which take half as much as these weights.
        """
        shards = self.engine.shards
        layer = 4 * (WIDTHS[0] * self.hidden + WIDTHS[1] * self.intermediate)
        stored = layer + 4 * self.layers * self.hidden if self.heal.gradient_checkpointing else layer * self.layers
        return {
            "weights": -(-4 * self.parameters // shards("weights")) + 4 * self.mixed,
            # The layer-wise start has a copy and two moments of what it fits, and is over before the training.
            "layer-wise start": max(0, 4 * (1 + MOMENTS) * (self.fitted - self.trained.count)),
            "gradients": -(-4 * self.trained.count // shards("gradients")),
            "optimizer": -(-4 * MOMENTS * self.trained.count // shards("optimizer")),
            "base": 4 * self.base_parameters,
            "activations": self.micro_tokens * stored,
            "logits": self.micro_tokens * 4 * self.vocabulary * (3 if self.base_parameters else 2),
        }

    @property
    def memory_bytes(self) -> int:
        """Total bytes of one process."""
        return sum(self.memory.values())

    @property
    def teacher_bytes(self) -> int:
        """Most bytes of a stored teacher on disk (repeated rows are stored once); 0 with the clock: it is unknown."""
        heal = self.heal
        if heal.teacher != "stored" or not heal.planned_steps:
            return 0
        return heal.planned_steps * heal.rows * heal.length * token_bytes(heal.top_k, self.vocabulary)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint on disk: the parameters that train and AdamW's moments, in float32."""
        return 4 * (1 + MOMENTS) * self.trained.count

    @property
    def disk_bytes(self) -> int:
        """Bytes of the checkpoints that are on disk at the same time, with what the layer-wise start alone changed."""
        checkpoints = self.checkpoint_bytes * (self.heal.keep_checkpoints + 1) if self.heal.checkpoint_every else 0
        return checkpoints + 4 * self.started

    def measurements(self) -> tuple[Measurement, ...]:
        """The stages of the training, for the time estimate of `plan`. Reading data from files is not counted."""
        from surgery.data.documents import share_of_base

        heal, steps = self.heal, self.heal.planned_steps
        tokens = (steps or 0) * heal.rows * heal.length
        base = self.base_parameters or self.parameters
        stages = [Measurement("training text", 3 * base * share_of_base(heal, tokens))]
        if heal.loss_needs and heal.teacher == "stored":
            stages.append(Measurement("answers of the base", 2 * base * tokens))
        if heal.warm_start:
            stages.append(Measurement("fitting layer by layer", (GRADIENT + 1) * 2 * base * heal.warm_start))
        live = 2 * base * tokens if heal.loss_needs and heal.teacher == "live" else 0
        seconds = 0.0 if steps else 60 * (heal.minutes or 0)
        return *stages, Measurement("training", GRADIENT * 2 * self.parameters * tokens + live, seconds=seconds)

    @property
    def lines(self) -> list[str]:
        """The plan in words, a line each."""
        heal = self.heal
        how_long = (
            f"{heal.planned_steps:,} steps of {heal.rows * heal.length:,} tokens"
            if heal.planned_steps
            else f"{heal.minutes:g} minutes"
        )
        low_rank = (
            f", updates of rank {heal.rank} on {len(self.trained.adapted)} matrices" if self.trained.adapted else ""
        )
        share = f" ({self.trained.count / self.parameters:.1%} of the model)" if self.parameters else ""
        mixing = []
        if self.mixing:
            each = {"row": "input channel and head"}.get(heal.mixing, heal.mixing)
            beside = "; these heads train beside" if heal.mixing_heads == "train" else ""
            mixing.append(
                f"heal: {self.mixing_count:,} of them mix the base's K and V heads (one for each {each}), folded "
                f"after{beside}"
            )
        return [
            f"heal ({heal.method}): {self.trained.count:,} parameters train{share}{low_rank}",
            *mixing,
            f"heal: towards {losses.aim(heal.loss)} ({losses.written(heal.loss)}), on "
            f"{', '.join(heal.sources)}, {how_long}, "
            f"learning rate {heal.rate:g}",
            *self.attention,
            *self._further_lines(),
            *([f"note: {self.note}"] if self.note else []),
        ]

    def _further_lines(self) -> list[str]:
        """Lines on settings that few trainings have."""
        heal, lines = self.heal, []
        if heal.recall:
            rows = f", {recalled(heal):,} of {heal.planned_steps * heal.rows:,} rows" if heal.planned_steps else ""
            lines.append(
                f"heal: in {heal.recall:.0%} of the rows something said earlier comes back{rows} (passages, codes, "
                "lists, quotations)"
            )
        if heal.alternate:
            lines.append("heal: gates and experts train in turn, one step each; experts are drawn for each token")
        if heal.sure:
            lines.append(f"heal: a token counts {1 - heal.sure:g} + {heal.sure:g} p, p the base's largest probability")
        if self.started:
            lines.append(
                f"heal: the layer-wise start changes {self.started:,} further parameters of attention, which then "
                f"{'train by low-rank updates or not at all' if self.trained.adapted else 'do not train'}"
            )
        return lines

    def headline(self) -> str:
        heal = self.heal
        return f"{heal.method}: {self.trained.count:,} parameters train, on {', '.join(heal.sources)}"

    def blocks(self) -> list[str]:
        return self.lines

    def to_dict(self) -> dict:
        """The plan as plain data."""
        return {
            "settings": self.heal.model_dump(mode="json"),
            "parameters": self.trained.count,
            "in_full": summed_up(set(self.trained.parameters) - self.mixing.keys()),
            "mixing": self.mixing_count,
            "adapted": len(self.trained.adapted),
            **({"started": self.started} if self.started else {}),
            **({"recall_rows": recalled(self.heal)} if self.heal.recall else {}),
            "steps": self.heal.planned_steps,
            "step_tokens": self.heal.rows * self.heal.length,
            "minutes": self.heal.minutes,
            "full_from_step": switch_step(self.heal),
            "processes": self.engine.processes,
            "engine": self.engine.name,
            "memory_bytes": self.memory_bytes,
            "memory": self.memory,
            "checkpoint_bytes": self.checkpoint_bytes,
            "teacher_bytes": self.teacher_bytes,
        }


def _mixing(heal: Heal, anatomy: Anatomy, base: Anatomy | None, operations: Sequence[dict]) -> tuple[Table, int]:
    """The table of the mixing weights, and how many numbers the mixed heads of the base have."""
    if heal.mixing == "none" or base is None:
        return {}, 0
    from surgery.healing.weighted_gqa import merges, mixing_table, orders_of

    orders_of(operations, anatomy)
    merged = merges(anatomy, base)
    hidden = getattr(base.config.get_text_config(), "hidden_size", 0) or 0
    heads = sum(len(members) for _, _, groups in merged for members in groups)
    table = mixing_table(merged, heal.mixing, hidden, heal.mixing_heads == "train")
    return table, 2 * heads * merged[0][1].head_dim * hidden


def recalled(heal: Heal) -> int:
    """About how many of the rows that a training of known length reads have repeats; 0 where the clock ends it."""
    return round(heal.recall * heal.planned_steps * heal.rows) if heal.planned_steps else 0


def _hard_mae(operations: Sequence[dict]) -> bool:
    return any(fields.get("op") == "mae" and fields.get("hard", True) for fields in operations)


def _refuse_start(heal: Heal, operations: Sequence[dict], fitted: Sequence[str], more: int) -> None:
    """Raise where a layer-wise start would fit nothing; `fitted`: what it fits, `more` as for `select_trainable`."""
    if heal.warm_start and _hard_mae(operations) and all("surgery_router" in name for name in fitted):
        raise SettingError(
            "a layer-wise start has nothing to train: hard gates of mae only choose, and a choice has no gradient",
            where="heal.warm_start",
            fix="heal.warm_start=0",
        )
    if heal.warm_start and not more and not fitted:
        raise SettingError(
            "a layer-wise start has nothing to train: no attention parameter trains but by low-rank updates",
            where="heal.warm_start",
            fix="heal.warm_start=0, heal.method=full, or "
            + ("freeze less" if heal.warm_start_of == "attention" else "heal.warm_start_of=attention"),
        )


def _refuse_long_rows(heal: Heal, config) -> None:
    """Raise where rows are longer than a model of this config has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and heal.length > positions:
        raise SettingError(
            f"rows of {heal.length} tokens are longer than the model, which has {positions} positions",
            where="heal.length",
            fix=f"heal.length={positions}",
        )


def _refuse_alternating(
    heal: Heal, operations: Sequence[dict], trained: TrainableParameters, engine: Engine, more: int
) -> None:
    """Raise where the gates of mae and the rest cannot train in turn; `more` as for `select_trainable`."""
    if not heal.alternate:
        return
    what, fix = "", "heal.alternate=false"
    if not any(fields.get("op") == "mae" for fields in operations):
        what = "this model has no such gates"
    elif not trained.adapted and all("surgery_" in name for name in trained.parameters):
        what, fix = f"with method: {heal.method} nothing but the gates trains", "heal.method=lora, or " + fix
    elif not more and not any("surgery_" in name for name in trained.parameters):
        what, fix = "freeze leaves no gate to train", "freeze less, or " + fix
    elif engine.name.startswith("ZeRO"):  # DeepSpeed steps before the Trainer could leave out a gradient
        what = f"{engine.name} trains all weights in every step"
    if what:
        raise SettingError(
            f"alternate lets the gates of mae and the rest train in turn, and {what}", where="heal.alternate", fix=fix
        )


def refuse_unhealable(anatomy: Anatomy, where: str) -> None:
    """Raise where a model cannot be healed."""
    if anatomy.composite:
        what = "healing trains text models, and this one has other parts (vision + text)"
        raise UnsupportedModelError(what, where=where, fix="heal: null, and train it with a script of its own")


def rows_each(heal: Heal, processes: int) -> int:
    """Rows of a step in each process.

    Raises:
        TrainingError: the rows of a step cannot be shared evenly by the processes.
    """
    rows, left = divmod(heal.rows, processes)
    if left or not rows:
        raise TrainingError(
            f"{processes} processes cannot share the {heal.rows} rows of a step evenly",
            where="heal",
            exists=f"batch_tokens {heal.batch_tokens}, length {heal.length}",
            fix=f"heal.batch_tokens={heal.length * processes * -(-heal.rows // processes)}",
            code="invalid-setting",
        )
    return rows


def token_bytes(top_k: int, vocabulary: int, each: int = 2) -> int:
    """Bytes that `teacher.py` stores for one token: k token ids, and k + 1 probabilities of `each` bytes."""
    count = min(top_k, vocabulary)
    return each * (count + 1) + count * (2 if vocabulary <= 1 << 16 else 4)


def micro_rows(rows: int, length: int, vocabulary: int = 0) -> int:
    """The number of rows in one forward.

    It is the largest divisor of a step's rows with at most MICRO_TOKENS tokens and MICRO_LOGITS logits, and at least
    1. Cutting a step into forwards changes its sums only by rounding. The load-balance loss of routers is an
    exception: the mean over forwards is not the loss of all tokens.
    """
    most = min(MICRO_TOKENS, MICRO_LOGITS // vocabulary if vocabulary else MICRO_TOKENS)
    return max(count for count in range(1, rows + 1) if rows % count == 0 and (count * length <= most or count == 1))
