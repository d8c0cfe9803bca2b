"""The recall test: which needles a model finds, alone or compared with its base, over a grid of lengths and depths.

A needle is found if decoding with the model's own cache gives exactly its secret; the answer's NLL is measured too.
Base and converted model run one after the other, never both in memory. The surgery is judged by the share of needles
"kept": those that the converted model finds, among those that the base finds. Needles that streaming heads see anyway,
through sinks or window, prove nothing and do not count.

`kind` chooses what is hidden and how it is asked for (`surgery.data.needle_kinds`): each kind has its floor, which is
what a guess reaches, and a base that does not exceed it by its interval proves nothing.

With `without=SCORES.json` the model is asked again with its highest-scored query heads off, and with random ones off
(`surgery.evaluation.ablation`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, create_model, model_validator

from surgery.architecture.anatomy import Anatomy, positions_of
from surgery.calibration.head_scores import ABOVE
from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long
from surgery.data import needle_kinds
from surgery.data.haystack import FORMS, SECRETS, form_for, refuse_form, refuse_settings, spread
from surgery.data.needle_kinds.base import Grid, Kind
from surgery.data.text import BUILTIN, load_text
from surgery.evaluation import ablation
from surgery.evaluation.ablation import ROWS, HeadAblation
from surgery.evaluation.paired import NAMES, kept_words, percent
from surgery.evaluation.probes.base import Aliases, Effort, Flag, Limit, Metric, RecipeField, Row, Table
from surgery.evaluation.probes.fields import FileName, Shares, TextSource, TokenLengths, check_setting, settings_error
from surgery.evaluation.probes.grid import NeedleResult, heat_map, hits_table, too_few
from surgery.evaluation.probes.recall import (
    ANSWER,
    LATE,
    RecallProbe,
    both_words,
    floor_line,
    kept_limit,
    kept_sentence,
    share_words,
)
from surgery.evaluation.recall import longest_sequence, reach_of
from surgery.io.printing import count

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery.io.loading import ModelSource

SHORTEST = 64  # tokens of a prompt
FAR = (0.1, 0.25, 0.4, 0.55)  # depths far from the question, where a head split could lose a needle


def longest_prompt(config: PretrainedConfig, secrets: int = 1) -> int | None:
    """The most tokens of a prompt that leaves positions for its answer; None: no limit, or too low a one to ask.

    Args:
        secrets: how many an answer has.
    """
    longest = (positions_of(config) or 0) - secrets * ANSWER
    return longest if longest >= SHORTEST else None


def _kind_settings() -> dict[str, Any]:
    """The setting `kind`, and the settings of all kinds, with the kinds that read them."""
    options = {"description": f"What is hidden and asked: {', '.join(needle_kinds.REGISTRY)}."}
    fields: dict[str, Any] = {
        "kind": (
            str,
            Field(needle_kinds.DEFAULT, **options, json_schema_extra={"enum": list(needle_kinds.REGISTRY)}),
        )
    }
    for cls in needle_kinds.every():
        for key, info in cls.model_fields.items():
            kinds = ", ".join(needle_kinds.readers(key))
            own = info.description[0].lower() + info.description[1:]
            bounded = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
            fields[key] = (bounded, Field(info.default, description=f"With kind {kinds}: {own}"))
    return fields


KIND_SETTINGS = _kind_settings()
# The settings of kinds are settings of the probe. A new kind brings its own.
RecallOfKinds: Any = create_model("RecallOfKinds", __base__=RecallProbe, __doc__=RecallProbe.__doc__, **KIND_SETTINGS)


class Needles(RecallOfKinds):
    """Secrets hidden in a text: a grid of prompt lengths and depths, in several kinds."""

    name: ClassVar[str] = "needles"
    summary: ClassVar[str] = "secrets hidden in a text, over lengths and depths: which are found"
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
        check_setting(needle_kinds.find, self.kind)
        self._refuse_settings_of_other_kinds()
        check_setting(self.chosen_kind.refuse)
        return self

    def _refuse_settings_of_other_kinds(self) -> None:
        kind, given = needle_kinds.find(self.kind), self.model_fields_set
        others = [key for key in KIND_SETTINGS if key not in {"kind", *kind.model_fields}]
        unread = [key for key in (*others, *kind.unread) if key in given]
        if not unread:
            return
        kinds = [name for name in needle_kinds.REGISTRY if set(unread) <= needle_kinds.find(name).model_fields.keys()]
        exists = f"the kind {kind.name} has {', '.join(kind.model_fields) or 'no settings of its own'}"
        fix = f"kind={' or '.join(kinds)}, or " * bool(kinds) + f"leave out {' and '.join(unread)}"
        what = f"{'are' if len(unread) > 1 else 'is'} not for kind={kind.name}"
        raise settings_error(f"{' and '.join(unread)} {what}", exists=exists, fix=fix)

    @property
    def chosen_kind(self) -> Kind:
        """The kind with its settings."""
        return needle_kinds.of({key: getattr(self, key) for key in KIND_SETTINGS})

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
        longest = longest_prompt(config, self.chosen_kind.secrets)
        if longest is None or longest >= max(self.tokens, default=0):
            return {}
        if self.length is not None:
            return {"length": longest}
        return {"lengths": list(dict.fromkeys(min(length, longest) for length in self.lengths))}

    def refuse(self, base: ModelSource, out: Anatomy) -> None:
        """Raise if the score file of `without` is not of this model, or names too few heads."""
        if self.without is not None:
            self._heads_off(self.without, out)

    def _heads_off(self, scores: str, out: Anatomy) -> HeadAblation:
        """The query heads of a model that are switched off, by a score file."""
        return HeadAblation.of(scores, out, top=self.top, draws=self.draws, seed=self.seed, rows=self.off)

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> NeedleResult:
        """The needles, from the kind.

        Raises:
            SurgeryError: as for `Kind.make`; prompts exceed a model's positions; the tokenizer is another model's.
        """
        chosen = None if self.without is None else self._heads_off(self.without, Anatomy.of(configs["out"]))
        message = ("prompt and answer", "shorter lengths")
        refuse_too_long(configs, max(self.tokens, default=0), *message)
        text = load_text(self.text, part="held-out")
        form, kind = form_for(tokenizer, self.form), self.chosen_kind
        cells = Grid(self.tokens, self.depth_shares, self.repetitions, self.seed, self.secret)
        needles = kind.make(tokenizer, text, form, cells)
        refuse_too_long(configs, longest_sequence(needles), *message)
        refuse_other_tokenizer(configs, max(token for n in needles for token in (*n.prompt, *n.answer)))
        grid = {name: list(dict.fromkeys(getattr(n, name[:-1]) for n in needles)) for name in ("lengths", "depths")}
        text_info = {"title": text.title, "sha256": text.sha256[:12]}
        settings = grid | {"samples": self.repetitions, "seed": self.seed, "secret": self.secret, "form": form}
        settings |= {"text": text_info, "chance": kind.chance(self.secret)}
        if kind.name != needle_kinds.DEFAULT:
            settings |= {"kind": kind.name} | kind.model_dump()
        settings = {key: value for key, value in settings.items() if key not in kind.unread}
        notes = list(chosen.notes) if chosen else []
        return NeedleResult("done", settings, needles, notes=notes, reach=reach_of(configs["out"]), ablation=chosen)

    def count_changes(self, label: str) -> int:
        return 1 + self.draws if self.without is not None and label == "out" else 0

    def changes(self, label: str, model: Any, result: NeedleResult) -> dict[str, AbstractContextManager]:
        return result.ablation.contexts(model) if result.ablation is not None and label == "out" else {}

    @classmethod
    def what(cls, settings: dict) -> str:
        return needle_kinds.recorded(settings).finds

    @classmethod
    def worst(cls, record: dict) -> tuple[float, str]:
        """See `Probe.worst`; it is reported if half of the needles that the base finds are lost, or more."""
        kept, base, out = (record.get(key) or {} for key in ("kept", "base", "out"))
        if not kept.get("of") or 2 * kept["kept"] > kept["of"] or cls.missing(record):
            return 0.0, ""
        if (kind := needle_kinds.recorded(record.get("settings") or {})).name != needle_kinds.DEFAULT:
            lost = _lost(kind)
            found = f"{kind.finds}: {kept['kept']} of the {kept['of']} prompts that the base answers"
            return 1 - kept["kept"] / kept["of"], f"This model {lost} ({found})."
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
        recall = Metric("recall", cls.what(settings), out.get("accuracy"), base.get("accuracy"))
        kind, hidden = settings.get("kind") or needle_kinds.DEFAULT, "passkeys"
        if kind != needle_kinds.DEFAULT:  # the settings of the kind make other data of the same text
            hidden = f"needles of kind {kind}"
            about |= needle_kinds.recorded(settings).model_dump()
        return [({"name": f"{hidden} hidden in {text.get('title') or 'a text'}"} | about, [recall])]

    @classmethod
    def recall(cls, record: dict) -> float | None:
        """See `Probe.recall`; only of the default kind: other kinds ask for more than a copy."""
        other = ((record.get("settings") or {}).get("kind") or needle_kinds.DEFAULT) != needle_kinds.DEFAULT
        return None if other or cls.missing(record) else record["kept"]["share"]

    @classmethod
    def sentence(cls, record: dict) -> str:
        kind = needle_kinds.recorded(record.get("settings") or {})
        what = "needles" if kind.name == needle_kinds.DEFAULT else kind.finds
        return "" if cls.missing(record) else kept_words(what, record)

    @classmethod
    def paragraph(cls, record: dict) -> str:
        """How many hidden secrets the base and the converted model find."""
        if record.get("status") != "done":
            reason = record.get("reason") or "no reason was recorded"
            return f"The recall test (needles: secrets hidden in a text) was **not run**: {reason}."
        settings = record.get("settings") or {}
        lengths = ", ".join(f"{length:,}" for length in settings.get("lengths") or [])
        hidden, comma, asked = needle_kinds.recorded(settings).detail(settings.get("secret")).partition(",")
        line = f"Recall test (needles: {hidden} hidden in that text{comma}{asked}, prompts of {lengths} "
        late = LATE if settings.get("late") else ""
        line += f"tokens{late}): {both_words(record, 'finds')}."
        if off := record.get("without"):
            line += f" {ablation.sentence(off, record['out'])}"
        return line + kept_sentence(record, "finds")

    @classmethod
    def lines(cls, result: NeedleResult) -> list[Table | str]:
        """The hits in every cell, and the totals."""
        labels, settings, record = list(result.outcomes), result.settings, result.to_dict()
        lines: list[Table | str] = [hits_table(result)]
        lines.append(f"Needles answered exactly{', base → converted' if len(labels) > 1 else ''}.")
        if few := too_few(result):
            lines.append(few)
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
        low = floor_line(record)
        if (kept := result.compare()) and not (low and kept["of"]):
            where = " outside sinks and window" if result.reach else ""
            share = f"{kept['kept']} of the {kept['of']} that the base finds{where and ' and that lie' + where}"
            share += f" ({percent(kept)})"
            nothing = f"nothing to compare (the base finds no needle{where})"
            lines.append(f"{'kept:':<11}{share if kept['of'] else nothing}")
        if off := record.get("without"):
            lines += ablation.lines(off, record["out"])
        samples = f"{count(settings['samples'], 'prompt')} for each depth and length"
        size = f"{samples}, {settings['form']} form, seed {settings['seed']}{LATE if settings.get('late') else ''}"
        kind, share = needle_kinds.recorded(settings), share_words(settings["chance"])
        if kind.name != needle_kinds.DEFAULT:
            lines.append(f"Kind {kind.name}: {kind.detail(settings.get('secret'))}.")
        lines.append(f"{size}; {kind.guess} is right with probability {share}.")
        if low:
            lines.append(low)
        return [
            *lines,
            f"The secrets are hidden in: {settings['text']['title']} (sha256 {settings['text']['sha256']}).",
        ]

    @classmethod
    def verdict(cls, record: dict) -> str:
        kept = record.get("kept") or {}
        if not kept.get("of") or cls.missing(record):
            return ""
        if not kept["kept"]:
            lost = _lost(needle_kinds.recorded(record.get("settings") or {}))
            return f"The converted model {lost}: it finds none of what the base finds."
        where = " outside sinks and window" if record.get("streaming") else ""
        if kept["kept"] == kept["of"]:
            return f"The converted model finds all {kept['of']} needles that the base finds{where}."
        return f"The converted model finds {kept['kept']} of the {kept['of']} needles that the base finds{where}."

    @classmethod
    def picture(cls, result: NeedleResult) -> dict:
        """A heat map of the share of hits for each model, with counts in the cells."""
        return heat_map(result)


def _lost(kind: Kind) -> str:
    return "no longer copies from its prompt" if kind.copies else f"can no longer do this ({kind.summary})"
