"""The registry of operations, which maps the `op` of a recipe to a class. A module is imported on first use."""

from __future__ import annotations

from importlib import import_module, metadata

from pydantic import PydanticUserError

from surgery.errors import RecipeError, SurgeryError, nearest
from surgery.operations.base import Operation

GROUP = "surgery.operations"
BUILTIN = {  # op -> module of this package : class
    "absorb": "absorb:Absorb",
    "duo_attention": "duo_attention.operation:DuoAttention",
    "expand": "expand:Expand",
    "gqa": "gqa.operation:GQA",
    "head_mask": "head_mask:HeadMask",
    "kv_evict": "kv_evict.operation:KVEvict",
    "kv_read": "kv_read.operation:KVRead",
    "low_rank_kv": "low_rank_kv.operation:LowRankKV",
    "mae": "moh.operation:Mae",
    "mla": "mla.operation:MLA",
    "moh": "moh.operation:Moh",
    "prune_heads": "prune_heads.operation:PruneHeads",
    "sink_calibration": "sink_calibration.operation:SinkCalibration",
    "sliding_layers": "sliding_layers.operation:SlidingLayers",
    "sparse_prefill": "sparse_prefill.operation:SparsePrefill",
}


def builtin_names() -> list[str]:
    return sorted(BUILTIN)


def third_party() -> dict[str, metadata.EntryPoint]:
    """Entry points of other packages, not imported yet. They cannot replace a built-in operation."""
    return {point.name: point for point in metadata.entry_points(group=GROUP) if point.name not in builtin_names()}


def find(op: str) -> type[Operation]:
    """The class of an operation.

    Raises:
        SurgeryError: there is no such operation, or another package provides it and it cannot be imported.
    """
    if op in builtin_names():
        module, name = BUILTIN[op].split(":")
        return getattr(import_module(f"{__name__}.{module}"), name)
    points = third_party()
    if op in points:
        return _load(points[op])
    known = [*builtin_names(), *points]
    close = nearest(op, known)
    raise RecipeError(
        f"unknown operation {op!r}",
        exists=", ".join(known),
        fix=f"did you mean {close!r}?"
        if close
        else "a newer version of attention-surgery may have it, or the package that provides it is not installed",
    )


def catalogue() -> tuple[dict[str, type[Operation]], dict[str, str]]:
    """All operations that can be imported, and the error text of each third-party operation that cannot."""
    operations, broken = {}, {}
    for op in [*builtin_names(), *third_party()]:
        try:
            cls = find(op)
            cls.model_json_schema()  # `ls --json` and `schema` print the schema: a class without one is broken
            operations[op] = cls
        except SurgeryError as error:
            broken[op] = error.what
        except PydanticUserError as error:
            broken[op] = f"its fields have no JSON Schema: {error.message}"
    return operations, broken


def _load(point: metadata.EntryPoint) -> type[Operation]:
    package = point.dist.name if point.dist else point.value
    try:
        cls = point.load()
    except (Exception, SystemExit) as error:  # third-party code can raise anything
        raise SurgeryError(
            f"the operation {point.name!r} of {package} does not load: {type(error).__name__}: {error}",
            code="plugin-fault",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Operation)):
        raise SurgeryError(
            f"the operation {point.name!r} of {package} is not a subclass of surgery.Operation", code="plugin-fault"
        )
    return cls
