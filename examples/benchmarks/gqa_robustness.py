"""How much the closed form depends on its calibration text: kinds of text, sizes, seeds; cross-entropy above the base.

    python examples/benchmarks/gqa_robustness.py [MODEL] --prose FILE [--texts builtin FILE ...] --out rows.json

Kinds: prose (--prose), code (Python's standard library), chat (MODEL writes both user and assistant with its chat
template, again for every seed), mixed (the recipe's default, which has no seed). A seed shuffles the paragraphs of a
text, or the files of code, before the text is cut into pieces. Each row converts the model in memory to --kv-heads and
scores it on held-out texts, which the calibration must not have seen. A row of 8,192 tokens takes some minutes on one
core, and more tokens take longer in proportion. Finished rows are kept in --out, and the same command resumes.
"""

import argparse
import random
import sysconfig
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from gqa_ladder import fit, judged
from measured import Measured

import surgery
from surgery.data.generated import sample
from surgery.data.text import load_text
from surgery.io.hub import resolve
from surgery.io.loading import read_tokenizer

KINDS = ("prose", "code", "chat", "mixed")
SPARE = 8  # characters of text for each token that is needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--prose", type=Path, required=True, help="a text file that no held-out text is part of")
    parser.add_argument("--texts", nargs="+", default=["builtin"], help="held-out texts")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a piece, and of a held-out window")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of finished rows")
    args = parser.parse_args()
    base = str(resolve(args.model).path)
    tokenizer = read_tokenizer(base)
    names = ("model", "prose", "texts", "kv_heads", "length", "windows")
    measured = Measured(args.out, {name: getattr(args, name) for name in names} | fit())
    print(f"{args.model}, KV heads → {args.kv_heads}, no training. Nats above the base on {', '.join(args.texts)}.\n")
    print(
        f"| calibration | tokens | seed |{'|'.join(' + ' for _ in args.texts)}|\n|{' --- |' * (3 + len(args.texts))}"
    )
    for tokens in args.tokens:
        for kind in args.kinds:
            for seed in args.seeds if kind != "mixed" else [0]:
                measure = partial(row, base, tokenizer, kind, tokens, seed, args)
                found = measured.once(f"{kind}/{tokens}/{seed}", measure)
                above = " | ".join(f"{each['ce'] - each['base']:+.3f}" for each in found)
                print(f"| {kind} | {tokens:,} | {seed} | {above} |", flush=True)


def row(base: str, tokenizer, kind: str, tokens: int, seed: int, args) -> list[dict]:
    """Convert the model with a calibration text of this kind, and score it."""
    model = surgery.load(base)
    with tempfile.TemporaryDirectory() as folder:
        text = "mixed"
        if kind != "mixed":
            text = Path(folder, f"{kind}.txt")
            text.write_text(calibration(kind, model, tokenizer, tokens, seed, args), encoding="utf-8")
        asked = {"calibration_samples": tokens // args.length, "calibration_length": args.length}
        surgery.apply("gqa", model, tokenizer=tokenizer, kv_heads=args.kv_heads, calibration_text=str(text), **asked)
    return judged(model, base, tokenizer, args)


def calibration(kind: str, model, tokenizer, tokens: int, seed: int, args) -> str:
    """Enough text of a kind, in an order that depends on the seed."""
    if kind == "chat":
        asked = SimpleNamespace(length=args.length, chat=True, seed=seed)
        return "\n\n".join(map(tokenizer.decode, sample(model, tokenizer, asked, int(1.2 * tokens))))
    if kind == "prose":
        parts = load_text(str(args.prose)).text.split("\n\n")
    else:
        library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        parts = [path.read_text(encoding="utf-8") for path in library]
    random.Random(seed).shuffle(parts)
    return "\n\n".join(parts)[: SPARE * tokens]


if __name__ == "__main__":
    main()
