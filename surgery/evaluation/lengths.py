"""Numbers of tokens: as a person types them, and how many a surgery must be judged on."""

from __future__ import annotations

from math import inf

from surgery.errors import SettingError

JUDGED = 4  # a row is long enough where it has so many times the tokens that a surgery leaves alone


def parse_lengths(text: str) -> tuple[int, ...]:
    """ "512,2k,8k" as numbers of tokens (k: thousands).

    Raises:
        SurgeryError: not positive whole numbers.
    """
    try:
        lengths = tuple(int(word.strip().lower().replace("k", "000")) for word in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise SettingError(f"lengths are whole numbers with commas between, not {text!r}", fix="write 512,2k")
    return lengths


def too_short(length: int, unchanged: int, op: str, *, rows: str, key: str, positions: int | None = None) -> str:
    """Why rows show too little of an operation, as a sentence with the length to take; "" if they are long enough.

    Args:
        length: tokens of a row.
        unchanged: tokens of a sequence that the operation `op` leaves as they are (`Operation.unchanged_within`).
        rows: what they are, in the plural ("windows").
        key: how their length is set ("evaluate.length").
        positions: of the model; where they are used up nothing is said. None: unknown.
    """
    if length >= min(JUDGED * unchanged, positions or inf):
        return ""
    enough = min(1 << (JUDGED * unchanged - 1).bit_length(), positions or inf)
    if length <= unchanged:
        seen = f"lie within the {unchanged:,} tokens that {op} leaves unchanged: they show nothing of it"
    else:
        seen = f"show little of {op}, which leaves the first {unchanged:,} of them unchanged"
    return f"{rows} of {length:,} tokens {seen}; {key}={enough} shows it"
