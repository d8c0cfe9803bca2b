"""Low-rank adapters through peft: added by explicit paths, merged, and the merge is checked.

Source: Hu et al. 2021, "LoRA", arXiv 2106.09685.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from surgery.errors import TrainingError
from surgery.healing.distributed import processes

if TYPE_CHECKING:
    import torch

    from surgery.config.heal import Heal
    from surgery.healing.parameters import TrainableParameters

TOLERANCE, ROUNDING = 1e-4, 1e-2  # of the logits, in float64 and in float32
RANDOM_SHAPE = (2, 24)  # rows and tokens of the input that checks a merge


def freeze(model, names: tuple[str, ...]) -> None:
    """Let these parameters train and no others."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def adapt(model, heal: Heal, trained: TrainableParameters):
    """The model with low-rank updates on the linears of `trained`, and in full what it names besides.

    Whole modules are trained as copies that peft keeps with the adapter. The surgery's own parameters belong to the
    attention module, which holds adapted linears: they train where they are.

    Returns:
        A `peft.PeftModel` around this very model.
    """
    from peft import LoraConfig, get_peft_model

    # The last step is the parameter: what is a module of its own is trained as one.
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
    with warnings.catch_warnings():  # peft reads names that Transformers has renamed
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    for name in own:
        model.get_parameter(name).requires_grad_(True)
    return adapted


def bare(model, trained: TrainableParameters) -> list[str]:
    """Parameters that an adapter file would not hold: those of the attention module itself."""
    return [name for name in trained.parameters if _is_bare(model, name)]


def merge(adapted, vocabulary: int):
    """The model with its updates added to its weights, and by how much the logits of random tokens moved.

    The merge and its check are in float64 on the CPU, where there is memory for it: in float32 rounding moves the
    logits of a model with massive activations by a thousandth.

    Args:
        adapted: of `adapt`; its weights are in float32, since in bfloat16 a small update is rounded away.

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
    """Logits in float64, the model left in it; None, and as it was, where a kernel is missing."""
    try:
        return logits(model.double(), tokens)
    except RuntimeError:  # experts' grouped product has no float64
        model.float()
        return None


def random_tokens(model, vocabulary: int) -> torch.Tensor:
    """Random tokens [rows, tokens] on the model's device."""
    import torch

    return torch.randint(vocabulary, RANDOM_SHAPE, generator=torch.Generator().manual_seed(0)).to(model.device)


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """Of tokens; the model is left in eval mode."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def _is_bare(model, name: str) -> bool:
    """Whether a parameter belongs to a module that has modules inside, or to a weight that is worked out of more."""
    return ".parametrizations." in name or any(True for _ in model.get_submodule(name.rpartition(".")[0]).children())


def _transposed(model, paths: tuple[str, ...]) -> bool:
    """Whether these linears keep their weights [in, out], as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(model.get_submodule(path), Conv1D) for path in paths)
