"""The damage to a model whose KV heads are merged without training: one table, with a row for each method.

    python examples/benchmarks/gqa_table.py [MODEL] [--kv-heads 1] [--text FILE]

Every row converts the model in memory and scores it against the base on held-out text.
"""

import argparse

import surgery
from surgery.io.hub import resolve

SETTINGS = {
    "mean": {"method": "mean"},
    "first": {"method": "first"},
    "random": {"method": "random"},
    "procrustes + mean": {"method": "mean", "align": "procrustes"},
    "procrustes + first": {"method": "first", "align": "procrustes"},
    "similarity + mean": {"method": "mean", "grouping": "similarity"},  # the same as mean where one group is left
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--text", default="builtin")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    base = resolve(args.model).path
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows, last = [], None
    for name, fields in SETTINGS.items():
        if args.kv_heads == 1 and "grouping" in fields:
            continue
        model = surgery.load(base)
        report = surgery.apply("mqa", model, kv_heads=args.kv_heads, **fields)
        last = surgery.evaluate(model, base, text=args.text, tokenizer=tokenizer).to_dict()
        rows.append((name, last, report.data["plan"]["kv_bytes_per_token"]["after"]))

    text, before = last["text"], last["base"]
    print(f"{args.model}, KV heads → {args.kv_heads}, no training; {text['tokens']:,} tokens of {text['title']}")
    print(f"(sha256 {text['sha256']})\n")
    print("| method | perplexity | cross-entropy, nats | KL to base | same best token | KV bytes per token |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    figures = f"{before['perplexity']:,.2f} | {before['cross_entropy']:.3f}"
    print(f"| base | {figures} | 0 | 100% | {before['kv_bytes_per_token']:,} |")
    for name, result, kv_bytes in rows:
        out = result["out"]
        print(
            f"| {name} | {out['perplexity']:,.0f} | {out['cross_entropy']:.3f} | {result['kl']['mean']:.3f} "
            f"| {result['top1_agreement']:.1%} | {kv_bytes:,} |"
        )


if __name__ == "__main__":
    main()
