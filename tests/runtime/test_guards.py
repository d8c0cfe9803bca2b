"""What would undo a surgery without a word, or leave something half done: refused, or done right."""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import edit_json
from dense import batch
from families import TINY
from head_split import WINDOW, kv_heads, operated, random_split

from surgery.architecture.anatomy import Anatomy
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_config as surgery_block
from surgery.runtime.surgery_cache import SurgeryCache
from surgery.runtime.surgery_visibility import base_windows, head_kinds, surgery_mask


@pytest.fixture
def split(surgery, model, tmp_path):
    """A tiny checkpoint whose heads are split by a score file."""
    (tmp_path / "scores.txt").write_text("0.9 0.1 0.8\n0.1 0.7 0.2\n")
    command = ("apply", "duo-attention", model, "-o", "split", "scores=scores.txt", "sinks=2", "window=6")
    assert surgery(*command, "--no-check", "--no-eval").code == 0
    return tmp_path / "split"


def all_streaming(model):
    return operated(model, [list(range(kv_heads(model)))] * model.config.num_hidden_layers)


@pytest.mark.parametrize("through", ["inner model", "config"])
def test_another_attention_set_behind_the_back(through):
    model = all_streaming(TINY["llama"]())
    if through == "config":
        model.config._attn_implementation = "sdpa"
    else:
        model.model.set_attn_implementation("sdpa")
    for mode in (model.eval(), model.train()):
        for options in ({}, {"use_cache": False}):
            with pytest.raises(ValueError, match="'sdpa' was set on a part of a surgical model"):
                mode(input_ids=torch.tensor([[3, 4, 5]]), **options)


def test_tensor_parallel_loading_is_refused(split):
    import surgery

    with pytest.raises(surgery.SurgeryError, match="tp_plan cuts attention by heads"):
        surgery.load(split, tp_plan="auto")


def test_a_block_that_does_not_fit_leaves_the_model_as_it_was():
    for name, layers, says in (
        ("llama", [{"shapes": {"no_proj.weight": [4, 4]}}, {}], "no_proj.weight, which LlamaAttention does not have"),
        ("bloom", [{}, {}], "does not use Transformers' attention interface"),
    ):
        model = TINY[name]().eval()
        ids = torch.tensor([[3, 4, 5]])
        before, config, cls = model(input_ids=ids).logits, model.config.to_dict(), type(model)
        with pytest.raises(ValueError, match=says):
            runtime.patch(model, {"layers": layers})
        assert type(model) is cls
        assert model.config.to_dict() == config
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("name", ["flash_attention_2", "sdpa", "eager"])
def test_another_attention_asked_for_at_load(split, name, trust):
    import surgery

    surgery.register()
    for cls in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        with pytest.raises(ValueError, match=f"attn_implementation='{name}' would undo the surgery"):
            cls.from_pretrained(split, trust_remote_code=trust, attn_implementation=name)
    config = transformers.AutoConfig.from_pretrained(split, trust_remote_code=trust)
    with pytest.raises(ValueError, match="would undo the surgery"):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name, trust_remote_code=trust)
    config = transformers.AutoConfig.from_pretrained(split, trust_remote_code=trust)  # the name was put into the last
    again = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    copied = transformers.AutoModelForCausalLM.from_config(again.config, trust_remote_code=trust)
    assert copied.config._attn_implementation.startswith("surgery_")


def test_a_model_that_runs_its_checkpoints_own_code(split, monkeypatch):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    import surgery

    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "surgery")  # as in a process without `surgery.register()`
    model = AutoModelForCausalLM.from_pretrained(split, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    ids = torch.tensor([[3, 4, 5] * 5])
    before = model(input_ids=ids).logits
    with pytest.raises(surgery.SurgeryError, match=r"surgery\.load"):
        surgery.apply("zero-tuning", model, gamma=2.0)
    assert torch.equal(model(input_ids=ids).logits, before)
    registry = transformers.AttentionInterface._global_mapping
    assert registry[runtime.ATTENTION] is runtime.surgery_attention, "a copy of the code took the package's place"
    assert registry[model.config._attn_implementation].__module__.startswith("transformers_modules")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "stablelm"])
def test_attention_weights_are_refused(name):
    """Some models take the flag for themselves: their attention would not see it."""
    model = all_streaming(TINY[name]().eval())
    ids = batch(model, (0,))[0]
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=ids, output_attentions=True)
    model.config._output_attentions = True  # as a config.json says it, before attention is chosen
    for given in ({}, {"output_attentions": None}):
        with pytest.raises(ValueError, match="output_attentions"):
            model(input_ids=ids, **given)
    assert "output_attentions: true" in Anatomy.of(model).runtime_problem()


@torch.no_grad()
def test_a_cache_of_another_split_is_refused():
    base = TINY["llama"]().eval()
    one, other, same = (operated(base, split) for split in ([[0], []], [[1], []], [[0], []]))
    ids = batch(base, (0,))[0]
    cache = one(input_ids=ids[:, :-1])[runtime.CACHE]
    with pytest.raises(ValueError, match="split otherwise"):
        other(input_ids=ids[:, -1:], **{runtime.CACHE: cache})
    got = same(input_ids=ids[:, -1:], **{runtime.CACHE: cache}).logits
    assert torch.allclose(got, one(input_ids=ids, use_cache=False).logits[:, -1:], atol=1e-5)


@pytest.mark.parametrize("chunks", [[5, 40], [20, 25], [40, 1, 4], [1] * 6 + [39]])
@pytest.mark.parametrize("trained", ["", "layers.1.self_attn.v_proj"])
def test_gradients_flow_through_the_cache(chunks, trained):
    """Of the last chunk, as of one call: through sinks, ring and full heads; and a later call changes no graph."""
    model = operated(TINY["llama"](), [[0], [0, 1]])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    ids = batch(model, (0,))[0][:, : sum(chunks)]
    weights = torch.randn(chunks[-1], 1, generator=torch.Generator().manual_seed(0))
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = (model(input_ids=ids, use_cache=False).logits[0, -chunks[-1] :] * weights).sum()
    want = torch.autograd.grad(whole, wanted)
    cache, begin = model.make_cache(), 0
    for size in chunks:
        logits = model(input_ids=ids[:, begin : begin + size], **{runtime.CACHE: cache}).logits
        begin += size
    with torch.no_grad():
        model(input_ids=ids[:, :3], **{runtime.CACHE: cache})
    loss = (logits[0] * weights).sum()
    assert (loss - whole).abs() <= 1e-3
    for one, other in zip(torch.autograd.grad(loss, wanted), want, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(1, other.abs().max())


def test_packed_rows_with_a_mask_are_refused():
    """Transformers gives one or the other; whoever gives both would lose the borders of the sequences."""
    from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

    numbers = torch.tensor([[0, 0, 1, 1]])
    both = and_masks(causal_mask_function, packed_sequence_mask_function(numbers))
    assert torch.equal(surgery_mask(1, 4, 4, both), numbers)
    with pytest.raises(ValueError, match="packed rows have no padding"):
        surgery_mask(1, 4, 4, both, attention_mask=torch.ones(1, 4))


@torch.no_grad()
def test_layer_types_rule_over_the_switch():
    """SmolLM3's masks follow `layer_types`, whatever `use_sliding_window` says."""
    kinds = ["sliding_attention", "full_attention"]
    given = {"layer_types": kinds, "sliding_window": 6, "use_sliding_window": False, "no_rope_layers": [1, 0]}
    base = TINY["smollm3"](**given).eval()
    model = operated(base, [[], []])
    ids = batch(base, (0,))[0]
    assert torch.allclose(
        model(input_ids=ids, use_cache=False).logits, base(input_ids=ids, use_cache=False).logits, atol=1e-5
    )
    assert base_windows(base.config) == [layer.window for layer in Anatomy.of(base).layers] == [6, None]


def test_the_code_that_travels_runs_wherever_the_package_does(monkeypatch):
    low, high = surgery_block.TRANSFORMERS
    metadata = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    (floor,) = re.findall(rf'"transformers>=(\d+\.\d+),<{high[0]}"', metadata)
    assert low <= tuple(map(int, floor.split(".")))
    model = operated(TINY["llama"](), [[0], []])
    for version in ("5.12.3", "6.0.0"):
        monkeypatch.setattr("transformers.__version__", version)
        with pytest.raises(ValueError, match=rf">= 5\.13 and < 6\.0, this is {version[:-2]}"):
            surgery_block.validate(model.config)


@pytest.mark.parametrize(
    ("kind", "version", "least"),
    [
        ("gptj", "5.23.0", "5.24"),
        ("gptj", "5.24.1", ""),
        ("llama", "5.13.0", ""),
        ("llama", "5.12.1", "5.13"),
        ("llama", "6.0.0", "5.13"),
        (None, "4.57.6", "5.13"),
        (None, "5.13.1", ""),
    ],
)
def test_each_family_has_its_first_version(kind, version, least, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    config = SimpleNamespace(surgery={"base_model_type": kind}) if kind else None
    this = ".".join(version.split(".")[:2])
    said = f"this checkpoint's code is made for Transformers >= {least} and < 6.0, this is {this}"
    assert surgery_block.version_fault(config) == (said if least else "")


def test_a_family_that_this_version_cannot_serve(monkeypatch):
    """It is refused before the base's own code is called with a name that it does not know."""
    config = operated(TINY["llama"](), [[0], []]).config
    monkeypatch.setitem(surgery_block.SINCE, "llama", (5, 99))
    monkeypatch.setattr(runtime, "attach", lambda model: pytest.fail("the base's own code was called"))
    with pytest.raises(ValueError, match=r">= 5\.99"):
        runtime.SurgeryLlamaForCausalLM(config)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_gradients_of_a_first_call_with_a_cache(length):
    model = all_streaming(TINY["llama"]()).train()
    ids = batch(model, (0,), length)[0]
    found = []
    for use_cache in (False, True):
        model.zero_grad()
        model(input_ids=ids, use_cache=use_cache).logits.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("prompt", [1, WINDOW - 1, WINDOW + 9])
@torch.no_grad()
def test_a_cache_that_is_offloaded_between_the_layers(prompt):
    """`Cache.update` moves tensors away before attention reads its views: "meta" stands for the other device."""

    class Away(SurgeryCache):
        def update(self, keys, values, index, *args, **kwargs):
            layer = self.layers[index]
            for store, here in zip(layer.stores, getattr(layer, "here", ()), strict=False):
                store.tensors = here
            views = super().update(keys, values, index, *args, **kwargs)
            layer.here = [store.tensors for store in layer.stores]
            for store in layer.stores:
                store.tensors = {name: tensor.to("meta") for name, tensor in store.tensors.items()}
            return views

    base = TINY["llama"]().eval()
    model = operated(base, random_split(base, 1), sinks=0)
    ids = batch(model, (0,), prompt + 1)[0]
    cache = Away(head_kinds(model.config))
    model(input_ids=ids[:, :prompt], **{runtime.CACHE: cache})
    got = model(input_ids=ids[:, prompt:], **{runtime.CACHE: cache}).logits
    want = model(input_ids=ids, use_cache=False).logits[:, -1:]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, WINDOW + 9])
@torch.no_grad()
def test_sinks_of_an_offloaded_cache_are_written_where_they_are_now(prompt):
    """Tensors move to other memory between the layers: what is written to the old place must not be read."""

    class Away(SurgeryCache):
        def update(self, keys, values, index, *args, **kwargs):
            views = super().update(keys, values, index, *args, **kwargs)
            for store in self.layers[index].stores:
                store.tensors = {name: tensor.clone() for name, tensor in store.tensors.items()}
            return views

    base = TINY["llama"]().eval()
    model = operated(base, random_split(base, 1))
    ids = batch(model, (0,), prompt + 12)[0]
    cache = Away(head_kinds(model.config))
    got = [model(input_ids=ids[:, :prompt], **{runtime.CACHE: cache}).logits]
    got += [model(input_ids=ids[:, i : i + 1], **{runtime.CACHE: cache}).logits for i in range(prompt, ids.shape[1])]
    want = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(torch.cat(got, dim=1), want, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
@torch.no_grad()
def test_autocast(name):
    base = TINY[name]().eval()
    model = operated(base, random_split(base, 1))
    ids = batch(model, (0,))[0]
    want = model(input_ids=ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(input_ids=ids).logits
    assert (got.float() - want).abs().max() < 0.1 * want.std()


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_second_surgery_brings_this_versions_code(surgery, model, tmp_path):
    assert surgery("apply", "mqa", model, "-o", "shaped", "kv_heads=[3,1]", "--no-check", "--no-eval").code == 0
    code = tmp_path / "shaped" / "modeling_surgery.py"
    code.write_text(code.read_text() + "# SOMEBODY ELSE'S\n")
    (tmp_path / "shaped" / "surgery_gone.py").write_text("# a file that this version does not have\n")
    (tmp_path / "shaped" / "custom.py").write_text("# the user's own\n")
    made = surgery(
        "apply", "duo-attention", "shaped", "-o", "out", "streaming_ratio=1", "sinks=2", "window=6", "--no-eval"
    )
    assert made.code == 0, made.err
    assert "SOMEBODY" not in (tmp_path / "out" / "modeling_surgery.py").read_text()
    assert not (tmp_path / "out" / "surgery_gone.py").exists()
    assert (tmp_path / "out" / "custom.py").exists()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"layers": None}, "a list of 2 layers"),
        ({"layers": [{}]}, "a list of 2 layers"),
        ({"layers": [5, {}]}, "layer 0 of the surgery block"),
        ({"layers": [{"streaming": 7, "sinks": 2, "window": 6}, {}]}, "as streaming"),
        ({"layers": [{"streaming": [99], "sinks": 2, "window": 6}, {}]}, "as streaming"),
        ({"layers": [{"num_key_value_heads": 10**9}, {}]}, "more than query heads"),
        ({"format": 2}, "format 2"),
    ],
)
def test_a_block_edited_by_hand(surgery, split, model, edit, says):
    config = json.loads((split / "config.json").read_text())
    edit_json(split / "config.json", surgery={**config["surgery"], **edit})
    for code, command in (
        (2, ("inspect", "split")),
        (2, ("plan", "zero-tuning", "split")),
        (2, ("score", "split", "-o", "s.json")),
        (4, ("check", "split")),
    ):
        ran = surgery(*command)
        assert ran.code == code, (command, ran.out, ran.err)
        assert says in " ".join((ran.out + ran.err).split()), (command, ran.out, ran.err)


def test_resume_sees_that_a_score_file_changed(surgery, split, model, tmp_path):
    (tmp_path / "scores.txt").write_text("0.1 0.9 0.2\n0.9 0.1 0.8\n")
    command = ("apply", "duo-attention", model, "-o", "split", "scores=scores.txt", "sinks=2", "window=6")
    ran = surgery(*command, "--no-check", "--no-eval", "--resume")
    assert ran.code == 2
    assert "split" in ran.err
    shutil.rmtree(split)
    assert surgery(*command, "--no-check", "--no-eval").code == 0
    layers = json.loads((split / "config.json").read_text())["surgery"]["layers"]
    assert [layer["streaming"] for layer in layers] == [[0, 2], [1]]


def test_bench_counts_the_heads_of_layers_of_different_shape(surgery, model):
    assert surgery("apply", "mqa", model, "-o", "shaped", "kv_heads=[3,1]", "--no-check", "--no-eval").code == 0
    command = ("bench", "shaped", "--base", model, "--lengths", "40", "--rounds", "1", "--decode", "1", "--json")
    ran = surgery(*command, "--synthetic", "--ratio", "0.5")
    assert ran.code == 0, ran.err
    split = ran.json["split"]
    assert (split["streaming"], split["kv_heads"], split["ratio"]) == (2, 4, 0.5)
    assert copy.copy(split["streaming_per_layer"])[1] <= 1


def test_the_version_is_checked_before_code_that_an_older_one_cannot_import():
    """Transformers 4.46 has no `CacheLayerMixin`: its user reads our sentence, and no ImportError of that name."""
    folder = Path(runtime.__file__).parent
    body = ast.parse((folder / "modeling_surgery.py").read_text(encoding="utf-8")).body
    check = next(i for i, node in enumerate(body) if isinstance(node, ast.If) and "version_fault" in ast.unparse(node))
    before = [node.module for node in body[:check] if isinstance(node, ast.ImportFrom) and node.level]
    assert before == ["surgery_config"]
    names = ast.parse((folder / "surgery_config.py").read_text(encoding="utf-8")).body
    modules = [ast.unparse(node) for node in names if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in modules if "transformers" in line or "from ." in line]
