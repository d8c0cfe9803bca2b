"""The ways to heal, compared: how much of the damage to a converted model does each undo in the same time?

    python examples/benchmarks/heal_routes.py START BASE --data FILE --minutes 40 --out routes.json \\
        [--texts builtin FILE] [--recall 0.25 --sure 0.5] [--judges]

START is a folder that `surgery apply` wrote from BASE. Each route trains START for the same minutes (or `--steps`) on
the same text, and the result is scored on held-out texts. During the training, a little of the built-in held-out text
is scored every `--every` steps. The columns "at N min" have this loss after so many minutes; with `--steps`, there are
also columns for an eighth, a quarter and half of the steps. They have the last loss that was measured up to then. The
curves, nats against minutes and against tokens, are drawn next to `--out`. With `--data self`, the base writes
`--write` tokens of text with each of `--text-seeds`, once for all routes; `--beside` names text files to train on
beside them, which must not be held-out texts, or builtin (the calibration part of the built-in text). With
`--conversations`, each route also trains on so many tokens of conversations that the base writes. `--out` holds the
finished routes. The same command resumes, a route from its last checkpoint.

In "layers first", each layer's attention is first fitted to the base's on `--first` tokens (K and V, among the
parameters that train); then `lora` follows. In "layers first, all", the fit is of all of attention. In "layers first,
full", `full` follows. The time of the fit is not part of the minutes; "in all" includes it, and is empty for a route
that was stopped. Saving a checkpoint counts.

`--recall` and `--sure` are the settings `heal.recall` and `heal.sure`; `--sure` holds for all routes but `ce`.
`--judges` adds three recall tests: needles (12 prompts of 512 and 1,024 tokens), repeats of random words, and a
look-up of names. Their columns say how many prompts are answered, of those that the base answers.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from measured import Measured

import surgery
from surgery.config.heal import Heal
from surgery.data.generated import sample
from surgery.data.text import begin_of_text, load_text
from surgery.evaluation.probes.settings import make
from surgery.evaluation.recall import reach_of
from surgery.io.hub import resolve
from surgery.io.loading import load_model, read_config, read_tokenizer
from surgery.report.plots import Line, Panel, curves

ROUTES = {
    "ce": {"method": "full", "loss": "ce"},
    "full": {"method": "full", "loss": "distill"},
    "both": {"method": "full", "loss": "both"},
    "lora": {"method": "lora", "loss": "distill"},
    "parts": {"method": "parts", "loss": "distill"},
    "layers first": {"method": "lora", "loss": "distill"},
    "layers first, all": {"method": "lora", "loss": "distill", "warm_start_of": "attention"},
    "layers first, full": {"method": "full", "loss": "distill"},
}

JUDGES = {
    "needles": {"lengths": [512, 1024], "depths": 3, "samples": 2},
    "repeats": {},
    "lookup": {},
}


def setting(text: str) -> tuple[str, object]:
    """KEY=VALUE as a setting of heal; VALUE is JSON, or a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError("write KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("start", type=Path)
parser.add_argument("base")
parser.add_argument("--data", default="builtin", help="text to train on: builtin (its calibration part), self, a file")
parser.add_argument("--routes", nargs="+", choices=list(ROUTES), default=list(ROUTES))
parser.add_argument("--minutes", type=float, default=40.0, help="of each route")
parser.add_argument("--steps", type=int, help="of each route, in place of --minutes")
parser.add_argument("--write", type=int, default=131072, help="tokens of text that the base writes for --data self")
parser.add_argument("--text-seeds", nargs="+", type=int, default=[0], help="so many tokens are written with each")
parser.add_argument("--beside", nargs="+", default=[], help="builtin or text files that --data self also trains on")
parser.add_argument("--conversations", type=int, help="so many tokens of the base's conversations beside the data")
parser.add_argument("--batch-tokens", type=int, default=2048)
parser.add_argument("--rate", type=float, help="highest learning rate, in place of each method's")
parser.add_argument("--first", type=int, default=16384, help="layers first: tokens")
parser.add_argument("--every", type=int, default=8, help="steps between two points of a curve")
parser.add_argument("--points", nargs="*", type=float, default=[5, 10, 20, 40], help="minutes of the columns of loss")
parser.add_argument("--recall", type=float, default=0.0, help="share of the rows in which something comes back")
parser.add_argument("--sure", type=float, default=0.0, help="how much less a token counts of which the base is unsure")
parser.add_argument("--row", type=int, default=512, help="tokens of a row")
parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="every route is trained with each")
parser.add_argument(
    "--also", nargs="*", default=[], metavar="KEY=VALUE", type=setting, help="more settings of every route: hidden=1.0"
)
parser.add_argument("--judges", action="store_true", help="also ask needles, repeats and look-ups")
parser.add_argument("--texts", nargs="+", default=["builtin"], help="held-out texts: builtin, files")
parser.add_argument("--windows", type=int, default=8)
parser.add_argument("--out", type=Path, required=True)


def score(folder, options) -> dict:
    """Nats a token on each text; of each judge which prompts are answered, and nats a token of the answers."""
    texts = (surgery.evaluate(folder, options.base, text=text, windows=options.windows) for text in options.texts)
    scores: dict = {"losses": [one.out.cross_entropy for one in texts], "judges": {}}
    reach = reach_of(read_config(options.start))  # what START's streaming heads see proves nothing
    for name, settings in JUDGES.items() if options.judges else ():
        result = make(name, settings).measure(resolve(str(folder)).path)
        if result.status != "done":
            raise SystemExit(f"{name} was not run: {result.reason}")
        rows = list(zip(result.cases, result.outcomes["out"], strict=True))
        hits = [outcome.hit for needle, outcome in rows if reach is None or needle.outside(*reach)]
        scores["judges"][name] = [hits, statistics.mean(outcome.nll for _, outcome in rows)]
    return scores


def written(options) -> Path:
    """Write text of the base to a file next to `--out`; its batches are kept in folders, so that a run can resume."""
    folder, file = resolve(options.base).path, options.out.with_name(f"{options.out.stem}-text.jsonl")
    tokenizer, model = read_tokenizer(folder), load_model(folder, dtype=torch.float32).eval()
    documents = []
    for seed in options.text_seeds:
        batches = file.with_name(f"{file.stem}{f'-{seed}' if seed else ''}")
        documents += sample(model, tokenizer, Heal(steps=1, seed=seed), options.write, folder=batches, progress=said)
    begin = len(begin_of_text(tokenizer))  # which the tokenizer puts before each text
    texts = tokenizer.batch_decode([document[begin:] for document in documents])
    texts += [load_text(name, "calibration").text for name in options.beside]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def said(done: int, total: int, label: str) -> None:
    print(f"{label}: {done:,} of {total:,}", file=sys.stderr)


def run(route: str, seed: int, data: str, options) -> dict:
    """Train a route and return its scores and its curve."""
    name = f"{options.out.stem}-{route.replace(',', '').replace(' ', '-')}{f'-{seed}' if seed else ''}"
    folder = options.out.with_name(name)
    begun = folder.is_dir() or folder.with_name(f"{name}.partial").is_dir()
    budget = {"steps": options.steps} if options.steps else {"minutes": options.minutes}
    asked = ROUTES[route] | budget | {"data": data, "batch_tokens": options.batch_tokens, "seed": seed}
    asked |= {"recall": options.recall, "length": options.row}
    if options.conversations:
        asked |= {"data": [data, "conversations"], "self_tokens": options.conversations}
    asked |= {"sure": options.sure} if ROUTES[route]["loss"] != "ce" else {}
    asked |= {"learning_rate": options.rate, "eval_every": options.every}
    asked |= {"warm_start": options.first} if route.startswith("layers first") else {}
    if fixed := [key for key, _ in options.also if key in asked]:
        raise SystemExit(f"--also {fixed[0]}: this is set by the route or by an option of its own")
    asked |= dict(options.also)
    where = {"output": folder, "resume": begun, "check": False, "evaluate": False}
    try:
        report = surgery.heal(options.start, options.base, settings=asked, **where)
    except surgery.SurgeryError as error:
        old = f"\n{folder}, or its .partial, is of an earlier run: remove it if its settings were others"
        raise SystemExit(f"{error}{old * begun}") from None
    lines = map(json.loads, (folder / "healing" / "metrics.jsonl").read_text().splitlines())
    curve = [[line["tokens"], line["seconds"], line["held_out_loss"]] for line in lines if "held_out_loss" in line]
    facts = report.data["heal"]
    whole = None if facts["resumed"] else facts["wall_seconds"] / 60  # with the layer-wise start
    times = {"minutes": facts["minutes"], "in_all": whole}
    return {"scores": score(folder, options), "tokens": facts["tokens"], "curve": curve} | times


def columns_over_time(options) -> dict[str, tuple[int, float]]:
    """Title -> (which number of a curve's points, and up to which value of it the last loss is taken)."""
    wanted = [minutes for minutes in options.points if options.steps or minutes <= options.minutes]
    columns = {f"at {minutes:g} min": (1, 60 * minutes) for minutes in wanted}
    if options.steps:
        tokens = options.batch_tokens // options.row * options.row  # of a step, in whole rows
        columns |= {f"at step {step}": (0, step * tokens) for step in (options.steps // part for part in (8, 4, 2))}
    return columns


def at(curve: list, column: int, most: float) -> str:
    """The last loss of a curve that was measured up to then, for a cell."""
    return next((f"{point[2]:.3f}" for point in reversed(curve) if point[column] <= most), "")


def cells(scores: dict, base: dict) -> list[str]:
    """The columns of the texts and the judges."""
    row = [f"{loss:.3f}" for loss in scores["losses"]]
    for name, (hits, nll) in scores["judges"].items():
        known = base["judges"][name][0]
        row.append(f"{sum(map(min, hits, known))} of {sum(known)} ({nll:.2f})")
    return row


def main() -> None:
    options = parser.parse_args()
    beside, judged_texts = ({Path(name).resolve() for name in names} for names in (options.beside, options.texts))
    if judged := beside & judged_texts - {Path("builtin").resolve()}:  # whose parts are different texts
        parser.error(f"{judged.pop()} is a held-out text: do not train on it")
    if options.beside and options.data != "self":
        parser.error("--beside is for --data self; a folder as --data may hold several texts")
    settings = {
        name: value for name, value in vars(options).items() if name not in ("out", "routes", "seeds", "points")
    }
    measured = Measured(options.out, settings)
    base, start = (measured.once(name, partial(score, getattr(options, name), options)) for name in ("base", "start"))
    points = columns_over_time(options)
    columns = [*options.texts, *(f"{name} (nats a token)" for name in base["judges"]), "won back"]
    columns += points
    none = " |" * len(points)
    print(f"| route | tokens | minutes | in all | {' | '.join(columns)} |")
    print("| --- | ---: | ---: | ---: |" + " ---: |" * len(columns))
    print(f"| base | | | | {' | '.join(cells(base, base))} | |{none}")
    print(f"| start | | | | {' | '.join(cells(start, base))} | 0% |{none}", flush=True)
    data = str(written(options)) if options.data == "self" else options.data
    names = {
        f"{route}, seed {seed}" if seed else route: (route, seed) for route in options.routes for seed in options.seeds
    }
    for name, (route, seed) in names.items():
        found = measured.once(name, partial(run, route, seed, data, options))
        sides = zip(base["losses"], start["losses"], found["scores"]["losses"], strict=True)
        won = ", ".join(f"{(bad - now) / (bad - good):.0%}" for good, bad, now in sides)
        took = f"{found['minutes']:.1f} | {'' if found['in_all'] is None else format(found['in_all'], '.1f')}"
        row = [*cells(found["scores"], base), won, *(at(found["curve"], *point) for point in points.values())]
        print(f"| {name} | {found['tokens']:,} | {took} | {' | '.join(row)} |", flush=True)
    for name, column, unit in (("minutes", 1, 60.0), ("tokens", 0, 1.0)):
        lines = {
            route: Line([point[column] / unit for point in found["curve"]], [point[2] for point in found["curve"]])
            for route, found in measured.items()
            if found.get("curve")
        }
        picture = options.out.with_name(f"{options.out.stem}-{name}.png")
        panel = Panel(lines, "cross-entropy on held-out text, nats per token")
        curves(picture, panel, x_label=f"{name} of training", title="what each way to heal reaches")


if __name__ == "__main__":
    main()
