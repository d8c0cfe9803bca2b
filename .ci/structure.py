"""Check the structure of the package: loose files, circles of imports, and the files that a commit touched.

    python .ci/structure.py             loose files in surgery/, circles, the largest files
    python .ci/structure.py COMMIT ...  for each commit, the files outside tests/ that it touched

Exit code 1 if the loose files are not the six that are expected, or if there is a circle.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
LOOSE = {"__init__.py", "__main__.py", "api.py", "errors.py", "pipeline.py", "version.py"}


def circles() -> list[set[str]]:
    """Groups of modules that import one another, directly or indirectly; imports for type checkers do not count."""
    graph = grimp.build_graph("surgery", exclude_type_checking_imports=True)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    return [found for found in strongly_connected(imports) if len(found) > 1]


def strongly_connected(edges: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of a graph: Tarjan's algorithm, without recursion."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found: list[set[str]] = []
    for root in edges:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        path.append(root)
        work = [(root, iter(edges[root]))]
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in edges:
                    continue
                if target not in index:
                    index[target] = low[target] = len(index)
                    path.append(target)
                    work.append((target, iter(edges[target])))
                    break
                if target in path:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    at = path.index(node)
                    found.append(set(path[at:]))
                    del path[at:]
    return found


def touched(commit: str) -> list[str]:
    """The files outside tests/ that a commit added, changed or removed."""
    command = ["git", "-C", str(ROOT), "diff", "--no-renames", "--name-only", "-z", f"{commit}^1", commit]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and not name.startswith("tests/")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", metavar="COMMIT")
    for commit in (given := parser.parse_args().commits):
        names = touched(commit)
        print(f"{commit}: {len(names)} files outside tests: {', '.join(names)}")
    if given:
        return 0
    package = ROOT / "surgery"
    loose = {path.name for path in package.glob("*.py")}
    sizes = sorted((path.read_text(encoding="utf-8").count("\n"), path) for path in package.rglob("*.py"))
    found = circles()
    print(f"loose files in surgery/: {len(loose)} ({', '.join(sorted(loose))})")
    print(f"circles of modules: {len(found) or 'none'}")
    for circle in found:
        print(f"  {', '.join(sorted(circle))}")
    print(f"modules: {len(sizes)}, {sum(lines for lines, _ in sizes):,} lines, median {sizes[len(sizes) // 2][0]}")
    for lines, path in sizes[:-6:-1]:
        print(f"  {lines:4} {path.relative_to(ROOT).as_posix()}")
    return int(loose != LOOSE or bool(found))


if __name__ == "__main__":
    sys.exit(main())
