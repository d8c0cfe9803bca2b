"""Low-rank adapters through peft: they are added by explicit paths and merged, and the merge is checked.

Source: Hu et al. 2021, "LoRA", arXiv 2106.09685.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from surgery.errors import TrainingError
from surgery.healing.distributed import processes

if TYPE_CHECKING:
    import torch

    from surgery.config.heal import Heal
    from surgery.healing.parameters import TrainableParameters

TOLERANCE, ROUNDING = 1e-4, 1e-2  # how far a merge may move the logits, in float64 and in float32
RANDOM_SHAPE = (2, 24)  # rows and tokens of the input that checks a merge


def freeze(model, names: tuple[str, ...]) -> None:
    """Make these parameters trainable, and freeze all others."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def adapt(model, heal: Heal, trained: TrainableParameters):
    """Add low-rank updates to the linear modules of `trained`, and train its other parameters in full.

    Modules that train in full are copies, which peft saves with the adapter. The surgery's own parameters belong to
    the attention module, which contains adapted linears. They are not copied.

    Returns:
        A `peft.PeftModel` around the same model object.
    """
    from peft import LoraConfig, get_peft_model

    # The last part of a name is the parameter. A parameter that has a module of its own is trained as that module.
    own = [name for name in trained.parameters if _is_bare(model, name)]
    modules = sorted({name.rpartition(".")[0] for name in trained.parameters if name not in own})
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=heal.rank,
        lora_alpha=heal.alpha or 2 * heal.rank,
        lora_dropout=heal.dropout,
        target_modules=list(trained.adapted),
        modules_to_save=modules or None,
        fan_in_fan_out=_transposed(model, trained.adapted),
    )
    with _without_experts(model), warnings.catch_warnings():  # peft uses names that Transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    for name in own:
        model.get_parameter(name).requires_grad_(True)
    return adapted


@contextmanager
def _without_experts(model) -> Iterator[None]:
    """Hide the type of a model without experts from peft.

    For families with experts it takes all names of MLPs for those of fused experts, and would adapt none in a model
    whose MLPs are dense, as latent attention has them.
    """
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        yield
        return
    model.config.model_type = ""
    try:
        yield
    finally:
        del model.config.model_type  # its class has it


def bare(model, trained: TrainableParameters) -> list[str]:
    """The trainable parameters that an adapter file would not contain: those of the attention module itself."""
    return [name for name in trained.parameters if _is_bare(model, name)]


def merge(adapted, vocabulary: int):
    """Merge the updates into the weights; returns the model, and how far the logits of random tokens moved.

    If memory allows, the merge and its check are in float64 on the CPU: in float32, rounding moves the logits of a
    model with massive activations by a thousandth.

    Args:
        adapted: the result of `adapt`, with weights in float32, since bfloat16 would round small updates away.

    Raises:
        TrainingError: the logits moved, or the updates hold NaN; checkpoints are kept.
    """
    from surgery.machine.device import too_big

    parameters, count = list(adapted.parameters()), processes().num_processes
    device, size = parameters[0].device, sum(parameter.numel() for parameter in parameters)
    on_cpu = device.type == "cpu"
    fits = (on_cpu or count == 1) and not too_big(0, extra=(6 if on_cpu else 10) * size * count)
    try:
        if fits:
            adapted.cpu()  # not every other device has float64
        tokens = random_tokens(adapted, vocabulary)
        before = _wide_logits(adapted, tokens) if fits else None
        wide = before is not None
        if not wide:
            tokens = tokens.to(adapted.to(device).device)
            before = logits(adapted, tokens)
        try:
            model = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise TrainingError(f"the adapters cannot be merged: {error}", where="heal") from error
        after = logits(model, tokens)
    finally:
        adapted.float().to(device)
    moved, spread = (after - before).abs().max().item(), before.std().item()
    if not moved <= (TOLERANCE if wide else ROUNDING) * max(1.0, spread):
        raise TrainingError(
            f"merging the adapters moved the logits by {moved:.3g} (their spread is {spread:.3g})",
            where="heal",
            fix="heal.method=full trains without adapters",
        )
    return model, moved


def _wide_logits(model, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits in float64; the model stays in float64. Where a kernel is missing: None, and the model is in float32."""
    try:
        return logits(model.double(), tokens)
    except RuntimeError:  # the grouped product of experts has no float64 kernel
        model.float()
        return None


def random_tokens(model, vocabulary: int) -> torch.Tensor:
    """Random tokens [rows, tokens] on the model's device."""
    import torch

    return torch.randint(vocabulary, RANDOM_SHAPE, generator=torch.Generator().manual_seed(0)).to(model.device)


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of tokens; the model stays in eval mode."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def _is_bare(model, name: str) -> bool:
    """Whether a parameter belongs to a module with submodules, or to a weight that is computed (parametrized)."""
    return ".parametrizations." in name or any(True for _ in model.get_submodule(name.rpartition(".")[0]).children())


def _transposed(model, paths: tuple[str, ...]) -> bool:
    """Whether these linear modules store their weights as [in, out], as GPT-2 does."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(model.get_submodule(path), Conv1D) for path in paths)
