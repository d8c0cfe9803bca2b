"""A checkpoint on disk: which tensor is in which file, read without loading a model.

The safetensors format is: 8 bytes little-endian length n, n bytes of JSON header (name -> dtype, shape,
data_offsets), then the data. Headers are read here rather than through a memory map, since mapped pages
count as resident memory: a 4 GiB conversion must fit in 1 GiB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from surgery.errors import ModelError, ModelNotFoundError, SurgeryError, UnsupportedModelError, nearest, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 1 << 17  # bytes copied at a time; larger writes make Linux look for large blocks of memory, which is slower
LONGEST_NAME = 255  # bytes, in every common file system
MAX_HEADER = 100 << 20  # the format's own limit
BY_CONTENT = "content:"  # prefix; fingerprints of earlier versions held file times
SAMPLES, SAMPLE = 4, 1024  # for a fingerprint: samples of each tensor, and bytes of each sample
WEIGHT_INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # dtypes that we compute with
STORED_NAMES = {name: dtype for dtype, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `size` are bytes from the beginning of `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in file order and its metadata."""

    file: str
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    header: bytes


class Checkpoint:
    """The safetensors files of a model folder.

    Raises:
        SurgeryError: no safetensors, a truncated or overlapping file, an index that names a missing shard, a
            missing tensor or a path outside the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ModelNotFoundError("no such model folder", where=str(folder), exists=_siblings(self.folder))
        index, single = self.folder / WEIGHT_INDEX, self.folder / SINGLE_FILE
        self.index = read_index(index) if index.is_file() and not single.is_file() else None  # as Transformers reads
        self.shards = [read_header(self.folder / file, file) for file in self._files()]
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for info in shard.tensors:
                if info.name in self.tensors:
                    raise ModelError(
                        f"tensor {info.name} is in {self.tensors[info.name].file} and in {info.file}",
                        where=str(folder),
                    )
                self.tensors[info.name] = info
        self._verify_index()

    def _files(self) -> list[str]:
        if self.index is not None:
            files = sorted(set(self.index["weight_map"].values()))
            for file in files:
                if not (self.folder / file).is_file():
                    raise ModelError(
                        f"the index names {file}, which is not there",
                        where=str(self.folder / WEIGHT_INDEX),
                        exists=", ".join(sorted(p.name for p in self.folder.glob("*.safetensors"))) or "no shard",
                        fix="download the missing shard",
                    )
            return files
        if (self.folder / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        names = sorted(
            p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".safetensors", ".pt", ".pth", ".gguf")
        )
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        raise ModelError(
            f"no {SINGLE_FILE} and no {WEIGHT_INDEX}",
            where=str(self.folder),
            exists=", ".join(names) or "no weight file",
            fix="a .bin file is a pickle, which can run code: convert it with --allow-pickle if you trust it"
            if pickled
            else "name a folder that holds safetensors weights",
        )

    def _verify_index(self) -> None:
        if self.index is None:
            return
        for name, file in self.index["weight_map"].items():
            info = self.tensors.get(name)
            if info is None or info.file != file:
                raise ModelError(
                    f"the index says that {file} holds {name}, and it does not",
                    where=str(self.folder / WEIGHT_INDEX),
                    exists=f"{name} in {info.file}" if info else f"nearest: {nearest(name, self.tensors) or 'none'}",
                )

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum((self.folder / shard.file).stat().st_size for shard in self.shards)

    def fingerprint(self) -> str:
        """A hash of the headers and of some bytes of every tensor: a cheap identity, equal for every copy of a base.

        It changes with every training, merge or cast. It misses an edit that leaves the sampled bytes unchanged.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.file}\0".encode() + shard.header)
            with open(self.folder / shard.file, "rb") as file:
                for info in shard.tensors:
                    for sample_index in range(SAMPLES):
                        file.seek(info.start + sample_index * max(0, info.size - SAMPLE) // max(1, SAMPLES - 1))
                        digest.update(file.read(min(SAMPLE, info.size)))
        return BY_CONTENT + digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """One tensor, read into memory of its own.

        Raises:
            SurgeryError: not a floating-point tensor, or a file that ends too early.
        """
        import torch

        info, dtype = self.tensors[name], self.float_dtype(name)
        data = torch.empty(info.size, dtype=torch.uint8)
        with open(self.folder / info.file, "rb") as file:
            file.seek(info.start)
            if file.readinto(data.numpy()) != info.size:
                raise self.ended(info.file)
        return data.view(dtype).reshape(info.shape)

    def placeholder(self, name: str) -> Tensor:
        """A meta tensor with the shape and the dtype of a stored one; nothing is read."""
        import torch

        return torch.empty(self.tensors[name].shape, dtype=self.float_dtype(name), device="meta")

    def float_dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype; a SurgeryError if it is not a floating-point one."""
        import torch

        info = self.tensors[name]
        if info.dtype not in TORCH_NAMES:
            raise UnsupportedModelError(
                f"{name} is {info.dtype}: only floating-point tensors are computed with", where=info.file
            )
        return getattr(torch, TORCH_NAMES[info.dtype])

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        """The bytes of one tensor, at most `CHUNK` at a time; the buffer is reused."""
        buffer = memoryview(bytearray(min(CHUNK, max(info.size, 1))))
        with open(self.folder / info.file, "rb", buffering=0) as file:
            file.seek(info.start)
            remaining = info.size
            while remaining:
                read = file.readinto(buffer[: min(remaining, len(buffer))])
                if not read:
                    raise self.ended(info.file)
                remaining -= read
                yield buffer[:read]

    def ended(self, file: str) -> SurgeryError:
        """The error for a file that became shorter while it was read."""
        return ModelError(f"{file} ended while it was read", where=str(self.folder))


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of one tensor; a value of a dtype that this version does not know counts as one byte."""
    return prod(shape) * DTYPE_BITS.get(dtype, 8) // 8


def stored_dtype(tensor: Tensor) -> str:
    """A tensor's dtype in safetensors' spelling; a dtype that we do not compute with keeps torch's spelling."""
    name = str(tensor.dtype).removeprefix("torch.")
    return STORED_NAMES.get(name, name)


def header_table(headers: dict[str, dict] | None) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Name -> (dtype, shape) from headers that were fetched without their weights (`hub.ResolvedModel.headers`)."""
    if headers is None:
        return None
    entries = (pair for header in headers.values() for pair in header.items() if pair[0] != "__metadata__")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries}


def read_index(path: Path) -> dict:
    """Read a weight index; a SurgeryError unless its weight_map maps names to files inside the folder."""
    from surgery.io.files import read_json

    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError("the index has no weight_map of names to files", where=str(path))
    if not weight_map or not isinstance(index.get("metadata"), dict | None):
        what = "its weight_map names no tensor" if not weight_map else "its metadata is no mapping"
        raise ModelError(f"the index is damaged: {what}", where=str(path), fix="download it again")
    for file in weight_map.values():
        inside_folder(file, str(path))
    return index


def inside_folder(name: str, where: str) -> str:
    """Return `name` if it stays in its folder (not absolute, no "..", in any system's spelling); else raise.

    The name is checked as text and not through the file system, because the links of the Hub's cache are allowed.
    """
    for flavour in (PurePosixPath, PureWindowsPath):
        path = flavour(name)
        if path.is_absolute() or path.drive or path.root or ".." in path.parts or not path.parts:
            raise SurgeryError(
                f"the name {name!r} leaves its folder",
                where=where,
                fix="names must be relative, without ..",
                code="unsafe-weights",
            )
        if any(len(part) > LONGEST_NAME for part in path.parts):
            raise ModelError(f"the name {shown(name)} is too long for a file", where=where)
    return name


def read_header(path: Path, file: str) -> Shard:
    """The header of one safetensors file, checked against the file's real size; a SurgeryError where they differ."""
    total = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > min(MAX_HEADER, total - 8):
            raise ModelError(
                f"{file} is not a safetensors file, or is cut short",
                where=str(path.parent),
                fix="download it again (a Git LFS pointer of 130 bytes becomes the file by `git lfs pull`)",
            )
        header = stream.read(length)
    from surgery.io.files import parse_json

    try:
        entries = parse_json(header)
        metadata = entries.pop("__metadata__", None) or {}
        tensors = [
            TensorInfo(
                name,
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries.items()
            if all(type(n) is int and n >= 0 for n in (*entry["shape"], *entry["data_offsets"]))
            and len(entry["data_offsets"]) == 2
            and isinstance(entry["dtype"], str)
        ]
        if len(tensors) < len(entries):
            raise ValueError("a shape or an offset is not a number, or a dtype no text")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ModelError(f"{file} has a header that is not safetensors", where=str(path.parent)) from None
    tensors.sort(key=lambda info: (info.start, info.size))  # an empty tensor comes before the next one
    _verify_offsets(tensors, 8 + length, total, file, path.parent)
    return Shard(file, tuple(tensors), metadata, header)


def _verify_offsets(tensors: list[TensorInfo], position: int, total: int, file: str, folder: Path) -> None:
    for info in tensors:
        bits = DTYPE_BITS.get(info.dtype)
        for size in info.shape:
            bits = bits and bits * size
        if info.start != position or (bits is not None and info.size * 8 != bits):
            raise ModelError(f"{file}: {info.name} lies where its shape does not allow", where=str(folder))
        position += info.size
    if position != total:
        raise ModelError(
            f"{file} has {total:,} bytes and its header promises {position:,}",
            where=str(folder),
            fix="the file is cut short or damaged: download it again",
        )


def _siblings(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    names = [p.name for p in folder.parent.iterdir() if p.is_dir()]
    close = nearest(folder.name, names)
    return f"{close} in the same folder" if close else ""
