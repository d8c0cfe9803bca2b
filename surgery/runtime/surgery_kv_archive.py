"""The archive of a store under a policy: what KV heads keep that drop nothing, and that differ from row to row.

A `KeptStore` holds a table of keys, as many for each KV head. A policy may name KV heads of each row that are to keep
every key (`Policy.whole_heads`). What the policy takes from the table of these heads moves into the archive, and is
attended to there. So F heads of each row keep every key, and the others cost no more than their table.

The archive is as long as its keys. A decision copies it, which costs a hundredth of what the steps up to the next
decision read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .surgery_stores import rows_at

QUERIES = 128  # so many attend to the archive at a time


class Archive(NamedTuple):
    """The archive of one store.

    Attributes:
        whole: long [batch, F], the KV heads that keep every key, in ascending order; -1: not chosen yet.
        keys, values: [batch, F, m, head_dim].
        slots: int32 [batch, F, m]; -1 where there is no key.
        gaps: some slots are -1.
    """

    whole: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    gaps: bool = False

    @classmethod
    def empty(cls, whole: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> Archive:
        """An archive of these heads without a key, for a table like this one."""
        return cls(whole, *(tensor[:, : whole.shape[1], :0] for tensor in (keys, values, slots)))

    @property
    def length(self) -> int:
        return self.slots.shape[2]

    def changed(self, function: Callable) -> Archive:
        """This archive with the function's result for each tensor."""
        return Archive(*map(function, self[:4]), self.gaps)

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
        real = (self.slots >= 0)[:, :, None] if self.gaps else None
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
            leaving: bool [batch, KV heads, stored], the keys that leave it; none of rows that have not chosen.
        """
        slots = self.of_whole(slots.masked_fill(~leaving, -1))
        more = self._replace(keys=self.of_whole(keys), values=self.of_whole(values), slots=slots)._compact()
        pairs = zip(self[1:4], more[1:4], strict=True)
        return Archive(self.whole, *(torch.cat(pair, dim=2) for pair in pairs))._compact()

    def _compact(self) -> Archive:
        """Without the columns in which no head has a key; each head's keys come first, in their order."""
        real = self.slots >= 0
        if bool(real.all()):
            return self._replace(gaps=False)
        counts = real.sum(-1)
        index = real.int().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())]
        gaps = bool((counts != counts.max()).any())
        return Archive(self.whole, *(rows_at(tensor, index) for tensor in self[1:4]), gaps)
