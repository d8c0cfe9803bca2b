"""Convert and measure tiny models on the CPU and on a second device: `python on_second_device.py [NAME...]`.

Without an option: the conversion of a loaded model, JSON on stdout. For each operation: the largest difference of a
weight to the one converted on the CPU, as a share of the weights' size; the devices on which weights lie; the share of
the multiply-adds that ran on the second device, and those that did not, by operation; the most bytes alive there. With
`--router-on-cpu` the regression of `moh` is computed on the CPU, which must be seen.

With `--verbs`: `surgery apply --device second` of each operation, and the verbs that measure on its result; then what
measures a base. The same figures, with the difference to those of the CPU. `--table` prints them as a table.

With `--streamed`: the same conversions on a device with a tenth less memory than the model needs, beside the device
that has enough; and the bytes that `surgery plan` says. With `--eight-b` besides, the model is eight layers of the
shape of Llama 3.1 8B, the operations are those of `EIGHT_B` (or some of them by name), the device has a tenth less
memory than the weights take, and there is no device that has enough (half an hour and 18 GB of memory).

With `--spread`: what is done with a model that is spread over two devices that are too small for it, in two runs.
`--spread passes`, under SECOND_DEVICE_COUNT=2, has what reads texts. `--spread gradients` has what needs gradients;
there the CPU takes the place of the other device, since PyTorch's back-ends in Python have gradients on one device.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from second_device import NAME, UNLIMITED, Work

# isort: split
from families import build
from safetensors.torch import load_file
from tokenizers_of_bytes import byte_tokenizer

import surgery
from surgery.calibration.sinks import survey_sinks
from surgery.conversion import estimate
from surgery.evaluation.conversation import reply
from surgery.machine import placement
from surgery.machine.device import LOAD_OVERHEAD
from surgery.machine.offload import ModelSizes
from surgery.machine.placement import placed_on
from surgery.operations.head_scorers.scorers import METHODS, score_to_file

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 1024,
}  # fmt: skip
SMALL = {"calibration_samples": 4, "calibration_length": 64}
TEXT = SMALL | {"calibration_text": "builtin"}  # text that a model writes would differ: the CPU's writes in bfloat16
OPERATIONS = {
    "gqa": {"op": "gqa", "kv_heads": 1, "method": "closed_form", **TEXT},
    "mla": {"op": "mla", "rank": 20, "rope": 8, **TEXT},
    "gqa by means": {"op": "gqa", "kv_heads": 1, "method": "mean"},
    "duo_attention": {"op": "duo_attention", "streaming_ratio": 0.5, "sinks": 2, "window": 8},
    "moh": {"op": "moh", "active_ratio": 0.5, **SMALL},
    "mae": {"op": "mae", **SMALL},
    "prune_heads": {"op": "prune_heads", "granularity": "kv_group", "per_layer": 1, **TEXT},
    "prune_heads by magnitude": {
        "op": "prune_heads",
        "granularity": "kv_group",
        "per_layer": 1,
        "scores": "magnitude",
        **TEXT,
    },
    "zero_tuning": {"op": "sink_calibration", "method": "zero_tuning", **SMALL},
    "act": {"op": "sink_calibration", "method": "act", **SMALL},
    "learned": {"op": "sink_calibration", "method": "learned", "logit": -2.0},
    "sparse_prefill": {"op": "sparse_prefill", "method": "streaming", "block": 16, "dense_below": 0},
}
CHECKED = ("gqa", "duo_attention")  # `check` starts processes, which takes seconds: a native and a surgical result
HEADS = {"samples": 2, "length": 320, "sinks": 2, "window": 8}  # of `surgery score`


def recipe_of(steps: dict | list[dict]) -> dict:
    return {
        "version": 1,
        "name": "made",
        "operations": steps if isinstance(steps, list) else [steps],
        "evaluate": None,
    }


def converted(step: dict, device: str):
    """A tiny model with random weights on this device, converted in memory."""
    model = build("Llama", **SIZES).eval().to(device)
    surgery.apply(recipe_of(step), model, tokenizer=byte_tokenizer())
    return model


def difference(found: dict, expected: dict) -> float:
    """The largest difference of two sets of weights, as a share of a weight's size."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].cpu().double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-9))
        for name, tensor in expected.items()
    )


def with_products(weights: dict, head_dim: int) -> dict:
    """Weights with, of each layer, W_O V of each query head in place of W_O and V.

    The closed form of `gqa` takes V from singular vectors. Where singular values lie close together, the vectors turn
    by many times the rounding, and W_O turns back by as much.
    """
    wide = {name: tensor.cpu().double() for name, tensor in weights.items()}
    for name in [name for name in wide if name.endswith("v_proj.weight")]:
        output, values = name.replace("v_proj", "o_proj"), wide.pop(name)
        values = values.view(-1, head_dim, values.shape[1])  # [kv_heads, d, hidden]
        heads = wide[output].view(len(wide[output]), -1, head_dim)  # [hidden, heads, d]
        values = values.repeat_interleave(heads.shape[1] // len(values), 0)
        wide[output] = torch.einsum("ohd,hdi->ohi", heads, values)
    return wide


def counted(work: Work) -> dict:
    """What ran where."""
    return {
        "share": work.share,
        "on_cpu": {name: count for name, count in work.cpu.most_common() if count},
        "multiply_adds": sum(work.second.values()),
        "peak_bytes": work.peak,
    }


def compared(step: dict) -> dict:
    """What one operation does on the second device, beside the CPU."""
    expected = converted(step, "cpu").state_dict()
    with Work() as work:
        found = converted(step, NAME).state_dict()
    devices = sorted({tensor.device.type for tensor in found.values()})
    return {"difference": difference(found, expected), "devices": devices} | counted(work)


def applied(step: dict | list[dict], base: Path, out: Path, device: str) -> dict:
    """`surgery apply --device` into a folder; returns the weights that it wrote."""
    surgery.apply(recipe_of(step), str(base), output=out, check=False, device=device)
    return load_file(out / "model.safetensors")


def numbers(data: object) -> list[float]:
    """All numbers in plain data, in order."""
    if isinstance(data, dict | list | tuple):
        return [number for each in (data.values() if isinstance(data, dict) else data) for number in numbers(each)]
    return [float(data)] if isinstance(data, int | float) else []


def furthest(found: object, expected: object) -> float:
    """The largest difference of two lots of numbers, as a share of the number where that is above 1."""
    pairs = list(zip(numbers(found), numbers(expected), strict=True))
    assert pairs, "there are no numbers to compare"
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def checked(out: Path, base: Path, device: str) -> dict:
    """What `surgery check` found, without what its fresh process counted."""
    report = surgery.check(out, base, device=device)
    return {item["name"]: item["status"] == "passed" for item in report.data["check"]["items"]}


def verbs_of(out: Path, base: Path) -> dict[str, Callable[[str], object]]:
    """Verb -> a function that runs it on a device and returns what it found."""
    needles, choices = {"length": 200, "depths": 2, "samples": 1}, {"items": 4, "context": 16}
    return {
        "eval": lambda device: surgery.evaluate(out, base, windows=2, length=64, device=device).to_dict(),
        "needles": lambda device: surgery.evaluate_needles(out, base, device=device, **needles).to_dict()["cases"],
        "choices": lambda device: surgery.evaluate_choices(out, base, device=device, **choices).to_dict()["cases"],
        "check": partial(checked, out, base),
    }


def probes_of(model: Path, scratch: Path) -> dict[str, Callable[[str], object]]:
    """What measures a model that was not converted, as in `verbs_of`."""

    def scored(method: str, device: str) -> object:
        with placed_on(device):
            settings = HEADS | ({"steps": 3} if method == "gates" else {})
            return score_to_file(str(model), scratch / f"{method}-{device}.json", method, **settings).scores

    def sinks(device: str) -> object:
        with placed_on(device):
            found, _ = survey_sinks(str(model), samples=2, length=128)
        return found.to_dict()

    def tried(device: str) -> object:
        with placed_on(device):
            return [ord(letter) for letter in reply(model, "abc", most=8).text]

    def probe(name: str, device: str, **settings) -> object:
        return surgery.evaluate(model, probe=name, device=device, **settings).to_dict()["cases"]

    return {
        **{f"score {method}": partial(scored, method) for method in METHODS if method != "retrieval"},
        "inspect --sinks": sinks,
        "try": tried,
        "lookup": partial(probe, "lookup"),
        "massive": lambda device: surgery.evaluate(model, probe="massive", device=device).to_dict(),
    }


LARGER = SIZES | {"num_hidden_layers": 24, "intermediate_size": 192}
SHAPE_OF_8B = SIZES | {
    "hidden_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336,
}  # fmt: skip
EIGHT_B = {
    "moh": OPERATIONS["moh"],
    "gqa": {"op": "gqa", "kv_heads": 4, "method": "closed_form", "refit": ["q", "k", "v", "o"], **TEXT},
}


def streamed(steps: dict[str, dict], sizes: dict = LARGER, beside: bool = True) -> dict[str, dict]:
    """Operation -> what it does on a device that is too small for the model of these sizes.

    `beside`: it is done on a device with room, too, and checked.
    """
    model, found = build("Llama", **sizes).eval(), {}
    parts = ModelSizes.of(model)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = root / "base"
        model.save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        del model
        for name, step in steps.items():
            slug = name.replace(" ", "-")
            if beside:
                with Work() as whole:
                    expected = applied(step, base, root / f"{slug}-whole", NAME)
            with Work(memory=int(0.9 * (LOAD_OVERHEAD if beside else 1) * parts.whole)) as work:
                weights = applied(step, base, root / slug, NAME)
            with Work(memory=work.memory), placed_on(NAME):
                planned = surgery.plan(recipe_of(step), str(base)).estimate.device
            assert (planned.device, planned.streamed) == (f"{NAME}:0", True)
            found[name] = {"model": parts.whole, "planned": planned.memory_bytes} | counted(work)
            if beside:
                with Work(memory=parts.whole // 4), placed_on(NAME):
                    passed = surgery.check(root / slug).passed  # on the CPU, since the device has no room
                found[name] |= {
                    "evaluated": streamed_eval(root / slug, base, parts.whole),
                    "difference": difference(weights, expected),
                    "whole_peak": whole.peak,
                    "passed": passed,
                }
    return found


def streamed_eval(out: Path, base: Path, memory: int) -> dict:
    """`surgery eval` on a device that is too small for the models, beside the CPU."""

    def figures(device: str) -> object:
        return surgery.evaluate(out, base, windows=2, length=64, device=device).to_dict()

    with Work(memory=memory) as work:
        found = figures(NAME)
    return {"difference": furthest(found, figures("cpu"))} | counted(work)


READ = ("duo_attention", "moh", "act")  # results that are read on two devices
PASSES = ("score far-mass", "score ablation", "score induction", "inspect --sinks", "try")
BY_GRADIENTS = {name: OPERATIONS[name] for name in ("prune_heads", "zero_tuning", "act")}
for _text in ("builtin", "self"):  # the second step alone would be streamed
    BY_GRADIENTS[f"prune_heads and gqa on {_text}"] = [
        OPERATIONS["prune_heads"],
        OPERATIONS["gqa"] | {"kv_heads": 1, "calibration_length": 200, "calibration_text": _text},
    ]


@contextmanager
def two_devices(gradients: bool) -> Iterator[list[int]]:
    """Two devices of which none counts as large enough for a model; yields a list of how many each model is on."""
    counts, real = [], (placement.accelerators, placement._fitting, placement.free_on, placement.place_for)

    def place_for(*args, **kwargs) -> placement.Place:
        place = real[-1](*args, **kwargs)
        counts.append(len(place.devices))
        return place

    placement.place_for = estimate.place_for = place_for
    placement._fitting, placement.free_on = (lambda *_: []), (lambda _: UNLIMITED)
    if gradients:
        placement.accelerators = lambda: [torch.device(NAME, 0), torch.device("cpu")]
    try:
        yield counts
    finally:
        placement.accelerators, placement._fitting, placement.free_on, placement.place_for = real
        estimate.place_for = real[-1]


def runs_when_spread(root: Path, base: Path, gradients: bool) -> dict[str, Callable[[str], object]]:
    """What is done with a model that is spread -> a function that does it on a device, as in `verbs_of`."""
    probes = probes_of(base, root)
    if gradients:
        scores = {f"score {name}" for name, method in METHODS.items() if method.gradients}
        return {name: run for name, run in probes.items() if name in scores} | {
            name: lambda device, name=name, steps=steps: applied(
                steps, base, root / f"{name}-{device}".replace(" ", "-"), device
            )
            for name, steps in BY_GRADIENTS.items()
        }
    runs = {name: probes[name] for name in PASSES}
    for name in READ:
        applied(OPERATIONS[name], base, root / name, "cpu")
        runs |= {f"{name}: {verb}": run for verb, run in verbs_of(root / name, base).items() if verb != "check"}
    return runs


def spread(gradients: bool) -> dict[str, dict]:
    """What is done with a model that is spread over two devices -> how, and the difference to the CPU."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = root / "base"
        sizes = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4}
        head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
        build("Llama", **sizes).eval().save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        for name, run in runs_when_spread(root, base, gradients).items():
            expected, measures = run("cpu"), name in BY_GRADIENTS
            with Work() as work, two_devices(gradients) as counts:
                result = run("auto" if gradients else NAME)
            if " and gqa" in name:
                result, expected = (with_products(weights, head_dim) for weights in (result, expected))
            measure = difference if measures else furthest
            found[name] = {"devices": max(counts), "difference": measure(result, expected)} | counted(work)
            if measures:
                with two_devices(gradients):
                    found[name]["planned"] = surgery.plan(recipe_of(BY_GRADIENTS[name]), str(base)).to_dict()[
                        "estimate"
                    ]
    return found


def on_both(run: Callable[[str], object]) -> dict:
    """What a verb finds on the second device, beside the CPU. A fresh process of it counts into a file."""
    expected = run("cpu")
    counts = Path(os.environ["SECOND_DEVICE_COUNTS"])
    counts.unlink(missing_ok=True)
    with Work() as work:
        found = run(NAME)
    if counts.is_file():  # of the fresh process of `check`
        for line in counts.read_text().splitlines():
            inside = json.loads(line)
            work.second["fresh process"] += inside["second"]
            work.cpu["fresh process"] += inside["cpu"]
            work.peak = max(work.peak, inside["peak"])
    return {"difference": furthest(found, expected)} | counted(work)


def verbs(names: list[str]) -> dict[str, dict]:
    """Operation -> verb -> what it does on the second device, beside the CPU; "base" -> what measures a base."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        in_fresh_processes(root)
        base = root / "base"
        build("Llama", **SIZES).eval().save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        found = {}
        for name in names:
            slug = name.replace(" ", "-")
            expected = applied(OPERATIONS[name], base, root / f"{slug}-cpu", "cpu")
            with Work() as work:
                weights = applied(OPERATIONS[name], base, root / slug, NAME)
            planned = surgery.plan(recipe_of(OPERATIONS[name]), str(base), device=NAME).estimate.device
            found[name] = {"apply": {"difference": difference(weights, expected)} | counted(work)}
            found[name]["apply"]["planned"] = planned.memory_bytes if planned else 0
            of_verbs = verbs_of(root / slug, base)
            if name not in CHECKED:
                del of_verbs["check"]
            found[name] |= {verb: on_both(run) for verb, run in of_verbs.items()}
        found["base"] = {verb: on_both(run) for verb, run in probes_of(base, root).items()}
    return found


def in_fresh_processes(folder: Path) -> None:
    """Let every new Python process know the second device, and count its work into a file."""
    os.environ["SECOND_DEVICE_COUNTS"] = str(folder / "counts.jsonl")
    (folder / "sitecustomize.py").write_text(COUNTING.format(support=str(Path(__file__).parent)))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


COUNTING = """
import atexit, json, os, sys
sys.path.insert(0, {support!r})
from second_device import Work
work = Work()
work.__enter__()


def write():
    work.__exit__(None, None, None)
    total = dict(second=sum(work.second.values()), cpu=sum(work.cpu.values()), peak=work.peak)
    with open(os.environ["SECOND_DEVICE_COUNTS"], "a") as file:
        file.write(json.dumps(total) + "\\n")


atexit.register(write)
"""


def table(found: dict[str, dict]) -> str:
    """Operation x verb x share of the multiply-adds x peak bytes, as Markdown."""
    titles = "on", "verb", "multiply-adds there", "peak bytes", "difference to the CPU"
    lines = [f"| {' | '.join(titles)} |", "| --- | --- | ---: | ---: | ---: |"]
    for name, of_verbs in found.items():
        for verb, row in of_verbs.items():
            share = f"{row['share']:.2%}" if row["multiply_adds"] else "none to do"
            lines.append(f"| {name} | {verb} | {share} | {row['peak_bytes']:,} | {row['difference']:.1e} |")
    return "\n".join(lines)


def put_router_on_cpu() -> None:
    """Let the sums of `moh`'s regression be made on the CPU, as a careless `.cpu()` would."""
    from surgery.operations.moh.router import RegressionSums

    init, add = RegressionSums.__init__, RegressionSums.add
    RegressionSums.__init__ = lambda sums, inputs, outputs, device=None: init(sums, inputs, outputs)
    RegressionSums.add = lambda sums, x, y: add(sums, x.cpu(), y.cpu())


def main() -> None:
    torch.set_num_threads(1)  # `Work` counts this thread
    options = {each for each in sys.argv[1:] if each.startswith("--")}
    names = [each for each in sys.argv[1:] if each not in options]
    names = names or list(EIGHT_B if "--eight-b" in options else OPERATIONS)
    if "--router-on-cpu" in options:
        put_router_on_cpu()
    if "--spread" in options:
        json.dump(spread(names == ["gradients"]), sys.stdout)
    elif "--streamed" in options:
        eight_b = "--eight-b" in options
        known = EIGHT_B if eight_b else OPERATIONS
        steps = {name: known[name] for name in names}
        json.dump(streamed(steps, SHAPE_OF_8B if eight_b else LARGER, beside=not eight_b), sys.stdout)
    elif "--table" in options:
        print(table(verbs(names)))
    elif "--verbs" in options:
        json.dump(verbs(names), sys.stdout)
    else:
        json.dump({name: compared(OPERATIONS[name]) for name in names}, sys.stdout)


if __name__ == "__main__":
    main()
