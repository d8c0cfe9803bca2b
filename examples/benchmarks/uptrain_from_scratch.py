"""The GQA paper's figure at a small scale, from scratch: how much of the original training does a merge need?

    python examples/benchmarks/uptrain_from_scratch.py --out uptrain.json [--minutes 20 | --steps N] \\
        [--text FILE --held-out FILE]
    python examples/benchmarks/uptrain_from_scratch.py --base-only --out mha.json [--minutes 20 | --steps N]

A byte-level Llama with 8 query heads and 8 KV heads trains on the text (by default the calibration part of the
built-in one). Its KV heads are merged to 2 and to 1: the mean of each group, its first head, or new random heads. All
weights of each merged model then train for 0 to 10% of the original steps on the same text, and the model is scored on
held-out text (Ainslie et al. 2023, arXiv 2305.13245: mean pooling, its two controls, and the uptraining).

As in the paper, uptraining continues the original training: the same optimiser, batch, data and learning rate. The
paper's rate (T5's) is nearly constant at the end. Here every training, the base's and each uptraining, has a rate that
rises to `--rate` in the first 5% of its steps and falls to 0 as a cosine, so each point is a separate training. Such a
rise disturbs a model that is already trained, and further training may help any model. The row "8 | none" is the
control: the base itself, whose heads are not merged, trains for the same shares of its steps.

`--out` holds what was measured so far, and the same command resumes, also in the middle of the base's training. The
base is saved in a folder next to it, with its tokenizer, and the plot in a .png file. The built-in text is short: a
base that reads it some dozen times begins to memorise it. Its loss on the training text shows this.

With `--base-only` the script ends when the base is saved (uptrain.json: in uptrain-base). Every verb of `surgery`
takes that folder: a second model for every conversion, with a KV head for each query head. A step then has one row of
2,048 bytes by default, so that a head split, sparse prefill and the probes have something to show.
"""

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from measured import Measured
from transformers import TrainerCallback

import surgery
from surgery.data.packing import Packed
from surgery.data.text import BUILTIN, Text, load_text
from surgery.healing.distributed import on_cpu
from surgery.healing.trainer import (
    Clock,
    checkpoint_record,
    complete,
    complete_checkpoints,
    keep_newest,
    rate_at,
    remove_cut_off,
)
from surgery.machine.transformers_logging import quiet_transformers
from surgery.report.plots import COLOURS, Line, Panel, curves, ready

HEADS, WARMUP, ENDLESS = 8, 0.05, 1_000_000
SHAPE, SHAPE_ALONE = (256, 4), (2048, 1)  # bytes of a row, rows of a step: of the figure, with --base-only
END = "</s>"
REPORTS, TIMED = 10, 10  # lines on the base's training; steps between two logs
STARTS = dict(zip(("mean", "first", "random"), COLOURS, strict=False))  # method -> colour
SHAPES = ({"linestyle": "-", "marker": "o"}, {"linestyle": "--", "marker": "s"}, {"linestyle": ":", "marker": "^"})

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--base-only", action="store_true", help="train and save the base, and stop")
parser.add_argument("--minutes", type=float, default=20.0, help="of all trainings; --base-only: of the base's")
parser.add_argument("--steps", type=int, help="of the base's training, in place of --minutes")
parser.add_argument("--text", default=BUILTIN, help="a UTF-8 text file to train on; it goes with --held-out")
parser.add_argument("--held-out", default=BUILTIN, help="a UTF-8 text file to score on")
parser.add_argument("--kv-heads", type=int, nargs="+", choices=[4, 2, 1], default=[2, 1])
parser.add_argument("--shares", type=float, nargs="+", default=[0, 1, 2, 5, 10], help="%% of the original steps")
parser.add_argument("--hidden", type=int, default=128)
parser.add_argument("--layers", type=int, default=5)
parser.add_argument("--context", type=int, help="bytes of a row; 256, or 2,048 with --base-only")
parser.add_argument("--rows", type=int, help="of a step; 4, or 1 with --base-only")
parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
parser.add_argument("--windows", type=int, default=64, help="held-out windows of the context's length")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int)


def byte_tokenizer(context: int):
    """A tokenizer with one token for each byte and one that ends a text; it adds none to a text by itself.

    The end has the number of the byte 0xFF, which no UTF-8 text holds. Programs that generate or fill up rows need
    such a token. The base never reads it in its training, so it does not generate it either.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    never = "\u00ff"  # the letter of ByteLevel for 0xFF
    letters = [END if letter == never else letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END, model_max_length=context)


def new_model(options, end: int):
    """A Llama with random weights whose query heads have a KV head each; `end` is the token that ends a text."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


def pretrain(model, rows: Packed, options) -> int:
    """Train with Transformers' Trainer as healing does: AdamW, gradients clipped at 1, the same schedule of the rate.

    A checkpoint is kept next to the base's folder at each report, and the next call with the same options resumes.

    Returns:
        The number of steps.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    run, watch = training_folder(options), Watch(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.0)
    clock = watch.clock
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(clock.fraction if clock.limit else (step + 0.5) / options.steps, WARMUP)
    )
    settings = TrainingArguments(
        output_dir=str(run),
        max_steps=options.steps or ENDLESS,
        per_device_train_batch_size=options.rows,
        dataloader_drop_last=True,
        dataloader_pin_memory=not on_cpu(),
        logging_steps=TIMED,
        save_strategy="no",  # `Watch` says when
        report_to="none",
        seed=options.seed,
        disable_tqdm=True,
        use_cpu=on_cpu(),
        use_cache=True,  # it becomes the model's own setting
    )
    remove_cut_off(run)
    known = complete_checkpoints(run)
    watch.earlier = checkpoint_record(known[-1])["seconds"] if known else 0.0
    with quiet_transformers():
        trainer = Trainer(model, settings, train_dataset=rows, optimizers=(optimizer, schedule), callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(known[-1]) if known else None)
    return trainer.state.global_step


class Watch(TrainerCallback):
    """Follows the base's training: reports the loss and the time that is left, and says when to save and to stop.

    Attributes:
        clock: the seconds of the training; its limit is None where `--steps` ends it.
        earlier: seconds of training before a resume.
    """

    def __init__(self, options):
        self.options, self.earlier, self.begun, self.told = options, 0.0, 0, 0
        alone = 1 if options.base_only else 1 + uptrainings(options)
        self.clock = Clock(None if options.steps else options.minutes / alone)

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.start(self.earlier)
        self.begun, self.told = state.global_step, int(self.over(state) * REPORTS)
        if self.begun:
            print(f"base: resumes after step {self.begun:,}", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        if self.clock.limit:
            control.should_training_stop = self.over(state) >= 1
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        tenths, done = int(self.over(state) * REPORTS), state.global_step - self.begun
        if "loss" in logs and done and (tenths > self.told or done <= TIMED):
            control.should_save = tenths > self.told
            self.told = tenths
            print(self.report(state, done, logs["loss"]), file=sys.stderr, flush=True)
        return control

    def on_save(self, args, state, control, **kwargs):
        complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", seconds=self.clock.seconds)
        keep_newest(Path(args.output_dir), 1)

    def over(self, state) -> float:
        """The share of the training that is over."""
        return self.clock.fraction if self.clock.limit else state.global_step / self.options.steps

    def report(self, state, done: int, loss: float) -> str:
        """A line: the step, the mean loss of the last `TIMED` steps, the time that is left."""
        each = (self.clock.seconds - self.earlier) / done
        if self.clock.limit:
            left = self.clock.limit - self.clock.seconds
            steps = f"of about {state.global_step + round(left / each):,}"
        else:
            left = (self.options.steps - state.global_step) * each
            steps = f"of {self.options.steps:,}"
        return f"base: step {state.global_step:,} {steps}, loss {loss:.3f}, about {left / 60:.1f} minutes left"


def uptrainings(options) -> float:
    """How long all uptrainings take, as a share of the base's training."""
    return sum(options.shares) / 100 * (1 + len(STARTS) * len(options.kv_heads))


def uptrained(kv_heads: int, start: str, steps: int, tokenizer, options, progress) -> torch.nn.Module:
    """The base merged to `kv_heads` KV heads and then trained for `steps` steps (0: only merged)."""
    model = surgery.load(base_folder(options))
    merge = {"op": "gqa", "kv_heads": kv_heads, "method": "mean" if start == "none" else start, "seed": options.seed}
    surgery.apply({"version": 1, "name": "row", "operations": [merge], "evaluate": None}, model, tokenizer=tokenizer)
    if steps:
        size = {"length": options.context, "batch_tokens": options.rows * options.context, "steps": steps}
        how = {"method": "full", "loss": "ce", "data": options.text, "seed": options.seed + 1}
        how |= {"precision": "float32"}  # as the base was trained
        how |= {"learning_rate": options.rate, "warmup": WARMUP}
        label = f"{kv_heads} KV heads, {start}"
        surgery.heal(
            model, settings=how | size, tokenizer=tokenizer, progress=lambda done, of, _: progress(done, of, label)
        )
    return model.eval()


def loss(model, tokenizer, text: str | Text, options) -> float:
    """Cross-entropy on a text, in nats per byte."""
    size = {"windows": options.windows, "length": options.context}
    return surgery.evaluate(model.eval(), text=text, tokenizer=tokenizer, **size).out.cross_entropy


def base_folder(options) -> Path:
    return options.out.with_name(f"{options.out.stem}-base")


def training_folder(options) -> Path:
    """Where the base's checkpoints are while it trains."""
    return options.out.with_name(f"{options.out.stem}-training")


def show(done: int, of: int, label: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{label}: {done:,} of {of:,}   ", end="" if done < of else "\r\033[K", file=sys.stderr, flush=True)


def order(rows: dict, kv_heads: list[int], shares: list[float]) -> str:
    """Text on whether mean < first < random: the number of points where it holds, and the losses where it does not."""
    points = [(heads, share) for heads in kv_heads for share in shares]
    found = {(heads, share): [rows[f"{heads} {start} {share:g}"] for start in STARTS] for heads, share in points}
    wrong = [point for point in points if not found[point][0] < found[point][1] < found[point][2]]
    text = f"mean < first < random: at {len(points) - len(wrong)} of {len(points)} points"
    if not wrong:
        return text
    cases = []
    for heads, share in wrong:
        losses = ", ".join(f"{value:.4f}" for value in found[heads, share])
        cases.append(f"{heads} KV head{'s' * (heads > 1)}, {share:g}% ({losses})")
    return f"{text}; not at {'; '.join(cases)}"


def draw(measured: Measured, options, title: str) -> None:
    lines = {}

    def add(label: str, key: str, **style) -> None:
        losses = [measured[f"{key} {share:g}"] for share in options.shares]
        lines[label] = Line(options.shares, losses, style={"markersize": 4} | style)

    for heads, shape in zip(options.kv_heads, SHAPES, strict=False):
        for start, colour in STARTS.items():
            add(f"{heads} KV head{'s' * (heads > 1)}, {start}", f"{heads} {start}", color=colour, **shape)
    add("base, trained on", f"{HEADS} none", color="0.6", marker=".")
    panel = Panel(
        lines,
        "cross-entropy on held-out text, nats a byte",
        levels={f"base, {HEADS} KV heads": measured["base"]["loss"]},
    )
    curves(options.out.with_suffix(".png"), panel, x_label="uptraining, % of the original steps", title=title)


def main() -> None:
    options = parser.parse_args()
    if (options.text == BUILTIN) != (options.held_out == BUILTIN):
        parser.error("--text and --held-out go together: a model is scored on text like that which it trained on")
    context, rows = SHAPE_ALONE if options.base_only else SHAPE
    options.context, options.rows = options.context or context, options.rows or rows
    if options.threads:
        torch.set_num_threads(options.threads)
    ready(options.out.with_suffix(".png"))
    text, held = load_text(options.text, "calibration"), load_text(options.held_out, "held-out")
    names = ("base_only", "minutes", "steps", "hidden", "layers", "context", "rows", "rate", "windows", "seed")
    settings = {name: getattr(options, name) for name in names} | {"text": text.sha256, "held_out": held.sha256}
    measured, tokenizer = Measured(options.out, settings), byte_tokenizer(options.context)
    measured.keep()  # so that a base whose training was interrupted is not resumed with other settings
    base = measured.once("base", partial(make_base, text, tokenizer, options))
    if not base_folder(options).is_dir():
        raise SystemExit(f"the base is gone: {base_folder(options)}; name another --out to begin again")

    def row(heads: int, start: str, share: float) -> float:
        steps = max(1, round(share / 100 * base["steps"])) if share else 0
        model = uptrained(heads, start, steps, tokenizer, options, show)
        return loss(model, tokenizer, options.held_out, options)

    title = f"Llama of {base['parameters'] / 1e6:.1f}M parameters, {base['steps']:,} steps of "
    title += f"{options.rows * options.context:,} bytes"
    print(f"{title}\ntrained on {text.title}, sha256 {text.sha256[:12]}, {len(text.text.encode()):,} bytes")
    print(f"scored on {held.title}, sha256 {held.sha256[:12]}, {options.windows} windows of {options.context}")
    print(f"base: {base['loss']:.4f} nats a byte ({base['known']:.4f} on the text that it trained on)")
    if options.base_only:
        print(f"\n{base_folder(options)}")
        return
    print()
    print(f"| KV heads | start | {' | '.join(f'{share:g}%' for share in options.shares)} |")
    print(f"| ---: | --- |{' ---: |' * len(options.shares)}")
    for heads in (HEADS, *options.kv_heads):
        for start in STARTS if heads != HEADS else ("none",):
            cells = []
            for share in options.shares:
                found = measured.once(f"{heads} {start} {share:g}", partial(row, heads, start, share))
                cells.append(f"{found:.4f}")
            print(f"| {heads} | {start} | {' | '.join(cells)} |", flush=True)
    draw(measured, options, title)
    print(f"\n{options.out.with_suffix('.png')}\n{order(measured, options.kv_heads, options.shares)}")


def make_base(text: Text, tokenizer, options) -> dict:
    """Train the base, save it, score it."""
    model = new_model(options, tokenizer.eos_token_id)
    rows = Packed([tokenizer(text.text, verbose=False)["input_ids"]], options.context)  # as healing packs one text
    if len(rows) < options.rows:
        raise SystemExit(f"{text.title}: {len(rows)} rows of {options.context} bytes, a step needs {options.rows}")
    steps = pretrain(model, rows, options)
    with quiet_transformers():
        model.cpu().save_pretrained(base_folder(options))
        tokenizer.save_pretrained(base_folder(options))
    found, known = (loss(model, tokenizer, each, options) for each in (options.held_out, text))
    shutil.rmtree(training_folder(options), ignore_errors=True)
    return {"steps": steps, "parameters": model.num_parameters(), "loss": found, "known": known}


if __name__ == "__main__":
    main()
