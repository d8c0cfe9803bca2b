"""Tiny models with the vocabulary of SmolLM2, and the operations by which tests export them to engines."""

from __future__ import annotations

SIZES = {
    "vocab_size": 49152, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
# Slow frequencies turn eight times slower than their theta says, so within the tokens that engines are asked.
SCALED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "Llama": {"head_dim": 32, "rope_parameters": SCALED},
    "Mistral": {"head_dim": 64, "sliding_window": 200},
    "Qwen2": {},
    "Granite": {"num_key_value_heads": 2},
    "SmolLM3": {},  # of two layers with fewer heads, the best tokens are pieces of characters
}
UNIFORM = {"op": "gqa", "kv_heads": 1, "method": "mean"}
UNEQUAL = UNIFORM | {"kv_heads": [2, 1]}
EXPANDED = {"op": "expand"}
ALIKE = {"op": "prune_heads", "granularity": "kv_group", "per_layer": 2, "refit": False}
PRUNED = {"op": "prune_heads", "granularity": "head", "heads": [[1, 3], []], "refit": False}


def kv_heads_after(step: dict) -> int:
    """KV heads of both layers together after one of these operations."""
    if step is EXPANDED:
        return 8
    if step["op"] == "prune_heads":
        return 4 if step is ALIKE else 6
    return 3 if step is UNEQUAL else 2
