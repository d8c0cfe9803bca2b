"""Figures of a model that need no run: the bytes that are loaded, and the KV cache of one token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError
from surgery.io.safetensors import SINGLE_FILE, WEIGHT_INDEX, Checkpoint

if TYPE_CHECKING:
    from surgery.io.loading import ModelSource


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model at rest.

    Attributes:
        load_bytes: bytes of the weight files that are loaded from the folder, or of the parameters of a loaded model.
        kv_bytes_per_token: KV cache of one token, all layers; None if the attention is not understood.
    """

    load_bytes: int
    kv_bytes_per_token: int | None = None


def footprint(source: ModelSource, label: str, notes: list[str]) -> Footprint:
    """Measure a model at rest.

    Args:
        source: model folder, or loaded model.
        label: name of the model in a note.
        notes: gets a line if the attention is not understood.
    """
    from surgery.architecture.anatomy import Anatomy

    size = _bytes(source)
    try:
        return Footprint(size, int(Anatomy.of(source).kv_bytes_per_token))
    except SurgeryError as error:
        notes.append(f"KV bytes of {label} are unknown: {error.what}")
        return Footprint(size)


def _bytes(source: ModelSource) -> int:
    """Bytes of the weights that are loaded, without other weight files in the folder (adapters, `consolidated*`)."""
    if not isinstance(source, str | Path):
        return sum(weight.numel() * weight.element_size() for weight in source.parameters())
    folder = Path(source)
    if (folder / SINGLE_FILE).is_file() or (folder / WEIGHT_INDEX).is_file():
        return Checkpoint(folder).size
    return sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))
