"""Estimates of a run: time, memory and disk, in three lines."""

from __future__ import annotations

from surgery.cli.render.console import console
from surgery.cli.render.durations import about
from surgery.cli.render.layout import hanging
from surgery.conversion.estimate import Estimate
from surgery.io.printing import byte_size, count

WHILE = {
    "measure": "while measuring",
    "write": "while writing",
    "heal": "while healing",
    "check": "while checking",
    "score": "while scoring",
}
INDENT = 9  # columns before what is estimated
LEAST = 1.0  # seconds from which a part of the run is named


def cost(estimate: Estimate) -> None:
    """Print estimates of the duration of the whole run, of its peak memory, and of the bytes that it writes."""
    groups = estimate.groups()
    parts = ", ".join(f"{group} {about(seconds)}" for group, (seconds, _) in groups.items() if seconds >= LEAST)
    peak = max(groups, key=lambda group: groups[group][1])
    threads = f" on {count(estimate.threads, 'thread')}" if estimate.threads else ""
    out = console()
    hanging(out, "time:", f"about {about(estimate.seconds)}{threads}" + (f" ({parts})" if parts else ""), INDENT)
    if use := estimate.device:
        where = " and ".join(use.spread) or use.device
        how = ", whole layers on each" if use.spread else ", one layer at a time" if use.streamed else ""
        hanging(out, "device:", f"{where}{how}: about {byte_size(use.memory_bytes)} there", INDENT)
    hanging(out, "memory:", f"about {byte_size(estimate.memory_bytes)} at the peak ({WHILE.get(peak, peak)})", INDENT)
    kept = f"; {byte_size(estimate.disk_bytes)} while it heals" if estimate.disk_bytes > estimate.output_bytes else ""
    hanging(out, "disk:", f"{byte_size(estimate.output_bytes)}{kept}", INDENT)
