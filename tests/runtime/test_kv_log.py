"""The policy that counts: numbers worked out by hand, and the base's logits, saved and loaded both ways."""

from __future__ import annotations

import copy

import torch
from dense import PADS, batch, chunked, difference, given
from families import TINY, check_both_ways_to_load

from surgery.runtime import modeling_surgery as runtime
from surgery.runtime.surgery_kv_log import Counts, counts

CHUNKS = [20, 1, 24]


@torch.no_grad()
def test_what_is_counted(tmp_path):
    base = TINY["llama"]().eval()
    model, layers, kv_heads = copy.deepcopy(base), base.config.num_hidden_layers, base.config.num_key_value_heads
    runtime.patch(model, {"layers": [{"policy": {"name": "log"}}] * layers})
    ids, mask = batch(base)
    want = base(**given(base, ids, mask), use_cache=False).logits
    assert difference(chunked(model, ids, mask, CHUNKS), want, mask) <= 1e-5
    real = [sum(CHUNKS) - pad for pad in PADS]
    each = Counts(sum(real), sum(n * (n + 1) // 2 for n in real), max(real))
    assert counts(model) == {layer: dict.fromkeys(range(kv_heads), each) for layer in range(layers)}
    check_both_ways_to_load({tmp_path / "out": model}, tmp_path)
    assert (tmp_path / "out" / "surgery_kv_log.py").is_file()
