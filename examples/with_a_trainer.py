"""Convert a model, fine-tune it with your own Trainer, save it, and see what a push would send.

    python examples/with_a_trainer.py [MODEL] [--steps 4] [-o OUT]

A few steps heal nothing; `surgery heal` or a recipe's `heal:` block is the way to heal. This is for a fine-tuning of
your own on a model whose attention was changed.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, Trainer, TrainingArguments

import surgery
from surgery.data.text import load_text, windows
from surgery.io.hub import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--recipe", default="mqa")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("-o", "--output", default="out-tuned")
    args = parser.parse_args()

    base = resolve(args.model).path
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = surgery.load(base)
    report = surgery.apply(args.recipe, model, tokenizer=tokenizer)  # in place: before the Trainer, which makes the
    print(report.data["plan"]["changes"][0])  # optimiser

    pieces = windows(load_text(part="calibration"), tokenizer, length=64, count=8)
    rows = [{"input_ids": piece, "labels": piece} for piece in pieces]
    settings = TrainingArguments(
        output_dir=f"{args.output}-run",
        max_steps=args.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        save_steps=args.steps,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[surgery.SurgeryCallback(report)])
    trainer.train()

    model.eval()
    surgery.save(model, args.output, report, tokenizer=tokenizer, overwrite=True)
    for folder in (Path(args.output), Path(settings.output_dir) / f"checkpoint-{args.steps}"):
        checked = surgery.check(folder)
        print(folder.name, "passed" if checked.data["check"]["passed"] else checked.data["check"])
    sent = surgery.push(args.output, "me/my-model", dry_run=True)
    print(f"a push would send {len(sent['files'])} files")


if __name__ == "__main__":
    main()
