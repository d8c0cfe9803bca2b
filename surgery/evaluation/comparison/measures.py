"""What is compared: the measurements of a model and its base, and the columns of the table that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import SettingError, nearest
from surgery.evaluation.probes.settings import make

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgery.evaluation.probes.base import Probe

RECALL = "needles"  # the measurement that the picture marks
CHAT = "chat"  # the measurement whose requests are few
LONG = 8192  # tokens of the sequence whose cache is counted
NONE = "none"  # the cell of a count where nothing counts


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: its head, a few letters.
        what: what the numbers are, for the line below the table.
        value: computes the number of a side ("base" or "out") from the measurement's record; None: there is none.
        form: format of the number.
        of: computes what a count is out of, if it is one.
        of_some: whether it is left out where no model has it.
    """

    title: str
    what: str
    value: Callable[[dict, str], float | None]
    form: str
    of: Callable[[dict, str], int | None] | None = None
    of_some: bool = False

    def cell(self, record: dict | None, side: str) -> str:
        """The text of a cell; `NONE` where a count is out of nothing."""
        if record is None or record.get("status", "done") != "done":
            return ""
        value, whole = self.value(record, side), self.of(record, side) if self.of else None
        if value is None:
            return NONE if whole == 0 else ""
        return self.form.format(value) + (f"/{whole}" if whole is not None else "")


@dataclass(frozen=True)
class Measure:
    """A measurement of a model and of its base.

    Attributes:
        name: how a user names it.
        what: what it is, a few words.
        columns: what the table shows of it.
        probe, settings: the probe that measures it; "": it is measured otherwise.
        is_cost: whether it says what the model costs, and not what it can do.
    """

    name: str
    what: str
    columns: tuple[Column, ...]
    probe: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    is_cost: bool = False

    def for_model(self, config: PretrainedConfig, text: str) -> Probe:
        """The probe, with windows and prompts no longer than a model with this config takes."""
        return make(self.probe, self._settings(text) | self.cuts(config, text))

    def cuts(self, config: PretrainedConfig, text: str) -> dict[str, Any]:
        """The settings that are cut for a model with this config: key -> what it is instead."""
        return make(self.probe, self._settings(text)).cuts(config) if self.probe else {}

    def _settings(self, text: str) -> dict[str, Any]:
        """The settings of the probe, with the text if it reads one."""
        settings = dict(self.settings)
        reads = text != "builtin" and "text" in type(make(self.probe, settings)).model_fields
        return settings | {"text": text} if reads else settings


def _side(name: str) -> Callable[[dict, str], float | None]:
    return lambda record, side: (record.get(side) or {}).get(name)


def _kept(record: dict, side: str) -> int | None:
    """How many prompts the base answers; of these, if they count, how many the model answers. None: none counts."""
    if side == "base":
        figures = record.get("base") or {}
        return figures.get("hits", figures.get("answered"))
    kept = record.get("kept") or {}
    return kept.get("kept") if kept.get("of") else None


def _kept_of(record: dict, side: str) -> int | None:
    """What that is out of: all prompts; for the model, those that the base answers and that count."""
    return (record.get("base") or {}).get("of") if side == "base" else (record.get("kept") or {}).get("of")


def _ratio(name: str) -> Callable[[dict, str], float | None]:
    return lambda record, side: 1.0 if side == "base" else (record.get("ratio") or {}).get(name)


def _loss(length: int, windows: int) -> Measure:
    name = f"{length:,}"
    columns = [Column(f"loss {name}", f"nats a token on windows of {name} tokens", _side("cross_entropy"), "{:.3f}")]
    if length > 1024:
        kl = Column(
            f"KL {name}",
            f"KL from the base in nats a token on windows of {name}",
            lambda record, side: 0.0 if side == "base" else (record.get("kl") or {}).get("mean"),
            "{:.4f}",
        )
        columns.append(kl)
    settings = (("windows", windows), ("length", length))
    return Measure(f"loss-{length}", f"loss on windows of {name} tokens", tuple(columns), "perplexity", settings)


def _needles(name: str, title: str, what: str, **settings: Any) -> Measure:
    column = Column(
        title, f"{what} answered, of those that the base answers; of the base, of all", _kept, "{}", _kept_of
    )
    return Measure(name, what, (column,), "needles", (("cases", 48), ("length", 1024), *settings.items()))


MEASURES = (
    _loss(512, 8),
    _loss(2048, 4),
    Measure(
        "choices",
        "multiple choice",
        (Column("choices", "multiple-choice questions right", _side("right"), "{}", _side("of")),),
        "choices",
        (("items", 200),),
    ),
    _needles(RECALL, "needles", "hidden passkeys"),
    _needles("late", "late", "passkeys asked for in a later call", late=True),
    Measure(
        CHAT,
        "short requests",
        (
            Column(
                "chat",
                "short requests answered, of those that the base answers; of the base, of all",
                _kept,
                "{}",
                _kept_of,
            ),
        ),
        CHAT,
    ),
    Measure(
        "cache",
        "KV cache",
        (
            Column("KV/token", "bytes of KV cache for each further token", _side("per_token"), "{:,}"),
            Column(f"KV at {LONG // 1024}k", f"MiB of KV cache at {LONG:,} tokens", _side("long_mib"), "{:,.1f}"),
        ),
        is_cost=True,
    ),
    Measure(
        "speed",
        "prompt and decoding",
        (
            Column("prompt", "times as fast as the base on a prompt of 2,000 tokens", _ratio("prefill"), "{:.2f}"),
            Column("decode", "times as fast as the base in decoding after it", _ratio("decode"), "{:.2f}"),
            Column(
                "own",
                "times as fast in decoding as the same cache with all heads full, for a head split",
                lambda record, side: None if side == "base" else (record.get("ratio") or {}).get("own"),
                "{:.2f}",
                of_some=True,
            ),
        ),
        is_cost=True,
    ),
)


def chosen(only: Sequence[str] = (), leave_out: Sequence[str] = ()) -> tuple[Measure, ...]:
    """The measurements that a user asked for, in their order here.

    Args:
        only: names of measurements; () : all.
        leave_out: names of measurements that are not wanted.

    Raises:
        SettingError: there is no such measurement, or none is left.
    """
    names = [measure.name for measure in MEASURES]
    for name in (*only, *leave_out):
        if name not in names:
            close = nearest(name, names)
            fix = f"did you mean {close!r}?" if close else f"for example {names[0]}"
            raise SettingError(f"there is no measurement {name!r}", exists=", ".join(names), fix=fix)
    found = [m for m in MEASURES if (not only or m.name in only) and m.name not in leave_out]
    if not found:
        raise SettingError("no measurement is left", exists=", ".join(names), fix="leave out fewer")
    return tuple(found)
