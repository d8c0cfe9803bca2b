"""The one command to type after `apply` or `heal`."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.evaluation.probes.settings import requested_probes
from surgery.report.gate import damage
from surgery.report.verdict import nothing_came_back, says_nothing

if TYPE_CHECKING:
    from surgery.conversion.plan import Step

BUDGETS = ("tokens", "steps", "minutes")
LONGER = 4  # factor on the training's budget
CLEARLY = 1.1  # factor on the KV cache, below which a milder setting brings too little for a new conversion


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
        key = setting.partition("=")[0]
        kept = [each for each in self.overrides if each.partition("=")[0].rpartition(".")[2] != key.rpartition(".")[2]]
        model = [self.base] if self.verb == "apply" else []
        base = [] if model else ["--base", self.base]
        return shlex.join(["surgery", self.verb, self.subject, *model, *kept, setting, "-o", f"{out}-2", *base])


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
    """A milder setting of one operation, with which the recipe still fits this model; "" where there is none."""
    from surgery.api import plan

    try:
        steps = plan(command.subject, command.base, overrides=list(command.overrides)).steps
    except SurgeryError:  # an operation is not installed or of another version, or the base is gone
        return ""
    for step in steps:
        for setting in filter(None, (step.operation.milder(), _mildest(step))):
            key = setting.partition("=")[0]
            kept = [each for each in command.overrides if each.partition("=")[0].rpartition(".")[2] != key]
            with suppress(SurgeryError):
                plan(command.subject, command.base, overrides=[*kept, setting])
                return setting
    return ""


def _mildest(step: Step) -> str:
    """For an operation whose own milder setting goes too far for this model: the one that goes as far as it can."""
    wanted, left = step.operation.milder().partition("=")[0], step.change.after.kv_bytes_per_token
    for rung in (rung for ladder in step.operation.ladders(step.before) for rung in ladder if list(rung) == [wanted]):
        milder = step.operation.model_copy(update=rung)
        if not milder.problems(step.before):
            clearly = milder.plan(step.before).after.kv_bytes_per_token >= CLEARLY * left
            return f"{wanted}={rung[wanted]:g}" if clearly else ""
    return ""


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
