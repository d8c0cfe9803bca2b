"""Convert a model inside a fine-tuning script, train it, save it: plain Transformers from the second line on.

    python examples/in_a_training_script.py [MODEL] [--steps 3] [-o OUT]

A few steps do not heal a merged model; the script shows where your own training goes.
"""

import argparse

import torch

import surgery
from surgery.data.text import load_text, windows
from surgery.io.hub import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("-o", "--output", default="out-trained")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    base = resolve(args.model).path
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = surgery.load(base)

    report = surgery.apply("gqa", model, tokenizer=tokenizer, calibration_samples=16)  # in place; optimiser after it
    print(report.data["plan"]["changes"][0])

    batch = windows(load_text(part="calibration"), tokenizer, length=128, count=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for step in range(args.steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    surgery.save(model, args.output, report, tokenizer=tokenizer, overwrite=True)
    checked = surgery.check(args.output)
    print({item["name"]: item["status"] for item in checked.data["check"]["items"]})


if __name__ == "__main__":
    main()
