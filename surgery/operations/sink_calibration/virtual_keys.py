"""Virtual keys that replace a first token that a head no longer sees. They are measured with all heads full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgery.operations.sink_calibration.zero_tuning import Trial, first_tokens, frozen, parameters_of

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy


def fit_virtual_keys(model, anatomy: Anatomy, targets: dict[int, list[int]], samples, progress=None) -> dict:
    """Give heads the mean first token of half of the texts as a virtual key. Keep it if it helps on the other half.

    Args:
        model: surgical, with `surgery_sink_logit` in the layers of `targets`. With `surgery_key`, the logit is added
            to the key's score and is 0; without it, the logit is the mean score. With `surgery_value`, the virtual
            key has the mean value.
        anatomy: the model's anatomy.
        targets: layer -> query heads.
        samples: long [texts, length]; texts must be longer than the heads' windows.

    Returns:
        The record of `Trial.settle`.
    """
    names = ("surgery_sink_logit", "surgery_key", "surgery_value")
    logits, keys, values = (parameters_of(model, name) for name in names)
    reach = [layer.streaming_window if layer.index in targets else 0 for layer in anatomy.layers]
    measured = first_tokens(model, samples[::2], reach, progress)
    every = [table[layer] for layer in targets for table in (logits, keys, values) if layer in table]
    settings = []
    trial = Trial(model, every, samples[::2], samples[1::2])
    for layer, heads in targets.items():
        logit = logits[layer].detach().clone()
        logit[heads, 0] = 0.0 if layer in keys else measured[layer].score[heads].to(logit)
        settings.append(logit)
        settings += [measured[layer].key[:, None]] if layer in keys else []
        settings += [measured[layer].value[:, None]] if layer in values else []
    with frozen(model, []):
        return trial.settle(settings)


def set_logit(model, targets: dict[int, list[int]], logit: float) -> None:
    """Set the logit of the virtual keys of these heads."""
    logits = parameters_of(model, "surgery_sink_logit")
    with torch.no_grad():
        for layer, heads in targets.items():
            logits[layer][heads] = logit
