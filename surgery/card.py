"""The model card: what was changed, what it cost, how to load it, and the base's own card below.

`render_card` takes surgery.json as a dict. A missing piece is no error: what was not measured is said to be so.
"""

from __future__ import annotations

import math
import re
import shlex

import yaml

METHODS = {"mean": "mean pooling", "first": "keeping the first head", "random": "random heads"}
# Tags of the base that speak of formats, engines or scores which this folder does not have.
STALE_TAGS = {
    "gguf", "onnx", "mlx", "openvino", "coreml", "tflite", "tf", "jax", "rust", "pytorch", "transformers.js",
    "exl2", "gptq", "awq", "model-index", "eval-results", "leaderboard", "autotrain_compatible",
    "endpoints_compatible", "text-generation-inference", "custom_code",
}  # fmt: skip
OPERATION_LIMITS = {
    "gqa": "Fewer KV heads save KV-cache memory and decode bandwidth. The FLOPs of prefill attention do not change.",
    "expand": "More KV heads cost KV-cache memory and decode bandwidth. The function computed is the base's.",
}
TIERS = {
    "native": "The result is **native**: a stock checkpoint that Transformers loads, with no extra code.",
    "surgical": "The result is **surgical**: it needs the code in this folder, or the `attention-surgery` package.",
}
HERE = '"this repository or folder"'


def render_card(report: dict, base_card: str | None) -> str:
    """README.md of an output folder.

    Args:
        report: the content of surgery.json; `evaluation`, `check`, `gate` and most other keys may be missing or None.
        base_card: README.md of the base, with its metadata, or None.

    Returns:
        Markdown with a metadata block that the Hub accepts.
    """
    metadata, text = split_card(base_card or "")
    recipe = yaml.safe_dump(_get(report, "recipe"), sort_keys=False, allow_unicode=True)
    parts = [
        f"# {_title(report)}",
        *_warnings(report),
        _summary(report),
        "## What it costs and what it saves\n\n" + _table(report),
        "## How to load\n\n" + _loading(report),
        "## Checks\n\n" + _checks(report),
        "## Limits\n\n" + _limits(report),
        "## Recipe\n\n" + _fenced(recipe, "yaml"),
        "## How it was made\n\n" + _provenance(report),
        "## Licence\n\n" + _licence(report, metadata),
    ]
    if text.strip():
        whose = "*Written for the base model. Every score in it is the base's, not this model's.*"
        parts.append(f"## The base model's card\n\n{whose}\n\n{text.strip()}")
    return f"---\n{_metadata(report, metadata)}\n---\n\n" + "\n\n".join(parts) + "\n"


def split_card(card: str) -> tuple[dict, str]:
    """Metadata and body of a card. Unreadable metadata comes back as {}: a base's card is not ours to mend."""
    from huggingface_hub import ModelCard

    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    if not (block := re.match(r"---[ \t]*\n(.*?\n)?---[ \t]*(\n|$)", card, re.DOTALL)):
        return {}, card
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict(), card[block.end() :]
    except (ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}, card[block.end() :]


def _metadata(report: dict, base: dict) -> str:
    from huggingface_hub import ModelCardData

    def listed(value: object) -> list[str]:
        values = value if isinstance(value, list) else [value]
        # `no`, the code of Norwegian, is false to YAML.
        return ["no" if each is False else str(each) for each in values if each is not None]

    tags = ["attention-surgery", *_operations(report), *["custom_code"] * (report.get("tier") == "surgical")]
    tags += [tag for tag in listed(base.get("tags")) if tag.lower() not in STALE_TAGS and ":" not in tag]
    languages, base_model = listed(base.get("language")), _base_model(report)
    # All else of the base's metadata stays behind: scores, widgets, gating prompts, formats.
    data = ModelCardData(
        base_model=base_model,
        language=(languages if len(languages) > 1 else languages[0]) if languages else None,
        library_name="transformers",
        license=base.get("license") or _get(report, "base").get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=base.get("pipeline_tag") or "text-generation",
        tags=list(dict.fromkeys(tags)),
        **({"base_model_relation": "finetune"} if base_model else {}),  # the nearest: there is no "converted"
    )
    return data.to_yaml().strip()


def _base_model(report: dict) -> str | None:
    """The Hub id of the base, or of the nearest ancestor that has one. The Hub rejects anything else."""
    for each in [report, *reversed(report.get("history") or [])]:
        for known in (_get(each, "base").get("hub_id"), _get(each, "base").get("base_model")):
            if known and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(known)):
                return str(known)
    return None


def _get(report: dict, key: str) -> dict:
    return report.get(key) or {}


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _operations(report: dict) -> list[str]:
    return [str(op["op"]) for op in _get(report, "recipe").get("operations") or [] if op.get("op")]


def _base_name(report: dict) -> str:
    """The Hub id, or the last part of a name: a card is published, and a path says where its author lives."""
    base = _get(report, "base")
    name = str(base.get("name") or base.get("base_model") or "an unnamed base").replace("\\", "/")
    return str(base.get("hub_id") or name.rstrip("/").rsplit("/", 1)[-1])


def _title(report: dict) -> str:
    base = str(_get(report, "base").get("base_model") or _base_name(report))
    return f"{base.rsplit('/', 1)[-1]}, {' + '.join(_operations(report)) or 'attention surgery'}"


def _done(report: dict) -> dict:
    """The evaluation, if it was run."""
    evaluation = _get(report, "evaluation")
    return evaluation if evaluation.get("status", "done") == "done" else {}


def _too_costly(report: dict) -> list[str]:
    """What makes the model useless as it is: perplexity more than doubled, mean KL above 1, or NaN."""
    base, out, kl = (_get(_done(report), key) for key in ("base", "out", "kl"))
    before, after, mean, costs = base.get("perplexity"), out.get("perplexity"), kl.get("mean"), []
    # JSON has null for NaN, which is not the same as a figure that is not there.
    if "perplexity" in out and not _finite(after):
        costs.append("its perplexity is not a number")
    elif _finite(before) and _finite(after) and before > 0 and after / before > 2:
        costs.append(f"its perplexity is {after / before:.3g} times the base's")
    if "mean" in kl and not _finite(mean):
        costs.append("its KL to the base is not a number")
    elif _finite(mean) and mean > 1:
        costs.append(f"its mean KL to the base is {mean:.3g} nats per token")
    return costs


def _warnings(report: dict) -> list[str]:
    """The first lines of the card, where the model is not fit for use or nobody knows."""
    gate, lines = _get(report, "gate"), []
    status = gate.get("status") or "not run"
    if costs := _too_costly(report):
        lines.append(f"> **Not usable before healing.** On the text named below, {' and '.join(costs)}.")
    if status == "failed":
        lines.append(f"> **The quality gate failed.** {'; '.join(map(str, gate.get('reasons') or []))}".rstrip())
    elif status != "passed":
        lines.append(f"> **The quality gate: {status}.** Measure this model before you rely on it.")
    return ["\n>\n".join(lines)] if lines else []


def _summary(report: dict) -> str:
    what = "; ".join(map(str, _get(report, "plan").get("changes") or [])) or "attention changed by the recipe below"
    operations = _get(report, "recipe").get("operations") or []
    methods = dict.fromkeys(str(op["method"]) for op in operations if op.get("method"))
    how = " and ".join(METHODS.get(method, method) for method in methods if method not in what)
    base, name = _get(report, "base"), _base_name(report)
    origin = f"[{name}](https://huggingface.co/{name})" if base.get("hub_id") else f"`{name}`"
    origin += f" ({base['note']})" if base.get("note") else ""
    made = f"Made from {origin} with attention-surgery: {what}{f' by {how}' if how else ''}."
    return f"{made} {TIERS.get(str(report.get('tier')), '')}".rstrip()


def _table(report: dict) -> str:
    """Before and after, and the text that it was measured on. A figure that is not known is left empty."""
    known, evaluation, plan = _get(report, "evaluation"), _done(report), _get(report, "plan")
    base, out = _get(known, "base"), _get(known, "out")  # cache and load size are known without a run
    kl, cache, sizes = _get(evaluation, "kl"), _get(plan, "kv_bytes_per_token"), _get(plan, "parameters")
    kv = base.get("kv_bytes_per_token") or cache.get("before"), out.get("kv_bytes_per_token") or cache.get("after")
    rows = [
        ("perplexity", base.get("perplexity"), out.get("perplexity"), "{:,.4g}"),
        ("cross-entropy, nats per token", base.get("cross_entropy"), out.get("cross_entropy"), "{:.4f}"),
        ("KL from the base, mean, nats per token", None, kl.get("mean"), "{:.4g}"),
        ("KL from the base, 99th percentile", None, kl.get("p99"), "{:.4g}"),
        ("top-1 agreement with the base", None, evaluation.get("top1_agreement"), "{:.1%}"),
        ("KV cache, bytes per token", *kv, "{:,.0f}"),
        ("weights, bytes", base.get("load_bytes"), out.get("load_bytes"), "{:,.0f}"),
        ("parameters", sizes.get("before"), sizes.get("after"), "{:,.0f}"),
    ]
    lines = ["| | base | this model | ratio |", "| --- | ---: | ---: | ---: |"]
    for name, before, after, form in rows:
        cells = [form.format(value) if _finite(value) else "" for value in (before, after)]
        both = all(cells) and before > 0 and not name.startswith("cross-entropy")
        if any(cells):
            lines.append(f"| {name} | {cells[0]} | {cells[1]} | {f'{after / before:.3g}' if both else ''} |")
    why = known.get("reason") or known.get("status") or "no evaluation was asked for"
    said = _measured_on(evaluation) if evaluation else f"Quality was **not measured**: {why}."
    note = _get(report, "base").get("note")
    notes = [f"Base: {note}."] * bool(note) + [f"{each}." for each in known.get("notes") or []]
    return "\n\n".join(["\n".join(lines)] * (len(lines) > 2) + [" ".join([said, *notes])])


def _measured_on(evaluation: dict) -> str:
    text, top_k = _get(evaluation, "text"), _get(evaluation, "kl").get("top_k")
    if not text:
        return "The text that it was measured on was not recorded."
    facts = [f"sha256 `{str(text['sha256'])[:12]}`"] if text.get("sha256") else []
    facts += [f"{text['tokens']:,} tokens"] if text.get("tokens") else []
    facts += [f"{text['windows']} windows of {text.get('length')}"] if text.get("windows") else []
    line = f"Measured on *{text.get('title') or 'an untitled text'}* ({', '.join(facts)}), base and result alike."
    return line + (
        f" KL is over the base's {top_k} likeliest tokens, the rest as one: a lower bound." if top_k else ""
    )


def _loading(report: dict) -> str:
    lines, flags = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""], ""
    if report.get("tier") == "surgical":
        flags = ", trust_remote_code=True, revision=revision"
        lines.append('revision = "the commit whose code you have read"')
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({HERE}{flags})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({HERE}{flags})")
    stock = _fenced("\n".join(lines), "python")
    if not flags:
        return stock
    ours = _fenced(f"import surgery\n\nmodel = surgery.load({HERE})", "python")
    return (
        f"With the package:\n\n{ours}\n\nWithout it; this runs code from the repository, so read it first:\n\n{stock}"
    )


def _checks(report: dict) -> str:
    check, gate = _get(report, "check"), _get(report, "gate")
    lines = [(str(item.get("name")), item.get("status"), item.get("detail")) for item in check.get("items") or []]
    passed = {True: "passed", False: "failed"}.get(check.get("passed"), "not run")
    lines = lines or [("`surgery check`", passed, "")]
    limits = ", ".join(f"{key} {value}" for key, value in _get(gate, "limits").items())
    reasons = "; ".join(map(str, gate.get("reasons") or []))
    lines.append((f"quality gate, {limits}" if limits else "quality gate", gate.get("status") or "not run", reasons))
    return "\n".join(f"- {name}: **{status}**{f' ({detail})' if detail else ''}" for name, status, detail in lines)


def _limits(report: dict) -> str:
    lines = [OPERATION_LIMITS[op] for op in dict.fromkeys(_operations(report)) if op in OPERATION_LIMITS]
    if report.get("tier") == "surgical":
        stock = "Loaded with the stock class by name (`LlamaForCausalLM.from_pretrained`), it warns and runs the"
        lines.append(f"{stock} *unchanged* attention: use the lines above.")
    lines.append("The table is one text on one machine. Other tasks, languages and lengths were not measured.")
    return "\n".join(f"- {line}" for line in lines)


def _provenance(report: dict) -> str:
    base, recipe, files = _get(report, "base"), _get(report, "recipe"), _get(report, "files")
    pinned = base.get("hub_id") and base.get("revision")
    origin = f"{_base_name(report)}@{base['revision']}" if pinned else _base_name(report)
    overrides = [str(each) for each in report.get("overrides") or []]
    command = shlex.join(["surgery", "apply", str(recipe.get("name") or "RECIPE"), origin, "-o", "OUT", *overrides])
    earlier = [f"{' + '.join(_operations(old))} on {_base_name(old)}" for old in report.get("history") or []]
    facts = {
        "base": f"`{origin}`",
        "note on the base": base.get("note"),
        "model type": base.get("model_type"),
        "fingerprint of the base": base.get("fingerprint"),
        "earlier surgeries": "; ".join(earlier),
        "engine": report.get("engine"),
        "made": report.get("created"),
        "versions": ", ".join(f"{name} {version}" for name, version in _get(report, "versions").items()),
        "threads": report.get("threads"),
        "seeds": ", ".join(f"{name} {seed}" for name, seed in _get(report, "seeds").items()),
        "files of the base left behind": ", ".join(f"`{name}`" for name in report.get("left_behind") or []),
    }
    lines = [f"- {name}: {fact}" for name, fact in facts.items() if fact not in (None, "")]
    lines += [f"- `{name}`: sha256 `{_get(files, name).get('sha256')}`" for name in files]
    same = "The same command, versions and machine give the same weights:"
    return f"{same}\n\n{_fenced(command, '')}\n\n" + "\n".join(lines)


def _licence(report: dict, base: dict) -> str:
    name = base.get("license_name") or base.get("license") or _get(report, "base").get("license")
    name = f"**{', '.join(name) if isinstance(name, list) else name}**" if name else "the base card does not name it"
    holds = f"This model is under the base's licence: {name}"
    holds += f" ({base['license_link']})" if base.get("license_link") else ""
    files = [n for n in _get(report, "files") if re.match(r"LICEN[SC]E|NOTICE|USE_POLICY", n, re.IGNORECASE)]
    carried = "The base's licence and notice files, where it has any, are carried in this folder"
    named = f" ({', '.join(f'`{file}`' for file in files)})" if files else ""
    return f"{holds}. {carried}{named}. The weights were modified as said above."


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
