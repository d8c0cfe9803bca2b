"""Putting the same cases (needles, choices) to a model and to its base, one after the other; shares with intervals."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError
from surgery.evaluation.perplexity import measure_at_rest
from surgery.io.loading import loaded, refuse_pickle
from surgery.machine.device import too_big

if TYPE_CHECKING:
    from surgery.io.loading import Source


def run_base_then_model(
    result,
    sources: dict[str, Source],
    ask: Callable,
    *,
    what: str,
    cases: int,
    extra: Callable[[int], int],
    broken: Callable,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Ask each model, the one gone from memory before the next is loaded; or say why it does not fit in memory.

    Args:
        result: gets `outcomes` by label, `notes`, and where nothing was run a `status` "not run" and a `reason`.
        sources: label ("base", "out") -> folder or loaded model, in this order.
        ask: called with a model and a callback(done); gives one outcome for each case.
        what: what the cases are, for messages.
        cases: their number.
        extra: bytes needed besides the weights, from the model's KV bytes per token.
        broken: whether an outcome is NaN or infinite.
        progress: called as progress(done, total, label) after each case.

    Raises:
        SurgeryError: a folder without safetensors, a base that yields NaN.
    """
    need = []
    for label, source in sources.items():
        side = measure_at_rest(source, label, result.notes)
        on_disk = isinstance(source, str | Path)
        if on_disk:
            refuse_pickle(Path(source))
        need.append((side.load_bytes if on_disk else 0, extra(side.kv_bytes_per_token or 0)))
    if reason := next(filter(None, (too_big(weights, extra=more) for weights, more in need)), ""):
        result.status, result.reason = "not run", reason
        return
    for run, (label, source) in enumerate(sources.items()):

        def tick(done: int, before: int = run * cases, label: str = label) -> None:
            if progress:
                progress(before + done, len(sources) * cases, label)

        with loaded(source) as model:
            result.outcomes[label] = ask(model, tick)
        del model
        gc.collect()  # or a model held in a cycle would still be there beside the next one
        wrong = sum(map(broken, result.outcomes[label]))
        if wrong and label == "base":
            raise SurgeryError(
                f"the base model itself gives NaN or infinite values ({what}: {wrong} of {cases})",
                fix="check that the base generates; a float16 overflow needs bfloat16 or float32 weights",
            )
        if wrong:
            result.notes.append(f"out gives NaN or infinite values for {wrong} of {cases} {what}: misses")


def wilson(hits: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share (Wilson 1927), 95% by default; (0, 1) where nothing was seen.

    These are the two shares p that lie z standard errors sqrt(p (1 - p) / of) away from hits / of.
    """
    if not of:
        return 0.0, 1.0
    share, spread = hits / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
