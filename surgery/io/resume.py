"""Partial results of long work, saved one by one, so that a stopped run can be resumed.

`SavedFigures` keeps the figures of a measurement, `LayerFiles` keeps tensors one layer at a time, and `fingerprint`
identifies a model in memory by a hash of all its weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.io.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".state"  # of these files in OUT.partial, which are removed when OUT is complete


class SavedFigures:
    """The figures that were measured so far, by name: one JSON line each.

    Args:
        path: the file; None saves nothing.
        settings: an object whose `repr` holds everything that the figures depend on. A file with other settings is
            replaced.
    """

    def __init__(self, path: Path | None = None, settings: Any = None):
        self.path, self.known = path, {}
        if path is None:
            return
        header = json.dumps({"settings": hashlib.sha256(repr(settings).encode()).hexdigest()})
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines[:1] == [header]:
            for line in lines[1:-1]:  # the last one has no line end: it is empty, or was cut off by a kill
                name, value = json.loads(line)
                self.known[name] = value
        write_text(path, "\n".join([header, *map(json.dumps, self.known.items())]) + "\n")

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The figure of this name; it is measured only if it is not saved yet.

        Args:
            measure: returns a value that JSON can hold: numbers, texts and lists of them.
        """
        if name not in self.known:
            self.known[name] = measure()
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps([name, self.known[name]]) + "\n")
        return self.known[name]


class LayerFiles:
    """One safetensors file for each layer, complete or absent.

    Args:
        folder: where the files are; None saves nothing.
        name: prefix of the file names.
        settings: an object whose `repr` holds everything that the tensors depend on. Files with other settings are
            ignored.
    """

    def __init__(self, folder: Path | None, name: str, settings: Any):
        self.folder = folder
        self.name = f"{name}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}"

    def path(self, index: int) -> Path:
        """The file of a layer, whether it exists or not."""
        return self.folder / f"{self.name}-{index:04}{SUFFIX}"

    def load(self, index: int) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and record of a layer, or None."""
        from safetensors import safe_open

        if self.folder is None or not self.path(index).is_file():
            return None
        with safe_open(self.path(index), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["record"])  # noqa: SIM118

    def save(self, index: int, tensors: dict[str, Tensor], record: dict) -> None:
        """Write the tensors of a layer and a record of plain data, in one step."""
        from safetensors.torch import save

        if self.folder is None:
            return
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self.path(index)
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_bytes(save(contiguous, metadata={"record": json.dumps(record)}))
        os.replace(unfinished, path)


def fingerprint(model) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and saved buffers; about a second per gigabyte."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
