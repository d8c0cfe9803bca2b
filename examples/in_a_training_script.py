"""Convert a model inside a fine-tuning script, train it, save it: plain Transformers from the second line on.

    python examples/in_a_training_script.py [MODEL] [--steps 3] [-o OUT]

A few steps do not heal a merged model; the script shows where your own training goes.
"""

import argparse

import torch

import surgery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("-o", "--output", default="out-trained")
    args = parser.parse_args()

    tokenizer = surgery.load_tokenizer(args.model)
    model = surgery.load(args.model)

    # In place, before the optimiser: one KV head, the mean of all, which then needs training.
    report = surgery.apply("mqa", model, tokenizer=tokenizer, windows=2)
    print(report)

    batch = surgery.text_windows(tokenizer, length=128, count=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for step in range(args.steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    result = surgery.evaluate(model, args.model, tokenizer=tokenizer, report=report)  # with the trained weights
    print(result)
    surgery.save(model, args.output, report, tokenizer=tokenizer, overwrite=True)
    print(surgery.check(args.output).checks)


if __name__ == "__main__":
    main()
