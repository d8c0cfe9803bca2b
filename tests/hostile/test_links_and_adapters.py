"""What lies in a model folder and is not the model: links to a user's files, an adapter that would act unseen."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import surgery

MEAN = {"version": 1, "name": "mean", "operations": [{"op": "gqa", "kv_heads": 2, "method": "mean"}], "evaluate": None}
QUICK = {"check": False, "evaluate": False}


@pytest.fixture
def secret(tmp_path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text("hf_secret")
    return tmp_path / "home/token"


def holds_secret(folder: Path) -> bool:
    return any(b"hf_secret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "README.md", "tokenizer_config.json", "logo.png", "a/b.py"])
@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_a_link_out_of_the_folder_is_not_followed(base, secret, tmp_path, name, how):
    link = base / ("helper.py" if name == "a/b.py" else name)
    link.unlink(missing_ok=True)
    link.symlink_to(secret if how == "absolute" else os.path.relpath(secret, link.parent))
    with pytest.raises(surgery.SurgeryError, match=f"{link.name} is a link that leaves the model folder"):
        surgery.apply(MEAN, str(base), output=tmp_path / "out", **QUICK)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "home"}, "nothing is left"


def test_a_link_in_a_linked_folder(base, secret, tmp_path):
    (base / "chat_templates").symlink_to(secret.parent)
    (secret.parent / "secret.jinja").write_text("hf_secret")
    with suppress(surgery.SurgeryError):  # Python follows linked folders in some versions
        surgery.apply(MEAN, str(base), output=tmp_path / "out", **QUICK)
    assert not any(holds_secret(path) for path in tmp_path.glob("out*"))


def test_links_within_the_folder_and_into_the_hub_cache_are_followed(base, tmp_path):
    blobs = tmp_path / "hub/models--me--it/blobs"
    snapshot = tmp_path / "hub/models--me--it/snapshots/0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (base / "LICENSE").write_text("free")
    for index, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / f"{index:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{index:064x}")
    (snapshot / "COPYING").symlink_to("LICENSE")
    report = surgery.apply(MEAN, str(snapshot), output=tmp_path / "out", **QUICK)
    assert (report.folder / "LICENSE").read_text() == (report.folder / "COPYING").read_text() == "free"
    assert not any(path.is_symlink() for path in report.folder.rglob("*"))


def test_weights_may_lie_elsewhere(base, tmp_path):
    """Nothing but tensors is taken from them."""
    (base / "model.safetensors").rename(tmp_path / "weights")
    (base / "model.safetensors").symlink_to(tmp_path / "weights")
    report = surgery.apply(MEAN, str(base), output=tmp_path / "out", **QUICK)
    assert not (report.folder / "model.safetensors").is_symlink()


def test_a_model_in_memory_takes_no_linked_licence_along(base, secret, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    report = surgery.apply(MEAN, model)
    (base / "LICENSE").symlink_to(secret)
    with pytest.raises(surgery.SurgeryError, match="LICENSE is a link that leaves"):
        surgery.save(model, tmp_path / "out", report)
    assert not (tmp_path / "out").exists()


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(base) -> Path:
    """A base with an adapter beside its weights, as a trainer that saved both in one folder leaves it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(base)
    config = json.loads((base / "adapter_config.json").read_text())
    assert config["r"] == 2
    return base


def test_transformers_adds_the_adapter(base, adapted):
    """What the refusals below are for."""
    ids = torch.arange(2, 12)[None]
    with_adapter = AutoModelForCausalLM.from_pretrained(adapted)(input_ids=ids).logits
    (adapted / "adapter_config.json").unlink()
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(adapted)(input_ids=ids).logits, with_adapter)


CALLS = {
    "plan": lambda folder, out: surgery.plan(MEAN, str(folder)),
    "apply": lambda folder, out: surgery.apply(MEAN, str(folder), output=out, **QUICK),
    "apply, loaded": lambda folder, out: surgery.apply(MEAN, str(folder), output=out, engine="loaded", **QUICK),
    "load": lambda folder, out: surgery.load(folder),
    "evaluate": lambda folder, out: surgery.evaluate(str(folder), windows=1, length=16),
    "evaluate against it": lambda folder, out: surgery.evaluate(out.with_name("other"), str(folder), windows=1),
    "check against it": lambda folder, out: surgery.check(out.with_name("other"), str(folder)),
    "heal": lambda folder, out: surgery.heal(
        out.with_name("other"), str(folder), output=out, overrides=["steps=1", "length=16", "data=builtin"]
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_adapter_beside_the_weights_is_refused(base, tmp_path, request, call):
    surgery.apply(MEAN, str(base), output=tmp_path / "other", **QUICK)
    folder = request.getfixturevalue("adapted")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(surgery.SurgeryError, match="holds an adapter next to the weights") as fault:
        CALLS[call](folder, tmp_path / "out")
    assert "merge_and_unload" in fault.value.fix
    assert sorted(tmp_path.iterdir()) == before
