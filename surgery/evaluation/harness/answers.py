"""Runs tasks on a loaded model. Each answer is written down, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery.kernels
import surgery.runtime
from surgery.errors import SettingError, SurgeryError
from surgery.evaluation.harness import version
from surgery.evaluation.harness.task_set import SEEDS, Asking, ItemScore, TaskSet, quiet, seeded
from surgery.io.demo_model import cache_folder
from surgery.io.files import sha256
from surgery.io.hub_errors import brief
from surgery.io.identity import model_identity, tokenizer_identity
from surgery.machine.device import is_out_of_memory
from surgery.machine.placement import AUTO, CPU, accelerators, current

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "2"  # of the files that keep answers


def run(
    model: Any,
    tokenizer: Any,
    tasks: TaskSet,
    asking: Asking,
    answers: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[ItemScore]]:
    """Run tasks on a loaded model, as `lm_eval.simple_evaluate` does with its defaults.

    Args:
        answers: a file that gets every answer at once, and from which the answers of an earlier run are taken.
        progress: called with the number of requests done, and their number.

    Returns:
        Task -> the score of each of its items, in the order of `TaskSet.items`.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks.loaded["tasks"].values():
        if asking.fewshot is not None and task.get_config("num_fewshot") != 0:  # a task that says 0 has no examples
            task.set_config(key="num_fewshot", value=asking.fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS[3])
    hook = _AnswerHook(answers, progress)
    with quiet(), seeded(), _errors():
        results = evaluate(
            lm=_language_model(model, tokenizer, tasks, asking.batch, hook),
            task_dict=tasks.loaded,
            samples=tasks.items(asking.limit),
            apply_chat_template=asking.chat,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
        )
    return {
        name: [
            tasks.missed(name, score) if score.broken else score
            for score in scores_of(results["samples"][name], name, hook.broken)
        ]
        for name in tasks.loaded["tasks"]
    }


@contextmanager
def _errors() -> Iterator[None]:
    """Errors inside lm-eval, which runs code of tasks, as ours; those of memory and of this package are passed on."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, OSError):
            raise
        what = f"lm-eval cannot run these tasks: {type(error).__name__}: {brief(error)}"
        raise SettingError(what, fix="see the page of the task in lm-eval, or its file") from error


def scores_of(
    samples: Sequence[dict[str, Any]], task: str = "", broken: Collection[tuple[str, int]] = ()
) -> list[ItemScore]:
    """The score of each item, from lm-eval's record of every item and filter.

    Args:
        broken: (task, item) of the answers that are NaN or infinite.
    """
    by_item: dict[int, ItemScore] = {}
    for sample in samples:
        score = by_item.setdefault(sample["doc_id"], ItemScore({}, sample["prompt_hash"]))
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        score.values.update({f"{metric}{suffix}": sample[metric] for metric in sample["metrics"]})
    return [replace(by_item[number], broken=(task, number) in broken) for number in sorted(by_item)]


def _language_model(model: Any, tokenizer: Any, tasks: TaskSet, batch: int, hook: _AnswerHook) -> Any:
    """lm-eval's model, which takes known answers from the hook's file and tells the hook each new one."""
    from lm_eval.api.model import hash_args
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from transformers import LogitsProcessorList

    known = hook.read()

    class RememberingModel(HFLM):
        def _ask(self, kind: str, requests: list) -> list:
            total = sum(each.repeats for task in tasks.loaded["tasks"].values() for each in task.instances)
            keys = [hash_args(kind, request.args) for request in requests]
            new = [request for key, request in zip(keys, requests, strict=True) if key not in known]
            hook.begin(len(requests) - len(new), total)
            if kind != "loglikelihood_rolling":  # which reads a long text in windows
                tasks.cut.update((each.task_name, each.doc_id) for each in requests if self._is_cut(kind, *each.args))
            given = iter(getattr(HFLM, kind)(self, new, disable_tqdm=True) if new else ())
            answers = [known[key] if key in known else next(given) for key in keys]
            for key, request, answer in zip(keys, requests, answers, strict=True):
                if key in hook.nonfinite or not _is_finite(answer):
                    hook.broken.add((request.task_name, request.doc_id))
            return answers

        def _is_cut(self, kind: str, prompt: str, asked: Any) -> bool:
            """Whether lm-eval cuts the beginning of a prompt off, so that it and its answer fit."""
            if kind == "loglikelihood":
                return len(self.tok_encode(prompt + asked)) > self.max_length + 1  # the last token is not read
            answer = normalize_gen_kwargs(asked, self.max_gen_toks)["max_gen_toks"]
            return len(self.tok_encode(prompt)) > self.max_length - answer

        def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
            return [tuple(answer) for answer in self._ask("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list:
            return self._ask("loglikelihood_rolling", requests)

        def generate_until(self, requests: list, disable_tqdm: bool = True) -> list:
            return self._ask("generate_until", requests)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            check = _FiniteLogits(len(context))
            options["logits_processor"] = LogitsProcessorList([check])
            written = super()._model_generate(context, max_length, stop, **options)
            hook.broken_rows = check.broken
            return written

    lm = RememberingModel(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    lm.set_cache_hook(hook)
    return lm


def _is_drawn(request: Sequence[Any]) -> bool:
    """Whether an answer may be drawn at random, so that another time it is another."""
    if len(request) < 2 or not isinstance(request[1], Mapping):
        return False
    drawn, temperature = request[1].get("do_sample"), request[1].get("temperature")
    return bool(drawn) or (drawn is None and temperature not in (None, 0, 0.0))


def answers_file(folder: Path, tokenizer: Any, batch: int) -> Path:
    """The file in the cache folder that keeps the answers of a model, so that a run that was interrupted goes on.

    Its name changes with the weights, the configs, the tokenizer that writes the prompts, the size of a batch, the
    versions, and the code that runs the model.
    """
    import torch
    import transformers

    folders = [Path(each) for package in (surgery.runtime, surgery.kernels) for each in package.__path__]
    code = [f"{file.name} {sha256(file)}" for parent in folders for file in sorted(parent.glob("*.py"))]
    kind = next((device.type for device in accelerators()), CPU)
    place = [kind, *(each for each in vars(current()).values() if each != AUTO)]
    parts = [FORMAT, version(), torch.__version__, transformers.__version__, *place, str(batch), *code]
    parts += [model_identity(folder), tokenizer_identity(tokenizer)]
    parent = cache_folder() / "answers"
    parent.mkdir(parents=True, exist_ok=True)
    return parent / f"{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:32]}.jsonl"


class _FiniteLogits:
    """A logits processor that notes the prompts of a batch whose logits are NaN or infinite, and lets them go on.

    Args:
        prompts: the number of prompts; each may have several beams.
    """

    def __init__(self, prompts: int):
        self.broken = [False] * prompts

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """The logits [prompts * beams, vocabulary], zeros where they are broken: drawing from NaN would raise."""
        rows = ~logits.amax(-1).isfinite()  # -inf alone rules a token out
        if rows.any():
            now = rows.reshape(len(self.broken), -1).any(-1).tolist()
            self.broken = [one or other for one, other in zip(self.broken, now, strict=True)]
        return logits.masked_fill(rows[:, None], 0.0)


def _is_finite(answer: Any) -> bool:
    """Whether a log-likelihood is a number; of a written answer the logits say so (`_FiniteLogits`)."""
    value = answer[0] if isinstance(answer, list | tuple) else answer
    return not isinstance(value, float) or not (math.isnan(value) or value == math.inf)


class _AnswerHook:
    """What lm-eval calls with each new answer: it is written down and counted.

    The file has a line for each answer: its key, the answer, and true where an answer was written from NaN or infinite
    logits. Answers that may be drawn at random are not in it.
    """

    def __init__(self, file: Path | None, progress: Callable[[int, int], None] | None):
        self.file, self.progress, self.done, self.total = file, progress, 0, 0
        self.broken: set[tuple[str, int]] = set()  # (task, item) of answers that are NaN or infinite
        self.nonfinite: set[str] = set()  # keys of answers that were written from such logits
        self.broken_rows: list[bool] = []  # of the batch that lm-eval hands over next, in its order

    def read(self) -> dict[str, Any]:
        """The answers of an interrupted run, by key; a line that is no answer (it was cut off) is left out."""
        answers: dict[str, Any] = {}
        if self.file is None or not self.file.is_file():
            return answers
        for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                key, answer, *nonfinite = json.loads(line)
            except (ValueError, TypeError):
                continue
            if isinstance(key, str):
                answers[key] = answer
                self.nonfinite |= {key} if nonfinite else set()
        return answers

    def begin(self, known: int, total: int) -> None:
        """Count the answers that are known already."""
        self.done, self.total = self.done + known, total
        self._report()

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """lm-eval's own name for this call."""
        from lm_eval.api.model import hash_args

        key, nonfinite = hash_args(kind, request), kind == "generate_until" and self.broken_rows.pop(0)
        self.nonfinite |= {key} if nonfinite else set()
        if self.file is not None and not _is_drawn(request):
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps([key, answer, *([True] if nonfinite else [])]) + "\n")
        self.done += 1
        self._report()

    def _report(self) -> None:
        if self.progress:
            self.progress(min(self.done, self.total), self.total)
