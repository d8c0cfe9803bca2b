"""Times prefill and decoding of the base and the converted model, interleaved in one run, and measures their memory.

The converted model is compared with the base on `DynamicCache`, and with itself when all its heads are full and on.
The second comparison uses the same block-growing cache, so that a surgery is not credited with the gain of the cache.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import MachineError, SettingError
from surgery.evaluation.benchmark.models import (
    compare,
    gate_figures,
    loaded_pair,
    make_prompts,
    random_pair,
    sparse_figures,
    split_figures,
)
from surgery.evaluation.benchmark.result import FULL, SPLIT, STOCK, Benchmark, Timing
from surgery.machine.device import PeakMemory, device_name, is_out_of_memory
from surgery.machine.offload import ModelSizes
from surgery.machine.placement import AUTO, CPU, current, device_for, placed_on
from surgery.machine.progress import begin

if TYPE_CHECKING:
    import torch

# The keys of a layer's entry in the `surgery` block that give its shape. With these alone, all its heads attend fully.
SHAPE = ("num_attention_heads", "num_key_value_heads", "query_groups", "shapes")


@dataclass(frozen=True)
class Contender:
    """A model with the name of its rows, and the `surgery` block that it gets before it runs, if any."""

    name: str
    model: Any
    block: dict | None = None

    def ready(self):
        """The model, with this contender's `surgery` block attached."""
        from surgery.runtime.modeling_surgery import attach

        if self.block:
            self.model.config.surgery = self.block
            attach(self.model)
        return self.model


BY_TEXT = (
    "how many blocks the sparse prefill reads follows from text and weights: random ones have it read far more. A "
    "density is kept in any case (a recipe with density=0.2 gamma=null)"
)


NO_ROOM = "no GPU has room for both models: the CPU was timed"


def _base_info(stock) -> dict:
    """Facts about the base that a reader of the timings must know."""
    text = stock.config.get_text_config()
    return {
        "layers": text.num_hidden_layers,
        "dtype": str(stock.dtype).removeprefix("torch."),
        "base_attention": text._attn_implementation,
        "base_cache": "its own cache" if getattr(stock.config, "surgery", None) else "DynamicCache",
    }


def _contenders(stock, model) -> list[Contender]:
    """The base, the converted model with all heads full, which shows the gain of the cache alone, and the converted
    model.
    """
    block = getattr(model.config, "surgery", None)
    if not block or any("latent" in layer for layer in block["layers"]):  # whose cache the stock module cannot read
        return [Contender(STOCK, stock), Contender(SPLIT, model, block)]
    layers = [{name: layer[name] for name in SHAPE if name in layer} for layer in block["layers"]]
    all_full = Contender(FULL, model, {**block, "layers": layers})
    return [Contender(STOCK, stock), all_full, Contender(SPLIT, model, block)]


def bench(
    out: str | Path,
    base: str | Path,
    *,
    lengths: tuple[int, ...] = (512, 2048, 8000),
    rounds: int = 3,
    decode: int = 16,
    synthetic: bool = False,
    layers: int | None = None,
    ratio: float | None = None,
    device: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> Benchmark:
    """Time a checkpoint against its base on text (random tokens if the weights are random), batch 1.

    Before the rounds of a length, every model runs once untimed; its peak memory is measured in that run.

    Args:
        out: the converted checkpoint. A native one gives two rows per length, base and converted model; a surgical one
            gives a third, with all heads full.
        base: folder, name or Hub id of the model that it was made from.
        lengths: prompt lengths in tokens.
        rounds: repetitions. The models take turns, and each round starts with another one.
        decode: tokens timed after each prompt. One untimed token precedes them, in which a cache makes room.
        synthetic: random weights, and as many positions as the lengths need.
        layers: number of layers of a synthetic model; if it is less than the base's, they are taken evenly spaced.
        ratio: share of streaming KV heads of a synthetic model, chosen at random, in place of `out`'s split.
        device: as for `surgery.evaluate`.
        progress: called as progress(tokens done, tokens in all, "timing").

    Raises:
        SurgeryError: settings are out of range, a length is beyond the base's positions, or the shapes differ.
        MachineError: there is no such device, or too little memory.
    """
    from surgery.io.hub import resolve
    from surgery.io.loading import read_config

    _refuse(lengths, rounds, decode, synthetic, layers, ratio)
    lengths, emptiest = tuple(dict.fromkeys(lengths)), device_of(device)  # a wrong name is told before models load
    folder, positions = resolve(str(base), weights=not synthetic).path, max(lengths) + 1 + decode
    configs = read_config(folder), read_config(out)
    notes = compare(*configs, base, out)
    if synthetic:
        stock, model, info = random_pair(*configs, positions, layers, ratio)
    else:
        stock, model, info = loaded_pair(*configs, folder, Path(out), positions)
    split, gate, sparse = split_figures(model.config), gate_figures(model.config), sparse_figures(model.config)
    info = _base_info(stock) | {"synthetic": synthetic} | info
    vocabulary = stock.config.get_text_config().vocab_size
    prompts, info["prompts"], reason = make_prompts(None if synthetic else folder, vocabulary, lengths)
    notes += [f"the prompts are random tokens, not text: {reason}"] if reason else []
    notes += [BY_TEXT] if sparse and sparse["by_text"] and (synthetic or reason) else []
    torch_device = move(device, stock, model)
    notes += [NO_ROOM] if torch_device.type == CPU != emptiest.type else []
    with _out_of_memory(torch_device, "shorter --lengths"), _short_collections():
        timings = _all_rounds(_contenders(stock, model), prompts, rounds, decode, torch_device, progress)
    return Benchmark(machine_name(torch_device), info, split, gate, rounds, decode, timings, notes, sparse)


def _all_rounds(contenders, prompts, rounds, decode, device, progress) -> list[Timing]:
    done, total, timings = 0, sum(prompts) * (rounds + 1) * len(contenders), []
    begin(progress, "timing", total)
    for length, ids in prompts.items():
        ids = ids.to(device)
        samples: dict[str, list] = {contender.name: [] for contender in contenders}
        peaks: dict[str, tuple[int | None, dict]] = {}
        for round_index in range(rounds + 1):
            first = round_index % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                if round_index == 0:
                    peaks[contender.name] = _peak(contender.ready(), ids, device)
                else:
                    samples[contender.name].append(_run(contender.ready(), ids, decode))
                done += length
                if progress:
                    progress(done, total, "timing")
        for name, values in samples.items():
            prefill, token, *cache_sizes = zip(*values, strict=True)
            timings.append(Timing(name, length, prefill, token, *map(max, cache_sizes), *peaks[name]))
    return timings


def _run(model, ids, decode: int) -> tuple[float, float, int, int]:
    """Seconds of a prefill and of one decoded token, and bytes of the cache after the prompt and at the end."""
    import torch

    from surgery.runtime.modeling_surgery import CACHE

    seconds, inputs = [], {"input_ids": ids, "logits_to_keep": 1}
    gc.collect()
    with torch.no_grad():
        for _ in range(1 + 1 + decode):  # the prompt, the token in which the cache makes room, the timed tokens
            wait(ids.device)
            begin = time.perf_counter()
            output = model(**inputs, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            wait(ids.device)
            seconds.append(time.perf_counter() - begin)
            if len(seconds) == 1:
                prompt_bytes = cache_bytes(output[CACHE])
            inputs = {"input_ids": token, CACHE: output[CACHE]}
    return seconds[0], statistics.median(seconds[2:]), prompt_bytes, cache_bytes(output[CACHE])


def _peak(model, ids, device) -> tuple[int | None, dict[str, list[int]]]:
    """Peak bytes of a prefill beyond the weights, and its multiply-adds in the form of `Timing.work`.

    A token is decoded afterwards, so that all code has run once before it is timed.
    """
    import torch

    from surgery.runtime.modeling_surgery import CACHE
    from surgery.runtime.surgery_gated_compute import counted

    with torch.no_grad():
        with PeakMemory(device) as peak, counted(model) as work:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        model(input_ids=ids[:, :1], **{CACHE: output[CACHE]}, use_cache=True)
    return peak.bytes, {name: [done, work.dense[name]] for name, done in work.done.items()}


def cache_bytes(cache) -> int:
    """Bytes of the storage that a cache holds."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def _refuse(lengths, rounds, decode, synthetic, layers, ratio) -> None:
    for name, value in (("rounds", rounds), ("decode", decode), *(("lengths", length) for length in lengths)):
        if type(value) is not int or value < 1:
            raise SettingError(f"{name} must be whole numbers from 1, not {value!r}", where="bench")
    if not lengths:
        raise SettingError("no length to measure", where="bench", fix="lengths=(512, 2048)")
    if not synthetic and (layers is not None or ratio is not None):
        raise SettingError("layers and ratio are of random models", where="bench", fix="add --synthetic")


def device_of(name: str, *models: Any) -> torch.device:
    """The device of this name for models that are there at the same time; "auto" is a GPU if one has room for them.

    Raises:
        SurgeryError: it is not the name of a device.
        MachineError: PyTorch sees no such device, or it has no room for the models.
    """
    with placed_on(current().device if name == AUTO else name):
        return device_for(sum(ModelSizes.of(model).whole for model in models))


def move(name: str, *models: Any) -> torch.device:
    """Move models that were loaded to the device of this name, in eval mode, and return the device."""
    device = device_of(name, *models)
    fix = "a machine with more memory" if device.type == CPU else "--device cpu"
    with _out_of_memory(device, fix):
        for model in models:
            _read_weights(model.to(device).eval())
    return device


@contextmanager
def _out_of_memory(device, fix: str):
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = (str(error) or "no more to be had").splitlines()[0]
        raise MachineError(f"out of memory: {what}", where=str(device), fix=fix, code="out-of-memory") from error


@contextmanager
def _short_collections():
    """Exclude the objects that exist now from garbage collection: a collection of all of Transformers' objects takes
    half a second, at an unpredictable moment.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _read_weights(model) -> None:
    """Read every page of the weights: they may be mapped from a file, and the first prompt should not pay for that."""
    for parameter in model.parameters():
        parameter.detach().flatten()[::512].sum()


def wait(device) -> None:
    """Wait until the device has finished, because calls to a GPU return earlier."""
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)


def machine_name(device) -> str:
    """GPU, or processor and number of threads, and version of torch, on one line."""
    import platform

    import torch

    if device.type != "cpu":
        return f"{device_name(device)}, torch {torch.__version__}"
    name = f"{platform.machine()} CPU"
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
