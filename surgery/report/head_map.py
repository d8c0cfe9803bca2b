"""The picture of a head split: layers from left to right, heads from top to bottom, streaming heads hatched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from surgery.calibration.head_scores import KINDS, HeadScores
from surgery.errors import SurgeryError
from surgery.report.plots import Cells, heat_maps

FILE = "heads.png"  # in an output folder; the card shows it
# Scoring method -> what its score measures, and what a high score means.
MEANINGS = {
    "far-mass": "attention beyond sinks and window (far-mass); high: needs the past",
    "retrieval": "how often the head looks at the token it copies (retrieval); high: needs the past",
    "gates": "gate learned on passkeys (gates); 1: needs the past",
    "fisher": "mean of two ranks (fisher); high: needs the past",
    "ablation": "nats lost when this head alone streams (ablation); high: needs the past",
    "induction": "attention to earlier copies (induction); high: needs the past",
}


def draw_heads(
    path: str | Path,
    numbers: Sequence[Sequence[int]],
    *,
    name: str = "",
    streaming: Sequence[Sequence[int]] | None = None,
    sees: str = "",
    scores: HeadScores | None = None,
) -> Path:
    """Draw a head split, or the scores of heads.

    Args:
        path: as for `plots.heat_maps`, which also lists the errors.
        numbers: the heads of each layer, by the base's numbers.
        name: name of the model.
        streaming: the streaming heads of each layer, by the base's numbers; None: no split was made.
        sees: what streaming heads see ("16 sinks + 240 tokens").
        scores: the scores of the heads, in the order of `numbers`; None: only the split is drawn.
    """
    kind = KINDS[scores.per or "kv_heads"] if scores is not None else KINDS["kv_heads"]
    method = scores.method if scores is not None else ""
    height, total = 1 + max(max(heads) for heads in numbers), sum(map(len, numbers))
    values = [[math.nan] * len(numbers) for _ in range(height)]
    hatched = [[False] * len(numbers) for _ in range(height)]
    for layer, heads in enumerate(numbers):
        for index, head in enumerate(heads):
            hatched[head][layer] = streams = streaming is not None and head in streaming[layer]
            values[head][layer] = scores.scores[layer][index] if scores is not None else float(not streams)
    title = f"{name}: " if name else ""
    if streaming is not None:
        count = sum(map(len, streaming))
        title += f"{count} of {total} {kind} stream"
    else:
        title += f"{total} {kind} by their {method} score"
    return heat_maps(
        path,
        {"": Cells(values, hatched=hatched)},
        rows=range(height),
        columns=range(len(numbers)),
        row_label=kind.removesuffix("s"),
        column_label="layer",
        value_label=MEANINGS.get(method, f"{method} score") if scores is not None else "",
        title=title,
        limits=None if scores is not None else (0.0, 1.0),
        hatch_label=f"streams: sees {sees}; not hatched: sees all" if sees else "streams; not hatched: sees all",
    )


def draw_recorded(record: dict, folder: Path) -> bool:
    """Draw the head split of a checkpoint that is being written, as `heads.png`; returns whether it was drawn.

    Nothing is drawn without matplotlib, or if the checkpoint's last operation made no head split with scores.

    Args:
        record: the content of the checkpoint's surgery.json.
        folder: the checkpoint's folder.
    """
    operations = record.get("operations") or []
    made = operations[-1] if operations else {}
    split, fields = made.get("record") or {}, ((record.get("recipe") or {}).get("operations") or [{}])[-1]
    scores, streaming = split.get("scores") or {}, split.get("streaming")
    if made.get("op") != "duo_attention" or not streaming or not any(streaming):
        return False
    table, method = scores.get("scores"), str(scores.get("method") or "")
    if not table or len(table) != len(streaming):
        return False
    sees = f"{fields['sinks']} sinks + {fields['window']} tokens" if {"sinks", "window"} <= fields.keys() else ""
    name = str((record.get("base") or {}).get("base_model") or (record.get("base") or {}).get("name") or "")
    try:
        draw_heads(
            folder / FILE,
            [range(len(row)) for row in table],
            name=name.rsplit("/", 1)[-1],
            streaming=streaming,
            sees=sees,
            scores=HeadScores(method, table) if method != "none" else None,  # all heads stream, and none was scored
        )
    except SurgeryError:  # matplotlib is not installed
        return False
    return True
