"""Old checkpoints in pickle files (.bin), which are refused without --allow-pickle.

Even with it they are read with `weights_only=True`, which builds tensors and nothing else.
"""

from __future__ import annotations

import pickle
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import ModelError, SurgeryError, UnsupportedModelError, shown
from surgery.io.files import write_json
from surgery.io.output_folder import machine_errors, output_path, parent_folder
from surgery.io.safetensors import SINGLE_FILE, WEIGHT_INDEX, read_index

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@contextmanager
def readable(base: Path, output: str | Path, allow_pickle: bool):
    """Yield a folder with the base's weights in safetensors: the base itself, or a temporary one next to OUT.

    Raises:
        SurgeryError: a pickle that is damaged or holds more than tensors.
        MachineError: the temporary folder cannot be written.
    """
    if not (allow_pickle and only_pickled(base)):
        yield base  # Checkpoint() names what is wrong, if anything is
        return
    with (
        parent_folder(output_path(output)) as parent,
        machine_errors(parent),
        tempfile.TemporaryDirectory(dir=parent, prefix=".unpickled-") as folder,
    ):
        _unpickle(base, Path(folder))
        yield Path(folder)


def only_pickled(base: Path) -> bool:
    """Whether a folder holds its weights as pickles and not as safetensors."""
    safe = (base / SINGLE_FILE).is_file() or (base / WEIGHT_INDEX).is_file()
    return not safe and ((base / PICKLE).is_file() or (base / PICKLE_INDEX).is_file())


def _unpickle(base: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    index = read_index(base / PICKLE_INDEX) if (base / PICKLE_INDEX).is_file() else None
    files = [PICKLE] if index is None else sorted(set(index["weight_map"].values()))
    weight_map = {}
    for shard, file in enumerate(files, 1):
        state = _plain_tensors(base, file)
        target = SINGLE_FILE if index is None else f"model-{shard:05d}-of-{len(files):05d}.safetensors"
        stored, first_names = {}, {}
        for name in sorted(state, key=lambda name: -name.count(".")):  # the embedding comes before a tied lm_head
            tensor = state[name]
            memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if first_names.setdefault(memory, name) == name:  # tied tensors are stored once, as save_pretrained does
                stored[name] = tensor.contiguous()
        weight_map |= dict.fromkeys(stored, target)
        save_file(stored, folder / target, metadata={"format": "pt"})
    if index is not None:
        write_json(folder / WEIGHT_INDEX, {"metadata": {}, "weight_map": weight_map})


def _plain_tensors(base: Path, file: str) -> dict:
    """Name -> tensor of one pickle. An old pickle is not a zip file, cannot be memory-mapped and is read whole."""
    import torch

    try:
        state = torch.load(base / file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(base / file))
    except FileNotFoundError:
        raise ModelError(f"the index names {file}, which is not there", where=str(base)) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SurgeryError(
            f"{file} cannot be read as plain tensors: {reason}", where=str(base), code="unsafe-weights"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise SurgeryError(f"{file} holds more than tensors", where=str(base), code="unsafe-weights")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ModelError(f"{file} names a tensor {shown(name)}, which is no text", where=str(base))
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            kind = "on the meta device" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            what = f"{name} in {file} is no plain tensor ({'quantized' if tensor.is_quantized else kind})"
            raise UnsupportedModelError(
                what, where=str(base), fix="save the model with save_pretrained, in safetensors"
            )
    return state
