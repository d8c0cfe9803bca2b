"""One call of the heads under a policy: attention piece by piece, and after each piece what the policy drops.

    LayerPolicy  the policy of a layer, as the attention function calls it
    Kept         the stored keys, as the policy sees them at the end of a piece
    Votes        the attention of the queries that vote

surgery_kv_policy.py says where pieces end, and how a policy is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from .surgery_kept_store import KeptStore
from .surgery_kv_archive import Archive
from .surgery_stores import KeyValues, Scoring

if TYPE_CHECKING:
    from .surgery_kv_policy import Policy

FEW = 32  # queries whose weights are held at a time


class LayerPolicy:
    """The policy of one layer, as the attention function calls it."""

    def __init__(self, policy: Policy, layer: int):
        self.policy, self.layer = policy, layer

    def attend(self, module, kind: int, query, view: KeyValues, terms, scoring: Scoring, attend) -> torch.Tensor:
        """Attention of the heads of one kind, in pieces; after each the policy drops what it does not keep.

        Args:
            kind: the number of the kind in `module.surgery_heads`.
            query: [batch, heads, n, head_dim]; the result has this shape, too.
            view: a call's new keys and the store that takes them; without a store, all keys.
            terms: the terms of this kind (`surgery_attention._Terms`).
            attend: attend(query, view, terms), attention to what a view holds.
        """
        policy, store = self.policy, view.store
        if store is None and query.shape[2] < view.keys.shape[2] and not policy.in_calls:
            raise ValueError("this surgery drops keys from the model's own cache: leave the cache out")
        if store is None and policy.interval is None:
            return attend(query, view, terms)
        call = _PiecewiseCall(
            self, module, kind, query, (view.keys, view.values), terms, scoring, attend, view.prompt_slots
        )
        if store is None:
            return call.run(KeptStore(view.visibility), view.new)
        with store.on(view.keys.device):
            if store.recording and not policy.in_calls:
                store.remember(partial(call.run, store))
            return call.run(store, view.new)


@dataclass
class _PiecewiseCall:
    """The heads of one kind under a policy, in one call. The attributes are the arguments of `LayerPolicy.attend`."""

    of: LayerPolicy
    module: torch.nn.Module
    kind: int
    query: torch.Tensor
    new: tuple[torch.Tensor, torch.Tensor]
    terms: tuple
    scoring: Scoring
    attend: Callable
    prompt_slots: dict | None
    in_graph: bool = False  # whether gradients may flow through this run

    def run(self, store: KeptStore, length: int) -> torch.Tensor:
        """Add the call's first `length` tokens to the store, and return the output of their queries."""
        policy, outputs, begin = self.of.policy, [], 0
        first, is_prompt = store.seen, store.seen == 0
        self.in_graph = torch.is_grad_enabled()
        tracked = self.in_graph and any(tensor.requires_grad for tensor in (self.query, *self.new))
        keeps_all = policy.in_calls and (store.recording or tracked)
        for end in self._ends(first, length):
            view = store.add(*(tensor[:, :, begin:end] for tensor in self.new))
            view.prompt_slots, query = self.prompt_slots, self.query[:, :, begin:end]
            terms = self.terms.part(begin, end)
            voting, deciding = self._when(first + begin, first + end, is_prompt)
            if voting is not None:
                terms = terms._replace(observe=partial(self._observe, store, voting, begin))
            outputs.append(self.attend(query, view, terms))
            if deciding is not None and not keeps_all:
                self._decide(store, query, view, deciding)
            begin = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _ends(self, first: int, length: int) -> list[int]:
        """Where the pieces of the call end, counted from its first token, whose slot is `first`."""
        every, pad = self.of.policy.interval, self.scoring.pad
        ends = {length}
        if every is not None and length > 1:
            for start in {0} if pad is None else {*pad.tolist()}:
                ends |= {*range(every - (first - start) % every, length, every)}
        return sorted(ends)

    def _when(self, begin: int, end: int, is_prompt: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which queries of the piece in these slots vote, bool [1 or batch, n], and which rows decide at its end, bool
        [1 or batch]. None: none."""
        policy, every = self.of.policy, self.of.policy.interval
        if self.scoring.mask is None and every is not None and end % every and end % every <= every - policy.voters:
            return None, None  # most steps; nothing is asked of the device
        position = self.scoring.positions(begin, end, self.query.device)
        if policy.in_calls or not (every or is_prompt):
            return None, position.new_ones(len(position), dtype=torch.bool) if policy.in_calls else None
        if every is None:
            last = position.amax(1)
            voting, deciding = position > last[:, None] - policy.voters, last >= 0
        else:
            voting = position % every >= every - policy.voters
            deciding = (position[:, -1] >= 0) & ((position[:, -1] + 1) % every == 0)
        voting = voting & (position >= 0)
        return voting if bool(voting.any()) else None, deciding if bool(deciding.any()) else None

    @torch.no_grad()
    def _observe(self, store: KeptStore, voting, begin: int, query, view: KeyValues, out, lse) -> None:
        """Show the policy the attention of the queries that vote.

        Args:
            voting: bool [1 or batch, n], which of the piece's queries do.
            begin: where the piece begins in the call.
            out, lse: [batch, heads, n, head_dim] and [batch, heads, n].
        """
        at = voting.any(0).nonzero().flatten()
        kept, shape = self._kept(store, query, view), (view.keys.shape[0], view.keys.shape[1], -1)
        slots = torch.arange(view.end - query.shape[2], view.end, device=query.device)
        wide, slots_of_keys = lse.dtype, _slots(view)
        alone = query.shape[2] == 1 and self.scoring.mask is None and self.terms.gates is None and not view.gaps
        for few in range(int(at[0]), int(at[-1]) + 1, FEW):
            some = slice(few, min(few + FEW, int(at[-1]) + 1))
            rows, outputs = (tensor[:, :, some].unflatten(1, shape[1:]).to(wide) for tensor in (query, out))
            product = (rows.flatten(2, 3) * self.scoring.scale) @ view.keys.to(wide).mT
            if (cap := self.scoring.softcap) is not None:
                product = cap * torch.tanh(product / cap)
            votes = voting[:, None, None, some] & self._switched_on(begin, some)
            counted = (product.view(*rows.shape[:4], -1) - lse[:, :, some].unflatten(1, shape[1:])[..., None]).exp()
            if not alone:
                seen = (slots_of_keys[:, :, None] <= slots[some, None]) & (kept.positions >= 0)[:, :, None]
                counted = counted.masked_fill(~(seen[:, :, None] & votes[..., None]), 0.0)
            first, last = int(slots[some][0]), int(slots[some][-1])
            position = self.scoring.positions(first, last + 1, self.query.device)
            if not self.of.policy.needs_outputs:
                outputs = None
            elif not self.terms.corrections:  # what the kernel gave may be rounded to half precision
                outputs = in_groups(counted, view.values.to(wide))
            self.of.policy.add_votes(Votes(counted, outputs, votes, position), kept)
        store.note(kept.notes)
        store.settled = store.seen

    def _switched_on(self, begin: int, some: slice) -> torch.Tensor:
        """Whether the gate of each query's head is open, bool [1 or batch, KV heads or 1, group or 1, n or 1]."""
        if self.terms.gates is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.query.device)
        gates = self.terms.gates[:, begin + some.start : begin + some.stop]  # [batch, n, heads]
        return (gates != 0).mT.unflatten(1, (self.new[0].shape[1], -1))

    def _projection(self) -> torch.Tensor:
        """The part of the output projection of each query head of this kind (`Votes.projection`)."""
        groups, kinds = self.module.surgery_heads.spec
        firsts, (_, kv_heads) = [sum(groups[:head]) for head in range(len(groups))], kinds[self.kind]
        output = self.module.get_submodule(self.of.policy.output)
        while hasattr(output, "base_layer"):  # an adapter of peft: the weight that it adapts
            output = output.base_layer
        weight = output.weight
        if weight.is_meta or not weight.is_floating_point():
            raise ValueError(
                "this surgery reads the output projection to choose keys, and its weights are quantised or offloaded "
                "here: make it with output=false"
            )
        weight = weight.mT if type(output).__name__ == "Conv1D" else weight  # GPT-2's is transposed
        rows = weight.mT.unflatten(0, (sum(groups), -1))  # [heads, head_dim, hidden]
        return torch.stack([rows[firsts[head] : firsts[head] + groups[head]] for head in kv_heads])

    def _kept(self, store: KeptStore, query, view: KeyValues) -> Kept:
        scoring, (_, kv_heads) = self.scoring, self.module.surgery_heads.spec[1][self.kind]
        cached = view.keys, view.values, _positions(view, scoring.mask, scoring.pad)
        rule = scoring.scale, scoring.softcap
        rows = store.state, None if store.archive is None else store.archive.whole
        return Kept(self.of.layer, kv_heads, query, *cached, *rule, store.notes, self._projection, *rows)

    @torch.no_grad()
    def _decide(self, store: KeptStore, query, view: KeyValues, deciding: torch.Tensor) -> None:
        """Drop from the store the keys that the policy does not keep, in rows that decide now: bool [1 or batch]."""
        policy, kept = self.of.policy, self._kept(store, query, view)
        stays, now = policy.survivors(kept), deciding[:, None, None]
        real = kept.positions >= 0
        if not policy.in_calls:
            stays = (stays | ~now) & real
            kept.notes |= _in_rows(deciding, policy.forget(kept.notes), kept.notes)
        store.note(kept.notes)
        if stays is not None:
            stays = _checked(stays, kept.positions)
            with torch.set_grad_enabled(self.in_graph):
                if policy.full_heads:
                    self._archive(store, kept, real & ~stays, deciding)
                store.select(stays)
        if policy.at_prompt_end:
            store.forget_notes()
        if not policy.in_calls:
            store.settled = store.seen

    def _archive(self, store: KeptStore, kept: Kept, leaving: torch.Tensor, deciding: torch.Tensor) -> None:
        """Keep the keys that leave heads which keep every key, and choose these heads in rows that have not yet."""
        policy = self.of.policy
        whole, anew = policy.whole_heads(kept, leaving), policy.forget_state(store.state)
        if bool((whole >= 0).all()):
            store.state = {name: tensor for name, tensor in store.state.items() if name not in anew}
        else:
            store.state = store.state | _in_rows(deciding, anew, store.state)
        archive, table = store.archive, store.table()
        archive = Archive.empty(whole, *table) if archive is None else archive._replace(whole=whole)
        store.archive = archive.with_more(*table, leaving)


def in_groups(rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """rows [batch, KV heads, group, n, x] @ tensor [batch, KV heads, x, m], which a group reads once."""
    return (rows.flatten(2, 3) @ tensor).unflatten(2, rows.shape[2:4])


def _in_rows(rows: torch.Tensor, these: dict, others: dict) -> dict[str, torch.Tensor]:
    """Tensors [batch, ...]: those of `these` in some rows, bool [1 or batch], and in the others those of `others`."""
    return {
        name: torch.where(rows.reshape(-1, *[1] * (tensor.dim() - 1)), tensor, others[name])
        for name, tensor in these.items()
    }


def _slots(view: KeyValues) -> torch.Tensor:
    """The slots of a view's keys, long [batch, KV heads, kept]; -1 where there is no key."""
    if view.slots is not None:
        return view.slots
    return torch.arange(view.start, view.end, device=view.keys.device).expand(view.keys.shape[:3])


def _positions(view: KeyValues, mask, pad) -> torch.Tensor:
    """The positions of a view's keys (`Kept.positions`)."""
    slots = _slots(view)
    if mask is None:
        return slots
    real = (slots >= 0) & mask[:, None].expand(*slots.shape[:2], -1).gather(2, slots.clamp(min=0))
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


@dataclass
class Kept:
    """The keys that are stored for the heads of one kind in one layer, as a policy sees them at the end of a piece.

    Attributes:
        layer: index of the layer.
        kv_heads: indices of these KV heads in the layer.
        queries: [batch, heads, n, head_dim], the queries of the piece's tokens, after RoPE, in order of KV heads.
        keys, values: [batch, KV heads, kept, head_dim], the stored keys and values, including the piece's.
        positions: long [batch, KV heads, kept], counted from a row's first real token; -1 where no real token is
            stored (padding). The piece's tokens are the last ones.
        scale, softcap: the factor on the scores and their cap; softcap may be None.
        state: values that the policy keeps for each row, name -> [batch, ...] (`KeptStore.state`). The policy may set
            and replace them.
        notes: values that the policy keeps for each key, name -> [batch, KV heads, kept, ...]. The policy may set and
            change them. Notes stay with their keys; new keys have notes of 0.
        whole: long [batch, F], the KV heads that keep every key, -1 where a row has not chosen; None: no row has.
        projection: a function that gives the part of the output projection `Policy.output` of each query head,
            [KV heads, group, head_dim, hidden].
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
    projection: Callable[[], torch.Tensor]
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: torch.Tensor | None = None


@dataclass
class Votes:
    """The attention of some queries, before the base's own learned sinks take their share.

    Attributes:
        weights: [batch, KV heads, group, n, kept], the weight of each key for each query of the group's heads, with
            the biases of the surgery; 0 for keys that the query does not see, and for queries that have no vote.
        outputs: [batch, KV heads, group, n, head_dim], attention's output; arbitrary for queries without a vote. None
            unless the policy `needs_outputs`. Of heads that keep every key, the archive's share may be missing.
        voting: bool [1 or batch, 1 or KV heads, 1 or group, n], the queries that have a vote.
        positions: long [1 or batch, n], of the queries.
    """

    weights: torch.Tensor
    outputs: torch.Tensor | None
    voting: torch.Tensor
    positions: torch.Tensor
