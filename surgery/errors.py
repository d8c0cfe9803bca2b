"""Errors that a user sees: one sentence on what is wrong, where it is, what is available, and how to fix it.

Exit codes of the command: 0 done; 1 a bug of ours; 2 recipe, plan, usage or input; 3 a quality gate failed;
4 `check` found a fault; 5 the environment (disk, network, permission); 130 interrupted.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

# Kind of a pydantic error -> what was wanted, in a recipe's words. Other kinds keep pydantic's message.
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
READ_AS_TEXT = re.compile(r"([-+]?[0-9]+)(?:\.([0-9]*))?[eE]([-+]?)([0-9]+)")  # numbers that YAML 1.1 reads as text


# The kind of an error, for programs. A code never changes; the message of an error may.
Code = Literal[
    "invalid-argument",  # an argument, an option or a command that is not valid
    "invalid-setting",  # a setting of a probe, a healing or a benchmark
    "unknown-recipe",  # there is no recipe of this name, or no such recipe file
    "invalid-recipe",  # a fault in a recipe or an override
    "recipe-mismatch",  # the recipe cannot be applied to this model
    "model-not-found",  # there is no such folder, repository or revision
    "invalid-model",  # config, index or weights are damaged or contradict each other
    "unsupported-model",  # a sound model that cannot be edited, measured or trained here
    "unsafe-weights",  # weights are pickles, or links lead out of the folder
    "model-mismatch",  # model, base, tokenizer, report or score file do not belong together
    "unusable-text",  # a text or a file of questions is missing, is not text, or is too short
    "invalid-file",  # a file of another kind is missing or cannot be read
    "out-exists",  # the output's name is taken by something that must not be replaced
    "unfinished-run",  # an earlier run left a part that does not fit, or must be resumed
    "invalid-record",  # surgery.json is missing or damaged
    "unchecked-output",  # a push of a folder that has not passed the check, or was changed since
    "missing-package",  # an optional package is not installed
    "plugin-fault",  # an operation of another package breaks the contract
    "gate-failed",  # the surgery costs more than the recipe allows
    "check-failed",  # the check found a fault
    "training-failed",  # a training cannot continue
    "machine-failure",  # the system failed for a reason other than the next four
    "disk-full",
    "permission-denied",  # by the system or the Hub
    "out-of-memory",
    "network-failure",
    "internal-error",  # a bug of ours
]


class SurgeryError(Exception):
    """A user's mistake that has one clear remedy. The command prints it without a traceback.

    Args:
        what: the fault in one sentence.
        where: the file and line, tensor, folder or option in which it was found.
        exists: what is available instead (the known names, the legal values).
        fix: what to type or change.
        others: further faults found in the same pass; they are shown together.
        code: the kind of error, for programs; default: the code of the class.
    """

    code: Code = "invalid-argument"
    exit_code: int = 2
    resumable = False  # whether the files written so far are kept for --resume
    reported = False  # whether the command has already printed a report that contains this fault

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        exists: str = "",
        fix: str = "",
        others: tuple[SurgeryError, ...] = (),
        code: Code | None = None,
    ):
        self.what, self.where, self.exists, self.fix, self.others = what, where, exists, fix, tuple(others)
        self.code = code or type(self).code
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [head]
        if self.exists:
            lines.append(f"  available: {self.exists}")
        if self.fix:
            lines.append(f"  to fix: {self.fix}")
        return "\n".join([*lines, *(str(other) for other in self.others)])

    def in_a_line(self) -> str:
        """The same words in one line, as a problem of a recipe."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return "; ".join(filter(None, (head, self.exists, self.fix)))

    def to_dict(self) -> dict[str, Any]:
        """The same facts as an object, for `--json`: `code` for programs, `message` as printed, and its parts."""
        words = {"error": self.what, "where": self.where, "exists": self.exists, "fix": self.fix}
        words |= {"code": self.code, "message": str(self)}
        facts: dict[str, Any] = {key: value for key, value in words.items() if value} | {"exit_code": self.exit_code}
        if self.others:
            facts["others"] = [other.to_dict() for other in self.others]
        return facts


class RecipeError(SurgeryError):
    """A recipe or an override is not valid."""

    code = "invalid-recipe"


class RecipeMismatchError(SurgeryError):
    """A valid recipe cannot be applied to this model."""

    code = "recipe-mismatch"


class SettingError(SurgeryError):
    """A setting of a probe, a healing, a search or a benchmark has a value that is not valid."""

    code = "invalid-setting"


class ModelError(SurgeryError):
    """A model's config, index, weights or tokenizer are damaged or contradict each other."""

    code = "invalid-model"


class UnsupportedModelError(SurgeryError):
    """A sound model cannot be edited, measured or trained here."""

    code = "unsupported-model"


class ModelMismatchError(SurgeryError):
    """Model, base, tokenizer, report or score file do not belong together."""

    code = "model-mismatch"


class TextError(SurgeryError):
    """A text or a file of questions is missing, is not text, or is too short."""

    code = "unusable-text"


class OutputExistsError(SurgeryError):
    """The output's name is taken by something that must not be replaced."""

    code = "out-exists"


class ModelNotFoundError(SurgeryError):
    """There is no such folder, repository or revision."""

    code = "model-not-found"


class RecordError(SurgeryError):
    """A checkpoint's surgery.json, or the data that should be written into one, is missing or damaged."""

    code = "invalid-record"


class GateError(SurgeryError):
    """The converted model was saved, but lost more quality than the recipe's gate allows."""

    code = "gate-failed"
    exit_code = 3


class CheckError(SurgeryError):
    """`check` found a fault in a saved checkpoint."""

    code = "check-failed"
    exit_code = 4


class MachineError(SurgeryError):
    """The disk, the network or a permission is at fault, not the recipe or the model."""

    code = "machine-failure"
    exit_code = 5
    resumable = True


class NetworkError(MachineError):
    """The Hub cannot be reached, or its answer is not valid."""

    code = "network-failure"


class AccessError(MachineError):
    """The system or the Hub does not let this user read or write."""

    code = "permission-denied"


class TrainingError(SurgeryError):
    """A training cannot continue; its checkpoints are kept."""

    code = "training-failed"


class OtherTrainingError(TrainingError):
    """The checkpoints of an unfinished training belong to another training."""

    code = "unfinished-run"
    resumable = True


def system_code(number: int | None) -> Code:
    """The code of a system error, by its `errno` number (None: unknown)."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "disk-full"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "permission-denied"
    return "out-of-memory" if number == errno.ENOMEM else "machine-failure"


def nearest(word: object, known: Iterable[object], cutoff: float = 0.5) -> str:
    """The known word closest to `word`, or "" if none is as close as `cutoff` (1: equal)."""
    from difflib import get_close_matches

    match = get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=cutoff)
    return match[0] if match else ""


def wanted(complaints: list[dict]) -> str:
    """What pydantic wanted in place of one value; alternatives are joined by "or"."""
    words = []
    for each in complaints:
        own = WORDS.get(each["type"])
        words.append(own.format(**each.get("ctx", {})) if own else each["msg"].removeprefix("Input should be "))
    return " or ".join(dict.fromkeys(words))


def number_meant(complaints: list[dict]) -> str:
    """How to write a number that YAML reads as text (1.0e-3 for 1e-3); "" if the value is no such number."""
    for each in complaints:
        if each["type"] == "float_type" and (found := READ_AS_TEXT.fullmatch(str(each["input"]))):
            whole, fraction, sign, power = found.groups()
            return f"write {whole}.{fraction or 0}e{sign or '+'}{power}: YAML reads {each['input']} as text"
    return ""


def any_of(words: Sequence[str]) -> str:
    """The words joined as in "a, b or c"."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def all_of(words: Sequence[str]) -> str:
    """The words joined as in "a, b and c"; "" for none."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def shown(value: object) -> str:
    """A user's value for a message, at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an int of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
