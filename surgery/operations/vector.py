"""Operations that make the keys and values of all heads from one vector for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from surgery.calibration.closed_form.cost import Calibration
from surgery.data.text import CALIBRATION_TEXTS_ARE, VARIED, CalibrationText
from surgery.operations.base import ApplyContext, CalibrationRecall, Operation, recall_notes, recall_problems

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.anatomy import Anatomy
    from surgery.calibration.closed_form.vector_layer import VectorConversion

Projection = Literal["q", "k", "o", "mlp"]


def numbers_of(share: float, full: int) -> int:
    """The numbers a token that a share leaves of `full`."""
    return round(share * full)


def largest_share(numbers: int, full: int) -> float:
    """The largest share, in hundredths, that leaves no more than so many numbers."""
    return max(each for each in range(101) if numbers_of(each / 100, full) <= numbers) / 100


def least_share(numbers: int, full: int) -> float:
    """The least share, in hundredths, that leaves so many numbers."""
    return min(each for each in range(101) if numbers_of(each / 100, full) >= numbers) / 100


class VectorOperation(Operation):
    """One vector for each token, from which keys and values are made, fitted on a calibration text."""

    purpose: ClassVar[str] = "cache"
    STAGE: ClassVar[str]  # name of the fits, for progress and plan

    keep_kv: float = Field(
        0.5, gt=0, le=1, description="Share of the base's keys and values that a token takes, where rank is null."
    )
    rank: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        None, description="Numbers in the vector. null: what keep_kv leaves for it."
    )
    refit: list[Projection] = Field(
        ["q", "k", "o", "mlp"],
        description="Projections that are refitted: queries and keys to the base's scores, attention's output (o) to "
        "that of the base's attention, the MLP's output (mlp) to the base's states behind each layer.",
    )
    calibration_samples: int = Field(28, ge=2, strict=True, description="Pieces of text; a sixth is held back.")
    calibration_length: int = Field(512, ge=8, strict=True, description="Tokens in a piece.")
    calibration_text: str = Field(VARIED, description=CALIBRATION_TEXTS_ARE)
    calibration_recall: CalibrationRecall = 0.0

    @property
    def _text(self) -> CalibrationText:
        return CalibrationText(
            self.calibration_text, self.calibration_length, self.calibration_samples, self.calibration_recall
        )

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ("q", "k", "v", "o")

    def milder(self) -> str:
        if self.rank is not None:
            return f"rank={self.rank + max(1, self.rank // 2)}"
        share = round(min(1.5 * self.keep_kv, (1 + self.keep_kv) / 2), 2)
        return f"keep_kv={share:g}" if self.keep_kv <= 0.9 else ""

    def ladders(self, anatomy: Anatomy) -> list[list[dict[str, Any]]]:
        return [[{"keep_kv": share / 100} for share in range(99, 4, -1)]] if self.rank is None else []

    def at_most(self, rank: int, full: int, beside: int = 0) -> str:
        """What to do about a vector that is too long, in terms of the field that the user set.

        Args:
            rank: numbers that it may have.
            full: numbers a token in the base's cache.
            beside: numbers a token beside the vector in the new one.
        """
        share = largest_share(rank + beside, full)
        return f"take at most {share:g}" if self.rank is None and share else f"take a rank of at most {rank}"

    def problems_of_fit(self) -> list[str]:
        """Why the calibration text or the refits cannot be as they are set."""
        problems = recall_problems(self.op, self.calibration_length) if self.calibration_recall else []
        if len(set(self.refit)) < len(self.refit):
            problems.append(f"{self.op}: refit names a projection twice: {', '.join(self.refit)}")
        return problems

    @property
    def conversion(self) -> type[VectorConversion]:
        """The class that converts the layers."""
        raise NotImplementedError

    def calibration(self, anatomy: Anatomy) -> Calibration:
        """What the conversion of such a model measures and fits."""
        raise NotImplementedError

    def cost_of_fit(
        self, *, grown: float, decomposed: int, wider: float = 1.0, fits_scores: bool = True
    ) -> Calibration:
        """The same, from what differs between methods.

        Args:
            grown, decomposed, wider: as for `Calibration`.
            fits_scores: whether queries and keys can be fitted to the base's scores.
        """
        fits = self.conversion.LAYER.SCORE_FITS if fits_scores else ()
        return Calibration(
            self.calibration_samples,
            self.calibration_length,
            scores=tuple(fit.effort for fit in fits if fit.projection in self.refit),
            values=False,
            decomposed=decomposed,
            written=self._text.written_tokens,
            outputs=int("o" in self.refit),
            mlp="mlp" in self.refit,
            stage=self.STAGE,
            wider=wider,
            grown=grown,
        )

    def notes_of_fit(self, fitted: list[str]) -> Iterator[str]:
        """Notes for the plan: the text, and the projections that are refitted to it."""
        tokens = self.calibration_samples * self.calibration_length
        yield f"fitted on {tokens:,} tokens of text; refitted: {', '.join(fitted) or 'nothing'}"
        yield from recall_notes(self.calibration_recall)

    def fit(self, model: Any, context: ApplyContext) -> ConvertedLayers:
        """Convert the layers of a loaded model, which stays as it is, to those that `context.change` plans.

        Raises:
            SurgeryError: there is no tokenizer, the text is too short, or weights are not finite.
        """
        from surgery.calibration.closed_form.layer_inputs import FitSettings
        from surgery.io.resume import LayerFiles

        after, settings = context.change.after, FitSettings(refit=tuple(self.refit))
        what = f"{self.op} needs the tokenizer, for its calibration text"
        sequences, source = context.calibration(model, self._text, self.op, what)
        made = [(layer.latent, layer.vector) for layer in after.layers]
        identity = [self.conversion.REVISION, settings, made, sequences.tolist()]
        files = LayerFiles(context.folder, context.state_name(self.op), identity)
        run = self.conversion(model, after.layers, sequences, settings, files.load, files.save)
        run.label = self.STAGE
        tensors_of_layers, records = run.layers(context.progress)
        record = {layer.path: fitted for layer, fitted in zip(after.layers, records, strict=True) if fitted}
        return ConvertedLayers(tensors_of_layers, run.mlps, record | {"calibration": source})


@dataclass(frozen=True)
class ConvertedLayers:
    """What a conversion made.

    Attributes:
        tensors: of each layer's attention module, by name.
        mlps: refitted weights of MLPs, by parameter name.
        record: of each changed layer, by its path, and of the text.
    """

    tensors: list[dict[str, Tensor]]
    mlps: dict[str, Tensor]
    record: dict[str, Any]
