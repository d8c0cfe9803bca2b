"""Model folders, second round: tensors of odd shapes and dtypes, names twice, configs that say something else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import edit_json, edit_tensors
from families import TINY
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers_of_bytes import byte_tokenizer

import surgery as library
from surgery import SurgeryError
from surgery.data.text import Text

MERGE = {"op": "gqa", "kv_heads": 2, "method": "mean"}
SPLIT = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 1, "window": 4}
KEY, OUTPUT = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.o_proj.weight"
HELLO = Text("a greeting", "0" * 64, "Hello!")
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(3))


def recipe(*steps, **more) -> dict:
    return {"version": 1, "name": "x", "operations": list(steps), "evaluate": None} | more


def convert(base, out, *steps, **more):
    return library.apply(recipe(*steps), base, output=out, check=False, evaluate=False, **more)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def header(folder: Path, change) -> None:
    """Rewrite the header of model.safetensors: `change` gets it with the data, and gives both."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    entries, data = change(json.loads(content[8 : 8 + size]), content[8 + size :])
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- projections ----------------------------------------------------------------------------------

SHAPES = {
    "a number": lambda weight: torch.tensor(1.0),
    "a row": lambda weight: weight.flatten(),
    "three axes": lambda weight: weight[None],
    "no rows": lambda weight: weight[:0],
    "a column less": lambda weight: weight[:, 1:],
    "a column more": lambda weight: torch.cat([weight, weight[:, :1]], 1),
    "turned": lambda weight: weight.T,
    "one head less": lambda weight: weight[8:],
}


# An output projection is square here, and one of fewer rows is a narrower one.
WRONG = [(KEY, name) for name in SHAPES] + [
    (OUTPUT, name) for name in SHAPES if name not in ("turned", "one head less")
]


@pytest.mark.parametrize(("tensor", "name"), WRONG)
@pytest.mark.parametrize("verb", ["plan", "apply"])
def test_a_projection_of_another_shape(base, tmp_path, name, tensor, verb):
    """Refused before a weight is computed, by its name."""
    edit_tensors(base, lambda tensors: tensors.update({tensor: SHAPES[name](tensors[tensor]).contiguous()}))
    with pytest.raises(SurgeryError) as fault:
        library.plan(recipe(MERGE), base) if verb == "plan" else convert(base, tmp_path / "out", MERGE)
    assert tensor in str(fault.value)
    assert "shape" in str(fault.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


DTYPES = [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_projection_that_is_no_matrix_of_numbers(base, tmp_path, dtype):
    edit_tensors(base, lambda tensors: tensors.update({KEY: tensors[KEY].to(dtype)}))
    for step in (MERGE, SPLIT):
        with pytest.raises(SurgeryError, match=r"k_proj\.weight is"):
            convert(base, tmp_path / "out", step)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("engine", ["streaming", "loaded"])
def test_one_projection_of_another_precision(base, tmp_path, dtype, engine):
    """It keeps its own, where tensors are streamed, and the mean is rounded once; or one sentence says what to do."""
    edit_tensors(base, lambda tensors: tensors.update({KEY: tensors[KEY].to(dtype)}))
    before = load_file(base / "model.safetensors")
    try:
        convert(base, tmp_path / "out", MERGE, engine=engine)
    except SurgeryError as fault:
        said = str(fault)
    else:
        said = ""
    assert not said or "dtype" in said
    if said:
        return
    after = load_file(tmp_path / "out/model.safetensors")
    mean = before[KEY].double().view(2, 2, 8, 64).mean(1).view(16, 64)
    exact = after[KEY].double() - mean
    assert exact.abs().max() <= torch.finfo(after[KEY].dtype).eps * mean.abs().max()
    other = KEY.replace("k_proj", "v_proj")
    assert torch.equal(after[other], before[other].double().view(2, 2, 8, 64).mean(1).view(16, 64).float())


# --- headers --------------------------------------------------------------------------------------


def empty_first(entries: dict, data: bytes):
    return {"aa": {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]}} | entries, data


def empty_last(entries: dict, data: bytes):
    return entries | {"zz": {"dtype": "F32", "shape": [3, 0], "data_offsets": [0, 0]}}, data


def empty_between(entries: dict, data: bytes):
    place = entries[OUTPUT]["data_offsets"][0]
    return entries | {"mm": {"dtype": "I8", "shape": [0], "data_offsets": [place, place]}}, data


EMPTY = {"first": empty_first, "last": empty_last, "between": empty_between}


@pytest.mark.parametrize("place", EMPTY)
def test_tensors_of_nothing(base, tmp_path, place):
    """safetensors reads such a file, whatever the order of its header; and so do we, and carry the tensor."""
    header(base, EMPTY[place])
    with safe_open(base / "model.safetensors", "pt") as file:
        name = next(name for name in file.keys() if 0 in file.get_slice(name).get_shape())  # noqa: SIM118
    convert(base, tmp_path / "out", MERGE)
    carried = load_file(tmp_path / "out/model.safetensors")
    assert carried[name].numel() == 0
    assert library.load(tmp_path / "out").config.num_key_value_heads == 2


def test_metadata_of_another_framework_is_kept(base, tmp_path):
    """Keys and values of the header's metadata are a file's own business."""
    header(base, lambda entries, data: (entries | {"__metadata__": {"format": "pt", "a": "\u03b1\n", "": ""}}, data))
    convert(base, tmp_path / "out", MERGE)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "\u03b1\n", "": ""}


EXTRA = {
    "an adapter's half": ("model.layers.0.self_attn.k_proj.lora_A.weight", torch.zeros(2, 64)),
    "a scale": ("model.layers.0.self_attn.k_proj.weight_scale", torch.ones(1)),
    "frequencies of old checkpoints": ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    "a mask of pruning": ("model.layers.0.self_attn.k_proj.weight_mask", torch.ones(32, 64)),
    "a name of the file system": ("../../etc/passwd", torch.ones(1)),
    "an empty name": ("", torch.ones(1)),
    "a name of control letters": ("a\x1b[31m\n", torch.ones(1)),
}


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What the plain base says, merged and split."""
    root = tmp_path_factory.mktemp("plain")
    for step in (MERGE, SPLIT):
        convert(tiny, root / step["op"], step)
    return {step["op"]: logits(library.load(root / step["op"])) for step in (MERGE, SPLIT)}


@pytest.mark.parametrize("name", EXTRA)
def test_tensors_that_no_model_reads(base, tmp_path, name, plain):
    """They are carried as they are, or refused; what the model says does not depend on them."""
    key, value = EXTRA[name]
    edit_tensors(base, lambda tensors: tensors.update({key: value}))
    try:
        convert(base, tmp_path / "out", MERGE)
    except SurgeryError:
        assert not (tmp_path / "out").exists()
        return
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[key], value)
    assert torch.equal(logits(library.load(tmp_path / "out")), plain["gqa"])


# --- configs --------------------------------------------------------------------------------------

CONFIGS = [
    {"architectures": None},
    {"architectures": []},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": ["LlamaModel"]},
    {"dtype": 5},
    {"dtype": "int8"},
    {"dtype": {"": "float32"}},
    {"quantization_config": {}},
    {"quantization_config": None},
    {"torchscript": True},
    {"is_decoder": False},
    {"add_cross_attention": True},
    {"use_cache": False},
    {"output_attentions": True},
    {"transformers_version": "99.0"},
    {"tokenizer_class": "EvilTokenizer"},
    {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
    {"id2label": {"0": "x"}},
    {"pad_token_id": -1},
    {"eos_token_id": [1, 2, 3]},
    {"max_position_embeddings": 1},
    {"max_position_embeddings": -1},
    {"max_position_embeddings": 0},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
@pytest.mark.parametrize("step", [MERGE, SPLIT], ids=["merged", "split"])
def test_a_config_that_says_something_odd(base, tmp_path, fields, step, plain):
    """The result says what it says of the plain base, or one sentence says why not."""
    edit_json(base / "config.json", **fields)
    try:
        convert(base, tmp_path / "out", step)
        model = library.load(tmp_path / "out")
    except SurgeryError:
        return
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), plain[step["op"]])


@pytest.mark.parametrize("value", [1, -1, 0, 64, 10**8])
def test_inspect_with_the_models_positions(surgery, base, value):
    """A recipe that leaves all of so many positions unchanged is said to change nothing, if a number is named."""
    edit_json(base / "config.json", max_position_embeddings=value)
    ran = surgery("inspect", base, "--json")
    assert ran.code == 0, ran.err
    reasons = " ".join(reason for reasons in ran.json["recipes"].values() for reason in reasons)
    assert (f"this model takes {value}: nothing changes" in reasons) == (value in (1, 64))


# --- chats ----------------------------------------------------------------------------------------


def test_a_template_that_writes_nothing(base):
    """There is nothing that an answer could follow."""
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(SurgeryError, match="chat template"):
        library.evaluate(base, probe="chat", tokenizer=tokenizer, tokens=2, requests=HELLO)


@pytest.mark.parametrize("value", [[[1]], {"a": 1}, "</s>", [None], 10**30])
def test_ends_that_are_no_tokens(base, value):
    """A generation config of odd ends gives a figure or a sentence."""
    model = library.load(base)
    model.generation_config.eos_token_id = value
    try:
        record = library.evaluate(
            model, probe="chat", tokenizer=byte_tokenizer(chat=True), tokens=2, requests=HELLO
        ).to_dict()
    except SurgeryError:
        return
    assert record["out"]["of"] == 1


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content[1:] }}", "{{ messages[0].content | upper }}", "{{ bos_token }}{{ messages | tojson }}"],
)
def test_templates_that_change_a_message(base, template):
    """What stands in a template is the model's; the probe asks in its words."""
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = template
    result = library.evaluate(base, probe="chat", tokenizer=tokenizer, tokens=2, requests=HELLO)
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello!"}], tokenize=False, add_generation_prompt=True
    )
    assert result.cases[0].prompt == tuple(tokenizer(written, add_special_tokens=False)["input_ids"])


# --- other families -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "qwen3", "gemma2", "olmo2"])
def test_a_checkpoint_of_numbers_stored_apart(tmp_path, family):
    """Every tensor in a file of its own, in an order of its own: streamed and loaded are the same to the bit."""
    from safetensors.torch import save_file

    base = tmp_path / "base"
    TINY[family]().save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors, key=lambda name: name[::-1])
    for number, name in enumerate(names):
        save_file({name: tensors[name]}, base / f"m{number}.safetensors", {"format": "pt"})
    (base / "model.safetensors").unlink()
    weights = {name: f"m{number}.safetensors" for number, name in enumerate(names)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    step = {"op": "head_mask", "values": {0: {1: 0.5}, 1: {0: -2.0}}}
    for engine in ("streaming", "loaded"):
        convert(base, tmp_path / engine, step, engine=engine)
    one, other = (library.load(tmp_path / engine).state_dict() for engine in ("streaming", "loaded"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
