"""What a plan would make of a model, as a tree, and what a healing will train."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from surgery.cli.render.console import console, size
from surgery.cli.render.estimate import cost


def plan(work) -> None:
    """The old → new tree."""
    before, after = work.before, work.after
    # Where the model is measured first, which heads of which layer change is not known yet: totals alone are.
    measured = [step for step in work.steps if step.change.measured]
    known, placed = not measured, all(_alike(step.change.after) or not _alike(step.before) for step in measured)
    tree = Tree(Text.assemble((work.recipe.name, "bold"), f" on {work.source} ({before.model_type}): {work.tier}"))
    for old, new, last in _changes(before.layers, after.layers, known, placed):
        where = old.path.replace(f".{old.index}.", f".{old.index}-{last}.", 1)
        branch = tree.add(where)
        branch.add(f"query heads {_arrow(old.heads, new.heads)}, of {old.head_dim}")
        if not placed:
            counts = " or ".join(map(str, sorted({layer.kv_heads for layer in after.layers})))
            branch.add(f"KV heads {old.kv_heads} → {counts}: which layers get which is measured")
            continue
        branch.add(
            f"KV heads {_arrow(old.kv_heads, new.kv_heads)}, {_arrow(_readers(old), _readers(new))} query heads each"
        )
        if known and (old.streaming or new.streaming):
            branch.add(f"streaming KV heads {_arrow(len(old.streaming), len(new.streaming))}")
        for name in new.tensor_names:
            full = f"{old.path}.{name}"
            old_shape = before.tensors.get(full, ("", None))[1]
            new_shape = work.shapes.get(full, old_shape)
            if old_shape != new_shape:
                branch.add(f"{name} {_arrow(_shape(old_shape), _shape(new_shape))}")
    for change in work.changes:
        tree.add(Text(change, style="bold"))
    for note in work.notes:
        tree.add(Text(f"note: {note}", style="yellow"))
    out = console()
    out.print(tree)
    out.print(f"KV cache per token: {_arrow(before.kv_bytes_per_token, after.kv_bytes_per_token)} bytes")
    if before.kv_bytes_fixed or after.kv_bytes_fixed:
        out.print(f"KV cache of sinks and windows: {_arrow(before.kv_bytes_fixed, after.kv_bytes_fixed)} bytes, fixed")
    if before.tensors:
        out.print(f"parameters: {_arrow(before.parameters, work.parameters_after)}")
    if heal := work.heal:
        healing(heal)
    if before.tensors:
        cost(work.estimate)


def healing(work) -> None:
    """What will train, for how long, and what that takes."""
    out = console()
    for line in work.lines:
        out.print(line)
    storage = f", checkpoints of {size(work.checkpoint_bytes)} on the disk" if work.heal.checkpoint_every else ""
    storage += f", a stored teacher of at most {size(work.teacher_bytes)}" if work.teacher_bytes else ""
    engine, memory = work.engine, ", ".join(f"{name} {size(count)}" for name, count in work.memory.items() if count)
    where = f"in each of {engine.processes} processes ({engine.name})" if engine.name else "in each process"
    out.print(f"heal: about {size(work.memory_bytes)} of memory {where}{storage}")
    out.print(f"heal: of which {memory}")
    if not engine.sharded:
        states = work.memory["gradients"] + work.memory["optimizer"]
        out.print(
            f"heal: several processes hold as much each; ZeRO-2 shares {size(states)} of it out among them, "
            f"FSDP and ZeRO-3 {size(states + work.memory['weights'])}"
        )


def _alike(anatomy) -> bool:
    """Whether all layers have as many KV heads; `Anatomy.alike` asks for their readers too, which pruning changes."""
    return len({layer.kv_heads for layer in anatomy.layers}) == 1


def _changes(before, after, known: bool, placed: bool) -> list[tuple]:
    """(old layer, new layer, number of the last) of neighbouring layers that change alike.

    Args:
        known: which heads change; placed: which layers have how many.
    """
    runs: list[tuple] = []
    previous = None
    for old, new in zip(before, after, strict=True):
        change = (comparison_key(old), comparison_key(new) if known else new.kv_heads if placed else None)
        if change == previous:
            runs[-1] = (*runs[-1][:2], old.index)
        else:
            runs.append((old, new, old.index))
        previous = change
    return runs


def comparison_key(layer) -> dict:
    """What makes a layer differ from another one for a reader: all but its number."""
    fields = {name: value for name, value in vars(layer).items() if name not in ("index", "path", "entry")}
    part_keys = {name: part.display_key(layer.entry) for name, part in layer.parts.items()}
    return fields | {name: value for name, value in part_keys.items() if value is not None}


def _readers(layer) -> int | str:
    """Query heads that read a KV head."""
    sizes = layer.query_groups
    return f"{min(sizes)} to {max(sizes)}" if sizes else layer.group


def _arrow(old, new) -> str:
    shown = [f"{value:,}" if isinstance(value, int) else str(value) for value in (old, new)]
    return shown[0] if shown[0] == shown[1] else " → ".join(shown)


def _shape(shape) -> str:
    return "none" if shape is None else str(list(shape))
