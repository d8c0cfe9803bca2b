"""Several keys with a secret each in one text, and a question about one of them: the multi-key retrieval of RULER
(Hsieh et al. 2024). Whoever finds "a number in the text" is right about one needle; here the key must be matched.

Prompts, run and "kept" are those of the needles; the other keys stand in the same words, evenly spread over the text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
from surgery.errors import SurgeryError
from surgery.evaluation.paired import percent
from surgery.evaluation.probes.base import CaseProbe, Limit, Row, Shares, Table, TextSource, in_own_words
from surgery.evaluation.probes.needles import NeedleResult, Outcome, reach_of, run_needles

STRETCH = 2.5  # letters of the text from which a prompt is cut, over those of the prompt
LETTERS = 20_000  # of the text that tell how many letters a token has
TRIES = 20  # stretches of the text that are tried until a prompt holds as many keys as were asked for


@dataclass
class MultiNeedleResult(NeedleResult):
    """What was measured; `cases` are the needles that are asked for, the other keys are part of their prompts."""

    COUNT: ClassVar[str] = "prompts"


class MultiNeedle(CaseProbe):
    """Several keys with a secret each, hidden in one text, and a question about one of them (RULER's multi-key)."""

    name: ClassVar[str] = "multi_needle"
    summary: ClassVar[str] = "several keys with a secret each in one text: is the one found that is asked for"
    cases_are: ClassVar[str] = "prompts"

    text: TextSource = Field(BUILTIN, description="The haystack: 'builtin' or a text file.")
    length: int = Field(1024, ge=64, description="Tokens of the prompts.")
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

    limits: ClassVar[dict[str, Limit]] = {
        "min_multi_needle": Limit(
            lambda facts: facts["kept"]["share"],
            at_least=True,
            description="Gate: share of the prompts answered by the base that are answered, at least.",
            most=1,
        )
    }

    @model_validator(mode="after")
    def _sensible(self) -> MultiNeedle:
        in_own_words(refuse_settings, (self.length,), spread(self.depths), self.cases, self.secret)
        in_own_words(refuse_form, self.form)
        return self

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> MultiNeedleResult:
        """Raises SurgeryError as `make_needles`; prompts longer than a model's positions, a foreign tokenizer."""
        refuse_too_long(configs, self.length, "prompt and answer", "a shorter length")
        words, form = load_text(self.text, part="held-out"), form_for(tokenizer, self.form)
        places = spread(self.depths)
        samples = -(-self.cases // len(places))
        cases = [self._case(tokenizer, words, form, place, i) for place in places for i in range(samples)]
        refuse_too_long(configs, _longest(cases), "prompt and answer", "a shorter length")
        refuse_other_tokenizer(configs, max(token for case in cases for token in (*case.prompt, *case.answer)))
        drawn = {"lengths": [self.length], "depths": list(places), "samples": samples, "keys": self.keys}
        drawn |= {"seed": self.seed, "secret": self.secret, "form": form, "chance": chance(self.secret)}
        settings = drawn | {"text": {"title": words.title, "sha256": words.sha256[:12]}}
        return MultiNeedleResult("done", settings, cases, reach=reach_of(configs["out"]))

    def _case(self, tokenizer: Any, words: Text, form: str, depth: float, sample: int) -> Needle:
        """A prompt that asks for a key at a depth; all in it follows from settings, depth and sample."""
        draw = random.Random(f"{self.seed} {self.keys} {self.length} {depth:.6f} {sample}")
        statement, question = draw.choice(TEMPLATES)
        key, *others = draw.sample(KEYS.split(), len(KEYS.split()))
        spoken = [f"{statement.format(key=other)} {_secret(draw, self.secret)}." for other in others]
        asked = ((statement.format(key=key), question.format(key=key)),)
        where = {"lengths": (self.length,), "depths": (depth,), "samples": 1, "form": form, "templates": asked}
        for _ in range(TRIES):
            hay, seed = self._hay(draw, tokenizer, words.text.strip(), spoken), draw.getrandbits(32)
            if sum(sentence in hay for sentence in spoken) < self.keys - 1:  # a text without sentences
                continue
            text = replace(words, text=hay)
            (needle,) = make_needles(tokenizer, text=text, secret=self.secret, seed=seed, **where)
            prompt = tokenizer.decode(needle.prompt)
            counts = [prompt.count(sentence) for sentence in spoken]
            if (sum(counts), max(counts)) == (self.keys - 1, 1):
                return replace(needle, sample=sample, seed=self.seed)
        raise SurgeryError(
            f"this text has no room for {self.keys} keys in {self.length} tokens",
            where=words.title,
            fix="fewer keys, a longer length, or a text of shorter sentences",
        )

    def _hay(self, draw: random.Random, tokenizer: Any, text: str, spoken: list[str]) -> str:
        """A stretch of the text with the other keys at even distances."""
        letters = int(STRETCH * self.length * _letters_per_token(tokenizer, text[:LETTERS]))
        start = draw.choice([0, *(match.end() for match in SENTENCE_START.finditer(text))])
        whole = f"{text[start:]}\n\n{text[:start]}\n\n".lstrip()  # a text that ends goes on from its beginning
        stretch = (whole * (letters // len(whole) + 1))[:letters]
        gap = _letters_per_token(tokenizer, stretch) * self.length / self.keys - len(spoken[0])
        parts, done, turn = [], 0, 0
        for match in SENTENCE_START.finditer(stretch):
            if match.end() >= (turn + 1) * gap:
                parts += [stretch[done : match.end()], f"{spoken[turn % len(spoken)]} "]
                done, turn = match.end(), turn + 1
        return "".join([*parts, stretch[done:]])

    def run(self, model: Any, cases: list, progress: Callable[[int], None]) -> list[Outcome]:
        return run_needles(model, cases, progress)

    def extra_bytes(self, cases: list, kv_bytes: int) -> int:
        return 2 * _longest(cases) * kv_bytes  # twice the cache: growing it copies it

    def is_broken(self, outcome: Outcome) -> bool:
        return outcome.nll - outcome.nll != 0  # NaN and infinity

    @classmethod
    def missing(cls, facts: dict) -> str:
        counted = (facts.get("kept") or {}).get("of")
        return "" if counted else facts.get("reason") or "the base answers no prompt that counts"

    @classmethod
    def rows(cls, facts: dict) -> list[Row]:
        base, out = (facts.get(label) or {} for label in ("base", "out"))
        name = f"right one of {facts['settings']['keys']} hidden secrets, share of prompts"
        return [Row(name, base.get("accuracy"), out.get("accuracy"), "{:.1%}")]

    @classmethod
    def sentence(cls, facts: dict) -> str:
        kept = facts.get("kept") or {}
        keys = facts["settings"]["keys"]
        return f"right one of {keys} secrets kept {kept['kept']} of {kept['of']}" if kept.get("of") else ""

    @classmethod
    def paragraph(cls, facts: dict) -> str:
        if facts.get("status") != "done":
            return f"Several needles in one text were **not run**: {facts.get('reason') or 'no reason was recorded'}."
        settings, kept, *both = (facts.get(key) or {} for key in ("settings", "kept", "base", "out"))
        base, out = (f"{side.get('hits')} of {side.get('of')}" for side in both)
        line = (
            f"Several needles ({settings['keys']} keys with {settings['secret']} each in a prompt of "
            f"{settings['lengths'][0]:,} tokens, one asked for): the base answers {base}, this model {out}."
        )
        if not kept.get("of"):
            return line
        where = " and that lie outside sinks and window" if facts.get("streaming") else ""
        interval = f"95 % interval {kept['low']:.1%} to {kept['high']:.1%}"
        return f"{line} Of those that the base answers{where}, it keeps {kept['kept']} of {kept['of']} ({interval})."

    @classmethod
    def lines(cls, result: MultiNeedleResult) -> list[Table | str]:
        settings, kept = result.settings, result.compare()
        said = [*super().lines(result), *([f"kept: {percent(kept)}"] if kept and kept["of"] else [])]
        said.append(
            f"{len(result.cases)} {settings['form']} prompts of {settings['lengths'][0]:,} tokens, seed "
            f"{settings['seed']}; a guess is right with probability {settings['chance']:.0e}"
        )
        return [*said, f"haystack: {settings['text']['title']}, sha256 {settings['text']['sha256']}"]


def _letters_per_token(tokenizer: Any, text: str) -> float:
    return len(text) / max(1, len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))


def _longest(needles: list[Needle]) -> int:
    return max(len(needle.prompt) + len(needle.answer) for needle in needles)


def _secret(draw: random.Random, kind: str) -> str:
    if kind == "digits":
        return "".join(draw.choices("0123456789", k=SECRETS[kind]))
    return " ".join(draw.choices(WORDS.split(), k=SECRETS[kind]))
