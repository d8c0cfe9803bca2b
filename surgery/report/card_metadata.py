"""The metadata block of the model card, which the Hub reads, lists and searches."""

from __future__ import annotations

import re

from surgery.evaluation import probes
from surgery.report.card_sections import get, operations_of
from surgery.report.gate import finite

# Tags of the base that name formats, engines or scores that the converted model does not have.
STALE_TAGS = {
    "gguf", "onnx", "mlx", "openvino", "coreml", "tflite", "tf", "jax", "rust", "pytorch", "transformers.js",
    "exl2", "gptq", "awq", "model-index", "eval-results", "leaderboard", "autotrain_compatible",
    "endpoints_compatible", "text-generation-inference", "custom_code",
}  # fmt: skip
# The order of keys that cards on the Hub use; the figures come last.
ORDER = (
    "license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "base_model",
    "base_model_relation", "tags", "model-index",
)  # fmt: skip


def metadata(report: dict, base: dict, title: str) -> str:
    """The block as YAML, without its fences.

    Args:
        report: the content of surgery.json.
        base: the metadata of the base's card. Only licence, language, task and tags are taken over, not its scores,
            widgets, gating prompts or formats.
        title: the card's title; the Hub lists the figures under it.
    """
    from huggingface_hub.repocard_data import ModelCardData  # the package itself would import its client

    languages, base_model, results = _listed(base.get("language")), hub_base(report), _results(report)
    task = "image-text-to-text" if get(report, "base").get("composite") else "text-generation"
    tags = ["attention-surgery", *operations_of(report), *["custom_code"] * (report.get("tier") == "surgical")]
    tags += [tag for tag in _listed(base.get("tags")) if tag.lower() not in STALE_TAGS and ":" not in tag]
    data = ModelCardData(
        base_model=base_model,
        language=(languages if len(languages) > 1 else languages[0]) if languages else None,
        library_name="transformers",
        license=base.get("license") or get(report, "base").get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=base.get("pipeline_tag") or task,
        tags=list(dict.fromkeys(tags)),
        **({"model_name": title, "eval_results": results} if results else {}),
        **({"base_model_relation": "finetune"} if base_model else {}),  # the nearest value: the Hub has no "converted"
    )
    return data.to_yaml(original_order=list(ORDER)).strip()


def hub_base(report: dict) -> str | None:
    """The Hub id of the base, or of the nearest ancestor that has one. The Hub rejects anything else."""
    for record in [report, *reversed(report.get("history") or [])]:
        for name in (get(record, "base").get("hub_id"), get(record, "base").get("base_model")):
            if name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)):
                return str(name)
    return None


def _listed(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    # YAML reads `no`, the code of Norwegian, as false.
    return ["no" if each is False else str(each) for each in values if each is not None]


def _results(report: dict) -> list:
    """Every figure of the converted model that was measured and is finite."""
    from huggingface_hub.repocard_data import EvalResult

    evaluation, results = get(report, "evaluation"), []
    if evaluation.get("status", "done") != "done":
        return []
    found = probes.done(evaluation) if evaluation else []
    for about, metrics in (each for cls, record in found for each in cls.metrics(record)):
        about = {key: value for key, value in about.items() if value is not None}
        name = str(about.pop("name", None) or "an untitled text")
        for metric in metrics:
            if finite(metric.value):
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=re.sub(r"\W+", "-", name.lower()).strip("-"),
                        dataset_name=name,
                        dataset_args=about or None,
                        metric_type=metric.kind,
                        metric_name=metric.name,
                        metric_value=round(float(metric.value), 4),
                        metric_args={"base": round(float(metric.base), 4)} if finite(metric.base) else None,
                    )
                )
    return results
