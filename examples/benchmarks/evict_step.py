"""One decoding step under KV eviction behind a long past, beside full attention: milliseconds and bytes.

    python examples/benchmarks/evict_step.py smollm2-135m [--lengths 8192 32768] [--table FILE --machine TEXT]

Each policy keeps `--share` of the keys. The caches are filled with random numbers, which cost what others do. "full
store" is the surgical model without a policy, whose cache is the one that the policies are compared with; the base has
Transformers' own. The step of a policy is the mean over one interval: in it some queries vote, and once keys are
dropped. A step of the others is the median of `--steps`. The models take turns. `--generate N` then generates N tokens
with the first policy, behind nothing, and prints the largest and the smallest number of bytes of its cache once it is
full.
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
from surgery.io.loading import load_model
from surgery.runtime.modeling_surgery import CACHE, patch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("--policies", nargs="+", default=["attention", "caote", "norm"])
parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768], help="tokens of the past")
parser.add_argument("--share", type=float, default=0.5, help="of the keys that a policy keeps")
parser.add_argument("--interval", type=int, default=256)
parser.add_argument("--steps", type=int, default=5, help="timed steps of full attention")
parser.add_argument("--generate", type=int, metavar="N", help="tokens to generate, in place of the steps")
parser.add_argument("--table", type=Path, metavar="FILE", help="write a table for the pages (results/NAME.json)")
parser.add_argument("--machine", default="", help="with --table: the machine")
BASE, FULL = "the base", "full store"


def evicting(model, policy: str, most: int, interval: int):
    """The model under a policy that lets a KV head hold up to `most` keys."""
    step = {"op": "kv_evict", "method": policy, "keys": most - 4 - 128 - interval, "interval": interval}
    surgery.apply({"version": 1, "name": policy, "operations": [step], "evaluate": None}, model)
    return model


def full_of_kept(model, length: int):
    """The cache of an evicting model behind `length` tokens, just after a decision."""
    cache, token = model.make_cache(), torch.ones(1, 1, dtype=torch.long)
    model(token, **{CACHE: cache})
    for layer in cache.layers:
        for store in layer.stores:
            most, interval = store.visibility.most, model.config.surgery["layers"][0]["policy"]["interval"]
            kept, like = most - interval, store.tensors["keys"]
            shape = (*like.shape[:2], most, like.shape[3])
            store.tensors = {name: 0.1 * torch.randn(shape) for name in ("keys", "values")}
            slots = torch.linspace(0, length - 1, kept).int()
            store.tensors["slots"] = torch.zeros(*like.shape[:2], most, dtype=torch.int32)
            store.tensors["slots"][:, :, :kept] = slots
            store.seen = store.settled = length
            store.stored = kept
    return cache


def generate(model, count: int) -> None:
    """Generate tokens one by one, and print how many bytes the cache holds."""
    cache, token, seen = model.make_cache(), torch.ones(1, 1, dtype=torch.long), []
    for _ in range(count):
        token = model(token, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        tensors = [tensor for layer in cache.layers for store in layer.stores for tensor in store.tensors.values()]
        seen.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
    last = seen[count // 2 :]
    print(f"{count:,} tokens: from {min(last):,} to {max(last):,} bytes in the second half", flush=True)


@torch.inference_mode()
def main() -> None:
    options, folder = (parsed := parser.parse_args()), resolve(parsed.model).path

    def load():
        return load_model(folder, dtype=torch.float32).eval()

    if options.generate:
        generate(evicting(load(), options.policies[0], 1024, options.interval), options.generate)
        return
    base, full = load(), load()
    patch(full, {"layers": [{}] * full.config.num_hidden_layers})
    rows: list[list] = [[BASE], [FULL], *([f"`{policy}`"] for policy in options.policies)]
    for length in options.lengths:
        most = round(options.share * length)
        models = {BASE: base, FULL: full}
        models |= {f"`{policy}`": evicting(load(), policy, most, options.interval) for policy in options.policies}
        caches = {name: (filled if name in (BASE, FULL) else full_of_kept)(models[name], length) for name in models}
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(options.steps + 1):  # the first step is slower: the buffers grow
            for name, model in models.items():
                some = 1 if name in (BASE, FULL) else options.interval // options.steps + 1
                times[name] += [step(model, caches[name]) for _ in range(some if turn else 1)]
        took = {
            name: (statistics.median if name in (BASE, FULL) else statistics.mean)(each[1:])
            for name, each in times.items()
        }
        for row in rows:
            name = row[0]
            size = None if name == BASE else caches[name].nbytes / 2**20
            row += [took[name], took[FULL] / took[name], size]
            print(f"{name}, {length:,} tokens: {took[name]:.1f} ms, {size or 0:.0f} MB", flush=True)
    if options.table:
        columns: list = ["milliseconds a step"]
        for n in options.lengths:
            columns += [{"name": f"{n:,} tokens", "format": "{:,.0f}"}, {"name": "speed", "format": "{:.2f}"}]
            columns += [{"name": "cache, MB", "format": "{:,.0f}"}]
        command = f"python examples/benchmarks/evict_step.py {options.model} --share {options.share:g}"
        results.write(options.table, command, options.machine, columns, rows)


if __name__ == "__main__":
    main()
