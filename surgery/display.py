"""What the command line prints: tables and trees for people. No logic; every number comes from the API's objects."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

STATUS_STYLE = {
    "passed": "green",
    "failed": "bold red",
    "measured": "cyan",
    "not run": "yellow",
    "skipped": "yellow",
}
LOADED = 1.3  # memory of a loaded model over its bytes on disk, with room for activations
BROKEN_PIPE = 141  # what a shell gives for a command whose reader went away


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader has seen enough (`surgery ls | head -1`): no fault of anybody's."""
        reader_left()


def reader_left() -> None:
    """End quietly where stdout is a pipe that nobody reads any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
    raise SystemExit(BROKEN_PIPE)


def console(stderr: bool = False) -> Console:
    """A console that wraps nothing in a pipe, colours only a terminal, and prints a user's [text] as it is."""
    stream = sys.stderr if stderr else sys.stdout
    piped, plain = not stream.isatty(), {"highlight": False, "markup": False, "emoji": False}
    return _Console(file=stream, soft_wrap=piped, width=1000 if piped else None, **plain)


@contextmanager
def progress_bar(quiet: bool):
    """A callback(done, total, label) that draws a bar on stderr once two seconds have passed, in a terminal only."""
    import time

    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>14}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console(stderr=True), transient=True)
    tasks, began, shown = {}, time.monotonic(), False

    def update(done: int, total: int, label: str) -> None:
        nonlocal shown
        if not shown and time.monotonic() - began > 2:
            bar.start()
            shown = True
        if label not in tasks:
            tasks[label] = bar.add_task(label, total=total)
        bar.update(tasks[label], completed=done, total=total, visible=done < total)

    try:
        yield update
    finally:
        if shown:
            bar.stop()


def size(count: float) -> str:
    """Bytes for people: 520.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def anatomy(facts) -> None:
    """The anatomy as a table; equal layers are shown once."""
    out, first = console(), facts.layers[0]
    name = f"{facts.composite} ({facts.model_type})" if facts.composite else facts.model_type
    out.print(
        f"{name}{', a guess' if facts.guess else ''}: {len(facts.layers)} attention layers, {facts.dtype or '?'}"
    )
    table = Table(box=None, pad_edge=False)
    split = any(layer.streaming for layer in facts.layers)
    for column in (
        "layers",
        "query heads",
        "KV heads",
        *["streaming"] * split,
        "head size",
        "positions",
        "QK-norm",
        "window",
        "biases",
    ):
        table.add_column(column)
    for run in _runs(facts.layers):
        layer = run[0]
        label = f"{layer.index}-{run[-1].index}" if len(run) > 1 else str(layer.index)
        turned = f", {layer.rotary} of {layer.head_dim}" if 0 < layer.rotary < layer.head_dim else ""
        streaming = [len(layer.streaming)] * split
        cells = (
            layer.heads,
            layer.kv_heads,
            *streaming,
            layer.head_dim,
            layer.positions + turned,
            layer.qk_norm or "none",
        )
        table.add_row(label, *map(str, cells), str(layer.window or "none"), layer.biases or "none")
    out.print(table)
    kind = f"fused {first.layout.qkv} ({first.layout.layout})" if first.layout.qkv else "separate q, k, v"
    out.print(f"projections: {kind}, {first.path.replace('.0.', '.N.')}")
    extra = [f"soft-cap {first.soft_cap}"] if first.soft_cap else []
    extra += ["learned sinks"] if first.layout.sinks else []
    extra += [] if first.layout.interface else ["attention outside Transformers' attention interface"]
    if extra:
        out.print("also: " + ", ".join(extra))
    fixed = f", and {facts.kv_bytes_fixed:,} bytes of sinks and windows" if facts.kv_bytes_fixed else ""
    out.print(f"KV cache: {facts.kv_bytes_per_token:,} bytes per token{fixed}")
    for layer in (each for each in facts.layers if each.streaming):
        out.print(f"streaming: {layer.sinks} sinks + {layer.streaming_window} tokens")
        break


def applicable(rows: dict[str, list[str]]) -> None:
    """Which recipes fit the model: name -> reasons against it."""
    out = console()
    for name, problems in rows.items():
        mark = Text("can be applied  ", style="green") if not problems else Text("cannot be  ", style="yellow")
        out.print(Text.assemble((f"{name:<12}", "bold"), mark, "; ".join(problems)))


def plan(work) -> None:
    """The old → new tree."""
    before, after = work.before, work.after
    # Where the model is measured first, which heads of which layer change is not known yet: totals alone are.
    known = not any(step.change.measured for step in work.steps)
    tree = Tree(Text.assemble((work.recipe.name, "bold"), f" on {work.source} ({before.model_type}): {work.tier}"))
    for old, new, last in _changes(before.layers, after.layers, known):
        where = old.path.replace(f".{old.index}.", f".{old.index}-{last}.", 1)
        branch = tree.add(where)
        branch.add(f"query heads {_arrow(old.heads, new.heads)}, of {old.head_dim}")
        branch.add(f"KV heads {_arrow(old.kv_heads, new.kv_heads)}, {_arrow(old.group, new.group)} query heads each")
        if known and (old.streaming or new.streaming):
            branch.add(f"streaming KV heads {_arrow(len(old.streaming), len(new.streaming))}")
        for name in new.tensor_names:
            full = f"{old.path}.{name}"
            old_shape = before.tensors.get(full, ("", None))[1]
            new_shape = work.shapes.get(full, old_shape)
            if old_shape != new_shape:
                branch.add(f"{name} {_arrow(_shape(old_shape), _shape(new_shape))}")
    for change in work.changes:
        tree.add(Text(change, style="bold"))
    for note in work.notes:
        tree.add(Text(f"note: {note}", style="yellow"))
    out = console()
    out.print(tree)
    out.print(f"KV cache per token: {_arrow(before.kv_bytes_per_token, after.kv_bytes_per_token)} bytes")
    if before.kv_bytes_fixed or after.kv_bytes_fixed:
        out.print(f"KV cache of sinks and windows: {_arrow(before.kv_bytes_fixed, after.kv_bytes_fixed)} bytes, fixed")
    if before.tensors:
        out.print(f"parameters: {_arrow(before.parameters, work.parameters_after)}")
        loaded = size(work.output_bytes * LOADED)
        if work.streams:
            out.print(
                f"rewriting: {size(work.output_bytes)} of output, about {size(work.memory_bytes)} of memory, "
                f"{work.seconds:.0f} s"
            )
        else:
            out.print(f"editing: {size(work.output_bytes)} of output; the model is loaded: about {loaded} of memory")
        out.print(f"check and eval load the model: about {loaded} of memory")


def _changes(before, after, known: bool) -> list[tuple]:
    """(old layer, new layer, number of the last) of neighbouring layers that change alike."""
    runs: list[tuple] = []
    facts = None
    for old, new in zip(before, after, strict=True):
        here = (_facts(old), _facts(new) if known else new.kv_heads)
        if here == facts:
            runs[-1] = (*runs[-1][:2], old.index)
        else:
            runs.append((old, new, old.index))
        facts = here
    return runs


def checks(items: list[dict]) -> None:
    out = console()
    for item in items:
        style = STATUS_STYLE.get(item["status"], "")
        out.print(Text.assemble((f"{item['status']:<9}", style), f"{item['name']:<32}", (item["detail"], "dim")))


def evaluation(result: dict) -> None:
    out = console()
    if result["status"] != "done":
        out.print(f"not run: {result.get('reason', '')}")
        return
    text, base, new = result["text"], result.get("base"), result["out"]
    table = Table("", *(["base"] if base else []), "model", box=None, pad_edge=False)
    for label, key, form in (
        ("perplexity", "perplexity", "{:,.3f}"),
        ("cross-entropy, nats", "cross_entropy", "{:.4f}"),
        ("KV bytes per token", "kv_bytes_per_token", "{:,}"),
        ("bytes to load", "load_bytes", "{:,}"),
    ):
        cells = [side.get(key) for side in ((base, new) if base else (new,))]
        table.add_row(label, *("?" if cell is None else form.format(cell) for cell in cells))
    out.print(table)
    if base:
        kl, same = result["kl"], result["top1_agreement"]
        if kl.get("mean") is not None:
            out.print(
                f"KL to base: mean {kl['mean']:.4f}, 99th percentile {kl['p99']:.3f} nats (top {kl['top_k']} + rest)"
            )
            out.print(f"same best token: {same:.1%}")
    out.print(f"on {text['tokens']:,} tokens of {text['title']}, sha256 {text['sha256']}")
    for note in result.get("notes", []):
        out.print(f"note: {note}")


def _runs(layers) -> list[list]:
    """Neighbouring layers that differ in nothing but their number."""
    runs: list[list] = []
    for layer in layers:
        if runs and _facts(runs[-1][0]) == _facts(layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _facts(layer) -> tuple:
    facts = vars(layer) | {"streaming": len(layer.streaming)}  # their number: which ones is --json's
    return tuple(value for name, value in facts.items() if name not in ("index", "path"))


def _arrow(old, new) -> str:
    shown = [f"{value:,}" if isinstance(value, int) else str(value) for value in (old, new)]
    return shown[0] if shown[0] == shown[1] else " → ".join(shown)


def _shape(shape) -> str:
    return "none" if shape is None else str(list(shape))


def pushed(facts: dict) -> None:
    out = console()
    for file in facts["files"]:
        out.print(f"{size(file['bytes']):>10}  {file['name']}")
    if facts["dry_run"]:
        out.print(
            f"dry run: {size(facts['bytes'])} would go to {facts['repo']} ({facts['visibility']}); nothing was sent"
        )
    else:
        out.print(f"pushed {size(facts['bytes'])} to {facts['url']} ({facts['visibility']}), commit {facts['commit']}")
    for warning in facts["warnings"]:
        out.print(Text(f"warning: {warning}", style="yellow"))


def doctor(facts: dict) -> None:
    out = console()
    out.print(f"surgery {facts['surgery']}, Python {facts['python']}, {facts['system']}")
    out.print("packages: " + ", ".join(f"{name} {version or 'absent'}" for name, version in facts["packages"].items()))
    memory = "unknown" if facts["memory_free"] is None else size(facts["memory_free"])
    out.print(f"devices:  {', '.join(facts['devices'])}; {facts['threads']} threads; {memory} memory free")
    out.print(
        f"disk:     {size(facts['disk_free']['here'])} free here, {size(facts['disk_free']['cache'])} in the cache"
    )
    out.print("Hub:      " + ("offline (HF_HUB_OFFLINE)" if facts["offline"] else "may be used"))
    for name, state in facts["doors"].items():
        out.print(f"door:     {name}: {state}")
    out.print(f"kernels:  {facts['kernels']}")
    for problem in facts["problems"]:
        out.print(Text(f"problem:  {problem}", style="yellow"))


def benchmark(result) -> None:
    out, table = console(), Table(box=None, pad_edge=False)
    for column in ("tokens", "model", "prefill, s", "decode, ms per token", "cache"):
        table.add_column(column)
    for t in result.timings:
        cells = (f"{t.prefill:.2f} (x{t.prefill_spread:.2f})", f"{t.decode * 1000:.1f} (x{t.decode_spread:.2f})")
        table.add_row(f"{t.length:,}", t.model, *cells, size(t.cache_bytes))
    out.print(table)
    for r in result.ratios():
        speed = f"prefill {r['prefill_vs_stock']:.2f}x of stock, decode {r['decode_vs_stock']:.2f}x of stock"
        split = f"{r['decode_vs_block_cache']:.2f}x of all heads full on the same cache"
        out.print(f"{r['length']:,} tokens: {speed} and {split}; cache bytes {r['cache_bytes_vs_stock']:.3f}x")
    out.print(f"medians of {result.rounds} rounds, largest over smallest in brackets; {result.machine}")
