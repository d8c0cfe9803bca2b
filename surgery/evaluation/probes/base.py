"""What a probe is: settings, cases, a run of each model, a comparison, and how the figures are shown and judged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from surgery.data.text import Text
from surgery.errors import SurgeryError
from surgery.evaluation.lengths import parse_lengths
from surgery.evaluation.paired import CaseResult, run_base_then_model, sides
from surgery.evaluation.result import Result
from surgery.io.loading import read_config, read_tokenizer
from surgery.io.printing import Table

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery.io.loading import ModelSource

Progress = Callable[[int, int, str], None]
UNASKED = "not asked"  # status of a probe that says nothing of such a model (`Probe.unasked`)
SETTINGS_ERROR = "settings_error"  # kind of a pydantic error whose sentence is a SurgeryError's


def settings_error(what: str, *, key: str = "", exists: str = "", fix: str = "") -> PydanticCustomError:
    """An error for a validator of settings, shown to the user in these words.

    Args:
        what: the fault; where it is about one setting, what follows the setting's name.
        key: that setting. It is named as the user wrote it (`items`, or `--choice-items`).
        exists, fix: as of a `SurgeryError`.
    """
    return PydanticCustomError(SETTINGS_ERROR, "{what}", {"what": what, "key": key, "exists": exists, "fix": fix})


def check_setting(check: Callable[..., object], *args: object) -> None:
    """Call a check that raises SurgeryError inside a validator of settings."""
    try:
        check(*args)
    except SurgeryError as error:
        raise settings_error(error.what, exists=error.exists, fix=error.fix) from None


class NamesFile:
    """Marks a setting that may name a file: a recipe file may not name one outside of the working folder."""


def _text(value: object) -> object:
    if isinstance(value, str | Path | Text):
        return value
    raise PydanticCustomError("string_type", "Input should be a valid string")


def _plain_text(value: str | Path | Text) -> str:
    return value.title if isinstance(value, Text) else str(value)


def _list(value: Any) -> object:
    """Lists, ranges and arrays as tuples of Python's numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple | range):
        return value
    return tuple(item.item() if hasattr(item, "item") else item for item in value)


def _lengths(value: object) -> object:
    value = _list(value)
    if isinstance(value, str):
        try:
            return parse_lengths(value)
        except SurgeryError as error:
            raise settings_error(error.what, fix="write 512,2k") from None
    return (value,) if type(value) is int else value


# Types of settings. A text: "builtin", a file, or (from Python) a loaded `Text`.
TextSource = Annotated[
    Any, BeforeValidator(_text), PlainSerializer(_plain_text), WithJsonSchema({"type": "string"}), NamesFile()
]
TokenLengths = Annotated[tuple[int, ...], BeforeValidator(_lengths)]  # "512,2k", 512, [512, 2000]
Shares = Annotated[tuple[float, ...], BeforeValidator(_list)]


@dataclass(frozen=True)
class Limit:
    """A figure that a recipe may bound.

    Attributes:
        figure: gives, from the probe's record, the number that is compared with the limit; None where there is none.
        at_least: whether the number may not be below the limit; otherwise it may not be above.
        description: for the schema.
        most: the largest limit that makes sense (1 for a share).
        words: what the number is called where it stands beside its limit ("KL").
    """

    figure: Callable[[dict], float | None]
    at_least: bool
    description: str
    most: float | None = None
    words: str = ""


@dataclass(frozen=True)
class Flag:
    """An option of `surgery eval` that stands for a setting.

    Attributes:
        key: the setting.
        help: what it is, in a few words.
        kind: type of the option.
        least: smallest number.
        metavar: what the help shows in place of a value.
    """

    key: str
    help: str
    kind: type = str
    least: int | None = None
    metavar: str | None = None


@dataclass(frozen=True)
class RecipeField:
    """A key directly below a recipe's `evaluate:` that stands for a setting.

    Attributes:
        key: the setting.
        annotation, field: type, default, bounds and description of the recipe's key.
        asks: the probe is asked for where the value is not zero.
    """

    key: str
    annotation: Any
    field: FieldInfo
    asks: bool = False


@dataclass(frozen=True)
class Aliases:
    """Earlier spellings of a probe's settings. A new probe has none.

    Attributes:
        switch: help of the flag of the probe's own name (`--needles`); "": there is none.
        flags: option of `surgery eval` -> what it stands for.
        recipe: key of `evaluate:` -> what it stands for.
        limits: those limits that are keys of `evaluate:` too.
        last: of these, those that come after the keys of all other probes.
    """

    switch: str = ""
    flags: dict[str, Flag] = field(default_factory=dict)
    recipe: dict[str, RecipeField] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    last: tuple[str, ...] = ()


SHARED = ("text",)  # keys of `evaluate:` that every probe with such a setting follows, unless its block has its own


@dataclass(frozen=True)
class Effort:
    """What a probe makes one model do, for the time and memory that `plan` gives.

    Attributes:
        read: tokens that are read, in texts of `length` tokens.
        length: of the longest text.
        written: tokens that are written one by one.
    """

    read: int
    length: int
    written: int = 0


@dataclass(frozen=True)
class Row:
    """A figure before and after, for a table; an empty cell where a number is None or not finite.

    Attributes:
        form: format of the numbers.
        ratio: whether model / base says something.
    """

    name: str
    base: float | None
    model: float | None
    form: str = "{:,.4g}"
    ratio: bool = True


@dataclass(frozen=True)
class Metric:
    """A figure of a model as the Hub lists it (`model-index` of a card).

    Attributes:
        kind: the Hub's name of the metric ("perplexity", "recall").
        name: for people.
        value, base: the model's figure, and its base's; None where there is none.
    """

    kind: str
    name: str
    value: float | None
    base: float | None = None


class Probe(BaseModel):
    """One thing that is measured of a model and of its base: the fields are its settings.

    Everything below that takes `record` reads what `Result.to_dict` gave, possibly written by an earlier version.

    Attributes:
        name: as in the registry.
        summary: one line, what it measures.
        limits: gate limits that it serves, named max_... or min_...
        aliases: earlier spellings.
        main: it is run whatever a recipe asks, see `surgery.evaluation.probes.main`. One probe alone is.
        drawing: what `picture` shows, in a few words; "": it has no picture.
        alternatives: pairs of settings of which one may be set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    name: ClassVar[str]
    summary: ClassVar[str]
    limits: ClassVar[dict[str, Limit]] = {}
    aliases: ClassVar[Aliases] = Aliases()
    main: ClassVar[bool] = False
    drawing: ClassVar[str] = ""
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()

    @classmethod
    def files(cls) -> list[str]:
        """The settings that may name a file."""
        return [key for key, info in cls.model_fields.items() if _marked(info.annotation, info.metadata)]

    @classmethod
    def shared(cls, settings: Mapping[str, Any]) -> list[str]:
        """The keys of `evaluate:` that these settings follow."""
        return [key for key in SHARED if key in cls.model_fields and key not in settings]

    # --- measuring ---

    def misfit(self, config: PretrainedConfig) -> str:
        """Why these settings do not fit a model with this config; "" if they do."""
        return ""

    @property
    def effort(self) -> Effort:
        """What it makes each of the two models do."""
        return Effort(0, 0)

    def stages(self, compared: bool = True) -> list[str]:
        """The stages that `measure` reports; `compared`: with a base."""
        return []

    def unasked(self, base: ModelSource, tokenizer: Any = None) -> str:
        """Why it says nothing of such a model, and no gate waits for it; "" if it does.

        Args:
            base: a model folder, or a loaded model.
            tokenizer: needed where the base is a loaded model.
        """
        return ""

    def refuse(self, base: ModelSource) -> None:
        """Raise, before a base is converted, what `measure` would raise when all is done."""

    @abstractmethod
    def measure(
        self,
        out: ModelSource,
        base: ModelSource | None = None,
        *,
        tokenizer: Any = None,
        progress: Progress | None = None,
        allow_pickle: bool = False,
    ) -> Result:
        """Run the base, then the model, never both in memory, and compare.

        Args:
            out, base: model folder, or loaded model. A loaded model stays where and as it is.
            tokenizer: needed where no folder is given; otherwise taken from base, or from out without a base.
            progress: called as progress(done, total, label); the label names the stage.
            allow_pickle: the base may have .bin weights alone.

        Raises:
            SurgeryError: these models cannot be measured so.
        """

    # --- judging ---

    @classmethod
    def missing(cls, record: dict) -> str:
        """Why there is nothing to compare with a limit, or ""; `record` is {} where the probe was not asked for."""
        return "" if record else "it was not asked for"

    @classmethod
    def faults(cls, record: dict) -> list[str]:
        """What fails any gate: figures that are no numbers."""
        return []

    @classmethod
    def damage(cls, record: dict) -> list[str]:
        """What makes a model useless as it is, clauses of a sentence ("its perplexity is 3 times the base's")."""
        return []

    @classmethod
    def recall(cls, record: dict) -> float | None:
        """Of what the base finds in its prompt, the share that the model finds too; None: this is no recall test."""
        return None

    @classmethod
    def worst(cls, record: dict) -> tuple[float, str]:
        """What is most wrong with a model by this probe: the share of the base's ability that is lost (0 to 1), and a
        sentence that says it on top of the card; (0, "") where nothing is to be said there.
        """
        costs = cls.damage(record)
        return (1.0, f"This model is far from its base: {' and '.join(costs)}.") if costs else (0.0, "")

    # --- showing ---

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        """Rows of the card's table, and of the terminal's."""
        return []

    @classmethod
    def metrics(cls, record: dict) -> tuple[dict, list[Metric]]:
        """What the Hub is told: of the data, `name` and what else identifies them; and the figures."""
        return {}, []

    @classmethod
    def sentence(cls, record: dict) -> str:
        """What `apply` says at its end, a clause ("needles kept 23 of 24"); "" for nothing."""
        return ""

    @classmethod
    def paragraph(cls, record: dict) -> str:
        """What the card says below its table; "" for nothing. Also of a probe that was not run."""
        return ""

    @classmethod
    def lines(cls, result: Any) -> list[Table | str]:
        """What `surgery eval` prints of a result that was run; notes are added to it."""
        record = result.to_dict()
        both = record.get("base") is not None
        rows = [
            [row.name, *(_cell(figure, row.form) for figure in ((row.base, row.model) if both else (row.model,)))]
            for row in cls.rows(record)
        ]
        table = Table(("", *(["base", "converted"] if both else ["model"])), rows)
        sentence = cls.sentence(record)
        return [table, *([sentence] if sentence else [])]

    @classmethod
    def verdict(cls, record: dict) -> str:
        """What the figures mean, in a sentence that ends what `surgery eval` prints; "" for nothing."""
        costs = cls.damage(record)
        return f"The converted model is not usable as it is: {'; '.join(costs)}." if costs else ""

    @classmethod
    def picture(cls, result: Any) -> dict:
        """Arguments of `surgery.report.plots.heat_maps` but the path; asked for where `drawing` says something.

        A panel is a dict: the fields of `surgery.report.plots.Cells`.
        """
        raise NotImplementedError


def _marked(annotation: Any, metadata: Iterable[object]) -> bool:
    """Whether a type, or one inside it, is marked as naming a file."""
    if any(isinstance(mark, NamesFile) for mark in metadata):
        return True
    return any(_marked(inner, getattr(inner, "__metadata__", ())) for inner in get_args(annotation))


def _cell(figure: float | None, form: str) -> str:
    return "?" if figure is None else form.format(figure)


class CaseProbe(Probe):
    """A probe that puts the same cases to base and model, one after the other.

    Attributes:
        cases_are: what the cases are, for messages ("needles").
        model_first: the model is run before its base, which reads what the model wrote.
        stage: what progress reports while it runs.
    """

    cases_are: ClassVar[str]
    stage: ClassVar[str]
    model_first: ClassVar[bool] = False

    def stages(self, compared: bool = True) -> list[str]:
        return [self.stage]

    @abstractmethod
    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> CaseResult:
        """The cases, in a result without outcomes; no weight is read.

        Args:
            configs: "base" (if one is given) and "out" -> Transformers config.
        """

    @abstractmethod
    def run(self, model: Any, result: CaseResult, progress: Callable[[int], None]) -> list:
        """One outcome a case by a loaded model; `progress` is called with the number of cases done.

        Args:
            result: has the cases, and the outcomes of the model that was run before, if one was.
        """

    @abstractmethod
    def extra_bytes(self, cases: list, kv_bytes: int) -> int:
        """Memory needed besides the weights, from the model's KV bytes per token."""

    @abstractmethod
    def is_broken(self, outcome: Any) -> bool:
        """Whether a model gave NaN or infinity."""

    def measure(
        self,
        out: ModelSource,
        base: ModelSource | None = None,
        *,
        tokenizer: Any = None,
        progress: Progress | None = None,
        allow_pickle: bool = False,
    ) -> CaseResult:
        """See `Probe.measure`; weights as pickles are refused. `progress` is called after each case."""

        def tick(done: int, total: int, whose: str) -> None:
            if progress:
                progress(done, total, f"{self.stage}: {whose}" if whose else self.stage)

        sources = sides(out, base)
        configs = {label: read_config(source) for label, source in sources.items()}
        result = self.make_cases(tokenizer or read_tokenizer(next(iter(sources.values()))), configs)
        run_base_then_model(
            result,
            dict(reversed(sources.items())) if self.model_first else sources,
            lambda model, tick: self.run(model, result, tick),
            what=self.cases_are,
            extra=lambda kv_bytes: self.extra_bytes(result.cases, kv_bytes),
            broken=self.is_broken,
            progress=tick if progress else None,
        )
        result.outcomes = {label: result.outcomes[label] for label in sources if label in result.outcomes}
        return result
