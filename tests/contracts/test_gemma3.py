"""A tiny Gemma 3 with one KV head, whose layers have windows of their own but for one."""

import pytest
import torch
from families import COMMON, build, one_thread  # noqa: F401 (a fixture)
from tokenizers_of_bytes import byte_tokenizer

import surgery as package
from surgery.conversion.fit import fitting_recipes

WINDOW, TOKEN = 24, 2 * 16 * 4  # bytes of a token's key and value in one layer: head size 16, float32
SIZES = COMMON | {
    "vocab_size": 300,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 1024,
}
ALONE = {
    "gqa",
    "gqa-distill",
    "gqa-uptrain",
    "mqa",
    "prune-heads",
    "wgqa",
}  # they need two KV heads


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The model as a folder."""
    folder = tmp_path_factory.mktemp("gemma3") / "m"
    build("Gemma3", **SIZES).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stored_bytes(model, length: int) -> int:
    """Bytes that the model's own cache holds after `length` tokens."""
    with torch.no_grad():
        cache = model(torch.arange(length)[None] % 250 + 3, use_cache=True).past_key_values
    return sum(layer.nbytes for layer in cache.layers)


def test_the_cache_grows_in_the_full_layer_alone(gemma):
    anatomy = package.Anatomy.of(gemma)
    assert (anatomy.kv_bytes_per_token, anatomy.kv_bytes_fixed) == (TOKEN, 2 * WINDOW * TOKEN)


@pytest.mark.parametrize(
    ("sinks", "window", "kept"),
    [
        (4, 40, (24, 24, 44)),  # wider than the base's own window, which stays as it is
        (4, 8, (12, 12, 12)),
        (0, 24, (24, 24, 24)),
    ],
)
def test_a_cache_that_stops_growing(gemma, sinks, window, kept):
    """All heads stream: plan, record and the cache itself say what each layer keeps."""
    recipe = {"version": 1, "name": "all", "evaluate": None}
    recipe["operations"] = [{"op": "duo_attention", "streaming_ratio": 1.0, "sinks": sinks, "window": window}]
    after = package.plan(recipe, gemma).after
    assert (after.kv_bytes_per_token, after.kv_bytes_fixed) == (0, sum(kept) * TOKEN)
    model = package.load(gemma)
    report = package.apply(recipe, model)
    assert report.data["plan"]["kv_bytes_fixed"] == {"before": 2 * WINDOW * TOKEN, "after": sum(kept) * TOKEN}
    assert stored_bytes(model, 100) == stored_bytes(model, 200) == sum(kept) * TOKEN


def test_the_cache_of_a_measured_split_is_that_of_the_result(gemma, tmp_path):
    """Which head streams decides how much is saved: the record and the check count the heads that were chosen."""
    settings = {"sinks": 4, "window": 12, "calibration_samples": 2, "calibration_length": 512}
    plan = package.plan("duo-attention", gemma, streaming_ratio=0.34, **settings)
    assert any("depends on the choice of heads" in note for note in plan.notes)
    report = package.apply(
        "duo-attention", gemma, output=tmp_path / "out", streaming_ratio=0.34, evaluate=False, gate=False, **settings
    )
    assert report.passed
    layers = package.Anatomy.of(tmp_path / "out").layers
    assert sum(bool(layer.streaming) for layer in layers) == 1
    growing = [index for index in (2,) if not layers[index].streaming]
    held = [16 if layer.streaming else layer.window or 0 for layer in layers]
    assert report.data["plan"]["kv_bytes_per_token"]["after"] == len(growing) * TOKEN
    assert report.data["plan"]["kv_bytes_fixed"]["after"] == sum(held) * TOKEN


def test_recipes_that_one_kv_head_leaves_nothing_to_do_are_refused_with_the_reason(gemma):
    reasons = fitting_recipes(package.Anatomy.of(gemma))
    assert {name for name in ALONE if reasons[name]} == ALONE
    assert reasons["prune-heads"] == ["per_layer 1: a layer has 1 KV group, which must stay"]
