"""The one command to type after `apply` or `heal`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.evaluation.probes.settings import requested_probes
from surgery.report.gate import damage
from surgery.report.verdict import nothing_came_back, says_nothing

if TYPE_CHECKING:
    from surgery.conversion.plan import Plan, Step

BUDGETS = ("tokens", "steps", "minutes")
LONGER = 4  # factor on the training's budget
CLEARLY = 1.05  # factor on the KV cache, below which a milder setting brings too little for a new conversion
CONTEXT = 8192  # tokens whose cache is compared, where the model names no limit


@dataclass(frozen=True)
class Typed:
    """The command that the user typed: `surgery VERB SUBJECT [MODEL] KEY=VALUE ... -o OUT`.

    Attributes:
        verb: "apply" or "heal".
        subject: the recipe, or the folder that is healed.
        base: the model as typed; for a healing without --base, the base that the record names.
        overrides: key=value texts.
    """

    verb: str
    subject: str
    base: str
    overrides: tuple[str, ...] = ()

    def again(self, setting: str, out: str) -> str:
        """The same command with another setting, which writes to a folder next to `out`."""
        model = [self.base] if self.verb == "apply" else []
        base = [] if model else ["--base", self.base]
        settings = self.overrides_with(setting)
        return shlex.join(["surgery", self.verb, self.subject, *model, *settings, "-o", f"{out}-2", *base])

    def overrides_with(self, setting: str) -> list[str]:
        """The overrides with another setting, which takes the place of those of the same key."""
        return [*(each for each in self.overrides if _key(each) != _key(setting)), setting]


def _key(setting: str) -> str:
    """The field of a setting "operation.field=value"."""
    return setting.partition("=")[0].rpartition(".")[2]


def next_command(data: dict[str, Any], folder: str, command: Typed) -> str:
    """The one command to type next; never a push if the result failed or its healing improved nothing."""
    quoted, base = shlex.quote(folder), shlex.quote(command.base)
    evaluation = data["evaluation"]
    if data["check"] is None or not data["check"]["passed"]:
        return f"surgery check {quoted} --base {base}"
    if evaluation is None or evaluation["status"] != "done":
        where = "" if evaluation is None else ", on a machine with more memory"
        return f"surgery eval {quoted} --base {base}{_requested_options(data)}{where}"
    if says_nothing(data):  # of text that the base knows, it may say something
        asked = f"surgery eval {quoted} --base {base} --text FILE"
        return command.again("evaluate.text=FILE", folder) if command.verb == "apply" else asked
    if damage(evaluation) or data["gate"]["status"] == "failed" or nothing_came_back(data):
        return _mend(data, folder, command)
    return f"surgery push {quoted} OWNER/NAME"


def _mend(data: dict[str, Any], folder: str, command: Typed) -> str:
    """The next command for a result that lost too much: longer training, a milder setting, or a first training."""
    if data.get("heal"):
        settings, prefix = data["heal"]["settings"], "heal." if command.verb == "apply" else ""
        budget = next((name for name in BUDGETS if settings.get(name)), None)
        if budget:
            return command.again(f"{prefix}{budget}={LONGER * settings[budget]:g}", folder)
    if command.verb == "apply" and (setting := _milder(command)):
        return command.again(setting, folder)
    return shlex.join(["surgery", "heal", folder, "tokens=1e6", "-o", "HEALED", "--base", command.base])


def _milder(command: Typed) -> str:
    """A setting of one operation with which the recipe fits this model and changes less; "" where there is none."""
    from surgery.api import plan

    with suppress(SurgeryError, ValueError):  # an operation is not installed or of another version, or no base is left
        now = plan(command.subject, command.base, overrides=list(command.overrides))
        for setting in (setting for step in now.steps for setting in _candidates(step)):
            names_method = setting.partition("=")[2].isidentifier()  # which may be milder and leave as much
            with suppress(SurgeryError):
                milder = plan(command.subject, command.base, overrides=command.overrides_with(setting))
                if names_method or _leaves_more(milder, now):
                    return setting
    return ""


def _candidates(step: Step) -> Iterator[str]:
    """The operation's own milder setting, and the mildest value of its field that fits the model."""
    if setting := step.operation.milder():
        yield setting
        key = _key(setting)
        rungs = (rung for ladder in step.operation.ladders(step.before) for rung in ladder if list(rung) == [key])
        mildest = next(
            (rung for rung in rungs if not step.operation.model_copy(update=rung).problems(step.before)), {}
        )
        yield from (f"{key}={value:g}" for value in mildest.values())


def _leaves_more(plan: Plan, now: Plan) -> bool:
    """Whether a plan leaves clearly more of the cache, where the present one saves some, or changes other things."""
    length = now.before.positions or CONTEXT
    base, left, then = (each.kv_bytes_at(length) for each in (now.before, now.after, plan.after))
    return CLEARLY * left <= then < base if left < base else plan.changes != now.changes


def _requested_options(data: dict[str, Any]) -> str:
    """The options with which `eval` measures as the recipe's evaluation does."""
    settings = data["recipe"].get("evaluate") or {}
    probe = next(probe for probe in requested_probes(settings) if probe.main)
    flags = {option: (getattr(probe, flag.key), flag.key) for option, flag in probe.aliases.flags.items()}
    return "".join(
        f" --{option.replace('_', '-')} {shlex.quote(str(value))}"
        for option, (value, key) in flags.items()
        if value != type(probe).model_fields[key].default
    )
