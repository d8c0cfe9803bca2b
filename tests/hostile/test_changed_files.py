"""Every file of a checkpoint is as it was written, or `check` fails and `push` refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import edit_json
from tokenizers_of_bytes import byte_tokenizer

import surgery
from surgery.io import manifest

MEAN = {"op": "gqa", "kv_heads": 2, "method": "mean"}
CHEAP = {"check": True, "evaluate": False, "gate": False}


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory) -> dict[str, Path]:
    """A native and a surgical checkpoint with everything that is carried along, both checked."""
    root = tmp_path_factory.mktemp("changed")
    base = root / "base"
    shutil.copytree(tiny, base)
    (base / "LICENSE").write_text("free\n")
    (base / "README.md").write_text("# The base\n")
    (base / "logo.png").write_bytes(b"\x89PNG")
    (base / "processing_it.py").write_text("VALUE = 1\n")
    recipes = {
        "native": {"op": "gqa", "kv_heads": 2, "method": "mean"},
        "surgical": {"op": "duo_attention", "streaming_ratio": 1.0},
    }
    for name, step in recipes.items():
        recipe = {"version": 1, "name": name, "operations": [step], "evaluate": None}
        report = surgery.apply(recipe, str(base), output=root / name, **CHEAP)
        assert report.data["check"]["passed"], report.data["check"]
    return {name: root / name for name in ("native", "surgical")}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


FILES = [
    "LICENSE", "README.md", "base-card.md", "config.json", "generation_config.json", "logo.png", "model.safetensors",
    "processing_it.py", "surgery.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
]  # fmt: skip


def copy_of(checkpoints, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints[name], tmp_path / "out"))


def test_these_are_the_files(checkpoints):
    assert set(files_of(checkpoints["native"])) == set(FILES)
    assert set(files_of(checkpoints["surgical"])) > {*FILES, "modeling_surgery.py"}


@pytest.fixture
def quick(monkeypatch):
    """Leave out what takes seconds and is not about the files: the fresh processes."""
    from surgery.evaluation import check

    monkeypatch.setattr(check, "check_loading", lambda *_, **__: [])


def refuses(out: Path, words: str) -> None:
    """`check` says that it failed, once and again, and `push` refuses before it and after."""
    with pytest.raises(surgery.SurgeryError, match=words) as fault:
        surgery.push(out, "me/it", dry_run=True)
    assert fault.value.exit_code == 2
    for _ in range(2):
        report = surgery.check(out)
        assert report.data["check"]["passed"] is False
        with pytest.raises(surgery.CheckError, match=words):
            report.raise_faults()
    with pytest.raises(surgery.SurgeryError):
        surgery.push(out, "me/it", dry_run=True)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["native", "surgical"])
@pytest.mark.parametrize("file", [*FILES, "modeling_surgery.py"])
def test_one_byte(checkpoints, name, file, tmp_path):
    if name == "native" and file == "modeling_surgery.py":
        pytest.skip("has no code")
    out = copy_of(checkpoints, name, tmp_path)
    surgery.push(out, "me/it", dry_run=True)
    content = bytearray((out / file).read_bytes())
    at = content.index(b"llama") if file == "surgery.json" else len(content) // 2  # it stays JSON
    content[at] ^= 1
    (out / file).write_bytes(content)
    refuses(out, "surgery.json is not as surgery wrote it" if file == "surgery.json" else f"{file} is not the file")
    assert (out / file).read_bytes() == content or file == "surgery.json", "what somebody wrote is not overwritten"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("file", sorted({*FILES, "modeling_surgery.py"} - {"surgery.json"}))
def test_one_file_less(checkpoints, file, tmp_path):
    out = copy_of(checkpoints, "surgical", tmp_path)
    (out / file).unlink()
    with pytest.raises(surgery.SurgeryError, match=f"{file} is missing"):
        surgery.push(out, "me/it", dry_run=True)
    assert surgery.check(out).data["check"]["passed"] is False
    if file == "README.md":  # which follows from surgery.json
        assert surgery.check(out).data["check"]["passed"]
    else:
        assert surgery.check(out).data["check"]["passed"] is False


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("file", ["notes.md", "id_rsa", "wandb/run.log", "model-2.safetensors", "evil.py", "token"])
def test_one_file_more(checkpoints, file, tmp_path):
    out = copy_of(checkpoints, "surgical", tmp_path)
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("mine")
    refuses(out, f"{file} was added: move it away")


def test_hidden_files_and_training_states_are_nobodys_business(checkpoints, tmp_path):
    out = copy_of(checkpoints, "native", tmp_path)
    for name in (".git/config", ".DS_Store", "optimizer.pt", "trainer_state.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    sent = {file["name"] for file in surgery.push(out, "me/it", dry_run=True)["files"]}
    assert sent == set(FILES)


@pytest.mark.usefixtures("quick")
def test_a_link_in_place_of_a_file(checkpoints, tmp_path):
    out = copy_of(checkpoints, "native", tmp_path)
    (tmp_path / "licence").write_bytes((out / "LICENSE").read_bytes())
    (out / "LICENSE").unlink()
    (out / "LICENSE").symlink_to(tmp_path / "licence")
    with pytest.raises(surgery.SurgeryError, match="a link"):
        surgery.push(out, "me/it", dry_run=True)
    assert surgery.check(out).data["check"]["passed"] is False


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("edit", ["undone", "tier", "cache"])
def test_record_and_config_that_do_not_agree(checkpoints, edit, tmp_path):
    """Both were rewritten with right hashes: what surgery.json says of the model is held against its config."""
    out = copy_of(checkpoints, "surgical", tmp_path)
    record, config = (json.loads((out / name).read_text()) for name in ("surgery.json", "config.json"))
    if edit == "undone":
        del config["surgery"], config["auto_map"]
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    elif edit == "tier":
        record["tier"] = "native"
    else:
        for layer in config["surgery"]["layers"]:
            layer["window"] = 7
    (out / "config.json").write_text(json.dumps(config))
    record["other_files"]["config.json"] = manifest.entry(out / "config.json")
    record["record_sha256"] = manifest.record_hash(record)
    (out / "surgery.json").write_text(json.dumps(record))
    report = surgery.check(out)
    failed = {item["name"] for item in report.data["check"]["items"] if item["status"] == "failed"}
    assert "surgery.json against config" in failed


def test_code_of_this_version_that_is_not_this_versions(checkpoints, tmp_path):
    """Its hash was forged with it: what the running version wrote is known to the byte."""
    out = copy_of(checkpoints, "surgical", tmp_path)
    mark = tmp_path / "ran"
    code = out / "modeling_surgery.py"
    code.write_text(f"open({str(mark)!r}, 'w')\n" + code.read_text())
    record = json.loads((out / "surgery.json").read_text())
    record["other_files"][code.name] = manifest.entry(code)
    record["code"][code.name] = manifest.entry(code)["sha256"]
    record["record_sha256"] = manifest.record_hash(record)
    (out / "surgery.json").write_text(json.dumps(record))
    report = surgery.check(out)
    items = {item["name"]: item for item in report.data["check"]["items"]}
    assert items["runtime files"]["status"] == "failed"
    assert not mark.exists()


def test_what_a_config_says_of_its_machine_stays_there(checkpoints, tmp_path):
    base = Path(shutil.copytree(checkpoints["native"].parent / "base", tmp_path / "base"))
    edit_json(base / "config.json", _name_or_path="/home/me/secret-project/model", _attn_implementation="eager")
    recipe = {"version": 1, "name": "x", "operations": [MEAN], "evaluate": None}
    report = surgery.apply(recipe, str(base), output=tmp_path / "out", check=False, evaluate=False)
    assert report.data["engine"] == "streaming"
    assert b"secret-project" not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert "_attn_implementation" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["/etc/hostname", "../base/config.json", "model.safetensors"])
def test_a_record_that_lists_too_little(checkpoints, name, tmp_path):
    """surgery.json decides what is hashed: of weights that it does not list, `check` says so."""
    out = copy_of(checkpoints, "native", tmp_path)
    record = json.loads((out / "surgery.json").read_text())
    known = record.pop("other_files")
    if name == "model.safetensors":
        record["files"] = {"config.json": known["config.json"]}
    else:
        record["files"][name] = known["config.json"]
    record["record_sha256"] = manifest.record_hash(record)
    (out / "surgery.json").write_text(json.dumps(record))
    assert surgery.check(out).data["check"]["passed"] is False
    with pytest.raises(surgery.SurgeryError):
        surgery.push(out, "me/it", dry_run=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}'])
def test_a_damaged_record_is_a_failed_check(checkpoints, tmp_path, content):
    out = copy_of(checkpoints, "native", tmp_path)
    (out / "surgery.json").write_text(content)
    with pytest.raises(surgery.CheckError) as fault:
        surgery.check(out)
    assert fault.value.exit_code == 4


def test_a_search_writes_no_config_that_was_edited(checkpoints, tmp_path):
    from surgery.evaluation.benchmark.dense_below import write_dense_below

    out = copy_of(checkpoints, "surgical", tmp_path)
    edit_json(out / "config.json", rms_norm_eps=0.5)
    before = (out / "config.json").read_bytes()

    class Found:
        fits, tried, dense_below = True, 1, 1

    with pytest.raises(surgery.SurgeryError, match="is not the file that was written: nothing was written"):
        write_dense_below(out, Found())
    assert (out / "config.json").read_bytes() == before


def test_a_trainers_checkpoint_lists_its_files(checkpoints, tmp_path):
    """A folder that surgery.save wrote passes as well, and its weights are those of the model."""
    from transformers import AutoModelForCausalLM

    base = checkpoints["native"].parent / "base"
    model = AutoModelForCausalLM.from_pretrained(base)
    recipe = {
        "version": 1,
        "name": "x",
        "operations": [{"op": "gqa", "kv_heads": 2, "method": "mean"}],
        "evaluate": None,
    }
    report = surgery.apply(recipe, model)
    saved = surgery.save(model, tmp_path / "saved", report, tokenizer=byte_tokenizer())
    assert manifest.differences(saved.folder, saved.data, saved.intact) == []
    assert surgery.check(saved.folder).data["check"]["passed"]
    assert torch.equal(surgery.load(saved.folder).lm_head.weight, model.lm_head.weight)
