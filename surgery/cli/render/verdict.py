"""The judgement on a result: its gate compared with the limits, one verdict, and the command to type next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.evaluation.probes.perplexity import NO_MODEL, shown_perplexity
from surgery.evaluation.probes.settings import requested_probes
from surgery.report.gate import comparisons, damage

BUDGETS = ("tokens", "steps", "minutes")
LONGER = 4  # factor on the training's budget


@dataclass(frozen=True)
class Command:
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


def gate_words(data: dict[str, Any]) -> str:
    """ "passed (KL 0.502 ≤ 1.0)", "failed (KL 1.320 > 1.0)", "not run", "none"."""
    gate = data["gate"]
    if not gate["limits"]:
        return "none"
    compared = comparisons(data["evaluation"], gate["limits"])
    return gate["status"] + (f" ({', '.join(map(str, compared))})" if compared else "")


def verdict(data: dict[str, Any]) -> str:
    """One sentence: whether the result can be used, and if not, why and by how much."""
    check, evaluation, gate = data["check"], data["evaluation"], data["gate"]
    if check and not check["passed"]:
        faults = [item["name"] for item in check["items"] if item["status"] == "failed"]
        return f"damaged: {', '.join(faults)}"
    if not evaluation or evaluation["status"] != "done":
        return "nothing is known of its quality"
    costs, missed = damage(evaluation), [each for each in comparisons(evaluation, gate["limits"]) if not each.passed]
    healed = bool(data.get("heal"))
    if gate["status"] == "failed":
        amounts = [
            f"{each.words} is {abs(each.value - each.limit):.3g} too {'low' if each.at_least else 'high'}"
            for each in missed
        ]
        words = f"it lost more than the recipe allows: {'; '.join(amounts or gate.get('reasons', []))}"
    elif costs:
        words = f"not usable{'' if healed else ' before healing'}: {costs[0]}"
    elif gate["limits"] and gate["status"] == "passed":
        words = "usable: it keeps the recipe's limits"
    elif gate["limits"]:
        words = f"usable, if the cost is right for you: the gate was {gate['status']}"
    else:
        words = "usable, if the cost is right for you: the recipe sets no limit"
    return f"{words}; healing won nothing back" if healed and nothing_came_back(data) else words


def notes(data: dict[str, Any]) -> list[str]:
    """Reasons why the figures say little."""
    before = ((data["evaluation"] or {}).get("base") or {}).get("perplexity")
    if not isinstance(before, int | float) or before <= NO_MODEL:
        return []
    return [f"the base's perplexity is {shown_perplexity(before)}: it is no language model, or this is not its text"]


def nothing_came_back(data: dict[str, Any]) -> bool:
    """Whether a healing was measured and improved no figure."""
    shares = [share for share in ((data.get("heal") or {}).get("recovered") or {}).values() if share is not None]
    return bool(shares) and max(shares) <= 0


def next_command(data: dict[str, Any], folder: str, command: Command) -> str:
    """The one command to type next; never a push if the result failed or its healing improved nothing."""
    quoted, base = shlex.quote(folder), shlex.quote(command.base)
    evaluation = data["evaluation"]
    if data["check"] is None or not data["check"]["passed"]:
        return f"surgery check {quoted} --base {base}"
    if evaluation is None or evaluation["status"] != "done":
        where = "" if evaluation is None else ", on a machine with more memory"
        return f"surgery eval {quoted} --base {base}{_requested_options(data)}{where}"
    if damage(evaluation) or data["gate"]["status"] == "failed" or nothing_came_back(data):
        return _mend(data, folder, command)
    return f"surgery push {quoted} OWNER/NAME"


def _mend(data: dict[str, Any], folder: str, command: Command) -> str:
    """The next command for a result that lost too much: longer training, a milder setting, or a first training."""
    if data.get("heal"):
        settings, prefix = data["heal"]["settings"], "heal." if command.verb == "apply" else ""
        budget = next((name for name in BUDGETS if settings.get(name)), None)
        if budget:
            return command.again(f"{prefix}{budget}={LONGER * settings[budget]:g}", folder)
    if command.verb == "apply" and (setting := _milder(data, command)):
        return command.again(setting, folder)
    return shlex.join(["surgery", "heal", folder, "tokens=1e6", "-o", "HEALED", "--base", command.base])


def _milder(data: dict[str, Any], command: Command) -> str:
    """A milder setting of one operation, with which the recipe still fits this model; "" where there is none."""
    from surgery import operations
    from surgery.api import plan

    for fields in data["recipe"]["operations"]:
        try:
            setting = operations.find(str(fields["op"])).model_validate(fields).milder()
            if not setting:
                continue
            key = setting.partition("=")[0]
            kept = [each for each in command.overrides if each.partition("=")[0].rpartition(".")[2] != key]
            plan(command.subject, command.base, overrides=[*kept, setting])
        except (SurgeryError, ValueError):  # not installed, of another version, or unfit for this model
            continue
        return setting
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
