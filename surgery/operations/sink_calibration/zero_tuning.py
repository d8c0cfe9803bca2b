"""Measurements of the first token of a text in attention, and the search of a better weight for it.

`first_tokens` measures the first token's keys, values and scores, so that virtual keys can replace it. `search_gammas`
searches the weight of the first token in each head. `Trial` compares a setting with the unchanged model on held-out
text, or on held-out questions with known answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from surgery.calibration.attention_hook import hook_attention
from surgery.calibration.gradients import with_gradients
from surgery.io.resume import SavedFigures
from surgery.machine.placement import exact
from surgery.machine.progress import begin
from surgery.runtime.modeling_surgery import attention_modules
from surgery.runtime.surgery_attention import surgery_attention
from surgery.runtime.surgery_bias import scores
from surgery.runtime.surgery_cache import CACHE
from surgery.runtime.surgery_config import depends_on_prompt

LABELLED = "labelled"  # name of the objective for questions
GRID = (1.1, 1.25, 1.5, 2.0)  # values of gamma; each 1 / gamma is tried, too


@dataclass
class FirstToken:
    """The first token in one layer; all figures are means over texts.

    Attributes:
        key, value: [KV heads, head_dim] of the first token; the key is that at position 0, after norms and RoPE.
        score: [heads], the scaled and soft-capped score of this key for the queries that see it, from position `reach`
            on.
    """

    key: torch.Tensor
    value: torch.Tensor
    score: torch.Tensor


def first_tokens(model, samples: torch.Tensor, reach: list[int], progress=None) -> list[FirstToken]:
    """Measure the first token in every layer of a model, with all heads full.

    Args:
        model: in memory; it is not changed.
        samples: long [texts, length].
        reach: for each layer, the first position whose query counts; less than the length.
        progress: called with done, total and a label.
    """

    def attention(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        layer = module.layer_idx
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = slice(reach[layer], hook.windows[layer])  # no query after the base's own window sees it
        first = scores(query[:, :, rows], key[:, :, :1], scale, softcap, torch.float32)
        measured = key[0, :, 0], value[0, :, 0], first.mean(dim=(0, 2, 3))
        sums[layer] = [old + exact(new) for old, new in zip(sums[layer], measured, strict=True)]
        return surgery_attention(module, query, key, value, mask, scaling=scaling, softcap=softcap, **kwargs)

    sums = [[0.0, 0.0, 0.0] for _ in reach]
    with hook_attention(model, attention, split=True) as hook, torch.no_grad():
        begin(progress, "measuring first tokens", len(samples))
        for index, sample in enumerate(samples):
            model.base_model(input_ids=sample[None].to(model.device), use_cache=False)
            if progress:
                progress(index + 1, len(samples), "measuring first tokens")
    return [FirstToken(*(total / len(samples) for total in layer)) for layer in sums]


def objective(model, sample, kind: str) -> torch.Tensor:
    """The number to minimise, in nats, on one text, long [length], or on one question.

    It is the cross-entropy per token of the text ("ce"), the mean entropy of the predictions ("entropy"), or -log of
    the right choice's share (LABELLED; see `calibration.scoring.choice_loss`).

    Where a model's answers depend on where the prompt ends (ACT's map), the first half of a text is the prompt, and
    the predictions are those of the second half, through the cache. The prompt's own tokens cannot be judged: what it
    says after one of them has already seen the next.
    """
    by_prompt = depends_on_prompt(model.config)
    if kind == LABELLED:
        from surgery.calibration.scoring import choice_logps, choice_loss

        return choice_loss(choice_logps(model, [sample], cached=by_prompt)[0], sample.answer)
    ids = sample[None].to(model.device)
    if by_prompt:
        logits, targets = continued(model, ids, ids.shape[1] // 2)
    else:
        logits, targets = model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:]
    logp = logits.float().log_softmax(-1)
    if kind == "ce":
        return -logp.gather(-1, targets[:, None]).mean()
    return -(logp.exp() * logp).sum(-1).mean()


def continued(model, ids: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits [n, vocabulary] that predict the tokens of a text [1, length] from `first` on, and these tokens."""
    prompted = model(input_ids=ids[:, :first], use_cache=True)
    rest = model(input_ids=ids[:, first:-1], use_cache=True, **{CACHE: prompted[CACHE]}).logits[0]
    return torch.cat([prompted.logits[0, -1:], rest]), ids[0, first:]


@dataclass
class Trial:
    """Compares settings of some parameters of a model on text or on questions.

    Attributes:
        parameters: the parameters to set. Their values at the start of the trial are the setting that changes nothing.
        fit, validation: data for the search and for the final comparison; long [texts, length], or lists of `Choice`.
        kind: see `objective`.
        figures: results of an earlier run, which are not measured again.
    """

    model: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    fit: torch.Tensor | list
    validation: torch.Tensor | list
    kind: str = "ce"
    figures: SavedFigures = field(default_factory=SavedFigures)

    def __post_init__(self):
        self.nothing = [parameter.detach().clone() for parameter in self.parameters]

    def set(self, values: list[torch.Tensor]) -> None:
        """Copy the values into the parameters."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def judge(self, samples) -> tuple[list[float], float | None]:
        """The objective on each text or question with the current parameters; for questions also the accuracy."""
        with torch.no_grad():
            if self.kind != LABELLED:
                return [objective(self.model, sample, self.kind).item() for sample in samples], None
            from surgery.calibration.scoring import ask

            answers = ask(self.model, samples)
            return [answer.nll for answer in answers], sum(answer.right for answer in answers) / len(answers)

    def measure(self, name: str, values: list[torch.Tensor], samples) -> tuple[torch.Tensor, float | None]:
        """The result of `judge` for a setting, with the objective in float64; each name is measured only once."""

        def judged() -> list:
            self.set(values)
            return list(self.judge(samples))

        losses, right = self.figures.once(name, judged)
        return torch.tensor(losses, dtype=torch.float64), right

    def settle(self, values: list[torch.Tensor]) -> dict:
        """Keep a setting if it is better on `validation` than no change, by over two standard errors; once per trial.

        It is the standard error of the mean change over different texts (or questions): copies would make it look
        small. A single text has no standard error, so nothing is kept.

        Returns:
            A record: the objective without the setting, its change, and whether the setting was kept.
        """
        before, right_before = self.measure("held back, nothing", self.nothing, self.validation)
        after, right_after = self.measure("held back, the best", values, self.validation)
        distinct = different(self.validation)
        before, change = before[distinct], (after - before)[distinct]
        error = change.std().item() / math.sqrt(len(distinct)) if len(distinct) > 1 else math.inf
        kept = bool(change.mean() < -2 * error)
        self.set(values if kept else self.nothing)
        record = {"kept": kept, "objective": self.kind, "held_back_before": before.mean().item()}
        record |= {"held_back_change": change.mean().item(), "standard_error": error if len(distinct) > 1 else None}
        record |= {
            "kept_if": "lower by more than two standard errors of the change, over what differs of the held back"
        }
        if right_before is None:
            return record | {"texts": len(change)}
        accuracy = {"held_back_accuracy_before": right_before, "held_back_accuracy_after": right_after}
        return record | accuracy | {"questions": len(change)}


def different(samples) -> list[int]:
    """Indices of the texts or questions that are not copies of an earlier one."""
    first_index: dict[str, int] = {}
    for index, sample in enumerate(samples):
        first_index.setdefault(repr(sample.tolist() if isinstance(sample, torch.Tensor) else sample), index)
    return list(first_index.values())


def search_gammas(
    trial: Trial, masks: list[torch.Tensor], grid: list[float] | None, groups: str, progress=None
) -> dict:
    """Search gamma for the first token on the trial's `fit`. Keep the best if it helps on the trial's `validation`.

    Args:
        trial: its parameters are log gamma [heads] of some layers.
        masks: for each parameter, float [heads]: 1.0 for heads that may change, 0.0 for others.
        grid: values of gamma to try, in addition to 1. None: the values of `GRID` and their inverses.
        groups: "uniform" (one gamma), "layers" (one for each layer, one layer after the other), or "heads". For
            "heads", the gradient of the objective at gamma = 1 says which heads should give the first token more
            weight and which less. The first get gamma, the others 1 / gamma; each side is tried alone, and both
            together.

    Returns:
        A record: every setting that was tried, and the record of `Trial.settle`.
    """
    if grid is None:
        grid = [*GRID] if groups == "heads" else [*(1 / gamma for gamma in reversed(GRID)), *GRID]
    if groups == "layers":
        steps = [[[mask * (i == layer) for i, mask in enumerate(masks)]] for layer in range(len(masks))]
    elif groups == "uniform":
        steps = [[masks]]
    else:
        slopes_by_layer = trial.figures.once("slopes", lambda: [slope.tolist() for slope in gradients(trial)])
        slopes = [torch.tensor(slope).to(mask) * mask for slope, mask in zip(slopes_by_layer, masks, strict=True)]
        sides = [[(side * slope < 0).float() * side for slope in slopes] for side in (1, -1)]
        steps = [[*sides, [up + down for up, down in zip(*sides, strict=True)]]]
        grid = sorted({max(gamma, 1 / gamma) for gamma in grid})
    best, lowest = trial.nothing, trial.measure("gamma 1", trial.nothing, trial.fit)[0].mean().item()
    tried, total = [{"gamma": 1.0, "fit": lowest}], sum(map(len, steps)) * len(grid)
    for step, directions in enumerate(steps):
        start = best
        for side, direction in zip(("more", "less", "both"), directions, strict=False):
            for gamma in grid:
                setting = [b + math.log(gamma) * d.to(b) for b, d in zip(start, direction, strict=True)]
                fit = trial.measure(f"step {step}, {side}, gamma {gamma!r}", setting, trial.fit)[0].mean().item()
                tried.append({"step": step, "side": side, "gamma": gamma, "fit": fit})
                if groups != "heads":
                    del tried[-1]["side"]
                if fit < lowest:
                    best, lowest = setting, fit
                if progress:
                    progress(len(tried) - 1, total, f"trying gammas: best {lowest:.4f}")
    if best is trial.nothing:
        trial.set(trial.nothing)
        return {"tried": tried, "kept": False, "objective": trial.kind}
    return {"tried": tried} | trial.settle(best)


def gradients(trial: Trial) -> list[torch.Tensor]:
    """Gradient of the objective by each parameter, summed over the texts of `fit`; 0 if no text depends on it."""
    total = [torch.zeros_like(parameter) for parameter in trial.parameters]
    for sample in trial.fit:
        with with_gradients():
            loss = objective(trial.model, sample, trial.kind)
        if not loss.requires_grad:  # no parameter changes anything in this text, for example because it has no sink
            continue
        slopes = torch.autograd.grad(loss, trial.parameters, materialize_grads=True)
        total = [old + new for old, new in zip(total, slopes, strict=True)]
    return total


@contextmanager
def frozen(model, but: list[torch.nn.Parameter]) -> Iterator[None]:
    """Keep the model in eval mode, with gradients only for the parameters `but`; then restore it."""
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
    parameters = {module.layer_idx: getattr(module, name, None) for module in attention_modules(model)}
    return {layer: parameter for layer, parameter in parameters.items() if parameter is not None}


def search_gamma(model, settings, targets: dict[int, list[int]], samples, context) -> dict:
    """Set gamma in the query heads `targets` (by layer) to the given value, or search it.

    Args:
        model: surgical, with `surgery_log_gamma` in the layers of `targets`.
        settings: a `SinkCalibration` of method zero_tuning.
        samples: long [texts, length], or a list of `Choice`; not read if gamma is given.
        context: the operation's context.

    Returns:
        A record: the gammas of all query heads, and how they were searched.
    """
    log_gammas = parameters_of(model, "surgery_log_gamma")
    masks = {layer: torch.zeros(len(log_gammas[layer])) for layer in targets}
    for layer, heads in targets.items():
        masks[layer][heads] = 1.0
    record = {}
    if settings.gamma is not None:
        with torch.no_grad():
            for layer, mask in masks.items():
                log_gammas[layer].copy_(mask.to(log_gammas[layer]) * math.log(settings.gamma))
    else:
        parameters = [log_gammas[layer] for layer in targets]
        kind, texts = (LABELLED, samples) if settings.labelled else (settings.objective, samples.tolist())
        state = SavedFigures(
            context.state_file("sink-calibration"), [kind, settings.groups, settings.grid, targets, texts]
        )
        trial = Trial(model, parameters, samples[::2], samples[1::2], kind, state)
        with frozen(model, parameters):
            record = search_gammas(trial, list(masks.values()), settings.grid, settings.groups, context.progress)
    gammas = {
        str(layer): {
            str(context.before.layers[layer].query_name(head)): round(x, 6)
            for head, x in enumerate(log_gammas[layer].detach().exp().tolist())
        }
        for layer in targets
    }
    return {"method": settings.method, **record, "gamma": gammas}
