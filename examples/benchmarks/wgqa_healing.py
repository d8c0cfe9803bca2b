"""Do WGQA's mixing weights pay? The same training of the same merge with them and without, for several seeds.

    python examples/benchmarks/wgqa_healing.py [MODEL] --texts builtin NOVEL --out FILE

`gqa` merges the KV heads of every layer into `--kv-heads` by the mean, once. Each way then trains on `--tokens` tokens
of `--data` towards the base's probabilities:

    gqa                  all weights of the merged model
    weights alone        the mixing weights and nothing else (`method: parts`, `mixing: head`)
    jointly, by head     all weights; K and V are the base's heads, which train, times a weight each
    jointly, by row      the same with a weight for each channel of the layer's input

The table gives the loss above the base on held-out windows of each text, a row for each seed and one for their mean,
and what the merge loses before the training. The seed decides the order of rows. `--out` holds what was measured so
far, and the same command resumes.
"""

import argparse
import shutil
import statistics
from functools import partial
from pathlib import Path

from measured import Measured
from text_losses import above, losses_on

import surgery
from surgery.io.hub import resolve

WAYS = {
    "gqa": {"method": "full"},
    "weights alone": {"method": "parts", "mixing": "head"},
    "jointly, by head": {"method": "full", "mixing": "head", "mixing_heads": "train"},
    "jointly, by row": {"method": "full", "mixing": "row", "mixing_heads": "train"},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="smollm2-135m")
parser.add_argument("--kv-heads", type=int, default=1)
parser.add_argument("--tokens", type=int, default=32768)
parser.add_argument("--batch-tokens", type=int, default=1024)
parser.add_argument("--rate", type=float, help="highest learning rate, in place of each method's")
parser.add_argument("--data", default="builtin", help="text to train on: builtin (its calibration part), a file")
parser.add_argument("--windows", type=int, default=4)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--texts", nargs="+", default=["builtin"], help="held-out texts: builtin, files")
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
parser.add_argument("--out", type=Path, required=True)


def main() -> None:
    options = parser.parse_args()
    path, counts = resolve(options.model).path, {"windows": options.windows, "length": options.length}
    measured = Measured(options.out, {k: v for k, v in vars(options).items() if k not in ("out", "seeds")})
    tokenizer, start = surgery.load_tokenizer(path), options.out.with_name(f"{options.out.stem}-start")
    if "start" not in measured:
        merge = [f"kv_heads={options.kv_heads}", "method=mean"]
        quick = {"gate": False, "check": False, "evaluate": False}
        surgery.apply("gqa", path, overrides=merge, output=start, overwrite=True, **quick)

    losses = partial(losses_on, options.texts, tokenizer=tokenizer, **counts)

    def healed(way: str, seed: int) -> list[float]:
        folder = options.out.with_name(f"{options.out.stem}-healed")
        settings = {"loss": "distill", "tokens": options.tokens, "batch_tokens": options.batch_tokens, "seed": seed}
        settings |= {"data": options.data, "learning_rate": options.rate} | WAYS[way]
        surgery.heal(start, path, output=folder, settings=settings, check=False, evaluate=False, overwrite=True)
        found = losses(surgery.load(folder).eval())
        shutil.rmtree(folder)
        return found

    base = measured.once("base", lambda: losses(surgery.load(path)))
    merged = measured.once("start", lambda: losses(surgery.load(start)))

    print(f"base: {', '.join(f'{loss:.3f}' for loss in base)} nats; on {', '.join(options.texts)}")
    print(f"| nats above the base | {' | '.join(options.texts)} |")
    print(f"| --- |{' ---: |' * len(options.texts)}")
    print(f"| the mean of the heads, no training | {above(merged, base, 3)} |", flush=True)
    for way in WAYS:
        found = []
        for seed in options.seeds:
            found.append(measured.once(f"{way} {seed}", partial(healed, way, seed)))
            print(f"| {way}, seed {seed} | {above(found[-1], base, 3)} |", flush=True)
        means = [statistics.mean(column) for column in zip(*found, strict=True)]
        print(f"| {way}, mean | {above(means, base, 3)} |", flush=True)


if __name__ == "__main__":
    main()
