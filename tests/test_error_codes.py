"""Every error has a code of a short list: programs go by it, whatever becomes of the words."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import get_args

import pytest
from conftest import listing

import surgery
from surgery import errors
from surgery.errors import Code, SurgeryError

PACKAGE = Path(surgery.__file__).parent
CODES = get_args(Code)
CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, SurgeryError)}


def made() -> list[tuple[str, ast.Call]]:
    """Every place of the package that makes one of our errors."""
    calls = []
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "kernels").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", ""))
            if isinstance(node, ast.Call) and name in CLASSES:
                calls.append((f"{path.relative_to(PACKAGE.parent)}:{node.lineno}", node))
    return calls


def test_the_list_of_codes_is_short_and_says_kinds():
    assert 15 <= len(CODES) <= 30
    assert len(set(CODES)) == len(CODES)
    for code in CODES:
        assert code.replace("-", "").isalpha()
        assert code == code.lower()
        assert len(code) <= 20
    assert {cls.code for cls in CLASSES.values()} <= set(CODES)


def test_every_error_of_the_package_is_made_with_a_known_code():
    calls = made()
    assert len(calls) > 300
    used = set()
    for where, call in calls:
        given = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
        constants = [node for value in given for node in ast.walk(value) if isinstance(node, ast.Constant)]
        texts = [node.value for node in constants if isinstance(node.value, str)]
        assert set(texts) <= set(CODES), where
        used |= set(texts) if given else {CLASSES[call.func.id].code}
    # Those of the system's errors are chosen by number, in `system_code`.
    used |= {errors.system_code(number) for number in (None, *errors.errno.errorcode)}
    assert used == set(CODES), "a code that no error has is no promise"


def test_an_error_that_is_passed_on_keeps_its_code():
    """Where an error is made from another one's words, it is of that one's kind."""
    for where, call in made():
        words = call.args[0] if call.args else None
        if isinstance(words, ast.Attribute) and words.attr == "what":
            given = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
            named = CLASSES[call.func.id] is not SurgeryError
            assert named or (given and ast.unparse(given[0]) == f"{ast.unparse(words.value)}.code"), where


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_a_class_has_a_code_and_an_instance_may_have_another(cls):
    assert cls("what").code == cls.code
    assert cls("what", code="disk-full").code == "disk-full"
    assert cls.code != "disk-full"
    told = cls("what", where="here", fix="that", others=(SurgeryError("more"),)).to_dict()
    assert told["code"] == cls.code
    assert told["message"] == "here: what\n  to fix: that\nmore"
    assert (told["error"], told["where"], told["fix"]) == ("what", "here", "that"), "keys of before"
    assert told["others"][0]["code"] == "invalid-argument"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("plan", "gqqa", "model"), "unknown-recipe"),
        (("plan", "nowhere.yaml", "model"), "unknown-recipe"),
        (("plan", "gqa", "model", "kv_hedas=1"), "invalid-recipe"),
        (("plan", "gqa", "model", "kv_heads=2.5"), "invalid-recipe"),
        (("plan", "gqa", "model", "kv_heads=2"), "recipe-mismatch"),
        (("plan", "gqa", "./nowhere"), "model-not-found"),
        (("plan", "gqa", "empty"), "invalid-model"),
        (("apply", "mqa", "model", "-o", "model"), "out-exists"),
        (("apply", "mqa", "model", "-o", "empty"), "out-exists"),
        (("apply", "mqa", "model"), "invalid-argument"),
        (("eval", "model", "--probe", "perplexity", "windoes=1"), "invalid-setting"),
        (("eval", "model", "--probe", "perplexty"), "invalid-setting"),
        (("eval", "model", "--text", "nowhere.txt"), "unusable-text"),
        (("check", "model"), "invalid-record"),
        (("push", "model", "me/mine"), "invalid-record"),
        (("frobnicate",), "invalid-argument"),
    ],
)
def test_codes_that_the_command_prints(surgery, model, tmp_path, args, code):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    ran = surgery(*args, "--json")
    assert ran.code == 2
    assert ran.json["code"] == code, ran.out
    assert ran.json["message"].splitlines()[0].endswith(ran.json["error"].splitlines()[0])
    assert listing(tmp_path) == before


def test_an_error_of_the_system_is_told_by_its_number(tmp_path):
    import errno

    from surgery.io.output_folder import machine_errors

    kinds = {
        errno.ENOSPC: "disk-full",
        errno.EACCES: "permission-denied",
        errno.ENOMEM: "out-of-memory",
        errno.EIO: "machine-failure",
    }
    for number, code in kinds.items():
        with pytest.raises(errors.MachineError) as caught, machine_errors(tmp_path):
            raise OSError(number, "of the system")
        assert (caught.value.code, caught.value.exit_code) == (code, 5)
