"""The base classes of operations. An operation has pydantic fields (the YAML keys), a plan, and a rewrite or an apply.

A new weight rewrite is one file with a subclass of `WeightRewrite` (`expand.py` is a short example). The file is
surgery/operations/<op>.py, with a line in the registry (`__init__.py`), or it is in another package, which names it in
the entry-point group `surgery.operations`. An operation with several methods, each with its own fields, is a union of
classes: see `variants.py`.

    member                     defined by          purpose
    op, fields                 all                 the keys of a recipe; `op: Literal["name"] = "name"`
    plan                       all                 what changes, before -> after
    rewrite                    WeightRewrite       compute the new weights of one layer from the old weights
    apply                      other operations    edit a loaded model in place
    summary, LIMITATIONS       optional            a line for `surgery ls`; sentences for the model card
    problems                   optional            why it cannot be applied to this model
    term, term_layers          optional            the term of the equation that it sets, and in which layers; no other
                                                   operation may set the same term there
    problems_before            optional            why it cannot follow the surgery that the checkpoint already has
    problems_after             optional            why a later operation would break what it set
    carries_terms              optional            terms of earlier operations that stay valid after its weight change
    rewritten_projections      optional            projections that `rewrite` reads and changes; the others are copied
    limitations, streams       optional            overridden where they depend on the settings
    model_use                  optional            what measuring does with the model: layer by layer, as a whole
    unchanged_within           optional            length up to which a sequence gives the base's outputs
    milder                     optional            a setting that changes less, for a result that lost too much
    ladders                    optional            settings that leave less and less of the KV cache, for `surgery fit`
    purpose, start_only        optional            where `surgery ls` lists its recipes; whether training must follow
    on_latent                  optional            whether it is for latent attention; other operations refuse it
    usual_tier                 optional            the tier of the result, as far as the settings determine it
    in_words                   optional            what it did, for the title and the first paragraph of the model card
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from surgery.calibration.cost import Measurement
from surgery.data.text import CALIBRATION_TEXTS, SHORTEST_RECALL, CalibrationText
from surgery.errors import ModelMismatchError, RecipeMismatchError, SurgeryError
from surgery.machine.placement import LAYERS, Use

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.architecture.weights import AttentionLayer
    from surgery.machine.progress import Progress

NATIVE, SURGICAL = "native", "surgical"
LOADS_WITH = {NATIVE: "native (loads with stock Transformers)", SURGICAL: "surgical (needs the bundled code)"}
PURPOSES = {  # purpose of an operation -> heading in `surgery ls`, in the order of the headings
    "cache": "A smaller KV cache",
    "prompt": "Faster long prompts",
    "decoding": "Faster decoding behind long texts",
    "quality": "Lower perplexity on one kind of text",
    "training": "A start for training, or trained",
    "exact": "Exact, or a building block",
}


@dataclass(frozen=True)
class PlannedChange:
    """What one operation will do.

    Attributes:
        after: the anatomy that results.
        lines: what changes, in words ("KV heads 3 → 1 in 30 layers, mean").
        tier: NATIVE (a stock checkpoint) or SURGICAL (needs the runtime that is saved with it).
        notes: what is lost, guessed or worth knowing.
        seconds: rough time of the computation on a laptop, beyond reading, writing and `measurements`.
        measured: the change of each layer depends on a later measurement; `after` has the right totals.
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
    """The arguments of `apply` besides the model.

    Attributes:
        change: the plan of this operation.
        before: the model's anatomy before the operation.
        progress: called with done, total and a label; None: progress is not reported.
        tokenizer: None if there is none; `tokenizer_for` then raises an error for the user.
        after: set by an operation that knows its result only after measuring. The next operation starts from it.
        folder: where a long measurement may keep files that end in ".state", from which a stopped run resumes.
        number: index of the operation in the recipe, from 0. It keeps the files of two equal operations apart.
    """

    change: PlannedChange
    before: Anatomy
    progress: Progress | None = None
    tokenizer: Any = None
    after: Anatomy | None = None
    folder: Path | None = None
    number: int = 0

    def state_name(self, name: str) -> str:
        """The name of a state file, prefixed by the operation's number: no two operations of a recipe share a file."""
        return f"{self.number}-{name}"

    def state_file(self, name: str) -> Path | None:
        """The path of a state file of this operation; None where nothing is kept."""
        from surgery.io.resume import SUFFIX

        return self.folder and self.folder / f"{self.state_name(name)}{SUFFIX}"

    def tokenizer_for(self, what: str, where: str, otherwise: str = "") -> Any:
        """The tokenizer.

        Args:
            what: text of the error if there is no tokenizer; it names what needs one.
            where: location that the error names, the operation's `op`.
            otherwise: what works without a tokenizer; it is appended to the remedy.

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

    def calibration(
        self, model: Any, text: CalibrationText, where: str, what: str, otherwise: str = ""
    ) -> tuple[Tensor, dict[str, Any]]:
        """Tokens of a calibration text, long [samples, length], and the record of the text.

        Args:
            text: what it is.
            where, what, otherwise: as for `tokenizer_for`.
        """
        from surgery.data.calibration_text import calibration_sequences, calibration_source, with_repeats

        tokenizer = self.tokenizer_for(what, where, otherwise)
        source, length, samples, recall = text
        sequences = calibration_sequences(model, tokenizer, source, length, samples, self.folder, self.progress)
        record = calibration_source(source, samples) | {"tokens": sequences.numel()}
        if not recall:
            return sequences, record
        return with_repeats(sequences, tokenizer, text), record | {"recall": recall}


CalibrationRecall = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        description="Share of the pieces of text in which something said earlier comes back, as with heal.recall. "
        "Plain text has little of that, and a fit to it does not see whether the model copies.",
    ),
]


def recall_problems(op: str, length: int) -> list[str]:
    """Why nothing can come back in pieces of a calibration text of so many tokens."""
    if length >= SHORTEST_RECALL:
        return []
    return [
        f"{op}: calibration_recall: pieces of {length} tokens are too short for something to come back: take "
        f"calibration_length={SHORTEST_RECALL} or more, or calibration_recall=0"
    ]


def recall_notes(share: float) -> list[str]:
    """What `plan` says of a calibration text in which something said earlier comes back."""
    return [f"in {100 * share:.3g}% of the text something said earlier comes back"] if share else []


TERMS = {  # term of the equation -> what it decides, for errors
    "visibility": "which keys a head sees",
    "visibility in prefill": "which keys a prompt reads",
    "visibility in decoding": "which keys a step reads",
    "visibility of the cache": "which keys the cache keeps",
    "bias": "what is added to the scores of some keys",
    "virtual keys": "what is added to the softmax beside the keys",
    "gate": "which heads a token uses",
    "vectors": "what keys and values are made of",
}
# Terms that stay valid for a head that a weight change keeps or silences.
TERMS_OF_A_HEAD = tuple(term for term in TERMS if term not in ("gate", "vectors"))
RENAMED = {  # former name of an operation's member -> present name
    "caveats": "LIMITATIONS or limitations()",
    "follows_terms": "carries_terms",
    "limits": "LIMITATIONS or limitations()",
    "problems_later": "problems_after",
    "problems_of_checkpoint": "problems_before",
    "touches": "rewritten_projections",
    "whole_model": "model_use",
}


def missing_texts(operation: Operation) -> list[str]:
    """Problems with the calibration texts of an operation. Each text must be a file or have a name."""
    problems = []
    for field in ("text", "calibration_text"):
        text = getattr(operation, field, None)
        if isinstance(text, str) and (reason := missing_text(text, operation.TEXTS)):
            problems.append(f"{operation.op}: {field}: {reason}")
    return problems


def missing_text(text: str, names: tuple[str, ...]) -> str:
    """Why there is no such text; "" where it has one of these names, or is a file."""
    if text in names or os.path.isfile(text):
        return ""
    return f"no such text file: {text!r} (available: {'; '.join((*names, 'a UTF-8 text file'))})"


def give_entries(model: Any, layers: list[dict[str, Any]], op: str) -> None:
    """Put the entries of an operation's parts into the layers of a model in memory.

    Raises:
        RecipeMismatchError: they do not fit the model.
    """
    from surgery.runtime.modeling_surgery import patch

    try:
        patch(model, {"layers": layers})
    except ValueError as error:
        raise RecipeMismatchError(f"{op}: {error}", where=type(model).__name__) from None


WholeNumber = Annotated[int, Field(ge=0, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Length = Annotated[int, Field(ge=2, strict=True)]  # in tokens
Seed = Annotated[int, Field(ge=0, le=2**32 - 1, strict=True)]  # the range that every random generator takes


class Operation(BaseModel):
    """Base of all operations. Fields are the recipe's keys; each has a description, which `surgery ls` prints.

    Values keep the types that YAML gives them (strict): true and '16' are not numbers, and 9.0 is not a whole number.
    The module's docstring lists the members that an operation must define, and those that it may define.
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
    # Fields that are newer than some records. A record has them only if they were set, so that its hash stays.
    LATER: ClassVar[tuple[str, ...]] = ()
    TEXTS: ClassVar[tuple[str, ...]] = tuple(CALIBRATION_TEXTS)  # names that `text` and `calibration_text` take
    LIMITATIONS: ClassVar[tuple[str, ...]] = ()  # sentences for the card: what it costs or does not do
    # A term of the equation, by its name in the runtime (`Part.terms`): one of TERMS. None: it changes weights.
    term: ClassVar[str | None] = None
    on_latent: ClassVar[bool] = False
    carries_terms: ClassVar[tuple[str, ...]] = ()  # terms set earlier that stay valid after this weight change

    purpose: ClassVar[str] = "exact"  # one of PURPOSES

    @model_serializer(mode="wrap")
    def _record(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = set(self.LATER) - self.model_fields_set
        return {key: value for key, value in handler(self).items() if key not in left_out}

    def limitations(self) -> tuple[str, ...]:
        """The entries of `LIMITATIONS` that apply to these settings."""
        return self.LIMITATIONS

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        """What the operation did, for the card; None if it changed nothing.

        Args:
            before: the anatomy that it was planned for.
            after: the planned anatomy; where the change is measured, only its totals are right.
            record: what `apply` returned.
        """
        return None

    @property
    def start_only(self) -> bool:
        """Whether the result is only a start for training, and not usable before."""
        return self.purpose == "training"

    @property
    def usual_tier(self) -> str:
        """NATIVE or SURGICAL, as far as the settings determine it. For a given model `plan` determines it."""
        return NATIVE if self.term is None else SURGICAL

    @property
    def streams(self) -> bool:
        """Whether the new weights follow from the old ones alone, layer by layer (`WeightRewrite.rewrite`)."""
        return False

    @property
    def model_use(self) -> Use:
        """What its measurement does with the model, which decides where one goes that no GPU holds."""
        return LAYERS

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        """The projections among "q", "k", "v", "o" that get new weights. Healing with `method: parts` trains them.

        `WeightRewrite.rewrite` gets the values of these alone, because a conversion copies the others unread.
        """
        return ()

    @property
    def unchanged_within(self) -> int:
        """A sequence of up to this many tokens gives the base's outputs for any weights; 0: every token may change.

        Such short sequences are of no use to evaluate or to heal the change.
        """
        return 0

    def milder(self) -> str:
        """A setting "key=value" that changes less, for a user whose result lost too much; "": none is known."""
        return ""

    def ladders(self, anatomy: Anatomy) -> list[list[dict[str, Any]]]:
        """Settings with which less and less of the KV cache is left; [] where no setting does that.

        Each ladder is a list of changes to the fields, from the mildest on. `surgery fit` takes the first of each with
        which the cache fits. Steps that `problems` refuses are passed over.
        """
        return []

    def problems(self, anatomy: Anatomy) -> list[str]:
        """Why the operation cannot be applied to such a model. Each text says what would work."""
        return []

    def problems_before(self, earlier: Anatomy) -> list[str]:
        """Why the operation cannot follow the surgery that the checkpoint had before this recipe."""
        return []

    def problems_after(self, later: Anatomy) -> list[str]:
        """Why the settings of this operation do not fit `later`, the model after a later operation."""
        return []

    def term_layers(self, anatomy: Anatomy) -> set[int]:
        """The layers in which it sets `term`. Two operations may set the same term in different layers."""
        return set(range(len(anatomy.layers)))

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        """What changes, before -> after. It is called only where `problems` finds none."""
        raise TypeError(f"operation {self.op} defines no plan")

    def apply(self, model: PreTrainedModel, context: ApplyContext) -> dict[str, Any]:
        """Edit a loaded model in place.

        Returns:
            A record of what was done, for surgery.json: plain data, or {}.
        """
        raise TypeError(f"operation {self.op} defines no apply")


class WeightRewrite(Operation):
    """An operation that computes new weights from the old weights alone. It can rewrite a checkpoint layer by layer.

    A subclass with settings that need more than the weights overrides `streams`, and `apply` for these settings.
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
            layer: a copy of the old weights, on the CPU. A projection that `rewritten_projections` does not name is a
                meta tensor: it has a shape and a dtype, and no values.
            target: the anatomy that the result must have.

        Returns:
            The new layer (its `anatomy` is `target`) and a record of choices worth keeping, or {}.
        """
        raise TypeError(f"operation {self.op} defines no rewrite")

    def apply(self, model: PreTrainedModel, context: ApplyContext) -> dict[str, Any]:
        from surgery.operations.rewrite import rewrite_model

        return rewrite_model(model, self, context)


def whole_keys(values: Any) -> Any:
    """The value with decimal keys as whole numbers at every depth. JSON has only text keys, so "3" means 3."""
    if not isinstance(values, dict):
        return values
    keys = {key: int(key) if isinstance(key, str) and key.isdecimal() else key for key in values}
    return {keys[key]: whole_keys(value) for key, value in values.items()} if _different(keys) else values


def _different(keys: dict[Any, Any]) -> bool:
    return len({*keys.values()}) == len(keys)
