"""A plan in lines: which layers change to what, what the user must know, and the sizes before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.architecture.layer import LayerAnatomy
from surgery.operations.base import LOADS_WITH

if TYPE_CHECKING:
    from surgery.conversion.plan import Plan


def lines(plan: Plan) -> list[str]:
    """The plan as a tree of text, with its sizes below it."""
    branches: list[tuple[str, list[str]]] = layer_branches(plan)
    branches += [(change, []) for change in plan.changes] + [(f"note: {note}", []) for note in plan.notes]
    name = f"{plan.recipe.name} on {plan.source} ({plan.before.model_type})"
    return [f"{name}: {LOADS_WITH[plan.tier]}", *_drawn(branches), *sizes(plan)]


def headline(plan: Plan) -> str:
    """The plan in one line."""
    changes = plan.changes or ["no change"]
    more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
    return f"{plan.recipe.name} on {plan.source or plan.before.model_type}: {changes[0]}{more}; {plan.tier}"


def sizes(plan: Plan) -> list[str]:
    """KV cache and parameters, before and after."""
    before, after = plan.before, plan.after
    rows = [f"KV cache per token: {arrow(before.kv_bytes_per_token, after.kv_bytes_per_token)} bytes"]
    if before.kv_bytes_fixed or after.kv_bytes_fixed:
        fixed = f"KV cache that does not grow: {arrow(before.kv_bytes_fixed, after.kv_bytes_fixed)} bytes"
        more = after.kv_bytes_fixed - before.kv_bytes_fixed
        saved = before.kv_bytes_per_token - after.kv_bytes_per_token
        if more > 0 and saved > 0:
            fixed += f"; texts longer than {more // saved:,} tokens need less cache than in the base"
        rows.append(fixed)
    return [*rows, *([f"parameters: {arrow(before.parameters, plan.parameters_after)}"] if before.tensors else [])]


def layer_branches(plan: Plan) -> list[tuple[str, list[str]]]:
    """Neighbouring layers that change alike: their path, and a line for each thing that changes or is worth knowing.

    Where the model is measured first, which heads of which layer change is not known yet: totals alone are.
    """
    measured, placed = plan.measured, _placed(plan, "kv_heads")
    branches = []
    for old, new, last in _runs(plan.before.layers, plan.after.layers, not measured, placed):
        path = old.path if last == old.index else old.path.replace(f".{old.index}.", f".{old.index}-{last}.", 1)
        branches.append((path, _layer_lines(plan, old, new, not measured, placed)))
    return branches


def _layer_lines(plan: Plan, old: LayerAnatomy, new: LayerAnatomy, known: bool, placed: bool) -> list[str]:
    if not known and not _placed(plan, "heads"):
        return [f"{old.heads} query heads on {old.kv_heads} KV heads: how many stay in which layer is measured"]
    rows = [f"{arrow(old.heads, new.heads)} query heads of size {old.head_dim}"]
    if new.latent:
        rows.append(
            f"{_kv(old)} → a latent vector of {new.latent.rank} numbers, a key of {new.latent.rope} rotated channels"
        )
        return rows + _tensor_lines(plan, old, new)
    if not placed:
        return [*rows, f"{old.kv_heads} KV heads: how many stay in which layer is measured"]
    earlier = f" ({_readers(old)} before)" if _readers(old) != _readers(new) else ""
    heads = "1 KV head" if old.kv_heads == new.kv_heads == 1 else f"{arrow(old.kv_heads, new.kv_heads)} KV heads, each"
    rows.append(f"{heads} read by {_readers(new)} query heads{earlier}")
    if known and (old.streaming or new.streaming):
        rows.append(f"{arrow(len(old.streaming), len(new.streaming))} streaming KV heads")
    if new.vector:
        rows.append(f"keys and values made of a vector of {new.vector} numbers")
    return rows + _tensor_lines(plan, old, new)


def _tensor_lines(plan: Plan, old: LayerAnatomy, new: LayerAnatomy) -> list[str]:
    """A line for each stored tensor of a layer whose shape changes."""
    rows = []
    for name in dict.fromkeys([*old.tensor_names, *new.tensor_names]):
        full = f"{old.path}.{name}"
        before = plan.before.tensors.get(full, ("", None))[1]
        after = plan.shapes.get(full, before)
        if before != after:
            rows.append(f"{name} {arrow(_shape(before), _shape(after))}")
    return rows


def _kv(layer: LayerAnatomy) -> str:
    return "1 KV head" if layer.kv_heads == 1 else f"{layer.kv_heads} KV heads"


def _placed(plan: Plan, kind: str) -> bool:
    """Whether it is known before the measurement how many heads each layer keeps; `kind`: "heads" or "kv_heads"."""
    changes = [(step.before, step.change.after) for step in plan.steps if step.change.measured]
    return all(_alike(after.layers, kind) or not _alike(before.layers, kind) for before, after in changes)


def _runs(before: Sequence[LayerAnatomy], after: Sequence[LayerAnatomy], known: bool, placed: bool) -> list[tuple]:
    """(old layer, new layer, number of the last) of neighbouring layers that change alike.

    Args:
        known: which heads change; placed: which layers have how many.
    """
    runs: list[tuple[LayerAnatomy, LayerAnatomy, int]] = []
    previous = None
    for old, new in zip(before, after, strict=True):
        change = (comparison_key(old), comparison_key(new) if known else new.kv_heads if placed else None)
        if change == previous:
            runs[-1] = (*runs[-1][:2], old.index)
        else:
            runs.append((old, new, old.index))
        previous = change
    return runs


def comparison_key(layer: LayerAnatomy) -> dict[str, Any]:
    """What makes a layer differ from another one for a reader: all but its number."""
    fields = {name: value for name, value in vars(layer).items() if name not in ("index", "path", "entry")}
    parts = {name: part.display_key(layer.entry) for name, part in layer.parts.items()}
    return fields | {name: value for name, value in parts.items() if value is not None}


def _drawn(branches: Sequence[tuple[str, list[str]]]) -> list[str]:
    """Branches with their leaves, as the lines of a tree."""
    drawn = []
    for place, (branch, leaves) in enumerate(branches):
        last = place == len(branches) - 1
        drawn.append(f"{'└── ' if last else '├── '}{branch}")
        for number, leaf in enumerate(leaves):
            drawn.append(f"{'    ' if last else '│   '}{'└── ' if number == len(leaves) - 1 else '├── '}{leaf}")
    return drawn


def _alike(layers: Sequence[LayerAnatomy], kind: str) -> bool:
    """Whether all layers have as many heads of this kind."""
    return len({getattr(layer, kind) for layer in layers}) == 1


def _readers(layer: LayerAnatomy) -> int | str:
    """Query heads that read a KV head."""
    counts = layer.query_groups
    return f"{min(counts)} to {max(counts)}" if counts else layer.group


def arrow(old: int | str, new: int | str) -> str:
    """ "46,080 → 15,360", or the one value of what stays."""
    shown = [f"{value:,}" if isinstance(value, int) else value for value in (old, new)]
    return shown[0] if shown[0] == shown[1] else " → ".join(shown)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
