"""Tokenizers of single bytes, and of single letters."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[model] {% endif %}"
)


def byte_tokenizer(chat: bool = False, bos: bool = False, merges: tuple = ()) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each pair in `merges`, wherever it stands; tokens 0 and 1 are specials."""
    from tokenizers.processors import TemplateProcessing

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    vocabulary |= {"".join(pair): len(vocabulary) + i for i, pair in enumerate(merges)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if bos:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    from tokenizers.decoders import ByteLevel

    core.decoder = ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT if chat else None
    return made


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: letters, a mark for spaces, and bytes for the rest. It begins every text with BOS and a space."""
    from tokenizers import decoders, normalizers
    from tokenizers.processors import TemplateProcessing

    signs = [chr(code) for code in range(33, 127)]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *signs]
    vocabulary = {name: index for index, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Letters:
    """A tokenizer of single letters, for the operations that measure on a text; the models have 128 words."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(letter) % 120 for letter in text]}
