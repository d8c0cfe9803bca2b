"""The ways to choose blocks in sparse prefill, by name, and whether settings fit them.

Each is a function `select(query, key, scale, block, **settings)` that gives the kept blocks, bool [batch, heads or KV
heads, query blocks, key blocks]: causal on the level of blocks, the first and the diagonal block always kept. Query is
[batch, heads, n, head_dim], key [batch, KV heads, N, head_dim], all of real tokens, the queries the last n of them.
A model's soft-cap and learned sinks are not known here: they change weights, not the order of a query's scores.

Block boundaries are absolute: key block J is the keys from J * size to J * size + size - 1, query block I the queries
at those same places: what a block of queries keeps does not depend on how a prompt is cut, if it is at block edges.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch.nn.functional import pad

from .surgery_config import is_whole, load_file


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
        return by_head if self.name == "by_head" else getattr(load_file(f"sparse.{self.name}"), self.name)

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


CELLS = 1 << 22  # scores that an estimator holds at once, over all heads: 16 MB of float32


@dataclass(frozen=True)
class Blocks:
    """How the last `queries` of `keys` tokens fall into blocks of `size`.

    Attributes:
        queries, keys: n and N.
        size: tokens in a block.
    """

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, size: int) -> Blocks:
        """Of query [batch, heads, n, head_dim] and key [batch, KV heads, N, head_dim]."""
        return cls(query.shape[2], key.shape[2], size)

    @property
    def start(self) -> int:
        """Place of the first query among the tokens."""
        return self.keys - self.queries

    @property
    def first(self) -> int:
        """Number of the first query block: row r of a list of kept blocks is query block `first` + r."""
        return self.start // self.size

    @property
    def columns(self) -> int:
        """Key blocks."""
        return -(-self.keys // self.size)

    @property
    def rows(self) -> int:
        """Query blocks."""
        return self.columns - self.first

    def row_numbers(self, device=None) -> torch.Tensor:
        """Number of each query block, long [rows, 1]."""
        return torch.arange(self.first, self.columns, device=device)[:, None]

    def distance(self, device=None) -> torch.Tensor:
        """Block of the queries less block of the keys, long [rows, columns]; below 0: the keys are later."""
        return self.row_numbers(device) - torch.arange(self.columns, device=device)

    def causal(self, device=None) -> torch.Tensor:
        """Blocks with a key that some query of the row sees, bool [rows, columns]."""
        return self.distance(device) >= 0

    def counts(self, device=None) -> torch.Tensor:
        """Keys of each block, long [columns]."""
        return (self.keys - torch.arange(self.columns, device=device) * self.size).clamp_max(self.size)

    def forced(self, first: int = 1, local: int = 1, last_rows_dense: int = 0, device=None) -> torch.Tensor:
        """What is kept whatever its score, bool [rows, columns].

        Args:
            first: blocks at the begin.
            local: nearest blocks, the diagonal one counted.
            last_rows_dense: of so many last tokens, the query blocks that hold them keep all blocks.
        """
        distance = self.distance(device)
        near = distance < max(local, 1)
        begin = torch.arange(self.columns, device=device) < max(first, 1)
        dense = (self.row_numbers(device) + 1) * self.size > self.keys - last_rows_dense
        if not last_rows_dense:
            dense = torch.zeros_like(dense)
        return (near | begin | dense) & (distance >= 0)

    def pieces(self, cells_of_row: int) -> Iterator[tuple[slice, slice, int]]:
        """The queries in pieces of whole query blocks whose scores may be held at once.

        Args:
            cells_of_row: scores of one query block with one key block, over all heads of the batch.

        Yields:
            rows of the list of kept blocks, the queries that they hold, and how many key blocks the last row sees.
        """
        begin = 0
        while begin < self.rows:
            end = begin + 1
            while end < self.rows and (end + 1 - begin) * (self.first + end + 1) * cells_of_row <= CELLS:
                end += 1
            tokens = slice(self.place(begin), self.place(end))
            yield slice(begin, end), tokens, self.first + end
            begin = end

    def place(self, row: int) -> int:
        """Number of the first query of a row."""
        return min(max((self.first + row) * self.size - self.start, 0), self.queries)

    def row_of(self, tokens: slice, device=None) -> torch.Tensor:
        """Of some queries, the row each belongs to, long [tokens]."""
        return (self.start + torch.arange(tokens.start, tokens.stop, device=device)) // self.size - self.first

    def fold(self, values: torch.Tensor, rows: slice, fill: float) -> torch.Tensor:
        """Values of the queries of some rows, [..., tokens, x], block by block: [..., rows, size, x].

        Places of a block where no query is (before a chunk, after the end) get `fill`.
        """
        lead = self.start % self.size if rows.start == 0 else 0
        count = rows.stop - rows.start
        trail = count * self.size - lead - values.shape[-2]
        if lead or trail:
            values = pad(values, (0, 0, lead, trail), value=fill)
        return values.unflatten(-2, (count, self.size))


def widen(values: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def block_means(values: torch.Tensor, size: int, start: int = 0) -> torch.Tensor:
    """Mean of the tokens of each block.

    Args:
        values: [batch, heads, tokens, x], the first of which is at place `start`.
        size: tokens of a block.

    Returns:
        [batch, heads, blocks, x], float32 or wider; a block that is not whole is the mean of the tokens it has.
    """
    wide, length = torch.promote_types(values.dtype, torch.float32), values.shape[2]
    lead = min(-start % size, length)
    whole = (length - lead) // size
    middle = lead + whole * size
    means = []
    if lead:
        means.append(values[:, :, :lead].mean(2, keepdim=True, dtype=wide))
    if whole:
        means.append(values[:, :, lead:middle].unflatten(2, (whole, size)).mean(3, dtype=wide))
    if middle < length:
        means.append(values[:, :, middle:].mean(2, keepdim=True, dtype=wide))
    return torch.cat(means, dim=2)


def by_group(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Query [batch, heads, n, x] as [batch, KV heads, group, n, x]."""
    return query.unflatten(1, (kv_heads, query.shape[1] // kv_heads))


def shares(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; a row that has only -inf gives zeros."""
    return scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)


def reduce_groups(mass: torch.Tensor, kv_heads: int, how: str) -> torch.Tensor:
    """One list of masses for the query heads that read a KV head.

    Args:
        mass: [batch, heads, rows, columns], not negative.
        how: "sum" or "max" over the query heads of each KV head, or "none".

    Returns:
        [batch, KV heads, rows, columns], or mass itself.
    """
    if how == "none":
        return mass
    grouped = by_group(mass, kv_heads)
    return grouped.sum(2) if how == "sum" else grouped.amax(2)


def keep_by_coverage(mass: torch.Tensor, gamma: float, forced: torch.Tensor) -> torch.Tensor:
    """Blocks in falling order of mass, the forced ones first, as long as those before hold less than gamma of all.

    The block that crosses the line is in. Of equal masses the earlier block is first.

    Args:
        mass: [..., columns], not negative.
        gamma: share of a row's mass. 1 keeps all, also what has no mass.
        forced: bool, broadcast to mass.
    """
    if gamma >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    order = mass.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ranked = mass.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    kept = before < gamma * ranked.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept) | forced


def keep_by_ratio(mass: torch.Tensor, alpha: float) -> torch.Tensor:
    """Blocks with at least alpha times the largest mass of their row; 0 keeps all."""
    return mass >= alpha * mass.amax(-1, keepdim=True)


def keep_top(scores: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """The k largest of each row, the earlier of equal ones first.

    Args:
        scores: [..., columns].
        k: from 1; one for all, or long and broadcast to [..., 1]. More than the columns keeps all.
    """
    columns = scores.shape[-1]
    k = torch.as_tensor(k, device=scores.device).clamp(1, columns)
    ranked = scores.topk(int(k.max()), dim=-1).values
    least = ranked.gather(-1, (k - 1).expand(*scores.shape[:-1], 1))
    above, level = scores > least, scores == least
    room = k - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def keep(
    mass: torch.Tensor, blocks: Blocks, forced: torch.Tensor, gamma: float | None, density: float | None, alpha=None
) -> torch.Tensor:
    """The kept blocks by one of three rules, with what is forced, causal on the level of blocks.

    Args:
        mass: [batch, heads, rows, columns], not negative, 0 for later keys.
        forced: bool [rows, columns] (or broadcast so), a part of the causal blocks.
        gamma: coverage, see `keep_by_coverage`.
        density: share of the causal blocks of a row, rounded up, what is forced counted.
        alpha: see `keep_by_ratio`.

    Returns:
        bool [batch, heads, rows, columns].

    Raises:
        ValueError: not one of the three.
    """
    if [gamma, density, alpha].count(None) != 2:
        raise ValueError(f"one rule says which blocks are kept: gamma={gamma}, density={density}, alpha={alpha}")
    causal = blocks.causal(mass.device)
    if gamma is not None:
        kept = keep_by_coverage(mass, gamma, forced)
    elif density is not None:
        # Less a little, since 0.1 * 30 is a little more than 3.
        most = [math.ceil(density * (row + 1) - 1e-9) for row in range(blocks.first, blocks.columns)]
        ranked = mass.masked_fill(~causal, -torch.inf).masked_fill(forced, torch.inf)
        kept = keep_top(ranked, torch.tensor(most, device=mass.device)[:, None])
    else:
        kept = keep_by_ratio(mass, alpha)
    return (kept | forced) & causal
