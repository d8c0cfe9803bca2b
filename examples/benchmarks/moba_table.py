"""MoBA beside full attention: loss on text and share of the keys read, by queries and by blocks of queries.

    python examples/benchmarks/moba_table.py [MODEL] --out table.json
    python examples/benchmarks/moba_table.py [MODEL] --ways --converted FOLDER... --length 2048 --out trained.json

Each way is a value of `sparse` in all layers, as `bench_sparse.py --ways` has it. A converted folder is measured
twice: with the attention that it has, and with full attention. A row has:

    read        the share of attention's multiply-adds that is done, over the layers with sparse attention
    perplexity  of held-out windows of `--length` tokens, without and with the way; all tokens count
    late        the same of the last quarter of a window, where most keys are left out
    times       seconds of the whole prompt, as a multiple of full attention's

A row is printed as soon as it is measured. `--out` holds what was measured so far, and the same command resumes.
"""

import argparse
import math
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from bench_sparse import setting
from measured import Measured
from torch.nn.functional import cross_entropy

import surgery
from surgery.data.text import load_text, windows
from surgery.healing.sparse_attention import full_attention, sparse_modules
from surgery.io.hub import resolve
from surgery.io.loading import read_tokenizer
from surgery.runtime.modeling_surgery import patch
from surgery.runtime.surgery_gated_compute import counted

FULL = "full"
WAYS = [
    "block_topk exact=true block=128 top=6",
    "block_topk block=128 top=6",
    "block_topk block=128 top=12 votes=0.25 dense_below=1024",
]


def row(model, ids) -> dict:
    """Losses of a model in nats, seconds, and the share of attention that is read."""
    losses, late, seconds = [], [], []
    with torch.no_grad(), counted(model) as work:
        for window in ids:
            begin = time.perf_counter()
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            seconds.append(time.perf_counter() - begin)
            each = cross_entropy(logits.float(), window[1:], reduction="none")
            losses.append(each.mean().item())
            late.append(each[-len(window) // 4 :].mean().item())
    read = work.done["attention"] / work.dense["attention"] if work.dense.get("attention") else 1.0
    names = ("loss", "late", "seconds", "read")
    return dict(zip(names, (*map(statistics.mean, (losses, late, seconds)), read), strict=True))


def beside(name: str, found: dict, full: dict) -> None:
    """Print a row of the table."""
    print(
        f"| {name} | {found['read']:.1%} | {math.exp(found['loss']):.2f} | {math.exp(found['late']):.2f} | "
        f"{found['seconds'] / full['seconds']:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--ways", nargs="*", default=WAYS)
    parser.add_argument("--converted", nargs="*", default=[], help="folders with sparse attention")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--text", default="builtin", help="builtin (its held-out part), or a text file")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    measured = Measured(
        options.out, {key: value for key, value in vars(options).items() if key not in ("out", "ways", "converted")}
    )
    folder = resolve(options.model).path
    text = load_text(options.text, part="held-out")
    ids = windows(text, read_tokenizer(folder), options.length, options.windows)
    model = surgery.load(folder).float().eval()
    full = measured.once(FULL, lambda: row(model, ids))
    print(
        f"{options.model}, {options.windows} windows of {options.length:,} tokens of {text.title}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n"
        "| way | read | perplexity | late | times |\n| --- | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    for way in (FULL, *options.ways):
        if way != FULL:
            patch(model, {"layers": [{"sparse": setting(way)}] * model.config.num_hidden_layers})
        beside(way, measured.once(way, lambda: row(model, ids)), full)
    for name in options.converted:
        model = surgery.load(name).float().eval()
        beside(name, measured.once(name, partial(row, model, ids)), full)
        with full_attention(sparse_modules(model)):
            beside(f"{name}, full attention", measured.once(f"{name}, {FULL}", partial(row, model, ids)), full)


if __name__ == "__main__":
    main()
