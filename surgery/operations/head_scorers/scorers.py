"""The registry of head scorers. A scorer measures which heads need the far past.

A new scorer is one file and one line in `METHODS`. The file has a function `(model, tokenizer, *, sinks, window, ...,
progress) -> HeadScores`. Its keyword arguments are the scorer's settings, and their types say which values are
allowed. If there is a setting `preset`, the file has `PRESETS`: for each preset, the values of the settings that are
None. A scorer that also has a number for each query head takes `per`; the others say in the registry why they have
none. The file is imported only when it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from surgery.calibration.head_scores import (
    ABOVE,
    KINDS,
    HeadScores,
    is_score_file,
    model_identity,
    model_name,
    refuse_not_finite,
)
from surgery.errors import (
    OutputExistsError,
    SettingError,
    SurgeryError,
    UnsupportedModelError,
    nearest,
    number_meant,
    shown,
    wanted,
)
from surgery.io.key_values import read_key_values
from surgery.machine.placement import AUTO, GRADIENTS, PASSES, current


@dataclass(frozen=True)
class Scorer:
    """A scorer.

    Attributes:
        module, function: its module in this package, and the function in that module.
        summary: one line on what it measures.
        kv_only: why it has no number for each query head; "" if it has.
        threshold: the score above which a head counts as one that needs the far past; None: the method has none.
        gradients: whether it needs gradients through all layers.
    """

    module: str
    function: str
    summary: str
    kv_only: str = ""
    threshold: float | None = None
    gradients: bool = False

    def load(self):
        """The scorer's function; imports its module."""
        return getattr(import_module(f".{self.module}", __package__), self.function)

    def presets(self) -> dict[str, dict[str, Any]]:
        """What the scorer's presets say where a setting is None; {} if it has none. Imports its module."""
        return getattr(import_module(f".{self.module}", __package__), "PRESETS", {})


METHODS = {
    "far-mass": Scorer("far_mass", "far_mass", "attention mass beyond sinks + window where passkeys are repeated"),
    "retrieval": Scorer(
        "retrieval",
        "retrieval",
        "how often a head looks at the token that it copies (Wu et al.)",
        threshold=ABOVE,
    ),
    "gates": Scorer(
        "learned_gates",
        "gates",
        "a gate for each KV head, optimised on passkeys (DuoAttention)",
        kv_only="it trains one gate for all query heads of a KV head",
        gradients=True,
    ),
    "fisher": Scorer(
        "fisher",
        "fisher",
        "KL that streaming costs on text, by the Fisher information, and far-mass",
        kv_only="it estimates what is lost when all query heads of a KV head stream together",
        gradients=True,
    ),
    "ablation": Scorer(
        "ablation",
        "ablation",
        "what answers and plain text lose when one KV head alone streams (KL)",
        kv_only="it lets all query heads of a KV head stream together",
    ),
    "induction": Scorer("induction", "induction", "attention to earlier copies of random tokens (RazorAttention)"),
}


def score(
    model, tokenizer, method: str, *, name: str = "", per: str = "kv_heads", progress=None, **settings
) -> HeadScores:
    """Measure a model's heads.

    Args:
        model, tokenizer: in memory; the model is not changed.
        method: a name in `METHODS`.
        name: the model's name in the file; default: the name by which it was loaded.
        per: "kv_heads" or "heads" (query heads).
        progress: called with done, total and a label.
        settings: the method's settings; None means the method's default. `settings_of` lists them.

    Raises:
        SurgeryError: there is no such method, it lacks one of the settings, it has no number for each query head, or
            it cannot measure this model.
    """
    from surgery.architecture.anatomy import Anatomy

    refuse_heads(method, per)
    function = method_named(method).load()
    options = {key: value for key, value in settings.items() if value is not None}
    refuse_wrong_settings(method, options)
    options |= {"per": per} if "per" in settings_of(method) else {}
    scores = function(model, tokenizer, progress=progress, **options)
    refuse_not_finite([scores.scores], method)
    dtype = {} if current().dtype == AUTO else {"dtype": current().dtype}
    model_origin = model_identity(Anatomy.of(model), name or model_name(model.config))
    return replace(scores, origin={"model": model_origin} | dtype | scores.origin)


def refuse_heads(method: str, per: str) -> None:
    """Raise a SurgeryError if `per` names no kind of head, or one for which the method has no numbers."""
    scorer = method_named(method)
    if per not in KINDS:
        names = ", ".join(kind.replace("_", "-") for kind in KINDS)
        raise SettingError(f"scores are not measured per {per!r}", exists=names, fix="--per heads for query heads")
    if per == "heads" and scorer.kv_only:
        able = ", ".join(name for name, each in METHODS.items() if not each.kv_only)
        what = f"{method} has no score for each query head: {scorer.kv_only}"
        raise SettingError(what, exists=f"methods with one: {able}", fix="another --method, or --per kv-heads")


def method_named(method: str) -> Scorer:
    """The method of this name.

    Raises:
        SurgeryError: there is none.
    """
    if method not in METHODS:
        close = nearest(method, METHODS)
        raise SettingError(
            f"no method {method!r} to score heads",
            exists=", ".join(METHODS),
            fix=f"did you mean {close!r}?" if close else "",
        )
    return METHODS[method]


def settings_of(method: str) -> dict[str, Any]:
    """The names of a method's settings and their defaults; `inspect.Parameter.empty` where there is none."""
    parameters = inspect.signature(method_named(method).load()).parameters.items()
    return {name: each.default for name, each in parameters if name not in ("model", "tokenizer", "progress")}


def resolved_settings(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a method: those that are given (not None), then those of the preset, then the defaults."""
    settings = settings_of(method) | {name: value for name, value in given.items() if value is not None}
    preset = method_named(method).presets().get(settings.get("preset", ""), {})
    return settings | {name: value for name, value in preset.items() if settings[name] is None}


def refuse_wrong_settings(method: str, given: Mapping[str, Any], where: str = "") -> None:
    """Check settings of a method by their names and types.

    Raises:
        SurgeryError: the method has no such setting, or a value is not allowed; the error lists every fault.
    """
    known, hints = settings_of(method), get_type_hints(method_named(method).load(), include_extras=True)
    if unknown := [key for key in given if key not in known]:
        close = nearest(unknown[0], known)
        fix = f"did you mean {close!r}?" if close else ""
        raise SettingError(f"{method} takes no {', '.join(unknown)}", where=where, exists=", ".join(known), fix=fix)
    faults = []
    for key, value in given.items():
        try:
            TypeAdapter(hints.get(key, Any), config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            items: list = error.errors(include_url=False)
            what = f"{key} should be {wanted(items)}; it is {shown(value)}"
            faults.append(SettingError(what, where=where, fix=number_meant(items)))
    if faults:
        first, *rest = faults
        raise SettingError(first.what, where=where, fix=first.fix, others=tuple(rest))


def read_settings(method: str, texts: Iterable[str]) -> dict[str, Any]:
    """Settings of a method that were typed as key=value.

    Raises:
        SurgeryError: as for `refuse_wrong_settings` and `read_key_values`.
    """
    where, known = f"--method {method}", [name for name in settings_of(method) if name != "state"]  # of a resumed run
    settings = read_key_values(texts, where, ", ".join(known))
    if "state" in settings:
        raise SettingError(f"{method} takes no state", where=where, exists=", ".join(known), fix="--resume")
    refuse_wrong_settings(method, settings, where)
    return settings


def how_chosen(method: str, origin: Mapping[str, Any]) -> str:
    """A sentence for the card, after a space, on the scores by which heads were chosen; "" for an unknown method.

    Args:
        origin: the scores' origin, which has the settings.
    """
    if method not in METHODS:
        return ""
    sentence = f" The heads were chosen by the score `{method}`: {METHODS[method].summary}"
    presets = METHODS[method].presets()
    preset = origin.get("preset", next(iter(presets), ""))
    if preset not in presets:  # the method has none, or another version measured the scores
        return f"{sentence}."
    changed = {key: origin[key] for key, value in presets[preset].items() if key in origin and origin[key] != value}
    other = ", ".join(f"{key} {value}" for key, value in changed.items() if not isinstance(value, list))
    if "length" in changed:
        other = ", ".join(filter(None, (other, "other lengths")))
    return f"{sentence}. Its settings were those of the preset `{preset}`{f', but {other}' if other else ''}."


def score_to_file(
    model: str,
    output: str | Path,
    method: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress=None,
    **settings,
) -> HeadScores:
    """Measure a model by name and save the scores; arguments as for `score`.

    Args:
        model: a folder, `smollm2-135m` or a Hub id.
        output: the file; an existing one is refused without `overwrite`.
        resume: continue from `output` + ".state", which a method with steps leaves when it is stopped.
        overwrite: replace an existing file, and start an unfinished run again.

    Raises:
        SurgeryError: as for `score`; or `output` exists without `overwrite`; or a stopped run left its state file, and
            neither `overwrite` nor `resume` is set.
        MachineError: the file cannot be written.
    """
    from surgery.architecture.detect import check_block
    from surgery.io.hub import resolve
    from surgery.io.loading import load_for_run, read_config, read_tokenizer
    from surgery.io.output_folder import parent_folder

    output = Path(output)
    refuse_heads(method, settings.get("per") or "kv_heads")
    state = output.with_name(output.name + ".state")
    resumable = "state" in settings_of(method)
    if resume and not resumable:
        raise SurgeryError(f"{method} has no steps to go on from", fix="leave out --resume")
    if output.exists() and not overwrite:
        raise OutputExistsError("the score file exists", where=str(output), fix="another name (-o), or --overwrite")
    if output.exists() and not output.is_dir() and not is_score_file(output):
        what = "--overwrite replaces a score file, and this is not one"
        raise SurgeryError(what, where=str(output), fix="another name (-o)")
    if output.is_dir():
        raise OutputExistsError("this is a folder, not a score file", where=str(output), fix="-o FILE.json")
    if state.exists() and not (resume or overwrite):
        fix = "add --resume to go on from it, or --overwrite to start again"
        raise SurgeryError("an unfinished run left this file", where=str(state), fix=fix, code="unfinished-run")
    source = resolve(model)
    block = check_block(read_config(source.path), source.name)
    if block and any(layer.get("streaming") for layer in block["layers"]):
        raise UnsupportedModelError("the heads of this model are split already: measure its base", where=source.name)
    with parent_folder(output):
        if not resume:
            state.unlink(missing_ok=True)
        loaded = load_for_run(source.path, use=GRADIENTS if method_named(method).gradients else PASSES)
        tokenizer = read_tokenizer(source.path)
        options = settings | ({"state": state} if resumable else {})
        scores = score(loaded, tokenizer, method, name=source.name, progress=progress, **options)
        scores.save(output)
        state.unlink(missing_ok=True)
    return scores
