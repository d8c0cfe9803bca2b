"""New weights of a long conversion, kept layer by layer, so that a run that was stopped goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from surgery.io.resume import SUFFIX


class LayerFiles:
    """One safetensors file a layer, complete or not there.

    Args:
        folder: where; None keeps nothing.
        name: what the files begin with.
        settings: all that the weights depend on, as something whose `repr` says it; files of other settings are
            not seen.
    """

    def __init__(self, folder: Path | None, name: str, settings: Any):
        self.folder = folder
        self.name = f"{name}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}"

    def path(self, number: int) -> Path:
        """The file of a layer, whether it is there or not."""
        return self.folder / f"{self.name}-{number:04}{SUFFIX}"

    def load(self, number: int) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Tensors and record of a layer, or None."""
        from safetensors import safe_open

        if self.folder is None or not self.path(number).is_file():
            return None
        with safe_open(self.path(number), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["record"])  # noqa: SIM118

    def save(self, number: int, tensors: dict[str, torch.Tensor], record: dict) -> None:
        from safetensors.torch import save

        if self.folder is None:
            return
        given = {name: tensor.contiguous() for name, tensor in tensors.items()}
        path = self.path(number)
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_bytes(save(given, metadata={"record": json.dumps(record)}))
        os.replace(unfinished, path)
