"""What a surgery cost and gained: perplexity, distance to the base model, KV cache bytes.

Base and patched model run one after the other, never both in memory. What is kept of the base between the two
runs is, for each predicted token, its `top_k` most probable next tokens and the mass of all others, on disk.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibration.scoring import score_model
from surgery.data.text import Text, load_text
from surgery.data.text import windows as cut
from surgery.errors import MachineError, SurgeryError
from surgery.io.loading import read_config, read_tokenizer, refuse_pickle
from surgery.io.safetensors import SINGLE_FILE, WEIGHT_INDEX, Checkpoint
from surgery.machine.device import too_big

if TYPE_CHECKING:
    import torch

    from surgery.io.loading import Source

LABELS = ("base", "out")


@dataclass
class Side:
    """One model's figures.

    Attributes:
        cross_entropy: nats per token, mean over the tokens scored; perplexity is its exponential.
        kv_bytes_per_token: KV cache of one token, all layers; None where the attention is not understood.
        load_bytes: bytes of the weight files that are loaded from the folder, or of the parameters of a loaded model.
        nonfinite_tokens: scored tokens whose log-probability is NaN or infinite. Any makes the figures NaN.
    """

    cross_entropy: float | None = None
    perplexity: float | None = None
    kv_bytes_per_token: int | None = None
    load_bytes: int | None = None
    nonfinite_tokens: int = 0


@dataclass
class Evaluation:
    """What `evaluate` measured, with the text it was measured on.

    Attributes:
        status: "done", or "not run" for the stated `reason`; then no figure of a run exists.
        text: title, sha256 (first 12 digits), tokens scored, windows, length (tokens in a window).
        base, out: each model's own figures; base is None if none was given.
        kl: KL(base || out) in nats per token: mean, p99 (99th percentile over tokens), top_k.
        top1_agreement: share of tokens where both models find the same next token most probable.
        notes: what could not be found out.
    """

    status: str
    text: dict
    out: Side
    base: Side | None = None
    kl: dict | None = None
    top1_agreement: float | None = None
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The same facts for JSON. NaN and infinity, which JSON has not, become None; `gate` fails on them."""
        facts = {"status": self.status, "reason": self.reason} if self.reason else {"status": self.status}
        facts |= {
            "text": dict(self.text),
            "base": self.base and dict(vars(self.base)),
            "out": dict(vars(self.out)),
        }
        facts |= {"kl": self.kl and dict(self.kl), "top1_agreement": self.top1_agreement}
        return finite(facts | {"notes": list(self.notes)} if self.notes else facts)


def evaluate(
    out: Source,
    base: Source | None = None,
    *,
    text: str | Path | Text = "builtin",
    windows: int = 8,
    length: int = 512,
    top_k: int = 512,
    tokenizer: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
    allow_pickle: bool = False,
) -> Evaluation:
    """Measure a model, and how far it is from its base.

    KL(base || out) is computed over the base's `top_k` tokens and one bucket that holds all the others. That
    is a lower bound of the KL over the whole vocabulary: what it misses is disagreement about tokens inside
    the bucket. With `top_k` >= vocabulary it is the KL itself. Log-softmax is done in float32, sums in
    float64, models run in their checkpoint's dtype.

    Args:
        out, base: model folder, or loaded model. A loaded model stays where and as it is.
        text: see `surgery.data.text.load_text`; of the built-in text the held-out part.
        windows, length: pieces of the text, and tokens in each; `length - 1` tokens of each are scored.
        top_k: base tokens kept for the KL.
        tokenizer: needed where no folder is given; otherwise taken from base, or from out without a base.
        progress: called as progress(done, total, label) after each window; label is "base" or "out".
        allow_pickle: the base may have .bin weights alone.

    Raises:
        SurgeryError: a folder that is not a model or has no safetensors, a text too short, models with different
            vocabularies, a base that yields NaN.
        MachineError: the temporary folder cannot be written.
    """
    sources = dict(zip(LABELS, (base, out), strict=True)) if base is not None else {"out": out}
    if top_k < 1:
        raise SurgeryError(f"top_k is {top_k}", fix="keep at least 1 token")
    words, pieces, vocabulary = tokens_to_score(sources, text, windows, length, tokenizer)
    size = {"tokens": windows * (length - 1), "windows": windows, "length": length}
    result = Evaluation("done", {"title": words.title, "sha256": words.sha256[:12], **size}, Side())
    for label, source in sources.items():
        if isinstance(source, str | Path) and not (allow_pickle and label == "base"):
            refuse_pickle(Path(source))
        setattr(result, label, measure_at_rest(source, label, result.notes))
    sizes = [getattr(result, label).load_bytes for label, it in sources.items() if isinstance(it, str | Path)]
    # 8 bytes: logits as the model returns them, at most float32, and one copy.
    if reason := too_big(max(sizes, default=0), extra=8 * length * vocabulary):
        result.status, result.reason = "not run", reason
        return result

    def tick(label: str, before: int, done: int) -> None:
        if progress:
            progress(before + done, windows * len(sources), label)

    top_k = min(top_k, vocabulary)
    try:
        with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
            folder = Path(temporary) if base is not None else None
            for run, (label, source) in enumerate(sources.items()):
                may = allow_pickle and label == "base"
                scores = score_model(source, pieces, folder, top_k, partial(tick, label, run * windows), may)
                gc.collect()  # or a model held in a cycle would still be there beside the next one
                _sum_up(getattr(result, label), scores["loss"], label)
    except OSError as error:
        raise MachineError(
            f"cannot keep the base's log-probabilities: {error}", where=tempfile.gettempdir()
        ) from error
    if base is not None:
        kl = scores["kl"]
        percentile = kl.quantile(0.99) if kl.isfinite().all() else kl.max()
        result.kl = {"mean": kl.mean().item(), "p99": percentile.item(), "top_k": top_k}
        result.top1_agreement = scores["same"].double().mean().item()
    return result


def tokens_to_score(
    sources: dict[str, Source], text, windows: int, length: int, tokenizer=None
) -> tuple[Text, torch.Tensor, int]:
    """The text, its windows [windows, length] and the size of the vocabulary; no weight is read.

    Raises:
        SurgeryError: whatever makes it impossible to score these models on this text.
    """
    configs = {label: read_config(source) for label, source in sources.items()}
    vocabulary = _vocabulary(configs, length)
    words = load_text(text, part="held-out")
    pieces = cut(words, tokenizer or read_tokenizer(next(iter(sources.values()))), length=length, count=windows)
    if (largest := int(pieces.max())) >= vocabulary:
        raise SurgeryError(
            f"the tokenizer gives token {largest}, the model knows {vocabulary}",
            fix="use the tokenizer of this model",
        )
    return words, pieces, vocabulary


def measure_at_rest(source: Source, label: str, notes: list[str]) -> Side:
    """What can be said of a model without running it."""
    from surgery.architecture.anatomy import Anatomy

    side = Side(load_bytes=_bytes(source))
    try:
        side.kv_bytes_per_token = int(Anatomy.of(source).kv_bytes_per_token)
    except SurgeryError as error:
        notes.append(f"KV bytes of {label} are unknown: {error.what}")
    return side


def _bytes(source: Source) -> int:
    """Bytes of what is loaded: other weight files in the folder (adapters, `consolidated*`) do not count."""
    if not isinstance(source, str | Path):
        return sum(weight.numel() * weight.element_size() for weight in source.parameters())
    folder = Path(source)
    if (folder / SINGLE_FILE).is_file() or (folder / WEIGHT_INDEX).is_file():
        return Checkpoint(folder).size
    return sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))


def _sum_up(side: Side, loss: torch.Tensor, label: str) -> None:
    side.nonfinite_tokens = int((~loss.isfinite()).sum())
    if side.nonfinite_tokens and label == "base":
        raise SurgeryError(
            f"the base model itself gives NaN or infinite values ({side.nonfinite_tokens} of {len(loss)} tokens)",
            fix="check that the base loads and generates; a float16 overflow needs bfloat16 or float32 weights",
        )
    side.cross_entropy = loss.mean().item()
    side.perplexity = loss.mean().exp().item()


def _vocabulary(configs: dict, length: int) -> int:
    sizes = {label: config.get_text_config().vocab_size for label, config in configs.items()}
    if len(set(sizes.values())) > 1:
        raise SurgeryError(
            f"base and out have different vocabularies: {sizes['base']} and {sizes['out']} tokens",
            fix="compare a model with the one it was made from",
        )
    for label, config in configs.items():
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest and length > longest:
            raise SurgeryError(
                f"{label} takes {longest} tokens, the windows have {length}",
                fix=f"--length {longest} (in a recipe: evaluate.length={longest})",
            )
    return next(iter(sizes.values()))


def finite(value):
    """The same structure with None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
