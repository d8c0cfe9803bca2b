"""Numbers of tokens as a person types them."""

from __future__ import annotations

from surgery.errors import SurgeryError


def parse_lengths(text: str) -> tuple[int, ...]:
    """ "512,2k,8k" as numbers of tokens (k: thousands).

    Raises:
        SurgeryError: not positive whole numbers.
    """
    try:
        lengths = tuple(int(part.strip().lower().replace("k", "000")) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise SurgeryError(f"lengths are whole numbers with commas between, not {text!r}", fix="write 512,2k")
    return lengths
