"""The estimators of sparse prefill by name, and the validation of their settings.

An estimator is a function `select(query, key, scale, block, **settings)` that returns the kept blocks, bool [batch,
heads or KV heads, query blocks, key blocks]. No block of later keys is kept, and the first and the diagonal block are
always kept. Query is [batch, heads, n, head_dim], and key is [batch, KV heads, N, head_dim]. All tokens are real, and
the queries are the last n of them. Estimators do not know a model's soft-cap and learned sinks: these change weights,
not the order of a query's scores.

A new estimator is one file and a line in `surgery_config.FILES`, `"sparse.<name>": "<file>"`, in the order in which
the names are listed for people. The file ends with `ESTIMATORS`, name -> `Estimator`. This holds the function, whose
keyword-only arguments are the settings, and the allowed values of the settings that no other estimator has. `SHARED`
holds the settings that several estimators have. A file is imported only where its estimator is used, since a
checkpoint carries only the files that it uses. surgery_estimate_streaming.py is a short example.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches

from .surgery_config import FILES, is_whole, load_file


@dataclass(frozen=True)
class Setting:
    """The allowed values of a setting.

    Attributes:
        words: a description that follows "must be" in an error message.
        right: a function that says whether a value is allowed.
        optional: None is allowed as well.
        within_block: the value must not be larger than the block; such a setting is no list by head.
    """

    words: str
    right: Callable[..., bool]
    optional: bool = False
    within_block: bool = False


@dataclass(frozen=True)
class Estimator:
    """One way to choose blocks.

    Attributes:
        select: the function (see the module's docstring); its keyword-only arguments are the settings with their
            defaults.
        chunk_exact: a prompt keeps the same blocks when it comes in chunks that begin and end at block edges.
        head_lists: with default settings, there is a list for each query head, not for each KV head.
        reads_text: the kept blocks depend on queries and keys, not only on the settings and the length.
        by_head: names of the settings that may be a list with one value for each query head.
        settings: the allowed values of the settings that are not in `SHARED`, name -> `Setting`.
        by_query: a function (query, key, block, **settings) that gives each query a list of its own, bool [batch,
            heads, n, key blocks]; the setting `exact` asks for it. None: the estimator has no such setting.
    """

    select: Callable
    chunk_exact: bool
    head_lists: bool = False
    reads_text: bool = True
    by_head: tuple[str, ...] = ()
    settings: dict[str, Setting] = field(default_factory=dict)
    by_query: Callable | None = None

    @property
    def defaults(self) -> dict:
        """The settings and their defaults, as the function's signature has them."""
        own = inspect.signature(self.select).parameters.values()
        return {each.name: each.default for each in own if each.kind is each.KEYWORD_ONLY}

    @property
    def allowed(self) -> dict[str, Setting]:
        """The allowed values of every setting, in the order of `defaults`."""
        return {name: self.settings[name] if name in self.settings else SHARED[name] for name in self.defaults}


def is_number(value) -> bool:
    """Whether a value is an int or a float, but no bool."""
    return type(value) in (int, float)


FROM_ONE = Setting("a whole number from 1", lambda value: is_whole(value, 1))
FROM_NONE = Setting("a whole number from 0", lambda value: is_whole(value, 0))
STEP = Setting(  # it divides the block
    "a power of two", lambda value: is_whole(value, 1) and value & (value - 1) == 0, within_block=True
)
SHARE = Setting("a number above 0, up to 1", lambda value: is_number(value) and 0 < value <= 1, optional=True)
RULES = ("gamma", "density", "alpha")  # an estimator that weighs blocks takes exactly one of these
SHARED = {  # the settings that several estimators have
    "gamma": SHARE,
    "density": SHARE,
    "alpha": Setting("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1, optional=True),
    "queries": Setting("each, all or mean", lambda value: value in ("each", "all", "mean")),
    "reduce": Setting("sum, max or none", lambda value: value in ("sum", "max", "none")),
    "local": FROM_ONE,
    "window": FROM_ONE,
    "top": FROM_ONE,
    "last": FROM_ONE,
    "sinks": FROM_NONE,
}


def estimator_names() -> list[str]:
    """The names of all estimators, in the order of `FILES`."""
    names = (name.partition(".")[2] for name in FILES if name.startswith("sparse."))
    return [name for name in names if name != "queries"]  # which attends to what is kept


def estimator(name: str) -> Estimator:
    """An estimator by its name.

    Raises:
        ValueError: there is none of this name, or the checkpoint does not carry its code.
    """
    return load_file(f"sparse.{name}").ESTIMATORS[name]


def with_defaults(method: str, settings: dict) -> dict:
    """An estimator's settings, with defaults for those left out. A given rule (`RULES`) replaces the default rule."""
    defaults = estimator(method).defaults
    if any(settings.get(rule) is not None for rule in RULES):
        defaults |= {rule: None for rule in RULES if rule in defaults}
    return defaults | settings


def choose(method: str, query, key, scale: float, block: int, settings: dict):
    """The blocks that an estimator keeps with these settings (see the module's docstring)."""
    return estimator(method).select(query, key, scale, block, **with_defaults(method, settings))


def choose_by_query(method: str, query, key, block: int, settings: dict):
    """The blocks that each query chooses for itself (`Estimator.by_query`); no list of a query block is made."""
    return estimator(method).by_query(query, key, block, **with_defaults(method, settings))


def by_head(query, key, scale: float, block: int, *, patterns: list[dict] = ()):
    """The blocks that each query head's own estimator keeps. A search over a model's heads can find these estimators.

    Args:
        patterns: for each query head {"method": ..., and its settings}. Heads with the same method and the same
            settings (apart from those that may differ by head) run in one call.

    Returns:
        bool [batch, heads, query blocks, key blocks].
    """
    together: dict[tuple, list[int]] = {}
    for head, pattern in enumerate(patterns):
        own = estimator(pattern["method"]).by_head
        alike = tuple((name, None if name in own else pattern[name]) for name in sorted(pattern))
        together.setdefault(alike, []).append(head)
    kept, group = None, query.shape[1] // key.shape[1]
    for heads in together.values():
        one = patterns[heads[0]]
        own = estimator(one["method"]).by_head
        settings = {
            name: [patterns[head][name] for head in heads] if name in own else value
            for name, value in one.items()
            if name != "method"
        }
        keys = key[:, [head // group for head in heads]]
        found = choose(one["method"], query[:, heads], keys, scale, block, settings)
        kept = found.new_zeros(found.shape[0], len(patterns), *found.shape[2:]) if kept is None else kept
        kept[:, heads] = found
    return kept


def settings_problems(method: str, settings: dict, block: int | None = None, heads: int | None = None) -> list[str]:
    """The errors in an estimator's settings, a sentence each; [] if there is none.

    Args:
        method: a name, which should be one of `estimator_names()`.
        settings: the settings that are given; the others have their defaults.
        block: tokens of a block, if known; it must be a power of two from 16.
        heads: number of query heads in the layer, if known. A setting that is a list must have one value for each.
    """
    names = estimator_names()
    if not isinstance(method, str) or method not in names:
        return [f"there is no method {method!r} of sparse prefill{_near(method, names)}; there is: {', '.join(names)}"]
    found, known, lists = [], estimator(method).allowed, estimator(method).by_head
    if block is not None and not (is_whole(block, 16) and block & (block - 1) == 0):
        found.append(f"block is {block!r}, and must be a power of two from 16")
    for name, value in settings.items():
        if name not in known:
            found.append(f"{method} has no setting {name!r}{_near(name, known)}; it has: {', '.join(known)}")
            continue
        may = known[name]
        if may is PATTERNS:
            found += _problems_of_patterns(value, block, heads)
        elif isinstance(value, list) and name in lists:
            if not value or not all(map(may.right, value)) or len(value) != (heads or len(value)):
                found.append(f"{name} of {method} is {value}, and must be one for each query head, each {may.words}")
        elif not (may.right(value) or (value is None and may.optional)):
            found.append(f"{name} of {method} is {value!r}, and must be {may.words}")
    whole = with_defaults(method, settings)
    for name in (name for name, may in known.items() if may.within_block):
        if not found and block is not None and whole[name] is not None and whole[name] > block:
            found.append(f"{name} of {method} is {whole[name]}, and must not be larger than the block of {block}")
    if method == "by_head" and "patterns" not in settings:
        found.append("by_head needs patterns: a method and its settings for each query head")
    rules = [rule for rule in RULES if rule in known]
    given = [rule for rule in rules if whole.get(rule) is not None]
    if rules and len(given) != 1:
        said = " and ".join(given) if given else "none"
        found.append(f"{method} keeps blocks by one of {', '.join(rules)}; here it is {said}")
    return found


def _problems_of_patterns(patterns, block, heads) -> list[str]:
    """The errors in the estimators of single heads."""
    if not PATTERNS.right(patterns):
        return [f"patterns of by_head must be {PATTERNS.words}"]
    if len(patterns) != (heads or len(patterns)) or not patterns:
        return [f"patterns of by_head are {len(patterns)}, and must be one for each of the {heads} query heads"]
    found = []
    for head, pattern in enumerate(patterns):
        method, settings = pattern.get("method"), {name: value for name, value in pattern.items() if name != "method"}
        nested = ["by_head cannot hold by_head"] if method == "by_head" else settings_problems(method, settings, block)
        if settings.get("exact"):
            nested.append("exact is for a whole layer: by_head gives a head lists of query blocks")
        lists = [name for name, value in settings.items() if isinstance(value, list)]
        nested += [f"{name} is a list, and this is one head" for name in lists]
        found += [f"query head {head}: {each}" for each in nested]
    return found


def _near(name, known) -> str:
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else ""


PATTERNS = Setting(
    "a list with a method and its settings for each query head",
    lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
)
ESTIMATORS = {"by_head": Estimator(by_head, chunk_exact=False, head_lists=True, settings={"patterns": PATTERNS})}
