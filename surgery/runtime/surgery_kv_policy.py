"""Policies that drop keys from the cache of full heads (KV eviction), and the interface through which they are called.

An entry of the `surgery` block may hold `policy`: a name, the settings of the policy, and perhaps `heads`, the indices
of the KV heads that are under it (left out: all):

    {"name": "identity"}
    {"name": "norm", "keys": 1024, "sinks": 4, "recent": 128, "interval": 256, "heads": [0, 2]}

A policy applies to KV heads that see all tokens. (Heads that see sinks + window store only these already.) The
attention function hands the queries of these heads to `LayerPolicy.attend`, which works a call off in pieces. After a
piece it shows the policy what is stored now (`Kept`), and the policy returns the keys that stay, which may differ from
KV head to KV head. No later query sees the other keys, and their memory is freed (`surgery_kept_store.KeptStore`). In
KV heads that are to keep every key they move to an archive (surgery_kv_archive.py). All keys keep their positions.

Where a piece ends is up to the policy. With `interval`, a piece ends at each position before a multiple of it, counted
from a row's first real token. So a text gives the same result in one call, in chunks, without a cache, and in a padded
batch. Without `interval` a piece is a call (a prompt, a chunk of one, a decoded token), and nothing is dropped without
a cache, where gradients flow through the keys, or while the cache records tokens that may be removed again.

A new policy is one file: a subclass of `Policy` whose fields are its settings, with `POLICY = YourPolicy` at its end,
and a line in `surgery_config.FILES`, `"policy.<name>": "<file>"`. surgery_kv_log.py is a short example of a policy
that is called after each call, and surgery_kv_norm.py of one that decides at positions. In your own process,
`POLICIES["<name>"] = YourPolicy` is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .surgery_config import FILES, HeadCost, Part, used_parts
from .surgery_kv_call import Kept, LayerPolicy, Votes
from .surgery_kv_entry import fault_of_heads, heads_under, remaining_heads, rule_of
from .surgery_visibility import Visibility


class Policy:
    """The base class of policies, which decide the keys that stay in the cache.

    A subclass is a dataclass. Its fields are the settings in a layer's entry. Each layer has one policy for all calls,
    so a policy must store what it remembers of a text as notes (`Kept.notes`).

    Attributes:
        interval: it decides before each multiple of this position; None: at the end of each call.
        voters: number of queries before a decision whose votes are counted; 0: none.
        at_prompt_end: it decides once, at the end of the call that filled the empty cache.
        keeps_first: whether a row's first token always stays.
        output: name of the output projection in the attention module, for votes that are weighed behind it; "": none.
        needs_outputs: votes come with attention's outputs (`Votes.outputs`).
        full_heads: number of KV heads of each row that keep every key (`whole_heads`).
    """

    output: str = ""
    interval: int | None = None
    voters: int = 0
    at_prompt_end: bool = False
    keeps_first: bool = False
    needs_outputs: bool = False
    full_heads: int = 0

    @property
    def in_calls(self) -> bool:
        """Whether it is asked at the end of every call."""
        return self.interval is None and not self.at_prompt_end

    def survivors(self, kept: Kept) -> torch.Tensor | None:
        """Which of the stored keys stay.

        Returns:
            None if all stay, or bool [batch, KV heads, kept], or distinct indices, long [batch, KV heads, m]. With an
            interval, bool: rows that do not decide now keep their keys.
        """
        raise NotImplementedError

    def add_votes(self, votes: Votes, kept: Kept) -> None:
        """Note the votes of some queries in `kept.notes`."""
        raise NotImplementedError

    def whole_heads(self, kept: Kept, leaving: torch.Tensor) -> torch.Tensor:
        """The KV heads of each row that keep every key, long [batch, full_heads], ascending; -1: not chosen yet.

        Asked at each decision, with an interval or at the prompt's end, if there are `full_heads`. What was chosen
        before is `kept.whole`, and stays.

        Args:
            leaving: bool [batch, KV heads, kept], the keys that the policy drops now.
        """
        raise NotImplementedError

    def forget(self, notes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The notes of rows that have just decided."""
        return notes

    def forget_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those values of `Kept.state` that rows have anew after a decision. They go once every row has chosen."""
        return {}

    def problem(self) -> str:
        """The error in the settings, "" if there is none."""
        return ""

    def problem_of_heads(self, groups: list[int]) -> str:
        """Why it cannot be the policy of these KV heads of a layer, "" if it can.

        Args:
            groups: number of query heads that read each of them.
        """
        return ""

    def kv_cost(self, cost: HeadCost) -> HeadCost:
        """The cost of a KV head in the cache under this policy; `cost`: without the policy."""
        return cost

    def archive_costs(self) -> list[HeadCost]:
        """What the heads of a layer that keep every key (`whole_heads`) cost beside their tables."""
        return []

    @property
    def most(self) -> int | None:
        """The largest number of keys in a KV head's table; None: it grows with the text. An archive does so, too."""
        return None

    @property
    def probe_length(self) -> int:
        """How many tokens a text must have to show that keys are dropped."""
        return 0

    def after_heads_change(self, queries: list[int], kv_heads: list[int]) -> dict:
        """The new values of settings that have a value for each head, when only these heads remain."""
        return {}


@dataclass
class Identity(Policy):
    """A policy that keeps all keys."""

    keeps_first = True

    def survivors(self, kept: Kept) -> None:
        return None


POLICIES: dict[str, type[Policy]] = {"identity": Identity}


def policy_of(entry: dict) -> Policy:
    """The policy that a layer's entry `policy` describes.

    Raises:
        ValueError: as of `rule_of`.
    """
    return rule_of("policy", entry, POLICIES)


class KVPolicy(Part):
    """A policy for the cache of full heads. An entry has `policy` (see the module's docstring)."""

    keys = ("policy",)

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        try:
            policy = policy_of(layer["policy"])
        except ValueError as error:
            return f"has a policy that cannot be: {error}"
        if fault := fault_of_heads(layer, "policy", len(groups)):
            return fault
        under = sorted(heads_under(layer, "policy", len(groups)) - {*layer.get("streaming", [])})
        if under and (fault := policy.problem_of_heads([groups[head] for head in under])):
            return f"has a policy that cannot be: {fault}"
        for name, part in used_parts(layer).items():
            if part.by_slots:
                return f"has a policy for the cache and {name}, which needs all keys in order"
            if part.by_first_token(layer) and not policy.keeps_first:
                return f"has {name}, which needs the first token, and a policy that may drop it: sinks from 1"
        return ""

    def methods(self, layer: dict) -> set[str]:
        return {f"policy.{layer['policy']['name']}"} & set(FILES)

    def visibilities(self, layer: dict, heads: list[Visibility]) -> list[Visibility]:
        under, most = heads_under(layer, "policy", len(heads)), policy_of(layer["policy"]).most
        return [
            replace(seen, keeper="policy", most=most) if head in under and seen.simplified().window is None else seen
            for head, seen in enumerate(heads)
        ]

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        if "policy" in layer:
            module.surgery_keepers["policy"] = LayerPolicy(policy_of(layer["policy"]), module.layer_idx)

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("visibility of the cache",)

    def kv_cost(self, layer: dict, heads: list[HeadCost]) -> list[HeadCost]:
        policy, under = policy_of(layer["policy"]), heads_under(layer, "policy", len(heads))
        costs = [policy.kv_cost(cost) if cost.growing and head in under else cost for head, cost in enumerate(heads)]
        return costs + (policy.archive_costs() if costs != heads else [])

    def after_heads_change(self, layer: dict, queries: list[int], kv_heads: list[int]) -> dict:
        entry = layer["policy"] | policy_of(layer["policy"]).after_heads_change(queries, kv_heads)
        return {"policy": remaining_heads(entry, kv_heads)}

    def by_prompt(self, layer: dict) -> bool:
        return policy_of(layer["policy"]).at_prompt_end

    def in_own_cache(self, layer: dict) -> bool:
        return not policy_of(layer["policy"]).in_calls

    def describe(self, layer: dict) -> tuple[str, str]:
        return "policy of the cache", layer["policy"]["name"]

    def display_key(self, layer: dict):
        return layer["policy"]

    def probe_length(self, layer: dict, least: int) -> int:
        return max(least, policy_of(layer["policy"]).probe_length)


PART = KVPolicy()
