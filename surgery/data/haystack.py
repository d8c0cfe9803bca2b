"""Needles in a haystack: prompts of a wanted number of tokens that hide a random secret and ask for it at the end.

The method is Kamradt's ("Needle In A Haystack", 2023), made from any text and for any tokenizer. Where the needle lies
is known in tokens from how the prompt was put together; it is never searched for among tokens.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.data.text import BUILTIN, Text, begin_of_text, load_text
from surgery.errors import ModelMismatchError, SettingError, UnsupportedModelError, nearest

# The statement before the secret, in the needle and in the first words of the answer; and the question.
TEMPLATES = (
    ("The magic number for {key} is", "What is the magic number for {key}?"),
    ("The ticket number of the ferry to {key} is", "What is the ticket number of the ferry to {key}?"),
    ("The number of the safe in {key} is", "What is the number of the safe in {key}?"),
    ("The number of the locker at {key} station is", "What is the number of the locker at {key} station?"),
    ("The password of the library in {key} is", "What is the password of the library in {key}?"),
    ("The lucky draw of {key} was won by number", "Which number won the lucky draw of {key}?"),
)
KEYS = (  # places
    "Oslo Lima Cairo Quito Dublin Nairobi Havana Riga Tunis Bergen Lagos Denver Kyoto Porto Perth Jakarta Geneva "
    "Manila Naples Accra Boston Prague Tehran Malmo"
)
WORDS = (  # of a secret
    "apple river window candle forest silver garden pepper castle rocket butter violin marble saddle thunder pillow "
    "copper basket lantern pencil meadow anchor feather hammer orange ribbon tunnel velvet walnut harbor"
)
SECRETS = {"digits": 5, "words": 3}  # kind -> how many
FORMS = ("auto", "chat", "plain")
SENTENCE_START = re.compile(r"\n\s*\n|(?<=[.!?])\s+|(?<=[。！？])\s*")
WORD_START = re.compile(r"\s+")
CUT = re.compile(r"\S{1,16}\s*")  # where the haystack may end: after a word, or inside a very long one


@dataclass(frozen=True)
class Needle:
    """One prompt.

    Attributes:
        length, depth: as requested: tokens of the prompt; position in the haystack, 0 = begin, 1 = end.
        sample, seed: with length and depth they decide everything that is random.
        secret: the answer to the question.
        prompt: token ids, at most `length`, BOS and chat template included.
        answer: token ids of the secret as they follow the prompt.
        span: tokens [first, end) of the prompt that hold the needle, the whole sentence.
        question: first token of the question; all from there on are question and first words of the answer.
    """

    length: int
    depth: float
    sample: int
    seed: int
    secret: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    span: tuple[int, int]
    question: int

    def outside(self, sinks: int, window: int) -> bool:
        """Whether no row of question and answer sees any of the needle through sinks + window.

        Row i sees key j if j < sinks or i - j < window; of all those rows the question's first looks back furthest.
        Rows between needle and question may still see it and hand something on, from layer to layer.
        """
        first, end = self.span
        return first >= sinks and self.question - (end - 1) >= window


def make_needles(
    tokenizer,
    *,
    lengths: Sequence[int] = (512, 1024, 2048),
    depths: int | Sequence[float] = 5,
    samples: int = 4,
    seed: int = 0,
    text: str | Path | Text = BUILTIN,
    secret: str = "digits",
    size: int | None = None,
    form: str = "auto",
    templates: Sequence[tuple[str, str]] = TEMPLATES,
) -> list[Needle]:
    """Prompts for a grid length x depth, `samples` in each cell; the same ones for the same arguments.

    A prompt is a stretch of the text from a random sentence on (a text that ends goes on from its beginning) with
    the needle between two sentences, the question, and the first words of the answer: "What is the magic number for
    Oslo? ... The magic number for Oslo is". Secret, key, template and stretch are drawn for each prompt.

    Args:
        lengths: tokens of the prompts; reached to within a word of the text.
        depths: their number, evenly spaced inside (0, 1), or the depths themselves.
        text: see `surgery.data.text.load_text`; of the built-in text the held-out part.
        secret, size: "digits" or "words", and how many (5 digits, 3 words).
        form: "chat" puts text and question into a user's message of the tokenizer's chat template, the answer's
            first words after the generation prompt; "plain" has no template; "auto" is chat where there is one.
        templates: (statement up to the secret, question), both with {key}.

    Raises:
        SurgeryError: an argument makes no sense, the text is too short or the length is, no chat template, a
            tokenizer that cannot write the secret.
    """
    fractions = spread(depths)
    size = SECRETS.get(secret, 0) if size is None else size
    refuse_settings(lengths, fractions, samples, secret, size)
    words = load_text(text, part="held-out")
    maker = _NeedleMaker(tokenizer, words, form_for(tokenizer, form), secret, size, templates)
    return [maker.make(n, depth, i, seed) for n in lengths for depth in fractions for i in range(samples)]


def spread(depths: int | Sequence[float]) -> list[float]:
    """Depths: so many, evenly spaced inside (0, 1), or those that are given."""
    return [(i + 1) / (depths + 1) for i in range(depths)] if isinstance(depths, int) else list(depths)


def refuse_form(form: str) -> None:
    """Raise where a form is none."""
    if form not in FORMS:
        raise SettingError(f"no form {form!r}", exists=", ".join(FORMS), fix=f"use {nearest(form, FORMS) or FORMS[0]}")


def form_for(tokenizer, form: str) -> str:
    """ "chat" or "plain", which "auto" means for a tokenizer.

    Raises:
        SurgeryError: another word, or "chat" without a chat template.
    """
    refuse_form(form)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if form == "chat" and not has_template:
        raise ModelMismatchError("the tokenizer has no chat template", fix="use the form plain")
    return ("chat" if has_template else "plain") if form == "auto" else form


def chance(secret: str, size: int | None = None) -> float:
    """Probability of guessing a secret."""
    return {"digits": 10, "words": len(WORDS.split())}[secret] ** -float(SECRETS[secret] if size is None else size)


def refuse_settings(
    lengths: Sequence[int], depths: Sequence[float], samples: int, secret: str, size: int | None = None
) -> None:
    """Raise where prompts of such settings make no sense; arguments as of `make_needles`, depths as shares."""
    size = SECRETS.get(secret, 0) if size is None else size
    if not lengths or min(lengths) < 1 or samples < 1 or not depths:
        raise SettingError(
            "needles need at least one length, one depth and one sample",
            fix="for example 512 tokens, 5 depths and 4 samples",
        )
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise SettingError(f"depth {wrong[0]} is outside of the text", fix="depths go from 0 to 1")
    if secret not in SECRETS:
        fix = f"use {nearest(secret, SECRETS) or 'digits'}"
        raise SettingError(f"no secret {secret!r}", exists=", ".join(SECRETS), fix=fix)
    if size < 1:
        raise SettingError(f"a secret of {size} {secret} is none", fix="use at least 1")


class _NeedleMaker:
    """Makes needles in one text with one tokenizer."""

    def __init__(self, tokenizer, text: Text, form: str, secret: str, size: int, templates):
        self.tokenizer, self.form, self.secret, self.size = tokenizer, form, secret, size
        self.title, self.text, self.templates = text.title, text.text.strip(), templates
        self.bos = begin_of_text(tokenizer) if form == "plain" else []  # a chat template brings its own
        self.starts = [0, *(m.end() for m in SENTENCE_START.finditer(self.text))]
        self.letters_per_token = len(self.text) / max(1, len(self._ids(self.text)))

    def make(self, length: int, depth: float, sample: int, seed: int) -> Needle:
        """One needle; the arguments are those of `Needle` and decide everything that is random."""
        draw = random.Random(f"{seed} {length} {depth:.6f} {sample}")  # a text seeds the same in every Python
        key = draw.choice(KEYS.split())
        statement, question = (template.format(key=key) for template in draw.choice(self.templates))
        hay = self._stretch(draw.choice(self.starts), length)
        secret = self._secret(draw, hay)
        cuts = [m.end() for m in CUT.finditer(hay)]

        def ids(cut: int) -> list[int]:
            text, _, _ = self._compose(hay[:cut].rstrip(), depth, statement, secret, question)
            return self._ids(text)

        fits = bisect_right(cuts, length, key=lambda cut: len(ids(cut)))
        if not fits:
            raise SettingError(f"{length} tokens are too few for a needle", fix=f"at least {len(ids(cuts[0]))} tokens")
        fitted = hay[: cuts[fits - 1]].rstrip()
        text, (first, end), question_start = self._compose(fitted, depth, statement, secret, question)
        prompt = self._ids(text)
        full = self._ids(f"{text} {secret}")
        cut = common(prompt, full)  # what merges with the secret belongs to the answer
        if secret not in self.tokenizer.decode(full[cut:]):
            raise ModelMismatchError(
                f"the tokenizer cannot write {secret!r}: it gives {self.tokenizer.decode(full[cut:])!r}",
                fix=f"use the secret {'words' if self.secret == 'digits' else 'digits'}",
            )
        letters = (first, end, question_start)
        needle_start, needle_end, question_token = (common(self._ids(text[:letter]), prompt) for letter in letters)
        if len(self._ids(text[:end])) > needle_end:  # the needle's last letters share a token with what follows
            needle_end += 1
        spans = {"span": (needle_start, needle_end), "question": question_token}
        return Needle(length, depth, sample, seed, secret, tuple(full[:cut]), tuple(full[cut:]), **spans)

    def _stretch(self, start: int, length: int) -> str:
        """The text from `start` on, more than enough for `length` tokens."""
        wanted = int(3 * length * self.letters_per_token) + 100
        cycle = f"{self.text[start:]}\n\n{self.text[:start]}\n\n".lstrip()
        return (cycle * (wanted // len(cycle) + 1))[:wanted]

    def _secret(self, draw: random.Random, hay: str) -> str:
        while True:
            if self.secret == "digits":
                secret = "".join(draw.choices("0123456789", k=self.size))
            else:
                secret = " ".join(draw.choices(WORDS.split(), k=self.size))
            if secret not in hay or self.size < 3:  # a short one may occur everywhere
                return secret

    def _compose(self, hay: str, depth: float, statement: str, secret: str, question: str):
        """The text of a prompt, letters [first, end) of the needle in it, and the question's first letter."""
        position = _nearest_start(hay, depth * len(hay))
        needle = f"{statement} {secret}."
        before = hay[:position].rstrip()
        gap = hay[len(before) : position] or "\n\n"  # between two paragraphs the needle is one, else a sentence
        first = len(before + gap) if before else 0
        content = f"{before}{gap * bool(before)}{needle}{gap}{hay[position:]}".rstrip() + f"\n\n{question}"
        question_start = len(content) - len(question)
        if self.form == "plain":
            return f"{content}\n\n{statement}", (first, first + len(needle)), question_start
        text = chat_prompt(self.tokenizer, content, fix="use the form plain")
        shift = text.find(content)
        if shift < 0:
            raise UnsupportedModelError("the chat template changes the text of a message", fix="use the form plain")
        return text + statement, (shift + first, shift + first + len(needle)), shift + question_start

    def _ids(self, text: str) -> list[int]:
        return self.bos + self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def chat_prompt(tokenizer, content: str, fix: str) -> str:
    """A user's message as the model wants to see it, up to where it would answer.

    Raises:
        SurgeryError: the template raises; `fix`: what to do then.
    """
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # a variable that other templates ignore
        )
    except Exception as error:  # a template may raise whatever its author thought of
        raise UnsupportedModelError(f"the chat template does not work: {error}", fix=fix) from error


def _nearest_start(hay: str, wanted: float) -> int:
    """The start of a sentence nearest to a position in letters; of a word where the text has no sentences."""
    for pattern in (SENTENCE_START, WORD_START):
        starts = [m.end() for m in pattern.finditer(hay)]
        if starts:
            return min([0, *starts, len(hay)], key=lambda position: abs(position - wanted))
    return 0 if wanted <= len(hay) / 2 else len(hay)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
