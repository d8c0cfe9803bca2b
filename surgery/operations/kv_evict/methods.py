"""Policies of `kv_evict`: by which rule a KV head keeps keys.

A policy is a file of the runtime (surgery/runtime/surgery_kv_*.py), which names its source, and a class here with its
settings. A test compares the defaults of the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from surgery.operations.base import Count, Seed
from surgery.operations.kv_evict.base import KVEvict

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

Group = Literal["sum", "max"]
Weight = Annotated[float, Field(gt=0, lt=1)]

OBSERVE = "Queries before a decision that vote."
GROUP = "How the query heads of a KV head vote: by the sum or the largest of their votes."
MEMORY = "Votes before the last decision count, too."
THRESHOLD = "Attention weight from which a key counts as attended to."


class AttentionEviction(KVEvict):
    """Keep the keys with the largest mean attention weight (TOVA, H2O, SnapKV)."""

    method: Literal["attention"] = "attention"
    observe: Count = Field(32, description=OBSERVE)
    group: Group = Field("sum", description=GROUP)
    memory: bool = Field(False, description=MEMORY)


class BehindOutput(KVEvict):
    """A policy that may look behind the output projection: `output` says so in a recipe, its name in the runtime."""

    output: bool

    def policy(self, anatomy: Anatomy, layer: int) -> dict:
        output = anatomy.layers[layer].layout.o if self.output else ""
        return super().policy(anatomy, layer) | {"output": output}


class CaoteEviction(BehindOutput):
    """Keep the keys without which attention's output would change most (CAOTE)."""

    method: Literal["caote"]
    observe: Count = Field(32, description=OBSERVE)
    group: Group = Field("sum", description=GROUP)
    memory: bool = Field(False, description=MEMORY)
    output: bool = Field(True, description="Measure the change behind the output projection.")
    fast: bool = Field(False, description="The mean value stands in for the output (FastCAOTE).")
    greedy: bool = Field(
        False,
        description="Drop one key after the other, exactly. Slow, and it notes `observe` weights of each query head "
        "with each key: choose observe as small as 1.",
    )


class LraEviction(KVEvict):
    """Keep the keys that were attended to last."""

    method: Literal["lra"]
    observe: Count = Field(256, description="Queries before a decision that are looked at.")
    group: Group = Field("max", description=GROUP)
    threshold: Weight = Field(0.01, description=THRESHOLD)


class LfaEviction(KVEvict):
    """Keep the keys that were attended to most often."""

    method: Literal["lfa"]
    observe: Count = Field(256, description="Queries before a decision that are looked at.")
    group: Group = Field("max", description=GROUP)
    threshold: Weight = Field(0.01, description=THRESHOLD)


class TaskEviction(BehindOutput):
    """Some KV heads of each text, chosen anew for it, keep every key; the others the keys with the largest weight."""

    method: Literal["task_kv"]
    full_heads: Count = Field(1, description="KV heads of a layer that keep every key.")
    observe: Count = Field(32, description="Queries before a decision that vote, and whose outputs choose the heads.")
    group: Group = Field("sum", description=GROUP)
    memory: bool = Field(False, description=MEMORY)
    output: bool = Field(False, description="Compare the heads' outputs behind the output projection.")

    def problems(self, anatomy: Anatomy) -> list[str]:
        problems = super().problems(anatomy)
        if self.evicting_ratio < 1:
            problems.append(
                "kv_evict: with task_kv each text chooses the heads that keep every key: full_heads says how many. "
                "Leave evicting_ratio at 1"
            )
        return problems

    @property
    def exempt(self) -> int:
        return self.full_heads


class NormEviction(KVEvict):
    """Keep the keys of the smallest norm."""

    method: Literal["norm"]


class WindowEviction(KVEvict):
    """Keep the newest keys: a control."""

    method: Literal["window"]


class RandomEviction(KVEvict):
    """Keep random keys: a control."""

    method: Literal["random"]
    seed: Seed = Field(0, description="Seed of the draw.")
