"""The public functions that measure a model: `evaluate`, and one function each for two of the probes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from surgery.config.arguments import no_model, refuse_no_function, refuse_no_text, refuse_no_tokenizer
from surgery.errors import SurgeryError
from surgery.machine.placement import AUTO, current, placed, refuse_for_loaded
from surgery.machine.progress import Progress
from surgery.report.report import FILE, Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from surgery.data.text import Text
    from surgery.evaluation.figures import Evaluation
    from surgery.evaluation.probes.base import Probe
    from surgery.evaluation.probes.choices import ChoiceResult
    from surgery.evaluation.probes.needles import NeedleResult
    from surgery.evaluation.result import Result

    AnyModel = str | Path | PreTrainedModel  # a folder, a name, a Hub id or a loaded model
    AnyText = str | Path | Text  # "builtin", a text file, or a text
    AnyTokenizer = PreTrainedTokenizerBase


@overload
def evaluate(
    model: AnyModel,
    base: AnyModel | None = None,
    *,
    probe: None = None,
    tokenizer: AnyTokenizer | None = None,
    report: Report | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    text: AnyText | None = None,
    windows: int | None = None,
    length: int | None = None,
    top_k: int | None = None,
) -> Evaluation: ...
@overload
def evaluate(
    model: AnyModel,
    base: AnyModel | None = None,
    *,
    probe: str | Probe,
    tokenizer: AnyTokenizer | None = None,
    report: Report | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Result: ...
@placed
def evaluate(
    model: AnyModel,
    base: AnyModel | None = None,
    *,
    probe: str | Probe | None = None,
    tokenizer: AnyTokenizer | None = None,
    report: Report | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    text: AnyText | None = None,
    windows: int | None = None,
    length: int | None = None,
    top_k: int | None = None,
    **settings: Any,
) -> Result:
    """Measure a model, alone or compared with its base: `result["out"]["perplexity"]`, `result.kl`.

    Args:
        model, base: a folder, a name or a loaded model. Loaded models need `tokenizer`.
        probe: what is measured: a name of `surgery.evaluation.probes`. The default probe judges every recipe: it
            measures perplexity, KL to the base, top-1 agreement, KV bytes and load size.
        report: the report of the loaded model. The figures are added to it, and `surgery.save` writes them. Without a
            probe and settings, everything that its recipe asks for is measured.
        device, dtype: where and how folders run: "cpu", "cuda", "cuda:1", "mps", and "float32", "bfloat16",
            "float16". "auto": a GPU where the model fits, and the dtype of the weights.
        progress: called with done, total and a label.
        text: for the default probe: "builtin" or a text file.
        windows, length: for the default probe: number of windows that are scored (8), and tokens of each (512).
        top_k: for the default probe: how many of the base's tokens the KL is computed over (512).
        settings: for another probe: its settings, as in `surgery eval --probe NAME key=value`.

    Defaults that are longer than the model or its base takes are cut, and a note in the result says so.

    A checkpoint of ours that was not scored yet (`--no-eval`) stores the result of the default probe in its
    surgery.json and card, and the result is compared with its gate. This requires the text of its recipe and the base
    of its record. Otherwise a note in the result gives the reason.

    Returns:
        The probe's result, a mapping that can be printed: `status`, `notes`, `to_dict()`, and the probe's own figures.

    Raises:
        SurgeryError: there is no such probe, a setting is not valid, or these models cannot be measured by the probe.
    """
    given = _given(text=text, windows=windows, length=length, top_k=top_k) | settings
    return _evaluate(model, base, probe, given, tokenizer, report, progress)


@placed
def evaluate_needles(
    model: AnyModel,
    base: AnyModel | None = None,
    *,
    tokenizer: AnyTokenizer | None = None,
    report: Report | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    text: AnyText | None = None,
    lengths: int | str | Sequence[int] | None = None,
    length: int | None = None,
    depths: int | Sequence[float] | None = None,
    samples: int | None = None,
    cases: int | None = None,
    seed: int | None = None,
    secret: str | None = None,
    form: str | None = None,
    without: str | Path | None = None,
    top: int | None = None,
    draws: int | None = None,
    off: str | None = None,
    late: bool | None = None,
    kind: str | None = None,
    keys: int | None = None,
    values: int | None = None,
    hops: int | None = None,
    chains: int | None = None,
) -> NeedleResult:
    """Run the recall test: hide secrets in a text and count those that a model, and its base if given, finds.

    With `without`, the model is also asked with its highest-scored query heads switched off, and with as many random
    heads of the same layers off. It is restored afterwards.

    Args:
        model, base, tokenizer, report, device, dtype, progress: as for `evaluate`.
        text: the text around the secrets: "builtin" or a text file.
        lengths, length: tokens of the prompts: several lengths (512, 1024, 2048), or one.
        depths: positions in the text: their number, evenly spaced (5), or a list of shares (0 the beginning, 1 the
            end).
        samples, cases: prompts for each length and depth (4), or the least number of prompts in all.
        seed: random seed of the secrets and their positions (0).
        secret: "digits" or "words".
        form: "chat", "plain", or "auto" (as the tokenizer allows).
        without: a score file of query heads (`surgery score MODEL --per heads`).
        top: how many heads are off; default: those that score above 0.1.
        draws: random draws (5).
        late: the question comes in a call of its own, after the text is read.
        off: "all": heads are off for all tokens; "answer": from the last token of the prompt on.
        kind: what is hidden and asked ("key"); see `surgery.data.needle_kinds`.
        keys, values, hops, chains: settings of some kinds: keys in a prompt, values of a key, steps of a chain, and
            chains in a prompt.
    """
    given = _given(text=text, lengths=lengths, length=length, depths=depths, samples=samples)
    given |= _given(cases=cases, seed=seed, secret=secret, form=form)
    given |= _given(without=without, top=top, draws=draws, off=off, late=late)
    given |= _given(kind=kind, keys=keys, values=values, hops=hops, chains=chains)
    return cast("NeedleResult", _evaluate(model, base, "needles", given, tokenizer, report, progress))


@placed
def evaluate_choices(
    model: AnyModel,
    base: AnyModel | None = None,
    *,
    tokenizer: AnyTokenizer | None = None,
    report: Report | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    text: AnyText | None = None,
    labelled: str | Path | None = None,
    items: int | None = None,
    context: int | None = None,
    seed: int | None = None,
) -> ChoiceResult:
    """Ask multiple-choice questions and count those that a model, and its base if given, answers right.

    Args:
        model, base, tokenizer, report, device, dtype, progress: as for `evaluate`.
        text: the text that questions are made from: "builtin" or a text file. Each asks which ending continues a
            passage.
        labelled: a JSONL file of questions (prompt, choices, answer) in place of a text.
        items, context: number of questions made from the text (320), and tokens of a passage (96).
        seed: random seed of the passages (0).
    """
    given = _given(text=text, labelled=labelled, items=items, context=context, seed=seed)
    return cast("ChoiceResult", _evaluate(model, base, "choices", given, tokenizer, report, progress))


def _evaluate(
    model: AnyModel,
    base: AnyModel | None,
    probe: str | Probe | None,
    settings: dict[str, Any],
    tokenizer: AnyTokenizer | None,
    report: Report | None,
    progress: Progress | None,
) -> Result:
    from surgery.evaluation.probes.settings import fitted
    from surgery.evaluation.run import evaluate_in_memory
    from surgery.io.loading import read_config
    from surgery.report.lineage import as_its_recipe, refuse_another

    if model is None:
        raise no_model(model)
    refuse_no_tokenizer(tokenizer)
    refuse_no_function(progress=progress)
    if report is not None:
        refuse_another(model, report)
    chosen = _chosen(probe, settings, report)
    out, beside = _source(model), _source(base, "base")
    options = {"tokenizer": tokenizer, "progress": progress}
    if any(side is not None and not isinstance(side, Path) for side in (out, beside)):
        refuse_for_loaded()
    configs = {"the model": read_config(out)} | ({} if beside is None else {"the base": read_config(beside)})
    if report is not None:
        asked, cuts = fitted(chosen, configs) if chosen else (None, [])
        result = evaluate_in_memory(report, out, beside, asked, **options)
        result.notes += cuts
        return result
    asked = chosen or _usual()
    if base is not None and isinstance(out, Path):
        asked = as_its_recipe(asked, out)
    asked, cuts = fitted(asked, configs)
    result = asked.measure(out, beside, **options)
    result.notes += cuts
    if isinstance(out, Path) and (dtype := current().dtype) != AUTO:
        result.notes.append(f"measured in {dtype}" + ", so not added to the card" * (base is not None))
    elif base is not None and isinstance(out, Path):
        _record(out, base, asked, result, tokenizer)
    return result


def _chosen(probe: str | Probe | None, settings: dict[str, Any], report: Report | None) -> Probe | None:
    """The probe that the caller asked for; None if neither a probe nor settings were given.

    Without settings, the probe takes the settings in the recipe of the report, if there are any.
    """
    from surgery.evaluation import probes
    from surgery.evaluation.probes.base import Probe
    from surgery.evaluation.probes.settings import make
    from surgery.report.lineage import recipe_probe

    if isinstance(probe, Probe):
        if settings:
            what = f"this probe has its settings already: {', '.join(settings)}"
            raise SurgeryError(what, where="probe", fix="give its name instead", code="invalid-setting")
        return probe
    if probe is None and not settings:
        return None
    if probe is not None:
        refuse_no_text("probe", probe)
    name = probe or probes.main().name
    of_recipe = recipe_probe(report.data, probes.find(name)) if report is not None and not settings else None
    return of_recipe or make(name, settings)


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that the caller gave; the probe has defaults for the others."""
    return {key: value for key, value in settings.items() if value is not None}


def _usual() -> Probe:
    """The probe that every recipe is judged by, with its default settings."""
    from surgery.evaluation import probes

    return probes.main()()


def _record(folder: Path, base: object, probe: Probe, result: Result, tokenizer: Any) -> None:
    """Add a score to the record of a checkpoint of ours that has none, or note in the result why it was not added."""
    from surgery.architecture.anatomy import positions_of
    from surgery.config.recipe import recorded
    from surgery.io.loading import read_config
    from surgery.report.lineage import KEPT, record_score

    if not (folder / FILE).is_file():
        return
    report = Report.of(folder)
    recipe = recorded(report.data) if probe.main else None
    if recipe and (short := recipe.too_short(probe.length, "windows", "", positions_of(read_config(folder)))):
        result.notes.append(short)
    if reason := record_score(report, base, probe, result.to_dict(), tokenizer):
        result.notes.append(f"not added to the card{', ' if reason == KEPT else ': '}{reason}")


def _source(model: Any, name: str = "model") -> Any:
    """The folder of a model given by name; a loaded model or None is returned unchanged."""
    if isinstance(model, str | Path):
        from surgery.io.hub import folder_of

        return folder_of(model)
    if model is not None and not hasattr(model, "config"):
        raise no_model(model, name)
    return model
