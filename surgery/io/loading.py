"""Running one model for its figures: load it, score a window of text, compare with what another model left.

A scored window leaves in a file, for each predicted token, the `top_k` most probable next tokens and the mass
of all others: `evaluation` needs only one model in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.io.files import read_json
from surgery.io.safetensors import SINGLE_FILE, WEIGHT_INDEX
from surgery.machine.transformers_logging import quiet_in_pipes, quiet_transformers

if TYPE_CHECKING:
    import torch

    Source = str | Path | torch.nn.Module  # a model folder, or a loaded Transformers model

# False, not left out: with None, Transformers asks "run the code of this repository? [y/N]" on the terminal.
STRICT = {"local_files_only": True, "trust_remote_code": False}
LOAD_OVERHEAD = 1.3  # memory of a loaded model over its bytes on disk, with room for activations
ROWS = 128  # tokens whose log-probabilities are in memory as float32 at once


def score_model(
    source: Source,
    pieces: torch.Tensor,
    folder: Path | None,
    top_k: int,
    tick: Callable[[int], None],
    allow_pickle: bool = False,
) -> dict[str, torch.Tensor]:
    """Score every window with one model, which is gone from memory after the call if it was loaded here.

    Args:
        source: model folder, or loaded model (left in the mode it was in).
        pieces: LongTensor [windows, length].
        folder: where the windows' files are or will be; None keeps nothing and compares with nothing.
        top_k: tokens to keep, at most the vocabulary.
        tick: called with the number of windows done.
        allow_pickle: see `load_model`.

    Returns:
        The vectors of `score_window`, joined over the windows.
    """
    import torch

    scores: dict[str, list] = {}
    with loaded(source, allow_pickle) as model:
        for number, piece in enumerate(pieces):
            kept = folder / f"{number}.safetensors" if folder else None
            for name, values in score_window(model, piece, kept, top_k).items():
                scores.setdefault(name, []).append(values)
            tick(number + 1)
    return {name: torch.cat(parts) for name, parts in scores.items()}


def score_window(model, piece: torch.Tensor, kept: Path | None, top_k: int) -> dict[str, torch.Tensor]:
    """Run one window of tokens [length]. Where there is no file `kept`, leave one; where there is, compare
    with it.

    Returns:
        Vectors [length - 1]: "loss" (nats, float64); after a comparison also "kl" (nats, float64; see
        `evaluate`) and "same" (bool: the same token is the most probable one).
    """
    import torch
    from safetensors.torch import load, save

    with torch.no_grad():
        logits = model(input_ids=piece[None].to(model.device), use_cache=False).logits[0, :-1]
    targets = piece[1:].to(logits.device)
    known = load(kept.read_bytes()) if kept and kept.is_file() else None
    if known and int(known["vocabulary"]) != logits.shape[-1]:
        raise SurgeryError(f"base and out give {int(known['vocabulary'])} and {logits.shape[-1]} logits a token")
    rows: dict[str, list] = {"loss": []}

    def add(name: str, values: torch.Tensor) -> None:
        rows.setdefault(name, []).append(values.cpu())

    for first in range(0, len(targets), ROWS):
        here = slice(first, first + ROWS)
        logp = logits[here].float().log_softmax(-1)
        add("loss", -logp.gather(-1, targets[here, None])[:, 0])
        if not kept:
            continue
        # argmax, not topk's first: of two equal logits each may pick another, and a model must agree with
        # itself.
        best = logp.argmax(-1).cpu()
        where = known["tokens"][here].to(logp.device).long() if known else logp.topk(top_k).indices
        mine = logp.gather(-1, where)
        rest = logp.scatter(-1, where, -math.inf).logsumexp(-1, keepdim=True)
        mine = torch.cat([mine, rest], dim=-1).cpu()  # [rows, top_k + 1]
        if known:
            theirs, mine = known["logp"][here].double(), mine.double()
            gap = theirs.exp() * (theirs - mine)
            # 0 * log(0 / q) is 0; rounding can leave a sum of -1e-9, which no KL is.
            add("kl", gap.where(theirs > -math.inf, 0).sum(-1).clamp(min=0))
            add("same", best == known["best"][here])
        else:
            for name, values in (("tokens", where.int()), ("logp", mine), ("best", best)):
                add(name, values)
    joined = {name: torch.cat(parts) for name, parts in rows.items()}
    if kept and not known:
        facts = {name: joined.pop(name).contiguous() for name in ("tokens", "logp", "best")}
        kept.write_bytes(save(facts | {"vocabulary": torch.tensor(logits.shape[-1])}))
    return joined | {"loss": joined["loss"].double()}


@contextmanager
def loaded(source: Source, allow_pickle: bool = False) -> Iterator[Any]:
    """The model in eval mode; a loaded one goes back to the mode that it was in."""
    if isinstance(source, str | Path):
        with quiet_transformers():  # on a terminal too: the bar of the scoring is there
            model = load_model(source, allow_pickle=allow_pickle)
    else:
        model = source
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)


def load_model(folder: str | Path, *, allow_pickle: bool = False, **kwargs):
    """A model folder as a Transformers model; quiet in pipes, and no code and no pickle of the folder is run.

    Args:
        allow_pickle: also read .bin weights (Transformers does it with `weights_only=True`).
        kwargs: for `from_pretrained`; the dtype is that of the file unless `dtype` says otherwise.

    Raises:
        SurgeryError: not a model folder, no safetensors, weights that are missing or of another shape.
    """
    folder = Path(folder)
    auto = auto_class(folder)
    if not allow_pickle:
        refuse_pickle(folder)
    given = {"dtype": "auto", **STRICT, "use_safetensors": None if allow_pickle else True} | kwargs
    with quiet_in_pipes(), _reading(folder):
        model, info = auto.from_pretrained(folder, **(given | {"output_loading_info": True}))
    # Transformers fills what is missing with random numbers; every figure would be one too.
    if lost := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise SurgeryError(f"{len(lost)} weights are missing, the first is {lost[0]}", where=str(folder))
    return (model, info) if kwargs.get("output_loading_info") else model


def refuse_pickle(folder: Path) -> None:
    """Raise where a folder has no safetensors: a pickle can run code, and is read with --allow-pickle alone."""
    if (folder / SINGLE_FILE).is_file() or (folder / WEIGHT_INDEX).is_file():
        return
    kinds = (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    found = sorted(path.name for path in folder.iterdir() if path.suffix in kinds)
    pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in found)
    raise SurgeryError(
        f"no {SINGLE_FILE} and no {WEIGHT_INDEX}",
        where=str(folder),
        exists=", ".join(found) or "no weight file",
        fix="pickles can run code and are not loaded; surgery apply RECIPE FOLDER -o OUT --allow-pickle converts them"
        if pickled
        else "name a folder that holds safetensors weights",
    )


def auto_class(folder: Path):
    """The Auto class that loads a folder as what generates text: causal, or image-text for a composite."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = read_config(folder)
    composite = config.get_text_config() is not config  # some composites are in the causal mapping as well
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not composite:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def read_config(source: Source):
    if not isinstance(source, str | Path):
        return source.config
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise SurgeryError("not a model folder: it has no config.json", where=str(folder), fix="name a saved model")
    from transformers import AutoConfig

    if reason := no_class(folder):
        raise SurgeryError(reason, where=str(folder), fix="a model with code of its own cannot be loaded here")
    with _reading(folder):
        return AutoConfig.from_pretrained(folder, **STRICT)


def no_class(folder: Path) -> str:
    """Why stock Transformers cannot load such a model, or ""."""
    from transformers import CONFIG_MAPPING

    from surgery.runtime import register

    register()
    kind = read_json(Path(folder) / "config.json").get("model_type")
    return "" if kind in CONFIG_MAPPING else f"Transformers has no class for model_type {kind!r}"


def read_tokenizer(source: Source):
    if not isinstance(source, str | Path):
        raise SurgeryError("a loaded model has no tokenizer", fix="evaluate(..., tokenizer=tokenizer)")
    folder = Path(source)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
    # Asked first, since some tokenizer classes come up empty where there is no file, without a word.
    if not any(any(folder.glob(name)) for name in names):
        raise SurgeryError(
            "no tokenizer files",
            where=str(folder),
            fix="copy the base's tokenizer files there, or skip scoring with --no-eval",
        )
    from transformers import AutoTokenizer

    with _reading(folder):
        return AutoTokenizer.from_pretrained(folder, **STRICT)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Transformers' many ways to say that a folder does not load, as one SurgeryError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SurgeryError(f"Transformers cannot load this: {first}", where=str(folder)) from error


def too_big(weights: int, memory: int | None = None, extra: int = 0) -> str:
    """Why a model does not fit in memory, or "".

    Args:
        weights: its bytes on disk (0 for a model that is in memory already).
        memory: bytes that may be used; default what is free now.
        extra: bytes needed besides the model.
    """
    free = free_memory() if memory is None else memory
    need = int(LOAD_OVERHEAD * weights) + extra
    if free is None or need <= free:
        return ""
    return f"needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"


def free_memory() -> int | None:
    """Bytes that a process may still take, or None where the system does not say (all but Linux)."""
    try:
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:  # a container's limit; page cache counts as used there, but can be given back
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):  # no container, or "max": no limit
        pass
    return free


def refuse_wrapped(model) -> None:
    """Only a plain Transformers model can be edited: not one with adapters, compiled, wrapped or offloaded."""
    adapters = hasattr(model, "peft_config") or any(
        type(module).__module__.startswith("peft.") for module in model.modules()
    )
    if adapters:
        raise SurgeryError(
            "the model carries adapters, which would no longer fit the new weights",
            where=type(model).__name__,
            fix="merge them first: model = model.merge_and_unload()",
        )
    if not hasattr(model, "config") or hasattr(model, "_orig_mod"):
        raise SurgeryError(
            "this is not a plain Transformers model",
            where=type(model).__name__,
            fix="pass the model inside the wrapper",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SurgeryError(
            "some weights are not in memory (offloaded, or never loaded)",
            where=type(model).__name__,
            fix="load the model without device_map, or convert the folder: surgery.apply(recipe, folder, output=...)",
        )


DONE = "_surgery_reports"  # attribute of a model: the reports of what was done to it in this process


def is_model(model) -> bool:
    return hasattr(model, "named_parameters") and hasattr(model, "config")
