"""Latent attention (MLA) in vLLM: what it can hold, and the weights that it reads.

vLLM differs from Transformers in two ways. Its norm of the latent vector has the epsilon of the other norms, where
Transformers has one of its own: rows that are scaled by the root of their ratio give the same vector. And it reads an
output layer from the file also where the embedding is one with it.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.architecture.latent import NORM_EPSILON
from surgery.engines.base import NO_LATENT, Obstacle, obstacles_of_latent
from surgery.io.files import read_json, write_json

if TYPE_CHECKING:
    from surgery.architecture.anatomy import Anatomy

RANK, ROPE = 512, 64  # channels of the vector and of the rotated key that its attention computes
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# The rotation of strided queries, which vLLM 0.32 computes wrongly on a CPU; its own code in torch is right.
WRONG_OPERATION = "-rotary_embedding"


def refusals(anatomy: Anatomy) -> list[Obstacle]:
    """Why vLLM cannot run these layers with latent attention; []: it can."""
    scaled, activation = "it takes every scaling for YaRN", "its DeepSeek computes silu alone"
    others = obstacles_of_latent(anatomy, scaled, activation)
    latent = anatomy.latent
    if latent is None or (latent.rank, latent.rope) == (RANK, ROPE):
        return others
    what = (
        f"a latent vector of {latent.rank} and a rotated key of {latent.rope}: its attention takes {RANK} and {ROPE} "
        "alone"
    )
    nearest = f"mla rank={RANK} rope={ROPE}, where the base's cache holds more numbers; or {NO_LATENT}"
    return [Obstacle(what, nearest), *others]


def vector_factor(anatomy: Anatomy) -> float:
    """The factor on the rows that make the vector, with which vLLM's norm gives what Transformers' does."""
    return math.sqrt(anatomy.config.rms_norm_eps / NORM_EPSILON)


def write_latent_weights(source: Path, anatomy: Anatomy, target: Path) -> None:
    """Copy a file of weights, or the index of several, as vLLM reads them.

    Rows that are scaled are written in float32: a server that runs in bfloat16 rounds them as it reads them.
    """
    tied, factor = anatomy.config.tie_word_embeddings, vector_factor(anatomy)
    if source.suffix == ".json":
        _write_index(source, tied, target)
        return
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    vectors = {f"{layer.path}.{layer.layout.k}.weight" for layer in anatomy.layers}
    rank = anatomy.latent.rank if anatomy.latent else 0
    with safe_open(source, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        if not (tied and EMBEDDING in names) and (factor == 1 or not names & vectors):
            shutil.copyfile(source, target)
            return
        tensors = {name: file.get_tensor(name) for name in names}
    for name in names & vectors:
        rows = tensors[name].double()
        rows[:rank] *= factor
        tensors[name] = rows.to(torch.float32)
    if tied and EMBEDDING in names:
        tensors[OUTPUT] = tensors[EMBEDDING].clone()
    save_file(tensors, target, metadata)


def _write_index(source: Path, tied: bool, target: Path) -> None:
    index: dict[str, Any] = read_json(source)
    if tied:
        index["weight_map"][OUTPUT] = index["weight_map"][EMBEDDING]
        index.get("metadata", {}).pop("total_size", None)  # the index's own sum, which nothing reads
    write_json(target, index)
