"""ACT (Yu et al. 2024, arXiv 2406.15765): find the sinks of each head, and the heads that gain from weaker sinks.

ACT finds a head's sinks in its attention map of the full text: a token is a sink if its column mean is above
alpha / N. Cached decoding has no such map, so the rule is learned here. Each head gets a linear probe on a token's own
value. The probe is fitted by least squares to the answers of the rule, and its threshold has the best F1.

On held-out texts with SmolLM2-135M (512 tokens, alpha 5), the probes have a recall of 60% and a precision of 64%,
counted in sinks: near the threshold, probe and rule often differ. Counted in attention on the sinks, the recall is 87%
and the precision is 96%.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from surgery.calibration.attention_hook import hook_attention
from surgery.calibration.sinks import other_sinks, received
from surgery.machine.progress import begin
from surgery.operations.sink_calibration.zero_tuning import Trial, frozen, gradients, parameters_of
from surgery.runtime.surgery_act import probe_features, probe_scores
from surgery.runtime.surgery_attention import surgery_attention

RIDGE = 1e-4  # relative to the mean square of the features
SHARES = (1.0, 0.5, 0.25, 0.125)  # shares to try of the heads whose slope says that less weight on sinks helps


def calibrate_sinks(
    model, targets: dict[int, list[int]], samples: torch.Tensor, *, beta, alpha, objective, progress=None
) -> dict:
    """Fit `surgery_sink_probe` and `surgery_log_beta` on half of the texts. Keep beta if it helps on the other half.

    Args:
        model: surgical, with both parameters in the layers of `targets`, at identity.
        targets: layer -> query heads that may change.
        samples: long [texts, length].
        beta: the share of the weight on its sinks that a chosen head keeps.
        alpha: a key is a sink if its mean weight is above alpha / N.
        objective: "ce" or "entropy" (see `zero_tuning.objective`).
        progress: called with done, total and a label.

    Returns:
        A record: the agreement of the probes with ACT's rule on the held-out texts, the settings that were tried, the
        record of `Trial.settle`, and the heads that got beta, by layer.
    """
    train, validation = samples[::2], samples[1::2]
    probes, betas = parameters_of(model, "surgery_sink_probe"), parameters_of(model, "surgery_log_beta")
    set_probes(model, {layer: probes[layer] for layer in targets}, train, alpha, progress)
    record = {"agreement": agreement(model, {i: probes[i] for i in targets}, validation, alpha, progress)}
    parameters = [betas[layer] for layer in targets]
    with frozen(model, parameters):
        trial = Trial(model, parameters, train, validation, objective)
        record |= choose_heads(trial, list(targets.values()), beta, progress)
    chosen = {str(layer): (betas[layer] < 0).nonzero()[:, 0].tolist() for layer in targets}
    return record | {"heads": {layer: heads for layer, heads in chosen.items() if heads}}


def set_probes(model, probes: dict[int, torch.Tensor], samples, alpha: float, progress=None) -> None:
    """Fit the probes [heads, features] of some layers to ACT's rule, with two forward passes per text."""
    grams: dict[int, torch.Tensor] = {}
    moments: dict[int, torch.Tensor] = {}

    def learn(layer: int, value, total, marked, judged) -> None:
        x = probe_features(value[0, :, judged].double())  # [KV heads, judged, features]
        y = marked[:, judged].double().reshape(len(x), -1, x.shape[1])
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
        scores_and_marks[layer].append((probe_scores(value, probes[layer])[0, :, judged], marked[:, judged]))

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
        predicted = probe_scores(value, probes[layer])[0, :, judged] > 0
        marked, total = marked[:, judged], total[:, judged]
        for column, chosen in enumerate((predicted & marked, predicted, marked)):
            sums[:, column] += torch.stack([chosen.sum().double(), total[chosen].sum().double()]).cpu()

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


def choose_heads(trial: Trial, heads: list[list[int]], beta: float, progress=None) -> dict:
    """Give beta to the heads that gain most according to their slope. How many is chosen on the trial's `fit`.

    The choice is kept if it is better on the trial's `validation` (see `Trial.settle`).

    Args:
        trial: its parameters are log beta [heads] of some layers, at 0.
        heads: for each layer, the heads that may change.
        beta: see `calibrate_sinks`.

    Returns:
        A record: every setting that was tried, and the record of `Trial.settle`.
    """
    begin(progress, "choosing heads", len(SHARES))
    ranked = sorted(
        ((slope[head].item(), layer, head) for layer, slope in enumerate(gradients(trial)) for head in heads[layer]),
        reverse=True,
    )
    helped = [(layer, head) for slope, layer, head in ranked if slope > 0]
    best, lowest = None, trial.measure("beta 1", trial.nothing, trial.fit)[0].mean().item()
    tried = [{"heads": 0, "fit": lowest}]
    for index, share in enumerate(SHARES):
        chosen = helped[: math.ceil(share * len(helped))]
        setting = [log_beta.clone() for log_beta in trial.nothing]
        for layer, head in chosen:
            setting[layer][head] = math.log(beta)
        loss = trial.measure(f"beta {beta!r}, {len(chosen)} heads", setting, trial.fit)[0].mean().item()
        tried.append({"heads": len(chosen), "fit": loss})
        if loss < lowest:
            best, lowest = setting, loss
        if progress:
            progress(index + 1, len(SHARES), "choosing heads")
    if best is None:
        trial.set(trial.nothing)
        return {"tried": tried, "kept": False, "objective": trial.kind}
    return {"tried": tried} | trial.settle(best)
