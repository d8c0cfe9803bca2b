"""The proof of an exported file: the engine's log-probabilities, compared with those of Transformers.

The engine continues a text greedily. Transformers reads the text and the continuation in one forward pass, in
float32, and is compared at each position of the continuation. An engine with float32 weights and a float32 cache
differs by rounding alone: a merged GQA checkpoint of SmolLM2-135M by 3.5e-4.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engines.base import EngineAnswers, EngineQuestion

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3  # largest difference of a log-probability, in nats; for float32 weights alone
TIE = 2e-3  # nats: where the two best tokens are closer, either may be the best one
PROMPT, GENERATED, BEST = 64, 64, 400
LEAST = -80.0  # nats: smaller log-probabilities are not compared, since float32 does not hold exp of them
TEXT = "The engine reads this sentence, and it's split into 12 or 345 tokens: does (or doesn't) it agree?"


@dataclass(frozen=True)
class Agreement:
    """How far an engine agrees with Transformers.

    Attributes:
        tokens: number of positions that were compared.
        compared: number of log-probabilities that were compared, over all positions.
        largest_difference: of a log-probability, in nats; None: the engine's are not numbers.
        same_best: positions at which both have the same best token.
        near_ties: the other positions at which Transformers' two best tokens are closer than 2e-3 nats.
        same_text_tokens: whether the file's vocabulary splits a sentence as the folder's tokenizer does.
    """

    tokens: int
    compared: int
    largest_difference: float | None
    same_best: int
    near_ties: int
    same_text_tokens: bool

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)

    def faults(self, exact: bool) -> list[str]:
        """Why the file must not be used, a clause each; []: the engine agrees.

        Args:
            exact: whether the weights were written in float32. Other types round: only the text and NaN are judged.
        """
        faults = []
        if self.largest_difference is None:
            faults.append("its log-probabilities are not numbers (NaN)")
        elif exact and self.largest_difference > TOLERANCE:
            faults.append(f"log-probabilities differ by {self.largest_difference:.1e}, more than {TOLERANCE:.0e}")
        if exact and (others := self.tokens - self.same_best - self.near_ties):
            faults.append(f"another best token at {others} of {self.tokens} positions")
        if not self.same_text_tokens:
            faults.append("its vocabulary splits a sentence into other tokens than the folder's tokenizer")
        return faults


def make_question(folder: Path, positions: int | None) -> tuple[EngineQuestion, list[int]]:
    """What the engine is asked about a folder, and the tokens of the question's text by the folder's tokenizer.

    Args:
        positions: the most tokens that the model takes; None: unknown.
    """
    from surgery.data.text import load_text, windows
    from surgery.io.loading import read_tokenizer

    tokenizer = read_tokenizer(folder)
    half = max((positions or PROMPT + GENERATED) // 2, 2)
    prompt = windows(load_text(), tokenizer, length=min(PROMPT, half), count=1)[0].tolist()
    expected = tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    return EngineQuestion(prompt, min(GENERATED, half), BEST, TEXT), list(expected)


def reference(folder: Path, question: EngineQuestion, answers: EngineAnswers) -> torch.Tensor:
    """Transformers' log-probabilities after the prompt and after each generated token but the last.

    Returns:
        float64 [generated tokens, vocabulary], computed with float32 weights.
    """
    import torch

    from surgery.io.loading import eval_mode, load_model

    model = load_model(folder, dtype=torch.float32)
    tokens = torch.tensor([question.prompt + answers.generated[:-1]])
    with torch.no_grad(), eval_mode(model):
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(question.prompt) - 1 :]
    return logits.double().log_softmax(-1)


def compare(expected: torch.Tensor, answers: EngineAnswers, expected_text: list[int]) -> Agreement:
    """Compare an engine's answers with Transformers' log-probabilities.

    Args:
        expected: the result of `reference`.
        expected_text: the text's tokens by the folder's tokenizer.
    """
    difference, compared, same, ties = 0.0, 0, 0, 0
    for row, best in zip(expected, answers.best, strict=True):
        for token, value in best:
            wanted = float(row[token])
            if wanted > LEAST:
                difference = max(difference, abs(value - wanted)) if math.isfinite(value) else math.inf
                compared += 1
        first, second = row.topk(2).values.tolist()
        if best and best[0][0] == int(row.argmax()):
            same += 1
        elif first - second < TIE:
            ties += 1
    sound = compared > 0 and math.isfinite(difference)
    return Agreement(
        tokens=len(answers.best),
        compared=compared,
        largest_difference=float(f"{difference:.3g}") if sound else None,
        same_best=same,
        near_ties=ties,
        same_text_tokens=answers.text_tokens == expected_text,
    )
