"""Text that a model writes itself, for calibration and healing without a data set.

How a sample begins: a model that was trained with a BOS token before every text gets BOS alone, which samples the
model's own distribution. Other models have no token for the beginning of a text. Their first token is drawn at random
from the words of the vocabulary, and the rest is sampled. Where openings are given, the first words of one, behind
BOS if there is one, decide the kind of the text. With `heal.chat` a sample begins with the tokens that begin
a user's message in the chat template, and the model writes the question. Where it writes the token with which the
template ends the message, the template's tokens follow that begin the model's own turn, and the model writes the
answer. A template may end messages with words, such as "[/INST]", or with a token that does not end this model's
texts. Then the model must write all of that itself.

All tokens are sampled at temperature 1 from the whole distribution. A sharper distribution would teach the student
another model than the base.

Sources: Liu et al. 2023, "LLM-QAT", arXiv 2305.17888 (a random first token); Xu et al. 2024, "Magpie", arXiv
2406.08464 (the template of the user's message).
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.data.text import BATCH, SELF_TEXT, begin_of_text, fitting_length
from surgery.errors import ModelError, ModelMismatchError, SettingError
from surgery.io.output_folder import machine_errors
from surgery.io.resume import LayerFiles, fingerprint
from surgery.machine.device import fast_in_bfloat16
from surgery.machine.offload import whole_on_cpu
from surgery.machine.placement import has_float64
from surgery.runtime.modeling_surgery import patch
from surgery.runtime.surgery_cache import CACHE

MARK = "surgery-mark"
# Of a conversation, if the template prints the day. So the same settings give the same text on any day.
DAY = "26 Jul 2024"
STAGE = "text that the model writes"
OPENING = 8  # words of an opening, which tell the kind of the text
REPORTED = 16  # progress is reported after this many tokens of a sample
REVISION = 2  # raised when a change of the code makes the same settings give another text


def sample(
    model, tokenizer, heal, tokens: int, *, folder: Path | None = None, batch: int = BATCH, progress=None
) -> list[list[int]]:
    """Documents of at most `heal.length` tokens that the model writes, at least `tokens` in all, without their prefix.

    A document ends where the model ends it (its EOS is kept), or at that length. A conversation ends where the answer
    ends, if the template's tokens begin an answer (`Begin.answer`). Every batch has its own seed, so that a resumed
    run writes the same text as an uninterrupted one.

    Args:
        model: the model in memory, in eval mode.
        heal: its length, chat and seed are read, and its openings, if it has any: beginnings of texts, of which the
            first words begin the samples of running text.
        folder: folder in which each batch is saved, complete or not at all; None saves nothing.
        batch: number of samples at a time; fewer if the lengths of earlier samples show that fewer are enough.
        progress: called as progress(done, total, label), in tokens.

    Raises:
        SurgeryError: as for `Begin.of`.
        MachineError: the disk is full or not writable; saved batches stay.
    """
    with whole_on_cpu(model):
        length, openings = fitting_length(model.config, heal.length), getattr(heal, "openings", ())
        begin = Begin.of(model, tokenizer, heal.chat, length, openings)
        return _documents(model, heal, tokens, begin, folder, batch, progress)


def _documents(model, heal, tokens: int, begin: Begin, folder: Path | None, batch: int, progress) -> list[list[int]]:
    length, device = fitting_length(model.config, heal.length), model.device
    writer = fast_writer(model)
    settings = {"length": length, "batch": batch, "seed": heal.seed, "begin": begin}
    settings |= {"revision": REVISION, "dtype": str(next(writer.parameters()).dtype)}
    settings |= {"model": fingerprint(model)} if folder else {}
    settings |= {"openings": begin.openings} if begin.openings else {}
    settings |= {} if device.type == "cpu" else {"device": device.type}  # whose rounding may choose other tokens
    files = LayerFiles(folder, SELF_TEXT, settings)
    documents: list[list[int]] = []
    index, tokens_done = 0, 0

    def written(more: int) -> None:
        """Report the number of tokens of all batches, including `more` of the current one."""
        if progress:
            progress(min(tokens_done + more, tokens), tokens, STAGE)

    written(0)
    while tokens_done < tokens:
        stored = files.load(index)
        if stored is None:
            generator = torch.Generator().manual_seed(_seed(heal.seed, index))
            remaining = math.ceil((tokens - tokens_done) * len(documents) / tokens_done) if documents else batch
            count = min(batch, remaining)
            speakers = Speakers(begin, count, device)
            first = begin.draw(count, generator).to(device)
            rows, lengths = _write(writer, first, length, speakers, generator, written)
            if folder:
                with machine_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    files.save(index, {"ids": rows.int().cpu(), "lengths": lengths.cpu()}, {})
        else:
            rows, lengths = stored[0]["ids"].long(), stored[0]["lengths"]
        new_documents = [row[:end] for row, end in zip(rows.tolist(), lengths.tolist(), strict=True)]
        new_tokens = sum(len(document) - len(begin.prefix) for document in new_documents)
        documents, tokens_done, index = documents + new_documents, tokens_done + new_tokens, index + 1
        written(0)
    return documents


def fast_writer(model):
    """The model in the form that generates text fastest on this machine.

    Its cache is not copied as a whole for every token. On a CPU that computes in bfloat16, its weights are in
    bfloat16.

    It is the cache of surgical checkpoints, without any surgery. On one core, it raised the speed of SmolLM2-135M for
    32 samples of 384 tokens from 77 to 144 tokens a second. On two cores, 64 samples of 512 tokens were written at 251
    tokens a second in bfloat16, and at 137 in float32.

    Returns:
        A new model, which shares this model's weights unless they are rounded; or this model, where the runtime cannot
        be used with it.
    """
    if hasattr(model, "make_cache") or Anatomy.of(model).runtime_problem() or hasattr(model, "hf_device_map"):
        return model
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    if model.device.type == "cpu" and fast_in_bfloat16():  # buffers stay: RoPE's frequencies must be exact
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
    model,
    ids: torch.Tensor,
    length: int,
    speakers: Speakers,
    generator: torch.Generator,
    written: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples [batch, length] that begin with `ids` [batch, n], and how many tokens each has [batch].

    `written` is called with the number of sampled tokens so far, every `REPORTED` tokens.

    The model's own `generate` would apply its generation config, such as penalties and a top-p for chats.
    """
    rows = ids.new_zeros(len(ids), length)
    rows[:, : ids.shape[1]] = ids
    lengths = torch.full_like(ids[:, 0], length)
    live, ended = torch.arange(len(ids), device=ids.device), torch.zeros_like(ids[:, 0], dtype=torch.bool)
    state, new, tokens = {}, ids, 0
    for position in range(ids.shape[1], length):
        out = model(input_ids=new, use_cache=True, logits_to_keep=1, **state)
        state = {CACHE: out[CACHE]}
        new, last = speakers(_sample_tokens(out.logits[:, -1], generator))
        rows[live, position] = new[:, 0]
        lengths[live[last & ~ended]] = position + 1
        ended |= last
        tokens += len(live) - int(ended.sum())
        if written and position % REPORTED == 0:
            written(tokens)
        if ended.all():
            break
        if 4 * ended.sum() >= len(ended):  # else ended rows would still be computed
            running = (~ended).nonzero()[:, 0]
            state[CACHE].batch_select_indices(running.cpu())  # its layers may be on several devices
            live, new, ended = live[running], new[running], ended[running]
            speakers.keep(running)
    return rows, lengths


class Speakers:
    """Who writes in each sample: the model alone, or first the user and then the model.

    Args:
        begin: its `answer` and `ends` are read.
        rows: number of samples.
    """

    def __init__(self, begin: Begin, rows: int, device: Any = None):
        self.answer = torch.tensor(begin.answer, dtype=torch.long, device=device)
        self.ends = torch.tensor(begin.ends, dtype=torch.long, device=device)
        self.put = torch.zeros(rows, dtype=torch.long, device=device)  # how many tokens of `answer` each sample has

    def __call__(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens [rows, 1] after `new` was sampled, and whether they end their samples [rows]."""
        ends = torch.isin(new[:, 0], self.ends)
        if not len(self.answer):
            return new, ends
        message_ends = new[:, 0] == self.answer[0]
        between = torch.where(self.put == 0, message_ends, self.put < len(self.answer))
        put = self.answer[self.put.clamp(max=len(self.answer) - 1)]
        self.put += between
        return torch.where(between, put, new[:, 0])[:, None], ends & ~between

    def keep(self, rows: torch.Tensor) -> None:
        """Continue with the samples at these indices."""
        self.put = self.put[rows]


def _sample_tokens(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sample a token [rows, 1] for each row of logits [rows, vocabulary].

    One random number is drawn for each row. `multinomial` draws one for each token of the vocabulary, which took a
    fifth of a step's time.
    """
    dtype = torch.float64 if has_float64(logits.device) else torch.float32
    cumulative = logits.to(dtype).softmax(-1).cumsum(-1)
    if not cumulative[:, -1].isfinite().all():
        raise ModelError(
            f"the model gives no probabilities for its next token: its logits ({logits.dtype}) are infinite or NaN",
            where="text of the base",
            fix="name a text (calibration_text=FILE, heal.data=FILE); float16 may overflow: load in float32",
        )
    threshold = torch.rand(len(logits), 1, generator=generator, dtype=dtype).to(logits.device)
    return torch.searchsorted(cumulative, threshold * cumulative[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class Begin:
    """How samples begin and end.

    Attributes:
        prefix: their first tokens.
        words: tokens of which one follows; () if none does.
        ends: the tokens that end a text of this model, sorted.
        answer: in a conversation, the template's tokens from the end of the user's message to the beginning of the
            answer; () if the model must write them itself.
        openings: tokens of openings, all of one length, of which one follows; () if none does.
    """

    prefix: tuple[int, ...]
    words: tuple[int, ...]
    ends: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    openings: tuple[tuple[int, ...], ...] = field(default=(), repr=False)  # not in the names of files without openings

    @classmethod
    def of(cls, model, tokenizer, chat: bool, length: int, openings: Sequence[str] = ()) -> Begin:
        """The beginning for a model: of a conversation, or of running text.

        Args:
            length: tokens of the longest sample.
            openings: beginnings of texts, whose first words begin running text; (): it begins with BOS or a word.

        Raises:
            SurgeryError: `chat` and as for `user_turn`; or a vocabulary without words, or without those of openings.
        """
        prefix, answer = user_turn(tokenizer, length) if chat else ((), ())
        bos, ends = tuple(begin_of_text(tokenizer)), tuple(sorted(_end_tokens(model, tokenizer)))
        if prefix[: len(bos)] != bos:
            prefix = bos + prefix
        answer = answer if set(answer[:1]) & set(ends) else ()
        if openings and not chat:
            return cls(prefix, (), ends, answer, _first_tokens(tokenizer, openings, (length - len(prefix)) // 2))
        words = () if prefix else _words(tokenizer, model.config.get_text_config().vocab_size)
        return cls(prefix, words, ends, answer)

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """The first tokens of a batch of samples, long [batch, n]."""
        prefix = torch.tensor(self.prefix, dtype=torch.long).expand(batch, -1)
        if self.openings:  # in their order, from a random one on: neighbours are of different kinds
            first = torch.randint(len(self.openings), (1,), generator=generator)
            openings = torch.tensor(self.openings)
            return torch.cat([prefix, openings[(first + torch.arange(batch)) % len(openings)]], dim=1)
        if not self.words:
            return prefix
        words = torch.tensor(self.words)
        indices = torch.randint(len(words), (batch, 1), generator=generator)
        return torch.cat([prefix, words[indices]], dim=1)


def user_turn(tokenizer, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The chat template's tokens before a user's message, and those between it and the model's answer.

    Args:
        length: tokens of the longest conversation. The template's may take half of them.

    Raises:
        SurgeryError: the tokenizer has no chat template, one that a user's message alone does not fit, or one that
            leaves too little room.
    """
    where, fix = "conversations of the base", "heal.data=self and heal.chat=false: running text"
    if not getattr(tokenizer, "chat_template", None):
        raise ModelMismatchError("this tokenizer has no chat template", where=where, fix=fix)
    try:
        text = _rendered(tokenizer, [{"role": "user", "content": MARK}])
    except Exception as error:  # templates are code, which raises what it likes
        reason = f"the chat template does not take a user's message: {error}"
        raise ModelMismatchError(reason, where=where, fix=fix) from error
    before, mark, after = text.partition(MARK)
    if not mark:
        raise ModelMismatchError("the chat template leaves out a user's message of text", where=where, fix=fix)
    turn = [tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after)]
    if 2 * (taken := sum(map(len, turn))) > length:
        reason = f"the chat template alone takes {taken} of {length} tokens"
        raise SettingError(reason, where="heal.length", fix=f"heal.length={2 * taken}, or {fix}")
    return turn[0], turn[1]


def _rendered(tokenizer, messages: list[dict[str, str]]) -> str:
    """A conversation up to the model's next turn. A template that prints today's date prints `DAY` instead."""
    template = tokenizer.get_chat_template()
    if "strftime_now(" in template:
        macro = "{%- macro surgery_day(format) -%}" + DAY + "{%- endmacro -%}"
        template = macro + template.replace("strftime_now(", "surgery_day(")
    settings = {"chat_template": template, "date_string": DAY}
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)


def _first_tokens(tokenizer, texts: Sequence[str], count: int) -> tuple[tuple[int, ...], ...]:
    """The tokens of the first words of texts, at most `count` and as many of each as of the shortest, without doubles.

    Raises:
        SurgeryError: the tokenizer knows the words of no text.
    """
    unknown, beginnings = {None, tokenizer.unk_token_id}, [" ".join(text.split()[:OPENING]) for text in texts]
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in beginnings]
    known = [each for each in ids if each and not unknown & set(each)]
    if not known:
        raise ModelMismatchError(
            "the tokenizer does not know the English words that texts would begin with",
            where="text that the model writes",
            fix="calibration_text: mixed, whose texts begin with words of its vocabulary",
        )
    count = max(1, min(count, *map(len, known)))
    return tuple(dict.fromkeys(each[:count] for each in known))


def _words(tokenizer, vocabulary: int) -> tuple[int, ...]:
    """The tokens of letters that can begin a text; they are capitalised if the script has capitals.

    Raises:
        SurgeryError: there are no such tokens.
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
    """The EOS tokens of the tokenizer and of the model's generation config, which may have several."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (tokenizer.eos_token_id, *configured) if token is not None}


def _seed(seed: int, index: int) -> int:
    """A seed for each batch, so that the random numbers of neighbouring batches are independent."""
    return random.Random(f"{seed}/{index}").getrandbits(63)
