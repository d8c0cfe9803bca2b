"""Numbers of tokens: reads them as a user types them, and decides how many tokens are enough to judge a surgery."""

from __future__ import annotations

from math import inf

from surgery.errors import SettingError

JUDGED = 4  # a row is long enough if it has this many times the tokens that a surgery leaves unchanged


def parse_lengths(text: str, least: int = 1) -> tuple[int, ...]:
    """Read "512,2k,8k" as numbers of tokens (k: thousands).

    Args:
        least: the smallest number allowed.

    Raises:
        SurgeryError: the text is not a list of whole numbers, or one is too small.
    """
    try:
        lengths = tuple(map(_length, text.split(",")))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < least:
        raise SettingError(f"lengths are whole numbers with commas between, not {text!r}", fix="write 512,2k")
    return lengths


def _length(word: str) -> int:
    """A number of tokens; "2k" is 2,000. Raises a ValueError."""
    digits = word.strip().lower()
    return 1000 * int(digits.removesuffix("k")) if digits.endswith("k") else int(digits)


def too_short(length: int, unchanged: int, op: str, *, rows: str, key: str, positions: int | None = None) -> str:
    """A sentence that says why rows are too short to show an operation and which length is enough, or "".

    Args:
        length: tokens of a row.
        unchanged: number of first tokens of a sequence that the operation `op` leaves unchanged
            (`Operation.unchanged_within`).
        rows: the name of the rows, in the plural ("windows").
        key: the setting of their length ("evaluate.length"); "": the sentence names none.
        positions: the model's largest number of tokens (None: unknown). Rows of that length are never too short.
    """
    if length >= min(JUDGED * unchanged, positions or inf):
        return ""
    enough = min(1 << (JUDGED * unchanged - 1).bit_length(), positions or inf)
    if length <= unchanged:
        seen = f"lie within the {unchanged:,} tokens that {op} leaves unchanged: they show nothing of it"
    else:
        seen = f"show little of {op}, which leaves the first {unchanged:,} of them unchanged"
    return f"{rows} of {length:,} tokens {seen}; {f'{key}={enough} shows' if key else f'{enough:,} tokens show'} it"
