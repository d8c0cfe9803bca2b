"""Tasks with their data: how they are found, which items are asked, which metric judges, and how a total is made."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from surgery.errors import NetworkError, SettingError, SurgeryError
from surgery.evaluation.harness import version
from surgery.evaluation.harness.task_index import (
    folder_of_groups,
    group_of_file,
    manager_of,
    refuse_other_group,
    refuse_unknown,
)
from surgery.io.hub_errors import brief

RULER = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
RULER += ("niah_multiquery", "niah_multivalue", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad")
RULER += ("ruler_qa_hotpot",)  # Hsieh et al. 2024, arXiv 2404.06654: 13 tasks
RULER_OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
PREFERRED = ("acc_norm", "acc", "exact_match")  # where a task has several metrics, the first of these judges it
SEEDS = (0, 1234, 1234, 1234)  # lm-eval's own defaults: of random, numpy, torch and the examples before a question
NETWORK_LIBRARIES = {"aiohttp", "httpx", "requests", "urllib3"}
ANOTHER_LENGTH = -1.0  # RULER's score of an item that has another length than a metric's


@dataclass(frozen=True)
class ItemScore:
    """What a model scored on one item.

    Attributes:
        values: metric -> value; of a metric of a corpus (perplexity), what it is computed from.
        prompt: hash of the text that the model read.
        broken: whether the model gave NaN or infinity.
    """

    values: dict[str, Any]
    prompt: str
    broken: bool = False

    def number(self, metric: str) -> float | None:
        """The score as a number; None where it is none, or the item has another length than a RULER metric."""
        value = self.values.get(metric)
        if isinstance(value, bool | int | float) and not (metric.isdigit() and value == ANOTHER_LENGTH):
            return float(value)
        return None


@dataclass(frozen=True)
class Asking:
    """How tasks are asked.

    Attributes:
        limit: the first items of each task; None: all.
        fewshot: solved examples before each question; None: as the task says.
        chat: prompts are written out by the chat template.
        batch: requests in one forward pass.
    """

    limit: int | None = None
    fewshot: int | None = None
    chat: bool = False
    batch: int = 1


@dataclass
class TaskSet:
    """Tasks with their data.

    Attributes:
        loaded: lm-eval's tasks and groups.
        named: what lm-eval calls what was asked for: names, and paths of tasks' files.
        lengths: tokens of RULER's prompts; () without RULER.
        left_out: RULER tasks that were left out -> why.
        folder: the folder of files that lm-eval must know for groups among them; None: none.
        cut: (task, item) of the prompts so far that were, with their answer, longer than the model takes; lm-eval cuts
            their beginning.
    """

    loaded: dict[str, Any]
    named: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    folder: str | None = None
    cut: set[tuple[str, int]] = field(default_factory=set)

    def items(self, limit: int | None) -> dict[str, list[int]]:
        """Task -> numbers of the items that are asked: the first `limit`, in RULER of every length."""
        chosen = {}
        for name, task in self.loaded["tasks"].items():
            every = range(len(task.eval_docs))
            if name in RULER and self.lengths:
                sizes = list(task.eval_docs["max_length"])
                by_length = [[number for number in every if sizes[number] == size] for size in self.lengths]
                chosen[name] = [number for numbers in by_length for number in numbers[:limit]]
            else:
                chosen[name] = list(every[:limit])
        return chosen

    def scored(self, limit: int | None) -> tuple[bool, str]:
        """Whether likelihoods are asked for, of whole prompts; and the longest text of which all tokens are scored."""
        kinds = {name: task.OUTPUT_TYPE for name, task in self.loaded["tasks"].items()}
        texts = (
            self.loaded["tasks"][name].doc_to_target(self.loaded["tasks"][name].eval_docs[number])
            for name, numbers in self.items(limit).items()
            for number in (numbers if kinds[name] == "loglikelihood_rolling" else ())
        )
        longest = max((text for text in texts if isinstance(text, str)), key=len, default="")
        return any(kind != "generate_until" for kind in kinds.values()), longest

    def groups(self) -> dict[str, list[str]]:
        """Group -> its tasks."""
        return {
            name: [task.task_name for task in group.get_all_tasks()] for name, group in self.loaded["groups"].items()
        }

    def aggregates(self, group: str) -> dict[str, bool]:
        """The metrics that a group names -> whether each item counts alike, and not each task; {}: none."""
        listed = getattr(self.loaded["groups"].get(group), "aggregate_metric_list", None) or ()
        return {each.metric: each.weight_by_size for each in listed}

    def about(self, name: str) -> dict[str, Any]:
        """Version of a task, and how many solved examples stand before its question."""
        config = self.loaded["tasks"][name].config
        return {"version": (config.metadata or {}).get("version"), "fewshot": config.num_fewshot or 0}

    def metrics(self, name: str, scores: Sequence[ItemScore]) -> list[str]:
        """The metrics of a task, the one that judges it first."""
        known = {metric: None for score in scores for metric in score.values}
        if name in RULER and self.lengths:
            return [str(size) for size in self.lengths if str(size) in known]
        return sorted(known, key=lambda metric: _rank(metric.partition(",")[0]))

    def higher_is_better(self, name: str, metric: str) -> bool:
        """Whether a higher value of the metric is better."""
        return self.loaded["tasks"][name].higher_is_better().get(metric.partition(",")[0]) is not False

    def missed(self, name: str, score: ItemScore) -> ItemScore:
        """The score of an item whose answer is NaN: 0, or NaN for a metric that is better the lower it is."""
        values = dict(score.values)
        for metric in values:
            if score.number(metric) is not None:
                values[metric] = 0.0 if self.higher_is_better(name, metric) else math.nan
        return replace(score, values=values)

    def total(self, name: str, metric: str, scores: Sequence[ItemScore]) -> float:
        """The metric over all items, by the task's own rule."""
        values = [score.values[metric] for score in scores if metric in score.values]
        rules = self.loaded["tasks"][name].aggregation()
        # RULER's tasks name some lengths, with one rule for all of them; another length has that rule too.
        rule = rules.get(metric.partition(",")[0]) or (next(iter(rules.values())) if name in RULER else None)
        if rule is None:
            raise SettingError(f"{name} gives {metric}, and does not say how its items are summed up")
        return float(rule(values))


def _rank(metric: str) -> int:
    return PREFERRED.index(metric) if metric in PREFERRED else len(PREFERRED)


def load_tasks(
    names: Sequence[str], lengths: Sequence[int], tokenizer: Any, *, progress: Callable[[int, int], None] | None = None
) -> TaskSet:
    """Find tasks and read their data.

    Args:
        names: tasks, groups and tags of lm-eval, and YAML files of tasks and groups.
        lengths: also the tasks of RULER, with prompts of these many tokens. Those whose data cannot be reached are
            left out.
        tokenizer: counts the tokens of RULER's prompts.
        progress: called with the number of tasks read, and their number.

    Raises:
        SettingError: there is no such task, a file is not a task, or groups' files lie in two folders.
        NetworkError: the data of a named task are on the Hub, which cannot be reached.
    """
    version()
    with quiet(), seeded(), tempfile.TemporaryDirectory() as saved:
        metadata = {}
        if lengths:  # a folder that we wrote: RULER loads it with trust_remote_code
            tokenizer.save_pretrained(saved)
            metadata = {"max_seq_lengths": list(lengths), "tokenizer": saved}
        refuse_unknown(names)
        folder = folder_of_groups(names)
        manager = manager_of(json.dumps(metadata), folder)
        wanted = [*dict.fromkeys(names), *(name for name in RULER if lengths and name not in names)]
        found: dict[str, dict[str, Any]] = {}
        left_out, offline = {}, ""
        for number, name in enumerate(wanted):
            if progress:
                progress(number, len(wanted))
            if offline and name not in names and name not in RULER_OFFLINE:
                left_out[name] = offline
                continue
            try:
                found[name] = _load(manager, name)
            except NetworkError as error:
                if name in names:
                    raise
                left_out[name], offline = error.what, f"not tried, since {error.what}"
            except SettingError as error:  # such as prompts that are too short for a task of RULER
                if name in names:
                    raise
                left_out[name] = error.what
        if not found and not offline:
            raise SettingError(
                "no task of RULER could be made", exists="; ".join({*left_out.values()}), fix="--ruler 4k"
            )
        if not found:
            raise NetworkError("no task of RULER could be made", fix="allow the network once")
        merged: dict[str, dict[str, Any]] = {kind: {} for kind in ("tasks", "groups", "group_map")}
        for name, part in found.items():
            if twice := [task for task in part["tasks"] if task in merged["tasks"]]:
                what = f"{name} has the task {twice[0]}, which another name has too"
                raise SettingError(what, fix="leave one of them out; a file may give its task another name")
            for kind, entries in merged.items():
                entries.update(part[kind])
        called = tuple(group_of_file(name) or name for name in found)
        return TaskSet(merged, called, tuple(lengths), left_out, folder)


def _load(manager: Any, name: str) -> dict[str, Any]:
    """A task, group or tag with its data; errors of lm-eval and of its data as ours."""
    group = group_of_file(name)
    if group:
        refuse_other_group(manager.task_index, name, group)
    try:
        loaded = manager.load([group or name])
    except SurgeryError:
        raise
    except Exception as error:  # any kind: tasks are files and code of others
        # nltk's own advice is longer than a screen.
        if type(error) is LookupError and "nltk" in str(error).lower():
            what = (
                f"the task {name} needs data of nltk that are not on this machine, and the network does not give them"
            )
            raise NetworkError(what, fix="allow the network once, or python -m nltk.downloader all") from error
        if _is_of_network(error):
            what = f"the data of the task {name} are not on this machine, and the network does not give them"
            fix = "allow the network once, after which they stay in the cache; or use a task with local data"
            raise NetworkError(f"{what} ({brief(error)})", fix=fix) from error
        fix = "check the file" if Path(name).suffix else "see its page in lm-eval"
        raise SettingError(f"lm-eval cannot load the task {name}: {brief(error)}", fix=fix) from error
    if not loaded["tasks"]:
        raise SettingError(f"the group of {name} has no tasks", fix="name them as a list: `task: [piqa, hellaswag]`")
    if unsafe := [task for task, each in loaded["tasks"].items() if getattr(each, "UNSAFE_CODE", False)]:
        what = f"the task {unsafe[0]} runs the code that a model writes, which is refused"
        raise SettingError(what, fix="run it with lm_eval itself, in a sandbox")
    return loaded


def _is_of_network(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is of the network or of the Hub."""
    chain: BaseException | None = error
    while chain is not None:
        libraries = {kind.__module__.partition(".")[0] for kind in type(chain).__mro__}
        if isinstance(chain, ConnectionError | TimeoutError) or libraries & NETWORK_LIBRARIES:
            return True
        if type(chain).__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "URLError"):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Without bars, log lines and prints of lm-eval, its libraries and its tasks: the caller reports the progress."""
    from tqdm.std import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "nltk")]
    levels = [each.level for each in loggers]
    make = tqdm.__init__

    def without_bar(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options | {"disable": True})

    no_bars = mock.patch.object(tqdm, "__init__", without_bar)
    with no_bars, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), _quiet_nltk(nowhere):
        try:
            for each in loggers:
                each.setLevel(logging.CRITICAL)
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)


def _quiet_nltk(nowhere: TextIO) -> AbstractContextManager[Any]:
    """With the lines of nltk's downloader written elsewhere: tasks that use nltk ask for its data on import.

    RULER asks too, and splits only its essays with them. Where they are missing, `_load` says so.
    """
    if importlib.util.find_spec("nltk") is None:
        return nullcontext()
    import nltk

    return mock.patch.object(nltk, "download", partial(nltk.download, quiet=True, print_error_to=nowhere))


@contextmanager
def seeded() -> Iterator[None]:
    """With lm-eval's seeds; the random states of the process are restored."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEEDS[0])
        numpy.random.seed(SEEDS[1])
        torch.manual_seed(SEEDS[2])
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
