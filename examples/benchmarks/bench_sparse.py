"""Time and error of sparse prefill, compared with dense attention, on a model's own activations.

    python examples/benchmarks/bench_sparse.py [MODEL] [--lengths 4096 8192] [--layers 0 10 20] \\
        [--threads 2] [--runs 3]
        [--ways "pooled density=0.2 block=64" "streaming sinks=64 window=1024 delta=64"] [--whole]

The model reads one long text; a prompt beyond its positions is read with a larger RoPE base (NTK: times
(length / positions) ** (d / (d - 2))), and the table says so. In each of the layers, dense attention (SDPA, causal)
and every way run in turn on the same queries, keys and values. Times are medians of the runs: "estimator" is that of
the estimator alone, "all" includes it.

    error     |sparse - dense| / |dense| of a row of the layer's output, after the output projection, the mean over the
              rows beyond `dense_below` and over the layers; the input of each layer is the dense model's
    read      pairs of a query and a key that were multiplied, as a share of those of causal attention
    GFLOP/s   of these products (4 * head_dim operations a pair: scores and values), without the estimator

The gain follows from the share that is read, from the speed of its products compared with the dense kernel, and from
the time of the estimator. It is smaller on a machine whose dense kernel is faster, and means nothing without that
machine's GFLOP/s.

`--whole` runs the model as a user would, stock and sparse, and prints seconds of the prompt and the KL of the logits
(every 16th row beyond `dense_below`) in place of the table of layers.
"""

import argparse
import statistics
import time
from functools import partial

import yaml

from surgery.io.hub import resolve

WAYS = [
    "sampled block=64 gamma=0.7 dense_below=1024",
    "sampled block=64 gamma=0.8 dense_below=1024",
    "sampled block=64 gamma=0.9 dense_below=1024",
    "sampled block=128 gamma=0.8 dense_below=1024",
    "pooled block=64 gamma=0.8 dense_below=1024",
    "xattention block=64 gamma=0.8 dense_below=1024",
    "streaming block=64 sinks=64 window=1024 dense_below=1024",
    "streaming block=64 sinks=64 window=1024 delta=16 dense_below=1024",
    "block_topk block=64 top=16 dense_below=1024",
    "hierarchical block=64 top=16 dense_below=1024",
    "vertical_slash vertical=256 slash=1024 dense_below=1024",
    "flexprefill gamma=0.9 min_budget=256 dense_below=1024",
]


def setting(way: str) -> dict:
    """ "pooled density=0.2" as the value of `sparse` in a layer's entry."""
    method, *fields = way.split()
    pairs = (field.split("=", 1) for field in fields)
    return {"method": method} | {name: yaml.safe_load(value) for name, value in pairs}


def load(path, length: int):
    """The model for prompts of this length, and a note if its positions were stretched."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config, note = AutoConfig.from_pretrained(path), ""
    if length > config.max_position_embeddings:
        factor = length / config.max_position_embeddings
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.rope_parameters["rope_theta"] *= factor ** (size / (size - 2))
        config.max_position_embeddings, note = length, f" (RoPE base of {factor:g} times the positions)"
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval(), note


def layers(args, path, length: int, tokens) -> None:
    """Measure the attention of some layers, layer by layer inside one dense forward."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from surgery.calibration.attention_hook import hook_attention
    from surgery.runtime.surgery_sparse_prefill import Sparse

    ways = {way: Sparse.of({"block": 128, **setting(way)}) for way in args.ways}
    found = {way: {"kept": [], "estimator": [], "all": [], "error": [], "read": []} for way in ways}
    dense_times = []

    def attend(module, query, key, value, mask, scaling=None, **_):
        def dense():
            return sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)

        out = dense()
        if module.layer_idx in args.layers:
            calls = [dense, *(partial(way.attend, query, key, value, None, scaling, None) for way in ways.values())]
            rounds = [[timed(call) for call in calls] for _ in range(args.runs)]
            columns = [statistics.median(column) for column in zip(*rounds, strict=True)]
            dense_times.append(columns[0])
            right = module.o_proj(out.transpose(1, 2).flatten(2))
            for (name, way), seconds in zip(ways.items(), columns[1:], strict=True):
                record(found[name], module, way, (query, key, value, scaling), right, seconds)
        return out.transpose(1, 2), None

    def record(row, module, way, given, right, seconds):
        query, key, value, scaling = given
        times = [timed(way.kept, query, key, scaling) for _ in range(args.runs)]
        kept = way.kept(query, key, scaling)
        out, _, _ = way.attend(query, key, value, None, scaling, None)
        row["error"].append(error(module, out, right, way.dense_below))
        row["read"].append(share_read(way, kept, query))
        row["estimator"].append(statistics.median(times))
        row["all"].append(seconds)

    model, note = load(path, length)
    with torch.no_grad(), hook_attention(model, attend):
        model.model(input_ids=tokens)
    base, products = statistics.mean(dense_times), operations(model.config, length)
    print(
        f"\n{length:,} tokens{note}, layers {args.layers}: dense attention {base * 1e3:,.0f} ms a layer, "
        f"{products / base / 1e9:,.0f} GFLOP/s\n"
    )
    print(
        "| way | read | estimator, ms | all, ms | GFLOP/s | times as fast | error |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, row in found.items():
        mean = {key: statistics.mean(values) for key, values in row.items() if values}
        speed = mean["read"] * products / (mean["all"] - mean["estimator"]) / 1e9
        print(
            f"| {name} | {mean['read']:.1%} | {mean['estimator'] * 1e3:,.0f} | {mean['all'] * 1e3:,.0f} | "
            f"{speed:,.0f} | {base / mean['all']:.2f} | {mean['error']:.2%} |",
            flush=True,
        )


def operations(config, length: int) -> int:
    """Floating-point operations of causal attention in one layer: products of queries and keys, and with values."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * size * config.num_attention_heads * length * (length + 1) // 2


def whole(args, path, length: int, tokens) -> None:
    """Measure the prompt through the whole model."""
    import torch

    from surgery.runtime.modeling_surgery import patch

    stock, note = load(path, length)
    model, _ = load(path, length)
    count, times = stock.config.num_hidden_layers, {}
    print(f"\n{length:,} tokens{note}, the whole model\n")
    print("| way | seconds | times as fast | KL |\n| --- | ---: | ---: | ---: |")
    with torch.no_grad():
        for way in args.ways:
            sparse = {"block": 128, **setting(way)}
            patch(model, {"layers": [{"sparse": sparse}] * count})
            times = {"stock": [], "sparse": []}
            for _ in range(args.runs):
                for name, each in (("stock", stock), ("sparse", model)):
                    times[name].append(timed(each, input_ids=tokens, logits_to_keep=1))
            hidden = [
                each.model(input_ids=tokens).last_hidden_state[:, sparse.get("dense_below", 0) :: 16]
                for each in (stock, model)
            ]
            logp, logq = (each.lm_head(h).log_softmax(-1) for each, h in zip((stock, model), hidden, strict=True))
            kl = (logp.exp() * (logp - logq)).sum(-1).mean().item()
            base, ours = (statistics.median(times[name]) for name in ("stock", "sparse"))
            print(f"| {way} | {ours:.1f} (stock {base:.1f}) | {base / ours:.2f} | {kl:.4f} |", flush=True)


def share_read(way, kept, query) -> float:
    """The share of causal attention's pairs of a query and a key that is multiplied, for a prompt in one piece.

    Delta's dense rows count, since they are read in addition to the blocks.
    """
    heads, length = query.shape[1:3]
    return way.pairs(kept, heads, length, length) / (heads * length * (length + 1) / 2)


def error(module, out, right, first: int) -> float:
    """|x - right| / |right| of a row of a layer's output x, the mean over the rows from `first` on.

    Args:
        out: [batch, heads, n, head_dim], the output of the attention of `module`.
        right: [batch, n, hidden], the output of dense attention after the output projection.
    """
    off = module.o_proj(out.transpose(1, 2).flatten(2)) - right
    return (off.norm(dim=-1) / right.norm(dim=-1))[:, first:].mean().item()


def timed(function, *args, **kwargs) -> float:
    began = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 6, 12, 18, 24, 29])
    parser.add_argument("--ways", nargs="+", default=WAYS, help="method and settings: 'pooled density=0.2'")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--text", default="builtin", help="a text file of enough tokens")
    parser.add_argument("--whole", action="store_true", help="the whole model in place of layers")
    args = parser.parse_args()

    import torch
    from transformers import AutoTokenizer

    from surgery.data.text import load_text, windows

    if args.threads:
        torch.set_num_threads(args.threads)
    path = resolve(args.model).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = load_text(args.text, part="calibration")
    print(f"{args.model}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}, text {text.title}")
    for length in args.lengths:
        (whole if args.whole else layers)(args, path, length, windows(text, tokenizer, length, 1))


if __name__ == "__main__":
    main()
