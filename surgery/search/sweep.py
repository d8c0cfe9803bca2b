"""Converts a model with each value of a recipe's settings, measures the results side by side, and keeps no weights."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.arguments import refuse_no_function, refuse_no_path
from surgery.conversion.plan import make_plan
from surgery.errors import SettingError
from surgery.evaluation.comparison.measures import chosen
from surgery.evaluation.comparison.run import OTHER_FOLDER, Candidate, listed, measure_all
from surgery.io.files import sha256
from surgery.io.hub import resolve
from surgery.io.identity import model_identity
from surgery.io.output_folder import used_alone
from surgery.machine.placement import placed
from surgery.machine.progress import renamed
from surgery.pipeline import convert_only
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.config.recipe import Recipe
    from surgery.evaluation.comparison.result import Comparison
    from surgery.machine.progress import Progress

TRIED, OUT = ".surgery-try-", "out"  # how names of folders for weights that are not kept begin, and what they hold
LEFT = re.compile(re.escape(TRIED) + "[a-z0-9_]{8}")
OPENING, CLOSING = "([{", ")]}"  # brackets inside of which a comma belongs to a value


@placed
def sweep(
    recipe: str | Path | dict | Recipe,
    model: str | Path,
    settings: Sequence[str],
    *,
    folder: str | Path = "sweep",
    text: str = "builtin",
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """Try every combination of the values of some settings. What is measured is what `surgery.compare` measures.

    Args:
        recipe, model: as for `surgery.apply`; the model is also the base.
        settings: "key=value,value,..." texts; a setting with one value holds for every try.
        folder: holds the finished figures; the same call goes on from them.
        text, only, leave_out, device, dtype, progress: as for `surgery.compare`.

    Raises:
        SurgeryError: no setting has two values; or a recipe is at fault or does not fit the model, before any is
            converted.
    """
    refuse_no_path("folder", folder)
    refuse_no_function(progress=progress)
    measures = chosen(listed("only", only), listed("leave_out", leave_out))
    tries = combinations(listed("settings", settings))
    source = resolve(str(model))
    resolved = {name: recipes.load(recipe, overrides) for name, overrides in tries.items()}
    anatomy = Anatomy.of(source.path)
    for each in resolved.values():
        make_plan(each, anatomy, source.name, source.path)  # raises where the recipe does not fit
    folder, base = Path(folder), model_identity(source.path)
    if folder.is_dir():
        with used_alone(folder, OTHER_FOLDER):
            for left in filter(_is_left, folder.iterdir()):
                shutil.rmtree(left, ignore_errors=True)
    candidates = [
        Candidate(name, name, _identity(each, base), _converted(each, str(model), folder, name, progress), recipe=each)
        for name, each in resolved.items()
    ]
    return measure_all(candidates, source.path, source.name, folder, measures, text, progress)


def combinations(settings: Sequence[str]) -> dict[str, list[str]]:
    """Name of each try -> its overrides. The name has the settings that vary.

    Raises:
        SettingError: a text is not key=value,value,..., a key or a value is given twice, or nothing varies.
    """
    values: dict[str, list[str]] = {}
    for text in settings:
        key, sign, rest = text.partition("=")
        found = split(rest)
        if not sign or not key.strip() or not all(found) or _unclosed(rest):
            fix = "surgery sweep gqa MODEL kv_heads=1,2,3"
            raise SettingError(f"{text!r} is not of the form key=value,value,...", fix=fix)
        key, meant = key.strip(), [json.dumps(_value(each), sort_keys=True, default=str) for each in found]
        if key in values or len(set(meant)) < len(found):
            what = f"{key} is given twice" if key in values else f"a value of {key} is given twice"
            raise SettingError(what, fix="name each once")
        values[key] = found
    varying = [key for key, found in values.items() if len(found) > 1]
    if not varying:
        fix = "give a setting two values or more: kv_heads=1,2; or use `surgery apply`"
        raise SettingError("no setting has two values", fix=fix)
    tries = {}
    for combination in itertools.product(*values.values()):
        overrides = [f"{key}={value}" for key, value in zip(values, combination, strict=True)]
        name = " ".join(each for key, each in zip(values, overrides, strict=True) if key in varying)
        tries[name] = overrides
    return tries


def _value(text: str) -> object:
    """A value as YAML reads it: 1 and 01 are the same."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _unclosed(text: str) -> bool:
    """Whether a bracket is not closed."""
    return any(text.count(one) != text.count(other) for one, other in zip(OPENING, CLOSING, strict=True))


def split(text: str) -> list[str]:
    """Values that are separated by commas; commas inside brackets belong to a value."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in OPENING) - (letter in CLOSING)
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def _identity(recipe: Recipe, base: str) -> str:
    """Changes with the recipe, with the content of the files that it names, with the base and with this version."""
    files = {text: sha256(Path(text)) for text in _texts(recipe.to_dict()) if Path(text).is_file()}
    data = json.dumps([recipe.to_dict(), files, base, __version__], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()


def _texts(data: object) -> Iterator[str]:
    """Every text in plain data that is short enough to be the name of a file."""
    if isinstance(data, dict | list | tuple):
        for each in data.values() if isinstance(data, dict) else data:
            yield from _texts(each)
    elif isinstance(data, str) and 0 < len(data) < 256 and "\0" not in data:
        yield data


def _is_left(folder: Path) -> bool:
    """Whether this is what a try leaves if it is killed, and holds nothing else."""
    if folder.is_symlink() or not folder.is_dir() or not LEFT.fullmatch(folder.name):
        return False
    folders, lock = (OUT, f"{OUT}.partial", f"{OUT}.replaced"), f".{OUT}.lock"
    return all(each.name == lock or (each.is_dir() and each.name in folders) for each in folder.iterdir())


def _converted(recipe: Recipe, model: str, folder: Path, name: str, progress: Progress | None):
    """What opens a try: a context in which its folder exists, inside a new one that is removed afterwards."""

    @contextmanager
    def opened() -> Iterator[Path]:
        said = renamed(progress, f"converting with {name}")
        with tempfile.TemporaryDirectory(prefix=TRIED, dir=folder) as temporary:
            out = Path(temporary) / OUT
            convert_only(recipe, model, out, said)
            yield out

    return opened
