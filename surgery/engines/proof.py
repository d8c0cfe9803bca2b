"""The proof of an exported file: the engine's log-probabilities, compared with those of Transformers.

The engine continues a text greedily. Transformers reads the text and the continuation in one forward pass, in
float32. The two are compared at each position of the continuation. An engine with float32 weights and a float32 cache
differs by rounding alone: for a merged GQA checkpoint of SmolLM2-135M by 3.5e-4.
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
TIE = 2e-3  # nats: a token that is no further below the best one may be the engine's best
ROUNDED = 0.5  # share of the positions at which rounded weights must have the same best token, or nearly
PROMPT, GENERATED, BEST = 64, 64, 400
LONGEST = 8192  # tokens of a prompt that is longer than a sliding window
LEAST = -80.0  # nats: smaller log-probabilities are not compared, since float32 does not hold exp of them
REPLACED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character are decoded to
TEXT = (
    "The engine reads this sentence, and it's split into 12 or 345 tokens: does (or doesn't) it agree?\n\n"
    "  if x1 >= 10_000:\n\treturn 'I\u2019ll', \"WE'LL\"  # na\u00efve caf\u00e9, \u5317\u4eac, \u041c\u0438\u0440"
)


@dataclass(frozen=True)
class Agreement:
    """How far an engine agrees with Transformers.

    Attributes:
        tokens: number of positions that were compared.
        compared: number of log-probabilities that were compared, over all positions.
        largest_difference: of a log-probability, in nats; None: the engine's are not numbers.
        same_best: positions at which both have the same best token.
        near_ties: positions at which the engine's best token is another one, which Transformers puts less than 2e-3
            nats below its own.
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
            exact: whether the weights were written in float32. Other types round, by how much depends on the model.
                Then another best token at more than half of the positions is a fault, and no difference is.
        """
        faults = []
        if self.largest_difference is None:
            faults.append("its log-probabilities are not numbers (NaN)")
        elif exact and self.largest_difference > TOLERANCE:
            faults.append(f"log-probabilities differ by {self.largest_difference:.1e}, more than {TOLERANCE:.0e}")
        others = self.tokens - self.same_best - self.near_ties
        if others > (0 if exact else (1 - ROUNDED) * self.tokens):
            faults.append(f"another best token at {others} of {self.tokens} positions")
        if not self.same_text_tokens:
            faults.append("its vocabulary splits a sentence into other tokens than the folder's tokenizer")
        return faults


def make_question(
    folder: Path, positions: int | None, window: int = 0, words: int = BEST
) -> tuple[EngineQuestion, list[int]]:
    """What the engine is asked about a folder, and the tokens of the question's text by the folder's tokenizer.

    Args:
        positions: the most tokens that the file takes; None: unknown.
        window: the smallest sliding window (0: none). The prompt is longer, so that the engine's window matters too.
        words: the size of the vocabulary.
    """
    from surgery.data.text import load_text, windows
    from surgery.io.loading import read_tokenizer

    tokenizer = read_tokenizer(folder)
    wanted = min(window + PROMPT, LONGEST)
    positions = positions or wanted + GENERATED
    generate = max(min(GENERATED, positions // 2), 1)
    length = max(min(wanted, positions - generate), 2)
    prompt = windows(load_text(), tokenizer, length=length, count=1)[0].tolist()
    expected = tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    each = tokenizer.batch_decode([[token] for token in range(min(words, len(tokenizer)))])
    pieces = [token for token, text in enumerate(each) if REPLACED in text]
    return EngineQuestion(prompt, generate, min(BEST, words), TEXT, pieces=pieces), list(expected)


def reference(folder: Path, question: EngineQuestion, answers: EngineAnswers) -> torch.Tensor:
    """Transformers' log-probabilities after the prompt and after each generated token but the last.

    Returns:
        float64 [generated tokens, vocabulary], computed with float32 weights.
    """
    import torch

    from surgery.calibration.scoring import last_logits
    from surgery.io.loading import eval_mode, load_model

    model = load_model(folder, dtype=torch.float32)
    tokens = torch.tensor([question.prompt + answers.generated[:-1]])
    with torch.no_grad(), eval_mode(model):
        kept = last_logits(model, len(answers.generated))
        logits = model(input_ids=tokens, use_cache=False, **kept).logits[0, -len(answers.generated) :]
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
        if best and best[0][0] == int(row.argmax()):
            same += 1
        elif best and float(row.max() - row[best[0][0]]) < TIE:
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
