"""The types of the values in a `heal:` block: numbers as people write them, losses, and names of data."""

from __future__ import annotations

from os.path import normpath
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from surgery.data.text import BUILTIN, WRITTEN
from surgery.errors import any_of, nearest, shown
from surgery.healing import losses

LARGEST_WEIGHT = 1_000_000  # above it, a float32 sum would lose the other losses


def _number(value: object) -> object:
    """YAML 1.1 reads 1e6 and 5e-4 as text; people mean numbers."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _count(value: object) -> object:
    """1e6 is a whole number here; 1.5 and true are not."""
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _loss(value: object) -> object:
    """A word, the name of a loss, or weights of losses; any other value is refused, and the losses are listed."""
    if isinstance(value, dict):
        return _weights(value)
    if isinstance(value, str) and value in {**losses.WORDS, **losses.LOSSES}:
        return value
    words = any_of([repr(word) for word in losses.WORDS])
    close = nearest(value, {**losses.WORDS, **losses.LOSSES}) if isinstance(value, str) else ""
    raise fault(
        f"loss should be {words}, the name of a loss, or weights of losses; it is {shown(value)}",
        exists=", ".join(losses.LOSSES),
        fix=f"did you mean {close!r}?" if close else "{kl: 1, ce: 0.5}",
    )


def _weights(value: dict) -> dict[str, float]:
    """Weights of losses by name, in the registry's order."""
    if unknown := [name for name in value if name not in losses.LOSSES]:
        close = nearest(unknown[0], losses.LOSSES)
        raise fault(
            f"heal.loss names an unknown loss {shown(unknown[0])}",
            exists=", ".join(losses.LOSSES),
            fix=f"did you mean {close!r}?" if close else "",
        )
    weights = {name: _number(value[name]) for name in losses.LOSSES if name in value}
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not 0 <= weight <= LARGEST_WEIGHT:  # false for NaN
            wanted = f"a number from 0 to {LARGEST_WEIGHT:,}"
            raise fault(f"heal.loss: the weight of {name} should be {wanted}; it is {shown(weight)}")
    if not any(weights.values()):
        what = "all weights are 0" if weights else "it names no loss"
        raise fault(f"heal.loss: {what}", exists=", ".join(losses.LOSSES), fix="{kl: 1, ce: 0.5}")
    return {name: float(weight) for name, weight in weights.items()}


def _loss_schema() -> dict:
    """JSON Schema of `loss`, from the registry."""
    each_weight = {
        name: {"type": "number", "minimum": 0, "maximum": LARGEST_WEIGHT, "description": losses.find(name).summary}
        for name in losses.LOSSES
    }
    names = list(dict.fromkeys([*losses.WORDS, *losses.LOSSES]))
    weights = {"type": "object", "properties": each_weight, "additionalProperties": False, "minProperties": 1}
    return {"anyOf": [{"type": "string", "enum": names}, weights]}


def _data(value: object) -> object:
    """A name, or names; each once."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise fault(
            f"data should be {', '.join(WRITTEN)}, {BUILTIN}, a file, folder or data set, or a list of these; "
            f"it is {shown(value)}",
            fix="data: self, or data: [self, builtin]",
        )
    names = [name.strip() for name in names]
    files = [normpath(name) for name in names]
    if twice := [name for name, file in zip(names, files, strict=True) if files.count(file) > 1]:
        raise fault(f"data names {shown(twice[-1])} twice", fix="name each once")
    return names if len(names) > 1 else names[0]


NAME = {"type": "string", "minLength": 1}
Data = Annotated[
    str | list[str],
    BeforeValidator(_data),
    WithJsonSchema({"anyOf": [NAME, {"type": "array", "items": NAME, "minItems": 1, "uniqueItems": True}]}),
]
Loss = Annotated[str | dict[str, float], BeforeValidator(_loss), WithJsonSchema(_loss_schema())]
Count = Annotated[int, BeforeValidator(_count)]
Number = Annotated[float, BeforeValidator(_number)]


def fault(text: str, exists: str = "", fix: str = "") -> PydanticCustomError:
    """A fault with its own message; the command's message adds what exists and how to fix it."""
    return PydanticCustomError("heal", "{text}", {"text": text, "exists": exists, "fix": fix})
