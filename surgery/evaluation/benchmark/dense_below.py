"""Measures `dense_below`: the position from which sparse prefill pays on this machine.

The inputs of some layers' attention on a text are recorded. On these inputs the attention is timed in turn: dense, and
sparse from a candidate position on. A candidate fits if two prompts, one a quarter longer and one twice as long, both
take at most `LIMIT` times as long as dense; longer prompts save more with every block. The smallest candidate that
fits is taken. Only the attention is timed. It is a part of the whole prompt, so a whole prompt loses less than that.
"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import SettingError, SurgeryError, UnsupportedModelError
from surgery.machine.progress import begin

CANDIDATES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LIMIT = 1.02
LAYERS = 4  # number of timed layers, evenly spaced among those with sparse prefill
SHORTEST = 0.05  # least seconds of a timing; a shorter call is repeated


@dataclass(frozen=True)
class TimedPrompt:
    """The timing of a prompt whose first `dense_below` positions are dense.

    Attributes:
        dense, sparse: seconds of one layer's attention, mean over the layers, median over the rounds.
        ratio: sparse time over dense time, median over the rounds.
    """

    dense_below: int
    length: int
    dense: float
    sparse: float
    ratio: float


@dataclass(frozen=True)
class DenseBelowSearch:
    """The result of a search for `dense_below`.

    Attributes:
        dense_below: the value that was found. If no candidate fits, the number of the model's positions: then no
            prompt is sparse.
        before: the values that the layers have now.
        fits: whether a candidate fits.
        trials: the timings, in the order in which they were run.
        machine, text: the machine and the text of the timings.
        layers: the layers that were timed.
        rounds: repetitions of every timing.
    """

    dense_below: int
    before: list[int]
    fits: bool
    trials: list[TimedPrompt]
    machine: str
    text: str
    layers: list[int]
    rounds: int

    @property
    def tried(self) -> int:
        """Tokens of the longest prompt that was timed."""
        return max(trial.length for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        """The search as plain data, for `--json` and surgery.json."""
        return asdict(self)


def search_dense_below(
    out: str | Path,
    *,
    candidates: tuple[int, ...] | None = None,
    rounds: int = 5,
    text: str = "builtin",
    device: str = "auto",
    progress=None,
) -> DenseBelowSearch:
    """Find the `dense_below` of a checkpoint with sparse prefill on this machine.

    Args:
        out: the folder of the checkpoint.
        candidates: values to try, in tokens. Each needs twice as many tokens of text and positions. Default:
            `CANDIDATES`.
        rounds: repetitions of every timing.
        text: as for `load_text`; "builtin" is the calibration part of the built-in text.
        device: as for `surgery.evaluate`.
        progress: called as progress(candidates done, candidates, "timing").

    Raises:
        SurgeryError: no layer has sparse prefill, no candidate can be tried, or the text is too short.
    """
    from surgery.data.text import load_text, windows
    from surgery.evaluation.benchmark.models import spaced_layers
    from surgery.evaluation.benchmark.run import device_of, machine_name, move
    from surgery.io.loading import load_model, read_tokenizer

    device_of(device)  # a wrong name is told before the model loads
    sample_text, model = load_text(text, "calibration"), load_model(Path(out))
    torch_device = move(device, model)
    entries = [layer.get("sparse") for layer in (getattr(model.config, "surgery", None) or {"layers": []})["layers"]]
    sparse_layers = [layer_index for layer_index, entry in enumerate(entries) if entry]
    if not sparse_layers:
        what, fix = "no layer of this checkpoint has a sparse prefill", "surgery apply sparse-prefill MODEL -o OUT"
        raise UnsupportedModelError(f"{what} to calibrate", where=str(out), fix=fix)
    layers = [sparse_layers[index] for index in spaced_layers(len(sparse_layers), min(LAYERS, len(sparse_layers)))]
    block = max(entries[layer_index]["block"] for layer_index in sparse_layers)
    tokenizer, trials, dense_below = read_tokenizer(Path(out)), [], None
    tokens = len(tokenizer(sample_text.text, add_special_tokens=False, verbose=False)["input_ids"])
    positions = getattr(model.config, "max_position_embeddings", None) or tokens
    longest = min(positions, tokens)
    tried = [n for n in sorted(set(candidates or CANDIDATES)) if block <= n <= longest // 2]
    if not tried:
        raise _no_candidate(block, positions, tokens, str(out))
    ids = windows(sample_text, tokenizer, 2 * tried[-1], 1).to(torch_device)
    begin(progress, "timing", len(tried))
    for index, candidate in enumerate(tried):
        calls = _calls(model, ids[:, : 2 * candidate], layers)
        for length in sorted({max(candidate * 5 // 4, candidate + block), 2 * candidate}):
            trials.append(_trial(calls, candidate, length, rounds))
        if progress:
            progress(index + 1, len(tried), "timing")
        if max(trial.ratio for trial in trials if trial.dense_below == candidate) <= LIMIT:
            dense_below = candidate
            break
    before = sorted({entries[layer_index].get("dense_below", 0) for layer_index in sparse_layers})
    details = (trials, machine_name(torch_device), sample_text.title, layers, rounds)
    found = dense_below is not None
    return DenseBelowSearch(dense_below if dense_below is not None else positions, before, found, *details)


def _no_candidate(block: int, positions: int, tokens: int, where: str) -> SurgeryError:
    return SettingError(
        f"no candidate can be tried: they are from a block ({block}) to half of {min(positions, tokens):,} tokens, "
        f"which is what the model's {positions:,} positions and the {tokens:,} tokens of the text allow",
        where=where,
        fix="other --lengths, or a longer --text",
    )


def _calls(model, ids, layers: list[int]) -> list[tuple]:
    """The inputs of some layers' attention in a prompt: (module, query, key, value, other arguments)."""
    import torch

    from surgery.calibration.attention_hook import hook_attention
    from surgery.runtime.surgery_attention import surgery_attention

    calls = []

    def attention(module, query, key, value, mask, **kwargs):
        if module.layer_idx in layers:
            calls.append((module, query, key, value, kwargs))
        return surgery_attention(module, query, key, value, mask, **kwargs)

    with hook_attention(model, attention, split=True), torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    return calls


def _trial(calls: list[tuple], dense_below: int, length: int, rounds: int) -> TimedPrompt:
    """Time dense and sparse attention in turn; one round runs all layers."""
    repeats, times = 1, []
    for round_index in range(rounds + 1):  # the first round only sets the number of repeats
        dense, sparse = (
            sum(_seconds(call, length, below, repeats) for call in calls) for below in (None, dense_below)
        )
        if round_index:
            times.append((dense, sparse))
        else:
            repeats = max(1, round(SHORTEST * len(calls) / dense))
    dense, sparse = (statistics.median(column) / len(calls) for column in zip(*times, strict=True))
    return TimedPrompt(
        dense_below,
        length,
        dense,
        sparse,
        statistics.median(sparse_time / dense_time for dense_time, sparse_time in times),
    )


def _seconds(call: tuple, length: int, dense_below: int | None, repeats: int) -> float:
    """Seconds of a layer's attention on the first `length` tokens. `dense_below` None: all positions are dense."""
    import torch

    from surgery.evaluation.benchmark.run import wait
    from surgery.runtime.surgery_attention import surgery_attention

    module, *tensors, others = call
    inputs = [tensor[:, :, :length] for tensor in tensors]
    with torch.no_grad(), _dense_below(module, dense_below):
        wait(inputs[0].device)
        begin = time.perf_counter()
        for _ in range(repeats):
            surgery_attention(module, *inputs, None, **others)
        wait(inputs[0].device)
        return (time.perf_counter() - begin) / repeats


@contextmanager
def _dense_below(module, tokens: int | None):
    before = module.surgery_sparse
    module.surgery_sparse = (
        tokens if tokens is None else [settings and replace(settings, dense_below=tokens) for settings in before]
    )
    try:
        yield
    finally:
        module.surgery_sparse = before


def write_dense_below(folder: str | Path, search: DenseBelowSearch):
    """Write the `dense_below` that was found into a checkpoint: config.json, surgery.json and the card.

    With a larger value, the model reads more than when it was scored: the scores stay, and the card names the value
    that they belong to. With a smaller value, the scores no longer hold and are removed.

    Returns:
        The `Report`, saved.

    Raises:
        SurgeryError: no candidate fits, but a longer prompt than those tried might; or the folder was changed.
    """
    from surgery.io import manifest
    from surgery.io.files import read_json, write_text
    from surgery.io.output_folder import machine_errors
    from surgery.report.report import Report

    if not search.fits and search.tried < search.dense_below:
        raise SettingError(
            f"nothing was written: no prompt of up to {search.tried:,} tokens should be sparse here, and longer ones "
            f"(the model has {search.dense_below:,} positions) were not tried",
            where=str(folder),
            fix="give a longer --text and larger --lengths, or convert the base with a dense_below of yours",
        )
    folder = Path(folder)
    report, config = Report.of(folder), read_json(folder / "config.json")
    dense_below, data = search.dense_below, report.data
    if changed := manifest.differences(folder, data, report.intact):
        raise SurgeryError(
            f"{changed[0]}: nothing was written",
            where=str(folder),
            fix=f"surgery check {folder.name}",
            code="unchecked-output",
        )
    for entry in (layer["sparse"] for layer in config["surgery"]["layers"] if "sparse" in layer):
        entry["dense_below"] = dense_below
    steps = [step for step in data["recipe"]["operations"] if step.get("op") == "sparse_prefill"]
    for step in steps:
        step["dense_below"] = dense_below
        for changes in (step.get("per_layer") or {}).values():
            changes.pop("dense_below", None)
    if [dense_below] != search.before:
        _note_change(data, search)
    data["calibration"] = search.to_dict()
    with machine_errors(folder):
        text = json.dumps(config, indent=2, ensure_ascii=False)  # Transformers reads this file, and accepts Infinity
        write_text(folder / "config.json", text + "\n")
        if manifest.is_complete(data):
            data["other_files"]["config.json"] = manifest.entry(folder / "config.json")
        report.save()
    return report


def _note_change(data: dict, search: DenseBelowSearch) -> None:
    """Update a record for a new value of `dense_below`."""
    dense_below, before = search.dense_below, " or ".join(f"{tokens:,}" for tokens in search.before)
    plan, scored = data["plan"], data["evaluation"] is not None
    for old in search.before:
        phrases = [f"prompts beyond {tokens:,} tokens" for tokens in (old, dense_below)]
        plan["changes"] = [line.replace(*phrases) for line in plan["changes"]]
    plan["notes"].append(f"dense_below was {before} and became {dense_below:,} by calibration on {search.machine}")
    data["overrides"].append(f"sparse_prefill.dense_below={dense_below}")
    if dense_below < max(search.before):
        data["evaluation"] = None
        data["gate"] = {"status": "not run", "limits": data["gate"]["limits"]}
    elif scored:
        plan["notes"].append(f"the scores are of dense_below {before}: this model reads more than that")
