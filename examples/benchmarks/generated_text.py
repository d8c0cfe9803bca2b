"""The text of a converted model next to that of its base: ten prompts, with the likeliest token each time.

    python examples/benchmarks/generated_text.py OUT BASE [--tokens 40]

OUT is a folder that `surgery apply` wrote. BASE is the model that it was made from.
"""

import argparse
import textwrap

import torch

import surgery
from surgery.io.hub import resolve
from surgery.io.loading import read_tokenizer

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "Water boils when",
    "My favourite season is autumn, because",
    "To bake bread you need",
    "The main difference between cats and dogs is",
    "In 1969 the first people on the moon",
    "She opened the letter slowly and",
    "A good way to learn a language is",
    "The stock market fell today after",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    folder = resolve(args.base).path
    models = {"base": surgery.load(folder).eval(), "converted": surgery.load(args.out).eval()}
    tokenizer = read_tokenizer(folder)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        print(prompt)
        for name, model in models.items():
            with torch.no_grad():
                written = model.generate(**ids, max_new_tokens=args.tokens, do_sample=False)[
                    0, ids.input_ids.shape[1] :
                ]
            said = " ".join(tokenizer.decode(written, skip_special_tokens=True).split())
            print(textwrap.fill(said, 110, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13))
        print()


if __name__ == "__main__":
    main()
