"""Policies of the cache: what changes nothing, what a policy drops against a dense mask, and the memory it frees."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from dense import LENGTH, PADS, batch, chunked, dense_logits, difference, given
from families import TINY, check_both_ways_to_load
from head_split import FAMILIES, entries, operated, random_split
from head_split import base as base  # fixtures
from head_split import bases as bases

from surgery.architecture.anatomy import Anatomy
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_config, surgery_kv_policy
from surgery.runtime.surgery_gated_compute import Work
from surgery.runtime.surgery_gates import Gate
from surgery.runtime.surgery_kept_store import KeptStore
from surgery.runtime.surgery_kv_policy import Kept, Policy
from surgery.runtime.surgery_stores import FullStore, RingStore
from surgery.runtime.surgery_visibility import Visibility

GENERATED = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@dataclass
class AllByIndex(Policy):
    """Drops nothing, and says so by indices: from then on every key is found by its slot."""

    def survivors(self, kept: Kept) -> torch.Tensor:
        return torch.arange(kept.keys.shape[2]).flip(0).expand(kept.positions.shape)  # their order says nothing


@dataclass
class Real(Policy):
    """Drops the padding, which no query sees: rows of a batch keep different numbers of keys."""

    def survivors(self, kept: Kept) -> torch.Tensor:
        return kept.positions >= 0


@dataclass
class Thirds(Policy):
    """Of KV head h the first token, every third one from h on, and the last `recent` stay."""

    recent: int = 4

    def stays(self, positions: torch.Tensor, newest: torch.Tensor, head: int) -> torch.Tensor:
        near = positions > newest - self.recent
        return (positions == 0) | ((positions + head) % 3 == 0) | near if head % 2 else (positions == 0) | near

    def survivors(self, kept: Kept) -> torch.Tensor:
        newest = kept.positions.amax(-1)
        rows = [
            self.stays(kept.positions[:, i], newest[:, i, None], head) & (kept.positions[:, i] >= 0)
            for i, head in enumerate(kept.kv_heads)
        ]
        return torch.stack(rows, 1)


@dataclass
class Heavy(Policy):
    """The `count` keys that all queries so far gave most weight to; and notes that say whose they are."""

    count: int

    def survivors(self, kept: Kept) -> torch.Tensor:
        marks = kept.notes.get("mark", torch.zeros_like(kept.keys[..., :2]))
        old = marks[..., 0] > 0
        assert torch.equal(marks[..., 1].long()[old], kept.positions[old]), "a note lost its key"
        kept.notes["mark"] = torch.stack([kept.positions.ge(0).float(), kept.positions.float()], -1)
        batch, kv_heads, length, size = kept.keys.shape
        queries = kept.queries.reshape(batch, kv_heads, -1, size)
        late = kept.positions[:, :, None] < 0
        weight = (queries @ kept.keys.mT * kept.scale).masked_fill(late, -1e9).softmax(-1).sum(2)
        kept.notes["weight"] = kept.notes.get("weight", 0) + weight
        LOG.append(int(old.sum()))
        return kept.notes["weight"].masked_fill(kept.positions < 0, -1).topk(min(self.count, length)).indices


LOG: list = []


@dataclass
class Largest(Policy):
    """The `count` keys of each KV head with the largest sum of scores stay, by what this call's queries say."""

    count: int

    def survivors(self, kept: Kept) -> torch.Tensor:
        batch, kv_heads, length, size = kept.keys.shape
        queries = kept.queries.reshape(batch, kv_heads, -1, size)
        weight = (queries @ kept.keys.mT * kept.scale).sum(2).masked_fill(kept.positions < 0, -torch.inf)
        index = weight.topk(min(self.count, length), dim=-1).indices
        LOG.append((kept.layer, kept.kv_heads, kept.positions.gather(2, index), kept.positions))
        return index

    def problem(self) -> str:
        return "" if self.count > 0 else "count must be from 1"


@pytest.fixture(autouse=True)
def named(monkeypatch):
    LOG.clear()
    for name, policy in (
        ("indices", AllByIndex),
        ("real", Real),
        ("thirds", Thirds),
        ("largest", Largest),
        ("heavy", Heavy),
    ):
        monkeypatch.setitem(surgery_kv_policy.POLICIES, name, policy)


every_family = pytest.mark.parametrize("base", FAMILIES, indirect=True)
some = pytest.mark.parametrize("base", ["llama", "qwen3", "gemma2", "gpt_oss"], indirect=True)
harmless = pytest.mark.parametrize("policy", ["identity", "indices", "real"])


def under(model, policy: str, *more: dict, **settings):
    """The model with a policy in every layer, and other entries."""
    model = copy.deepcopy(model).eval()
    layers = model.config.get_text_config().num_hidden_layers
    rest = more or [{}] * layers
    runtime.patch(model, {"layers": [{"policy": {"name": policy} | settings} | entry for entry in rest]})
    return model


def stores(cache) -> list:
    return [store for layer in cache.layers for store in layer.stores]


@every_family
@harmless
@torch.no_grad()
def test_identity(base, policy):
    """What drops nothing that is seen gives the base's logits: cached and not, in chunks, alone and left-padded."""
    ids, mask = batch(base)
    model = under(base, policy)
    for rows in (slice(0, 1), slice(None)):
        part = (ids[rows], mask[rows])
        want = base(**given(base, *part), use_cache=False).logits
        assert difference(model(**given(model, *part), use_cache=False).logits, want, part[1]) <= 1e-5
        for chunks in ([20, 1, 24], [7] * 6 + [1, 1, 1]):
            assert difference(chunked(model, *part, chunks), want, part[1]) <= 1e-5


def test_a_setting_by_head_follows_the_heads(monkeypatch):
    @dataclass
    class Budgets(Policy):
        budgets: list

        def after_heads_change(self, queries, kv_heads):
            return {"budgets": [self.budgets[head] for head in kv_heads]}

    monkeypatch.setitem(surgery_kv_policy.POLICIES, "budgets", Budgets)
    entry = {"policy": {"name": "budgets", "budgets": [5, 6, 7, 8]}}
    changed = surgery_config.after_heads_change(entry, [0, 1, 4, 5], [0, 2])
    assert changed == {"policy": {"name": "budgets", "budgets": [5, 7]}}
    same = {"policy": {"name": "identity"}}
    assert surgery_config.after_heads_change(same, [0], [0]) == same


@torch.no_grad()
def test_work_counts_the_keys_that_stay():
    store, work = KeptStore(Visibility(keeper="policy")), Work()
    keys = torch.randn(1, 2, 9, 8)
    store.add(keys, keys)
    stays = torch.zeros(1, 2, 9, dtype=torch.bool)
    stays[0, 0, [0, 3, 8]] = stays[0, 1, [1]] = True
    store.select(stays)
    view = store.add(keys[:, :, :2], keys[:, :, :2])
    work.add_seen(view, torch.randn(1, 6, 2, 8))  # 3 query heads read each KV head; tokens 9 and 10
    assert work.done["attention"] == 2 * 8 * 3 * ((3 + 1) + (3 + 2) + (1 + 1) + (1 + 2))
    assert work.dense["attention"] == 2 * 8 * 6 * (10 + 11)


@torch.no_grad()
def test_notes_stay_in_their_buffer():
    """A note that is made anew at each step is copied into the memory that it has, and frees none of another name."""
    store = KeptStore(Visibility(keeper="policy"))
    keys = torch.randn(2, 3, 40, 8)
    store.add(keys, keys)
    store.note({"weight": torch.arange(240.0).reshape(2, 3, 40)})
    store.add(keys[:, :, :1], keys[:, :, :1])
    memory = store.tensors["weight"].data_ptr()
    for step in range(60):
        store.add(keys[:, :, :1], keys[:, :, :1])
        assert torch.equal(store.notes["weight"][:, :, -1], torch.zeros(2, 3)), "0 for a key that is new"
        store.note({"weight": store.notes["weight"] + step})
        store.note(store.notes)
        assert store.tensors["weight"].data_ptr() == memory
    wanted = torch.arange(240.0).reshape(2, 3, 40) + sum(range(60))
    assert torch.equal(store.notes["weight"][:, :, :40], wanted)
    store.note({"other": torch.rand(2, 3, 101)})
    notes = store.notes
    weight, other = notes["weight"].clone(), notes["other"].clone()
    store.note({"weight": notes["other"], "other": notes["weight"]})
    assert torch.equal(store.notes["weight"], other), "two notes may be exchanged"
    assert torch.equal(store.notes["other"], weight)
    store.note({"weight": store.notes["weight"][:, :1].expand(-1, 3, -1)})  # the same address, other strides
    assert torch.equal(store.notes["weight"], other[:, :1].expand(-1, 3, -1))
    store.note({"weight": torch.ones(2, 3, 101, 2)})  # of another shape
    assert store.notes["weight"].shape == (2, 3, 101, 2)
    for name in ("keys", "values", "slots"):
        with pytest.raises(ValueError, match=f"may not be called '{name}'"):
            store.note({name: torch.zeros(2, 3, 101)})


@some
@harmless
def test_generation(base, policy):
    """Greedy in a padded batch, in chunks of the prompt, and with beams: the base's tokens."""
    model, (ids, mask) = under(base, policy), batch(base)
    asked = {"input_ids": ids, "attention_mask": mask, **GENERATED}
    want = base.generate(**asked)
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(**asked, **more), want)
    assert torch.equal(model.generate(**asked, num_beams=3), base.generate(**asked, num_beams=3))
    one = {"input_ids": ids[:1], "attention_mask": mask[:1], **GENERATED}
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(model)}):
        if policy == "identity":
            assert torch.equal(model.generate(**one, **more), want[:1])
    assert model.generate(**one, return_dict_in_generate=True).past_key_values.get_seq_length() == LENGTH + 15


def test_identity_is_saved_and_loaded_both_ways(bases, tmp_path):
    models = {}
    for name in ("llama", "qwen3", "gemma2", "gpt_oss", "gpt2"):
        base = TINY[name]().eval()
        models[tmp_path / name] = under(base, "identity")
        split = operated(base, random_split(base, 1))
        models[tmp_path / f"{name}-split"] = under(split, "identity")
    check_both_ways_to_load(models, tmp_path)
    code = {path.name for path in (tmp_path / "llama").glob("*.py")}
    core = set(surgery_config.exported_files([]))
    assert code == core | {f"surgery_kv_{name}.py" for name in ("policy", "call", "entry", "archive")}


def held_by_thirds(mask, chunks, kv_heads: int) -> torch.Tensor:
    """Which keys the cache still has for each query under `Thirds`: bool [rows, KV heads, N, N], call by call."""
    rows, length = mask.shape
    held = torch.zeros(rows, kv_heads, length, length, dtype=torch.bool)
    for row in range(rows):
        positions = torch.arange(length) - int(mask[row].int().argmax())
        for head in range(kv_heads):
            alive, begin = torch.zeros(length, dtype=torch.bool), 0
            for size in chunks:
                end = begin + size
                alive[begin:end] = True
                held[row, head, begin:end] = alive
                newest = positions[end - 1] if positions[end - 1] >= 0 else torch.tensor(-1)
                alive &= Thirds().stays(positions, newest, head) & (positions >= 0)
                begin = end
    return held


CHUNKS = ([LENGTH - 3, 1, 1, 1], [20, 1, 24], [7] * 6 + [1, 1, 1], [1] * LENGTH)


@every_family
@torch.no_grad()
def test_what_is_dropped_is_seen_by_no_later_query(base):
    """Logits of a policy that keeps other tokens, and other numbers of them, in each KV head: the dense model's."""
    ids, mask = batch(base)
    text = base.config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    model, full = under(base, "thirds"), base(**given(base, ids, mask), use_cache=False).logits
    for chunks in CHUNKS:
        held = held_by_thirds(mask, chunks, kv_heads)
        layers = [{"held": held} if window is None else {} for window in runtime_windows(base)]
        want = dense_logits(base, layers, ids, mask)
        assert difference(chunked(model, ids, mask, chunks), want, mask) <= 1e-4
    assert any(window is None for window in runtime_windows(base)) == (difference(full, want, mask) > 1e-3)


def runtime_windows(model) -> list:
    return [layer.window for layer in Anatomy.of(model).layers]


@some
@torch.no_grad()
def test_on_the_full_heads_of_a_split(base):
    ids, mask = batch(base)
    split = random_split(base, 1)
    model, chunks = under(base, "thirds", *entries(split)), [20, 1, 24]
    held = held_by_thirds(mask, chunks, base.config.num_key_value_heads)
    layers = [
        entry | ({"held": held} if window is None else {})
        for entry, window in zip(entries(split), runtime_windows(base), strict=True)
    ]
    want, holder = dense_logits(base, layers, ids, mask), []
    assert difference(chunked(model, ids, mask, chunks, holder), want, mask) <= 1e-4
    kinds = {(type(store), store.visibility.window is None) for store in stores(holder[0])}
    assert kinds == {(KeptStore, True), (RingStore, False)}


@some
@torch.no_grad()
def test_by_scores_and_what_the_policy_is_shown(base):
    """A policy that chooses by the queries: its own record of what stayed, held against a dense mask."""
    ids, mask = batch(base)
    model, chunks, holder = under(base, "largest", count=9), [30, 1, 13, 1], []
    got = chunked(model, ids, mask, chunks, holder)
    pads, layers = mask.int().argmax(1), []
    for number, window in enumerate(runtime_windows(base)):
        calls = [entry for entry in LOG if entry[0] == number]
        held = torch.zeros(len(ids), base.config.num_key_value_heads, LENGTH, LENGTH, dtype=torch.bool)
        alive, begin = torch.zeros_like(held[:, :, 0]), 0
        for size, (_, heads, stayed, shown) in zip(chunks, calls, strict=window is None):
            end = begin + size
            alive[:, :, begin:end] = True
            held[:, :, begin:end] = alive[:, :, None]
            assert heads == list(range(base.config.num_key_value_heads))
            for row, pad in enumerate(pads.tolist()):  # shown is what is held: the survivors, and the call's own
                real = (torch.arange(LENGTH) >= pad) & alive[row]
                places = [sorted((where.nonzero().flatten() - pad).tolist()) for where in real]
                assert [sorted(p for p in one.tolist() if p >= 0) for one in shown[row]] == places
            alive = torch.zeros_like(alive)
            for row, pad in enumerate(pads.tolist()):
                for head in range(alive.shape[1]):
                    kept = stayed[row, head]
                    alive[row, head, kept[kept >= 0] + pad] = True
            begin = end
        layers.append({"held": held} if window is None else {})
    want = dense_logits(base, layers, ids, mask)
    assert difference(got, want, mask) <= 1e-4
    assert {store.stored for store in stores(holder[0]) if isinstance(store, KeptStore)} == {9}


@some
def test_generation_of_a_batch_is_that_of_its_rows(base):
    model, (ids, mask) = under(base, "thirds"), batch(base)
    made = model.generate(input_ids=ids, attention_mask=mask, **GENERATED)
    for row, pad in enumerate(PADS):
        alone = model.generate(
            input_ids=ids[row : row + 1, pad:], attention_mask=mask[row : row + 1, pad:], **GENERATED
        )
        assert torch.equal(alone[0, LENGTH - pad :], made[row, LENGTH:])


@torch.no_grad()
def test_rows_are_moved_repeated_and_chosen():
    """Beam search moves rows: what is moved gives what was computed in that order."""
    base = TINY["llama"]().eval()
    model, (ids, mask) = under(base, "thirds"), batch(base)
    order = torch.tensor([2, 1, 1, 3, 0, 0])
    more = torch.randint(3, 60, (len(order), 5), generator=torch.Generator().manual_seed(3))
    want = chunked(model, torch.cat([ids[order], more], 1), torch.cat([mask[order], more * 0 + 1], 1), [LENGTH, 5])
    for change in ("reorder_cache", "batch_select_indices"):
        holder = []
        chunked(model, ids, mask, [LENGTH], holder)
        getattr(holder[0], change)(order)
        assert difference(_further(model, ids[order], mask[order], more, holder[0]), want[:, LENGTH:], more) <= 1e-5
    holder, twice = [], torch.arange(len(ids)).repeat_interleave(2)
    chunked(model, ids, mask, [LENGTH], holder)
    holder[0].batch_repeat_interleave(2)
    more = more[:1].expand(len(twice), -1)
    want = chunked(model, torch.cat([ids[twice], more], 1), torch.cat([mask[twice], more * 0 + 1], 1), [LENGTH, 5])
    assert difference(_further(model, ids[twice], mask[twice], more, holder[0]), want[:, LENGTH:], more) <= 1e-5


def _further(model, ids, mask, more, cache) -> torch.Tensor:
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    return model(**given(model, ids, mask, LENGTH), use_cache=True, **{runtime.CACHE: cache}).logits


@torch.no_grad()
def test_notes_go_where_their_keys_go():
    """Dropped, appended, and moved with their rows: `Heavy` checks its own notes at every call."""
    base = TINY["llama"]().eval()
    model, (ids, mask), holder = under(base, "heavy", count=12), batch(base), []
    chunked(model, ids, mask, [20, 1, 20, 4], holder)
    assert LOG[-1] >= 12 * len(ids) * base.config.num_key_value_heads // 2
    order = torch.tensor([3, 1, 1, 0])
    holder[0].reorder_cache(order)
    more = torch.full((4, 3), 5)
    _further(model, ids[order], mask[order], more, holder[0])
    store = stores(holder[0])[0]
    assert {name: tuple(noted.shape[2:]) for name, noted in store.notes.items()} == {"mark": (12, 2), "weight": (12,)}
    with pytest.raises(ValueError, match="a policy's note 'mark' is"):
        store.note({"mark": torch.zeros(1, 2, 3)})


@torch.no_grad()
def test_memory_is_freed():
    """After a long prompt the stores hold what stayed, byte for byte, and grow by no more while tokens come and go."""
    base = TINY["llama"]().eval()
    text, count, length = base.config, 16, 700
    caches = {}
    for policy, settings in (("identity", {}), ("largest", {"count": count})):
        model, holder = under(base, policy, **settings), []
        ids, mask = batch(base, (0, 11), length)
        chunked(model, ids, mask, [length], holder)
        caches[policy] = holder[0]
    pair = text.num_key_value_heads * text.head_dim * 4 * 2
    assert caches["identity"].nbytes == text.num_hidden_layers * 2 * length * pair
    slots = text.num_key_value_heads * 4
    assert caches["largest"].nbytes == text.num_hidden_layers * 2 * count * (pair + slots)
    room = None
    for step in range(40):
        one, mask = torch.full((2, 1), 3 + step), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        ids = torch.cat([ids, one], 1)
        model(**given(model, ids, mask, length + step), use_cache=True, **{runtime.CACHE: caches["largest"]})
        assert {store.stored for store in stores(caches["largest"])} == {count}
        room = room or caches["largest"].nbytes
        assert caches["largest"].nbytes == room
    assert caches["largest"].get_seq_length() == length + 40
    assert room < caches["identity"].nbytes / 2


@torch.no_grad()
def test_only_what_came_since_can_be_taken_back():
    base = TINY["llama"]().eval()
    model, (ids, mask), holder = under(base, "thirds"), batch(base, (0, 3)), []
    chunked(model, ids, mask, [20, 10], holder)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        holder[0].crop(-1)
    holder[0].activate_past_recording()  # now nothing is dropped
    before = [store.stored for store in stores(holder[0])]
    want = model(**given(model, ids[:, :36], mask[:, :36], 30), use_cache=True, **{runtime.CACHE: holder[0]}).logits
    assert [store.stored for store in stores(holder[0])] == [held + 6 for held in before]
    holder[0].crop(-6)
    assert [store.stored for store in stores(holder[0])] == before
    got = model(**given(model, ids[:, :36], mask[:, :36], 30), use_cache=True, **{runtime.CACHE: holder[0]}).logits
    assert torch.equal(got, want)


def test_gradients_keep_all():
    """Where gradients flow through the keys nothing is dropped, and they flow on into the next call."""
    base = TINY["llama"]().eval()
    model, (ids, mask) = under(base, "thirds"), batch(base, (0, 3))
    out = model(**given(model, ids[:, :30], mask[:, :30]), use_cache=True)
    late = model(**given(model, ids, mask, 30), use_cache=True, **{runtime.CACHE: out[runtime.CACHE]}).logits
    assert {store.stored for store in stores(out[runtime.CACHE])} == {LENGTH}
    whole = base(**given(base, ids, mask), use_cache=False).logits
    assert difference(late.detach(), whole.detach()[:, 30:], mask[:, 30:]) <= 1e-5
    name = "model.layers.0.self_attn.k_proj.weight"
    for logits in (late, whole[:, 30:]):
        logits.square().mean().backward()
    got, want = model.get_parameter(name).grad, base.get_parameter(name).grad
    assert want.abs().max() > 0
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@torch.no_grad()
def test_with_a_gate_the_policy_sees_every_query():
    base = TINY["llama"]().eval()
    groups = [base.config.num_attention_heads // base.config.num_key_value_heads] * base.config.num_key_value_heads
    gate = {"kind": "moh", "unit": "head", "shared": [], "active": 1}
    shapes = Gate.of(gate, groups).shapes(base.config.hidden_size)
    entry = {"gate": gate, "parameters": shapes}
    alone, both = copy.deepcopy(base), under(base, "largest", *[entry] * base.config.num_hidden_layers, count=999)
    runtime.patch(alone, {"layers": [entry] * base.config.num_hidden_layers})
    for name, parameter in both.named_parameters():
        if "surgery_router" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
            alone.get_parameter(name).copy_(parameter)
    ids, mask = batch(base, (0,))
    got, want = (chunked(model, ids, mask, [20, 1, 24]) for model in (both, alone))
    assert difference(got, want, mask) <= 1e-5


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"policy": {"name": "no"}}, "names no policy; there is: attention, caote, heavy, identity, indices"),
        ({"policy": "identity"}, "names no policy"),
        ({"policy": {"name": "identity", "count": 3}}, "policy 'identity' has no 'count'; it has: no settings"),
        ({"policy": {"name": "largest"}}, "count"),
        ({"policy": {"name": "largest", "count": 0}}, "count must be from 1"),
        ({"policy": {"name": "identity"}, "sparse": {"method": "pooled", "block": 16}}, "and sparse, which needs all"),
        ({"policy": {"name": "real"}, "parameters": {"surgery_log_gamma": [4]}}, "bias, which needs the first token"),
        ({"policy": {"name": "identity", "heads": [0, 9]}}, "must list KV heads from 0 to"),
        ({"policy": {"name": "identity", "heads": [0, 0]}}, "each once, not"),
    ],
)
def test_what_cannot_be_is_refused(entry, says):
    base = TINY["llama"]()
    if "parameters" in entry:
        entry["parameters"]["surgery_log_gamma"] = [base.config.num_attention_heads]
    with pytest.raises(ValueError, match=says):
        runtime.patch(base, {"layers": [entry] * base.config.num_hidden_layers})
    assert not hasattr(base.config, "surgery")


@torch.no_grad()
def test_an_answer_that_the_store_cannot_take_is_refused(monkeypatch):
    class Wrong(Policy):
        def survivors(self, kept: Kept) -> torch.Tensor:
            return kept.positions[:, 0] >= 0

    monkeypatch.setitem(surgery_kv_policy.POLICIES, "wrong", dataclass(Wrong))
    base = TINY["llama"]().eval()
    model, (ids, mask) = under(base, "wrong"), batch(base)
    with pytest.raises(ValueError, match=r"a policy gave torch.bool \[4, 45\]; it is bool \[4, \d, 45\]"):
        model(**given(model, ids, mask), use_cache=True)


@torch.no_grad()
def test_a_policy_that_is_used_no_longer_is_asked_no_more():
    base = TINY["llama"]().eval()
    model, (ids, mask), holder = under(base, "thirds"), batch(base), []
    model.config.surgery = model.config.surgery | {"layers": [{}] * base.config.num_hidden_layers}
    runtime.attach(model)
    chunked(model, ids, mask, [20, 25], holder)
    assert {type(store) for store in stores(holder[0])} == {FullStore}


def test_the_anatomy_knows_it():
    base = TINY["llama"]()
    anatomy = Anatomy.of(under(base, "identity"))
    assert anatomy.terms == {"visibility of the cache": set(range(base.config.num_hidden_layers))}
    assert anatomy.descriptions == {"policy of the cache": ["identity"] * base.config.num_hidden_layers}
    assert (anatomy.kv_bytes_per_token, anatomy.kv_bytes_fixed) == (Anatomy.of(base).kv_bytes_per_token, 0)
