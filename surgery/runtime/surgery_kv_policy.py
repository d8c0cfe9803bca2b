"""Policies that drop keys from the cache of full heads (KV eviction), and how one comes to be asked.

An entry of the `surgery` block may hold `policy`: a name, and whatever settings the policy has:

    {"name": "identity"}

It is for KV heads that see all: those that see sinks + window keep what they see anyway. At the end of every call with
a cache (a prompt, a chunk of one, a decoded token) the attention function calls `LayerPolicy.drop`, which shows the
policy what was computed: `Kept`. The policy answers which keys stay, of each KV head others if it likes. What goes is
seen by no later query, and its memory is freed (`surgery_stores.KeptStore`). Keys keep the position they were made at.

A new policy is one file: a subclass of `Policy` whose fields are its settings, with `POLICY = YourPolicy` at its end,
and a line in `surgery_config.FILES`, `"policy.<name>": "<file>"`; surgery_kv_log.py is a short one. A policy is not
told whether a chunk of a prompt is its last: more than one query is a chunk, one query a decoded token. In your own
process `POLICIES["<name>"] = YourPolicy` will do.

Nothing is dropped without a cache, through a cache that is not ours, where gradients flow through the keys, and while
the cache records what may be taken back (assisted generation).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from .surgery_config import FILES, HeadCost, Part, load_file, used_parts
from .surgery_stores import KeyValues
from .surgery_visibility import HeadKinds, Visibility


@dataclass
class Kept:
    """What a policy is shown at the end of a call: the heads of one kind in one layer.

    Attributes:
        layer: the number of the layer.
        kv_heads: the numbers of these KV heads in it.
        queries: [batch, heads, n, head_dim] of this call's tokens, after RoPE; heads KV head by KV head.
        keys, values: [batch, KV heads, kept, head_dim], what is held, this call's tokens among them.
        positions: long [batch, KV heads, kept], counted from a row's first real token; -1 where nothing real is held
            (padding). The newest are this call's.
        scale, softcap: of the scores; softcap may be None.
        notes: what the policy wants to remember of each key, name -> [batch, KV heads, kept, ...]; it may set and
            change them. They stay with their keys; those of new keys are 0.
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
    """Which keys stay in the cache. A subclass is a dataclass; its fields are settings, which an entry gives.

    There is one for each layer, for all calls: what it must remember of a text is a note (`Kept.notes`).
    """

    def survivors(self, kept: Kept) -> torch.Tensor | None:
        """Which of the keys that are held stay.

        Returns:
            None: all of them. Or bool [batch, KV heads, kept]. Or indices, long [batch, KV heads, m], each once.
        """
        raise NotImplementedError

    def problem(self) -> str:
        """What is wrong with the settings, "" if nothing."""
        return ""

    def kv_cost(self, cost: HeadCost) -> HeadCost:
        """What the cache holds of a KV head under this policy; `cost`: without it."""
        return cost

    def after_heads_change(self, queries: list[int], kv_heads: list[int]) -> dict:
        """The settings that change where only these heads stay: of a policy that has a setting for each head."""
        return {}


@dataclass
class Identity(Policy):
    """All keys stay."""

    def survivors(self, kept: Kept) -> None:
        return None


POLICIES: dict[str, type[Policy]] = {"identity": Identity}


def policy_of(entry: dict) -> Policy:
    """The policy that `policy` of a layer's entry names.

    Raises:
        ValueError: there is none of this name, it has other settings, or they are wrong.
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
        """Ask the policy for every kind of head that is under it, and have the cache drop what it does not keep.

        Args:
            queries, views: kind by kind, of the call that ends.
            mask: bool [batch, N], the slots of real tokens, or None. pad: [batch], those before each row's first, or
                None.
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
    """Positions of the keys of a view, as `Kept` has them."""
    slots, shape = view.slots, view.keys.shape[:3]
    if slots is None:
        slots = torch.arange(view.start, view.end, device=view.keys.device).expand(shape)
    if mask is None:
        return slots
    real = (slots >= 0) & mask[:, None].expand(*shape[:2], -1).gather(2, slots.clamp(min=0))
    return torch.where(real, slots - pad.long()[:, None, None], -1)


def _checked(stays: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What a policy answered, if the store can take it.

    Raises:
        ValueError: it is neither bool for each key nor indices for each KV head.
    """
    is_mask = stays.dtype == torch.bool and stays.shape == positions.shape
    if not is_mask and (stays.dtype != torch.long or stays.shape[:2] != positions.shape[:2] or stays.dim() != 3):
        kind, wanted = f"{stays.dtype} {list(stays.shape)}", list(positions.shape)
        raise ValueError(f"a policy gave {kind}; it is bool {wanted}, or long {[*wanted[:2], 'm']}")
    return stays


class KVPolicy(Part):
    """A policy for the cache of full heads; an entry has `policy`, as this file's beginning says."""

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
