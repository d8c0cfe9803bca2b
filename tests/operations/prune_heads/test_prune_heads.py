"""Heads taken away: values against stock models whose heads are silenced, scores, the refit, both tiers, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from dense import chunked, given
from families import (
    TINY,
    TOKENS,
    VOCAB,
    attention_modules,
    base,
    difference,
    double,
    get_head,
    head_dim_of,
    kv_heads_of,
    load_without_package,
    logits_of,
    one_thread,  # noqa: F401
    text_config,
)

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.architecture.layer import groups_of
from surgery.calibration.layerwise import Layerwise
from surgery.calibration.moments import refit_output
from surgery.errors import SurgeryError
from surgery.operations.prune_heads.importance import importance
from surgery.operations.prune_heads.operation import PruneHeads
from surgery.operations.prune_heads.refit import moments_of, refit
from surgery.operations.prune_heads.select import anatomy_without_heads, choose_removed

PLAIN = {"scores": "random", "refit": False}
# 8 query heads on 4 KV heads: two groups go for 4 on 2, which divides the hidden size (llama's config wants that)
NATIVE = (
    "llama", "llama_bias", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "phi",
    "phi3", "cohere", "cohere_qk_norm", "granite", "smollm3", "starcoder2", "gpt_oss", "glm4",
)  # fmt: skip
SURGICAL = (*(name for name in NATIVE if name not in ("phi3", "cohere_qk_norm")), "phi_qk_layernorm")
ODD = [[0], [2, 3, 7]]  # of 8 on 4: groups of 1 2 2 2, and a whole group and a head: 2 2 1 on 3 KV heads
GROUPS = [[0, 1, 4, 5], [2, 3, 6, 7]]
SEQUENCES = torch.randint(3, VOCAB, (6, 16), generator=torch.Generator().manual_seed(1))


def output(module):
    return getattr(module, "o_proj", None) or module.dense


def silenced(model, removed: list[list[int]]):
    """The stock model in float64 whose removed heads say nothing: their output columns are zero."""
    wide = double(model)
    size = head_dim_of(model)
    for module, heads in zip(attention_modules(wide), removed, strict=True):
        for head in heads:
            output(module).weight.data[:, head * size : (head + 1) * size] = 0
    return wide


def pruned(model, removed, **fields):
    model = copy.deepcopy(model)
    fields = {"granularity": "head", "refit": False, "per_layer": None, "heads": removed} | fields
    return model, surgery.apply("prune-heads", model, **fields)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every family pruned in both ways, saved, loaded by us and saved again: folder -> (model in memory, removed)."""
    root, models = tmp_path_factory.mktemp("pruned"), {}
    for kind, names, removed in (("native", NATIVE, GROUPS), ("surgical", SURGICAL, ODD)):
        for name in names:
            model, report = pruned(base(name), removed)
            assert report.data["tier"] == kind, name
            folder = root / f"{kind}-{name}"
            model.save_pretrained(folder)
            surgery.load(folder).save_pretrained(root / f"{kind}-{name}-again")
            for each in (folder, root / f"{kind}-{name}-again"):
                models[each] = (name, model, removed)
    answers = {}
    for kind in ("native", "surgical"):
        folders = [folder for folder in models if folder.name.startswith(kind)]
        scratch = root / f"fresh-{kind}"
        scratch.mkdir()
        answers |= load_without_package(folders, scratch, trust=kind == "surgical")
    return models, answers


def test_values_are_those_of_silenced_heads_through_every_door(saved):
    models, answers = saved
    expected = {}
    for folder, (name, model, removed) in models.items():
        answer = answers[folder]
        assert "error" not in answer, f"{folder.name}: {answer}"
        assert not answer["missing"], folder.name
        assert not answer["unexpected"], folder.name
        key = (name, str(removed))
        if key not in expected:
            expected[key] = logits_of(silenced(base(name), removed))
        assert difference(logits_of(model), expected[key]) < 1e-4, folder.name
        assert difference(answer["logits"], expected[key]) < 1e-4, folder.name
        again = surgery.load(folder)
        for (label, one), two in zip(again.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(one, two), f"{folder.name}: {label}"


def test_tensors_are_really_smaller(saved):
    for folder, (name, model, _) in saved[0].items():
        size, old = head_dim_of(base(name)), base(name)
        counts = [(4, 2), (4, 2)] if folder.name.startswith("native") else [(7, 4), (5, 3)]
        for layer, (heads, kv_heads) in zip(Anatomy.of(model).layers, counts, strict=True):
            assert (layer.heads, layer.kv_heads, layer.head_dim) == (heads, kv_heads, size), folder.name
        for module, (heads, _) in zip(attention_modules(model), counts, strict=True):
            assert output(module).in_features == heads * size
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in old.parameters())


def test_a_native_folder_is_stock(saved):
    folder = next(folder for folder in saved[0] if folder.name == "native-llama")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert "surgery" not in config
    assert not list(folder.glob("*.py"))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
def test_cached_is_uncached_with_left_padding(name):
    model, _ = pruned(base(name), ODD)
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    with torch.no_grad():
        uncached = model(**given(model, TOKENS, mask), use_cache=False).logits
        cached = chunked(model, TOKENS, mask, (5, 1, 6))
    assert (cached - uncached)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("nothing", [{"per_layer": 0}, {"per_layer": None, "ratio": 0.0}, {"heads": [[], []]}])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "phi3", "bloom"])
def test_removing_nothing_is_the_base(name, nothing):
    model = copy.deepcopy(base(name))
    report = surgery.apply("prune-heads", model, **({"per_layer": None} | nothing), refit=True)
    assert report.data["tier"] == "native"
    assert type(model) is type(base(name))
    assert torch.equal(logits_of(model), logits_of(base(name)))


def test_pruning_again_names_heads_by_the_bases_numbers():
    """Absolute numbers: removing 0, then 2, is removing both."""
    once, _ = pruned(base("llama"), [[0], [0, 1]])
    assert Anatomy.of(once).layers[1].kv_numbers == (1, 2, 3)
    twice, report = pruned(once, [[2], [5]])
    assert report.data["operations"][0]["record"]["removed"] == [[2], [5]]
    both, _ = pruned(base("llama"), [[0, 2], [0, 1, 5]])
    assert twice.config.surgery == both.config.surgery
    assert torch.equal(logits_of(twice), logits_of(both))
    assert difference(logits_of(twice), logits_of(silenced(base("llama"), [[0, 2], [0, 1, 5]]))) < 1e-4
    with pytest.raises(SurgeryError, match=r"layer 0 has no query heads \[0\]; it has 1, 2, 3"):
        pruned(once, [[0], []])


def test_even_pruning_of_a_surgical_model_keeps_no_old_shape():
    """Unequal groups become equal again: the block may not remember the unequal ones."""
    once, _ = pruned(base("llama"), [[0], [0]])
    twice, _ = pruned(once, [[1], [1]], granularity="kv_group")
    assert [layer.query_groups for layer in Anatomy.of(twice).layers] == [(), ()]
    assert difference(logits_of(twice), logits_of(silenced(base("llama"), [[0, 1], [0, 1]]))) < 1e-4


# --- with the head split and with gqa ----------------------------------------------------------------------


@pytest.mark.parametrize("removed", [ODD, GROUPS])
def test_streaming_heads_keep_their_names(removed, tmp_path):
    """Split first, prune then: what streams is what streamed, whatever its new place."""
    split = [[1, 2], [0, 3]]
    scores = tmp_path / "scores.txt"
    scores.write_text("\n".join(" ".join("0" if kv in row else "1" for kv in range(4)) for row in split))
    recipe = {
        "version": 1,
        "name": "both",
        "operations": [
            {"op": "duo_attention", "scores": str(scores), "sinks": 1, "window": 3},
            {"op": "prune_heads", "granularity": "head", "heads": removed, "refit": False},
        ],
    }
    full = copy.deepcopy(base("llama"))
    surgery.apply(recipe | {"operations": recipe["operations"][:1]}, full)
    assert [layer["streaming"] for layer in full.config.surgery["layers"]] == split
    full.save_pretrained(tmp_path / "split")
    for module, heads in zip(attention_modules(full), removed, strict=True):
        for head in heads:
            module.o_proj.weight.data[:, head * 8 : head * 8 + 8] = 0
    model = copy.deepcopy(base("llama"))
    surgery.apply(recipe, model)
    assert difference(logits_of(model), logits_of(full)) < 1e-4
    names = [(layer.split_info or {"kv_heads": []})["kv_heads"] for layer in Anatomy.of(model).layers]
    removed_kv = [[kv for kv in range(4) if {2 * kv, 2 * kv + 1} <= {*heads}] for heads in removed]
    assert names == [[kv for kv in row if kv not in out] for row, out in zip(split, removed_kv, strict=True)]
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(surgery.load(tmp_path / "out")), logits_of(model))
    later = surgery.load(tmp_path / "split")  # a second surgery on a checkpoint that is split already
    surgery.apply(
        "prune-heads", later, per_layer=None, **{k: v for k, v in recipe["operations"][1].items() if k != "op"}
    )
    assert later.config.surgery == model.config.surgery
    assert torch.equal(logits_of(later), logits_of(model))


def test_gqa_split_and_prune_in_one_recipe_through_the_command(surgery, model):
    (model.parent / "three.yaml").write_text(
        "version: 1\nname: three\ndescription: x\noperations:\n"
        "  - {op: gqa, kv_heads: [3, 1]}\n"
        "  - {op: duo_attention, streaming_ratio: 0.5, sinks: 1, window: 4, calibration_length: 200, "
        "calibration_samples: 1}\n"
        "  - {op: prune_heads, granularity: head, per_layer: 2, scores: magnitude, calibration_length: 64, "
        "calibration_samples: 2}\n"
    )
    ran = surgery("apply", "three.yaml", model, "-o", "out", "--no-eval")
    assert ran.code == 0, ran.err
    report = json.loads((model.parent / "out" / "surgery.json").read_text())
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["both ways to load agree"] == "passed"
    assert [len(heads) for heads in report["operations"][2]["record"]["removed"]] == [2, 2]
    layers = surgery("inspect", model.parent / "out", "--json").json["layers"]
    assert [layer["heads"] for layer in layers] == [7, 7]
    assert surgery("apply", "gqa", "out", "kv_heads=1", "-o", "no").code == 2


def test_a_split_measured_after_pruning(surgery, model):
    """Whole groups first (native), then the head split is measured on what is left."""
    (model.parent / "two.yaml").write_text(
        "version: 1\nname: two\ndescription: x\noperations:\n"
        "  - {op: prune_heads, per_layer: 1, scores: magnitude, refit: false}\n"
        "  - {op: duo_attention, streaming_ratio: 0.5, sinks: 1, window: 4, calibration_length: 200, "
        "calibration_samples: 1}\n"
    )
    ran = surgery("apply", "two.yaml", model, "-o", "out", "--no-eval")
    assert ran.code == 0, ran.err
    layers = surgery("inspect", model.parent / "out", "--json").json["layers"]
    assert [(layer["heads"], layer["kv_heads"]) for layer in layers] == [(6, 2), (6, 2)]
    assert sum(len((layer["streaming"] or {"kv_heads": []})["kv_heads"]) for layer in layers) == 2


# --- the choice --------------------------------------------------------------------------------------------


def test_choice_by_hand():
    groups = [[[0, 1], [2, 3]], [[0, 1], [2, 3]]]
    scores = [[1, 9, 2, 2], [5, 5, 0, 8]]
    heads = [[[0], [1], [2], [3]]] * 2
    assert choose_removed(scores, heads, per_layer=1) == [[0], [2]]
    assert choose_removed(scores, heads, per_layer=3) == [[0, 2, 3], [0, 1, 2]]
    assert choose_removed(scores, heads, ratio=0.5) == [[0, 2, 3], [2]]
    assert choose_removed(scores, heads, ratio=0.5, protect=[0]) == [[], [0, 1, 2]]
    assert choose_removed(scores, groups, per_layer=1) == [[2, 3], [2, 3]]
    assert choose_removed(scores, groups, ratio=0.25) == [[2, 3], []]
    tied = [[1] * 4] * 2
    assert choose_removed(tied, heads, ratio=0.375) == [[0, 1, 2], []]


def test_names_follow():
    layer = Anatomy.of(base("llama")).layers[0]
    once = anatomy_without_heads(layer, [0, 2, 3])
    assert (once.heads, once.kv_heads, once.query_groups) == (5, 3, (1, 2, 2))
    assert (once.query_numbers, once.kv_numbers) == ((1, 4, 5, 6, 7), (0, 2, 3))
    assert groups_of(once) == [[0], [1, 2], [3, 4]]
    twice = anatomy_without_heads(once, [0])
    assert (twice.query_numbers, twice.kv_numbers, twice.query_groups) == ((4, 5, 6, 7), (2, 3), ())


# --- scores ------------------------------------------------------------------------------------------------


def losses(model, name, layer=None, head=None, factor=1.0):
    """Loss of each sequence in float64 with one head's output columns multiplied by a factor."""
    wide = double(model)
    if head is not None:
        size = head_dim_of(model)
        output(attention_modules(wide)[layer]).weight.data[:, head * size : (head + 1) * size] *= factor
    with torch.no_grad():
        return torch.stack(
            [torch.nn.functional.cross_entropy(wide(input_ids=ids[None]).logits[0, :-1], ids[1:]) for ids in SEQUENCES]
        )


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_gradient_scores_are_finite_differences(name):
    model, step = base(name), 1e-3  # norms compute in float32 even here: smaller steps drown in it
    want = torch.zeros(2, 8, dtype=torch.float64)
    for layer in range(2):
        for head in range(8):
            up, down = (losses(model, name, layer, head, 1 + sign * step) for sign in (1, -1))
            want[layer, head] = ((up - down) / (2 * step)).abs().mean()
    want /= want.norm(dim=1, keepdim=True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    scores = torch.tensor(importance(model, "gradient", SEQUENCES).scores, dtype=torch.float64)
    assert (scores - want).abs().max() < 1e-3
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_ablation_scores_are_the_kl_of_silenced_heads(name):
    model = base(name)
    scores = importance(model, "ablation", SEQUENCES).scores
    full = logits_of(double(model), SEQUENCES).log_softmax(-1)
    for layer, head in ((0, 0), (0, 7), (1, 3)):
        removed = [[], []]
        removed[layer] = [head]
        other = logits_of(silenced(model, removed), SEQUENCES).log_softmax(-1)
        want = (full.exp() * (full - other)).sum(-1).mean().item()
        assert scores[layer][head] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", ["llama_bias", "phi3", "qwen2"])
def test_magnitude_is_the_norm_of_the_product(name):
    model = base(name)
    scores = importance(model, "magnitude", None).scores
    size, per = head_dim_of(model), text_config(model).num_attention_heads // kv_heads_of(model)
    for layer, module in enumerate(attention_modules(model)):
        for head in range(8):
            value = get_head(model, module, "v", head // per)
            wrote = output(module).weight.double()[:, head * size : (head + 1) * size] @ value
            assert scores[layer][head] == pytest.approx(wrote.norm().item(), rel=1e-6)


# --- the refit ---------------------------------------------------------------------------------------------


def test_refit_is_least_squares():
    """Against lstsq on stacked rows: the data, and the ridge as rows of its own."""
    generator = torch.Generator().manual_seed(0)
    z, r, old = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((40, 6), (40, 5), (5, 6)))
    weight = 0.3 * (z.square().sum(0)).mean()
    rows = torch.cat([z, weight.sqrt() * torch.eye(6, dtype=torch.float64)])
    targets = torch.cat([r, weight.sqrt() * old.T])
    want = torch.linalg.lstsq(rows, targets).solution.T
    assert torch.allclose(refit_output(old, r.T @ z, z.T @ z, 0.3), want, atol=1e-10)
    assert torch.allclose(refit_output(old, r.T @ z, z.T @ z, 1e12), old, atol=1e-8)
    assert torch.equal(refit_output(old, 0 * (r.T @ z), 0 * (z.T @ z), 0.3), old)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "phi", "cohere", "llama_bias"])
def test_refit_of_a_model_equals_lstsq_on_its_own_activations(name):
    """Layer by layer, with inputs from the pruned layers before: everything recomputed on the stock float64 model.

    Where the output projection has a bias, lstsq has a column of ones for it, which the ridge does not pull.
    """
    model, removed, size = double(base(name)), ODD, head_dim_of(base(name))
    anatomy = Anatomy.of(model)
    logits = logits_of(model)
    fits = refit(model, anatomy, removed, SEQUENCES, 0.05)
    assert torch.equal(logits_of(model), logits)
    stock = double(base(name))
    for layer, removed_heads in enumerate(removed):
        module = output(attention_modules(stock)[layer])
        inputs = []
        hook = module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2)))
        logits_of(stock, SEQUENCES)
        hook.remove()
        z, old = torch.cat(inputs), module.weight.data.clone()
        kept = [h * size + i for h in range(8) if h not in removed_heads for i in range(size)]
        biased = module.bias is not None
        spread = z[:, kept] - z[:, kept].mean(0) if biased else z[:, kept]
        target, weight = z @ old.T, 0.05 * spread.square().sum(0).mean()
        ones = torch.ones(len(z), 1, dtype=torch.float64)[:, :biased]
        ridge = torch.cat([weight.sqrt() * torch.eye(len(kept)).double(), torch.zeros(len(kept), int(biased))], dim=1)
        rows = torch.cat([torch.cat([z[:, kept], ones], dim=1), ridge])
        fitted = torch.linalg.lstsq(rows, torch.cat([target, weight.sqrt() * old[:, kept].T])).solution.T
        want, shift = fitted[:, : len(kept)], fitted[:, len(kept) :].sum(1)
        assert (fits[layer].weight.flatten(1) - want).abs().max() < 1e-8 * want.abs().max()
        module.weight.data.zero_()
        module.weight.data[:, kept] = want
        if biased:
            assert (fits[layer].shift - shift).abs().max() < 1e-8 * shift.abs().max()
            module.bias.data += shift
        else:
            assert fits[layer].shift is None
        lost = (target - z @ module.weight.data.T - shift).square().sum() / target.square().sum()
        assert fits[layer].lost["refitted"] == pytest.approx(lost.item(), rel=1e-6)
        assert fits[layer].lost["refitted"] < fits[layer].lost["pruned"]


def test_a_head_that_always_writes_the_same_goes_without_loss_where_there_is_a_bias(monkeypatch):
    """Its values are a bias alone: the refitted output bias has all of it, and stock Llama says the same logits."""
    model = base("llama_bias")
    with torch.no_grad():
        for module in attention_modules(model):
            size = head_dim_of(model)
            module.v_proj.weight[:size] = 0.0
            module.v_proj.bias[:size] += 1.0
    want = logits_of(model)
    removed = [[0, 1], [0, 1]]  # the query heads of the first KV head
    fits = refit(model, Anatomy.of(model), removed, SEQUENCES, 1e-9)
    assert all(fit.lost["refitted"] < 1e-9 < fit.lost["pruned"] for fit in fits)
    assert torch.equal(logits_of(model), want), "the model was left as it was"
    monkeypatch.setattr(PruneHeads, "_sequences", lambda *_: SEQUENCES)
    without, _ = pruned(model, removed, granularity="kv_group")
    smaller, report = pruned(model, removed, granularity="kv_group", refit=True, ridge=1e-9)
    assert difference(logits_of(smaller), want) < 1e-3 < 1e-2 < difference(logits_of(without), want)
    assert report.data["operations"][0]["record"]["output_bias"] == "refitted"
    assert "output projections and their biases refitted" in report.data["plan"]["changes"][0]
    _, report = pruned(base("llama"), removed, granularity="kv_group", refit=True)
    assert report.data["operations"][0]["record"]["output_bias"] == "none"
    assert any("have no bias here" in note for note in report.data["plan"]["notes"])


def test_layers_one_by_one_are_the_model():
    for name in ("llama", "gemma3", "smollm3", "cohere", "gpt_oss", "gemma3_image_text"):
        model = double(base(name))
        with torch.no_grad():
            run = Layerwise(model, Anatomy.of(model), SEQUENCES)
            moments = moments_of(run.heads(0)).total
            run.advance(0)
            second = list(run.heads(1))
            inputs = []
            hook = output(attention_modules(model)[1]).register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0])
            )
            for ids in SEQUENCES:
                model(input_ids=ids[None])
            hook.remove()
        assert moments.shape == (8 * head_dim_of(model),) * 2
        for mine, theirs in zip(second, inputs, strict=True):
            assert torch.equal(mine, theirs.flatten(0, -2)), name


def test_refit_through_the_command_beats_plain_pruning(surgery, model, text):
    """On the calibration text itself, and the record says by how much."""
    once = ["granularity=head", "per_layer=2", "scores=magnitude", "calibration_length=32", "calibration_samples=8"]
    once += [f"calibration_text={text}", "ridge=0.001"]
    ran = surgery("apply", "prune-heads", model, "-o", "out", "--no-eval", *once)
    assert ran.code == 0, ran.err
    report = json.loads((model.parent / "out" / "surgery.json").read_text())
    assert report["tier"] == "surgical"
    for layer in report["operations"][0]["record"]["lost_share"]:
        assert layer["refitted"] < layer["pruned"]
    assert "prune_heads" in (model.parent / "out" / "README.md").read_text()


def test_native_through_the_command(surgery, model, text):
    once = ["calibration_length=32", "calibration_samples=4", "score_samples=2", f"calibration_text={text}"]
    ran = surgery("apply", "prune-heads", model, "-o", "out", "--no-eval", *once)
    assert ran.code == 0, ran.err
    report = json.loads((model.parent / "out" / "surgery.json").read_text())
    assert report["tier"] == "native"
    statuses = {item["name"]: item["status"] for item in report["check"]["items"]}
    assert statuses["loads with stock Transformers"] == "passed"
    again = surgery("apply", "prune-heads", model, "-o", "out2", "--no-eval", "--no-check", *once)
    assert again.code == 0
    second = json.loads((model.parent / "out2" / "surgery.json").read_text())
    assert [f["sha256"] for f in report["files"].values()] == [f["sha256"] for f in second["files"].values()]
    before, after = (report["plan"]["parameters"][key] for key in ("before", "after"))
    assert before - after == 2 * (2 * 3 * 8 + 2 * 8) * 72


def test_scores_from_a_file(surgery, refused, model, tmp_path):
    row = "9 9 9 9 0 9 9 9 9"
    (tmp_path / "scores.txt").write_text(f"{row}\n{row}\n")
    settings = ["granularity=head", "refit=false", "scores=scores.txt"]
    assert surgery("apply", "prune-heads", model, "-o", "out", "--no-eval", "--no-check", *settings).code == 0
    report = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert report["operations"][0]["record"]["removed"] == [[4], [4]]
    (tmp_path / "few.txt").write_text("1 2 3\n1 2 3\n")
    refused("apply", "prune-heads", model, "-o", "x", "scores=few.txt", says=["2 x 3 (layers x query heads)", "2 x 9"])


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["per_layer=3"], ["a layer has 3 KV groups, and one must stay"]),
        (["granularity=head", "per_layer=9"], ["a layer has 9 query heads, and one must stay"]),
        (["per_layer=null", "ratio=0.9"], ["removes 5 of 6 KV groups, and only 4 can go"]),
        (["per_layer=null", "ratio=1.0"], ["ratio"]),
        (["ratio=0.5"], ["one of per_layer, ratio and heads"]),
        (["per_layer=null"], ["none of them"]),
        (["per_layer=null", "heads=[[0], []]"], ["KV group 0 cannot go while its query heads [1, 2] stay"]),
        (["per_layer=null", "heads=[[9], []]", "granularity=head"], ["no query heads [9]; it has 0 to 8"]),
        (["per_layer=null", "heads=[[1, 1], []]", "granularity=head"], ["names a head twice"]),
        (["per_layer=null", "heads=[[0, 1, 2, 3, 4, 5, 6, 7, 8], []]"], ["layer 0 would have no head left"]),
        (["per_layer=null", "heads=[[0]]"], ["heads lists 1 layers, the model has 2"]),
        (["per_layer=-1"], ["per_layer"]),
        (["ridge=0"], ["ridge"]),
        (["scores=gradients"], ["did you mean 'gradient'"]),
        (["scores=none.txt"], ["no such score file"]),
        (["protect_layers=[2]"], ["layers 0 to 1"]),
        (["calibration_samples=100000"], ["the text is too short"]),
        (["calibration_text=none.txt"], ["no such text file"]),
    ],
)
def test_bad_fields(refused, model, overrides, says):
    refused("apply", "prune-heads", model, "-o", "out", *overrides, says=says)


def test_what_cannot_be_pruned_is_refused():
    for name, word in (
        ("olmo2", "spans all heads"),
        ("bloom", "divides its hidden size by its heads"),
        ("gpt2", "divides its hidden size by its heads"),
        ("falcon_new", "divides its hidden size by its heads"),
        ("stablelm", "counts heads by its config"),
    ):
        with pytest.raises(SurgeryError, match=word):
            surgery.plan("prune-heads", TINY[name](), **PLAIN)
    with pytest.raises(SurgeryError, match="the forward of phi3 counts heads by its config"):
        surgery.plan("prune-heads", TINY["phi3"](), granularity="head", **PLAIN)
    with pytest.raises(SurgeryError, match="need the tokenizer"):
        surgery.apply("prune-heads", copy.deepcopy(base("llama")))


def test_a_config_that_refuses_the_number_goes_surgical():
    """llama's config wants heads that divide the hidden size, which its forward does not need."""
    plan = surgery.plan("prune-heads", base("llama"), per_layer=1, **PLAIN)
    assert plan.tier == "surgical"
    assert any("refuses 6 query heads" in note for note in plan.notes)
    assert surgery.plan("prune-heads", base("qwen2"), per_layer=1, **PLAIN).tier == "native"


def test_order_of_operations():
    split = {"op": "duo_attention", "streaming_ratio": 0.5, "sinks": 4, "window": 16}
    steps = [{"op": "prune_heads", "granularity": "head", "per_layer": 1, "scores": "magnitude"}, split]
    recipe = {"version": 1, "name": "x", "operations": steps}
    with pytest.raises(SurgeryError, match="put it before prune_heads"):
        surgery.plan(recipe, base("llama"))
    plan = surgery.plan(recipe | {"operations": steps[::-1]}, base("llama"))
    assert plan.tier == "surgical"
    with pytest.raises(SurgeryError, match="weight rewrites come before duo_attention"):
        surgery.plan(recipe | {"operations": [split, {"op": "gqa", "kv_heads": 1}]}, base("llama"))


def test_the_plan_tells_unequal_groups(surgery, model):
    message = surgery("plan", "prune-heads", model, "granularity=head").out
    assert "9 → 8 query heads of size 8" in message
    assert "3 KV heads, each read by 2 to 3 query heads (3 before)" in message
    assert "parameters may be fewer" not in message
    assert "may be fewer" in surgery("plan", "prune-heads", model, "granularity=head", "per_layer=3").out
    assert "prune_heads" in surgery("ls", "--all").out


def test_plan_lines():
    plan = surgery.plan("prune-heads", base("qwen2"), per_layer=1, **PLAIN)
    assert plan.changes == ["query heads 8 → 6, KV heads 4 → 3 in 2 layers (random; no refit)"]
    plan = surgery.plan("prune-heads", base("qwen2"), granularity="head", per_layer=None, ratio=0.25)
    assert plan.changes == ["4 of 16 query heads go (gradient; output projections refitted, ridge 0.01)"]
    assert any("measured on the model (gradient)" in note for note in plan.notes)
    assert PruneHeads(per_layer=1).plan(Anatomy.of(base("mistral"))).tier == "native"
