"""A model folder or a loaded model: its config, a table of its tensors, and the other files that are copied to OUT."""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from surgery.errors import ModelError, SurgeryError, shown
from surgery.io.files import BASE_CARD, CARD, REPORT, read_json, utf8
from surgery.io.plain_config import plain_config
from surgery.io.safetensors import SINGLE_FILE, STORED_NAMES, WEIGHT_INDEX, Checkpoint
from surgery.runtime.surgery_config import CODE

PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\.original$")


def load_config(folder: Path):
    """The Transformers config of a model folder; never runs code from the folder.

    A `model_type` that Transformers does not know gives the general `PreTrainedConfig` with the same fields.

    Raises:
        SurgeryError: no config.json, or one that Transformers refuses.
    """
    raw = read_config_json(folder)
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = raw.get("model_type")
    if kind == "surgery":
        from surgery.runtime import register

        register()
    known = kind in CONFIG_MAPPING
    cls = CONFIG_MAPPING[kind] if known else PreTrainedConfig  # the mapping is lazy and has no .get
    try:
        return cls.from_dict(raw)
    except Exception as error:  # Transformers' validators raise many kinds
        raise ModelError(
            f"Transformers does not accept this config: {error}",
            where=str(folder / "config.json"),
            fix="check its numbers (heads, sizes, layers) against the model's original",
        ) from None


def settled_config(folder: Path):
    """The config of a model folder, read without Transformers where config.json is plain (see `plain_config`).

    Raises:
        SurgeryError: as for `load_config`.
    """
    return plain_config(read_config_json(folder), partial(load_config, folder)) or load_config(folder)


# Field of a config -> largest number accepted. Transformers may make lists of that many elements.
NUMBERS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000),
    "num_labels": 100_000,
    "vocab_size": 100_000_000,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_kv_heads"), 1_000_000),
    **dict.fromkeys(("hidden_size", "head_dim", "sliding_window", "max_position_embeddings"), 10**12),
    **dict.fromkeys(("partial_rotary_factor", "rotary_dim", "rope_theta"), 10**12),
}


def read_config_json(folder: Path) -> dict:
    """config.json of a model folder, checked so that Transformers cannot make huge lists from its numbers.

    Raises:
        SurgeryError: no config.json, not JSON, text in place of a number, a number above its limit in `NUMBERS`, or a
            key that stops Transformers from running the model or makes it read other files than surgery reads.
    """
    raw = read_json(folder / "config.json")
    where = str(folder / "config.json")
    for part in [raw, *(value for value in raw.values() if isinstance(value, dict))]:
        for name, most in NUMBERS.items():
            value = part.get(name)
            if isinstance(value, str | dict):
                raise ModelError(f"{name} should be a number; it is {shown(value)}", where=where)
            if isinstance(value, int | float) and value > most:
                what = f"{name} is {value:,}, which is more than any model has"
                raise ModelError(what, where=where, fix="check it against the model's original")
        for name in ("_attn_implementation", "attn_implementation"):
            if "/" in str(part.get(name)):  # Transformers would fetch this code and run it
                what = f"{name} is {shown(part[name])}: code of somebody's, which is not loaded"
                raise ModelError(what, where=where, fix="remove this key")
        if not isinstance(part.get("model_type"), str | None):
            raise ModelError(f"model_type should be a name; it is {shown(part['model_type'])}", where=where)
        if part.get("return_dict") is False:  # its own forward reads the layers' outputs by name
            what = "return_dict is false: Transformers cannot run a model that returns tuples"
            raise ModelError(what, where=where, fix="remove this key")
    if (file := raw.get("transformers_weights")) not in (None, SINGLE_FILE, WEIGHT_INDEX):
        what = f"transformers_weights is {shown(file)}: Transformers would load this in place of {SINGLE_FILE}"
        raise ModelError(what, where=where, fix=f"remove this key, and call the file {SINGLE_FILE}")
    return raw


def tensor_table(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of a folder, from the safetensors headers alone."""
    return {name: (info.dtype, info.shape) for name, info in Checkpoint(folder).tensors.items()}


def model_table(model) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every parameter of a loaded model (tied ones once).

    The original of a weight under torch's parametrize is listed under the name of the plain weight.
    """

    def stored_name(dtype):
        name = str(dtype).removeprefix("torch.")
        return STORED_NAMES.get(name, name)

    parameters = ((PARAMETRIZED.sub(r".\1", name), p) for name, p in model.named_parameters())
    return {name: (stored_name(p.dtype), tuple(p.shape)) for name, p in parameters}


# Files that are copied from the base's folder, apart from weights, config and card. All others are left behind and
# listed: other weight formats, adapters, caches, training states.
CARRIED = (
    "tokenizer*.json", "tokenizer.model*", "*.tiktoken", "tiktoken.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "spiece.model", "sentencepiece*.model", "sentencepiece*.bpe",
    "*preprocessor_config.json", "processor_config.json", "chat_template.*", "chat_templates/*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "*.py",
    "*.png", "*.jpg", "*.jpeg", "*.webp", "*.gif", "*.svg",
)  # fmt: skip
REWRITTEN = {BASE_CARD, "config.json", CARD, REPORT}
# Code files that are not copied from a surgical base: OUT has this version's files. In a stock base such files are its
# own. They are copied, unless OUT has a file of that name.
RUNTIME = CODE


def is_carried(name: str) -> bool:
    """Whether a file with this path is of a kind that is copied, or one that surgery writes next to the weights."""
    return name in REWRITTEN or _matches(name)


def _matches(name: str) -> bool:
    patterns = (pattern.lower() for pattern in CARRIED if "/" in pattern or "/" not in name)
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def refuse_links_out(folder: Path) -> None:
    """Raise where a file that would be copied or read is a link out of the model folder; a clone may hold such a link.

    The link's target would become a plain file in OUT and be published. Links into the Hub's cache are allowed. Weight
    files may be links to anywhere, since only tensors are taken from them.
    """
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if is_carried(name) and _leads_out(path, folder):
            raise SurgeryError(
                f"{name} is a link that leaves the model folder",
                where=str(folder),
                fix="put a copy of the file in its place if it belongs to the model, else remove the link",
                code="unsafe-weights",
            )


def _leads_out(path: Path, folder: Path) -> bool:
    target, root = path.resolve(), folder.resolve()
    blobs = target.parent
    return root not in target.parents and not (blobs.name == "blobs" and blobs.parent.name.startswith("models--"))


def carry_files(base: Path, folder: Path, weights: set[str]) -> list[str]:
    """Copy the base's files that are on the allow list (`CARRIED`); a link becomes the file that it points to.

    Args:
        weights: files of the base that were converted, including the index if it was read.

    Returns:
        The names of the files that were left behind.

    Raises:
        SurgeryError: a link leaves the folder.
    """
    refuse_links_out(base)
    left_behind, runtime, surgical = [], _runtime_names(folder), _is_surgical(base)
    for path in sorted(p for p in base.rglob("*") if p.is_file()):
        name = path.relative_to(base).as_posix()
        if any(component.startswith(".") for component in path.relative_to(base).parts) or name in REWRITTEN:
            continue
        if surgical and name in runtime:  # OUT has this version's file
            continue
        if name in runtime or (surgical and any(fnmatchcase(name, pattern) for pattern in RUNTIME)):
            left_behind.append(utf8(name))
        elif _matches(name) and name.isprintable():  # a name that is not UTF-8 cannot be recorded
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        elif name not in weights:
            left_behind.append(utf8(name))
    card = next((base / name for name in (BASE_CARD, "README.md") if (base / name).is_file()), None)
    if card:
        shutil.copyfile(card, folder / BASE_CARD)
    return left_behind


def _is_surgical(folder: Path) -> bool:
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "surgery"


def _runtime_names(folder: Path) -> set[str]:
    """The code files that a surgical folder runs; empty for a stock folder."""
    if not _is_surgical(folder):
        return set()
    from surgery.runtime.surgery_config import exported_files, parts_of

    return set(exported_files(parts_of(load_config(folder).surgery["layers"])))
