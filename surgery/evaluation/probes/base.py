"""Base classes of probes: settings, cases, a run of each model, a comparison, and how figures are shown and judged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from surgery.evaluation.paired import CaseResult, run_base_then_model, sides
from surgery.evaluation.probes.fields import names_file
from surgery.evaluation.result import Result
from surgery.io.loading import read_config, read_tokenizer
from surgery.io.printing import Table
from surgery.machine.progress import PERCENT

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery.architecture.anatomy import Anatomy
    from surgery.evaluation.base_runs import BaseRuns
    from surgery.io.loading import ModelSource

Progress = Callable[[int, int, str], None]
UNASKED = "not asked"  # status of a probe that does not apply to a model (`Probe.unasked`)


@dataclass(frozen=True)
class Limit:
    """A figure that a recipe may bound.

    Attributes:
        figure: computes the number that a limit bounds from the probe's record; None: none; with `by_item` a dict.
        at_least: True: the number must not be below the limit. False: it must not be above.
        description: text for the schema.
        most: the largest limit that makes sense (1 for a share).
        words: name of the number when it is shown with its limit ("KL").
        by_item: of a dict of limits ({"piqa": 0.01}): (probe, may it take seconds) -> names of items, are these all.
    """

    figure: Callable[[dict], Any]
    at_least: bool
    description: str
    most: float | None = None
    words: str = ""
    by_item: Callable[[Any, bool], tuple[Collection[str], bool]] | None = None


@dataclass(frozen=True)
class Flag:
    """An option of `surgery eval` that sets one setting.

    Attributes:
        key: the setting.
        help: the help text, a few words.
        kind: type of the option.
        least: smallest number allowed.
        metavar: placeholder for the value in the help.
        asks: the option asks for the probe, as its switch would.
    """

    key: str
    help: str
    kind: type = str
    least: int | None = None
    metavar: str | None = None
    asks: bool = False


@dataclass(frozen=True)
class RecipeField:
    """A key directly below a recipe's `evaluate:` that sets one setting.

    Attributes:
        key: the setting.
        annotation, field: type, default, bounds and description of the recipe's key.
        asks: a value other than zero asks for the probe.
    """

    key: str
    annotation: Any
    field: FieldInfo
    asks: bool = False


@dataclass(frozen=True)
class Aliases:
    """Earlier spellings of a probe's settings. A new probe has none.

    Attributes:
        switch: help text of the flag that is named like the probe (`--needles`); "": there is no such flag.
        flags: option of `surgery eval` -> the setting that it sets.
        recipe: key of `evaluate:` -> the setting that it sets.
        limits: the limits that are also keys of `evaluate:`.
        last: the keys among these that are listed after the keys of all other probes.
    """

    switch: str = ""
    flags: dict[str, Flag] = field(default_factory=dict)
    recipe: dict[str, RecipeField] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    last: tuple[str, ...] = ()


SHARED = ("text",)  # keys of `evaluate:` that hold for every probe with such a setting, unless its block sets it


@dataclass(frozen=True)
class Effort:
    """The work of one model in a probe, from which `plan` estimates time and memory.

    Attributes:
        read: tokens that the model reads in all.
        length: tokens of the longest text.
        written: tokens that the model generates one by one.
        logits: tokens whose logits are in memory at once (not of the main probe).
    """

    read: int
    length: int
    written: int = 0
    logits: int = 0


@dataclass(frozen=True)
class Row:
    """A figure of base and model, for a table. A number that is None or not finite gives an empty cell.

    Attributes:
        form: format of the numbers.
        ratio: whether the ratio model / base has a meaning.
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
        name: the name that people read.
        value, base: the figures of the model and of its base; None if there is none.
    """

    kind: str
    name: str
    value: float | None
    base: float | None = None


class Probe(BaseModel):
    """One measurement of a model and of its base. The fields are its settings.

    A `record` is the dict that `Result.to_dict` returned; an earlier version may have written it.

    Attributes:
        name: as in the registry.
        summary: one line that says what it measures.
        limits: the gate limits that bound its figures, named max_... or min_...
        aliases: earlier spellings of its settings.
        main: whether every evaluation runs it (see `surgery.evaluation.probes.main`). Exactly one probe is main.
        drawing: help text of the option that draws `picture`; "": it has no picture.
        alternatives: pairs of settings of which only one may be set.
        resumes: whether a run that was interrupted goes on when it is started again.
        unsafe: settings that a recipe file may not turn on, since a stranger may have written it -> why.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    name: ClassVar[str]
    summary: ClassVar[str]
    limits: ClassVar[dict[str, Limit]] = {}
    aliases: ClassVar[Aliases] = Aliases()
    main: ClassVar[bool] = False
    drawing: ClassVar[str] = ""
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()
    resumes: ClassVar[bool] = False
    unsafe: ClassVar[dict[str, str]] = {}

    @classmethod
    def files(cls) -> list[str]:
        """The settings that may name a file."""
        return [key for key, info in cls.model_fields.items() if names_file(info.annotation, info.metadata)]

    @classmethod
    def shared(cls, settings: Mapping[str, Any]) -> list[str]:
        """The keys of `evaluate:` whose values this probe takes over, since `settings` does not have them."""
        return [key for key in SHARED if key in cls.model_fields and key not in settings]

    # --- measuring ---

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        """The settings that are longer than a model with this config takes: key -> the longest that fits."""
        return {}

    @property
    def effort(self) -> Effort:
        """The work of each of the two models."""
        return Effort(0, 0)

    def stages(self, compared: bool = True) -> list[str]:
        """Names of the stages that `measure` reports; `compared`: whether there is a base."""
        return []

    def unasked(self, base: ModelSource, tokenizer: Any = None) -> str:
        """Why the probe does not apply to such a model; "" if it does. A gate ignores a probe that does not apply.

        Args:
            base: a model folder, or a loaded model.
            tokenizer: required if the base is a loaded model.
        """
        return ""

    def refuse(self, base: ModelSource, out: Anatomy) -> None:
        """Raise, before a base is converted, the errors that `measure` would raise at the end for the result `out`."""

    @abstractmethod
    def measure(
        self,
        out: ModelSource,
        base: ModelSource | None = None,
        *,
        tokenizer: Any = None,
        progress: Progress | None = None,
        allow_pickle: bool = False,
        shared: BaseRuns | None = None,
    ) -> Result:
        """Run the base, then the model, never both in memory, and compare.

        Args:
            out, base: model folder, or loaded model. A loaded model keeps its device and its mode.
            tokenizer: required for loaded models; default: the tokenizer of the base, or of `out` without a base.
            progress: called as progress(done, total, label); the label names the stage.
            allow_pickle: whether the base may have .bin weights only.
            shared: what this base scored for other models already; what it scores now is added.

        Raises:
            SurgeryError: this probe cannot measure these models.
        """

    # --- judging ---

    @classmethod
    def missing(cls, record: dict) -> str:
        """Why there is no figure to compare with a limit, or "". `record` is {} if the probe was not asked for."""
        return "" if record else "it was not asked for"

    @classmethod
    def faults(cls, record: dict) -> list[str]:
        """Faults that fail every gate: figures that are not numbers."""
        return []

    @classmethod
    def damage(cls, record: dict) -> list[str]:
        """Reasons why a model is not usable, as clauses of a sentence ("its perplexity is 3 times the base's")."""
        return []

    @classmethod
    def recall(cls, record: dict) -> float | None:
        """Of the items that the base finds in its prompts, the share that the model finds; None: no recall test."""
        return None

    @classmethod
    def worst(cls, record: dict) -> tuple[float, str]:
        """The worst damage, for the top of the card: the share of the base's ability that is lost (0 to 1), and a
        sentence about it; (0, "") if there is none.
        """
        costs = cls.damage(record)
        return (1.0, f"This model is far from its base: {' and '.join(costs)}.") if costs else (0.0, "")

    @classmethod
    def joined(cls, recorded: dict, record: dict) -> dict | None:
        """A record with the figures of another that it lacks; None: it lacks none, or the two do not go together."""
        return None

    # --- showing ---

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        """Rows of the table in the card and on the terminal."""
        return []

    @classmethod
    def metrics(cls, record: dict) -> list[tuple[dict, list[Metric]]]:
        """Figures for the Hub: for each data set a dict that identifies it (its `name` and more), and the metrics."""
        return []

    @classmethod
    def sentence(cls, record: dict) -> str:
        """A clause for the closing lines of `apply` ("needles kept 23 of 24"), or ""."""
        return ""

    @classmethod
    def paragraph(cls, record: dict) -> str:
        """A paragraph below the card's table, or "". It is also asked for if the probe was not run."""
        return ""

    @classmethod
    def lines(cls, result: Any) -> list[Table | str]:
        """The output of `surgery eval` for a result with figures; notes are added to it."""
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
        """A sentence that says what the figures mean, or "". It ends the output of `surgery eval`."""
        costs = cls.damage(record)
        return f"The converted model is not usable as it is: {'; '.join(costs)}." if costs else ""

    @classmethod
    def picture(cls, result: Any) -> dict:
        """Arguments of `surgery.report.plots.heat_maps` except the path. It is called only if `drawing` is not "".

        A panel is a dict with the fields of `surgery.report.plots.Cells`.
        """
        raise NotImplementedError


def _cell(figure: float | None, form: str) -> str:
    return "?" if figure is None else form.format(figure)


class CaseProbe(Probe):
    """A probe that runs the same cases on base and model, one after the other.

    Attributes:
        cases_are: name of the cases in messages ("needles").
        outcome: the dataclass of the outcomes, if the base's can be kept for other models; None: they cannot.
        model_first: whether the model runs before its base, because the base scores what the model wrote.
        task: keys of lm-eval's YAML that score the cases as this probe does; {}: they cannot be written as a task.
        stage: name of the stage in progress reports.
    """

    cases_are: ClassVar[str]
    stage: ClassVar[str]
    outcome: ClassVar[type | None] = None
    model_first: ClassVar[bool] = False
    task: ClassVar[dict[str, Any]] = {}

    def stages(self, compared: bool = True) -> list[str]:
        return [self.stage]

    @abstractmethod
    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> CaseResult:
        """The cases, in a result without outcomes; no weight is read.

        Args:
            configs: "base" (if one is given) and "out" -> Transformers config.
        """

    def prepare(self, result: Any, sources: dict[str, ModelSource], progress: Progress | None) -> None:
        """Do what takes long before a model is loaded. `sources`: label -> folder or loaded model."""

    def finish(self, result: Any, sources: dict[str, ModelSource], progress: Progress | None) -> None:
        """Do what follows the runs of both models."""

    def question(self, case: Any) -> tuple[Sequence[int], list[Sequence[int]], int]:
        """A case as tokens: the prompt, its answers, and the index of the right one. Only with a `task`."""
        raise NotImplementedError

    @abstractmethod
    def run(self, model: Any, result: CaseResult, progress: Callable[[int], None]) -> list:
        """One outcome for each case by a loaded model; `progress` is called with the number of cases done.

        Args:
            result: holds the cases, and the outcomes of the model that ran first, if this is the second.
        """

    def count_changes(self, label: str) -> int:
        """How many changes `changes` gives at most; known before a model is loaded."""
        return 0

    def changes(self, label: str, model: Any, result: Any) -> Mapping[str, AbstractContextManager]:
        """Changes at run time under which the model runs the cases again: name -> context in which it is changed.

        Args:
            label: "base" or "out".
            model: the loaded model, after it ran the cases as it is. Every context restores it.
            result: holds the cases, and the outcomes so far.
        """
        return {}

    @abstractmethod
    def extra_bytes(self, cases: list, kv_bytes: int) -> int:
        """Bytes needed in addition to the weights, computed from the model's KV bytes per token."""

    def logits_at_once(self, result: Any, positions: int) -> int:
        """Tokens whose logits are in memory at once, if many. `positions`: the most that a model takes, or 0."""
        return 0

    @abstractmethod
    def is_broken(self, outcome: Any) -> bool:
        """Whether the outcome comes from NaN or infinity."""

    def measure(
        self,
        out: ModelSource,
        base: ModelSource | None = None,
        *,
        tokenizer: Any = None,
        progress: Progress | None = None,
        allow_pickle: bool = False,
        shared: BaseRuns | None = None,
    ) -> CaseResult:
        """See `Probe.measure`; `progress` is called after each case."""

        def tick(done: int, total: int, whose: str) -> None:
            if progress and whose:  # counts for each model, and a share of both
                progress(PERCENT * done // total, PERCENT, f"{self.stage}: {whose}")
            elif progress:
                progress(done, total, self.stage)

        sources = sides(out, base)
        configs = {label: read_config(source) for label, source in sources.items()}
        result = self.make_cases(tokenizer or read_tokenizer(next(iter(sources.values()))), configs)
        self.prepare(result, sources, progress)
        order = dict(reversed(sources.items())) if self.model_first else sources
        shared = None if base is None or self.count_changes("base") else shared
        asked = (f"{self.name} {self.model_dump_json()}", result.cases, self.outcome)
        known = shared.answers(*asked) if shared else None
        if known is not None:
            result.outcomes["base"] = known
        left = {label: source for label, source in order.items() if label not in result.outcomes}
        keep = partial(shared.keep_answers, *asked) if shared else None
        run_base_then_model(result, left, self, tick if progress else None, allow_pickle, keep)
        result.outcomes = {label: result.outcomes[label] for label in sources if label in result.outcomes}
        if result.status == "done":
            self.finish(result, sources, progress)
        else:  # the base's outcomes that were found again say nothing by themselves
            result.outcomes = {}
        return result
