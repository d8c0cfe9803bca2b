"""Scores of text and of answers: losses of windows, log-probabilities of choices. One model is in memory at a time.

Scoring a window writes a file with the `top_k` most probable next tokens and the probability of all others, for each
predicted token. A second model is compared with this file, so that the two models are never in memory together.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.data.questions import Choice, encode, read_questions
from surgery.errors import ModelMismatchError, RecipeMismatchError
from surgery.io.files import write_bytes
from surgery.io.loading import loaded
from surgery.machine.placement import exact

if TYPE_CHECKING:
    import torch

    from surgery.io.loading import ModelSource


def refuse_too_long(configs: dict, tokens: int, what: str, fix: str) -> None:
    """Raise a SurgeryError if a model has fewer than `tokens` positions; `configs`: label -> config."""
    for label, config in configs.items():
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest and tokens > longest:
            raise RecipeMismatchError(f"{label} has {longest} positions, {what} have {tokens} tokens", fix=fix)


def refuse_other_tokenizer(configs: dict, largest: int) -> None:
    """Raise a SurgeryError if a model does not know the token `largest`; `configs`: label -> config."""
    for label, config in configs.items():
        known = config.get_text_config().vocab_size
        if largest >= known:
            raise ModelMismatchError(
                f"the tokenizer gives token {largest}, {label} knows {known}", fix="use the tokenizer of this model"
            )


def last_logits(model, count: int) -> dict:
    """The keyword argument that makes a model compute only its last `count` logits; {} if its forward has none."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


BATCH = 4  # questions in one forward pass


@dataclass(frozen=True)
class Chosen:
    """The result of one model on one question.

    Attributes:
        right: the right choice is more probable than every other choice.
        nll: see `choice_loss`.
        logps: log-probability per token of each choice.
    """

    right: bool
    nll: float
    logps: tuple[float, ...]

    @classmethod
    def of(cls, logps: torch.Tensor, answer: int) -> Chosen:
        """The result from the log-probabilities [choices] and the index of the right choice."""
        best = sum(map(bool, logps >= logps[answer])) == 1
        return cls(best and bool(logps.isfinite().all()), choice_loss(logps, answer).item(), tuple(logps.tolist()))


def choice_logps(
    model, items: Sequence[Choice], cached: bool = True, progress: Callable[[int], None] | None = None
) -> list[torch.Tensor]:
    """Log-probability per token of every choice after its prompt. The model's mode is not changed.

    Args:
        cached: run each prompt once, and then its choices with the model's own cache. False: run prompt and choice
            together without a cache, which takes longer and allows gradients. The figures differ only as much as
            cached and uncached logits do.
        progress: called with the number of questions done.

    Returns:
        A vector [choices] for each question, float64, on the CPU.
    """
    by_question: dict[int, torch.Tensor] = {}
    order = sorted(range(len(items)), key=lambda index: items[index].longest)  # little padding
    for first in range(0, len(order), BATCH):
        indices = order[first : first + BATCH]
        batch = [items[index] for index in indices]
        logps = (_through_cache if cached else _without_cache)(model, batch).cpu()
        by_question |= zip(indices, logps.split([len(item.choices) for item in batch]), strict=True)
        if progress:
            progress(len(by_question))
    return [by_question[index] for index in range(len(items))]


def choice_loss(logps: torch.Tensor, answer: int) -> torch.Tensor:
    """-log of the right choice's softmax share, over the choices' log-probabilities per token: nats, 0 if certain."""
    return -logps.log_softmax(-1)[answer]


def _through_cache(model, items: list[Choice]) -> torch.Tensor:
    """Run the prompts, padded on the left; then all choices, padded on the right, on copies of the prompts' caches."""
    import torch

    from surgery.runtime.modeling_surgery import CACHE

    prompts, mask = _padded([item.prompt for item in items], model.device, left=True)
    prompted = model(**inputs_of(model, prompts, mask), use_cache=True, **last_logits(model, 1))
    owners = torch.tensor([n for n, item in enumerate(items) for _ in item.choices], device=model.device)
    choices, real = _padded([choice for item in items for choice in item.choices], model.device)
    logps = _log_probabilities(prompted.logits[:, -1:], choices[:, :1], owners)
    if choices.shape[1] > 1:
        prompted[CACHE].batch_select_indices(owners.cpu())  # the cache's layers may be on several devices
        inputs = inputs_of(model, choices[:, :-1], torch.cat([mask[owners], real[:, :-1]], dim=1))
        logits = model(**inputs, **{CACHE: prompted[CACHE]}, use_cache=True).logits
        logps = torch.cat([logps, _log_probabilities(logits, choices[:, 1:])], dim=1)
    return _mean(logps, real)


def _without_cache(model, items: list[Choice]) -> torch.Tensor:
    """Run every prompt with each of its choices, padded on the right, without a cache."""
    rows = [(len(item.prompt), item.prompt + choice) for item in items for choice in item.choices]
    ids, mask = _padded([row for _, row in rows], model.device)
    first = min(begin for begin, _ in rows)
    keep = ids.shape[1] - first + 1  # the token before the first choice predicts it
    logits = model(**inputs_of(model, ids, mask), use_cache=False, **last_logits(model, keep)).logits[:, -keep:-1]
    real = mask[:, first:].clone()
    for row, (begin, _) in zip(real, rows, strict=True):
        row[: begin - first] = 0
    return _mean(_log_probabilities(logits, ids[:, first:]), real)


def _padded(rows: Sequence[tuple[int, ...]], device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [rows, longest]; padding is token 0."""
    import torch

    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for index, row in enumerate(rows):
        columns = slice(longest - len(row), None) if left else slice(len(row))
        ids[index, columns], mask[index, columns] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def inputs_of(model, ids: torch.Tensor, mask: torch.Tensor) -> dict:
    """The arguments of a forward pass on token ids [rows, n] and a mask [rows, cached + n].

    Positions are counted from each row's first real token.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return inputs


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor, rows=slice(None)) -> torch.Tensor:
    """Log-probabilities [rows, n] of tokens under logits [rows, n, vocabulary], or under the logits at `rows`."""
    logits = logits.float()
    totals = logits.logsumexp(-1)[rows]
    return logits[rows].gather(-1, tokens[..., None])[..., 0] - totals


def _mean(logps: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    logps = exact(logps)
    real = real.to(logps.device)
    return logps.masked_fill(real == 0, 0.0).sum(1) / real.sum(1)


def refuse_unfit(configs: dict, items: Sequence[Choice]) -> None:
    """Raise a SurgeryError if questions exceed a model's positions or have tokens that it does not know."""
    longest = max(item.longest for item in items)
    refuse_too_long(configs, longest, "prompt and choice", "shorter questions")
    refuse_other_tokenizer(configs, max(max(map(max, (item.prompt, *item.choices))) for item in items))


def fitting_questions(file: str | Path, tokenizer, model) -> list[Choice]:
    """A file's different questions, for a loaded model; errors as for `read_questions`, `encode`, `refuse_unfit`."""
    questions = encode(tokenizer, list(dict.fromkeys(read_questions(file))))
    refuse_unfit({type(model).__name__: model.config}, questions)
    return questions


def ask(model, items: Sequence[Choice], progress: Callable[[int], None] | None = None) -> list[Chosen]:
    """Put questions to a loaded model, whose mode is restored afterwards; arguments as for `choice_logps`."""
    import torch

    with loaded(model), torch.no_grad():
        logps = choice_logps(model, items, progress=progress)
    return [Chosen.of(row, item.answer) for row, item in zip(logps, items, strict=True)]


ROWS = 128  # number of tokens whose log-probabilities are in memory as float32 at once


def score_model(
    source: ModelSource,
    windows: torch.Tensor,
    folder: Path | None,
    top_k: int,
    tick: Callable[[int], None],
    allow_pickle: bool = False,
) -> dict[str, torch.Tensor]:
    """Score every window with one model. A model that is loaded here is removed from memory after the call.

    Args:
        source: model folder, or loaded model (its mode is restored).
        windows: LongTensor [windows, length].
        folder: holds the files of the windows; None: nothing is saved or compared.
        top_k: number of tokens to save, at most the size of the vocabulary.
        tick: called with the number of windows done.
        allow_pickle: see `load_model`.

    Returns:
        The vectors of `score_window`, concatenated over the windows.
    """
    import torch

    scores: dict[str, list] = {}
    with loaded(source, allow_pickle) as model:
        for index, window in enumerate(windows):
            file = folder / f"{index}.safetensors" if folder else None
            for name, values in score_window(model, window, file, top_k).items():
                scores.setdefault(name, []).append(values)
            tick(index + 1)
    return {name: torch.cat(vectors) for name, vectors in scores.items()}


def score_window(model, window: torch.Tensor, file: Path | None, top_k: int) -> dict[str, torch.Tensor]:
    """Score one window of tokens [length]. Write `file` if it does not exist; otherwise compare with it.

    Returns:
        Vectors [length - 1]: "loss" (nats, float64); after a comparison also "kl" (nats, float64; see
        `evaluate`) and "same" (bool: the same token is the most probable one).
    """
    import torch
    from safetensors.torch import load, save

    with torch.no_grad():
        logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]
    targets = window[1:].to(logits.device)
    reference = load(file.read_bytes()) if file and file.is_file() else None
    if reference and int(reference["vocabulary"]) != logits.shape[-1]:
        raise ModelMismatchError(
            f"base and out give {int(reference['vocabulary'])} and {logits.shape[-1]} logits a token"
        )
    vectors: dict[str, list] = {"loss": []}

    def add(name: str, values: torch.Tensor) -> None:
        vectors.setdefault(name, []).append(values.cpu())

    for first in range(0, len(targets), ROWS):
        chunk = slice(first, first + ROWS)
        logp = logits[chunk].float().log_softmax(-1)
        add("loss", -logp.gather(-1, targets[chunk, None])[:, 0])
        if not file:
            continue
        # argmax and not the first of topk: the two may choose differently between equal logits, and a model must
        # agree with itself.
        best = logp.argmax(-1).cpu()
        tokens = reference["tokens"][chunk].to(logp.device).long() if reference else logp.topk(top_k).indices
        own_logp = logp.gather(-1, tokens)
        rest = logp.scatter(-1, tokens, -math.inf).logsumexp(-1, keepdim=True)
        own_logp = torch.cat([own_logp, rest], dim=-1).cpu()  # [rows, top_k + 1]
        if reference:
            reference_logp, own_logp = reference["logp"][chunk].double(), own_logp.double()
            gap = reference_logp.exp() * (reference_logp - own_logp)
            # 0 * log(0 / q) is 0. Rounding can leave a sum of -1e-9, and a KL is never negative.
            add("kl", gap.where(reference_logp > -math.inf, 0).sum(-1).clamp(min=0))
            add("same", best == reference["best"][chunk])
        else:
            for name, values in (("tokens", tokens.int()), ("logp", own_logp), ("best", best)):
                add(name, values)
    joined = {name: torch.cat(chunks) for name, chunks in vectors.items()}
    if file and not reference:
        stored = {name: joined.pop(name).contiguous() for name in ("tokens", "logp", "best")}
        write_bytes(file, save(stored | {"vocabulary": torch.tensor(logits.shape[-1])}))
    return joined | {"loss": joined["loss"].double()}
