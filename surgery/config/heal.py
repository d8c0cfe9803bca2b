"""How a converted model is healed: the `heal:` block of a recipe."""

from __future__ import annotations

import json
import math
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from surgery.config.heal_values import Count, Data, Loss, Number, fault
from surgery.data.text import BUILTIN, CONVERSATIONS, RECALL_ROWS, SELF, SHORTEST_RECALL, WRITTEN, source_names
from surgery.errors import any_of
from surgery.healing import losses
from surgery.healing.losses.base import BASE_LOGITS, BASE_STATES
from surgery.operations.variants import Variants

BUDGETS = ("tokens", "steps", "minutes")


class Heal(Variants):
    """Training after the surgery: what trains, on what text, towards what, for how long.

    What the methods share is here; each method is a class below, listed in `METHODS`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    LATER: ClassVar[tuple[str, ...]] = (
        "alternate",
        "freeze",
        "full_from",
        "mixing_heads",
        "recall",
        "self_tokens",
        "sure",
        "warm_start_of",
    )
    RECORDED_AFTER: ClassVar[dict[str, tuple[str, ...]]] = {
        "minutes": ("rank", "alpha", "dropout"),
        "keep_checkpoints": ("keep_adapter",),
    }

    method: str = Field(
        description="lora: low-rank updates of attention and MLP, and in full what the surgery added or rebuilt; "
        "full: all weights; parts: only what the surgery added, and the projections of attention that it rewrote.",
    )
    loss: Loss = Field(
        "distill",
        description="ce: the text's next token; distill: the base's probabilities (KL); both: a mixture. Or the name "
        "of a loss, or weights of losses: {kl: 1, ce: 0.5}.",
    )
    mix: Number = Field(0.5, gt=0, lt=1, description="Weight of ce in loss: both.")
    temperature: Number = Field(1.0, gt=0, le=1000, description="Temperature of the distillation.")
    hidden: Number = Field(0.0, ge=0, description="Weight of the distance of hidden states to the base's; 0: none.")
    sure: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="How much more a token counts where the base is sure: its weight is 1 - sure + sure * p, with the "
        "base's largest probability p (at the temperature). 0: all count the same.",
    )
    mixing: Literal["none", "head", "channel", "row"] = Field(
        "none",
        description="head: merged KV heads are trained as sums of the base's heads with a weight for each (WGQA), and "
        "are plain weights afterwards; channel: a weight for each of their channels; row: a weight for each channel "
        "of the layer's input. With parts, K and V themselves stay as merged; with lora and full they train too.",
    )
    mixing_heads: Literal["frozen", "train"] = Field(
        "frozen",
        description="train: the base's heads in these sums train with their weights, from their mean on, as in WGQA's "
        "paper; nothing else of K and V trains.",
    )
    balance: Number = Field(
        0.01,
        ge=0,
        description="Weight of the load-balance loss of routers that train. It is of one forward's tokens, so that "
        "batch_tokens and processes change it a little.",
    )
    alternate: bool = Field(
        False,
        description="Of mae: steps that train the gates alone, and steps that train all but them with one expert "
        "drawn for each token, take turns (block coordinate descent).",
    )
    full_from: Number | None = Field(
        None,
        ge=0,
        le=1,
        description="Of sparse prefill: share of the training after which attention is full (MoBA: 0.9); null: never.",
    )
    freeze: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Patterns of parameters that do not train although the method would train them, such as "
        "'*surgery_router*' or '*.mlp.*'. embeddings: the token embeddings and the output head.",
    )
    teacher: Literal["live", "stored"] = Field(
        "live",
        description="live: the base runs at each step; stored: once before, keeping its likeliest tokens on disk.",
    )
    top_k: Count = Field(64, ge=1, description="Tokens that a stored teacher keeps of each distribution.")

    data: Data = Field(
        SELF,
        description="self: text that the base writes; conversations: conversations that it writes; builtin: the "
        "calibration part of the built-in text; a text or JSONL file, a folder of them, or a data set of the Hub. A "
        "list of these is read in equal shares.",
    )
    self_tokens: Count | None = Field(
        None,
        ge=1,
        description="With data: self and conversations, about how many tokens the base writes of each. The training "
        "reads them again where the other data end too. null: as many as the training reads; with minutes, a quarter.",
    )
    column: str | None = Field(None, min_length=1, description="Column of the text; default text.")
    chat: bool = Field(False, description="Rows are conversations (with data: self, the base's own).")
    recall: Number = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the rows in which something said earlier comes back: passages, codes, lists and "
        "quotations, made from the same text at all distances of a row; not of conversations that the base writes.",
    )
    length: Count = Field(512, ge=8, description="Tokens of a row; documents are packed into rows.")
    batch_tokens: Count = Field(4096, ge=8, description="Tokens of one step, over all processes.")
    tokens: Count | None = Field(None, ge=1, description="Train on so many tokens (or steps, or minutes).")
    steps: Count | None = Field(None, ge=1, description="Train so many steps.")
    minutes: Number | None = Field(None, gt=0, description="Train so long.")

    # A new low-rank factor starts from zero and tolerates a higher rate than pretrained weights (`Full`).
    learning_rate: Number | None = Field(5e-4, gt=0, description="Highest learning rate.")
    warmup: Number = Field(0.05, ge=0, lt=1, description="Share of the training in which the rate rises.")
    weight_decay: Number = Field(
        0.0, ge=0, description="Of AdamW, on matrices (routers among them); not on biases, norms, sinks and gates."
    )
    clip: Number = Field(1.0, gt=0, description="Largest norm of the gradient.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the products; the weights that train are float32. auto: bfloat16 on a GPU "
        "that has it, and on an x86 CPU that multiplies it (avx512_bf16, amx_bf16).",
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, a third more time.")
    warm_start: Count = Field(
        0, ge=0, description="Tokens on which each layer's attention is first fitted to the base's."
    )
    warm_start_of: Literal["trained", "attention"] = Field(
        "trained",
        description="What that start fits. trained: the parameters of attention that train in full; attention: all of "
        "its projections (q, k, v, o), their biases and norms, from which low-rank updates then begin.",
    )

    eval_every: Count = Field(0, ge=0, description="Score a little held-out text every so many steps; 0: never.")
    stop_at_gate: bool = Field(False, description="Stop when that score passes the recipe's gate.")
    checkpoint_every: Count = Field(50, ge=0, description="Steps between checkpoints; 0: none.")
    keep_checkpoints: Count = Field(2, ge=1, description="Checkpoints that are kept while it trains.")
    report_to: str = Field(
        "none",
        min_length=1,
        description="none, or what the Trainer reports to (tensorboard, ...); it also gets the scores and the gate.",
    )
    seed: Count = Field(0, ge=0, le=2**32 - 1, description="Of data, text, adapters and dropout.")

    @classmethod
    def misplaced(cls, keys: list[str]) -> list[tuple[str, str]]:
        """(key, message) for each of the keys that this method does not read."""
        method, faults = cls.own_method(), []
        for key in keys:
            readers, unset = any_of(cls.readers(key)), json.dumps(cls.unset(key)[0])
            words = f"read by method: {readers}, and this is {method}: drop it, or write {unset}"
            if key == "keep_adapter":  # its message of earlier versions
                words = f"of method: {readers}, this is method: {method}"
            faults.append((key, f"heal.{key} is {words}"))
        return faults

    @model_validator(mode="after")
    def _settings_agree(self) -> Heal:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) != 1:
            named = f"it has {' and '.join(budgets)}" if budgets else "it has none of them"
            raise fault(f"heal names one of tokens, steps, minutes; {named}")
        if self.batch_tokens < self.length:
            raise fault(f"heal.batch_tokens {self.batch_tokens} holds no row of heal.length {self.length}")
        if self.stop_at_gate and not self.eval_every:
            raise fault("heal.stop_at_gate needs heal.eval_every: steps between two scores")
        if self.recall and self.chat:
            raise fault(
                "heal.recall makes rows of running text, and with chat: true rows are conversations",
                fix="heal.chat=false with a text, or heal.recall=0",
            )
        if self.recall and self.sources == [CONVERSATIONS]:
            raise fault(
                "heal.recall makes rows of running text, and data: conversations has none",
                fix="heal.data='[self, conversations]', or heal.recall=0",
            )
        if self.chat and set(WRITTEN) <= set(self.sources):
            raise fault(
                "with heal.chat: true, self is conversations too",
                fix="leave out one of the two, or heal.chat=false",
            )
        if self.chat and self.sources == [CONVERSATIONS]:
            raise fault("heal.chat: true is for other data: conversations are conversations", fix="heal.chat=false")
        if self.recall and self.length < SHORTEST_RECALL:
            raise fault(
                f"heal.length {self.length} is too short for heal.recall: a row should hold lines, text and some of "
                "the lines again",
                fix=f"heal.length={SHORTEST_RECALL}, or heal.recall=0",
            )
        if unused := unread(self.model_dump()):
            raise fault("; ".join(f"heal.{name} is read {by}: {remedy}" for name, (by, remedy) in unused.items()))
        least = self.length * (RECALL_ROWS if self.recall else 1)
        least = least if self.recall else math.ceil(least / len(self.sources))  # of each, where the base writes all
        if set(self.sources) <= set(WRITTEN) and (self.self_tokens or least) < least:
            rows = f"the {RECALL_ROWS} rows that heal.recall needs" if self.recall else "a row"
            raise fault(
                f"heal.self_tokens {self.self_tokens} is fewer than {least:,}, {rows} (heal.length {self.length})",
                fix=f"heal.self_tokens={least} or more, or a shorter heal.length",
            )
        for name in self.weights if self.teacher == "stored" else ():
            if lacking := losses.find(name).not_stored:
                field = "heal.hidden" if self.hidden and name == "hidden" else f"heal.loss: {name}"
                raise fault(f"{field} needs the base's {lacking}, which teacher: stored does not keep")
        return self

    @property
    def rows(self) -> int:
        """Rows of one step, over all processes."""
        return self.batch_tokens // self.length

    @property
    def planned_steps(self) -> int | None:
        """Steps of the training; None if the budget is in minutes."""
        if self.tokens is not None:
            return math.ceil(self.tokens / (self.rows * self.length))
        return self.steps

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or 0.0  # never null: null means the default

    @property
    def keeps_adapter(self) -> bool:
        """Whether the adapter is saved along with the merged weights."""
        return False

    @property
    def weights(self) -> dict[str, float]:
        """The losses that training lowers: name -> weight, in the registry's order; weights of 0 are left out."""
        return _all_weights(self.loss, self.mix, self.hidden)

    @property
    def loss_needs(self) -> frozenset[str]:
        """The outputs of the base that the losses read in every step: BASE_LOGITS, BASE_STATES (`losses.base`)."""
        return _needs_of(self.weights)

    @property
    def reads_states(self) -> bool:
        """Whether a loss reads hidden states."""
        return BASE_STATES in self.loss_needs

    @property
    def reads_probabilities(self) -> bool:
        """Whether a loss reads the base's probabilities."""
        return BASE_LOGITS in self.loss_needs

    @property
    def needs_base(self) -> bool:
        """Whether the training itself reads the base."""
        return bool(self.loss_needs) or self.warm_start > 0 or self.mixing != "none" or self.base_writes

    @property
    def sources(self) -> list[str]:
        """The names in `data`."""
        return source_names(self.data)

    @property
    def base_writes(self) -> bool:
        """Whether the base writes text for the training."""
        return not set(WRITTEN).isdisjoint(self.sources)

    @property
    def base_converses(self) -> bool:
        """Whether some of that text is conversations."""
        return CONVERSATIONS in self.sources or (self.chat and SELF in self.sources)


def unread(fields: dict) -> dict[str, tuple[str, str]]:
    """Fields that all methods share and whose values would not be read: name -> (when it is read, remedy).

    Args:
        fields: values of a `Heal`; a missing field has its default.
    """
    defaults = {name: field.get_default() for name, field in Heal.model_fields.items()}
    loss, teacher, data, hidden = ((defaults | fields)[x] for x in ("loss", "teacher", "data", "hidden"))
    sources = source_names(data) if isinstance(data, str | list) else []  # unchecked settings hold anything
    needs_columns = f"of data with columns (.jsonl, data sets), not of {' and '.join(map(str, sources))}"
    loss_text, weights = losses.written(loss), _all_weights(loss, 0.5, hidden)
    idle = {"mix": f"with loss: both, and this is {loss_text}"} if loss != "both" else {}
    if loss not in list(losses.WORDS):
        idle |= {"hidden": f"with a word as loss ({', '.join(losses.WORDS)}), and this is {loss_text}"}
    if not any(losses.find(name).reads_temperature for name in weights):
        idle |= {"temperature": f"by distillation, and this is loss: {loss_text}"}
    if (defaults | fields)["mixing"] == "none":
        idle |= {"mixing_heads": "with mixing: head, channel or row"}
    if BASE_LOGITS not in _needs_of(weights):
        idle |= {"sure": f"where the base's probabilities are asked, and loss: {loss_text} asks none"}
    if not (defaults | fields)["warm_start"]:
        idle |= {"warm_start_of": "with warm_start (tokens)"}
    if not _needs_of(weights):
        idle |= {"teacher": f"where a teacher is asked, and loss: {loss_text} asks none"}
    idle |= {"top_k": f"with teacher: stored, and this is {teacher}"} if teacher != "stored" else {}
    idle |= {"column": needs_columns} if sources and set(map(str, sources)) <= {*WRITTEN, BUILTIN} else {}
    if set(WRITTEN).isdisjoint(map(str, sources)):
        idle |= {"self_tokens": "with data: self or conversations"}
    changed = [name for name in idle if fields.get(name, defaults[name]) != defaults[name]]
    return {name: (idle[name], f"drop it, or write {json.dumps(defaults[name])}") for name in changed}


def _all_weights(loss: object, mix: float, hidden: object) -> dict[str, float]:
    """Weights of a `loss` and of `hidden`; {} for an invalid `loss`, which unchecked settings may hold."""
    if isinstance(loss, str) and loss in losses.WORDS:
        return losses.weights(losses.weights(loss, mix) | ({"hidden": hidden} if hidden else {}))
    known = isinstance(loss, dict) or (isinstance(loss, str) and loss in losses.LOSSES)
    return losses.weights(loss) if known else {}


def _needs_of(weights: dict[str, float]) -> frozenset[str]:
    return frozenset().union(*(losses.find(name).needs for name in weights))


class Lora(Heal):
    """Low-rank updates of attention and MLP, and in full what the surgery added or rebuilt."""

    method: Literal["lora"] = "lora"
    rank: Count = Field(16, ge=1, description="Rank of the updates.")
    alpha: Number | None = Field(None, gt=0, description="Updates count alpha / rank; default 2 * rank.")
    dropout: Number = Field(0.0, ge=0, lt=1, description="Dropout before the updates.")
    keep_adapter: bool = Field(
        False,
        description="Save the adapter too; it loads on the model as it was before (apply keeps it: OUT.unhealed).",
    )

    @model_validator(mode="after")
    def _no_adapter_with_mixing(self) -> Lora:
        if self.keep_adapter and self.mixing != "none":
            raise fault("heal.keep_adapter: an adapter file would not hold what heal.mixing makes of K and V")
        if self.keep_adapter and self.warm_start_of == "attention":
            raise fault("heal.keep_adapter: an adapter file would not hold what heal.warm_start makes of attention")
        return self

    @property
    def keeps_adapter(self) -> bool:
        """Whether the adapter is saved along with the merged weights."""
        return self.keep_adapter


class Full(Heal):
    """All weights train."""

    method: Literal["full"]
    learning_rate: Number | None = Field(2e-4, gt=0, description="Highest learning rate.")


class Parts(Heal):
    """Only what the surgery added trains, and the projections of attention that it rewrote."""

    method: Literal["parts"]


METHODS = Heal.union(
    Lora,
    Full,
    Parts,
)
