"""Prompts of a benchmark: text where the weights are a model's own, random tokens where they are random.

What a router turns on, and which blocks a sparse prefill reads, follows from the text: random tokens would time
something else.
"""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SurgeryError

RANDOM = "random tokens"


def make_prompts(folder: Path | None, vocabulary: int, lengths: tuple[int, ...]) -> tuple[dict, str, str]:
    """One prompt for each length, the same at every call.

    Args:
        folder: of a model with its tokenizer; None: the weights are random.
        vocabulary: number of different tokens.
        lengths: in tokens.

    Returns:
        Length -> long [1, length]; what they are, in words; and why they are random although the weights are not, or
        "".
    """
    import torch

    reason = ""
    if folder is not None:
        from surgery.data.text import load_text, windows
        from surgery.io.loading import read_tokenizer

        try:
            text = load_text(part="calibration")
            whole = windows(text, read_tokenizer(folder), max(max(lengths), 2), 1)
            return {length: whole[:, :length] for length in lengths}, text.title, ""
        except SurgeryError as error:
            reason = error.what
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randint(vocabulary, (1, n), generator=generator) for n in lengths}, RANDOM, reason
