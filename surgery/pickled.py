"""Old checkpoints in pickle files (.bin): refused, unless the user says --allow-pickle.

Even then they are read with `weights_only=True`, which builds tensors and nothing else.
"""

from __future__ import annotations

import pickle
import tempfile
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import SINGLE_FILE, WEIGHT_INDEX, inside_folder
from .errors import SurgeryError
from .folder import read_json
from .output import machine_errors, write_json

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@contextmanager
def readable(base: Path, output: str | Path, allow_pickle: bool):
    """A folder with the base's weights in safetensors: the base itself, or a temporary one beside OUT."""
    has_safetensors = (base / SINGLE_FILE).is_file() or (base / WEIGHT_INDEX).is_file()
    has_pickle = (base / PICKLE).is_file() or (base / PICKLE_INDEX).is_file()
    if has_safetensors or not (allow_pickle and has_pickle):
        yield base  # Checkpoint() names what is wrong, if anything is
        return
    parent = Path(output).resolve().parent
    with machine_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".unpickled-") as folder:
            _unpickle(base, Path(folder))
            yield Path(folder)


def _unpickle(base: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    index = read_json(base / PICKLE_INDEX) if (base / PICKLE_INDEX).is_file() else None
    files = sorted(set(index["weight_map"].values())) if index else [PICKLE]
    weight_map, seen = {}, {}
    for number, file in enumerate(files, 1):
        inside_folder(file, str(base / PICKLE_INDEX))
        try:
            state = torch.load(base / file, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise SurgeryError(f"the index names {file}, which is not there", where=str(base)) from None
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise SurgeryError(f"{file} cannot be read as plain tensors: {reason}", where=str(base)) from None
        state = state.get("state_dict", state)
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise SurgeryError(f"{file} holds more than tensors", where=str(base))
        target = f"model-{number:05d}-of-{len(files):05d}.safetensors" if index else SINGLE_FILE
        own = {}
        for name, tensor in state.items():
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
            if seen.setdefault(place, name) == name:  # tied tensors are stored once, as save_pretrained does
                own[name] = tensor.contiguous()
        weight_map |= dict.fromkeys(own, target)
        save_file(own, folder / target, metadata={"format": "pt"})
    if index:
        write_json(folder / WEIGHT_INDEX, {"metadata": {}, "weight_map": weight_map})
