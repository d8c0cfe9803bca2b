"""Do new scores after each step choose better heads than one scoring? Nats above the base, by text.

    python examples/benchmarks/rescore_table.py [MODEL] [--texts builtin NOVEL] [--out FILE]

Single query heads are removed by `gradient` (Michel et al. 2019), without a refit: as many at once, and in steps of
`--rescore` with new scores after each. The control removes as many random heads, in `--draws` draws: their mean, the
lowest and the highest. All rows are scored on the same held-out windows of each text. `--out` holds what was measured
so far, and the same command resumes.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

from measured import Measured
from text_losses import losses_on

import surgery
from surgery.io.hub import resolve

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="smollm2-135m")
parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3])
parser.add_argument("--rescore", type=float, default=0.1)
parser.add_argument("--draws", type=int, default=10)
parser.add_argument("--windows", type=int, default=4)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--texts", nargs="+", default=["builtin"], help="builtin, or files")
parser.add_argument("--out", type=Path, required=True)


def main() -> None:
    options = parser.parse_args()
    path, counts = resolve(options.model).path, {"windows": options.windows, "length": options.length}
    tokenizer = surgery.load_tokenizer(path)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "ratios", "draws")}
    measured = Measured(options.out, settings)

    losses = partial(losses_on, options.texts, tokenizer=tokenizer, **counts)

    def pruned(ratio: float, **settings) -> dict:
        model = surgery.load(path)
        by_head = {"granularity": "head", "per_layer": None, "refit": False, "ratio": ratio}
        report = surgery.apply("prune-heads", model, tokenizer=tokenizer, **by_head, **settings)
        removed = report.data["operations"][0]["record"]["removed"]
        return {"losses": losses(model), "removed": removed}

    base = measured.once("base", lambda: losses(surgery.load(path)))
    print(f"base: {', '.join(f'{loss:.3f} ({text})' for loss, text in zip(base, options.texts, strict=True))} nats")
    print("| removed | text | at once | in steps | the same heads | random: mean (lowest to highest) |")
    print("| ---: | --- | ---: | ---: | ---: | --- |", flush=True)
    for ratio in options.ratios:
        once = measured.once(f"once {ratio}", partial(pruned, ratio))
        steps = measured.once(f"steps {ratio}", partial(pruned, ratio, rescore=options.rescore))
        draws = [
            measured.once(f"random {ratio} {seed}", partial(pruned, ratio, scores="random", seed=seed))
            for seed in range(options.draws)
        ]
        pairs = [(layer, head) for layer, heads in enumerate(once["removed"]) for head in heads]
        same = sum(head in steps["removed"][layer] for layer, head in pairs) / len(pairs)
        for index, text in enumerate(options.texts):
            first, second = (each["losses"][index] - base[index] for each in (once, steps))
            chance = [draw["losses"][index] - base[index] for draw in draws]
            spread = f"{statistics.mean(chance):.3f} ({min(chance):.3f} to {max(chance):.3f})" if chance else ""
            print(f"| {ratio:.0%} | {text} | {first:.3f} | {second:.3f} | {same:.0%} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
