"""ACT's two ways to find sinks, by the map of each prompt and by a fitted probe: what the search keeps, and its cost.

    python examples/benchmarks/act_table.py [MODEL] [--texts builtin FILE ...] --out rows.json \\
        [--labelled FILE.jsonl | --ask FILE]

Every row applies `sink_calibration`, method act, in memory. The table says whether the search kept its choice, by how
much it changed what was held back, the perplexity of the second half of held-out windows, and how many short requests
are answered. The first half of a window is a prompt. Sinks that a map shows depend on a whole prompt, so that a loss
over the prompt itself would have seen what it predicts. The other rows are judged in the same way.

Where the search keeps nothing, a row is the base. So each row has another one, "all heads", in which every head of the
layers has beta: it shows what the rule does where no search chooses. With `--labelled`, every head is tried alone on
these questions, as in the paper; `--ask` makes `--items` questions of a text in their place, which ask how a passage
goes on. Finished rows are kept in --out, and the same command resumes.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measured import Measured

import surgery
from surgery.data.questions import make_choices
from surgery.data.text import begin_of_text, load_text, windows
from surgery.io.hub import resolve
from surgery.io.loading import read_tokenizer
from surgery.operations.sink_calibration.zero_tuning import continued
from surgery.runtime.modeling_surgery import attention_modules

ALL = "all heads"  # the end of the names of rows that no search chose


def rows(labelled: str | None) -> dict[str, dict[str, Any] | None]:
    """Row -> the fields of `sink_calibration`, None for the base."""
    every, by_map = {"layers": None}, {"find": "map"}
    known: dict[str, dict[str, Any] | None] = {
        "the base": None,
        "map": by_map,
        "probe": {},
        "map, all layers": by_map | every,
        "probe, all layers": every,
    }
    if labelled:
        alone = {"trials": "each", "labelled": labelled}
        known |= {"probe, each head": alone, "map, each head": by_map | alone}
    return known


def ask(text: str, count: int, tokenizer, file: Path) -> None:
    """Write a JSONL file of questions made of a text: which of four endings continues a passage of 48 tokens."""
    lines = []
    for question in make_choices(tokenizer, items=count, context=48, ending=12, text=text):
        prompt = question.prompt[len(begin_of_text(tokenizer)) :]  # whoever reads the file puts BOS before it
        prompt, *choices = tokenizer.batch_decode([prompt, *question.choices])
        lines.append(json.dumps({"prompt": prompt, "choices": choices, "answer": question.answer}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def measure(fields: dict[str, Any] | None, base: Path, tokenizer, args) -> dict[str, Any]:
    """The figures of a row: the record of the search, those of `judged`, and the same where all heads have beta."""
    model = surgery.load(base, dtype=torch.float32).eval()
    if fields is None:
        return judged(model, base, tokenizer, args)
    read = "labelled" not in fields or fields.get("find") != "map"
    search = {"calibration_samples": args.samples, "calibration_length": args.length} if read else {}
    step = {"op": "sink_calibration", "method": "act"} | search | fields
    recipe = {"version": 1, "name": "row", "operations": [step], "evaluate": None}
    record = surgery.apply(recipe, model, tokenizer=tokenizer).data["operations"][-1]["record"]
    kept = ("kept", "held_back_change", "standard_error")
    row = {key: record[key] for key in kept if key in record}
    row["heads"] = sum(map(len, record["heads"].values()))
    row |= judged(model, base, tokenizer, args)
    if fields.get("find") == "map":  # layers without a chosen head are as they were: begin again, without a search
        model = surgery.load(base, dtype=torch.float32).eval()
        step = {"op": "sink_calibration", "method": "act", "beta": 1.0, "find": "map"}
        step |= {"layers": fields["layers"]} if "layers" in fields else {}
        surgery.apply(recipe | {"operations": [step]}, model, tokenizer=tokenizer)
    every = {"heads": set_all(model, record["beta"])}
    return row | {ALL: every | judged(model, base, tokenizer, args)}


def judged(model, base: Path, tokenizer, args) -> dict[str, Any]:
    """The loss of every window by text, and the number of requests answered."""
    losses = {}
    for text in args.texts:
        pieces = windows(load_text(text, part="held-out"), tokenizer, args.length, args.windows)
        losses[text] = [loss(model, piece) for piece in pieces]
    chat = surgery.evaluate(model, str(base), probe="chat", tokenizer=tokenizer)
    return {"losses": losses, "answered": chat.side("out")["answered"]}


@torch.no_grad()
def loss(model, piece: torch.Tensor) -> float:
    """Cross-entropy of a window's second half after its first, in nats a token."""
    logits, targets = continued(model, piece[None], len(piece) // 2)
    return torch.nn.functional.cross_entropy(logits.float(), targets).item()


@torch.no_grad()
def set_all(model, beta: float) -> int:
    """Give beta to every head of the layers that ACT may change; returns their number."""
    betas = [m.surgery_log_beta for m in attention_modules(model) if hasattr(m, "surgery_log_beta")]
    for log_beta in betas:
        log_beta.fill_(math.log(beta))
    return sum(map(len, betas))


def line(name: str, row: dict[str, Any], base: dict[str, Any]) -> str:
    """A row of the table, compared with the base's."""
    cells = [name, "", "", str(row.get("heads", ""))]
    if "kept" in row:
        cells[1] = "yes" if row["kept"] else "no"
        if "held_back_change" in row:
            cells[2] = f"{row['held_back_change']:+.4f} ± {row['standard_error']:.4f}"
    for text, losses in row["losses"].items():
        mean, plain = (math.fsum(each) / len(each) for each in (losses, base["losses"][text]))
        cells.append(f"{math.exp(mean):.2f}" if row is base else f"{math.exp(mean):.2f} ({mean - plain:+.3f})")
    return f"| {' | '.join([*cells, str(row['answered'])])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--texts", nargs="+", default=["builtin"], help="held-out texts")
    parser.add_argument("--windows", type=int, default=8, help="windows of each")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, and of a calibration text")
    parser.add_argument("--samples", type=int, default=16, help="calibration texts; every second one is held back")
    questions = parser.add_mutually_exclusive_group()
    questions.add_argument("--labelled", help="a JSONL file of questions on which every head is tried alone")
    questions.add_argument("--ask", help="a text of which these questions are made; it should not be among --texts")
    parser.add_argument("--items", type=int, default=32, help="questions of --ask; every second one is held back")
    parser.add_argument("--rows", nargs="+", help="these rows, and the base")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of finished rows")
    args = parser.parse_args()
    base = resolve(args.model).path
    tokenizer = read_tokenizer(base)
    questions_file = args.out.with_name(f"{args.out.stem}.questions.jsonl")
    known = rows(str(questions_file) if args.ask else args.labelled)
    if unknown := set(args.rows or ()) - set(known):
        raise SystemExit(f"no row {', '.join(sorted(unknown))}; there is {', '.join(known)}")
    left_out = {"rows", "out"} if args.ask else {"rows", "out", "ask", "items"}
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    measured = Measured(args.out, settings)
    if args.ask:
        ask(args.ask, args.items, tokenizer, questions_file)
    titles = [load_text(text, part="held-out").title for text in args.texts]
    print(
        f"{args.model}: perplexity of the second half of {args.windows} windows of {args.length:,} tokens, nats + base"
    )
    print(f"| act | kept | held back, nats | heads | {' | '.join(titles)} | answered |")
    print(f"| --- | --- |{' ---: |' * (len(titles) + 3)}")
    for name, fields in known.items():
        if args.rows and name not in {*args.rows, "the base"}:
            continue
        row = measured.once(name, partial(measure, fields, base, tokenizer, args))
        print(line(name, row, measured["the base"]), flush=True)
        if ALL in row:
            print(line(f"{name}, {ALL}", row[ALL], measured["the base"]), flush=True)


if __name__ == "__main__":
    main()
