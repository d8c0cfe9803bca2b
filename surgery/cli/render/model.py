"""What a plan would make of a model, as a tree, and what a healing will train."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from surgery.cli.render.console import console
from surgery.cli.render.estimate import cost
from surgery.conversion import plan_tree
from surgery.conversion.estimate import Estimate
from surgery.io.printing import byte_size
from surgery.operations.base import LOADS_WITH


def plan(work, estimate: Estimate | None = None) -> None:
    """The old → new tree, and below it the sizes, what would train, and what the run would cost.

    Args:
        estimate: of the stages that will run; default that of the whole run, if the plan knows the tensors.
    """
    name = f" on {work.source} ({work.before.model_type}): {LOADS_WITH[work.tier]}"
    tree = Tree(Text.assemble((work.recipe.name, "bold"), name))
    for path, changes in plan_tree.layer_branches(work):
        branch = tree.add(Text(path))
        for change in changes:
            branch.add(Text(change))
    for change in work.changes:
        tree.add(Text(change, style="bold"))
    for note in work.notes:
        tree.add(Text(f"note: {note}", style="yellow"))
    out = console()
    out.print(tree)
    for line in plan_tree.sizes(work):
        out.print(line)
    if heal := work.heal:
        healing(heal)
    if estimate is not None or work.before.tensors:
        cost(estimate or work.estimate)


def healing(work) -> None:
    """What will train, for how long, and what that takes."""
    out = console()
    for line in work.lines:
        out.print(line)
    storage = f", checkpoints of {byte_size(work.checkpoint_bytes)} on the disk" if work.heal.checkpoint_every else ""
    storage += f", a stored teacher of at most {byte_size(work.teacher_bytes)}" if work.teacher_bytes else ""
    engine, memory = (
        work.engine,
        ", ".join(f"{name} {byte_size(count)}" for name, count in work.memory.items() if count),
    )
    where = f"in each of {engine.processes} processes ({engine.name})" if engine.name else "in each process"
    out.print(f"heal: about {byte_size(work.memory_bytes)} of memory {where}{storage}")
    out.print(f"heal: of which {memory}")
    if not engine.sharded:
        states = work.memory["gradients"] + work.memory["optimizer"]
        out.print(
            f"heal: several processes hold as much each; ZeRO-2 shares {byte_size(states)} of it out among them, "
            f"FSDP and ZeRO-3 {byte_size(states + work.memory['weights'])}"
        )
