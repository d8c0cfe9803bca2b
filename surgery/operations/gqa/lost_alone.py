"""What the model loses when one layer alone has fewer KV heads, by which their number in each layer is chosen.

Every layer whose number is open is fitted to the base's inputs (`layer.Sharing`). Then a few texts go through the base
with only this layer converted. They are validation texts, which have also chosen the layer's ridges and are part of
the last fit of W_O. The losses of single layers add up well enough to compare layers: of all choices with the wanted
number of heads, the one with the least sum is taken (`heads_by_layer.choose_heads`). MLPs are not refitted here.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from surgery.calibration.attention_hook import hook_attention
from surgery.calibration.closed_form.cost import TRIED
from surgery.calibration.closed_form.layerwise_fit import LayerProgress
from surgery.calibration.layerwise import kl, replayed
from surgery.data.text import is_validation
from surgery.operations.gqa.layer import Sharing


def validation_samples(count: int) -> list[int]:
    """Indices of at most TRIED validation texts among `count`, evenly spaced to include every kind of text."""
    validation = [index for index in range(count) if is_validation(index, count)]
    tried = min(TRIED, len(validation))
    return [validation[step * len(validation) // tried] for step in range(tried)]


class LayerLosses(Sharing):
    """The conversion of each layer alone.

    Attributes:
        fits: layer index -> tensors of the layer's new attention, and a record.
    """

    def __init__(self, model, targets, sequences, settings, load_layer=None, save_layer=None):
        super().__init__(model, targets, sequences, replace(settings, sequential=False), load_layer, save_layer)
        self.fits: dict[int, tuple[dict, dict]] = {}
        self.exclusive = threading.Lock()  # one layer at a time runs through the whole model

    def measure(self, progress=None) -> list[float | None]:
        """KL to the base in nats per token, for each layer, when only this layer has its planned KV heads; None for a
        layer that keeps its own.
        """
        with hook_attention(self.model, self.states.attention) as hook, torch.no_grad():
            self._begin(hook)
            self.tried_samples = validation_samples(len(self.sequences))
            self.base_logps = [self._log_probabilities(index) for index in self.tried_samples]
            self.base_states: dict[int, dict[int, torch.Tensor]] = {}
            return self._map_layers(self._layer_loss, "trying layers alone", progress)

    def _run_base(self, anatomy, target) -> LayerProgress:
        if self.changes(anatomy, target):
            self.base_states[anatomy.index] = {index: self.states.base[index] for index in self.tried_samples}
        return super()._run_base(anatomy, target)

    def _layer_loss(self, anatomy, target) -> float | None:
        """The loss of one layer, in nats per token; None if it keeps its KV heads."""
        progress, states, layer_index = self._convert_attention(anatomy, target), self.states, anatomy.index
        new, record = progress.result
        if progress.conversion is None:
            with self.converted_order.of(layer_index):  # the next layer waits for it
                return None
        with self.converted_order.of(layer_index), self.exclusive:
            self.fits[layer_index] = new.tensors(), record
            if not progress.finished:
                self.save_layer(layer_index, *self.fits[layer_index])
            with states.layer(layer_index), states.output(layer_index, new.o.flatten(1)):
                for index, state in self.base_states.pop(layer_index).items():
                    states.converted[index] = state
                    heads = progress.conversion.head_outputs(new, index)
                    states.converted_step(layer_index, index, lambda _, heads=heads: heads)
            del progress  # log-probabilities need its memory
            return sum(
                self._kl_to_base(layer_index, index, base_logps)
                for index, base_logps in zip(self.tried_samples, self.base_logps, strict=True)
            )

    def _kl_to_base(self, layer_index: int, index: int, base_logps: torch.Tensor) -> float:
        """KL to the base when the unchanged later layers continue from the converted state of this layer."""
        blocks = self.states.run.blocks[: layer_index + 1]
        state = self.states.converted[index].to(self.model.dtype)
        with replayed(blocks, dict.fromkeys(blocks, state)):
            return kl(base_logps, self._log_probabilities(index)) / len(self.tried_samples)

    def _log_probabilities(self, index: int) -> torch.Tensor:
        """Log-probabilities of the next token in one text [T, vocabulary], in float32."""
        ids = self.sequences[index][None].to(self.model.device)
        return self.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
