"""What was measured, checked, pushed or found, as tables."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from . import STATUS_STYLE, console, size


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
