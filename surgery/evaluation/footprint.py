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
        kv_bytes_per_token: KV cache of each further token of a long text, all layers; None if the attention is not
            understood.
        kv_bytes_unfilled: KV cache of each token as long as no window is full; 0 if that is unknown.
        logit_bytes: the logits of one token, in the model's dtype.
        positions: the most tokens that the model takes; 0 if it does not say.
    """

    load_bytes: int
    kv_bytes_per_token: int | None = None
    kv_bytes_unfilled: int = 0
    logit_bytes: int = 0
    positions: int = 0


def footprint(source: ModelSource, label: str, notes: list[str]) -> Footprint:
    """Measure a model at rest.

    Args:
        source: model folder, or loaded model.
        label: name of the model in a note.
        notes: gets a line if the attention is not understood.
    """
    from surgery.architecture.anatomy import Anatomy, positions_of
    from surgery.architecture.layer import BYTES
    from surgery.io.loading import read_config

    size, config = _bytes(source), read_config(source)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 0
    positions, width = positions_of(config) or 0, 4
    try:
        anatomy = Anatomy.of(source)
        width = BYTES.get(anatomy.dtype, width)
        cache = int(anatomy.kv_bytes_per_token), anatomy.kv_bytes_at(1)
        return Footprint(size, *cache, width * vocabulary, positions)
    except SurgeryError as error:
        notes.append(f"KV bytes of {label} are unknown: {error.what}")
        return Footprint(size, None, 0, width * vocabulary, positions)


def _bytes(source: ModelSource) -> int:
    """Bytes of the weights that are loaded, without other weight files in the folder (adapters, `consolidated*`)."""
    if not isinstance(source, str | Path):
        return sum(weight.numel() * weight.element_size() for weight in source.parameters())
    folder = Path(source)
    if (folder / SINGLE_FILE).is_file() or (folder / WEIGHT_INDEX).is_file():
        return Checkpoint(folder).size
    return sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))
