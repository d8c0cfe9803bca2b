"""Runs tasks on a loaded model. Each answer is written down, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import surgery.runtime
from surgery.evaluation.harness import version
from surgery.evaluation.harness.task_set import SEEDS, Asking, ItemScore, TaskSet, quiet, seeded
from surgery.io.demo_model import cache_folder
from surgery.io.safetensors import Checkpoint

READ_WITH_MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
READ_WITH_MODEL += ("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")


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
    with quiet(), seeded():
        results = evaluate(
            lm=_language_model(model, tokenizer, tasks, asking.batch, _AnswerHook(answers, progress)),
            task_dict=tasks.loaded,
            samples=tasks.items(asking.limit),
            apply_chat_template=asking.chat,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
        )
    return {name: scores_of(results["samples"][name]) for name in tasks.loaded["tasks"]}


def scores_of(samples: Sequence[dict[str, Any]]) -> list[ItemScore]:
    """The score of each item, from lm-eval's record of every item and filter."""
    by_item: dict[int, ItemScore] = {}
    for sample in samples:
        score = by_item.setdefault(sample["doc_id"], ItemScore({}, sample["prompt_hash"]))
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        score.values.update({f"{metric}{suffix}": sample[metric] for metric in sample["metrics"]})
    return [by_item[number] for number in sorted(by_item)]


def _language_model(model: Any, tokenizer: Any, tasks: TaskSet, batch: int, hook: _AnswerHook) -> Any:
    """lm-eval's model, which takes known answers from the hook's file and tells the hook each new one."""
    from lm_eval.api.model import hash_args
    from lm_eval.models.huggingface import HFLM

    known = _read_answers(hook.file)

    class RememberingModel(HFLM):
        def _ask(self, kind: str, requests: list) -> list:
            total = sum(each.repeats for task in tasks.loaded["tasks"].values() for each in task.instances)
            keys = [None if _is_drawn(request.args) else hash_args(kind, request.args) for request in requests]
            new = [request for key, request in zip(keys, requests, strict=True) if key not in known]
            hook.begin(len(requests) - len(new), total)
            given = iter(getattr(HFLM, kind)(self, new, disable_tqdm=True) if new else ())
            return [known[key] if key in known else next(given) for key in keys]

        def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
            return [tuple(answer) for answer in self._ask("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list:
            return self._ask("loglikelihood_rolling", requests)

        def generate_until(self, requests: list, disable_tqdm: bool = True) -> list:
            return self._ask("generate_until", requests)

    lm = RememberingModel(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    lm.set_cache_hook(hook)
    return lm


def _is_drawn(request: Sequence[Any]) -> bool:
    """Whether an answer is drawn at random, so that another time it is another."""
    return len(request) > 1 and isinstance(request[1], Mapping) and bool(request[1].get("do_sample"))


def answers_file(folder: Path) -> Path:
    """The file in the cache folder that keeps the answers of a model, so that a run that was interrupted goes on.

    Its name changes with the weights, config and tokenizer, with lm-eval and with the code that runs the model.
    """
    digest = hashlib.sha256(f"{version()} {Checkpoint(folder).fingerprint()}".encode())
    code = Path(surgery.runtime.__file__).parent.glob("*.py")
    for file in sorted([*code, *(folder / name for name in READ_WITH_MODEL if (folder / name).is_file())]):
        digest.update(file.name.encode() + file.read_bytes())
    parent = cache_folder() / "answers"
    parent.mkdir(parents=True, exist_ok=True)
    return parent / f"{digest.hexdigest()[:32]}.jsonl"


def _read_answers(file: Path | None) -> dict[str, Any]:
    """The answers of an interrupted run; a line that was cut off is left out."""
    answers: dict[str, Any] = {}
    if file is None or not file.is_file():
        return answers
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            key, answer = json.loads(line)
        except ValueError:
            continue
        answers[key] = answer
    return answers


class _AnswerHook:
    """What lm-eval calls with each new answer: it is written down and counted."""

    def __init__(self, file: Path | None, progress: Callable[[int, int], None] | None):
        self.file, self.progress, self.done, self.total = file, progress, 0, 0

    def begin(self, known: int, total: int) -> None:
        """Count the answers that are known already."""
        self.done, self.total = self.done + known, total
        self._report()

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """lm-eval's own name for this call."""
        from lm_eval.api.model import hash_args

        if self.file is not None and not _is_drawn(request):
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps([hash_args(kind, request), answer]) + "\n")
        self.done += 1
        self._report()

    def _report(self) -> None:
        if self.progress:
            self.progress(min(self.done, self.total), self.total)
