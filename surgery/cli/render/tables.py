"""Tables for checks, probes, benchmarks, pushes, `surgery doctor` and the search for `dense_below`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from surgery.cli.render.console import STATUS_STYLE, console
from surgery.cli.render.layout import hanging, show
from surgery.evaluation.benchmark.result import SPLIT
from surgery.evaluation.probes.base import Probe, Result
from surgery.evaluation.probes.base import Table as Data
from surgery.io.hub import DEMO
from surgery.io.printing import Table as Plain
from surgery.io.printing import byte_size, count

if TYPE_CHECKING:
    from surgery.evaluation.comparison.result import Comparison
    from surgery.evaluation.conversation import Reply
    from surgery.search.fitted import Fitted

SHOWN = {SPLIT: "converted"}  # name of a model in a benchmark's record -> what a person reads


def checks(items: list[dict]) -> None:
    """Print the items of a check, in the form that surgery.json records."""
    out = console()
    width = max((len(item["name"]) for item in items), default=0) + 2
    for item in items:
        style = STATUS_STYLE.get(item["status"], "")
        label = Text.assemble((f"{item['status']:<9}", style), f"{item['name']:<{width}}")
        hanging(out, label, item["detail"], label.cell_len, "dim")


def check_verdict(data: dict, folder: str) -> None:
    """Print how many checks passed, and what to type next.

    Args:
        data: surgery.json of the folder that was checked.
        folder: as the user named it.
    """
    statuses = [item["status"] for item in data["check"]["items"]]
    failed, passed, left_out = (statuses.count(status) for status in ("failed", "passed", "not run"))
    out, quoted, base = console(), shlex.quote(folder), data["base"].get("name") or ""
    found = data["base"].get("hub_id") or base == DEMO or os.path.isdir(base)  # of a folder, only its name is recorded
    more = f", {left_out} not run" if left_out else ""
    if failed:
        out.print(Text(f"{failed} of {count(len(statuses), 'check')} failed{more}.", style="bold red"))
        return
    compare = f"surgery eval {quoted} --base {shlex.quote(base) if found else 'MODEL'}"
    following = f"surgery push {quoted} OWNER/NAME" if data["evaluation"] else compare
    hanging(out, "", f"{count(passed, 'check')} passed{more}. next: {following}", 0)


def reply(found: Reply) -> None:
    """Print the figures of an answer, below it."""
    out = console()
    out.print()
    out.print(f"[{found.facts}]", markup=False)
    out.print()


def comparison(found: Comparison) -> None:
    """Print a comparison: what the models can do, then what they cost, a row for each model."""
    out = console()
    for _, table, lines in found.tables:
        show(out, _as_rich(table))
        for line in lines:
            hanging(out, "", line, 0, "dim")
        out.print()
    for note in found.all_notes:
        hanging(out, "note: ", note, 6)


def fitted(found: Fitted) -> None:
    """Print what a search tried, and what was chosen."""
    out = console()
    for block in found.blocks():
        if isinstance(block, Plain):
            show(out, _as_rich(block))
        elif isinstance(block, tuple):
            hanging(out, f"{block[0]}: ", block[1], len(block[0]) + 2)
        else:
            hanging(out, "", block, 0, "dim")


def measured(probe: type[Probe], result: Result, following: str = "") -> None:
    """Print the result of a probe: figures, notes and a verdict.

    Args:
        following: a command to type next; "": none.
    """
    out = console()
    if result.status != "done":
        out.print(f"not run: {result.reason}")
        return
    for line in probe.lines(result):
        if isinstance(line, Data):
            show(out, _as_rich(line))
        else:
            hanging(out, "", line, 0)
    for note in result.notes:
        hanging(out, "note:", note, 4)
    if verdict := probe.verdict(result.to_dict()):
        hanging(out, "", verdict, 0, "bold" if out.is_terminal else "")
    if following:
        out.print(f"next: {following}", soft_wrap=True)


def _as_rich(data: Data) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in data.headers:
        table.add_column(header, justify=data.justify)
    for row in data.rows:
        table.add_row(*row)
    return table


def benchmark(result) -> None:
    """Print a `Benchmark`: timings, ratios, the conditions of the measurement, and a verdict in words."""
    out = console()
    table = _narrow("tokens", "", "prompt", "tok/s", "spread", "decode", "tok/s", "spread", "cache", "peak")
    last = None
    for timing in result.timings:
        figures = timing.to_dict()
        table.add_row(
            f"{timing.length:,}" if timing.length != last else "",
            SHOWN.get(timing.model, timing.model),
            f"{timing.prefill:.2f} s",
            f"{figures['prefill_tokens_per_second']:,.0f}",
            f"{figures['prefill_spread']:.2f}",
            f"{timing.decode * 1000:.1f} ms",
            f"{figures['decode_tokens_per_second']:,.1f}",
            f"{figures['decode_spread']:.2f}",
            byte_size(timing.cache_bytes),
            "?" if timing.peak_memory is None else byte_size(timing.peak_memory),
        )
        last = timing.length
    show(out, table)
    if result.split:
        hanging(out, "all full:", "the converted model's weights and its cache, with every head full and on", 4)
    hanging(out, "decode:", "one token after the prompt; spread: the slowest round over the fastest", 4)
    hanging(out, "peak:", "what the prompt takes beyond the weights, its cache included", 4)
    out.print()
    table = _narrow("tokens", "converted", "prompt", "decode", "cache", "cache+", "peak")
    for ratios in result.ratios():
        shares = ("cache_bytes_vs_stock", "decode_cache_bytes_vs_stock", "peak_memory_vs_stock")
        shares = ["?" if ratios[name] is None else f"{ratios[name]:.3f}" for name in shares]
        table.add_row(f"{ratios['length']:,}", "to base", *_speedups(ratios, "stock"), *shares)
        if result.split:
            table.add_row("", "to all full", *_speedups(ratios, "block_cache"), "", "", "")
    show(out, table)
    hanging(out, "prompt, decode:", "times as fast (lowest to highest of the rounds)", 4)
    cached = f"share of the base's bytes; cache+: after {count(result.decode, 'decoded token')}"
    hanging(out, "cache, peak:", cached, 4)
    out.print()
    _benchmarked(out, result)
    out.print()
    for ratios in result.ratios():
        hanging(out, "", bench_verdict(ratios), 0, "bold" if out.is_terminal else "")


def bench_verdict(ratios: dict) -> str:
    """The row of one prompt length in words: "At 1,000 tokens: cache 0.63 of the base's; ..."."""
    cache = ratios["cache_bytes_vs_stock"]
    parts = [] if cache is None else [f"cache {cache:.2f} of the base's"]
    names = {"prompt": "prefill_vs_stock", "decoding": "decode_vs_stock"}
    ranges = {what: ratios["ranges"][name] for what, name in names.items()}
    noise = [what for what, (low, high) in ranges.items() if low <= 1 <= high]
    for what, name in names.items():
        if what not in noise:
            faster = ratios[name] >= 1
            times = ratios[name] if faster else 1 / ratios[name]
            parts.append(f"{what} {times:.2f} times as {'fast' if faster else 'slow'}")
    if noise:
        widest = max(high / low for low, high in (ranges[what] for what in noise))
        parts.append(f"{' and '.join(noise)} within the noise (spread {widest:.2f})")
    return f"At {ratios['length']:,} tokens: {'; '.join(parts)}."


def _benchmarked(out, result) -> None:
    """Print the conditions of a benchmark: models, split, rounds, machine, prompts."""
    model, split = result.model, result.split
    out.print(
        f"base: {model['base_attention']}, {model['base_cache']}; {model['layers']} layers, {model['dtype']}, batch 1"
    )
    if split and split["streaming"]:
        reach = " or ".join(f"{sinks} sinks + {window} tokens" for sinks, window in split["sinks_and_windows"])
        share = f"{split['streaming']} of {split['kv_heads']} KV heads ({split['ratio']:.3f})"
        layers = " ".join(map(str, split["streaming_per_layer"]))
        out.print(f"converted: {share} see {reach or 'no less'}; by layer {layers}")
    if gate := result.gate:
        kinds = " and ".join(gate["kinds"])
        out.print(f"converted: {kinds} in {gate['layers']} layers, {gate['on']:.0%} of the heads on for a token")
    if sparse := result.sparse:
        below = " or ".join(f"{tokens:,}" for tokens in sparse["dense_below"])
        ways = " and ".join(sparse["methods"])
        out.print(f"converted: sparse prefill beyond {below} tokens, {ways}, in {sparse['layers']} layers")
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
        f"medians of {count(result.rounds, 'round')}, models in turn, {count(result.decode, 'decoded token')} each; "
        f"{result.machine}"
    )
    out.print(f"prompts: {model['prompts']}")
    for note in result.notes:
        out.print(f"note: {note}")


def _narrow(*headers: str) -> Table:
    """A table for 80 columns: one space between columns; the second column, with names, is left-justified."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column, header in enumerate(headers):
        table.add_column(header, justify="left" if column == 1 else "right", no_wrap=True)
    return table


def _speedups(row: dict, to: str) -> list[str]:
    """ "1.31 (1.28-1.35)" for prefill and for decode."""
    names, ranges = [f"{what}_vs_{to}" for what in ("prefill", "decode")], row["ranges"]
    return [f"{row[name]:.2f} ({ranges[name][0]:.2f}-{ranges[name][1]:.2f})" for name in names]


def pushed(result: dict) -> None:
    """Print the result of `surgery.push`: files, sizes, destination, warnings."""
    out = console()
    for file in result["files"]:
        out.print(f"{byte_size(file['bytes']):>10}  {file['name']}")
    if result["dry_run"]:
        where = f"{result['repo']} ({result['visibility']})"
        out.print(f"dry run: {byte_size(result['bytes'])} would go to {where}; nothing was sent")
    else:
        where = f"{result['url']} ({result['visibility']})"
        out.print(f"pushed {byte_size(result['bytes'])} to {where}, commit {result['commit']}")
    for warning in result["warnings"]:
        out.print(Text(f"warning: {warning}", style="yellow"))


def doctor(report: dict) -> None:
    """Print the result of `surgery.cli.doctor.examine`, and a verdict."""
    out = console()
    out.print(f"surgery {report['surgery']}, Python {report['python']}, {report['system']}")
    packages = (f"{name} {version or 'absent'}" for name, version in report["packages"].items())
    hanging(out, "packages:", ", ".join(packages), 10)
    hanging(out, "CPU:", count(report["threads"], "thread"), 10)
    for device in report["devices"]:
        hanging(out, "--device", _device_words(device), 10)
    disk = report["disk_free"]
    hanging(out, "disk:", f"{byte_size(disk['here'])} free here, {byte_size(disk['cache'])} in the cache", 10)
    hanging(out, "Hub:", "offline (HF_HUB_OFFLINE)" if report["offline"] else "may be used", 10)
    for name, state in report["doors"].items():
        hanging(out, "loading:", f"{name}: {state}", 10)
    operations: dict[str, list[str]] = {}
    for operation, runs in report["kernels"].items():
        operations.setdefault(runs, []).append(operation)
    for runs, names in operations.items():
        hanging(out, "runs:", f"{', '.join(names)} on {runs}", 10)
    for problem in report["problems"]:
        hanging(out, Text("problem:", style="yellow"), problem, 10, "yellow")
    out.print()
    hanging(out, "", doctor_verdict(report), 0, "bold" if out.is_terminal else "")


def _device_words(device: dict) -> str:
    """A device that may be named, with its free memory and the dtypes that not every device has."""
    known = {True: "", False: "no ", None: "perhaps "}
    free = "free memory unknown" if device["memory_free"] is None else f"{byte_size(device['memory_free'])} free"
    dtypes = [f"{known[device[dtype]]}{dtype}" for dtype in ("bfloat16", "float64")]
    return f"{device['device']} ({device['name']}): {', '.join([free, *dtypes])}"


def doctor_verdict(report: dict) -> str:
    """Whether everything works here, and on which devices."""
    faults = [name for name, state in report["doors"].items() if not state.startswith("works")]
    faults = [f"loading ({', '.join(faults)}) fails"] if faults else []
    if report["problems"]:
        faults.append(f"{count(len(report['problems']), 'problem')} named above")
    verdict = f"Not everything works here: {'; '.join(faults)}." if faults else "Everything works here."
    gpus = [f"{each['device']} ({each['name']})" for each in report["devices"] if each["device"] != "cpu"]
    return f"{verdict} {'GPU: ' + ', '.join(gpus) + '.' if gpus else 'CPU only: PyTorch sees no GPU.'}"


def dense_below_table(search) -> None:
    """Print a `DenseBelowSearch`."""
    from surgery.evaluation.benchmark.dense_below import LIMIT

    out = console()
    show(out, _rows(search))
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
        report: the report of the checkpoint that the value was written to; None: it was not written.
    """
    lines = console()
    if report is None:
        if search.fits:
            another_way = f"make the checkpoint again with dense_below={search.dense_below}"
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
