"""Which score finds the heads that must keep the whole past? Needles kept, by score and ratio, and by chance.

    python examples/benchmarks/head_scores_table.py smollm2-135m --scores far-mass.json retrieval.json --out table.json

Each score file was written by `surgery score MODEL --method ... -o FILE`. Only needles count that the base answers and
that lie outside of sinks and window. The share of them that the split model also answers is printed with its 95 %
interval. `inverse` keeps the heads with the lowest scores of the first file. `random` rows draw the heads (only one
row where the ratio is 0.25, since any choice passes there). Prompt and answer are one forward without a cache.
`--perplexity WINDOWS LENGTH` adds, for each of `--texts` ("builtin", its held-out part, or a file), the perplexity as
a share of the base's. A row is printed as soon as it is measured. `--out` holds what was measured so far, and the same
command resumes. The first lines compare the orders of the heads: for each pair of files, Spearman's rank correlation
and the share of the lower half that is the same. With `--orders FILE` that is all, and FILE gets a table.
"""

import argparse
import itertools
import math
import random
from functools import partial
from pathlib import Path

import results
import torch
from measured import Measured

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.calibration.head_scores import choose_streaming, load_scores, ranks
from surgery.calibration.scoring import score_window
from surgery.data.haystack import make_needles
from surgery.data.text import load_text, windows
from surgery.evaluation.paired import wilson
from surgery.evaluation.recall import run_needles
from surgery.io.hub import resolve
from surgery.io.loading import read_tokenizer
from surgery.runtime.modeling_surgery import patch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("--scores", nargs="+", type=Path, required=True)
parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.75])
parser.add_argument("--random", type=int, default=5, help="random splits at each ratio; 0: no controls")
parser.add_argument("--sinks", type=int, default=16)
parser.add_argument("--window", type=int, default=240)
parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048])
parser.add_argument("--samples", nargs="+", type=int, default=[34, 2, 1], help="in each cell, for each length")
parser.add_argument("--depths", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4])
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--perplexity", nargs=2, type=int, metavar=("WINDOWS", "LENGTH"))
parser.add_argument("--texts", nargs="+", default=["builtin"], help="builtin, or files")
parser.add_argument("--out", type=Path)
parser.add_argument("--orders", type=Path, metavar="FILE", help="only compare the orders (results/NAME.json)")
parser.add_argument("--machine", default="", help="with --orders: the machine")


def splits(model, options) -> dict[str, list[list[list[float]]]]:
    """Row name -> score tables: the files, the inverse of the first, random ones."""
    anatomy = Anatomy.of(model)
    rows = {path.stem: load_scores(path, anatomy).scores for path in options.scores}
    first = next(iter(rows))
    if options.random:
        rows[f"inverse {first}"] = [[-x for x in layer] for layer in rows[first]]
    for number in range(options.random):
        draw = random.Random(f"{options.seed} {number}")
        rows[f"random {number}"] = [[draw.random() for _ in range(layer.kv_heads)] for layer in anatomy.layers]
    return rows


def orders(paths: list[Path], model) -> list[list]:
    """Print and return for each pair of score files how alike the orders of the heads are."""
    rows = []
    tables = {path.stem: load_scores(path, Anatomy.of(model)).scores for path in paths}
    for (one, first), (two, second) in itertools.combinations(tables.items(), 2):
        both = torch.tensor([[x for layer in ranks(table) for x in layer] for table in (first, second)])
        correlation = torch.corrcoef(both)[0, 1].item()
        halves = [
            {(layer, head) for layer, heads in enumerate(choose_streaming(table, ratio=0.5)) for head in heads}
            for table in (first, second)
        ]
        share = len(halves[0] & halves[1]) / len(halves[0])
        print(f"{one}, {two}: rank correlation {correlation:.2f}, same lower half {share:.0%}", flush=True)
        rows.append([f"{one}, {two}", correlation, share])
    return rows


def needles_of(tokenizer, options) -> list:
    found = []
    for length, samples in zip(options.lengths, options.samples, strict=True):
        made = make_needles(tokenizer, lengths=[length], depths=options.depths, samples=samples, seed=options.seed)
        found += [needle for needle in made if needle.outside(options.sinks, options.window)]
    return found


def cross_entropies(model, texts: dict[str, torch.Tensor]) -> list[float]:
    """Nats per token on the windows [count, length] of each text."""
    each = [
        [score_window(model, piece, None, 1)["loss"].mean().item() for piece in pieces] for pieces in texts.values()
    ]
    return [math.fsum(losses) / len(losses) for losses in each]


def main() -> None:
    options = parser.parse_args()
    if not (options.out or options.orders):
        parser.error("name --out, or --orders")
    folder = resolve(options.model).path
    model, tokenizer = surgery.load(folder).eval(), read_tokenizer(folder)
    alike = orders(options.scores, model)
    if options.orders:
        columns = ["two orders of the heads", {"name": "rank correlation", "format": "{:.2f}"}]
        columns += [{"name": "the same heads in the lower half", "format": "{:.0%}"}]
        files = " ".join(path.name for path in options.scores)
        command = f"python examples/benchmarks/head_scores_table.py {options.model} --scores {files} --orders FILE"
        results.write(options.orders, command, options.machine, columns, alike)
        return
    rows, needles = splits(model, options), needles_of(tokenizer, options)
    free = ("out", "scores", "ratios", "random", "orders", "machine")
    settings = {key: value for key, value in vars(options).items() if key not in free}
    measured = Measured(options.out, settings)
    count, length = options.perplexity or (0, 0)
    texts = {text: windows(load_text(text), tokenizer, length, count) for text in options.texts if count}

    def base() -> dict:
        hits = [outcome.hit for outcome in run_needles(model, needles, cached=False)]
        return {"hits": hits, "losses": cross_entropies(model, texts)}

    def row(scores: list[list[float]], ratio: float) -> dict:
        streaming = choose_streaming(scores, ratio=ratio)
        layers = [{"streaming": s, "sinks": options.sinks, "window": options.window} for s in streaming]
        patch(model, {"layers": layers})
        outcomes = run_needles(model, asked, cached=False)
        nll = sum(outcome.nll for outcome in outcomes) / len(outcomes)
        kept = sum(outcome.hit for outcome in outcomes)
        return {"kept": kept, "nll": nll, "losses": cross_entropies(model, texts)}

    known = measured.once("base", base)
    asked = [needle for needle, hit in zip(needles, known["hits"], strict=True) if hit]
    print(f"base: {len(asked)} of {len(needles)} needles outside of sinks + window answered", flush=True)
    if not asked:
        raise SystemExit("the base answers none: more --samples, or shorter --lengths")
    for text, loss in zip(texts, known["losses"], strict=True):
        print(f"base: perplexity {math.exp(loss):.3f} on {count} windows of {length} tokens of {text}", flush=True)
    for ratio in options.ratios:
        for name, scores in rows.items():
            if ratio < 0.5 and name.startswith("random") and name != "random 0":
                continue
            found = measured.once(f"{name} {ratio}", partial(row, scores, ratio))
            ratios = [math.exp(loss - old) for loss, old in zip(found["losses"], known["losses"], strict=True)]
            kept, (low, high) = found["kept"], wilson(found["kept"], len(asked))
            print(
                f"| {ratio:.2f} | {name} | {kept}/{len(asked)} | {kept / len(asked):.1%} ({low:.1%} to {high:.1%}) | "
                f"{found['nll']:.3f} |" + "".join(f" {x:.4f} |" for x in ratios),
                flush=True,
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
