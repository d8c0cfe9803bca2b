"""Damaged, foreign, pickled and quantised checkpoints: refused with what is wrong and what would work, or carried."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import edit_json, edit_tensors, listing
from safetensors.torch import load, load_file, save, save_file

from surgery.io.safetensors import Checkpoint

FAST = ("--no-check", "--no-eval")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def shard(folder: Path, names: tuple[str, ...] = ("a-1.safetensors", "a-2.safetensors", "a-3.safetensors")) -> dict:
    """Split model.safetensors into shards with an index; the index."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: names[i * len(names) // len(tensors)] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def truncated(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def overlapping(folder):
    header, body = header_of((folder / WEIGHTS).read_bytes())
    first, second = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:2]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    start = header[first]["data_offsets"][0]
    header[second]["data_offsets"] = [start, start + size]
    (folder / WEIGHTS).write_bytes(with_header(header, body))


def shape_that_lies(folder):
    header, body = header_of((folder / WEIGHTS).read_bytes())
    header[Q]["shape"] = [72, 720]
    (folder / WEIGHTS).write_bytes(with_header(header, body))


def header_entry(**fields):
    def spoil(folder):
        header, body = header_of((folder / WEIGHTS).read_bytes())
        header[Q] = {key: value for key, value in (header[Q] | fields).items() if value is not None}
        (folder / WEIGHTS).write_bytes(with_header(header, body))

    return spoil


def raw(content: bytes):
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


def indexed(change):
    """A sharded copy whose index `change` spoils."""

    def spoil(folder):
        index = shard(folder)
        change(folder, index)
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def name_in_index(name: str):
    return indexed(lambda folder, index: index["weight_map"].update({Q: name}))


def drop_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(Q))


def config(**fields):
    return lambda folder: edit_json(folder / "config.json", **fields)


def text_of(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json", "Hugging Face model folder"]),
    "config is broken": (text_of("config.json", '{"model_type": "llama",'), ["config.json is not JSON", "line 1"]),
    "config is a list": (text_of("config.json", "[]"), ["config.json", "no JSON object"]),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ["config.json is not JSON"]),
    "config is empty": (text_of("config.json", "{}"), ["the config has no usable num_hidden_layers"]),
    "config without sizes": (text_of("config.json", '{"model_type": "llama"}'), ["config"]),
    "config of other sizes": (config(num_attention_heads=18, head_dim=8), ["has shape", "18 query heads"]),
    "config with more layers": (config(num_hidden_layers=5), ["model.layers.2", "missing", "2 of the 5 layers"]),
    "config with text for a number": (config(num_attention_heads="nine"), ["num_attention_heads"]),
    "config with no heads": (config(num_attention_heads=0), ["config"]),
    "config with odd groups": (config(num_key_value_heads=2), ["9 query heads on 2 KV heads"]),
    "config with negative KV heads": (config(num_key_value_heads=-3), ["num_key_value_heads"]),
    "config with text for KV heads": (config(num_key_value_heads="3"), ["num_key_value_heads"]),
    "truncated": (truncated, ["cut short", "download it again"]),
    "empty file": (raw(b""), [f"{WEIGHTS} is not a safetensors file, or is cut short"]),
    "a few bytes": (raw(b"abc"), [f"{WEIGHTS} is not a safetensors file, or is cut short"]),
    "garbage": (raw(os.urandom(7) + b"\x7f" + b"x" * 500), [f"{WEIGHTS} is not a safetensors file"]),
    "header is garbage": (raw((40).to_bytes(8, "little") + b"z" * 90), [f"{WEIGHTS} has a header that is not safe"]),
    "header is a list": (raw((8).to_bytes(8, "little") + b"[1, 2]  "), [f"{WEIGHTS} has a header that is not safe"]),
    "Git LFS pointer": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), ["git lfs pull"]),
    "overlapping offsets": (overlapping, [f"{WEIGHTS}: ", "lies where its shape does not allow"]),
    "shape that lies": (shape_that_lies, [f"{WEIGHTS}: {Q} lies where its shape does not allow"]),
    "entry without dtype": (header_entry(dtype=None), ["has a header that is not safetensors"]),
    "entry with odd offsets": (header_entry(data_offsets=["a", "b"]), ["has a header that is not safetensors"]),
    "entry with odd shape": (header_entry(shape=[-72, -72]), ["has a header that is not safetensors"]),
    "entry with text as shape": (header_entry(shape="72"), ["has a header that is not safetensors"]),
    "entry of unknown dtype": (header_entry(dtype="Q9"), [Q]),
    "index is broken": (indexed(lambda f, i: i.clear()), ["no weight_map"]),
    "shard missing": (
        indexed(lambda f, i: (f / "a-2.safetensors").unlink()),
        ["names a-2.safetensors, which is not there", "a-1.safetensors, a-3.safetensors", "download the missing"],
    ),
    "tensor of the index missing": (
        indexed(lambda f, i: i["weight_map"].update({"model.layers.1.self_attn.q_prj.weight": "a-1.safetensors"})),
        ["the index says that a-1.safetensors holds", "and it does not", "nearest: model.layers.1.self_attn."],
    ),
    "tensor in two shards": (
        indexed(lambda f, i: shutil.copy(f / "a-1.safetensors", f / "a-2.safetensors")),
        ["is in a-1.safetensors and in a-2.safetensors"],
    ),
    "name that climbs": (name_in_index("../x.safetensors"), ["'../x.safetensors' leaves its folder", "relative"]),
    "name that climbs within": (name_in_index("a/../../x"), ["'a/../../x' leaves its folder"]),
    "absolute name": (name_in_index("/etc/passwd"), ["'/etc/passwd' leaves its folder"]),
    "name with a drive": (name_in_index("C:\\x"), ["'C:\\\\x' leaves its folder"]),
    "name that climbs in Windows": (name_in_index("..\\x"), ["leaves its folder"]),
    "empty name": (name_in_index(""), ["leaves its folder"]),
    "name that is a number": (name_in_index(7), ["no weight_map of names to files"]),
    "projection missing": (drop_tensor, [f"{Q} is missing", "q_proj"]),
    "NaN in attention": (
        lambda f: edit_tensors(f, lambda t: t[Q].view(-1)[5].fill_(float("nan"))),
        [f"{Q} holds NaN or infinite values", "download it again"],
    ),
    "infinity in attention": (
        lambda f: edit_tensors(f, lambda t: t[Q].view(-1)[5].fill_(float("inf"))),
        [f"{Q} holds NaN or infinite values"],
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ["no model.safetensors", "no weight file"]),
    "only a GGUF": (lambda f: (f / WEIGHTS).rename(f / "model.gguf"), ["no model.safetensors", "model.gguf"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(refused, model, name):
    spoil, says = DAMAGE[name]
    spoil(model)
    refused("apply", "mqa", model, "-o", "out", *FAST, says=says)


@pytest.mark.parametrize("name", [n for n in DAMAGE if "in attention" not in n])
def test_plan_and_inspect_say_it_as_well(refused, model, name):
    spoil, says = DAMAGE[name]
    spoil(model)
    refused("plan", "mqa", model, says=says)
    refused("inspect", model, says=says)


def test_a_shard_with_nan_leaves_nothing_even_after_others_were_written(refused, model):
    shard(model)
    last = model / "a-3.safetensors"
    tensors = load(last.read_bytes())
    name = next(n for n in tensors if n.endswith("_proj.weight") and "self_attn" in n)
    tensors[name][0, 0] = float("nan")
    last.write_bytes(save(tensors, {"format": "pt"}))
    refused("apply", "mqa", model, "-o", "deep/er/out", *FAST, says=[f"{name} holds NaN"])


def test_nan_elsewhere_is_found_by_the_check(surgery, model, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(model, lambda tensors: tensors[name].view(-1)[3].fill_(float("nan")))
    done = surgery("apply", "mqa", model, "-o", "out")
    assert done.code == 4, done
    assert done.err.count("error:") == 1
    assert f"NaN or infinite values in {name}" in done.err
    report = json.loads((tmp_path / "out/surgery.json").read_text())
    assert report["check"]["passed"] is False
    assert report["evaluation"] is None
    assert report["gate"]["status"] == "not run"
    assert name in (tmp_path / "out/README.md").read_text()


def test_sharded_and_whole_give_the_same_tensors(surgery, model, tmp_path):
    shutil.copytree(model, tmp_path / "sharded")
    index = shard(tmp_path / "sharded")
    for base in ("model", "sharded"):
        assert surgery("apply", "mqa", base, "-o", f"{base}-out", *FAST).code == 0
    single, parts = load_file(tmp_path / "model-out" / WEIGHTS), {}
    for file in set(index["weight_map"].values()):
        parts |= load_file(tmp_path / "sharded-out" / file)
    assert single.keys() == parts.keys()
    assert all(torch.equal(single[name], parts[name]) for name in single)
    new = json.loads((tmp_path / "sharded-out" / INDEX).read_text())
    assert new["weight_map"] == index["weight_map"]
    assert new["metadata"]["total_size"] == sum(t.nbytes for t in single.values()) < index["metadata"]["total_size"]


def test_of_a_single_file_and_an_index_the_file_counts(surgery, model, tmp_path):
    """As Transformers reads it; shards of an older save are left behind, and listed."""
    shutil.copytree(model, tmp_path / "alone")
    content = (model / WEIGHTS).read_bytes()
    edit_tensors(model, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    shard(model)
    (model / WEIGHTS).write_bytes(content)
    for base in ("model", "alone"):
        assert surgery("apply", "mqa", base, "-o", f"{base}-out", *FAST).code == 0
    got, wanted = (load_file(tmp_path / f"{base}-out" / WEIGHTS) for base in ("model", "alone"))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert not (tmp_path / "model-out" / INDEX).exists()
    left = json.loads((tmp_path / "model-out/surgery.json").read_text())["left_behind"]
    assert left == ["a-1.safetensors", "a-2.safetensors", "a-3.safetensors", INDEX]


def test_an_index_that_was_used_is_not_left_behind(surgery, model, tmp_path):
    shard(model)
    assert surgery("apply", "mqa", model, "-o", "out", *FAST).code == 0
    assert json.loads((tmp_path / "out/surgery.json").read_text())["left_behind"] == []


# --- pickles ------------------------------------------------------------------------------------------------


def pickled(folder: Path, **kwargs) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin", **kwargs)
    (folder / WEIGHTS).unlink()


def test_a_pickle_is_refused_and_the_flag_named(refused, model):
    pickled(model)
    says = ["no model.safetensors", "pytorch_model.bin", "pickle, which can run code", "--allow-pickle"]
    refused("apply", "mqa", model, "-o", "new/out", *FAST, says=says)


def test_a_pickle_that_is_to_be_healed_is_refused_before_the_conversion(refused, model, tmp_path):
    pickled(model)
    says = ["the base's weights are a pickle, and healing loads the base again", "save it as safetensors first"]
    refused("apply", "gqa-distill", model, "heal.length=1024", "-o", "out", "--allow-pickle", says=says)
    assert not list(tmp_path.glob("*out*"))


def test_a_copy_has_the_fingerprint_and_any_other_weights_have_not(model, tmp_path):
    copied = shutil.copytree(model, tmp_path / "copied", copy_function=shutil.copyfile)
    one = Checkpoint(model).fingerprint()
    assert Checkpoint(copied).fingerprint() == one
    tensors = load_file(copied / WEIGHTS)
    for name, tensor in tensors.items():
        save_file(tensors | {name: tensor + 1}, copied / WEIGHTS, {"format": "pt"})
        assert Checkpoint(copied).fingerprint() != one


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_gives_what_safetensors_gives(surgery, model, tmp_path, zipped):
    assert surgery("apply", "mqa", model, "-o", "wanted", *FAST).code == 0
    pickled(model, _use_new_zipfile_serialization=zipped)
    before = listing(model)
    done = surgery("apply", "mqa", model, "-o", "out", "--allow-pickle", *FAST)
    assert done.code == 0, done.err
    assert listing(model) == before
    wanted, got = (load_file(tmp_path / name / WEIGHTS) for name in ("wanted", "out"))
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "wanted"]
    assert "pytorch_model.bin" in json.loads((tmp_path / "out/surgery.json").read_text())["left_behind"]


def test_a_sharded_pickle_loses_no_tensor(surgery, model, tmp_path):
    """Equal shards may be mapped to the same address one after the other: tensors are told apart by more than that."""
    tensors = load_file(model / WEIGHTS)
    weight_map = {name: f"pytorch_model-{i:05d}.bin" for i, name in enumerate(sorted(tensors))}
    for name, file in weight_map.items():
        torch.save({name: tensors[name]}, model / file)
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = surgery("apply", "mqa", model, "-o", "out", "--allow-pickle", *FAST)
    assert done.code == 0, done.err
    got = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        got |= load_file(file)
    assert got.keys() == tensors.keys()
    same = [name for name in tensors if not name.endswith(("k_proj.weight", "v_proj.weight"))]
    assert all(torch.equal(got[name], tensors[name]) for name in same)


def test_tied_tensors_of_a_pickle_are_stored_once(surgery, model, tmp_path):
    tensors = load_file(model / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    edit_json(model / "config.json", tie_word_embeddings=True)
    assert surgery("apply", "mqa", model, "-o", "out", "--allow-pickle", *FAST).code == 0
    assert tensors.keys() - load_file(tmp_path / "out" / WEIGHTS).keys() == {"lm_head.weight"}


class Evil:
    """Unpickled by anything but `weights_only`, it makes a file named `ran`."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain", "inside a dict"])
def test_a_pickle_that_would_run_code_runs_nothing(refused, model, tmp_path, monkeypatch, kind):
    (model / WEIGHTS).unlink()
    file = model / "pytorch_model.bin"
    if kind == "plain":
        file.write_bytes(pickle.dumps(Evil()))
    else:
        payload = {"w": torch.zeros(2), "x": Evil()} if kind == "inside a dict" else Evil()
        torch.save(payload, file, _use_new_zipfile_serialization=kind != "legacy")
    says = ["pytorch_model.bin cannot be read as plain tensors"]
    refused("apply", "mqa", model, "-o", "out", "--allow-pickle", *FAST, says=says)
    assert not (tmp_path / "ran").exists()
    if kind == "plain":  # the attack is real
        monkeypatch.chdir(model)
        pickle.loads(file.read_bytes())
        assert (model / "ran").is_dir()


PICKLE_FAULTS = {
    "garbage": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x" * 99), ["cannot be read as plain tensors"]),
    "empty": (lambda f: (f / "pytorch_model.bin").write_bytes(b""), ["cannot be read as plain tensors"]),
    "a list": (lambda f: torch.save([1, 2], f / "pytorch_model.bin"), ["holds more than tensors"]),
    "numbers": (lambda f: torch.save({"a": 1}, f / "pytorch_model.bin"), ["holds more than tensors"]),
    "index without map": (text_of("pytorch_model.bin.index.json", "{}"), ["no weight_map of names to files"]),
    "index that climbs": (
        text_of("pytorch_model.bin.index.json", '{"weight_map": {"a": "../x.bin"}}'),
        ["'../x.bin' leaves its folder"],
    ),
    "shard missing": (
        text_of("pytorch_model.bin.index.json", '{"weight_map": {"a": "x.bin"}}'),
        ["names x.bin, which is not there"],
    ),
}


@pytest.mark.parametrize("name", PICKLE_FAULTS)
def test_a_damaged_pickle_is_refused(refused, model, name):
    spoil, says = PICKLE_FAULTS[name]
    (model / WEIGHTS).unlink()
    spoil(model)
    refused("apply", "mqa", model, "-o", "new/out", "--allow-pickle", *FAST, says=says)


# --- quantised ----------------------------------------------------------------------------------------------


def gptq(tensors, prefix):
    tensors.pop(f"{prefix}.weight")
    packed = {"qweight": (9, 72), "qzeros": (1, 9), "g_idx": (72,)}
    tensors |= {f"{prefix}.{name}": torch.zeros(shape, dtype=torch.int32) for name, shape in packed.items()}
    tensors[f"{prefix}.scales"] = torch.ones(1, 72, dtype=torch.float16)


def awq(tensors, prefix):
    tensors.pop(f"{prefix}.weight")
    packed = {"qweight": (72, 9), "qzeros": (1, 9)}
    tensors |= {f"{prefix}.{name}": torch.zeros(shape, dtype=torch.int32) for name, shape in packed.items()}
    tensors[f"{prefix}.scales"] = torch.ones(1, 72, dtype=torch.float16)


def bnb(tensors, prefix):
    weight = tensors[f"{prefix}.weight"]
    tensors[f"{prefix}.weight"] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    tensors[f"{prefix}.weight.absmax"] = torch.ones(weight.numel() // 64)


def int8(tensors, prefix):
    tensors[f"{prefix}.weight"] = tensors[f"{prefix}.weight"].to(torch.int8)
    tensors[f"{prefix}.SCB"] = torch.ones(72)


def fp8(tensors, prefix):
    tensors[f"{prefix}.weight"] = tensors[f"{prefix}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{prefix}.weight_scale_inv"] = torch.ones(1, 1)


QUANTISED = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}),
    "bitsandbytes": (bnb, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_attention_is_refused_and_the_base_named(refused, model, kind):
    quantise, settings = QUANTISED[kind]

    def change(tensors):
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            quantise(tensors, name.removesuffix(".weight"))

    edit_tensors(model, change)
    edit_json(model / "config.json", quantization_config=settings)
    says = ["attention projections are quantised", settings["quant_method"], "_proj.", "the unquantised model"]
    refused("apply", "mqa", model, "-o", "out", *FAST, says=says)
    edit_json(model / "config.json", _name_or_path="org/base-7b")
    refused("apply", "mqa", model, "-o", "out", *FAST, says=["are quantised", "convert org/base-7b"])
    refused("plan", "mqa", model, says=["are quantised", "convert org/base-7b"])


def test_quantised_without_a_word_in_the_config_is_seen_all_the_same(refused, model):
    edit_tensors(model, lambda tensors: fp8(tensors, Q.removesuffix(".weight")))
    refused("apply", "mqa", model, "-o", "out", *FAST, says=["are quantised (F8_E4M3)", Q])


def test_quantised_experts_are_carried_byte_for_byte(surgery, tmp_path):
    """As gpt_oss is published: MXFP4 experts, attention in bfloat16."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    base = tmp_path / "oss"
    GptOssForCausalLM(GptOssConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(base)

    def pack(tensors):
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            tensor = tensors.pop(name)
            for part, size in (("blocks", 2), ("scales", 32)):
                drawn = torch.randint(256, (tensor.numel() // size,), dtype=torch.uint8)
                tensors[f"{name}_{part}"] = drawn.reshape(tensor.shape[0], -1)

    edit_tensors(base, pack)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_json(base / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    done = surgery("apply", "mqa", base, "-o", "out", *FAST)
    assert done.code == 0, done.err
    old, new = (load_file(folder / WEIGHTS) for folder in (base, tmp_path / "out"))
    experts = [name for name in old if name.endswith(("_blocks", "_scales"))]
    assert len(experts) == 8
    assert all(torch.equal(old[name], new[name]) for name in experts)
    assert new["model.layers.0.self_attn.k_proj.weight"].shape == (16, 64)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["quantization_config"]["modules_to_not_convert"] == skipped
    assert raw["num_key_value_heads"] == 1


# --- other kinds of model -----------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}


def other(kind: str):
    import transformers as hf

    t5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 32, "vocab_size": 64}
    if kind == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(vocab_size=64, **SMALL))
    if kind == "bert body":
        return hf.BertModel(hf.BertConfig(vocab_size=64, **SMALL))
    if kind == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, **SMALL))
    if kind == "t5":
        return hf.T5ForConditionalGeneration(hf.T5Config(**t5))
    sizes = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=64, decoder_layers=1, **sizes))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("bert", ["bert is not a decoder language model", "BertForMaskedLM", "llama", "causal language models"]),
        ("bert body", ["bert is not a decoder language model", "BertModel"]),
        ("vit", ["vit is not a decoder language model", "ViTForImageClassification"]),
        ("t5", ["t5 is not a decoder language model", "T5ForConditionalGeneration"]),
        ("bart", ["bart is not a decoder language model", "BartForConditionalGeneration"]),
    ],
)
def test_what_is_no_decoder_is_refused(refused, tmp_path, kind, says):
    other(kind).save_pretrained(tmp_path / "other")
    refused("apply", "mqa", tmp_path / "other", "-o", "out", *FAST, says=says)
    refused("inspect", tmp_path / "other", says=says)


def test_an_unknown_family_with_other_names_lists_what_there_is(refused, model):
    def rename(tensors):
        for name in [n for n in tensors if "self_attn" in n]:
            tensors[name.replace("q_proj", "wq").replace("k_proj", "wk")] = tensors.pop(name)

    edit_tensors(model, rename)
    edit_json(model / "config.json", model_type="zorg", architectures=["ZorgForCausalLM"])
    says = ["attention of model type zorg", "not understood", "self_attn.wq.weight", "need q_proj, k_proj"]
    refused("apply", "mqa", model, "-o", "out", *FAST, says=says)


def test_an_unknown_family_of_the_common_form_is_said_to_be_a_guess(surgery, model):
    edit_json(model / "config.json", model_type="zorg", architectures=["ZorgForCausalLM"])
    planned = surgery("plan", "mqa", model, "--json").json
    assert planned["guess"] is True
    assert "zorg is not a known family" in planned["notes"][-1]
