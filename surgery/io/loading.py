"""Loading a model, its config and its tokenizer, and refusing what is no plain model of Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from surgery.errors import ModelError, SurgeryError, UnsupportedModelError, shown
from surgery.io.files import read_json, utf8
from surgery.io.model_folder import read_config_json
from surgery.io.safetensors import SINGLE_FILE, WEIGHT_INDEX, read_index
from surgery.machine import placement
from surgery.machine.transformers_logging import quiet_transformers

if TYPE_CHECKING:
    import torch

    ModelSource = str | Path | torch.nn.Module  # a model folder, or a loaded Transformers model

# False, not left out: with None, Transformers asks "run the code of this repository? [y/N]" on the terminal.
STRICT = {"local_files_only": True, "trust_remote_code": False}


@contextmanager
def loaded(source: ModelSource, allow_pickle: bool = False, *, beside: int = 0) -> Iterator[Any]:
    """Yield the model in eval mode, on the run's device; one that was loaded before keeps its device and mode."""
    if isinstance(source, str | Path):
        model = load_for_run(source, allow_pickle=allow_pickle, beside=beside)
    else:
        model = source
    with eval_mode(model):
        yield model
    if model is not source:
        devices = {parameter.device for parameter in model.parameters()}
        del model  # the caller's name may still hold it
        for device in devices:
            placement.give_back(device)


@contextmanager
def eval_mode(model) -> Iterator[None]:
    """Put a model in eval mode, and every module back in its own mode afterwards: a part of it may have another.

    Threads may do that with one model at the same time: the last one to end restores what the first one found.
    """
    with _MODES:
        users, modes = _in_eval_mode.get(model) or (0, [(module, module.training) for module in model.modules()])
        _in_eval_mode[model] = users + 1, modes
        model.eval()
    try:
        yield
    finally:
        with _MODES:
            users, modes = _in_eval_mode.pop(model)
            if users > 1:
                _in_eval_mode[model] = users - 1, modes
            else:
                for module, training in modes:
                    module.training = training


_MODES, _in_eval_mode = Lock(), {}  # model -> how many use it, and its modules' modes


def load_for_run(
    folder: str | Path, *, allow_pickle: bool = False, use: placement.Use = placement.PASSES, beside: int = 0
) -> Any:
    """Load a model as `load_model` does, on the device and in the dtype of this run (`machine.placement`).

    Args:
        use, beside: as for `placement.put`.

    Raises:
        SurgeryError: as for `load_model`.
        MachineError: the device that was named has no room for it.
    """
    with quiet_transformers():  # on a terminal as well: scoring has a bar of its own there
        model = load_model(folder, allow_pickle=allow_pickle, dtype=placement.run_dtype())
        return placement.put(model, use=use, beside=beside)


def load_model(folder: str | Path, *, allow_pickle: bool = False, **kwargs) -> Any:
    """Load a model folder as a Transformers model, quietly in pipes; no code and no pickle of the folder is run.

    Args:
        allow_pickle: also read .bin weights (Transformers does it with `weights_only=True`).
        kwargs: for `from_pretrained`; the dtype is that of the file unless `dtype` names another.

    Raises:
        SurgeryError: not a model folder, no safetensors, weights that are missing or of another shape.
    """
    folder = Path(folder).absolute()  # the model remembers where it was loaded from; ".." may follow a link
    refuse_adapter(folder)
    auto = auto_class(folder)
    if not allow_pickle:
        refuse_pickle(folder)
    options = {"dtype": "auto", **STRICT, "use_safetensors": None if allow_pickle else True} | kwargs
    # Tensors of other shapes are listed, and refused below: Transformers itself would only say that there are some.
    listed = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet_transformers(), _loading_errors(folder):
        model, info = auto.from_pretrained(folder, **(options | listed))
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise ModelError(
            f"{name} has the shape {tuple(stored)} in the file, and {tuple(expected)} by config.json{more}",
            where=str(folder),
            fix="check the sizes in config.json against the model's original",
        )
    # Transformers fills what is missing with random numbers: every figure would be random, too.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{len(missing)} weights are missing, the first is {missing[0]}", where=str(folder))
    return (model, info) if kwargs.get("output_loading_info") else model


def refuse_adapter(folder: Path) -> None:
    """Raise where an adapter lies beside the weights: Transformers adds it whenever the folder is loaded.

    A conversion would lose it, and every figure of the base would be the adapter's.
    """
    if (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        raise UnsupportedModelError(
            "this folder holds an adapter next to the weights, and Transformers adds it whenever it loads the folder",
            where=str(folder),
            fix="move the adapter_* files into a folder ADAPTER of their own; to have it in the weights, merge it: "
            "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), ADAPTER).merge_and_unload()"
            ".save_pretrained(MERGED)",
        )


def refuse_pickle(folder: Path) -> None:
    """Raise where weights would not be read as safetensors: a pickle can run code, and needs --allow-pickle."""
    if (folder / SINGLE_FILE).is_file():
        return
    if (folder / WEIGHT_INDEX).is_file():
        named = sorted(set(read_index(folder / WEIGHT_INDEX)["weight_map"].values()))
        # Transformers goes by the name, and reads a file of any other as a pickle.
        if other := next((name for name in named if not name.endswith(".safetensors")), ""):
            raise SurgeryError(
                f"the index names {shown(other)}, which Transformers would read as a pickle",
                where=str(folder / WEIGHT_INDEX),
                fix="pickles can run code and are not loaded; name a folder whose index names .safetensors files",
                code="unsafe-weights",
            )
        return
    suffixes = (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    files = sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in files)
    raise SurgeryError(
        f"no {SINGLE_FILE} and no {WEIGHT_INDEX}",
        where=str(folder),
        exists=", ".join(files) or "no weight file",
        fix="pickles can run code and are not loaded; surgery apply RECIPE FOLDER -o OUT --allow-pickle converts them"
        if pickled
        else "name a folder that holds safetensors weights",
        code="unsafe-weights",
    )


def auto_class(folder: Path):
    """The Auto class that loads a folder as a model that generates text: causal, or image-text for a composite."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = read_config(folder)
    composite = config.get_text_config() is not config  # some composites are in the causal mapping as well
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not composite:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def read_config(source: ModelSource):
    """The config of a model folder or of a loaded model; never runs code from the folder.

    Raises:
        SurgeryError: no config.json, or one that stock Transformers cannot load.
    """
    if not isinstance(source, str | Path):
        return source.config
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise ModelError("not a model folder: it has no config.json", where=str(folder), fix="name a saved model")
    from transformers import AutoConfig

    if reason := no_class(folder):
        raise UnsupportedModelError(
            reason, where=str(folder), fix="a model with code of its own cannot be loaded here"
        )
    with _loading_errors(folder):
        return AutoConfig.from_pretrained(folder, **STRICT)


def no_class(folder: Path) -> str:
    """Explain why stock Transformers cannot load such a model; "" if it can."""
    from transformers import CONFIG_MAPPING

    from surgery.runtime import register

    register()
    kind = read_config_json(Path(folder)).get("model_type")
    return "" if kind in CONFIG_MAPPING else f"Transformers has no class for model_type {kind!r}"


def read_tokenizer(source: ModelSource):
    """The tokenizer of a model folder; never runs code from the folder.

    Raises:
        SurgeryError: a loaded model, a folder without tokenizer files, or files that Transformers cannot read.
    """
    if not isinstance(source, str | Path):
        raise SurgeryError("a loaded model has no tokenizer", fix="evaluate(..., tokenizer=tokenizer)")
    folder = Path(source)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
    # Checked first: some tokenizer classes are silently empty where there is no file.
    if not any(any(folder.glob(name)) for name in names):
        raise ModelError(
            "no tokenizer files",
            where=str(folder),
            fix="copy the base's tokenizer files there; `surgery apply --no-eval` needs none for weights alone",
        )
    from transformers import AutoTokenizer

    with _loading_errors(folder), quiet_transformers():  # it warns of a surgical config, of which it needs no class
        return AutoTokenizer.from_pretrained(folder, **STRICT)


@contextmanager
def _loading_errors(folder: Path) -> Iterator[None]:
    """Turn whatever Transformers raises for a folder that does not load into one SurgeryError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason, fix = (str(error).strip() or type(error).__name__).splitlines()[0], ""
        if isinstance(error, KeyError):  # of a table, and says no more than what is not in it
            reason = _unknown(folder, error.args[0] if error.args else None)
        elif utf8(str(folder)) != str(folder) and "utf-8" in reason.lower():
            reason, fix = "the path of this folder is not UTF-8", "rename it"
        raise ModelError(f"Transformers cannot load this: {reason}", where=str(folder), fix=fix) from error


def _unknown(folder: Path, value: object) -> str:
    """What a KeyError of Transformers says of this value, with the field of config.json that has it."""
    with suppress(SurgeryError):
        if field := _field(read_json(folder / "config.json"), value):
            return f"{field} in config.json is {shown(value)}, which it does not know"
    return f"it finds no {shown(value)}"


def _field(config: dict, value: object) -> str:
    """The field of a config that has this value, with a dot before one of a mapping; "" if none has."""
    for name, found in config.items():
        if isinstance(found, dict) and (inner := _field(found, value)):
            return f"{name}.{inner}"
        if type(found) is type(value) and found == value:
            return name
    return ""
