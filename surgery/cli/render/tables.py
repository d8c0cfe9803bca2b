"""What was measured, checked or pushed, and the search for `dense_below`, as tables."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from surgery.cli.render.console import STATUS_STYLE, console, size
from surgery.evaluation.probes.base import Probe, Result
from surgery.evaluation.probes.base import Table as Data


def checks(items: list[dict]) -> None:
    """Print the items of a check, as surgery.json keeps them."""
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
    for line in probe.lines(result):
        out.print(_as_rich(line) if isinstance(line, Data) else line)
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
    """Print a `Benchmark`: timings, ratios, and what they were taken on."""
    out = console()
    rate = ("\ntok/s", "\nspread")
    table = _narrow("\ntokens", "", "prefill\ns", *rate, "decode\nms", *rate, "\ncache", "\npeak")
    last = None
    for timing in result.timings:
        figures = timing.to_dict()
        table.add_row(
            f"{timing.length:,}" if timing.length != last else "",
            timing.model,
            f"{timing.prefill:.2f}",
            f"{figures['prefill_tokens_per_second']:,.0f}",
            f"{figures['prefill_spread']:.2f}",
            f"{timing.decode * 1000:.1f}",
            f"{figures['decode_tokens_per_second']:,.1f}",
            f"{figures['decode_spread']:.2f}",
            size(timing.cache_bytes),
            "?" if timing.peak_memory is None else size(timing.peak_memory),
        )
        last = timing.length
    out.print(table)
    out.print("spread: slowest to fastest round; peak: what the prompt takes beyond the weights, its cache included")
    out.print()
    table = _narrow("patched\ntokens", "", "\nprefill", "\ndecode", "\ncache", "cache,\ndecoding", "\npeak")
    for ratios in result.ratios():
        shares = ("cache_bytes_vs_stock", "decode_cache_bytes_vs_stock", "peak_memory_vs_stock")
        shares = ["?" if ratios[name] is None else f"{ratios[name]:.3f}" for name in shares]
        table.add_row(f"{ratios['length']:,}", "to base", *_speedups(ratios, "stock"), *shares)
        if result.split:
            table.add_row("", "to all full", *_speedups(ratios, "block_cache"), "", "", "")
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
        read = [f"{ratios['pairs_read']:.1%} at {ratios['length']:,}" for ratios in result.ratios()]
        out.print(f"pairs of a query and a key that these layers multiplied in the prompt: {', '.join(read)}")
    if gate or sparse:
        counted = [f"{ratios['multiply_adds']:.2f} at {ratios['length']:,}" for ratios in result.ratios()]
        out.print(f"multiply-adds of these layers' attention in the prompt, to the base's: {', '.join(counted)}")
    if model["synthetic"]:
        kept_layers, depth = model["layers_kept"], model["layers_of_the_base"]
        shown_layers = ", ".join(map(str, kept_layers))
        layers = "all layers" if len(kept_layers) == depth else f"layers {shown_layers} of the base's {depth}"
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
    for column, header in enumerate(headers):
        table.add_column(header, justify="left" if column == 1 else "right", no_wrap=True)
    return table


def _speedups(row: dict, to: str) -> list[str]:
    """ "1.31 (1.28-1.35)" for prefill and for decode."""
    names, ranges = [f"{what}_vs_{to}" for what in ("prefill", "decode")], row["ranges"]
    return [f"{row[name]:.2f} ({ranges[name][0]:.2f}-{ranges[name][1]:.2f})" for name in names]


def pushed(result: dict) -> None:
    """Print what `surgery.push` gives: files, sizes, where they went, warnings."""
    out = console()
    for file in result["files"]:
        out.print(f"{size(file['bytes']):>10}  {file['name']}")
    if result["dry_run"]:
        out.print(
            f"dry run: {size(result['bytes'])} would go to {result['repo']} ({result['visibility']}); nothing was sent"
        )
    else:
        where = f"{result['url']} ({result['visibility']})"
        out.print(f"pushed {size(result['bytes'])} to {where}, commit {result['commit']}")
    for warning in result["warnings"]:
        out.print(Text(f"warning: {warning}", style="yellow"))


def doctor(report: dict) -> None:
    """Print what `surgery.cli.doctor.examine` gives."""
    out = console()
    out.print(f"surgery {report['surgery']}, Python {report['python']}, {report['system']}")
    packages = (f"{name} {version or 'absent'}" for name, version in report["packages"].items())
    out.print(f"packages: {', '.join(packages)}")
    memory = "unknown" if report["memory_free"] is None else size(report["memory_free"])
    out.print(f"devices:  {', '.join(report['devices'])}; {report['threads']} threads; {memory} memory free")
    out.print(
        f"disk:     {size(report['disk_free']['here'])} free here, {size(report['disk_free']['cache'])} in the cache"
    )
    out.print("Hub:      " + ("offline (HF_HUB_OFFLINE)" if report["offline"] else "may be used"))
    for name, state in report["doors"].items():
        out.print(f"door:     {name}: {state}")
    for operation, runs in report["kernels"].items():
        out.print(f"runs:     {operation}: {runs}")
    for problem in report["problems"]:
        out.print(Text(f"problem:  {problem}", style="yellow"))


def dense_below_table(search) -> None:
    """Print a `DenseBelowSearch`."""
    from surgery.evaluation.benchmark.dense_below import LIMIT

    console().print(_rows(search))
    out = console()
    layers = ", ".join(map(str, search.layers))
    out.print(f"attention of layers {layers} on {search.text}, ms a layer; sparse beyond the first dense_below tokens")
    out.print(f"medians of {search.rounds} rounds, both in turn; {search.machine}")
    before = " or ".join(f"{tokens:,}" for tokens in search.before)
    result = f"dense_below: {search.dense_below:,} (now {before})"
    if search.fits:
        out.print(f"{result}: the smallest that stays within {LIMIT} of dense")
    else:
        out.print(f"{result}: no candidate stays within {LIMIT} of dense in prompts of up to {search.tried:,} tokens,")
        rest = "; longer ones were not tried" if search.tried < search.dense_below else ""
        out.print(f"so that none of these should be sparse here{rest}")


def dense_below_outcome(search, out: Path, report) -> None:
    """Print what was written, or how to write it.

    Args:
        report: of the checkpoint that got the value; None: no checkpoint did.
    """
    lines = console()
    if report is None:
        if search.fits:
            another_way = f"make the checkpoint anew with dense_below={search.dense_below}"
            lines.print(f"write it to {out}: add --write; or {another_way}")
        return
    lines.print(f"written to {out}: config.json, surgery.json, README.md")
    if report.data["evaluation"] is None and search.dense_below < max(search.before):
        lines.print("this model reads less than what was scored: its scores were taken out, score it again")


def _rows(search) -> Table:
    rows = Table("dense_below", "prompt", "dense, ms", "sparse, ms", "sparse / dense", box=None, pad_edge=False)
    for column in rows.columns:
        column.justify = "right"
    last = None
    for trial in search.trials:
        times = (f"{seconds * 1e3:,.1f}" for seconds in (trial.dense, trial.sparse))
        begin = f"{trial.dense_below:,}" if trial.dense_below != last else ""
        rows.add_row(begin, f"{trial.length:,}", *times, f"{trial.ratio:.3f}")
        last = trial.dense_below
    return rows
