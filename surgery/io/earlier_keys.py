"""The keys of a config.json by which Transformers 4 reads what Transformers 5 has under other names.

Transformers 5 saves RoPE as `rope_parameters` and the number format as `dtype`. Transformers 4 ignores the first, and
so computes RoPE with a default base, without an error. Both versions read a config that has both spellings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.io.files import read_json, write_json

APART = ("rope_theta", "partial_rotary_factor")  # keys of `rope_parameters` that are keys of the config in version 4
# Families with RoPE by type of layer -> the key of the base of sliding layers. `rope_theta` is that of full ones.
BY_TYPE = {"gemma3": "rope_local_base_freq", "gemma3_text": "rope_local_base_freq"}
SPELLINGS = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}


def with_earlier_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the keys of Transformers 4 beside those of Transformers 5. Keys that are there stay."""
    earlier = _rope(config)
    if type(config.get("dtype")) is str:
        earlier["torch_dtype"] = config["dtype"]
    made = earlier | config
    if isinstance(config.get("text_config"), dict):
        made["text_config"] = with_earlier_keys(config["text_config"])
    return made


def add_earlier_keys(folder: Path) -> None:
    """Give a stock folder's config.json the keys of Transformers 4, which does not run the code of a surgical one."""
    from surgery.runtime.surgery_config import NAME  # here: a plain base is converted without what this imports

    config = read_json(folder / "config.json")
    if NAME not in config:
        write_json(folder / "config.json", with_earlier_keys(config))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope, kind, found = config.get("rope_parameters"), config.get("model_type"), {}
    if not isinstance(rope, dict):
        return {}
    if isinstance(rope.get("full_attention"), dict):
        if not isinstance(kind, str) or kind not in BY_TYPE:
            return {}
        if isinstance(sliding := rope.get("sliding_attention"), dict) and "rope_theta" in sliding:
            found[BY_TYPE[kind]] = sliding["rope_theta"]
        rope = rope["full_attention"]
    spelled = SPELLINGS.get(kind, {}) if isinstance(kind, str) else {}
    found |= {spelled.get(name, name): rope[name] for name in APART if name in rope}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {name: value for name, value in rope.items() if name not in APART}
        if kind == "phi3":  # whose config class takes these three alone
            factors = {name: rope[name] for name in ("short_factor", "long_factor") if name in rope}
            found["rope_scaling"] = {"type": rope["rope_type"]} | factors
    return found
