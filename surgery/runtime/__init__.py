"""The code that travels with a surgical checkpoint: flat files, exported unchanged.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations


def register() -> None:
    """Make Transformers' Auto classes load surgical checkpoints with this package's code."""
    from transformers import AutoConfig

    from .modeling_surgery import NAME, SurgeryConfig

    AutoConfig.register(NAME, SurgeryConfig, exist_ok=True)
