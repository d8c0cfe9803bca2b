"""The cost of healing: a training step by its loss, the training loop, and the text that the base writes.

    python examples/benchmarks/bench_healing.py step [MODEL] [--methods full lora parts] [--layers 6] \\
        [--rows 2] [--length 512]
    python examples/benchmarks/bench_healing.py loop [MODEL] [--layers 6] [--rows 2] [--length 512] \\
        [--runs 5] [--steps 10]
    python examples/benchmarks/bench_healing.py stored [MODEL]
    python examples/benchmarks/bench_healing.py write [MODEL] [--batches 8 32 64] [--dtypes float32 bfloat16]

step: one step (forward, loss, backward, AdamW) of each method. The model has the shape of MODEL, random weights, fewer
layers and the whole vocabulary. Its KV heads were merged to one, because lora and parts train other parameters where
there was no surgery. The losses run in turn. For each, the table has the median time, its ratio to the step with our
cross-entropy, and the largest ratio that is allowed.
loop: tokens per second of `surgery.heal` (method full, loss ce) on such a merged model, and of a bare Trainer on a
stock model of that size. The two run in turn, on the same text in equally large batches. Time counts from the end of
the first step to the end of the last, so that reading the text and one-time work are left out.
stored: the error of a stored teacher, by its k tokens and their precision: the KL to a student whose V is off by 30%,
and how far the gradient is from that of the whole distribution.
write: tokens per second that MODEL writes, the hours for a million tokens, and how the samples begin.
"""

import argparse
import copy
import statistics
import tempfile
import time
from types import SimpleNamespace

import surgery
from surgery.io.hub import resolve

LIMITED = "distillation, live teacher", "distillation, stored top 64"
AT_MOST = {"full": (1.6, 1.2), "lora": (1.9, 1.2), "parts": (1.9, 1.2)}  # ratios to a step with cross-entropy
AT_LEAST = 0.95  # share of a bare Trainer's speed
MERGE = {"version": 1, "name": "merge", "operations": [{"op": "gqa", "kv_heads": 1}], "evaluate": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "loop", "stored", "write"])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", choices=list(AT_MOST), default=list(AT_MOST), help="step: of healing")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5, help="of everything that is timed, after one that is not")
    parser.add_argument("--steps", type=int, default=10, help="loop: in a round; the first is not timed")
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
    {"step": step, "loop": loop, "stored": stored, "write": write}[args.what](args)


def random_model(args):
    """A model of the shape of MODEL with random weights and fewer layers, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(resolve(args.model).path)
    config.num_hidden_layers, config.dtype = args.layers, torch.float32
    return AutoModelForCausalLM.from_config(config)


def step(args) -> None:
    import torch

    from surgery.data.packing import Packed
    from surgery.healing.teacher import LiveTeacher, StoredTeacher, store

    base = random_model(args).to(args.device)
    vocabulary = base.config.vocab_size
    rows = Packed(torch.randint(3, vocabulary, (args.rows, args.length)).tolist(), args.length)
    batch = torch.utils.data.default_collate([rows[number] for number in range(len(rows))])
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    print(f"{args.layers} layers, {args.rows} x {args.length} tokens, vocabulary {vocabulary}, {args.runs} runs")
    print("| method | loss | ms a step | ratio | at most |\n| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        store(base, rows, folder, top_k=64)
        for method in args.methods:
            times = timed_steps(method, base, LiveTeacher(base), StoredTeacher(folder), batch, args)
            first = statistics.median(times["cross-entropy"])
            limits = dict(zip(LIMITED, AT_MOST[method], strict=True))
            for name, each in times.items():
                ratio, limit = statistics.median(each) / first, limits.get(name, "")
                milliseconds = f"{1000 * statistics.median(each):.0f}"
                print(f"| {method} | {name} | {milliseconds} | {ratio:.2f} | {limit} |", flush=True)


def timed_steps(method: str, base, live, stored, batch: dict, args) -> dict[str, list[float]]:
    """Seconds of each step of a method, by its loss."""
    import torch

    from surgery.config.heal import Heal
    from surgery.data.packing import arguments
    from surgery.healing.lora import adapt, freeze
    from surgery.healing.models import rewritten_by
    from surgery.healing.run import trained_of

    plain = copy.deepcopy(base).requires_grad_(True)
    report, heal = surgery.apply(MERGE, plain), Heal(method=method, steps=1)
    trained = trained_of(plain, heal, rewritten_by(report.data), {})
    student = adapt(plain, heal, trained) if method == "lora" else plain
    if method != "lora":
        freeze(plain, trained.parameters)
    student.train()
    optimizer = torch.optim.AdamW([each for each in student.parameters() if each.requires_grad], lr=1e-6)

    def asked(loss: str) -> Heal:
        precision = "bfloat16" if args.bfloat16 else "float32"
        return Heal(steps=1, loss=loss, precision=precision)

    kinds = {
        "cross-entropy": lambda outputs: live.loss(outputs, batch, asked("ce"))[0],
        "cross-entropy, Transformers' own": lambda outputs: plain.loss_function(
            outputs.logits, batch["labels"], plain.config.vocab_size
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
                outputs = student(**arguments(plain, batch, hidden=False))
            loss_of(outputs).backward()
            optimizer.step()
            optimizer.zero_grad()
            if run:  # the first run includes one-time work
                times[name].append(now(args) - begin)
    return times


def loop(args) -> None:
    from transformers import AutoModelForCausalLM

    from surgery.config.heal import Heal
    from surgery.healing.contexts import use_bfloat16
    from surgery.io.loading import read_tokenizer

    tokenizer, merged = read_tokenizer(resolve(args.model).path), random_model(args)
    surgery.apply(MERGE, merged)
    stock = AutoModelForCausalLM.from_config(merged.config)
    size = {"length": args.length, "batch_tokens": args.rows * args.length, "steps": args.steps}
    heal = Heal(method="full", loss="ce", data="builtin", **size)
    sides = {"bare Trainer, stock": (bare_loop, stock), "surgery.heal, merged": (our_loop, merged)}
    speeds = {name: [] for name in sides}
    for number in range(args.runs + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            run, model = sides[name]
            speeds[name].append(run(model, tokenizer, heal, args))
    sizes = " and ".join(f"{model.num_parameters():,}" for _, model in sides.values())
    kind = f"{'bfloat16' if use_bfloat16(heal) else 'float32'} on {next(merged.parameters()).device.type}"
    print(f"{args.layers} layers, {sizes} parameters, {args.rows} x {args.length} tokens a step, {kind}")
    print(f"{args.runs} rounds of {args.steps - 1} timed steps\n")
    print("| loop | tokens/s | smallest | largest |\n| --- | ---: | ---: | ---: |")
    for name, each in speeds.items():
        del each[0]  # the first round includes one-time work
        print(f"| {name} | {statistics.median(each):.0f} | {min(each):.0f} | {max(each):.0f} |")
    ratios = [ours / bare for bare, ours in zip(*speeds.values(), strict=True)]
    row = f"{statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f}"
    print(f"| ratio, round by round (at least {AT_LEAST}) | {row} |")


def our_loop(model, tokenizer, heal, args) -> float:
    """Tokens per second of the healing loop."""
    ends = []

    def follow(done: int, of: int, label: str) -> None:
        if label.startswith("training:"):
            ends.append(now(args))

    surgery.heal(model, settings=heal, tokenizer=tokenizer, progress=follow)
    return speed_of(ends, heal)


def bare_loop(model, tokenizer, heal, args) -> float:
    """Tokens per second of Transformers' own Trainer, on rows of the same text, equally many in a forward."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from surgery.data.documents import Packed, documents
    from surgery.healing.contexts import use_bfloat16
    from surgery.healing.distributed import on_cpu
    from surgery.healing.plan import micro_rows
    from surgery.machine.transformers_logging import quiet_transformers

    ends = []  # the time at the end of each step

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(now(args))

    packed = Packed(documents(heal, tokenizer, model, rows_needed=heal.rows * heal.steps), heal.length)
    rows = [{"input_ids": ids, "labels": ids} for ids in packed.ids.long()]
    micro = micro_rows(heal.rows, heal.length, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=heal.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=heal.rows // micro,
            learning_rate=heal.rate,
            bf16=use_bfloat16(heal),
            use_cpu=on_cpu(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=not on_cpu(),
        )
        trainer = Trainer(model, settings, train_dataset=rows, callbacks=[Watch()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return speed_of(ends, heal)


def speed_of(ends: list[float], heal) -> float:
    """Tokens per second between the end of the first step and the end of the last."""
    return (len(ends) - 1) * heal.rows * heal.length / (ends[-1] - ends[0])


def stored(args) -> None:
    import torch

    from surgery.architecture.anatomy import Anatomy
    from surgery.data.calibration_text import calibration_sequences
    from surgery.healing.losses.kl import distillation, distillation_top_k
    from surgery.healing.plan import token_bytes
    from surgery.healing.teacher import as_distribution, top_k_and_rest
    from surgery.io.loading import load_model, read_tokenizer

    folder = resolve(args.model).path
    model = load_model(folder).to(args.device).eval()
    ids = calibration_sequences(model, read_tokenizer(folder), "builtin", args.length, 1).to(args.device)
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
            size = token_bytes(k, base.shape[-1], dtype.itemsize)
            off = ((found - slope).norm() / slope.norm()).item()
            print(f"| {k} | {str(dtype).removeprefix('torch.')} | {kl:.5f} | {off:.4%} | {size} |", flush=True)


def now(args) -> float:
    import torch

    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.cpu_time else time.perf_counter()


def write(args) -> None:
    import torch

    from surgery.data.generated import sample
    from surgery.io.loading import load_model, read_tokenizer

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
