"""Text on which models are measured: Python's language reference, or the user's file.

The built-in text is `pydoc_data.topics` of the standard library, which `help("with")` prints. Without repeats and
mark-up it is some 300 KB of English with code. Nothing is downloaded or shipped. The text differs between Python
versions, so every figure names it by title and sha256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from surgery.errors import SurgeryError, TextError, nearest

if TYPE_CHECKING:
    import torch

BUILTIN, SELF = "builtin", "self"  # the built-in text, and text that a model writes
CONVERSATIONS = "conversations"  # that a model writes
VARIED = "varied"  # that a model writes, from openings of many kinds
WRITTEN = (SELF, CONVERSATIONS)  # the names of `heal.data` that the base writes
SELF_TEXT = "self-text"  # name of the files with text that a model wrote itself (generated.py)
# Samples at a time. On one core, SmolLM2-135M wrote 66 tokens a second with 8 samples, 146 with 32, and 189 with 64
# (examples/benchmarks/bench_healing.py write). The cache of 64 samples of 512 tokens takes 1.5 GB for this model.
BATCH = 64
PARTS = {"calibration": 2, "held-out": 1}  # name -> share of the built-in text


class Written(NamedTuple):
    """What of a calibration text the model writes itself.

    Attributes:
        running, conversations: shares of the samples: running text, and conversations in the chat template.
        varied: running text begins with English openings of many kinds (openings.py).
    """

    running: float = 0.0
    conversations: float = 0.0
    varied: bool = False


# Calibration texts with a name. The samples that the model does not write are of the built-in text. Any other name is
# a file, and all samples are of it.
CALIBRATION_TEXTS = {
    BUILTIN: Written(),
    SELF: Written(1.0),
    "mixed": Written(0.5),
    CONVERSATIONS: Written(0.25, 0.25),
    VARIED: Written(0.5, varied=True),
}
CALIBRATION_TEXTS_ARE = (  # of a field that takes these names
    "builtin (the calibration part of Python's language reference), self (what the model writes), mixed (half builtin "
    "and half self), varied (mixed, but the model's texts begin as stories, letters, news and other kinds of English "
    "text), conversations (half builtin, a quarter self, and a quarter conversations that the model writes), or a "
    "UTF-8 text file."
)
STOPS = tuple(".!?…。！？؟।\n")  # a sentence ends after a token that ends with one of them
CLOSERS = "\"'”’»)]」』"  # may follow the stop

_OWN_FILE = "give a UTF-8 text file of your own: --text FILE"
_SHORT = 40  # characters; a shorter paragraph may be in both parts ("Changed in version 3.8.")


@dataclass(frozen=True)
class Text:
    """A text and its name.

    Attributes:
        title: the label of every figure that is measured on it.
        sha256: of `text` in UTF-8, 64 hex digits.
        text: the text itself.
    """

    title: str
    sha256: str
    text: str


def load_text(source: str | Path | Text = BUILTIN, part: str = "held-out") -> Text:
    """The built-in text, or a file.

    Args:
        source: "builtin", the path of a UTF-8 text file, or a `Text`, which is returned unchanged.
        part: "calibration" (two thirds) or "held-out" (one third) of the built-in text. The parts share no
            topic, and no paragraph of 40 characters or more. A file is always read as a whole: calibrate and evaluate
            on different files.

    Raises:
        SurgeryError: unknown part; no `pydoc_data` in this Python; a file that is missing, empty or not text.
    """
    if part not in PARTS:
        raise SurgeryError(
            f"no part {part!r} of the text",
            exists=", ".join(PARTS),
            fix=f"use {nearest(part, PARTS) or 'held-out'}",
        )
    if isinstance(source, Text):
        return source
    if source == BUILTIN:
        import platform

        major, minor, _ = platform.python_version_tuple()
        title = f"Python {major}.{minor} language reference (pydoc_data.topics), {part} part"
        return _named(title, _builtin()[part])
    return _named(Path(source).name, _read(Path(source)))


def windows(text: Text | str, tokenizer, length: int = 512, count: int = 8) -> torch.Tensor:
    """Windows of a text that do not overlap, spread evenly over all of it.

    No special token is added, with one exception: if the tokenizer itself begins a text with BOS, every window begins
    with it, since such models fail without it.

    Args:
        text: the text to cut.
        tokenizer: a Transformers tokenizer.
        length: tokens in a window, including BOS; at least 2.
        count: number of windows; at least 1.

    Returns:
        LongTensor [count, length].

    Raises:
        SurgeryError: the text is too short; `length` or `count` makes no sense.
    """
    import torch

    if length < 2 or count < 1:
        raise SurgeryError(
            f"{count} windows of {length} tokens cannot be measured", fix="use at least 1 window of 2 tokens"
        )
    words = text.text if isinstance(text, Text) else text
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = begin_of_text(tokenizer)
    body = length - len(prefix)
    if len(ids) < count * body:
        raise TextError(
            f"the text is too short: it has {len(ids)} tokens, {count} windows of {length} need {count * body}",
            where=text.title if isinstance(text, Text) else "",
            fix=_shorter(len(ids), body),
        )
    starts = [index * len(ids) // count for index in range(count)]
    return torch.tensor([prefix + ids[start : start + body] for start in starts], dtype=torch.long)


def _shorter(tokens: int, body: int) -> str:
    fits = tokens // body
    return f"use a longer text, or at most {fits} windows" if fits else "use a longer text, or shorter windows"


def fitting_length(config, length: int) -> int:
    """`length`, cut to the positions of a model with this config."""
    return min(length, getattr(config.get_text_config(), "max_position_embeddings", None) or length)


SHORTEST_RECALL = 64  # tokens of a row that holds lines, text, and some of the lines again
# Text of so many rows is enough for a plain row and a row in which something comes back, which is made from more.
RECALL_ROWS = 3
VALIDATION_EVERY = 6  # every sixth sample of a calibration text is a validation sample


def is_validation(index: int, samples: int) -> bool:
    """Whether a fit holds this sample of its text back: every sixth, or the last of fewer than six."""
    return index % VALIDATION_EVERY == VALIDATION_EVERY - 1 or (samples < VALIDATION_EVERY and index == samples - 1)


class CalibrationText(NamedTuple):
    """The text on which an operation measures and fits.

    Attributes:
        source: "builtin" (its calibration part), another name of `CALIBRATION_TEXTS`, or a file.
        length: tokens of a sample.
        samples: number of samples.
        recall: share of the samples in which something said earlier comes back.
    """

    source: str
    length: int
    samples: int
    recall: float = 0.0

    @property
    def written_tokens(self) -> int:
        """How many tokens of it the model writes itself."""
        return sum(written_samples(self.source, self.samples)) * self.length


def written_samples(text: str, samples: int) -> tuple[int, int]:
    """How many samples of a calibration text the model writes itself: running text, and conversations."""
    running, conversations, _ = CALIBRATION_TEXTS.get(text, Written())
    written = int(samples * (running + conversations))
    plain = int(written * running / (running + conversations)) if written else 0
    return plain, written - plain


def samples_to_begin(samples: int) -> int:
    """How many samples a model begins at a time to fill `samples`. Some end early, and one batch should be enough."""
    return min(BATCH, samples + 2 * samples // 5)


def source_names(data: str | Sequence[str]) -> list[str]:
    """The names in `heal.data`, which is one name or several."""
    return [data] if isinstance(data, str) else list(data)


def begin_of_text(tokenizer) -> list[int]:
    """[BOS] if the tokenizer by itself begins a text with it, else []."""
    bos = getattr(tokenizer, "bos_token_id", None)
    added, plain = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    return [bos] if bos is not None and added[:1] == [bos] and plain[:1] != [bos] else []


def _named(title: str, text: str) -> Text:
    return Text(title=title, sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(), text=text)


def _read(path: Path) -> str:
    """The text of a file, with \\n as line ends; raises a SurgeryError for a file that is no text."""
    where = str(path)
    if path.is_dir():
        raise TextError("this is a folder, not a text file", where=where, fix="name one UTF-8 text file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise TextError("no such text file", where=where, fix=f"check the path, or use {BUILTIN}") from error
    except OSError as error:
        raise TextError(f"cannot read the text file: {error}", where=where) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"not UTF-8 text (byte {error.start})", where=where, fix="save it as UTF-8, or name another file"
        ) from error
    if "\0" in text:
        raise TextError("a binary file, not text", where=where, fix="name a UTF-8 text file")
    if not text.strip():
        raise TextError("the text file is empty", where=where, fix="name a file with text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- the built-in text --------------------------------------------------------------------------------------


def _builtin() -> dict[str, str]:
    """The parts of Python's language reference as plain text. They are the same on every run of one Python version."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some Linux packages of Python leave it out
        raise TextError("this Python has no pydoc_data, the built-in text", fix=_OWN_FILE) from error
    return _split(_without_repeats({name: plain(text) for name, text in topics.items()}))


def _without_repeats(topics: dict[str, list[str]]) -> dict[str, list[str]]:
    """The topics, with each long paragraph in only one of them.

    For example, "with" is a topic of its own, and a section of "compound". The longest topic keeps a paragraph that
    several topics share, since it has the context.
    """
    known_keys: set[str] = set()
    unique = {}
    for name in sorted(topics, key=lambda name: (-sum(map(len, topics[name])), name)):
        unique[name] = []
        for paragraph in topics[name]:
            # Compared without spaces, marks and digits: copies differ in indentation and footnote numbers.
            key = "".join(re.findall(r"[^\W\d_]+", paragraph.lower()))
            if len(paragraph) < _SHORT or key not in known_keys:
                unique[name].append(paragraph)
            known_keys.add(key)
    # A topic that was mostly a copy is reduced to headings and fragments.
    return {name: paragraphs for name, paragraphs in sorted(unique.items()) if sum(map(len, paragraphs)) >= 500}


def _split(topics: dict[str, list[str]]) -> dict[str, str]:
    """Assign each topic, the longest first, to the part that is furthest below its share."""
    size = dict.fromkeys(PARTS, 0)
    names: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in sorted(topics, key=lambda name: (-sum(map(len, topics[name])), name)):
        part = min(PARTS, key=lambda part: size[part] / PARTS[part])
        size[part] += sum(map(len, topics[name]))
        names[part].append(name)
    return {
        part: "\n\n".join(paragraph for name in sorted(chosen) for paragraph in topics[name]) + "\n"
        for part, chosen in names.items()
    }


def plain(text: str) -> list[str]:
    """A help topic as paragraphs of plain text, without mark-up.

    Each paragraph of prose becomes one line. Code keeps its lines and its inner indentation. Underlines, grammar
    rules, tables, directives, role names, emphasis, footnote marks and cross-reference lines are removed.
    """
    paragraphs: list[str] = []
    code_indent = None  # indentation of the current code block
    previous, previous_indent = "", 0  # the prose block before this one, and its indentation
    for block in re.split(r"\n(?:[ \t]*\n)+", text.expandtabs(4)):
        lines = [line.rstrip() for line in block.split("\n") if not _is_markup(line)]
        if not lines or any("::=" in line for line in lines):
            continue
        indent = min(len(line) - len(line.lstrip()) for line in lines)
        if code_indent is None or indent < code_indent:
            code_indent = indent if _begins_code(lines, indent, previous, previous_indent) else None
        if code_indent is not None:
            paragraphs.append("\n".join("    " + line[code_indent:] for line in lines))
            if indent <= previous_indent:  # code that is not indented deeper than the prose ends with its block
                code_indent = None
            continue
        previous, previous_indent = _prose(lines), indent
        if previous not in ("Note:", "See also:", "Warning:"):
            paragraphs.append(previous)
    return paragraphs


def _is_markup(line: str) -> bool:
    """Whether a line is mark-up: an underline, table row, directive, footnote heading, cross references, or empty."""
    line = line.strip()
    return not line or bool(
        re.fullmatch(r"([*=\-~^#\"+])\1{2,}", line)
        or re.match(r"[+|].*[+|]$|\.\. |-\[.*\]-$|:\w+:( |$)|Related help topics:", line)
    )


def _begins_code(lines: list[str], indent: int, previous: str, previous_indent: int) -> bool:
    """Whether a block is code: it looks like code, or is indented under a sentence that announces it."""
    if re.match(r"\s*(>>> |\$ |> \S+\.py|(def|class|for|while|with|if) .*:( pass)?$)", lines[0]):
        return True
    if indent < previous_indent + 3 or previous in ("Note:", "See also:", "Warning:"):
        return False
    # "is equivalent to" announces code without a colon. A signature above its description has fewer words.
    unfinished = len(re.findall(r"\b[a-z]{2,}\b", previous)) >= 4 and previous[-1] not in ".)"
    return previous.endswith((":", "::")) or unfinished


def _prose(lines: list[str]) -> str:
    """The lines of a paragraph as one line, without inline mark-up."""
    joined = ""
    for line in lines:
        # A hyphen at the end of a line ("quote-") is joined without a space.
        gap = "" if not joined or re.search(r"\w-$", joined) else " "
        joined += gap + line.strip()
    joined = re.sub(r":\w+(?::\w+)?:`([^`]*)`", r"\1", joined)  # :ref:`name`
    joined = re.sub(r"`+([^`]+)`+_?", r"\1", joined)
    joined = re.sub(r"(?<![\w*\"'])(\*\*?)(?=[^\s*])([^*\"]*[^\s*\"])\1(?![\w*])", r"\2", joined)  # *emphasis*
    joined = re.sub(r"^\[\d+\]\s+|\s+\[\d+\](?=[\s.,;:)]|$)", "", joined)  # footnote marks, not "a[0]"
    joined = re.sub(r"^[*•] ", "- ", joined)
    return re.sub(r"\s+", " ", joined).strip()
