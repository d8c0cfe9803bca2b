"""Models for recall tests: one that reads its prompt as text and answers with what a function takes from it."""

from __future__ import annotations

import pytest
import torch
from tokenizers_of_bytes import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.runtime.modeling_surgery import CACHE


class Config:
    """The config of a model of bytes with many positions."""

    vocab_size, max_position_embeddings, surgery = 258, 4096, None

    def get_text_config(self):
        return self


class Planted:
    """What a model that is written down in a test has besides its call."""

    device, training, generation_config = torch.device("cpu"), False, None

    def forward(self, input_ids):
        raise NotImplementedError

    def eval(self):
        return self

    def modules(self):
        return [self]

    def train(self, mode):
        return self


class Reader(Planted):
    """A model that reads its prompt as text and answers with what `choose` takes from it."""

    def __init__(self, tokenizer, choose):
        self.tokenizer, self.choose, self.answer = tokenizer, choose, []

    def __call__(self, input_ids, use_cache, **cache):
        step = cache.get(CACHE, 0)
        if not step:
            prompt = self.tokenizer.decode(input_ids[0])
            self.answer = self.tokenizer(f" {self.choose(prompt)}")["input_ids"]
        logits = torch.full((1, input_ids.shape[1], 258), -30.0)
        logits[0, -1, self.answer[step] if step < len(self.answer) else 1] = 30.0
        return Said(logits, step + 1)


class Said(dict):
    """What `Reader` returns: logits and its place in the answer."""

    def __init__(self, logits, step):
        super().__init__({CACHE: step})
        self.logits = logits


@pytest.fixture(scope="session")
def reading_model(tmp_path_factory):
    """A folder with a random model of bytes, 1,024 positions long."""
    folder = tmp_path_factory.mktemp("reading") / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, bos_token_id=0, eos_token_id=1, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
