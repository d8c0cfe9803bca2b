"""Streaming conversion: safetensors in, safetensors out, one layer in memory at a time.

Tensors that no operation touches are copied byte for byte in chunks; every file keeps its name, its order of
tensors and its metadata; its sha256 is computed while it is written. Two files are written at a time, each by a
thread of its own: Python's lock is free during a read, a hash, a write and an fsync.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, RLock
from typing import TYPE_CHECKING

from surgery.architecture.edit import refuse_non_finite
from surgery.architecture.weights import pack, unpack
from surgery.errors import SurgeryError
from surgery.io.safetensors import CHUNK, WEIGHT_INDEX, Checkpoint, Shard, stored_bytes, stored_dtype
from surgery.machine.progress import Progress
from surgery.operations.rewrite import run_rewrite

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.conversion.plan import Plan
    from surgery.io.safetensors import Checkpoint

SHARDS_AT_ONCE = 2  # as many are lost by a kill
WORTH_THREADS = 128 << 20  # bytes; smaller checkpoints are written in order


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
        finished: called with each file that becomes complete, one at a time, by the thread that wrote it.
        progress: called with bytes written, bytes in all, and a label, in the same way.

    Returns:
        file name -> {"sha256", "bytes"}.
    """
    shared, files = _Shared(plan.output_bytes, progress), dict(done)
    layouts = {shard.file: shard_layout(shard, plan) for shard in checkpoint.shards}

    def convert(shard: Shard) -> None:
        with shared.work():
            shared.count(0)
            info = _write_shard(folder, shard, layouts[shard.file], checkpoint, stream, shared.count)
            with shared.lock:
                files[shard.file] = info
                finished(shard.file, info)

    for file in done:
        shared.count(done[file]["bytes"])
    with ThreadPoolExecutor(SHARDS_AT_ONCE if plan.output_bytes >= WORTH_THREADS else 1) as pool, shared.work():
        wait([pool.submit(convert, shard) for shard in checkpoint.shards if shard.file not in done])
    if shared.fault:
        raise shared.fault
    files = {shard.file: files[shard.file] for shard in checkpoint.shards}
    weight_map = {name: file for file, layout in layouts.items() for name in layout}
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
            layout[info.name] = (plan.dtypes[info.name], shape, True)
        if info.name in homes:
            layer = homes[info.name]
            for name in (f"{layer.path}.{name}" for name in layer.tensor_names):
                if name not in plan.before.tensors:
                    layout[name] = (plan.dtypes[name], plan.shapes[name], True)
    return layout


class _Shared:
    """What the threads share: how much is written, and the first fault, which stops them all."""

    def __init__(self, total: int, progress: Progress | None):
        self.total, self.progress, self.written = total, progress, 0
        self.lock, self.fault = RLock(), None

    def count(self, size: int) -> None:
        """Add bytes; called with every chunk, so that a thread stops soon."""
        with self.lock:
            if self.fault:
                raise _Stopped
            self.written += size
            if self.progress:
                self.progress(min(self.written, self.total), self.total, "weights")

    @contextmanager
    def work(self):
        """Keep the first exception of the block, Ctrl-C too, for the main thread."""
        try:
            yield
        except _Stopped:
            pass
        except BaseException as error:
            with self.lock:
                self.fault = self.fault or error


class _Stopped(Exception):
    """Another thread has failed."""


def _write_shard(folder: Path, shard: Shard, layout: dict, checkpoint: Checkpoint, stream: LayerStream, count) -> dict:
    header, position, infos = {}, 0, {info.name: info for info in shard.tensors}
    if shard.metadata:
        header["__metadata__"] = shard.metadata
    for name, (dtype, shape, computed) in layout.items():
        size = stored_bytes(dtype, shape) if computed else infos[name].size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data that begins at a multiple of 8
    path, digest = folder / shard.file, hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:

        def put(data) -> None:
            digest.update(data)
            file.write(data)
            count(len(data))

        put(len(text).to_bytes(8, "little") + text)
        for name, (_, _, computed) in layout.items():
            for chunk in tensor_chunks(stream.tensor(name)) if computed else checkpoint.chunks(infos[name]):
                put(chunk)
            begin, end = header[name]["data_offsets"]
            if file.tell() != 8 + len(text) + end:  # a file that lies about itself must never get its name
                raise RuntimeError(f"{shard.file}: {name} has not the {end - begin} bytes that its header promises")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def tensor_chunks(tensor: Tensor):
    """The bytes of a tensor in memory, at most `CHUNK` at a time."""
    import torch

    data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


def _write_index(folder: Path, checkpoint: Checkpoint, weight_map: dict[str, str], plan: Plan) -> None:
    metadata = dict(checkpoint.index.get("metadata") or {}) | {"total_size": plan.output_bytes}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = plan.parameters_after
    index = dict(checkpoint.index) | {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / WEIGHT_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


LAYERS_KEPT = 2  # a layer whose tensors lie far apart in the file is computed again, not kept


class LayerStream:
    """New attention tensors by name, computed a layer at a time from a checkpoint on disk; for several threads.

    Args:
        records: what an earlier run noted of the layers that it finished.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, records: list[dict] | None = None):
        self.plan, self.checkpoint = plan, checkpoint
        self._records: list[dict] = records or [{} for _ in plan.steps]
        self._lock = Lock()
        self._layer_of = {
            f"{layer.path}.{name}": layer.index
            for anatomy in (plan.before, plan.after)
            for layer in anatomy.layers
            for name in layer.tensor_names
        }
        self._ready: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def tensor(self, name: str) -> Tensor:
        """The new tensor of this stored name."""
        index = self._layer_of[name]
        with self._lock:
            if index not in self._ready:
                while len(self._ready) >= LAYERS_KEPT:
                    self._ready.popitem(last=False)
                self._ready[index] = self._compute(index)
            self._ready.move_to_end(index)
            return self._ready[index][name]

    @property
    def records(self) -> list[dict]:
        """What each operation noted so far, layers in order."""
        with self._lock:
            paths = [layer.path for layer in self.plan.before.layers]
            return [{path: record[path] for path in paths if path in record} for record in self._records]

    def _compute(self, index: int) -> dict[str, Tensor]:
        anatomy = self.plan.before.layers[index]
        tensors = {name: self.checkpoint.read(f"{anatomy.path}.{name}") for name in anatomy.tensor_names}
        refuse_non_finite(tensors, anatomy.path)
        layer = unpack(anatomy, tensors)
        for step_index, step in enumerate(self.plan.steps):
            layer, record = run_rewrite(step.operation, layer, step.change.after, index)
            if record:
                self._records[step_index][anatomy.path] = record
        new = {f"{anatomy.path}.{name}": tensor for name, tensor in pack(layer).items()}
        for name, tensor in new.items():
            planned = self.plan.dtypes.get(name), self.plan.shapes.get(name)
            if (stored_dtype(tensor), tuple(tensor.shape)) != planned:
                raise SurgeryError(
                    f"{name} became {stored_dtype(tensor)} {list(tensor.shape)}, and {planned[0]} was planned",
                    fix="tensors of one part of a layer differ in dtype: store the model in one dtype first",
                )
        return new
