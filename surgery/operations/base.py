"""What an operation is: pydantic fields (the YAML keys), plus problems, plan and a rewrite or an apply.

A new weight rewrite is one file: a subclass of `WeightRewrite` in surgery/operations/<op>.py (`expand.py` is a short
one), or in a package of yours under the entry-point group `surgery.operations`. An operation with several methods,
each with fields of its own, is a union of classes: see `variants.py`.

    member                     of whom             what for
    op, fields                 all                 the keys of a recipe; `op: Literal["name"] = "name"`
    plan                       all                 what changes, before -> after
    rewrite                    WeightRewrite       new weights of one layer from the old ones
    apply                      other operations    edit a loaded model in place
    summary, LIMITATIONS       optional            a line for `surgery ls`; sentences for the model card
    problems                   optional            why it cannot be applied to this model
    term, term_layers          optional            which term of the equation it sets, where: two in one place conflict
    problems_before            optional            why it does not go with the surgery that a checkpoint has already
    problems_after             optional            why what it set cannot stand after a later operation
    carries_terms              optional            terms of earlier operations that a weight change takes along
    rewritten_projections      optional            what healing in parts trains
    limitations, streams       optional            where these depend on the settings
    unchanged_within           optional            tokens of a sequence that it leaves as they are in the base
    milder                     optional            a setting that changes less, for a result that lost too much
    purpose, start_only        optional            where `surgery ls` lists its recipes; whether training must follow
    usual_tier                 optional            the tier of the result, as far as the settings tell
    in_words                   optional            what it did, for the title and the first paragraph of the model card
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from surgery.errors import ModelMismatchError, SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer
    from surgery.machine.progress import Progress

NATIVE, SURGICAL = "native", "surgical"
PURPOSES = {  # what people want an operation for -> heading of `surgery ls`, in its order
    "cache": "A smaller KV cache",
    "prompt": "Faster long prompts",
    "quality": "A better model",
    "training": "A start for training, or trained",
    "exact": "Exact, or a building block",
}
TEXTS = ("builtin", "self", "mixed")  # calibration texts that are no files


@dataclass(frozen=True)
class Measurement:
    """A stage in which an operation measures or fits, for the time and memory that `plan` gives.

    Attributes:
        stage: as progress reports it.
        flops: floating-point operations, in float32 (one in float64 counts as two).
        memory: bytes beside the model.
        seconds: where the clock ends it, or nothing else is known; counts in place of `flops`.
    """

    stage: str
    flops: float
    memory: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class PlannedChange:
    """What one operation will do.

    Attributes:
        after: the anatomy that results.
        lines: what changes, for people ("KV heads 3 → 1 in 30 layers, mean").
        tier: NATIVE (a stock checkpoint) or SURGICAL (needs the runtime that travels with it).
        notes: what is lost, guessed or worth knowing.
        seconds: rough time of the computation on a laptop, beyond reading, writing and `measurements`.
        measured: what each layer becomes is known only when the model was measured; `after` has the right totals.
        parameters: numbers that the surgery adds to the weights (routers, gammas, virtual keys).
        measurements: what it measures or fits, in order.
    """

    after: Anatomy
    lines: tuple[str, ...]
    tier: str = NATIVE
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    measured: bool = False
    parameters: int = 0
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True)
class InWords:
    """What an operation did to a model, for somebody who reads its card on the Hub.

    Attributes:
        title: what the model has now; it follows "MODEL with" ("1 KV head (GQA, was 3)").
        done: a sentence that says what was done to it.
        gain: a sentence on what it saves besides cache and weights, which the card counts itself; "": nothing.
        use: a sentence that says what it is good for, where it was not damaged.
        avoid: a sentence that says who should not use it, damaged or not.
    """

    title: str
    done: str
    gain: str = ""
    use: str = ""
    avoid: str = ""


@dataclass
class ApplyContext:
    """What `apply` is given besides the model.

    Attributes:
        change: what was planned for it.
        before: the model's anatomy.
        progress: called with done, total and a label; None: nobody asks.
        tokenizer: None: there is none (`tokenizer_for` says so to the user).
        after: set by an operation that knows what results only when it has measured: the next one meets it.
        folder: where a long measurement may keep files that end in ".state", from which a stopped run goes on.
        number: which operation of the recipe this is, from 0: two of a kind keep files of their own.
    """

    change: PlannedChange
    before: Anatomy
    progress: Progress | None = None
    tokenizer: Any = None
    after: Anatomy | None = None
    folder: Path | None = None
    number: int = 0

    def state_name(self, name: str) -> str:
        """What this operation calls a file of that kind: two operations of a recipe have files of their own."""
        return f"{self.number}-{name}"

    def state_file(self, name: str) -> Path | None:
        """The file of that kind for this operation; None where nothing is kept."""
        from surgery.io.resume import SUFFIX

        return self.folder and self.folder / f"{self.state_name(name)}{SUFFIX}"

    def tokenizer_for(self, what: str, where: str, otherwise: str = "") -> Any:
        """The tokenizer.

        Args:
            what: the error where there is none: what needs it.
            where: what the error is found in: the operation's `op`.
            otherwise: what works without it, in words after the way to give it.

        Raises:
            SurgeryError: there is none, or it has more tokens than the model.
        """
        if self.tokenizer is None:
            fix = f"surgery.apply(recipe, model, tokenizer=tokenizer){otherwise}"
            raise SurgeryError(what, where=where, fix=fix)
        known, tokens = self.before.config.get_text_config().vocab_size, getattr(self.tokenizer, "vocab_size", 0)
        if tokens > known:
            what = f"the tokenizer has {tokens:,} tokens, the model knows {known:,}"
            raise ModelMismatchError(what, where=where, fix="use the tokenizer of this model")
        return self.tokenizer


# What goes with a head that a weight change leaves or silences: every term of the equation but its gate.
TERMS_OF_A_HEAD = ("visibility", "visibility in prefill", "visibility of the cache", "bias", "virtual keys")
RENAMED = {  # members of an operation that had other names before -> the present ones
    "caveats": "LIMITATIONS or limitations()",
    "follows_terms": "carries_terms",
    "limits": "LIMITATIONS or limitations()",
    "problems_later": "problems_after",
    "problems_of_checkpoint": "problems_before",
    "touches": "rewritten_projections",
}


def missing_texts(operation: Operation) -> list[str]:
    """Problems of the calibration texts that an operation names: each must be a file or one of `TEXTS`."""
    problems = []
    for field in ("text", "calibration_text"):
        text = getattr(operation, field, None)
        if isinstance(text, str) and text not in TEXTS and not os.path.isfile(text):
            words = "; ".join((*TEXTS, "a UTF-8 text file"))
            problems.append(f"{operation.op}: {field}: no such text file: {text!r} (available: {words})")
    return problems


WholeNumber = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1, strict=True)]  # what every generator takes


class Operation(BaseModel):
    """Base of all operations. Fields are the recipe's keys; each has a description, which `surgery ls` prints.

    Values are taken as YAML gives them (strict): true and '16' are no numbers, 9.0 is no whole number. Which members
    one must define, and which it may, is in the module's head.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        own = cls.__mro__[: cls.__mro__.index(Operation)]
        if old := next((name for name in RENAMED if any(name in vars(each) for each in own)), None):
            what = f"{cls.__name__} defines {old}, which nothing asks any more: it is {RENAMED[old]} now"
            raise TypeError(f"{what}; give a member of another meaning another name")

    op: str
    summary: ClassVar[str] = ""
    LIMITATIONS: ClassVar[tuple[str, ...]] = ()  # sentences for the card: what it costs or does not do
    # Of the equation, as the runtime's part calls it (`Part.terms`): "visibility", "visibility in prefill",
    # "visibility of the cache", "bias", "virtual keys", "gate"; None: weights.
    term: ClassVar[str | None] = None
    carries_terms: ClassVar[tuple[str, ...]] = ()  # of a weight change: terms set before it that it takes along

    purpose: ClassVar[str] = "exact"  # one of PURPOSES

    def limitations(self) -> tuple[str, ...]:
        """Those of `LIMITATIONS` that hold with these settings."""
        return self.LIMITATIONS

    def in_words(self, changes: Sequence[str]) -> InWords | None:
        """What it did, for the card; None where the changes say nothing of it.

        Args:
            changes: `PlannedChange.lines` of all operations of the recipe, as surgery.json keeps them.
        """
        return None

    @property
    def start_only(self) -> bool:
        """Whether the result is meant to be trained: it is no usable model as it is."""
        return self.purpose == "training"

    @property
    def usual_tier(self) -> str:
        """NATIVE or SURGICAL, as far as the settings tell it; for a given model `plan` knows."""
        return NATIVE if self.term is None else SURGICAL

    @property
    def streams(self) -> bool:
        """Whether the new weights follow from the old ones alone, layer by layer (`WeightRewrite.rewrite`)."""
        return False

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        """Which of the projections "q", "k", "v", "o" have other weights afterwards: healing in parts trains them."""
        return ()

    @property
    def unchanged_within(self) -> int:
        """A sequence of so many tokens gives the base's outputs, whatever the weights; 0: every token may change.

        Shorter rows can neither judge nor heal what it does.
        """
        return 0

    def milder(self) -> str:
        """A setting, "key=value", that changes less: for a user whose result lost too much. "": none is known."""
        return ""

    def problems(self, anatomy: Anatomy) -> list[str]:
        """Why this cannot be applied to such a model, in words that say what would work."""
        return []

    def problems_before(self, earlier: Anatomy) -> list[str]:
        """Why this does not go with the surgery that the checkpoint has from before this recipe."""
        return []

    def problems_after(self, later: Anatomy) -> list[str]:
        """Why what this has set cannot stand in a model that a later operation has made into `later`."""
        return []

    def term_layers(self, anatomy: Anatomy) -> set[int]:
        """The layers whose `term` it sets: two operations may set one term, in different layers."""
        return set(range(len(anatomy.layers)))

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        """What changes, before -> after. Called only when there are no problems."""
        raise TypeError(f"operation {self.op} defines no plan")

    def apply(self, model: PreTrainedModel, context: ApplyContext) -> dict[str, Any]:
        """Edit a loaded model in place.

        Returns:
            A record of what was done, for surgery.json: plain data, or {}.
        """
        raise TypeError(f"operation {self.op} defines no apply")


class WeightRewrite(Operation):
    """An operation whose new weights follow from the old ones alone: it streams, and its result is native.

    One that has settings for which this does not hold says so in `streams`, and has an `apply` for them.
    """

    @property
    def streams(self) -> bool:
        return True

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ("q", "k", "v", "o")

    def rewrite(self, layer: AttentionLayer, target: LayerAnatomy) -> tuple[AttentionLayer, dict[str, Any]]:
        """New weights of one layer.

        Args:
            layer: the old weights, on the CPU in memory of their own.
            target: the anatomy that the result must have.

        Returns:
            The new layer (its `anatomy` is `target`) and a record of choices worth keeping, or {}.
        """
        raise TypeError(f"operation {self.op} defines no rewrite")

    def apply(self, model: PreTrainedModel, context: ApplyContext) -> dict[str, Any]:
        from surgery.operations.rewrite import rewrite_model

        return rewrite_model(model, self, context)


def search_lines(pattern: str, lines: Sequence[str]) -> list[re.Match[str]]:
    """The first match of a pattern in each line that has one."""
    return [found for line in lines if (found := re.search(pattern, line))]


def whole_keys(values: Any) -> Any:
    """The same value with decimal keys as whole numbers, at every depth: JSON has text keys alone, so "3" is 3."""
    if not isinstance(values, dict):
        return values
    keys = {key: int(key) if isinstance(key, str) and key.isdecimal() else key for key in values}
    return {keys[key]: whole_keys(value) for key, value in values.items()} if _different(keys) else values


def _different(keys: dict[Any, Any]) -> bool:
    return len({*keys.values()}) == len(keys)
