"""The model card: what was changed, what it cost, how to load it, and the base's own card below.

`render_card` takes surgery.json as a dict. A missing key is no error: the card says what was not measured.
"""

from __future__ import annotations

import re

import yaml

from surgery.evaluation import probes
from surgery.evaluation.probes.base import Row
from surgery.io.files import split_card
from surgery.report.card_sections import (
    base_name,
    fenced,
    get,
    healing,
    licence,
    limits,
    loading,
    operations_of,
    provenance,
    searched,
)
from surgery.report.gate import damage, finite

# Tags of the base that speak of formats, engines or scores which this folder does not have.
STALE_TAGS = {
    "gguf", "onnx", "mlx", "openvino", "coreml", "tflite", "tf", "jax", "rust", "pytorch", "transformers.js",
    "exl2", "gptq", "awq", "model-index", "eval-results", "leaderboard", "autotrain_compatible",
    "endpoints_compatible", "text-generation-inference", "custom_code",
}  # fmt: skip
TIERS = {
    "native": "The result is **native**: a stock checkpoint that Transformers loads, with no extra code.",
    "surgical": "The result is **surgical**: it needs the code in this folder, or the `attention-surgery` package.",
}


def render_card(report: dict, base_card: str | None) -> str:
    """README.md of an output folder.

    Args:
        report: the content of surgery.json; `evaluation`, `check`, `gate` and most other keys may be missing or None.
        base_card: README.md of the base, with its metadata, or None.

    Returns:
        Markdown with a metadata block that the Hub accepts.
    """
    metadata, base_text = split_card(base_card or "")
    recipe = yaml.safe_dump(get(report, "recipe"), sort_keys=False, allow_unicode=True)
    sections = [
        f"# {_title(report)}",
        *_warnings(report),
        _summary(report),
        "## What it costs and what it saves\n\n" + _table(report),
        *healing(report),
        "## How to load\n\n" + loading(report),
        "## Checks\n\n" + _checks(report),
        "## Limits\n\n" + limits(report),
        "## Recipe\n\n" + fenced(recipe, "yaml"),
        "## How it was made\n\n" + provenance(report),
        "## Licence\n\n" + licence(report, metadata),
    ]
    if base_text.strip():
        origin_note = "*Written for the base model. Every score in it is the base's, not this model's.*"
        sections.append(f"## The base model's card\n\n{origin_note}\n\n{base_text.strip()}")
    return f"---\n{_metadata(report, metadata)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(report: dict, base: dict) -> str:
    from huggingface_hub.repocard_data import ModelCardData  # the package would import its client for the same

    def listed(value: object) -> list[str]:
        values = value if isinstance(value, list) else [value]
        # `no`, the code of Norwegian, is false to YAML.
        return ["no" if each is False else str(each) for each in values if each is not None]

    tags = ["attention-surgery", *operations_of(report), *["custom_code"] * (report.get("tier") == "surgical")]
    tags += [tag for tag in listed(base.get("tags")) if tag.lower() not in STALE_TAGS and ":" not in tag]
    task = "image-text-to-text" if get(report, "base").get("composite") else "text-generation"
    languages, base_model = listed(base.get("language")), _base_model(report)
    # The rest of the base's metadata is left out: scores, widgets, gating prompts, formats.
    data = ModelCardData(
        base_model=base_model,
        language=(languages if len(languages) > 1 else languages[0]) if languages else None,
        library_name="transformers",
        license=base.get("license") or get(report, "base").get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=base.get("pipeline_tag") or task,
        tags=list(dict.fromkeys(tags)),
        **({"base_model_relation": "finetune"} if base_model else {}),  # the nearest: there is no "converted"
    )
    return data.to_yaml().strip()


def _base_model(report: dict) -> str | None:
    """The Hub id of the base, or of the nearest ancestor that has one. The Hub rejects anything else."""
    for record in [report, *reversed(report.get("history") or [])]:
        for name in (get(record, "base").get("hub_id"), get(record, "base").get("base_model")):
            if name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)):
                return str(name)
    return None


def _title(report: dict) -> str:
    base = str(get(report, "base").get("base_model") or base_name(report))
    return f"{base.rsplit('/', 1)[-1]}, {' + '.join(operations_of(report)) or 'attention surgery'}"


def _done(report: dict) -> dict:
    """The evaluation, if it was run."""
    evaluation = get(report, "evaluation")
    return evaluation if evaluation.get("status", "done") == "done" else {}


def _warnings(report: dict) -> list[str]:
    """The first lines of the card, where the model is not fit for use or that is not known."""
    gate, lines = get(report, "gate"), []
    status = gate.get("status") or "not run"
    if costs := damage(get(report, "evaluation")):
        when = "even after healing" if report.get("heal") else "before healing"
        lines.append(f"> **Not usable {when}.** On the text named below, {' and '.join(costs)}.")
    if status == "failed":
        lines.append(f"> **The quality gate failed.** {'; '.join(map(str, gate.get('reasons') or []))}".rstrip())
    elif status != "passed" and gate.get("limits"):  # without limits there is no gate that could be run
        lines.append(f"> **The quality gate: {status}.** Measure this model before you rely on it.")
    return ["\n>\n".join(lines)] if lines else []


def _summary(report: dict) -> str:
    what = "; ".join(map(str, get(report, "plan").get("changes") or [])) or "attention changed by the recipe below"
    base, name = get(report, "base"), base_name(report)
    origin = f"[{name}](https://huggingface.co/{name})" if base.get("hub_id") else f"`{name}`"
    origin += f" ({base['note']})" if base.get("note") else ""
    trained = [f"Then healed by training ({get(report, 'heal')['settings']['method']})"] if report.get("heal") else []
    sentences = (f"Made from {origin} with attention-surgery: {what}", *searched(report), *trained)
    summary = " ".join(f"{each}." for each in sentences)
    return f"{summary} {TIERS.get(str(report.get('tier')), '')}".rstrip()


def _table(report: dict) -> str:
    """The table of base and result, and the paragraphs of the probes. A figure that is not known is left empty."""
    recorded, evaluation, plan = get(report, "evaluation"), _done(report), get(report, "plan")
    base, out = get(recorded, "base"), get(recorded, "out")  # cache and load size are known without a run
    fixed = get(plan, "kv_bytes_fixed")  # only of streaming heads
    cache, sizes = get(plan, "kv_bytes_per_token"), get(plan, "parameters")
    kv = base.get("kv_bytes_per_token") or cache.get("before"), out.get("kv_bytes_per_token") or cache.get("after")
    window = Row("KV cache, bytes of sinks and windows (fixed)", fixed.get("before"), fixed.get("after"), "{:,.0f}")
    rows = [
        *(row for cls, result in probes.done(evaluation) for row in cls.rows(result)),
        Row("KV cache, bytes per token", *kv, "{:,.0f}"),
        *[window] * bool(fixed.get("before") or fixed.get("after")),
        Row("weights, bytes", base.get("load_bytes"), out.get("load_bytes"), "{:,.0f}"),
        Row("parameters", sizes.get("before"), sizes.get("after"), "{:,.0f}"),
    ]
    lines = ["| | base | this model | ratio |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        cells = [row.form.format(value) if finite(value) else "" for value in (row.base, row.model)]
        both = all(cells) and row.base > 0 and row.ratio
        if any(cells):
            lines.append(f"| {row.name} | {cells[0]} | {cells[1]} | {f'{row.model / row.base:.3g}' if both else ''} |")
    why = recorded.get("reason") or recorded.get("status") or "no evaluation was asked for"
    main_text = probes.main().paragraph(evaluation) if evaluation else f"Quality was **not measured**: {why}."
    note = get(report, "base").get("note")
    notes = [f"Base: {note}."] * bool(note) + [f"{each}." for each in recorded.get("notes") or []]
    others = [(cls, get(evaluation, cls.name)) for cls in probes.every() if not cls.main]
    paragraphs = [paragraph for cls, result in others if result and (paragraph := cls.paragraph(result))]
    return "\n\n".join(["\n".join(lines)] * (len(lines) > 2) + paragraphs + [" ".join([main_text, *notes])])


def _checks(report: dict) -> str:
    check, gate = get(report, "check"), get(report, "gate")
    lines = [(str(item.get("name")), item.get("status"), item.get("detail")) for item in check.get("items") or []]
    passed = {True: "passed", False: "failed"}.get(check.get("passed"), "not run")
    lines = lines or [("`surgery check`", passed, "")]
    bounds = ", ".join(f"{key} {value}" for key, value in get(gate, "limits").items())
    reasons = "; ".join(map(str, gate.get("reasons") or []))
    verdict = gate.get("status") or "not run"
    lines.append((f"quality gate, {bounds}", verdict, reasons) if bounds else ("quality gate", "none", "no limits"))
    return "\n".join(f"- {name}: **{status}**{f' ({detail})' if detail else ''}" for name, status, detail in lines)
