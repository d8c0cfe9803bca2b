"""The ways to choose blocks in sparse prefill, by name, and whether settings fit them.

Each is a function `select(query, key, scale, block, **settings)` that gives the kept blocks, bool [batch, heads or KV
heads, query blocks, key blocks]: causal on the level of blocks, the first and the diagonal block always kept. Query is
[batch, heads, n, head_dim], key [batch, KV heads, N, head_dim], all of real tokens, the queries the last n of them.
A model's soft-cap and learned sinks are not known here: they change weights, not the order of a query's scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from .surgery_block import is_whole
from .surgery_parts import part


def by_head(query, key, scale: float, block: int, *, patterns: list[dict] = ()):
    """A method of its own for each query head, as a search over a model's heads finds them.

    Args:
        patterns: for each query head {"method": ..., and its settings}. Heads of one method are chosen for together.

    Returns:
        bool [batch, heads, query blocks, key blocks].
    """
    together: dict[tuple, list[int]] = {}
    for head, pattern in enumerate(patterns):
        own = BY_HEAD.get(pattern["method"], ())
        alike = tuple((name, None if name in own else pattern[name]) for name in sorted(pattern))
        together.setdefault(alike, []).append(head)
    kept, group = None, query.shape[1] // key.shape[1]
    for heads in together.values():
        one = patterns[heads[0]]
        own = BY_HEAD.get(one["method"], ())
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


@dataclass(frozen=True)
class Method:
    """One way to choose blocks.

    Attributes:
        name: of the method, and of the function that it is in its file.
        chunk_exact: what a prompt's queries keep is the same in chunks that begin and end at block edges.
        head_lists: by default it gives a list for each query head, not one for those of a KV head.
    """

    name: str
    chunk_exact: bool
    head_lists: bool = False

    @property
    def select(self) -> Callable:
        """The function; its file is opened where the method is used."""
        return by_head if self.name == "by_head" else getattr(part(self.name), self.name)

    @property
    def defaults(self) -> dict:
        """The settings and their defaults, which are those of the function."""
        own = inspect.signature(self.select).parameters.values()
        return {each.name: each.default for each in own if each.kind is each.KEYWORD_ONLY}

    @property
    def per(self) -> str:
        """ "head" or "group": whose list it gives by default."""
        return "head" if self.head_lists else "group"


METHODS = {
    method.name: method
    for method in (
        Method("pooled", chunk_exact=True),
        Method("sampled", chunk_exact=True),
        Method("streaming", chunk_exact=True),
        Method("tri_shape", chunk_exact=False),
        Method("vertical_slash", chunk_exact=False, head_lists=True),
        Method("flexprefill", chunk_exact=False, head_lists=True),
        Method("xattention", chunk_exact=True, head_lists=True),
        Method("block_topk", chunk_exact=True, head_lists=True),
        Method("max_threshold", chunk_exact=True, head_lists=True),
        Method("hierarchical", chunk_exact=True, head_lists=True),
        Method("by_head", chunk_exact=False, head_lists=True),
    )
}
RULES = ("gamma", "density", "alpha")  # of the methods that weigh blocks: one of them decides
STEPS = ("stride", "every")  # they divide the block
FROM_ONE = ("local", "first", "window", "top", "last", "max_budget")
FROM_NONE = ("sinks", "nearest", "vertical", "slash", "min_budget")
# Setting -> what it may be, in words, and whether a value is.
ALLOWED = {
    **dict.fromkeys(
        ["gamma", "density"], ("a number above 0, up to 1", lambda value: _number(value) and 0 < value <= 1)
    ),
    "alpha": ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
    "similarity": ("a number from -1 to 1", lambda value: _number(value) and -1 <= value <= 1),
    "tau": ("a number from 0", lambda value: _number(value) and value >= 0),
    "votes": ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
    **dict.fromkeys(STEPS, ("a power of two", lambda value: is_whole(value, 1) and value & (value - 1) == 0)),
    "representative": ("mean or middle", lambda value: value in ("mean", "middle")),
    "queries": ("each, all or mean", lambda value: value in ("each", "all", "mean")),
    "reduce": ("sum, max or none", lambda value: value in ("sum", "max", "none")),
    **dict.fromkeys(FROM_ONE, ("a whole number from 1", lambda value: is_whole(value, 1))),
    **dict.fromkeys(FROM_NONE, ("a whole number from 0", lambda value: is_whole(value, 0))),
}
BY_HEAD = {  # settings that may be a list with one for each query head
    "streaming": ("sinks", "window"),
    "tri_shape": ("sinks", "window"),
    "vertical_slash": ("vertical", "slash"),
    "block_topk": ("top",),
}
OPTIONAL = {*RULES, "similarity", "max_budget"}  # may be None


def with_defaults(method: str, settings: dict) -> dict:
    """A method's settings with defaults for what they leave out; a rule that is given puts the default one away."""
    defaults = METHODS[method].defaults
    if any(settings.get(rule) is not None for rule in RULES):
        defaults |= {rule: None for rule in RULES if rule in defaults}
    return defaults | settings


def choose(method: str, query, key, scale: float, block: int, settings: dict):
    """The blocks that a method keeps with these settings (see the module's head)."""
    return METHODS[method].select(query, key, scale, block, **with_defaults(method, settings))


def settings_problems(method: str, settings: dict, block: int | None = None, heads: int | None = None) -> list[str]:
    """What is wrong with a method's settings, in sentences; [] if nothing.

    Args:
        method: one of `METHODS`.
        settings: what is not left at its default.
        block: tokens of a block, where known: a power of two from 16.
        heads: query heads of the layer, where known; settings that differ by head are lists with one for each.
    """
    if not isinstance(method, str) or method not in METHODS:
        return [
            f"there is no method {method!r} of sparse prefill{_near(method, METHODS)}; there is: {', '.join(METHODS)}"
        ]
    found, known = [], METHODS[method].defaults
    if block is not None and not (is_whole(block, 16) and block & (block - 1) == 0):
        found.append(f"block is {block!r}, and must be a power of two from 16")
    for name, value in settings.items():
        if name not in known:
            found.append(f"{method} has no setting {name!r}{_near(name, known)}; it has: {', '.join(known)}")
            continue
        if name == "patterns":
            found += _problems_of_patterns(value, block, heads)
            continue
        words, right = ALLOWED[name]
        if isinstance(value, list) and name in BY_HEAD.get(method, ()):
            if not value or not all(map(right, value)) or len(value) != (heads or len(value)):
                found.append(f"{name} of {method} is {value}, and must be one for each query head, each {words}")
        elif not (right(value) or (value is None and name in OPTIONAL)):
            found.append(f"{name} of {method} is {value!r}, and must be {words}")
    whole = with_defaults(method, settings)
    for step in STEPS:
        if not found and block is not None and whole.get(step, 1) > block:
            found.append(f"{step} of {method} is {whole[step]}, and must not be larger than the block of {block}")
    if method == "by_head" and "patterns" not in settings:
        found.append("by_head needs patterns: a method and its settings for each query head")
    rules = [rule for rule in RULES if rule in known]
    given = [rule for rule in rules if whole.get(rule) is not None]
    if rules and len(given) != 1:
        said = " and ".join(given) if given else "none"
        found.append(f"{method} keeps blocks by one of {', '.join(rules)}; here it is {said}")
    return found


def _problems_of_patterns(patterns, block, heads) -> list[str]:
    """What is wrong with the methods of single heads."""
    if not isinstance(patterns, list) or not all(isinstance(each, dict) for each in patterns):
        return ["patterns of by_head must be a list with a method and its settings for each query head"]
    if len(patterns) != (heads or len(patterns)) or not patterns:
        return [f"patterns of by_head are {len(patterns)}, and must be one for each of the {heads} query heads"]
    found = []
    for head, pattern in enumerate(patterns):
        method, settings = pattern.get("method"), {name: value for name, value in pattern.items() if name != "method"}
        nested = ["by_head cannot hold by_head"] if method == "by_head" else settings_problems(method, settings, block)
        lists = [name for name, value in settings.items() if isinstance(value, list)]
        nested += [f"{name} is a list, and this is one head" for name in lists]
        found += [f"query head {head}: {each}" for each in nested]
    return found


def _near(name, known) -> str:
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else ""


def _number(value) -> bool:
    return type(value) in (int, float)
