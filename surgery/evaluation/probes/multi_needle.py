"""Hides several keys in one text, each with a secret, and asks for one of them: the kind `multi` of the needles
(`surgery.data.needle_kinds.multi`), as a probe with one length and a limit of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long
from surgery.data import needle_kinds
from surgery.data.haystack import FORMS, SECRETS, form_for, refuse_form, refuse_settings, spread
from surgery.data.needle_kinds.base import Grid, keys_field
from surgery.data.needle_kinds.multi import MultiKey
from surgery.data.text import BUILTIN, load_text
from surgery.evaluation.probes.base import Effort, Limit
from surgery.evaluation.probes.fields import Shares, TextSource, check_setting
from surgery.evaluation.probes.needles import SHORTEST, NeedleResult, longest_prompt
from surgery.evaluation.probes.recall import RecallProbe, kept_limit
from surgery.evaluation.recall import longest_sequence, reach_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(repr=False)
class MultiNeedleResult(NeedleResult):
    """The result of the probe. `cases` are the needles that are asked for; their prompts contain the other keys."""

    PROBE: ClassVar[str] = "multi_needle"
    COUNT: ClassVar[str] = "prompts"


class MultiNeedle(RecallProbe):
    """Several keys with a secret each, hidden in one text, and a question about one of them (RULER's multi-key)."""

    name: ClassVar[str] = "multi_needle"
    summary: ClassVar[str] = "several keys with a secret each in one text: is the one found that is asked for"
    stage: ClassVar[str] = "recall test with several keys"
    title: ClassVar[str] = "Several needles in one text"
    guess: ClassVar[str] = MultiKey.guess

    text: TextSource = Field(BUILTIN, description="The haystack: 'builtin' or a text file.")
    length: int = Field(1024, ge=SHORTEST, description="Tokens of the prompts.")
    keys: int = keys_field()
    cases: int = Field(24, ge=1, description="Prompts in all, at least.")
    depths: int | Shares = Field(
        4, description="Places of the one that is asked for: their number, or a list of shares (0 begin, 1 end)."
    )
    seed: int = Field(0, description="Seed of what is drawn.")
    secret: str = Field("digits", description="digits or words.", json_schema_extra={"enum": list(SECRETS)})
    form: str = Field(
        "auto", description="chat, plain, or auto (by the tokenizer).", json_schema_extra={"enum": list(FORMS)}
    )

    limits: ClassVar[dict[str, Limit]] = {"min_multi_needle": kept_limit("prompts", "answered", "keys kept")}

    @model_validator(mode="after")
    def _refuse_unfit_settings(self) -> MultiNeedle:
        check_setting(refuse_settings, (self.length,), spread(self.depths), self.cases, self.secret)
        check_setting(refuse_form, self.form)
        return self

    @classmethod
    def what(cls, settings: dict) -> str:
        return MultiKey.found.format(keys=settings["keys"])

    @classmethod
    def detail(cls, settings: dict) -> str:
        hidden = needle_kinds.recorded(settings | {"kind": MultiKey.name}).detail(settings["secret"])
        return f"{hidden} in a prompt of {settings['lengths'][0]:,} tokens, one asked for"

    @property
    def effort(self) -> Effort:
        depths = len(spread(self.depths))
        return Effort(-(-self.cases // depths) * depths * self.length, self.length)

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        longest = longest_prompt(config)
        return {"length": longest} if longest is not None and longest < self.length else {}

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> MultiNeedleResult:
        """The needles that are asked for.

        Raises:
            SurgeryError: as for `Kind.make`; or prompts are longer than a model's positions; or the tokenizer
                belongs to another model; or the text has no room for the keys.
        """
        refuse_too_long(configs, self.length, "prompt and answer", "a shorter length")
        text, form = load_text(self.text, part="held-out"), form_for(tokenizer, self.form)
        kind, depths = MultiKey(keys=self.keys), spread(self.depths)
        samples = -(-self.cases // len(depths))
        cases = kind.make(tokenizer, text, form, Grid((self.length,), depths, samples, self.seed, self.secret))
        refuse_too_long(configs, longest_sequence(cases), "prompt and answer", "a shorter length")
        refuse_other_tokenizer(configs, max(token for case in cases for token in (*case.prompt, *case.answer)))
        draw_settings = {"lengths": [self.length], "depths": list(depths), "samples": samples, "keys": self.keys}
        draw_settings |= {"seed": self.seed, "secret": self.secret, "form": form, "chance": kind.chance(self.secret)}
        settings = draw_settings | {"text": {"title": text.title, "sha256": text.sha256[:12]}}
        return MultiNeedleResult("done", settings, cases, reach=reach_of(configs["out"]))
