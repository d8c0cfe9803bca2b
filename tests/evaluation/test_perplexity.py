"""Perplexity, KL, agreement and the gate, against direct float64 computations on tiny random models."""

import gc
import json
import math
import weakref

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from surgery.data.text import Text, load_text, windows
from surgery.errors import SurgeryError
from surgery.evaluation.figures import Evaluation
from surgery.evaluation.probes import perplexity as evaluation
from surgery.evaluation.probes.settings import make
from surgery.io import loading as scoring
from surgery.machine.device import free_memory
from surgery.report.gate import gate

VOCABULARY = 300
SIZE = {"windows": 3, "length": 40}


def evaluate(out, base=None, *, tokenizer=None, progress=None, allow_pickle=False, **settings):
    """The probe with these settings, of folders or loaded models."""
    return make("perplexity", settings).measure(
        out, base, tokenizer=tokenizer, progress=progress, allow_pickle=allow_pickle
    )


def make_model(seed: int, vocabulary: int = VOCABULARY, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(sizes | config)))


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte."""
    bytes_ = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    made = []
    for seed, name in enumerate(("base", "out")):
        folder = tmp_path_factory.mktemp(name)
        make_model(seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def direct(folders, tokenizer):
    """Log-probabilities [2, windows, length - 1, vocabulary] in float64 and targets, by the shortest way."""
    pieces = windows(load_text(), tokenizer, length=SIZE["length"], count=SIZE["windows"])
    with torch.no_grad():
        both = [AutoModelForCausalLM.from_pretrained(f)(pieces).logits.double() for f in folders]
    return torch.stack(both).log_softmax(-1)[:, :, :-1], pieces[:, 1:]


def test_whole_vocabulary_is_the_kl_itself(folders, direct):
    logp, targets = direct
    result = evaluate(folders[1], folders[0], top_k=VOCABULARY, **SIZE)
    kl = (logp[0].exp() * (logp[0] - logp[1])).sum(-1)
    assert kl.mean() > 0.1  # two random models do disagree
    assert result.kl["mean"] == pytest.approx(kl.mean().item(), abs=1e-6)
    assert result.kl["p99"] == pytest.approx(kl.flatten().quantile(0.99).item(), abs=1e-5)
    assert result.top1_agreement == pytest.approx((logp[0].argmax(-1) == logp[1].argmax(-1)).double().mean().item())
    for side, own in ((result.base, logp[0]), (result.out, logp[1])):
        loss = -own.gather(-1, targets[..., None]).mean().item()
        assert side.cross_entropy == pytest.approx(loss, abs=1e-6)
        assert side.perplexity == pytest.approx(math.exp(loss), rel=1e-6)


def test_fewer_tokens_give_a_lower_bound(folders, direct):
    logp, _ = direct
    full = (logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean().item()
    found = [evaluate(folders[1], folders[0], top_k=k, **SIZE).kl["mean"] for k in (1, 8, 64, VOCABULARY - 1)]
    assert found == sorted(found)
    assert found[-1] <= full + 1e-6
    # The bucket, by hand: the 8 most probable tokens of the base and one for all the rest.
    top = logp[0].topk(8).indices
    p, q = (own.gather(-1, top).exp() for own in logp)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    assert found[1] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_agrees_with_itself(tmp_path, tokenizer, dtype):
    make_model(0).to(dtype).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = evaluate(tmp_path, tmp_path, top_k=16, **SIZE)
    assert abs(result.kl["mean"]) < 1e-6
    assert abs(result.kl["p99"]) < 1e-6
    assert result.top1_agreement == 1
    assert result.base.perplexity == result.out.perplexity


def test_facts_and_names(folders):
    calls = []
    facts = evaluate(folders[1], str(folders[0]), progress=lambda *args: calls.append(args), **SIZE).to_dict()
    text = load_text()
    assert facts["status"] == "done"
    assert facts["text"] == {"title": text.title, "sha256": text.sha256[:12], "tokens": 3 * 39} | SIZE
    # 2 layers, keys and values, 2 KV heads of 8 channels, 4 bytes
    assert facts["base"]["kv_bytes_per_token"] == facts["out"]["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert facts["out"]["load_bytes"] == (folders[1] / "model.safetensors").stat().st_size
    assert facts["kl"]["top_k"] == VOCABULARY  # 512 asked for, there are no more
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    stages = ["scoring the base"] * 4 + ["scoring the converted model"] * 4
    assert calls == [(i % 4, 3, stage) for i, stage in enumerate(stages)], "each begins with a call"


def test_without_a_base(folders, direct):
    logp, targets = direct
    facts = evaluate(folders[1], **SIZE).to_dict()
    loss = -logp[1].gather(-1, targets[..., None]).mean().item()
    assert facts["out"]["cross_entropy"] == pytest.approx(loss, abs=1e-6)
    assert (facts["base"], facts["kl"], facts["top1_agreement"]) == (None, None, None)
    assert gate(facts, {})[0] == "passed"
    assert gate(facts, {"max_kl": 1.0}) == ("not run", ["max_kl needs the base model to compare with"])


def test_a_text_of_unknown_tokens_is_said_to_be_one(folders, tmp_path):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    model = make_model(0)
    (tmp_path / "known.txt").write_text("the " * 5000)
    (tmp_path / "unknown.txt").write_text("das Haus ist das Haus " * 1000)
    known, unknown = (
        evaluate(model, tokenizer=words, text=str(tmp_path / f"{n}.txt"), **SIZE) for n in ("known", "unknown")
    )
    assert not known.notes
    assert "100% of the scored tokens are unknown to this tokenizer" in unknown.notes[0]


def test_loaded_models(folders, tokenizer):
    base, out = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    out.train()
    loaded = evaluate(out, base, tokenizer=tokenizer, **SIZE)
    assert out.training
    assert not base.training
    saved = evaluate(folders[1], folders[0], **SIZE)
    assert loaded.kl == saved.kl
    assert loaded.out.perplexity == saved.out.perplexity
    assert evaluate(out, folders[0], **SIZE).kl == saved.kl  # the tokenizer comes from the folder
    with pytest.raises(SurgeryError, match="tokenizer=tokenizer"):
        evaluate(out, base, **SIZE)


def test_never_two_models_in_memory(folders, monkeypatch):
    alive, load = [], scoring.load_model

    def watched(folder, **kwargs):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        model = load(folder, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(scoring, "load_model", watched)
    evaluate(folders[1], folders[0], **SIZE)
    assert len(alive) == 2


def test_nan_is_said_not_hidden(folders, tokenizer, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(folders[1])
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    broken.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = evaluate(tmp_path, folders[0], top_k=8, **SIZE)
    assert math.isnan(result.out.perplexity)
    assert math.isnan(result.kl["mean"])
    assert math.isnan(result.kl["p99"])
    facts = result.to_dict()
    assert facts["out"]["nonfinite_tokens"] == 3 * 39
    assert facts["out"]["perplexity"] is None
    json.dumps(facts, allow_nan=False)
    for limits in ({}, {"max_kl": 100.0}, {"max_perplexity_ratio": 100.0}):
        assert gate(facts, limits)[0] == "failed"
    with pytest.raises(SurgeryError, match="base model itself"):
        evaluate(folders[0], tmp_path, **SIZE)


def test_what_does_not_fit_is_not_run(folders, monkeypatch):
    monkeypatch.setattr("surgery.machine.device.free_memory", lambda: 1000)
    monkeypatch.setattr(scoring, "load_model", lambda folder, **kwargs: pytest.fail("loaded all the same"))
    facts = evaluate(folders[1], folders[0], **SIZE).to_dict()
    assert facts["status"] == "not run"
    assert "of memory" in facts["reason"]
    assert facts["out"]["perplexity"] is None
    assert facts["out"]["kv_bytes_per_token"]
    assert gate(facts, {"max_kl": 1.0}) == ("not run", [facts["reason"]])


def test_load_bytes_are_those_that_are_loaded(folders, tmp_path, tokenizer):
    from safetensors.torch import save_file

    model = make_model(0)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    shards = sum(file.stat().st_size for file in tmp_path.glob("model-*.safetensors"))
    save_file({"other": torch.zeros(1000)}, tmp_path / "consolidated.safetensors")
    assert evaluate(tmp_path, **SIZE).out.load_bytes == shards > 0


def test_pickles_are_read_only_of_a_base_and_when_allowed(folders, tmp_path, tokenizer):
    make_model(0).config.save_pretrained(tmp_path)
    torch.save(make_model(0).state_dict(), tmp_path / "pytorch_model.bin")
    tokenizer.save_pretrained(tmp_path)
    for args in ((tmp_path,), (tmp_path, folders[0]), (folders[1], tmp_path)):
        with pytest.raises(SurgeryError, match=r"no model\.safetensors") as caught:
            evaluate(*args, **SIZE)
        assert "--allow-pickle" in caught.value.fix
    allowed = evaluate(folders[1], tmp_path, allow_pickle=True, **SIZE)
    assert allowed.kl == evaluate(folders[1], folders[0], **SIZE).kl
    assert allowed.base.load_bytes == (tmp_path / "pytorch_model.bin").stat().st_size
    with pytest.raises(SurgeryError, match=r"no model\.safetensors"):
        evaluate(tmp_path, folders[1], allow_pickle=True, **SIZE)


def test_free_memory():
    free = free_memory()
    assert free is None or free > 10_000_000


def test_faults_are_named(folders, tokenizer, tmp_path):
    bare = tmp_path / "bare"
    make_model(0).save_pretrained(bare)
    with pytest.raises(SurgeryError, match="no tokenizer files"):
        evaluate(bare, **SIZE)
    with pytest.raises(SurgeryError, match=r"no config\.json"):
        evaluate(tmp_path / "nowhere", **SIZE)
    with pytest.raises(SurgeryError, match="length=64"):
        evaluate(folders[0], length=65)
    with pytest.raises(SurgeryError, match="too short: it has 10 tokens"):
        evaluate(folders[0], text=Text("t", "0" * 64, "ten tokens"), **SIZE)
    with pytest.raises(SurgeryError, match="different vocabularies: 300 and 280"):
        evaluate(make_model(0, 280), folders[0], **SIZE)
    with pytest.raises(SurgeryError, match="the model knows 20"):
        evaluate(make_model(0, 20), tokenizer=tokenizer, **SIZE)


def test_missing_weights_are_not_filled_with_random_ones(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    make_model(0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r"1 weights are missing, the first is model.layers.1.mlp.up_proj"):
        evaluate(tmp_path, **SIZE)
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(SurgeryError):
        evaluate(tmp_path, **SIZE)


def test_gate():
    facts = Evaluation("done", {}, evaluation.Side(2.0, 8.0), evaluation.Side(1.0, 4.0)).to_dict()
    facts |= {"kl": {"mean": 0.5, "p99": 2.0, "top_k": 8}, "top1_agreement": 0.9}
    assert gate(facts, {"max_kl": 0.5, "max_perplexity_ratio": 2.0, "min_top1": 0.9}) == ("passed", [])
    assert gate(facts, {"max_kl": None}) == ("passed", [])
    assert gate(facts, {"max_kl": 0.4, "min_top1": 0.95, "max_perplexity_ratio": 3}) == (
        "failed",
        ["max_kl: 0.5, the limit is 0.4", "min_top1: 0.9, the limit is 0.95"],
    )
    for nan in (math.nan, None):
        assert gate(facts | {"top1_agreement": nan}, {"min_top1": 0.1})[0] == "failed"
    with pytest.raises(SurgeryError, match="use max_kl"):
        gate(facts, {"maxkl": 1})
    for wrong in ("1.0", True, math.nan):
        with pytest.raises(SurgeryError, match="not a number"):
            gate(facts, {"max_kl": wrong})
