"""Shared: the command in-process, a folder watched for what an error may leave, a tiny checkpoint with a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread for each of the processes that share the machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from warm_process import WarmPython

from surgery.errors import SurgeryError

SENTENCE = "the cat sat on a mat and looked at rain while seven dogs ran past old green doors of houses"
WORDS = list(dict.fromkeys(SENTENCE.split()))
TEXT = " ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(400))
LLAMA = {
    "vocab_size": 64, "hidden_size": 72, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.05,
}  # fmt: skip


STAGE_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] ")  # of a progress that is no terminal's


# The files that take longest begin first, so that no worker ends with one of them while the other has nothing to do.
LONGEST = [
    "test_sparse_prefill", "test_heal_folder", "test_compositions", "test_cli", "test_duo_smollm2", "test_smollm2",
    "test_odd_api", "test_resume", "test_virtual_keys", "test_prune_heads", "test_wgqa", "test_duo_attention",
]  # fmt: skip


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist, which else begins with the files of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@dataclass
class Ran:
    """What one call of the command did; `err` is stderr without the lines on its stages."""

    code: int
    out: str
    err: str
    stages: list[str] = field(default_factory=list)

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def float32_products():
    """Trainings of this process compute in float32 on every CPU, if they are not asked for bfloat16."""
    with pytest.MonkeyPatch.context() as patch:  # one that no test undoes
        patch.setattr("torch.cpu.get_capabilities", dict, raising=False)
        yield


@pytest.fixture(scope="session")
def warm_python():
    return WarmPython()


@pytest.fixture(autouse=True)
def warm_processes(request, warm_python):
    """The process that `check` starts is a fork of one that has imported torch and Transformers."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("real_process"):
            patch.setattr("surgery.evaluation.check.subprocess", warm_python)
        yield


@pytest.fixture
def surgery(capsys, monkeypatch, tmp_path):
    """`surgery ARGS` in-process, from inside `tmp_path`."""
    from surgery.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def run(*args) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        lines = err.splitlines(keepends=True)
        stages = [line for line in lines if STAGE_LINE.match(line)]
        return Ran(stopped.value.code or 0, out, "".join(line for line in lines if line not in stages), stages)

    return run


@pytest.fixture
def refused(surgery, tmp_path):
    """Run a command that must fail: one message that says `words`, this exit code, nothing changed on disk."""

    def run(*args, says: tuple | list, code: int = 2, has_json: bool = True) -> Ran:
        before = listing(tmp_path)
        plain = surgery(*args)
        said = plain.out + plain.err
        assert plain.code == code, said
        assert plain.err.startswith("error: "), said
        assert said.count("error:") == 1, said
        assert "Traceback" not in said
        assert not (lost := [word for word in says if word not in plain.err]), f"{lost} not in {plain.err}"
        if has_json:
            spoken = surgery(*args, "--json")
            assert spoken.code == code
            assert spoken.err == ""
            assert spoken.json["exit_code"] == code
            assert f"error: {_as_text(spoken.json)}\n" == plain.err, "the object says what the text says"
        assert listing(tmp_path) == before
        return plain

    return run


def _as_text(error: dict) -> SurgeryError:
    parts = {key: error[key] for key in ("where", "exists", "fix") if key in error}
    return SurgeryError(error["error"], **parts, others=tuple(map(_as_text, error.get("others", []))))


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the hash of its content or the target of a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            fact = f"-> {os.readlink(path)}"
        else:
            fact = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = fact
    return found


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A Llama of two layers, 9 query heads on 3 KV heads, with a word tokenizer. Copy it before changing it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)  # two threads wait for each other longer than such products take
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def text(tmp_path) -> Path:
    """400 words that the tiny tokenizer knows."""
    (tmp_path / "words.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "words.txt"


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_record(folder: Path, **fields) -> None:
    """Change surgery.json as surgery itself would: it says of itself what it holds."""
    from surgery.io.manifest import record_hash

    record = json.loads((folder / "surgery.json").read_text()) | fields
    (folder / "surgery.json").write_text(json.dumps(record | {"record_sha256": record_hash(record)}))


def edit_tensors(folder: Path, change) -> None:
    """Rewrite model.safetensors: `change` gets the dict of tensors and edits it in place."""
    from safetensors.torch import load, save

    tensors = load((folder / "model.safetensors").read_bytes())
    change(tensors)
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny Llama of 1,024 positions that knows every byte; not to be changed."""
    from families import TINY
    from tokenizers_of_bytes import byte_tokenizer

    folder = tmp_path_factory.mktemp("bytes") / "tiny"
    TINY["llama"](vocab_size=300, max_position_embeddings=1024).save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    """A copy of it, in `tmp_path`."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))
