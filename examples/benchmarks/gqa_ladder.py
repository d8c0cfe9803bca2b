"""From the mean of the heads to the closed form, one rung after the other: the gain of each step, in one table.

    python examples/benchmarks/gqa_ladder.py [MODEL] [--kv-heads 1] [--mix FILE ...] \\
        [--texts builtin FILE ...] [--out FILE]

Every row converts the model in memory, without training, and scores it against the base on held-out texts: `builtin`
(its held-out half) and files, which the calibration must not have seen. The calibration text is the recipe's (half
built-in text, half text that the model writes) or, with `--mix`, the built-in text and as many characters of each
file. A row of 40 x 512 tokens takes some minutes on two cores. With `--out`, finished rows are kept in a file, and the
same command resumes.
"""

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path

from measured import Measured

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.calibration.closed_form.layer_inputs import FitSettings
from surgery.data.text import load_text
from surgery.io.hub import resolve
from surgery.operations.gqa.closed_form import REVISION

CLOSED = {"method": "closed_form"}
RUNGS = {
    "mean": {"method": "mean"},
    "Procrustes, mean": {"method": "mean", "align": "procrustes"},
    "closed form (complex PCA, low-rank V)": CLOSED | {"refit": []},
    "+ W_O": CLOSED | {"refit": ["o"]},
    "+ W_O, W_Q": CLOSED | {"refit": ["q", "o"]},
    "+ W_O, W_Q, W_K": CLOSED | {"refit": ["q", "k", "o"]},
    "+ W_O, W_Q, W_K, W_V": CLOSED | {"refit": ["q", "k", "v", "o"]},
    "+ the MLP's output (default)": CLOSED,
    "all, attention fitted to the converted layers": CLOSED | {"sequential": True},
    "default, the half of the layers that loses most keeps its heads": CLOSED | {"keep_layers": 0.5},
    "default, a half of the layers, drawn (seed 0), keeps its heads": CLOSED | {"drawn": 0},
    "default, a half of the layers, drawn (seed 1), keeps its heads": CLOSED | {"drawn": 1},
}
CHOICES = ("out", "rungs", "samples")  # arguments that select the rows


def mixed(files: list[str], folder: str) -> str:
    """The path of a calibration text: the built-in text, and as many characters of each file."""
    own = load_text(part="calibration").text
    parts = [own] + [load_text(file).text[: len(own)] for file in files]
    path = Path(folder, "calibration.txt")
    path.write_text("\n\n".join(parts), encoding="utf-8")
    return str(path)


def drawn(model, kv_heads: int, seed: int) -> list[int]:
    """KV heads of each layer if a random half of the layers keeps its heads: as many bytes as `keep_layers: 0.5`."""
    layers = Anatomy.of(model).layers
    keep = random.Random(seed).sample(range(len(layers)), int(0.5 * len(layers) + 0.5))
    return [layer.kv_heads if layer.index in keep else kv_heads for layer in layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--mix", nargs="*", default=[], help="files that join the calibration text")
    parser.add_argument("--texts", nargs="+", default=["builtin"], help="held-out texts")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[40], help="calibration pieces, a row for each number"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a piece, and of a held-out window")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows")
    parser.add_argument("--rungs", type=int, nargs="+", default=range(len(RUNGS)), help="numbers of the rows, from 0")
    parser.add_argument("--out", type=Path, help="JSON file of finished rows")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    base = resolve(args.model).path
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {key: value for key, value in vars(args).items() if key not in CHOICES} | fit()
    measured = Measured(args.out, settings)

    def row(fields: dict, calibration: str) -> list[dict]:
        model = surgery.load(base)
        given = fields | text_of(fields, calibration)
        seed = given.pop("drawn", None)
        heads = args.kv_heads if seed is None else drawn(model, args.kv_heads, seed)
        surgery.apply("gqa", model, tokenizer=tokenizer, kv_heads=heads, **given)
        return judged(model, base, tokenizer, args)

    def text_of(fields: dict, calibration: str) -> dict:
        if fields["method"] != "closed_form":
            return {}
        return {"calibration_text": calibration, "calibration_length": args.length}

    with tempfile.TemporaryDirectory() as folder:
        calibration = mixed(args.mix, folder) if args.mix else "mixed"
        printed = False
        for number in args.rungs:
            name, fields = list(RUNGS.items())[number]
            for samples in args.samples if fields["method"] == "closed_form" else [0]:
                label = f"{name}, {samples * args.length:,} tokens" if samples else name
                given = fields | ({"calibration_samples": samples} if samples else {})
                found = measured.once(label, partial(row, given, calibration))
                if not printed:
                    header(args, found)
                    printed = True
                cells = (f"{f['ce']:.3f} | {f['ce'] - f['base']:+.3f} | {f['kl']:.3f}" for f in found)
                print(f"| {label} | {' | '.join(cells)} |", flush=True)


def fit() -> dict:
    """The settings and the revision of the fit, as settings of `Measured`."""
    return {"fit": f"{FitSettings()}, revision {REVISION}"}


def judged(model, base: str, tokenizer, args) -> list[dict]:
    """For each held-out text: its record, the base's and the model's cross-entropy in nats, and the KL to the base."""
    asked = {"tokenizer": tokenizer, "windows": args.windows, "length": args.length}
    found = [surgery.evaluate(model, base, text=text, **asked).to_dict() for text in args.texts]
    return [
        {"text": f["text"], "base": f["base"]["cross_entropy"], "ce": f["out"]["cross_entropy"], "kl": f["kl"]["mean"]}
        for f in found
    ]


def header(args, found: list[dict]) -> None:
    print(f"{args.model}, KV heads → {args.kv_heads}, no training. Cross-entropy in nats, above the base, KL to it.")
    for number, each in enumerate(found, 1):
        text = each["text"]
        print(f"Text {number}: {text['tokens']:,} tokens of {text['title']} (sha256 {text['sha256']})")
    columns = "".join(f" text {number} | + | KL |" for number in range(1, len(found) + 1))
    print(f"\n| method |{columns}\n| --- |{' ---: |' * 3 * len(found)}")
    bases = "".join(f" {each['base']:.3f} | | 0 |" for each in found)
    print(f"| base |{bases}", flush=True)


if __name__ == "__main__":
    main()
