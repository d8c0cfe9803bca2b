"""Estimates how long a run takes on this machine and how much memory and disk it needs, stage by stage.

The plan gives the floating-point operations, and `machine/speed.py` measures how many this machine does per second.
Other work is estimated with constants, from the processor time of one run of duo-attention on SmolLM2-135M (an AMD
EPYC). The estimate has not been compared with a whole run on a quiet machine yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from surgery.architecture.layer import BYTES
from surgery.calibration.cost import forward_flops, widths
from surgery.errors import SurgeryError
from surgery.evaluation.check import FILES, FRESH
from surgery.io.safetensors import TORCH_NAMES, stored_bytes
from surgery.machine.device import LOAD_OVERHEAD
from surgery.machine.offload import ModelSizes
from surgery.machine.placement import (
    AUTO,
    CPU,
    DTYPES,
    GRADIENTS,
    LAYERS,
    PASSES,
    Place,
    Use,
    accelerators,
    current,
    place_for,
    refuse_for_quantised,
    refuse_for_training,
)
from surgery.machine.speed import bytes_per_second, flops_per_second
from surgery.operations.base import SURGICAL, Measurement

if TYPE_CHECKING:
    from surgery.conversion.plan import Plan
    from surgery.evaluation.probes.base import Probe

LOADING, LOADED_BYTES = 2.0, 500e6  # seconds to build a model's modules; bytes per second when weights are loaded
WRITTEN_BYTES, HASHED_BYTES = 400e6, 700e6  # bytes per second when weights are written, and when they are hashed
PROCESS_SECONDS, PROCESS_BYTES = 8.0, 500e6  # start and memory of a process that imports PyTorch and Transformers
REWRITTEN_LAYER = 0.02  # seconds to rewrite one layer
GROUPS = ("measure", "write", "heal", "check", "score")


@dataclass(frozen=True)
class StageEstimate:
    """One stage: its name in progress reports, its group (one of `GROUPS`), seconds, and peak memory in bytes."""

    stage: str
    group: str
    seconds: float
    memory_bytes: float


@dataclass(frozen=True)
class Estimate:
    """A whole run: conversion, healing, check and scores.

    Attributes:
        stages: the stages in the order in which they run.
        output_bytes: bytes of the result's weights.
        disk_bytes: most bytes that the run needs on the disk at once.
        threads: number of PyTorch's threads that `seconds` assumes; None where nothing is computed with a model.
        device: the GPU that measures, or only scores where nothing is measured; None: the CPU does.
    """

    stages: tuple[StageEstimate, ...]
    output_bytes: int
    disk_bytes: int
    threads: int | None
    device: DeviceUse | None = None

    @property
    def seconds(self) -> float:
        """Seconds of all stages together."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Peak memory in bytes over all stages; processes that run at the same time are added."""
        return int(max(stage.memory_bytes for stage in self.stages))

    def names(self) -> list[str]:
        """Names of the stages in order."""
        return [stage.stage for stage in self.stages]

    def groups(self) -> dict[str, tuple[float, float]]:
        """Group -> (seconds in all, peak bytes), for the groups that have stages."""
        found: dict[str, tuple[float, float]] = {}
        for group in GROUPS:
            if stages := [stage for stage in self.stages if stage.group == group]:
                found[group] = sum(s.seconds for s in stages), max(s.memory_bytes for s in stages)
        return found

    def to_dict(self) -> dict:
        """The estimate as plain data, in seconds and bytes."""
        groups = self.groups().items()
        return {
            "output_bytes": self.output_bytes,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "seconds": round(self.seconds, 1),
            "threads": self.threads,
            "device": None if self.device is None else vars(self.device),
            "parts": {group: {"seconds": round(s, 1), "memory_bytes": int(m)} for group, (s, m) in groups},
        }


@dataclass(frozen=True)
class DeviceUse:
    """What a conversion takes of a GPU.

    Attributes:
        device: its name in PyTorch; of a model that is spread, the one where all that is not a layer is.
        streamed: whether the model's layers are there one at a time, since the model is larger.
        memory_bytes: bytes of the model that are there, with activations, and of the measurement; of several devices
            the sum.
        spread: the names of all devices, if the model is spread.
    """

    device: str
    streamed: bool
    memory_bytes: int
    spread: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan, scored: bool) -> DeviceUse | None:
        """The GPU of this run, if the model is measured or scored on one.

        Raises:
            SurgeryError: a device was named, and the model is quantised.
            MachineError: the device that was named has no room for the model.
        """
        refuse_for_quantised(plan.before.config)
        if (plan.streams and not scored) or getattr(plan.before.config, "quantization_config", None):
            return None
        sizes = _sizes(plan)
        place = place_for(sizes, PASSES if plan.streams else use_of(plan), measuring_bytes(plan))
        if place.device.type == CPU:
            return None
        size = sizes.streamed if place.streamed else sizes.whole
        beside = len(place.devices) * measuring_bytes(plan)
        spread = tuple(map(str, place.devices)) if place.layers else ()
        return cls(str(place.device), place.streamed, int(LOAD_OVERHEAD * size) + beside, spread)


def use_of(plan: Plan) -> Use:
    """What the plan's measurements do with the model."""
    asked = {step.operation.model_use for step in plan.steps}
    return next((use for use in (GRADIENTS, PASSES) if use in asked), LAYERS)


def measuring_bytes(plan: Plan) -> int:
    """Bytes that the plan's measurements need in addition to the model."""
    measured = [each for step in plan.steps for each in step.change.measurements]
    return int(
        max((each.memory if each.memory_on_gpu is None else each.memory_on_gpu for each in measured), default=0)
    )


def _sizes(plan: Plan) -> ModelSizes:
    """The sizes of the model in memory, in the dtype of this run."""
    dtype, anatomy = current().dtype, plan.before
    width = None if dtype == AUTO else DTYPES[dtype]
    of_tensors = {
        name: prod(shape) * width if width and kind in TORCH_NAMES else stored_bytes(kind, shape)
        for name, (kind, shape) in anatomy.tensors.items()
    }
    return ModelSizes.of_tensors(of_tensors, [layer.path.rpartition(".")[0] for layer in anatomy.layers])


def estimate(plan: Plan, check: bool = True, evaluate: bool = True) -> Estimate:
    """The estimate for a plan. Its tensors must be known, not only the config.

    Args:
        check, evaluate: whether the result will be checked and scored. PyTorch is imported, and its speed measured,
            only if some stage computes with a model: a plain conversion copies files while PyTorch is imported.
    """
    heal = plan.heal
    disk = plan.output_bytes
    if heal is not None:  # the converted model stays until the healed one is complete
        disk += plan.output_bytes + heal.disk_bytes + heal.teacher_bytes
    left_out = {group for group, asked in (("check", check), ("score", evaluate)) if not asked}
    work = _Stages(plan, left_out)
    return Estimate(tuple(work.all()), plan.output_bytes, disk, work.threads, work.device)


class _Stages:
    """The stages of a plan's run, without those of the groups that are left out."""

    def __init__(self, plan: Plan, left_out: Collection[str] = ()):
        self.plan, self.anatomy, self.weights, self.left_out = plan, plan.before, plan.output_bytes, left_out
        self.threads: int | None = None
        config = plan.before.config.get_text_config()
        self.vocabulary = getattr(config, "vocab_size", None) or 0
        asked = () if "score" in left_out else self._asked()  # a probe may read the tokenizer, which imports PyTorch
        self.probes = sorted(asked, key=lambda probe: not probe.main)
        self.device = DeviceUse.of(plan, bool(self.probes))
        if plan.heal is not None:
            refuse_for_training()
        self.load = LOADING + self.weights / LOADED_BYTES
        self.loaded = PROCESS_BYTES + self.weights

    def _speed(self, device: str, dtype: str = "float32") -> float:
        """Floating-point operations per second on a device; on the CPU always those of float32."""
        import torch

        if device == CPU:
            self.threads, dtype = torch.get_num_threads(), "float32"
        return flops_per_second(*widths(self.anatomy), device, dtype)

    @cached_property
    def _scored_on(self) -> Place:
        return place_for(_sizes(self.plan), PASSES)

    def all(self) -> Iterator[StageEstimate]:
        """All stages, in the order of `pipeline.py`."""
        plan = self.plan
        yield from self._conversion()
        if heal := plan.heal:
            yield from self._scores()
            for each in heal.measurements():
                yield self._measured(each, "heal", PROCESS_BYTES + heal.memory_bytes, _training_device())
            yield StageEstimate("writing", "heal", self.weights / WRITTEN_BYTES, PROCESS_BYTES + heal.memory_bytes)
        yield from self._check()
        yield from self._scores()

    def _asked(self) -> Iterator[Probe]:
        """The probes that will run. Some do not apply to a model without a chat template."""
        evaluate, folder = self.plan.recipe.evaluate, self.plan.folder
        for probe in evaluate.asked if evaluate else ():
            reason = ""
            if folder is not None:
                with suppress(SurgeryError):  # there is no tokenizer: the run itself reports that
                    reason = probe.unasked(folder)
            if not reason:
                yield probe

    def _conversion(self) -> Iterator[StageEstimate]:
        plan, layers = self.plan, len(self.anatomy.layers)
        writing = self.weights / WRITTEN_BYTES
        unknown = sum(step.change.seconds for step in plan.steps)
        if plan.streams:
            seconds = writing + REWRITTEN_LAYER * layers + unknown
            yield StageEstimate("writing", "write", seconds, PROCESS_BYTES + _streaming_bytes(plan))
            return
        yield StageEstimate("loading the model", "measure", self.load + unknown, self.loaded)
        for step in plan.steps:
            if step.operation.streams:
                yield StageEstimate("rewriting layers", "measure", REWRITTEN_LAYER * layers, self.loaded)
            for each in step.change.measurements:
                device = CPU if self.device is None else self.device.device
                if self.device and self.device.streamed and each.writes:
                    device = CPU
                yield self._measured(each, "measure", self.loaded, device)
        yield StageEstimate("writing", "write", writing, self.loaded)

    def _measured(self, measurement: Measurement, group: str, memory: float, device: str) -> StageEstimate:
        seconds = measurement.seconds or measurement.flops / self._speed(device)
        if device != CPU and self.device and self.device.streamed:
            seconds += measurement.passes * self.weights / bytes_per_second(CPU)
        return StageEstimate(measurement.stage, group, seconds, memory + measurement.memory)

    def _check(self) -> Iterator[StageEstimate]:
        if "check" in self.left_out:
            return
        yield StageEstimate(FILES, "check", 2 * self.weights / HASHED_BYTES, PROCESS_BYTES)
        processes = 2 if self.plan.tier == SURGICAL else 1  # both ways to load
        seconds = processes * (PROCESS_SECONDS + self.load)
        yield StageEstimate(FRESH, "check", seconds, PROCESS_BYTES + self.loaded)

    def _scores(self) -> Iterator[StageEstimate]:
        for probe in self.probes:
            stages = probe.stages()
            for stage in stages:  # each of two stages runs one model; a single stage runs both
                yield StageEstimate(stage, "score", 2 / len(stages) * self._of_one_model(probe), self._memory(probe))

    def _of_one_model(self, probe: Probe) -> float:
        effort, place = probe.effort, self._scored_on
        device = str(place.device)
        stored = TORCH_NAMES.get(self.anatomy.dtype, "float32")
        dtype = stored if current().dtype == AUTO else current().dtype
        reading = forward_flops(self.anatomy, effort.read, effort.length) / self._speed(device, dtype)
        # A streamed model's weights come from main memory for each text that is read, and for each token.
        passes = effort.written + place.streamed * effort.read / max(1, effort.length)
        return self.load + reading + passes * self.weights / bytes_per_second(CPU if place.streamed else device)

    def _memory(self, probe: Probe) -> float:
        """Bytes of a loaded model, of the logits of a text (main probe) or its cache, and of one layer's attention."""
        length, layer = probe.effort.length, self.anatomy.layers[0]
        logits = 8 * length * self.vocabulary if probe.main else 2 * self.anatomy.kv_bytes_at(length)
        logits += probe.effort.logits * self.vocabulary * BYTES.get(self.anatomy.dtype, 4)
        return self.loaded + logits + 3 * 4 * layer.heads * length**2


def _training_device() -> str:
    """Where the Trainer trains: on the first GPU, or on the CPU."""
    gpus = [] if current().device == CPU else accelerators()
    return str(gpus[0]) if gpus else CPU


def _streaming_bytes(plan: Plan) -> float:
    """Bytes of weights in memory while streaming: of what a layer reads, two copies as stored, and two in float64."""
    layer, stored = plan.before.layers[0], plan.before.tensors
    names = [f"{layer.path}.{name}" for name in layer.tensor_names]
    values = sum(prod(stored[name][1]) for name in names if name not in plan.unread) if plan.shapes else 0
    return values * (2 * BYTES.get(plan.before.dtype, 2) + 16)
