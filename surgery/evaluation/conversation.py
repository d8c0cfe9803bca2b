"""What a model answers to one prompt, as it is written, with its speed and the size of its cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long
from surgery.data.haystack import chat_prompt
from surgery.errors import SettingError
from surgery.evaluation.answers import end_tokens
from surgery.evaluation.benchmark.run import cache_bytes
from surgery.io.identity import SAMPLED
from surgery.io.loading import loaded, read_config, read_tokenizer
from surgery.io.printing import byte_size, count

if TYPE_CHECKING:
    from surgery.io.loading import ModelSource


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without special tokens.
        prompt_tokens, tokens: tokens of the prompt and of the answer.
        prompt_seconds: until the first token of the answer.
        tokens_per_second: of the tokens after the first; None for an answer of one token.
        cache_bytes: bytes of the KV cache at the end.
        ended: whether the model ended the answer before the limit.
    """

    text: str
    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    tokens_per_second: float | None
    cache_bytes: int
    ended: bool

    @property
    def facts(self) -> str:
        """Length, speed and cache in one line."""
        speed = f", then {self.tokens_per_second:,.1f} tokens a second" if self.tokens_per_second else ""
        end = "" if self.ended else ", cut off"
        read = f"{count(self.prompt_tokens, 'token')} read in {self.prompt_seconds:.1f} s{speed}"
        return f"{count(self.tokens, 'token')}{end}; {read}; KV cache {byte_size(self.cache_bytes)}"


def reply(
    source: ModelSource,
    prompt: str,
    *,
    tokenizer: Any = None,
    plain: bool = False,
    most: int = 200,
    say: Callable[[str], None] = lambda text: None,
) -> Reply:
    """Let a model answer a prompt, each time with its most probable token.

    Args:
        source: folder, or a loaded model, which needs `tokenizer`.
        plain: the model goes on with the text itself, where it would else be a user's message in the chat template.
        most: the most tokens of the answer.
        say: gets the text of the answer, piece by piece.

    Raises:
        SurgeryError: the prompt is empty, or longer than the model takes with its answer; a chat template raises.
    """
    import torch

    tokenizer = tokenizer or read_tokenizer(source)
    if not prompt.strip():
        raise SettingError("the prompt is empty", fix='-p "What is the capital of France?"')
    chat = not plain and bool(tokenizer.chat_template)
    text = chat_prompt(tokenizer, prompt, "--plain") if chat else prompt
    ids = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
    configs = {"the model": read_config(source)}
    refuse_too_long(configs, ids.shape[1] + most, "prompt and answer", "a shorter prompt, or fewer tokens (--tokens)")
    refuse_other_tokenizer(configs, int(ids.max()))
    with loaded(source) as model, torch.no_grad():
        stream, ids, ends = _stream(tokenizer, say), ids.to(model.device), end_tokens(model, tokenizer)
        began = time.perf_counter()
        done = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_greedy(model, tokenizer, ends, most),
            streamer=stream,
            return_dict_in_generate=True,
        )
        ended = time.perf_counter()
    written = done.sequences[0, ids.shape[1] :].tolist()
    after = len(written) - 1
    return Reply(
        tokenizer.decode(written, skip_special_tokens=True),
        ids.shape[1],
        len(written),
        stream.first - began,
        after / (ended - stream.first) if after else None,
        cache_bytes(done.past_key_values),
        written[-1] in ends,
    )


def _greedy(model: Any, tokenizer: Any, ends: set[int], most: int) -> Any:
    """The model's generation config, without what belongs to drawing at random."""
    from transformers import GenerationConfig

    own = model.generation_config.to_dict() if model.generation_config is not None else {}
    known = {key: value for key, value in own.items() if key not in (*SAMPLED, "max_length")}
    pads = (known.get("pad_token_id"), tokenizer.pad_token_id, *sorted(ends), 0)
    known |= {"do_sample": False, "num_beams": 1, "max_new_tokens": most, "eos_token_id": sorted(ends) or None}
    return GenerationConfig(**known | {"pad_token_id": next(token for token in pads if token is not None)})


def _stream(tokenizer: Any, say: Callable[[str], None]) -> Any:
    """A streamer that passes the text on and notes when the first token came."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        first = 0.0

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt and not self.first:
                self.first = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text)

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
