"""Read a plain config.json without Transformers, whose import takes longer than copying a gigabyte.

A config.json is plain if it belongs to a family of `FORMS` and Transformers would complete, convert or refuse none of
its keys. Any other config.json is read by Transformers (`model_folder.load_config`), since only Transformers knows the
defaults of its classes, the spellings of earlier versions and the values that it refuses. A test compares both
readings, also for files with missing keys and with values of other types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from surgery.io.safetensors import STORED_NAMES


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _flag(value: Any) -> bool:
    return type(value) is bool


def _share(value: Any) -> bool:
    return type(value) is float and 0 <= value <= 1


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _text(value: Any) -> bool:
    return type(value) is str


def _token_ids(value: Any) -> bool:
    return value is None or type(value) is int or (type(value) is list and all(type(each) is int for each in value))


def _token_id(value: Any) -> bool:
    return value is None or type(value) is int


def _dtype(value: Any) -> bool:
    return type(value) is str and value in STORED_NAMES


def _rope(value: Any) -> bool:
    """Whether RoPE rotates all channels of a head and its parameters are complete."""
    if value is None:
        return True
    if type(value) is not dict:
        return False
    numbers, kind = {"rope_theta", *SCALED}, value.get("rope_type")
    if not all(name == "rope_type" or (name in numbers and _positive(each)) for name, each in value.items()):
        return False
    return (
        value.keys() <= {"rope_type", "rope_theta"}
        if kind == "default"
        else kind == "llama3" and value.keys() >= SCALED
    )


SCALED = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}  # of Llama 3.1's RoPE
FULL = "full_attention"
NEEDED = (  # keys whose default differs between the classes
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "vocab_size",
)  # fmt: skip
KEYS: dict[str, Callable[[Any], bool]] = {  # key -> whether Transformers takes a value unchanged
    **dict.fromkeys((*NEEDED, "num_key_value_heads", "head_dim", "pretraining_tp"), _count),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"), _flag),
    **dict.fromkeys(("attention_dropout", "initializer_range"), _share),
    **dict.fromkeys(("hidden_act", "model_type", "transformers_version", "_name_or_path"), _text),
    **dict.fromkeys(("dtype", "torch_dtype"), _dtype),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _rope),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "unk_token_id"), _token_id),
    "eos_token_id": _token_ids,
    "rms_norm_eps": lambda value: type(value) is float and value > 0,
    "rope_theta": _positive,
    "architectures": lambda value: type(value) is list and len(value) == 1 and _text(value[0]),
}
WINDOW: dict[str, Callable[[Any], bool]] = {"sliding_window": lambda value: value is None or _count(value)}
NO_WINDOW = WINDOW | {
    "max_window_layers": _count,
    "use_sliding_window": lambda value: value is False,
    "layer_types": lambda value: type(value) is list and all(each == FULL for each in value),
}


@dataclass(frozen=True)
class Form:
    """The keys of a plain config.json of one `model_type`, in addition to those of all types.

    Attributes:
        needed: further keys that must be present, as in `NEEDED`.
        keys: further keys that may be present, as in `KEYS`.
        head_dim: where the key is missing, the class divides the hidden size by the number of heads.
        layer_types: the class lists a kind of attention for each layer; here each is full attention.
    """

    needed: tuple[str, ...]
    keys: dict[str, Callable[[Any], bool]]
    head_dim: bool = False
    layer_types: bool = False


FORMS = {
    "llama": Form((), {}, head_dim=True),
    "mistral": Form(("num_key_value_heads", "sliding_window"), WINDOW, head_dim=True),
    "qwen2": Form(("num_key_value_heads",), NO_WINDOW, layer_types=True),
    "qwen3": Form(("num_key_value_heads", "head_dim"), NO_WINDOW, layer_types=True),
}
# Attributes that operations and the anatomy look up in every config. These classes lack them unless their form adds
# them.
ABSENT = (
    "alibi", "attn_logit_softcapping", "layer_types", "new_decoder_architecture", "no_rope_layers", "qk_layernorm",
    "quantization_config", "rotary_dim", "sliding_window", "surgery", "use_qk_norm", "use_sliding_window",
)  # fmt: skip


class PlainConfig:
    """The config of a model folder whose config.json is plain.

    Its own attributes were read from config.json. Any other attribute is looked up in Transformers' config, which is
    loaded at the first such look-up.

    Args:
        known: attribute -> value, as Transformers' config would have it.
        absent: attributes that Transformers' config would not have.
        load: returns Transformers' config.
    """

    def __init__(self, known: dict[str, Any], absent: tuple[str, ...], load: Callable[[], Any]):
        self.__dict__ |= known
        self._absent, self._load = absent, load

    @cached_property
    def full(self) -> Any:
        """Transformers' config of the same folder."""
        return self._load()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_absent", "_load") or name in self._absent:
            raise AttributeError(f"this config has no attribute {name!r}")
        return getattr(self.full, name)

    def get_text_config(self, *_, **__) -> PlainConfig:
        """This config itself: it describes only a language model."""
        return self


def plain_config(raw: dict, load: Callable[[], Any]) -> PlainConfig | None:
    """The config that a plain config.json describes; None where it is not plain.

    Args:
        raw: the content of config.json.
        load: returns Transformers' config of the same file.
    """
    form = FORMS.get(raw.get("model_type", ""))
    if form is None or not {*NEEDED, *form.needed} <= raw.keys() or not _is_plain(raw, form):
        return None
    heads, hidden, layers = raw["num_attention_heads"], raw["hidden_size"], raw["num_hidden_layers"]
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    known = {name: raw[name] for name in ("model_type", *NEEDED)} | {
        "num_key_value_heads": raw.get("num_key_value_heads", heads),
        "architectures": raw.get("architectures"),
        "is_encoder_decoder": False,
        "output_attentions": False,
        "per_layer_attributes": None,
        "rope_parameters": {"rope_theta": raw.get("rope_theta", 10000.0), "rope_type": "default"} | rope,
        "_name_or_path": raw.get("_name_or_path", ""),
    }
    if form.head_dim or "head_dim" in raw:
        known["head_dim"] = raw.get("head_dim", hidden // heads)
    if form.layer_types:
        known |= {"layer_types": [FULL] * layers, "sliding_window": None, "use_sliding_window": False}
    elif "sliding_window" in form.keys:
        known["sliding_window"] = raw["sliding_window"]
    absent = (*ABSENT, "head_dim")
    return PlainConfig(known, tuple(name for name in absent if name not in known), load)


def _is_plain(raw: dict, form: Form) -> bool:
    keys = KEYS | form.keys
    if not all(name in keys and keys[name](value) for name, value in raw.items()):
        return False
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    if hidden % heads or raw.get("head_dim", hidden // heads) % 2:
        return False
    if "layer_types" in raw and len(raw["layer_types"]) != raw["num_hidden_layers"]:
        return False
    return _spellings_agree(raw)


def _spellings_agree(raw: dict) -> bool:
    """Whether keys of Transformers 4 that stand beside those of Transformers 5 say the same (`earlier_keys`)."""
    if {"dtype", "torch_dtype"} <= raw.keys() and raw["dtype"] != raw["torch_dtype"]:
        return False
    if not {"rope_scaling", "rope_parameters"} <= raw.keys():
        return True
    rope = dict(raw["rope_parameters"] or {})
    return rope.pop("rope_theta", None) == raw.get("rope_theta") is not None and rope == raw["rope_scaling"]
