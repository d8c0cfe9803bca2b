"""The config of a DeciLM: a Llama whose layers have different numbers of KV heads.

This file travels with an exported folder. vLLM computes the architecture DeciLMForCausalLM, and Transformers has no
class for its config. It imports Transformers alone.
"""

from types import SimpleNamespace

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """A Llama config with `block_configs`, the shapes of each layer, which vLLM reads as objects."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **fields):
        super().__init__(**fields)
        self.block_configs = [
            SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in block.items()})
            for block in block_configs
        ]

    def to_dict(self):
        """The config as plain data."""
        blocks = [{name: dict(vars(part)) for name, part in vars(block).items()} for block in self.block_configs]
        return super().to_dict() | {"block_configs": blocks}
