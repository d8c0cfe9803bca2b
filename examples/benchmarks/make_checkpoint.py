"""Write a Llama checkpoint of random bf16 weights, of any size, in shards; needs nothing but Python.

    python examples/benchmarks/make_checkpoint.py FOLDER --gib 4

The weights are noise: the checkpoint loads and converts like a real one, but generates no meaningful text. It serves
to measure speed and memory, and to test conversions that are killed.
"""

from __future__ import annotations

import argparse
import json
import random
from math import prod
from pathlib import Path

POOL = 32 << 20  # bytes of noise; every tensor is cut from it at a random offset
ONE = b"\x80\x3f"  # 1.0 as little-endian bf16


def make_checkpoint(
    folder: str | Path,
    size: int,
    *,
    shards: int = 4,
    hidden: int = 4096,
    heads: int = 32,
    kv_heads: int = 8,
    mlp: int = 14336,
    vocab: int = 32000,
    seed: int = 0,
) -> Path:
    """Write config.json, the shards and their index.

    Args:
        folder: created if missing.
        size: the least number of bytes of weights; layers are added until it is reached.
        shards: the largest number of files; tensors are spread in order, so a layer may lie in two files.
        hidden, heads, kv_heads, mlp, vocab: the shape of the model; 4096, 32, 8, 14336 is Llama 3 8B.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    outer = {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    layers = 0
    while not layers or 2 * sum(map(prod, (shapes | outer).values())) < size:
        shapes |= _layer_shapes(layers, hidden, hidden // heads * kv_heads, mlp)
        layers += 1
    shapes |= outer
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "max_position_embeddings": 4096,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    noise, rng, weight_map = _noise(seed), random.Random(seed), {}
    runs = _split(shapes, shards)
    for number, names in enumerate(runs, 1):
        file = f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        _write(folder / file, {name: shapes[name] for name in names}, noise, rng)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * sum(map(prod, shapes.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def _layer_shapes(number: int, hidden: int, kv: int, mlp: int) -> dict[str, tuple[int, ...]]:
    path = f"model.layers.{number}"
    return {
        f"{path}.input_layernorm.weight": (hidden,),
        f"{path}.mlp.down_proj.weight": (hidden, mlp),
        f"{path}.mlp.gate_proj.weight": (mlp, hidden),
        f"{path}.mlp.up_proj.weight": (mlp, hidden),
        f"{path}.post_attention_layernorm.weight": (hidden,),
        f"{path}.self_attn.k_proj.weight": (kv, hidden),
        f"{path}.self_attn.o_proj.weight": (hidden, hidden),
        f"{path}.self_attn.q_proj.weight": (hidden, hidden),
        f"{path}.self_attn.v_proj.weight": (kv, hidden),
    }


def _noise(seed: int) -> memoryview:
    """Random bf16 numbers between 2^-7 and 2^-3 in size, of both signs: finite, with full mantissas."""
    rng, values = random.Random(seed), bytearray(POOL)
    values[0::2] = rng.randbytes(POOL // 2)
    values[1::2] = rng.randbytes(POOL // 2).translate(bytes(0x3C | (byte & 0x81) for byte in range(256)))
    return memoryview(values)


def _split(shapes: dict[str, tuple[int, ...]], shards: int) -> list[list[str]]:
    """The names in order, in `shards` runs of about equal size (fewer where one tensor fills more than its share)."""
    total, position, runs = sum(map(prod, shapes.values())), 0, [[] for _ in range(shards)]
    for name, shape in shapes.items():
        runs[min(position * shards // total, shards - 1)].append(name)
        position += prod(shape)
    return [run for run in runs if run]


def _write(path: Path, shapes: dict[str, tuple[int, ...]], noise: memoryview, rng: random.Random) -> None:
    """One safetensors file: 8 bytes of header length, a JSON header, the data."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = position + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left, start = 2 * prod(shape), 2 * rng.randrange(POOL // 2)
            if "norm" in name:
                file.write(ONE * prod(shape))
                continue
            while left:
                left -= file.write(noise[start : start + left])
                start = 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the weights, at least")
    parser.add_argument("--shards", type=int, default=4)
    options = parser.parse_args()
    print(make_checkpoint(options.folder, int(options.gib * 2**30), shards=options.shards))
