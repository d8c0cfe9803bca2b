"""Compare a checkpoint with its own config without loading it: shapes, and attention layers one at a time.

Both checks build the model without memory (on the meta device) and match each stored tensor with one of its tensors.
Names on disk may differ from names in memory by a prefix; `names_in_memory` finds it.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.families import LAYER_PATHS
from surgery.errors import SurgeryError
from surgery.io.safetensors import Checkpoint

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
NOTED = "noted"  # no fault, but the user should know it
PROBE = 16  # tokens of the random input of a layer
# Prefixes that a module's name may have: the parents of the layer lists in families.py, the longest first.
_PARENTS = {path.rpartition(".")[0] for paths in LAYER_PATHS.values() for path in paths}
PREFIXES = sorted((f"{parent}." if parent else "" for parent in _PARENTS), key=len, reverse=True)


class NotRun(Exception):
    """A check cannot be run on this checkpoint; the message is the reason."""


def names_in_memory(stored, wanted) -> dict[str, str]:
    """Stored name -> the model's name, for tensors whose two names are equal or differ only by a known prefix.

    Args:
        stored: names on disk.
        wanted: the model's names.
    """
    matches = {}
    for name in stored:
        if name in wanted:
            matches[name] = name
            continue
        tails = [name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix)]
        candidates = (prefix + tail for tail in tails for prefix in PREFIXES)
        if match := next((candidate for candidate in candidates if candidate in wanted), None):
            matches[name] = match
    used = list(matches.values())  # if two stored tensors match one name, neither match is kept
    return {name: match for name, match in matches.items() if name == match or used.count(match) == 1}


def compare_shapes(folder: Path, anatomy: Anatomy, checkpoint: Checkpoint) -> tuple[str, str]:
    """Check that every stored tensor has the shape that the config gives its module; returns (status, detail).

    Attention was verified when the anatomy was read. Tensors that Transformers renames on load (experts that it
    fuses) are counted but not compared, because loading compares them.
    """
    layer, total = anatomy.layers[0], len(checkpoint.tensors)
    try:
        wanted = {key: tuple(tensor.shape) for key, tensor in empty_model(folder).state_dict().items()}
    except NotRun as reason:
        return NOT_RUN, str(reason)
    except Exception as error:  # Transformers accepts the config, but its model class does not
        return FAILED, f"no model can be made from this config: {error}"[:500]
    known = names_in_memory(checkpoint.tensors, wanted)
    for key, match in known.items():
        if checkpoint.tensors[key].shape != wanted[match]:
            return FAILED, f"{key} has shape {list(checkpoint.tensors[key].shape)}, the config says " + str(
                list(wanted[match])
            )
    if 2 * len(known) < total or not known:
        return NOT_RUN, f"Transformers renames on load: only {len(known)} of {total} tensors have the model's names"
    kinds = f"{layer.heads} query heads, {layer.kv_heads} KV heads, head size {layer.head_dim}"
    if layer.latent:
        kinds = f"{layer.heads} query heads, a latent vector of {layer.latent.rank} numbers"
    heads = f"{len(anatomy.layers)} layers, {kinds}"
    return PASSED, f"{len(known)} of {total} tensors compared; {heads}"


def empty_model(folder: Path):
    """The folder's model on the meta device: it has shapes and code, but takes no memory.

    Raises:
        NotRun: Transformers has no class for it.
    """
    import torch

    from surgery.io.loading import auto_class, no_class
    from surgery.io.model_folder import load_config

    if reason := no_class(folder):
        raise NotRun(reason)
    with torch.device("meta"):
        return auto_class(folder).from_config(load_config(folder), trust_remote_code=False)


def run_layers(folder: Path, anatomy: Anatomy, checkpoint: Checkpoint) -> tuple[str, str]:
    """Run every attention layer alone on random input, with one layer in memory at a time; returns (status, detail).

    Weights that do not fit their module and values that are not finite are faults. An attention module that cannot be
    called alone is no fault: the model may be sound, but too large for this machine.
    """
    try:
        model = empty_model(folder)
    except NotRun as reason:
        return NOT_RUN, str(reason)
    except Exception as error:
        return FAILED, f"no model can be made from this config: {error}"[:500]
    try:
        known = names_in_memory(checkpoint.tensors, dict.fromkeys(model.state_dict()))
        for layer in anatomy.layers:
            path = _path_in_memory(layer, known)
            module = model.get_submodule(path)
            arguments = _arguments(model, module, path, anatomy.config, layer.index)
            if set(dict(module.named_buffers())) - set(module.state_dict()):
                raise NotRun(f"{anatomy.model_type}'s attention computes tensors when it is made")
            module.to_empty(device="cpu")
            prefix = f"{layer.path}."
            state = {n[len(prefix) :]: checkpoint.read(n) for n in checkpoint.tensors if n.startswith(prefix)}
            try:
                missing = module.load_state_dict(state, strict=False).missing_keys
            except RuntimeError as error:
                return FAILED, f"layer {layer.index}: {' '.join(str(error).split())}"[:500]
            if missing:
                return FAILED, f"layer {layer.index}: {', '.join(missing[:3])} missing"
            finite, dtype = _forward(module, arguments, anatomy.model_type)
            if not finite:
                return FAILED, f"layer {layer.index} gives NaN or infinite values"
            module.to("meta")
    except NotRun as reason:
        return NOT_RUN, str(reason)
    except SurgeryError as error:
        return FAILED, str(error)
    except Exception as error:  # no module where one was expected: that says nothing about the weights
        return NOT_RUN, f"{type(error).__name__}: {error}"[:500]
    return PASSED, f"{len(anatomy.layers)} attention layers run in fp32 (stored as {dtype})"


def _path_in_memory(layer, known: dict[str, str]) -> str:
    """The attention module's path in the model, found by the name of its output projection there."""
    stored = f"{layer.path}.{layer.layout.o}.weight"
    if stored not in known:
        raise NotRun(f"no module of the model is {layer.path}")
    return known[stored].removesuffix(f".{layer.layout.o}.weight")


def _arguments(model, module, path: str, config, index: int) -> dict:
    """Keyword arguments for an attention module: only those that its forward accepts."""
    import torch

    accepted = inspect.signature(module.forward).parameters
    hidden = torch.randn(1, PROBE, config.hidden_size, generator=torch.Generator().manual_seed(index))
    positions = torch.arange(PROBE)[None]
    arguments = {"hidden_states": hidden, "attention_mask": None, "position_ids": positions, "alibi": None}
    if "position_embeddings" in accepted:
        arguments["position_embeddings"] = _embeddings(model, path, config, hidden, positions, index)
    required = {
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    if missing := sorted(required - set(arguments)):
        raise NotRun(f"{config.model_type}'s attention needs {', '.join(missing)} and does not run on its own")
    return {name: value for name, value in arguments.items() if name in accepted}


def _embeddings(model, path: str, config, hidden, positions, index: int):
    """RoPE's cosines and sines from a new copy of the model's rotary module; None if the model has none."""
    owner = model.get_submodule(re.sub(rf"\.?\w+\.{index}\.\w+$", "", path))
    if getattr(owner, "rotary_emb", None) is None:
        return None
    rotary = type(owner.rotary_emb)(config)
    kinds = getattr(config, "layer_types", None)
    extra = [kinds[index]] if "layer_type" in inspect.signature(rotary.forward).parameters else []
    return rotary(hidden, positions, *extra)


def _forward(module, arguments: dict, model_type: str) -> tuple[bool, object]:
    """Whether the output is finite, and the dtype in which the weights are stored."""
    import torch

    dtype = next(module.parameters()).dtype
    module.to(torch.float32)
    try:
        with torch.no_grad():
            out = module(**arguments)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotRun(f"{model_type}'s attention does not run on its own ({reason})"[:300]) from None
    out = out[0] if isinstance(out, tuple) else out
    return bool(out.isfinite().all()), dtype
