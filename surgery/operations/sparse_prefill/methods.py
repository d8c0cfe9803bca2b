"""Methods of `sparse_prefill`: how an estimator chooses the blocks that a prompt's queries read.

A method is an estimator of the runtime (surgery/runtime/surgery_estimate_*.py) and a class here with its settings. The
estimator's module says where it differs from its source. A test compares the defaults of the two.

Sources: Jiang et al. 2024, "MInference", arXiv 2407.02490 (vertical_slash, streaming); Li et al. 2024, arXiv
2412.10319 (tri_shape); Lai et al. 2025, "FlexPrefill", arXiv 2502.20766; Xu et al. 2025, "XAttention", arXiv
2503.16428; Zhu et al. 2024, "SampleAttention", arXiv 2406.15486 (sampled); Lu et al. 2025, "MoBA", arXiv 2502.13189
(block_topk); Lee et al. 2024, "HiP", arXiv 2406.09827 (hierarchical).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from surgery.operations.base import InWords, WholeNumber
from surgery.operations.sparse_prefill.base import LENGTHS, FromOne, Share, SparsePrefill
from surgery.operations.sparse_prefill.prompt_share import (
    NEARLY_ALL,
    dense_until,
    last_query_reads,
    nearly_dense_until,
    share_read,
    tops,
)

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

Tokens = WholeNumber | list[WholeNumber]
Reduce = Literal["sum", "max", "none"]
FromNone = Annotated[float, Field(ge=0)]
ZeroToOne = Annotated[float, Field(ge=0, le=1)]
Likeness = Annotated[float, Field(ge=-1, le=1)]

SHORT = 2048  # tokens of a prompt, for which the plan of `exact` also says how much is read
OVER_GROUP = "Over a KV head's query heads; none: a list for each."
LOCAL = "Nearest blocks that are kept."


class ByShare(SparsePrefill):
    """A method that estimates the weight of blocks: one of gamma, density and alpha says which are kept."""

    gamma: Share | None = Field(
        0.9, description="Share of the estimated weight kept; 1: all. Off where density or alpha is given."
    )
    density: Share | None = Field(None, description="In place of gamma: share of the blocks.")
    alpha: ZeroToOne | None = Field(None, description="In place of gamma: share of the largest weight.")

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, data: Any) -> Any:
        if isinstance(data, dict) and any(data.get(rule) is not None for rule in ("density", "alpha")):
            return {"gamma": None, **data}
        return data


class Pooled(ByShare):
    """Weights of block means: a block's mean key under each query."""

    method: Literal["pooled"] = "pooled"
    queries: Literal["each", "all", "mean"] | None = Field(
        "each", description="each: every query of a block has one vote; all: by its norm; mean: their mean alone."
    )
    reduce: Reduce | None = Field("sum", description=OVER_GROUP)
    similarity: Likeness | None = Field(
        None, description="Key blocks whose keys are less alike than this are always kept; null: none."
    )
    local: FromOne | None = Field(1, description=LOCAL)


class Streaming(SparsePrefill):
    """The same sinks + window for every query."""

    method: Literal["streaming"]
    sinks: Tokens | None = Field(128, description="First tokens read (or by query head); the first block always is.")
    window: FromOne | list[FromOne] | None = Field(4096, description="Newest tokens that are read (or by query head).")


class TriShape(SparsePrefill):
    """Sinks + window, and the last tokens read all."""

    method: Literal["tri_shape"]
    sinks: Tokens | None = Field(128, description="First tokens read (or by query head); the first block always is.")
    window: FromOne | list[FromOne] | None = Field(4096, description="Newest tokens that are read (or by query head).")
    last: FromOne | None = Field(128, description="Last tokens that read all.")


class VerticalSlash(SparsePrefill):
    """Columns and diagonals, chosen by the last queries' attention (MInference)."""

    method: Literal["vertical_slash"]
    sinks: WholeNumber | None = Field(30, description="First columns, in tokens, that are always chosen; they count.")
    last: FromOne | None = Field(64, description="Last queries that are looked at.")
    vertical: Tokens | None = Field(1000, description="Columns, in tokens (or by query head).")
    slash: Tokens | None = Field(6096, description="Diagonals, in tokens (or by query head).")
    nearest: WholeNumber | None = Field(100, description="Nearest diagonals that are always chosen; they count.")


class FlexPrefill(SparsePrefill):
    """For each head what its last queries show: columns and diagonals, or blocks of means too (FlexPrefill)."""

    method: Literal["flexprefill"]
    gamma: Share | None = Field(0.9, description="Share of the estimated weight kept; 1: all.")
    tau: FromNone | None = Field(0.1, description="A head nearer than this to its pooled guess adds pooled blocks.")
    min_budget: WholeNumber | None = Field(1024, description="Least tokens of columns, and of diagonals.")
    max_budget: FromOne | None = Field(None, description="Most tokens of them; null: no limit.")


class XAttention(ByShare):
    """Sums along the antidiagonals of a block (XAttention)."""

    method: Literal["xattention"]
    reduce: Reduce | None = Field("none", description=OVER_GROUP)
    stride: FromOne | None = Field(16, description="Tokens that are weighed together, a power of two.")


class Sampled(ByShare):
    """True weights of some queries of each block (SampleAttention)."""

    method: Literal["sampled"]
    reduce: Reduce | None = Field("sum", description=OVER_GROUP)
    every: FromOne | None = Field(32, description="Every n-th query of a block is looked at, a power of two.")
    local: FromOne | None = Field(2, description=LOCAL)


class BlockTopK(SparsePrefill):
    """The blocks whose mean key a query likes best (MoBA)."""

    method: Literal["block_topk"]
    LATER: ClassVar[tuple[str, ...]] = (*SparsePrefill.LATER, "exact")

    top: FromOne | list[FromOne] | None = Field(
        8, description="Blocks that a query picks, its own among them (or by query head)."
    )
    votes: ZeroToOne | None = Field(0.0, description="Share of a block's queries that must pick; 0: one of them.")
    exact: bool | None = Field(
        False,
        description="As in the paper: each query of each query head reads the blocks that it picks, and no others. "
        "false: a block of queries reads what its queries pick together, and the first block.",
    )

    @property
    def start_only(self) -> bool:
        return bool(self.exact)  # MoBA is made for training: an untrained model loses what a mean hides

    def _dense_until(self, entry: dict[str, Any]) -> int:
        return dense_until(entry)

    def _line(self, entry: dict[str, Any]) -> str:
        if not entry.get("exact"):
            return super()._line(entry)
        top, last = " or ".join(map(str, sorted(set(tops(entry))))), entry.get("last_rows_dense")
        line = f"prompts beyond {dense_until(entry):,} tokens: each query of each head reads {top} blocks of "
        return f"{line}{self.block} keys, its own among them" + (f", the last {last} queries all" if last else "")

    def _chunks(self) -> str:
        if not self.exact:
            return super()._chunks()
        return (
            "a prompt in chunks gets what it gets in one piece, wherever it is cut; a call of one token reads all "
            "keys, and one of several is a prompt (an assistant's drafts too)"
        )

    def _shares_read(self, entry: dict[str, Any], anatomy: Anatomy) -> list[str]:
        if not entry.get("exact"):
            return super()._shares_read(entry, anatomy)
        longest = anatomy.positions or max(LENGTHS)
        lengths = sorted({length for length in (SHORT, *LENGTHS) if length < longest} | {longest})
        shares = [
            f"{share_read(entry, length):.0%} at {length:,} tokens (the last {last_query_reads(entry, length):.0%})"
            for length in lengths
        ]
        dense, nearly = dense_until(entry), nearly_dense_until(entry, NEARLY_ALL)
        more = f", and of up to {nearly:,} more than {NEARLY_ALL:.0%}" if nearly > dense else ""
        return [
            f"of the keys before it, a query reads {', '.join(shares)}",
            f"prompts of up to {dense:,} tokens are read whole{more}: there this is dense attention in all but name, "
            "and scores say little",
        ]

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        if not self.exact:
            return super().in_words(before, after, record)
        entry = self._entry({})
        least, most = f"{dense_until(entry):,} tokens", max(tops(entry))
        return InWords(
            "sparse prefill (MoBA)",
            f"In a long prompt each query of each head now reads {most} blocks of {self.block} keys: its own, and "
            "those before it whose mean key fits it best. Decoding reads all, as before.",
            f"Prompts of more than {least} take less work in attention; the cache is as large as before.",
            "Use it as a start for training on long text (`surgery heal`), then where long prompts take the time.",
            f"Do not use it untrained, nor for prompts of up to {least}, where nothing changes.",
        )

    def limitations(self) -> tuple[str, ...]:
        more = (
            "MoBA is made for models that are trained with it. To a model that was not, it is a choice of blocks by "
            "their mean keys, and what a mean hides is lost. Even the first tokens are read only if picked.",
            "No Triton kernel computes lists of single queries: PyTorch runs them on every device.",
        )
        return (*super().limitations(), *(more if self.exact else ()))


class MaxThreshold(SparsePrefill):
    """Blocks that weigh a share of the heaviest one."""

    method: Literal["max_threshold"]
    alpha: ZeroToOne | None = Field(0.12, description="Share of the largest weight from which a block is kept.")
    queries: Literal["each", "all", "mean"] | None = Field(
        "each", description="each: every query of a block has one vote; all: by its norm; mean: their mean alone."
    )
    reduce: Reduce | None = Field("none", description=OVER_GROUP)
    first: FromOne | None = Field(2, description="Blocks at the beginning that are kept.")
    local: FromOne | None = Field(4, description=LOCAL)


class Hierarchical(SparsePrefill):
    """A search in halves for the blocks whose representatives a block's queries like best (HiP)."""

    method: Literal["hierarchical"]
    local: FromOne | None = Field(1, description=LOCAL)
    top: FromOne | None = Field(16, description="Blocks that the search finds.")
    representative: Literal["mean", "middle"] | None = Field("mean", description="What stands for keys.")
