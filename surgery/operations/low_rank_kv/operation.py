"""Keys and values of low rank, made of one vector for each token.

The conversion is our own: see `layer.py`. Related: Chang et al. 2024, "Palu", arXiv 2407.21118.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from surgery.calibration.closed_form.cost import Calibration
from surgery.operations.base import SURGICAL, InWords, PlannedChange, give_entries
from surgery.operations.vector import VectorOperation, least_share, numbers_of

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.architecture.layer import LayerAnatomy
    from surgery.calibration.closed_form.vector_layer import VectorConversion


class LowRankKV(VectorOperation):
    """One vector for each token, from which the keys and values of all heads are made."""

    summary: ClassVar[str] = "Low-rank keys and values: the cache holds one vector a token, of which all are made."
    STAGE: ClassVar[str] = "lowering the rank"
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "The weights are fitted to the calibration text (by default half Python's language reference, half what the "
        "model writes itself); text of another kind loses more.",
        "A step makes the keys of the whole past anew, which takes time that the base does not need and that grows "
        "with the text.",
        "No stock class and no engine holds it: it runs in Transformers with the code that comes with the checkpoint.",
    )

    op: Literal["low_rank_kv"] = "low_rank_kv"

    @property
    def usual_tier(self) -> str:
        return SURGICAL

    def _changed(self, anatomy: Anatomy) -> list[LayerAnatomy]:
        """The layers that get a vector: those whose cache grows with the text."""
        return [layer for layer in anatomy.layers if layer.window is None]

    def _rank(self, layer: LayerAnatomy) -> int:
        return self.rank or numbers_of(self.keep_kv, layer.token_width)

    def problems(self, anatomy: Anatomy) -> list[str]:
        if reason := _problem(anatomy):
            return [f"low_rank_kv: {reason}"]
        if not self._changed(anatomy):
            return ["low_rank_kv: every layer of this model has a sliding window: its cache does not grow"]
        return self._problems_of_size(anatomy) + self.problems_of_fit()

    def _problems_of_size(self, anatomy: Anatomy) -> list[str]:
        layer, hidden = self._changed(anatomy)[0], anatomy.config.get_text_config().hidden_size
        rank, full, before = self._rank(layer), layer.token_width, anatomy.kv_bytes_per_token
        share = f"low_rank_kv: keep_kv: {self.keep_kv:g} of {full} numbers a token is"
        if rank < 1:
            return [f"{share} none: take at least {least_share(1, full):g}"]
        has, after = min(full, hidden), self._after(anatomy, rank).kv_bytes_per_token
        if rank == full <= hidden or (rank <= has and after < before):  # the whole width is exact, for comparisons
            return []
        fewer = range(min(rank - 1, has), 0, -1)
        smaller = next((each for each in fewer if self._after(anatomy, each).kv_bytes_per_token < before), 0)
        take = self.at_most(smaller, full) if smaller else "no vector is short enough to make the cache smaller"
        if rank <= has:
            return [
                f"low_rank_kv: with RoPE's cosines and sines, which one layer keeps for all, the cache takes "
                f"{after:,} bytes a token, and the base's {before:,}: {take}"
            ]
        if self.rank is None:
            return [f"{share} {rank}, and a vector of {hidden} loses nothing here: {take}"]
        made = f"keys and values of {full} numbers have, made of {hidden} channels"
        return [f"low_rank_kv: rank: {rank} is more than {made}: {take}"]

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        changed = self._changed(anatomy)
        full, rank = changed[0].token_width, self._rank(changed[0])
        line = f"KV cache {full} → {rank} numbers a token in {len(changed)} layers (a vector of which all are made)"
        measurements = self.calibration(anatomy).measurements(anatomy, len(changed))
        after = self._after(anatomy, rank)
        return PlannedChange(after, (line,), SURGICAL, tuple(self._notes(anatomy, after)), measurements=measurements)

    def _after(self, anatomy: Anatomy, rank: int) -> Anatomy:
        changed = self._changed(anatomy)
        turning = next((layer.index for layer in changed if layer.rotary), None)
        layers = tuple(
            layer.with_vector(self._entry(layer, rank, layer.index == turning)) if layer in changed else layer
            for layer in anatomy.layers
        )
        return replace(anatomy, layers=layers)

    def _entry(self, layer: LayerAnatomy, rank: int, keeps_angles: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"rank": rank, "head_dim": layer.head_dim, "rotary": layer.rotary}
        if keeps_angles:
            entry["angles"] = layer.rotary if layer.layout.angles == "pairs" else 2 * layer.rotary
            entry |= {"wide": True} if layer.layout.angles == "wide" else {}
        if layer.qk_norm:
            entry["norm"] = [layer.layout.k_norm, layer.qk_norm]
        return entry

    @property
    def conversion(self) -> type[VectorConversion]:
        from surgery.operations.low_rank_kv.layer import LowRankConversion

        return LowRankConversion

    def calibration(self, anatomy: Anatomy) -> Calibration:
        layer, hidden = self._changed(anatomy)[0], anatomy.config.get_text_config().hidden_size
        rank, before = self._rank(layer), hidden * layer.head_dim * 2 * (layer.heads + layer.kv_heads)
        after = before + rank * (hidden + layer.token_width) - hidden * layer.token_width
        exact = rank == hidden  # the vector is then the layer's input
        return self.cost_of_fit(
            grown=max(1.0, after / before),
            decomposed=0 if exact else layer.token_width,
            fits_scores=not layer.qk_norm,
        )

    def _notes(self, anatomy: Anatomy, after: Anatomy) -> Iterator[str]:
        layers, layer = self._changed(anatomy), self._changed(anatomy)[0]
        if kept := len(anatomy.layers) - len(layers):
            yield f"{kept} layers with the base's own sliding window stay as they are"
        if (rank := self._rank(layer)) == layer.token_width:
            yield "the cache gets no smaller: a lower rank saves memory"
        elif rank == anatomy.config.get_text_config().hidden_size:
            yield "the vector has as many numbers as the layer's input: keys and values stay exact"
        angles = sum(each.entry["low_rank"].get("angles", 0) for each in after.layers if each.vector)
        if angles:
            yield f"one layer keeps, for all, the {angles} cosines and sines by which RoPE turns a token"
        fitted = [name for name in self.refit if not (layer.qk_norm and name in "qk")]
        yield from self.notes_of_fit(fitted)
        if layer.qk_norm:
            yield "a norm stands between keys and RoPE, so queries and keys are not fitted to the base's scores"

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        changed = [layer for layer in after.layers if layer.vector]
        if not changed:
            return None
        rank, full = changed[0].vector, changed[0].token_width
        return InWords(
            f"keys and values of low rank ({rank} numbers a token, was {full})",
            f"The keys and values of all heads are made of one vector of {rank} numbers for each token, in closed "
            "form on calibration text, without training.",
            use="Use it where the KV cache is the limit: many or long sequences at once.",
            avoid="Do not use it where the time of a decoding step behind a long text is the limit: each step makes "
            "the keys of the text anew.",
        )

    def apply(self, model: Any, context) -> dict[str, Any]:
        from surgery.calibration.closed_form.layerwise_fit import write_mlps

        fitted, after = self.fit(model, context), context.change.after
        give_entries(model, [layer.entry for layer in after.layers], self.op)
        for tensors, layer in zip(fitted.tensors, after.layers, strict=True):
            module = model.get_submodule(layer.path)
            for name, tensor in tensors.items() if layer.vector else ():
                module.get_parameter(name).data.copy_(tensor)
        write_mlps(model, fitted.mlps)
        return fitted.record


def _problem(anatomy: Anatomy) -> str:
    """Why keys and values of this model cannot be made of vectors; "" if they can."""
    if reason := anatomy.runtime_problem():
        return reason
    if reason := anatomy.layers[0].layout.vectors_problem:
        return f"in a {anatomy.model_type} {reason}"
    if anatomy.surgical or not anatomy.alike:
        return "the layers of this model were changed before; start from its base"
    return ""
