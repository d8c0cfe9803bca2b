"""What calibrated sinks cost and gain: cross-entropy and multiple choice for every method, compared with the base.

    python examples/benchmarks/sinks_table.py [MODEL] --out table.json

First table: heads see everything, and the weight of the first token (zero_tuning) or of other sinks (act) is changed.
Second table: every head sees a window. The window has no sinks, real sinks, or virtual keys that are fitted to the
first token and replace it: a logit and a value (learned), or a key and a value (kv_bias). Keys and values are per KV
head, logits per query head. "won back": the window alone has a higher loss than full attention, and a row undoes this
share of the difference. "new first token": the same, on windows whose first token begins no text of the fit.

The fit uses the calibration part of the built-in text. All figures are on its held-out part. Passages of the second
table's questions are longer than the window, because otherwise the first token would still be seen. A row is printed
as soon as it is measured. `--out` holds what was measured so far, and the same command resumes.
"""

import argparse
import math
from pathlib import Path

import torch
from measured import Measured

import surgery
from surgery.calibration.scoring import ask, score_window
from surgery.data.questions import make_choices
from surgery.data.text import load_text, windows
from surgery.evaluation.paired import wilson
from surgery.io.hub import resolve
from surgery.io.loading import read_tokenizer
from surgery.operations.sink_calibration.operation import SinkCalibration

REFERENCES = ("base", "full attention", "window")  # rows that others are compared with

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="smollm2-135m")
parser.add_argument("--rows", nargs="+", help="these rows, and those that they are compared with")
parser.add_argument("--window", type=int, default=256)
parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 8192], help="tokens in a window that is scored")
parser.add_argument("--windows", nargs="+", type=int, default=[8, 1], help="their number, for each length")
parser.add_argument("--items", type=int, default=320, help="questions of each table; 0: none")
parser.add_argument("--contexts", nargs=2, type=int, default=[72, 304], help="tokens of their passages, each table")
parser.add_argument("--samples", type=int, default=16, help="calibration texts; every second one is held back")
parser.add_argument("--search-length", type=int, default=256, help="tokens in each where gammas are searched")
parser.add_argument("--fit-length", type=int, default=512, help="tokens in each where virtual keys are fitted")
parser.add_argument("--out", type=Path, required=True)


def recipes(options) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """Row -> operations, for both tables; the other rows of a table are compared with its first one."""
    search = {"op": "sink_calibration", "calibration_samples": options.samples}
    fit = search | {"calibration_length": options.fit_length}
    search |= {"calibration_length": options.search_length}
    tuned = search | {"method": "zero_tuning"}
    whole = {
        "base": [],
        "zero_tuning, one gamma": [tuned | {"groups": "uniform", "grid": [0.5, 0.7, 0.85, 1.1, 1.25, 1.5, 2.0]}],
        "zero_tuning, per head": [tuned | {"groups": "heads"}],
    }
    if "act" in SinkCalibration.METHODS:
        whole["act"] = [search | {"method": "act", "layers": None}]
    else:
        print("act: sink_calibration has no such method in this version, no row")

    def split(sinks: int) -> dict:
        return {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": sinks, "window": options.window}

    return whole, {
        "full attention": [],
        "window": [split(0)],
        "window, 4 sinks": [split(4)],
        "window, learned": [split(0), fit | {"method": "learned"}],
        "window, kv_bias": [split(0), fit | {"method": "kv_bias"}],
    }


def measure(row: dict, steps: list[dict], folder: Path, tokenizer, pieces: dict, questions: list, key: str) -> None:
    """Measure what a row lacks: mean loss of every window by length, hits by `key`, records of the operations."""
    lacking = [length for length in pieces if str(length) not in row["losses"]]
    if not lacking and (not questions or key in row["right"]):
        return
    model = surgery.load(folder, dtype=torch.float32).eval()
    if steps:
        recipe = {"version": 1, "name": "row", "operations": steps, "evaluate": None}
        record = surgery.apply(recipe, model, tokenizer=tokenizer).data["operations"][-1]["record"]
        names = ("kept", "held_back_change", "standard_error")
        row["record"] = {name: record[name] for name in names if name in record}
    for length in lacking:
        losses = [score_window(model, piece, None, 1)["loss"].mean().item() for piece in pieces[length]]
        row["losses"][str(length)] = losses
    if questions and key not in row["right"]:
        row["right"][key] = [each.right for each in ask(model, questions)]


def mean(numbers) -> float:
    return math.fsum(numbers) / len(numbers)


def won_back(row: dict, known: dict[str, dict], length: str, chosen: list[int]) -> str:
    """The share of the window's extra loss that a row undoes, on chosen windows; "" where none can be compared."""
    if not chosen or "window" not in known:
        return ""
    rows = (known["full attention"], known["window"], row)
    best, worst, this = (mean([of["losses"][length][i] for i in chosen]) for of in rows)
    return f"{(worst - this) / (worst - best):.1%}"


def line(name: str, known: dict[str, dict], streaming: bool, new: dict[str, list[int]], key: str) -> str:
    """A row of a table; its answers are compared with those of the first row of `known`."""
    row, first, cells = known[name], next(iter(known.values())), [name]
    for length in new:
        losses = row["losses"][length]
        cells.append(f"{mean(losses):.4f}")
        if streaming:
            cells += [won_back(row, known, length, chosen) for chosen in (range(len(losses)), new[length])]
    if right := row["right"].get(key):
        low, high = wilson(sum(right), len(right))
        pairs = list(zip(first["right"][key], right, strict=True))
        cells.append(f"{mean(right):.1%} ({low:.1%} to {high:.1%})")
        cells.append(f"{pairs.count((True, False))} / {pairs.count((False, True))}")
    record = row["record"]
    verdict = {True: "kept", False: "not kept", None: ""}[record.get("kept")]
    if "held_back_change" in record:
        verdict += f", {record['held_back_change']:+.4f} ± {record['standard_error']:.4f}"
    return f"| {' | '.join([*cells, verdict])} |"


def main() -> None:
    options = parser.parse_args()
    folder = resolve(options.model).path
    tokenizer, tables = read_tokenizer(folder), recipes(options)
    names = ("model", "window", "lengths", "windows", "samples", "search_length", "fit_length")
    settings = {name: getattr(options, name) for name in names}
    measured = Measured(options.out, settings)
    held, fit = (load_text("builtin", part) for part in ("held-out", "calibration"))
    print(f"{options.model}, {held.title}, sha256 {held.sha256[:12]}")
    begun = set(windows(fit, tokenizer, options.fit_length, options.samples)[::2, 0].tolist())
    for streaming, (table, context) in enumerate(zip(tables, options.contexts, strict=True)):
        wanted = set(options.rows or table) & set(table)
        asked = {name: steps for name, steps in table.items() if wanted and name in wanted | set(REFERENCES)}
        if not asked:
            continue
        sizes = list(zip(options.lengths, options.windows, strict=True))[: None if streaming else 1]
        pieces = {length: windows(held, tokenizer, length, count) for length, count in sizes}
        new = {str(n): [i for i, row in enumerate(rows) if int(row[0]) not in begun] for n, rows in pieces.items()}
        key = f"{options.items} x {context}"
        questions = make_choices(tokenizer, items=options.items, context=context, text=held) if options.items else []
        heads = [f"loss, {n:,} tokens" + " | won back | new first token" * streaming for n in pieces]
        heads += ["right", "lost / gained"] * bool(questions) + ["on text held back"]
        titles = f"| | {' | '.join(heads)} |"
        print(f"\n{titles}\n|{' --- |' * (titles.count('|') - 1)}")
        known: dict[str, dict] = {}
        for name, steps in asked.items():
            known[name] = measured.setdefault(name, {"record": {}, "losses": {}, "right": {}})
            measure(known[name], steps, folder, tokenizer, pieces, questions, key)
            measured.keep()
            print(line(name, known, bool(streaming), new, key), flush=True)


if __name__ == "__main__":
    main()
