"""What the first token of a text is to attention, and what changing its weight does to a model's predictions.

`first_tokens` measures its keys, values and scores, so that virtual keys can take its place. `search_gammas` looks for
the weight that the first token should have in each head; `Trial` compares a setting with none on text, or on questions
with known answers, that were held back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from surgery.calibration.attention_hook import hook_attention
from surgery.io.resume import Found
from surgery.runtime.modeling_surgery import attention_modules
from surgery.runtime.surgery_attention import surgery_attention
from surgery.runtime.surgery_bias import scores

LABELLED = "labelled"  # the objective of questions
GRID = (1.1, 1.25, 1.5, 2.0)  # each 1 / gamma is tried, too


@dataclass
class FirstToken:
    """Of one layer, mean over texts.

    Attributes:
        key, value: [KV heads, head_dim] of the first token; the key as attention gets it, at position 0.
        score: [heads], scaled and capped, of the queries with it that are at positions from `reach` on, and see it.
    """

    key: torch.Tensor
    value: torch.Tensor
    score: torch.Tensor


def first_tokens(model, pieces: torch.Tensor, reach: list[int], progress=None) -> list[FirstToken]:
    """Measure the first token in every layer of a model, all of its heads full.

    Args:
        model: in memory; it is left as it was.
        pieces: long [texts, length].
        reach: of each layer, the first position whose queries count; less than the length.
    """

    def attention(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        layer = module.layer_idx
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        counted = slice(reach[layer], seen.windows[layer])  # behind the base's own window nobody saw it
        first = scores(query[:, :, counted], key[:, :, :1], scale, softcap, torch.float32)
        found = key[0, :, 0], value[0, :, 0], first.mean(dim=(0, 2, 3))
        sums[layer] = [old + new.double() for old, new in zip(sums[layer], found, strict=True)]
        return surgery_attention(module, query, key, value, mask, scaling=scaling, softcap=softcap, **kwargs)

    sums = [[0.0, 0.0, 0.0] for _ in reach]
    with hook_attention(model, attention, split=True) as seen, torch.no_grad():
        for number, piece in enumerate(pieces):
            model.base_model(input_ids=piece[None].to(model.device), use_cache=False)
            if progress:
                progress(number + 1, len(pieces), "first tokens")
    return [FirstToken(*(total / len(pieces) for total in layer)) for layer in sums]


def objective(model, piece, kind: str) -> torch.Tensor:
    """What is lowered, on one text [length] or one question, in nats.

    Cross-entropy per token of the text ("ce"), or the entropy of the predictions ("entropy"); or -log of the right
    choice's share (LABELLED; see `evaluation.choosing.choice_loss`).
    """
    if kind == LABELLED:
        from surgery.calibration.scoring import choice_logps, choice_loss

        return choice_loss(choice_logps(model, [piece], cached=False)[0], piece.answer)
    ids = piece[None].to(model.device)
    logp = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    if kind == "ce":
        return -logp.gather(-1, ids[0, 1:, None]).mean()
    return -(logp.exp() * logp).sum(-1).mean()


@dataclass
class Trial:
    """Settings of some parameters of a model, compared on text or on questions.

    Attributes:
        parameters: what is set; what they hold when the trial begins is the setting that changes nothing.
        fit, held: long [texts, length], or lists of `Choice`, to search on, and to judge on.
        kind: see `objective`.
        found: what was measured before and need not be again.
    """

    model: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    fit: torch.Tensor | list
    held: torch.Tensor | list
    kind: str = "ce"
    found: Found = field(default_factory=Found)

    def __post_init__(self):
        self.nothing = [parameter.detach().clone() for parameter in self.parameters]

    def set(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def judge(self, pieces) -> tuple[list[float], float | None]:
        """The objective of each text or question as the parameters are; of questions the share of right ones too."""
        with torch.no_grad():
            if self.kind != LABELLED:
                return [objective(self.model, piece, self.kind).item() for piece in pieces], None
            from surgery.calibration.scoring import ask

            told = ask(self.model, pieces)
            return [each.nll for each in told], sum(each.right for each in told) / len(told)

    def measure(self, name: str, values: list[torch.Tensor], pieces) -> tuple[torch.Tensor, float | None]:
        """What `judge` says of a setting, the objective in float64; measured once under this name."""

        def measured() -> list:
            self.set(values)
            return list(self.judge(pieces))

        losses, right = self.found.once(name, measured)
        return torch.tensor(losses, dtype=torch.float64), right

    def settle(self, values: list[torch.Tensor]) -> dict:
        """Keep a setting if it is better than none on what is held back by over two standard errors; once in a trial.

        The error is of the mean change over texts (or questions) that differ: copies would make it look small, and
        a single one has none, so that nothing is kept.

        Returns:
            A record: the objective with none and with it, and whether it was kept.
        """
        before, right_before = self.measure("held back, nothing", self.nothing, self.held)
        after, right_after = self.measure("held back, the best", values, self.held)
        own = different(self.held)
        before, change = before[own], (after - before)[own]
        error = change.std().item() / math.sqrt(len(own)) if len(own) > 1 else math.inf
        kept = bool(change.mean() < -2 * error)
        self.set(values if kept else self.nothing)
        facts = {"kept": kept, "objective": self.kind, "held_back_before": before.mean().item()}
        facts |= {"held_back_change": change.mean().item(), "standard_error": error if len(own) > 1 else None}
        facts |= {
            "kept_if": "lower by more than two standard errors of the change, over what differs of the held back"
        }
        if right_before is None:
            return facts | {"texts": len(change)}
        accuracy = {"held_back_accuracy_before": right_before, "held_back_accuracy_after": right_after}
        return facts | accuracy | {"questions": len(change)}


def different(pieces) -> list[int]:
    """The places of texts or questions of which none before is a copy."""
    seen: dict[str, int] = {}
    for place, piece in enumerate(pieces):
        seen.setdefault(repr(piece.tolist() if isinstance(piece, torch.Tensor) else piece), place)
    return list(seen.values())


def search_gammas(
    trial: Trial, masks: list[torch.Tensor], grid: list[float] | None, groups: str, progress=None
) -> dict:
    """Search gamma for the first token on the trial's `fit`, then keep what is better than nothing on its `held`.

    Args:
        trial: its parameters are log gamma [heads] of some layers.
        masks: for each parameter, 1.0 for the heads that may change, else 0.0; float [heads].
        grid: values of gamma to try; 1 is always among them. None: those of `GRID`, and 1 / gamma.
        groups: "uniform" (one gamma), "layers" (one for each layer, one layer after the other), or "heads": the
            gradient of the objective at gamma = 1 tells which heads should have more of the first token and which
            less; the first get gamma and the others 1 / gamma, all together or one side alone.

    Returns:
        A record: every trial, and what `Trial.settle` says.
    """
    if grid is None:
        grid = [*GRID] if groups == "heads" else [*(1 / gamma for gamma in reversed(GRID)), *GRID]
    if groups == "layers":
        steps = [[[mask * (i == layer) for i, mask in enumerate(masks)]] for layer in range(len(masks))]
    elif groups == "uniform":
        steps = [[masks]]
    else:
        found = trial.found.once("slopes", lambda: [slope.tolist() for slope in gradients(trial)])
        slopes = [torch.tensor(slope).to(mask) * mask for slope, mask in zip(found, masks, strict=True)]
        sides = [[(side * slope < 0).float() * side for slope in slopes] for side in (1, -1)]
        steps = [[*sides, [up + down for up, down in zip(*sides, strict=True)]]]
        grid = sorted({max(gamma, 1 / gamma) for gamma in grid})
    best, lowest = trial.nothing, trial.measure("gamma 1", trial.nothing, trial.fit)[0].mean().item()
    tried, total = [{"gamma": 1.0, "fit": lowest}], sum(map(len, steps)) * len(grid)
    for number, directions in enumerate(steps):
        start = best
        for side, direction in zip(("more", "less", "both"), directions, strict=False):
            for gamma in grid:
                setting = [b + math.log(gamma) * d.to(b) for b, d in zip(start, direction, strict=True)]
                fit = trial.measure(f"step {number}, {side}, gamma {gamma!r}", setting, trial.fit)[0].mean().item()
                tried.append({"step": number, "side": side, "gamma": gamma, "fit": fit})
                if groups != "heads":
                    del tried[-1]["side"]
                if fit < lowest:
                    best, lowest = setting, fit
                if progress:
                    progress(len(tried) - 1, total, f"gammas: best {lowest:.4f}")
    if best is trial.nothing:
        trial.set(trial.nothing)
        return {"tried": tried, "kept": False, "objective": trial.kind}
    return {"tried": tried} | trial.settle(best)


def gradients(trial: Trial) -> list[torch.Tensor]:
    """Gradient of the objective by each parameter, summed over the texts of `fit`."""
    total = [torch.zeros_like(parameter) for parameter in trial.parameters]
    for piece in trial.fit:
        loss = objective(trial.model, piece, trial.kind)
        found = torch.autograd.grad(loss, trial.parameters, materialize_grads=True)  # 0: of nothing in this text
        total = [old + new for old, new in zip(total, found, strict=True)]
    return total


@contextmanager
def frozen(model, but: list[torch.nn.Parameter]) -> Iterator[None]:
    """The model in eval mode, with gradients for the parameters `but` alone; then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in needed:
            parameter.requires_grad_(False)
        for parameter in but:
            parameter.requires_grad_(True)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, grad in needed:
            parameter.requires_grad_(grad)


def parameters_of(model, name: str) -> dict[int, torch.nn.Parameter]:
    """The parameter of this name of every attention module that has it, by layer."""
    found = {module.layer_idx: getattr(module, name, None) for module in attention_modules(model)}
    return {layer: parameter for layer, parameter in found.items() if parameter is not None}


def search_gamma(model, asked, targets: dict[int, list[int]], pieces, context) -> dict:
    """Set gamma in the query heads `targets` (by layer) as a `SinkCalibration` asks, or search it; a record."""
    found = parameters_of(model, "surgery_log_gamma")
    masks = {layer: torch.zeros(len(found[layer])) for layer in targets}
    for layer, heads in targets.items():
        masks[layer][heads] = 1.0
    record = {}
    if asked.gamma is not None:
        with torch.no_grad():
            for layer, mask in masks.items():
                found[layer].copy_(mask.to(found[layer]) * math.log(asked.gamma))
    else:
        parameters = [found[layer] for layer in targets]
        aim, told = (LABELLED, pieces) if asked.labelled else (asked.objective, pieces.tolist())
        state = Found(context.state_file("sink-calibration"), [aim, asked.groups, asked.grid, targets, told])
        trial = Trial(model, parameters, pieces[::2], pieces[1::2], aim, state)
        with frozen(model, parameters):
            record = search_gammas(trial, list(masks.values()), asked.grid, asked.groups, context.progress)
    gammas = {
        str(layer): {
            str(context.before.layers[layer].query_name(head)): round(x, 6)
            for head, x in enumerate(found[layer].detach().exp().tolist())
        }
        for layer in targets
    }
    return {"method": asked.method, **record, "gamma": gammas}
