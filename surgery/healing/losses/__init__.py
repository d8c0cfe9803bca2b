"""The registry of losses: name in `heal.loss` -> class. One loss is one file, which is imported on first use.

A new loss is a file of this folder with a subclass of `LogitLoss` or `StateLoss` (base.py states the contract), and
a line in `LOSSES`. The schema, the plan, the metrics and the card follow from the attributes of the class. Neither
this package nor a file of a loss imports torch before a loss is computed; `objective` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from surgery.errors import SettingError, all_of, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from surgery.healing.losses.base import Loss

LOSSES = {  # name -> module of this package : class; losses are computed and listed in this order
    "ce": "ce:CrossEntropy",
    "kl": "kl:Distillation",
    "hidden": "hidden:HiddenStates",
    "reverse_kl": "reverse_kl:ReverseKL",
}


@dataclass(frozen=True)
class Word:
    """A word in `heal.loss` that stands for weights of losses.

    Attributes:
        weights: a function from `heal.mix` to weights, loss -> weight.
        aim: the plan's words for what the model is trained towards.
    """

    weights: Callable[[float], dict[str, float]]
    aim: str


WORDS = {
    "ce": Word(lambda mix: {"ce": 1.0}, "the text"),
    "distill": Word(lambda mix: {"kl": 1.0}, "the base's probabilities"),
    "both": Word(lambda mix: {"ce": mix, "kl": 1 - mix}, "the text and the base"),
}


@cache
def find(name: str) -> Loss:
    """A loss by its name.

    Raises:
        SurgeryError: no such loss.
    """
    if name not in LOSSES:
        close = nearest(name, LOSSES)
        raise SettingError(
            f"unknown loss {name!r}", exists=", ".join(LOSSES), fix=f"did you mean {close!r}?" if close else ""
        )
    module, kind = LOSSES[name].split(":")
    return getattr(import_module(f"{__name__}.{module}"), kind)()


def weights(loss: str | dict, mix: float = 0.5) -> dict[str, float]:
    """The weights of a value of `heal.loss`: loss -> weight, in the registry's order, without losses of weight 0.

    Args:
        loss: a word, the name of a loss, or weights by name.
        mix: weight of the cross-entropy in "both".
    """
    if isinstance(loss, str):
        by_name = WORDS[loss].weights(mix) if loss in WORDS else {loss: 1.0}
    else:
        by_name = loss
    return {name: by_name[name] for name in LOSSES if by_name.get(name)}


def written(loss: str | dict) -> str:
    """A value of `heal.loss` as text in a recipe: "both", "{kl: 1, ce: 0.5}"."""
    if not isinstance(loss, dict):
        return str(loss)
    shown = (f"{name}: {f'{weight:g}' if isinstance(weight, float) else weight}" for name, weight in loss.items())
    return f"{{{', '.join(shown)}}}"


def aim(loss: str | dict) -> str:
    """The plan's words for what a value of `heal.loss` trains towards."""
    return WORDS[loss].aim if isinstance(loss, str) and loss in WORDS else goals(loss)


def goals(loss: str | dict) -> str:
    """The card's words for what a value of `heal.loss` trains towards. Unknown names stay unchanged."""
    names = list(weights(loss)) or ([loss] if isinstance(loss, str) else list(loss))
    known = [find(name) if name in LOSSES else None for name in names]
    if len(known) == 1 and known[0]:
        return f"{known[0].goal} ({known[0].method})"
    words = [each.goal if each else name for name, each in zip(names, known, strict=True)]
    return all_of(words)
