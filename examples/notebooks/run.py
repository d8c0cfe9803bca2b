"""Run a notebook from beginning to end, in a folder of its own, and report the first error.

    python examples/notebooks/run.py first_surgery [--fast] [--folder FOLDER]

`--fast` takes fewer samples. It needs nbclient and ipykernel (the extra `test`).
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("name", choices=sorted(path.stem for path in Path(__file__).parent.glob("*.ipynb")))
parser.add_argument("--fast", action="store_true", help="fewer samples")
parser.add_argument("--folder", type=Path, help="where it writes; default: a folder that is removed")


def main() -> None:
    options = parser.parse_args()
    book = nbformat.read(Path(__file__).with_name(f"{options.name}.ipynb"), as_version=4)
    if options.fast:
        os.environ["SURGERY_FAST"] = "1"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            print(output.get("text", ""), end="")
    print(f"{options.name}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
