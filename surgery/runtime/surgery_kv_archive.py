"""The archive of a store under a policy: what KV heads keep that drop nothing, and that differ from row to row.

A `KeptStore` holds a table of keys, as many for each KV head. A policy may name KV heads of each row that are to keep
every key (`Policy.whole_heads`). What the policy takes from the table of these heads moves into the archive, and is
attended to there. The archive is a part of `KeptStore.state`:

    whole                         long [batch, F], the KV heads, in ascending order; -1: not chosen yet
    archive_keys, archive_values  [batch, F, m, head_dim]
    archive_slots                 int32 [batch, F, m]; -1 where there is no key

So F heads of each row keep every key, and the others cost no more than their table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .surgery_stores import rows_at

WHOLE = "whole"  # the name in `KeptStore.state` of the heads; they are chosen before the archive has keys
PREFIX = "archive_"
QUERIES = 128  # so many attend to the archive at a time


class Archive(NamedTuple):
    """The archive of one store, with the heads and the shapes of the module's docstring."""

    whole: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, state: dict[str, torch.Tensor]) -> Archive | None:
        """The archive in a store's state, None if it holds no key."""
        if f"{PREFIX}slots" not in state or not state[f"{PREFIX}slots"].shape[2]:
            return None
        return cls(state[WHOLE], *(state[PREFIX + name] for name in cls._fields[1:]))

    def in_state(self) -> dict[str, torch.Tensor]:
        """The archive as a part of a store's state."""
        return {WHOLE: self.whole} | {PREFIX + name: getattr(self, name) for name in self._fields[1:]}

    def of_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor [batch, KV heads, ...] says of the heads of this archive, [batch, F, ...]."""
        return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], self.whole.clamp(min=0)]

    def _in_all(self, tensor: torch.Tensor, heads: int, fill: float) -> torch.Tensor:
        """A tensor [batch, F, ...] of these heads as one of all KV heads, [batch, KV heads, ...]."""
        all_heads = tensor.new_full((len(tensor), heads, *tensor.shape[2:]), fill)
        index = self.whole.clamp(min=0).reshape(*self.whole.shape, *[1] * (tensor.dim() - 2))
        return all_heads.scatter(1, index.expand_as(tensor), tensor)

    def join(self, query, kv_heads: int, out, lse, attend: Callable) -> tuple:
        """Attention to the keys of a table, and to those of the archive.

        Args:
            query: [batch, heads, n, head_dim].
            kv_heads: number of KV heads of the table.
            out, lse: attention to the table, [batch, heads, n, head_dim] and [batch, heads, n].
            attend: attend(query [batch, F, group, b, head_dim], keys, values, seen) gives output and log-sum-exp.

        Returns:
            The new `out` and `lse`.
        """
        grouped, outs, lses = self.of_whole(query.unflatten(1, (kv_heads, -1))), [], []
        real = None if not bool((self.slots < 0).any()) else (self.slots >= 0)[:, :, None]
        for rows in grouped.split(QUERIES, dim=3):
            seen = None if real is None else real.expand(-1, -1, rows.shape[2] * rows.shape[3], -1)
            each, own = attend(rows, self.keys, self.values, seen)
            outs.append(each)
            lses.append(own)
        far = self._in_all(torch.cat(outs, dim=3), kv_heads, 0.0).reshape(query.shape)
        far_lse = self._in_all(torch.cat(lses, dim=3), kv_heads, -torch.inf).reshape(lse.shape)
        both = torch.logaddexp(lse, far_lse)
        share = (far_lse - both).exp().masked_fill(far_lse == -torch.inf, 0.0)[..., None]
        return out + share.to(far.dtype) * (far - out), both

    def with_more(self, keys, values, slots, leaving: torch.Tensor) -> Archive:
        """This archive with keys of a table.

        Args:
            keys, values, slots: the table, [batch, KV heads, stored, ...].
            leaving: bool [batch, KV heads, stored], the keys that leave it.
        """
        slots = self.of_whole(slots.masked_fill(~leaving, -1)).masked_fill(self.whole[..., None] < 0, -1)
        more = self._replace(keys=self.of_whole(keys), values=self.of_whole(values), slots=slots)._compact()
        pairs = zip(self[1:], more[1:], strict=True)
        return Archive(self.whole, *(torch.cat(pair, dim=2) for pair in pairs))._compact()

    def _compact(self) -> Archive:
        """Without the columns in which no head has a key; each head's keys come first, in their order."""
        real = self.slots >= 0
        if bool(real.all()):
            return self
        most = int(real.sum(-1).max())
        index = real.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
        return Archive(self.whole, *(rows_at(tensor, index) for tensor in self[1:]))


def added_to(state: dict[str, torch.Tensor], table: tuple, leaving: torch.Tensor, whole: torch.Tensor) -> dict:
    """The state of a store whose archive takes more keys (`Archive.with_more`).

    Args:
        table: keys, values and slots of the store.
        whole: long [batch, F], the KV heads of each row that keep every key; -1: not chosen yet.
    """
    archive = Archive.of(state)
    if archive is None:
        empty = (tensor[:, : whole.shape[1], :0] for tensor in table)
        archive = Archive(whole, *empty)
    return state | archive._replace(whole=whole).with_more(*table, leaving).in_state()
