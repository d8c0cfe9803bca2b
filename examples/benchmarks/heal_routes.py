"""The ways to heal, compared: how much of the damage to a converted model does each undo in the same time?

    python examples/benchmarks/heal_routes.py START BASE --data FILE --minutes 40 --out routes.json \\
        [--texts builtin FILE]

START is a folder that `surgery apply` wrote from BASE. Each route trains START for the same minutes (or `--steps`) on
the same text, and the result is scored on held-out texts. During the training, a little of the built-in held-out text
is scored. With `--data self`, the base writes `--write` tokens of text once, for all routes.
The curves, nats against minutes and against tokens, are drawn next to `--out`. `--out` holds the finished routes, and
the same command resumes. In "layers first", each layer's attention is first fitted to the base's on `--first` tokens
(K and V, among the parameters that train); then `lora` follows. In "layers first, full", `full` follows. The time of
the fit is not part of the minutes; "in all" includes it.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from measured import Measured

import surgery
from surgery.config.heal import Heal
from surgery.data.generated import sample
from surgery.data.text import begin_of_text
from surgery.io.hub import resolve
from surgery.io.loading import load_model, read_tokenizer
from surgery.report.plots import Line, Panel, curves

ROUTES = {
    "ce": {"method": "full", "loss": "ce"},
    "full": {"method": "full", "loss": "distill"},
    "both": {"method": "full", "loss": "both"},
    "lora": {"method": "lora", "loss": "distill"},
    "parts": {"method": "parts", "loss": "distill"},
    "layers first": {"method": "lora", "loss": "distill"},
    "layers first, full": {"method": "full", "loss": "distill"},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("start", type=Path)
parser.add_argument("base")
parser.add_argument("--data", default="builtin", help="text to train on: builtin (its calibration part), self, a file")
parser.add_argument("--routes", nargs="+", choices=list(ROUTES), default=list(ROUTES))
parser.add_argument("--minutes", type=float, default=40.0, help="of each route")
parser.add_argument("--steps", type=int, help="of each route, in place of --minutes")
parser.add_argument("--write", type=int, default=131072, help="tokens of text that the base writes for --data self")
parser.add_argument("--batch-tokens", type=int, default=2048)
parser.add_argument("--rate", type=float, help="highest learning rate, in place of each method's")
parser.add_argument("--first", type=int, default=16384, help="layers first: tokens")
parser.add_argument("--every", type=int, default=8, help="steps between two points of a curve")
parser.add_argument("--texts", nargs="+", default=["builtin"], help="held-out texts: builtin, files")
parser.add_argument("--windows", type=int, default=8)
parser.add_argument("--out", type=Path, required=True)


def score(folder, options) -> list[float]:
    """Nats a token on each held-out text."""
    found = (surgery.evaluate(folder, options.base, text=text, windows=options.windows) for text in options.texts)
    return [one.out.cross_entropy for one in found]


def written(options) -> Path:
    """Write text of the base to a file next to `--out`; its batches are kept in a folder, so that a run can resume."""
    folder, file = resolve(options.base).path, options.out.with_name(f"{options.out.stem}-text.jsonl")
    tokenizer, model = read_tokenizer(folder), load_model(folder, dtype=torch.float32).eval()
    documents = sample(model, tokenizer, Heal(steps=1), options.write, folder=file.with_suffix(""), progress=said)
    begin = len(begin_of_text(tokenizer))  # which the tokenizer puts before each text
    texts = tokenizer.batch_decode([document[begin:] for document in documents])
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def said(done: int, total: int, label: str) -> None:
    print(f"{label}: {done:,} of {total:,}", file=sys.stderr)


def run(route: str, data: str, options) -> dict:
    """Train a route and return its scores and its curve."""
    folder = options.out.with_name(f"{options.out.stem}-{route.replace(',', '').replace(' ', '-')}")
    budget = {"steps": options.steps} if options.steps else {"minutes": options.minutes}
    asked = ROUTES[route] | budget | {"data": data, "batch_tokens": options.batch_tokens}
    asked |= {"learning_rate": options.rate, "eval_every": options.every, "checkpoint_every": 0}
    asked |= {"warm_start": options.first} if route.startswith("layers first") else {}
    report = surgery.heal(
        options.start, options.base, output=folder, settings=asked, check=False, evaluate=False, overwrite=True
    )
    lines = map(json.loads, (folder / "healing" / "metrics.jsonl").read_text().splitlines())
    curve = [[line["tokens"], line["seconds"], line["held_out_loss"]] for line in lines if "held_out_loss" in line]
    facts = report.data["heal"]
    times = {"minutes": facts["minutes"], "in_all": facts["wall_seconds"] / 60}  # with the layer-wise start
    return {"scores": score(folder, options), "tokens": facts["tokens"], "curve": curve} | times


def main() -> None:
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "routes")}
    measured = Measured(options.out, settings)
    base, start = (measured.once(name, partial(score, getattr(options, name), options)) for name in ("base", "start"))
    print(f"| route | tokens | minutes | in all | {' | '.join(options.texts)} | won back |")
    print("| --- | ---: | ---: | ---: |" + " ---: |" * (len(options.texts) + 1))
    print(f"| base | | | | {' | '.join(f'{x:.3f}' for x in base)} | |")
    print(f"| start | | | | {' | '.join(f'{x:.3f}' for x in start)} | 0% |", flush=True)
    data = str(written(options)) if options.data == "self" else options.data
    for route in options.routes:
        found = measured.once(route, partial(run, route, data, options))
        sides = zip(base, start, found["scores"], strict=True)
        won = ", ".join(f"{(bad - now) / (bad - good):.0%}" for good, bad, now in sides)
        scores = " | ".join(f"{x:.3f}" for x in found["scores"])
        took = f"{found['minutes']:.1f} | {found['in_all']:.1f}"
        print(f"| {route} | {found['tokens']:,} | {took} | {scores} | {won} |", flush=True)
    for name, column, unit in (("minutes", 1, 60.0), ("tokens", 0, 1.0)):
        lines = {
            route: Line([point[column] / unit for point in found["curve"]], [point[2] for point in found["curve"]])
            for route in ROUTES
            if (found := measured.get(route)) and found["curve"]
        }
        picture = options.out.with_name(f"{options.out.stem}-{name}.png")
        panel = Panel(lines, "cross-entropy on held-out text, nats per token")
        curves(picture, panel, x_label=f"{name} of training", title="what each way to heal reaches")


if __name__ == "__main__":
    main()
