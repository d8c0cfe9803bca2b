"""Policies that drop keys from the cache of full heads (KV eviction), and the interface through which they are called.

An entry of the `surgery` block may hold `policy`: a name, and the settings of the policy:

    {"name": "identity"}

A policy applies to KV heads that see all tokens. (Heads that see sinks + window store only these already.) At the end
of every call with a cache (a prompt, a chunk of one, a decoded token) the attention function calls `LayerPolicy.drop`.
This passes the policy a `Kept`: the call's queries, and the keys and values in the cache. The policy returns the keys
that stay, which may differ from KV head to KV head. No later query sees the other keys, and their memory is freed
(`surgery_stores.KeptStore`). The remaining keys keep their positions.

A new policy is one file: a subclass of `Policy` whose fields are its settings, with `POLICY = YourPolicy` at its end,
and a line in `surgery_config.FILES`, `"policy.<name>": "<file>"`. surgery_kv_log.py is a short example. In your own
process, `POLICIES["<name>"] = YourPolicy` is enough. A policy does not learn whether a chunk is the last one of its
prompt: a call with more than one query is a prompt or a chunk, and a call with one query is a decoded token.

Nothing is dropped without a cache, in a cache other than `SurgeryCache`, where gradients flow through the keys, or
while the cache records tokens that may be removed again (assisted generation).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from .surgery_config import FILES, HeadCost, Part, load_file, used_parts
from .surgery_stores import KeyValues
from .surgery_visibility import HeadKinds, Visibility


@dataclass
class Kept:
    """The argument of a policy at the end of a call: the heads of one kind in one layer.

    Attributes:
        layer: index of the layer.
        kv_heads: indices of these KV heads in the layer.
        queries: [batch, heads, n, head_dim], the queries of this call's tokens, after RoPE, in order of KV heads.
        keys, values: [batch, KV heads, kept, head_dim], the stored keys and values, including this call's.
        positions: long [batch, KV heads, kept], counted from a row's first real token; -1 where no real token is
            stored (padding). This call's tokens are the last ones.
        scale, softcap: the factor on the scores and their cap; softcap may be None.
        notes: values that the policy keeps for each key, name -> [batch, KV heads, kept, ...]. The policy may set and
            change them. Notes stay with their keys; new keys have notes of 0.
    """

    layer: int
    kv_heads: list[int]
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scale: float
    softcap: float | None
    notes: dict[str, torch.Tensor]


class Policy:
    """The base class of policies, which decide the keys that stay in the cache.

    A subclass is a dataclass. Its fields are the settings in a layer's entry. Each layer has one policy for all calls,
    so a policy must store what it remembers of a text as notes (`Kept.notes`).
    """

    def survivors(self, kept: Kept) -> torch.Tensor | None:
        """Which of the stored keys stay.

        Returns:
            None if all stay, or bool [batch, KV heads, kept], or distinct indices, long [batch, KV heads, m].
        """
        raise NotImplementedError

    def problem(self) -> str:
        """The error in the settings, "" if there is none."""
        return ""

    def kv_cost(self, cost: HeadCost) -> HeadCost:
        """The cost of a KV head in the cache under this policy; `cost`: without the policy."""
        return cost

    def after_heads_change(self, queries: list[int], kv_heads: list[int]) -> dict:
        """The new values of settings that have a value for each head, when only these heads remain."""
        return {}


@dataclass
class Identity(Policy):
    """A policy that keeps all keys."""

    def survivors(self, kept: Kept) -> None:
        return None


POLICIES: dict[str, type[Policy]] = {"identity": Identity}


def policy_of(entry: dict) -> Policy:
    """The policy that a layer's entry `policy` describes.

    Raises:
        ValueError: there is no policy of this name, it has no such setting, or a setting is wrong.
    """
    name = entry.get("name") if isinstance(entry, dict) else None
    names = sorted({*POLICIES, *(each.partition(".")[2] for each in FILES if each.startswith("policy."))})
    if name not in names:
        raise ValueError(f"{entry!r} names no policy; there is: {', '.join(names)}")
    cls = POLICIES[name] if name in POLICIES else load_file(f"policy.{name}").POLICY
    settings, known = (
        {key: value for key, value in entry.items() if key != "name"},
        {each.name for each in fields(cls) if each.init},
    )
    if other := sorted(set(settings) - known):
        raise ValueError(f"policy {name!r} has no {other[0]!r}; it has: {', '.join(sorted(known)) or 'no settings'}")
    try:
        policy = cls(**settings)
    except TypeError as error:  # a setting is missing
        raise ValueError(f"policy {name!r}: {error}") from None
    if problem := policy.problem():
        raise ValueError(f"policy {name!r}: {problem}")
    return policy


class LayerPolicy:
    """The policy of one layer, as the attention function calls it."""

    def __init__(self, policy: Policy, layer: int):
        self.policy, self.layer = policy, layer

    @torch.no_grad()
    def drop(self, kinds: HeadKinds, queries: list, views: list[KeyValues], mask, pad, scale, softcap) -> None:
        """Call the policy for every kind of head under it, and drop from the cache the keys that it does not keep.

        Args:
            queries, views: for each kind of head, the queries and the view of the call that ends.
            mask: bool [batch, N], the slots of real tokens, or None.
            pad: [batch], slots before each row's first real token, or None.
        """
        for (visibility, kv_heads), query, view in zip(kinds.spec[1], queries, views, strict=True):
            if not visibility.by_policy or view.store is None:
                continue
            cached = view.keys, view.values, _positions(view, mask, pad)
            shown = Kept(self.layer, kv_heads, query, *cached, scale, softcap, view.store.notes)
            stays = self.policy.survivors(shown)
            view.store.note(shown.notes)
            if stays is not None:
                view.store.select(_checked(stays, shown.positions))


def _positions(view: KeyValues, mask, pad) -> torch.Tensor:
    """The positions of a view's keys (`Kept.positions`)."""
    slots, shape = view.slots, view.keys.shape[:3]
    if slots is None:
        slots = torch.arange(view.start, view.end, device=view.keys.device).expand(shape)
    if mask is None:
        return slots
    real = (slots >= 0) & mask[:, None].expand(*shape[:2], -1).gather(2, slots.clamp(min=0))
    return torch.where(real, slots - pad.long()[:, None, None], -1)


def _checked(stays: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A policy's result, checked.

    Raises:
        ValueError: it is neither bool for each key nor indices for each KV head.
    """
    is_mask = stays.dtype == torch.bool and stays.shape == positions.shape
    if not is_mask and (stays.dtype != torch.long or stays.shape[:2] != positions.shape[:2] or stays.dim() != 3):
        kind, wanted = f"{stays.dtype} {list(stays.shape)}", list(positions.shape)
        raise ValueError(f"a policy gave {kind}; it is bool {wanted}, or long {[*wanted[:2], 'm']}")
    return stays


class KVPolicy(Part):
    """A policy for the cache of full heads. An entry has `policy` (see the module's docstring)."""

    keys = ("policy",)

    def validation_error(self, config, layer: dict, groups: list[int]) -> str:
        for name, part in used_parts(layer).items():
            if part.by_slots:
                return f"has a policy for the cache and {name}, which needs all keys in order"
        try:
            policy_of(layer["policy"])
        except ValueError as error:
            return f"has a policy that cannot be: {error}"
        return ""

    def methods(self, layer: dict) -> set[str]:
        return {f"policy.{layer['policy']['name']}"} & set(FILES)

    def visibilities(self, layer: dict, heads: list[Visibility]) -> list[Visibility]:
        return [seen if seen.simplified().window is not None else replace(seen, by_policy=True) for seen in heads]

    def attach(self, module, layer: dict, groups: list[int]) -> None:
        used = "policy" in layer
        module.surgery_policy = LayerPolicy(policy_of(layer["policy"]), module.layer_idx) if used else None

    def terms(self, layer: dict) -> tuple[str, ...]:
        return ("visibility of the cache",)

    def kv_cost(self, layer: dict, heads: list[HeadCost]) -> list[HeadCost]:
        policy = policy_of(layer["policy"])
        return [policy.kv_cost(cost) if cost.growing else cost for cost in heads]

    def after_heads_change(self, layer: dict, queries: list[int], kv_heads: list[int]) -> dict:
        return {"policy": layer["policy"] | policy_of(layer["policy"]).after_heads_change(queries, kv_heads)}

    def describe(self, layer: dict) -> tuple[str, str]:
        return "policy of the cache", layer["policy"]["name"]

    def display_key(self, layer: dict):
        return layer["policy"]


PART = KVPolicy()
