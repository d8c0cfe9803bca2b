"""The cost and the gain of sparse prefill: every method at the same densities, and a plot of error against time.

    python examples/benchmarks/sparse_table.py [MODEL] --out table.json [--plot table.png]

For each method, a search first finds the setting with which it reads the asked share of the blocks of a prompt of
`--length` tokens, in the `--layers` of the dense model. "read" is the share that was reached, which includes blocks
that are always read. Then the table has:

    times as fast   the attention of these layers, estimator included, compared with dense attention (SDPA), in turn
    error           |sparse - dense| / |dense| of a row of these layers' output, after the output projection, mean over
                    the rows beyond `--dense-below`; the input of each layer is the dense model's
    + nats          the whole model's loss on held-out windows of `--length` tokens, above the base's, on the tokens
                    beyond `--dense-below`
    needles         how many of the needles that the base answers are still answered when a model decodes densely from
                    the cache of a sparse prefill, and the mean loss of the answers

A row is printed as soon as it is measured. `--out` holds what was measured so far, and the same command resumes.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from bench_sparse import error, share_read, timed
from measured import Measured
from torch.nn.functional import cross_entropy
from torch.nn.functional import scaled_dot_product_attention as sdpa

import surgery
from surgery.calibration.attention_hook import hook_attention
from surgery.data.haystack import make_needles
from surgery.data.text import load_text, windows
from surgery.evaluation.recall import run_needles
from surgery.io.hub import resolve
from surgery.io.loading import read_tokenizer
from surgery.runtime.modeling_surgery import patch
from surgery.runtime.surgery_sparse_prefill import Sparse

# Method -> (the setting that is searched for, whether it is a whole number, least, most, fixed settings).
KNOBS = {
    "sampled": ("density", False, 0.01, 1.0, {}),
    "pooled": ("density", False, 0.01, 1.0, {}),
    "xattention": ("density", False, 0.01, 1.0, {}),
    "sampled by gamma": ("gamma", False, 0.3, 1.0, {}),
    "pooled by gamma": ("gamma", False, 0.3, 1.0, {}),
    "max_threshold": ("alpha", False, 1.0, 0.0, {"first": 1, "local": 2}),
    "block_topk": ("top", True, 1, 256, {"votes": 0.1}),
    "hierarchical": ("top", True, 1, 256, {}),
    "vertical_slash": ("slash", True, 1, 8192, {"vertical": 32, "sinks": 30, "nearest": 64}),
    "flexprefill": ("gamma", False, 0.05, 1.0, {"min_budget": 64}),
    "streaming": ("window", True, 64, 8192, {"sinks": 64}),
    "streaming, delta 16": ("window", True, 64, 8192, {"sinks": 64, "delta": 16}),
    "tri_shape": ("window", True, 64, 8192, {"sinks": 64, "last": 64}),
}


def watch(model, tokens, layers: list[int]) -> list[tuple]:
    """(module, query, key, value, scaling, dense output after the output projection) of each of some layers."""
    found = []

    def attend(module, query, key, value, mask, scaling=None, **_):
        out = sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
        if module.layer_idx in layers:
            found.append((module, query, key, value, scaling, module.o_proj(out.flatten(2))))
        return out, None

    with hook_attention(model, attend):
        model.model(input_ids=tokens)
    return found


def mean_read(entry: dict, seen: list[tuple]) -> float:
    """The share of the pairs of a query and a key that is multiplied, as the mean over the layers."""
    way = Sparse.of(entry)
    each = (share_read(way, way.kept(query, key, scaling), query) for _, query, key, _, scaling, _ in seen)
    return statistics.mean(each)


def sought(name: str, target: float, options, seen) -> dict:
    """The entry of the method with a share of read pairs nearest to the target, found by bisection of its setting."""
    setting, whole, least, most, rest = KNOBS[name]
    method = name.replace(",", "").split()[0]
    rest = {"block": options.block, "dense_below": options.dense_below, **rest}
    best = None
    for _ in range(9):
        middle = (least + most) // 2 if whole else (least + most) / 2
        entry = {"method": method, setting: middle, **rest}
        read = mean_read(entry, seen)
        if best is None or abs(read - target) < abs(best[0] - target):
            best = read, entry
        if abs(read - target) < 0.005 or (whole and least == most):
            break
        if read > target:
            most = middle
        else:
            least = middle + 1 if whole else middle
    return best[1]


def of_layers(entry: dict, seen, options) -> dict:
    """Speed, share of the estimator and error in the layers that were watched."""
    way, speeds, errors, estimators = Sparse.of(entry), [], [], []
    for module, query, key, value, scaling, right in seen:
        dense = partial(sdpa, query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        sparse = partial(way.attend, query, key, value, None, scaling, None)
        kept = partial(way.kept, query, key, scaling)
        times = [(timed(dense), timed(sparse), timed(kept)) for _ in range(options.runs)]
        speeds.append(statistics.median(one / other for one, other, _ in times))
        estimators.append(statistics.median(kept / one for one, _, kept in times))
        errors.append(error(module, sparse()[0], right, options.dense_below))
    names = ("times as fast", "estimator", "error")
    return dict(zip(names, map(statistics.mean, (speeds, estimators, errors)), strict=True))


def loss(model, ids, first: int) -> float:
    """Mean loss of the tokens from index `first` on, in nats."""
    total = []
    for window in ids:
        logits = model(input_ids=window[None], use_cache=False).logits[0, first - 1 : -1]
        total.append(cross_entropy(logits.float(), window[first:]).item())
    return statistics.mean(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=list(KNOBS), choices=list(KNOBS), metavar="METHOD")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--dense-below", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 14, 24], help="that are timed and compared")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--needles", type=int, default=12)
    parser.add_argument("--needle-length", type=int, default=2048)
    parser.add_argument("--text", default="builtin", help="builtin (its held-out part), or a text file")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="error against time, FILE.png")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    choices = ("out", "plot", "methods", "densities")
    measured = Measured(options.out, {key: value for key, value in vars(options).items() if key not in choices})
    with torch.no_grad():
        measure(options, measured)
    if options.plot:
        draw({key: row for key, row in measured.items() if key != "base"}, options)


def measure(options, measured: Measured) -> None:
    folder = resolve(options.model).path
    tokenizer, text = read_tokenizer(folder), load_text(options.text, part="held-out")
    ids = windows(text, tokenizer, options.length, options.windows)
    stock, model = (surgery.load(folder).float().eval() for _ in range(2))
    needles = make_needles(
        tokenizer, lengths=[options.needle_length], depths=[0.15, 0.4, 0.65], samples=-(-options.needles // 3)
    )

    def as_it_is() -> dict:
        hits = [outcome.hit for outcome in run_needles(stock, needles)]
        return {"loss": loss(stock, ids, options.dense_below), "hits": hits}

    def row(name: str, density: float) -> dict:
        entry = sought(name, density, options, seen)
        found = {"entry": entry, "read": mean_read(entry, seen), **of_layers(entry, seen, options)}
        patch(model, {"layers": [{"sparse": entry}] * model.config.num_hidden_layers})
        found["nats"] = loss(model, ids, options.dense_below) - base["loss"]
        outcomes = run_needles(model, asked)
        found["needles"] = [sum(outcome.hit for outcome in outcomes), len(asked)]
        answers = statistics.mean(outcome.nll for outcome in outcomes) if outcomes else None
        return found | {"answers": answers}  # None: the base answers no needle, so none was asked

    base = measured.once("base", as_it_is)
    asked = [needle for needle, hit in zip(needles, base["hits"], strict=True) if hit]
    seen = watch(stock, ids[:1], options.layers)
    print(
        f"{options.model}, {options.length:,} tokens of {text.title}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}\nbase: {base['loss']:.4f} nats, {len(asked)} of {len(needles)} needles\n\n"
        "| asked | method | setting | read | times as fast | estimator, share of dense | error | + nats | needles | "
        "loss of answers |\n| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    for density in options.densities:
        for name in options.methods:
            found = measured.once(f"{density} {name}", partial(row, name, density))
            setting = KNOBS[name][0]
            hits, of = found["needles"]
            answers = "" if found["answers"] is None else f"{found['answers']:.3f}"
            print(
                f"| {density:g} | {name} | {setting} {found['entry'][setting]:.3g} | {found['read']:.1%} | "
                f"{found['times as fast']:.2f} | {found['estimator']:.1%} | {found['error']:.1%} | "
                f"{found['nats']:.4f} | {hits}/{of} | {answers} |",
                flush=True,
            )


def draw(rows: dict, options) -> None:
    from surgery.report.plots import Line, Panel, curves

    lines = {}
    for name in options.methods:
        points = sorted(
            (row["times as fast"], row["error"]) for key, row in rows.items() if key.split(" ", 1)[1] == name
        )
        if points:
            lines[name] = Line(*zip(*points, strict=True))
    layers = ", ".join(map(str, options.layers))
    title = f"{options.model}: sparse attention of layers {layers} on {options.length:,} tokens"
    panel = Panel(lines, "error of the layer's output", "low and to the right is better")
    curves(options.plot, panel, x_label="times as fast as dense", title=title)


if __name__ == "__main__":
    main()
