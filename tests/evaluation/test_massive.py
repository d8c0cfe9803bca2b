"""The probe `massive`: planted activations are found where they are, and setting them is a forward with a hand-written
hook, in every family; what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import TEXT
from families import (
    TINY,
    base,
    double,
    one_thread,  # noqa: F401 (a fixture)
)
from tokenizers_of_bytes import byte_tokenizer

from surgery.architecture.anatomy import Anatomy
from surgery.calibration.layerwise import decoder_layers
from surgery.calibration.massive import find_massive, massive_set
from surgery.errors import SurgeryError
from surgery.evaluation.probes.massive import MassiveActivations, MassiveResult
from surgery.report.card import render_card

IDS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(3))
IDS[0, 4] = IDS[2, 9] = 77  # a token that has a massive activation where it is not the first
CHANNELS = {"first": (21, 4000.0), "later": (7, -2500.0)}


def plant(model, layer: int = 0):
    """A copy that writes, after a layer, a large value at the first token and at every later token 77."""
    model = double(model)
    blocks, ids = decoder_layers(model, Anatomy.of(model)), []

    def seen(_, args, kwargs):
        ids[:] = [kwargs["input_ids"]]

    def after(_, args, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        channel, value = CHANNELS["first"]
        hidden[:, 0, channel] = value
        channel, value = CHANNELS["later"]
        hidden[..., channel] = torch.where(ids[0] == 77, value, hidden[..., channel])
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    model.register_forward_pre_hook(seen, with_kwargs=True)
    blocks[layer].register_forward_hook(after)
    return model


@pytest.mark.parametrize("name", TINY)
def test_planted_activations_are_found_and_set_in_every_family(name):
    """Setting equals a forward with a hook written by hand, of which the positions are known."""
    model = plant(base(name))
    with torch.no_grad():
        before = [model(input_ids=ids[None], use_cache=False).logits for ids in IDS]
    rule = {"magnitude": 1000.0, "ratio": 500.0}
    massive, largest = find_massive(model, IDS, **rule, name="<{}>".format)
    first, later = sorted(massive, key=lambda each: not each.first)
    assert [(each.channel, each.layer, each.texts, each.count) for each in (first, later)] == [
        (21, 0, 3, 3),
        (7, 0, 2, 2),
    ]
    assert (first.value, later.value) == pytest.approx((4000.0, -2500.0))
    assert later.places == (
        {"token": "<77>", "position": 4, "count": 1},
        {"token": "<77>", "position": 9, "count": 1},
    )
    assert sum(place["count"] for place in first.places) == 3
    assert {place["position"] for place in first.places} == {0}
    assert (largest["channel"], largest["position"]) in ((21, 0), (7, 4), (7, 9))
    assert first.magnitude <= largest["magnitude"] or largest["channel"] != 21

    values = {(21, True): 0.0, (7, False): 33.0}
    with torch.no_grad(), massive_set(model, values, **rule) as counts:
        got = [model(input_ids=ids[None], use_cache=False).logits for ids in IDS]
    assert counts == {(21, True): 3, (7, False): 2}
    by_hand = copy.deepcopy(model)
    row = [0]

    def hook(_, args, out):
        hidden = out[0] if isinstance(out, tuple) else out
        hidden[0, 0, 21] = 0.0
        for text, position in ((0, 4), (2, 9)):
            if row[0] == text:
                hidden[0, position, 7] = 33.0
        return out

    decoder_layers(by_hand, Anatomy.of(by_hand))[0].register_forward_hook(hook)
    for row[0], ids in enumerate(IDS):
        with torch.no_grad():
            want = by_hand(input_ids=ids[None], use_cache=False).logits
        assert torch.allclose(got[row[0]], want, atol=1e-9)
        assert not torch.allclose(want, before[row[0]], atol=1e-3), "no power"
    with torch.no_grad():
        assert all(torch.equal(model(input_ids=ids[None], use_cache=False).logits, one) for ids, one in
                   zip(IDS, before, strict=True)), "the model is as it was"  # fmt: skip


def test_an_activation_is_set_where_it_first_appears_and_only_there():
    """Planted after the second layer of three, with a value that the next layer lifts over the threshold again."""
    model = plant(TINY["llama"](num_hidden_layers=3), layer=1)
    massive, _ = find_massive(model, IDS)
    assert [(each.layer, each.last) for each in massive] == [(1, 2), (1, 2)]
    seen = []
    blocks = decoder_layers(model, Anatomy.of(model))
    with torch.no_grad(), massive_set(model, {(21, True): 500.0}, magnitude=100.0, ratio=50.0) as counts:
        blocks[2].register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        model(input_ids=IDS[1][None], use_cache=False)
    assert counts == {(21, True): 1}
    assert seen[0][0, 0, 21].item() == pytest.approx(500, abs=50), "it was set after layer 1 and not after layer 2"
    with torch.no_grad(), massive_set(model, {}) as counts:
        model(input_ids=IDS[1][None], use_cache=False)
    assert not counts


def test_the_rule():
    """Above the magnitude, and at least the ratio times the median; another channel or token is another kind."""
    model = plant(base("llama"))
    assert len(find_massive(model, IDS, magnitude=3999.0)[0]) == 1
    assert find_massive(model, IDS, magnitude=4100.0)[0] == []
    assert find_massive(model, IDS, ratio=1e9)[0] == []
    assert len(find_massive(model, IDS, most=1)[0]) == 1
    assert find_massive(base("llama"), IDS)[0] == []


# --- the probe ------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.txt").write_text(TEXT)
    return tmp_path / "words.txt"


def probe_model(value: float = 3000.0):
    """A model in which the byte "d" has a massive activation by its embedding."""
    model = TINY["llama"](vocab_size=300, max_position_embeddings=512, tie_word_embeddings=False).eval()
    model.model.embed_tokens.weight.data[byte_tokenizer()("d")["input_ids"][0], 5] = value
    return model


def measured(words, model, against=None, **settings) -> MassiveResult:
    options = {"text": str(words), "samples": 3, "windows": 2, "length": 64} | settings
    return MassiveActivations(**options).measure(model, against, tokenizer=byte_tokenizer())


def test_perplexities_against_transformers_own_loss(words):
    """Every "d" of the scored windows is set by hand, to zero and to the mean over the other windows."""
    model, d = probe_model(), byte_tokenizer()("d")["input_ids"][0]
    result = measured(words, model)
    facts = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    windows = [window.ids for window in result.cases]
    (found,) = facts["out"]["massive"]
    assert (found["channel"], found["first"], found["layer"]) == (5, False, 0)
    assert {place["token"] for place in found["places"]} == {"d"}
    states = [model(input_ids=ids[None], output_hidden_states=True).hidden_states[1][0] for ids in result.samples]
    means = [state[position, 5] for state, ids in zip(states, result.samples, strict=True)
             for position in (ids == d).nonzero()[:, 0] if position]  # fmt: skip
    assert found["count"] == len(means)
    assert found["value"] == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)
    assert not {tuple(ids.tolist()) for ids in windows} & {tuple(ids.tolist()) for ids in result.samples}
    assert facts["out"]["set"]["zero"] == sum(int((ids[1:] == d).sum()) for ids in windows)
    for key, value in (("intact", None), ("zero", 0.0), ("mean", found["value"])):
        wide = double(model)

        read: list[torch.Tensor] = []

        def hook(_, args, out, value=value, read=read):
            hidden = out[0] if isinstance(out, tuple) else out
            if value is not None:
                hidden[0, (read[0] == d) & (torch.arange(64) > 0), 5] = value
            return out

        wide.model.layers[0].register_forward_hook(hook)
        losses = []
        for ids in windows:
            read[:] = [ids]
            with torch.no_grad():
                losses.append(wide(input_ids=ids[None], labels=ids[None]).loss.item())
        assert facts["out"]["perplexity"][key] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)
        assert [case["out"][key] for case in facts["cases"]] == pytest.approx(losses, abs=1e-4)
    figures = facts["out"]["perplexity"]
    assert abs(figures["zero"] / figures["intact"] - 1) > 1e-3, "no power"
    assert "kept" in facts
    assert facts["kept"] is None


def test_a_model_without_them_is_told_so(words, surgery, tmp_path):
    probe_model(0.5).save_pretrained(tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    options = ("--probe", "massive", f"text={words}", "samples=2", "windows=2", "length=64")
    done = surgery("eval", "plain", *options)
    assert done.code == 0, done.err
    assert "No massive activations. The largest activation is" in done.out
    facts = surgery("eval", "plain", *options, "--json").json
    assert (facts["out"]["massive"], list(facts["out"]["perplexity"])) == ([], ["intact"])
    assert facts["out"]["largest"]["ratio"] > 1


def test_base_and_converted_model_and_the_card(words):
    result = measured(words, probe_model(), probe_model())
    assert result.compare() == {"of": 1, "kept": 1, "new": 0}
    facts = result.to_dict()
    assert facts["base"] == facts["out"]
    assert MassiveActivations.sentence(facts) == "massive activations kept 1 of 1"
    text = str(result)
    for words_ in ("set to their mean", "values set", "The converted model keeps 1 of 1 massive activations."):
        assert words_ in text
    done = {"status": "done", "out": {"perplexity": 2.0}, "base": {"perplexity": 2.0}}
    card = render_card({"evaluation": done | {"massive": facts}}, None)
    assert "channel 5 at later tokens from layer 0 on" in card
    assert "| perplexity with massive activations at zero |" in card
    lost = measured(words, probe_model(0.5), probe_model())
    assert lost.compare() == {"of": 1, "kept": 0, "new": 0}
    calls = []
    options = {"text": str(words), "samples": 3, "windows": 2, "length": 64}
    MassiveActivations(**options).measure(
        probe_model(0.5), probe_model(), tokenizer=byte_tokenizer(), progress=lambda *call: calls.append(call[0])
    )
    assert calls == sorted(calls)
    assert calls[-1] == 100


def test_a_recipe_asks_for_it(words, surgery, tmp_path):
    probe_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    block = {"text": "words.txt", "samples": 2, "windows": 2, "length": 64}
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    recipe["evaluate"] = {"text": "words.txt", "windows": 1, "length": 64, "probes": {"massive": block}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    ran = surgery("apply", "r.yaml", "base", "-o", "out", "--no-check", "--no-gate")
    assert ran.code == 0, ran.err
    data = json.loads((tmp_path / "out/surgery.json").read_text())["evaluation"]["massive"]
    assert data["kept"]["of"] == 1
    assert "cases" not in data
    assert "massive activations kept" in ran.out


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("samples=0", ["samples should be at least 1"]),
        ("length=1", ["length should be at least 2"]),
        ("length=4096", ["a shorter length"]),
        ("magnitude=-1", ["magnitude should be at least 0"]),
        ("ratio=.nan", ["ratio should be a finite number"]),
        ("windows=9999", ["the text is too short"]),
        ("text=none.txt", ["no such text file"]),
        ("layer=3", ["unknown key 'layer' of the probe massive"]),
    ],
)
def test_bad_input(words, refused, tmp_path, setting, says):
    probe_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    refused("eval", "base", "--probe", "massive", f"text={words}" if "text" not in setting else setting,
            *([setting] if "text" not in setting else []), says=says)  # fmt: skip


def test_a_model_that_gives_nan(words):
    """As the converted model it is noted and has no figure; as the base it is refused."""
    broken = probe_model()
    broken.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    result = measured(words, broken, probe_model())
    facts = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert facts["out"]["perplexity"]["intact"] is None
    assert any("NaN or infinite values for 2 of 2 windows" in note for note in result.notes)
    assert "not finite" in str(result)
    with pytest.raises(SurgeryError, match="the base model itself gives NaN"):
        measured(words, probe_model(), broken)
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    assert find_massive(broken, IDS) == ([], {})
    assert "No massive activations." in str(measured(words, broken))
