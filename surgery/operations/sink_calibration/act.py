"""ACT (Yu et al. 2024, arXiv 2406.15765): find the sinks of each head, and the heads that gain from weaker sinks.

ACT finds a head's sinks in its attention map of a prompt: a token is a sink if its column mean is above alpha / N.
With `find: map` the runtime does that in every prompt, and only the heads are chosen here. With `find: probe` the rule
is learned here: each head gets a linear probe on a token's own value. The probe is fitted by least squares to the
answers of the rule, and its threshold has the best F1. It judges a token by itself, whatever comes after it. But it
holds alpha / N for the N of the calibration's texts, and does not scale with the length of a prompt.

On held-out texts with SmolLM2-135M (512 tokens, alpha 5), the probes have a recall of 60% and a precision of 64%,
counted in sinks: near the threshold, probe and rule often differ. Counted in attention on the sinks, the recall is 87%
and the precision is 96%.

Heads are chosen by the slope of an objective at beta = 1 (`choose_heads`), or as in the paper: each head alone, on
questions with known answers (`choose_each`). The paper keeps what gains on its samples. Here half of the data is held
back, and the whole choice is kept only if it is better there (`Trial.settle`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from surgery.calibration.attention_hook import hook_attention
from surgery.calibration.sinks import other_sinks, received
from surgery.io.resume import SavedFigures
from surgery.machine.placement import exact
from surgery.machine.progress import begin
from surgery.operations.sink_calibration.zero_tuning import LABELLED, Trial, frozen, gradients, parameters_of
from surgery.runtime.modeling_surgery import attach, attention_modules
from surgery.runtime.surgery_act import PART, probe_features, probe_scores
from surgery.runtime.surgery_attention import surgery_attention

RIDGE = 1e-4  # relative to the mean square of the features
SHARES = (1.0, 0.5, 0.25, 0.125)  # shares to try of the heads whose slope says that less weight on sinks helps


def calibrate_sinks(model, settings, targets: dict[int, list[int]], data, context) -> dict:
    """Fit the probes, if there are any, and choose the heads whose sinks weigh beta, on half of the data.

    The choice is kept if it helps on the other half.

    Args:
        model: surgical, with the parameters in the layers of `targets`, at identity.
        settings: a `SinkCalibration` of method act.
        targets: layer -> query heads that may change.
        data: an `ActData`.
        context: the operation's context.

    Returns:
        A record: the agreement of the probes with ACT's rule on the held-out texts, the settings that were tried, the
        record of `Trial.settle`, and the heads that got beta, by layer.
    """
    betas, record = parameters_of(model, "surgery_log_beta"), {}
    if settings.find == "probe":
        train, validation, alpha = data.texts[::2], data.texts[1::2], settings.threshold
        probes = {layer: parameters_of(model, "surgery_sink_probe")[layer] for layer in targets}
        set_probes(model, probes, train, alpha, context.progress)
        record["agreement"] = agreement(model, probes, validation, alpha, context.progress)
    kind, items = (LABELLED, data.questions) if settings.labelled else (settings.objective, data.texts)
    own = [getattr(settings, name) for name in ("find", "trials", "beta", "threshold")]
    read = [None if data.texts is None else data.texts.tolist(), data.questions]
    state = SavedFigures(context.state_file("sink-calibration"), [kind, own, targets, *read])
    parameters = [betas[layer] for layer in targets]
    with frozen(model, parameters):
        trial = Trial(model, parameters, items[::2], items[1::2], kind, state)
        choose = choose_each if settings.trials == "each" else choose_heads
        record |= choose(trial, targets, settings.beta, context.progress)
    chosen = {layer: (betas[layer] < 0).nonzero()[:, 0].tolist() for layer in targets}
    if settings.find == "map":
        leave_unchanged(model, [layer for layer, heads in chosen.items() if not heads])
    return record | {"heads": {str(layer): heads for layer, heads in chosen.items() if heads}}


def leave_unchanged(model, layers: list[int]) -> None:
    """Take ACT out of layers in which no head has beta. A model in which no head has one depends on no prompt."""
    entries, modules = model.config.surgery["layers"], attention_modules(model)
    for layer in layers:
        parameters = entries[layer]["parameters"]
        for name in PART.parameters.keys() & parameters:
            delattr(modules[layer], name)
        left = {name: shape for name, shape in parameters.items() if name not in PART.parameters}
        kept = {key: value for key, value in entries[layer].items() if key not in ("parameters", *PART.keys)}
        entries[layer] = kept | ({"parameters": left} if left else {})
    attach(model)


def set_probes(model, probes: dict[int, torch.Tensor], samples, alpha: float, progress=None) -> None:
    """Fit the probes [heads, features] of some layers to ACT's rule, with two forward passes per text."""
    grams: dict[int, torch.Tensor] = {}
    moments: dict[int, torch.Tensor] = {}

    def learn(layer: int, value, total, marked, judged) -> None:
        x = probe_features(exact(value[0, :, judged]))  # [KV heads, judged, features]
        y = exact(marked[:, judged]).reshape(len(x), -1, x.shape[1])
        grams[layer] = grams.get(layer, 0) + x.mT @ x
        moments[layer] = moments.get(layer, 0) + y @ x

    _each_call(model, probes, samples, alpha, learn, progress, "fitting probes")
    for layer, gram in grams.items():
        damping = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram + damping[:, None, None] * eye, moments[layer].mT).mT
        with torch.no_grad():
            probes[layer].copy_(weights.flatten(0, 1))
    scores_and_marks: dict[int, list] = {layer: [] for layer in probes}

    def record_scores(layer: int, value, total, marked, judged) -> None:
        scores_and_marks[layer].append(
            (probe_scores(value, probes[layer])[0, :, judged].to(marked.device), marked[:, judged])
        )

    _each_call(model, probes, samples, alpha, record_scores, progress, "setting thresholds")
    with torch.no_grad():
        for layer, recorded in scores_and_marks.items():
            scores, marked = (torch.cat(each, dim=1) for each in zip(*recorded, strict=True))
            cuts = torch.stack([best_cut(z, y) for z, y in zip(scores, marked, strict=True)])
            without_sinks = ~marked.any(dim=1)
            probes[layer][:, -1] -= cuts.to(probes[layer])
            probes[layer][without_sinks] = 0.0


def best_cut(scores: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """The threshold on scores [n] with the best F1 for the keys that are marked as sinks, bool [n]."""
    order = scores.argsort(descending=True)
    hits = marked[order].cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(scores) + 1, device=scores.device) + hits[-1])
    best = int(f1.argmax())
    below = scores[order[min(best + 1, len(scores) - 1)]]
    return (scores[order[best]] + below) / 2


def agreement(model, probes: dict[int, torch.Tensor], samples, alpha: float, progress=None) -> dict:
    """Precision and recall of the probes against ACT's rule, over all heads of these layers and judged keys.

    Returns:
        Precision and recall, each by the number of sinks and by the attention on them (`mass_`); and the number of
        sinks that the rule finds (`sinks`) and that the probes find (`found`).
    """
    sums = torch.zeros(2, 3, dtype=torch.float64)

    def count(layer: int, value, total, marked, judged) -> None:
        predicted = (probe_scores(value, probes[layer])[0, :, judged] > 0).to(marked.device)
        marked, total = marked[:, judged], total[:, judged]
        for column, chosen in enumerate((predicted & marked, predicted, marked)):
            sums[:, column] += torch.stack([chosen.sum().cpu(), total[chosen].sum().cpu()])

    _each_call(model, probes, samples, alpha, count, progress, "judging probes")
    record = {}
    for name, (both, predicted, marked) in zip(("", "mass_"), sums.tolist(), strict=True):
        record |= {
            f"{name}precision": both / predicted if predicted else 0.0,
            f"{name}recall": both / marked if marked else 0.0,
        }
    return record | {"sinks": int(sums[0, 2]), "found": int(sums[0, 1])}


def _each_call(model, layers, samples, alpha: float, visit: Callable, progress, label: str) -> None:
    """Run texts with all heads full, and call `visit(layer, value, total, marked, judged)` for each text and layer.

    `value` is [1, KV heads, n, head_dim]. `total` [heads, n] is the attention that each key receives. `marked`, bool
    [heads, n], says which keys are sinks by ACT's rule. `judged`, bool [n], says which keys the rule judges.
    """

    def attention(module, query, key, value, mask, **kwargs):
        layer = module.layer_idx
        if layer in layers:
            total, _ = received(hook, module, query, key, **kwargs)
            visit(layer, value, total, *other_sinks(total, hook.windows[layer], alpha))
        return surgery_attention(module, query, key, value, mask, **kwargs)

    with hook_attention(model, attention, split=True) as hook, torch.no_grad():
        begin(progress, label, len(samples))
        for index, sample in enumerate(samples):
            model.base_model(input_ids=sample[None].to(model.device), use_cache=False)
            if progress:
                progress(index + 1, len(samples), label)


def choose_heads(trial: Trial, targets: dict[int, list[int]], beta: float, progress=None) -> dict:
    """Give beta to the heads that gain most according to their slope. How many is chosen on the trial's `fit`.

    The choice is kept if it is better on the trial's `validation` (see `Trial.settle`).

    Args:
        trial: its parameters are log beta [heads] of some layers, at 0.
        targets: layer -> the heads that may change; in the order of the parameters.
        beta: see `calibrate_sinks`.

    Returns:
        A record: every setting that was tried, and the record of `Trial.settle`.
    """
    begin(progress, "choosing heads", len(SHARES))
    slopes = trial.figures.once("slopes", lambda: [slope.tolist() for slope in gradients(trial)])
    heads = [(index, head) for index, named in enumerate(targets.values()) for head in named]
    ranked = sorted(((slopes[index][head], index, head) for index, head in heads), reverse=True)
    helped = [(index, head) for slope, index, head in ranked if slope > 0]
    best, lowest = None, trial.measure("beta 1", trial.nothing, trial.fit)[0].mean().item()
    tried = [{"heads": 0, "fit": lowest}]
    for step, share in enumerate(SHARES):
        chosen = helped[: math.ceil(share * len(helped))]
        setting = with_beta(trial, chosen, beta)
        loss = trial.measure(f"beta {beta!r}, {len(chosen)} heads", setting, trial.fit)[0].mean().item()
        tried.append({"heads": len(chosen), "fit": loss})
        if loss < lowest:
            best, lowest = setting, loss
        if progress:
            progress(step + 1, len(SHARES), "choosing heads")
    return {"tried": tried} | _settled(trial, best)


def choose_each(trial: Trial, targets: dict[int, list[int]], beta: float, progress=None) -> dict:
    """Give beta to every head that gains from it alone on the trial's `fit`, as in the paper.

    A head gains if the objective is lower, which for questions is -log of the right choice's share; the paper counts
    right choices. The choice is kept if all these heads together are better on the trial's `validation` (see
    `Trial.settle`).

    Args: as for `choose_heads`.

    Returns:
        A record: `tried`, what no head and all these heads give on `fit`; `alone`, what each head gives alone (layer,
        head, fit); and the record of `Trial.settle`.
    """
    heads = [(index, layer, head) for index, (layer, named) in enumerate(targets.items()) for head in named]
    begin(progress, "choosing heads", len(heads))
    nothing = trial.measure("beta 1", trial.nothing, trial.fit)[0].mean().item()
    alone: list[dict] = []
    for index, layer, head in heads:
        setting = with_beta(trial, [(index, head)], beta)
        loss = trial.measure(f"beta {beta!r}, layer {layer}, head {head}", setting, trial.fit)[0].mean().item()
        alone.append({"layer": layer, "head": head, "fit": loss})
        if progress:
            progress(len(alone), len(heads), "choosing heads")
    chosen = [(index, head) for (index, _, head), each in zip(heads, alone, strict=True) if each["fit"] < nothing]
    tried, best = [{"heads": 0, "fit": nothing}], None
    if chosen:
        best = with_beta(trial, chosen, beta)
        together = trial.measure(f"beta {beta!r}, {len(chosen)} heads", best, trial.fit)[0].mean().item()
        tried.append({"heads": len(chosen), "fit": together})
    return {"tried": tried, "alone": alone} | _settled(trial, best)


def with_beta(trial: Trial, heads: list[tuple[int, int]], beta: float) -> list[torch.Tensor]:
    """The setting of a trial in which some heads (index of the parameter, head) have beta, and the others have 1."""
    setting = [log_beta.clone() for log_beta in trial.nothing]
    for index, head in heads:
        setting[index][head] = math.log(beta)
    return setting


def _settled(trial: Trial, best: list[torch.Tensor] | None) -> dict:
    """The record of `Trial.settle`; without a setting to settle, nothing is set."""
    if best is not None:
        return trial.settle(best)
    trial.set(trial.nothing)
    return {"kept": False, "objective": trial.kind}
