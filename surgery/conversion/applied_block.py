"""A recipe that is applied to a loaded model, and undone: weights, config, class, hooks and generation config."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.edit import snapshot
from surgery.errors import RecipeError, SurgeryError
from surgery.io.model_in_memory import version_of
from surgery.operations.base import Operation, WeightRewrite

if TYPE_CHECKING:
    from surgery.config.recipe import Recipe
    from surgery.report.report import Report

SAMPLED = 16  # values of a weight, from which a change of it is told
APPLIED = "_surgery_applied"  # attribute of a model: the blocks of `applied` that are open, the outermost first


class AppliedBlock(AbstractContextManager["Report"]):
    """A recipe that is applied to a loaded model for the length of a `with` block; see `surgery.applied`.

    Args:
        recipe: the recipe.
        model: the model, in eval mode when the block is entered.
        convert: applies the recipe to the model, in place.
    """

    def __init__(self, recipe: Recipe, model: Any, convert: Callable[[], Report]):
        self._recipe, self._model, self._convert = recipe, model, convert
        self._entered = False

    def __enter__(self) -> Report:
        model, where = self._model, type(self._model).__name__
        if self._entered:
            fix = "call surgery.applied again"
            raise SurgeryError("this block was entered already, which is possible only once", where=where, fix=fix)
        if model.training:
            fix = "model.eval() first; to train a converted model, use surgery.apply"
            raise SurgeryError("the model is in training mode", where=where, fix=fix)
        if self._recipe.heal is not None:
            raise RecipeError("a healing is not undone", where="heal", fix="heal=null, or surgery.apply")
        self._entered = True
        self._restore = snapshot(model, _rewritten(self._recipe, model))
        self._generation = getattr(model, "generation_config", None)
        self._kept = deepcopy(vars(self._generation)) if self._generation is not None else {}
        try:
            report = self._convert()
            self._weights = _state_of_weights(model)
        except BaseException:
            self._undo()
            raise
        setattr(model, APPLIED, (*getattr(model, APPLIED, ()), self))
        return report

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: Any) -> None:
        model, where = self._model, type(self._model).__name__
        if raised is None and getattr(model, APPLIED, ())[-1:] != (self,):
            what = "a block of surgery.applied that was opened later is still open"
            raise SurgeryError(what, where=where, fix="leave the inner block first")
        if _state_of_weights(model) != self._weights:
            what = "the weights were trained or moved inside the block, which is not undone: the model stays converted"
            if raised is not None:  # which is the error to see; half of the model would be undone
                return raised.add_note(f"surgery.applied: {what}")
            fix = "to train a converted model, use surgery.apply; move it to its device and dtype before the block"
            raise SurgeryError(what, where=where, fix=fix)
        self._undo()

    def _undo(self) -> None:
        self._restore()
        if self._generation is not None:
            vars(self._generation).clear()
            vars(self._generation).update(self._kept)


def _rewritten(recipe: Recipe, model: Any) -> list[Any]:
    """The weights that a recipe may change in place: those of all layers, if any operation rewrites weights."""
    if all(map(_keeps_weights, recipe.operations)):
        return []
    layers = {layer.path.rpartition(".")[0] for layer in Anatomy.of(model).layers}
    return [weight for path in layers for weight in model.get_submodule(path).parameters()]


def _keeps_weights(operation: Operation) -> bool:
    """Whether an operation leaves all weights as they are."""
    return operation.term is not None or (isinstance(operation, WeightRewrite) and not operation.rewritten_projections)


def _state_of_weights(model: Any) -> list[tuple]:
    """What changes where a weight is trained, cast, moved or written: a few of its values, among others."""
    return [(id(w), version_of(w), w.dtype, w.device, _sample(w)) for w in model.parameters()]


def _sample(weight: Any) -> list[int]:
    """The bytes of some values of a weight, evenly spaced. A NaN has the bytes that it had, and equals no number."""
    import torch

    flat = weight.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)].contiguous().view(torch.uint8).tolist()
