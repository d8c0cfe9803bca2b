"""Whether a surgery that was run again gave the same checkpoint: hashes, else tensors and figures."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.evaluation.paired import finite
from surgery.io.files import sha256
from surgery.io.identity import stable
from surgery.io.loading import read_config
from surgery.io.printing import Block, Printed, Table, count
from surgery.io.safetensors import TORCH_NAMES, Checkpoint
from surgery.report.report import MEASURED_IN

ROUNDING = 1e-3  # relative distance of a tensor up to which the last bits explain it
NEAR = 0.005  # relative difference of a loss up to which it is the same figure


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same to the bit.

    Attributes:
        distance: norm of the difference over the norm of the recorded tensor; infinite where it cannot be computed.
        otherwise: in words, why it cannot be computed; "" where it can.
    """

    name: str
    distance: float
    otherwise: str = ""


@dataclass
class Reproduction(Printed):
    """A surgery that was run again.

    Attributes:
        out, base: the checkpoint, and the base that its recipe was run on.
        files: weight file -> whether its hash is the recorded one.
        config: keys of config.json that differ.
        tensors: the tensors that differ, the farthest first; [] if all hashes are equal.
        figures: name -> (recorded, now), measured where the weights differ; {}: not measured.
        machine: name -> (recorded, now), of what differs and may decide the last bits.
        notes: remarks for the reader.
    """

    out: str
    base: str
    files: dict[str, bool]
    config: list[str] = field(default_factory=list)
    tensors: list[TensorDifference] = field(default_factory=list)
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    machine: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def same_bits(self) -> bool:
        """Whether all weight files have the recorded hash, and the config is the same."""
        return all(self.files.values()) and not self.config

    @property
    def reproduced(self) -> bool:
        """Whether the config is the same, and the weights are: to the bit, or to rounding if the machines differ.

        Of weights that differ by rounding, the figures must agree too. On one machine equal bits are promised.
        """
        near = bool(self.machine) and all(each.distance <= ROUNDING for each in self.tensors)
        agree = all(abs(now - then) <= NEAR * max(abs(then), 1e-9) for then, now in self.figures.values())
        return not self.config and (not self.tensors or (near and agree))

    def headline(self) -> str:
        if self.same_bits:
            return f"reproduced: {count(len(self.files), 'weight file')} with the recorded hash"
        if not self.config and not self.tensors:
            return "reproduced: every tensor is the same to the bit, in files with another hash"
        what = f"{count(len(self.tensors), 'tensor')} differ{'s' * (len(self.tensors) == 1)}"
        if self.config:
            what = f"config.json differs ({', '.join(self.config)})" + (f", and {what}" if self.tensors else "")
        return f"reproduced to rounding: {what}" if self.reproduced else f"not reproduced: {what}"

    def blocks(self) -> list[Block]:
        lines: list[Block] = [f"{self.out}: {self.headline()}", f"base: {self.base}"]
        if self.tensors:
            rows = [[each.name, each.otherwise or f"{each.distance:.2g}"] for each in self.tensors[:5]]
            lines.append(Table(("the farthest tensors", "relative distance, or what differs"), rows))
        if self.figures:
            rows = [[name, f"{then:.5g}", f"{now:.5g}"] for name, (then, now) in self.figures.items()]
            lines.append(Table(("", "recorded", "now"), rows))
        if self.machine:
            differing = ", ".join(f"{name} {then} → {now}" for name, (then, now) in self.machine.items())
            lines.append(f"the machines differ: {differing}")
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        tensors = [vars(each) for each in self.tensors]
        return finite(vars(self) | {"tensors": tensors, "reproduced": self.reproduced, "same_bits": self.same_bits})


def hashes(record: dict, again: Path) -> dict[str, bool]:
    """Recorded weight file -> whether the file of this name in `again` has its hash."""
    return {
        name: (again / name).is_file() and sha256(again / name) == entry["sha256"]
        for name, entry in record["files"].items()
    }


def differing_code(record: dict, again: Path) -> list[str]:
    """Code files of a record that the new run wrote otherwise or not at all."""
    code = {name: entry for name, entry in (record.get("other_files") or {}).items() if name.endswith(".py")}
    return [
        name
        for name, entry in sorted(code.items())
        if not (again / name).is_file() or sha256(again / name) != entry["sha256"]
    ]


def differing_config(out: Path, again: Path) -> list[str]:
    """Keys of the config that differ between two folders; one that is not written has its default."""
    old, new = (stable(read_config(folder).to_dict()) for folder in (out, again))
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def differing_tensors(out: Path, again: Path) -> list[TensorDifference]:
    """The tensors of two folders that are not the same to the bit, the farthest first."""
    old, new = Checkpoint(out), Checkpoint(again)
    found = [
        TensorDifference(name, math.inf, f"only in the {'recorded' if name in old.tensors else 'new'} weights")
        for name in old.tensors.keys() ^ new.tensors.keys()
    ]
    for name in old.tensors.keys() & new.tensors.keys():
        if difference := _difference(name, old, new):
            found.append(difference)
    return sorted(found, key=lambda each: (-each.distance, each.name))


def _difference(name: str, old: Checkpoint, new: Checkpoint) -> TensorDifference | None:
    """How a tensor that both have differs; None: it is the same to the bit."""
    before, now = old.tensors[name], new.tensors[name]
    otherwise = ""
    if before.shape != now.shape:
        otherwise = f"shape {list(before.shape)}, now {list(now.shape)}"
    elif before.dtype != now.dtype:
        otherwise = f"dtype {before.dtype}, now {now.dtype}"
    elif _digest(old, name) == _digest(new, name):
        return None
    elif before.dtype not in TORCH_NAMES:
        otherwise = f"other bytes ({before.dtype})"
    if otherwise:
        return TensorDifference(name, math.inf, otherwise)
    one, other = old.read(name).double(), new.read(name).double()
    norm = one.norm().item()
    if not norm:
        return TensorDifference(name, math.inf, "all zero in the recorded weights")
    distance = (one - other).norm().item() / norm
    if not math.isfinite(distance):
        return TensorDifference(name, math.inf, "values that are not finite")
    return TensorDifference(name, distance)


def _digest(checkpoint: Checkpoint, name: str) -> str:
    """A hash of a tensor's bytes, whatever its dtype."""
    digest = hashlib.sha256()
    for chunk in checkpoint.chunks(checkpoint.tensors[name]):
        digest.update(chunk)
    return digest.hexdigest()


def differing_machine(record: dict, again: dict) -> dict[str, tuple[Any, Any]]:
    """What differs between the machines of two records and may decide the last bits of weights."""
    facts = {name: (record.get("versions") or {}).get(name) for name in ("surgery", "torch", "transformers")}
    now = {name: (again.get("versions") or {}).get(name) for name in facts}
    for name in ("threads", MEASURED_IN):
        facts[name], now[name] = record.get(name), again.get(name)
    return {name: (then, now[name]) for name, then in facts.items() if then != now[name]}


def main_figures(evaluation: dict | None) -> dict[str, float]:
    """The figures of an evaluation that a repetition is judged by."""
    if not evaluation or evaluation.get("status") != "done":
        return {}
    figures = {"cross-entropy, nats a token": (evaluation.get("out") or {}).get("cross_entropy")}
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}
