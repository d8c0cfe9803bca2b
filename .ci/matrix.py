#!/usr/bin/env python
"""Convert a tiny model of every family with every shipped recipe, and print what came of each pair.

    python .ci/matrix.py [--families NAME ...] [--recipes NAME ...]

A pair is converted into a folder, checked in a fresh process, and scored. If all passed, it is "done". A pair is
"refused" where it ends in one error with exit code 2 and writes nothing. All else is a "FAULT". The script prints each
fault with its error, each reason for a refusal with its number of pairs, and the totals. It ends with 1 if there was a
fault. The recipes' settings are lowered to what a tiny model and a few minutes allow. Gates are not judged.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
VOCABULARY, POSITIONS = 258, 1024
SMALLER = {  # field of an operation -> value, where it has this field
    "calibration_samples": 4, "calibration_length": 256, "samples": 4, "steps": 2, "window": 32, "dense_below": 64,
    "min_budget": 64,
}  # fmt: skip
OF_RECIPE = {
    "minference": {"calibration_length": 1024, "block": 16},  # a shorter text has no cheap pattern
    "moba-heal": {
        "last_layers_full": 1,
        "block": 16,
        "top": 2,
        "dense_below": 0,
    },  # of two layers, and for rows of 64 tokens
}
HEAL = {"tokens": 2048, "batch_tokens": 512, "length": 64, "minutes": None, "data": "builtin"}
EVALUATE = {"text": "builtin", "windows": 1, "length": 64}


def smaller(recipe: dict) -> dict:
    """A recipe with the settings of SMALLER, HEAL and EVALUATE where it has such fields."""
    from surgery import operations

    steps = []
    for step in recipe["operations"]:
        known = operations.find(step["op"]).model_validate(step)
        fields = {name: value for name, value in SMALLER.items() if isinstance(getattr(known, name, None), int)}
        steps.append(step | fields | OF_RECIPE.get(recipe["name"], {}))
    heal = recipe.get("heal")
    return recipe | {"operations": steps, "heal": heal and heal | HEAL, "evaluate": EVALUATE}


def outcome(recipe: dict, base: Path, out: Path) -> tuple[str, str]:
    """("done", items of the check that were not run), ("refused", reason) or ("FAULT", what happened)."""
    import surgery
    from surgery.errors import SurgeryError

    try:
        report = surgery.apply(recipe, str(base), output=out, gate=False)
    except SurgeryError as error:
        if error.exit_code == 2 and not any(out.parent.glob("out*")):
            return "refused", str(error.what)
        return "FAULT", f"exit code {error.exit_code}: {error}"
    except Exception:
        return "FAULT", traceback.format_exc(limit=-3)
    items, scores = report.data["check"]["items"], report.data["evaluation"]["status"]
    left_out = [item["name"] for item in items if item["status"] == "not run"]
    if not report.passed or scores != "done":
        failed = [item["name"] for item in items if item["status"] == "failed"]
        return "FAULT", f"check: {', '.join(failed) or 'passed'}; scores: {scores}"
    return "done", ", ".join(left_out)


def main() -> int:
    import torch
    from families import TINY
    from tokenizers_of_bytes import byte_tokenizer
    from warm_process import WarmPython

    from surgery.config import recipe as recipes
    from surgery.evaluation import check

    torch.set_num_threads(1)  # tiny products wait for each other's threads
    check.subprocess = WarmPython()  # a fork of a process that has imported torch, for each check
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    parser.add_argument("--families", nargs="+", choices=list(TINY), default=list(TINY), metavar="NAME")
    parser.add_argument("--recipes", nargs="+", choices=names, default=names, metavar="NAME")
    options = parser.parse_args()
    counts, reasons, left_out, began = Counter(), Counter(), Counter(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for family in options.families:
            folder = Path(scratch, family)
            model = TINY[family](vocab_size=VOCABULARY, **positions(family))
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            row = Counter()
            for name in options.recipes:
                out = Path(scratch, "out")
                kind, why = outcome(smaller(recipes.load(name).to_dict()), folder, out)
                row[kind] += 1
                if kind == "refused":
                    reasons[why] += 1
                elif kind == "done" and why:
                    left_out[why] += 1
                elif kind == "FAULT":
                    print(f"{family}, {name}: {why}", flush=True)
                for left in Path(scratch).glob("out*"):
                    shutil.rmtree(left)
            counts += row
            print(f"{family:<22}{row['done']:>4} done{row['refused']:>4} refused{row['FAULT']:>4} FAULT", flush=True)
    print("\nrefused because:")
    for reason, number in reasons.most_common():
        print(f"{number:>4}  {reason}")
    for items, number in left_out.items():
        print(f"{number} pairs done without these items of the check, which do not apply: {items}")
    pairs = sum(counts.values())
    print(f"\n{pairs} pairs: {counts['done']} done, {counts['refused']} refused, {counts['FAULT']} FAULT", end=" ")
    print(f"({(time.monotonic() - began) / 60:.0f} min)")
    return bool(counts["FAULT"])


def positions(family: str) -> dict[str, int]:
    """The field with which a family's config bounds positions."""
    if family in ("gpt2", "gptj"):
        return {"n_positions": POSITIONS}
    if family in ("bloom", "mpt", "gemma3_image_text"):
        return {"max_seq_len": POSITIONS} if family == "mpt" else {}
    return {"max_position_embeddings": POSITIONS}


if __name__ == "__main__":
    sys.exit(main())
