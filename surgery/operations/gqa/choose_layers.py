"""What the model loses when the KV heads of one layer alone are shared: where KV heads are worth their bytes.

Every layer is fitted on the base's inputs, as `sharing` does it; then a few texts go through the base with this one
layer converted: texts that chose its ridges (and joined the last fit of W_O with them). Losses of single layers add up
well enough to rank them: those that lose most keep their heads. MLPs stay as they are here.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.calibration.attention_hook import hook_attention
from surgery.calibration.layerwise import kl, replayed
from surgery.operations.gqa.cost import TRIED
from surgery.operations.gqa.layer_inputs import is_validation
from surgery.operations.gqa.streams import Attended, Sharing


def keep_layers(before: Anatomy, shared: Anatomy, losses: list[float], kept: int) -> Anatomy:
    """What results when the `kept` layers that lose most stay as they were; of equal losses the earlier layer."""
    worst = sorted(range(len(losses)), key=lambda number: -losses[number])[:kept]
    heads = [(before if number in worst else shared).layers[number].kv_heads for number in range(len(losses))]
    return before.with_kv_heads_by_layer(heads)


def validation_samples(count: int) -> list[int]:
    """Of so many texts those that are held back, at most TRIED, evenly spaced: all kinds of text have their part."""
    held = [place for place in range(count) if is_validation(place, count)]
    some = min(TRIED, len(held))
    return [held[number * len(held) // some] for number in range(some)]


class LayerLosses(Sharing):
    """Sharing of every layer by itself. `fits`: of its number what each one's attention becomes, and a record."""

    def __init__(self, model, targets, sequences, settings, known=None, found=None):
        super().__init__(model, targets, sequences, replace(settings, sequential=False), known, found)
        self.fits: dict[int, tuple[dict, dict]] = {}
        self.alone = threading.Lock()  # the whole model is asked what one layer loses

    def measure(self, progress=None) -> list[float]:
        """KL to the base, in nats per token, of each layer when it alone has its planned KV heads."""
        with hook_attention(self.model, self.streams.attention) as watch, torch.no_grad():
            self._begin(watch)
            self.places = validation_samples(len(self.sequences))
            self.whole = [self._log_probabilities(place) for place in self.places]
            self.before: dict[int, dict[int, torch.Tensor]] = {}
            return self._each_layer(self._alone, "layers tried alone", progress)

    def _look_at(self, facts, target) -> Attended:
        self.before[facts.index] = {place: self.streams.base[place] for place in self.places}
        return super()._look_at(facts, target)

    def _alone(self, facts, target) -> float:
        """A layer's loss."""
        layer, streams, number = self._attended(facts, target), self.streams, facts.index
        new, record = layer.found
        with self.ends.of(number), self.alone:
            self.fits[number] = new.tensors(), record
            if not layer.known:
                self.found(number, *self.fits[number])
            with streams.layer(number), streams.output(number, new.o.flatten(1)):
                for place, state in self.before.pop(number).items():
                    streams.converted[place] = state
                    given = layer.work.heads(new, place)
                    streams.converted_step(number, place, lambda _, given=given: given)
            del layer  # the rest needs memory for log-probabilities
            return sum(self._lost(number, place, whole) for place, whole in zip(self.places, self.whole, strict=True))

    def _lost(self, number: int, place: int, whole: torch.Tensor) -> float:
        """KL to the base where the layers behind this one, as they are, go on from the converted state."""
        block = self.streams.run.blocks[: number + 1]
        state = self.streams.converted[place].to(self.model.dtype)
        with replayed(block, dict.fromkeys(block, state)):
            return kl(whole, self._log_probabilities(place)) / len(self.places)

    def _log_probabilities(self, place: int) -> torch.Tensor:
        """Of the next token in a text [T, vocabulary], in float32."""
        ids = self.sequences[place][None].to(self.model.device)
        return self.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
