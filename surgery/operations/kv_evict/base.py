"""The base class of the policies of `kv_evict`: KV heads keep a fixed number of keys.

Each policy is a class in `methods.py`; `operation.py` lists them. Which heads evict is decided as in the head split,
by their scores (`operations/head_scorers`): heads that need the far past keep all of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from surgery.machine.placement import Use
from surgery.operations.base import (
    SURGICAL,
    ApplyContext,
    Count,
    InWords,
    Operation,
    PlannedChange,
    Seed,
    WholeNumber,
    give_entries,
)
from surgery.operations.head_scorers.choice import HeadChoice
from surgery.operations.head_scorers.scorers import METHODS, how_chosen
from surgery.operations.variants import Variants

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

# Fields that say which heads evict, and are not settings of the policy.
OF_HEADS = {
    "op",
    "method",
    "evicting_ratio",
    "scores",
    "scoring",
    "calibration_samples",
    "calibration_length",
    "protect_layers",
    "scores_seed",
}
MOST_KEPT = 1 << 20  # most keys of a KV head; for tensors that the first token allocates
LONGEST, STEP = 16384, 64  # keys: the numbers that `surgery fit` tries where all heads evict
BLOCKS, PROMPT_END = "blocks", "prompt_end"


class KVEvict(Variants, Operation):
    """KV heads keep sinks, recent tokens, and the keys that a policy chooses among the others."""

    summary: ClassVar[str] = "KV eviction: KV heads keep sinks, recent tokens and the keys that a policy chooses."
    purpose: ClassVar[str] = "cache"
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "Keys that a head drops are gone. A later question finds them only through heads that keep every key. A "
        "recall test, where this card has one, tests it with literal answers alone.",
        "It needs the cache that this model makes itself (`generate`, or `use_cache=True` without a cache of yours). "
        "Another cache is refused.",
    )
    term: ClassVar[str | None] = "visibility of the cache"

    op: Literal["kv_evict"] = "kv_evict"
    method: str = Field(description="The policy: by which rule keys stay.")
    keys: Count = Field(1024, le=MOST_KEPT, description="Keys that a KV head keeps besides sinks and recent tokens.")
    sinks: WholeNumber = Field(4, le=MOST_KEPT, description="First tokens of a sequence that always stay.")
    recent: Count = Field(128, le=MOST_KEPT, description="Last tokens that always stay.")
    interval: Count = Field(256, le=MOST_KEPT, description="Positions from one decision to the next.")
    when: Literal["blocks", "prompt_end"] = Field(
        BLOCKS, description="blocks: decide at each interval; prompt_end: once, where the prompt ends (SnapKV)."
    )
    evicting_ratio: float = Field(
        1.0, gt=0, le=1, description="Share of the KV heads that evict: those with the lowest scores."
    )
    scores: str = Field(
        "far-mass",
        description=f"With a ratio below 1: {', '.join(METHODS)} (measured here); or a score file.",
    )
    scoring: dict[str, Any] | None = Field(
        None, description="Settings of this method, as in `surgery score --method METHOD KEY=VALUE`."
    )
    calibration_samples: int | None = Field(None, ge=1, description="Calibration sequences; null: the method's own.")
    calibration_length: int | None = Field(None, ge=2, description="Tokens in each; null: the method's own.")
    protect_layers: list[WholeNumber] = Field([], description="Layers whose heads all keep every key.")
    scores_seed: Seed = Field(0, description="Seed of the calibration sequences.")

    @property
    def _kept(self) -> int:
        """The largest number of keys that a decision leaves to a KV head."""
        return self.sinks + self.keys + self.recent

    @property
    def exempt(self) -> int:
        """How many of the evicting heads of a layer keep every key all the same; each text chooses them."""
        return 0

    @property
    def _choice(self) -> HeadChoice:
        return HeadChoice(
            self.op,
            self.evicting_ratio,
            self.scores,
            self.sinks,
            self.keys + self.recent,
            fields=("sinks", "keys, recent", "scores_seed"),
            scoring=self.scoring,
            samples=self.calibration_samples,
            length=self.calibration_length,
            protect=self.protect_layers,
            seed=self.scores_seed,
        )

    def policy(self, anatomy: Anatomy, layer: int) -> dict[str, Any]:
        """The value of `policy` in a layer's entry of the `surgery` block, without the heads."""
        settings = self.model_dump(exclude=OF_HEADS)
        return {"name": self.method, **settings} | ({"interval": None} if self.when == PROMPT_END else {})

    def problems(self, anatomy: Anatomy) -> list[str]:
        from surgery.runtime.surgery_kv_policy import policy_of

        problems = self._choice.problems(anatomy)
        if problems:
            return problems
        if self.when == PROMPT_END and self.interval != type(self).model_fields["interval"].default:
            problems.append("kv_evict: interval is for when: blocks; with prompt_end there is one decision")
        try:
            policy_of(self.policy(anatomy, 0))
        except ValueError as error:
            problems.append(f"kv_evict: {error}")
        windows = [layer.window for layer in anatomy.layers]
        if None not in windows:
            problems.append(
                f"kv_evict: every layer has a sliding window of the base's own ({min(filter(None, windows))} tokens): "
                "its cache drops keys already"
            )
        split = sum(len(layer.streaming) for layer in anatomy.layers)
        if split and self.evicting_ratio < 1:
            problems.append(
                f"kv_evict: {split} KV heads of this checkpoint stream already (head split): evicting_ratio 1 evicts "
                "on the others, a smaller ratio would mix the two choices"
            )
        elif not self._evicting(anatomy):
            problems.append("kv_evict: no KV head is left that keeps every key: they stream, or are protected")
        if not problems and (problem := self.plan(anatomy).after.entries_problem()):
            problems.append(f"kv_evict: {problem}")
        return problems

    def problems_after(self, later: Anatomy) -> list[str]:
        return [f"kv_evict: {problem}"] if (problem := later.entries_problem()) else []

    def _evicting(self, anatomy: Anatomy) -> bool:
        planned = self._choice.planned(anatomy, self._local(anatomy))
        heads = zip(anatomy.layers, planned, strict=True)
        return any({*chosen} - {*layer.streaming} for layer, chosen in heads)

    @staticmethod
    def _local(anatomy: Anatomy) -> list[int]:
        """Layers with a sliding window of the base's own, which stay as they are."""
        return [layer.index for layer in anatomy.layers if layer.window is not None]

    def term_layers(self, anatomy: Anatomy) -> set[int]:
        return {layer.index for layer in anatomy.layers} - {*self._local(anatomy), *self.protect_layers}

    @property
    def model_use(self) -> Use:
        return self._choice.model_use

    @property
    def unchanged_within(self) -> int:
        """The first decision that drops a key is before the first multiple of the interval that is larger.

        With PROMPT_END a text in one call is the base's at any length, which says nothing of a shorter one.
        """
        if self.when == PROMPT_END:
            return 0
        return (self._kept // self.interval + 1) * self.interval

    def limitations(self) -> tuple[str, ...]:
        if self.when != PROMPT_END:
            return self.LIMITATIONS
        return (
            *self.LIMITATIONS,
            "The call that fills the empty cache is taken for the prompt. Of a prompt that comes in chunks only the "
            "first chunk is thinned out. Assisted decoding is refused, and without a cache nothing is dropped.",
        )

    def milder(self) -> str:
        return f"keys={2 * self.keys}"

    def ladders(self, anatomy: Anatomy) -> list[list[dict[str, Any]]]:
        if self.when == PROMPT_END:  # how much is left depends on the prompt
            return []
        if self.evicting_ratio < 1:
            return [[{"evicting_ratio": share / 100} for share in range(1, 100)]]
        longest = min(anatomy.positions or LONGEST, LONGEST)
        return [[{"keys": keys} for keys in range(longest // STEP * STEP, 0, -STEP)]]

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        choice, local = self._choice, self._local(anatomy)
        evicting, total = choice.planned(anatomy, local), self._able(anatomy)
        after = replace(
            anatomy,
            layers=tuple(
                layer.with_entry(policy=self._entry(anatomy, layer.index, heads)) if heads else layer
                for layer, heads in zip(anatomy.layers, evicting, strict=True)
            ),
        )
        pairs = zip(anatomy.layers, evicting, strict=True)
        count = self._dropping([len({*heads} - {*layer.streaming}) for layer, heads in pairs])
        kept = f"{self.sinks} sinks, {self.recent} recent tokens and {self.keys:,} keys"
        when = f"every {self.interval} tokens" if self.when == BLOCKS else "where the prompt ends"
        which = "; each text chooses the others, which keep every key" if self.exempt else ""
        return PlannedChange(
            after,
            (f"{count} of {total} KV heads keep {kept}, chosen by {self.method} {when}{which}",),
            SURGICAL,
            tuple(self._notes(anatomy, choice, local)),
            measured=choice.measured and choice.needs_scores,
            measurements=choice.measurements(anatomy),
        )

    def _dropping(self, evicting: list[int]) -> int:
        """The number of KV heads that drop keys, from the evicting heads of each layer."""
        return sum(max(heads - self.exempt, 0) for heads in evicting)

    def _notes(self, anatomy: Anatomy, choice: HeadChoice, local: list[int]) -> list[str]:
        notes = []
        if choice.measured and choice.needs_scores:
            notes.append(f"which heads evict is decided by a measurement on the model (scores={self.scores})")
        if local:
            notes.append(f"{len(local)} of {len(anatomy.layers)} layers keep the base's own sliding window")
        if self.when == PROMPT_END:
            notes.append(
                f"a prompt leaves up to {self._kept:,} keys to a head, and each later token stays: the cache grows. "
                "What stays depends on how the prompt is cut into calls; a text in one call is computed as in the base"
            )
        else:
            notes.append(
                f"between two decisions a head holds up to {self.interval} keys more; a text in chunks, in a padded "
                "batch or without a cache gives the same result"
            )
        if anatomy.positions and anatomy.positions <= self.unchanged_within:
            notes.append(f"this model takes {anatomy.positions} tokens: no key is ever dropped")
        return notes

    def _able(self, anatomy: Anatomy) -> int:
        """The number of KV heads that see all."""
        local = self._local(anatomy)
        return sum(layer.kv_heads - len(layer.streaming) for layer in anatomy.layers if layer.index not in local)

    def _entry(self, anatomy: Anatomy, layer: int, heads: list[int]) -> dict[str, Any]:
        """The value of `policy` in the entry of a layer in which these KV heads evict."""
        whole = len(heads) == anatomy.layers[layer].kv_heads
        return self.policy(anatomy, layer) | ({} if whole else {"heads": heads})

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        total, count = self._able(before), self._dropping([*map(len, record["evicting"])])
        if not count:
            return None
        share = "All" if count == total else f"{count} of {total}"
        scores = record.get("scores") or {}
        chosen = how_chosen(scores.get("method", ""), scores.get("origin") or {}) if self.evicting_ratio < 1 else ""
        kept = f"the first {self.sinks} and the last {self.recent} tokens and {self.keys:,} others"
        when = f"every {self.interval} tokens" if self.when == BLOCKS else "where a prompt ends"
        rest = "" if count == total else "; the other heads keep every key"
        rest += ", and each text chooses which heads these are" if self.exempt else ""
        return InWords(
            f"{'all' if count == total else share} KV heads evicting keys ({self.method})",
            f"{share} KV heads now keep {kept}, chosen {when} by the policy {self.method}{rest}.{chosen}",
            use="Use it for long texts in little memory.",
            avoid=f"Do not use it for sequences of up to {self._kept:,} tokens: no key is dropped there.",
        )

    def apply(self, model, context: ApplyContext) -> dict:
        before = context.before
        scores = self._choice.measure(model, context)
        evicting = self._choice.chosen(scores.scores, self._local(before))
        pairs = list(zip(before.layers, evicting, strict=True))
        layers = [{"policy": self._entry(before, x.index, heads)} if heads else {} for x, heads in pairs]
        give_entries(model, layers, self.op)
        named = [[x.kv_name(head) for head in heads if head not in x.streaming] for x, heads in pairs]
        return {"evicting": named, "scores": scores.to_dict()}
