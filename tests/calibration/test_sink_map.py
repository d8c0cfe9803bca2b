"""`surgery inspect --sinks`: masses, other sinks, values, massive activations, against whole attention maps."""

from __future__ import annotations

import copy

import pytest
import torch
from families import TINY, base, one_thread  # noqa: F401 (a fixture)
from sinks import recipe, sink

import surgery as package
from surgery.calibration.sinks import SinkRules, other_sinks, sink_map, survey_sinks
from surgery.cli.render import sinks as display
from surgery.errors import SurgeryError
from surgery.runtime.modeling_surgery import CACHE

FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2", "gpt_neox", "opt", "phi3", "cohere"]
PADS, LENGTH, ALPHA = (0, 7, 3), 40, 2.0


def padded_sequences(vocabulary: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = torch.randint(3, vocabulary, (len(PADS), LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(sequences)
    for row, pad in enumerate(PADS):
        mask[row, :pad] = 0
    return sequences, mask


def window_of(model, layer: int) -> int | None:
    kinds = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    return window if window and (kinds is None or kinds[layer] == "sliding_attention") else None


@torch.no_grad()
def brute(model, ids: torch.Tensor) -> list[dict]:
    """The same facts of one unpadded text from Transformers' own attention maps and cache, entry by entry."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    outputs = model(input_ids=ids[None], output_attentions=True, use_cache=True)
    n, layers = len(ids), []
    for layer, maps in enumerate(outputs.attentions):
        window, weights = window_of(model, layer) or n, maps[0].double()
        norms = outputs[CACHE].layers[layer].values[0].double().norm(dim=-1)
        figures = {"first": [], "others": [], "sinks": [], "marks": [], "learned": [], "first_value": []}
        for head in range(len(weights)):
            sinks = []
            for j in range(1, n):
                rows = [i for i in range(j, n) if i - j < window]
                if 2 * len(rows) >= min(n, window):
                    mean = sum(weights[head, i, j].item() for i in rows) / len(rows)
                    sinks += [j] if mean > ALPHA / min(n, window) else []
            figures["first"].append(sum(weights[head, i, 0].item() for i in range(1, n)) / (n - 1))
            figures["others"].append(sum(weights[head, i, j].item() for i in range(1, n) for j in sinks) / (n - 1))
            figures["learned"].append(1 - weights[head, 1:].sum().item() / (n - 1))
            figures["sinks"].append(float(len(sinks)))
            figures["marks"].append(sinks)
        if len(norms[0]) == n:  # a sliding layer's cache has dropped the first keys
            figures["first_value"] = [(row[0] / row[1:].median()).item() for row in norms]
        layers.append(figures)
    return layers


@pytest.mark.parametrize("family", FAMILIES)
def test_masses_are_those_of_the_whole_map_and_padding_does_not_move_the_sink(family):
    """A left-padded batch against its rows one by one without padding."""
    model = base(family)
    sequences, mask = padded_sequences()
    rows = [brute(model, sequence[pad:]) for sequence, pad in zip(sequences, PADS, strict=True)]
    for batch in (1, 3):
        sinks = sink_map(model, sequences, mask=mask, rules=SinkRules(ALPHA), batch=batch)
        for layer in range(len(sinks.first)):
            for name in ("first", "others", "sinks"):
                want = torch.tensor([row[layer][name] for row in rows]).mean(0)
                assert (torch.tensor(getattr(sinks, name)[layer]) - want).abs().max() < 1e-4, name
            if all(row[layer]["first_value"] for row in rows):
                want = torch.tensor([row[layer]["first_value"] for row in rows]).mean(0)
                assert (torch.tensor(sinks.first_value[layer]) - want).abs().max() < 1e-4
        marked: dict[int, int] = {}
        for sequence, pad, row in zip(sequences, PADS, rows, strict=True):
            for j in (j for layer in row for head in layer["marks"] for j in head):
                token = sequence[pad + j].item()
                marked[token] = marked.get(token, 0) + 1
        assert {entry["id"]: entry["marks"] for entry in sinks.tokens}.items() <= marked.items()
        assert marked, "no sinks here: the test has no power"
        assert max(marked.values()) == sinks.tokens[0]["marks"]
    if family == "gpt_oss":
        want = torch.tensor([[layer["learned"] for layer in row] for row in rows]).mean(0)
        assert (torch.tensor(sinks.learned) - want).abs().max() < 1e-4
        assert want.min() > 0.01
    else:
        assert sinks.learned is None


def test_the_last_keys_are_not_judged():
    """A head that looks at the token before gives every key a whole weight, and the last keys few queries."""
    total = torch.ones(1, 100)
    marked, judged = other_sinks(total, None, alpha=5.0)
    assert judged.nonzero()[:, 0].tolist() == [*range(1, 51)]
    assert not marked.any()
    assert (total[0] / torch.arange(100, 0, -1) > 0.05).sum() == 19, "by ACT's own rule the last 19 would be sinks"
    assert other_sinks(total, 8, alpha=1.5)[1].nonzero()[:, 0].tolist() == [*range(1, 97)]


def test_massive_activations_are_found_where_they_were_put():
    model = copy.deepcopy(base("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[9, 21] = 5000.0
    sequences, _ = padded_sequences()
    sequences[sequences == 9] = 10
    sequences[0, 12] = sequences[2, 30] = 9
    sinks = sink_map(model, sequences)
    (massive,) = sinks.massive
    assert (massive["channel"], massive["layers"]) == (21, [0, 1])
    assert massive["places"] == [
        {"token": "9", "position": 12, "count": 2},
        {"token": "9", "position": 30, "count": 2},
    ]
    assert massive["magnitude"] == pytest.approx(5000, rel=0.01)
    assert all(entry["channel"] == 21 for entry in sinks.residual)
    with torch.no_grad():
        states = model(input_ids=sequences[:1], output_hidden_states=True).hidden_states[1][0]
    ratio = (states.abs().max() / states.abs().median()).item()
    assert massive["ratio"] >= ratio - 1e-3
    assert sink_map(base("llama"), sequences).massive == []


@torch.no_grad()
def test_norms_of_other_sinks_and_that_the_model_is_left_alone():
    model = base("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sequences, _ = padded_sequences()
    first = sequences[:1]
    measured, rows = sink_map(model, first, rules=SinkRules(ALPHA)), brute(model, first[0])
    values = model(input_ids=first, use_cache=True)[CACHE].layers
    compared = 0
    for layer, figures in enumerate(rows):
        norms = values[layer].values[0].norm(dim=-1)
        for head, sinks in enumerate(figures["marks"]):
            got = measured.other_values[layer][head]
            if not sinks:
                assert got is None
                continue
            want = (norms[head // 2, sinks].mean() / norms[head // 2, 1:].median()).item()
            assert got == pytest.approx(want, rel=1e-4)
            compared += 1
    assert compared
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rated", [None, 9])
def test_sink_rates_are_those_of_whole_attention_maps(family, rated):
    """By the paper's definition, every query counted, entry by entry, for each unpadded text by itself."""
    model, (sequences, mask) = base(family), padded_sequences()
    epsilon, count = 0.15, rated or LENGTH - max(PADS)
    with torch.no_grad():
        measured = sink_map(model, sequences, mask=mask, rules=SinkRules(epsilon=epsilon, rated=rated))
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        texts = [
            eager(input_ids=row[None, pad:], output_attentions=True).attentions
            for row, pad in zip(sequences, PADS, strict=True)
        ]
    assert [len(rates) for rates in measured.rates] == [count] * len(texts[0])
    for layer, rates in enumerate(measured.rates):
        for place, rate in enumerate(rates):
            above = []
            for maps in texts:
                for head in maps[layer][0].double():
                    means = sum(head[query, place].item() for query in range(count)) / (count - place)
                    above.append(means > epsilon)
            assert rate == pytest.approx(sum(above) / len(above))
    assert any(0 < rate < 1 for rates in measured.rates for rate in rates), "no power: all keys alike"


def test_a_sink_rate_of_more_tokens_than_a_text_has():
    model, (sequences, mask) = base("llama"), padded_sequences()
    with pytest.raises(SurgeryError, match="reads the first 34 tokens, and the shortest text has 33"):
        sink_map(model, sequences, mask=mask, rules=SinkRules(rated=34))
    for epsilon in (0.0, 1.0, float("nan"), -1.0):
        with pytest.raises(SurgeryError, match="the threshold of the sink rate is"):
            sink_map(model, sequences, rules=SinkRules(epsilon=epsilon))


def test_what_a_surgery_changed_is_refused():
    split_model = copy.deepcopy(base("llama"))
    package.apply(recipe({"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 5}), split_model)
    with pytest.raises(SurgeryError, match="split already"):
        sink_map(split_model, padded_sequences()[0])
    biased = copy.deepcopy(base("llama"))
    package.apply(recipe(sink("zero_tuning", gamma=2.0)), biased)
    with pytest.raises(SurgeryError, match="measure its base"):
        sink_map(biased, padded_sequences()[0])
    with pytest.raises(SurgeryError, match="padding"):
        sink_map(base("llama"), padded_sequences()[0], mask=torch.tensor([[1, 0, 1] + [1] * 37] * 3))
    with pytest.raises(SurgeryError, match="attention interface"):
        sink_map(TINY["bloom"](), padded_sequences()[0])


def test_the_command(surgery, model, text, tmp_path):
    arguments = ("inspect", model, "--sinks", "--text", text, "--samples", 2, "--length", 60)
    shown = surgery(*arguments, "--plot", "sinks.png")
    assert shown.code == 0, shown.err
    assert "2 texts of 60 tokens" in shown.out
    assert "too short for the paper's rate, which reads 64 tokens" in " ".join(shown.out.split())
    longer = surgery("inspect", model, "--sinks", "--text", text, "--samples", 2, "--length", 80).out
    assert "too short for the paper's rate" not in longer
    assert "has a BOS ('<s>') and does not add it" in shown.out
    assert "wrote sinks.png" in shown.out
    assert (tmp_path / "sinks.png").read_bytes()[:4] == b"\x89PNG"
    assert max(map(len, shown.out.splitlines()[2:6])) <= 80
    data = surgery(*arguments, "--json").json
    assert (data["texts"], data["length"], data["model"]) == (2, 60, "model")
    assert [len(row) for row in data["first"]] == [9, 9]
    assert data["bos"] == {"token": "<s>", "added": False}
    row = next(line.split() for line in shown.out.splitlines() if line.split()[:1] == ["1"])
    assert row[1:3] == [f"{sum(data['first'][1]) / 9:.2f}", f"{max(data['first'][1]):.2f}"]


@pytest.mark.parametrize("rules", [SinkRules(epsilon=1.5), SinkRules(rated=61)])
def test_rules_are_refused_before_the_model_is_loaded(model, text, monkeypatch, rules):
    monkeypatch.setattr("surgery.io.loading.load_for_run", None)
    with pytest.raises(SurgeryError, match="sink rate"):
        survey_sinks(str(model), text=str(text), samples=2, length=60, rules=rules)


def test_a_bos_that_the_tokenizer_adds_or_has_not():
    assert "as the tokenizer adds it" in display.bos({"token": "<s>", "added": True})
    assert "has no BOS" in display.bos({"token": None, "added": False})


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--samples", 2], ["--samples needs --sinks", "add --sinks"]),
        (["--epsilon", 0.2, "--rated", 8], ["--epsilon, --rated need --sinks", "add --sinks"]),
        (["--sinks", "--length", 20, "--rated", 21], ["first 21 tokens", "shortest text has 20"]),
        (["--sinks", "--epsilon", 1.5], ["threshold of the sink rate is 1.5", "between 0 and 1"]),
        (["--sinks", "--heads"], ["use either --heads or --sinks, not both"]),
        (["--sinks", "--scores", "x.json"], ["--scores", "add --heads"]),
        (["--plot", "x.png"], ["--plot needs --heads or --sinks"]),
        (["--sinks", "--plot", "x.txt"], ["x.txt"]),
        (["--sinks", "--samples", 100000], ["too short"]),
    ],
)
def test_bad_options(refused, model, args, says):
    refused("inspect", model, *args, says=says)
