"""Gates on heads: values against float64 forwards whose heads are multiplied, engines, compositions, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import (
    TINY,
    TOKENS,
    attention_modules,
    base,
    difference,
    double,
    head_dim_of,
    load_without_package,
    logits_of,
    one_thread,  # noqa: F401
)
from safetensors.torch import load_file

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.calibration.head_scores import HeadScores, model_identity
from surgery.errors import SurgeryError
from surgery.io.earlier_keys import with_earlier_keys

GATES = [[0.0, 1.0, 0.5, -2.0, 1.25, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.1]]
VALUES = {0: GATES[0], 1: {3: 0, 7: 0.1}}
OUTPUTS = ("o_proj", "dense", "c_proj", "out_proj")


def recipe(*steps: dict) -> dict:
    return {"version": 1, "name": "test", "operations": list(steps), "evaluate": None}


def mask(**fields) -> dict:
    return {"op": "head_mask"} | fields


def gated_logits(model, gates: list[list[float]]) -> torch.Tensor:
    """The stock model in float64; what each head gives to the output projection is multiplied on its way there."""
    wide, size = double(model), head_dim_of(model)
    for module, row in zip(attention_modules(wide), gates, strict=True):
        factors = torch.tensor(row, dtype=torch.float64).repeat_interleave(size)
        output = next(getattr(module, name) for name in OUTPUTS if hasattr(module, name))
        output.register_forward_pre_hook(lambda _, args, factors=factors: (args[0] * factors, *args[1:]))
    return logits_of(wide)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Every family, by both engines, and what stock Transformers in a process without surgery makes of it."""
    root, folders = tmp_path_factory.mktemp("gated"), {}
    for name in TINY:
        base(name).save_pretrained(root / name)
        for engine in ("streaming", "loaded"):
            out = folders[name, engine] = root / f"{name}-{engine}"
            report = surgery.apply(
                recipe(mask(values=VALUES)), root / name, output=out, engine=engine, check=False, evaluate=False
            )
            assert report.data["tier"] == "native"
    return folders, load_without_package([folders[name, "streaming"] for name in TINY], root)


@pytest.mark.parametrize("name", TINY)
def test_every_family_by_both_engines_in_stock_transformers(converted, name):
    folders, answers = converted
    streamed, loaded = folders[name, "streaming"], folders[name, "loaded"]
    want, answer = gated_logits(base(name), GATES), answers[streamed]
    assert "error" not in answer, answer
    assert answer["missing"] == answer["unexpected"] == answer["mismatched"] == []
    assert difference(answer["logits"], want) < 1e-4
    assert difference(logits_of(base(name)), want) > 1e-2, "the gates change nothing here: the test has no power"
    one, two = load_file(streamed / "model.safetensors"), load_file(loaded / "model.safetensors")
    known = load_file(streamed.with_name(name) / "model.safetensors")
    assert one.keys() == two.keys() == known.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    changed = {key for key in one if not torch.equal(one[key], known[key])}
    assert len(changed) == 2, "the output weights of two layers, and no bias"
    assert all(key.rpartition(".")[0].endswith(OUTPUTS) and key.endswith("weight") for key in changed)
    config = [json.loads((folder / "config.json").read_text()) for folder in (streamed, streamed.with_name(name))]
    assert config[0] == with_earlier_keys(config[1])


@pytest.mark.parametrize("values", [{}, {0: [1.0] * 8, 1: {2: 1}}])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bloom", "gpt_oss"])
def test_identity_is_the_base_to_the_bit(name, values):
    model = copy.deepcopy(base(name))
    report = surgery.apply(recipe(mask(values=values)), model)
    assert report.data["plan"]["changes"] == ["nothing: all gates are 1"]
    for (key, one), two in zip(model.named_parameters(), base(name).parameters(), strict=True):
        assert torch.equal(one, two), key


def test_bfloat16_is_rounded_once():
    model = copy.deepcopy(base("llama")).to(torch.bfloat16)
    before = model.model.layers[0].self_attn.o_proj.weight.detach().clone()
    surgery.apply(recipe(mask(values={0: {1: 0.3}})), model)
    after = model.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(after[:, 8:16], (before[:, 8:16].double() * 0.3).to(torch.bfloat16))
    assert torch.equal(after[:, :8], before[:, :8])
    assert torch.equal(after[:, 16:], before[:, 16:])


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_of_query_heads(tmp_path):
    table = [[5, 6, 0.1, 7, 8, 9, 5, 5], [5, 0.3, 5, 5, 0.2, 5, 5, 5]]
    (tmp_path / "s.txt").write_text("\n".join(" ".join(map(str, row)) for row in table))
    fields = {"scores": str(tmp_path / "s.txt"), "ratio": 3 / 16}
    for gate, options in ((0.0, {}), (0.5, {"gate": 0.5})):
        model = copy.deepcopy(base("llama"))
        report = surgery.apply(recipe(mask(**fields, **options)), model)
        want = [[1.0] * 8, [1.0] * 8]
        want[0][2] = want[1][1] = want[1][4] = gate
        assert difference(logits_of(model), gated_logits(base("llama"), want)) < 1e-4
        record = report.data["operations"][0]["record"]
        assert [layer["gates"] for layer in record.values()] == [{"2": gate}, {"1": gate, "4": gate}]
    model = copy.deepcopy(base("llama"))
    surgery.apply(recipe(mask(**fields, protect_layers=[1])), model)
    want = [[1.0] * 8, [1.0] * 8]
    for head in (2, 0, 6):  # the next lowest of layer 0: ties go by number
        want[0][head] = 0.0
    assert difference(logits_of(model), gated_logits(base("llama"), want)) < 1e-4


def test_scores_of_kv_heads_mask_whole_groups_on_both_engines(surgery, model, tmp_path):
    """A file as `surgery score` writes it, through the command; 9 query heads on 3 KV heads."""
    from surgery import load

    identity = model_identity(Anatomy.of(model))
    HeadScores("far-mass", [[0.1, 0.9, 0.2], [0.8, 0.3, 0.7]], {"model": identity}).save(tmp_path / "s.json")
    (tmp_path / "mask.yaml").write_text(json.dumps(recipe(mask(scores="s.json", ratio=0.5))))
    once = ("apply", "mask.yaml", model, "--no-eval")
    done = surgery(*once, "-o", "out")
    assert done.code == 0, done.err
    assert surgery(*once, "-o", "two", "--engine", "loaded").code == 0
    hashes = [json.loads((tmp_path / out / "surgery.json").read_text())["files"] for out in ("out", "two")]
    assert hashes[0]["model.safetensors"]["sha256"] == hashes[1]["model.safetensors"]["sha256"]
    want = [[0.0] * 3 + [1.0] * 3 + [0.0] * 3, [1.0] * 3 + [0.0] * 3 + [1.0] * 3]
    got = load(tmp_path / "out").float()
    assert difference(logits_of(got, TOKENS % 30), _gated(model, want)) < 1e-4
    planned = surgery("plan", "mask.yaml", model)
    assert "gates of 9 of 18 query heads in 2 layers: 9 silenced" in planned.out
    assert "prune_heads (heads: ...) removes them" in " ".join(planned.out.split())


def _gated(folder, gates) -> torch.Tensor:
    wide = surgery.load(folder).double()
    for layer, row in zip(wide.model.layers, gates, strict=True):
        factors = torch.tensor(row, dtype=torch.float64).repeat_interleave(8)
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, factors=factors: (args[0] * factors,))
    return logits_of(wide, TOKENS % 30)


# --- with other operations ------------------------------------------------------------------------------------------


def test_after_gqa_and_before():
    """A gate does not mind what its head reads: one recipe, both orders, the stock model that gqa leaves."""
    merged = copy.deepcopy(base("qwen2"))
    surgery.apply(recipe({"op": "gqa", "kv_heads": 2}), merged)
    want, steps = gated_logits(merged, GATES), [{"op": "gqa", "kv_heads": 2}, mask(values=VALUES)]
    for order in (steps, steps[::-1]):
        model = copy.deepcopy(base("qwen2"))
        assert surgery.apply(recipe(*order), model).data["tier"] == "native"
        assert difference(logits_of(model), want) < 1e-4


@pytest.mark.parametrize("removed", [[[0, 6], [3]], [[0, 1], [2, 3]]], ids=["surgical", "whole groups"])
def test_before_and_after_prune_heads(removed, tmp_path):
    """Heads keep the base's numbers when others are gone, and a mask on a saved surgical folder streams."""
    prune = {"op": "prune_heads", "heads": removed, "granularity": "head", "refit": False}
    gates = [
        [0.0 if h in cut else gate for h, gate in enumerate(row)] for row, cut in zip(GATES, removed, strict=True)
    ]
    want = gated_logits(base("llama"), gates)
    stays = {0: {h: GATES[0][h] for h in range(8) if h not in removed[0]}, 1: {7: 0.1}}
    before, after = copy.deepcopy(base("llama")), copy.deepcopy(base("llama"))
    surgery.apply(recipe(mask(values=VALUES), prune), before)
    surgery.apply(recipe(prune, mask(values=stays)), after)
    only = copy.deepcopy(base("llama"))
    surgery.apply(recipe(prune), only)
    only.save_pretrained(tmp_path / "pruned")
    for engine in ("streaming", "loaded"):
        out = tmp_path / engine
        steps = recipe(mask(values=stays))
        surgery.apply(steps, tmp_path / "pruned", output=out, engine=engine, check=False, evaluate=False)
        assert torch.equal(logits_of(surgery.load(out)), logits_of(after))
        assert difference(logits_of(surgery.load(out)), want) < 1e-4
    assert difference(logits_of(before), want) < 1e-4
    config = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("streaming", "loaded", "pruned")]
    assert config[0].get("surgery") == config[1].get("surgery") == config[2].get("surgery")


def test_a_pruned_head_is_not_there_any_more():
    model = copy.deepcopy(base("llama"))
    steps = {"op": "prune_heads", "heads": [[0], []], "granularity": "head", "refit": False}
    surgery.apply(recipe(steps), model)
    with pytest.raises(SurgeryError, match=r"layer 0 has no query heads \[0\]; it has 1, 2, 3, 4, 5, 6, 7"):
        surgery.plan(recipe(mask(values={0: {0: 0.5}})), model)
    with pytest.raises(SurgeryError, match=r"layer 0 has 7 query heads \(1, 2, 3, 4, 5, 6, 7\), and 8 gates"):
        surgery.plan(recipe(mask(values={0: [1.0] * 8})), model)


def test_heads_left_by_a_measured_pruning_have_the_bases_numbers(surgery, model, text, tmp_path):
    """One recipe; which KV group goes is known only when the model was measured."""
    from surgery import load

    prune = {"op": "prune_heads", "per_layer": 1, "scores": "magnitude", "refit": False}
    (tmp_path / "prune.yaml").write_text(json.dumps(recipe(prune)))
    assert surgery("apply", "prune.yaml", model, "-o", "pruned", "--no-eval", "--no-check").code == 0
    record = json.loads((tmp_path / "pruned" / "surgery.json").read_text())["operations"][0]["record"]
    left = [[head for head in range(9) if head not in removed_heads] for removed_heads in record["removed"]]
    steps = recipe(prune, mask(values={0: [0.0] + [1.0] * 5, 1: [1.0] * 5 + [0.5]}))
    (tmp_path / "both.yaml").write_text(json.dumps(steps))
    assert surgery("apply", "both.yaml", model, "-o", "both", "--no-eval", "--no-check").code == 0
    record = json.loads((tmp_path / "both" / "surgery.json").read_text())["operations"][1]["record"]
    assert [layer["gates"] for layer in record.values()] == [{str(left[0][0]): 0.0}, {str(left[1][5]): 0.5}]
    one, two = (load(tmp_path / name).model.layers[0].self_attn.o_proj.weight for name in ("pruned", "both"))
    assert torch.equal(two[:, 8:], one[:, 8:])
    assert (two[:, :8] == 0).all()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, ["either values or scores"]),
        ({"values": {0: {0: 0}}, "scores": "s.txt"}, ["either values or scores"]),
        ({"values": {0: {0: 0}}, "ratio": 0.5}, ["ratio is for scores"]),
        ({"values": {0: {0: 0}}, "gate": 0.5}, ["gate is for scores"]),
        ({"values": {0: [1.0] * 8}}, ["layer 0 has 9 query heads (0 to 8), and 8 gates"]),
        ({"values": {2: {0: 0}}}, ["there is no layer 2, but 0 to 1"]),
        ({"values": {0: {9: 0}}}, ["layer 0 has no query heads [9]; it has 0 to 8"]),
        ({"values": {0: {0: float("nan")}}}, ["values"]),
        ({"values": {0: {0: float("inf")}}}, ["values"]),
        ({"values": {0: {0: True}}}, ["values"]),
        ({"values": {-1: {0: 1}}}, ["the key -1"]),
        ({"values": {0: {0: 1e41}}}, ["larger than bfloat16 holds"]),
        ({"scores": "s.txt"}, ["scores need ratio"]),
        ({"scores": "s.txt", "ratio": 1.5}, ["ratio"]),
        ({"scores": "none.txt", "ratio": 0.5}, ["no such score file"]),
        ({"scores": "s.txt", "ratio": 0.5}, ["2 x 4 (layers x query heads or KV heads)", "2 x 9 or 2 x 3"]),
        ({"scores": "nan.txt", "ratio": 0.5}, ["NaN"]),
        ({"scores": "other.json", "ratio": 0.5}, ["scores are of another model: org/other"]),
        ({"scores": "nan.txt", "ratio": 0.5, "protect_layers": [2]}, ["protect_layers [2]: there are layers 0 to 1"]),
    ],
)
def test_bad_fields(refused, model, tmp_path, fields, says):
    import yaml

    (tmp_path / "s.txt").write_text("1 2 3 4\n1 2 3 4\n")
    (tmp_path / "nan.txt").write_text("1 nan 3\n1 2 3\n")
    HeadScores("far-mass", [[1.0] * 3] * 2, {"model": {"name": "org/other", "hash": "0" * 12}}).save(
        tmp_path / "other.json"
    )
    (tmp_path / "mask.yaml").write_text(yaml.safe_dump(recipe(mask(**fields))))
    refused("apply", "mask.yaml", model, "-o", "out", says=says)


def test_a_gate_that_overflows_leaves_the_model_as_it_was():
    model = copy.deepcopy(base("llama")).to(torch.float16)
    with pytest.raises(SurgeryError, match="a gate of -1e\\+06 makes the output projection larger than float16"):
        surgery.apply(recipe(mask(values={1: {0: -1e6}})), model)
    stock = copy.deepcopy(base("llama")).to(torch.float16)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), stock.parameters(), strict=True))


def test_a_recipe_written_out_is_the_same_recipe(tmp_path):
    """Keys of a JSON mapping are texts: layers and heads come back as numbers."""
    from surgery.config.recipe import load

    first = load(recipe(mask(values=VALUES)))
    again = load(json.loads(json.dumps(first.to_dict())))
    assert again.operations[0].values == first.operations[0].values == {0: GATES[0], 1: {3: 0.0, 7: 0.1}}
    assert load(recipe(mask(scores="s", ratio=0.5)), ["gate=0.25"]).operations[0].gate == 0.25
