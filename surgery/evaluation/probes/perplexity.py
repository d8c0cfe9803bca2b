"""The main probe: perplexity, distance to the base model, KV cache bytes.

Base and converted model run one after the other, never both in memory. Between the two runs, the base's predictions
are kept on disk: for each predicted token, the `top_k` most probable next tokens and the mass of all others.
"""

from __future__ import annotations

import gc
import math
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from surgery.architecture.anatomy import positions_of
from surgery.calibration.scoring import score_model
from surgery.data.text import BUILTIN, Text, load_text
from surgery.data.text import windows as text_windows
from surgery.errors import MachineError, ModelError, ModelMismatchError, RecipeMismatchError
from surgery.evaluation.base_runs import BaseRuns
from surgery.evaluation.figures import Evaluation, Side
from surgery.evaluation.footprint import footprint
from surgery.evaluation.paired import sides
from surgery.evaluation.probes.base import (
    Aliases,
    Effort,
    Flag,
    Limit,
    Metric,
    Probe,
    Progress,
    RecipeField,
    Row,
    Table,
)
from surgery.evaluation.probes.fields import TextSource
from surgery.io.loading import read_config, read_tokenizer, refuse_pickle
from surgery.io.printing import count
from surgery.machine.device import too_big

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from surgery.architecture.anatomy import Anatomy
    from surgery.io.loading import ModelSource

UNKNOWN = 0.2  # share of unknown tokens above which a note says that the text does not suit the model
NO_MODEL = 10_000  # a base with a higher perplexity is no language model
DAMAGE_RATIO, DAMAGE_KL = 2.0, 1.0  # beyond either limit a model is reported as not usable

SCORED = ("cross_entropy", "perplexity", "nonfinite_tokens")  # figures of a side that come from its run
STAGES = {"base": "scoring the base", "out": "scoring the converted model"}  # label -> what progress reports
SCORING = "scoring the model"  # the same if there is no base


class Perplexity(Probe):
    """Perplexity, KL from the base, same best token, KV bytes and load size."""

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "perplexity, KL, same best token, KV bytes"
    main: ClassVar[bool] = True

    text: TextSource = Field(
        BUILTIN, description="'builtin' (the held-out part of Python's reference) or a text file."
    )
    windows: int = Field(8, ge=1, description="Windows of text that are scored.")
    length: int = Field(512, ge=2, description="Tokens in a window.")
    top_k: int = Field(512, ge=1, description="Tokens of the base that the KL is computed over; the rest are one.")

    limits: ClassVar[dict[str, Limit]] = {
        "max_kl": Limit(
            lambda record: (record.get("kl") or {}).get("mean"),
            at_least=False,
            description="Gate: mean KL to the base in nats per token, at most.",
            words="KL",
        ),
        "max_perplexity_ratio": Limit(
            lambda record: _ratio(record),
            at_least=False,
            description="Gate: perplexity over the base's, at most.",
            words="perplexity ratio",
        ),
        "min_top1": Limit(
            lambda record: record.get("top1_agreement"),
            at_least=True,
            description="Gate: share of equal best tokens, at least.",
            most=1,
            words="same best token",
        ),
    }
    aliases: ClassVar[Aliases] = Aliases(
        flags={
            "text": Flag("text", "The text to measure on: builtin, or a UTF-8 text file.", metavar="FILE"),
            "windows": Flag("windows", "Score this many windows of the text.", int, 1),
            "length": Flag("length", "Make each window this many tokens long.", int, 2),
        },
        recipe={
            "windows": RecipeField("windows", int, Field(8, ge=1, description="Windows of text that are scored.")),
            "length": RecipeField("length", int, Field(512, ge=2, description="Tokens in a window.")),
        },
        limits=("max_kl", "max_perplexity_ratio", "min_top1"),
        last=("min_top1",),
    )

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        longest = positions_of(config)
        return {"length": longest} if longest and 2 <= longest < self.length else {}

    @property
    def effort(self) -> Effort:
        return Effort(self.windows * self.length, self.length)

    def stages(self, compared: bool = True) -> list[str]:
        return [*STAGES.values()] if compared else [SCORING]

    def refuse(self, base: ModelSource, out: Anatomy) -> None:
        """Raise the errors that `tokens` raises for the base alone."""
        self.tokens({"base": base})

    def measure(
        self,
        out: ModelSource,
        base: ModelSource | None = None,
        *,
        tokenizer: Any = None,
        progress: Progress | None = None,
        allow_pickle: bool = False,
        shared: BaseRuns | None = None,
    ) -> Evaluation:
        """See `Probe.measure`; `progress` is called after each window.

        KL(base || out) is computed over the base's `top_k` tokens and one bucket that holds all the others. That
        is a lower bound of the KL over the whole vocabulary: it misses disagreement about tokens inside the bucket.
        With `top_k` >= vocabulary it is the KL itself. Models run in their checkpoint's dtype, log-softmax in
        float32, sums in float64. `length - 1` tokens of each window are scored.

        Raises:
            SurgeryError: a folder is not a model or has no safetensors, the text is too short, the models have
                different vocabularies, or the base gives NaN.
            MachineError: the temporary folder cannot be written.
        """
        sources = sides(out, base)
        text, samples, vocabulary, unknown = self.tokens(sources, tokenizer)
        size = {"tokens": self.windows * (self.length - 1), "windows": self.windows, "length": self.length}
        result = Evaluation("done", {"title": text.title, "sha256": text.sha256[:12], **size}, Side())
        if unknown > UNKNOWN:
            result.notes.append(
                f"{unknown:.0%} of the scored tokens are unknown to this tokenizer: the figures say little of "
                "the model; score a text of its language (text=FILE)"
            )
        for label, source in sources.items():
            if isinstance(source, str | Path) and not (allow_pickle and label == "base"):
                refuse_pickle(Path(source))
            setattr(result, label, Side.of(vars(footprint(source, label, result.notes))))
        load_sizes = [getattr(result, label).load_bytes for label, it in sources.items() if isinstance(it, str | Path)]
        # 8 bytes for each logit: the model returns at most float32, and one copy is made.
        if reason := too_big(max(load_sizes, default=0), extra=8 * self.length * vocabulary):
            result.status, result.reason = "not run", reason
            return result
        top_k = min(self.top_k, vocabulary)
        kept = shared.windows(samples, top_k) if shared and base is not None else None
        scores = self._run(result, sources, samples, top_k, progress, allow_pickle, kept)
        if base is not None:
            kl = scores["kl"]
            percentile = kl.quantile(0.99) if kl.isfinite().all() else kl.max()
            result.kl = {"mean": kl.mean().item(), "p99": percentile.item(), "top_k": top_k}
            result.top1_agreement = scores["same"].double().mean().item()
        return result

    def tokens(self, sources: dict[str, ModelSource], tokenizer: Any = None) -> tuple[Text, torch.Tensor, int, float]:
        """The text, its windows [windows, length], the size of the vocabulary, and the share of unknown tokens.

        No weight is read.

        Raises:
            SurgeryError: these models cannot be scored on this text.
        """
        configs = {label: read_config(source) for label, source in sources.items()}
        vocabulary = _vocabulary(configs)
        for label, config in configs.items():
            if (longest := positions_of(config) or self.length) < self.length:
                fix = f"a length of {longest}: --length {longest}; in a recipe evaluate.length={longest}"
                what = f"it takes {longest} tokens, the windows have {self.length}"
                raise RecipeMismatchError(what, where=label, fix=fix)
        text = load_text(self.text, part="held-out")
        tokenizer = tokenizer or read_tokenizer(next(iter(sources.values())))
        samples = text_windows(text, tokenizer, length=self.length, count=self.windows)
        if (largest := int(samples.max())) >= vocabulary:
            raise ModelMismatchError(
                f"the tokenizer gives token {largest}, the model knows {vocabulary}",
                fix="use the tokenizer of this model",
            )
        token = getattr(tokenizer, "unk_token_id", None)
        unknown = 0.0 if token is None else (samples == token).double().mean().item()
        return text, samples, vocabulary, unknown

    def _run(self, result, sources, samples, top_k: int, progress, allow_pickle: bool, kept: Path | None) -> dict:
        """Score one model after the other; returns the scores of the last one, compared with the first.

        Args:
            kept: a folder that keeps what the base scored, and may have it already; None: a temporary folder.
        """

        def tick(label: str, done: int) -> None:
            if progress:
                progress(done, self.windows, STAGES[label] if "base" in sources else SCORING)

        try:
            with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
                folder = kept or (Path(temporary) if "base" in sources else None)
                for label, source in sources.items():
                    if kept and label == "base" and (known := BaseRuns.figures(kept, self.windows)):
                        result.base = replace(result.base, **known)
                        continue
                    for file in kept.glob("*.safetensors") if kept and label == "base" else ():
                        file.unlink()  # of a run that was interrupted, perhaps while it was written
                    may_be_pickle = allow_pickle and label == "base"
                    tick_of_side = partial(tick, label)
                    tick_of_side(0)
                    scores = score_model(source, samples, folder, top_k, tick_of_side, may_be_pickle)
                    gc.collect()  # otherwise a model in a reference cycle would stay in memory during the next run
                    side = getattr(result, label)
                    _sum_up(side, scores["loss"], label)
                    if kept and label == "base":
                        BaseRuns.keep_figures(kept, {name: getattr(side, name) for name in SCORED})
        except OSError as error:
            raise MachineError(
                f"cannot keep the base's log-probabilities: {error}", where=tempfile.gettempdir()
            ) from error
        return scores

    @classmethod
    def missing(cls, record: dict) -> str:
        return ""  # a missing figure fails the gate

    @classmethod
    def faults(cls, record: dict) -> list[str]:
        out = record["out"]
        if _is_number(out.get("perplexity")):
            return []
        return [f"the converted model's perplexity is not a number ({out.get('nonfinite_tokens')} tokens are NaN)"]

    @classmethod
    def damage(cls, record: dict) -> list[str]:
        """See `Probe.damage`: perplexity more than doubled, mean KL above 1, or NaN."""
        base, out, kl = (record.get(key) or {} for key in ("base", "out", "kl"))
        before, after, mean, costs = base.get("perplexity"), out.get("perplexity"), kl.get("mean"), []
        # JSON has null for NaN; a figure that was not measured has no key.
        if "perplexity" in out and not _is_number(after):
            costs.append("its perplexity is not a number")
        elif _is_number(before) and _is_number(after) and before > 0 and after / before > DAMAGE_RATIO:
            costs.append(f"its perplexity is {after / before:.3g} times the base's")
        if "mean" in kl and not _is_number(mean):
            costs.append("its KL to the base is not a number")
        elif _is_number(mean) and mean > DAMAGE_KL:
            costs.append(f"its mean KL to the base is {mean:.3g} nats per token")
        return costs

    @classmethod
    def worst(cls, record: dict) -> tuple[float, str]:
        lost, line = super().worst(record)
        before, after = ((record.get(side) or {}).get("perplexity") for side in ("base", "out"))
        near = 1 - before / after if _is_number(before) and _is_number(after) and after > before > 0 else lost
        return (near if line else 0.0), line

    @classmethod
    def rows(cls, record: dict) -> list[Row]:
        base, out, kl = (record.get(key) or {} for key in ("base", "out", "kl"))
        loss = "cross-entropy, nats per token"
        return [
            Row("perplexity", base.get("perplexity"), out.get("perplexity")),
            Row(loss, base.get("cross_entropy"), out.get("cross_entropy"), "{:.4f}", ratio=False),
            Row("KL from the base, mean, nats per token", None, kl.get("mean")),
            Row("KL from the base, 99th percentile", None, kl.get("p99")),
            Row("same best token as the base", None, record.get("top1_agreement"), "{:.1%}"),
        ]

    @classmethod
    def metrics(cls, record: dict) -> list[tuple[dict, list[Metric]]]:
        text, base, out, kl = (record.get(key) or {} for key in ("text", "base", "out", "kl"))
        about = {key: text[key] for key in ("sha256", "windows", "length") if text.get(key) is not None}
        metrics = [
            Metric("perplexity", "perplexity", out.get("perplexity"), base.get("perplexity")),
            Metric("kl_divergence", "KL from the base, nats per token", kl.get("mean")),
            Metric("accuracy", "same best token as the base", record.get("top1_agreement")),
        ]
        return [({"name": text.get("title")} | about, metrics)]

    @classmethod
    def sentence(cls, record: dict) -> str:
        base, out, kl = (record.get(key) or {} for key in ("base", "out", "kl"))
        figures = old, new, kl, same = (
            base.get("perplexity"),
            out.get("perplexity"),
            kl.get("mean"),
            record.get("top1_agreement"),
        )
        if None in figures:
            return ""
        perplexities = f"perplexity {shown_perplexity(old)} → {shown_perplexity(new)}"
        return f"{perplexities}, KL {kl:.3f} nats, same best token {same:.1%}"

    @classmethod
    def paragraph(cls, record: dict) -> str:
        """The text that was scored."""
        text, top_k = record.get("text") or {}, (record.get("kl") or {}).get("top_k")
        if not text:
            return "The text that it was measured on was not recorded."
        details = [f"sha256 `{str(text['sha256'])[:12]}`"] if text.get("sha256") else []
        details += [f"{text['tokens']:,} tokens"] if text.get("tokens") else []
        details += [f"{text['windows']} windows of {text.get('length')}"] if text.get("windows") else []
        title = text.get("title") or "an untitled text"
        line = f"Measured on *{title}* ({', '.join(details)}), base and result alike."
        return line + (
            f" KL is over the base's {top_k} likeliest tokens, the rest as one: a lower bound." if top_k else ""
        )

    @classmethod
    def lines(cls, result: Evaluation) -> list[Table | str]:
        record = result.to_dict()
        text, base, new = record["text"], record["base"], record["out"]
        rows = []
        for label, key, form in (
            ("perplexity", "perplexity", "{:,.3f}"),
            ("cross-entropy, nats", "cross_entropy", "{:.4f}"),
            ("KV bytes per token", "kv_bytes_per_token", "{:,}"),
            ("bytes of weights", "load_bytes", "{:,}"),
        ):
            cells = [side.get(key) for side in ((base, new) if base else (new,))]
            quotient = [_quotient(*cells)] if base else []
            rows.append([label, *("?" if cell is None else form.format(cell) for cell in cells), *quotient])
        headers = ("", "base", "converted", "ratio") if base else ("", "model")
        lines: list[Table | str] = [Table(headers, rows)]
        if base and (record["kl"] or {}).get("mean") is not None:
            kl, same = record["kl"], record["top1_agreement"]
            lines.append(f"KL from the base: mean {kl['mean']:.4f}, 99th percentile {kl['p99']:.3f} nats per token")
            lines.append(f"same best token: {same:.1%}")
            lines.append(
                f"The KL is a lower bound: it takes the base's {kl['top_k']} likeliest tokens, and all others as one."
            )
        if not {"tokens", "title", "sha256"} <= text.keys():  # a record of an earlier version
            return lines
        windows = f" ({count(text['windows'], 'window')} of {text['length']:,})" if text.get("windows") else ""
        return [
            *lines,
            f"Measured on {count(text['tokens'], 'token')}{windows} of {text['title']} (sha256 {text['sha256']}).",
        ]

    @classmethod
    def verdict(cls, record: dict) -> str:
        ratio = _ratio(record) if record.get("base") else None
        if ratio is None or cls.damage(record):
            return super().verdict(record)
        near = "within 0.05% of" if 0.9995 <= ratio < 1.0005 else f"{ratio:.3f} times"
        words = f"The perplexity is {near} the base's"
        same = record.get("top1_agreement")
        return words + (
            f", and the best token is the same at {same:.1%} of the positions." if same is not None else "."
        )


def _quotient(base: float | None, new: float | None) -> str:
    """The converted model's figure over the base's, for a cell."""
    return f"{new / base:.3f}" if base and new is not None else ""


def shown_perplexity(value: float) -> str:
    """A perplexity with two decimals; above `NO_MODEL`, with four significant digits."""
    return f"{value:,.2f}" if value <= NO_MODEL else f"{value:.4g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _ratio(record: dict) -> float | None:
    perplexities = (record["out"].get("perplexity"), record["base"].get("perplexity"))
    return perplexities[0] / perplexities[1] if all(map(_is_number, perplexities)) else None


def _sum_up(side: Side, loss: torch.Tensor, label: str) -> None:
    side.nonfinite_tokens = int((~loss.isfinite()).sum())
    if side.nonfinite_tokens and label == "base":
        raise ModelError(
            f"the base model itself gives NaN or infinite values ({side.nonfinite_tokens} of {len(loss)} tokens)",
            fix="check that the base loads and generates; a float16 overflow needs bfloat16 or float32 weights",
        )
    side.cross_entropy = loss.mean().item()
    side.perplexity = loss.mean().exp().item()


def _vocabulary(configs: dict) -> int:
    sizes = {label: config.get_text_config().vocab_size for label, config in configs.items()}
    if len(set(sizes.values())) > 1:
        raise ModelMismatchError(
            f"base and out have different vocabularies: {sizes['base']} and {sizes['out']} tokens",
            fix="compare a model with the one it was made from",
        )
    return next(iter(sizes.values()))
