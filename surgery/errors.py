"""What a user's mistake looks like: one sentence on what is wrong, where, what exists, how to mend it.

Exit codes of the command: 0 done; 1 a bug of ours; 2 recipe, plan, usage or input; 3 a quality gate failed;
4 `check` found a fault; 5 the environment (disk, network, permission); 130 interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

# Pydantic's complaints in a recipe's words; what is not listed keeps pydantic's own.
WORDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text of some length",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list with something in it",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
}
READ_AS_TEXT = re.compile(r"([-+]?[0-9]+)(?:\.([0-9]*))?[eE]([-+]?)([0-9]+)")  # numbers that YAML 1.1 takes for words


class SurgeryError(Exception):
    """A mistake of the user's that has one clear remedy. Never a traceback.

    Args:
        what: the fault in one sentence.
        where: file and line, tensor, folder or option that it was found in.
        exists: what is there instead (the known names, the legal values).
        fix: what to type or change.
        others: further faults found in the same pass, shown together (a recipe shows all at once).
    """

    exit_code = 2
    resumable = False  # whether what was written until then is kept for --resume
    reported = False  # whether it follows a report that says the same: a command has printed that

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        exists: str = "",
        fix: str = "",
        others: tuple[SurgeryError, ...] = (),
    ):
        self.what, self.where, self.exists, self.fix, self.others = what, where, exists, fix, tuple(others)
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [head]
        if self.exists:
            lines.append(f"  available: {self.exists}")
        if self.fix:
            lines.append(f"  to fix: {self.fix}")
        return "\n".join([*lines, *(str(other) for other in self.others)])

    def to_dict(self) -> dict[str, Any]:
        """The same facts as an object, for `--json`."""
        words = {"error": self.what, "where": self.where, "exists": self.exists, "fix": self.fix}
        facts: dict[str, Any] = {key: value for key, value in words.items() if value} | {"exit_code": self.exit_code}
        if self.others:
            facts["others"] = [other.to_dict() for other in self.others]
        return facts


class GateError(SurgeryError):
    """The surgery was done and saved, and costs more quality than the recipe's gate allows."""

    exit_code = 3


class CheckError(SurgeryError):
    """`check` found a fault in a saved checkpoint."""

    exit_code = 4


class MachineError(SurgeryError):
    """Disk, network or permission: nothing in the recipe or the model is at fault."""

    exit_code = 5
    resumable = True


class TrainingError(SurgeryError):
    """A training cannot go on as it was asked for; its checkpoints are kept."""

    resumable = True


def nearest(word: object, known: Iterable[object], cutoff: float = 0.5) -> str:
    """The known word closest to `word`, or "" if none is as close as `cutoff` (1: equal)."""
    from difflib import get_close_matches

    match = get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=cutoff)
    return match[0] if match else ""


def wanted(complaints: list[dict]) -> str:
    """What pydantic wanted in place of one value, its alternatives joined."""
    words = []
    for each in complaints:
        own = WORDS.get(each["type"])
        words.append(own.format(**each.get("ctx", {})) if own else each["msg"].removeprefix("Input should be "))
    return " or ".join(dict.fromkeys(words))


def number_meant(complaints: list[dict]) -> str:
    """What to write for a number that YAML reads as text, as 1.0e-3 for 1e-3; "" where none stands there."""
    for each in complaints:
        if each["type"] == "float_type" and (found := READ_AS_TEXT.fullmatch(str(each["input"]))):
            whole, fraction, sign, power = found.groups()
            return f"write {whole}.{fraction or 0}e{sign or '+'}{power}: YAML reads {each['input']} as text"
    return ""


def any_of(words: Sequence[str]) -> str:
    """ "a, b or c"."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def shown(value: object) -> str:
    """A user's value as it may stand in a message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no int of more
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
