"""Time of an attention block with a gate: projections and attention of one layer, compared with the base's.

    python examples/benchmarks/bench_gates.py [MODEL] [--lengths 2048 4096 8192] [--active 0.5 0.75]

The layer has the model's shape and random weights in float32. Stock Transformers with SDPA is compared with the same
layer after `moh` with a random router. The two run in turn, and times are medians. The table has the ratio of the
times and the ratio of the multiply-adds that were counted (router, projections, attention). `--decode` times one token
after a prompt of each length. Both sides then use our cache, which grows by blocks, so that only the gate differs.
"""

import argparse
import copy
import statistics
import time

import surgery
from surgery.io.hub import resolve


def block(config, active: float | None, unit: str, shared: float):
    """A model of one layer: with a gate, or without one if `active` is None."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    if active is not None:
        fields = {"active_ratio": active, "shared_ratio": 0.0, "router": "random", "granularity": unit}
        surgery.apply("moh", model, **fields)
        if shared:
            share_some(model, config, active, shared, unit)
    return model


def share_some(model, config, active: float, shared: float, unit: str) -> None:
    """Make the first units shared ones, as if a calibration had chosen them."""
    from surgery.runtime.modeling_surgery import attention_modules, patch

    (module,) = attention_modules(model)
    units, hidden = module.surgery_gate.units, config.hidden_size
    count, on = round(shared * units), module.surgery_gate.on
    shapes = {"surgery_router": [units - count, hidden], "surgery_router_bias": [units - count]}
    shapes |= {"surgery_router_temperature": [1], "surgery_shared_router": [count, hidden]}
    shapes |= {"surgery_balance": [2, hidden]}
    gate = {"kind": "moh", "unit": unit, "shared": list(range(count)), "active": on - count}
    patch(model, {"layers": [{"gate": gate, "parameters": shapes}]})
    module.surgery_router.data.normal_(std=hidden**-0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="whose shapes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--active", type=float, nargs="+", default=[0.5])
    parser.add_argument("--shared", type=float, default=0.25, help="share of the heads that are always on")
    parser.add_argument("--unit", choices=["head", "kv_group"], default="head")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--decode", action="store_true", help="one token after so many")
    args = parser.parse_args()

    import torch
    from transformers import AutoConfig

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(resolve(args.model).path)
    config.num_hidden_layers, config.max_position_embeddings = 1, 1 << 20
    config.dtype = torch.float32
    print(f"one layer of {args.model}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| tokens | active | base, ms | gated, ms | ratio | counted |\n| ---: | ---: | ---: | ---: | ---: | ---: |")
    with torch.no_grad():
        for length in args.lengths:
            for active in args.active:
                base, gated = (block(config, ratio, args.unit, args.shared) for ratio in (None, active))
                report(args, base, gated, length, active)


def report(args, base, gated, length: int, active: float) -> None:
    import torch

    from surgery.runtime import modeling_surgery as runtime
    from surgery.runtime.surgery_gated_compute import counted

    hidden = torch.randn(1, length, base.config.hidden_size)
    if args.decode:
        runtime.patch(base, {"layers": [{}]})
    calls = []
    for model in (base, gated):
        attention, rotary = model.model.layers[0].self_attn, model.model.rotary_emb
        given = {"attention_mask": None}
        if args.decode:
            cache = model.make_cache()
            positions = rotary(hidden, torch.arange(length)[None])
            attention(hidden, position_embeddings=positions, **{runtime.CACHE: cache}, **given)
            given[runtime.CACHE] = cache
        new = hidden[:, :1] if args.decode else hidden
        first = length if args.decode else 0
        given["position_embeddings"] = rotary(new, torch.arange(first, first + new.shape[1])[None])
        calls.append((attention, new, given))

    times = [[], []]
    repeat = 20 if args.decode else 1  # a token's block is too short for one reading of the clock
    for _ in range(args.runs + 1):
        for (attention, new, given), found in zip(calls, times, strict=True):
            began = time.perf_counter()
            for _ in range(repeat):
                attention(new, **given)
            found.append((time.perf_counter() - began) / repeat * 1e3)
    with counted(gated) as work:
        attention, new, given = calls[1]
        attention(new, **given)
    plain, ours = (statistics.median(found[1:]) for found in times)
    ratio = sum(work.done.values()) / sum(work.dense.values())
    print(f"| {length:,} | {active:g} | {plain:.3g} | {ours:.3g} | {ours / plain:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
