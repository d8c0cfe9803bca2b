"""A model with latent attention (MLA) as stock `deepseek_v3`: what can become one, its config, and its modules.

DeepSeek-AI 2024, "DeepSeek-V2", arXiv 2405.04434. Stock Transformers keeps the latent vector and the rotated key in
its cache, so that the bytes are saved without code of ours.

Biases of keys and values become one of the projection that makes the vector and the rotated key. The stock module has
no bias of queries. It can make them of a vector of their own, though, and here this vector is the layer's input with a
1 behind it: the bias is a column of the matrix that makes queries of it.

The stock module divides the vector by its root mean square, with a fixed epsilon (`NORM_EPSILON`). A vector that is
scaled far below this epsilon is divided by the epsilon alone, so that the norm's weight undoes the scale and the norm
does nothing. `scaled_norm` gives both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.architecture.families import SHARE
from surgery.architecture.layer import Latent
from surgery.architecture.stock_class import BASES, empty_model, stock_config, take_class
from surgery.errors import all_of

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.anatomy import Anatomy

STOCK = "deepseek_v3"
ROPE_TYPES = ("default", "linear", "llama3")  # their frequencies follow from theta one by one
VECTORS = (("kv_a_proj_with_mqa", "kv_a_layernorm"), ("q_a_proj", "q_a_layernorm"))  # what makes a vector, its norm
NORM_EPSILON = 1e-6
HARMLESS = 1e-6  # largest share of the epsilon that a vector's mean square may have; half of it is the relative error
LARGE = 100.0  # a norm's weight beyond this undoes a factor; trained ones are of the order of 1
BIASES = ("", "qkv", "qkvo")  # letters of the projections with a bias that it can hold
ALIGNED = 8  # a matrix whose sides are multiples of it is multiplied fast
NARROW = ("F16",)  # dtypes that cannot hold rows scaled so far down


def latent_problem(anatomy: Anatomy) -> str:
    """Why a stock model with latent attention cannot stand for this model; "" if it can."""
    config, layer = anatomy.config, anatomy.layers[0]
    if anatomy.composite or anatomy.guess or anatomy.model_type not in BASES[STOCK]:
        families = all_of(BASES[STOCK])
        return f"stock {STOCK} has the layers of {families}, and this is {anatomy.composite or anatomy.model_type}"
    if anatomy.surgical or not anatomy.alike:
        return "the layers of this model were changed before; start from its base"
    if odd := [each.biases for each in anatomy.layers if each.biases not in BIASES]:
        return f"stock {STOCK} has biases in q, k and v or in none, and this {anatomy.model_type} has: {odd[0]}"
    if getattr(config, "mlp_bias", False):
        return f"stock {STOCK} has no biases in its MLP, and this {anatomy.model_type} has"
    if any(each.window is not None for each in anatomy.layers):
        return f"stock {STOCK} has no sliding window, and layers of this {anatomy.model_type} slide"
    rope = getattr(config, "rope_parameters", None) or {}
    if (kind := rope.get("rope_type", "default")) not in ROPE_TYPES or layer.rotary != layer.head_dim:
        what = kind if kind not in ROPE_TYPES else f"partial ({layer.rotary} of {layer.head_dim} channels)"
        return f"its RoPE is {what}, whose frequencies a head of another size does not have"
    return ""


def latent_fields(anatomy: Anatomy, latent: Latent) -> dict[str, Any]:
    """The fields of the stock config that differ from the base's.

    RoPE of `latent.rope` channels has the base's first frequencies, or each `latent.fold`-th of them: theta is raised
    to the share of channels that they stand for.
    """
    layer, config = anatomy.layers[0], anatomy.config
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope.pop(SHARE, None)  # stock code reads it in neither family; that of engines and earlier releases may
    if (rotary := latent.rope * latent.fold) != layer.rotary:
        rope["rope_theta"] = float(rope["rope_theta"]) ** (rotary / layer.rotary)
    return {
        "model_type": STOCK,
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": latent.queries > 0,
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.queries or None,
        "qk_rope_head_dim": latent.rope,
        "qk_nope_head_dim": latent.nope,
        "v_head_dim": latent.value,
        "head_dim": latent.rope,
        "num_key_value_heads": layer.heads,
        "first_k_dense_replace": len(anatomy.layers),
        "num_mtp_layers": 0,
        "rope_interleave": True,  # as other engines take it for granted
        "rope_parameters": rope,
    }


def interleaved(rows: Tensor) -> Tensor:
    """Rotated channels [..., e, n] in the stock order: the pairs (i, i + e/2) side by side."""
    import torch

    half = rows.shape[-2] // 2
    return rows[..., torch.arange(2 * half).view(2, half).T.flatten(), :]


def queries_of(anatomy: Anatomy) -> int:
    """Numbers in the vector that queries are made of, where they have a bias: the layer's input, a 1, and zeros up to
    a multiple of `ALIGNED`; 0 where no projection of queries, keys and values has one.
    """
    size = anatomy.config.hidden_size
    return (size // ALIGNED + 1) * ALIGNED if set("qkv") & set(anatomy.layers[0].biases) else 0


def scaled_norm(largest: float) -> tuple[float, float]:
    """The factor on the rows that make the vector, and the norm's weight, with which the norm does nothing.

    The weight is a power of two, which every dtype holds.

    Args:
        largest: the largest mean square of a vector over a text.
    """
    weight = 2.0 ** math.ceil(math.log2((max(largest, 1.0) / HARMLESS) ** 0.5))
    return NORM_EPSILON**0.5 / weight, weight


def write_latent(model, after: Anatomy, tensors_of_layers: list[dict[str, Tensor]]) -> None:
    """Turn a loaded model, in place, into the stock model with latent attention that `after` describes.

    All modules but attention and RoPE stay, with their parameters and hooks; layers get the stock classes.

    Args:
        tensors_of_layers: the attention module's tensors of each layer, by name.
    """
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    stock = empty_model(model, stock_config(model.config, after.edits))
    attentions = [
        _filled(made.self_attn, layer.self_attn, tensors)
        for made, layer, tensors in zip(stock.model.layers, model.model.layers, tensors_of_layers, strict=True)
    ]
    rotary = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(stock.config)
    model.model.rotary_emb = rotary.to(model.model.embed_tokens.weight.device)
    for layer, attention in zip(model.model.layers, attentions, strict=True):
        layer.self_attn = attention
    take_class(model, stock, [f"model.layers.{index}" for index in range(len(attentions))])


def _filled(made, old, tensors: dict[str, Tensor]):
    """An attention module that was made without memory, with these parameters, in the place of another one.

    Its output projection keeps its bias. Where the old one has none and the stock class does, it is zero.
    """
    from torch import nn

    weight = old.o_proj.weight
    if made.o_proj.bias is not None:
        bias = old.o_proj.bias
        tensors = tensors | {"o_proj.bias": weight.new_zeros(len(weight)) if bias is None else bias.detach()}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(tensor.to(weight.device), requires_grad=weight.requires_grad)
        setattr(made.get_submodule(owner), leaf, parameter)
    return made.train(old.training)


@contextmanager
def vectors_at_scale(model) -> Iterator[None]:
    """Inside the context, hold the rows of the latent vectors at about their own scale, and the norms' epsilon far up.

    The function of the model is the same. An optimiser's step of 1e-4 would be thousands of times a row that is scaled
    far down. A norm that does something, as that of a trained model, is left alone. All factors are powers of two, so
    that nothing is rounded.
    """
    # By their paths: a training may put other modules in their places.
    factors = {
        (f"{path}.{projection}", f"{path}.{norm}"): _factor(getattr(attention, norm))
        for path, attention in model.named_modules()
        for projection, norm in VECTORS
        if getattr(attention, norm, None) is not None
    }
    _scale(model, factors)
    try:
        yield
    finally:
        _scale(model, {paths: 1 / factor for paths, factor in factors.items()})


def _factor(norm) -> float:
    """The power of two that undoes the factor of `scaled_norm` on the rows of a vector; 1 where a norm has none."""
    weight = float(norm.weight.detach().double().mean())
    return 2.0 ** round(math.log2(weight / NORM_EPSILON**0.5)) if weight > LARGE else 1.0


def _scale(model, factors: dict[tuple[str, str], float]) -> None:
    """Multiply the rows that make vectors, the first ones of their projections, and leave the model's function.

    Args:
        factors: paths of the projection and of the norm of a vector -> factor.
    """
    import torch

    for paths, factor in factors.items():
        projection, norm = map(model.get_submodule, paths)
        with torch.no_grad():
            projection.weight[: len(norm.weight)] *= factor
            if projection.bias is not None:
                projection.bias[: len(norm.weight)] *= factor
        norm.variance_epsilon *= factor**2
