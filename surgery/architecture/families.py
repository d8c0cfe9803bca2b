"""How model families lay out attention, as one table.

Each row is a family of Transformers 5; the defaults are those of Llama. The rows were read from the modelling code of
the families and are tested on a tiny random model of each (tests/contracts/test_families.py). Features that a config
can switch (biases, Cohere's and Phi's QK-norm, ALiBi in old Falcons) are not settled here: detect.py reads them from
the config and the stored tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one `model_type` lays out attention.

    Attributes:
        layers: path of the layer list in the causal model, as `named_parameters` spells it.
        attn: the attention module's name within a layer.
        q, k, v, o: names of the projections. In latent attention `k` makes the latent vector and the rotated key, and
            `v` makes keys and values of the vector.
        latent_norm: name of the norm of the vector in latent attention; None: attention has no such vector.
        q_down, q_down_norm: names of a projection and a norm whose output `q` reads in place of the layer's input
            (`with_query_vector`), or None.
        qkv: name of the fused module that replaces q, k and v, or None.
        layout: how the rows of `qkv` are ordered: "rows" (all q, all k, all v), "grouped" (per KV head: its
            query heads, one k, one v; with one query head per KV head this is the per-head interleave) or
            "falcon" (either, as its config says); "separate" if nothing is fused.
        conv1d: whether weights are stored transposed, [in, out].
        positions: "half" (RoPE pairs (i, i + r/2)), "interleaved" (pairs (2i, 2i+1)), "learned" or "alibi".
        partial: the config's field for the channels of a head that RoPE rotates, or for their share; "": it rotates
            all, and stock code does not read such a field.
        kv_field: the config field for the number of KV heads, if the forward honours it; None if there is no such
            field or the forward ignores it; "falcon" for Falcon's two switches.
        qk_norm: None, "shared" (weight [head_dim]), "per head" ([heads, head_dim]), "modules" (one module
            for each head) or "whole" (over the whole projection, [heads * head_dim]).
        q_norm, k_norm: names of the two norm modules.
        sinks: name of the learned sink logits [heads], or None.
        head_dim: whether the forward takes the head size from the config's `head_dim`, if set. Otherwise it divides
            the hidden size by the heads, and no stock checkpoint can have fewer heads of the same size.
        kv_down: name of the projection that makes the vector of which keys and values are made, where a surgery gave
            the layer one (`with_kv_vector`), or None. `k` and `v` then read this vector.
        angles: what attention gets of RoPE's cosines and sines: one for each of the "channels" or of the "pairs" of
            channels, "wide" (for each channel, in float32), or "nothing", where it makes them by itself.
        interface: whether the family uses Transformers' attention interface in the installed version.
        since: the version of Transformers that introduced this; "": every version that this package accepts, or none.
    """

    layers: str = "model.layers"
    attn: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    latent_norm: str | None = None
    q_down: str | None = None
    q_down_norm: str | None = None
    qkv: str | None = None
    layout: str = "separate"
    conv1d: bool = False
    positions: str = "half"
    partial: str = ""
    kv_field: str | None = "num_key_value_heads"
    qk_norm: str | None = None
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    sinks: str | None = None
    head_dim: bool = True
    kv_down: str | None = None
    angles: str = "channels"
    interface: bool = True
    since: str = ""

    @property
    def q_input(self) -> str:
        """Name of the query projection that reads the layer's input."""
        return self.q_down or self.q

    @property
    def vectors_problem(self) -> str:
        """Why keys and values cannot be made of a vector of low rank (`with_kv_vector`); "" if they can."""
        if not self.interface or self.latent_norm:
            return "attention of this kind has no keys and values of its own here"
        if self.qkv:
            return "one matrix makes queries, keys and values, and keys need one of their own"
        if self.angles == "nothing":
            return "attention turns its keys by itself, and those of the past must be turned anew"
        return ""


TRANSFORMERS = tuple(int(part) for part in version("transformers").split(".")[:2])


def interface_from(release: str) -> dict[str, Any]:
    """The fields of a family that uses Transformers' attention interface from this release on."""
    return {"interface": tuple(map(int, release.split("."))) <= TRANSFORMERS, "since": release}


SHARE = "partial_rotary_factor"
GPT2 = {"layers": "transformer.h", "attn": "attn", "kv_field": None, "head_dim": False}
BLOOM = {"attn": "self_attention", "qkv": "query_key_value", "o": "dense", "head_dim": False}

FAMILIES: dict[str, Family] = {
    # separate projections, RoPE, num_key_value_heads honoured
    "llama": Family(),
    "mistral": Family(),
    "ministral": Family(),
    "mixtral": Family(),
    "qwen2": Family(),
    "gemma": Family(),
    "gemma2": Family(),
    "granite": Family(),
    "smollm3": Family(),
    "starcoder2": Family(),
    "glm4": Family(positions="interleaved", partial=SHARE),
    "gpt_oss": Family(sinks="sinks", angles="pairs"),
    # latent attention; where a config has q_lora_rank, see `with_query_vector`
    "deepseek_v3": Family(k="kv_a_proj_with_mqa", v="kv_b_proj", latent_norm="kv_a_layernorm", kv_field=None),
    # the same, with a norm between projection and RoPE
    "qwen3": Family(qk_norm="shared"),
    "qwen3_moe": Family(qk_norm="shared"),
    "gemma3_text": Family(qk_norm="shared"),
    "olmo2": Family(qk_norm="whole", angles="wide"),
    "cohere": Family(qk_norm="per head", positions="interleaved"),
    "stablelm": Family(qk_norm="modules", q_norm="q_layernorm", k_norm="k_layernorm", head_dim=False, partial=SHARE),
    "phi": Family(qk_norm="shared", q_norm="q_layernorm", k_norm="k_layernorm", o="dense", partial=SHARE),
    # fused projections that honour a number of KV heads
    "phi3": Family(qkv="qkv_proj", layout="rows", partial=SHARE),
    "falcon": Family(
        layers="transformer.h",
        layout="falcon",
        kv_field="falcon",
        **BLOOM,
        **interface_from("5.25"),
    ),
    # no number of KV heads: these cannot be expanded further, and fewer KV heads need the surgical tier
    "gpt_neox": Family(
        "gpt_neox.layers",
        "attention",
        o="dense",
        qkv="query_key_value",
        layout="grouped",
        partial=SHARE,
        kv_field=None,
        head_dim=False,
    ),
    "gpt2": Family(**GPT2, qkv="c_attn", o="c_proj", layout="rows", conv1d=True, positions="learned"),
    "gptj": Family(
        **GPT2,
        o="out_proj",
        positions="interleaved",
        partial="rotary_dim",
        angles="nothing",
        **interface_from("5.24"),
    ),
    "opt": Family(layers="model.decoder.layers", o="out_proj", positions="learned", kv_field=None, head_dim=False),
    "bloom": Family(
        layers="transformer.h", layout="grouped", positions="alibi", kv_field=None, interface=False, **BLOOM
    ),
    "mpt": Family(
        "transformer.blocks",
        "attn",
        qkv="Wqkv",
        o="out_proj",
        layout="rows",
        positions="alibi",
        kv_field=None,
        head_dim=False,
        interface=False,
    ),
}


def with_query_vector(family: Family) -> Family:
    """A family with latent attention whose queries are made of a vector of their own (`q_lora_rank`)."""
    return replace(family, q="q_b_proj", q_down="q_a_proj", q_down_norm="q_a_layernorm")


def with_kv_vector(family: Family) -> Family:
    """A family whose keys and values are made of a vector of low rank (surgery/runtime/surgery_low_rank.py)."""
    return replace(family, k=f"{family.k}.up", v=f"{family.v}.up", kv_down="kv_vector")


# Where the layer list of a causal model may be found in a file or in a loaded model: checkpoints are saved
# with and without the base model's prefix (gpt2 and bloom on the Hub lack "transformer."), and a composite
# keeps its language model under a prefix that changed between releases of Transformers.
LAYER_PATHS: dict[str, tuple[str, ...]] = {
    "model.layers": (
        "model.layers",
        "layers",
        "model.language_model.layers",
        "language_model.model.layers",
        "language_model.layers",
        "model.text_model.layers",
    ),
    "model.decoder.layers": ("model.decoder.layers", "decoder.layers"),
    "transformer.h": ("transformer.h", "h"),
    "transformer.blocks": ("transformer.blocks", "blocks"),
    "gpt_neox.layers": ("gpt_neox.layers", "layers"),
}

# The common form of tensor names, by which an unknown family is understood (and marked as a guess).
COMMON_FORM = (
    r"^(?P<layers>(?:\w+\.)*(?:layers|h|blocks))\.(?P<i>\d+)\.(?P<attn>self_attn|attention|attn)"
    r"\.(?P<p>q_proj|k_proj|v_proj|o_proj|out_proj)\.weight$"
)

# Parts of module names that suggest attention of another form; the error lists the names that were found.
ATTENTION_WORDS = (
    "attn",
    "attention",
    "query",
    "key",
    "value",
    "qkv",
    "q_a_proj",
    "kv_a_proj",
    "in_proj",
    "mixer",
)
