"""The parts of this code that only some checkpoints need, and the files that a checkpoint carries.

What every surgical model runs is imported as usual. A part is looked up by its name where a layer's entry in the
`surgery` block uses it, so that a checkpoint may come without the parts that it does not use. Transformers takes a
checkpoint's code by its text: the file that config.json names, and those that it finds imported there. So a
checkpoint's copy of this file ends with an import of each part that it carries, which never runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

ENTRY = "modeling_surgery"  # what config.json names
OF_LAYERS = ("terms", "gate", "sparse")  # what an entry may have: the part's `attach` gives it to a module
FILES = {
    "terms": "surgery_terms",
    "sinks": "surgery_sinks",
    "gate": "surgery_skipping",
    "sparse": "surgery_prefill",
    "kernel": "block_sparse_prefill",  # of the package's kernels; with "sparse"
    # The ways to choose blocks in sparse prefill. `by_head`, which uses others, comes with "sparse".
    "block_topk": "surgery_estimate_block_topk",
    "flexprefill": "surgery_estimate_flexprefill",
    "hierarchical": "surgery_estimate_hierarchical",
    "max_threshold": "surgery_estimate_max_threshold",
    "pooled": "surgery_estimate_pooled",
    "sampled": "surgery_estimate_sampled",
    "streaming": "surgery_estimate_streaming",
    "tri_shape": "surgery_estimate_streaming",
    "vertical_slash": "surgery_estimate_vertical_slash",
    "xattention": "surgery_estimate_xattention",
}
LIST = b"\n\nif False:  # read by Transformers, which takes what it finds imported here\n"


@cache
def part(name: str):
    """The module of a part.

    Raises:
        ValueError: no part has this name, or the checkpoint that this code came with does not use it.
    """
    if name not in FILES:
        raise ValueError(f"there is no part {name!r} of a surgery; there is: {', '.join(FILES)}")
    if (spec := _spec(FILES[name])) is None:
        raise ValueError(
            f"the surgery block uses {name!r}, and its code {FILES[name]}.py did not come with this checkpoint: load "
            "it with surgery.load and save it again"
        )
    return import_module(spec.name)


def _spec(file: str):
    """Where a file of code is: a checkpoint has all beside this one, the package its kernels elsewhere; or None."""
    here = find_spec(f".{file}", __package__)
    return here or (find_spec(f"surgery.kernels.{file}") if find_spec("surgery") else None)


def code_of(parts: Iterable[str]) -> dict[str, bytes]:
    """The files of code that a checkpoint with these parts carries: name -> content."""
    files = sorted({FILES[name] for name in parts})
    roots = [Path(_spec(name).origin) for name in (ENTRY, *files)]
    found = {Path(file) for root in roots for file in (root, *get_relative_import_files(root))}
    code = {path.name: path.read_bytes() for path in sorted(found)}
    own = Path(__file__).name
    code[own] = code[own].partition(LIST)[0]
    if files:
        code[own] += LIST + "".join(f"    from .{file} import *\n" for file in files).encode()
    return code


def carry(parts: Iterable[str], folder: str | Path) -> None:
    """Put the code that a checkpoint with these parts carries in its folder."""
    for name, content in code_of(parts).items():
        (Path(folder) / name).write_bytes(content)
