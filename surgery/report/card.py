"""The model card: what was changed, what that cost, how to use the model, and below it the base's own card.

`render_card` takes surgery.json as a dict. A missing key is no error: the card then says what was not measured.
"""

from __future__ import annotations

from surgery.evaluation import probes
from surgery.evaluation.probes.base import Row
from surgery.io.card_text import BASE_HEADING, literal, notes_block, without_markers
from surgery.io.files import split_card
from surgery.report.card_healing import healing
from surgery.report.card_metadata import metadata
from surgery.report.card_sections import FITTED, figures_of, get, licence, limits, literal_record, loading, provenance
from surgery.report.card_summary import banner, summary, title
from surgery.report.gate import finite
from surgery.report.head_map import FILE as HEADS

ALTERNATIVES = "What else was tried"  # heading of what `surgery fit` tried


def render_card(report: dict, base_card: str | None) -> str:
    """The README.md of an output folder.

    Args:
        report: the content of surgery.json; `evaluation`, `check`, `gate` and most other keys may be missing or None.
        base_card: the README.md of the base, with its metadata, or None.

    Returns:
        Markdown with a metadata block that the Hub accepts.
    """
    of_base, base_text = split_card(base_card or "")
    name, words = title(report), literal_record(report)
    sections = [
        f"# {name}",
        *banner(words),
        summary(words),
        "## What it costs and what it saves\n\n" + costs_text(words),
        *_heads(report),
        *healing(report),
        *(f"## {ALTERNATIVES}\n\n{text}" for text in alternatives(report)),
        "## How to use it\n\n" + loading(report),
        "## Checks\n\n" + checks_text(words),
        "## Limits\n\n" + limits(words),
        "## Notes\n\n" + notes_block(str(report.get("owner_notes") or "")),
        "## How it was made\n\n" + provenance(report),
        "## Licence\n\n" + licence(report, of_base),
    ]
    if base_text.strip():
        origin_note = "*Written for the base model. Every score in it is the base's, not the converted model's.*"
        sections.append(f"{BASE_HEADING}\n\n{origin_note}\n\n{without_markers(base_text).strip()}")
    return f"---\n{metadata(report, of_base, name)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _heads(report: dict) -> list[str]:
    """The picture of the head split as a list of one, or [] if the folder has none."""
    if HEADS not in get(report, "other_files"):
        return []
    what = "Which KV heads see all, and which (hatched) see sinks and a window, by layer"
    return [f"![{what}]({HEADS})\n\n*{what}. Heads have the base's numbers.*"]


def alternatives(report: dict) -> list[str]:
    """What `surgery fit` tried before it chose this recipe, as a list of one text; [] if it did not choose it."""
    found = get(report, "fit")
    budget, rows = get(found, "budget"), found.get("options") or []
    if not rows:
        return []
    lines = [
        "| option | KV cache | trial | damage | KL | passkeys kept | |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        lost = row.get("whole") or row.get("first") or {}
        figures = ["", "", "", ""]
        if finite(lost.get("total")):
            figures = [
                "whole" if row.get("whole") else "first",
                f"{lost['total']:.3f}",
                f"{lost['kl']:.3f}",
                f"{lost['kept']} of {lost['asked']}",
            ]
        option, why = literal(row["option"]), literal(row["why"])
        lines.append(f"| {' | '.join([option, format(row['share'], '.0%'), *figures, why])} |")
    told = (
        f"`surgery fit` chose this recipe among what leaves {budget['share']:.0%} of the base's KV cache at "
        f"{budget['context']:,} tokens, or less. The damage is the KL from the base on plain text, and a tenth of "
        "what answers lose that are asked from all over such a text, in nats a token. In the first trial a conversion "
        "reads less calibration text, so that damages of the two trials are not to be compared."
    )
    told = " ".join([told, *(f"{literal(note[:1].upper() + note[1:])}." for note in found.get("notes") or [])])
    what = "What each option leaves of the cache, and its damage"
    picture = [f"![{what}]({FITTED})"] if FITTED in get(report, "other_files") else []
    return ["\n\n".join([told, "\n".join(lines), *picture])]


def costs_text(report: dict) -> str:
    """The table of base and converted model, and the paragraphs of the probes. An unknown figure is left empty."""
    recorded, evaluation, plan = get(report, "evaluation"), figures_of(report), get(report, "plan")
    base, out = get(recorded, "base"), get(recorded, "out")  # cache and load size are known without a run
    fixed = get(plan, "kv_bytes_fixed")  # of streaming heads, and of windows of the base's own
    cache, sizes = get(plan, "kv_bytes_per_token"), get(plan, "parameters")
    kv = base.get("kv_bytes_per_token") or cache.get("before"), out.get("kv_bytes_per_token") or cache.get("after")
    window = Row("KV cache, bytes that do not grow", fixed.get("before"), fixed.get("after"), "{:,.0f}")
    rows = [
        *(row for cls, result in probes.done(evaluation) for row in cls.rows(result)),
        Row("KV cache, bytes per token", *kv, "{:,.0f}"),
        *[window] * bool(fixed.get("before") or fixed.get("after")),
        Row("weights, bytes", base.get("load_bytes"), out.get("load_bytes"), "{:,.0f}"),
        Row("parameters", sizes.get("before"), sizes.get("after"), "{:,.0f}"),
    ]
    lines = [f"| | base | {'healed' if report.get('heal') else 'converted'} | ratio |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        cells = [row.form.format(value) if finite(value) else "" for value in (row.base, row.model)]
        both = all(cells) and row.base > 0 and row.ratio
        if any(cells):
            lines.append(f"| {row.name} | {cells[0]} | {cells[1]} | {f'{row.model / row.base:.3f}' if both else ''} |")
    main_text = probes.main().paragraph(evaluation) if evaluation else f"Quality was **not measured**: {_why(report)}."
    note = get(report, "base").get("note")
    notes = [f"Base: {note}."] * bool(note) + [f"{each}." for each in recorded.get("notes") or []]
    others = [(cls, get(evaluation, cls.name)) for cls in probes.every() if not cls.main]
    paragraphs = [paragraph for cls, result in others if result and (paragraph := cls.paragraph(result))]
    return "\n\n".join(["\n".join(lines)] * (len(lines) > 2) + paragraphs + [" ".join([main_text, *notes])])


def _why(report: dict) -> str:
    """Why there are no figures."""
    recorded = get(report, "evaluation")
    if recorded:
        return str(recorded.get("reason") or recorded.get("status"))
    if report.get("in_memory"):
        return "it was made from a model in memory, and `surgery eval` has not been run on this folder"
    if get(report, "recipe").get("evaluate"):
        return (
            "this card was written before the scores that its recipe asks for. If it is all that came, the run was "
            "stopped, or its scoring was turned off; `surgery eval` measures it"
        )
    return "its recipe asks for no evaluation"


def checks_text(report: dict) -> str:
    """The list of checks and of the gate."""
    check, gate = get(report, "check"), get(report, "gate")
    lines = [(str(item.get("name")), item.get("status"), item.get("detail")) for item in check.get("items") or []]
    passed = {True: "passed", False: "failed"}.get(check.get("passed"), "not run")
    lines = lines or [("`surgery check`", passed, "")]
    bounds = ", ".join(f"{key} {value}" for key, value in get(gate, "limits").items())
    reasons = "; ".join(map(str, gate.get("reasons") or []))
    verdict = gate.get("status") or "not run"
    lines.append((f"quality gate, {bounds}", verdict, reasons) if bounds else ("quality gate", "none", "no limits"))
    return "\n".join(f"- {name}: **{status}**{f' ({detail})' if detail else ''}" for name, status, detail in lines)
