"""The probe `chat`: greedy answers and their likelihood against Transformers' own, what counts, gate and card."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from families import TINY
from readers import Config, Planted, Said
from tokenizers_of_bytes import byte_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

import surgery
from surgery.data.requests import REQUESTS
from surgery.evaluation.answers import goes_in_circles
from surgery.evaluation.paired import few_words
from surgery.evaluation.probes.chat import Chat
from surgery.evaluation.probes.settings import make
from surgery.io.printing import Table
from surgery.report.gate import gate
from surgery.runtime.modeling_surgery import CACHE

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


# --- after a text ---------------------------------------------------------------------------------------------------

SOUND, EMPTY, LOOPS, ENDLESS = (5, 6, 7, 1), (1,), (5, 6) * 40, tuple(range(2, 90))


class Talker(Planted):
    """A planted model: it says one answer to a prompt of fewer than `reach` tokens, another to a longer one."""

    def __init__(self, reach: int, far: tuple[int, ...]):
        self.reach, self.far = reach, far

    def __call__(self, input_ids, use_cache, **cache):
        count = input_ids.shape[1]
        prompt, said = cache.get(CACHE) or (count, 0)
        logits = torch.zeros(1, count, 258)
        if use_cache:
            answer = SOUND if prompt < self.reach else self.far
            logits[0, -1, answer[said] if said < len(answer) else 1] = 30.0
        else:  # whatever is said is as likely
            logits[0, torch.arange(count), input_ids[0].roll(-1)] = 30.0
        return Said(logits, (prompt, said + 1))


@pytest.mark.parametrize(
    ("far", "counts"),
    [
        (SOUND, {"answered": 10, "ended": 10, "loops": 0, "empty": 0}),
        (EMPTY, {"answered": 0, "ended": 10, "loops": 0, "empty": 10}),
        (LOOPS, {"answered": 0, "ended": 0, "loops": 10, "empty": 0}),
        (ENDLESS, {"answered": 0, "ended": 0, "loops": 0, "empty": 0}),
    ],
    ids=["sound", "empty", "loops", "endless"],
)
def test_what_a_model_loses_after_a_text_is_counted_by_its_length(tokenizer, far, counts):
    probe = make("chat", {"lengths": [0, 200, 900], "tokens": 40})
    result = probe.make_cases(tokenizer, {"out": Config()})
    result.outcomes["out"] = probe.run(Talker(700, far), result, lambda done: None)
    base = probe.run(Talker(9999, SOUND), result, lambda done: None)
    result.outcomes = {"base": base, "out": result.outcomes["out"]}
    record = result.to_dict()
    assert [row["length"] for row in record["lengths"]] == [0, 200, 900]
    fine = {"answered": 10, "ended": 10, "loops": 0, "empty": 0}
    for row, expected in zip(record["lengths"], (fine, fine, counts), strict=True):
        assert {key: row["out"][key] for key in counts} == expected
        assert {key: row["base"][key] for key in counts} == fine
        assert (row["kept"]["kept"], row["kept"]["of"]) == (expected["answered"], 10)
    assert (record["kept"]["kept"], record["kept"]["of"]) == (20 + counts["answered"], 30)
    assert [case.get("length", 0) for case in record["cases"]] == [0] * 10 + [200] * 10 + [900] * 10
    assert all(case["text"] <= case["length"] < case["prompt"] for case in record["cases"][10:])
    card = Chat.paragraph(record)
    assert "after 0, 200 or 900 tokens of text" in card
    ends = f"{10 - counts['ended']} of its answers do not end, {counts['loops']} go round in circles"
    said = f"After 900 tokens of text the base answers 10 of 10 and it keeps {counts['answered']}; {ends}"
    assert f"{said}, {counts['empty']} are empty." in card
    assert Chat.sentence(record) == f"chat after 0, 200 or 900 tokens of text kept {20 + counts['answered']} of 30"
    assert [row.name for row in Chat.rows(record)][-1] == "the same after 900 tokens of text"
    lines = Chat.lines(result)
    few = "A cell of 10 requests has no share of its own: 48 make it reportable (requests=FILE with 48 lines)."
    assert few in lines
    table = next(each for each in lines if isinstance(each, Table) and each.headers[0] == "text before")
    assert table.rows[2][0] == "900 tokens"
    assert table.rows[2][2].startswith(f"{counts['answered']} of 10 answered; {counts['ended']} end, ")
    assert table.rows[2][3] == f"{counts['answered']} of 10"


def test_without_a_length_the_probe_is_that_of_short_requests(tokenizer):
    """Prompts to the bit, and the same keys in the record."""
    plain, none, zero = (
        make("chat", given).make_cases(tokenizer, {"out": Config()}) for given in ({}, {"length": 0}, {"lengths": [0]})
    )
    assert plain.cases == none.cases == zero.cases
    assert (
        plain.settings
        == zero.settings
        == {"requests": "ten greetings and short requests", "tokens": 128, "margin": 0.5}
    )
    for case, words in zip(plain.cases, REQUESTS, strict=True):
        message = [{"role": "user", "content": words}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert list(case.prompt) == tokenizer(text, add_special_tokens=False)["input_ids"]
    plain.outcomes["out"] = Chat().run(Talker(9999, SOUND), plain, lambda done: None)
    record = plain.to_dict()
    assert "lengths" not in record
    assert set(record["cases"][0]) == {"request", "out"}
    assert "tokens of text" not in Chat.paragraph(record | {"base": record["out"]})


def test_lengths_in_a_recipe_and_what_a_model_takes():
    config = TINY["llama"](**CONFIG).config
    room = 1024 - 128 - 160
    assert Chat().cuts(config) == {}
    assert Chat(length=room).cuts(config) == {}
    assert Chat(length=4096).cuts(config) == {"length": room}
    assert Chat(lengths=(0, 512, 2048, 4096)).cuts(config) == {"lengths": [0, 512, room]}
    cut = Chat(length=room).make_cases(byte_tokenizer(chat=True), {"out": config})
    assert max(len(case.prompt) for case in cut.cases) + 128 <= 1024, "what is cut fits"
    assert Chat(length=1024).effort.read == 10 * (128 + 2 * 1024)
    assert Chat(length=1024).effort.length == 1024 + 128
    assert Chat().effort == Chat(length=0).effort
    assert Chat.shared({}) == [], "requests alone read no text"
    assert Chat.shared({"length": 512}) == ["text"]
    assert Chat.shared({"length": 512, "text": "builtin"}) == []


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
    refused("eval", base, "--probe", "chat", "length=-1", says=["length should be at least 0; it is -1"])
    refused("eval", base, "--probe", "chat", "lengths=2x", says=["not '2x'", "write 512,2k"])
    refused("eval", base, "--probe", "chat", "lengths=[]", says=["lengths"])
    refused("eval", base, "--probe", "chat", "lengths=[-1]", says=["lengths"])
    refused("eval", base, "--probe", "chat", "length=5", "lengths=5", says=["length and lengths are two ways"])
    refused("eval", base, "--probe", "chat", "length=2000", says=["1024 positions", "or of the text (length)"])
    refused("eval", base, "--probe", "chat", "length=64", "text=none.txt", says=["no such text file"])
    refused("eval", base, "--probe", "chat", "length=64", "text=mine.txt", says=["the text is too short", "length="])
    ran = surgery("eval", "other", "--base", base, "--probe", "chat", "tokens=24", "lengths=0,64")
    assert ran.code == 0, ran.err
    shown = re.search(r"\[(\d+)\] What is the capital of France\?", ran.out.partition("[0] Can you help")[2])
    assert 48 < int(shown[1]) <= 64
    assert "text before" in ran.out
    assert "The text is Python" in ran.out


def test_identity_on_disk(models, tmp_path):
    """A copy of the base, written and read again, keeps every answer."""
    base = saved(models["base"], tmp_path / "base", chat=True)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "copy")
    result = surgery.evaluate(str(tmp_path / "copy"), str(base), probe="chat", tokens=24)
    assert result.compare()["kept"] == result.compare()["of"] > 0


def test_a_record_of_lengths_without_a_base_has_a_paragraph():
    side = {"answered": 3, "of": 10, "share": 0.3, "ended": 6, "loops": 2, "empty": 1}
    settings = {"requests": "ten requests", "tokens": 128, "margin": 0.5, "lengths": [512]}
    rows = [{"length": 512, "out": side, "kept": None}]
    record = {"status": "done", "settings": settings, "out": side, "kept": None, "lengths": rows}
    said = Chat.paragraph(record)
    assert "it answers 3 of 10. An answer counts if it ends and does not go round in circles." in said
    assert "After 512 tokens of text it answers 3 of 10; 4 of its answers do not end, 2 go round in circles" in said
    assert "base" not in said
    assert "None" not in said


def test_few_requests_are_told():
    for cells, says in (
        ([10], "10 requests are few: 48 make the share reportable (more)."),
        ([1], "1 request is few: 48 make the share reportable (more)."),
        ([48, 10], "A cell of 10 requests has no share of its own: 48 make it reportable (more)."),
        ([48, 60], ""),
    ):
        assert few_words(cells, "request", "more") == says
