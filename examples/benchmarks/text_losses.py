"""Nats a token on held-out texts, and how far they are above the base's; the scripts share this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import surgery


def losses_on(texts: Sequence[str], model: Any, tokenizer: Any, **counts: int) -> list[float]:
    """Nats a token of a model on each text.

    Args:
        texts: "builtin" or text files.
        counts: arguments of `surgery.evaluate` that say how much of a text is read.
    """
    scores = (surgery.evaluate(model, None, text=text, tokenizer=tokenizer, **counts) for text in texts)
    return [score.out.cross_entropy for score in scores]


def above(found: Sequence[float], base: Sequence[float], digits: int = 4) -> str:
    """The cells of a row of a table: each loss less the base's."""
    return " | ".join(f"{loss - old:.{digits}f}" for loss, old in zip(found, base, strict=True))
