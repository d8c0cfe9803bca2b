"""Text that a model writes itself: calibration and healing without a data set, on what it knows, in its own mixture.

How a sample begins. A model that was trained with a BOS token before every text begins from it alone: that samples the
model's own distribution. Others know no begin of a text; theirs is one token drawn at random from the words of the
vocabulary, and the rest is sampled. With `heal.chat` a sample begins as the chat template begins a user's turn: the
model writes the question, and then the answer.

All tokens are sampled at temperature 1 from the whole distribution: anything sharper would teach the student another
model than the base.

Sources: Liu et al. 2023, "LLM-QAT", arXiv 2305.17888 (a random first token); Xu et al. 2024, "Magpie", arXiv
2406.08464 (the template of the user's turn).
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.data.text import BATCH, SELF_TEXT, begin_of_text, fitting_length
from surgery.errors import SurgeryError
from surgery.io.output_folder import machine_errors
from surgery.io.resume import LayerFiles, fingerprint
from surgery.machine.device import fast_in_bfloat16
from surgery.runtime.modeling_surgery import patch
from surgery.runtime.surgery_cache import CACHE

MARK = "surgery-mark"
REVISION = 1  # raised when the same settings give another text


def sample(
    model, tokenizer, heal, tokens: int, *, folder: Path | None = None, batch: int = BATCH, progress=None
) -> list[list[int]]:
    """Documents that the model wrote, of `heal.length` at most; at least `tokens` tokens in all are its own.

    A document ends where the model ends it (its EOS is kept), or at that length. Every batch has a seed of its own, so
    that a run that was stopped and goes on finds what it would have found.

    Args:
        model: in memory, in eval mode.
        heal: length, chat and seed are read.
        folder: keeps each batch, complete or not there; None keeps nothing.
        batch: samples at a time; fewer where fewer should do, by the length of those before.
        progress: called as progress(done, total, label), in tokens.

    Raises:
        SurgeryError: `heal.chat` and a tokenizer without a chat template; a vocabulary without words.
        MachineError: the disk is full, or not ours to write on; what is there stays.
    """
    length, device = fitting_length(model, heal.length), model.device
    begin = _Begin.of(tokenizer, heal.chat, model.config.get_text_config().vocab_size)
    ends = _ends(model, tokenizer)
    writer = writing(model)
    settings = {"length": length, "batch": batch, "seed": heal.seed, "begin": begin, "ends": sorted(ends)}
    settings |= {"revision": REVISION, "dtype": str(next(writer.parameters()).dtype)}
    settings |= {"model": fingerprint(model)} if folder else {}
    kept = LayerFiles(folder, SELF_TEXT, settings)
    found: list[list[int]] = []
    number, done = 0, 0
    while done < tokens:
        known = kept.load(number)
        if known is None:
            generator = torch.Generator(device).manual_seed(_seed(heal.seed, number))
            count = batch if not found else min(batch, math.ceil((tokens - done) * len(found) / done))
            rows = _write(writer, begin.draw(count, generator), length, ends, generator).cpu()
            if folder:
                with machine_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    kept.save(number, {"ids": rows.int()}, {})
        else:
            rows = known[0]["ids"].long()
        some = [_document(row, len(begin.prefix), ends) for row in rows.tolist()]
        own = sum(len(document) - len(begin.prefix) for document in some)
        found, done, number = found + some, done + own, number + 1
        if progress:
            progress(min(done, tokens), tokens, "text of the base")
    return found


def writing(model):
    """The model as it writes fastest here: with a cache that is not copied as a whole for every token, and on a CPU
    that computes in bfloat16 with its weights in that.

    The cache is that of surgical checkpoints, with nothing that a surgery does: on one core 32 samples of 384 tokens
    of SmolLM2-135M went on at 144 tokens a second in place of 77. On two cores 64 samples of 512 tokens were written
    at 251 a second in bfloat16, at 137 in float32.

    Returns:
        A model of its own. It has the weights of this one, if they are not rounded. Where the runtime knows no such
        cache, this one.
    """
    if hasattr(model, "make_cache") or Anatomy.of(model).runtime_problem() or hasattr(model, "hf_device_map"):
        return model
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    if model.device.type == "cpu" and fast_in_bfloat16():  # not the buffers: frequencies of RoPE must be exact
        shared |= {id(tensor): _rounded(tensor) for tensor in model.parameters() if tensor.dtype == torch.float32}
    copied = copy.deepcopy(model, shared)
    try:
        patch(copied, {"layers": [{}] * copied.config.num_hidden_layers})
    except ValueError:  # what the runtime refuses is sampled as it is
        return model
    return copied.eval()


def _rounded(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)


@torch.no_grad()
def _write(model, ids: torch.Tensor, length: int, ends: set[int], generator: torch.Generator) -> torch.Tensor:
    """Samples [batch, length] that begin with `ids` [batch, n]; after one of `ends` a row means nothing.

    The model's own `generate` would read its generation config: penalties and a top-p that are meant for chats.
    """
    stop = torch.tensor(sorted(ends), dtype=torch.long, device=ids.device)
    rows = ids.new_zeros(len(ids), length)
    rows[:, : ids.shape[1]] = ids
    live, over = torch.arange(len(ids), device=ids.device), torch.zeros_like(ids[:, 0], dtype=torch.bool)
    state, new = {}, ids
    for place in range(ids.shape[1], length):
        out = model(input_ids=new, use_cache=True, logits_to_keep=1, **state)
        state = {CACHE: out[CACHE]}
        new = _drawn(out.logits[:, -1], generator)
        rows[live, place] = new[:, 0]
        over |= torch.isin(new[:, 0], stop)
        if over.all():
            break
        if 4 * over.sum() >= len(over):  # rows that ended would be computed all the same
            going = (~over).nonzero()[:, 0]
            state[CACHE].batch_select_indices(going)
            live, new, over = live[going], new[going], over[going]
    return rows


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token for each row [rows, vocabulary], by its probability [rows, 1].

    One random number a row: `multinomial` draws one for each token, which took a fifth of the time of a step.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS does not have
    below = logits.to(wide).softmax(-1).cumsum(-1)
    if not below[:, -1].isfinite().all():
        raise SurgeryError(
            f"the model gives no probabilities for its next token: its logits ({logits.dtype}) are infinite or NaN",
            where="text of the base",
            fix="name a text (calibration_text=FILE, heal.data=FILE); float16 may overflow: load in float32",
        )
    drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device, dtype=wide)
    return torch.searchsorted(below, drawn * below[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)


def _document(row: list[int], begin: int, ends: set[int]) -> list[int]:
    """A sample up to its end; what it began with is no end, though some models begin a text with EOS."""
    last = next((place for place in range(begin, len(row)) if row[place] in ends), len(row) - 1)
    return row[: last + 1]


@dataclass(frozen=True)
class _Begin:
    """How samples begin: the same tokens, and after them one of `words`, if there are any."""

    prefix: tuple[int, ...]
    words: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer, chat: bool, vocabulary: int) -> _Begin:
        if chat:
            return cls(user_turn(tokenizer), ())
        bos = tuple(begin_of_text(tokenizer))
        return cls(bos, () if bos else _words(tokenizer, vocabulary))

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Long [batch, n]."""
        device = generator.device
        prefix = torch.tensor(self.prefix, dtype=torch.long, device=device).expand(batch, -1)
        if not self.words:
            return prefix
        words = torch.tensor(self.words, device=device)
        drawn = torch.randint(len(words), (batch, 1), generator=generator, device=device)
        return torch.cat([prefix, words[drawn]], dim=1)


def user_turn(tokenizer) -> tuple[int, ...]:
    """How the chat template begins a user's turn, as tokens; raises where there is no template."""
    if not tokenizer.chat_template:
        raise SurgeryError("this tokenizer has no chat template", where="heal.chat", fix="heal.chat=false")
    turn = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    return tuple(tokenizer(turn.partition(MARK)[0], add_special_tokens=False)["input_ids"])


def _words(tokenizer, vocabulary: int) -> tuple[int, ...]:
    """Tokens of letters alone that may stand first in a text: capitalised, where the script has capitals.

    Raises:
        SurgeryError: there are none.
    """
    special = set(tokenizer.all_special_ids)
    ids = [number for number in range(min(len(tokenizer), vocabulary)) if number not in special]
    texts = dict(zip(ids, tokenizer.batch_decode([[number] for number in ids]), strict=True))
    letters = [number for number, text in texts.items() if text.isalpha()]
    first = [number for number in letters if texts[number] == texts[number].capitalize()]
    if not letters:
        raise SurgeryError(
            "the tokenizer has no words that a text of the base could begin with",
            where="text that the model writes",
            fix="name a text file, or builtin",
        )
    return tuple(sorted(first or letters))


def _ends(model, tokenizer) -> set[int]:
    """EOS of the tokenizer and of the model's generation config, which may name several."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {number for number in (tokenizer.eos_token_id, *configured) if number is not None}


def _seed(seed: int, number: int) -> int:
    """A seed for each batch: neighbours have nothing in common."""
    return random.Random(f"{seed}/{number}").getrandbits(63)
