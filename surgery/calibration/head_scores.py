"""Scores of heads (higher = keep the whole cache): the table, its file, and the choice of streaming heads.

A table is [layers][KV heads] or [layers][query heads], with its origin. It is saved as JSON and can be used again. The
two kinds have different formats, so that no reader takes one for the other. Heads are numbered as in the base.
`surgery.operations.head_scorers.scorers` measures the scores.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import ModelError, ModelMismatchError, SurgeryError, nearest

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

FORMATS = {"kv_heads": 1, "heads": 2}  # kind of the heads -> format of a score file
KINDS = {"kv_heads": "KV heads", "heads": "query heads"}
ABOVE = 0.1  # a head with a higher retrieval score is a retrieval head (Wu et al. 2024, arXiv 2404.15574)
LISTED = 20  # heads in a list of the highest scores
UNEQUAL = "KV heads that are read by unequally many query heads cannot be measured"
ROPE = ("rope_type", "rope_theta", "factor", "partial_rotary_factor")  # settings of RoPE that the scores depend on


@dataclass(frozen=True)
class HeadScores:
    """A score for every head.

    Attributes:
        method: name of the method that measured the scores.
        scores: [layers][heads].
        origin: the settings, the text (title, first 12 digits of its sha256), `model` (see `model_identity`), and the
            other figures of the method (for `gates`: the loss of every step, and the share of undecided gates).
        per: which heads: "kv_heads" or "heads" (query heads); "" for a table of numbers, which does not say it.
    """

    method: str
    scores: list[list[float]]
    origin: dict[str, Any] = field(default_factory=dict)
    per: str = "kv_heads"

    def to_dict(self) -> dict:
        """The content of a score file, as plain data. A file of query heads also has `per`."""
        kind = {"per": self.per} if self.per == "heads" else {}
        table = {"method": self.method, "scores": self.scores, "origin": self.origin}
        return {"format": FORMATS[self.per or "kv_heads"]} | kind | table

    def highest(self) -> list[tuple[float, int, int]]:
        """All heads as (score, layer, head), the highest score first; ties by layer and head."""
        heads = [(x, layer, head) for layer, row in enumerate(self.scores) for head, x in enumerate(row)]
        return sorted(heads, key=lambda head: (-head[0], *head[1:]))

    def above(self, threshold: float) -> dict[str, Any]:
        """How many heads score above a threshold, as plain data, and the highest of them (at most `LISTED`)."""
        order = self.highest()
        top = [{"layer": layer, "head": head, "score": x} for x, layer, head in order if x > threshold]
        share = len(top) / len(order)
        return {"threshold": threshold, "above": len(top), "of": len(order), "share": share, "top": top[:LISTED]}

    def save(self, path: str | Path) -> None:
        """Write a score file; raises a MachineError where it cannot be written."""
        from surgery.io.files import write_json
        from surgery.io.output_folder import machine_errors

        with machine_errors(Path(path)):
            write_json(Path(path), self.to_dict())


def model_identity(anatomy: Anatomy, name: str = "") -> dict[str, Any]:
    """The record of the model on which scores were measured: its name, its shape, and a hash of the shape.

    The hash covers the shape of attention and its positions, and not the weights. So the scores can also be used for a
    fine-tuned version of the model.
    """
    text = anatomy.config
    ropes = getattr(text, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in ropes.values())  # by layer type, if there are several
    kinds = ropes if nested else {"all": ropes}
    identity = {
        "model_type": anatomy.model_type,
        "hidden_size": getattr(text, "hidden_size", None),
        "layers": len(anatomy.layers),
        "heads": _shared([layer.heads for layer in anatomy.layers]),
        "kv_heads": _shared([layer.kv_heads for layer in anatomy.layers]),
        "head_dim": _shared([layer.head_dim for layer in anatomy.layers]),
        "window": _shared([layer.window for layer in anatomy.layers]),
        "rope": {kind: {key: rope[key] for key in ROPE if key in rope} for kind, rope in kinds.items() if rope},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return {"name": name, **identity, "hash": digest[:12]}


def _shared(values: list):
    """The value, if it is the same in all layers; otherwise the list of values."""
    return values[0] if len(set(values)) == 1 else values


def names_method(scores: str, methods: Collection[str], otherwise: str) -> bool:
    """Whether a recipe's `scores` names one of some methods. False: it names a file.

    Args:
        otherwise: what a user may give in place of a method.

    Raises:
        SurgeryError: it is neither a method nor a file, and does not look like a path.
    """
    if scores in methods or Path(scores).is_file():
        return scores in methods
    if Path(scores).suffix or len(Path(scores).parts) > 1:  # the path of a missing file: `load_scores` reports it
        return False
    close = nearest(scores, methods)
    raise SurgeryError(
        f"scores: {scores!r} is neither a method nor a file",
        exists=", ".join(methods),
        fix=f"did you mean {close!r}?" if close else otherwise,
        code="invalid-file",
    )


def load_scores(path: str | Path, anatomy: Anatomy, per: str | Collection[str] = "kv_heads") -> HeadScores:
    """Scores from a file: the JSON of `HeadScores.save`, or a table of numbers (a row for each layer).

    DuoAttention publishes its patterns as such tables. A table names no model, so only its shape is checked.

    Args:
        per: "kv_heads" or "heads" (query heads): a row must have one number for each of these. Several names: for each
            head of any one kind.

    Raises:
        SurgeryError: it is not such a file, or it is from another model (its shape or the hash of its config differs).
    """
    path, per = Path(path), [per] if isinstance(per, str) else list(per)
    kinds = " or ".join(KINDS[kind] for kind in per)
    command = f"`surgery score MODEL{'' if 'kv_heads' in per else ' --per heads'} -o FILE`"
    if not path.is_file():
        raise SurgeryError("no such score file", where=str(path), fix=f"{command} writes one", code="invalid-file")
    scores = read_scores(path)
    shape = [len(row) for row in scores.scores]
    counts = {kind: [getattr(layer, kind) for layer in anatomy.layers] for kind in KINDS}
    if scores.per == "heads" and "heads" not in per:
        raise other_heads(path, scores.per, per[0])
    if shape not in [counts[kind] for kind in per]:
        if scores.per == "kv_heads" and shape == counts["kv_heads"]:
            raise other_heads(path, scores.per, per[0])
        raise ModelMismatchError(
            f"the scores are of another model: {_shape(shape)} (layers x {kinds})",
            where=str(path),
            exists=f"this model has {' or '.join(_shape(counts[kind]) for kind in per)}",
            fix=f"measure this one: {command}",
        )
    theirs, ours = scores.origin.get("model"), model_identity(anatomy)
    if isinstance(theirs, dict) and theirs.get("hash", ours["hash"]) != ours["hash"]:
        differ = [key for key in ours if key not in ("name", "hash") and theirs.get(key) != ours[key]]
        raise ModelMismatchError(
            f"the scores are of another model: {theirs.get('name') or theirs.get('model_type')} "
            f"(config hash {theirs['hash']})",
            where=str(path),
            exists=f"this model is {_name_of(anatomy)} ({ours['hash']}); they differ in {', '.join(differ) or 'hash'}",
            fix=f"measure this one: {command}",
        )
    if not all(math.isfinite(x) for row in scores.scores for x in row):
        fix = f"measure them again: {command}"
        raise SurgeryError("the scores hold NaN or infinity", where=str(path), fix=fix, code="invalid-file")
    return scores


def other_heads(path: Path, found: str, wanted: str) -> ModelMismatchError:
    """The error for a score file of KV heads where query heads are wanted, or the reverse."""
    return ModelMismatchError(
        f"these are scores of {KINDS[found]}, and scores of {KINDS[wanted]} are needed here",
        where=str(path),
        fix=f"`surgery score MODEL --per {wanted.replace('_', '-')} -o FILE` measures them",
    )


def recorded_scores(folder: Path, counts: list[int]) -> HeadScores | None:
    """The last head scores in a checkpoint's surgery.json that have this shape; `counts`: heads of each layer."""
    from surgery.io.files import REPORT as FILE
    from surgery.io.files import read_json

    if not (folder / FILE).is_file():
        return None
    steps = read_json(folder / FILE).get("operations")
    for step in reversed(steps if isinstance(steps, list) else []):
        try:
            scores = _of_dict(step["record"]["scores"])
        except (KeyError, TypeError, ValueError):
            continue
        if scores.method != "none" and [len(row) for row in scores.scores] == counts:
            return scores
    return None


def read_scores(path: str | Path) -> HeadScores:
    """Scores from a file, without a comparison with a model.

    Raises:
        SurgeryError: the file cannot be read or holds no table of scores.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith(("{", "[")):
            return _of_json(text, path)
        rows = [[float(x) for x in line.split()] for line in text.splitlines() if line.strip()]
        return HeadScores("file", rows, {"file": path.name}, per="")
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise SurgeryError(f"not a table of scores: {error}", where=str(path), code="invalid-file") from None


def _of_json(text: str, path: Path) -> HeadScores:
    """Scores from a JSON file; a file of another form raises a SurgeryError that shows the right form."""
    raw = json.loads(text)
    try:
        return _of_dict(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fault = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise SurgeryError(
            f"JSON, but no table of scores: {fault if isinstance(raw, dict) else 'it holds a list'}",
            where=str(path),
            exists='{"format": 1, "method": ..., "scores": [a list of numbers for each layer], "origin": {...}}',
            fix="`surgery score MODEL -o FILE` writes one; a table without a name is plain text, a row for each layer",
            code="invalid-file",
        ) from None


def is_score_file(path: Path) -> bool:
    """Whether `HeadScores.save` wrote this file."""
    try:
        _of_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def _of_dict(raw: dict) -> HeadScores:
    per = next((kind for kind, number in FORMATS.items() if raw["format"] == number), None)
    if per is None:
        known = ", ".join(f"{number} for {KINDS[kind]}" for kind, number in FORMATS.items())
        raise ValueError(f"format {raw['format']!r}, known is {known}")
    if per == "heads" and raw["per"] != per:
        raise ValueError(f"per {raw['per']!r} in format {raw['format']}, which is of query heads ({per})")
    if not isinstance(raw["origin"], dict):
        raise ValueError("origin is no mapping")
    table = [[float(x) for x in row] for row in raw["scores"]]
    return HeadScores(str(raw["method"]), table, raw["origin"], per)


def _shape(counts: list[int]) -> str:
    return f"{len(counts)} x {_shared(counts)}" if counts else "nothing"


def _name_of(anatomy: Anatomy) -> str:
    name = model_name(anatomy.config)
    return f"{name}, a {anatomy.model_type}" if name else f"a {anatomy.model_type}"


def model_name(config) -> str:
    """The name by which a model was loaded. For a local path it is the last folder, since score files are shared."""
    name = getattr(config, "_name_or_path", "") or ""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def ranks(table: list[list[float]]) -> list[list[float]]:
    """For each head, the share of all other heads that score lower, 0 to 1; heads with an equal score count half."""
    order = sorted(x for row in table for x in row)
    others = max(1, len(order) - 1)
    return [[(bisect_left(order, x) + bisect_right(order, x) - 1) / 2 / others for x in row] for row in table]


def refuse_not_finite(tables: list[list[list[float]]], method: str) -> None:
    """Raise a SurgeryError if a measured table [layers][heads] has NaN or inf, which would be ranked like a score."""
    if not all(math.isfinite(x) for table in tables for row in table for x in row):
        raise ModelError(
            f"the heads' scores are no numbers ({method}): the model gives NaN or inf on its calibration text",
            fix="load it in bfloat16 or float32; if that does not help, look for damaged weights (surgery check)",
        )


def unsupported(anatomy: Anatomy) -> str:
    """Why heads of such a model cannot have different visibility; "" if they can."""
    reason = anatomy.runtime_problem()
    return f"{reason}, so its heads cannot be split" if reason and not anatomy.composite else reason


def choose_streaming(
    scores: list[list[float]],
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    min_retrieval: int = 0,
    protect: Collection[int] = (),
    local: Collection[int] = (),
) -> list[list[int]]:
    """The KV heads of each layer that will stream: those with the lowest scores over all layers.

    Args:
        scores: [layers][KV heads], higher = keep.
        ratio: share of all KV heads that stream, rounded to a whole number; or
        threshold: heads with a lower score stream.
        min_retrieval: number of full KV heads that every layer keeps.
        protect: layers whose heads all stay full.
        local: layers that see no farther than the window anyway. They do not change, and `ratio` does not count them.

    Ties are broken by layer and head, so that a plan is reproducible.
    """
    far = [(layer, row) for layer, row in enumerate(scores) if layer not in local]
    order = sorted((x, layer, head) for layer, row in far for head, x in enumerate(row))
    wanted = len(order) if ratio is None else round(ratio * len(order))
    streaming: list[list[int]] = [[] for _ in scores]
    for x, layer, head in order:
        if wanted == 0 or (threshold is not None and x >= threshold):
            break
        if layer in protect or len(scores[layer]) - len(streaming[layer]) <= min_retrieval:
            continue
        streaming[layer].append(head)
        wanted -= 1
    return [sorted(heads) for heads in streaming]
