"""Figures of a long measurement, kept in a file as they come, so that a run that was stopped goes on from there.

New weights of a long conversion, kept layer by layer, so that a run that was stopped goes on from there.

What tells one model in memory from another: a hash of all its weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from surgery.io.files import write_text

SUFFIX = ".state"  # of such files in OUT.partial; they go when OUT is complete


class Found:
    """What was measured so far, by name: one JSON line each.

    Args:
        path: the file; None keeps nothing beyond this object.
        settings: all that the figures depend on, as something whose `repr` says it; a file of other settings is
            started anew.
    """

    def __init__(self, path: Path | None = None, settings: Any = None):
        self.path, self.known = path, {}
        if path is None:
            return
        head = json.dumps({"settings": hashlib.sha256(repr(settings).encode()).hexdigest()})
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines[:1] == [head]:
            for line in lines[1:-1]:  # the last one has no end: empty, or cut off by a kill
                name, value = json.loads(line)
                self.known[name] = value
        write_text(path, "\n".join([head, *map(json.dumps, self.known.items())]) + "\n")

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """A figure, measured if it is not known: numbers, texts and lists of them."""
        if name not in self.known:
            self.known[name] = measure()
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps([name, self.known[name]]) + "\n")
        return self.known[name]


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


def fingerprint(model) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and saved buffers; about a second a gigabyte."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
