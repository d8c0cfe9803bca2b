"""One decoding step that reads a part of the cache, beside one that reads all of it: milliseconds.

    python examples/benchmarks/read_step.py smollm2-135m [--lengths 8192 32768] [--keys 1024] [--table FILE]

The caches are filled with random numbers, which cost what others do. "full store" is the surgical model without a
reader; the base has Transformers' own cache. A step is the mean over `--steps` ones, which are as many as from one
choice of `recycled` to the next. Each has another token. The models take turns. `tokenselect` is timed with no
choice used again, and with each used until the next is due: a real text lies in between.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import results
import torch
from latent_step import filled, step

import surgery
from surgery.io.hub import resolve
from surgery.io.loading import load_model, read_tokenizer
from surgery.runtime.modeling_surgery import patch

READERS: dict[str, dict] = {
    "`index`": {"method": "index"},
    "`loki`": {"method": "loki", "calibration_samples": 2},
    "`recycled`": {"method": "recycled"},
    "`tokenselect`, a choice in each step": {"method": "tokenselect", "similarity": 1.0},
    "`tokenselect`, a choice in 32 steps": {"method": "tokenselect", "similarity": -1.0},
    "`tree`": {"method": "tree"},
}
BASE, FULL = "the base", "full store"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768], help="tokens of the past")
parser.add_argument("--keys", type=int, default=1024, help="keys that a step reads beside sinks and recent tokens")
parser.add_argument("--steps", type=int, default=32, help="timed steps of each model")
parser.add_argument("--table", type=Path, metavar="FILE", help="write a table for the pages (results/NAME.json)")
parser.add_argument("--machine", default="", help="with --table: the machine")


def reading(model, tokenizer, settings: dict, keys: int):
    """The model with a reader."""
    operation = {"op": "kv_read", "keys": keys} | settings
    recipe = {"version": 1, "name": "reading", "operations": [operation], "evaluate": None}
    surgery.apply(recipe, model, tokenizer=tokenizer)
    return model


@torch.inference_mode()
def main() -> None:
    options, folder = (parsed := parser.parse_args()), resolve(parsed.model).path
    tokenizer = read_tokenizer(folder)

    def load():
        return load_model(folder, dtype=torch.float32).eval()

    base, full = load(), load()
    patch(full, {"layers": [{}] * full.config.num_hidden_layers})
    models = {BASE: base, FULL: full}
    models |= {name: reading(load(), tokenizer, settings, options.keys) for name, settings in READERS.items()}
    rows: list[list] = [[name] for name in models]
    for length in options.lengths:
        caches = {name: filled(model, length) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(options.steps + 1):  # the first step is slower: the buffers grow
            for name, model in models.items():
                times[name].append(step(model, caches[name], 100 + turn))
        took = {name: statistics.mean(each[1:]) for name, each in times.items()}
        for row in rows:
            row += [took[row[0]], took[FULL] / took[row[0]]]
            print(f"{row[0]}, {length:,} tokens: {row[-2]:.1f} ms, {row[-1]:.2f}", flush=True)
    if options.table:
        columns: list = ["milliseconds a step"]
        for n in options.lengths:
            columns += [{"name": f"{n:,} tokens", "format": "{:,.0f}"}, {"name": "speed", "format": "{:.2f}"}]
        command = f"python examples/benchmarks/read_step.py {options.model} --keys {options.keys}"
        results.write(options.table, command, options.machine, columns, rows)


if __name__ == "__main__":
    main()
