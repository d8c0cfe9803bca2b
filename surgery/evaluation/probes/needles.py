"""The recall test: which needles a model finds, alone or compared with its base, over a grid of lengths and depths.

A needle is found if decoding with the model's own cache gives exactly its secret; the answer's NLL is measured too.
Base and converted model run one after the other, never both in memory. The surgery is judged by the share of needles
"kept": those that the converted model finds, among those that the base finds. Needles that streaming heads see anyway,
through sinks or window, prove nothing and do not count.

With `without=SCORES.json` the model is asked again with its highest-scored query heads off, and with random ones off
(`surgery.evaluation.ablation`).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from surgery.architecture.anatomy import Anatomy, positions_of
from surgery.calibration.head_scores import ABOVE, read_scores
from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long
from surgery.data.haystack import (
    FORMS,
    SECRETS,
    chance,
    form_for,
    make_needles,
    refuse_form,
    refuse_settings,
    spread,
)
from surgery.data.text import BUILTIN, load_text
from surgery.evaluation import ablation
from surgery.evaluation.ablation import ROWS, HeadAblation
from surgery.evaluation.paired import NAMES, kept_words, percent, share_of
from surgery.evaluation.probes.base import Aliases, Effort, Flag, Limit, Metric, RecipeField, Row, Table
from surgery.evaluation.probes.fields import FileName, Shares, TextSource, TokenLengths, check_setting, settings_error
from surgery.evaluation.probes.recall import ANSWER, LATE, RecallProbe, RecallResult, kept_limit, kept_sentence
from surgery.evaluation.recall import longest_sequence, reach_of
from surgery.io.printing import count

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery.io.loading import ModelSource

SHORTEST = 64  # tokens of a prompt
FAR = (0.1, 0.25, 0.4, 0.55)  # depths far from the question, where a head split could lose a needle


@dataclass(repr=False)
class NeedleResult(RecallResult):
    """The result of the recall test. `cases` are needles; an outcome is an `Outcome`.

    Attributes:
        settings: lengths, depths, samples, seed, secret, form, text (title, sha256), chance (that a guess is right).
        ablation: the query heads of `out` that were switched off, if any; `changed` has the outcomes.
    """

    ablation: HeadAblation | None = None

    PROBE: ClassVar[str] = "needles"
    COUNT: ClassVar[str] = "needles"

    def cell(self, label: str, length: int, depth: float) -> tuple[int, int]:
        """Hits and needles of one cell of the grid."""
        rows = zip(self.cases, self.outcomes[label], strict=True)
        hits = [outcome.hit for needle, outcome in rows if (needle.length, needle.depth) == (length, depth)]
        return sum(hits), len(hits)

    def grid(self, label: str) -> list[list[float]]:
        """Share of hits [depths][lengths]; NaN for a cell without needles."""
        return [
            [hits / total if total else math.nan for hits, total in (self.cell(label, n, depth) for n in self.lengths)]
            for depth in self.depths
        ]

    @property
    def lengths(self) -> list[int]:
        """Prompt lengths in tokens, the columns of the grid."""
        return self.settings["lengths"]

    @property
    def depths(self) -> list[float]:
        """Depths as shares of the text, the rows of the grid."""
        return self.settings["depths"]

    def side(self, label: str) -> dict:
        """The figures of one model: hits, accuracy with its 95% interval, mean NLL, and the grid."""
        return super().side(label) | {"grid": self.grid(label)}

    def change_figures(self) -> dict:
        """The figures of `out` with query heads off; {} if there were none."""
        if self.ablation is None:
            return {}
        sides = [share_of("hits", (o.hit for o in run), (o.nll for o in run)) for run in self.changed["out"].values()]
        return {"without": self.ablation.to_dict(sides)}

    def case(self, index: int) -> dict:
        """See `RecallResult.case`; and whether it was found with query heads off."""
        off = [run[index].hit for run in self.changed.get("out", {}).values()]
        return super().case(index) | ({"without": off} if off else {})


def longest_prompt(config: PretrainedConfig) -> int | None:
    """The most tokens of a prompt that leaves positions for its answer; None: no limit, or too low a one to ask."""
    positions = positions_of(config)
    return positions - ANSWER if positions and positions - ANSWER >= SHORTEST else None


class Needles(RecallProbe):
    """Secrets hidden in a text, one in each prompt: a grid of prompt lengths and depths."""

    name: ClassVar[str] = "needles"
    summary: ClassVar[str] = "secrets hidden in a text, one in a prompt, over lengths and depths: which are found"
    cases_are: ClassVar[str] = "needles"
    stage: ClassVar[str] = "recall test"
    drawing: ClassVar[str] = "Draw the hits by length and place into this file."
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("length", "lengths"), ("cases", "samples"))

    text: TextSource = Field(BUILTIN, description="The haystack: 'builtin' or a text file.")
    lengths: TokenLengths = Field((512, 1024, 2048), description="Tokens of the prompts: 512,1024,2048.")
    length: int | None = Field(None, ge=SHORTEST, description="Tokens of the prompts, where all have one length.")
    depths: int | Shares = Field(
        5, description="Places in the text: their number, evenly spaced, or a list of shares (0 begin, 1 end)."
    )
    samples: int = Field(4, ge=1, description="Prompts for each length and place.")
    cases: int | None = Field(
        None,
        ge=1,
        description="Prompts in all, at least, in place of samples; the depths are then 0.1, 0.25, 0.4 and 0.55.",
    )
    seed: int = Field(0, description="Seed of what is drawn.")
    secret: str = Field("digits", description="digits or words.", json_schema_extra={"enum": list(SECRETS)})
    form: str = Field(
        "auto", description="chat, plain, or auto (by the tokenizer).", json_schema_extra={"enum": list(FORMS)}
    )
    without: FileName | None = Field(
        None, description="A score file of query heads: also ask the model with its highest heads off."
    )
    top: int | None = Field(None, ge=1, description=f"With without: heads to switch off; null: those above {ABOVE:g}.")
    draws: int = Field(5, ge=0, le=100, description="With without: random draws of as many heads of the same layers.")
    off: str = Field(
        "all",
        description="With without: heads are off for all tokens, or for the answer (from the prompt's last token on).",
        json_schema_extra={"enum": list(ROWS)},
    )

    limits: ClassVar[dict[str, Limit]] = {"min_needles": kept_limit("needles", "found", "needles kept")}
    aliases: ClassVar[Aliases] = Aliases(
        switch="Run a recall test: hide secrets in a text and ask for them.",
        flags={
            "text": Flag("text", "The text to measure on: builtin, or a UTF-8 text file.", metavar="FILE"),
            "lengths": Flag("lengths", "Make prompts of these many tokens.", metavar="N,N,..."),
            "depths": Flag("depths", "Hide a secret at this many places, evenly spaced.", int, 1),
            "samples": Flag("samples", "Ask this many times for each length and place.", int, 1),
            "seed": Flag("seed", "Random seed for what is hidden and asked.", int),
            "secret": Flag("secret", "What is hidden: digits or words.", metavar="KIND"),
            "form": Flag("form", "How to ask: chat, plain, or auto (as the tokenizer can).", metavar="FORM"),
        },
        recipe={
            "needles": RecipeField(
                "cases",
                int,
                Field(0, ge=0, description="Secrets hidden in the text that both are asked for; 0: none."),
                asks=True,
            ),
            "needle_length": RecipeField(
                "length", int, Field(1024, ge=SHORTEST, description="Tokens of such a prompt.")
            ),
        },
        limits=("min_needles",),
    )

    @model_validator(mode="after")
    def _refuse_unfit_settings(self) -> Needles:
        for one, other in self.alternatives:
            if {one, other} <= self.model_fields_set:
                raise settings_error(f"and {other} are two ways to say the same", key=one, fix="one of them")
        check_setting(ablation.refuse_settings, self.off, self.without, self.model_fields_set)
        check_setting(refuse_settings, self.tokens, self.depth_shares, self.repetitions, self.secret)
        check_setting(refuse_form, self.form)
        return self

    @property
    def tokens(self) -> tuple[int, ...]:
        """Lengths of the prompts."""
        return self.lengths if self.length is None else (self.length,)

    @property
    def depth_shares(self) -> tuple[float, ...]:
        """Depths, as shares of the text."""
        depths = FAR if self.cases is not None and "depths" not in self.model_fields_set else self.depths
        return tuple(spread(depths))

    @property
    def repetitions(self) -> int:
        """Prompts for each length and depth."""
        cells = max(1, len(self.tokens) * len(self.depth_shares))
        return self.samples if self.cases is None else -(-self.cases // cells)

    @property
    def effort(self) -> Effort:
        tokens = len(self.depth_shares) * self.repetitions * sum(self.tokens)
        tokens += tokens * self.count_changes("out") // 2  # only one of the two models runs with heads off
        return Effort(tokens, max(self.tokens, default=0))

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        longest = longest_prompt(config)
        if longest is None or longest >= max(self.tokens, default=0):
            return {}
        if self.length is not None:
            return {"length": longest}
        return {"lengths": list(dict.fromkeys(min(length, longest) for length in self.lengths))}

    def refuse(self, base: ModelSource) -> None:
        """Raise if there is no such score file; whether it fits the converted model is not known yet."""
        if self.without is not None:
            read_scores(self.without)

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> NeedleResult:
        """The needles, from `make_needles`.

        Raises:
            SurgeryError: as for `make_needles`; prompts exceed a model's positions; the tokenizer is another model's.
        """
        chosen = None
        if self.without is not None:
            options = {"top": self.top, "draws": self.draws, "seed": self.seed, "rows": self.off}
            chosen = HeadAblation.of(self.without, Anatomy.of(configs["out"]), **options)
        message = ("prompt and answer", "shorter lengths")
        refuse_too_long(configs, max(self.tokens, default=0), *message)
        text = load_text(self.text, part="held-out")
        form = form_for(tokenizer, self.form)
        draw_settings = {"samples": self.repetitions, "seed": self.seed, "secret": self.secret, "form": form}
        needles = make_needles(tokenizer, lengths=self.tokens, depths=self.depth_shares, text=text, **draw_settings)
        refuse_too_long(configs, longest_sequence(needles), *message)
        refuse_other_tokenizer(configs, max(token for n in needles for token in (*n.prompt, *n.answer)))
        grid = {name: list(dict.fromkeys(getattr(n, name[:-1]) for n in needles)) for name in ("lengths", "depths")}
        text_info = {"title": text.title, "sha256": text.sha256[:12]}
        settings = grid | draw_settings | {"text": text_info, "chance": chance(self.secret)}
        notes = list(chosen.notes) if chosen else []
        return NeedleResult("done", settings, needles, notes=notes, reach=reach_of(configs["out"]), ablation=chosen)

    def count_changes(self, label: str) -> int:
        return 1 + self.draws if self.without is not None and label == "out" else 0

    def changes(self, label: str, model: Any, result: NeedleResult) -> dict[str, AbstractContextManager]:
        return result.ablation.contexts(model) if result.ablation is not None and label == "out" else {}

    @classmethod
    def what(cls, settings: dict) -> str:
        return "hidden passkeys found"

    @classmethod
    def worst(cls, record: dict) -> tuple[float, str]:
        """See `Probe.worst`; it is reported if half of the needles that the base finds are lost, or more."""
        kept, base, out = (record.get(key) or {} for key in ("kept", "base", "out"))
        if not kept.get("of") or 2 * kept["kept"] > kept["of"]:
            return 0.0, ""
        copies = "no longer copies" if not kept["kept"] else "hardly copies any more"
        found = f"{out.get('hits')} of {out.get('of')} hidden passkeys found; the base finds {base.get('hits')}"
        if record.get("streaming"):
            found = f"{kept['kept']} of the {kept['of']} passkeys outside sinks and window found that the base finds"
        return 1 - kept["kept"] / kept["of"], f"This model {copies} from its prompt: {found}."

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        base, out = (record.get(label) or {} for label in ("base", "out"))
        return [
            Row(
                f"{cls.what(record.get('settings') or {})}, share", base.get("accuracy"), out.get("accuracy"), "{:.0%}"
            )
        ]

    @classmethod
    def metrics(cls, record: dict) -> list[tuple[dict, list[Metric]]]:
        settings, base, out = (record.get(key) or {} for key in ("settings", "base", "out"))
        text = settings.get("text") or {}
        about = {key: value for key, value in text.items() if key == "sha256"} | {"tokens": settings.get("lengths")}
        recall = Metric("recall", "hidden passkeys found", out.get("accuracy"), base.get("accuracy"))
        return [({"name": f"passkeys hidden in {text.get('title') or 'a text'}"} | about, [recall])]

    @classmethod
    def recall(cls, record: dict) -> float | None:
        return (record.get("kept") or {}).get("share")

    @classmethod
    def sentence(cls, record: dict) -> str:
        return kept_words("needles", record)

    @classmethod
    def paragraph(cls, record: dict) -> str:
        """How many hidden secrets the base and the converted model find."""
        if record.get("status") != "done":
            reason = record.get("reason") or "no reason was recorded"
            return f"The recall test (needles: secrets hidden in a text) was **not run**: {reason}."
        settings, *both = (record.get(key) or {} for key in ("settings", "base", "out"))
        lengths = ", ".join(f"{length:,}" for length in settings.get("lengths") or [])
        line = f"Recall test (needles: random {settings.get('secret')} hidden in that text, prompts of {lengths} "
        base, out = (f"{side.get('hits')} of {side.get('of')}" for side in both)
        late = LATE if settings.get("late") else ""
        line += f"tokens{late}): the base finds {base}, the converted model {out}."
        if off := record.get("without"):
            line += f" {ablation.sentence(off, record['out'])}"
        return line + kept_sentence(record, "finds")

    @classmethod
    def lines(cls, result: NeedleResult) -> list[Table | str]:
        """The hits in every cell, and the totals."""
        labels, settings, record = list(result.outcomes), result.settings, result.to_dict()
        lines: list[Table | str] = [_grid(result, labels)]
        lines.append(f"Needles answered exactly{', base → converted' if len(labels) > 1 else ''}.")
        if inside := sum(not result.counts(n) for n in result.cases):
            sinks, window = result.reach
            verdict = "are left out of the line `kept`" if len(labels) > 1 else "prove nothing"
            seen = f"They begin in the {sinks} sinks or in the last {window} tokens, which streaming heads see"
            lines.append(f"* {inside} of {len(result.cases)} needles {verdict}. {seen}.")
        lines.append("")
        for label in labels:
            side = result.side(label)
            name = NAMES[label] if len(labels) > 1 else "model"
            lines.append(
                f"{name + ':':<11}{side['hits']} of {side['of']} needles ({percent(side)}), "
                f"{side['nll']:.3f} nats per token on the right answer"
            )
        if kept := result.compare():
            where = " outside sinks and window" if result.reach else ""
            share = f"{kept['kept']} of the {kept['of']} that the base finds{where and ' and that lie' + where}"
            share += f" ({percent(kept)})"
            nothing = f"nothing to compare (the base finds no needle{where})"
            lines.append(f"{'kept:':<11}{share if kept['of'] else nothing}")
        if off := record.get("without"):
            lines += ablation.lines(off, record["out"])
        samples = f"{count(settings['samples'], 'prompt')} for each depth and length"
        size = f"{samples}, {settings['form']} form, seed {settings['seed']}{LATE if settings.get('late') else ''}"
        lines.append(f"{size}; a random guess is right with probability {settings['chance']:.0e}.")
        return [
            *lines,
            f"The secrets are hidden in: {settings['text']['title']} (sha256 {settings['text']['sha256']}).",
        ]

    @classmethod
    def verdict(cls, record: dict) -> str:
        kept = record.get("kept") or {}
        if not kept.get("of"):
            return ""
        if not kept["kept"]:
            return "The converted model no longer copies from its prompt: it finds none of what the base finds."
        where = " outside sinks and window" if record.get("streaming") else ""
        if kept["kept"] == kept["of"]:
            return f"The converted model finds all {kept['of']} needles that the base finds{where}."
        return f"The converted model finds {kept['kept']} of the {kept['of']} needles that the base finds{where}."

    @classmethod
    def picture(cls, result: NeedleResult) -> dict:
        """A heat map of the share of hits for each model, with counts in the cells."""
        starred = {(n.length, n.depth) for n in result.cases if not result.counts(n)}
        inside = [[(length, depth) in starred for length in result.lengths] for depth in result.depths]
        panels = {}
        for label in result.outcomes:
            side = result.side(label)
            counts = [[result.cell(label, length, depth) for length in result.lengths] for depth in result.depths]
            texts = [[f"{hits}/{of}" if of else "" for hits, of in row] for row in counts]
            name = NAMES[label] if len(result.outcomes) > 1 else "model"
            panels[f"{name}: {side['hits']} of {side['of']} found"] = {
                "values": side["grid"],
                "texts": texts,
                "hatched": inside,
            }
        kept = result.compare()
        title = "recall test: needles answered exactly"
        if kept and kept["of"]:
            interval = f"95% interval {kept['low']:.1%} to {kept['high']:.1%}"
            title += f"\nkept {kept['kept']} of {kept['of']} that the base finds\n({interval})"
        return {
            "panels": panels,
            "rows": [f"{depth:.2f}" for depth in result.depths],
            "columns": [f"{length:,}" for length in result.lengths],
            "row_label": "depth of the needle",
            "column_label": "tokens of the prompt",
            "value_label": "share of the needles found",
            "title": title,
            "limits": (0.0, 1.0),
            "hatch_label": "within sinks or window: proves nothing",
        }


def _grid(result: NeedleResult, labels: list[str]) -> Table:
    """Depth x length: hits of each model."""
    starred = {(n.length, n.depth) for n in result.cases if not result.counts(n)}
    rows = []
    for depth in result.depths:
        cells = []
        for length in result.lengths:
            hits = [result.cell(label, length, depth) for label in labels]
            star = "* " if (length, depth) in starred else ""
            cells.append(f"{star}{' → '.join(str(hit) for hit, _ in hits)} of {hits[0][1]}")
        rows.append([f"{depth:.2f}", *cells])
    return Table(("depth", *(f"prompts of {length:,} tokens" for length in result.lengths)), rows, justify="right")
