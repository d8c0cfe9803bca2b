"""The trackers that a training reports to (`heal.report_to`), which also get the scores and the verdict of the gate.

Transformers reports to a tracker (tensorboard, wandb, mlflow, ...) by a callback of the Trainer, and many of these end
the tracker's run when the training ends. The scores are known later. So the end of the training is told to a tracker
only after the scores are, and everything lands in one run.
"""

from __future__ import annotations

import logging
import re
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from surgery.errors import MachineError
from surgery.evaluation import probes
from surgery.evaluation.run import SCORE_LISTENERS
from surgery.io.hub_errors import brief
from surgery.machine.transformers_logging import quiet_transformers
from surgery.report.gate import finite

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

END, LOG = "on_train_end", "on_log"  # names of events
SIDES = {"": "out", "_base": "base"}  # ending of a figure's name -> the model in an evaluation
OWN = {"loss": "cross_entropy", "perplexity": "perplexity"}  # a figure's name -> key of a model's own figures
warn = logging.getLogger(__name__).warning  # on stderr, unless a program has set up its logs


_OPEN: weakref.WeakKeyDictionary[Any, weakref.finalize] = weakref.WeakKeyDictionary()


def close_earlier(model: Any) -> None:
    """End the runs of an earlier healing of this model in memory: the next healing begins its own."""
    if finalizer := _OPEN.pop(model, None):
        finalizer()
        del SCORE_LISTENERS[model]


class Trackers:
    """The trackers of one training. They stand in the Trainer's callbacks in place of those of Transformers.

    Args:
        trainer: a Trainer whose arguments name the trackers.
        main: whether this is the first process, which alone has scores to report.
    """

    def __init__(self, trainer: Trainer, main: bool):
        from transformers.integrations.integration_utils import get_reporting_integration_callbacks

        kinds, handler = tuple(get_reporting_integration_callbacks(trainer.args.report_to)), trainer.callback_handler
        held = {id(each): Tracker(each, main) for each in handler.callbacks if isinstance(each, kinds)}
        handler.callbacks = [held.get(id(each), each) for each in handler.callbacks]
        self.each: list[Tracker] = list(held.values())
        self.told: dict[str, float] = {}

    @property
    def faults(self) -> list[str]:
        """A sentence for each tracker that failed after the training had begun."""
        return [tracker.fault for tracker in self.each if tracker.fault]

    def moved(self, folder: Path) -> None:
        """Tell the trackers that the training's folder has another path now."""
        for tracker in self.each:
            tracker.moved(folder)

    def report(self, data: dict[str, Any]) -> None:
        """Report the scores and the gate of a report's data, at the last step. What was reported is not repeated."""
        values = {name: value for name, value in figures(data).items() if self.told.get(name) != value}
        if values:
            self.told |= values
            for tracker in self.each:
                tracker.log({f"eval_{name}": value for name, value in values.items()})

    def close(self) -> None:
        """End the runs. A second call does nothing."""
        for tracker in self.each:
            tracker.close()

    def keep_open(self, model: Any) -> None:
        """Report each score that a model in memory gets, until the model is gone or the program ends."""
        SCORE_LISTENERS[model] = self.report
        _OPEN[model] = weakref.finalize(model, self.close)


class Tracker:
    """A callback of Transformers that reports to a tracker. It gets each event; the end of the training when closed.

    Before the first step, an error of the tracker is raised: it costs nothing, and is worth mending. After that the
    training is worth more than its reports: the tracker is left out, and a warning says so.

    Args:
        callback: Transformers' callback.
        waits: whether `close` ends the training for the callback, not the training's own end.
    """

    def __init__(self, callback: TrainerCallback, waits: bool):
        self.callback, self.fault = callback, ""
        self.name = type(callback).__name__.removesuffix("Callback")
        # Without `on_log` there are no scores to wait for (CodeCarbon measures the training alone).
        self.waits = waits and getattr(type(callback), LOG) is not getattr(TrainerCallback, LOG)
        self._end: tuple[TrainingArguments, TrainerState, TrainerControl] | None = None

    def __getattr__(self, event: str) -> Any:
        if event.startswith("on_"):
            return partial(self._pass_on, event)
        raise AttributeError(event)

    def log(self, values: dict[str, float]) -> None:
        """Report figures at the step at which the training ended."""
        if self._end is not None:
            self._call(LOG, *self._end, logs=values)

    def close(self) -> None:
        """Tell the callback that the training has ended. The trained model is no longer in memory."""
        if self._end is not None:
            end, self._end = self._end, None
            self._call(END, *end)

    def moved(self, folder: Path) -> None:
        """Give the callback the new path of the training's folder, in which it may write."""
        if self._end is None:
            return
        arguments = self._end[0]
        if self._writes_into(arguments.output_dir):
            self.callback.logging_dir = str(folder / Path(self.callback.logging_dir).relative_to(arguments.output_dir))
        arguments.output_dir = str(folder)

    def _pass_on(self, event: str, arguments: Any, state: Any, control: Any, **details: Any) -> Any:
        if event == END and self.waits:
            self._end = arguments, state, control
            if not self._writes_into(arguments.output_dir):
                return None
            # Its file is closed, since some systems rename no folder with open files. The next figure opens another.
        return self._call(event, arguments, state, control, **details)

    def _writes_into(self, folder: str) -> bool:
        """Whether the callback writes its log into this folder, as TensorBoard's does."""
        log = getattr(self.callback, "logging_dir", None)
        return isinstance(log, str) and Path(log).is_relative_to(folder)

    def _call(self, event: str, arguments: Any, state: Any, control: Any, **details: Any) -> Any:
        if self.fault:
            return None
        try:
            with quiet_transformers():
                return getattr(self.callback, event)(arguments, state, control, **details)
        except Exception as error:  # any kind: the tracker's own
            reason = f"{self.name}: {type(error).__name__}: {brief(error)}"
            if not state.global_step:
                fix = "see that its service is reached and logged in to, or heal.report_to=none"
                raise MachineError(f"the tracker cannot begin: {reason}", where="heal.report_to", fix=fix) from error
            # The record is published, and an error may name addresses and keys: only the log has its words.
            silent = f"nothing was reported to it after step {state.global_step}"
            self.fault = f"{self.name}: {type(error).__name__}; {silent}"
            warn("%s; %s. The result is not affected.", reason, silent)
            return None


def figures(data: dict[str, Any]) -> dict[str, float]:
    """The scores of a report and the verdict of its gate: name -> number.

    NAME is the model's figure, NAME_base the base's, NAME_unhealed that of the model before this healing, and
    recovered_NAME the share of the damage that the healing won back. gate_passed is 1 or 0.
    """
    evaluation, healing, gate = data.get("evaluation") or {}, data.get("heal") or {}, data["gate"]["status"]
    values: dict[str, Any] = {}
    for cls, record in probes.done(evaluation):
        if cls.main:
            values |= _of_main(record)
            continue
        named = any(limit.by_item for limit in cls.limits.values())  # each item has a name that people know
        for about, metrics in cls.metrics(record):
            for metric in metrics:
                name = re.sub(r"\W+", "_", f"{about['name'] if named else cls.name}_{metric.kind}")
                values |= {name: metric.value, f"{name}_base": metric.base}
    if values:
        before = healing.get("converted") or {}
        keys = OWN | {"kl": "kl", "top1_agreement": "top1_agreement"}
        values |= {f"{name}_unhealed": before.get(key) for name, key in keys.items()}
        shares = healing.get("recovered") or {}
        values |= {f"recovered_{name}": shares.get(key) for name, key in keys.items()}
    if gate in ("passed", "failed"):
        values["gate_passed"] = float(gate == "passed")
    return {name: float(value) for name, value in values.items() if finite(value)}


def _of_main(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures of the main probe."""
    values = {
        f"{name}{ending}": (evaluation.get(side) or {}).get(key)
        for ending, side in SIDES.items()
        for name, key in OWN.items()
    }
    return values | {
        "kl": (evaluation.get("kl") or {}).get("mean"),
        "top1_agreement": evaluation.get("top1_agreement"),
    }
