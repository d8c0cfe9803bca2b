"""Results in other engines: how far llama.cpp and vLLM are from Transformers, and the cache that they count.

    python examples/benchmarks/engines_table.py OUT... [--engines llama.cpp vllm] [--table FILE --machine TEXT]

Each OUT is a folder that `surgery apply` wrote and `surgery check` passed. It is exported for each engine, which runs
it, and the file is removed again. llama.cpp also runs a file of type q8_0. The row is called by the recipe and
what was set in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import results

import surgery

TYPES = {"llama.cpp": ("f32", "q8_0"), "vllm": ("as-saved",)}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folders", nargs="+", type=Path, metavar="OUT")
parser.add_argument("--engines", nargs="+", choices=list(TYPES), default=list(TYPES))
parser.add_argument("--table", type=Path, metavar="FILE", help="write a table for the pages (results/NAME.json)")
parser.add_argument("--machine", default="", help="with --table: the machine")


def exported(folder: Path, engine: str, kind: str) -> dict:
    """What surgery.json says of an export, which is not kept."""
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as scratch:
        name = "made.gguf" if engine == "llama.cpp" else "made"
        return surgery.export(folder, engine, Path(scratch) / name, kind=kind).entry


def title(folder: Path) -> str:
    """The recipe, and what was set in it."""
    record = json.loads((folder / "surgery.json").read_text(encoding="utf-8"))
    return f"`{' '.join([record['recipe']['name'], *record['overrides']])}`"


def cells(entry: dict, engine: str, kind: str) -> list[dict]:
    """The figures of one export: how far it agrees, and for an engine's first type the cache."""
    agreement = {name: entry[name] for name in ("largest_difference", "same_best", "tokens")}
    counted = {"bytes": entry["engine_cache_bytes_per_token"], "number": entry["engine_cache_number_bytes"]}
    return [agreement] + [counted] * (kind == TYPES[engine][0])


def main() -> None:
    options = parser.parse_args()
    kinds = [(engine, kind) for engine in options.engines for kind in TYPES[engine]]
    columns, rows = ["result", "KV bytes a token, 2 bytes a number"], []
    for engine, kind in kinds:
        agrees = {"name": f"{engine}, {kind}: largest difference; same best token", "align": "right"}
        columns.append(agrees | {"format": "{largest_difference:.1e}; {same_best} of {tokens}"})
        if kind == TYPES[engine][0]:
            columns.append({"name": f"{engine} counts", "format": "{bytes:,} ({number} bytes a number)"})
    for folder in options.folders:
        row: list = [title(folder)]
        for engine, kind in kinds:
            entry = exported(folder, engine, kind)
            print(f"{row[0]}, {engine}, {kind}: {json.dumps(entry)}", flush=True)
            row += [entry["kv_bytes_per_token"]] * (len(row) == 1) + cells(entry, engine, kind)
        rows.append(row)
    if options.table:
        command = f"python examples/benchmarks/engines_table.py {' '.join(path.name for path in options.folders)}"
        results.write(options.table, command, options.machine, columns, rows)


if __name__ == "__main__":
    main()
