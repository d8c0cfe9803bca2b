"""The conversion of layers to keys and values that are made of one vector for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch

from surgery.architecture.layer import LayerAnatomy, groups_of
from surgery.architecture.weights import AttentionLayer, with_bias
from surgery.calibration.closed_form.conjugate_gradient import Solution, solve
from surgery.calibration.closed_form.fit_scores import ScoreObjective, ScoreSample
from surgery.calibration.closed_form.layer import FittedLayer
from surgery.calibration.closed_form.layer_inputs import LayerInputs, scale_of, train_and_validation
from surgery.calibration.closed_form.layerwise_fit import LayerwiseFit


@dataclass(frozen=True)
class VectorWeights:
    """The attention weights of one layer whose keys and values are made of a vector, before they are stored.

    H query heads in G groups with the same keys and values; r numbers in the vector; D channels of the layer's input
    and output. The projections read n of them: D, and where they have biases a last one that is always 1. A subclass
    says how many channels queries, keys and values have, and whether the vector has such a last number, too.

    Attributes:
        anatomy: of the layer.
        q: [H, ., n], queries.
        vector: [r, n], rows that make the vector.
        key_maps, value_maps: [G, ., r], from the vector to keys and values.
        o: [D, H, .], output projection.
    """

    anatomy: LayerAnatomy
    q: torch.Tensor
    vector: torch.Tensor
    key_maps: torch.Tensor
    value_maps: torch.Tensor
    o: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Field name -> tensor."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "anatomy"}

    def replace(self, **tensors: torch.Tensor) -> Self:
        """This layer with other tensors."""
        return replace(self, **tensors)

    def to(self, place: torch.dtype | torch.device) -> Self:
        """This layer in another dtype or on another device."""
        return self.replace(**{name: tensor.to(place) for name, tensor in self.tensors().items()})

    def rows(self, projection: str, like: torch.Tensor) -> torch.Tensor:
        """Queries [H, ., n], keys or values [G, ., n], in the dtype and on the device of a tensor.

        Args:
            projection: "q", "k" or "v".
        """
        if projection == "q":
            return self.q.to(like)
        maps = self.key_maps if projection == "k" else self.value_maps
        return maps.to(like) @ self.vector.to(like)


class ScoreFit(NamedTuple):
    """One of the fits of queries and keys to the base's scores.

    Attributes:
        part: "q" for queries, or a part of the keys.
        effort: its share of the solver's steps.
        reweights: whether samples weigh keys by the attention so far, too.
    """

    part: str
    effort: float
    reweights: bool = True

    @property
    def projection(self) -> str:
        """The entry of `refit` that asks for it."""
        return "q" if self.part == "q" else "k"


class VectorFit(FittedLayer):
    """The conversion of one layer to keys and values that are made of a vector.

    A method is a subclass that defines the start, and how keys are fitted to the base's scores.

    Attributes:
        WEIGHTS: the class of the new layer.
        SCORE_FITS: the fits to the base's scores, in order.
    """

    WEIGHTS: ClassVar[type[VectorWeights]]
    SCORE_FITS: ClassVar[tuple[ScoreFit, ...]]

    def prepare(self) -> None:
        self._rows: tuple[VectorWeights | None, dict[str, torch.Tensor]] = None, {}

    def start(self, record: dict) -> VectorWeights:
        """The layer of least loss before any refit, in float64."""
        raise NotImplementedError

    def fit_keys(self, part: str, steps: int, new: Any, samples: list[ScoreSample]) -> tuple[VectorWeights, Solution]:
        """Fit a part of the keys to the base's scores."""
        raise NotImplementedError

    @property
    def fits_scores(self) -> bool:
        """Whether queries or keys are fitted to the base's scores."""
        return bool({"q", "k"} & set(self.settings.refit))

    def convert(self) -> tuple[VectorWeights, dict]:
        record: dict[str, Any] = {}
        new = self.start(record).to(self.layer.q.device)
        if self.fits_scores:
            fits = (
                (partial(self._fit_part, fit.part, round(fit.effort * self.settings.steps)), fit.reweights)
                for fit in self.SCORE_FITS
                if fit.projection in self.settings.refit
            )
            new = self.fit_in_turn(new, fits, record)
        new = new.to(torch.promote_types(self.layer.o.dtype, torch.float32))  # rounded once, where it is stored
        if "o" in self.settings.refit:
            new = self._fit_output(new, new.o.double(), record)
        return new, record

    def projection(self, new: VectorWeights, letter: str) -> torch.Tensor:
        if self._rows[0] is not new:  # the products are needed for each text, and are larger than those with a text
            self._rows = new, {}
        rows = self._rows[1]
        if letter not in rows:
            rows[letter] = new.rows(letter, self.inputs.x[0])
        return rows[letter]

    def queries_and_keys(self, fitted: VectorWeights) -> tuple[torch.Tensor, torch.Tensor]:
        return self.projection(fitted, "q"), self.projection(fitted, "k")

    def restored(self, tensors: dict[str, torch.Tensor], record: dict) -> VectorWeights:
        return self.WEIGHTS(self.target, **tensors)

    def old_weights(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The base's queries, keys and values [., d, n], and its output projection [D, H, d].

        They are in the dtype and on the device of a tensor.
        """
        return *(with_bias(self.layer, letter).to(like) for letter in "qkv"), self.layer.o.to(like)

    def value_costs(
        self, v: torch.Tensor, o: torch.Tensor, covariance: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What errors of each KV head cost.

        An error of a value costs what the output projection makes of it. An error of a score moves the head's output
        towards or away from the token's value, so it costs in proportion to the spread of the values; that makes one
        scale of both.

        Args:
            v: [G, d, n], values.
            o: [D, H, d], output projection.
            covariance: [n, n], of the layer's input.

        Yields:
            The weight of an error of its values [d, d], and the spread of the values as each of its query heads
            writes them [H / G].
        """
        for group, heads in enumerate(groups_of(self.layer.anatomy)):
            varied = v[group] @ covariance @ v[group].T
            spread = torch.einsum("dha,ab,dhb->h", o[:, heads], varied, o[:, heads])
            yield sum(o[:, head].T @ o[:, head] for head in heads), spread

    def _fit_part(
        self, part: str, steps: int, new: VectorWeights, samples: list[ScoreSample]
    ) -> tuple[VectorWeights, Solution]:
        if part != "q":
            return self.fit_keys(part, steps, new, samples)
        x, keys = self.inputs.x[0], self.projection(new, "k")
        rotations = self.query_rotation.to(x), self.key_rotation.to(x)
        train, validation = (
            ScoreObjective(some, scale_of(self.inputs.base[0]), *rotations, len(keys)).query_problem(keys)
            for some in train_and_validation(samples)
        )
        solution = solve(train, validation, new.q, steps=steps, damping=self.settings.damping)
        return new.replace(q=solution.weight), solution


class VectorConversion(LayerwiseFit):
    """The conversion of a model's layers to keys and values that are made of a vector.

    Attributes:
        LAYER: the conversion of one layer.
        REVISION: raised when a change of the fit gives other weights: a resumed run then mixes no two versions.
    """

    LAYER: ClassVar[type[VectorFit]]
    REVISION: ClassVar[int]

    def conversion(self, layer: AttentionLayer, target: LayerAnatomy, inputs: LayerInputs) -> VectorFit:
        return self.LAYER(self.settings, layer, target, inputs, self.hook)
