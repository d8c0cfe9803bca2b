"""The `surgery` block of a surgical config: what it says of each layer, whether it is right, and which code reads it.

The block is all that the code needs to know of a surgery, besides the weights:

    {"format": 1, "base_model_type": "llama", "layers": [{...}, ...]}

`layers` has an entry for every layer. What an entry leaves out is as in the base:

    num_attention_heads, num_key_value_heads, query_groups, shapes
                               a layer of another shape: its heads, how many query heads read each KV head (left out
                               where all are read by equally many), and the shape of each parameter that differs,
                               by its name in the attention module
    query_numbers, kv_numbers  what the base calls this layer's heads, where some of its heads are gone: for people,
                               nothing that runs reads them
    parameters                 parameters that the surgery gave to the attention module, name -> shape
    every other key            is of a part, and so is every parameter

A part is a term of attention's equation in one file, which ends with its description: a `Part`, called `PART`. `FILES`
names the parts and is the only list of them. The description says which keys and parameters are the part's, whether an
entry of it is right, what it gives to an attention module, and what everybody else needs to know: the term, what the
cache holds, what becomes of the entry when heads go, words for people. A new part is a file, a line in `FILES` and a
test.

What every surgical model runs is imported as usual. A part is looked up where a layer's entry uses it, so that a
checkpoint may come without the parts that it does not use. Transformers takes a checkpoint's code by its text: the
file that config.json names, and those that it finds imported there. So a checkpoint's copy of this file ends with an
import of each part that it carries, which never runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

NAME, FORMAT = "surgery", 1
TRANSFORMERS = ((5, 21), (6, 0))  # from, before; 5.20 drops the soft-cap of gemma2 under SDPA
SHAPE = {"num_attention_heads", "num_key_value_heads", "query_groups", "shapes", "query_numbers", "kv_numbers"}
QUERY_HEADS, KV_HEADS = "query heads", "KV heads"

ENTRY = "modeling_surgery"  # what config.json names
# A part's name -> its file. An entry that has a key of the part's name uses it; of others the files that are here are
# asked. Parts work on one another in this order. With a dot: what a part opens by a name that its entry gives.
FILES = {
    "split": "surgery_visibility",
    "sparse": "surgery_sparse_prefill",
    "act": "surgery_act",
    "bias": "surgery_bias",
    "gate": "surgery_gated_compute",
    "policy": "surgery_kv_policy",
    "policy.log": "surgery_kv_log",
    "sparse.kernel": "block_sparse_prefill",  # of the package's kernels
    # The estimators of blocks, in the order in which people read them.
    "sparse.pooled": "surgery_estimate_pooled",
    "sparse.sampled": "surgery_estimate_sampled",
    "sparse.streaming": "surgery_estimate_streaming",
    "sparse.tri_shape": "surgery_estimate_streaming",
    "sparse.vertical_slash": "surgery_estimate_vertical_slash",
    "sparse.flexprefill": "surgery_estimate_flexprefill",
    "sparse.xattention": "surgery_estimate_xattention",
    "sparse.block_topk": "surgery_estimate_block_topk",
    "sparse.max_threshold": "surgery_estimate_max_threshold",
    "sparse.hierarchical": "surgery_estimate_hierarchical",
    "sparse.by_head": "surgery_estimators",  # which every one of them needs
}
PARTS = tuple(name for name in FILES if "." not in name)
LIST = b"\n\nif False:  # read by Transformers, which takes what it finds imported here\n"


class Parameter(NamedTuple):
    """A parameter that a part gives to an attention module.

    Attributes:
        identity: the value that changes nothing; not -inf, which would give gradients that are no numbers.
        rows: what its rows are of, `QUERY_HEADS` or `KV_HEADS`; "": neither.
    """

    identity: float
    rows: str = ""


class HeadCost(NamedTuple):
    """What the cache holds of one KV head, in tokens.

    Attributes:
        growing: for each token of the text.
        fixed: however long the text is.
    """

    growing: float = 1
    fixed: int = 0


class Part:
    """The description of a part, for an entry that uses it. What is not said here, the part does not do.

    Attributes:
        keys: of a layer's entry.
        parameters: name, which begins with `surgery_` -> what it is.
        by_slots: it finds keys by their slot in the cache, and cannot work where a policy has dropped some.
    """

    keys: tuple[str, ...] = ()
    parameters: dict[str, Parameter] = {}  # noqa: RUF012 (a subclass sets another, nobody changes one)
    by_slots = False

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        """What is wrong with it in a layer's entry, "" if nothing.

        Args:
            groups: query heads that read each KV head.
        """
        return ""

    def methods(self, layer: dict) -> set[str]:
        """The names in `FILES` that it opens for this entry, besides its own."""
        return set()

    def visibilities(self, layer: dict, heads: list) -> list:
        """Which keys each KV head sees, a `Visibility` each; `heads`: as the parts before it have them."""
        return heads

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        """Give an attention module what its forward needs; if the entry uses it no longer, take that away.

        The module has its `surgery_heads` and the parameters already, and an empty dict `surgery_corrections`.
        """

    def terms(self, layer: dict) -> tuple[str, ...]:
        """The terms of the equation that this entry sets, as operations call them (`Operation.term`)."""
        return ()

    def kv_cost(self, layer: dict, heads: list[HeadCost]) -> list[HeadCost]:
        """What the cache holds of each KV head; `heads`: as the parts before it have it."""
        return heads

    def after_heads_change(self, layer: dict, queries: list[int], kv_heads: list[int]) -> dict:
        """The entries of its keys that change where only these heads stay; shapes of parameters follow by themselves.

        Args:
            queries, kv_heads: where the heads that stay are among those that were.
        """
        return {}

    def describe(self, layer: dict) -> tuple[str, str] | None:
        """A title and some words for `surgery inspect`, where the terms alone do not say it."""
        return None

    def display_key(self, layer: dict):
        """What neighbouring layers must have in common to be shown to people as one row; compared by ==."""
        return None

    def probe_length(self, layer: dict, least: int) -> int:
        """How many tokens show its effect to a check of the model that reads at least so many."""
        return least


def validate(config) -> list[dict]:
    """The layers of a config's `surgery` block, checked.

    Raises:
        ValueError: a format that this code does not know, a Transformers it was not made for, or a block that does
            not fit the model.
    """
    import transformers  # here: what a part costs is asked of stock configs too, before it is imported

    version = tuple(int(component) for component in transformers.__version__.split(".")[:2])
    if not TRANSFORMERS[0] <= version < TRANSFORMERS[1]:
        least, below = (".".join(map(str, bound)) for bound in TRANSFORMERS)
        raise ValueError(
            f"this checkpoint's code is made for Transformers >= {least} and < {below}, this is {version}"
        )
    block = getattr(config, NAME, None)
    if not isinstance(block, dict) or block.get("format") != FORMAT:
        block_format = block.get("format") if isinstance(block, dict) else block
        raise ValueError(f"the surgery block has format {block_format!r}; this code reads format {FORMAT}")
    layers, count = block.get("layers"), config.get_text_config().num_hidden_layers
    if not isinstance(layers, list) or len(layers) != count:
        raise ValueError(f"the surgery block must have a list of {count} layers")
    for index, layer in enumerate(layers):
        if reason := _fault(config, layer):
            raise ValueError(f"layer {index} of the surgery block {reason}")
    return layers


def _fault(config, layer) -> str:
    """What is wrong with a layer's entry, "" if nothing."""
    used, unknown = _owners(layer) if isinstance(layer, dict) else ({}, {""})
    if not isinstance(layer, dict) or unknown & set(layer):
        keys = {key for part in _parts_here() for key in part.keys}
        return f"has other keys than {', '.join(sorted(keys | SHAPE | {'parameters'}))}{_lost_files()}"
    named = layer.get("parameters", {})
    if not isinstance(named, dict) or unknown:
        names = sorted(name for part in _parts_here() for name in part.parameters)
        return f"has other parameters than {', '.join(names)}{_lost_files()}"
    if reason := _fault_of_shape(config, layer):
        return reason
    groups = query_groups(config, layer)
    return next(filter(None, (part.validation_error(config, layer, groups) for part in used.values())), "")


def _fault_of_shape(config, layer: dict) -> str:
    """What is wrong with the numbers of heads and the shapes in a layer's entry, "" if nothing."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        if name in layer and not is_whole(layer[name], 1):
            return f"has {name} {layer[name]!r}, which must be whole and from 1"
    if layer.get("num_key_value_heads", 1) > layer.get("num_attention_heads", sum(query_groups(config))):
        return f"has {layer['num_key_value_heads']} KV heads, more than query heads"
    groups, kv_heads = query_groups(config, layer), layer.get("num_key_value_heads", len(query_groups(config)))
    heads = layer.get("num_attention_heads", sum(query_groups(config)))
    valid = isinstance(groups, list) and all(is_whole(size, 1) for size in groups)
    if not valid or len(groups) != kv_heads or sum(groups) != heads:
        return f"spreads {heads} query heads over {kv_heads} KV heads as {groups}"
    for name, count in (("query_numbers", heads), ("kv_numbers", kv_heads)):
        numbers = layer.get(name, [])
        if numbers and not (all_whole(numbers, 0) and len({*numbers}) == count == len(numbers)):
            return f"must give {count} different numbers as {name}, not {numbers}"
    shapes = layer.get("shapes", {})
    if not isinstance(shapes, dict) or not all(all_whole(shape, 1) and shape for shape in shapes.values()):
        return "has shapes that are no lists of whole numbers"
    return ""


def _owners(layer: dict) -> tuple[dict[str, Part], set[str]]:
    """The parts that a layer's entry uses, in the order of `FILES`, and the keys and parameters that are nobody's."""
    named = layer.get("parameters", {})
    left = (set(layer) - SHAPE - {"parameters"}) | (set(named) if isinstance(named, dict) else set())
    used: dict[str, Part] = {}
    for name in sorted(PARTS, key=lambda name: name not in layer):
        if not left:
            break
        if name not in layer and _sibling(FILES[name]) is None:
            continue
        part = load_part(name)
        if own := left & {*part.keys, *part.parameters}:
            used[name], left = part, left - own
    return {name: used[name] for name in PARTS if name in used}, left


def used_parts(layer: dict) -> dict[str, Part]:
    """The parts that a layer's entry uses, by name, in the order of `FILES`.

    Raises:
        ValueError: the code of one did not come with this checkpoint.
    """
    return _owners(layer)[0]


def parts_of(layers: list[dict]) -> set[str]:
    """What the code of layers is, whose entries are right: names of `FILES`."""
    used = [(name, part, layer) for layer in layers for name, part in used_parts(layer).items()]
    return {name for name, _, _ in used} | {name for _, part, layer in used for name in part.methods(layer)}


def after_heads_change(layer: dict, queries: list[int], kv_heads: list[int]) -> dict:
    """A layer's entry where only these heads stay; its shape is not followed.

    Args:
        queries, kv_heads: where the heads that stay are among those that were.
    """
    parts, counts = used_parts(layer).values(), {QUERY_HEADS: len(queries), KV_HEADS: len(kv_heads)}
    changed = {
        key: value for part in parts for key, value in part.after_heads_change(layer, queries, kv_heads).items()
    }
    if "parameters" in layer:
        rows = {name: parameter.rows for part in parts for name, parameter in part.parameters.items()}
        changed["parameters"] = {
            name: [counts[rows[name]], *shape[1:]] if rows.get(name) else shape
            for name, shape in layer["parameters"].items()
        }
    return layer | changed


def _parts_here() -> list[Part]:
    """Every part whose code is here: in a checkpoint those that it uses."""
    return [load_part(name) for name in PARTS if _sibling(FILES[name])]


def _lost_files() -> str:
    """Which parts' code did not come with this checkpoint, the end of an error; "" where all is here."""
    lost = [f"{FILES[name]}.py" for name in PARTS if _sibling(FILES[name]) is None]
    return f" ({', '.join(lost)} did not come with this checkpoint: load it with surgery.load)" if lost else ""


def query_groups(config, layer: dict | None = None) -> list[int]:
    """How many query heads read each KV head of a layer, None: of a layer as the base's config has it."""
    text, layer = config.get_text_config(), layer or {}
    heads = layer.get("num_attention_heads", text.num_attention_heads)
    kv_heads = layer.get("num_key_value_heads", getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    return layer.get("query_groups") or [heads // kv_heads] * kv_heads


def base_windows(config) -> list[int | None]:
    """The base model's own sliding window in each layer, None for full attention."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    window, layers = getattr(text, "sliding_window", None), range(text.num_hidden_layers)
    if kinds:  # which the base's masks follow, whatever the switch says
        return [window if kinds[i] == "sliding_attention" else None for i in layers]
    return [window if getattr(text, "use_sliding_window", True) else None for _ in layers]


def is_whole(value, least: int) -> bool:
    """Whether a value is a whole number from `least` on."""
    return type(value) is int and value >= least


def all_whole(values, least: int) -> bool:
    """Whether a value is a list of whole numbers from `least` on."""
    return isinstance(values, list) and all(is_whole(value, least) for value in values)


@cache
def load_file(name: str):
    """The module that a name in `FILES` stands for.

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


def load_part(name: str) -> Part:
    """The description of a part; errors as of `load_file`."""
    return load_file(name).PART


def _sibling(file: str):
    """Where the file of code is in the folder of this one, where every part is; or None."""
    return find_spec(f".{file}", __package__)


def _spec(file: str):
    """Where a file of code is: a checkpoint has all in one folder, the package has its kernels elsewhere; or None."""
    return _sibling(file) or (find_spec(f"surgery.kernels.{file}") if find_spec("surgery") else None)


def exported_files(parts: Iterable[str]) -> dict[str, bytes]:
    """The files of code that a checkpoint with these parts carries: name -> content."""
    from transformers.dynamic_module_utils import get_relative_import_files

    files = sorted({FILES[name] for name in parts})
    roots = [Path(_spec(name).origin) for name in (ENTRY, *files)]
    sources = {Path(file) for root in roots for file in (root, *get_relative_import_files(root))}
    code = {path.name: path.read_bytes() for path in sorted(sources)}
    own = Path(__file__).name
    code[own] = code[own].partition(LIST)[0]
    if files:
        code[own] += LIST + "".join(f"    from .{file} import *\n" for file in files).encode()
    return code


def export_files(parts: Iterable[str], folder: str | Path) -> None:
    """Put the code that a checkpoint with these parts carries in its folder."""
    for name, content in exported_files(parts).items():
        (Path(folder) / name).write_bytes(content)
