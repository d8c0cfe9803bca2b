"""The cost of pruning heads, and the share of it that a refit of the output projections wins back: one table.

    python examples/benchmarks/prune_table.py [MODEL] [--scores gradient magnitude random] [--text FILE]

Two cases: every layer loses one KV group with its query heads (a stock checkpoint), or one query head (unequal groups,
the surgical tier). Every row prunes the model in memory and scores it on held-out text. "won back" is the share of the
rise in cross-entropy that the refit undoes. "forward" is the CPU time of one window, divided by that of the base. Both
are the best of five, measured in turn. CPU time counts all threads, so that other programs matter little.
"""

import argparse
import time

import surgery
from surgery.io.hub import resolve

CASES = {"one KV group": {"granularity": "kv_group"}, "one query head": {"granularity": "head"}}


def seconds(model, ids) -> float:
    import torch

    began = time.process_time()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--scores", nargs="+", default=["gradient", "magnitude", "random"])
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of the refit")
    parser.add_argument("--windows", type=int, default=4, help="held-out windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--text", default="builtin", help="held-out text")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    path = resolve(args.model).path
    tokenizer, base = AutoTokenizer.from_pretrained(path), surgery.load(path)
    counts = {"windows": args.windows, "length": args.length}

    def cross_entropy(model):
        result = surgery.evaluate(model, None, text=args.text, tokenizer=tokenizer, **counts).to_dict()
        return result["out"]["cross_entropy"], result["text"]

    before, text = cross_entropy(base)
    print(f"{args.model}: {text['tokens']:,} tokens of {text['title']} (sha256 {text['sha256']})")
    print(f"refit on {args.samples} x {args.length} tokens of the calibration part\n")
    print(
        "| goes from every layer | tier | scores | refit | cross-entropy, nats | + | won back | parameters | forward |"
    )
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print(f"| base | | | | {before:.3f} | | | {base.num_parameters():,} | 1 |", flush=True)
    import torch

    ids = torch.randint(base.config.vocab_size, (1, args.length), generator=torch.Generator().manual_seed(0))
    for case, fields in CASES.items():
        for scores in args.scores:
            lost, choice = {}, {"scores": scores, "per_layer": 1}
            for refit in (False, True):
                model = surgery.load(path)
                settings = fields | choice | {"refit": refit, "calibration_samples": args.samples}
                report = surgery.apply(
                    "prune-heads", model, tokenizer=tokenizer, calibration_length=args.length, **settings
                )
                choice = {"heads": report.data["operations"][0]["record"]["removed"], "per_layer": None}
                after, _ = cross_entropy(model)
                lost[refit] = after - before
                won = f"{1 - lost[True] / lost[False]:.0%}" if refit else ""
                times = [(seconds(model, ids), seconds(base, ids)) for _ in range(5)]
                ratio = min(t[0] for t in times) / min(t[1] for t in times)
                print(
                    f"| {case} | {report.data['tier']} | {scores} | {'yes' if refit else 'no'} | {after:.3f} "
                    f"| {lost[refit]:.3f} | {won} | {model.num_parameters():,} | {ratio:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
