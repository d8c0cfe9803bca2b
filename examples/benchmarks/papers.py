"""The papers whose methods are here: formula, the test that proves it, the paper's claim, and what SmolLM2 shows.

    python examples/benchmarks/papers.py

The rows are results/papers.json; figures in them refer to other results. The script prints the table, and ends with 1
if a test that a row names does not exist.
"""

import ast
import re
import sys
from pathlib import Path

import results

TESTS = Path(__file__).parents[2] / "tests"
NAMED = re.compile(r"([\w/]+\.py)::(\w+)")
PROVED = 3  # the column of tests


def missing_tests() -> list[str]:
    """The tests that the table names and that do not exist."""
    named = [match.groups() for row in results.read("papers").rows for match in NAMED.finditer(row[PROVED])]
    return [f"{file}::{name}" for file, name in named if name not in _tests_of(TESTS / file)]


def _tests_of(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


if __name__ == "__main__":
    print(results.table("papers"), end="")
    if missing := missing_tests():
        sys.exit(f"no such test: {', '.join(missing)}")
