"""The top of the model card: its title, the worst damage that was measured, and a summary for a first-time reader."""

from __future__ import annotations

from dataclasses import fields
from functools import cache

from surgery.errors import SurgeryError
from surgery.evaluation import probes
from surgery.operations.base import InWords
from surgery.report.card_sections import base_name, figures_of, get, hub_link, operations_of, searched
from surgery.report.gate import damage, finite, gate

PROJECT = "attention-surgery"
TIERS = {
    "native": "It is **native**: stock Transformers loads it, with no extra code.",
    "surgical": "It is **surgical**: it needs the code in this folder, or the `attention-surgery` package.",
}
AT_LEAST = 0.001  # share of the weights; a smaller saving is not mentioned


def title(report: dict) -> str:
    """The card's title, made from what changed ("Base-1B with 1 KV head (GQA, was 3)")."""
    base = str(get(report, "base").get("base_model") or base_name(report)).rsplit("/", 1)[-1]
    words = in_words(report)
    if not words:
        return f"{base}, {' + '.join(operations_of(report)) or 'attention surgery'}"
    healed = ", healed" if report.get("heal") else ""
    return f"{base} with {' and '.join(each.title for each in words)}{healed}"


def in_words(report: dict) -> list[InWords]:
    """What each operation did, in words; operations of which the record has no words are left out."""
    recorded = [operation.get("words") for operation in report.get("operations") or []]
    names = [field.name for field in fields(InWords)]
    return [InWords(*(str(words.get(name, "")) for name in names)) for words in recorded if isinstance(words, dict)]


def banner(report: dict) -> list[str]:
    """A quotation as a list of one, with the worst damage first; [] if no damage was found."""
    evaluation, record = figures_of(report), get(report, "gate")
    alarms = [(*cls.worst(result), cls) for cls, result in probes.done(evaluation)] if evaluation else []
    alarms = sorted((alarm for alarm in alarms if alarm[1]), key=lambda alarm: -alarm[0])
    lines = [f"> **{alarms[0][1]}**"] if alarms else []
    if damage(evaluation):
        when = "even after healing" if report.get("heal") else "before healing"
        rest = [each for each in probes.done(evaluation) if each[0] is not alarms[0][2]]
        others = [cost for cls, result in rest for cost in cls.damage(result)]
        lines.append(f"> **Not usable {when}.**" + (f" Also, {' and '.join(others)}." if others else ""))
    lines += [f"> {sentence}" for _, sentence, cls in alarms[1:] if not cls.damage(probes.record_of(evaluation, cls))]
    lines += _gate_lines(record, evaluation)
    return ["\n>\n".join(lines)] if lines else []


def _gate_lines(record: dict, evaluation: dict) -> list[str]:
    """Lines about a gate that was not passed. They say "not measured" only if there are no figures."""
    status, limits = record.get("status"), record.get("limits") or {}
    reasons = "; ".join(map(str, record.get("reasons") or []))
    if status == "failed":
        return [f"> **The quality gate failed:** {reasons}." if reasons else "> **The quality gate failed.**"]
    if status == "passed" or not limits:  # without limits there is no gate that could be applied
        return []
    if not evaluation:
        return ["> **Not measured.** Measure this model before you rely on it: what it lost is unknown."]
    try:
        would, reasons = gate(evaluation | {"status": "done"}, limits)
    except (SurgeryError, KeyError, TypeError):  # limits or figures of another version
        would, reasons = "not run", record.get("reasons") or []
    reasons = f": {'; '.join(map(str, reasons))}" if reasons else ""
    if status == "skipped":
        verdict = "It would have passed" if would == "passed" else f"It would have failed{reasons}"
        return [f"> **The limits of the recipe were set aside** (`--no-gate`). {verdict}."]
    return [f"> **The quality gate is undecided**{reasons}."]


def summary(report: dict) -> str:
    """What was done, what it saves and costs, what the model is good for, and who should not use it."""
    base, name, words = get(report, "base"), base_name(report), in_words(report)
    on_hub = [hub_link(str(base["base_model"]))] if base.get("base_model") and not base.get("hub_id") else []
    origin = hub_link(name) if base.get("hub_id") else f"`{name}`"
    if about := [*on_hub, *filter(None, [base.get("note")])]:
        origin += f" ({', '.join(about)})"
    url = project_url()
    made = f"This is {origin}, converted with {f'[{PROJECT}]({url})' if url else PROJECT}."
    done = [each.done for each in words] or [_changes(report)]
    trained = ""
    if report.get("heal"):
        trained = f"Then it was healed: trained towards its base ({get(report, 'heal')['settings']['method']})."
    found = [f"{each}." for each in searched(report) if "setting was" in each]
    what = " ".join(filter(None, [made, *done, trained, *found, *_saved(report, words), _cost(report)]))
    return "\n\n".join(filter(None, [what, " ".join(_advice(report, words)), TIERS.get(str(report.get("tier")), "")]))


def _changes(report: dict) -> str:
    changes = "; ".join(map(str, get(report, "plan").get("changes") or []))
    return f"What changed: {changes}." if changes else "Its attention was changed by the recipe below."


def _saved(report: dict, words: list[InWords]) -> list[str]:
    """Sentences on the savings in cache and weights, and the gains that operations state themselves."""
    plan, lines = get(report, "plan"), []
    cache, fixed, sizes = (get(plan, key) for key in ("kv_bytes_per_token", "kv_bytes_fixed", "parameters"))
    before, after = cache.get("before"), cache.get("after")
    held, always = fixed.get("before") or 0, fixed.get("after") or 0
    if finite(before) and finite(after) and before > 0 and after != before:
        bytes_ = f"{before:,} → {after:,} bytes per token"
        if not after:
            lines.append(f"Its KV cache stops growing at {always:,} bytes.")
        elif always:
            share = f"{after / before:.3f} of the base's bytes"
            once = f"{held:,} → {always:,}" if held else f"{always:,}"
            lines.append(f"Its KV cache grows by {share} ({bytes_}), plus {once} bytes once.")
        else:
            lines.append(f"Its KV cache takes {after / before:.3f} of the base's ({bytes_}).")
    elif before == after and held and always != held:
        lines.append(
            f"Its windows hold {always / held:.3f} of the base's KV cache ({held:,} → {always:,} bytes once)."
        )
    before, after = sizes.get("before"), sizes.get("after")
    if finite(before) and finite(after) and before > 0 and after / before < 1 - AT_LEAST:
        lines.append(f"Its weights are {after / before:.3f} of the base's.")
    return lines + [each.gain for each in words if each.gain]


def _cost(report: dict) -> str:
    evaluation = figures_of(report)
    try:
        figures = [cls.sentence(record) for cls, record in probes.done(evaluation)] if evaluation else []
    except (KeyError, TypeError):  # figures of another version
        figures = []
    figures = [figure for figure in figures if figure]
    return f"Measured against its base: {'; '.join(figures)}." if figures else ""


def _advice(report: dict, words: list[InWords]) -> list[str]:
    """What the model is good for, and who should not use it. The measured damage decides first."""
    evaluation, failed = figures_of(report), get(report, "gate").get("status") == "failed"
    avoid = list(dict.fromkeys(each.avoid for each in words if each.avoid))
    if damage(evaluation) or failed:
        return ["Use it as a start for training, not as it is.", *avoid]
    if not evaluation:
        return ["What it lost was not measured, so measure it (`surgery eval`) before you use it.", *avoid]
    return [*dict.fromkeys(each.use for each in words if each.use), *avoid]


@cache
def project_url() -> str:
    """The address of this project in the metadata of the installed package; "" if there is none."""
    from importlib import metadata

    try:
        entries = metadata.metadata(PROJECT).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return ""
    urls = {label.strip().lower(): url.strip() for label, _, url in (entry.partition(",") for entry in entries)}
    return next((urls[label] for label in ("homepage", "repository", "source", "documentation") if label in urls), "")
