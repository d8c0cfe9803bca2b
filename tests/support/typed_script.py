"""What a user's package may hold: an operation of their own, and a script that plans with it. Checked, not run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, assert_type

from pydantic import Field

import surgery
from surgery import Anatomy, AttentionLayer, LayerAnatomy, PlannedChange

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class KeepOne(surgery.WeightRewrite):
    """All query heads read one of the KV heads."""

    summary: ClassVar[str] = "Keep one KV head."
    LIMITATIONS: ClassVar[tuple[str, ...]] = ("What the other heads held is lost.",)

    op: Literal["keep_one"] = "keep_one"
    head: int = Field(default=0, ge=0, description="The KV head that stays.")
    layers: list[int] | None = Field(default=None, description="Layers that are changed; default all.")

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ("k", "v")

    def problems(self, anatomy: Anatomy) -> list[str]:
        fewest = min(layer.kv_heads for layer in anatomy.layers)
        return [f"keep_one: there are {fewest} KV heads"] if self.head >= fewest else []

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        return PlannedChange(anatomy.with_kv_heads(1), (f"KV head {self.head} alone",))

    def rewrite(self, layer: AttentionLayer, target: LayerAnatomy) -> tuple[AttentionLayer, dict[str, object]]:
        kept = {name: layer.tensors()[name][[self.head]] for name in ("k", "v")}
        return layer.replace(anatomy=target, **kept), {"kept": self.head}


class Nothing(surgery.Operation):
    """An operation that edits a loaded model, and leaves it as it was."""

    op: Literal["nothing"] = "nothing"

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        return PlannedChange(anatomy, ("nothing",))

    def apply(self, model: object, context: surgery.ApplyContext) -> dict[str, object]:
        if context.progress is not None:
            context.progress(1, 1, "nothing")
        return {}


def summary(model: str | Path) -> list[str]:
    """What a recipe would do to a model, a line for each change."""
    operation = KeepOne(head=1)
    recipe = {"version": 1, "name": "mine", "operations": [operation.model_dump()]}
    plan: surgery.Plan = surgery.plan(recipe, model, overrides=["evaluate=null"], head=2)
    try:
        report: surgery.Report = surgery.apply(recipe, model, output="out", check=False)
    except surgery.SurgeryError as error:
        return [error.what, error.fix]
    result = surgery.evaluate(model, text="builtin", windows=2)
    loaded = surgery.load("out")
    figures = result.to_dict()
    return [*plan.changes, *plan.notes, str(report.folder), type(loaded).__name__, *figures]


def figures(report: surgery.Report) -> str:
    """What a report says, each figure with its type."""
    assert_type(report.passed, bool | None)
    assert_type(report.gate, Literal["passed", "failed", "skipped", "not run"])
    assert_type(report.perplexity, float | None)
    assert_type(report.base_perplexity, float | None)
    assert_type(report.kl, float | None)
    assert_type(report.recall, float | None)
    assert_type(report.kv_bytes, int | None)
    assert_type(report.base_kv_bytes, int | None)
    assert_type(report.changes, list[str])
    assert_type(report.checks, dict[str, str])
    assert_type(report.evaluation, surgery.Evaluation | None)
    assert_type(report.path, Path | None)
    return f"{report!r}{report}"


def measured(folder: Path, base: str) -> float | None:
    """Every function that measures, with its settings written out."""
    result = surgery.evaluate(folder, base, windows=2, length=128)
    assert_type(result, surgery.Evaluation)
    assert_type(result.top1_agreement, float | None)
    needles = surgery.evaluate_needles(folder, base, lengths=[512, 1024], depths=3, samples=1, secret="words")
    assert_type(needles, surgery.NeedleResult)
    assert_type(needles.depths, list[float])
    choices = surgery.evaluate_choices(folder, base, items=8, context=32, seed=1)
    assert_type(choices, surgery.ChoiceResult)
    assert_type(choices.chance, float)
    assert_type(surgery.evaluate(folder, base, probe="chat", tokens=64), surgery.Result)
    return result.out.perplexity


def in_memory(name: str) -> surgery.Report:
    """Convert, score, heal and save a loaded model."""
    model, base, tokenizer = surgery.load(name), surgery.load(name), surgery.load_tokenizer(name)
    _loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] = (model, tokenizer)
    report = surgery.apply("mqa", model, tokenizer=tokenizer)
    surgery.evaluate(model, base, tokenizer=tokenizer, report=report)
    windows: Tensor = surgery.text_windows(tokenizer, length=128, count=4)
    healed = surgery.heal(model, base, tokenizer=tokenizer, method="lora", tokens=float(windows.numel()))
    assert_type(healed, surgery.Report)
    return surgery.save(model, "out", healed, tokenizer=tokenizer, overwrite=True)


def checked(folder: Path) -> tuple[list[str], int, str]:
    """Check a folder and see what a push would send."""
    try:
        report = surgery.check(folder)
    except surgery.CheckError as error:
        return [], error.exit_code, error.code
    sent = surgery.push(folder, "me/mine", dry_run=True, message="first")
    assert_type(sent["bytes"], int)
    return [file["name"] for file in sent["files"]], len(report.checks), report.gate
