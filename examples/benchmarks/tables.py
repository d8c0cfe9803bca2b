"""The tables of recipes/README.md, made from the figures in results/*.json, so that page and figures cannot drift.

    python examples/benchmarks/tables.py           says which tables of the page are not those of the results
    python examples/benchmarks/tables.py --write   writes them into the page

A results file holds the command that printed the figures, the machine where it matters, and the table: `columns`,
`align` (left or right) and `rows` of texts. `<!-- results: NAME -->` in the page stands before the table of NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).resolve().parents[2] / "recipes" / "README.md"
MARK = re.compile(r"(<!-- results: ([a-z0-9-]+) -->\n\n)((?:\|.*\n)*)")


def table(name: str) -> str:
    """The Markdown table of a results file, a line a row.

    Raises:
        SystemExit: there is no such file, or a row has more or fewer cells than there are columns.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"no results {name}: there is {', '.join(sorted(p.stem for p in RESULTS.glob('*.json')))}")
    found = json.loads(path.read_text(encoding="utf-8"))
    if uneven := [row for row in found["rows"] if len(row) != len(found["columns"])]:
        raise SystemExit(
            f"{path.name}: a row of {len(uneven[0])} cells under {len(found['columns'])} columns: {uneven[0]}"
        )
    rules = ["---:" if align == "right" else "---" for align in found["align"]]
    return "".join(
        f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in (found["columns"], rules, *found["rows"])
    )


def page(text: str) -> str:
    """The page with every marked table as the results have it."""
    return MARK.sub(lambda match: match.group(1) + table(match.group(2)), text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if parser.parse_args().write:
        PAGE.write_text(new, encoding="utf-8")
        return 0
    stale = [match.group(2) for match in MARK.finditer(old) if match.group(3) != table(match.group(2))]
    print(f"not those of the results: {', '.join(stale)}" if stale else "every table is that of its results")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
