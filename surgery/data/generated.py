"""Text that a model writes itself: calibration and healing without a data set, on what it knows, in its own mixture.

How a sample begins. A model that was trained with a BOS token before every text begins with BOS alone: that samples
the model's own distribution. Other models know no beginning of a text: their first token is drawn at random from the
words of the vocabulary, and the rest is sampled. With `heal.chat` a sample begins as the chat template begins a user's
message: the model writes the question, and then the answer.

All tokens are sampled at temperature 1 from the whole distribution: anything sharper would teach the student another
model than the base.

Sources: Liu et al. 2023, "LLM-QAT", arXiv 2305.17888 (a random first token); Xu et al. 2024, "Magpie", arXiv
2406.08464 (the template of the user's message).
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.data.text import BATCH, SELF_TEXT, begin_of_text, fitting_length
from surgery.errors import ModelError, ModelMismatchError
from surgery.io.output_folder import machine_errors
from surgery.io.resume import LayerFiles, fingerprint
from surgery.machine.device import fast_in_bfloat16
from surgery.runtime.modeling_surgery import patch
from surgery.runtime.surgery_cache import CACHE

MARK = "surgery-mark"
STAGE = "text that the model writes"
REPORTED = 16  # tokens of a sample between two reports of progress
REVISION = 1  # raised when the same settings give another text


def sample(
    model, tokenizer, heal, tokens: int, *, folder: Path | None = None, batch: int = BATCH, progress=None
) -> list[list[int]]:
    """Documents that the model wrote, of `heal.length` at most; at least `tokens` tokens in all are its own.

    A document ends where the model ends it (its EOS is kept), or at that length. Every batch has its own seed, so that
    a resumed run writes the same text as one that was not stopped.

    Args:
        model: in memory, in eval mode.
        heal: length, chat and seed are read.
        folder: saves each batch, complete or absent; None saves nothing.
        batch: samples at a time; fewer where fewer are needed, judged by the length of those before.
        progress: called as progress(done, total, label), in tokens.

    Raises:
        SurgeryError: `heal.chat` and a tokenizer without a chat template; a vocabulary without words.
        MachineError: the disk is full, or may not be written; what was saved stays.
    """
    length, device = fitting_length(model, heal.length), model.device
    begin = _Begin.of(tokenizer, heal.chat, model.config.get_text_config().vocab_size)
    ends = _end_tokens(model, tokenizer)
    writer = fast_writer(model)
    settings = {"length": length, "batch": batch, "seed": heal.seed, "begin": begin, "ends": sorted(ends)}
    settings |= {"revision": REVISION, "dtype": str(next(writer.parameters()).dtype)}
    settings |= {"model": fingerprint(model)} if folder else {}
    files = LayerFiles(folder, SELF_TEXT, settings)
    documents: list[list[int]] = []
    index, tokens_done = 0, 0

    def written(more: int) -> None:
        """Report the tokens of all batches, with `more` of the one that is being written."""
        if progress:
            progress(min(tokens_done + more, tokens), tokens, STAGE)

    written(0)
    while tokens_done < tokens:
        stored = files.load(index)
        if stored is None:
            generator = torch.Generator(device).manual_seed(_seed(heal.seed, index))
            remaining = math.ceil((tokens - tokens_done) * len(documents) / tokens_done) if documents else batch
            count = min(batch, remaining)
            rows = _write(writer, begin.draw(count, generator), length, ends, generator, written).cpu()
            if folder:
                with machine_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    files.save(index, {"ids": rows.int()}, {})
        else:
            rows = stored[0]["ids"].long()
        new_documents = [_document(row, len(begin.prefix), ends) for row in rows.tolist()]
        new_tokens = sum(len(document) - len(begin.prefix) for document in new_documents)
        documents, tokens_done, index = documents + new_documents, tokens_done + new_tokens, index + 1
        written(0)
    return documents


def fast_writer(model):
    """The model in the form that writes fastest here: with a cache that is not copied as a whole for every token, and
    with weights in bfloat16 on a CPU that computes in bfloat16.

    The cache is that of surgical checkpoints, without any surgery: on one core 32 samples of 384 tokens of
    SmolLM2-135M were written at 144 tokens a second instead of 77. On two cores 64 samples of 512 tokens were written
    at 251 a second in bfloat16, and at 137 in float32.

    Returns:
        A new model, which shares the weights of this one unless they are rounded; or this model, where the runtime
        knows no such cache for it.
    """
    if hasattr(model, "make_cache") or Anatomy.of(model).runtime_problem() or hasattr(model, "hf_device_map"):
        return model
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    if model.device.type == "cpu" and fast_in_bfloat16():  # not the buffers: frequencies of RoPE must be exact
        shared |= {id(tensor): _rounded(tensor) for tensor in model.parameters() if tensor.dtype == torch.float32}
    copied = copy.deepcopy(model, shared)
    try:
        patch(copied, {"layers": [{}] * copied.config.num_hidden_layers})
    except ValueError:  # a model that the runtime refuses is sampled unchanged
        return model
    return copied.eval()


def _rounded(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)


@torch.no_grad()
def _write(
    model, ids: torch.Tensor, length: int, ends: set[int], generator: torch.Generator, written: Callable | None = None
) -> torch.Tensor:
    """Samples [batch, length] that begin with `ids` [batch, n]; what follows one of `ends` in a row is to be ignored.

    `written` is called now and then with the number of tokens so far.

    The model's own `generate` would read its generation config: penalties and a top-p that are meant for chats.
    """
    stop = torch.tensor(sorted(ends), dtype=torch.long, device=ids.device)
    rows = ids.new_zeros(len(ids), length)
    rows[:, : ids.shape[1]] = ids
    live, ended = torch.arange(len(ids), device=ids.device), torch.zeros_like(ids[:, 0], dtype=torch.bool)
    state, new, tokens = {}, ids, ids.numel()
    for position in range(ids.shape[1], length):
        out = model(input_ids=new, use_cache=True, logits_to_keep=1, **state)
        state = {CACHE: out[CACHE]}
        new = _sample_tokens(out.logits[:, -1], generator)
        rows[live, position] = new[:, 0]
        ended |= torch.isin(new[:, 0], stop)
        tokens += len(live) - int(ended.sum())
        if written and position % REPORTED == 0:
            written(tokens)
        if ended.all():
            break
        if 4 * ended.sum() >= len(ended):  # rows that have ended would still be computed
            running = (~ended).nonzero()[:, 0]
            state[CACHE].batch_select_indices(running)
            live, new, ended = live[running], new[running], ended[running]
    return rows


def _sample_tokens(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a token [rows, 1] for each row of logits [rows, vocabulary], by its probability.

    One random number is drawn for each row: `multinomial` draws one for each token of the vocabulary, which took a
    fifth of the time of a step.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS does not have
    cumulative = logits.to(dtype).softmax(-1).cumsum(-1)
    if not cumulative[:, -1].isfinite().all():
        raise ModelError(
            f"the model gives no probabilities for its next token: its logits ({logits.dtype}) are infinite or NaN",
            where="text of the base",
            fix="name a text (calibration_text=FILE, heal.data=FILE); float16 may overflow: load in float32",
        )
    threshold = torch.rand(len(logits), 1, generator=generator, device=logits.device, dtype=dtype)
    return torch.searchsorted(cumulative, threshold * cumulative[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)


def _document(row: list[int], begin: int, ends: set[int]) -> list[int]:
    """A sample up to its end; its first `begin` tokens are no end, though some models begin a text with EOS."""
    last = next((position for position in range(begin, len(row)) if row[position] in ends), len(row) - 1)
    return row[: last + 1]


@dataclass(frozen=True)
class _Begin:
    """How samples begin: with the tokens `prefix`, and then with one of `words`, if there are any."""

    prefix: tuple[int, ...]
    words: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer, chat: bool, vocabulary: int) -> _Begin:
        """The beginning for a tokenizer; `vocabulary`: tokens that the model knows."""
        if chat:
            return cls(user_turn(tokenizer), ())
        bos = tuple(begin_of_text(tokenizer))
        return cls(bos, () if bos else _words(tokenizer, vocabulary))

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """The first tokens of a batch of samples, long [batch, n]."""
        device = generator.device
        prefix = torch.tensor(self.prefix, dtype=torch.long, device=device).expand(batch, -1)
        if not self.words:
            return prefix
        words = torch.tensor(self.words, device=device)
        indices = torch.randint(len(words), (batch, 1), generator=generator, device=device)
        return torch.cat([prefix, words[indices]], dim=1)


def user_turn(tokenizer) -> tuple[int, ...]:
    """The tokens with which the chat template begins a user's message.

    Raises:
        SurgeryError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelMismatchError("this tokenizer has no chat template", where="heal.chat", fix="heal.chat=false")
    message = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    return tuple(tokenizer(message.partition(MARK)[0], add_special_tokens=False)["input_ids"])


def _words(tokenizer, vocabulary: int) -> tuple[int, ...]:
    """Tokens of letters alone that may stand first in a text: capitalised, where the script has capitals.

    Raises:
        SurgeryError: there are none.
    """
    special = set(tokenizer.all_special_ids)
    ids = [token for token in range(min(len(tokenizer), vocabulary)) if token not in special]
    texts = dict(zip(ids, tokenizer.batch_decode([[token] for token in ids]), strict=True))
    letters = [token for token, text in texts.items() if text.isalpha()]
    first = [token for token in letters if texts[token] == texts[token].capitalize()]
    if not letters:
        raise ModelMismatchError(
            "the tokenizer has no words that a text of the base could begin with",
            where="text that the model writes",
            fix="name a text file, or builtin",
        )
    return tuple(sorted(first or letters))


def _end_tokens(model, tokenizer) -> set[int]:
    """EOS of the tokenizer and of the model's generation config, which may name several."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (tokenizer.eos_token_id, *configured) if token is not None}


def _seed(seed: int, index: int) -> int:
    """A seed for each batch, so that the random numbers of neighbouring batches have nothing in common."""
    return random.Random(f"{seed}/{index}").getrandbits(63)
