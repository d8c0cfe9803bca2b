"""Write every table and plot of the pages, from the figures in results/*.json and from the code.

    python examples/benchmarks/tables.py           lists stale tables and plots, with the rows that differ
    python examples/benchmarks/tables.py --write   writes them

A page is any Markdown file at the top of the repository, in recipes/, surgery/ or kernels/. A table or plot is written
between two marks:

    <!-- results: NAME -->    the table of results/NAME.json, and the commands that printed it (see results.py)
    <!-- plot: NAME -->       recipes/plots/NAME.svg (see plots.py)
    <!-- reference: NAME -->  a table from the code (see reference.py)
    <!-- end -->
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import plots
import reference
import results

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("results", "plot", "reference")
MARK = re.compile(rf"(<!-- ({'|'.join(KINDS)}): ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
BEGIN = re.compile(rf"<!-- (?:{'|'.join(KINDS)}): ")


class Block(NamedTuple):
    """The text between two marks of a page, and what the first mark names."""

    kind: str
    name: str
    text: str


def pages() -> list[Path]:
    """The pages that hold such tables or plots."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("surgery/**/*.md"), *ROOT.glob("kernels/*.md")]
    return sorted(page for page in found if BEGIN.search(page.read_text(encoding="utf-8")))


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, with their present text.

    Raises:
        SystemExit: a mark has no end.
    """
    text = page.read_text(encoding="utf-8")
    found = [Block(*match.group(2, 3, 4)) for match in MARK.finditer(text)]
    if any(BEGIN.search(block.text) for block in found) or len(BEGIN.findall(text)) > len(found):
        raise SystemExit(f"{page.relative_to(ROOT)}: a mark has no <!-- end -->")
    return found


def rendered(page: Path, kind: str, name: str) -> str:
    """The text that a block of `page` should have.

    Raises:
        SystemExit: there are no such results, plot or reference.
    """
    if kind == "results":
        return f"\n{results.table(name)}\n"
    known = plots.PLOTS if kind == "plot" else reference.REFERENCES
    if name not in known:
        raise SystemExit(f"{page.relative_to(ROOT)}: no {kind} {name}: there is {', '.join(known)}")
    if kind == "reference":
        return f"\n{reference.REFERENCES[name]()}\n"
    picture = Path(os.path.relpath(plots.FOLDER / f"{name}.svg", page.parent)).as_posix()
    return f"\n![{plots.PLOTS[name].says}]({picture})\n\n"


def rewritten(page: Path) -> str:
    """The text of the page with every block up to date."""
    blocks(page)
    return MARK.sub(
        lambda match: match[1] + rendered(page, match[2], match[3]) + match[5], page.read_text(encoding="utf-8")
    )


def stale() -> Iterator[str]:
    """A sentence for each table or plot that does not match the results or the code."""
    for page in pages():
        for kind, name, text in blocks(page):
            right = rendered(page, kind, name)
            if text == right:
                continue
            has, wants = text.splitlines(), right.splitlines()
            rows = [f"lacks {line}" for line in wants if line and line not in has]
            rows += [f"should not have {line}" for line in has if line and line not in wants]
            where = page.relative_to(ROOT).as_posix()
            yield f"{where}: {kind} {name}: {'; '.join(rows) or 'its rows are in another order'}"
    for name in plots.PLOTS:
        if why := plots.stale(name):
            yield f"recipes/plots/{name}.svg: {why}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        for page in pages():
            page.write_text(rewritten(page), encoding="utf-8", newline="\n")
        plots.FOLDER.mkdir(exist_ok=True)
        for name, plot in plots.PLOTS.items():
            (plots.FOLDER / f"{name}.svg").write_text(plots.svg(plot), encoding="utf-8", newline="\n")
        return 0
    faults = list(stale())
    print("\n".join(faults) or "every table and plot is that of its results")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
