"""`surgery try`: what a model answers, its figures, the base beside it, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import edit_tensors
from families import one_thread  # noqa: F401 (a fixture)

import surgery as package
from surgery.errors import SurgeryError
from surgery.evaluation.conversation import reply
from surgery.io.loading import load_model, read_tokenizer

PROMPT = "the cat sat on"


def by_hand(folder, prompt, most) -> list[int]:
    """Greedy tokens, one forward over everything for each."""
    model, tokenizer = load_model(folder).eval(), read_tokenizer(folder)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + most and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_the_answer_is_the_greedy_one_and_its_figures_are_counted(model):
    pieces = []
    found, tokenizer = reply(model, PROMPT, most=6, say=pieces.append), read_tokenizer(model)
    tokens = by_hand(model, PROMPT, 6)
    assert found.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces).split() == found.text.split()
    assert len(pieces) > 1, "it is streamed"
    assert (found.prompt_tokens, found.tokens) == (len(tokenizer(PROMPT)["input_ids"]), len(tokens))
    assert found.cache_bytes == 2 * 2 * 3 * 8 * 2 * (found.prompt_tokens + found.tokens - 1)
    assert found.prompt_seconds > 0
    assert found.tokens_per_second > 0
    assert found.ended is (tokens[-1] == tokenizer.eos_token_id)


def test_a_generation_config_that_draws_is_not_followed(model):
    loaded, tokenizer = load_model(model), read_tokenizer(model)
    loaded.generation_config.update(do_sample=True, temperature=9.0, top_k=5, max_length=7)
    answers = {reply(loaded, PROMPT, tokenizer=tokenizer, most=6).text for _ in range(3)}
    assert answers == {reply(model, PROMPT, most=6).text}
    assert loaded.generation_config.do_sample, "and it is left as it was"


def test_a_message_goes_through_the_chat_template_or_not(model):
    tokenizer = read_tokenizer(model)
    tokenizer.chat_template = "{% for m in messages %}old {{ m.content }} green{% endfor %}"
    loaded = load_model(model)
    assert reply(loaded, PROMPT, tokenizer=tokenizer, most=2).prompt_tokens == len(PROMPT.split()) + 2
    assert reply(loaded, PROMPT, tokenizer=tokenizer, most=2, plain=True).prompt_tokens == len(PROMPT.split())
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(SurgeryError, match="--plain"):
        reply(loaded, PROMPT, tokenizer=tokenizer)


def test_the_command_lets_the_base_answer_first(surgery, model, tmp_path):
    package.apply("streaming", model, output=tmp_path / "out", check=False, evaluate=False, sinks=1, window=3)
    ran = surgery("try", "out", "--base", model, "-p", PROMPT, "--tokens", 5)
    assert ran.code == 0, ran.err
    assert ran.out.index(f"{model}:") < ran.out.index("out:")
    assert ran.out.count("tokens a second; KV cache") == 2
    data = surgery("try", "out", "--base", model, "-p", PROMPT, "--tokens", 5, "--json").json
    base, out = data["answers"]
    assert (base["model"], out["model"], data["prompt"]) == (str(model), "out", PROMPT)
    assert base["text"] in ran.out
    alone = surgery("try", "out", "-p", PROMPT, "--tokens", 5, "--json").json["answers"]
    assert [each["text"] for each in alone] == [out["text"]]


def test_another_base_is_told(surgery, model, tmp_path):
    package.apply("streaming", model, output=tmp_path / "out", check=False, evaluate=False, sinks=1, window=3)
    edit_tensors(shutil.copytree(model, tmp_path / "other"), lambda tensors: next(iter(tensors.values())).add_(1))
    ran = surgery("try", "out", "--base", "other", "-p", PROMPT, "--tokens", 2)
    assert ran.code == 0, ran.err
    assert "note: out may not be made from other: this is not the base it was made from (model)" in ran.err
    package.apply("gqa", model, output=tmp_path / "merged", check=False, evaluate=False, method="mean")
    again = {"check": False, "evaluate": False, "sinks": 1, "window": 3}
    package.apply("streaming", tmp_path / "merged", output=tmp_path / "twice", **again)
    for name in ("out", "twice"):  # the second by way of the first
        assert "note" not in surgery("try", name, "--base", model, "-p", PROMPT, "--tokens", 2).err
    (tmp_path / "out/surgery.json").write_text("{")
    ran = surgery("try", "out", "--base", model, "-p", PROMPT, "--tokens", 2)
    assert ran.code == 0, ran.err
    assert "surgery.json is not JSON" in ran.err


def test_what_cannot_be_asked(refused, model):
    refused("try", model, "-p", "  ", says=["the prompt is empty", "-p "])
    says = ["the model has 1024 positions, prompt and answer have 5004 tokens", "--tokens"]
    refused("try", model, "-p", PROMPT, "--tokens", 5000, says=says)
    refused("try", "./nowhere", "-p", PROMPT, says=["nowhere"])
