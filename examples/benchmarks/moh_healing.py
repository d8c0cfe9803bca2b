"""Does training MoH's routers pay? The same healing with routers that train and with frozen ones, for several seeds.

    python examples/benchmarks/moh_healing.py [MODEL] --texts builtin NOVEL --out FILE

The model is converted by `moh` once, with the router of `--router`. Each healing trains low-rank updates and gates on
`--tokens` tokens of `--data` towards the base's probabilities; in the control `heal.freeze` holds the routers. The
table gives the loss above the base on held-out windows of each text. "old routers" is the model with trained routers,
whose routers are then set back to those of the start. "other heads" is the share of tokens for which a layer of that
model chooses other heads than the old routers would; it is the mean over layers, on the first text. `--router norm` is
the paper's form for LLMs, whose routers have no weights: there is no control, and no old router. `--out` holds what
was measured so far, and the same command resumes.
"""

import argparse
import shutil
import statistics
from functools import partial
from pathlib import Path

import torch
from measured import Measured
from text_losses import above, losses_on

import surgery
from surgery.data.text import load_text, windows
from surgery.io.hub import resolve
from surgery.runtime.modeling_surgery import attention_modules
from surgery.runtime.surgery_gates import parameters_of

ROUTERS = ("surgery_router", "surgery_router_bias", "surgery_router_temperature")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="smollm2-135m")
parser.add_argument("--tokens", type=int, default=32768)
parser.add_argument("--batch-tokens", type=int, default=512)
parser.add_argument("--data", default="builtin", help="text to train on: builtin (its calibration part), self, a file")
parser.add_argument("--balance", type=float, default=0.01)
parser.add_argument("--router", default="fit", help="the router of the start: fit, random, zero, norm")
parser.add_argument("--windows", type=int, default=4)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--texts", nargs="+", default=["builtin"], help="held-out texts: builtin, files")
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
parser.add_argument("--out", type=Path, required=True)


def routers(model) -> list[dict[str, torch.Tensor]]:
    """A copy of every layer's router, name -> tensor."""
    return [
        {name: getattr(module, name).detach().clone() for name in ROUTERS if hasattr(module, name)}
        for module in attention_modules(model)
    ]


def set_back(model, old: list[dict[str, torch.Tensor]]) -> None:
    """Give a model these routers."""
    for module, tensors in zip(attention_modules(model), old, strict=True):
        for name, tensor in tensors.items():
            getattr(module, name).data.copy_(tensor)


def share_of_other_heads(model, old: list[dict[str, torch.Tensor]], ids: torch.Tensor) -> float:
    """The share of tokens for which a layer chooses other heads than with the old router, mean over layers."""
    shares: list[float] = []

    def compare(index: int, module, args, kwargs) -> None:
        hidden, gate = args[0] if args else kwargs["hidden_states"], module.surgery_gate
        now = parameters_of(module)
        before = now | {name.removeprefix("surgery_"): tensor for name, tensor in old[index].items()}
        chosen = [gate.chosen(gate.logits(hidden, each)) for each in (now, before)]
        shares.append((chosen[0] != chosen[1]).any(-1).double().mean().item())

    handles = [
        module.register_forward_pre_hook(partial(compare, index), with_kwargs=True)
        for index, module in enumerate(attention_modules(model))
    ]
    try:
        with torch.no_grad():
            for row in ids:
                model(input_ids=row[None], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return statistics.mean(shares)


def main() -> None:
    options = parser.parse_args()
    path, counts = resolve(options.model).path, {"windows": options.windows, "length": options.length}
    measured = Measured(options.out, {k: v for k, v in vars(options).items() if k not in ("out", "seeds")})
    tokenizer, start = surgery.load_tokenizer(path), options.out.with_name(f"{options.out.stem}-start")
    if not start.is_dir():
        chosen = [f"router={options.router}", *(["shared=first"] if options.router == "norm" else [])]
        surgery.apply("moh", path, overrides=chosen, output=start, gate=False, check=False, evaluate=False)

    losses = partial(losses_on, options.texts, tokenizer=tokenizer, **counts)

    def healed(seed: int, freeze: list[str]) -> dict:
        folder = options.out.with_name(f"{options.out.stem}-healed")
        settings = {"method": "lora", "loss": "distill", "tokens": options.tokens, "seed": seed, "freeze": freeze}
        settings |= {"batch_tokens": options.batch_tokens, "data": options.data, "balance": options.balance}
        surgery.heal(start, path, output=folder, settings=settings, check=False, evaluate=False, overwrite=True)
        model, old = surgery.load(folder).eval(), routers(surgery.load(start))
        found: dict = {"losses": losses(model)}
        if not freeze and options.router != "norm":
            ids = windows(load_text(options.texts[0], part="held-out"), tokenizer, options.length, options.windows)
            found["other"] = share_of_other_heads(model, old, ids)
            set_back(model, old)
            found["old"] = losses(model)
        shutil.rmtree(folder)
        return found

    base = measured.once("base", lambda: losses(surgery.load(path)))
    first = measured.once("start", lambda: losses(surgery.load(start)))

    print(f"base: {', '.join(f'{x:.4f}' for x in base)} nats; on {', '.join(options.texts)}")
    print(f"| nats above the base | {' | '.join(options.texts)} | other heads |")
    print(f"| --- |{' ---: |' * (len(options.texts) + 1)}")
    print(f"| start | {above(first, base)} | |", flush=True)
    for seed in options.seeds:
        trained = measured.once(f"trained {seed}", partial(healed, seed, []))
        if options.router == "norm":
            print(f"| trained, seed {seed} | {above(trained['losses'], base)} | |", flush=True)
            continue
        print(f"| routers train, seed {seed} | {above(trained['losses'], base)} | {trained['other']:.1%} |")
        print(f"| the same with old routers, seed {seed} | {above(trained['old'], base)} | |", flush=True)
        frozen = measured.once(f"frozen {seed}", partial(healed, seed, ["*surgery_router*"]))
        print(f"| frozen routers, seed {seed} | {above(frozen['losses'], base)} | |", flush=True)


if __name__ == "__main__":
    main()
