"""Identities of models and tokenizers: hashes that change whenever what they compute does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from surgery.io.files import read_json, sha256
from surgery.io.safetensors import Checkpoint

CONFIGS = ("config.json", "generation_config.json")
# Keys of config.json that follow from the machine, and not from the model.
UNSTABLE = ("transformers_version", "_name_or_path", "_commit_hash")
PADDING = ("padding", "truncation")  # what a call of a tokenizer leaves in it


def model_identity(folder: Path) -> str:
    """A hash of every byte of a folder's weights, and of its configs and code. Reading takes a second a gigabyte."""
    weights = [folder / shard.file for shard in Checkpoint(folder).shards] or sorted(folder.glob("pytorch_model*.bin"))
    others = [*(folder / name for name in CONFIGS), *sorted(folder.glob("*.py"))]
    parts = [f"{file.name} {sha256(file)}" for file in [*weights, *others] if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def stable_config(folder: Path) -> dict[str, Any]:
    """What stands in a folder's config.json, without keys that follow from the machine."""
    config = read_json(folder / CONFIGS[0])
    return {key: value for key, value in config.items() if key not in UNSTABLE}


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary and rules, and of its chat template."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(core.to_str()) if core is not None else tokenizer.get_vocab()
    rules = {name: rule for name, rule in rules.items() if name not in PADDING}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    words = json.dumps([rules, special, str(tokenizer.chat_template)], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()
