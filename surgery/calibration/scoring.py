"""Scores of text and of answers: losses of windows, log-probabilities of choices, one model in memory at a time.

A scored window leaves in a file, for each predicted token, the `top_k` most probable next tokens and the mass
of all others, so that a second model is compared with the first without both in memory.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.data.questions import Choice, encode, read_questions
from surgery.errors import SurgeryError
from surgery.io.loading import loaded

if TYPE_CHECKING:
    import torch

    from surgery.io.loading import Source


def refuse_too_long(configs: dict, tokens: int, what: str, fix: str) -> None:
    """Raise where a model has fewer positions than the cases have tokens."""
    for label, config in configs.items():
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest and tokens > longest:
            raise SurgeryError(f"{label} has {longest} positions, {what} have {tokens} tokens", fix=fix)


def refuse_other_tokenizer(configs: dict, largest: int) -> None:
    """Raise where a model does not know the largest token."""
    for label, config in configs.items():
        known = config.get_text_config().vocab_size
        if largest >= known:
            raise SurgeryError(
                f"the tokenizer gives token {largest}, {label} knows {known}", fix="use the tokenizer of this model"
            )


def last_logits(model, count: int) -> dict:
    """The argument by which a model computes its last logits alone, where it has one."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


BATCH = 4  # questions in one forward


@dataclass(frozen=True)
class Chosen:
    """How one model did on one question.

    Attributes:
        right: the right choice is the most probable one; not where another is as probable.
        nll: see `choice_loss`.
        logps: log-probability per token of each choice.
    """

    right: bool
    nll: float
    logps: tuple[float, ...]

    @classmethod
    def of(cls, logps: torch.Tensor, answer: int) -> Chosen:
        """From the vector of log-probabilities and the right index."""
        best = sum(map(bool, logps >= logps[answer])) == 1
        return cls(best and bool(logps.isfinite().all()), choice_loss(logps, answer).item(), tuple(logps.tolist()))


def choice_logps(
    model, items: Sequence[Choice], cached: bool = True, progress: Callable[[int], None] | None = None
) -> list[torch.Tensor]:
    """Log-probability per token of every choice after its prompt; the model is used in the mode it is in.

    Args:
        cached: prompts are run once, and the choices through the model's own cache. False: prompt and choice are run
            whole without a cache, which takes longer and gives gradients. The figures are the same as far as cached
            is uncached.
        progress: called with the number of questions done.

    Returns:
        Of each question a vector [choices], float64, on the CPU.
    """
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(items)), key=lambda number: items[number].longest)  # little padding
    for first in range(0, len(order), BATCH):
        numbers = order[first : first + BATCH]
        batch = [items[number] for number in numbers]
        logps = (_through_cache if cached else _at_once)(model, batch).cpu()
        found |= zip(numbers, logps.split([len(item.choices) for item in batch]), strict=True)
        if progress:
            progress(len(found))
    return [found[number] for number in range(len(items))]


def choice_loss(logps: torch.Tensor, answer: int) -> torch.Tensor:
    """-log softmax over the choices' log-probabilities per token, at the right one: nats, 0 where it is certain."""
    return -logps.log_softmax(-1)[answer]


def _through_cache(model, items: list[Choice]) -> torch.Tensor:
    """Prompts padded on the left, then all choices, padded on the right, each after a copy of its prompt's cache."""
    import torch

    from surgery.runtime.modeling_surgery import CACHE

    prompts, mask = _padded([item.prompt for item in items], model.device, left=True)
    begun = model(**_given(model, prompts, mask), use_cache=True, **last_logits(model, 1))
    owners = torch.tensor([n for n, item in enumerate(items) for _ in item.choices], device=model.device)
    choices, real = _padded([choice for item in items for choice in item.choices], model.device)
    found = _picked(begun.logits[:, -1:], choices[:, :1], owners)
    if choices.shape[1] > 1:
        begun[CACHE].batch_select_indices(owners)
        given = _given(model, choices[:, :-1], torch.cat([mask[owners], real[:, :-1]], dim=1))
        logits = model(**given, **{CACHE: begun[CACHE]}, use_cache=True).logits
        found = torch.cat([found, _picked(logits, choices[:, 1:])], dim=1)
    return _mean(found, real)


def _at_once(model, items: list[Choice]) -> torch.Tensor:
    """Every prompt with every choice, padded on the right, without a cache."""
    rows = [(len(item.prompt), item.prompt + choice) for item in items for choice in item.choices]
    ids, mask = _padded([row for _, row in rows], model.device)
    first = min(begin for begin, _ in rows)
    keep = ids.shape[1] - first + 1  # the token before the first choice predicts it
    logits = model(**_given(model, ids, mask), use_cache=False, **last_logits(model, keep)).logits[:, -keep:-1]
    real = mask[:, first:].clone()
    for row, (begin, _) in zip(real, rows, strict=True):
        row[: begin - first] = 0
    return _mean(_picked(logits, ids[:, first:]), real)


def _padded(rows: Sequence[tuple[int, ...]], device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [rows, longest]; what is masked is token 0."""
    import torch

    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for number, row in enumerate(rows):
        part = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, part], mask[number, part] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def _given(model, ids: torch.Tensor, mask: torch.Tensor) -> dict:
    """The last columns of a mask belong to the tokens; positions are counted from each row's first real token."""
    import inspect

    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return given


def _picked(logits: torch.Tensor, tokens: torch.Tensor, rows=slice(None)) -> torch.Tensor:
    """Log-probabilities [rows, n] of tokens by logits [rows, n, vocabulary], `rows` of these if given."""
    logits = logits.float()
    totals = logits.logsumexp(-1)[rows]
    return logits[rows].gather(-1, tokens[..., None])[..., 0] - totals


def _mean(logps: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return logps.double().masked_fill(real == 0, 0.0).sum(1) / real.sum(1)


def refuse_unfit(configs: dict, items: Sequence[Choice]) -> None:
    """Raise where questions are longer than the positions of a model, or hold tokens that it does not know."""
    longest = max(item.longest for item in items)
    refuse_too_long(configs, longest, "prompt and choice", "shorter questions")
    refuse_other_tokenizer(configs, max(max(map(max, (item.prompt, *item.choices))) for item in items))


def fitting_questions(file: str | Path, tokenizer, model) -> list[Choice]:
    """A file's different questions for a loaded model; raises as `read_questions`, `encode` and `refuse_unfit`."""
    questions = encode(tokenizer, list(dict.fromkeys(read_questions(file))))
    refuse_unfit({type(model).__name__: model.config}, questions)
    return questions


def ask(model, items: Sequence[Choice], progress: Callable[[int], None] | None = None) -> list[Chosen]:
    """Put questions to a loaded model, which is left in the mode it was in; arguments as for `choice_logps`."""
    import torch

    with loaded(model), torch.no_grad():
        logps = choice_logps(model, items, progress=progress)
    return [Chosen.of(row, item.answer) for row, item in zip(logps, items, strict=True)]


ROWS = 128  # tokens whose log-probabilities are in memory as float32 at once


def score_model(
    source: Source,
    pieces: torch.Tensor,
    folder: Path | None,
    top_k: int,
    tick: Callable[[int], None],
    allow_pickle: bool = False,
) -> dict[str, torch.Tensor]:
    """Score every window with one model, which is gone from memory after the call if it was loaded here.

    Args:
        source: model folder, or loaded model (left in the mode it was in).
        pieces: LongTensor [windows, length].
        folder: where the windows' files are or will be; None keeps nothing and compares with nothing.
        top_k: tokens to keep, at most the vocabulary.
        tick: called with the number of windows done.
        allow_pickle: see `load_model`.

    Returns:
        The vectors of `score_window`, joined over the windows.
    """
    import torch

    scores: dict[str, list] = {}
    with loaded(source, allow_pickle) as model:
        for number, piece in enumerate(pieces):
            kept = folder / f"{number}.safetensors" if folder else None
            for name, values in score_window(model, piece, kept, top_k).items():
                scores.setdefault(name, []).append(values)
            tick(number + 1)
    return {name: torch.cat(parts) for name, parts in scores.items()}


def score_window(model, piece: torch.Tensor, kept: Path | None, top_k: int) -> dict[str, torch.Tensor]:
    """Run one window of tokens [length]. Where there is no file `kept`, leave one; where there is, compare
    with it.

    Returns:
        Vectors [length - 1]: "loss" (nats, float64); after a comparison also "kl" (nats, float64; see
        `evaluate`) and "same" (bool: the same token is the most probable one).
    """
    import torch
    from safetensors.torch import load, save

    with torch.no_grad():
        logits = model(input_ids=piece[None].to(model.device), use_cache=False).logits[0, :-1]
    targets = piece[1:].to(logits.device)
    known = load(kept.read_bytes()) if kept and kept.is_file() else None
    if known and int(known["vocabulary"]) != logits.shape[-1]:
        raise SurgeryError(f"base and out give {int(known['vocabulary'])} and {logits.shape[-1]} logits a token")
    rows: dict[str, list] = {"loss": []}

    def add(name: str, values: torch.Tensor) -> None:
        rows.setdefault(name, []).append(values.cpu())

    for first in range(0, len(targets), ROWS):
        here = slice(first, first + ROWS)
        logp = logits[here].float().log_softmax(-1)
        add("loss", -logp.gather(-1, targets[here, None])[:, 0])
        if not kept:
            continue
        # argmax, not topk's first: of two equal logits each may pick another, and a model must agree with
        # itself.
        best = logp.argmax(-1).cpu()
        where = known["tokens"][here].to(logp.device).long() if known else logp.topk(top_k).indices
        mine = logp.gather(-1, where)
        rest = logp.scatter(-1, where, -math.inf).logsumexp(-1, keepdim=True)
        mine = torch.cat([mine, rest], dim=-1).cpu()  # [rows, top_k + 1]
        if known:
            theirs, mine = known["logp"][here].double(), mine.double()
            gap = theirs.exp() * (theirs - mine)
            # 0 * log(0 / q) is 0; rounding can leave a sum of -1e-9, which no KL is.
            add("kl", gap.where(theirs > -math.inf, 0).sum(-1).clamp(min=0))
            add("same", best == known["best"][here])
        else:
            for name, values in (("tokens", where.int()), ("logp", mine), ("best", best)):
                add(name, values)
    joined = {name: torch.cat(parts) for name, parts in rows.items()}
    if kept and not known:
        facts = {name: joined.pop(name).contiguous() for name in ("tokens", "logp", "best")}
        kept.write_bytes(save(facts | {"vocabulary": torch.tensor(logits.shape[-1])}))
    return joined | {"loss": joined["loss"].double()}
