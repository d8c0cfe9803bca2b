"""What a folder or a loaded model says about itself: its config, and a table of its tensors."""

from __future__ import annotations

import re
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.io.files import read_json
from surgery.io.safetensors import STORED_NAMES, Checkpoint

PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\.original$")


def load_config(folder: Path):
    """The Transformers config of a model folder; never runs code from the folder.

    A `model_type` that Transformers does not know gives the general `PreTrainedConfig` with the same fields.
    """
    raw = read_json(folder / "config.json")
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = raw.get("model_type")
    if kind == "surgery":
        from surgery.runtime import register

        register()
    known = kind in CONFIG_MAPPING
    cls = CONFIG_MAPPING[kind] if known else PreTrainedConfig  # the mapping is lazy and has no .get
    try:
        return cls.from_dict(raw)
    except Exception as error:  # Transformers' validators raise many kinds
        raise SurgeryError(
            f"Transformers does not accept this config: {error}",
            where=str(folder / "config.json"),
            fix="check its numbers (heads, sizes, layers) against the model's original",
        ) from None


def tensor_table(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of a folder, from the safetensors headers alone."""
    return {name: (info.dtype, info.shape) for name, info in Checkpoint(folder).tensors.items()}


def model_table(model) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every parameter of a loaded model (tied ones once).

    A weight that torch's parametrize works out of several has the name that it has without.
    """

    def spelled(dtype):
        name = str(dtype).removeprefix("torch.")
        return STORED_NAMES.get(name, name)

    parameters = ((PARAMETRIZED.sub(r".\1", name), p) for name, p in model.named_parameters())
    return {name: (spelled(p.dtype), tuple(p.shape)) for name, p in parameters}
