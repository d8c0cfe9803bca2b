"""Operations on one another: heads pruned under a head split and sink terms, masks, two operations of one term."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from dense import KINDS, batch, chunked, dense_logits, dense_model, difference, given, random_terms
from families import TINY, VOCAB, load_without_package, logits_of, one_thread  # noqa: F401 (one_thread: a fixture)
from safetensors import safe_open

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.operations.prune_heads.importance import importance
from surgery.operations.prune_heads.refit import refit
from surgery.runtime import modeling_surgery as runtime

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss")
# Of 8 query heads on 2 KV heads (after gqa): groups of 3 and 4, of 4 and none.
REMOVED = [[1], [4, 5, 6, 7]]
STREAMING = [[1], [0, 1]]
SEQUENCES = torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))


def recipe(*steps: dict) -> dict:
    return {"version": 1, "name": "test", "operations": list(steps), "evaluate": None}


def prune(removed=REMOVED, **fields) -> dict:
    return {"op": "prune_heads", "granularity": "head", "heads": removed, "refit": False} | fields


def gamma(value: float, **fields) -> dict:
    return {"op": "sink_calibration", "method": "zero_tuning", "gamma": value} | fields


def merged(family: str):
    """The family's tiny model with 2 KV heads: a stock model."""
    model = copy.deepcopy(TINY[family]()).eval().requires_grad_(False)
    package.apply(recipe({"op": "gqa", "kv_heads": 2}), model)
    return model


def split_with_terms(stock, kind: str):
    """A stock model with streaming heads and random terms: the model, its layers in the block, its tensors."""
    tensors, sinks = random_terms(stock, kind, 1), 0 if kind == "stand in" else 2
    layers = [{"streaming": heads, "sinks": sinks, "window": 5} for heads in STREAMING]
    for entry, named in zip(layers, tensors, strict=True):
        entry["parameters"] = {name: list(tensor.shape) for name, tensor in named.items()}
        entry |= {"stand_in": True} if kind == "stand in" else {}
    model = copy.deepcopy(stock)
    runtime.patch(model, {"layers": layers})
    with torch.no_grad():
        for module, named in zip(runtime.attention_modules(model), tensors, strict=True):
            for name, tensor in named.items():
                getattr(module, name).copy_(tensor)
    return model, layers, tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every family and kind of term, pruned: model in memory, what a padded batch must give, folder, what loads."""
    root, found = tmp_path_factory.mktemp("composed"), {}
    for family in FAMILIES:
        stock = merged(family)
        ids, mask = batch(stock)
        for kind in KINDS:
            model, layers, tensors = split_with_terms(stock, kind)
            want = dense_logits(stock, layers, ids, mask, tensors, silent=REMOVED)
            heard = dense_logits(stock, layers, ids, mask, tensors)
            without = dense_logits(stock, layers, ids, mask, silent=REMOVED)
            package.apply(recipe(prune()), model)
            folder = root / f"{family}-{kind.replace(' ', '-')}"
            model.save_pretrained(folder)
            found[family, kind] = (model, want, (heard, without), folder)
    answers = load_without_package([folder for *_, folder in found.values()], root, trust=True)
    return {key: (*value, answers[value[-1]]) for key, value in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads_pruned_under_a_split_and_terms(saved, family, kind):
    """gqa, head split, terms, pruning: logits of the dense model whose pruned heads say nothing."""
    model, want, others, folder, answer = saved[family, kind]
    ids, mask = batch(model)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    for chunks in ([20, 1, 24], [7] * 6 + [3]):
        assert difference(chunked(model, ids, mask, chunks), want, mask) <= 1e-4
    for other in others:
        assert difference(other, want, mask) > 1e-3, "pruning or terms change nothing here: the test has no power"
    block = json.loads((folder / "config.json").read_text())["surgery"]["layers"]
    assert [entry["streaming"] for entry in block] == [[1], [0]]
    assert [entry.get("query_groups") for entry in block] == [[3, 4], None]
    rows = {"surgery_key": (2, 1), "surgery_value": (2, 1)}  # of KV heads; the others of query heads
    for number, (entry, module) in enumerate(zip(block, runtime.attention_modules(model), strict=True)):
        for name, shape in entry["parameters"].items():
            assert shape == list(getattr(module, name).shape)
            assert shape[0] == rows.get(name, (7, 4))[number]
    again = package.load(folder)
    assert "error" not in answer, answer
    assert answer["missing"] == answer["unexpected"] == answer["mismatched"] == []
    assert torch.equal(logits_of(again), answer["logits"].double())
    assert (logits_of(again) - logits_of(model)).abs().max() <= 1e-4
    again.save_pretrained(folder / "again")
    last = package.load(folder / "again").state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_heads_are_scored_and_the_output_refitted_with_the_terms_at_work(family):
    """Ablation and gradients against the dense model; the refit against lstsq on the dense model's activations."""
    stock = merged(family)
    model, layers, tensors = split_with_terms(stock, "all")
    whole = torch.ones_like(SEQUENCES)
    logp = dense_logits(stock, layers, SEQUENCES, whole, tensors).log_softmax(-1)
    found = importance(model, "ablation", SEQUENCES).scores
    for layer, head in ((0, 1), (0, 6), (1, 3)):
        silent = [[], []]
        silent[layer] = [head]
        other = dense_logits(stock, layers, SEQUENCES, whole, tensors, silent).log_softmax(-1)
        assert found[layer][head] == pytest.approx((logp.exp() * (logp - other)).sum(-1).mean().item(), rel=1e-3)
    size, want, step = stock.config.head_dim, torch.zeros(8, dtype=torch.float64), 1e-3
    for head in range(8):
        sides = []
        for factor in (1 + step, 1 - step):
            scaled = copy.deepcopy(stock).double()
            scaled.model.layers[1].self_attn.o_proj.weight.data[:, head * size : (head + 1) * size] *= factor
            rows = dense_logits(scaled, layers, SEQUENCES, whole, tensors).log_softmax(-1)[:, :-1]
            sides.append(-rows.gather(-1, SEQUENCES[:, 1:, None])[..., 0].mean(1))
        want[head] = ((sides[0] - sides[1]) / (2 * step)).abs().mean()
    got = torch.tensor(importance(model, "gradient", SEQUENCES).scores[1], dtype=torch.float64)
    assert (got - want / want.norm()).abs().max() < 1e-3
    fits = refit(model, Anatomy.of(model), REMOVED, SEQUENCES, 0.05)
    dense = dense_model(stock, layers, whole, tensors)
    for layer, gone in enumerate(REMOVED):
        module, seen = dense.model.layers[layer].self_attn.o_proj, []
        hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
        logits_of(dense, SEQUENCES)
        hook.remove()
        z, old = torch.cat(seen), module.weight.data.clone()
        kept = [h * size + i for h in range(8) if h not in gone for i in range(size)]
        mean = z.mean(0) * (module.bias is not None)  # a bias takes over what is written on average
        near, written = (z - mean)[:, kept], (z - mean) @ old.T
        weight = 0.05 * near.square().sum(0).mean()
        rows = torch.cat([near, weight.sqrt() * torch.eye(len(kept), dtype=torch.float64)])
        fitted = torch.linalg.lstsq(rows, torch.cat([written, weight.sqrt() * old[:, kept].T])).solution.T
        assert (fits[layer].weight.flatten(1) - fitted).abs().max() < 1e-3 * fitted.abs().max()
        module.weight.data.zero_()
        module.weight.data[:, kept] = fitted
        if module.bias is not None:
            module.bias.data += old @ mean - fitted @ mean[kept]


@pytest.mark.parametrize("method", ["zero_tuning", "learned", "kv_bias"])
def test_four_operations_in_one_recipe_through_the_command(surgery, model, tmp_path, method):
    """Fitted terms; what is pruned in one recipe is what is pruned later, and both ways to load agree."""
    fit = {"start": "fit", "calibration_samples": 4, "calibration_length": 64}
    if method == "zero_tuning":
        fit = {"gamma": 2.0, "heads": [0, 4, 8]}
    sinks = 2 if method == "zero_tuning" else 0
    removed = [[0, 5], [1]]
    steps = [
        {"op": "gqa", "kv_heads": [3, 1]},
        {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": sinks, "window": 6},
        {"op": "sink_calibration", "method": method} | fit,
        prune(removed),
    ]
    measured = {"op": "prune_heads", "granularity": "head", "per_layer": 1, "score_samples": 2}
    measured |= {"calibration_samples": 4, "calibration_length": 64}
    for name, parts in (
        ("three", steps[:3]),
        ("four", steps),
        ("later", steps[3:]),
        ("measured", [*steps[:3], measured]),
    ):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe(*parts)))
        done = surgery("apply", f"{name}.yaml", "three" if name == "later" else model, "-o", name, "--no-eval")
        assert done.code == 0, done.err
        report = json.loads((tmp_path / name / "surgery.json").read_text())
        statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
        assert statuses["loads with trust_remote_code"] == statuses["both ways to load agree"] == "passed"
    assert [len(gone) for gone in report["operations"][3]["record"]["removed"]] == [1, 1]
    assert all(layer["refitted"] < layer["pruned"] for layer in report["operations"][3]["record"]["lost_share"])
    three, four, later = (package.load(tmp_path / name) for name in ("three", "four", "later"))
    assert four.config.surgery == later.config.surgery
    last = later.state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in four.state_dict().items())
    names = [name for name, _ in four.named_parameters() if "surgery_" in name]
    assert len(names) == 2 * {"zero_tuning": 1, "learned": 2, "kv_bias": 3}[method]
    wide = three.float()
    with torch.no_grad():
        for layer, gone in zip(wide.model.layers, removed, strict=True):
            for head in gone:
                layer.self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
    tokens = SEQUENCES % 30
    want = logits_of(wide, tokens)
    assert (logits_of(four.float(), tokens) - want).abs().max() <= 1e-4 * want.std()


SPLIT = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 5}


@pytest.mark.parametrize(
    ("removed", "between"),
    [([[0, 1], [2, 3]], [SPLIT]), ([[0, 3], [2, 3, 7]], [])],  # KV heads with unequal readers cannot be measured
    ids=["whole groups, then a split", "unequal groups"],
)
@torch.no_grad()
def test_pruned_first_and_calibrated_then(removed, between):
    """The other order: the heads that get a gamma are named by the base's numbers."""
    base = TINY["llama"]().eval()
    model, last = copy.deepcopy(base), gamma(3.0, heads=[4, 6])
    package.apply(recipe(prune(removed), *between, last), model)
    log_gamma = torch.zeros(8)
    log_gamma[[4, 6]] = math.log(3)
    ids, mask = batch(base)
    layers = [{"streaming": [0, 1, 2, 3], "sinks": 2, "window": 5} if between else {}] * 2
    want = dense_logits(base, layers, ids, mask, [{"surgery_log_gamma": log_gamma}] * 2, removed)
    assert difference(model(**given(model, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    assert difference(chunked(model, ids, mask, [30, 1, 14]), want, mask) <= 1e-4
    with pytest.raises(SurgeryError, match=r"heads \[0\]: a layer has query heads [12], "):
        package.plan(recipe(prune(removed), *between, last | {"heads": [0]}), base)


# --- one term, two operations ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_term_by_two_operations_in_different_layers(tmp_path):
    base = TINY["llama"]().eval()
    model, later = copy.deepcopy(base), copy.deepcopy(base)
    package.apply(recipe(gamma(3.0, layers=[0]), gamma(0.5, layers=[1], heads=[2])), model)
    for value, fields in ((3.0, {"layers": [0]}), (0.5, {"layers": [1], "heads": [2]})):
        package.apply(recipe(gamma(value, **fields)), later)
    second = torch.zeros(8)
    second[2] = math.log(0.5)
    ids, mask = batch(base)
    tensors = [{"surgery_log_gamma": torch.full((8,), math.log(3))}, {"surgery_log_gamma": second}]
    want = dense_logits(base, [{}, {}], ids, mask, tensors)
    for each in (model, later):
        assert difference(each(**given(each, ids, mask), use_cache=False).logits, want, mask) <= 1e-4
    assert model.config.surgery == later.config.surgery


def test_one_term_by_two_operations_in_one_layer_is_refused_with_both_names():
    base = TINY["llama"]()
    with pytest.raises(SurgeryError, match=r"sink_calibration: sink_calibration before it sets the bias .* layers 1;"):
        package.plan(recipe(gamma(2.0, layers=[0, 1]), gamma(2.0, layers=[1])), base)
    split = {"op": "duo_attention", "streaming_ratio": 0.5, "sinks": 4, "window": 16}
    with pytest.raises(SurgeryError, match="duo_attention: duo_attention before it sets the visibility of the same"):
        package.plan(recipe(split, split), base)
    model = copy.deepcopy(base)
    package.apply(recipe(gamma(2.0, layers=[1])), model)
    assert package.plan(recipe(gamma(2.0, layers=[0])), model).tier == "surgical"
    with pytest.raises(SurgeryError, match=r"checkpoint sets the bias .* already, in layers 1; write one recipe"):
        package.plan(recipe(gamma(2.0)), model)
    with pytest.raises(SurgeryError, match="gqa: weight rewrites come before sink_calibration in a recipe"):
        package.plan(recipe(gamma(2.0), {"op": "gqa", "kv_heads": 1}), base)


# --- weight rewrites on a surgical checkpoint ------------------------------------------------------------------------


def test_gqa_on_heads_that_pruning_left_in_memory_and_streamed(tmp_path):
    """6 query heads on 3 KV heads, which no stock llama of this size may have; then one KV head, the mean."""
    base, removed = TINY["llama"]().eval(), [[0, 1], [0, 1]]
    want = copy.deepcopy(base).double()
    with torch.no_grad():
        for layer in want.model.layers:
            layer.self_attn.o_proj.weight[:, :16] = 0
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = projection.weight.view(4, 8, -1)
                heads[1:] = heads[1:].mean(0, keepdim=True)
    model, merge = copy.deepcopy(base), {"op": "gqa", "kv_heads": 1}
    package.apply(recipe(prune(removed)), model)
    model.save_pretrained(tmp_path / "pruned")
    package.apply(recipe(merge), model)
    assert (logits_of(model) - logits_of(want)).abs().max() <= 1e-4 * logits_of(want).std()
    once = copy.deepcopy(base)
    package.apply(recipe(prune(removed), merge), once)
    assert torch.equal(logits_of(once), logits_of(model))
    out = tmp_path / "out"
    package.apply(recipe(merge), tmp_path / "pruned", output=out, engine="streaming", check=False, evaluate=False)
    assert torch.equal(logits_of(package.load(out)), logits_of(model))
    assert torch.equal(load_without_package([out], tmp_path, trust=True)[out]["logits"].double(), logits_of(model))


@pytest.mark.parametrize(
    "steps",
    [
        [{"op": "moh", "router": "zero", "shared_ratio": 0, "granularity": "kv_group"}],
        [{"op": "moh", "router": "random", "shared_ratio": 0, "keep_first_layers": 1}],
        [{"op": "mae", "router": "zero"}],
        [{"op": "sink_calibration", "method": "zero_tuning", "gamma": 2.0, "layers": [1]}],
        [{"op": "sink_calibration", "method": "act", "beta": 1}],
        [{"op": "sink_calibration", "method": "learned", "logit": 1.0}, {"op": "mae", "router": "zero"}],
        [{"op": "gqa", "kv_heads": 2}, {"op": "sink_calibration", "method": "kv_bias", "start": "identity"}],
    ],
)
def test_a_plan_counts_the_parameters_that_the_surgery_adds(steps):
    model = TINY["llama"]()
    plan = package.plan(recipe(*steps), model)
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert plan.before.parameters == stored
    package.apply(recipe(*steps), model)
    assert plan.parameters_after == sum(parameter.numel() for parameter in model.parameters()) != stored


def test_shared_heads_have_routers_too(surgery, model, text):
    """Through the command, with what is measured: the card's numbers are those of the files."""
    asked = [f"operations.0.text={text}", "calibration_samples=4", "calibration_length=32", "--no-eval"]
    assert surgery("apply", "moh", model, "-o", "out", *asked).code == 0
    with safe_open(model.parent / "out" / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    report = json.loads((model.parent / "out" / "surgery.json").read_text())
    assert report["plan"]["parameters"]["after"] == stored > report["plan"]["parameters"]["before"]
