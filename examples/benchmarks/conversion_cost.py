"""Time and memory of a closed form: the estimate of `plan` and the measured cost, for a model of any shape.

    python examples/benchmarks/conversion_cost.py [RECIPE] [KEY=VALUE ...] [--layers 1] [--whole 32]
        [--hidden 4096] [--heads 32] [--kv-heads 32] [--mlp 11008] [--tokenizer MODEL]

RECIPE is `gqa`, `mla`, `low-rank-kv` or a file. The model is a Llama with random bfloat16 weights. It is made in
memory with a few layers of the shape (by default that of Llama 2 7B) and with the vocabulary of --tokenizer. The
script prints the estimate for these layers, the measured cost of their conversion, and the estimate for --whole
layers; layers of this width are converted one at a time. Memory is the peak of the resident set beyond the model,
which is read from /proc, so that this runs on Linux only.
"""

import argparse
import re
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import surgery
from surgery.io.hub import resolve
from surgery.io.loading import read_tokenizer

GB = 1e9


def model_of(args, layers: int, words: int, device: str):
    """A Llama of the shape with `layers` layers and `words` tokens; on the device `meta` it has no weights."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        intermediate_size=args.mlp,
        num_hidden_layers=layers,
        vocab_size=words,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def planned(model, args) -> tuple[float, float]:
    """The estimate of `plan`: seconds, and GB in addition to the model."""
    plan = surgery.plan(args.recipe, model, overrides=args.settings)
    memory = max(stage.memory for stage in plan.steps[0].change.measurements)
    return plan.estimate.to_dict()["parts"]["measure"]["seconds"], memory / 1e9


def resident(name: str) -> float:
    """Memory of this process in GB: `VmRSS` is the present value, `VmHWM` the peak since `forget`."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / GB


def forget() -> None:
    """Reset the peak of memory, `VmHWM`."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="gqa")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    for name, default in {"layers": 1, "whole": 32, "hidden": 4096, "heads": 32, "kv-heads": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--tokenizer", default="smollm2-135m", help="a model whose words are taken")
    args = parser.parse_args()
    tokenizer = read_tokenizer(str(resolve(args.tokenizer).path))

    torch.manual_seed(0)
    model = model_of(args, args.layers, len(tokenizer), "cpu")
    seconds, beside = planned(model, args)
    print(f"| layers of {args.hidden} | | minutes | GB in addition to the model |\n| --- | --- | --- | --- |")
    print(f"| {args.layers} | planned | {seconds / 60:.1f} | {beside:.1f} |", flush=True)
    forget()
    before, began = resident("VmRSS"), time.perf_counter()
    surgery.apply(args.recipe, model, overrides=args.settings, tokenizer=tokenizer)
    took, peak = time.perf_counter() - began, resident("VmHWM") - before
    print(
        f"| {args.layers} | measured, {torch.get_num_threads()} threads | {took / 60:.1f} | {peak:.1f} |", flush=True
    )
    seconds, beside = planned(model_of(args, args.whole, len(tokenizer), "meta"), args)
    print(f"| {args.whole} | planned | {seconds / 60:.1f} | {beside:.1f} |", flush=True)


if __name__ == "__main__":
    main()
