"""The `surgery` block of a surgical config: its format, its validation, and the registry of the code that reads it.

The weights and this block are all that the code needs to run a surgery:

    {"format": 1, "base_model_type": "llama", "layers": [{...}, ...]}

`layers` has an entry for every layer. A key that an entry leaves out is as in the base:

    num_attention_heads, num_key_value_heads, query_groups, shapes
                               a layer of another shape: its heads, how many query heads read each KV head (left out
                               where each KV head is read by equally many), and the shape of each parameter that
                               differs, by its name in the attention module
    query_numbers, kv_numbers  the base's numbers of this layer's heads, where heads were removed: for people, no code
                               of the runtime uses them
    parameters                 parameters that the surgery added to the attention module, name -> shape
    every other key            belongs to a part, and so does every parameter

A part is a term of the attention equation in one file. The file ends with the part's description: a `Part`, called
`PART`. `FILES` is the only list of parts. The description gives the part's keys and parameters, validates an entry,
and sets up an attention module. It also gives what the rest of the package needs: the term, the cost in the cache, the
entry after heads are removed, and words for people. A new part is a file, a line in `FILES` and a test.

Code that every surgical model runs is imported as usual. A part is imported only where a layer's entry uses it,
so that a checkpoint need not carry other parts. Transformers finds a checkpoint's code by reading its text: the file
that config.json names, and the files that it imports; Transformers 4 takes no file that only an imported file imports.
So a checkpoint's copy of `modeling_surgery.py` ends with an import of each file that the checkpoint carries. This
import never runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

NAME, FORMAT = "surgery", 1
TRANSFORMERS = ((5, 13), (6, 0))  # (from, before); the caches of 5.12 lack a method that ours builds on
# The base's model_type -> the first version in which its attention can be replaced.
SINCE = {"gptj": (5, 24), "deepseek_v3": (5, 24), "falcon": (5, 25)}
SHAPE = {"num_attention_heads", "num_key_value_heads", "query_groups", "shapes", "query_numbers", "kv_numbers"}
PER_LAYER = "per_layer_config"  # the key of config.json by which Transformers 5 names what differs between layers
QUERY_HEADS, KV_HEADS = "query heads", "KV heads"

ENTRY = "modeling_surgery"  # the file that config.json names
# A part's name -> its file. An entry with a key of the part's name uses the part. For other keys, the parts whose
# files are here are searched. Parts are applied in this order. A name with a dot is a file that a part opens when its
# entry names it.
FILES = {
    "split": "surgery_visibility",
    "latent": "surgery_latent",
    "low_rank": "surgery_low_rank",
    "sparse": "surgery_sparse_prefill",
    "act": "surgery_act",
    "bias": "surgery_bias",
    "gate": "surgery_gated_compute",
    "read": "surgery_kv_read",
    "policy": "surgery_kv_policy",
    "policy.log": "surgery_kv_log",
    "policy.attention": "surgery_kv_attention",
    "policy.caote": "surgery_kv_caote",
    "policy.lra": "surgery_kv_lra",
    "policy.lfa": "surgery_kv_lfa",
    "policy.norm": "surgery_kv_norm",
    "policy.window": "surgery_kv_window",
    "policy.random": "surgery_kv_random",
    "policy.task_kv": "surgery_kv_task_kv",
    "read.index": "surgery_kv_read_index",
    "read.loki": "surgery_kv_read_loki",
    "read.recycled": "surgery_kv_read_recycled",
    "read.tokenselect": "surgery_kv_read_tokenselect",
    "read.tree": "surgery_kv_read_tree",
    "read.adaptive": "surgery_kv_read_adaptive",
    "read.threshold": "surgery_kv_read_threshold",
    "read.random": "surgery_kv_read_random",
    # The package's kernels (surgery_kernels.py).
    "kernel.streaming_prefill": "streaming_prefill",
    "kernel.split_decode": "split_decode",
    "kernel.gathered_heads": "gathered_heads",
    "kernel.block_sparse_prefill": "block_sparse_prefill",
    "kernel.estimators": "estimators",
    "sparse.queries": "surgery_query_blocks",  # where each query has a list of its own
    # The estimators of blocks, in the order in which they are listed for people.
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
    "sparse.by_head": "surgery_estimators",  # every estimator needs this file
}
PARTS = tuple(name for name in FILES if "." not in name)
# The names of the files of code that a checkpoint may carry.
CODE = (f"{ENTRY}.py", "surgery_*.py", *(f"{file}.py" for name, file in FILES.items() if name.startswith("kernel.")))
# What every surgical checkpoint carries besides its parts.
ALWAYS = ("kernel.streaming_prefill", "kernel.split_decode")
LIST = b"\n\nif False:  # read by Transformers, which takes what it finds imported here\n"


class Parameter(NamedTuple):
    """A parameter that a part gives to an attention module.

    Attributes:
        identity: the value that changes nothing; not -inf, which would give NaN gradients.
        rows: whether it has a row for each of the `QUERY_HEADS` or of the `KV_HEADS`; "": neither.
    """

    identity: float
    rows: str = ""


class HeadCost(NamedTuple):
    """How much the cache stores for one KV head, or beside the heads, in tokens.

    Attributes:
        growing: stored for each token of the text.
        fixed: stored whatever the length of the text; negative for what begins after so many tokens.
        beside: bytes that are stored beside the key and the value of each of these tokens.
        readers: number of query heads that read it.
    """

    growing: float = 1
    fixed: int = 0
    beside: float = 0
    readers: int = 1


class Part:
    """The description of a part. The defaults here are those of a part that does nothing.

    Attributes:
        keys: the keys of a layer's entry that belong to the part.
        parameters: name, which begins with `surgery_` -> its `Parameter`.
        by_slots: the part finds keys by their slot in the cache, and cannot work where a policy has dropped some.
        of_prompts: it does so in prompts alone.
    """

    keys: tuple[str, ...] = ()
    parameters: dict[str, Parameter] = {}  # noqa: RUF012 (a subclass sets another, nobody changes one)
    by_slots = of_prompts = False

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        """The error in the part's keys and parameters of a layer's entry, "" if there is none.

        Args:
            groups: number of query heads that read each KV head.
        """
        return ""

    def methods(self, layer: dict) -> set[str]:
        """The names in `FILES` that the part opens for this entry, apart from its own."""
        return set()

    def visibilities(self, layer: dict, heads: list) -> list:
        """The `Visibility` of each KV head; `heads` are the visibilities that the earlier parts gave."""
        return heads

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        """Set up an attention module for the part; if the entry no longer uses the part, undo that.

        The module already has its `surgery_heads`, its parameters and an empty dict `surgery_corrections`.
        """

    def terms(self, layer: dict) -> tuple[str, ...]:
        """The terms of the equation that this entry sets, by the names that operations use (`Operation.term`)."""
        return ()

    def kv_cost(self, layer: dict, heads: list[HeadCost]) -> list[HeadCost]:
        """The cost of each KV head in the cache, then what is stored beside them; `heads`: what earlier parts gave."""
        return heads

    def after_heads_change(self, layer: dict, queries: list[int], kv_heads: list[int]) -> dict:
        """The part's keys that change when only these heads remain, with their new values.

        The caller changes the shapes of the parameters.

        Args:
            queries, kv_heads: indices of the remaining heads among the old ones.
        """
        return {}

    def by_prompt(self, layer: dict) -> bool:
        """Whether what later tokens see depends on where the prompt ended: the call that filled the empty cache.

        Then a cached decode is not one forward over the whole text, by definition, and the model needs its own cache.
        """
        return False

    def in_own_cache(self, layer: dict) -> bool:
        """Whether the model needs its own cache, since another would hold, and show, keys that nobody may see."""
        return False

    def by_first_token(self, layer: dict) -> bool:
        """Whether the part looks up the first token of each row in the cache."""
        return False

    def describe(self, layer: dict) -> tuple[str, str] | None:
        """A title and a short text for `surgery inspect`, where the terms alone are not enough."""
        return None

    def display_key(self, layer: dict):
        """A value that neighbouring layers must share to be displayed as one row; compared by ==."""
        return None

    def probe_length(self, layer: dict, least: int) -> int:
        """How many tokens a check of the model must read to show the part's effect; at least `least`."""
        return least


def validate(config) -> list[dict]:
    """Validate a config's `surgery` block and return its layers.

    Raises:
        ValueError: a format that this code does not know, a version of Transformers that it was not made for, or a
            block that does not fit the model.
    """
    block = getattr(config, NAME, None)
    if fault := version_fault(config):
        raise ValueError(fault)
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


def version_fault(config=None) -> str:
    """Why the installed Transformers cannot run this code with a config (None: with any); "" if it can."""
    import transformers  # here: other functions of this file must run without it

    block = getattr(config, NAME, None)
    base_type = block.get("base_model_type") if isinstance(block, dict) else None
    version = tuple(int(component) for component in transformers.__version__.split(".")[:2])
    bounds = (max(TRANSFORMERS[0], SINCE.get(str(base_type), (0, 0))), TRANSFORMERS[1])
    if bounds[0] <= version < bounds[1]:
        return ""
    least, below, this = (".".join(map(str, each)) for each in (*bounds, version))
    return f"this checkpoint's code is made for Transformers >= {least} and < {below}, this is {this}"


def _fault(config, layer) -> str:
    """The error in a layer's entry, "" if there is none."""
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
    """The error in the numbers of heads and the shapes of a layer's entry, "" if there is none."""
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
    """The parts that a layer's entry uses, in the order of `FILES`, and the keys and parameters that no part owns."""
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
        ValueError: the checkpoint does not carry the code of one of them.
    """
    return _owners(layer)[0]


def parts_of(layers: list[dict]) -> set[str]:
    """The code that layers with valid entries use, as names in `FILES`."""
    used = [(name, part, layer) for layer in layers for name, part in used_parts(layer).items()]
    return {name for name, _, _ in used} | {name for _, part, layer in used for name in part.methods(layer)}


def depends_on_prompt(config) -> bool:
    """Whether a part of a surgical config does something that depends on where the prompt ended (`by_prompt`)."""
    layers = (getattr(config, NAME, None) or {}).get("layers", ())
    return any(part.by_prompt(layer) for layer in layers for part in used_parts(layer).values())


def after_heads_change(layer: dict, queries: list[int], kv_heads: list[int]) -> dict:
    """A layer's entry when only these heads remain. The keys of its shape (`SHAPE`) stay unchanged.

    Args:
        queries, kv_heads: indices of the remaining heads among the old ones.
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
    """Every part whose code is here; in a checkpoint, the parts that it uses."""
    return [load_part(name) for name in PARTS if _sibling(FILES[name])]


def _lost_files() -> str:
    """The end of an error message: the parts' files that this checkpoint does not carry; "" if none is missing."""
    lost = [f"{FILES[name]}.py" for name in PARTS if _sibling(FILES[name]) is None]
    return f" ({', '.join(lost)} did not come with this checkpoint: load it with surgery.load)" if lost else ""


def query_groups(config, layer: dict | None = None) -> list[int]:
    """How many query heads read each KV head of a layer; without `layer`, of a layer of the base."""
    text, layer = config.get_text_config(), layer or {}
    heads = layer.get("num_attention_heads", text.num_attention_heads)
    kv_heads = layer.get("num_key_value_heads", getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    return layer.get("query_groups") or [heads // kv_heads] * kv_heads


def per_layer_config(layers: list[dict], heads: int, kv_heads: int | None) -> dict[str, dict[str, int]]:
    """The layers' own numbers of KV heads, as Transformers spells them in config.json, for programs that read these.

    A surgical model is made from the `surgery` block, and ignores them.

    Args:
        layers: the layers of a valid `surgery` block.
        heads, kv_heads: the numbers that the config names for all layers; None: its family has no such number.

    Returns:
        layer -> name -> number, of layers that differ from the config. {} if these numbers would not say all: other
        changes than of shapes, other query heads (from whose number some families compute the size of a head), or KV
        heads that different numbers of query heads read.
    """
    alike = all(layer.get("num_attention_heads", heads) == heads for layer in layers)
    even = all(len({*(layer.get("query_groups") or ())}) < 2 for layer in layers)
    if kv_heads is None or not alike or not even or any(set(layer) - SHAPE for layer in layers):
        return {}
    counts = [layer.get("num_key_value_heads", kv_heads) for layer in layers]
    own = [index for index, count in enumerate(counts) if count != kv_heads]
    digits = len(str(max(own, default=0)))
    return {str(index).zfill(digits): {"num_key_value_heads": counts[index]} for index in own}


def is_whole(value, least: int) -> bool:
    """Whether a value is an integer of at least `least`."""
    return type(value) is int and value >= least


def all_whole(values, least: int) -> bool:
    """Whether a value is a list of integers of at least `least`."""
    return isinstance(values, list) and all(is_whole(value, least) for value in values)


@cache
def load_file(name: str):
    """The module of a name in `FILES`.

    Raises:
        ValueError: `FILES` has no such name, or the checkpoint of this code does not carry its file.
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
    """The description of a part; raises as `load_file` does."""
    return load_file(name).PART


def _sibling(file: str):
    """The import spec of a file of code in this file's folder, which holds every part; or None."""
    return find_spec(f".{file}", __package__)


def _spec(file: str):
    """The import spec of a file of code, or None. The package keeps its kernels in a folder of their own."""
    return _sibling(file) or (find_spec(f"surgery.kernels.{file}") if __package__ == "surgery.runtime" else None)


def exported_files(parts: Iterable[str]) -> dict[str, bytes]:
    """The files of code that a checkpoint with these parts carries: name -> content."""
    from transformers.dynamic_module_utils import get_relative_import_files

    files = sorted({FILES[name] for name in (*parts, *ALWAYS)})
    roots = [Path(_spec(name).origin) for name in (ENTRY, *files)]
    sources = {Path(file) for root in roots for file in (root, *get_relative_import_files(root))}
    code = {path.name: path.read_bytes() for path in sorted(sources)}
    entry = f"{ENTRY}.py"
    carried = "".join(f"    from .{Path(name).stem} import *\n" for name in sorted(code) if name != entry)
    return code | {entry: code[entry].partition(LIST)[0] + LIST + carried.encode()}


def export_files(parts: Iterable[str], folder: str | Path) -> None:
    """Write the code that a checkpoint with these parts carries to its folder."""
    for name, content in exported_files(parts).items():
        (Path(folder) / name).write_bytes(content)
