"""What healing costs: a training step by its loss, and the text that the base writes itself.

    python examples/bench_healing.py step [MODEL] [--layers 6] [--rows 2] [--length 512]
    python examples/bench_healing.py stored [MODEL]
    python examples/bench_healing.py write [MODEL] [--batches 8 32 64] [--dtypes float32 bfloat16]

step: one step of full training (forward, loss, backward, AdamW) of a model of the shape of MODEL with random weights,
fewer layers and its whole vocabulary, the losses in turn, medians; each beside the step with our cross-entropy.
stored: what a stored teacher loses by its k tokens and by their precision: KL to a student whose V is off by 30%,
and how far the gradient is from that of the whole distribution.
write: tokens a second that MODEL writes, what a million tokens take, and how the samples begin.
"""

import argparse
import copy
import statistics
import tempfile
import time
from types import SimpleNamespace

from surgery.hub import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "stored", "write"])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="of the process: for a machine that has other work")
    parser.add_argument("--bfloat16", action="store_true", help="step: under autocast")
    args = parser.parse_args()
    import torch

    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{args.model}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    {"step": step, "stored": stored, "write": write}[args.what](args)


def step(args) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from surgery.healing.packing import Packed, arguments
    from surgery.healing.stored import store
    from surgery.healing.teacher import LiveTeacher, StoredTeacher

    config = AutoConfig.from_pretrained(resolve(args.model).path)
    config.num_hidden_layers, config.dtype = args.layers, torch.float32
    base = AutoModelForCausalLM.from_config(config).to(args.device)
    student = copy.deepcopy(base).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    texts = torch.randint(3, config.vocab_size, (args.rows, args.length)).tolist()
    rows = Packed(texts, args.length)
    batch = torch.utils.data.default_collate([rows[number] for number in range(len(rows))])
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}

    def asked(loss: str) -> SimpleNamespace:
        return SimpleNamespace(loss=loss, mix=0.5, temperature=1.0, hidden=0.0)

    with tempfile.TemporaryDirectory() as folder:
        store(base, rows, folder, top_k=64)
        live, stored = LiveTeacher(base), StoredTeacher(folder)
        kinds = {
            "cross-entropy": lambda outputs: live.loss(outputs, batch, asked("ce"))[0],
            "cross-entropy, Transformers' own": lambda outputs: student.loss_function(
                outputs.logits, batch["labels"], config.vocab_size
            ),
            "distillation, live teacher": lambda outputs: live.loss(outputs, batch, asked("distill"))[0],
            "distillation, stored top 64": lambda outputs: stored.loss(outputs, batch, asked("distill"))[0],
            "both, live teacher": lambda outputs: live.loss(outputs, batch, asked("both"))[0],
        }
        times = {name: [] for name in kinds}
        for run in range(args.runs + 1):
            for name, loss_of in kinds.items():
                begin = now(args)
                with torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16):
                    loss = loss_of(student(**arguments(student, batch, hidden=False)))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if run:  # the first makes what is made once
                    times[name].append(now(args) - begin)
    print(f"{args.layers} layers, {args.rows} x {args.length} tokens, vocabulary {config.vocab_size}, full training")
    print("| loss | ms a step | ratio |\n| --- | ---: | ---: |")
    first = statistics.median(times["cross-entropy"])
    for name, each in times.items():
        print(f"| {name} | {1000 * statistics.median(each):.0f} | {statistics.median(each) / first:.2f} |")


def stored(args) -> None:
    import torch

    from surgery.anatomy import Anatomy
    from surgery.calibration.sequences import calibration_pieces
    from surgery.healing.losses import distillation, distillation_top_k
    from surgery.healing.stored import as_distribution, top_k_and_rest
    from surgery.scoring import load_model, read_tokenizer

    folder = resolve(args.model).path
    model = load_model(folder).to(args.device).eval()
    ids = calibration_pieces(model, read_tokenizer(folder), "builtin", args.length, 1).to(args.device)
    with torch.no_grad():
        base = model(input_ids=ids, use_cache=False).logits.float()
        for layer in Anatomy.of(model).layers:
            weight = model.get_parameter(f"{layer.path}.{layer.layout.v}.weight")
            weight.mul_(1 + 0.3 * torch.randn(len(weight), 1, device=weight.device))
        logits = model(input_ids=ids, use_cache=False).logits.float()
    kept = torch.ones_like(ids, dtype=torch.bool)

    def measured(function) -> tuple:
        student = logits.clone().requires_grad_()
        loss = function(student)
        return loss.item(), torch.autograd.grad(loss, [student])[0]

    whole, slope = measured(lambda student: distillation(student, base, kept))
    print(f"{ids.shape[1]} tokens, KL of the whole distribution {whole:.4f} nats")
    print("| tokens kept | precision | KL | gradient off by | bytes a token |\n| ---: | --- | ---: | ---: | ---: |")
    for k in (16, 64, 256):
        for dtype in (torch.float32, torch.float16):
            values, indices, rest = top_k_and_rest(base[0], k, 1.0)
            values, rest = as_distribution(values.to(dtype), rest.to(dtype))
            three = (tensor[None] for tensor in (values, indices, rest))
            kl, found = measured(lambda student, three=tuple(three): distillation_top_k(student, *three, kept))
            size = (k + 1) * dtype.itemsize + k * (2 if base.shape[-1] <= 1 << 16 else 4)
            off = ((found - slope).norm() / slope.norm()).item()
            print(f"| {k} | {str(dtype).removeprefix('torch.')} | {kl:.5f} | {off:.4%} | {size} |", flush=True)


def now(args) -> float:
    import torch

    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.cpu_time else time.perf_counter()


def write(args) -> None:
    import torch

    from surgery.calibration.self_text import sample
    from surgery.scoring import load_model, read_tokenizer

    folder = resolve(args.model).path
    tokenizer = read_tokenizer(folder)
    print("| dtype | samples at a time | tokens/s | hours for 1M tokens | ended | different |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for dtype in args.dtypes:
        model = load_model(folder, dtype=getattr(torch, dtype)).to(args.device).eval()
        for batch in args.batches:
            asked = SimpleNamespace(length=args.length, chat=False, seed=0)
            begin = now(args)
            found = sample(model, tokenizer, asked, 1, batch=batch)
            speed = sum(map(len, found)) / (now(args) - begin)
            ended = sum(len(each) < args.length for each in found) / len(found)
            fours = [tuple(each[i : i + 4]) for each in found for i in range(len(each) - 3)]
            different = len(set(fours)) / len(fours)
            hours = 1e6 / speed / 3600
            print(f"| {dtype} | {batch} | {speed:.0f} | {hours:.1f} | {ended:.0%} | {different:.0%} |", flush=True)
    for each in found[:6]:
        print("   ", repr(tokenizer.decode(each[:40])))


if __name__ == "__main__":
    main()
