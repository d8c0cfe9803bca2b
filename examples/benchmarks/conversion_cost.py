"""Time and memory of a conversion in closed form: the estimate of `plan` beside the measured cost, for any shape.

    python examples/benchmarks/conversion_cost.py RECIPE [KEY=VALUE ...] [--layers 1] [--whole 32]
        [--hidden 4096] [--heads 32] [--kv-heads 32] [--mlp 11008] [--tokenizer MODEL] [--table FILE --machine TEXT]

The model is a Llama with random bfloat16 weights. It is made in memory with a few layers of the shape (by default
that of Llama 2 7B) and with the vocabulary of --tokenizer. The script prints the estimate for these layers, the
measured cost of their conversion, and the estimate for --whole layers. Memory is the peak of the resident set beyond
the model. It is read from /proc, so that this runs on Linux only.

Choose settings that do the same in each layer, such as `gqa kv_heads=8`: by default `gqa` chooses among layers. For
`low-rank-kv` choose keep_kv below 0.5. At 0.5 of this shape the vector is as wide as the layer's input, nothing is
lost, and the longest step of the fit is left out.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import results
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


def planned(model, args) -> tuple[float, float, list[str]]:
    """The estimate of `plan`: minutes, and GB in addition to the model. And what the plan says of the change."""
    plan = surgery.plan(args.recipe, model, overrides=args.settings)
    if plan.recipe.heal:
        sys.exit(f"{args.recipe} trains, and this measures the conversion alone: add heal=null")
    measured = [stage for step in plan.steps for stage in step.change.measurements]
    if not measured:
        sys.exit(f"{args.recipe} measures nothing, so that its conversion is a matter of reading and writing")
    seconds = plan.estimate.to_dict()["parts"]["measure"]["seconds"]
    said = [line for step in plan.steps for line in (*step.change.lines, *step.change.notes)]
    return seconds / 60, max(stage.memory for stage in measured) / GB, said


def resident(name: str) -> float:
    """Memory of this process in GB: `VmRSS` is the present value, `VmHWM` the peak since `forget`."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / GB


def forget() -> None:
    """Reset the peak of memory, `VmHWM`."""
    Path("/proc/self/clear_refs").write_text("5")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    for name, default in {"layers": 1, "whole": 32, "hidden": 4096, "heads": 32, "kv-heads": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--tokenizer", default="smollm2-135m", help="a model whose words are taken")
    parser.add_argument("--table", type=Path, metavar="FILE", help="add the row to a table for the pages")
    parser.add_argument("--machine", default="", help="with --table: the machine")
    return parser


def main() -> None:
    args = parser().parse_intermixed_args()
    columns = table_columns(args)
    if args.table and args.table.exists():
        refuse_another_table(args.table, args.machine, columns)
    tokenizer = read_tokenizer(str(resolve(args.tokenizer).path))

    torch.manual_seed(0)
    model = model_of(args, args.layers, len(tokenizer), "cpu")
    minutes, beside, said = planned(model, args)
    whole, _, _ = planned(model_of(args, args.whole, len(tokenizer), "meta"), args)
    print(*said, sep="\n", flush=True)
    forget()
    before, began = resident("VmRSS"), time.perf_counter()
    surgery.apply(args.recipe, model, overrides=args.settings, tokenizer=tokenizer)
    took, peak = (time.perf_counter() - began) / 60, resident("VmHWM") - before
    row = dict(zip(columns, (took, minutes, peak, beside, whole), strict=True))
    print("", *(f"{name}: {number:.1f}" for name, number in row.items()), sep="\n")
    if args.table:
        add_row(args.table, args.machine, asked(args), row)


def table_columns(args) -> list[str]:
    shown = ["minutes", "minutes, planned", "GB beside the model", "GB, planned"]
    return [*shown, f"minutes for {args.whole} layers, planned"]


def asked(args) -> str:
    """The recipe, its settings and the shape, as they are typed; what is as by default is left out."""
    usual = parser()
    shape = ("layers", "hidden", "heads", "kv_heads", "mlp", "tokenizer", "whole")
    options = [
        f"--{name.replace('_', '-')} {value}"
        for name in shape
        if (value := vars(args)[name]) != usual.get_default(name)
    ]
    return " ".join([args.recipe, *args.settings, *options])


def refuse_another_table(path: Path, machine: str, columns: list[str]) -> None:
    """A table has the rows of one machine, with the same columns: else its caption would be untrue."""
    table = json.loads(path.read_text(encoding="utf-8"))
    names = [column["name"] for column in table["columns"][1:]]
    if table["machine"] != machine or names != columns:
        have, would = f"{table['machine']!r} with {names[-1]!r}", f"{machine!r} with {columns[-1]!r}"
        sys.exit(f"{path} has figures of {have}, and these would be of {would}: name another file, or delete it first")


def add_row(path: Path, machine: str, settings: str, row: dict[str, float]) -> None:
    """Add a row to a table, or put it in the place of an older one of the same conversion."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [other for other in rows if other[0] != f"`{settings}`"] + [[f"`{settings}`", *row.values()]]
    columns = ["conversion", *({"name": name, "format": "{:,.1f}"} for name in row)]
    commands = [f"python examples/benchmarks/conversion_cost.py {other[0].strip('`')}" for other in rows]
    results.write(path, commands, machine, columns, rows)


if __name__ == "__main__":
    main()
