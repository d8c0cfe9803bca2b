"""Tiny random models of every family, where their heads lie (by explicit index, not by surgery's unpack), and
both ways to load a saved model.

Every parameter is random, norm weights, biases and sinks too, so that no mistake can hide behind ones and zeros.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import subprocess
import sys
import sysconfig
import venv
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[2]
VOCAB, LENGTH, QUERIES, KV = 128, 12, 8, 4
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": QUERIES}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = SIZES | IDS | {"intermediate_size": 96, "max_position_embeddings": 64}
GROUPED = COMMON | {"num_key_value_heads": KV}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TOKENS = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products wait for each other's threads far longer than they compute: import this into a test file."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Fill every parameter: matrices to keep the scale of their input, norm weights near 1, the rest near 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("weight") and (parameter.ndim == 1 or "norm" in name):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim >= 2 and "bias" not in name:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 * (4 if "embed" in name or "wte" in name else 1))
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def build(family: str, seed: int | None = None, **fields) -> PreTrainedModel:
    """A causal model of Transformers' class prefix `family` ("Llama") with these config fields."""
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")(**fields)
    head = {"GPT2": "LMHeadModel"}.get(family, "ForCausalLM")
    model = getattr(transformers, family + head)(config)
    return randomise(model, zlib.crc32(family.encode()) if seed is None else seed)


def maker(family: str, base: dict = GROUPED, **fields) -> Callable[[], PreTrainedModel]:
    return lambda **more: build(family, **(base | fields | more))


def gemma3_image_text(**fields) -> PreTrainedModel:
    """A composite: Gemma 3 with a SigLIP tower of two layers and four patches."""
    text = GROUPED | ALTERNATING | {"head_dim": 16, "query_pre_attn_scalar": 16} | fields
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    )
    return randomise(transformers.Gemma3ForConditionalGeneration(config), 5)


PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
FALCON = {"base": COMMON, "bias": True, "ffn_hidden_size": 96}
CONVERTIBLE: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": maker("Llama", tie_word_embeddings=True),
    "llama_bias": maker("Llama", attention_bias=True),
    "mistral": maker("Mistral", head_dim=16, sliding_window=6),
    "ministral": maker("Ministral", head_dim=16, **ALTERNATING),
    "mixtral": maker("Mixtral", **MOE),
    "qwen2": maker("Qwen2"),
    "qwen3": maker("Qwen3", head_dim=16),
    "qwen3_moe": maker("Qwen3Moe", head_dim=16, **MOE),
    "gemma": maker("Gemma", head_dim=16),
    "gemma2": maker("Gemma2", head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, **ALTERNATING),
    "gemma3": maker("Gemma3", head_dim=16, query_pre_attn_scalar=16, **ALTERNATING),
    "gemma3_image_text": gemma3_image_text,
    "phi": maker("Phi"),
    "phi_qk_layernorm": maker("Phi", qk_layernorm=True),
    "phi3": maker("Phi3"),
    "olmo2": maker("Olmo2"),
    "cohere": maker("Cohere", logit_scale=1.0),
    "cohere_qk_norm": maker("Cohere", use_qk_norm=True, logit_scale=1.0),
    "granite": maker("Granite", attention_multiplier=0.3, residual_multiplier=0.7, logits_scaling=2.0),
    "smollm3": maker("SmolLM3", no_rope_layers=[1, 0]),
    "starcoder2": maker("Starcoder2", sliding_window=6),
    "stablelm": maker("StableLm", use_qkv_bias=True, **PARTIAL),
    "stablelm_qk_layernorm": maker("StableLm", qk_layernorm=True, **PARTIAL),
    "gpt_oss": maker("GptOss", head_dim=16, **ALTERNATING, **MOE),
    "glm4": maker("Glm4", head_dim=16, **PARTIAL),
    "falcon_old": maker("Falcon", multi_query=False, **FALCON),
    "falcon_alibi": maker("Falcon", multi_query=False, alibi=True, **FALCON),
    "falcon_multi_query": maker("Falcon", multi_query=True, **FALCON),
    "falcon_new": maker("Falcon", new_decoder_architecture=True, num_kv_heads=KV, **FALCON),
}
WITHOUT_KV_FIELD: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt_neox": maker("GPTNeoX", COMMON),
    "gpt2": maker("GPT2", IDS, vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=QUERIES, n_positions=64),
    "gptj": maker("GPTJ", IDS, vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=QUERIES, n_positions=64, rotary_dim=4),
    "opt": maker("OPT", COMMON, word_embed_proj_dim=64, ffn_dim=96),
    "bloom": maker("Bloom", IDS, vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=QUERIES),
    "mpt": maker("Mpt", IDS, vocab_size=VOCAB, d_model=64, n_layers=2, n_heads=QUERIES, max_seq_len=64),
}
TINY = CONVERTIBLE | WITHOUT_KV_FIELD
# Not on Transformers' attention interface: these never, gptj since 5.24 only, falcon since 5.25.
OFF_THE_INTERFACE = {name for name in TINY if name.startswith(("falcon_alibi", "bloom", "mpt"))}
for _family in ("falcon", "gptj"):
    if not hasattr(
        importlib.import_module(f"transformers.models.{_family}.modeling_{_family}"), "ALL_ATTENTION_FUNCTIONS"
    ):
        OFF_THE_INTERFACE |= {name for name in TINY if name.startswith(_family)}
ONE_KV_HEAD = "falcon_multi_query"  # the family of which all query heads share one KV head
BASES: dict[str, PreTrainedModel] = {}


def base(name: str) -> PreTrainedModel:
    """The tiny model of a family, built once: copy it before changing it."""
    if name not in BASES:
        BASES[name] = TINY[name]()
    return BASES[name]


def text_config(model: PreTrainedModel):
    return model.config.get_text_config()


def kv_heads_of(model: PreTrainedModel) -> int:
    config = text_config(model)
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim_of(model: PreTrainedModel) -> int:
    config = text_config(model)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_modules(model: PreTrainedModel) -> list:
    """The attention modules in order, by what they hold: an output projection and q/k/v or a fused one."""
    fused = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
    modules = []
    for path, module in model.named_modules():
        if "vision" not in path and (hasattr(module, "q_proj") or any(hasattr(module, name) for name in fused)):
            modules.append(module)
    return modules


def head_rows(model: PreTrainedModel, letter: str, head: int) -> tuple[str, list[int]]:
    """Projection's name and its output rows of one query, key or value head, from each family's own layout."""
    config, groups, size = text_config(model), kv_heads_of(model), head_dim_of(model)
    heads = config.num_attention_heads
    kind = config.model_type
    if kind in ("phi3", "mpt", "gpt2") or (
        kind == "falcon" and config.multi_query and not config.new_decoder_architecture
    ):
        before = {"q": 0, "k": heads, "v": heads + groups}[letter]
        name = {"phi3": "qkv_proj", "mpt": "Wqkv", "gpt2": "c_attn"}.get(kind, "query_key_value")
        return name, [(before + head) * size + i for i in range(size)]
    if kind in ("falcon", "bloom", "gpt_neox"):  # a KV head's queries, its key, its value, then the next KV head's
        per = heads // groups
        if letter == "q":
            block = (head // per) * (per + 2) + head % per
        else:
            block = head * (per + 2) + per + (letter == "v")
        return "query_key_value", [block * size + i for i in range(size)]
    return f"{letter}_proj", [head * size + i for i in range(size)]


def get_head(model: PreTrainedModel, module, letter: str, head: int) -> torch.Tensor:
    """Weight rows of one head [d, D], a bias as one more column, in float64."""
    name, rows = head_rows(model, letter, head)
    projection = getattr(module, name)
    weight = projection.weight.detach().double()
    weight = weight.T if name == "c_attn" else weight
    rows_of_head = weight[rows]
    if getattr(projection, "bias", None) is not None:
        rows_of_head = torch.cat([rows_of_head, projection.bias.detach().double()[rows, None]], dim=1)
    return rows_of_head


def set_head(model: PreTrainedModel, module, letter: str, head: int, value: torch.Tensor) -> None:
    name, rows = head_rows(model, letter, head)
    projection = getattr(module, name)
    bias = getattr(projection, "bias", None)
    with torch.no_grad():
        weight = projection.weight.T if name == "c_attn" else projection.weight
        weight[rows] = (value[:, :-1] if bias is not None else value).to(weight.dtype)
        if bias is not None:
            bias[rows] = value[:, -1].to(bias.dtype)


def key_norm(model: PreTrainedModel, module):
    """Per-head weights of the key norm: a list of writable views [d], or None where all heads share one."""
    kind = text_config(model).model_type
    if kind == "stablelm" and text_config(model).qk_layernorm:
        return [norm.weight.data for norm in module.k_layernorm.norms]
    if kind == "cohere" and text_config(model).use_qk_norm:
        return list(module.k_norm.weight.data.unbind(0))
    if kind == "olmo2":
        return list(module.k_norm.weight.data.view(kv_heads_of(model), -1).unbind(0))
    return None


def double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64 (the grouped matrix product of experts has no float64: eager there)."""
    model = copy.deepcopy(model).double()
    text_config(model)._experts_implementation = "eager"
    return model


def logits_of(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.double()


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the expected logits' spread."""
    return ((got.double() - expected).abs().max() / expected.std()).item()


def orthogonal(size: int, generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def legal_rotation(anatomy, generator) -> torch.Tensor:
    """A random rotation of keys that commutes with RoPE: of each channel pair, and of all the other channels."""
    rotation = torch.eye(anatomy.head_dim, dtype=torch.float64)
    for f in range(anatomy.rotary // 2):
        a, b = (2 * f, 2 * f + 1) if anatomy.positions == "interleaved" else (f, f + anatomy.rotary // 2)
        angle = torch.rand(1, generator=generator, dtype=torch.float64).item() * 2 * math.pi
        rotation[a, a] = rotation[b, b] = math.cos(angle)
        rotation[a, b], rotation[b, a] = -math.sin(angle), math.sin(angle)
    rest = anatomy.head_dim - anatomy.rotary
    if rest:
        rotation[anatomy.rotary :, anatomy.rotary :] = orthogonal(rest, generator)
    return rotation


def stranger(folder: Path) -> Path:
    """The Python of an environment that has the installed libraries and not `surgery`."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    libraries = Path(sysconfig.get_paths()["purelib"])
    if (libraries / "surgery").exists():  # installed, not editable: everything else by links
        links = folder / "links"
        links.mkdir()
        for entry in libraries.iterdir():
            if "surgery" not in entry.name:
                (links / entry.name).symlink_to(entry)
        libraries = links
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    Path(own, "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    probe = "import importlib.util as u; assert u.find_spec('torch'); assert u.find_spec('surgery') is None"
    subprocess.run([python, "-P", "-c", probe], check=True, cwd=folder, env=env)
    return python


def load_without_package(
    folders: list[Path], scratch: Path, generate: int = 2, trust: bool = False
) -> dict[Path, dict]:
    """Load every folder with stock Transformers in one fresh process without `surgery`.

    Args:
        trust: with trust_remote_code, which runs the code in the folder.

    Returns:
        folder -> what fresh_process.py says of it, and its "logits" on `TOKENS`.
    """
    jobs = [
        {"folder": str(f), "tokens": TOKENS.tolist(), "generate": generate, "trust": trust}
        | {"logits": str(scratch / f"{i}.pt")}
        for i, f in enumerate(folders)
    ]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env["OMP_NUM_THREADS"] = "1"
    env |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.run(
        [stranger(scratch / "env"), "-P", ROOT / "surgery" / "evaluation" / "fresh_process.py"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=env,
        cwd=scratch,
    )
    answers = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(jobs), f"{process.returncode}: {process.stderr[-3000:]}"
    for job, answer in zip(jobs, answers, strict=True):
        if "error" not in answer:
            answer["logits"] = torch.load(job["logits"], weights_only=True)
    return dict(zip(folders, answers, strict=True))


def check_both_ways_to_load(models: dict[Path, PreTrainedModel], scratch: Path) -> None:
    """Save each model in its folder and load it with the package and with trust_remote_code.

    The logits are equal to the bit, and all but equal to those of the model in memory. Saved once more, the tensors
    are the same.
    """
    import surgery

    for folder, model in models.items():
        model.save_pretrained(folder)
    for folder, answer in load_without_package(list(models), scratch, trust=True).items():
        assert "error" not in answer, answer
        assert answer["missing"] == answer["unexpected"] == answer["mismatched"] == []
        loaded = surgery.load(folder)
        with torch.no_grad():
            logits, logits_in_memory = loaded(input_ids=TOKENS).logits, models[folder](input_ids=TOKENS).logits
        assert torch.equal(logits, answer["logits"])
        assert (logits - logits_in_memory).abs().max() <= 1e-4
        loaded.save_pretrained(f"{folder}-again")
        again = surgery.load(f"{folder}-again").state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in loaded.state_dict().items())


def layers_of(report: dict) -> dict[str, dict]:
    """What the first operation of a report noted of each layer, by its path."""
    record = report["operations"][0]["record"]
    return {path: layer_record for path, layer_record in record.items() if path != "calibration"}


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)


if __name__ == "__main__":  # what there is, for people
    for name in TINY:
        model = base(name)
        print(f"{name:24} {sum(p.numel() for p in model.parameters()):8,} {kv_heads_of(model)}", file=sys.stdout)
