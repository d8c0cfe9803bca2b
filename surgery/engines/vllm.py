"""vLLM: a folder that it opens, run by vLLM itself in an environment of its own.

A result of the native tier is such a folder as it is. Layers that have different numbers of heads become a DeciLM
(Nemotron-NAS), which vLLM computes like Llama with its own number of KV heads in each layer. All layers of a DeciLM
have the same number of query heads, and divide them evenly among their KV heads. Where a result has fewer, heads of
zeros are put in: rows of the query projection and columns of the output projection. They add exactly 0.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.architecture.layer import BYTES, LayerAnatomy, groups_of
from surgery.architecture.sliding import FULL, SLIDING
from surgery.engines import vllm_environment
from surgery.engines.artifact import RECORD
from surgery.engines.base import (
    SAME_WEIGHTS,
    WEIGHTS_ALONE,
    EngineAnswers,
    EngineQuestion,
    Obstacle,
    ServingEngine,
    other_width,
    parts_of,
    per_layer,
    some_slide,
    stock_names,
    unlike_stock,
)
from surgery.engines.process import ask_script
from surgery.engines.vllm_latent import WRONG_OPERATION, refusals, vector_factor, write_latent_weights
from surgery.errors import SurgeryError
from surgery.io import manifest
from surgery.io.files import BASE_CARD, CARD, read_json, write_json, write_text
from surgery.io.loading import read_tokenizer
from surgery.io.model_folder import carry_files

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.architecture.anatomy import Anatomy

PER_LAYER = ("llama", "mistral", "qwen2")  # families whose layers a DeciLM computes
DIVIDED = ("qwen2",)  # families for which vLLM takes the size of a head to be hidden size / heads
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM 0.32 on a CPU, where the proof runs
MOST_PADDING = 4  # times as many query heads as the widest layer has, at most
# Part of the runtime -> what vLLM does not compute, and the nearest that it does.
PARTS = {
    "split": ("streaming heads: it has no window for single heads", WEIGHTS_ALONE),
    "sparse": ("sparse prefill: it computes every prompt densely", SAME_WEIGHTS),
    "act": ("attention that is redistributed at run time: it has no such step", SAME_WEIGHTS),
    "bias": ("sink biases, scales of sinks or virtual keys: it has sinks in gpt-oss alone", WEIGHTS_ALONE),
    "gate": ("gated heads: it has no router of heads", "prune-heads, which removes heads for good"),
    "low_rank": ("keys and values that are made of vectors: it has this as latent attention alone", "mla"),
    "read": ("decoding steps that read a part of the cache: it reads all", SAME_WEIGHTS),
    "policy": ("a cache that drops keys: it keeps the keys of all tokens", WEIGHTS_ALONE),
}
DROPPED = ("surgery", "sliding_window", "layer_types", "use_sliding_window", "_name_or_path")  # of the config
CONFIG, TOKENIZER_CONFIG, CODE = "config.json", "tokenizer_config.json", "configuration_decilm.py"
SURGERY_CARD = "surgery-card.md"
OWN_CODE = "auto_map"  # the key by which the two configs name code
WEIGHTS = (".safetensors", ".safetensors.index.json")
NO_WINDOWS = ("qwen3",)  # families in which it refuses windows in some of the layers
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


class VLLM(ServingEngine):
    """vLLM, in the environment that `vllm_environment` makes."""

    name: ClassVar[str] = "vllm"
    types: ClassVar[dict[str, float]] = {"as-saved": 4}
    suffix: ClassVar[str] = ""

    def version(self) -> str:
        if version := vllm_environment.installed_version():
            return version
        raise SurgeryError(
            "vLLM is not installed in an environment of its own, which it needs since it excludes our Transformers",
            where=str(vllm_environment.environment()),
            fix=f"{vllm_environment.COMMAND} (3.4 GB), or set {vllm_environment.VARIABLE} to an environment with vLLM",
            code="missing-package",
        )

    def obstacles(self, anatomy: Anatomy) -> list[Obstacle]:
        if anatomy.latent:
            return refusals(anatomy)
        if some_slide(anatomy) and anatomy.model_type in NO_WINDOWS:
            why = f"windows in some layers of {anatomy.model_type}: vLLM refuses them"
            return [Obstacle(why, "gqa, which merges KV heads; or this result in Transformers")]
        unequal = _obstacles_of_layers(anatomy) if as_decilm(anatomy) else []
        return parts_of(anatomy, PARTS) + unequal + _obstacles_of_size(anatomy)

    def write(self, folder: Path, anatomy: Anatomy, kind: str, file: Path) -> dict[str, Any]:
        file.mkdir()
        apart, config = as_decilm(anatomy), read_json(folder / CONFIG)
        weights = [name for name in manifest.paths_in(folder) if name.endswith(WEIGHTS) and "/" not in name]
        for name in weights:
            if anatomy.latent:
                write_latent_weights(folder / name, anatomy, file / name)
            elif apart and name.endswith(".safetensors"):
                _write_padded(folder / name, anatomy.layers, query_heads(anatomy.layers), file / name)
            else:
                shutil.copyfile(folder / name, file / name)
        carry_files(folder, file, set(weights))
        _carry_card(folder, file)
        for code in file.rglob("*.py"):
            code.unlink()
        _write_tokenizer_config(folder, file, apart)
        facts = {}
        if apart:
            config, facts = decilm_config(anatomy), {"architecture": "DeciLMForCausalLM"}
            shutil.copyfile(Path(__file__).with_name(CODE), file / CODE)
        else:
            config.pop(OWN_CODE, None)
        if as_llama(anatomy):
            config |= LLAMA
            facts = {"architecture": LLAMA["architectures"][0]}
        if anatomy.latent:
            config.pop("surgery", None)
            config |= stock_names(anatomy) | {"tie_word_embeddings": False}
        write_json(file / CONFIG, config)
        write_text(file / CARD, _card(folder.resolve().name, anatomy))
        return facts

    def disk_bytes(self, anatomy: Anatomy, kind: str) -> int:
        stored = BYTES.get(anatomy.dtype, 4)
        if anatomy.latent:
            config = anatomy.config
            output = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
            return stored * (anatomy.parameters + output)
        if not as_decilm(anatomy):
            return stored * anatomy.parameters
        hidden, heads = anatomy.config.get_text_config().hidden_size, query_heads(anatomy.layers)
        zeros = sum(2 * (heads - layer.heads) * layer.head_dim * hidden for layer in anatomy.layers)
        return stored * (anatomy.parameters + zeros)

    def ask(self, file: Path, question: EngineQuestion) -> EngineAnswers:
        python = str(vllm_environment.interpreter(vllm_environment.environment()))
        job = {"file": str(file.resolve()), "code": (file / CODE).is_file(), "operations": _operations(file)}
        return ask_script("vllm_process.py", self.name, job, question, python)

    def command(self, file: str) -> str:
        import shlex

        code = " --trust-remote-code" if (Path(file) / CODE).is_file() else ""
        if operations := _operations(Path(file)):
            code += f" --compilation-config {shlex.quote(json.dumps({'custom_ops': operations}))}"
        own = vllm_environment.interpreter(vllm_environment.environment()).with_name("vllm")
        program = "vllm" if shutil.which("vllm") else shlex.quote(str(own))
        return f"{program} serve {shlex.quote(file)}{code}"


def _operations(folder: Path) -> list[str]:
    """vLLM's own operations that it must not use for this folder, as its setting `custom_ops` names them."""
    latent = "kv_lora_rank" in (read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {})
    return [WRONG_OPERATION] if latent else []


def _write_tokenizer_config(folder: Path, target: Path, named: bool) -> None:
    """Write tokenizer_config.json without names of code.

    Args:
        named: name the class that the folder's tokenizer has. Transformers may have taken it from the model's type,
            and a DeciLM has another type.
    """
    source = folder / TOKENIZER_CONFIG
    config = read_json(source) if source.is_file() else {}
    config.pop(OWN_CODE, None)
    if named:
        config["tokenizer_class"] = type(read_tokenizer(folder)).__name__
    if config:
        write_json(target / TOKENIZER_CONFIG, config)


def _carry_card(folder: Path, target: Path) -> None:
    """Copy the card of the surgery. `carry_files` took it for the base's where the base has none."""
    if not (folder / BASE_CARD).is_file():
        (target / BASE_CARD).unlink(missing_ok=True)
    if (folder / CARD).is_file():
        shutil.copyfile(folder / CARD, target / SURGERY_CARD)


def _card(name: str, anatomy: Anatomy) -> str:
    """A short card. Those of the surgery and of the base, which names its licence, are next to it."""
    kind = "It is an ordinary checkpoint."
    if as_decilm(anatomy):
        kind = (
            "It is a DeciLM, which vLLM alone opens, with `--trust-remote-code`: its code is the class of its config."
        )
    elif anatomy.latent and vector_factor(anatomy) != 1:
        kind = "Open it with vLLM alone: the rows that make the latent vector are scaled for its norm's epsilon."
    elif as_llama(anatomy):
        kind = "It is a Llama with windows in some layers: open it with vLLM alone, since Transformers ignores them."
    return (
        f"# {name} for vLLM\n\n`surgery export` made this folder from a checkpoint whose attention was rewritten, and "
        f"compared vLLM with Transformers (`{RECORD}`). {kind} Its weights are not the base's: `{SURGERY_CARD}` says "
        f"what the surgery did. The base's card, if it has one, is `{BASE_CARD}`, and its licence holds for these "
        "weights too.\n"
    )


def as_llama(anatomy: Anatomy) -> bool:
    """Whether vLLM computes these layers as a Llama's, which it gives a window by `layer_types`."""
    return anatomy.model_type == "ministral" and not as_decilm(anatomy)


def as_decilm(anatomy: Anatomy) -> bool:
    """Whether vLLM computes these layers as a DeciLM alone, and not as the family itself."""
    of_its_own = other_width(anatomy) or some_slide(anatomy)
    return per_layer(anatomy) or (anatomy.model_type in DIVIDED and of_its_own)


def query_heads(layers: tuple[LayerAnatomy, ...]) -> int:
    """The smallest number of query heads that each layer's KV heads divide with room for those that read them."""
    step = math.lcm(*(layer.kv_heads for layer in layers))
    needed = max(layer.kv_heads * max(map(len, groups_of(layer))) for layer in layers)
    return step * -(-needed // step)


def decilm_config(anatomy: Anatomy) -> dict[str, Any]:
    """The config.json of a DeciLM with the layers of `anatomy`.

    It names every value, since a DeciLM's defaults are those of Llama and not of the base's family.
    """
    layers, heads, config = anatomy.layers, query_heads(anatomy.layers), anatomy.config.to_dict()
    kept = {key: value for key, value in config.items() if key not in DROPPED}
    blocks = [
        {
            "attention": {"no_op": False, "n_heads_in_group": heads // layer.kv_heads},
            "ffn": {"no_op": False, "intermediate_size": config["intermediate_size"]},
        }
        for layer in layers
    ]
    kept |= {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        OWN_CODE: {"AutoConfig": f"{Path(CODE).stem}.DeciLMConfig"},
        "head_dim": layers[0].head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": layers[0].kv_heads,
        "block_configs": blocks,
        "attention_bias": layers[0].biases == "qkvo",
    }
    if layers[0].biases == "qkv":
        kept["qkv_bias"] = True
    if windows := {layer.window for layer in layers if layer.window}:
        kept["sliding_window"] = windows.pop()
        kept["layer_types"] = [SLIDING if layer.window else FULL for layer in layers]
    return kept


def _obstacles_of_layers(anatomy: Anatomy) -> list[Obstacle]:
    """Why a DeciLM cannot hold layers whose numbers of heads no stock config can give; []: it can."""
    layers, (what, uniform) = anatomy.layers, unlike_stock(anatomy)
    if any(layer.qk_norm for layer in layers):
        return [Obstacle(f"{what}, and QK-norm: its DeciLM has no QK-norm", uniform)]
    if anatomy.model_type not in PER_LAYER:
        families = ", ".join(PER_LAYER)
        return [Obstacle(f"{what} of {anatomy.model_type}: its DeciLM computes {families} alone", uniform)]
    if {layer.biases for layer in layers} - {"", "qkv", "qkvo"} or len({layer.biases for layer in layers}) > 1:
        return [
            Obstacle(f"{what}, and biases in a part of the projections: its DeciLM has no place for them", uniform)
        ]
    if (act := anatomy.config.get_text_config().hidden_act) != "silu":
        return [Obstacle(f"{what}, and {act} as the MLP's activation: its DeciLM computes silu alone", uniform)]
    widest = max(layer.heads for layer in layers)
    if (heads := query_heads(layers)) > MOST_PADDING * widest:
        counts = ", ".join(map(str, sorted({layer.kv_heads for layer in layers})))
        why = f"all layers of a DeciLM have the same number of query heads, and no number below {heads} fits all"
        return [Obstacle(f"layers with {counts} KV heads: {why}", "numbers of KV heads that divide one another")]
    return []


def _obstacles_of_size(anatomy: Anatomy) -> list[Obstacle]:
    """Why vLLM cannot compute heads of this size; []: it can. No surgery changes the size of a head."""
    others = sorted({layer.head_dim for layer in anatomy.layers} - set(HEAD_SIZES))
    if not others:
        return []
    sizes, known = (", ".join(map(str, numbers)) for numbers in (others, HEAD_SIZES))
    nearest = "a result of a base whose heads have one of these sizes"
    return [Obstacle(f"heads of size {sizes}: on a CPU it computes sizes {known} alone", nearest)]


def _write_padded(source: Path, layers: tuple[LayerAnatomy, ...], heads: int, target: Path) -> None:
    """Copy a file of weights; layers with fewer query heads than `heads`, or in unequal groups, get heads of zeros."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        wanted = {name: changes for layer in layers for name, changes in _projections(layer, heads).items()}
        if not names & wanted.keys():
            shutil.copyfile(source, target)
            return
        tensors = {name: file.get_tensor(name) for name in names}
    for name in names & wanted.keys():
        layer, axis = wanted[name]
        tensors[name] = padded(tensors[name], groups_of(layer), heads, layer.head_dim, axis)
    save_file(tensors, target, metadata)


def _projections(layer: LayerAnatomy, heads: int) -> dict[str, tuple[LayerAnatomy, int]]:
    """Tensors of a layer that get heads of zeros -> the layer, and the axis of the heads; {} if it needs none."""
    if layer.heads == heads and not layer.query_groups:
        return {}
    query, output = f"{layer.path}.{layer.layout.q}", f"{layer.path}.{layer.layout.o}.weight"
    return {f"{query}.weight": (layer, 0), f"{query}.bias": (layer, 0), output: (layer, 1)}


def padded(weight: Tensor, groups: list[list[int]], heads: int, head_dim: int, axis: int) -> Tensor:
    """A weight with heads of zeros after the query heads of each KV head, so that all groups have the same size.

    Args:
        weight: query heads of `head_dim` channels along `axis`; [heads * head_dim, D], [heads * head_dim] or
            [D, heads * head_dim].
        groups: for each KV head the query heads that read it.
        heads: number of query heads of the result, which the number of groups divides.
    """
    parts = weight.unflatten(axis, (-1, head_dim)).movedim(axis, 0)
    size = heads // len(groups)
    made = parts.new_zeros((len(groups), size, *parts.shape[1:]))
    for group, members in zip(made, groups, strict=True):
        group[: len(members)] = parts[members]
    return made.flatten(0, 1).movedim(0, axis).flatten(axis, axis + 1).contiguous()
