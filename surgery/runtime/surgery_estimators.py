"""The ways to choose blocks in sparse prefill, by name, and whether settings fit them.

Each is a function `select(query, key, scale, block, **settings)` that gives the kept blocks, bool [batch, heads or KV
heads, query blocks, key blocks]: causal on the level of blocks, the first and the diagonal block always kept. Query is
[batch, heads, n, head_dim], key [batch, KV heads, N, head_dim], all of real tokens, the queries the last n of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from .surgery_estimate_pooled import pooled
from .surgery_estimate_streaming import streaming, tri_shape


@dataclass(frozen=True)
class Method:
    """One way to choose blocks.

    Attributes:
        select: the function.
        chunk_exact: what a prompt's queries keep is the same in chunks that begin and end at block edges.
        head_lists: by default it gives a list for each query head, not one for those of a KV head.
    """

    select: Callable
    chunk_exact: bool
    head_lists: bool = False

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
    "pooled": Method(pooled, chunk_exact=True),
    "streaming": Method(streaming, chunk_exact=True),
    "tri_shape": Method(tri_shape, chunk_exact=False),
}
RULES = ("gamma", "density", "alpha")  # of the methods that weigh blocks: one of them decides
# Setting -> what it may be, in words, and whether a value is.
ALLOWED = {
    **dict.fromkeys(
        ["gamma", "density"], ("a number above 0, up to 1", lambda value: _number(value) and 0 < value <= 1)
    ),
    "alpha": ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
    "similarity": ("a number from -1 to 1", lambda value: _number(value) and -1 <= value <= 1),
    "queries": ("each, all or mean", lambda value: value in ("each", "all", "mean")),
    "reduce": ("sum, max or none", lambda value: value in ("sum", "max", "none")),
    **dict.fromkeys(["local", "window"], ("a whole number from 1", lambda value: _whole(value, 1))),
    **dict.fromkeys(["sinks", "last"], ("a whole number from 0", lambda value: _whole(value, 0))),
}
BY_HEAD = {
    "streaming": {"sinks", "window"},
    "tri_shape": {"sinks", "window"},
}  # settings that may differ by query head
OPTIONAL = {*RULES, "similarity"}  # may be None


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
    if method not in METHODS:
        return [
            f"there is no method {method!r} of sparse prefill{_near(method, METHODS)}; there is: {', '.join(METHODS)}"
        ]
    found, known = [], METHODS[method].defaults
    if block is not None and not (_whole(block, 16) and block & (block - 1) == 0):
        found.append(f"block is {block!r}, and must be a power of two from 16")
    for name, value in settings.items():
        if name not in known:
            found.append(f"{method} has no setting {name!r}{_near(name, known)}; it has: {', '.join(known)}")
            continue
        words, right = ALLOWED[name]
        if isinstance(value, list) and name in BY_HEAD.get(method, ()):
            if not value or not all(map(right, value)) or len(value) != (heads or len(value)):
                found.append(f"{name} of {method} is {value}, and must be one for each query head, each {words}")
        elif not (right(value) or (value is None and name in OPTIONAL)):
            found.append(f"{name} of {method} is {value!r}, and must be {words}")
    rules = [rule for rule in RULES if rule in known]
    given = [rule for rule in rules if with_defaults(method, settings).get(rule) is not None]
    if rules and len(given) != 1:
        said = " and ".join(given) if given else "none"
        found.append(f"{method} keeps blocks by one of {', '.join(rules)}; here it is {said}")
    return found


def _near(name, known) -> str:
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else ""


def _whole(value, least: int) -> bool:
    return type(value) is int and value >= least


def _number(value) -> bool:
    return type(value) in (int, float)
