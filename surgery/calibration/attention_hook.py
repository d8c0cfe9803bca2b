"""A hook on every attention call of a model during a measurement. Afterwards the model is restored."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from surgery.architecture.anatomy import Anatomy
from surgery.calibration.head_scores import UNEQUAL, unsupported
from surgery.data.passkeys import Recall
from surgery.errors import UnsupportedModelError
from surgery.runtime.modeling_surgery import attention_modules
from surgery.runtime.surgery_attention import surgery_attention
from surgery.runtime.surgery_config import query_groups
from surgery.runtime.surgery_visibility import base_windows, kinds_of_heads, surgery_mask

NAME = "surgery_watch"


@dataclass
class AttentionHook:
    """A model whose attention calls go to the function that `hook_attention` was given.

    Attributes:
        anatomy: the model's anatomy.
        modules: the attention modules, one for each layer.
        groups: for each layer, how many query heads read each KV head.
        windows: for each layer, the base's own sliding window, or None.
    """

    anatomy: Anatomy
    modules: list
    groups: list[list[int]]
    windows: list[int | None]

    @property
    def kv_heads(self) -> list[int]:
        """Number of KV heads of each layer."""
        return [layer.kv_heads for layer in self.anatomy.layers]

    def set_streaming(self, layer: int, streaming: Sequence[int] = (), sinks: int = 0, window: int = 1) -> None:
        """Let these KV heads of a layer see sinks + window (in tokens), and let its other heads see all."""
        kinds = kinds_of_heads(self.groups[layer], streaming, sinks, window, self.windows[layer])
        self.modules[layer].surgery_heads = kinds

    def streamed(self, module, query, key, value, mask, *, sinks: int, window: int, **kwargs) -> torch.Tensor:
        """The output of a call if all KV heads of its layer streamed, [batch, n, heads, head_dim]; all are full again.

        Args: those of the hooked function, and sinks + window, in tokens.
        """
        layer = module.layer_idx
        self.set_streaming(layer, range(self.kv_heads[layer]), sinks, window)
        output, _ = surgery_attention(module, query, key, value, mask, **kwargs)
        self.set_streaming(layer)
        return output

    def largest_of_groups(self, totals: list[torch.Tensor]) -> list[list[float]]:
        """The largest number in each KV head's group, [layers][KV heads]; `totals` has [query heads] a layer."""
        pairs = zip(totals, self.kv_heads, strict=True)
        return [total.view(heads, -1).amax(-1).tolist() for total, heads in pairs]

    def table(self, totals: list[torch.Tensor], per: str) -> list[list[float]]:
        """The numbers [query heads] of each layer as a table: [layers][query heads] if `per` is "heads", otherwise
        that of `largest_of_groups`.
        """
        return [total.tolist() for total in totals] if per == "heads" else self.largest_of_groups(totals)

    def weights(self, module, query, key, rows, scaling=None, softcap=None, s_aux=None, **_) -> torch.Tensor:
        """`attention_weights` for a call that the hooked function received, with the call's keyword arguments."""
        limit = self.windows[module.layer_idx]
        rows = rows.to(query.device)
        return attention_weights(query, key, rows, scale=scaling, limit=limit, softcap=softcap, s_aux=s_aux)


@contextmanager
def hook_attention(model, attention: Callable = surgery_attention, split: bool = False) -> Iterator[AttentionHook]:
    """Put the model in eval mode, freeze its weights and run every attention call with `attention`.

    Args:
        attention: takes and returns the same as `surgery_attention`, the default, which reads `module.surgery_heads`.
            All heads are full until `AttentionHook.set_streaming` changes that.
        split: also accept a model whose heads are already split; it is measured with all heads full.

    Sparse prefill is off, and gates skip no work, so that the full attention is measured.

    Afterwards the model is restored: weights, modes, requires_grad, gradients, attention implementation, attributes.

    Raises:
        SurgeryError: the heads of this model cannot be measured in this way.
    """
    anatomy = Anatomy.of(model)
    modules = attention_modules(model)
    reason = unsupported(anatomy)
    if not split and any(layer.streaming for layer in anatomy.layers):
        reason = "the heads of this model are split already: measure its base"
    if any(layer.query_groups for layer in anatomy.layers):
        reason = UNEQUAL
    if not reason and not all(hasattr(sys.modules[type(m).__module__], "ALL_ATTENTION_FUNCTIONS") for m in modules):
        reason = f"{anatomy.model_type} does not use the attention interface in this version of Transformers"
    if reason:
        raise UnsupportedModelError(reason, where=type(model).__name__)
    block = getattr(model.config, "surgery", None)  # holds the head groups of layers with different shapes
    groups = [query_groups(model.config, layer) for layer in (block["layers"] if block else [None] * len(modules))]
    hook = AttentionHook(anatomy, modules, groups, base_windows(model.config))
    implementation, names = model.config._attn_implementation, ("surgery_heads", "surgery_sparse")
    own_attributes = [{name: vars(module)[name] for name in names if name in vars(module)} for module in modules]
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One function serves all models and measurements: the registry is global and would keep a closure's objects alive.
    AttentionInterface.register(NAME, _dispatch)
    AttentionMaskInterface.register(NAME, surgery_mask)
    try:
        for layer, module in enumerate(modules):
            module.surgery_watch = attention
            module.surgery_sparse, module.surgery_whole = None, True
            hook.set_streaming(layer)
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.eval().config._attn_implementation = NAME  # the setter of a surgical model would refuse it
        yield hook
    finally:
        model.config._attn_implementation = implementation
        for module, training in modes:
            module.training = training
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, attributes in zip(modules, own_attributes, strict=True):
            for attribute in ("surgery_watch", "surgery_whole", *names):
                module.__dict__.pop(attribute, None)
            vars(module).update(attributes)


def _dispatch(module, query, key, value, mask, **kwargs):
    return module.surgery_watch(module, query, key, value, mask, **kwargs)


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    *,
    scale: float | None = None,
    limit: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention weights of some rows of a sequence, with all heads full.

    Args:
        query: [batch, heads, n, head_dim], after norms and RoPE.
        key: [batch, KV heads, n, head_dim].
        rows: positions of the queries, long [r].
        scale: factor on q.k, default head_dim ** -0.5.
        limit: the base's own sliding window.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        s_aux: [heads], the logit of a learned sink, which takes weight from the keys (gpt_oss).

    Returns:
        [batch, heads, r, n], float32 or wider; a row sums to 1 minus the learned sink's share.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).to(wide)
    scores = query[:, :, rows].to(wide) @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = rows[:, None] - torch.arange(query.shape[2], device=query.device)
    scores = scores.masked_fill((distance < 0) | (distance >= (limit or query.shape[2])), float("-inf"))
    if s_aux is None:
        return scores.softmax(-1)
    sink = s_aux.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


def answer_logits(model, sequence: Recall) -> torch.Tensor:
    """Logits of the next token on the rows of a sequence's answers: [r, vocabulary], float32 or wider."""
    return row_logits(model, sequence.ids, sequence.rows)


def row_logits(model, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logits of the next token on some rows of a sequence, ids [n]: [r, vocabulary], float32 or wider.

    Only these rows go through the model's output layer, which is expensive.
    """
    inputs = {"input_ids": ids[None].to(model.device), "logits_to_keep": rows.to(model.device)}
    logits = model(**inputs, use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
