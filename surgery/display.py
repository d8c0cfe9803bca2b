"""What the command line prints: tables and trees for people. No logic; every number comes from the API's objects."""

from __future__ import annotations

import sys
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

DAMAGE_RATIO, DAMAGE_KL = 2.0, 1.0  # beyond these a model is said to be not usable before healing
STATUS_STYLE = {"passed": "green", "failed": "bold red", "not run": "yellow", "skipped": "yellow"}


def console(stderr: bool = False) -> Console:
    """A console that wraps nothing in a pipe and colours only a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    piped = not stream.isatty()
    return Console(file=stream, soft_wrap=piped, width=1000 if piped else None, highlight=False)


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


def catalogue(recipes: dict, classes: dict, broken: dict) -> None:
    out = console()
    table = Table("recipe", "what it does", title="Recipes", title_justify="left", box=None, pad_edge=False)
    for name, description in recipes.items():
        table.add_row(name, description)
    out.print(table)
    for op, cls in classes.items():
        out.print(Text.assemble("\n", (op, "bold"), "  ", cls.summary))
        fields = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1))
        for name, field in cls.model_fields.items():
            if name != "op":
                default = "required" if field.is_required() else f"default {field.default}"
                fields.add_row(f"  {name}", Text(default, style="dim"), field.description or "")
        out.print(fields)
    for op, error in broken.items():
        out.print(Text.assemble("\n", (op, "bold red"), "  ", error))


def anatomy(facts) -> None:
    """The anatomy as a table; equal layers are shown once."""
    out, first = console(), facts.layers[0]
    name = f"{facts.composite} ({facts.model_type})" if facts.composite else facts.model_type
    out.print(
        f"{name}{', a guess' if facts.guess else ''}: {len(facts.layers)} attention layers, {facts.dtype or '?'}"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("layers", "query heads", "KV heads", "head size", "positions", "QK-norm", "window", "biases"):
        table.add_column(column)
    for run in _runs(facts.layers):
        layer = run[0]
        label = f"{layer.index}-{run[-1].index}" if len(run) > 1 else str(layer.index)
        turned = f", {layer.rotary} of {layer.head_dim}" if 0 < layer.rotary < layer.head_dim else ""
        cells = (layer.heads, layer.kv_heads, layer.head_dim, layer.positions + turned, layer.qk_norm or "none")
        table.add_row(label, *map(str, cells), str(layer.window or "none"), layer.biases or "none")
    out.print(table)
    kind = f"fused {first.layout.qkv} ({first.layout.layout})" if first.layout.qkv else "separate q, k, v"
    out.print(f"projections: {kind}, {first.path.replace('.0.', '.N.')}")
    extra = [f"soft-cap {first.soft_cap}"] if first.soft_cap else []
    extra += ["learned sinks"] if first.layout.sinks else []
    extra += [] if first.layout.interface else ["attention outside Transformers' attention interface"]
    if extra:
        out.print("also: " + ", ".join(extra))
    out.print(f"KV cache: {facts.kv_bytes_per_token:,} bytes per token")


def applicable(rows: dict[str, list[str]]) -> None:
    """Which recipes fit the model: name -> reasons against it."""
    out = console()
    for name, problems in rows.items():
        mark = Text("can be applied  ", style="green") if not problems else Text("cannot be  ", style="yellow")
        out.print(Text.assemble((f"{name:<12}", "bold"), mark, "; ".join(problems)))


def plan(work) -> None:
    """The old → new tree."""
    before, after = work.before, work.after
    tree = Tree(Text.assemble((work.recipe.name, "bold"), f" on {work.source} ({before.model_type}): {work.tier}"))
    for old_run in _runs(before.layers):
        first, new = old_run[0], after.layers[old_run[0].index]
        where = first.path.replace(f".{first.index}.", f".{first.index}-{old_run[-1].index}.", 1)
        branch = tree.add(where)
        branch.add(f"query heads {_arrow(first.heads, new.heads)}, of {first.head_dim}")
        branch.add(
            f"KV heads {_arrow(first.kv_heads, new.kv_heads)}, {_arrow(first.group, new.group)} query heads each"
        )
        for name in new.tensor_names:
            full = f"{first.path}.{name}"
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
    if before.tensors:
        out.print(f"parameters: {_arrow(before.parameters, work.parameters_after)}")
        out.print(
            f"output: {size(work.output_bytes)}; estimate: {size(work.memory_bytes)} memory, {work.seconds:.0f} s"
        )


def checks(items: list[dict]) -> None:
    out = console()
    for item in items:
        style = STATUS_STYLE[item["status"]]
        out.print(Text.assemble((f"{item['status']:<8}", style), f"{item['name']:<32}", (item["detail"], "dim")))


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


def summary(report) -> None:
    """The three lines that `apply` ends with: what changed, what it cost, what to type next."""
    data, out = report.data, console()
    kv, result, gate = data["plan"]["kv_bytes_per_token"], data["evaluation"], data["gate"]
    out.print(
        f"changed: {'; '.join(data['plan']['changes'])}; KV cache {kv['before']:,} → {kv['after']:,} bytes per token"
    )
    out.print(Text.assemble("cost:    ", _cost(result), ", gate ", (gate["status"], STATUS_STYLE[gate["status"]])))
    folder = report.folder.name if report.folder.parent.samefile(".") else str(report.folder)
    out.print(f"next:    {_next(data, folder)}")


def unusable(result: dict | None) -> bool:
    """Whether an evaluation shows damage that only training mends."""
    if not result or result["status"] != "done" or not result.get("base"):
        return False
    new, old, kl = result["out"]["perplexity"], result["base"]["perplexity"], result["kl"]["mean"]
    return None in (new, kl) or new > DAMAGE_RATIO * old or kl > DAMAGE_KL


def _cost(result: dict | None) -> str:
    if not result:
        return "not measured"
    if result["status"] != "done":
        return f"not measured ({result.get('reason', '')})"
    new, old, kl = result["out"]["perplexity"], result["base"]["perplexity"], result["kl"]["mean"]
    if new is None or kl is None:
        return "the model gives NaN: not usable"
    usable = ": not usable before healing" if unusable(result) else ""
    return (
        f"perplexity {old:,.2f} → {new:,.2f}, KL {kl:.3f} nats, same best token {result['top1_agreement']:.1%}{usable}"
    )


def _next(data: dict, folder: str) -> str:
    quoted = f'"{folder}"' if " " in folder else folder
    if data["check"] is None:
        return f"surgery check {quoted}"
    if not data["check"]["passed"]:
        return f"surgery check {quoted} names the fault; the base is untouched"
    if data["evaluation"] is None:
        return f"surgery eval {quoted} --base {data['base']['name']}"
    if unusable(data["evaluation"]):
        return f"train {quoted} before use, or choose more KV heads (surgery plan)"
    return f'AutoModelForCausalLM.from_pretrained("{folder}"), or surgery push {quoted} OWNER/NAME'


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
    return tuple(value for name, value in vars(layer).items() if name not in ("index", "path"))


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
