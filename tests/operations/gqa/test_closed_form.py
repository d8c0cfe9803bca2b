"""method: closed_form on whole models: every family, planted structure, both models' states, resuming, refusals."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from closed_form import SEQUENCES, Stopped, Tokens, closed, numbers, recipe, same, stop, weights  # noqa: F401
from families import (
    CONVERTIBLE,
    OFF_THE_INTERFACE,
    TINY,
    attention_modules,
    base,
    check_both_ways_to_load,
    difference,
    kv_heads_of,
    layers_of,
    logits_of,
    one_thread,  # noqa: F401
)
from planted import planted
from tokenizers_of_bytes import byte_tokenizer

import surgery as package
from surgery.architecture.anatomy import Anatomy
from surgery.calibration.closed_form.fit_mlp import projection_of
from surgery.calibration.closed_form.layer_inputs import FitSettings
from surgery.data.calibration_text import calibration_sequences, calibration_source, with_repeats
from surgery.data.text import CalibrationText, is_validation, load_text, windows
from surgery.errors import SurgeryError
from surgery.io.resume import LayerFiles
from surgery.operations.gqa.layer import SharedLayer, Sharing

FAMILIES = [
    name
    for name in CONVERTIBLE
    if not (anatomy := Anatomy.of(TINY[name]())).composite
    and anatomy.layers[0].layout.interface
    and name not in ("olmo2", "falcon_old", "falcon_alibi", "falcon_multi_query")  # the last three: no 2 KV heads
]


def one_text(numbers) -> None:
    """The text becomes one sequence twelve times: what is held back is what is fitted, so that every fit is kept."""
    numbers.write_text(" ".join(map(str, SEQUENCES[0].repeat(12).tolist())), "utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_turned_copies_merge_without_loss(name, numbers):
    """4 KV heads of which two are turned copies of the others → 2: the same logits, where the mean is far off."""
    old = planted(name)
    closed_form, mean = copy.deepcopy(old), copy.deepcopy(old)
    report = package.apply(recipe(closed(numbers, 2, grouping="similarity")), closed_form, tokenizer=Tokens())
    package.apply(recipe({"op": "gqa", "kv_heads": 2, "grouping": "similarity"}), mean)
    assert report.data["tier"] == "native"
    assert kv_heads_of(closed_form) == 2
    want = logits_of(old)
    assert difference(logits_of(closed_form), want) <= 1e-3
    assert difference(logits_of(mean), want) >= 0.05


def test_the_command(surgery, model, text):
    """Plan, convert, and what is kept: facts of every layer, no file of the measurement."""
    small = ("kv_heads=1", "calibration_samples=4", "calibration_length=64", f"calibration_text={text}")
    plan = surgery("plan", "gqa", model, *small)
    assert plan.code == 0
    assert "KV heads 3 → 1 in 2 layers (closed form)" in plan.out
    assert "fitted on 256 tokens of text; refitted after the merge: q, k, v, o and mlp" in plan.out
    done = surgery("apply", "gqa", model, "-o", "out", *small, "--no-eval")
    assert done.code == 0, done.err
    report = json.loads(Path("out/surgery.json").read_text(encoding="utf-8"))
    assert report["engine"] == "loaded"
    assert report["check"]["passed"]
    records = report["operations"][0]["record"]
    assert records.pop("calibration")["sha256"] == hashlib.sha256(Path(text).read_bytes()).hexdigest()[:12]
    assert len(records) == 2
    for record in records.values():
        # Of every fit before and after, on text held back: none may make it worse.
        for losses in (
            *record["scores_lost"],
            record["values_fit"],
            record["output_lost"][:2],
            record["output_lost"][2:],
            record["mlp_fit"],
        ):
            assert losses == sorted(losses, reverse=True)
        assert 0 < record["keys_lost"] < 1
        assert 0 < record["values_lost"] < 1
    assert not [*Path("out").glob("*.state")]
    again = surgery("apply", "gqa", model, "-o", "again", *small, "--no-eval", "--no-check")
    assert again.code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def states_of_the_last_layer(model, sequences=SEQUENCES) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states before and after it."""
    block, states = model.get_submodule(Anatomy.of(model).layers[-1].path.rpartition(".")[0]), []

    def hook(_, args, kwargs, out):
        states.extend((args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out))

    handle = block.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=sequences, use_cache=False)
    handle.remove()
    return tuple(states)


@pytest.mark.parametrize(
    "name", ["llama_bias", "qwen2", "phi3", "gemma2", "gpt_oss", "cohere", "stablelm", "cohere_qk_norm", "gemma3"]
)
def test_the_streams_are_those_of_the_base_and_of_the_converted_model(name, numbers):
    """What later layers are fitted to is what the new model really gives: windows, caps, sinks, norms, biases."""
    model = copy.deepcopy(base(name))
    targets = Anatomy.of(model).with_kv_heads(2).layers
    before = weights(model)
    run = Sharing(model, targets, SEQUENCES, FitSettings())
    run.layers()
    assert same(before, weights(model))
    package.apply(recipe(closed(numbers, 2)), model, tokenizer=Tokens())
    _, after = states_of_the_last_layer(base(name))
    reached = states_of_the_last_layer(model)[name != "gpt_oss"]  # behind the last layer, if its MLP is refitted
    for states, want in ((run.states.base, after), (run.states.converted, reached)):
        assert (torch.cat(states) - want).abs().max() <= 2e-4 * want.abs().max()
    assert (torch.cat(run.states.base) - torch.cat(run.states.converted)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "qwen3"])
def test_half_precision_is_measured_in_float32_and_left_as_it_was(name, numbers):
    step = closed(numbers, 2, refit=["q", "k", "v"])  # in others a rounding decides here whether a ridge is kept
    model = copy.deepcopy(base(name)).to(torch.bfloat16)
    before = weights(model)
    with pytest.raises(Stopped):
        package.apply(recipe(step), model, tokenizer=Tokens(), progress=stop)
    assert same(before, weights(model))
    package.apply(recipe(step), model, tokenizer=Tokens())
    after = weights(model)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    fitted = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
    assert all(torch.equal(before[n], tensor) for n, tensor in after.items() if not any(f in n for f in fitted))
    wide = copy.deepcopy(base(name)).to(torch.bfloat16).float()  # the same weights, stored in float32
    package.apply(recipe(step), wide, tokenizer=Tokens())
    assert difference(logits_of(model.float()), logits_of(wide)) < 0.15


def test_an_error_leaves_heads_in_their_order(numbers):
    model = copy.deepcopy(planted("llama"))
    before = weights(model)
    with pytest.raises(Stopped):
        package.apply(recipe(closed(numbers, 2, grouping="similarity")), model, tokenizer=Tokens(), progress=stop)
    assert same(before, weights(model))


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    for name in ("llama_bias", "qwen3"):
        targets, converted = Anatomy.of(base(name)).with_kv_heads(1).layers, []

        def run(files, progress=None, name=name, targets=targets, converted=converted):
            def save(index, *given):
                converted.append(index)
                files.save(index, *given)

            return Sharing(copy.deepcopy(base(name)), targets, SEQUENCES, FitSettings(), files.load, save).layers(
                progress
            )

        complete, records = run(LayerFiles(None, "x", name))
        with pytest.raises(Stopped):
            run(LayerFiles(tmp_path, "x", name), stop)
        assert converted == [0, 1, 0]
        again, known_records = run(LayerFiles(tmp_path, "x", name))
        assert converted == [0, 1, 0, 1]
        assert known_records == records
        assert all(same(one, two) for one, two in zip(complete, again, strict=True))
        run(LayerFiles(tmp_path, "x", f"{name}, other settings"))
        assert converted == [0, 1, 0, 1, 0, 1]


def test_a_list_of_kv_heads_through_both_doors(numbers, tmp_path):
    """Layers of 2 and 4 KV heads: the one that keeps its heads keeps its bits."""
    models = {}
    for name in ("llama", "qwen2"):
        model = copy.deepcopy(base(name))
        report = package.apply(recipe(closed(numbers, [2, kv_heads_of(model)])), model, tokenizer=Tokens())
        assert report.data["tier"] == "surgical"
        kept_layer, old = attention_modules(model)[1], attention_modules(base(name))[1]
        assert same(kept_layer.state_dict(), old.state_dict())
        assert len(layers_of(report.data)) == 1
        models[tmp_path / name] = model
    check_both_ways_to_load(models, tmp_path)


def test_all_kv_heads_is_the_base_and_needs_no_text():
    model = copy.deepcopy(base("llama"))
    package.apply(recipe(closed("builtin", kv_heads_of(model))), model)
    assert same(weights(model), weights(base("llama")))


def test_settings_change_what_is_fitted(numbers):
    """Without refits queries are only scaled and turned; every refit changes its own projection."""
    one_text(numbers)
    fits = {}
    for refit in ([], ["o"], ["q"], ["k"], ["k", "q"]):
        model = copy.deepcopy(base("llama"))
        report = package.apply(recipe(closed(numbers, 1, refit=refit)), model, tokenizer=Tokens())
        fits[tuple(refit)] = attention_modules(model)[0], layers_of(report.data)
    plain, _ = fits[()]
    for refit, (module, _) in fits.items():
        assert torch.equal(module.v_proj.weight, plain.v_proj.weight)
        assert torch.equal(module.q_proj.weight, plain.q_proj.weight) == ("q" not in refit)
        assert torch.equal(module.k_proj.weight, plain.k_proj.weight) == ("k" not in refit)
    old = attention_modules(base("llama"))[0].q_proj.weight.double().view(8, 2, 4, -1)  # pairs (i, i + 4)
    new = plain.q_proj.weight.double().view(8, 2, 4, -1)
    ratio = torch.complex(new[:, 0], new[:, 1]) / torch.complex(old[:, 0], old[:, 1])
    assert (ratio - ratio.mean(-1, keepdim=True)).abs().max() <= 1e-3 * ratio.abs().max()
    default, sequential = copy.deepcopy(base("llama")), copy.deepcopy(base("llama"))
    package.apply(recipe(closed(numbers, 1)), default, tokenizer=Tokens())
    package.apply(recipe(closed(numbers, 1, sequential=True)), sequential, tokenizer=Tokens())
    first, second = zip(*(attention_modules(model) for model in (default, sequential)), strict=True)
    assert same(first[0].state_dict(), first[1].state_dict()), "the first layer's input is the base's either way"
    assert not torch.equal(second[0].o_proj.weight, second[1].o_proj.weight)
    plain = copy.deepcopy(base("llama"))
    package.apply(recipe(closed(numbers, 1, refit=["q", "k", "v", "o"])), plain, tokenizer=Tokens())
    changed = {name for name, tensor in weights(default).items() if not torch.equal(tensor, weights(plain)[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}, "attention is the same"
    fixed = copy.deepcopy(base("llama"))
    report = package.apply(recipe(closed(numbers, 1, ridge=0.25)), fixed, tokenizer=Tokens())
    assert {record["ridge"] for record in layers_of(report.data).values()} <= {0.25, None}


def mlp_output(model):
    names = ("down_proj", "fc2", "c_proj")
    return [module for name, module in model.named_modules() if "mlp" in name and name.endswith(names)][-1]


def states_at_the_mlp(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the last layer, first sequence: what its MLP gives its output projection, what that writes, the state."""
    captured = []
    handle = mlp_output(model).register_forward_hook(lambda _, args, out: captured.extend((args[0], out)))
    state = states_of_the_last_layer(model, SEQUENCES[:1])[1]
    handle.remove()
    return captured[0].double(), captured[1].double(), state.double()


@pytest.mark.parametrize("name", ["llama_bias", "starcoder2", "granite", "phi"])
def test_the_refit_of_the_mlp_is_least_squares_on_the_models_own_states(name, numbers):
    """Its last layer against `lstsq`: rows that say what the base's state lacks, and rows that pull to the old one."""
    one_text(numbers)
    old, model = base(name), copy.deepcopy(base(name))
    report = package.apply(recipe(closed(numbers, 2, ridge=0.01)), model, tokenizer=Tokens())
    assert list(layers_of(report.data).values())[-1]["mlp_ridge"] == 0.01
    z, written, state = states_at_the_mlp(model)
    target = states_of_the_last_layer(old, SEQUENCES[:1])[1].double()
    module, before = mlp_output(model), mlp_output(old)
    lacks = (target - state) / getattr(model.config, "residual_multiplier", 1.0)
    wanted = lacks + written - (0 if module.bias is None else module.bias.double())
    new, kept = module.weight.double(), before.weight.double()
    unfitted = state + getattr(model.config, "residual_multiplier", 1.0) * (z @ (kept - new).T)
    weight = 1 / torch.maximum(target.square().mean(-1), unfitted.square().mean(-1))
    weight[:, 0] *= 20
    root = weight.sqrt().unsqueeze(-1)
    left, right = (root * z).flatten(0, 1), (root * wanted).flatten(0, 1)
    pull = (0.01 * left.square().sum(0).mean()).sqrt() * torch.eye(z.shape[-1], dtype=torch.float64)
    want = torch.linalg.lstsq(torch.cat([left, pull]), torch.cat([right, pull @ before.weight.double().T])).solution.T
    assert (want - before.weight).abs().max() > 0.05 * want.abs().max()
    assert (module.weight - want).abs().max() <= 2e-3 * want.abs().max()


def test_a_layer_whose_mlp_writes_through_a_norm_keeps_its_mlp(numbers):
    model = copy.deepcopy(base("gemma2"))
    report = package.apply(recipe(closed(numbers, 2)), model, tokenizer=Tokens())
    assert all("mlp_fit" not in record for record in layers_of(report.data).values())
    old, new = weights(base("gemma2")), weights(model)
    assert all(torch.equal(old[name], tensor) for name, tensor in new.items() if "mlp" in name)


def test_experts_are_no_plain_mlp():
    for name, name_of_projection in (
        ("mixtral", None),
        ("llama", "mlp.down_proj"),
        ("phi", "mlp.fc2"),
        ("gpt2", "mlp.c_proj"),
    ):
        model = base(name)
        layer = Anatomy.of(model).layers[0]
        block = model.get_submodule(layer.path.rpartition(".")[0])
        module = model.get_submodule(layer.path)
        assert projection_of(block, module, module.get_submodule(layer.layout.o)) == name_of_projection


def test_half_of_a_mixed_text_is_the_models_own(model, tmp_path, monkeypatch):
    """The first half is the built-in text's calibration part, the second what the model writes, kept for --resume."""
    from transformers import AutoTokenizer

    tokenizer, loaded = AutoTokenizer.from_pretrained(model), package.load(model)
    loaded.train()
    builtin = calibration_sequences(loaded, tokenizer, "builtin", 32, 3)
    own = calibration_sequences(loaded, tokenizer, "self", 32, 3, tmp_path)
    assert own.shape == builtin.shape == (3, 32)
    assert loaded.training
    assert torch.equal(calibration_sequences(loaded, tokenizer, "mixed", 32, 6), torch.cat([builtin, own]))
    monkeypatch.setattr("surgery.data.generated._write", None)  # what is kept is not written again
    assert torch.equal(calibration_sequences(loaded, tokenizer, "self", 32, 3, tmp_path), own)


CONVERSATION = (
    "{% for m in messages %}cat dog {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}sat{% endif %}"
)


def test_half_of_what_the_model_writes_for_conversations_is_conversations(model, tmp_path, monkeypatch):
    """They come last, the first begins a sample, and a resumed run finds them beside the running text."""
    from transformers import AutoTokenizer

    tokenizer, loaded, done = AutoTokenizer.from_pretrained(model), package.load(model), []
    plain = calibration_sequences(loaded, tokenizer, "self", 32, 2)
    mixed = calibration_sequences(loaded, tokenizer, "mixed", 32, 8)
    tokenizer.chat_template = CONVERSATION
    assert torch.equal(calibration_sequences(loaded, tokenizer, "mixed", 32, 8), mixed)

    def report(*args):
        done.append(args)

    text = calibration_sequences(loaded, tokenizer, "conversations", 32, 8, tmp_path, report)
    turn = tokenizer("cat dog", add_special_tokens=False)["input_ids"]
    assert torch.equal(text[:4], mixed[:4])
    assert torch.equal(text[4:6], plain)
    assert text[6, : len(turn)].tolist() == turn
    assert {total for _, total, _ in done} == {4 * 32}
    assert [count for count, *_ in done] == sorted(count for count, *_ in done)
    assert done[-1][0] == 4 * 32
    monkeypatch.setattr("surgery.data.generated._write", None)
    assert torch.equal(calibration_sequences(loaded, tokenizer, "conversations", 32, 8, tmp_path), text)
    source = calibration_source("conversations", 8)["text"]
    assert source.endswith(", and as much that the model writes (2 samples of text, 2 of conversations)")
    assert calibration_source("mixed", 8)["text"].endswith(", and as much that the model writes")


def test_a_share_of_the_samples_repeats_itself(model):
    """The others stay as they were, in their order, and no text is in both. A fit holds back the same share."""
    loaded, tokenizer, length = package.load(model), byte_tokenizer(), 96
    plain = calibration_sequences(loaded, tokenizer, "builtin", length, 12)
    text = with_repeats(plain, tokenizer, CalibrationText("builtin", length, 12, 0.25))
    assert torch.equal(text, with_repeats(plain, tokenizer, CalibrationText("builtin", length, 12, 0.25)))
    places = [next((at for at, row in enumerate(plain) if torch.equal(row, sample)), None) for sample in text]
    rows = [index for index, place in enumerate(places) if place is None]
    others = [place for place in places if place is not None]
    assert len(text) in (11, 12)
    assert len(rows) == 3
    assert others == sorted(others)
    assert [is_validation(row, len(text)) for row in rows].count(True) == 1
    made = "".join(tokenizer.decode(text[row]) for row in rows)
    assert not any(tokenizer.decode(plain[place])[20:60] in made for place in others)
    for row in rows:  # a stretch of 8 tokens at least is there twice
        stretches = [tuple(text[row][first : first + 8].tolist()) for first in range(length - 7)]
        assert len(set(stretches)) < len(stretches)
    with pytest.raises(SurgeryError, match=r"too short for calibration_recall(.|\n)*more calibration_samples, or"):
        with_repeats(plain[:1, :64], tokenizer, CalibrationText("builtin", 64, 1, 0.5))


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("bos", [False, True])
def test_rows_that_repeat_are_held_back_in_their_share(share, bos):
    """Of 40 samples six are. Conversations, the last ten of them, stay whole."""
    tokenizer = byte_tokenizer(bos=bos)
    plain = windows(load_text("builtin", "calibration"), tokenizer, 96, 40)
    text = with_repeats(plain, tokenizer, CalibrationText("conversations", 96, 40, share))
    whole = {tuple(row.tolist()) for row in plain}
    made = [index for index, row in enumerate(text) if tuple(row.tolist()) not in whole]
    assert len(made) == round(share * 40)
    assert text.shape[1] == 96
    assert 36 <= len(text) <= 40
    held_back = sum(is_validation(index, len(text)) for index in made)
    assert abs(held_back - 6 * share) <= 1
    assert held_back > 0
    kept = [tuple(row.tolist()) for row in text]
    assert [kept.index(tuple(row.tolist())) for row in plain[30:]] == sorted(
        kept.index(tuple(row.tolist())) for row in plain[30:]
    )
    if bos:
        assert (text[:, 0] == tokenizer.bos_token_id).all()


def test_conversations_without_a_template_that_serves_is_refused(model):
    from transformers import AutoTokenizer

    tokenizer, loaded = AutoTokenizer.from_pretrained(model), package.load(model)
    for tokenizer.chat_template, says in ((None, "no chat template"), (CONVERSATION, "alone takes 4 of 7 tokens")):
        with pytest.raises(SurgeryError, match=f"calibration_text: conversations: .*{says}(.|\\n)*mixed needs no"):
            calibration_sequences(loaded, tokenizer, "conversations", 7, 4)
    assert calibration_sequences(loaded, tokenizer, "conversations", 8, 3).shape == (3, 8)
    assert calibration_sequences(loaded, tokenizer, "conversations", 8, 1).shape == (1, 8)


def test_refusals(numbers):
    interface = "falcon_old" not in OFF_THE_INTERFACE  # since Transformers 5.25
    cases = [
        ("olmo2", {}, "the QK-norm of olmo2 spans all heads: use method: mean"),
        ("falcon_alibi", {"kv_heads": 1}, "has ALiBi" if interface else "does not use the attention interface"),
        ("llama", {"align": "procrustes"}, "drop align"),
        ("llama", {"refit": ["o", "o"]}, "refit names a projection twice: o, o"),
    ]
    for name, fields, says in cases:
        with pytest.raises(SurgeryError, match=says):
            package.plan(recipe(closed(numbers, 2) | fields), base(name))
    with pytest.raises(SurgeryError, match="needs the tokenizer"):
        package.apply(recipe(closed(numbers, 2)), copy.deepcopy(base("llama")))
    notes = package.plan(recipe(closed(numbers, 2)), base("qwen3")).notes
    assert any("one key head stays as it is" in note for note in notes)
    assert not package.plan(recipe(closed(numbers, 2)), base("llama")).streams
    assert package.plan(recipe({"op": "gqa", "kv_heads": 2}), base("llama")).streams


def test_a_number_that_does_not_divide(numbers):
    """4 KV heads of 8 query heads cannot become 3; of 12 they can, and old heads enter two groups."""
    from families import COMMON, build

    old = build("Llama", seed=1, **COMMON | {"hidden_size": 96, "num_attention_heads": 12}, num_key_value_heads=4)
    model, mean = copy.deepcopy(old), copy.deepcopy(old)
    package.apply(recipe(closed(numbers, 3)), model, tokenizer=Tokens())
    package.apply(recipe({"op": "gqa", "kv_heads": 3}), mean)
    want = logits_of(old, SEQUENCES)
    assert difference(logits_of(model, SEQUENCES), want) < difference(logits_of(mean, SEQUENCES), want)


def test_resume_converts_only_the_layers_that_are_missing(model, text, tmp_path, monkeypatch):
    options = {"kv_heads": 1, "calibration_samples": 4, "calibration_length": 64, "calibration_text": str(text)}
    options |= {"check": False, "evaluate": False}
    package.apply("gqa", str(model), output=tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        package.apply("gqa", str(model), output=tmp_path / "out", progress=stop, **options)
    assert len([*(tmp_path / "out.partial").glob("0-gqa-*.state")]) == 1
    converted, convert = [], SharedLayer.convert
    monkeypatch.setattr(
        SharedLayer, "convert", lambda work: (converted.append(work.layer.anatomy.index), convert(work))[1]
    )
    package.apply("gqa", str(model), output=tmp_path / "out", resume=True, **options)
    assert converted == [1]
    with pytest.raises(Stopped):
        package.apply("gqa", str(model), output=tmp_path / "new", progress=stop, **options)
    converted.clear()
    with monkeypatch.context() as patch:
        patch.setattr("surgery.operations.gqa.closed_form.REVISION", "of another version")
        package.apply("gqa", str(model), output=tmp_path / "new", resume=True, **options)
    assert converted == [0, 1], "no layer of another version's fit"
    weights_of = "model.safetensors"
    assert (tmp_path / "out" / weights_of).read_bytes() == (tmp_path / "whole" / weights_of).read_bytes()
    records = [
        json.loads((tmp_path / name / "surgery.json").read_text("utf-8"))["operations"] for name in ("out", "whole")
    ]
    assert records[0] == records[1]
