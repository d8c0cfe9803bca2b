"""Convert a model, fine-tune it with your own Trainer, save it, and see what a push would send.

    python examples/with_a_trainer.py [MODEL] [--steps 4] [-o OUT]

A few steps heal nothing: to heal, use `surgery heal` or a recipe's `heal:` block. This script shows how you fine-tune
a model whose attention was changed.
"""

import argparse
from pathlib import Path

from transformers import Trainer, TrainingArguments

import surgery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--recipe", default="mqa")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("-o", "--output", default="out-tuned")
    args = parser.parse_args()

    tokenizer = surgery.load_tokenizer(args.model)
    model = surgery.load(args.model)
    # The model is changed in place, and before there is a Trainer, which makes the optimiser.
    report = surgery.apply(args.recipe, model, tokenizer=tokenizer)
    print("\n".join(report.changes))

    windows = surgery.text_windows(tokenizer, length=64, count=8)
    rows = [{"input_ids": window, "labels": window} for window in windows]
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
        print(folder.name, "passed" if checked.passed else checked.checks)
    sent = surgery.push(args.output, "me/my-model", dry_run=True)
    print(f"a push would send {len(sent['files'])} files")


if __name__ == "__main__":
    main()
