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
    """A prompt as text, with places in letters.

    Attributes:
        text: the prompt.
        span: letters [first, end) of what is asked for.
        question: first letter of the question.
        more: letters [first, end) of what else the answer needs.
    """

    text: str
    span: tuple[int, int]
    question: int
    more: tuple[tuple[int, int], ...] = ()


class Hidden(NamedTuple):
    """What a prompt hides in its text, and what it asks.

    Attributes:
        sentences: (depth, sentence) for each needle.
        needed: indices of the sentences that the answer needs; the first is the one that is asked for.
        question: follows the text.
        lead: the answer's first words, which the prompt has already.
        answer: follows `lead` after a space.
    """

    sentences: Sequence[tuple[float, str]]
    needed: Sequence[int]
    question: str
    lead: str
    answer: str


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
        more: tokens [first, end) of further needles that the answer needs.
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
    more: tuple[tuple[int, int], ...] = ()

    def outside(self, sinks: int, window: int) -> bool:
        """Whether no row of question and answer sees any part of the needles through sinks + window.

        Row i sees key j if j < sinks or i - j < window, so the question's first row sees furthest back. Rows between
        needle and question may still see the needle, and pass information on from layer to layer.
        """
        spans = (self.span, *self.more)
        return all(first >= sinks and self.question - (end - 1) >= window for first, end in spans)


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
    templates: Sequence[tuple[str, ...]] = TEMPLATES,
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
        templates: (statement up to the secret, question), both with {key}; or (statement, question, first words of
            the answer) where these are not the statement.

    Raises:
        SurgeryError: an argument makes no sense, the text or the length is too short, there is no chat template, or
            the tokenizer cannot encode the secret.
    """
    fractions = spread(depths)
    size = SECRETS.get(secret, 0) if size is None else size
    refuse_settings(lengths, fractions, samples, secret, size)
    words = load_text(text, part="held-out")
    maker = NeedleMaker(tokenizer, words, form_for(tokenizer, form), secret, size)
    return [maker.make(n, depth, i, seed, templates) for n in lengths for depth in fractions for i in range(samples)]


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


def draw_secret(draw: random.Random, kind: str, size: int) -> str:
    """A random secret of `size` digits, or words."""
    if kind == "digits":
        return "".join(draw.choices("0123456789", k=size))
    return " ".join(draw.choices(WORDS.split(), k=size))


class NeedleMaker:
    """Makes prompts from one text with one tokenizer.

    Args:
        form: "chat" or "plain".
        secret, size: as for `make_needles`, without None.
    """

    def __init__(self, tokenizer, text: Text, form: str, secret: str, size: int):
        self.tokenizer, self.form, self.kind, self.size = tokenizer, form, secret, size
        self.title, self.text = text.title, text.text.strip()
        self.bos = begin_of_text(tokenizer) if form == "plain" else []  # a chat template adds its own
        self.starts = [0, *(m.end() for m in SENTENCE_START.finditer(self.text))]
        self.letters_per_token = len(self.text) / max(1, len(self.ids(self.text)))

    def make(self, length: int, depth: float, sample: int, seed: int, templates: Sequence[tuple[str, ...]]) -> Needle:
        """One needle. The numbers are those of `Needle`, and determine everything that is random."""
        draw = random.Random(f"{seed} {length} {depth:.6f} {sample}")  # a text seeds the same in every Python
        key = draw.choice(KEYS.split())
        statement, question, *lead = (template.format(key=key) for template in draw.choice(templates))
        hay = self.stretch(draw, length)
        secret = self.secret(draw, hay)
        hidden = Hidden([(depth, f"{statement} {secret}.")], [0], question, *lead or [statement], secret)
        return Needle(length, depth, sample, seed, secret, **self.fit(hay, length, hidden))

    def stretch(self, draw: random.Random, length: int) -> str:
        """The text from a random sentence on, with more than enough letters for `length` tokens."""
        start = draw.choice(self.starts)
        wanted = int(3 * length * self.letters_per_token) + 100
        cycle = f"{self.text[start:]}\n\n{self.text[:start]}\n\n".lstrip()
        return (cycle * (wanted // len(cycle) + 1))[:wanted]

    def secret(self, draw: random.Random, hay: str) -> str:
        """A random secret that is not in a text."""
        while True:
            secret = draw_secret(draw, self.kind, self.size)
            if secret not in hay or self.size < 3:  # a short secret may occur everywhere
                return secret

    def fit(self, hay: str, length: int, hidden: Hidden) -> dict[str, Any]:
        """Prompt, answer and places of a `Needle`: as much of the text `hay` as fits into a prompt of `length` tokens.

        Raises:
            SurgeryError: the length has no room for the question, or for the needles; the tokenizer cannot write the
                answer.
        """
        cuts = [m.end() for m in CUT.finditer(hay)]

        def ids(cut: int) -> list[int]:
            return self.ids(self._compose(hay[:cut].rstrip(), hidden).text)

        fits = bisect_right(cuts, length, key=lambda cut: len(ids(cut)))
        if not fits:
            least, what = len(ids(cuts[0])), "a needle" if len(hidden.sentences) == 1 else "these needles"
            raise SettingError(f"{length} tokens are too few for {what}", fix=f"at least {least} tokens")
        fitted = hay[: cuts[fits - 1]].rstrip()
        places = _places(fitted, [depth for depth, _ in hidden.sentences])
        if len(set(places)) < len(places):
            what = f"the text of a prompt of {length} tokens has no room for {len(places)} needles"
            raise SettingError(what, where=self.title, fix="a longer length, or fewer needles")
        fix = f"use the secret {'words' if self.kind == 'digits' else 'digits'}"
        return in_tokens(self.tokenizer, self.ids, hidden.answer, self._compose(fitted, hidden), fix)

    def _compose(self, hay: str, hidden: Hidden) -> Composed:
        places = _places(hay, [depth for depth, _ in hidden.sentences])
        content, done, spans = "", 0, {}
        for index in sorted(range(len(places)), key=lambda index: (places[index], hidden.sentences[index][0])):
            chunk = hay[done : places[index]]
            before = chunk.rstrip()
            gap = chunk[len(before) :] or "\n\n"  # between two paragraphs, a needle is a paragraph
            content += f"{before}{gap}" if before else ""
            spans[index] = (len(content), len(content) + len(hidden.sentences[index][1]))
            content += f"{hidden.sentences[index][1]}{gap}"
            done = places[index]
        content = f"{content}{hay[done:]}".rstrip() + f"\n\n{hidden.question}"
        question = len(content) - len(hidden.question)
        text, shift = asked(self.tokenizer, self.form, content, hidden.lead)
        span, *more = ((shift + first, shift + end) for first, end in (spans[index] for index in hidden.needed))
        return Composed(text, span, shift + question, tuple(more))

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, with BOS if the tokenizer begins a text with it."""
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
    """Prompt, answer, span, further spans and question of a `Needle`.

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

    def token_at(letter: int) -> int:
        return common(encode(composed.text[:letter]), prompt)

    def tokens_of(first: int, end: int) -> tuple[int, int]:
        last = token_at(end)
        shared = len(encode(composed.text[:end])) > last  # its last letters share a token with what follows
        return token_at(first), last + shared

    span, *more = (tokens_of(*letters) for letters in (composed.span, *composed.more))
    parts = {"prompt": tuple(full[:cut]), "answer": tuple(full[cut:]), "span": span, "more": tuple(more)}
    return parts | {"question": token_at(composed.question)}


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


def _places(hay: str, depths: Sequence[float]) -> list[int]:
    """For each depth, the start of a sentence (or of a word, without enough sentences) that is nearest to it.

    Places are letters. They differ where the text has enough of them, and come in the order of the depths.
    """
    order = sorted(range(len(depths)), key=depths.__getitem__)
    for pattern in (SENTENCE_START, WORD_START):
        starts = [m.end() for m in pattern.finditer(hay)]
        free = [0, *starts, len(hay)]
        if starts and len(set(free)) >= len(depths):
            break
    taken: list[int] = []
    for index in order:
        left = [place for place in free if place not in taken] or free
        taken.append(min(left, key=lambda place: abs(place - depths[index] * len(hay))))
    return [place for _, place in sorted(zip(order, sorted(taken), strict=True))]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
