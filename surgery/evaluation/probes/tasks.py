"""Tasks of lm-eval (`surgery.evaluation.harness`), for a model alone or compared with its base item by item."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from surgery.calibration.scoring import refuse_too_long
from surgery.errors import ModelMismatchError, SettingError
from surgery.evaluation import harness
from surgery.evaluation.harness.answers import answers_file, run
from surgery.evaluation.harness.command import run_alone
from surgery.evaluation.harness.scores import TaskResult
from surgery.evaluation.harness.task_index import refuse_unknown, row_names
from surgery.evaluation.harness.task_set import RULER, Asking, ItemScore, load_tasks
from surgery.evaluation.probes.base import Aliases, CaseProbe, Effort, Flag, Limit, Metric, Row, Table
from surgery.evaluation.probes.fields import TaskNames, TokenLengths
from surgery.io.files import published
from surgery.io.loading import read_config
from surgery.io.printing import count
from surgery.machine.progress import begin

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.io.loading import ModelSource
    from surgery.machine.progress import Progress

TYPICAL = 512  # tokens of a prompt of a task other than RULER's, for the estimate of memory
LOGITS = 2  # copies in memory, since lm-eval takes the log-softmax in the dtype of the logits
SHOWN = 3  # tasks that the closing lines of `apply` name
READING, ALONE = "reading tasks", "lm_eval alone"  # names of stages


class Tasks(CaseProbe):
    """Tasks of lm-eval: questions with a name, which other projects report too."""

    name: ClassVar[str] = "tasks"
    summary: ClassVar[str] = "tasks of lm-eval, by name or as YAML files, and RULER"
    cases_are: ClassVar[str] = "items"
    stage: ClassVar[str] = "tasks"
    resumes: ClassVar[bool] = True
    unsafe: ClassVar[dict[str, str]] = {"both_ways": "it runs the code in the folder"}

    names: TaskNames = Field((), description="Tasks, groups and tags of lm-eval, and YAML files of them.")
    ruler: TokenLengths = Field((), description="Also RULER's tasks, with prompts of these many tokens: 4096.")
    limit: int | None = Field(None, ge=1, description="The first items of each task; null: all.")
    fewshot: int | None = Field(None, ge=0, description="Solved examples before a question; null: as the task says.")
    chat: bool = Field(False, description="Write prompts out by the chat template.")
    batch: int = Field(1, ge=1, description="Requests in one forward pass.")
    both_ways: bool = Field(
        False,
        description="Also run lm-eval's own command on the converted model, as others would: it runs the code in the "
        "folder (trust_remote_code). Both must agree.",
    )

    limits: ClassVar[dict[str, Limit]] = {
        "max_drop": Limit(
            lambda record: {name: row.get("drop") for name, row in record["tasks"].items()},
            at_least=False,
            description="Gate: for a task, how much worse its metric may be than the base's, at most: {piqa: 0.01}.",
            words="drop of",
            by_item=lambda probe, look_up: probe.bounded(look_up),
        )
    }
    aliases: ClassVar[Aliases] = Aliases(
        flags={
            "tasks": Flag("names", "Run these tasks of lm-eval: names, YAML files.", metavar="NAME,NAME", asks=True),
            "ruler": Flag("ruler", "Run RULER with prompts of these many tokens.", metavar="N,N,...", asks=True),
            "limit": Flag("limit", "Ask only the first items of each task.", int, 1),
        },
    )

    # --- measuring ---

    @property
    def asking(self) -> Asking:
        """How the tasks are asked."""
        return Asking(limit=self.limit, fewshot=self.fewshot, chat=self.chat, batch=self.batch)

    def stages(self, compared: bool = True) -> list[str]:
        return [READING, self.stage, *([ALONE] if self.both_ways else [])]

    def refuse(self, base: ModelSource, out: Anatomy) -> None:
        """Raise for what needs no data of a task: lm-eval is missing, unknown names, prompts that are too long."""
        harness.version()
        self._refuse_nothing()
        refuse_unknown(self.names)
        refuse_too_long({"the base": read_config(base)}, *self._longest)

    def bounded(self, look_up: bool) -> tuple[Collection[str], bool]:
        """The names of the rows that the tasks get, and whether these are all; only lm-eval knows what is in a group.

        Args:
            look_up: read lm-eval's index, if it is installed.
        """
        ruler = [f"{name} {length}" for name in RULER for length in self.ruler]
        if not self.names:
            return ruler, bool(ruler)  # without any task, `refuse` says so
        if not look_up or not harness.is_installed():
            return [*ruler, *self.names], False
        names = row_names(self.names)
        known = [name for name in names or () if not (self.ruler and name in RULER)]
        return [*ruler, *known], names is not None

    def _refuse_nothing(self) -> None:
        if not self.names and not self.ruler:
            known = "`lm_eval ls tasks` lists them"
            raise SettingError("no task is named", exists=known, fix="name one: names=piqa, or --tasks piqa")

    @property
    def _longest(self) -> tuple[int, str, str]:
        """Tokens of the longest RULER prompt, and the words of an error on them."""
        return max(self.ruler, default=0), "RULER's prompts", "shorter lengths"

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> TaskResult:
        """A result without items: `prepare` reads the tasks.

        Raises:
            SurgeryError: lm-eval is not installed, no task is named, or RULER's prompts are longer than a model's
                positions.
        """
        self._refuse_nothing()
        if self.chat and not getattr(tokenizer, "chat_template", None):
            raise SettingError("chat=true needs a chat template, and this tokenizer has none", fix="chat=false")
        names = [published(name) for name in self.names]  # the record is published, and a path is its author's
        settings: dict[str, Any] = {"lm_eval": harness.version(), "names": names, "ruler": list(self.ruler)}
        settings |= vars(self.asking)
        refuse_too_long(configs, *self._longest)
        manner = {"limit": self.limit, "chat": self.chat}
        return TaskResult("done", settings, [], tokenizer=tokenizer, manner=manner)

    def prepare(self, result: TaskResult, sources: dict[str, ModelSource], progress: Progress | None) -> None:
        """Read the tasks, and find the answers of an earlier run.

        Raises:
            SurgeryError: as for `load_tasks`; `both_ways` and the model is not a folder.
        """
        folders = {label: Path(each) for label, each in sources.items() if isinstance(each, str | Path)}
        if self.both_ways and "out" not in folders:
            raise SettingError("both_ways needs a folder", fix="save the model first, or leave both_ways out")
        said = (lambda done, total: progress(done, total, READING)) if progress else None
        result.tasks = load_tasks(self.names, self.ruler, result.tokenizer, progress=said)
        chosen = result.tasks.items(self.limit)
        result.cases = [(name, number) for name, numbers in chosen.items() for number in numbers]
        result.answers = {
            label: answers_file(folder, result.tokenizer, self.batch) for label, folder in folders.items()
        }
        reasons = dict.fromkeys(result.tasks.left_out.values())
        for reason in reasons:
            names = [name for name, why in result.tasks.left_out.items() if why == reason]
            result.notes.append(f"left out: {', '.join(names)}. {reason[:1].upper()}{reason[1:]}")

    def run(self, model: Any, result: TaskResult, progress: Callable[[int], None]) -> list[ItemScore]:
        def tick(done: int, total: int) -> None:
            progress(done * len(result.cases) // max(1, total))

        options = {"answers": result.answers.get(result.running), "progress": tick}
        scores = run(model, result.tokenizer, result.tasks, self.asking, **options)
        return [score for each in scores.values() for score in each]

    def finish(self, result: TaskResult, sources: dict[str, ModelSource], progress: Progress | None) -> None:
        """Refuse a comparison of different prompts; run the model the other way."""
        if result.tasks.cut:
            cut = count(len(result.tasks.cut), "prompt")
            result.notes.append(f"{cut} longer, with the answer, than the model takes: lm-eval cut the beginning off")
        if "base" in result.outcomes:
            pairs = zip(result.outcomes["base"], result.outcomes["out"], strict=True)
            if differing := sum(one.prompt != two.prompt for one, two in pairs):
                what = f"the models were asked different prompts for {differing} of {len(result.cases)} items"
                raise ModelMismatchError(what, fix="use a task whose prompts are not drawn anew each time")
        if not self.both_ways:
            return
        begin(progress, ALONE)
        scores = run_alone(Path(sources["out"]), result.tasks, self.asking)
        result.by_others = [score for each in scores.values() for score in each]

    def extra_bytes(self, cases: list, kv_bytes: int) -> int:
        return 2 * self.batch * max(self.ruler, default=TYPICAL) * kv_bytes  # twice the cache, as growing it copies it

    @property
    def effort(self) -> Effort:
        """The memory of both models. How many tokens they read is not known before the tasks are."""
        length = max(*self.ruler, TYPICAL if self.names else 0, 0)
        return Effort(0, length, logits=LOGITS * self.batch * TYPICAL if self.names else 0)

    def logits_at_once(self, result: TaskResult, positions: int) -> int:
        """Choices are scored from the logits of all tokens, and a corpus in windows as long as the model takes."""
        scored, corpus = result.tasks.scored(self.limit)
        longest = len(result.tokenizer.encode(corpus)) if corpus else 0
        window = min(longest, positions) if positions else longest
        return LOGITS * self.batch * max(window, TYPICAL if scored else 0)

    def is_broken(self, outcome: ItemScore) -> bool:
        return outcome.broken or any(
            isinstance(value, float) and not math.isfinite(value) for value in outcome.values.values()
        )

    # --- judging ---

    @classmethod
    def missing(cls, record: dict) -> str:
        return "" if record.get("status") == "done" else record.get("reason") or super().missing(record)

    @classmethod
    def joined(cls, recorded: dict, record: dict) -> dict | None:
        """The tasks of both; a task that is recorded already keeps its figures."""
        if record.get("status") != "done":
            return None
        tasks = recorded.get("tasks") or {}
        new = {name: row for name, row in record["tasks"].items() if name not in tasks}
        if not new or "drop" not in next(iter(new.values())):
            return None
        sides = {label: dict(recorded.get(label) or {}) for label in ("base", "out")}
        for label, side in sides.items():
            for name, each in record[label].items():  # RULER may bring another length
                side[name] = each | side.get(name, {})
        items = recorded["items"] + sum(row["of"] for row in new.values() if "tasks" not in row)
        asked = (recorded["settings"], record["settings"])
        settings = asked[0] | {key: [*dict.fromkeys(asked[0][key] + asked[1][key])] for key in ("names", "ruler")}
        return recorded | sides | {"tasks": tasks | new, "items": items, "settings": settings}

    # --- showing ---

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        return [
            Row(f"{name}, {_metric(row)}", row.get("base"), row["out"], "{:.4g}", ratio=False)
            for name, row in record["tasks"].items()
        ]

    @classmethod
    def metrics(cls, record: dict) -> list[tuple[dict, list[Metric]]]:
        return [
            ({"name": name, "items": row["of"]}, [Metric(row["metric"], _metric(row), row["out"], row.get("base"))])
            for name, row in record["tasks"].items()
        ]

    @classmethod
    def sentence(cls, record: dict) -> str:
        rows = record["tasks"]
        if len(rows) <= SHOWN:
            return ", ".join(f"{name} {_both(row)}" for name, row in rows.items())
        worst = max(rows, key=lambda name: -math.inf if rows[name].get("drop") is None else rows[name]["drop"])
        return f"{len(rows)} tasks, most lost in {worst} ({_both(rows[worst])})"

    @classmethod
    def paragraph(cls, record: dict) -> str:
        if record.get("status") != "done":
            return f"Tasks of lm-eval were **not run**: {record.get('reason') or 'no reason was recorded'}."
        drops = [
            f"{name} {_drop(row)}, {count(row['of'], 'item')}"
            for name, row in record["tasks"].items()
            if "drop" in row
        ]
        tasks = f"Tasks of lm-eval {record['settings']['lm_eval']}"
        worse = "how much worse this model is than its base, with 95 % intervals over the same items"
        return f"{tasks}: {worse}: {'; '.join(drops)}."

    @classmethod
    def lines(cls, result: TaskResult) -> list[Table | str]:
        record, both = result.to_dict(), "base" in result.outcomes
        headers = ["task", "metric", "items", *(["base", "converted", "drop, 95% interval"] if both else ["model"])]
        rows = [
            [
                name,
                _metric(row),
                f"{row['of']:,}",
                *([_figure(row["base"], "{:.4g}")] if both else []),
                _figure(row["out"], "{:.4g}"),
                *([_drop(row)] if both else []),
            ]
            for name, row in record["tasks"].items()
        ]
        lines: list[Table | str] = [Table(tuple(headers), rows)]
        if both:
            lines.append("drop: how much worse the converted model is. Both answered the same items.")
        if others := record.get("by_others"):
            same = f"the same score for {others['same']:,} of {others['of']:,} items"
            lines.append(f"lm_eval alone, which loads the model with trust_remote_code, gives {same}.")
        return lines

    @classmethod
    def verdict(cls, record: dict) -> str:
        """The tasks in which the model is worse, or better, than chance explains."""
        rows = record["tasks"]
        worse = [name for name, row in rows.items() if row.get("low") is not None and row["low"] > 0]
        better = [name for name, row in rows.items() if row.get("high") is not None and row["high"] < 0]
        told = [
            f"The converted model is {word} in {', '.join(names)}"
            for word, names in (("worse", worse), ("better", better))
            if names
        ]
        return f"{'; '.join(told)}: more than chance explains." if told else ""


def _metric(row: dict) -> str:
    """The metric of a task as people read it; RULER names it by the length of the prompts."""
    return "RULER" if row["metric"].isdigit() else row["metric"]


def _figure(value: float | None, form: str) -> str:
    """A figure, or "?" for one that is no number."""
    return "?" if value is None else form.format(value)


def _both(row: dict) -> str:
    """A task's figure of the base and of the model."""
    return f"{_figure(row.get('base'), '{:.3f}')} → {_figure(row['out'], '{:.3f}')}"


def _drop(row: dict) -> str:
    """The drop of a task with its interval."""
    if row.get("low") is None:
        return _figure(row.get("drop"), "{:.4f}")
    return f"{row['drop']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
