"""Identities of models and tokenizers: hashes that change whenever what they compute does."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.io.earlier_keys import with_earlier_keys
from surgery.io.files import read_json, sha256
from surgery.io.safetensors import Checkpoint

CONFIGS = ("config.json", "generation_config.json")
# Keys of a config, at any depth, that follow from the machine, and not from the model.
UNSTABLE = ("transformers_version", "_name_or_path", "_commit_hash")
# Keys of a generation config that belong to drawing at random.
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Keys of a generation config that greedy answers do not follow from.
NOT_GREEDY = (
    *SAMPLED, "do_sample", "max_length", "bos_token_id", "pad_token_id", "use_cache", "_from_model_config",
    "num_return_sequences", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
    "return_dict_in_generate",
)  # fmt: skip
# Values of its keys that say what is so without them.
USUAL = {
    "num_beams": 1, "num_beam_groups": 1, "early_stopping": False, "length_penalty": 1.0, "diversity_penalty": 0.0,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "remove_invalid_values": False,
    "renormalize_logits": False, "penalty_alpha": 0.0, "guidance_scale": 1.0,
}  # fmt: skip
END = "eos_token_id"
NOT_FINITE = "__not_finite__"  # key of what stands for infinity or NaN, which JSON does not have
PADDING = ("padding", "truncation")  # what a call of a tokenizer leaves in it


def model_identity(folder: Path, digest: Callable[[Path], str] = sha256) -> str:
    """A hash of every byte of a folder's weights, and of its configs and code. Reading takes a second a gigabyte.

    Args:
        digest: gives the hash of a file.
    """
    weights = [folder / shard.file for shard in Checkpoint(folder).shards] or sorted(folder.glob("pytorch_model*.bin"))
    others = [*(folder / name for name in CONFIGS), *sorted(folder.glob("*.py"))]
    parts = [f"{file.name} {digest(file)}" for file in [*weights, *others] if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def stable_config(folder: Path, name: str = CONFIGS[0]) -> dict[str, Any]:
    """What stands in a config of a folder, as `stable` says it; {} if the folder has none of this name."""
    return stable(read_json(folder / name)) if (folder / name).is_file() else {}


def stable(value: Any) -> Any:
    """Plain data of a config without keys that follow from the machine; every number in it can be written as JSON."""
    if isinstance(value, dict):
        return {key: stable(each) for key, each in value.items() if key not in UNSTABLE}
    if isinstance(value, list | tuple):
        return [stable(each) for each in value]
    return {NOT_FINITE: str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def as_written(value: Any) -> Any:
    """The inverse of `stable`, but for the keys that it left out."""
    if isinstance(value, dict):
        if set(value) == {NOT_FINITE}:
            return float(value[NOT_FINITE])
        return {key: as_written(each) for key, each in value.items()}
    return [as_written(each) for each in value] if isinstance(value, list) else value


def greedy_settings(generation: dict[str, Any] | None, config: dict[str, Any]) -> dict[str, Any]:
    """What greedy answers follow from in the configs of a folder, without values that change nothing.

    Args:
        generation: the generation config; None: the folder has none, and Transformers makes one of config.json.
        config: config.json.
    """
    said = {
        key: value
        for key, value in (_generation_of(config) if generation is None else generation).items()
        if key not in NOT_GREEDY and value is not None and (key not in USUAL or value != USUAL[key])
    }
    ends = said.get(END)
    return said | {END: [ends] if isinstance(ends, int) else ends}


def _generation_of(config: dict[str, Any]) -> dict[str, Any]:
    """The generation config that Transformers makes of a config.json: what it says, then what an inner config says."""
    from transformers import GenerationConfig

    inner = next((config[name] for name in ("decoder", "generator", "text_config") if config.get(name)), {})
    made: dict[str, Any] = {}
    for source in (inner if isinstance(inner, dict) else {}, config):
        made |= {key: source[key] for key in vars(GenerationConfig()) if source.get(key) is not None}
    return made


def stable_hash(file: Path) -> str:
    """A hash of what a config says, in whatever version's spelling; of its bytes where it is no JSON."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and file.name == CONFIGS[0]:
            config = _without_dtypes(with_earlier_keys(config))
        words = json.dumps(stable(config), sort_keys=True)
    except (ValueError, RecursionError):
        return sha256(file)
    return hashlib.sha256(words.encode()).hexdigest()


def _without_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose inner configs name no dtype of None, nor the outer one's, which Transformers adds as it saves."""
    outer = (None, config.get("dtype"), config.get("torch_dtype"))

    def inside(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {key: each for key, each in value.items() if key not in ("dtype", "torch_dtype") or each not in outer}
        return {key: inside(each) for key, each in kept.items()}

    return {key: inside(value) for key, value in config.items()}


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary and rules, and of its chat template."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(core.to_str()) if core is not None else tokenizer.get_vocab()
    rules = {name: rule for name, rule in rules.items() if name not in PADDING}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    words = json.dumps([rules, special, str(tokenizer.chat_template)], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()
