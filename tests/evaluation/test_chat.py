"""The probe `chat`: greedy answers and their likelihood against Transformers' own, what counts, gate and card."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import TINY
from tokenizers_of_bytes import byte_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

import surgery
from surgery.data.requests import REQUESTS
from surgery.evaluation.answers import goes_in_circles
from surgery.evaluation.probes.chat import Chat
from surgery.report.gate import gate

CONFIG = {"vocab_size": 300, "max_position_embeddings": 1024, "tie_word_embeddings": False}
ENDS = {1, *range(0, 300, 3)}  # so many tokens end an answer that a random model ends its own


@pytest.fixture(scope="module")
def models():
    """A base that answers, one that answers otherwise, and one that never ends."""
    base, other, endless = (TINY["llama"](**CONFIG).eval() for _ in range(3))
    torch.manual_seed(0)
    base.lm_head.weight.data = torch.randn_like(base.lm_head.weight)
    other.load_state_dict(base.state_dict())
    endless.load_state_dict(base.state_dict())
    torch.manual_seed(1)
    other.lm_head.weight.data = torch.randn_like(other.lm_head.weight)
    prompt = byte_tokenizer(chat=True).apply_chat_template(
        [{"role": "user", "content": "Hello!"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([byte_tokenizer()(prompt)["input_ids"]])
    for model in (base, other):  # all prompts end alike, and so begin all answers
        ends = ENDS - {int(model(input_ids=ids).logits[0, -1].argmax())}
        model.generation_config.eos_token_id = sorted(ends)
    endless.generation_config.eos_token_id = 1
    return {"base": base, "other": other, "endless": endless}


@pytest.fixture
def tokenizer():
    return byte_tokenizer(chat=True)


def repeats(ids: list[int]) -> bool:
    """By definition: every block size, every place."""
    for size in range(1, 33):
        for times in range(3, len(ids) // size + 1):
            if times * size >= 12:
                for start in range(len(ids) - times * size + 1):
                    block = ids[start : start + size]
                    if ids[start : start + times * size] == block * times:
                        return True
    return False


def test_circles():
    draw = torch.Generator().manual_seed(0)
    for letters, length in [(2, 30), (2, 14), (3, 40), (6, 60), (2, 11)]:
        for _ in range(40):
            ids = torch.randint(letters, (length,), generator=draw).tolist()
            assert goes_in_circles(ids) == repeats(ids)
    sentence = list(range(20))
    assert goes_in_circles([7, 8, *sentence * 3, 5])
    assert not goes_in_circles([*sentence * 2, *sentence[:19]])
    assert goes_in_circles([5] * 12)
    assert not goes_in_circles([5] * 11)
    assert not goes_in_circles([])


def test_answers_and_likelihoods(models, tokenizer):
    """Greedy decoding is Transformers' own; the likelihood is its loss, in float64."""
    base, other = models["base"], models["other"]
    result = Chat(tokens=24).measure(other, base, tokenizer=tokenizer)
    exact = TINY["llama"](**CONFIG).double().eval()
    exact.load_state_dict(base.state_dict())
    for label, model in (("base", base), ("out", other)):
        ends = model.generation_config.eos_token_id
        settings = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=ends, pad_token_id=0)
        for words, answer in zip(REQUESTS, result.outcomes[label], strict=True):
            message = [{"role": "user", "content": words}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")
            prompt = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
            whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
            assert whole[0, prompt.shape[1] :].tolist() == list(answer.ids)
            labels = whole.clone()
            labels[:, : prompt.shape[1]] = -100
            assert answer.nll == pytest.approx(exact(input_ids=whole, labels=labels).loss.item(), abs=1e-4)
            assert answer.ended == (answer.ids[-1] in ends)


def test_what_counts(models, tokenizer):
    base = models["base"]
    same = Chat(tokens=24).measure(base, base, tokenizer=tokenizer)
    kept = same.compare()
    assert kept["of"] > 0
    assert kept["kept"] == kept["of"] == same.side("base")["answered"]
    assert same.about() == {}
    alone = Chat(tokens=24).measure(base, tokenizer=tokenizer)
    assert alone.side("out")["answered"] == same.side("out")["answered"], "without a base, what ends counts"

    other = Chat(tokens=24, margin=0.0).measure(models["other"], base, tokenizer=tokenizer)
    for index, answered in enumerate(other.answered("out")):
        answer, own = other.outcomes["out"][index], other.outcomes["base"][index]
        assert answered == (answer.sound and answer.nll <= own.nll)
    assert other.compare()["kept"] < other.compare()["of"]
    assert other.about()["example"]["request"] in REQUESTS

    endless = Chat(tokens=24).measure(models["endless"], base, tokenizer=tokenizer)
    assert endless.compare()["kept"] == 0
    assert endless.side("out")["ended"] == 0


def test_a_model_that_gives_nan(models, tokenizer):
    broken = TINY["llama"](**CONFIG)
    broken.lm_head.weight.data.fill_(math.nan)
    result = Chat(tokens=4).measure(broken, models["base"], tokenizer=tokenizer)
    assert result.compare()["kept"] == 0
    assert "NaN or infinite values for 10 of 10 requests" in result.notes[0]
    assert json.dumps(result.to_dict(), allow_nan=False)
    with pytest.raises(surgery.SurgeryError, match="the base model itself gives NaN"):
        Chat(tokens=4).measure(models["base"], broken, tokenizer=tokenizer)


def saved(model, folder, chat: bool):
    model.save_pretrained(folder)
    byte_tokenizer(chat=chat).save_pretrained(folder)
    return folder


RECIPE = {
    "version": 1,
    "name": "chat",
    "operations": [{"op": "gqa", "kv_heads": 1, "method": "random"}],
    "evaluate": {"windows": 1, "length": 64, "probes": {"chat": {"tokens": 24, "margin": 0.0, "min_chat": 0.9}}},
}


def test_gate_and_card(models, tmp_path):
    base = saved(models["base"], tmp_path / "base", chat=True)
    report = surgery.apply(RECIPE, str(base), output=tmp_path / "out", check=False)
    record = report.data["evaluation"]["chat"]
    assert record["requests"] == 10
    assert "cases" not in record
    status, reasons = gate(report.data["evaluation"], {"min_chat": 0.9})
    assert (status, report.gate) == ("failed", "failed")
    assert reasons[0].startswith("min_chat: ")
    card = (tmp_path / "out/README.md").read_text()
    assert "greetings and short requests answered, share" in card
    assert "Chat (ten greetings and short requests" in card
    assert record["example"]["request"] in card


def test_a_model_without_a_template_is_not_asked(models, tmp_path, surgery):
    """A base model is judged by the rest of the gate."""
    base = saved(models["base"], tmp_path / "base", chat=False)
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
    ran = surgery("apply", "r.yaml", base, "-o", "out", "--no-check")
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "out/surgery.json").read_text())
    assert record["evaluation"]["chat"] == {"status": "not asked", "reason": "the tokenizer has no chat template"}
    assert record["gate"]["status"] == "passed"
    assert "Chat" not in (tmp_path / "out/README.md").read_text()


def test_the_command(models, tmp_path, surgery, refused):
    base = saved(models["base"], tmp_path / "base", chat=True)
    saved(models["other"], tmp_path / "other", chat=True)
    ran = surgery("eval", "other", "--base", base, "--probe", "chat", "tokens=24")
    assert ran.code == 0, ran.err
    assert "What is the capital of France?" in ran.out
    assert "go round in circles" in ran.out
    (tmp_path / "mine.txt").write_text("Hi\n\n  What now?  \n")
    ran = surgery("eval", base, "--probe", "chat", "tokens=24", "requests=mine.txt", "--json")
    assert [case["request"] for case in ran.json["cases"]] == ["Hi", "What now?"]
    assert ran.json["settings"]["requests"] == "mine.txt"
    plain = saved(models["base"], tmp_path / "plain", chat=False)
    refused("eval", plain, "--probe", "chat", says=["this tokenizer has no chat template"])
    refused("eval", base, "--probe", "chat", "tokens=0", says=["tokens", "at least 1"])
    refused("eval", base, "--probe", "chat", "margin=-1", says=["margin", "at least 0"])
    refused("eval", base, "--probe", "chat", "tokens=2000", says=["fewer tokens for an answer"])
    refused("eval", base, "--probe", "chat", "requests=none.txt", says=["no such text file"])


def test_identity_on_disk(models, tmp_path):
    """A copy of the base, written and read again, keeps every answer."""
    base = saved(models["base"], tmp_path / "base", chat=True)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "copy")
    result = surgery.evaluate(str(tmp_path / "copy"), str(base), probe="chat", tokens=24)
    assert result.compare()["kept"] == result.compare()["of"] > 0
