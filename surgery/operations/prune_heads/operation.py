"""Removal of heads from a model. Projections get smaller, and output projections are refitted to make up for the loss.

Source: Michel et al. 2019, arXiv 1905.10650 (gradient scores; many heads can be removed). The refit is least squares
on calibration activations, as in GPTQ and SliceGPT for other edits. Heads are numbered as in the base throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from surgery.architecture.layer import groups_of, query_names, shown_names
from surgery.calibration.cost import GRADIENT, activation_bytes, forward_flops, gradient_bytes, logit_bytes, widths
from surgery.calibration.head_scores import HeadScores, load_scores
from surgery.data.text import BUILTIN
from surgery.errors import SurgeryError
from surgery.machine.placement import GRADIENTS, LAYERS, PASSES, Use
from surgery.machine.progress import within
from surgery.operations.base import (
    NATIVE,
    SURGICAL,
    TERMS_OF_A_HEAD,
    ApplyContext,
    InWords,
    Measurement,
    Operation,
    PlannedChange,
    Seed,
    WholeNumber,
)
from surgery.operations.prune_heads.importance import METHODS, importance, is_method, random_table
from surgery.operations.prune_heads.select import (
    anatomy_without_heads,
    biased_output,
    change_lines,
    choose_removed,
    without_heads,
)

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

MEASURED = ("gradient", "ablation")  # scores that need text


class PruneHeads(Operation):
    """Remove the query heads, or whole KV groups, that the model needs least."""

    summary: ClassVar[str] = "Remove heads: whole KV groups alike in all layers (stock checkpoint), or any heads."
    purpose: ClassVar[str] = "cache"
    TEXTS: ClassVar[tuple[str, ...]] = (BUILTIN,)
    LIMITATIONS: ClassVar[tuple[str, ...]] = (
        "Heads are gone for good.",
        "Which ones matter was judged on a text: what only rare inputs need (recall over a long distance, other "
        "languages) may be lost without a change in perplexity.",
        "The refit fits the output projections to its calibration text (built in: Python's language reference); on "
        "text of another kind it may win back less.",
    )
    carries_terms: ClassVar[tuple[str, ...]] = TERMS_OF_A_HEAD
    LATER: ClassVar[tuple[str, ...]] = ("rescore",)

    op: Literal["prune_heads"] = "prune_heads"
    granularity: Literal["head", "kv_group"] = Field(
        "kv_group", description="kv_group: a KV head with all its query heads. head: query heads one by one."
    )
    per_layer: WholeNumber | None = Field(None, description="Heads (or KV groups) to remove from every layer.")
    ratio: float | None = Field(
        None, ge=0, lt=1, description="Instead: share of all heads (or groups) to remove, ranked over all layers."
    )
    heads: list[list[WholeNumber]] | None = Field(
        None, description="Instead: the query heads to remove, a list for each layer."
    )
    scores: str = Field("gradient", description=f"{', '.join(METHODS)}; or a file [layers][query heads].")
    rescore: float | None = Field(
        None, gt=0, le=1, description="Score anew each time this share of all heads (or groups) went; null: once."
    )
    refit: bool = Field(True, description="Fit the output projections of the heads that stay, on calibration text.")
    ridge: float = Field(0.01, gt=0, description="Pull to the old output projection, relative to the heads' energy.")
    protect_layers: list[WholeNumber] = Field([], description="Layers that keep all their heads.")
    calibration_samples: int = Field(32, ge=1, strict=True, description="Calibration sequences of the refit.")
    score_samples: int = Field(8, ge=1, strict=True, description="Those of them on which heads are scored.")
    calibration_length: int = Field(512, ge=2, strict=True, description="Tokens in each.")
    calibration_text: str = Field("builtin", description="builtin (its calibration part), or a UTF-8 text file.")
    seed: Seed = Field(0, description="Seed of scores: random.")

    @property
    def rewritten_projections(self) -> tuple[str, ...]:
        return ("q", "o")

    @property
    def usual_tier(self) -> str:
        """Native if every layer loses the same number of whole KV groups."""
        alike = self.granularity == "kv_group" and self.per_layer is not None and not self.protect_layers
        return NATIVE if alike else SURGICAL

    def ladders(self, anatomy: Anatomy) -> list[list[dict[str, Any]]]:
        if self.granularity != "kv_group" or self.per_layer is None:
            return []
        return [[{"per_layer": count} for count in range(1, min(layer.kv_heads for layer in anatomy.layers))]]

    @property
    def model_use(self) -> Use:
        by_text = {"gradient": GRADIENTS, "ablation": PASSES}
        return by_text.get(self.scores, LAYERS) if self.heads is None else LAYERS

    def limitations(self) -> tuple[str, ...]:
        return tuple(compress(self.LIMITATIONS, (True, self._judges(), self.refit)))

    def _judges(self) -> bool:
        return self.heads is None and self.scores in MEASURED

    def problems(self, anatomy: Anatomy) -> list[str]:
        problems, layers = [], len(anatomy.layers)
        settings = [name for name in ("per_layer", "ratio", "heads") if getattr(self, name) is not None]
        if len(settings) != 1:
            which = " and ".join(settings) or "none of them"
            problems.append(f"prune_heads: give one of per_layer, ratio and heads (null for the others), not {which}")
        if self.rescore is not None and not self._judges():
            source = "heads are listed" if self.heads is not None else f"scores: {self.scores} stays the same"
            problems.append(
                f"prune_heads: rescore, and {source} when heads go: drop rescore, or scores: {' or '.join(MEASURED)}"
            )
        if wrong := [i for i in self.protect_layers if i >= layers]:
            problems.append(f"prune_heads: protect_layers {wrong}: there are layers 0 to {layers - 1}")
        if any(layer.qk_norm == "whole" for layer in anatomy.layers):
            problems.append(
                f"prune_heads: the QK-norm of {anatomy.model_type} spans all heads: without some, the others change"
            )
        problems += [] if problems else self._problems_of_choice(anatomy)
        if not problems and is_method(self.scores) is False and self.heads is None:
            try:
                load_scores(self.scores, anatomy, per="heads")
            except SurgeryError as error:
                problems.append(f"prune_heads: {error.in_a_line()}")
        if not problems and self._removes_something(anatomy):
            problems += self._problems_of_tier(anatomy)
        return problems

    def _problems_of_choice(self, anatomy: Anatomy) -> list[str]:
        """Problems: heads that do not exist, layers without any head left, KV groups that would be split."""
        if self.heads is not None:
            return [f"prune_heads: {fault}" for fault in self._faults_of_heads(anatomy)]
        open_layers = [layer for layer in anatomy.layers if layer.index not in self.protect_layers]
        unit = "query heads" if self.granularity == "head" else "KV groups"
        counts = [len(units) for units in self._units(anatomy)]
        fewest = min((counts[layer.index] for layer in open_layers), default=1)
        if self.per_layer is not None and self.per_layer >= fewest and open_layers:
            one = f"1 {unit[:-1]}, which must stay" if fewest == 1 else f"{fewest} {unit}, and one must stay"
            return [f"prune_heads: per_layer {self.per_layer}: a layer has {one}"]
        wanted, most = round((self.ratio or 0) * sum(counts)), sum(counts[layer.index] - 1 for layer in open_layers)
        if wanted > most:
            return [
                f"prune_heads: ratio {self.ratio} removes {wanted} of {sum(counts)} {unit}, and only {most} can go"
            ]
        try:
            is_method(self.scores)
        except SurgeryError as error:
            return [f"prune_heads: {'; '.join(filter(None, (error.what, error.exists, error.fix)))}"]
        return []

    def _faults_of_heads(self, anatomy: Anatomy):
        if len(self.heads) != len(anatomy.layers):
            yield f"heads lists {len(self.heads)} layers, the model has {len(anatomy.layers)}"
            return
        for layer, named in zip(anatomy.layers, self.heads, strict=True):
            names = query_names(layer)
            if wrong := [head for head in named if head not in names]:
                yield f"heads: layer {layer.index} has no query heads {wrong}; it has {shown_names(names)}"
            elif len({*named}) < len(named):
                yield f"heads: layer {layer.index} names a head twice: {named}"
            elif len(named) == layer.heads:
                yield f"heads: layer {layer.index} would have no head left"
            elif layer.index in self.protect_layers and named:
                yield f"heads: layer {layer.index} is protected (protect_layers)"
            elif self.granularity == "kv_group":
                for kv_head, group in enumerate(groups_of(layer)):
                    members = [layer.query_name(head) for head in group]
                    if remaining := [name for name in members if name not in named] if {*members} & {*named} else []:
                        yield (
                            f"heads: layer {layer.index}: KV group {layer.kv_name(kv_head)} cannot go while its query "
                            f"heads {remaining} stay: name them too, or granularity: head"
                        )

    def _problems_of_tier(self, anatomy: Anatomy) -> list[str]:
        after, tier = self._after(anatomy, self._nominal(anatomy))
        if tier == NATIVE:
            return []
        if reason := anatomy.shapes_problem():
            stock = self._stock_problem(anatomy, after)
            stock = stock or "a stock checkpoint has the same number of whole KV groups in every layer"
            return [f"prune_heads: {stock}; and on the surgical tier {reason}"]
        return []

    def milder(self) -> str:
        return f"ratio={self.ratio / 2:g}" if self.ratio else ""

    def plan(self, anatomy: Anatomy) -> PlannedChange:
        if not self._removes_something(anatomy):
            return PlannedChange(anatomy, ("nothing: no head is to go",))
        removed = self._nominal(anatomy)
        after, tier = self._after(anatomy, removed)
        known = self._known_choice(anatomy)
        streaming = any(layer.streaming for layer in anatomy.layers)
        alike = self.granularity == "kv_group" and self.per_layer is not None
        notes = [] if known else [f"which heads go is measured on the model ({self.scores})"]
        if self.rescore is not None:
            unit = "query heads" if self.granularity == "head" else "KV groups"
            times, step = self._scorings(anatomy), self._step(anatomy)
            once = f"heads are scored once: rescore begins to act where more than {step} {unit} go"
            notes.append(f"heads are scored {times} times, after each {step} {unit}" if times > 1 else once)
        if tier == SURGICAL and (reason := self._stock_problem(anatomy, after)) and after.alike:
            notes.append(f"surgical, since {reason}")
        if not known and not alike and self._may_empty_groups(anatomy):
            notes.append("a KV head whose query heads all go goes with them: parameters and KV bytes may be fewer")
        what = "output projections and their biases" if biased_output(anatomy) else "output projections"
        refit = f"{what} refitted, ridge {self.ridge}" if self.refit else "no refit"
        if self.refit and not biased_output(anatomy):
            notes.append("output projections have no bias here to take over what heads that go write on average")
        how = "as listed" if self.heads is not None else self.scores if is_method(self.scores) else "scores of a file"
        return PlannedChange(
            after,
            tuple(change_lines(anatomy, removed, f"{how}; {refit}", known)),
            tier,
            tuple(notes),
            measured=not known and (streaming or not alike),
            measurements=tuple(self._measurements(anatomy, known)),
        )

    def _forwards(self, anatomy: Anatomy) -> float:
        """Forward passes per text to score heads. An ablation starts at the head's layer: half a pass on average."""
        heads = sum(layer.heads for layer in anatomy.layers)
        return {"gradient": GRADIENT, "ablation": heads / 2}.get(self.scores, 0)

    def _step(self, anatomy: Anatomy) -> int:
        """How many heads (or groups) go before the next scoring."""
        return max(1, round((self.rescore or 1.0) * sum(map(len, self._units(anatomy)))))

    def _scorings(self, anatomy: Anatomy) -> int:
        """How often heads are scored."""
        pairs = zip(self._units(anatomy), self._nominal(anatomy), strict=True)
        gone = sum(unit[0] in removed for units, removed in pairs for unit in units)
        return max(1, ceil(gone / self._step(anatomy)))

    def _measurements(self, anatomy: Anatomy, known: bool) -> Iterator[Measurement]:
        """The stages: scoring the heads, if that needs text, and the refit."""
        length = min(self.calibration_length, anatomy.positions or self.calibration_length)
        if not known and (forwards := self._forwards(anatomy)):
            tokens = self._scorings(anatomy) * self.score_samples * length
            of_text = gradient_bytes if self.model_use == GRADIENTS else activation_bytes
            on_gpu = of_text(anatomy, length) + logit_bytes(anatomy, length)
            flops = forwards * forward_flops(anatomy, tokens, length)
            yield Measurement("measuring heads", flops, memory_on_gpu=on_gpu)
        if self.refit and self._removes_something(anatomy):
            tokens = self.calibration_samples * length
            layer, (hidden, _) = anatomy.layers[0], widths(anatomy)
            width = layer.heads * layer.head_dim
            sums = 8 * (3 * width**2 + 3 * width * hidden)  # of both products and what solves them, in float64
            on_gpu = 2 * 4 * tokens * hidden + sums + activation_bytes(anatomy, length)
            yield Measurement(
                "refitting output projections", 2 * forward_flops(anatomy, tokens, length), memory_on_gpu=on_gpu
            )

    def in_words(self, before: Anatomy, after: Anatomy, record: dict) -> InWords | None:
        total = sum(layer.heads for layer in before.layers)
        gone = total - sum(layer.heads for layer in after.layers)
        if not gone:
            return None
        (old, *_), (new, *_) = before.layers, after.layers
        if before.alike and after.alike:
            title = f"{new.heads} query heads (pruned, was {old.heads})"
            done = f"In each layer {old.heads - new.heads} of {old.heads} query heads were cut out"
            if new.kv_heads < old.kv_heads:
                done += f", with {old.kv_heads - new.kv_heads} of {old.kv_heads} KV heads"
        else:
            title = f"{gone} of {total} query heads pruned"
            done = f"{gone} of its {total} query heads were cut out"
        done += ", and the output projections refitted to what is left" if self.refit else ""
        return InWords(
            title,
            f"{done}, without training.",
            use="Use it as a smaller start for fine-tuning on your own text.",
            avoid="Do not use it on text unlike that which it was fitted to, such as other languages, unless you have "
            "measured it there.",
        )

    def apply(self, model, context: ApplyContext) -> dict:
        from surgery.architecture.edit import refuse_non_finite, write_layers
        from surgery.architecture.weights import pack, unpack
        from surgery.operations.prune_heads.refit import refit

        before = context.before
        if not self._removes_something(before):
            return {}
        sequences = self._sequences(model, context)
        removed, scores = self._removed(model, before, sequences, context.progress)
        after, tier = self._after(before, removed)
        if context.change.tier == SURGICAL:  # as planned, even if all layers now have equally many heads
            after, tier = before.with_layers(list(after.layers), stock=False), SURGICAL
        fits = [None] * len(removed)
        if self.refit:
            fits = refit(model, before, removed, sequences, self.ridge, context.progress)
        results = []
        for layer, target, removed_heads, fit in zip(before.layers, after.layers, removed, fits, strict=True):
            module = model.get_submodule(layer.path)
            tensors = {name: module.get_parameter(name).detach() for name in layer.tensor_names}
            refuse_non_finite(tensors, layer.path)
            results.append(pack(without_heads(unpack(layer, tensors), target, removed_heads, fit and fit.weight)))
        for tensors, new_layer in zip(results, after.layers, strict=True):
            refuse_non_finite(tensors, new_layer.path)
        write_layers(model, before, after, results, surgical=tier == SURGICAL)
        for new_layer, fit in zip(after.layers, fits, strict=True):
            if fit and fit.shift is not None:
                bias = model.get_submodule(f"{new_layer.path}.{new_layer.layout.o}").bias
                bias.data.add_(fit.shift.to(bias))
        context.after = after
        named = [[layer.query_name(h) for h in heads] for layer, heads in zip(before.layers, removed, strict=True)]
        record = {"removed": named, "importance": scores.to_dict() if scores else None}
        if not self.refit:
            return record
        lost = [fit.lost if fit else {} for fit in fits]
        return record | {"lost_share": lost, "output_bias": "refitted" if biased_output(before) else "none"}

    def _may_empty_groups(self, anatomy: Anatomy) -> bool:
        """Whether so many single query heads may be removed that a KV head has none left."""
        sizes = [len(group) for layer in anatomy.layers for group in groups_of(layer)]
        return self.granularity == "head" and max(sizes) > 1 and (self.per_layer or max(sizes)) >= min(sizes)

    def _units(self, anatomy: Anatomy) -> list[list[list[int]]]:
        """What can be removed from each layer: lists of query heads, single ones or KV groups."""
        one_by_one = self.granularity == "head"
        return [[[h] for h in range(layer.heads)] if one_by_one else groups_of(layer) for layer in anatomy.layers]

    def _removes_something(self, anatomy: Anatomy) -> bool:
        if self.heads is not None:
            return any(self.heads)
        return bool(self.per_layer or round((self.ratio or 0) * sum(map(len, self._units(anatomy)))))

    def _known_choice(self, anatomy: Anatomy) -> bool:
        return self.heads is not None or self.scores == "random" or not is_method(self.scores)

    def _nominal(self, anatomy: Anatomy) -> list[list[int]]:
        """The heads to remove if they are known without the model; else as many, taken evenly from all KV heads."""
        if self.heads is not None:
            return [[_index(layer, h) for h in named] for layer, named in zip(anatomy.layers, self.heads, strict=True)]
        if not is_method(self.scores):
            return self._choose(anatomy, load_scores(self.scores, anatomy, per="heads"))
        if self.scores == "random":
            return self._choose(anatomy, HeadScores("random", random_table(anatomy, self.seed)))
        groups = map(groups_of, anatomy.layers)
        table = [[-float(rank) for group in layer for rank in range(len(group))] for layer in groups]
        return self._choose(anatomy, HeadScores("none", table))

    def _removed(self, model, anatomy: Anatomy, sequences, progress) -> tuple[list[list[int]], HeadScores | None]:
        """The query heads to remove, and the scores by which they were chosen.

        With `rescore` a head that goes has the score of the time when it was chosen, the others that of the last time.
        """
        if self.rescore is None:
            scores = self._scores(model, anatomy, sequences, progress)
            return self._choose(anatomy, scores), scores
        times, removed, table = self._scorings(anatomy), [[] for _ in anatomy.layers], []
        for part in range(times):
            found = self._scores(model, anatomy, sequences, within(progress, part, times), silent=removed).scores
            for row, heads, earlier in zip(found, removed, table, strict=bool(table)):
                for head in heads:
                    row[head] = earlier[head]
            table = found
            removed = self._choose(anatomy, HeadScores(self.scores, table), removed, self._step(anatomy))
        return removed, HeadScores(self.scores, table, {"rescore": self.rescore, "scorings": times})

    def _choose(
        self,
        anatomy: Anatomy,
        scores: HeadScores | None,
        removed: list[list[int]] | None = None,
        at_most: int | None = None,
    ) -> list[list[int]]:
        if scores is None:
            return self._nominal(anatomy)
        return choose_removed(
            scores.scores,
            self._units(anatomy),
            per_layer=self.per_layer,
            ratio=self.ratio,
            protect=self.protect_layers,
            removed=removed,
            at_most=at_most,
        )

    def _after(self, anatomy: Anatomy, removed: list[list[int]]) -> tuple[Anatomy, str]:
        """The resulting anatomy and its tier: native where a stock config can describe it."""
        layers = [anatomy_without_heads(layer, heads) for layer, heads in zip(anatomy.layers, removed, strict=True)]
        after = anatomy.with_layers(layers, stock=False)
        if self._stock_problem(anatomy, after):
            return after, SURGICAL
        return anatomy.with_layers(layers, stock=True), NATIVE

    def _stock_problem(self, anatomy: Anatomy, after: Anatomy) -> str:
        """Why no stock checkpoint can have this anatomy; "" if one can."""
        loose = self.granularity == "head" and any(layer.group > 1 for layer in anatomy.layers)
        if not after.alike or (loose and not self._known_choice(anatomy)):
            return "a stock checkpoint has the same number of whole KV groups in every layer"
        first = after.layers[0]
        return anatomy.heads_problem(first.heads, first.kv_heads)

    def _sequences(self, model, context: ApplyContext):
        """Calibration tokens [samples, length]; None if none are needed."""
        from surgery.data.calibration_text import calibration_sequences

        if not (self.refit or self._judges()):
            return None
        otherwise = "; or scores: magnitude with refit: false"
        tokenizer = context.tokenizer_for("measuring heads and refitting need the tokenizer", self.op, otherwise)
        count = self.calibration_samples if self.refit else self.score_samples
        return calibration_sequences(model, tokenizer, self.calibration_text, self.calibration_length, count)

    def _scores(self, model, anatomy: Anatomy, sequences, progress, silent=None) -> HeadScores | None:
        if self.heads is not None:
            return None
        if not is_method(self.scores):
            return load_scores(self.scores, anatomy, per="heads")
        if sequences is not None:  # take a subset that is spread evenly over the text
            count = min(self.score_samples, len(sequences))
            sequences = sequences[[index * len(sequences) // count for index in range(count)]]
        return importance(model, self.scores, sequences, self.seed, progress, silent)


def _index(layer, name: int) -> int:
    """The index of the query head that has this number in the base."""
    return layer.query_numbers.index(name) if layer.query_numbers else name
