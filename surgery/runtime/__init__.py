"""The code that travels with a surgical checkpoint: flat files, exported as they are. Nothing heavy is imported."""

from __future__ import annotations


def register() -> None:
    """Door 1: after this, Transformers' Auto classes load surgical checkpoints with this package's code."""
    from transformers import AutoConfig

    from .modeling_surgery import NAME, SurgeryConfig

    AutoConfig.register(NAME, SurgeryConfig, exist_ok=True)
