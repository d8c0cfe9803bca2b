"""A block of `surgery.applied` undoes itself: state, config, class, hooks, attention, generation config and logits."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import CASES, recipe
from families import TINY, TOKENS, one_thread  # noqa: F401 (a fixture)
from tokenizers_of_bytes import Letters, byte_tokenizer

import surgery
from surgery.errors import SurgeryError

pytestmark = pytest.mark.usefixtures("one_thread")
FIVE = ("llama", "qwen3", "gemma2", "gpt_oss", "mistral")
CLOSED = {"op": "gqa", "kv_heads": 2, "method": "closed_form", "calibration_samples": 6, "calibration_length": 64}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def described(model) -> dict:
    """Everything that tells two states of a model apart, but the values of weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    generation = model.generation_config
    return {
        "class": type(model),
        "config class": type(model.config),
        "config object": id(model.config),
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation object": id(generation),
        "generation": generation.to_dict(),
        "modules": [
            (name, type(module), sorted(vars(module)), module.training, [len(getattr(module, hook)) for hook in hooks])
            for name, module in model.named_modules()
        ],
        "parameters": [(name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
    }


@pytest.fixture
def kept():
    """Remembers a model, and says whether it is again what it was."""

    def remember(model):
        known, words = described(model), logits(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def same() -> None:
            assert described(model) == known
            now = model.state_dict()
            assert now.keys() == state.keys()
            assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
            assert torch.equal(logits(model), words)

        return same

    return remember


@pytest.mark.parametrize("family", FIVE)
@pytest.mark.parametrize("op", CASES)
def test_every_operation_is_undone(family, op, kept):
    case = CASES[op]
    if family in (*case.refused, *case.refused_always):
        pytest.skip("this operation refuses this family")
    model = TINY[family]().eval()
    model.generation_config.cache_implementation = None
    same, before = kept(model), logits(model)
    with surgery.applied(recipe({"op": op} | case.acts), model, tokenizer=Letters()) as report:
        assert report.data["recipe"]["operations"][0]["op"] == op
        if op not in ("expand", "sparse_prefill", "kv_read"):  # prompts of 12 tokens are read whole
            assert not torch.equal(logits(model), before)
        model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=2, do_sample=False)
    same()


@pytest.mark.parametrize("step", [CLOSED, {"op": "prune_heads", "per_layer": 1, "calibration_samples": 4}])
def test_what_is_refitted_in_place_is_undone(step, kept, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps. " * 300)
    step = step | {"calibration_text": str(tmp_path / "text.txt"), "calibration_length": 64}
    model = TINY["llama"](vocab_size=300).eval()
    same = kept(model)
    with surgery.applied(recipe(step), model, tokenizer=byte_tokenizer()):
        changed = dict(model.named_parameters())["model.layers.0.mlp.down_proj.weight"].clone()
    same()
    if step["op"] == "gqa":
        assert not torch.equal(changed, model.model.layers[0].mlp.down_proj.weight), "the MLP was refitted"


def test_a_model_made_in_inference_mode(kept):
    with torch.inference_mode():
        model = TINY["llama"]().eval()
    same = kept(model)
    with surgery.applied("streaming", model, sinks=1, window=3):
        assert model.config.surgery["layers"][0]["streaming"]
    same()


def test_what_trains_is_as_before(kept):
    model = TINY["llama"]().eval()
    model.lm_head.requires_grad_(False)
    same = kept(model)
    with surgery.applied("streaming", model, sinks=1, window=3):
        for weight in model.parameters():
            weight.requires_grad_(not weight.requires_grad)
    same()


def test_a_hook_from_before_can_be_removed_after_the_block(kept):
    model, ran = TINY["llama"]().eval(), []
    same = kept(model)
    handles = [module.register_forward_hook(lambda *_: ran.append(1)) for module in (model, model.model.layers[0])]
    with surgery.applied("streaming", model, sinks=1, window=3):
        model(TOKENS)
    assert len(ran) == 2
    for handle in handles:
        handle.remove()
    same()
    assert len(ran) == 2, "no hook is left"


def test_an_output_that_a_hook_keeps_is_left_alone(kept):
    """It is a dict whose class refuses to be filled."""
    model = TINY["llama"]().eval()
    handle = model.register_forward_hook(lambda module, _, output: setattr(module, "last", output))
    model(TOKENS)
    last, same = model.last, kept(model)
    model.last = last
    with surgery.applied("gqa", model, method="mean", kv_heads=1):
        pass
    assert model.last is last
    assert last.logits is not None
    same()
    handle.remove()


def test_blocks_may_be_nested(kept):
    model = TINY["llama"]().eval()
    outside = kept(model)
    with surgery.applied("gqa", model, method="mean", kv_heads=1):
        between = kept(model)
        with surgery.applied("streaming", model, sinks=1, window=3):
            assert model.config.surgery["layers"][0]["streaming"]
            with surgery.applied(recipe({"op": "head_mask"} | CASES["head_mask"].acts), model):
                pass
        between()
    outside()


def test_an_error_inside_the_block_undoes_it_and_is_raised(kept):
    model = TINY["llama"]().eval()
    same = kept(model)
    for kind in (ValueError, KeyboardInterrupt):
        with pytest.raises(kind, match="mine"), surgery.applied("streaming", model, sinks=1, window=3):
            raise kind("mine")
        same()


def test_an_error_of_the_recipe_leaves_the_model_alone(kept):
    model = TINY["llama"]().eval()
    same = kept(model)
    with pytest.raises(SurgeryError), surgery.applied("gqa", model, method="mean", kv_heads=3):
        pass
    with pytest.raises(SurgeryError, match="tokenizer"), surgery.applied("gqa", model):
        pass
    same()


def test_two_models_in_two_threads(kept):
    models = [TINY["llama"]().eval(), TINY["qwen3"]().eval()]
    checks, faults = [kept(model) for model in models], []
    inside = threading.Barrier(2, timeout=60)

    def work(model) -> None:
        try:
            with surgery.applied("streaming", model, sinks=1, window=3):
                inside.wait()
                assert model.config.surgery
                inside.wait()
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    for same in checks:
        same()


def test_a_block_that_is_left_before_an_inner_one(kept):
    model = TINY["llama"]().eval()
    same = kept(model)
    outer = surgery.applied("gqa", model, method="mean", kv_heads=1)
    inner = surgery.applied("streaming", model, sinks=1, window=3)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(SurgeryError, match="opened later is still open"):
        outer.__exit__(None, None, None)
    assert model.config.surgery, "and nothing was undone"
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    same()


def test_a_training_inside_is_not_thrown_away():
    model = TINY["llama"]().eval()
    block = surgery.applied("streaming", model, sinks=1, window=3)
    block.__enter__()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimiser.step()
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(SurgeryError, match="trained or moved inside the block"):
        block.__exit__(None, None, None)
    assert model.config.surgery, "it stays converted"
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in trained.items())


def test_a_training_inside_that_ends_with_an_error_is_not_undone_by_halves():
    model = TINY["llama"]().eval()
    outer = surgery.applied("gqa", model, method="mean", kv_heads=1)
    inner = surgery.applied("streaming", model, sinks=1, window=3)
    trained = {}

    def train() -> None:
        with outer, inner:
            for weight in model.parameters():
                weight.data.add_(0.1)  # which counts no version
            trained.update({name: weight.clone() for name, weight in model.state_dict().items()})
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        train()
    assert "trained or moved inside the block" in caught.value.__notes__[0]
    assert len(caught.value.__notes__) == 2, "of both blocks"
    assert model.config.surgery
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in trained.items())


def test_a_cast_inside_is_not_undone_by_halves():
    model = TINY["llama"]().eval()
    with (
        pytest.raises(SurgeryError, match="trained or moved"),
        surgery.applied("gqa", model, method="mean", kv_heads=1),
    ):
        model.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_no_number_is_no_change(kept, dtype):
    model = TINY["llama"]().to(dtype).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(-1)[0] = float("nan")  # the first value is always looked at
    known = described(model)
    with surgery.applied("gqa", model, method="mean", kv_heads=1):
        assert model.config.num_key_value_heads == 1
    assert described(model) == known
    with (
        pytest.raises(SurgeryError, match="trained or moved"),
        surgery.applied("gqa", model, method="mean", kv_heads=1),
        torch.no_grad(),
    ):
        model.model.layers[0].mlp.up_proj.weight.view(-1)[0] = 1.0


def test_what_is_refused():
    model = TINY["llama"]()
    with pytest.raises(SurgeryError, match="in training mode"), surgery.applied("streaming", model.train()):
        pass
    healing = recipe({"op": "head_mask"} | CASES["head_mask"].acts)
    healing |= {"heal": {"steps": 1}}
    with pytest.raises(SurgeryError, match="a healing is not undone"), surgery.applied(healing, model.eval()):
        pass
    with pytest.raises(SurgeryError, match="this is a name"):
        surgery.applied("streaming", "smollm2-135m")
    used = surgery.applied("streaming", model, sinks=1, window=3)
    with used:
        pass
    with pytest.raises(SurgeryError, match="only once"), used:
        pass
