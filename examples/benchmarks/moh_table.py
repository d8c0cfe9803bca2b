"""What a mixture of heads costs before any training: one table, with its controls.

    python examples/benchmarks/moh_table.py [MODEL] [--active 1 0.89 0.78 0.67 0.5] [--out FILE]

Every row gates the model in memory and scores it on held-out text. Fit: a router chooses the heads from the layer's
input. Static: the same number of heads, the same ones for every token, with the best mean of the same score. A fitted
router must beat it. Random: a router of random numbers, with the same shared heads. Norm: the heads with the largest
queries, as in MoH's code for LLMs; here its shared heads are measured, there they are the first half. With `--out`,
finished rows are kept in a file, and the same command resumes.
"""

import argparse
from functools import partial
from pathlib import Path

from measured import Measured

import surgery
from surgery.io.hub import resolve

ROWS = ("out", "active", "scores", "routers", "mae")  # arguments that select the rows


def settings(args):
    """(label, recipe, overrides) of each row."""
    for ratio in args.active:
        for score in args.scores:
            for router in args.routers:
                fields = {"active_ratio": ratio, "router": router, "score": score}
                yield f"moh, {ratio:g}, {router}, {score}", "moh", fields
    for score in args.scores if args.mae else ():
        for rescale in (False, True):
            how = ", rescaled" if rescale else ""
            yield f"mae, hard{how}, {score}", "mae", {"rescale": rescale, "score": score}
        yield f"mae, soft, {score}", "mae", {"hard": False, "score": score}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--active", type=float, nargs="+", default=[1.0, 0.89, 0.78, 0.67, 0.5])
    parser.add_argument("--scores", nargs="+", default=["damage", "energy"])
    parser.add_argument("--routers", nargs="+", default=["fit", "static", "random", "norm"])
    parser.add_argument("--mae", action="store_true", help="rows of the mixture of h - 1 heads, too")
    parser.add_argument("--shared", type=float, default=0.25, help="share of the heads that are always on")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of each, and of a calibration sequence")
    parser.add_argument("--text", default="builtin", help="held-out text")
    parser.add_argument("--out", type=Path, help="JSON file of finished rows")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    path = resolve(args.model).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    measured = Measured(args.out, {key: value for key, value in vars(args).items() if key not in ROWS})

    def row(name: str, fields: dict) -> dict:
        model, explained = surgery.load(path), None
        if name:
            shared = {"shared_ratio": min(args.shared, fields["active_ratio"] / 2)} if name == "moh" else {}
            more = {"calibration_samples": args.samples, "calibration_length": args.length}
            report = surgery.apply(name, model, tokenizer=tokenizer, **fields, **shared, **more)
            layers = report.data["operations"][0]["record"]["layers"]
            found = [layer["explained"] for layer in layers if "explained" in layer]
            explained = sum(found) / len(found) if found else None
        counts = {"windows": args.windows, "length": args.length}
        result = surgery.evaluate(model, None, text=args.text, tokenizer=tokenizer, **counts).to_dict()
        return {"ce": result["out"]["cross_entropy"], "explained": explained, "text": result["text"]}

    base = measured.once("base", partial(row, "", {}))
    print(f"{args.model}: {base['text']['tokens']:,} tokens of {base['text']['title']} ({base['text']['sha256']})\n")
    print("| gate | cross-entropy, nats | + | variance explained |\n| --- | ---: | ---: | ---: |")
    print(f"| base | {base['ce']:.4f} | | |", flush=True)
    for label, name, fields in settings(args):
        found = measured.once(label, partial(row, name, fields))
        explained = "" if found["explained"] is None else f"{found['explained']:.0%}"
        print(f"| {label} | {found['ce']:.4f} | {found['ce'] - base['ce']:+.4f} | {explained} |", flush=True)


if __name__ == "__main__":
    main()
