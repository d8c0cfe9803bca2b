"""One decoding step behind a long past, of models whose cache holds vectors, and of their base.

    python examples/benchmarks/latent_step.py BASE OUT [OUT ...] [--lengths 1024 8192] [--table FILE --machine TEXT]

An OUT is a folder that `surgery apply mla BASE`, `mla-absorbed` or `low-rank-kv` wrote; it names its row. The caches
are filled with random numbers, which cost what others do. The models take turns, and the median step of each is
printed in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import results
import torch

from surgery.io.hub import resolve
from surgery.io.loading import load_model
from surgery.runtime.modeling_surgery import CACHE

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base")
parser.add_argument("out", nargs="+", type=Path)
parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 8192], help="tokens of the past")
parser.add_argument("--steps", type=int, default=5, help="timed steps of each model at each length")
parser.add_argument("--table", type=Path, metavar="FILE", help="write a table for the pages (results/NAME.json)")
parser.add_argument("--machine", default="", help="with --table: the machine")


def filled(model, length: int):
    """A cache of the model that holds `length` tokens of random keys and values."""
    own = hasattr(model, "make_cache")
    cache = model.make_cache() if own else None
    token = torch.ones(1, 1, dtype=torch.long)
    cache = getattr(model(token, use_cache=True, **({CACHE: cache} if own else {})), "past_key_values", cache)
    for layer in cache.layers:
        for holder, name in _tensors(layer):
            like = holder[name]
            holder[name] = 0.1 * torch.randn(*like.shape[:2], length, like.shape[3])
        for store in getattr(layer, "stores", ()):
            store.seen = store.stored = length
    return cache


def _tensors(layer) -> list[tuple[dict, str]]:
    """Where a layer of a cache holds its tensors."""
    if not hasattr(layer, "stores"):
        return [(vars(layer), "keys"), (vars(layer), "values")]
    return [(store.tensors, name) for store in layer.stores for name in store.tensors]


def step(model, cache, token: int = 1) -> float:
    """Milliseconds of one step."""
    begun = time.perf_counter()
    model(torch.tensor([[token]]), **{CACHE: cache})
    return 1000 * (time.perf_counter() - begun)


@torch.inference_mode()
def main() -> None:
    options = parser.parse_args()
    folders = {"the base": options.base} | {f"`{folder.name}`": str(folder) for folder in options.out}
    models = {name: load_model(resolve(folder).path, dtype=torch.float32).eval() for name, folder in folders.items()}
    rows = [[name] for name in models]
    for length in options.lengths:
        caches = {name: filled(model, length) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.steps + 1):  # the first step is slower: the buffers grow
            for name, model in models.items():
                times[name].append(step(model, caches[name]))
        for row in rows:
            row.append(statistics.median(times[row[0]][1:]))
            print(f"{row[0]}, {length:,} tokens: {row[-1]:.0f} ms", flush=True)
    if options.table:
        columns = ["milliseconds a step", *({"name": f"{n:,} tokens", "format": "{:,.0f}"} for n in options.lengths)]
        lengths = " ".join(map(str, options.lengths))
        given = " ".join([options.base, *(folder.name for folder in options.out)])
        command = f"python examples/benchmarks/latent_step.py {given} --lengths {lengths}"
        results.write(options.table, command, options.machine, columns, rows)


if __name__ == "__main__":
    main()
