"""Query heads that are switched off at run time: the causal test of head scores.

The model runs with its highest-scored query heads off, and with as many other heads of the same layers off, in some
random draws. If the score finds the heads on which a task rests, the first costs the task and the second does not
(Wu et al. 2024, arXiv 2404.15574, section 3).

A head that is off gives zeros to the output projection. Its KV head still serves the other query heads. The released
code of the paper zeroes the head's query in its place, so that the head gives the mean of all values; it does this
only from the last token of the prompt on (`answer` here), and draws random heads from all layers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibration.head_scores import ABOVE, LISTED, HeadScores, load_scores, other_heads
from surgery.errors import SettingError, UnsupportedModelError
from surgery.io.printing import Table, count

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

    Head = tuple[int, int]  # layer, and number of the query head in the order in which heads are stored

ROWS = ("all", "answer")  # tokens for which heads are off


@dataclass(frozen=True)
class HeadAblation:
    """Which query heads of a model are switched off.

    Attributes:
        file, method: name of the score file, and the method that measured the scores.
        rows: "all": for all tokens; "answer": from the last token of the prompt on.
        highest: the heads with the highest scores, the highest first.
        draws: as many other heads of the same layers, drawn at random, for each draw.
        names: for each layer, the base's numbers of its query heads.
        notes: remarks for the reader.
    """

    file: str
    method: str
    rows: str
    highest: tuple[Head, ...]
    draws: tuple[tuple[Head, ...], ...]
    names: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, path: str | Path, anatomy: Anatomy, *, top: int | None = None, draws: int, seed: int, rows: str
    ) -> HeadAblation:
        """The heads of a model to switch off, by a file of scores of its query heads.

        Args:
            path: what `surgery score --per heads` wrote, or a table of numbers with a row for each layer.
            top: how many heads; None: those with a score above `ABOVE`.
            draws: how many random draws; `seed` decides them.
            rows: see the attribute.

        Raises:
            SurgeryError: the file cannot be read, or is of another model or of KV heads; there are not so many heads.
        """
        scores = load_scores(path, anatomy, per="heads")
        if scores.per == "kv_heads":  # of a model in which every query head has a KV head of its own
            raise other_heads(Path(path), scores.per, "heads")
        highest = _highest(scores, top, str(path))
        heads = [layer.heads for layer in anatomy.layers]
        if draws and len(highest) == sum(heads):
            what = f"all {len(highest)} query heads are off, so there are no others to compare them with"
            raise SettingError(what, where="top", fix="a smaller top, or draws=0")
        draw = random.Random(f"{seed} query heads")
        drawn = tuple(tuple(_others(highest, heads, draw)) for _ in range(draws))
        names = tuple(tuple(map(layer.query_name, range(layer.heads))) for layer in anatomy.layers)
        notes = _notes(scores, highest, heads) if draws else ()
        return cls(Path(path).name, scores.method, rows, tuple(highest), drawn, names, tuple(notes))

    def contexts(self, model: Any) -> dict[str, AbstractContextManager]:
        """The changes of a loaded model: name -> context in which those heads are off. The model is then restored."""
        sets = {f"its {count(len(self.highest), 'highest head')} off": self.highest}
        sets |= {f"random heads off, draw {number}": heads for number, heads in enumerate(self.draws, start=1)}
        last_only = self.rows == "answer"
        return {name: heads_off(model, heads, last_only=last_only) for name, heads in sets.items()}

    def to_dict(self, sides: Sequence[dict]) -> dict[str, Any]:
        """The figures as plain data.

        Args:
            sides: `hits`, `of` and more with the highest heads off, and then with those of each draw.
        """
        shown = [[[layer, self.names[layer][head]] for layer, head in heads] for heads in (self.highest, *self.draws)]
        first, *others = [{"heads": heads} | side for heads, side in zip(shown, sides, strict=True)]
        data = {"scores": {"file": self.file, "method": self.method}, "rows": self.rows, "top": len(self.highest)}
        data |= {"highest": first, "random": others}
        mean = {"random_mean_hits": sum(side["hits"] for side in others) / len(others)} if others else {}
        return data | mean | ({"notes": list(self.notes)} if self.notes else {})


def refuse_settings(off: str, without: str | None, given: Collection[str]) -> None:
    """Raise a SurgeryError for settings that cannot be.

    Args:
        off, without: these settings.
        given: names of the settings that the user gave.
    """
    if without is None and (unread := {"top", "draws", "off"} & set(given)):
        what = f"{min(unread)} is read only with a score file of query heads"
        raise SettingError(what, fix="add without=SCORES.json, or leave it out")
    if off not in ROWS:
        raise SettingError(f"off is {off!r}", exists=" or ".join(ROWS))


def lines(record: dict, intact: dict) -> list[Table | str]:
    """A table of the needles found by the query heads that are off, and what it says.

    Args:
        record: what `HeadAblation.to_dict` returned.
        intact: `hits`, `of` and `nll` of the unchanged model.
    """
    sides = {"none": intact, f"the {record['top']} with the highest score": record["highest"]}
    sides |= {f"random, draw {number}": side for number, side in enumerate(record["random"], start=1)}
    rows = []
    for name, side in sides.items():
        loss = "?" if side["nll"] is None else f"{side['nll']:.3f}"
        rows.append([name, f"{side['hits']} of {side['of']}", loss])
    if record["random"]:
        rows.append(["random, mean", f"{record['random_mean_hits']:.1f} of {intact['of']}", ""])
    headers = ("query heads off", "needles found", "nats per token")
    names = ", ".join(f"layer {layer} head {head}" for layer, head in record["highest"]["heads"][:LISTED])
    more = record["top"] - LISTED
    those = f"The highest: {names}{f' and {more} more' if more > 0 else ''}."
    return ["", Table(headers, rows), those, sentence(record, intact)]


def sentence(record: dict, intact: dict) -> str:
    """What the figures say; arguments as for `lines`."""
    heads = count(record["top"], "query head")
    when = " while it answers" if record["rows"] == "answer" else ""
    words = f"With its {heads} of the highest {record['scores']['method']} score off{when}, the model finds "
    words += f"{record['highest']['hits']} of the {intact['of']} needles, and unchanged {intact['hits']}"
    if record["random"]:
        draws = count(len(record["random"]), "draw")
        words += (
            f"; with as many random heads of the same layers off, {record['random_mean_hits']:.1f} (mean of {draws})"
        )
    return f"{words}."


def _highest(scores: HeadScores, top: int | None, where: str) -> list[Head]:
    """The heads with the highest scores: `top` of them, or those above `ABOVE`."""
    order = scores.highest()
    if top is None:
        order = [head for head in order if head[0] > ABOVE]
        if not order:
            what = f"no query head scores above {ABOVE}, so it is not clear which to switch off"
            raise SettingError(what, where=where, fix="say how many: top=13")
    elif top > len(order):
        what = f"top is {top}, and the model has {count(len(order), 'query head')}"
        raise SettingError(what, where=where, fix="a smaller top")
    return [(layer, head) for _, layer, head in order[:top]]


def _others(highest: Sequence[Head], heads: Sequence[int], draw: random.Random) -> Iterator[Head]:
    """Other heads at random, in each layer as many as `highest` has there, or all that there are."""
    for layer, wanted in sorted(Counter(layer for layer, _ in highest).items()):
        others = [head for head in range(heads[layer]) if (layer, head) not in highest]
        yield from ((layer, head) for head in sorted(draw.sample(others, min(wanted, len(others)))))


def _notes(scores: HeadScores, highest: Sequence[Head], heads: Sequence[int]) -> Iterator[str]:
    """Remarks on layers with too few other heads, and on heads that do not score."""
    wanted = Counter(layer for layer, _ in highest)
    few = {layer: heads[layer] - number for layer, number in sorted(wanted.items()) if 2 * number > heads[layer]}
    if few:
        drawn = sum(min(number, heads[layer] - number) for layer, number in wanted.items())
        where = ", ".join(f"layer {layer} has {left} for {wanted[layer]}" for layer, left in few.items())
        yield f"too few other heads in the same layers ({where}): a draw switches off {drawn}, not {len(highest)}"
    zeros = sum(scores.scores[layer][head] <= 0 for layer, head in highest)
    if zeros:
        yield f"{zeros} of the {len(highest)} highest heads have the score 0 or less"


@contextmanager
def heads_off(model: Any, heads: Iterable[Head], last_only: bool = False) -> Iterator[None]:
    """Switch query heads of a loaded model off: their output is zero before the output projection.

    Args:
        heads: (layer, number of the query head).
        last_only: only for the last token of every forward. With one prefill and a cache, these are the last token of
            the prompt and the tokens after it.

    Raises:
        SurgeryError: the output projection of such a layer is not called as a module.
    """
    from surgery.architecture.anatomy import Anatomy

    layers, by_layer, handles = Anatomy.of(model).layers, {}, []
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    called: set[int] = set()
    try:
        for index, off in by_layer.items():
            layer = layers[index]
            output = model.get_submodule(f"{layer.path}.{layer.layout.o}")
            handles.append(output.register_forward_pre_hook(_zeroing(index, off, layer.heads, last_only, called)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(set(by_layer) - called):
        what = f"the output projection of layer {missing[0]} was not called, so its heads cannot be switched off"
        raise UnsupportedModelError(what, where=type(model).__name__)


def _zeroing(layer: int, off: list[int], heads: int, last_only: bool, called: set[int]):
    """A forward pre-hook of an output projection [..., n, heads * head_dim] that zeroes these heads."""

    def before(_, args):
        called.add(layer)
        inputs = args[0].clone()
        of_heads = inputs.unflatten(-1, (heads, -1))  # a view
        of_heads[(..., slice(-1 if last_only else 0, None), off, slice(None))] = 0
        return (inputs, *args[1:])

    return before
