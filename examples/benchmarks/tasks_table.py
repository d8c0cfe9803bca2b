"""Writes the scores of a model and its base on tasks of lm-eval (`surgery eval ... --tasks`, `--ruler`) to results.

    python examples/benchmarks/tasks_table.py OUT NAME --machine "..." --command "..." [--command "..."]

OUT is the converted model, whose surgery.json holds the scores. A row is a task, or a task at one length of RULER's
prompts. The interval of the drop is over the pairs of items: base and model answered the same ones.
"""

import json
from pathlib import Path
from typing import Any

import results

RULER = "RULER"


def table(scores: dict[str, dict[str, Any]], commands: list[str], machine: str) -> dict[str, Any]:
    """A results file (see results.py).

    Args:
        scores: task -> its scores beside the base, as surgery.json has them; of RULER, "TASK TOKENS".
    """
    columns: list[Any] = ["task", "tokens", "metric", "items"]
    columns += [{"name": side, "format": "{:.2f}"} for side in ("base", "converted")]
    columns.append({"name": "drop (95% interval)", "format": "{drop:.2f} ({low:.2f} to {high:.2f})"})
    rows = []
    for name, score in scores.items():
        task, _, tokens = name.partition(" ") if score["metric"].isdigit() else (name, "", "")
        drop = {key: round(score[key], 4) for key in ("drop", "low", "high")}
        what = (int(tokens), RULER) if tokens else (None, score["metric"])
        rows.append([f"`{task}`", *what, score["of"], *(round(score[side], 4) for side in ("base", "out")), drop])
    return {"command": commands, "machine": machine, "columns": columns, "rows": rows}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Task -> its scores beside the base, from the surgery.json of a converted model.

    Raises:
        SystemExit: no tasks were asked, or none beside the base.
    """
    evaluation = json.loads((folder / "surgery.json").read_text(encoding="utf-8")).get("evaluation") or {}
    scores = (evaluation.get("tasks") or {}).get("tasks") or {}
    if not scores or any("base" not in score for score in scores.values()):
        raise SystemExit(f"{folder}: no tasks were asked beside the base: surgery eval OUT --base MODEL --tasks ...")
    return scores


def main() -> None:
    results.write_from(__doc__, lambda folder, *rest: table(read(folder), *rest), "tasks", "the converted model")


if __name__ == "__main__":
    main()
