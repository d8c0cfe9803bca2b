"""Hides several keys in one text, each with a secret, and asks for one of them: the multi-key retrieval of RULER
(Hsieh et al. 2024). With a single needle, a model is right if it finds any number in the text. Here it must match the
key.

Prompts, run and "kept" are those of the probe `needles`. The other keys use the same sentence and are evenly spread
over the text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long
from surgery.data.haystack import (
    FORMS,
    KEYS,
    SECRETS,
    SENTENCE_START,
    TEMPLATES,
    WORDS,
    Needle,
    chance,
    form_for,
    make_needles,
    refuse_form,
    refuse_settings,
    spread,
)
from surgery.data.text import BUILTIN, Text, load_text
from surgery.errors import TextError
from surgery.evaluation.probes.base import Effort, Limit
from surgery.evaluation.probes.fields import Shares, TextSource, check_setting
from surgery.evaluation.probes.needles import SHORTEST, NeedleResult, longest_prompt
from surgery.evaluation.probes.recall import RecallProbe, kept_limit
from surgery.evaluation.recall import longest_sequence, reach_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STRETCH = 2.5  # length of the stretch of text that a prompt is cut from, relative to the prompt
LETTERS = 20_000  # letters of the text from which the letters per token are computed
TRIES = 20  # most stretches of text that are tried for a prompt with the right number of keys


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

    text: TextSource = Field(BUILTIN, description="The haystack: 'builtin' or a text file.")
    length: int = Field(1024, ge=SHORTEST, description="Tokens of the prompts.")
    keys: int = Field(4, ge=2, le=16, description="Keys in a prompt, the one that is asked for among them.")
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
        return f"right one of {settings['keys']} hidden secrets"

    @classmethod
    def detail(cls, settings: dict) -> str:
        keys, secret, length = settings["keys"], settings["secret"], settings["lengths"][0]
        return f"{keys} keys with {secret} each in a prompt of {length:,} tokens, one asked for"

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
            SurgeryError: as for `make_needles`; or prompts are longer than a model's positions; or the tokenizer
                belongs to another model; or the text has no room for the keys.
        """
        refuse_too_long(configs, self.length, "prompt and answer", "a shorter length")
        text, form = load_text(self.text, part="held-out"), form_for(tokenizer, self.form)
        depths = spread(self.depths)
        samples = -(-self.cases // len(depths))
        cases = [self._case(tokenizer, text, form, depth, i) for depth in depths for i in range(samples)]
        refuse_too_long(configs, longest_sequence(cases), "prompt and answer", "a shorter length")
        refuse_other_tokenizer(configs, max(token for case in cases for token in (*case.prompt, *case.answer)))
        draw_settings = {"lengths": [self.length], "depths": list(depths), "samples": samples, "keys": self.keys}
        draw_settings |= {"seed": self.seed, "secret": self.secret, "form": form, "chance": chance(self.secret)}
        settings = draw_settings | {"text": {"title": text.title, "sha256": text.sha256[:12]}}
        return MultiNeedleResult("done", settings, cases, reach=reach_of(configs["out"]))

    def _case(self, tokenizer: Any, text: Text, form: str, depth: float, sample: int) -> Needle:
        """A prompt that asks for a key at a depth. Settings, depth and sample determine everything in it."""
        draw = random.Random(f"{self.seed} {self.keys} {self.length} {depth:.6f} {sample}")
        statement, question = draw.choice(TEMPLATES)
        asked_key, *others = draw.sample(KEYS.split(), len(KEYS.split()))
        statements = [f"{statement.format(key=other)} {_secret(draw, self.secret)}." for other in others]
        templates = ((statement.format(key=asked_key), question.format(key=asked_key)),)
        options = {"lengths": (self.length,), "depths": (depth,), "samples": 1, "form": form, "templates": templates}
        for _ in range(TRIES):
            stretch = self._stretch_with_other_keys(draw, tokenizer, text.text.strip(), statements)
            seed = draw.getrandbits(32)
            if sum(sentence in stretch for sentence in statements) < self.keys - 1:  # the text has too few sentences
                continue
            cut_text = replace(text, text=stretch)
            (needle,) = make_needles(tokenizer, text=cut_text, secret=self.secret, seed=seed, **options)
            prompt = tokenizer.decode(needle.prompt)
            counts = [prompt.count(sentence) for sentence in statements]
            if (sum(counts), max(counts)) == (self.keys - 1, 1):
                return replace(needle, sample=sample, seed=self.seed)
        raise TextError(
            f"this text has no room for {self.keys} keys in {self.length} tokens",
            where=text.title,
            fix="fewer keys, a longer length, or a text of shorter sentences",
        )

    def _stretch_with_other_keys(self, draw: random.Random, tokenizer: Any, text: str, statements: list[str]) -> str:
        """A stretch of the text in which the other keys are inserted at even distances."""
        letters = int(STRETCH * self.length * _letters_per_token(tokenizer, text[:LETTERS]))
        start = draw.choice([0, *(match.end() for match in SENTENCE_START.finditer(text))])
        looped = f"{text[start:]}\n\n{text[:start]}\n\n".lstrip()  # the text starts again after its end
        stretch = (looped * (letters // len(looped) + 1))[:letters]
        gap = _letters_per_token(tokenizer, stretch) * self.length / self.keys - len(statements[0])
        passages, position, inserted = [], 0, 0
        for match in SENTENCE_START.finditer(stretch):
            if match.end() >= (inserted + 1) * gap:
                passages += [stretch[position : match.end()], f"{statements[inserted % len(statements)]} "]
                position, inserted = match.end(), inserted + 1
        return "".join([*passages, stretch[position:]])


def _letters_per_token(tokenizer: Any, text: str) -> float:
    return len(text) / max(1, len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))


def _secret(draw: random.Random, kind: str) -> str:
    if kind == "digits":
        return "".join(draw.choices("0123456789", k=SECRETS[kind]))
    return " ".join(draw.choices(WORDS.split(), k=SECRETS[kind]))
