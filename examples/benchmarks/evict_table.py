"""What do the policies of KV eviction keep, beside a window and chance, at equal numbers of keys?

    python examples/benchmarks/evict_table.py smollm2-135m --scores fisher.json --out evict.json

FILE was written by `surgery score MODEL --method fisher -o FILE`. A row is a policy and a share of the keys that the
base holds of a text of `--length` tokens. In the rows "all heads" every KV head evicts. In the rows "low scores" the
heads with the lowest scores evict down to `--cap` keys, and the others keep every key. The rows "split" are the
control that decides: the same heads see sinks and a window (`duo_attention`), with as many keys. In the rows "task_kv"
as many heads keep every key as with "low scores", but each text chooses its own, as many in each layer. That gives few
shares: with 3 KV heads and `--cap 256`, 50%. A text comes in one call, so that "where the prompt ends" nothing is
dropped from it. All rows protect the same first and last tokens, and hold at most as many keys as the row says.

Each row has the needles that are found of those that the base finds, with the 95 % interval; the prompt is read first
and the question in a later call. Then nats a token of the answers, and nats a token on each of `--texts` ("builtin",
its held-out part, or a file), in windows of `--window` tokens. `--out` holds what was measured so far, and the same
command resumes. `--table` writes it as a table for the pages.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import results
import torch
from head_scores_table import cross_entropies
from measured import Measured

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.data.haystack import make_needles
from surgery.data.text import load_text, windows
from surgery.evaluation.paired import wilson
from surgery.evaluation.recall import run_needles
from surgery.io.hub import resolve
from surgery.io.loading import read_tokenizer

POLICIES: dict[str, dict] = {
    "attention": {"method": "attention"},
    "attention, last query (TOVA)": {"method": "attention", "observe": 1},
    "attention, all queries (H2O)": {"method": "attention", "memory": True},
    "caote": {"method": "caote"},
    "caote, before the output projection": {"method": "caote", "output": False},
    "caote, one key at a time": {"method": "caote", "greedy": True, "observe": 1},
    "lra": {"method": "lra"},
    "lfa": {"method": "lfa"},
    "task_kv": {"method": "task_kv"},
    "task_kv, behind the output projection": {"method": "task_kv", "output": True},
    "task_kv, where the prompt ends": {"method": "task_kv", "when": "prompt_end"},
    "norm": {"method": "norm"},
    "window": {"method": "window"},
    "random": {"method": "random"},
}
SPLIT = "split"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("--scores", type=Path, required=True, help="a score file: heads with low scores evict")
parser.add_argument("--shares", nargs="+", type=float, default=[0.75, 0.5, 0.33, 0.25], help="of the base's keys")
parser.add_argument("--heads", nargs="+", choices=["all heads", "low scores"], default=["all heads", "low scores"])
parser.add_argument("--policies", nargs="+", choices=[*POLICIES, SPLIT], default=[*POLICIES, SPLIT])
parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt, for which the shares hold")
parser.add_argument("--cap", type=int, default=160, help="most keys of an evicting head, where others keep all")
parser.add_argument("--sinks", type=int, default=4)
parser.add_argument("--recent", type=int, default=32)
parser.add_argument("--interval", type=int, default=32)
parser.add_argument("--samples", type=int, default=12, help="needles at each of four depths")
parser.add_argument("--texts", nargs="+", default=["builtin"], help="builtin, or files")
parser.add_argument("--windows", type=int, default=4)
parser.add_argument("--window", type=int, default=2048, help="tokens of a window of the texts")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--table", type=Path, metavar="FILE", help="write a table for the pages (results/NAME.json)")
parser.add_argument("--machine", default="", help="with --table: the machine")
DEPTHS = [0.1, 0.3, 0.5, 0.7]


def operation(policy: str, heads: str, share: float, options, kv_heads: int) -> dict | None:
    """The operation of a row; None: it cannot be, since the other heads alone hold more keys, or no whole
    number of heads of each layer holds as many.

    Args:
        kv_heads: KV heads of a layer.
    """
    if heads == "all heads":
        most, ratio = round(share * options.length), 1.0
    else:
        most, ratio = options.cap, (1 - share) / (1 - options.cap / options.length)
    if ratio > 1:
        return None
    chosen = {"scores": str(options.scores)} if ratio < 1 else {}
    if policy == SPLIT:
        window = most - options.sinks
        return {"op": "duo_attention", "sinks": options.sinks, "window": window, "streaming_ratio": ratio} | chosen
    settings = {"sinks": options.sinks, "recent": options.recent, "interval": options.interval}
    own = POLICIES[policy]
    if own.get("when") == "prompt_end":
        del settings["interval"]
    keys = most - sum(settings.values())
    if own["method"] == "task_kv":
        full = round((1 - ratio) * kv_heads)
        if not full or abs(full - (1 - ratio) * kv_heads) > 0.02:
            return None
        ratio, chosen, own = 1.0, {}, own | {"full_heads": full}
    votes = {} if own["method"] in ("norm", "window", "random") else {"observe": options.interval}
    return {"op": "kv_evict", "keys": keys, "evicting_ratio": ratio} | settings | chosen | votes | own


def main() -> None:
    options = parser.parse_args()
    folder = resolve(options.model).path
    model, tokenizer = surgery.load(folder).eval(), read_tokenizer(folder)
    kv_heads = Anatomy.of(model).layers[0].kv_heads
    fixed = ("out", "shares", "heads", "policies", "table", "machine")
    measured = Measured(options.out, {key: value for key, value in vars(options).items() if key not in fixed})
    needles = make_needles(tokenizer, lengths=[options.length], depths=DEPTHS, samples=options.samples, seed=0)
    texts = {text: windows(load_text(text), tokenizer, options.window, options.windows) for text in options.texts}

    def base() -> dict:
        outcomes = run_needles(model, needles, late=True)
        hits, nll = [outcome.hit for outcome in outcomes], sum(outcome.nll for outcome in outcomes) / len(outcomes)
        return {"hits": hits, "nll": nll, "losses": cross_entropies(model, texts)}

    def row(step: dict) -> dict:
        recipe = {"version": 1, "name": "row", "operations": [step], "evaluate": None}
        with surgery.applied(recipe, model, tokenizer=tokenizer):
            outcomes = run_needles(model, asked, late=True)
            nll = sum(outcome.nll for outcome in outcomes) / len(outcomes)
            kept = sum(outcome.hit for outcome in outcomes)
            return {"kept": kept, "nll": nll, "losses": cross_entropies(model, texts)}

    known = measured.once("base", base)
    asked = [needle for needle, hit in zip(needles, known["hits"], strict=True) if hit]
    if not asked:
        raise SystemExit("the base finds no needle: a shorter --length")
    print(f"| heads | keys | policy | needles of {len(asked)} | 95% | answers | {' | '.join(options.texts)} |")
    print("| --- | ---: | --- | ---: | --- | ---: |" + " ---: |" * len(options.texts))
    losses = " | ".join(f"{loss:.3f}" for loss in known["losses"])
    print(f"| | | base | {len(asked)} | | {known['nll']:.3f} | {losses} |", flush=True)
    rows = [["every key", "the base", len(asked), None, known["nll"], *known["losses"]]]
    for heads in options.heads:
        for share in options.shares:
            for policy in options.policies:
                if (step := operation(policy, heads, share, options, kv_heads)) is None:
                    print(f"left out, for no number of keys gives it: {policy}, {heads}, {share:.0%}", file=sys.stderr)
                    continue
                found = measured.once(f"{policy}, {heads}, {share}", partial(row, step))
                low, high = wilson(found["kept"], len(asked))
                losses = " | ".join(f"{loss:.3f}" for loss in found["losses"])
                interval = f"{low:.0%} to {high:.0%}"
                where = "" if len(options.heads) == 1 else f", {heads}"
                rows.append([f"{share:.0%}{where}", policy, found["kept"], interval, found["nll"], *found["losses"]])
                print(
                    f"| {heads} | {share:.0%} | {policy} | {found['kept']} | {interval} | {found['nll']:.3f} | "
                    f"{losses} |",
                    flush=True,
                )
    if options.table:
        names = {"builtin": "held-out reference", "austen-pride": "*Pride and Prejudice*"}
        columns: list = ["keys", {"name": "policy", "align": "left"}, f"needles, of {len(asked)}", "95%"]
        columns += [{"name": "nats a token of the answers", "format": "{:.3f}"}]
        columns += [
            {"name": names.get(Path(text).stem, Path(text).stem), "format": "{:.3f}"} for text in options.texts
        ]
        asked = f"--heads {' '.join(map(repr, options.heads))} --shares {' '.join(map(str, options.shares))}"
        asked += f" --cap {options.cap} --policies POLICY... --texts builtin NOVEL --out evict.json"
        command = f"python examples/benchmarks/evict_table.py {options.model} --scores fisher.json {asked}"
        commands = [f"surgery score {options.model} --method fisher -o fisher.json", command]
        if len(options.heads) == len(options.shares) == 1:  # then the first column says the same everywhere
            columns, rows = columns[1:], [row[1:] for row in rows]
            columns[0] = f"policy, {options.shares[0]:.0%} of the keys"
        results.write(options.table, commands, options.machine, columns, rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
