"""What was measured, checked, pushed or found, as tables.

Multiple choice as lines: how many are right, base beside patched, and where the two differ.

Needles as a table and as a picture: depth x length, base beside patched.

What a calibration of sparse prefill found, as a table.
"""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from surgery.cli.render.console import STATUS_STYLE, console, size


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


def lines(result) -> None:
    """What a `ChoiceResult` says."""
    out = console()
    if result.status != "done":
        out.print(f"not run: {result.reason}")
        return
    settings, both = result.settings, len(result.outcomes) > 1
    for label in result.outcomes:
        side = result.side(label)
        name = NAMES[label] if both else "model"
        out.print(
            f"{name + ':':<9}{side['right']} of {side['of']} questions right ({percent(side)}), "
            f"{side['nll']:.3f} nats for the right choice"
        )
    if paired := result.paired():
        out.print(
            f"paired:  both right {paired['both']}, only the base {paired['only_base']}, only the patched model "
            f"{paired['only_out']}, neither {paired['neither']} (McNemar's exact test: p = {paired['p']:.2g})"
        )
    size = sorted({len(item.choices) for item in result.items})
    counts = f"{size[0]}" if len(size) == 1 else f"{size[0]} to {size[-1]}"
    made = f", passages of {settings['context']} tokens, seed {settings['seed']}" if "context" in settings else ""
    out.print(f"{counts} choices each{made}; a guess is right with probability {result.chance:.1%}")
    out.print(f"questions: {settings['text']['title']}, sha256 {settings['text']['sha256']}")
    for note in result.notes:
        out.print(f"note: {note}")


NAMES = {"base": "base", "out": "patched"}


def table(result) -> None:
    """Hits of every cell and what they sum up to, of a `NeedleResult`."""
    out = console()
    if result.status != "done":
        out.print(f"not run: {result.reason}")
        return
    labels, settings = list(result.outcomes), result.settings
    grid = Table(box=None, pad_edge=False)
    grid.add_column("depth", justify="right")
    for length in result.lengths:
        grid.add_column(f"{length:,} tokens", justify="right")
    starred = {(n.length, n.depth) for n in result.needles if not result.counts(n)}
    for depth in result.depths:
        cells = []
        for length in result.lengths:
            hits = [result.cell(label, length, depth) for label in labels]
            star = "* " if (length, depth) in starred else ""
            cells.append(f"{star}{' -> '.join(str(hit) for hit, _ in hits)} of {hits[0][1]}")
        grid.add_row(f"{depth:.2f}", *cells)
    out.print(grid)
    out.print(f"answered exactly{', base -> patched' if len(labels) > 1 else ''}")
    if starred:
        sinks, window = result.reach
        inside = sum(not result.counts(n) for n in result.needles)
        verdict = "do not count for what is kept" if len(labels) > 1 else "prove nothing"
        seen = f"streaming heads see them, or a part, within {sinks} sinks and {window} tokens before the question"
        out.print(f"*: {inside} of {len(result.needles)} needles {verdict}: {seen}")
    out.print()
    for label in labels:
        side = result.side(label)
        name = NAMES[label] if len(labels) > 1 else "model"
        out.print(
            f"{name + ':':<9}{side['hits']} of {side['of']} needles ({percent(side)}), "
            f"{side['nll']:.3f} nats per token of the answer"
        )
    if kept := result.kept():
        what = "the base finds" + (" outside sinks and window" if result.reach else "")
        share = f"{kept['kept']} of {kept['of']} ({percent(kept)})" if kept["of"] else "there are none"
        out.print(f"kept:    of those that {what}, the patched model finds {share}")
    size = f"{settings['samples']} samples in a cell, {settings['form']} prompts, seed {settings['seed']}"
    out.print(f"{size}; a guess is right with probability {settings['chance']:.0e}")
    out.print(f"haystack: {settings['text']['title']}, sha256 {settings['text']['sha256']}")
    for note in result.notes:
        out.print(f"note: {note}")


def picture(result, path: str | Path) -> Path:
    """A heat map of the share of hits for each model; raises as `pictures.heat_maps`."""
    from surgery.report.plots import heat_maps

    panels = {}
    for label in result.outcomes:
        side = result.side(label)
        name = NAMES[label] if len(result.outcomes) > 1 else "model"
        panels[f"{name}: {side['hits']} of {side['of']}"] = result.grid(label)
    kept = result.kept()
    title = "needles answered exactly"
    if kept and kept["of"]:
        title += f"; kept {kept['kept']} of {kept['of']} ({percent(kept)})"
    return heat_maps(
        path,
        panels,
        rows=[f"{depth:.2f}" for depth in result.depths],
        columns=[f"{length:,}" for length in result.lengths],
        row_label="depth of the needle",
        column_label="tokens of the prompt",
        value_label="share answered",
        title=title,
        limits=(0.0, 1.0),
    )


def percent(facts: dict) -> str:
    share = facts.get("share", facts.get("accuracy"))
    return f"{share:.1%}, 95% interval {facts['low']:.1%} to {facts['high']:.1%}"


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
