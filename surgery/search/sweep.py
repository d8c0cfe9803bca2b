"""Converts a model with each value of a recipe's settings, measures the results side by side, and keeps no weights."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.options import RunOptions
from surgery.conversion.plan import make_plan
from surgery.errors import SettingError
from surgery.evaluation.comparison.measures import chosen
from surgery.evaluation.comparison.run import Candidate, measure_all
from surgery.io.hub import resolve
from surgery.io.safetensors import Checkpoint
from surgery.machine.progress import renamed
from surgery.pipeline import apply_to_folder
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.config.recipe import Recipe
    from surgery.evaluation.comparison.result import Comparison
    from surgery.machine.progress import Progress

WEIGHTS = "weights"  # folder of the model that is measured now; it is removed afterwards
OPENING, CLOSING = "([{", ")]}"


def sweep(
    recipe: str | Path | dict | Recipe,
    model: str | Path,
    settings: Sequence[str],
    *,
    folder: str | Path = "sweep",
    text: str = "builtin",
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Try every combination of the values of some settings. What is measured is what `surgery.compare` measures.

    Args:
        recipe, model: as for `surgery.apply`; the model is also the base.
        settings: "key=value,value,..." texts; a setting with one value holds for every try.
        folder: holds the finished figures; the same call goes on from them.
        text, only, leave_out, progress: as for `surgery.compare`.

    Raises:
        SurgeryError: no setting has two values; or a recipe is at fault or does not fit the model, before any is
            converted.
    """
    measures, tries = chosen(only, leave_out), combinations(settings)
    source = resolve(str(model))
    resolved = {name: recipes.load(recipe, overrides) for name, overrides in tries.items()}
    anatomy = Anatomy.of(source.path)
    for each in resolved.values():
        make_plan(each, anatomy, source.name, source.path)  # raises where the recipe does not fit
    folder, fingerprint = Path(folder), Checkpoint(source.path).fingerprint()
    candidates = [
        Candidate(name, _identity(each, fingerprint), _converted(each, str(model), folder / WEIGHTS, name, progress))
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
        if not sign or not key.strip() or not all(found):
            fix = "surgery sweep gqa MODEL kv_heads=1,2,3"
            raise SettingError(f"{text!r} is not of the form key=value,value,...", fix=fix)
        if key in values or len(set(found)) < len(found):
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
    data = json.dumps([recipe.to_dict(), base, __version__], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()


def _converted(recipe: Recipe, model: str, out: Path, name: str, progress: Progress | None):
    """What opens a try: a context in which its folder exists."""

    @contextmanager
    def opened() -> Iterator[Path]:
        _remove(out)
        options = RunOptions(
            check=False, evaluate=False, gate=False, progress=renamed(progress, f"converting with {name}")
        )
        try:
            apply_to_folder(recipe, model, out, options)
            yield out
        finally:
            _remove(out)

    return opened


def _remove(out: Path) -> None:
    for path in out.parent.glob(f"{out.name}*"):  # with its unfinished part
        shutil.rmtree(path, ignore_errors=True)
