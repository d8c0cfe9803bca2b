"""Multi-head latent attention (MLA) in closed form, as a stock model.

Source: DeepSeek-AI 2024, "DeepSeek-V2", arXiv 2405.04434. The conversion is our own: see `layer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, inf, tau
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from surgery.architecture.latent import NARROW, STOCK, latent_fields, latent_problem, queries_of
from surgery.architecture.layer import Latent
from surgery.calibration.closed_form.cost import Calibration
from surgery.data.text import CALIBRATION_TEXTS_ARE, CONVERSATIONS
from surgery.operations.base import NATIVE, InWords, PlannedChange
from surgery.operations.vector import VectorOperation, least_share, numbers_of

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.calibration.closed_form.vector_layer import VectorConversion

# A frequency keeps no RoPE if its wave is more than FAR times as long as the longest text, so that it turns by half a
# radian at most. One whose wave is shorter than NEAR tokens has no place in the latent vector: without its angle it
# says nothing.
FAR, NEAR = 12, 16


class MLA(VectorOperation):
    """One latent vector and one rotated key for each token, from which all heads' keys and values are made."""

    summary: ClassVar[str] = "Latent attention (MLA): one vector a token in place of keys and values."
    STAGE: ClassVar[str] = "compressing layers"
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "The weights are fitted to the calibration text (by default half Python's language reference, half what the "
        "model writes itself); text of another kind loses more.",
        "Stock Transformers makes the keys and values of the whole past anew at each step, which takes time that the "
        "base does not need; the operation absorb, after this one, avoids it.",
        "With a `rope` below the default, frequencies lose RoPE that matter in long texts: judge those before use.",
        "Train it with `surgery heal`: the rows that make the vector are stored scaled far down, and a step of "
        "another trainer's optimiser would replace them.",
        "Run it in bfloat16 or float32: float16 has no numbers so small, and the output would be noise.",
    )

    LATER: ClassVar[tuple[str, ...]] = ("calibration_recall", "fold")

    op: Literal["mla"] = "mla"
    rope: Annotated[int, Field(ge=2, strict=True)] | None = Field(
        None,
        description="Channels of the shared key that RoPE rotates: two for each of the first frequencies, or for each "
        f"fold of them. null: all but those whose wave, before any scaling, is {FAR} times longer than the longest "
        "text.",
    )
    fold: int = Field(
        1,
        ge=1,
        strict=True,
        description="Neighbouring frequencies that RoPE turns as the fastest of them, and that share channels of the "
        "rotated key (FreqFold of TransMLA); with keep_kv the vector gets the numbers that this frees. 1: each has "
        "channels of its own.",
    )
    calibration_text: str = Field(CONVERSATIONS, description=CALIBRATION_TEXTS_ARE)

    def latent(self, anatomy: Anatomy) -> Latent:
        """The latent attention that such a model gets."""
        layer, waves = anatomy.layers[0], _waves(anatomy)
        longest = FAR * anatomy.positions if anatomy.positions else inf
        kept = sum(wave <= longest for wave in waves)
        rope = self.rope or 2 * ceil(max(1, kept) / self.fold)
        rank = self.rank or numbers_of(self.keep_kv, layer.token_width) - rope
        return Latent(rank, rope, layer.head_dim - 2 * _fast(waves), layer.head_dim, queries_of(anatomy), self.fold)

    def problems(self, anatomy: Anatomy) -> list[str]:
        if reason := latent_problem(anatomy) or anatomy.runtime_problem():
            return [f"mla: {reason}"]
        layer, problems = anatomy.layers[0], []
        frequencies = layer.rotary // 2
        if frequencies % self.fold:
            return [f"mla: fold: {self.fold} does not divide the {frequencies} frequencies of this model"]
        rotated = 2 * frequencies // self.fold
        if self.rope and (self.rope % 2 or self.rope > rotated):
            of = f"{layer.rotary}, which RoPE rotates here" if self.fold == 1 else f"{rotated}, with fold: {self.fold}"
            problems.append(f"mla: rope: {self.rope} is not an even number up to {of}")
        least = 2 * max(1, ceil(_fast(_waves(anatomy)) / self.fold))
        if not problems and (rope := self.latent(anatomy).rope) < least:
            problems.append(f"mla: rope: {rope} drops fast frequencies, which need RoPE: take at least {least}")
        problems = problems or self._problems_of_size(anatomy, least)
        problems += self.problems_of_fit()
        if anatomy.dtype in NARROW:
            problems.append(
                "mla: float16 cannot hold the rows that make the vector, which are scaled below the stock norm's "
                "epsilon: store the base in bfloat16 or float32 first"
            )
        return problems

    def _problems_of_size(self, anatomy: Anatomy, least: int) -> list[str]:
        """Why the vector cannot be as long as it is set.

        Args:
            least: the rotated channels that fast frequencies need.
        """
        layer, latent = anatomy.layers[0], self.latent(anatomy)
        rank, rope, full = latent.rank, latent.rope, layer.token_width
        share = f"mla: keep_kv: {self.keep_kv:g} of {full} numbers a token leaves"
        if rank < 1:
            lower = (numbers_of(self.keep_kv, full) - 1) // 2 * 2  # the most rotated channels beside a vector
            more = f", or a rope of at most {lower}" if lower >= least else ""
            return [
                f"{share} none beside {rope} rotated channels: take at least {least_share(rope + 1, full):g}{more}"
            ]
        has = min(layer.kv_heads * (latent.nope + latent.value), anatomy.config.hidden_size)
        if rank <= (most := min(has, full - rope)):
            return []
        take = self.at_most(most, full, beside=rope)
        if self.rank is None:
            return [f"{share} a vector of {rank} numbers, and {has} hold all of its keys and values: {take}"]
        if most == has:
            return [f"mla: rank: {rank} is more than its keys and values have: {take}"]
        both = f"with {rope} rotated channels it is {latent.width} numbers a token"
        return [f"mla: rank: {rank} is too much: {both}, and this model's cache holds {full}: {take}"]

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        layer, latent, layers = anatomy.layers[0], self.latent(anatomy), len(anatomy.layers)
        full = layer.token_width
        line = (
            f"KV cache {full} → {latent.width} numbers a token in {layers} layers (a latent vector of {latent.rank}, "
            f"a shared key of {latent.rope} rotated channels)"
        )
        after = anatomy.with_latent(latent, latent_fields(anatomy, latent))
        measurements = self.calibration(anatomy).measurements(anatomy, layers)
        return PlannedChange(after, (line,), NATIVE, tuple(self._notes(anatomy, latent)), measurements=measurements)

    @property
    def conversion(self) -> type[VectorConversion]:
        from surgery.operations.mla.layer import LatentConversion

        return LatentConversion

    def calibration(self, anatomy: Anatomy) -> Calibration:
        layer, latent, hidden = anatomy.layers[0], self.latent(anatomy), anatomy.config.hidden_size
        queries = layer.heads * (latent.nope + latent.rope)
        before = hidden * layer.head_dim * 2 * (layer.heads + layer.kv_heads)
        maps = layer.heads * (latent.nope + latent.value) * latent.rank
        made = latent.queries * (hidden + queries) if latent.queries else hidden * queries
        after = hidden * (latent.width + layer.heads * latent.value) + made + maps
        return self.cost_of_fit(
            grown=after / before,
            decomposed=layer.kv_heads * (latent.nope + latent.value),
            wider=(latent.nope + latent.rope) / layer.head_dim,
        )

    def _notes(self, anatomy: Anatomy, latent: Latent) -> Iterator[str]:
        yield f"the layers are those of a stock {STOCK}"
        if latent.queries:
            yield f"queries, which have a bias, are made of a vector of {latent.queries}: the layer's input and a 1"
        of = anatomy.layers[0].rotary // 2
        dropped = of - latent.rope // 2 * latent.fold
        if latent.fold > 1:
            yield f"each {latent.fold} neighbouring frequencies turn as the fastest of them"
        if dropped:
            yield f"of {of} frequencies the slowest {dropped} {'keeps' if dropped == 1 else 'keep'} no RoPE"
        full = anatomy.layers[0].token_width
        if latent.width == full:
            yield "the cache keeps its size: a lower rank saves memory"
        yield from self.notes_of_fit(self.refit)

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        latent = after.latent
        if latent is None:
            return None
        full = before.layers[0].token_width
        return InWords(
            f"latent attention (MLA, {latent.width} numbers a token, was {full})",
            f"The keys and values of all heads are made of one vector of {latent.rank} numbers for each token and one "
            f"key of {latent.rope} rotated channels, in closed form on calibration text, without training.",
            use="Use it where the KV cache is the limit: many or long sequences at once.",
            avoid="Do not use it where it must copy from its prompt (retrieval, code editing, long chats), unless "
            "recall was measured on this card and kept.",
        )

    def apply(self, model: Any, context) -> dict[str, Any]:
        from surgery.architecture.latent import write_latent
        from surgery.architecture.stock_class import refuse_other_class
        from surgery.calibration.closed_form.layerwise_fit import write_mlps

        refuse_other_class(model, self.op)
        fitted = self.fit(model, context)
        write_latent(model, context.change.after, fitted.tensors)
        write_mlps(model, fitted.mlps)  # last: an error before leaves the model as it was
        return fitted.record


def _fast(waves: list[float]) -> int:
    """How many of the first frequencies have no place in the latent vector; at least one has."""
    return min(sum(wave < NEAR for wave in waves), len(waves) - 1)


def _waves(anatomy: Anatomy) -> list[float]:
    """The wavelength of each frequency of RoPE in tokens, before any scaling for longer contexts."""
    rotary = anatomy.layers[0].rotary
    theta = (getattr(anatomy.config, "rope_parameters", None) or {}).get("rope_theta") or 10_000.0
    return [tau * theta ** (2 * index / rotary) for index in range(rotary // 2)]
