"""`check`: no code and no pickle of a folder runs, every family is compared, and what was not run is said so."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import edit_json
from families import TINY, one_thread  # noqa: F401
from families import base as tiny

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.errors import SurgeryError
from surgery.evaluation import check as checking
from surgery.evaluation.check import Item, passed
from surgery.evaluation.check_layers import compare_shapes, names_in_memory, run_layers
from surgery.evaluation.probes.perplexity import Perplexity
from surgery.io import loading as scoring
from surgery.io.safetensors import Checkpoint
from surgery.kernels import surgery_triton
from surgery.machine.device import too_big
from surgery.runtime.modeling_surgery import patch
from surgery.runtime.surgery_gated_compute import ROWS
from surgery.runtime.surgery_gates import Gate

EVIL = "import pathlib\npathlib.Path({!r}).write_text('ran')\n"


def items_of(folder: Path, base: Path | None = None) -> dict[str, Item]:
    """All items but the hashes, which need surgery.json."""
    return {item.name: item for item in checking._check_contents(folder, base, None, None)}


@pytest.fixture
def split(model) -> Path:
    """A surgical checkpoint, two sinks and a window of four."""
    loaded = surgery.load(model)
    patch(loaded, {"layers": [{"streaming": [0], "sinks": 2, "window": 4}] * 2})
    out = model.parent / "split"
    loaded.save_pretrained(out)
    return out


def test_the_text_is_long_enough_for_a_gates_kernel(model, split, monkeypatch):
    """Where a GPU has kernels: a gate leaves rows out of texts from `ROWS` tokens on. Elsewhere the check is short."""
    gate = {"kind": "moh", "unit": "head", "shared": [0], "active": 1}
    loaded, gated = surgery.load(model), model.parent / "gated"
    of_heads = Gate.of(gate, [3] * 3)
    patch(loaded, {"layers": [{"gate": gate, "parameters": of_heads.shapes(loaded.config.hidden_size)}] * 2})
    loaded.save_pretrained(gated)
    asked = []
    monkeypatch.setattr(checking, "load_in_fresh_process", lambda jobs: asked.extend(jobs) or [{"error": "x"}] * 2)

    def length(folder: Path, device: str) -> int:
        asked.clear()
        checking.check_loading(folder, Anatomy.of(folder), None, place={"device": device})
        return len(asked[0]["tokens"][0])

    monkeypatch.setattr(surgery_triton, "unsupported", lambda *_: None)
    assert [length(gated, device) for device in ("cpu", "cuda:1")] == [checking.PROBE_LENGTH, ROWS]
    assert [length(split, device) for device in ("cpu", "cuda:1")] == [checking.PROBE_LENGTH + 6] * 2
    monkeypatch.setattr(surgery_triton, "unsupported", lambda *_: "no kernel was ever compiled for sm_75")
    assert length(gated, "cuda:1") == checking.PROBE_LENGTH


# --- code and pickles of a folder ---------------------------------------------------------------------------------


@pytest.mark.real_process
def test_code_of_a_folder_does_not_run_and_nobody_is_asked(model, monkeypatch):
    mark = model / "ran"
    (model / "evil.py").write_text(EVIL.format(str(mark)))
    named = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    edit_json(model / "config.json", auto_map=named)
    edit_json(model / "tokenizer_config.json", auto_map=named)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    scoring.load_model(model)  # a stock class: loads as that
    scoring.read_tokenizer(model)
    assert items_of(model)["loads with stock Transformers"].status == "passed"
    edit_json(model / "config.json", model_type="evil_model")
    with pytest.raises(SurgeryError, match="no class for model_type 'evil_model'"):
        scoring.load_model(model)
    items = items_of(model)
    for name in ("loads with stock Transformers", "generates", "shapes against config"):
        assert items[name].status == "not run"
        assert items[name].detail == "Transformers has no class for model_type 'evil_model'"
    assert checking.load_in_fresh_process([{"folder": str(model), "tokens": [[1]], "generate": 1}])[0] == {
        "no_class": "Transformers has no class for model_type 'evil_model'"
    }
    assert not mark.exists()


@pytest.mark.real_process
def test_a_surgical_folder_of_ours(split):
    items = items_of(split)
    assert {item.status for name, item in items.items() if name != "layers one by one"} == {"passed"}
    assert items["runtime files"].detail == "11 files, identical to this version's"
    assert type(scoring.load_model(split)).__name__ == "SurgeryLlamaForCausalLM"


def spoil_runtime(folder: Path, mark: Path) -> None:
    code = folder / "surgery_attention.py"
    code.write_text(EVIL.format(str(mark)) + code.read_text())


def spoil_auto_map(folder: Path, mark: Path) -> None:
    (folder / "evil.py").write_text(EVIL.format(str(mark)))
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", auto_map=config["auto_map"] | {"AutoConfig": "evil.SurgeryLlamaConfig"})


def spoil_generate(folder: Path, mark: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL.format(str(mark)) + "def generate(**_): pass\n")


@pytest.mark.parametrize("spoil", [spoil_runtime, spoil_auto_map, spoil_generate])
def test_foreign_code_in_a_surgical_folder_is_a_fault_and_is_not_run(split, tmp_path, spoil):
    spoil(split, tmp_path / "ran")
    items = items_of(split)
    assert items["runtime files"].status == "failed"
    assert "is not this version's" in items["runtime files"].detail
    assert items["loads with trust_remote_code"].status == "not run"
    assert items["loads with surgery.load"].status == "passed"  # this package's own code
    assert "both ways to load agree" not in items
    assert not (tmp_path / "ran").exists()


def test_pickles_are_not_read(model):
    state = scoring.load_model(model).state_dict()
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    for reader in (scoring.load_model, Perplexity().measure):
        with pytest.raises(SurgeryError, match=r"no model\.safetensors") as caught:
            reader(model)
        assert caught.value.exists == "pytorch_model.bin"
        assert "--allow-pickle" in caught.value.fix
    result = checking.load_in_fresh_process([{"folder": str(model), "tokens": [[1, 2]], "generate": 1}])[0]
    assert "safetensors" in result["error"]
    assert scoring.load_model(model, allow_pickle=True).config.model_type == "llama"


def test_loading_into_a_pipe_is_quiet(model, capfd, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    was = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        scoring.load_model(model)
        assert logging.is_progress_bar_enabled()
    finally:
        if not was:
            logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


# --- shapes and layers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny(name).save_pretrained(made[name])
        return made[name]

    return save


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_compared_and_none_fails(saved, name):
    folder = saved(name)
    checkpoint, anatomy = Checkpoint(folder), Anatomy.of(folder)
    status, detail = compare_shapes(folder, anatomy, checkpoint)
    if name in ("mixtral", "qwen3_moe"):  # Transformers fuses their experts on load: most tensors
        assert (status, detail.partition(":")[0]) == ("not run", "Transformers renames on load")
    else:
        renamed = name == "gpt_neox"  # its output layer has another name in memory
        assert (status, int(detail.split()[0])) == ("passed", len(checkpoint.tensors) - renamed), detail
    status, detail = run_layers(folder, anatomy, checkpoint)
    alone = {"falcon_alibi", "gpt2", "gptj", "bloom", "mpt"}  # their attention needs what only the model has
    assert status in (("passed", "not run") if name in alone else ("passed",)), detail


def test_names_without_the_base_prefix_are_compared(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(saved("gpt2"), tmp_path / "gpt2"))
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    status, detail = compare_shapes(folder, Anatomy.of(folder), Checkpoint(folder))
    assert (status, int(detail.split()[0])) == ("passed", len(bare)), detail
    bare["ln_f.weight"] = torch.ones(3)
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert compare_shapes(folder, Anatomy.of(folder), Checkpoint(folder))[0] == "failed"


def test_nothing_compared_is_not_passed(model, monkeypatch):
    monkeypatch.setattr("surgery.evaluation.check_layers.names_in_memory", lambda stored, wanted: {})
    status, detail = compare_shapes(model, Anatomy.of(model), Checkpoint(model))
    assert status == "not run"
    assert "only 0 of" in detail


def test_prefixes():
    wanted = dict.fromkeys(
        ("model.language_model.layers.0.a", "model.vision_tower.layers.0.a", "lm_head.weight", "model.norm"), ()
    )
    stored = ("language_model.model.layers.0.a", "vision_tower.layers.0.a", "language_model.lm_head.weight", "norm")
    assert names_in_memory(stored, wanted) == dict(zip(stored, wanted, strict=True))
    assert names_in_memory(["other"], wanted) == {}
    assert names_in_memory(["norm", "transformer.norm"], {"model.norm": ()}) == {}  # two cannot be one


def test_layers_of_a_surgical_folder(split):
    assert run_layers(split, Anatomy.of(split), Checkpoint(split))[0] in ("passed", "not run")


def test_weights_that_do_not_fit_their_layer_fail(model):
    anatomy = Anatomy.of(model)
    edit_json(model / "config.json", head_dim=16)
    assert run_layers(model, anatomy, Checkpoint(model))[0] == "failed"


# --- statuses -----------------------------------------------------------------------------------------------------


def test_a_difference_is_measured_not_passed(model, tmp_path):
    other = scoring.load_model(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(100)
    other.save_pretrained(tmp_path / "wrecked")
    items = items_of(tmp_path / "wrecked", model)
    assert items["logits against base"].status == "measured"
    assert passed(list(items.values()))


def test_one_memory_rule():
    gib = 2**30
    assert too_big(10 * gib, memory=14 * gib) == ""
    assert too_big(10 * gib, memory=12 * gib) == "needs about 13.0 GiB of memory, 12.0 GiB are free"
    assert too_big(0, memory=gib, extra=2 * gib) == "needs about 2.0 GiB of memory, 1.0 GiB are free"


@pytest.mark.parametrize(("name", "fields"), [("streaming", {"sinks": 1, "window": 8}), ("mqa", {})])
def test_a_model_without_an_output_head_is_not_called_damaged(name, fields, tmp_path):
    """It computes hidden states, and no logits that could be compared."""
    from transformers import LlamaConfig, LlamaModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaModel(LlamaConfig(vocab_size=100, **shape))
    report = surgery.apply(name, model, **fields)
    surgery.save(model, tmp_path / "out", report)
    found = surgery.check(tmp_path / "out")
    assert found.passed, str(found)
    assert "has no output head" in str(found.data["check"])
