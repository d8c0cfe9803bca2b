"""Streaming conversion: safetensors in, safetensors out, one layer in memory at a time.

Tensors that no operation touches are copied byte for byte in pieces; every file keeps its name, its order of
tensors and its metadata; its sha256 is computed while it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import PIECE, WEIGHT_INDEX, Checkpoint, Shard

if TYPE_CHECKING:
    from torch import Tensor

    from .engines import LayerStream
    from .planning import Plan

Progress = Callable[[int, int, str], None]


def convert_shards(
    checkpoint: Checkpoint,
    plan: Plan,
    stream: LayerStream,
    folder: Path,
    done: dict[str, dict],
    finished: Callable[[str, dict], None],
    progress: Progress | None = None,
) -> dict[str, dict]:
    """Write every shard of the converted checkpoint, and its index.

    Args:
        folder: where to write; a file under its final name is complete.
        done: files that an earlier run finished, name -> {"sha256", "bytes"}.
        finished: called with each file that becomes complete.
        progress: called with bytes written, bytes in all, and a label.

    Returns:
        file name -> {"sha256", "bytes"}.
    """
    files, total, written = {}, plan.output_bytes, 0

    def count(size: int) -> None:
        nonlocal written
        written += size
        if progress:
            progress(min(written, total), total, "weights")

    weight_map = {}
    for shard in checkpoint.shards:
        layout = shard_layout(shard, plan)
        weight_map |= dict.fromkeys(layout, shard.file)
        if shard.file in done:
            files[shard.file] = done[shard.file]
            count(done[shard.file]["bytes"])
            continue
        path = folder / shard.file
        path.parent.mkdir(parents=True, exist_ok=True)
        files[shard.file] = _write_shard(path, shard, layout, checkpoint, stream, count)
        finished(shard.file, files[shard.file])
    if checkpoint.index is not None and any(shard.file != "model.safetensors" for shard in checkpoint.shards):
        _write_index(folder, checkpoint, weight_map, plan)
    return files


def shard_layout(shard: Shard, plan: Plan) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """What the new file holds, in order: name -> (dtype, shape, computed).

    Tensors that are new (norms of added heads) go where their layer's output projection is.
    """
    layout = {}
    homes = {f"{layer.path}.{layer.layout.o}.weight": layer for layer in plan.after.layers}
    for info in shard.tensors:
        if info.name not in plan.shapes:
            layout[info.name] = (info.dtype, info.shape, False)
        elif (shape := plan.shapes[info.name]) is not None:
            layout[info.name] = (info.dtype, shape, True)
        if info.name in homes:
            layer = homes[info.name]
            for name in (f"{layer.path}.{name}" for name in layer.tensor_names):
                if name not in plan.before.tensors:
                    layout[name] = (layer.dtype, plan.shapes[name], True)
    return layout


def _write_shard(path: Path, shard: Shard, layout: dict, checkpoint: Checkpoint, stream: LayerStream, count) -> dict:
    from .checkpoint import DTYPE_BITS

    header, position, infos = {}, 0, {info.name: info for info in shard.tensors}
    if shard.metadata:
        header["__metadata__"] = shard.metadata
    for name, (dtype, shape, computed) in layout.items():
        size = prod(shape) * DTYPE_BITS[dtype] // 8 if computed else infos[name].size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data that begins at a multiple of 8
    digest, unfinished = hashlib.sha256(), path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:

        def put(data) -> None:
            digest.update(data)
            file.write(data)
            count(len(data))

        put(len(text).to_bytes(8, "little") + text)
        for name, (_, _, computed) in layout.items():
            for piece in tensor_pieces(stream.tensor(name)) if computed else checkpoint.pieces(infos[name]):
                put(piece)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def tensor_pieces(tensor: Tensor):
    """The bytes of a tensor in memory, at most `PIECE` at a time."""
    import torch

    data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def _write_index(folder: Path, checkpoint: Checkpoint, weight_map: dict[str, str], plan: Plan) -> None:
    metadata = dict(checkpoint.index.get("metadata") or {}) | {"total_size": plan.output_bytes}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = plan.parameters_after
    index = dict(checkpoint.index) | {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / WEIGHT_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
