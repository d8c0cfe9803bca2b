"""Healing a model with sparse prefill: the switch to full attention (`heal.full_from`), and the loss under both.

MoBA trains nine tenths of the tokens with sparse attention and the rest with full attention, so that the model is good
with either. The weights are the same in both; only the visibility changes.

Source: Lu et al. 2025, "MoBA", arXiv 2502.13189, section 3.2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from surgery.errors import SettingError
from surgery.operations.sparse_prefill.prompt_share import block_of, dense_until, last_query_reads, share_read

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy
    from surgery.config.heal import Heal
    from surgery.data.packing import Packed

SPARSE, FULL = "text_loss_sparse", "text_loss_full"  # names in metrics.jsonl


def entries(anatomy: Anatomy) -> list[dict[str, Any]]:
    """The settings of sparse prefill of the layers that have it."""
    return [layer.entry["sparse"] for layer in anatomy.layers if "sparse" in layer.entry]


def switch_step(heal: Heal) -> int | None:
    """How many steps are sparse before attention becomes full; None: it never does, or the clock decides."""
    if heal.full_from is None or heal.planned_steps is None:
        return None
    return math.ceil(heal.full_from * heal.planned_steps - 1e-9)  # 0.7 * 10 is slightly more than 7


def refuse_without_sparse(heal: Heal, anatomy: Anatomy) -> None:
    """Raise where `heal.full_from` asks for a switch, and attention is full in any case."""
    if heal.full_from is None:
        return
    where, fix = "heal.full_from", "heal.full_from=null"
    sparse = entries(anatomy)
    if not sparse:
        raise SettingError(
            "full_from switches sparse prefill off, and no layer of this model has it", where=where, fix=fix
        )
    if heal.length <= (whole := min(map(_whole_until, sparse))):
        raise SettingError(
            f"full_from switches sparse prefill off, and rows of {heal.length:,} tokens are read whole anyway: "
            f"attention is sparse beyond {whole:,}",
            where=where,
            fix=f"heal.length={1 << (4 * whole - 1).bit_length()}, or {fix}",
        )


def _whole_until(entry: dict) -> int:
    """Rows of up to so many tokens read all keys in a layer with this entry (`Sparse.applies`)."""
    return dense_until(entry) if entry.get("exact") else max(entry.get("dense_below", 0), block_of(entry) - 1)


def plan_lines(heal: Heal, anatomy: Anatomy) -> tuple[str, ...]:
    """What the plan of a healing says about its attention."""
    found = []
    if exact := [entry for entry in entries(anatomy) if entry.get("exact")]:
        share, last = (measure(exact[0], heal.length) for measure in (share_read, last_query_reads))
        found.append(
            f"heal: in a row of {heal.length:,} tokens, if it is one document, a query reads {share:.0%} of the keys "
            f"before it (the last one {last:.0%}), in {len(exact)} of {len(anatomy.layers)} layers"
        )
    if heal.full_from is not None:
        step, steps = switch_step(heal), heal.planned_steps
        last = f"{1 - heal.full_from:.0%} of the time" if step is None else f"{steps - step:,} of {steps:,} steps"
        found.append(f"heal: attention is sparse at first, and full in the last {last}")
    return tuple(found)


def keys_read(anatomy: Anatomy, rows: Packed) -> dict[str, dict[str, float]]:
    """The share of the keys before it that a query reads, a mean over the queries and keys of the rows and over the
    layers in which the settings alone determine it, and how many of all layers these are; {} where there is none.

    A document of a row is a text of its own, so that short ones are read whole whatever the length of a row.
    """
    if not (exact := [entry for entry in entries(anatomy) if entry.get("exact")]):
        return {}
    lengths: Counter[int] = Counter()
    for positions in rows.positions:
        begins = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        lengths.update(after - before for before, after in pairwise(begins))
    pairs = {length: count * length * (length + 1) / 2 for length, count in lengths.items()}
    read = [sum(share_read(entry, length) * share for length, share in pairs.items()) for entry in exact]
    share = sum(read) / len(read) / sum(pairs.values())
    return {"keys_read": {"share": share, "layers": len(read), "of": len(anatomy.layers)}}


def sparse_modules(model) -> list:
    """The attention modules that have sparse prefill."""
    from surgery.runtime.modeling_surgery import attention_modules

    return [module for module in attention_modules(model) if any(getattr(module, "surgery_sparse", None) or ())]


@contextmanager
def full_attention(modules: Iterable) -> Iterator[None]:
    """Let these attention modules read all keys, also where a backward pass computes a forward again."""
    before = [(module, module.surgery_sparse) for module in modules]
    try:
        for module, _ in before:
            module.surgery_sparse = None
        yield
    finally:
        for module, sparse in before:
            module.surgery_sparse = sparse


def text_losses(model, plain, batches: Iterable[dict], modules: list) -> dict[str, float]:
    """Cross-entropy of the text in nats a token, under sparse and under full attention.

    Args:
        model: the model as it trains, which an engine may have sharded: every process must call this.
        plain: the Transformers model inside it.
        batches: rows of `Packed`, some at a time.
        modules: `sparse_modules` of the model.
    """
    import torch

    from surgery.data.packing import arguments
    from surgery.healing.losses.base import predicts
    from surgery.healing.losses.ce import cross_entropy
    from surgery.io.loading import eval_mode

    sums, count = {SPARSE: 0.0, FULL: 0.0}, 0
    with torch.no_grad(), eval_mode(model):
        for batch in batches:
            predicted = int(predicts(batch["labels"]).sum())
            count += predicted
            for name, off in ((SPARSE, []), (FULL, modules)):
                with full_attention(off):
                    logits = model(**arguments(type(plain), batch, False)).logits
                sums[name] += cross_entropy(logits, batch["labels"]).item() * predicted
    return {name: value / max(count, 1) for name, value in sums.items()} | {"text_loss_tokens": count}


def record_of(lines: list[dict]) -> dict:
    """What a healing's record keeps of its attention; {} where no layer is sparse.

    Args:
        lines: of metrics.jsonl.
    """
    last = lines[-1] if lines else {}
    if SPARSE not in last:
        return {}
    full = sum(bool(line.get("full_attention")) for line in lines)
    losses = {"sparse": last[SPARSE], "full": last[FULL], "tokens": last["text_loss_tokens"]}
    return {"attention": {"sparse_steps": len(lines) - full, "full_steps": full, "text_loss": losses}}
