"""What was measured, checked, pushed or found, as tables.

What a calibration of sparse prefill found, as a table.
"""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from surgery.cli.render.console import STATUS_STYLE, console, size
from surgery.evaluation.probes.base import Probe, Result
from surgery.evaluation.probes.base import Table as Data


def checks(items: list[dict]) -> None:
    out = console()
    for item in items:
        style = STATUS_STYLE.get(item["status"], "")
        out.print(Text.assemble((f"{item['status']:<9}", style), f"{item['name']:<32}", (item["detail"], "dim")))


def measured(probe: type[Probe], result: Result) -> None:
    """What a probe says of its result."""
    out = console()
    if result.status != "done":
        out.print(f"not run: {result.reason}")
        return
    for each in probe.lines(result):
        out.print(_as_rich(each) if isinstance(each, Data) else each)
    for note in result.notes:
        out.print(f"note: {note}")


def _as_rich(data: Data) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in data.headers:
        table.add_column(header, justify=data.justify)
    for row in data.rows:
        table.add_row(*row)
    return table


def benchmark(result) -> None:
    out = console()
    rate = ("\ntok/s", "\nspread")
    table = _narrow("\ntokens", "", "prefill\ns", *rate, "decode\nms", *rate, "\ncache", "\npeak")
    last = None
    for t in result.timings:
        facts = t.to_dict()
        table.add_row(
            f"{t.length:,}" if t.length != last else "",
            t.model,
            f"{t.prefill:.2f}",
            f"{facts['prefill_tokens_per_second']:,.0f}",
            f"{facts['prefill_spread']:.2f}",
            f"{t.decode * 1000:.1f}",
            f"{facts['decode_tokens_per_second']:,.1f}",
            f"{facts['decode_spread']:.2f}",
            size(t.cache_bytes),
            "?" if t.peak_memory is None else size(t.peak_memory),
        )
        last = t.length
    out.print(table)
    out.print("spread: slowest to fastest round; peak: what the prompt takes beyond the weights, its cache included")
    out.print()
    table = _narrow("patched\ntokens", "", "\nprefill", "\ndecode", "\ncache", "cache,\ndecoding", "\npeak")
    for r in result.ratios():
        shares = ("cache_bytes_vs_stock", "decode_cache_bytes_vs_stock", "peak_memory_vs_stock")
        shares = ["?" if r[name] is None else f"{r[name]:.3f}" for name in shares]
        table.add_row(f"{r['length']:,}", "to base", *_speedups(r, "stock"), *shares)
        if result.split:
            table.add_row("", "to all full", *_speedups(r, "block_cache"), "", "", "")
    out.print(table)
    out.print("prefill, decode: times as fast (lowest-highest of the rounds); cache, peak: share of the base's bytes")
    out.print()
    _benchmarked(out, result)


def _benchmarked(out, result) -> None:
    """What the figures are of."""
    model, split = result.model, result.split
    out.print(
        f"base: {model['base_attention']}, {model['base_cache']}; {model['layers']} layers, {model['dtype']}, batch 1"
    )
    if split:
        out.print("all full: the patched model's weights and its cache, with every head full and on")
    if split and split["streaming"]:
        reach = " or ".join(f"{sinks} sinks + {window} tokens" for sinks, window in split["sinks_and_windows"])
        share = f"{split['streaming']} of {split['kv_heads']} KV heads ({split['ratio']:.3f})"
        layers = " ".join(map(str, split["streaming_per_layer"]))
        out.print(f"patched: {share} see {reach or 'no less'}; by layer {layers}")
    if gate := result.gate:
        kinds = " and ".join(gate["kinds"])
        out.print(f"patched: {kinds} in {gate['layers']} layers, {gate['on']:.0%} of the heads on for a token")
    if sparse := result.sparse:
        below = " or ".join(f"{tokens:,}" for tokens in sparse["dense_below"])
        ways = " and ".join(sparse["methods"])
        out.print(f"patched: sparse prefill beyond {below} tokens, {ways}, in {sparse['layers']} layers")
        read = [f"{r['pairs_read']:.1%} at {r['length']:,}" for r in result.ratios()]
        out.print(f"pairs of a query and a key that these layers multiplied in the prompt: {', '.join(read)}")
    if gate or sparse:
        counted = [f"{r['multiply_adds']:.2f} at {r['length']:,}" for r in result.ratios()]
        out.print(f"multiply-adds of these layers' attention in the prompt, to the base's: {', '.join(counted)}")
    if model["synthetic"]:
        kept, depth = model["layers_kept"], model["layers_of_the_base"]
        layers = "all layers" if len(kept) == depth else f"layers {', '.join(map(str, kept))} of the base's {depth}"
        source = "the checkpoint's" if model["ratio_asked"] is None else "a random"
        out.print(f"synthetic: random weights, {layers}" + (f", {source} head split" if split else ""))
    out.print(
        f"medians of {result.rounds} rounds, models in turn, {result.decode} decoded tokens each; {result.machine}"
    )
    out.print(f"prompts: {model['prompts']}")
    for note in result.notes:
        out.print(f"note: {note}")


def _narrow(*headers: str) -> Table:
    """A table for 80 columns: one space between columns; names, in the second one, are set to the left."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number == 1 else "right", no_wrap=True)
    return table


def _speedups(row: dict, to: str) -> list[str]:
    """ "1.31 (1.28-1.35)" for prefill and for decode."""
    names, ranges = [f"{what}_vs_{to}" for what in ("prefill", "decode")], row["ranges"]
    return [f"{row[name]:.2f} ({ranges[name][0]:.2f}-{ranges[name][1]:.2f})" for name in names]


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
    for operation, runs in facts["kernels"].items():
        out.print(f"runs:     {operation}: {runs}")
    for problem in facts["problems"]:
        out.print(Text(f"problem:  {problem}", style="yellow"))


def calibration_table(found) -> None:
    """Print a `Calibration`."""
    from surgery.evaluation.benchmark.dense_below import LIMIT

    console().print(_rows(found))
    told = console()
    layers = ", ".join(map(str, found.layers))
    told.print(f"attention of layers {layers} on {found.text}, ms a layer; sparse beyond the first dense_below tokens")
    told.print(f"medians of {found.rounds} rounds, both in turn; {found.machine}")
    before = " or ".join(f"{tokens:,}" for tokens in found.before)
    result = f"dense_below: {found.dense_below:,} (now {before})"
    if found.fits:
        told.print(f"{result}: the smallest that stays within {LIMIT} of dense")
    else:
        told.print(f"{result}: no candidate stays within {LIMIT} of dense in prompts of up to {found.tried:,} tokens,")
        rest = "; longer ones were not tried" if found.tried < found.dense_below else ""
        told.print(f"so that none of these should be sparse here{rest}")


def closing(found, out: Path, report) -> None:
    """What became of it; `report`: of the checkpoint that was given the value, None: none was."""
    told = console()
    if report is None:
        if found.fits:
            anew = f"make the checkpoint anew with dense_below={found.dense_below}"
            told.print(f"write it to {out}: add --write; or {anew}")
        return
    told.print(f"written to {out}: config.json, surgery.json, README.md")
    if report.data["evaluation"] is None and found.dense_below < max(found.before):
        told.print("this model reads less than what was scored: its scores were taken out, score it again")


def _rows(found) -> Table:
    rows = Table("dense_below", "prompt", "dense, ms", "sparse, ms", "sparse / dense", box=None, pad_edge=False)
    for column in rows.columns:
        column.justify = "right"
    last = None
    for trial in found.trials:
        times = (f"{seconds * 1e3:,.1f}" for seconds in (trial.dense, trial.sparse))
        begin = f"{trial.dense_below:,}" if trial.dense_below != last else ""
        rows.add_row(begin, f"{trial.length:,}", *times, f"{trial.ratio:.3f}")
        last = trial.dense_below
    return rows
