"""Streaming conversion: safetensors in, safetensors out, one layer in memory at a time.

Tensors that no operation touches are copied byte for byte, inside the kernel if the system can do that. Every file
keeps its name, its order of tensors and its metadata; its sha256 is computed while it is written. Two files are
written at a time, each by its own thread, and a third thread waits for the disk. Threads help because Python's lock is
free during a copy, a read, a hash, a write and an fsync. Copying needs no torch, so torch is imported meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import BoundedSemaphore, Lock, RLock
from typing import TYPE_CHECKING

from surgery.architecture.edit import refuse_non_finite
from surgery.architecture.weights import pack, unpack
from surgery.errors import SurgeryError
from surgery.io.ranges import RangeCopier, write_all
from surgery.io.safetensors import CHUNK, WEIGHT_INDEX, Checkpoint, Shard, stored_bytes, stored_dtype
from surgery.machine.progress import Progress
from surgery.operations.rewrite import run_rewrite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from surgery.conversion.plan import Plan
    from surgery.io.safetensors import TensorInfo

SHARDS_AT_ONCE = 2
SHARDS_UNSYNCED = 4  # most shards that are written but not synced yet; a kill loses these and the unfinished ones
WORTH_THREADS = 128 << 20  # bytes; smaller checkpoints are written by one thread


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
        folder: the folder to write into. A file with its final name is complete.
        done: files that an earlier run finished, name -> {"sha256", "bytes"}.
        finished: called with name and info of each file that becomes complete; calls do not overlap.
        progress: called with bytes written, bytes in all, and a label; calls do not overlap.

    Returns:
        file name -> {"sha256", "bytes"}.
    """
    shared, files = _Shared(plan.output_bytes, progress), dict(done)
    layouts = {shard.file: shard_layout(shard, plan) for shard in checkpoint.shards}
    syncs: list[Future] = []

    def convert(shard: Shard) -> None:
        with shared.work():
            shared.count(0)
            path = folder / shard.file
            digest = _write_shard(path, shard, layouts[shard.file], checkpoint, stream, shared.count)
            unsynced.acquire()
            syncs.append(syncer.submit(complete, path, digest))

    def complete(path: Path, digest: str) -> None:
        try:
            with shared.work():
                info = {"sha256": digest, "bytes": _put_in_place(path)}
                with shared.lock:
                    files[path.relative_to(folder).as_posix()] = info
                    finished(path.relative_to(folder).as_posix(), info)
        finally:
            unsynced.release()

    for file in layouts.keys() & done.keys():
        shared.count(done[file]["bytes"])
    unsynced = BoundedSemaphore(SHARDS_UNSYNCED)
    writers = ThreadPoolExecutor(SHARDS_AT_ONCE if plan.output_bytes >= WORTH_THREADS else 1)
    with ThreadPoolExecutor(1) as syncer, writers, shared.work():
        shards = [shard for shard in _copies_first(checkpoint, layouts, plan.unread) if shard.file not in done]
        written = [writers.submit(convert, shard) for shard in shards]
        import torch  # noqa: F401 (this takes a second: writers copy meanwhile, and wait for it before they compute)

        wait(written)
        wait(syncs)
    if shared.fault:
        raise shared.fault
    files = {shard.file: files[shard.file] for shard in checkpoint.shards}
    weight_map = {name: file for file, layout in layouts.items() for name in layout}
    if checkpoint.index is not None and any(shard.file != "model.safetensors" for shard in checkpoint.shards):
        _write_index(folder, checkpoint, weight_map, plan)
    return files


def shard_layout(shard: Shard, plan: Plan) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """The tensors of the new file, in order: name -> (dtype, shape, whether it is computed or else copied).

    New tensors (norms of added heads) are placed after their layer's output projection.
    """
    layout = {}
    homes = {f"{layer.path}.{layer.layout.o}.weight": layer for layer in plan.after.layers}
    for info in shard.tensors:
        if info.name not in plan.shapes or info.name in plan.unread:
            layout[info.name] = (info.dtype, info.shape, False)
        elif (shape := plan.shapes[info.name]) is not None:
            layout[info.name] = (plan.dtypes[info.name], shape, True)
        if info.name in homes:
            layer = homes[info.name]
            for name in (f"{layer.path}.{name}" for name in layer.tensor_names):
                if name not in plan.before.tensors:
                    layout[name] = (plan.dtypes[name], plan.shapes[name], True)
    return layout


def _copies_first(checkpoint: Checkpoint, layouts: dict[str, dict], judged: frozenset[str]) -> list[Shard]:
    """The shards in the order of writing. Shards that need no torch come first: nothing in them is of attention."""

    def needs_torch(shard: Shard) -> bool:
        return any(computed or name in judged for name, (*_, computed) in layouts[shard.file].items())

    return sorted(checkpoint.shards, key=needs_torch)


class _Shared:
    """State that the threads share: the bytes written, and the first fault, which stops all threads."""

    def __init__(self, total: int, progress: Progress | None):
        self.total, self.progress, self.written = total, progress, 0
        self.lock, self.fault = RLock(), None

    def count(self, size: int) -> None:
        """Add written bytes. Every chunk calls it, so that a thread stops soon after a fault."""
        with self.lock:
            if self.fault:
                raise _Stopped
            self.written += size
            if self.progress:
                self.progress(min(self.written, self.total), self.total, "writing")

    @contextmanager
    def work(self):
        """Catch exceptions of the block, including Ctrl-C, and keep the first one for the main thread."""
        try:
            yield
        except _Stopped:
            pass
        except BaseException as error:
            with self.lock:
                self.fault = self.fault or error


class _Stopped(Exception):
    """Another thread has failed."""


def _write_shard(
    path: Path, shard: Shard, layout: dict, checkpoint: Checkpoint, stream: LayerStream, count: Callable[[int], None]
) -> str:
    """Write a shard under a temporary name; returns the sha256 of its bytes."""
    header, position, infos = {}, 0, {info.name: info for info in shard.tensors}
    if shard.metadata:
        header["__metadata__"] = shard.metadata
    for name, (dtype, shape, computed) in layout.items():
        size = stored_bytes(dtype, shape) if computed else infos[name].size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format requires data to start at a multiple of 8
    digest = hashlib.sha256()

    def written(data) -> None:
        digest.update(data)
        count(len(data))

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(checkpoint.folder / shard.file, "rb", buffering=0) as source, open(_unfinished(path), "wb", 0) as target:
        begin = len(text).to_bytes(8, "little") + text
        write_all(target, begin)
        written(begin)
        copier, promised = RangeCopier(source, target), len(begin)
        for name, start, size in _pieces(layout, infos, stream.plan.unread):
            promised += size
            if not start:
                for chunk in tensor_chunks(stream.tensor(name)):
                    write_all(target, chunk)
                    written(chunk)
                continue
            judge = FiniteRange(name, checkpoint.float_dtype(name)) if name else None
            try:
                for data in copier.copy(start, size):
                    written(data)
                    if judge:
                        judge.add(data)
            except EOFError:
                raise checkpoint.ended(shard.file) from None
            if target.tell() != promised:  # a file with a wrong header must never get its final name
                raise RuntimeError(f"{shard.file}: byte {target.tell()} where its header promises byte {promised}")
    return digest.hexdigest()


def _pieces(layout: dict, infos: dict[str, TensorInfo], judged: frozenset[str]) -> Iterator[tuple[str, int, int]]:
    """The pieces of a file in order, as (name, start, bytes).

    A computed tensor has start 0, where a file has its header. A copied range has a name if it is a tensor that must
    be finite, and "" if it holds other tensors.
    """
    start = end = 0
    for name, (dtype, shape, computed) in layout.items():
        alone = computed or name in judged
        if end > start and (alone or infos[name].start != end):
            yield "", start, end - start
            start = end = 0
        if computed:
            yield name, 0, stored_bytes(dtype, shape)
        elif alone:
            yield name, infos[name].start, infos[name].size
        else:
            start = start if end > start else infos[name].start
            end = infos[name].start + infos[name].size
    if end > start:
        yield "", start, end - start


class FiniteRange:
    """Refuses NaN and infinity in a tensor whose bytes come in pieces of any size, as they are copied.

    Args:
        name: the tensor's stored name.
        dtype: its dtype.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        self.path, _, self.name = name.rpartition(".")
        self.dtype, self.rest = dtype, b""

    def add(self, data: memoryview) -> None:
        """Judge the next bytes. Raises SurgeryError, as `refuse_non_finite` does."""
        import torch

        if self.rest:
            data = memoryview(bytearray(self.rest + bytes(data)))
        whole = len(data) - len(data) % self.dtype.itemsize
        self.rest = bytes(data[whole:])
        if whole:
            refuse_non_finite({self.name: torch.frombuffer(data[:whole], dtype=self.dtype)}, self.path)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".unfinished")


def _put_in_place(path: Path) -> int:
    """Wait until a shard is on disk and give it its final name; returns its size in bytes."""
    with open(_unfinished(path), "rb+") as file:
        os.fsync(file.fileno())
    os.replace(_unfinished(path), path)
    return path.stat().st_size


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


LAYERS_KEPT = 2  # computed layers in memory; a layer whose tensors are far apart in the file is computed again


class LayerStream:
    """New attention tensors by name, computed one layer at a time from a checkpoint on disk. It is thread-safe.

    Args:
        records: the records of an earlier run, for the layers that it finished.
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
        """The new tensor with this stored name."""
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
        """The records of each operation so far, with the layers in order."""
        with self._lock:
            paths = [layer.path for layer in self.plan.before.layers]
            return [{path: record[path] for path in paths if path in record} for record in self._records]

    def _compute(self, index: int) -> dict[str, Tensor]:
        anatomy = self.plan.before.layers[index]
        tensors = {name: self._read(f"{anatomy.path}.{name}") for name in anatomy.tensor_names}
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
                    code="plugin-fault",
                )
        return {name: tensor for name, tensor in new.items() if not tensor.is_meta}

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.placeholder(name) if name in self.plan.unread else self.checkpoint.read(name)
