"""KV eviction at absolute positions: its identity, each rule against a reference in float64, the memory it frees."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from dense import LENGTH, PADS, batch, chunked, difference, given
from evicting import evicting_model
from families import TINY, check_both_ways_to_load, double
from head_split import FAMILIES, entries, operated, random_split
from head_split import base as base  # fixtures
from head_split import bases as bases
from transformers import DynamicCache

from surgery.architecture.anatomy import Anatomy
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_config
from surgery.runtime.surgery_gated_compute import counted
from surgery.runtime.surgery_gates import Gate
from surgery.runtime.surgery_kept_store import KeptStore
from surgery.runtime.surgery_kv_caote import CaotePolicy
from surgery.runtime.surgery_kv_policy import Kept, Votes
from surgery.runtime.surgery_stores import RingStore

SMALL = {"keys": 5, "sinks": 2, "recent": 4, "interval": 8}
MOST = sum(SMALL.values())
RULES: dict[str, dict] = {
    "window": {"name": "window"},
    "norm": {"name": "norm"},
    "random": {"name": "random", "seed": 3},
    "attention": {"name": "attention", "observe": 3},
    "attention, largest": {"name": "attention", "observe": 3, "group": "max"},
    "tova": {"name": "attention", "observe": 1},
    "h2o": {"name": "attention", "observe": 8, "memory": True},
    "caote": {"name": "caote", "observe": 3},
    "caote, behind W": {"name": "caote", "observe": 3, "output": "o"},
    "caote, fast": {"name": "caote", "observe": 3, "fast": True},
    "caote, greedy": {"name": "caote", "observe": 2, "greedy": True},
    "caote, greedy behind W": {"name": "caote", "observe": 3, "greedy": True, "output": "o", "group": "max"},
    "lra": {"name": "lra", "observe": 8, "threshold": 0.08},
    "lfa": {"name": "lfa", "observe": 8, "threshold": 0.08},
    "lfa, sum": {"name": "lfa", "observe": 5, "threshold": 0.2, "group": "sum"},
    "task_kv": {"name": "task_kv", "observe": 3},
    "task_kv, behind W": {"name": "task_kv", "observe": 8, "output": "o", "group": "max", "full_heads": 2},
}
CHUNKS = ([LENGTH], [LENGTH - 3, 1, 1, 1], [20, 1, 24], [8] * 5 + [5], [7] * 6 + [1, 1, 1], [1] * LENGTH)
GENERATED = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
GENERATED |= {"suppress_tokens": [0]}  # an assistant takes a generated 0 for padding

every_rule = pytest.mark.parametrize("rule", list(RULES))
some = pytest.mark.parametrize("base", ["llama", "qwen3", "gemma2", "gpt_oss"], indirect=True)


def settings_of(model, rule: str, **changed) -> dict:
    """The settings of a rule; `output` becomes the name that this model has for its output projection."""
    settings = SMALL | RULES[rule] | changed
    return settings | ({"output": Anatomy.of(model).layers[0].layout.o} if "output" in settings else {})


def under(model, rule: str, *more: dict, **changed):
    """The model with a policy in every layer, and other entries."""
    settings = settings_of(model, rule, **changed)
    model = copy.deepcopy(model).eval()
    rest = more or [{}] * model.config.get_text_config().num_hidden_layers
    runtime.patch(model, {"layers": [{"policy": settings} | entry for entry in rest]})
    return model


def reference_logits(model, rule: str, ids, mask, gammas=None, **changed) -> torch.Tensor:
    """Logits by the reference, row by row."""
    settings = settings_of(model, rule, **changed)
    held = evicting_model(model, [settings] * model.config.get_text_config().num_hidden_layers, gammas)
    rows = []
    for row, real in zip(ids, mask.bool(), strict=True):
        out = held(**given(held, row[real][None], torch.ones_like(row[real])[None]), use_cache=False).logits[0]
        rows.append(torch.cat([out.new_zeros(int((~real).sum()), out.shape[1]), out]))
    return torch.stack(rows)


def stores(cache) -> list:
    return [store for layer in cache.layers for store in layer.stores]


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
@torch.no_grad()
def test_as_many_keys_as_tokens_are_the_base(base):
    """Every rule: cached and not, in chunks of one interval, odd and whole, alone and left-padded."""
    ids, mask = batch(base)
    want = base(**given(base, ids, mask), use_cache=False).logits
    alone = Anatomy.of(base).layers[0].kv_heads == 1
    for rule in (name for name in RULES if not (alone and name.startswith("task_kv"))):  # needs a second head
        model = under(base, rule, keys=LENGTH)
        assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-5
        for chunks in ([20, 1, 24], [8] * 5 + [5]):
            assert difference(chunked(model, ids, mask, chunks), want, mask) <= 1e-5
        first = slice(0, 1), slice(0, None)
        assert difference(chunked(model, ids[first], mask[first], [LENGTH]), want[:1], mask[:1]) <= 1e-5


@some
@every_rule
@torch.no_grad()
def test_each_rule_is_its_formula(base, rule):
    """Padded rows, in one call, in chunks, token by token and without a cache, against the reference in float64."""
    model, (ids, mask) = double(under(base, rule)), batch(base)
    whole = model(**given(model, ids, mask), use_cache=False).logits
    for chunks in CHUNKS:
        assert difference(chunked(model, ids, mask, chunks), whole, mask) <= 1e-9
    if rule != "random":
        want = reference_logits(base, rule, ids, mask)
        assert difference(whole, want, mask) <= 1e-9
    dense = base(**given(base, ids, mask), use_cache=False).logits
    layers = [layer.window for layer in Anatomy.of(base).layers]
    assert difference(whole, dense, mask) > 1e-3 or None not in layers


@every_rule
@torch.no_grad()
def test_where_the_output_projection_is_transposed(rule):
    base = TINY["gpt2"]().eval()
    model, (ids, mask) = double(under(base, rule)), batch(base, (0, 3))
    whole = model(**given(model, ids, mask), use_cache=False).logits
    assert difference(chunked(model, ids, mask, [20, 1, 24]), whole, mask) <= 1e-9
    if rule != "random":
        assert difference(whole, reference_logits(base, rule, ids, mask), mask) <= 1e-9


@every_rule
@torch.no_grad()
def test_one_key_too_few_drops_one_key_of_each_head(rule):
    """The first decision with one key fewer than there are: one key a head goes, the one that the reference drops."""
    base = TINY["llama"]().eval()
    ids, mask = batch(base, (0,), 16)
    fits = {"interval": 16, "recent": 4, "sinks": 2, "keys": 9} | ({"observe": 5} if "observe" in RULES[rule] else {})
    model, holder = double(under(base, rule, **fits)), []
    chunked(model, ids, mask, [16], holder)
    text = base.config
    assert {store.stored for store in stores(holder[0])} == {15}
    gone, fewer, heads = [], [], text.num_hidden_layers * text.num_key_value_heads
    for store in stores(holder[0]):
        left = [set(range(16)) - set(slots.tolist()) for slots in store.tensors["slots"][0, :, :15]]
        fewer += map(len, left)
        if store.archive is not None:
            for head, slots in zip(store.archive.whole[0], store.archive.slots[0], strict=True):
                assert set(slots.tolist()) == left[head]
                left[head] = set()
        gone += left
    assert fewer == [1] * heads
    whole = settings_of(base, rule, **fits).get("full_heads", 1) if rule.startswith("task") else 0
    assert sum(map(len, gone)) == heads - text.num_hidden_layers * whole
    if rule != "random":
        settings = settings_of(base, rule, **fits)
        held = evicting_model(base, [settings] * text.num_hidden_layers)
        more = torch.cat([ids, ids[:, :1]], 1)
        held(**given(held, more, torch.ones_like(more)), use_cache=False)
        want = [set(range(16)) - set(record[16]) for layer in held.held.values() for record in layer]
        assert gone == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output", [False, True])
@torch.no_grad()
def test_a_key_with_nearly_all_of_the_weight_stays(dtype, output):
    """Its loss against float64: where one weight is nearly 1, o - v is a small difference of large numbers."""
    generator = torch.Generator().manual_seed(5)
    size, count, far = 64, 64, torch.arange(64) + 3.0
    for weight in (0.9, 0.99, 0.999, 0.9999, 0.99999):
        values = torch.randn(1, 1, count, size, generator=generator).to(dtype)
        logits = torch.randn(1, 1, 1, 1, count, generator=generator).double()
        logits[..., 7] = -torch.inf
        weights = logits.softmax(-1) * (1 - weight)
        weights[..., 7] = weight
        projection = torch.randn(1, 1, size, 2 * size, generator=generator)
        wide = values.double()[:, :, None]
        left = [(weights * (torch.arange(count) != j)) for j in range(count)]
        without = torch.cat([w / w.sum(-1, keepdim=True) @ wide for w in left], dim=3)
        change = without - weights @ wide
        change = change @ projection.double() if output else change
        want = change.square().sum(-1)[0, 0, 0]
        kept = Kept(0, [0], None, values, values, far.long().expand(1, 1, -1), 1.0, None, {}, lambda w=projection: w)
        narrow = weights.float()
        votes = Votes(narrow, narrow @ values.float()[:, :, None], torch.ones(1, 1, 1, 1).bool(), torch.tensor([[99]]))
        policy = CaotePolicy(keys=4, output="o_proj" if output else "")
        got = policy.vote(votes, kept)[0, 0, 0, 0].double()
        assert got.argmax() == want.argmax() == 7
        assert (got[7] / want[7] - 1).abs() <= 0.05
        others = torch.arange(count) != 7
        assert (got[others] / want[others] - 1).abs().median() <= 0.05


@torch.no_grad()
def test_random_keys_are_spread_and_differ_between_heads():
    base = TINY["llama"]().eval()
    ids, mask = batch(base, (0,), 900)
    kept = {}
    for seed in (0, 1):
        holder = []
        chunked(under(base, "random", keys=200, interval=100, seed=seed), ids, mask, [900], holder)
        held = [store.tensors["slots"][0, :, : store.stored] for store in stores(holder[0])]
        kept[seed] = [set(slots.tolist()) for layer in held for slots in layer]
    assert all(len(each) == 206 for each in kept[0])
    middle = range(2, 896)
    for each in itertools.chain(*kept.values()):
        drawn = sorted(each & set(middle))
        assert 400 < sum(drawn) / len(drawn) < 500  # 449 is the middle; its standard error is 18
    for left, right in itertools.combinations([*kept[0], kept[1][0]], 2):
        assert len(left & right) < 100  # by chance 45 of 200


@some
@pytest.mark.parametrize("rule", ["attention", "caote, behind W", "lra", "random", "task_kv"])
def test_generation(base, rule):
    """A padded batch is its rows; a prompt in chunks, no cache, beams and assisted decoding change nothing."""
    model, (ids, mask) = under(base, rule), batch(base)
    asked = {"input_ids": ids, "attention_mask": mask, **GENERATED}
    want = model.generate(**asked)
    for more in ({"use_cache": False}, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(**asked, **more), want)
    beams = model.generate(**asked, num_beams=3)
    assert torch.equal(model.generate(**asked, num_beams=3, use_cache=False), beams)
    for row, pad in enumerate(PADS):
        alone = {"input_ids": ids[row : row + 1, pad:], "attention_mask": mask[row : row + 1, pad:], **GENERATED}
        assert torch.equal(model.generate(**alone)[0, LENGTH - pad :], want[row, LENGTH:])
        for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(model)}):
            assert torch.equal(model.generate(**alone, **more)[0, LENGTH - pad :], want[row, LENGTH:])


@some
@pytest.mark.parametrize("rule", ["attention", "h2o", "caote", "lfa", "task_kv"])
@torch.no_grad()
def test_recorded_tokens_can_be_taken_back(base, rule):
    """Past decisions and votes too: what follows is as if the tokens had never come."""
    model, (ids, mask) = double(under(base, rule)), batch(base, (0, 3))
    want, holder = model(**given(model, ids, mask), use_cache=False).logits, []
    chunked(model, ids, mask, [20], holder)
    cache, wrong = holder[0], torch.full_like(ids, 5)
    if any(isinstance(store, KeptStore) for store in stores(cache)):
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-5)
    for calls, back in (
        ([12], 12),
        ([1] * 12, 12),
        ([5, 7], 9),
        ([3, 9, 1], 10),
        ([12], 5),
        ([1] * 14, 3),
        ([9, 9], 0),
    ):
        holder = []
        chunked(model, ids, mask, [20], holder)
        cache, end = holder[0], 20 + sum(calls) - back
        cache.activate_past_recording()
        tokens = torch.cat([ids[:, :end], wrong[:, end:]], 1)  # those that are taken back are other ones
        for size in calls:
            begin = cache.get_seq_length()
            known = {runtime.CACHE: cache, "use_cache": True}
            model(**given(model, tokens[:, : begin + size], mask[:, : begin + size], begin), **known)
        cache.crop(-back)
        assert cache.get_seq_length() == end
        for more in (1, 7):  # from here to behind the next decision
            begin = cache.get_seq_length()
            some = ids[:, : begin + more], mask[:, : begin + more]
            got = model(**given(model, *some, begin), **{runtime.CACHE: cache, "use_cache": True}).logits
            assert difference(got, want[:, begin : begin + more], mask[:, begin : begin + more]) <= 1e-9


@torch.no_grad()
def test_the_memory_is_what_the_plan_says():
    """Bytes of the distinct storages, in a padded batch too, while a long prompt comes and tokens are generated."""
    base = TINY["llama"]().eval()
    text, length, pads = base.config, 700, (0, 3, 11)
    for rule in ("attention", "norm", "lra", "caote", "caote, behind W", "caote, greedy"):
        model, holder = under(base, rule, keys=50, recent=10, interval=64), []
        ids, mask = batch(base, pads, length)
        chunked(model, ids, mask, [333, length - 333], holder)
        seen = set()
        for step in range(200):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            ids = torch.cat([ids, torch.full_like(ids[:, :1], 3 + step % 50)], 1)
            model(**given(model, ids, mask, length + step), use_cache=True, **{runtime.CACHE: holder[0]})
            tensors = [tensor for store in stores(holder[0]) for tensor in store.tensors.values()]
            seen.add(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()))
        anatomy = Anatomy.of(model)
        assert seen == {len(pads) * anatomy.kv_bytes_at(length)}
        assert anatomy.kv_bytes_per_token == 0
        assert max(store.stored for store in stores(holder[0])) <= 50 + 10 + 2 + 64
        group = text.num_attention_heads // text.num_key_value_heads
        notes = {"attention": 2, "norm": 0, "lra": 1, "caote": 2, "caote, behind W": 2 + group}
        notes = (notes | {"caote, greedy": 2 * group})[rule]
        pair = 2 * text.head_dim * 4 + 4 + 4 * notes
        assert anatomy.kv_bytes_at(length) == text.num_hidden_layers * text.num_key_value_heads * 126 * pair
        assert holder[0].get_seq_length() == length + 200


@torch.no_grad()
def test_the_heads_that_keep_every_key_are_those_of_the_text():
    """They differ among the rows of a batch, follow the rows, and their keys are what the plan counts, to the byte."""
    base, pads, length = TINY["llama"]().eval(), (0, 64, 0, 64), 448
    model, holder, (ids, mask) = under(base, "task_kv", keys=50, recent=10, interval=64), [], batch(base, pads, length)
    chunked(model, ids, mask, [333, length - 333], holder)
    cache, anatomy, text = holder[0], Anatomy.of(model), base.config
    chosen = torch.stack([store.archive.whole for store in stores(cache)])
    assert (chosen.amax(1) > chosen.amin(1)).any()  # [layers, F]
    per_head = 2 * text.head_dim * 4 + 4
    assert anatomy.kv_bytes_per_token == text.num_hidden_layers * per_head
    assert not any(store.state for store in stores(cache))
    tensors = [tensor for store in stores(cache) for tensor in (*store.tensors.values(), *store.archive[:4])]
    indices = sum(store.archive.whole.nbytes for store in stores(cache))
    held = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
    assert held == len(pads) * anatomy.kv_bytes_at(length) + indices
    assert held == cache.nbytes
    for store in stores(cache):
        for row, (pad, heads) in enumerate(zip(pads, store.archive.whole.tolist(), strict=True)):
            for head, far in zip(heads, store.archive.slots[row], strict=True):
                table = store.tensors["slots"][row, head, : store.stored]
                both = [*far[far >= 0].tolist(), *table[table >= 0].tolist()]
                assert sorted(both) == list(range(pad, length))
    cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
    assert torch.equal(torch.stack([store.archive.whole for store in stores(cache)]), chosen[:, [3, 0, 0, 1]])
    for tokens, held in ((1, 0), (50, 0), (62, 0), (63, 1), (length, length - 62)):  # in the archive: nothing below
        table = text.num_hidden_layers * text.num_key_value_heads * min(tokens, 126) * (per_head + 8)
        assert anatomy.kv_bytes_at(tokens) == table + text.num_hidden_layers * held * per_head


@torch.no_grad()
def test_full_heads_beside_a_split():
    """Streaming heads are neither counted nor chosen; what remains must leave a head that drops keys."""
    base = TINY["llama"]().eval()
    ids, mask = batch(base)
    some = [{"streaming": [0], "sinks": 2, "window": 5}] * base.config.num_hidden_layers
    model, holder = under(base, "task_kv", *some), []
    whole = model(**given(model, ids, mask), use_cache=False).logits
    assert difference(chunked(model, ids, mask, [20, 1, 24], holder), whole, mask) <= 1e-5
    assert {tuple(store.archive.whole.shape) for store in stores(holder[0]) if isinstance(store, KeptStore)} == {
        (4, 1)
    }
    all_but_one = {"streaming": [0, 1, 2], "sinks": 2, "window": 5}
    every = {"streaming": [0, 1, 2, 3], "sinks": 2, "window": 5}
    with pytest.raises(ValueError, match="task_kv needs two KV heads at least"):
        under(base, "task_kv", all_but_one, {})
    under(base, "task_kv", every, {})


@some
@torch.no_grad()
def test_some_heads_keep_every_key_after_the_prompt(base):
    """`when: prompt_end`, which chooses them by the prompt's last queries: each row against the reference."""
    model = double(under(base, "task_kv", interval=None, when="prompt_end"))
    (ids, mask), end = batch(base), 30
    got = chunked(model, ids, mask, [end, 10, 1, 4])
    for row, pad in enumerate(PADS):
        settings = settings_of(base, "task_kv") | {"interval": end - pad}  # one decision, where the prompt ends
        want = evicting_model(base, [settings] * base.config.num_hidden_layers)
        one = ids[row : row + 1, pad : min(LENGTH, end - pad + end)]
        right = want(**given(want, one, torch.ones_like(one))).logits
        assert difference(got[row : row + 1, pad : pad + one.shape[1]], right, torch.ones_like(one)) <= 1e-9


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"full_heads": 0}, "full_heads is 0, and must be whole and from 1"),
        ({"full_heads": 4}, "full_heads is 4 of 4 KV heads, so that none drops a key: at most 3"),
        ({"full_heads": 2, "heads": [0, 3]}, "full_heads is 2 of 2 KV heads"),
        ({"heads": [3]}, "task_kv needs two KV heads at least"),
    ],
)
def test_wrong_numbers_of_full_heads_are_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        under(TINY["llama"](), "task_kv", **changed)


@some
@pytest.mark.parametrize("rule", ["attention", "caote, behind W", "task_kv"])
@torch.no_grad()
def test_on_some_heads_beside_a_split(base, rule):
    """A head split, and a policy on a part of the heads that see all: the policy asks nothing of the others."""
    ids, mask = batch(base)
    settings = settings_of(base, rule) | {"heads": [1] if rule != "task_kv" else [1, 2, 3]}
    want = evicting_model(base, [settings] * base.config.num_hidden_layers)
    model = double(copy.deepcopy(base))
    runtime.patch(model, {"layers": [{"policy": settings}] * base.config.num_hidden_layers})
    for row, pad in enumerate(PADS):
        one = ids[row : row + 1, pad:]
        got = chunked(model, one, torch.ones_like(one), [20, 1, LENGTH - pad - 21])
        assert difference(got, want(**given(want, one, torch.ones_like(one))).logits, torch.ones_like(one)) <= 1e-9
    split = entries(random_split(base, 1))
    both, alone, holder = under(base, rule, *split, keys=LENGTH), operated(base, random_split(base, 1)), []
    assert difference(chunked(both, ids, mask, [20, 25], holder), chunked(alone, ids, mask, [20, 25]), mask) <= 1e-5
    kinds = {(type(store), store.visibility.window is None) for store in stores(holder[0])}
    assert kinds == {(KeptStore, True), (RingStore, False)}


@pytest.mark.parametrize("base", ["llama", "gemma2", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("rule", ["attention", "caote", "task_kv"])
@torch.no_grad()
def test_with_a_weight_on_the_first_token(base, rule):
    """The bias counts before the votes, and the first token is found among the keys that stay."""
    text, (ids, mask) = base.config, batch(base)
    gammas = [torch.linspace(-1, 1.5, text.num_attention_heads) + layer for layer in range(text.num_hidden_layers)]
    shape = {"parameters": {"surgery_log_gamma": [text.num_attention_heads]}}
    model = under(base, rule, *[shape] * text.num_hidden_layers)
    for module, values in zip(runtime.attention_modules(model), gammas, strict=True):
        module.surgery_log_gamma.copy_(values)
    model = double(model)
    whole = model(**given(model, ids, mask), use_cache=False).logits
    assert difference(whole, reference_logits(base, rule, ids, mask, gammas), mask) <= 1e-9
    for chunks in CHUNKS:
        assert difference(chunked(model, ids, mask, chunks), whole, mask) <= 1e-9


@pytest.mark.parametrize("trained", ["", "q_proj", "v_proj", "k_proj", "q_proj v_proj"])
@pytest.mark.parametrize("rule", ["attention", "caote", "window", "task_kv"])
def test_gradients_are_those_of_the_keys_that_stay(rule, trained):
    """Whatever trains (all; some projections, as with low-rank updates), in one call and in two."""
    base, names = TINY["llama"]().eval(), trained.split()
    ids, mask = batch(base, (0,))
    model, late = (double(under(base, rule)) for _ in range(2))
    want = evicting_model(base, [settings_of(base, rule)] * base.config.num_hidden_layers)
    for each in (model, late, want):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(not names or any(part in name for part in names))
    model(**given(model, ids, mask), use_cache=False).logits.square().mean().backward()
    out = late(**given(late, ids[:, :30], mask[:, :30]), use_cache=True)
    rest = late(**given(late, ids, mask, 30), use_cache=True, **{runtime.CACHE: out[runtime.CACHE]}).logits
    torch.cat([out.logits, rest], 1).square().mean().backward()
    want(**given(want, ids, mask), use_cache=False).logits.square().mean().backward()
    for name, parameter in want.named_parameters():
        if parameter.requires_grad and "self_attn" in name:
            assert parameter.grad.abs().max() > 0
            for each in (model, late):
                error = (each.get_parameter(name).grad - parameter.grad).abs().max()
                assert error <= 1e-9 * parameter.grad.abs().max(), name


@torch.no_grad()
def test_heads_that_a_gate_switches_off_are_not_far_from_the_others():
    """task_kv behind a router: the heads that it chooses, and that the work on their keys is counted."""
    base = TINY["llama"]().eval()
    model, (ids, mask), seen = gated(base, "task_kv"), batch(base, (0,)), {}
    for module in runtime.attention_modules(model):
        policy = module.surgery_keepers["policy"].policy
        policy.observe = 1
        seen[module.layer_idx] = []

        def listen(votes, kept, add_votes=policy.add_votes, shown=seen[module.layer_idx]):
            shown.append((int(votes.positions[0, -1]), votes.outputs[0, :, :, -1], votes.voting[0, :, :, -1]))
            add_votes(votes, kept)

        policy.add_votes = listen
    holder = []
    with counted(model) as work:
        whole = chunked(model, ids, mask, [LENGTH], holder)
    alone = gated(base, "attention")
    with counted(alone) as less:
        alone(**given(alone, ids, mask), use_cache=False)
    assert work.done["attention"] > less.done["attention"]  # the archive's keys are read
    silent = 0
    for layer, store in enumerate(stores(holder[0])):
        outputs, voting = next((out, on) for position, out, on in seen[layer] if position == 15)
        voting = voting.expand(outputs.shape[:2])
        silent += int((~voting.any(1)).sum())
        center = outputs[voting].mean(0)
        far = [sum(float((z - center).norm()) for z, on in zip(head, votes, strict=True) if on)
               for head, votes in zip(outputs, voting, strict=True)]  # fmt: skip
        assert store.archive.whole[0].tolist() == [max(range(len(far)), key=far.__getitem__)]
    assert silent
    assert difference(chunked(model, ids, mask, [20, 25]), whole, mask) <= 1e-9


@torch.no_grad()
def test_heads_that_a_gate_switches_off_have_no_vote():
    """With one active head of each group, a reference in which the others' weights are 0."""
    base = TINY["llama"]().eval()
    text, (ids, mask) = base.config, batch(base, (0, 3))
    groups = [text.num_attention_heads // text.num_key_value_heads] * text.num_key_value_heads
    gate = {"kind": "moh", "unit": "head", "shared": [], "active": 1}
    shapes = Gate.of(gate, groups).shapes(text.hidden_size)
    model = under(base, "attention", *[{"gate": gate, "parameters": shapes}] * text.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if "surgery_router" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model, shown = double(model), []
    policy = runtime.attention_modules(model)[0].surgery_keepers["policy"].policy
    add_votes = policy.add_votes

    def listen(votes, kept):
        shown.append((votes, votes.weights.clone()))
        add_votes(votes, kept)

    policy.add_votes = listen
    whole = model(**given(model, ids, mask), use_cache=False).logits
    assert shown
    assert all(bool((weights[~votes.voting] == 0).all()) for votes, weights in shown)
    silent = [float((~votes.voting[:, :, :, votes.positions[0] >= 0]).double().mean()) for votes, _ in shown]
    assert min(silent) > 0.4
    for chunks in ([20, 1, 24], [1] * LENGTH):
        assert difference(chunked(model, ids, mask, chunks), whole, mask) <= 1e-9


def gated(base, rule: str):
    """A model with one active head of each group, chosen by a random router, in float64."""
    text = base.config
    groups = [text.num_attention_heads // text.num_key_value_heads] * text.num_key_value_heads
    gate = {"kind": "moh", "unit": "head", "shared": [], "active": 1}
    shapes = Gate.of(gate, groups).shapes(text.hidden_size)
    model = under(base, rule, *[{"gate": gate, "parameters": shapes}] * text.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if "surgery_router" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return double(model)


@torch.no_grad()
def test_gates_are_those_of_the_tokens_that_vote():
    """Where tokens are taken back, and where a row holds several sequences."""
    base = TINY["llama"]().eval()
    model, (ids, mask), holder = gated(base, "attention"), batch(base, (0,)), []
    want = model(**given(model, ids, mask), use_cache=False).logits
    chunked(model, ids, mask, [20], holder)
    holder[0].activate_past_recording()
    wrong = torch.cat([ids[:, :28], torch.full_like(ids[:, :4], 5)], 1)
    known = {runtime.CACHE: holder[0], "use_cache": True}
    model(**given(model, wrong, mask[:, :32], 20), **known)
    holder[0].crop(-4)
    got = model(**given(model, ids, mask, 28), **known).logits
    assert difference(got, want[:, 28:], mask[:, 28:]) <= 1e-9
    lengths = [13, 32]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    begin = 0
    for length in lengths:
        one = ids[:, begin : begin + length]
        alone = model(input_ids=one, use_cache=False).logits
        assert difference(packed[:, begin : begin + length], alone, torch.ones_like(one)) <= 1e-9
        begin += length


@torch.no_grad()
def test_an_adapter_on_the_output_projection_turns_nothing():
    from peft import LoraConfig, get_peft_model

    base = TINY["llama"]().eval()
    model, (ids, mask) = double(under(base, "caote, behind W")), batch(base, (0, 3))
    want = model(**given(model, ids, mask), use_cache=False).logits
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["o_proj"])).double()
    got = adapted(**given(model, ids, mask), use_cache=False).logits
    assert difference(got, want, mask) <= 1e-9
    quantised = copy.deepcopy(model)
    projection = quantised.model.layers[0].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised or offloaded"):
        quantised(**given(model, ids, mask), use_cache=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_rule
def test_in_half_precision(rule, dtype):
    base = TINY["llama"]().eval().to(dtype)
    ids, mask = batch(base)
    asked = {"input_ids": ids, "attention_mask": mask, **GENERATED}
    whole = under(base, rule, keys=LENGTH + 30).generate(**asked)
    assert torch.equal(whole, base.generate(**asked))
    made = under(base, rule).generate(**asked)
    assert made.shape == whole.shape
    assert not torch.equal(made, whole)


@some
@torch.no_grad()
def test_once_at_the_end_of_the_prompt(base):
    """Later queries see what the prompt's last queries chose, and every later token."""
    model, (ids, mask) = double(under(base, "attention", interval=None, when="prompt_end")), batch(base)
    layers, end = base.config.num_hidden_layers, 30
    assert runtime.depends_on_prompt(model.config)
    got, holder = chunked(model, ids, mask, [end, 10, 1, 4], []), []
    full = base(**given(base, ids, mask), use_cache=False).logits
    assert difference(got[:, :end], full[:, :end], mask[:, :end]) <= 1e-5
    for row, pad in enumerate(PADS):
        settings = settings_of(base, "attention") | {"interval": end - pad}  # one decision, where the prompt ends
        want = evicting_model(base, [settings] * layers)
        one = ids[row : row + 1, pad : min(LENGTH, end - pad + end)]
        right = want(**given(want, one, torch.ones_like(one))).logits
        assert difference(got[row : row + 1, pad : pad + one.shape[1]], right, torch.ones_like(one)) <= 1e-9
    chunked(model, ids, mask, [end, 15], holder)
    kept = {store.stored for store in stores(holder[0]) if isinstance(store, KeptStore)}
    assert kept == {SMALL["keys"] + SMALL["sinks"] + SMALL["recent"] + 15}


@torch.no_grad()
def test_another_cache_is_refused():
    base = TINY["llama"]().eval()
    ids, mask = batch(base, (0,))
    for changed in ({}, {"interval": None, "when": "prompt_end"}):
        model = under(base, "attention", **changed)
        with pytest.raises(ValueError, match="leave the cache out"):
            model(**given(model, ids, mask), **{runtime.CACHE: DynamicCache()})
        for name in ("static", "offloaded_static"):
            with pytest.raises(ValueError, match="would undo the surgery"):
                model.generate(input_ids=ids, cache_implementation=name, max_new_tokens=2)
    with pytest.raises(ValueError, match="paged cache"):
        under(base, "attention").generate_batch(ids)


def test_every_rule_is_saved_and_loaded_both_ways(tmp_path):
    base = TINY["llama"]().eval()
    models = {tmp_path / rule.replace(", ", "-").replace(" ", "-"): under(base, rule) for rule in RULES}
    check_both_ways_to_load(models, tmp_path)
    code = {path.name for path in (tmp_path / "norm").glob("*.py")}
    own = {f"surgery_kv_{name}.py" for name in ("policy", "call", "entry", "archive", "evict", "norm")}
    assert code == set(surgery_config.exported_files([])) | own


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"keys": 0}, "keys is 0, and must be whole and from 1"),
        ({"sinks": -1}, "sinks is -1"),
        ({"recent": 0}, "recent is 0"),
        ({"interval": 0}, "interval is 0"),
        ({"interval": None}, "interval is None"),
        ({"observe": 9}, "observe is 9, more than the interval of 8"),
        ({"observe": 0}, "observe is 0"),
        ({"group": "mean"}, "group is 'mean'; it is sum or max"),
        ({"when": "always"}, "when is 'always'; it is blocks or prompt_end"),
        ({"when": "prompt_end"}, "an interval is for when: blocks"),
        ({"fast": True}, "has no 'fast'"),
    ],
)
def test_wrong_settings_are_refused(changed, says):
    base = TINY["llama"]()
    with pytest.raises(ValueError, match=says):
        under(base, "attention", **changed)
