"""A model that is in memory: what it is, which surgeries it had, its origin, and whether its weights were changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.errors import UnsupportedModelError

DONE = "_surgery_reports"  # attribute of a model that holds the reports of its surgeries in this process


def is_model(model: Any) -> bool:
    """Whether an object has the parameters and the config of a loaded model."""
    return hasattr(model, "named_parameters") and hasattr(model, "config")


def refuse_wrapped(model: Any) -> None:
    """Raise unless this is a plain Transformers model: one with adapters, compiled, wrapped or offloaded is not."""
    adapters = hasattr(model, "peft_config") or any(
        type(module).__module__.startswith("peft.") for module in model.modules()
    )
    if adapters:
        raise UnsupportedModelError(
            "the model carries adapters, which would no longer fit the new weights",
            where=type(model).__name__,
            fix="merge them first: model = model.merge_and_unload()",
        )
    if not hasattr(model, "config") or hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "this is not a plain Transformers model",
            where=type(model).__name__,
            fix="pass the model inside the wrapper",
        )
    if computed := next((name for name, module in model.named_modules() if hasattr(module, "parametrizations")), ""):
        raise UnsupportedModelError(
            f"weights of {computed} are computed from others (torch.nn.utils.parametrize)",
            where=type(model).__name__,
            fix="remove_parametrizations(module, 'weight') first, which keeps the weight that they compute",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            "some weights are not in memory (offloaded, or never loaded)",
            where=type(model).__name__,
            fix="load the model without device_map, or convert the folder: surgery.apply(recipe, folder, output=...)",
        )


def origin(model: Any) -> str:
    """The folder or the Hub id that a model was loaded from, the latter with its revision; "" where it was not."""
    name = getattr(model.config, "_name_or_path", "")
    if not name or Path(name).is_dir():
        return name
    if name.count("/") != 1:
        return ""
    revision = getattr(model.config, "_commit_hash", None)
    return f"{name}@{revision}" if revision else name


def origin_folder(model: Any) -> Path | None:
    """The folder that a model was loaded from, or None."""
    name = getattr(model.config, "_name_or_path", "")
    return Path(name).absolute() if name and (Path(name) / "config.json").is_file() else None


def version_of(weight: Any) -> int:
    """How often PyTorch counted a write into a weight; 0 where it counts none (torch.inference_mode)."""
    return 0 if weight.is_inference() else weight._version


def weights_version(model: Any) -> int:
    """A number that changes with each training step: PyTorch counts the writes into each parameter."""
    return hash(tuple((id(weight), version_of(weight)) for weight in model.parameters()))
