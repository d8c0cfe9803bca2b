"""Writes the questions of a probe as a task of lm-eval, which anyone can run on any model with `lm_eval --tasks FILE`.

lm-eval turns text into tokens itself. A question that would become other tokens than ours is left out, and so is one
whose choices have different numbers of tokens. So the items of the task are scored exactly as the probe scores them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from surgery.data.text import begin_of_text
from surgery.errors import OutputExistsError, SettingError
from surgery.evaluation.probes import every
from surgery.evaluation.probes.base import CaseProbe
from surgery.io.loading import read_config, read_tokenizer

if TYPE_CHECKING:
    from surgery.io.loading import ModelSource

READER = '''"""Reads the items of the task from the file beside this one, wherever lm_eval is started."""

import json
from pathlib import Path


def {function}(**_):
    from datasets import Dataset

    lines = Path(__file__).with_name("{items}").read_text(encoding="utf-8").splitlines()
    return {{"test": Dataset.from_list([json.loads(line) for line in lines])}}
'''


@dataclass(frozen=True)
class WrittenTask:
    """A task that was written.

    Attributes:
        file: the YAML file.
        items: number of its items.
        left_out: number of questions that lm-eval would read or score otherwise.
    """

    file: Path
    items: int
    left_out: int


def write_task(probe: CaseProbe, model: ModelSource, folder: Path, tokenizer: Any = None) -> WrittenTask:
    """Write the questions that a probe asks a model as a task of lm-eval: NAME.yaml, its items, and what reads them.

    Args:
        model: its tokenizer makes the questions; no weight is read.
        folder: is made if it does not exist.

    Raises:
        SurgeryError: the probe has no questions with one right answer each; the files exist; or every question is left
            out.
    """
    if not getattr(probe, "task", None):
        names = ", ".join(cls.name for cls in every() if getattr(cls, "task", None))
        raise SettingError(f"{probe.name} cannot be written as a task", exists=names, fix="one of these")
    if getattr(probe, "late", False):
        raise SettingError("late=true cannot be written: lm-eval reads a prompt in one call", fix="late=false")
    tokenizer = tokenizer or read_tokenizer(model)
    result = probe.make_cases(tokenizer, {"out": read_config(model)})
    name = f"surgery_{probe.name}"
    files = [folder / f"{name}{ending}" for ending in (".yaml", ".jsonl", "_items.py")]
    if taken := next((file for file in files if file.exists()), None):
        raise OutputExistsError(f"{taken} exists already", fix="another folder, or remove it")
    documents = [_document(tokenizer, *probe.question(case)) for case in result.cases]
    kept = [document for document in documents if document]
    if not kept:
        what = "lm-eval would read every question as other tokens, or score it otherwise"
        raise SettingError(what, fix=f"surgery eval MODEL --probe {probe.name}")
    config = {
        "task": name,
        "custom_dataset": _Function(f"{name}_items.read"),
        "dataset_path": "",
        "dataset_name": "",
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
        **probe.task,
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SettingError(
            "this is a file, and a folder is needed", where=str(folder), fix="--write-task FOLDER"
        ) from None
    header = f"# {probe.summary}. Settings: {json.dumps(result.settings)}\n"
    files[0].write_text(header + yaml.dump(config, Dumper=_Dumper, sort_keys=False), encoding="utf-8")
    files[1].write_text("".join(json.dumps(document) + "\n" for document in kept), encoding="utf-8")
    files[2].write_text(READER.format(function="read", items=files[1].name), encoding="utf-8")
    return WrittenTask(files[0], len(kept), len(documents) - len(kept))


class _Function(str):
    """The name of a Python function in a YAML file of lm-eval."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _document(
    tokenizer: Any, prompt: Iterable[int], answers: list[Iterable[int]], right: int
) -> dict[str, Any] | None:
    """A question as text; None where lm-eval would turn it into other tokens, or score it otherwise."""
    prompt, answers = list(prompt), [list(answer) for answer in answers]
    if len(set(map(len, answers))) > 1:  # lm-eval sums over the tokens of a choice, and this project takes the mean
        return None
    bos = begin_of_text(tokenizer)
    shown = prompt[len(bos) :] if bos and prompt[: len(bos)] == bos else prompt
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = decode(shown)
    texts = [decode([*shown, *answer])[len(text) :] for answer in answers]
    encode = _encoder(tokenizer)
    if any(_split(encode, text, each) != (prompt, answer) for each, answer in zip(texts, answers, strict=True)):
        return None
    return {"prompt": text} | ({"answers": texts, "right": right} if len(texts) > 1 else {"answer": texts[0]})


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """How lm-eval turns text into tokens: with BOS where the tokenizer adds it and the text does not begin with it."""
    bos = getattr(tokenizer, "bos_token", None)

    def encode(text: str) -> list[int]:
        begun = bool(bos) and text.startswith(bos)
        return tokenizer.encode(text, **({"add_special_tokens": False} if begun else {}))

    return encode


def _split(encode: Callable[[str], list[int]], prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of prompt and answer as lm-eval splits them: blanks that end the prompt belong to the answer."""
    bare = prompt.rstrip()
    whole, before = encode(prompt + answer), encode(bare)
    return before, whole[len(before) :]
