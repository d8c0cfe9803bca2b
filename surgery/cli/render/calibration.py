"""What a calibration of sparse prefill found, as a table."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from surgery.cli.render import console


def table(found) -> None:
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
