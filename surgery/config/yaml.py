"""Read YAML as plain data, with the line of every key.

Tags, anchors and aliases (a few lines of them can unfold to gigabytes) and duplicate keys are refused, and the size is
limited. Keys are text. In the value of an operation's field, where keys can be indices of layers and heads, they may
also be whole numbers.
"""

from __future__ import annotations

from contextlib import suppress

import yaml

from surgery.errors import RecipeError, SurgeryError, shown
from surgery.evaluation.probes import REGISTRY, find
from surgery.io.files import MAX_DEPTH
from surgery.io.safetensors import inside_folder

MAX_BYTES = 256 << 10
FILE_FIELDS = ("scores", "text", "calibration_text", "labelled")  # fields of an operation that may name a file
MAX_DIGITS = 40
FIELD = 3  # steps from a recipe's top to the value of an operation's field
Path = tuple[str | int, ...]
QUOTED = """put text that begins with * or & in quotes, such as '["*router*"]'"""


def _line_of_fault(text: str, loader) -> str:
    """ ":LINE" of the first value that has the form of a date or a number and is none; "" where there is none."""
    with suppress(RecursionError, ValueError, OverflowError, yaml.YAMLError):  # it may not even be read
        nodes = [yaml.compose(text, Loader=loader)]
        for node in nodes:
            if isinstance(node, yaml.MappingNode):
                nodes += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                nodes += node.value
            else:
                try:
                    yaml.constructor.SafeConstructor().construct_object(node)
                except (ValueError, OverflowError):
                    return f":{node.start_mark.line + 1}"
    return ""


def parse(text: str, where: str, field: int = FIELD) -> tuple[object, dict[Path, int]]:
    """Plain data, and the line (from 1) of every key and item by its path.

    Args:
        field: steps from the top of this text to the value of a field; 0: the text is such a value.

    Raises:
        SurgeryError: not YAML, too large, or with a feature that recipes may not use.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"the file has {len(text):,} characters; a recipe has fewer than {MAX_BYTES:,}", where=where)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            line = event.start_mark.line + 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise RecipeError(f"this is nested more than {MAX_DEPTH} levels deep", where=f"{where}:{line}")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                what = "anchors and aliases (&, *) are not allowed in a recipe"
                raise RecipeError(what, where=f"{where}:{line}", fix=QUOTED)
            if getattr(event, "tag", None):
                raise RecipeError(f"the tag {event.tag} is not allowed in a recipe", where=f"{where}:{line}")
        node = yaml.compose(text, Loader=loader)
        data = yaml.load(text, Loader=loader)  # a safe loader: plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}" if mark else where
        fix = QUOTED if "alias" in (getattr(error, "context", None) or "") else ""
        raise RecipeError(f"this is not YAML: {getattr(error, 'problem', None) or error}", where=at, fix=fix) from None
    except (RecursionError, ValueError, OverflowError) as error:
        at = _line_of_fault(text, loader)
        raise RecipeError(f"this YAML cannot be read: {type(error).__name__}", where=where + at) from None
    lines: dict[Path, int] = {}
    if node is not None:
        _walk(node, (), lines, where, field)
    return data, lines


def _walk(node, path: Path, lines: dict[Path, int], where: str, field: int) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            digits = key.value.isdecimal() and len(key.value) <= MAX_DIGITS  # int() refuses thousands of digits
            numbered = len(path) >= field and digits and str(int(key.value)) == key.value
            if key.tag != "tag:yaml.org,2002:str" and not numbered:
                line = key.start_mark.line + 1
                raise RecipeError(f"the key {key.value} is not text", where=f"{where}:{line}", fix="put it in quotes")
            key_path = (*path, str(key.value))
            if key_path in lines:
                raise RecipeError(f"{key.value!r} is given twice", where=f"{where}:{key.start_mark.line + 1}")
            lines[key_path] = key.start_mark.line + 1
            _walk(value, key_path, lines, where, field)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, index), lines, where, field)
    elif node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
        raise RecipeError("a number of so many digits is no setting", where=f"{where}:{node.start_mark.line + 1}")


def line_of(lines: dict, path: tuple, where: str) -> str:
    """File and line of a path, or of its nearest ancestor; the override, where one set the value."""
    for end in range(len(path), -1, -1):
        line = lines.get(path[:end])
        if line is not None:
            return line if isinstance(line, str) else f"{where}:{line}"
    return where


def files_elsewhere(data: dict, lines: dict, where: str) -> list[SurgeryError]:
    """A fault for each file outside the working folder that a recipe file names, and for each setting that runs code:
    a stranger may have written the recipe.
    """
    settings, steps, faults = data.get("evaluate"), data.get("operations"), []
    named = {("evaluate", "text"): settings} if isinstance(settings, dict) else {}
    blocks = settings.get("probes") if isinstance(settings, dict) else None
    for name, block in blocks.items() if isinstance(blocks, dict) else ():
        if name not in REGISTRY or not isinstance(block, dict):
            continue
        named |= {("evaluate", "probes", name, key): block for key in find(name).files()}
        for key, why in find(name).unsafe.items():
            path = ("evaluate", "probes", name, key)
            if block.get(key) and isinstance(lines.get(path), int):
                what, fix = f"a recipe file may not set {'.'.join(path)}: {why}", f"say it in the command: {key}=true"
                faults.append(RecipeError(what, where=line_of(lines, path, where), fix=fix))
    if isinstance(heal := data.get("heal"), dict):
        named["heal", "data"] = heal
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        named |= {("operations", index, key): step for key in FILE_FIELDS if isinstance(step, dict)}
    for path, fields in named.items():
        value, key = fields.get(path[-1]), path[-1] if path[0] == "operations" else ".".join(path)
        if not isinstance(lines.get(path), int):  # data and overrides are the user's own
            continue
        for file in value if isinstance(value, list) else [value]:
            if isinstance(file, str) and (what := _fault_of_file(file, path[-1], where)):
                what = f"{key} of a recipe file {what}; it is {shown(file)}"
                fix = f"name it in the command: {key}=FILE"
                faults.append(RecipeError(what, where=line_of(lines, path, where), fix=fix))
    return faults


def _fault_of_file(file: str, key: str, where: str) -> str:
    """Why a recipe file may not name this file, as the end of a sentence, or ""."""
    if key == "names" and any(name.strip().endswith((".yaml", ".yml")) for name in file.split(",")):
        return "may not name a file of a task, which can run code"
    try:
        inside_folder(file, where)
    except SurgeryError:
        return "may not be absolute or hold .."
    return "may not be absolute or hold .." if file.startswith("~") else ""
