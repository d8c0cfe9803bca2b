"""Every recipe of `surgery ls` on one model, each with the smallest settings that make sense: run, or refused and why.

    python examples/benchmarks/every_recipe.py MODEL --out rows.json [--minutes 5] [--results NAME --machine TEXT]

A recipe that fits is applied in a process of its own, which `--minutes` end. The result is scored on held-out text
and removed. Calibration and training are far shorter than a recipe asks for, so that the figures say whether a recipe
works on this model, not how well it could do. `--out` holds what was measured so far, and the same command resumes.
`--results NAME` writes the rows to results/NAME.json, from which tables.py makes a table.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from measured import Measured
from results import FOLDER

import surgery
from surgery.conversion.fit import anatomy_of, fitting_recipes
from surgery.errors import CheckError, SurgeryError

HEAD_SCORES = ("duo_attention.calibration_samples=2", "duo_attention.calibration_length=768")
SINKS = ("sink_calibration.calibration_samples=8", "sink_calibration.calibration_length=512")
GATES = ("calibration_samples=4", "calibration_length=256")
HEALS = ("heal.data=builtin", "heal.steps=2")  # and the shortest step: a row of `heal.length`
SHORT = ("heal.length=256", "heal.batch_tokens=256")
SMALL: dict[str, tuple[str, ...]] = {
    "duo-attention": HEAD_SCORES,
    "duo-with-sinks": HEAD_SCORES + SINKS,
    "duo-heal": (*HEAD_SCORES, *HEALS, "heal.batch_tokens=1024"),
    "duo-after-gqa": HEAD_SCORES,
    "sparse-duo": HEAD_SCORES,
    "learned-sinks": SINKS,
    "learned-sinks-heal": (*SINKS, *HEALS, "heal.batch_tokens=1024"),
    "act": ("calibration_samples=8", "calibration_length=256"),
    "zero-tuning": ("calibration_samples=8", "calibration_length=256"),
    "minference": ("calibration_samples=1", "calibration_length=2048"),
    "moba-heal": (*HEALS, "heal.batch_tokens=2048"),
    "mae": GATES,
    "moh": GATES,
    "mae-heal": (*GATES, *HEALS, *SHORT),
    "moh-heal": (*GATES, *HEALS, *SHORT),
    "gqa-distill": (*HEALS, *SHORT),
    "gqa-uptrain": (*HEALS, *SHORT),
    "evict-duo": ("kv_evict.calibration_samples=2", "kv_evict.calibration_length=768"),
    "loki": ("calibration_samples=4",),
    "mla-heal": (*HEALS, *SHORT),
    "hybrid-swa-heal": (*HEALS, "heal.batch_tokens=2048"),
}  # fmt: skip
CHEAPEST_FIRST = (
    *("expand-kv", "mqa", "streaming", "sparse-prefill", "xattention", "flexprefill", "streaming-delta", "moba"),
    *("mae", "moh", "duo-attention", "duo-after-gqa", "sparse-duo", "minference", "act", "zero-tuning"),
    *("learned-sinks", "duo-with-sinks", "gqa-uptrain"),
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a model folder, or smollm2-135m")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--minutes", type=float, default=5.0, help="the most for each recipe; 0: plans alone")
parser.add_argument("--windows", type=int, default=1, help="held-out windows")
parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
parser.add_argument("--check", action="store_true", help="check each result as `surgery apply` does")
parser.add_argument("--only", nargs="+", default=[], help="these recipes")
parser.add_argument("--results", help="write results/NAME.json")
parser.add_argument("--machine", default="a machine that was not named", help="for the results file")
parser.add_argument("--one", help=argparse.SUPPRESS)  # the child process: a recipe


def score(model: str, options) -> float:
    """Cross-entropy of a model on held-out text, in nats a token."""
    return surgery.evaluate(model, windows=options.windows, length=options.length).out.cross_entropy


def apply(recipe: str, options) -> dict[str, Any]:
    """Apply one recipe, score the result and throw it away."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        settings = {"check": options.check, "evaluate": False, "gate": False}
        try:
            surgery.apply(recipe, options.model, output=out, overrides=SMALL.get(recipe, ()), **settings)
        except CheckError as error:
            return {"outcome": "failed", "reason": error.what}
        except SurgeryError as error:
            return {"outcome": "refused", "reason": error.what}
        loss = score(str(out), options)
    return {"outcome": "run", "loss": loss, "seconds": round(time.monotonic() - began, 1)}


def planned(recipe: str, options) -> dict[str, Any]:
    """Whether a recipe fits the model, and what it would change."""
    if reasons := fitting_recipes(anatomy_of(options.model))[recipe]:
        return {"outcome": "refused", "reason": "; ".join(reasons)}
    try:
        plan = surgery.plan(recipe, options.model, overrides=SMALL.get(recipe, ()))
    except SurgeryError as error:
        return {"outcome": "refused", "reason": error.what}
    summary = plan.summary()
    found = {"outcome": "not run", "reason": "it fits", "changes": list(plan.changes), "tier": plan.tier}
    return found | {key: summary[key] for key in ("kv_bytes_per_token", "kv_bytes_fixed")}


def outcome(recipe: str, options) -> dict[str, Any]:
    """What came of a recipe, which is applied in a process of its own if it fits."""
    found = planned(recipe, options)
    if found["outcome"] == "refused":
        return found
    command = [sys.executable, __file__, options.model, "--out", str(options.out), "--one", recipe]
    command += ["--windows", str(options.windows), "--length", str(options.length), *["--check"] * options.check]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * options.minutes, check=False)
    except subprocess.TimeoutExpired:
        return found | {"outcome": "stopped", "reason": f"after {options.minutes:g} minutes"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return found | {"outcome": "failed", "reason": said[-1]}
    return found | json.loads(done.stdout.splitlines()[-1])


def rows(measured: Measured, recipes: list[str], options) -> list[list[Any]]:
    """The rows of the table; a recipe that was not run has what its plan says."""
    made = []
    for recipe in recipes:
        found = measured.get(recipe) or planned(recipe, options)
        cache = [found.get(key) for key in ("kv_bytes_per_token", "kv_bytes_fixed")]
        growth, fixed = [f"{each['before']:,} → {each['after']:,}" if each else "" for each in cache]
        loss = f"{math.exp(measured['base']):.2f} → {math.exp(found['loss']):.2f}" if "loss" in found else ""
        ended = found["outcome"] if found["outcome"] == "run" else f"{found['outcome']}: {found['reason']}"
        made.append([f"`{recipe}`", ended, growth, fixed, loss])
    return made


def write_results(measured: Measured, recipes: list[str], options) -> None:
    """Write results/NAME.json."""
    command = f"python examples/benchmarks/every_recipe.py {Path(options.model).name} --out rows.json"
    command += f" --windows {options.windows} --length {options.length} --minutes {options.minutes:g}"
    command += " --check" * options.check + f" --results {options.results}"
    columns = [
        "recipe",
        {"name": "outcome", "align": "left"},
        "KV bytes a token",
        "KV bytes that do not grow",
        "perplexity",
    ]
    content = {
        "command": command,
        "machine": options.machine,
        "columns": columns,
        "rows": rows(measured, recipes, options),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (FOLDER / f"{options.results}.json").write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    options = parser.parse_args()
    if options.one:
        print(json.dumps(apply(options.one, options)))
        return
    known = list(fitting_recipes(anatomy_of(options.model)))
    ordered = [name for name in CHEAPEST_FIRST if name in known]
    ordered += [name for name in known if name not in ordered]
    chosen = [name for name in ordered if name in (options.only or known)]
    settings = {name: getattr(options, name) for name in ("windows", "length", "check")}
    measured = Measured(options.out, settings | {"model": Path(options.model).name})
    if options.minutes:
        base = measured.once("base", partial(score, options.model, options))
        print(
            f"{options.model}: perplexity {math.exp(base):.2f}, {options.windows} windows of {options.length} tokens"
        )
    for recipe in chosen if options.minutes else ():
        if measured.get(recipe, {}).get("outcome") in ("stopped", "failed"):  # another try may go well
            del measured[recipe]
        found = measured.once(recipe, partial(outcome, recipe, options))
        print(recipe, json.dumps(found, ensure_ascii=False), flush=True)
    if options.results:
        write_results(measured, ordered, options)


if __name__ == "__main__":
    main()
