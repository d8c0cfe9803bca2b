"""Needles in a haystack: prompts of a given number of tokens that hide a random secret and ask for it at the end.

The method is Kamradt's ("Needle In A Haystack", 2023), for any text and any tokenizer. The needle's position in tokens
follows from the construction of the prompt, without a search among the tokens.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from surgery.data.text import BUILTIN, Text, begin_of_text, load_text
from surgery.errors import ModelMismatchError, SettingError, UnsupportedModelError, nearest

# (statement, question). The statement precedes the secret in the needle, and is also the beginning of the answer.
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
WORDS = (  # the words of secrets
    "apple river window candle forest silver garden pepper castle rocket butter violin marble saddle thunder pillow "
    "copper basket lantern pencil meadow anchor feather hammer orange ribbon tunnel velvet walnut harbor"
)
SECRETS = {"digits": 5, "words": 3}  # kind of secret -> default number of them
FORMS = ("auto", "chat", "plain")
SENTENCE_START = re.compile(r"\n\s*\n|(?<=[.!?])\s+|(?<=[。！？])\s*")
WORD_START = re.compile(r"\s+")
CUT = re.compile(r"\S{1,16}\s*")  # the haystack may end after a word, or inside a very long one


class Composed(NamedTuple):
    """A prompt as text, the letters [first, end) of what is asked for, and the first letter of the question."""

    text: str
    span: tuple[int, int]
    question: int


@dataclass(frozen=True)
class Needle:
    """One prompt.

    Attributes:
        length: requested number of tokens of the prompt.
        depth: requested position in the haystack, from 0 (beginning) to 1 (end).
        sample, seed: together with length and depth, they determine everything that is random.
        secret: the answer to the question.
        prompt: token ids, at most `length`, including BOS and chat template.
        answer: token ids of the secret, as they follow the prompt.
        span: tokens [first, end) of the prompt that contain the needle, which is a whole sentence.
        question: first token of the question. The question and the first words of the answer follow up to the end.
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
        """Whether no row of question and answer sees any part of the needle through sinks + window.

        Row i sees key j if j < sinks or i - j < window, so the question's first row sees furthest back. Rows between
        needle and question may still see the needle, and pass information on from layer to layer.
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
    """Prompts for a grid of lengths and depths, `samples` in each cell. The same arguments give the same prompts.

    A prompt has three parts. The first is a stretch of the text from a random sentence on, with the needle between two
    sentences. (At the end of the text, the stretch continues at its beginning.) The question follows, and then the
    first words of the answer: "What is the magic number for Oslo? ... The magic number for Oslo is". Secret, key,
    template and stretch are drawn for each prompt.

    Args:
        lengths: numbers of tokens of the prompts, which may be shorter by a word of the text.
        depths: the number of depths, evenly spaced inside (0, 1), or the depths themselves.
        text: see `surgery.data.text.load_text`; the held-out part of the built-in text.
        secret, size: "digits" or "words", and how many (default 5 digits, 3 words).
        form: "chat" puts text and question into a user's message of the tokenizer's chat template, and the answer's
            first words after the generation prompt. "plain" has no template. "auto" is chat if there is a template.
        templates: (statement up to the secret, question), both with {key}.

    Raises:
        SurgeryError: an argument makes no sense, the text or the length is too short, there is no chat template, or
            the tokenizer cannot encode the secret.
    """
    fractions = spread(depths)
    size = SECRETS.get(secret, 0) if size is None else size
    refuse_settings(lengths, fractions, samples, secret, size)
    words = load_text(text, part="held-out")
    maker = _NeedleMaker(tokenizer, words, form_for(tokenizer, form), secret, size, templates)
    return [maker.make(n, depth, i, seed) for n in lengths for depth in fractions for i in range(samples)]


def spread(depths: int | Sequence[float]) -> list[float]:
    """The depths: `depths` many, evenly spaced inside (0, 1), or those that are given."""
    return [(i + 1) / (depths + 1) for i in range(depths)] if isinstance(depths, int) else list(depths)


def refuse_form(form: str) -> None:
    """Raise where `form` is not one of "auto", "chat" and "plain"."""
    if form not in FORMS:
        raise SettingError(f"no form {form!r}", exists=", ".join(FORMS), fix=f"use {nearest(form, FORMS) or FORMS[0]}")


def form_for(tokenizer, form: str) -> str:
    """The form of prompts, "chat" or "plain"; "auto" depends on the tokenizer.

    Raises:
        SurgeryError: an unknown form, or "chat" without a chat template.
    """
    refuse_form(form)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if form == "chat" and not has_template:
        raise ModelMismatchError("the tokenizer has no chat template", fix="use the form plain")
    return ("chat" if has_template else "plain") if form == "auto" else form


def chance(secret: str, size: int | None = None) -> float:
    """The probability of guessing a secret."""
    return {"digits": 10, "words": len(WORDS.split())}[secret] ** -float(SECRETS[secret] if size is None else size)


def refuse_settings(
    lengths: Sequence[int], depths: Sequence[float], samples: int, secret: str, size: int | None = None
) -> None:
    """Raise where settings of prompts make no sense; arguments as for `make_needles`, with depths as shares."""
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
        self.bos = begin_of_text(tokenizer) if form == "plain" else []  # a chat template adds its own
        self.starts = [0, *(m.end() for m in SENTENCE_START.finditer(self.text))]
        self.letters_per_token = len(self.text) / max(1, len(self._ids(self.text)))

    def make(self, length: int, depth: float, sample: int, seed: int) -> Needle:
        """One needle. The arguments are those of `Needle`, and determine everything that is random."""
        draw = random.Random(f"{seed} {length} {depth:.6f} {sample}")  # a text seeds the same in every Python
        key = draw.choice(KEYS.split())
        statement, question = (template.format(key=key) for template in draw.choice(self.templates))
        hay = self._stretch(draw.choice(self.starts), length)
        secret = self._secret(draw, hay)
        cuts = [m.end() for m in CUT.finditer(hay)]

        def ids(cut: int) -> list[int]:
            return self._ids(self._compose(hay[:cut].rstrip(), depth, statement, secret, question).text)

        fits = bisect_right(cuts, length, key=lambda cut: len(ids(cut)))
        if not fits:
            raise SettingError(f"{length} tokens are too few for a needle", fix=f"at least {len(ids(cuts[0]))} tokens")
        fitted = hay[: cuts[fits - 1]].rstrip()
        composed = self._compose(fitted, depth, statement, secret, question)
        fix = f"use the secret {'words' if self.secret == 'digits' else 'digits'}"
        return Needle(
            length, depth, sample, seed, secret, **in_tokens(self.tokenizer, self._ids, secret, composed, fix)
        )

    def _stretch(self, start: int, length: int) -> str:
        """The text from `start` on, with more than enough letters for `length` tokens."""
        wanted = int(3 * length * self.letters_per_token) + 100
        cycle = f"{self.text[start:]}\n\n{self.text[:start]}\n\n".lstrip()
        return (cycle * (wanted // len(cycle) + 1))[:wanted]

    def _secret(self, draw: random.Random, hay: str) -> str:
        while True:
            if self.secret == "digits":
                secret = "".join(draw.choices("0123456789", k=self.size))
            else:
                secret = " ".join(draw.choices(WORDS.split(), k=self.size))
            if secret not in hay or self.size < 3:  # a short secret may occur everywhere
                return secret

    def _compose(self, hay: str, depth: float, statement: str, secret: str, question: str) -> Composed:
        position = _nearest_start(hay, depth * len(hay))
        needle = f"{statement} {secret}."
        before = hay[:position].rstrip()
        gap = hay[len(before) : position] or "\n\n"  # between two paragraphs, the needle is a paragraph
        first = len(before + gap) if before else 0
        content = f"{before}{gap * bool(before)}{needle}{gap}{hay[position:]}".rstrip() + f"\n\n{question}"
        question_start = len(content) - len(question)
        text, shift = asked(self.tokenizer, self.form, content, statement)
        return Composed(text, (shift + first, shift + first + len(needle)), shift + question_start)

    def _ids(self, text: str) -> list[int]:
        return self.bos + self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def asked(tokenizer, form: str, content: str, statement: str) -> tuple[str, int]:
    """The prompt: text and question, then the answer's first words. And the letter at which the content begins in it.

    Args:
        form: "chat": the content is a user's message in the chat template; or "plain".
        content: text and question.
        statement: the answer's first words.

    Raises:
        SurgeryError: the template raises, or changes the content.
    """
    if form == "plain":
        return f"{content}\n\n{statement}", 0
    text = chat_prompt(tokenizer, content, fix="use the form plain")
    shift = text.find(content)
    if shift < 0:
        raise UnsupportedModelError("the chat template changes the text of a message", fix="use the form plain")
    return text + statement, shift


def in_tokens(
    tokenizer, encode: Callable[[str], list[int]], secret: str, composed: Composed, fix: str
) -> dict[str, Any]:
    """Prompt, answer, span and question of a `Needle`.

    Args:
        encode: gives the tokens of a text, with BOS if the tokenizer has one.
        secret: follows the prompt after a space.
        fix: the remedy in the error.

    Raises:
        SurgeryError: the tokenizer cannot write the secret.
    """
    prompt = encode(composed.text)
    full = encode(f"{composed.text} {secret}")
    cut = common(prompt, full)  # a token that merges with the secret belongs to the answer
    if secret not in tokenizer.decode(full[cut:]):
        raise ModelMismatchError(
            f"the tokenizer cannot write {secret!r}: it gives {tokenizer.decode(full[cut:])!r}", fix=fix
        )
    first, end, question = (common(encode(composed.text[:at]), prompt) for at in (*composed.span, composed.question))
    if len(encode(composed.text[: composed.span[1]])) > end:  # its last letters share a token with what follows
        end += 1
    return {"prompt": tuple(full[:cut]), "answer": tuple(full[cut:]), "span": (first, end), "question": question}


def chat_prompt(tokenizer, content: str, fix: str, before: Sequence[dict[str, str]] = ()) -> str:
    """A user's message in the chat template, up to the beginning of the answer.

    Args:
        fix: the remedy in the error.
        before: earlier messages of the conversation, each with its role and content.

    Raises:
        SurgeryError: the template raises.
    """
    try:
        return tokenizer.apply_chat_template(
            [*before, {"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # templates without this variable ignore it
        )
    except Exception as error:  # a template may raise any error
        raise UnsupportedModelError(f"the chat template does not work: {error}", fix=fix) from error


def _nearest_start(hay: str, wanted: float) -> int:
    """The start of the sentence (or of the word, without sentences) that is nearest to a position in letters."""
    for pattern in (SENTENCE_START, WORD_START):
        starts = [m.end() for m in pattern.finditer(hay)]
        if starts:
            return min([0, *starts, len(hay)], key=lambda position: abs(position - wanted))
    return 0 if wanted <= len(hay) / 2 else len(hay)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
