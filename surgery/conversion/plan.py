"""The plan: what a recipe would do to a model. It is worked out from the config and the headers; no weight is read."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.layer import LayerAnatomy
from surgery.architecture.weights import packed_shapes, unread_weights
from surgery.config.recipe import Recipe
from surgery.config.yaml import FILE_FIELDS
from surgery.conversion import plan_tree
from surgery.errors import ModelError, RecipeMismatchError, shown
from surgery.healing.parameters import touched
from surgery.healing.plan import HealPlan, refuse_unhealable
from surgery.io.printing import Block, Printed
from surgery.io.safetensors import stored_bytes
from surgery.operations.base import NATIVE, SURGICAL, TERMS, InWords, Operation, PlannedChange, missing_texts
from surgery.operations.rewrite import author_error

if TYPE_CHECKING:
    from surgery.conversion.estimate import Estimate


@dataclass(frozen=True)
class Step:
    """One operation, with the anatomy before it and the change that it plans."""

    operation: Operation
    before: Anatomy
    change: PlannedChange

    def record(self, found: dict) -> dict:
        """What surgery.json keeps of the operation.

        Args:
            found: what its `apply` returned.
        """
        words = self.operation.in_words(self.before, self.change.after, found)
        if not isinstance(words, InWords | None):
            raise author_error(self.operation, f"in_words returns {shown(words)}, and an InWords is wanted")
        return {"op": self.operation.op, "record": found} | ({"words": asdict(words)} if words else {})

    @property
    def without_effect(self) -> str:
        """Why the operation changes no output of this model, as a sentence; "" if it does."""
        positions, unchanged = self.before.positions, self.operation.unchanged_within
        if positions is None or positions > unchanged:
            return ""
        return (
            f"{self.operation.op} leaves the first {unchanged:,} tokens unchanged, and this model takes "
            f"{positions:,}: nothing changes"
        )


@dataclass(frozen=True, repr=False)
class Plan(Printed):
    """A recipe worked out for one model. `print(plan)` shows it as a tree.

    Attributes:
        recipe, source: the recipe, and the model's name as the user gave it.
        before: the anatomy of the base.
        steps: the operations in order.
        shapes: stored name -> new shape, for the tensors of all attention layers; None for one that is removed.
        dtypes: stored name -> dtype, for the tensors of `shapes` that are not removed.
        cuts: notes on lengths of the recipe's evaluation that were cut to what the model takes.
        base_notes: notes on other settings of the base that the result does not keep.
        folder: the base's folder, with its tokenizer; None if the plan was made without one.
    """

    recipe: Recipe
    source: str
    before: Anatomy
    steps: tuple[Step, ...]
    shapes: dict[str, tuple[int, ...] | None]
    dtypes: dict[str, str]
    cuts: tuple[str, ...] = ()
    base_notes: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def after(self) -> Anatomy:
        """The anatomy of the converted model."""
        return self.steps[-1].change.after

    @property
    def tier(self) -> str:
        """The tier of the result: NATIVE or SURGICAL."""
        surgical = self.before.surgical or any(step.change.tier == SURGICAL for step in self.steps)
        return SURGICAL if surgical else NATIVE

    @property
    def streams(self) -> bool:
        """Whether the streaming engine can convert: layer by layer, without building the model."""
        return all(step.operation.streams for step in self.steps)

    @property
    def changes(self) -> list[str]:
        """A sentence for each change, in the order of the operations."""
        return [line for step in self.steps for line in step.change.lines]

    @property
    def notes(self) -> list[str]:
        """Notes that the user must know about the result."""
        notes = [note for step in self.steps for note in (step.without_effect, *step.change.notes)]
        if self.before.guess:
            notes.append(
                f"{self.before.model_type} is not a known family: its attention was understood by shape, a guess"
            )
        notes += self.cuts
        if evaluate := self.recipe.evaluate:
            notes.append(
                self.recipe.too_short(evaluate.main.length, "windows", "evaluate.length", self.before.positions)
            )
        return [note for note in (*notes, *self.base_notes) if note]

    @property
    def parameters_after(self) -> int:
        """Number of values that the result stores; 0 if only the config is known."""
        old = {name: prod(self.before.tensors[name][1]) for name in self.shapes if name in self.before.tensors}
        new = sum(prod(shape) for shape in self.shapes.values() if shape is not None)
        return self.before.parameters - sum(old.values()) + new + self._added

    @property
    def _added(self) -> int:
        """Number of parameters that the surgery adds; 0 if only the config is known."""
        return sum(step.change.parameters for step in self.steps) if self.before.tensors else 0

    @property
    def heal(self) -> HealPlan | None:
        """The plan of the training after the surgery; None if there is none, or if only the config is known."""
        if self.recipe.heal is None or not self.before.tensors:
            return None
        unchanged = {name: entry for name, entry in self.before.tensors.items() if name not in self.shapes}
        table = unchanged | {name: (dtype, self.shapes[name] or ()) for name, dtype in self.dtypes.items()}
        operations = self.recipe.to_dict()["operations"]
        heal, added = self.recipe.heal, self._added
        return HealPlan.of(
            heal,
            self.after,
            table,
            touched(operations),
            added,
            base=self.before,
            operations=operations,
            note=self.recipe.too_short(heal.length, "rows", "heal.length"),
        )

    def headline(self) -> str:
        return plan_tree.headline(self)

    def blocks(self) -> list[Block]:
        heal = self.heal
        return ["\n".join(plan_tree.lines(self)), *(heal.lines if heal else [])]

    @property
    def output_bytes(self) -> int:
        """Bytes of weights that will be written."""
        unchanged = (entry for name, entry in self.before.tensors.items() if name not in self.shapes)
        new = ((dtype, self.shapes[name] or ()) for name, dtype in self.dtypes.items())
        return sum(
            stored_bytes(dtype, shape) for dtype, shape in (*unchanged, *new, (self.before.dtype, (self._added,)))
        )

    @functools.cached_property
    def unread(self) -> frozenset[str]:
        """The stored weights of attention that no step rewrites. They are copied like the rest of the model."""
        rewritten = {name for step in self.steps for name in step.operation.rewritten_projections}
        layers = self.before.layers
        return frozenset(f"{layer.path}.{name}" for layer in layers for name in unread_weights(layer, rewritten))

    @functools.cached_property
    def estimate(self) -> Estimate:
        """Time, memory and disk of the whole run. The first access measures the speed of this machine."""
        from surgery.conversion.estimate import estimate

        return estimate(self)

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the whole run in bytes."""
        return self.estimate.memory_bytes

    @property
    def seconds(self) -> float:
        """Estimated seconds of the whole run on this machine."""
        return self.estimate.seconds

    @property
    def measured(self) -> bool:
        """Whether a measurement decides what becomes of each layer."""
        return any(step.change.measured for step in self.steps)

    def summary(self, made: Anatomy | None = None) -> dict:
        """The part of the plan that surgery.json keeps; `made`: the anatomy of the result, if there is one."""
        after = made or self.after
        return {
            "changes": self.changes,
            "notes": self.notes,
            "parameters": {"before": self.before.parameters, "after": self.parameters_after},
            "kv_bytes_per_token": {
                "before": self.before.kv_bytes_per_token,
                "after": after.kv_bytes_per_token,
            },
            "kv_bytes_fixed": {"before": self.before.kv_bytes_fixed, "after": after.kv_bytes_fixed},
        }

    def to_dict(self) -> dict:
        """The plan as plain data, for `--json`."""
        layers = zip(self.before.layers, self.after.layers, strict=True)
        return {
            "recipe": self.recipe.identity(),
            "model": self.source,
            "model_type": self.before.model_type,
            "guess": self.before.guess,
            "tier": self.tier,
            "engine": "streaming" if self.streams else "loaded",
            **self.summary(),
            **({"heal": heal.to_dict()} if (heal := self.heal) else {}),
            "layers": [{"path": a.path, "before": heads(a), "after": heads(b)} for a, b in layers],
            "estimate": self.estimate.to_dict(),
        }

    def hash(self, fingerprint: str) -> str:
        """Identity of a conversion: a hash of the resolved recipe, the files that it names, the base's fingerprint and
        this version.
        """
        from surgery.version import __version__

        names = [getattr(operation, field, None) for operation in self.recipe.operations for field in FILE_FIELDS]
        paths = [Path(name) for name in names if isinstance(name, str) and Path(name).is_file()]
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        identity = {"recipe": self.recipe.identity(), "files": files, "base": fingerprint, "version": __version__}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def heads(layer: LayerAnatomy) -> dict[str, int]:
    """Number of query heads, number of KV heads and head size of a layer, as plain data."""
    return {"heads": layer.heads, "kv_heads": layer.kv_heads, "head_dim": layer.head_dim}


def make_plan(recipe: Recipe, anatomy: Anatomy, source: str, folder: Path | None = None) -> Plan:
    """Work out a recipe for a model; arguments as for `Plan`, where `anatomy` is its `before`.

    The plan's recipe is judged on windows that the model takes (`Recipe.cut_to`).

    Raises:
        SurgeryError: an operation cannot be applied; the error lists all problems of the first such operation.
    """
    steps, current = [], anatomy
    for operation in recipe.operations:
        problems = after_latent(operation, current) or conflicts(operation, steps, anatomy)
        problems = problems or missing_texts(operation) or problems_of(operation, "problems", current)
        if problems:
            first, *rest = (RecipeMismatchError(problem, where=source) for problem in problems)
            raise RecipeMismatchError(first.what, where=source, others=tuple(rest))
        change = planned_change(operation, current)
        if problems := problems_after(steps, change.after):
            raise RecipeMismatchError(problems[0], where=source)
        steps.append(Step(operation, current, change))
        current = change.after
    shapes = new_shapes(anatomy, current)
    dtypes = {name: _dtype(name, anatomy) for name, shape in shapes.items() if shape is not None}
    recipe, cuts = recipe.cut_to(anatomy.config)
    plan = Plan(recipe, source, anatomy, tuple(steps), shapes, dtypes, tuple(cuts), folder=folder)
    if recipe.heal is not None:
        refuse_unhealable(current, source)
        _ = plan.heal  # raises now if the method would train nothing
    return plan


def conflicts(operation: Operation, steps: list[Step], anatomy: Anatomy) -> list[str]:
    """Why an operation cannot follow those before it, in this recipe or in the checkpoint it starts from."""
    earlier_terms, own_layers = anatomy.terms, operation.term_layers(anatomy)
    if operation.term is None:
        if blocking := [term for term in earlier_terms if term not in operation.carries_terms]:
            reason = f"sets the {' and the '.join(map(_explained, blocking))}, and weight rewrites come before"
            return [f"{operation.op}: this checkpoint {reason}; write one recipe with all operations, from its base"]
    elif shared := own_layers & earlier_terms.get(operation.term, set()):
        reason = f"sets the {_explained(operation.term)} already{_where(shared, anatomy)}"
        return [f"{operation.op}: this checkpoint {reason}; write one recipe with all operations, from its base"]
    for step in steps:
        name, term = step.operation.op, step.operation.term
        if operation.term is None and term not in (None, *operation.carries_terms):
            return [f"{operation.op}: weight rewrites come before {name} in a recipe"]
        shared = (
            own_layers & step.operation.term_layers(anatomy) if term is not None and term == operation.term else None
        )
        if shared:
            what = f"{operation.op}: {name} before it sets the {term} of the same heads{_where(shared, anatomy)}"
            return [f"{what}; one operation sets a head's {_explained(term)}"]
    return problems_of(operation, "problems_before", anatomy)


def _explained(term: str) -> str:
    """A term with what it decides, for readers who do not know the terms of the equation."""
    return f"{term} ({TERMS[term]})" if term in TERMS else term


def after_latent(operation: Operation, current: Anatomy) -> list[str]:
    """Why an operation cannot follow latent attention, whose heads have no keys and values of their own."""
    if operation.on_latent:
        return []
    if current.latent:
        what = "this model has latent attention (mla), whose heads it cannot change"
    elif any(layer.vector for layer in current.layers):
        what = "keys and values are made of vectors (low_rank_kv), which no operation after it can change"
    else:
        return []
    return [f"{operation.op}: {what}: start from its base"]


def problems_after(steps: Sequence[Step], later: Anatomy) -> list[str]:
    """Why the settings of these operations do not fit a model that a later operation gave the anatomy `later`."""
    return [problem for step in steps for problem in problems_of(step.operation, "problems_after", later)]


def problems_of(operation: Operation, member: str, anatomy: Anatomy) -> list[str]:
    """The result of an operation's `problems`, `problems_before` or `problems_after` (`member`) for a model.

    Raises:
        SurgeryError: a third party's operation returns something other than texts.
        TypeError: one of our operations does.
    """
    problems = getattr(operation, member)(anatomy)
    if problems is not None and not _are_texts(problems):
        raise author_error(operation, f"{member} returns {shown(problems)}, and a list of texts is wanted")
    return list(problems or ())


def planned_change(operation: Operation, anatomy: Anatomy) -> PlannedChange:
    """The change that an operation plans for a model.

    Raises:
        SurgeryError: a third party's operation returns something that is not a valid change of this model.
        TypeError: one of our operations does.
    """
    change = operation.plan(anatomy)
    if fault := _fault_of_change(change, anatomy):
        raise author_error(operation, fault)
    return change


def _fault_of_change(change: object, before: Anatomy) -> str:
    """Why this is not a valid change of a model, as a clause; "" if it is one."""
    if not isinstance(change, PlannedChange):
        return f"plan returns {shown(change)}, and a PlannedChange is wanted"
    if not isinstance(change.after, Anatomy) or len(change.after.layers) != len(before.layers):
        return f"after of the planned change is no Anatomy of {len(before.layers)} layers"
    wanted = {
        "lines": (_are_texts, "a tuple of texts"),
        "notes": (_are_texts, "a tuple of texts"),
        "tier": ((NATIVE, SURGICAL).__contains__, f"{NATIVE!r} or {SURGICAL!r}"),
        "seconds": (_is_amount, "a number from 0"),
        "parameters": (_is_amount, "a number from 0"),
    }
    for name, (fits, words) in wanted.items():
        if not fits(value := getattr(change, name)):
            return f"{name} of the planned change is {shown(value)}, and {words} is wanted"
    return ""


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < inf


def _where(layers: set[int], anatomy: Anatomy) -> str:
    return "" if len(layers) == len(anatomy.layers) else f", in layers {', '.join(map(str, sorted(layers)))}"


def new_shapes(before: Anatomy, after: Anatomy) -> dict[str, tuple[int, ...] | None]:
    """Stored name -> shape in the result, for the tensors of all attention layers; None: the tensor is removed."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    if not before.tensors:
        return shapes
    for old, new in zip(before.layers, after.layers, strict=True):
        stored = {name: before.tensors[f"{old.path}.{name}"][1] for name in old.tensor_names}
        sizes = _hidden_and_out(old, stored)
        for name, shape in packed_shapes(old, *sizes).items():
            if prod(stored[name]) != prod(shape):
                raise ModelError(
                    f"{old.path}.{name} has shape {list(stored[name])}, and {list(shape)} is what the config promises",
                    fix="the config and the weights are of different models",
                )
        packed = packed_shapes(new, *sizes)
        shapes |= {f"{old.path}.{name}": packed.get(name) for name in stored}
        shapes |= {f"{old.path}.{name}": shape for name, shape in packed.items()}
    return shapes


def _hidden_and_out(layer: LayerAnatomy, stored: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Number of channels that a layer's projections read, and number that its output projection writes."""
    layout = layer.layout
    read, written = stored[f"{layout.qkv or layout.q_input}.weight"], stored[f"{layout.o}.weight"]
    return (read[0], written[1]) if layout.conv1d else (read[1], written[0])


def _dtype(name: str, before: Anatomy) -> str:
    """The dtype of a tensor in the result: a stored tensor keeps its dtype, and a new one (the norm of an added head)
    takes that of its siblings.
    """
    if name in before.tensors:
        return before.tensors[name][0]
    siblings = name.rsplit(".", 2)[0] + "."
    return next((dtype for old, (dtype, _) in before.tensors.items() if old.startswith(siblings)), before.dtype)
