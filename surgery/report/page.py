"""One self-contained HTML page about a checkpoint: nothing is fetched, no script runs, and every text is escaped.

The page says what the card says, in the same words, with the pictures inside. It adds what a card has no room for: the
plan as a tree, the needles by length and place, and the answers of base and result side by side.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

from surgery.evaluation import probes
from surgery.evaluation.paired import REPORTABLE, few_words
from surgery.io.printing import Table, as_html_table
from surgery.report.card import ALTERNATIVES, alternatives, checks_text, costs_text
from surgery.report.card_healing import CURVE, healing
from surgery.report.card_sections import FITTED, get, limits, literal_record, loading, provenance
from surgery.report.card_summary import banner, summary, title
from surgery.report.head_map import FILE as HEADS

FILE, SUFFIXES = "report.html", (".html", ".htm")
LARGEST = 900_000  # bytes of the page; pictures that would exceed it are left out, with a note
PICTURES = {
    HEADS: "Which KV heads see all, and which (hatched) see sinks and a window, by layer.",
    CURVE: "Loss and distance to the base while it was trained.",
    FITTED: "What each option leaves of the KV cache, and its damage; a filled mark was tried as a whole.",
}
FOLDED = re.compile(r"<details>\n<summary>(.*?)</summary>\n\n(.*?)\n\n</details>", re.DOTALL)  # `folded_away`
IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)\n*(\*[^*]*\*)?")
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --cell: 0, 114, 178; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
body { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }
td:first-child { min-width: 9rem; } td[style*="right"], th[style*="right"] { white-space: nowrap; }
td + td, th + th { overflow-wrap: normal; }
pre { background: var(--soft); overflow-x: auto; padding: 0.7rem; font-size: 0.85rem; overflow-wrap: normal; }
code { font-size: 0.9em; } blockquote { border-left: 4px solid #D55E00; margin: 1rem 0; padding: 0.1rem 1rem; }
img { max-width: 100%; height: auto; background: #fff; } summary { cursor: pointer; }
.cell { text-align: center; min-width: 4rem; } .answers { display: grid; gap: 1rem; }
.answers > div { background: var(--soft); padding: 0.1rem 0.8rem; white-space: pre-wrap; }
@media (min-width: 48rem) { .answers { grid-template-columns: 1fr 1fr; } }
"""


class ReplyText(Protocol):
    """An answer: `surgery.evaluation.conversation.Reply`, which lies above this module."""

    @property
    def text(self) -> str: ...
    @property
    def facts(self) -> str: ...


@dataclass(frozen=True)
class Answers:
    """What the models answer to one prompt; name of a model -> its answer, with a line on its length and speed."""

    prompt: str
    replies: Mapping[str, ReplyText]


def render_page(
    report: dict, folder: Path | None, plan: Sequence[str] = (), answers: Sequence[Answers] = (), edited: str = ""
) -> str:
    """The page of a checkpoint.

    Args:
        report: the content of surgery.json.
        folder: has the pictures; None: there are none.
        plan: the plan as lines of text; () : unknown.
        answers: what base and result answer; () : they were not asked.
        edited: what to say of a record that is not as surgery wrote it.
    """
    warnings, words = [f"> **{edited}.**"] if edited else [], literal_record(report)
    sections = [
        ("", "\n\n".join(_html(text) for text in [*warnings, *banner(words), summary(words)])),
        ("What it costs and what it saves", _html(costs_text(words))),
        ("Needles by length and place", _needles(get(report, "evaluation"))),
        ("Answers, side by side", "".join(map(_answers, answers))),
        ("What changed", f"<pre>{escape(chr(10).join(plan))}</pre>" if plan else ""),
        ("Healing", "".join(_html(text.removeprefix("## Healing\n\n")) for text in healing(report))),
        (ALTERNATIVES, "".join(map(_html, alternatives(report)))),
        ("Checks", _html(checks_text(words))),
        ("How to use it", _html(loading(report))),
        ("Limits", _html(limits(words))),
        ("How it was made", _html(provenance(report))),
    ]
    return document(title(report), sections, _pictures(report, folder))


def document(name: str, sections: Sequence[tuple[str, str]], pictures: Sequence[tuple[bytes, str]] = ()) -> str:
    """A whole page: sections of HTML with their headings (an empty one is left out); pictures follow the first two.

    Args:
        pictures: the bytes of a PNG file, and what it shows.
    """
    written = [
        f"<section>{f'<h2>{escape(head)}</h2>' if head else ''}{body}</section>" for head, body in sections if body
    ]
    size, figures = sum(len(part.encode()) for part in written), []
    for content, what in pictures:
        data = base64.b64encode(content).decode()
        if size + len(data) > LARGEST:
            figures.append(f"<p>A picture is left out, so that the page stays small: {escape(what)}</p>")
            continue
        size += len(data)
        image = f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'
        figures.append(f"<figure>{image}<figcaption>{escape(what)}</figcaption></figure>")
    parts = [f"<h1>{escape(name)}</h1>", *written[:2], *figures, *written[2:]]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # otherwise a browser asks the server for one
        f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html(markdown: str) -> str:
    """Markdown of the card as HTML: tags in it are text, its pictures are left out, its folded parts stay folded."""
    from markdown_it import MarkdownIt

    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    parts = FOLDED.split(IMAGE.sub("", markdown))
    html = render(parts[0])
    for summary_text, content, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        html += f"<details><summary>{escape(summary_text)}</summary>{render(content)}</details>{render(after)}"
    return html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


def _needles(evaluation: dict) -> str:
    """A grid of the share of needles found, for each model whose record has one."""
    grids = []
    for cls, record in probes.done(evaluation) if evaluation else ():
        settings = record.get("settings") or {}
        lengths, depths = settings.get("lengths"), settings.get("depths")
        if not (cls.drawing and lengths and depths):
            continue
        drawn = [
            _grid(name if label == "base" else f"{name}: {cls.sentence(record)}", grid, lengths, depths)
            for label, name in (("base", "base"), ("out", "this model"))
            if (grid := (record.get(label) or {}).get("grid"))
        ]
        if drawn and (asked := (record.get("out") or {}).get("of")):
            cells = len(lengths) * len(depths)
            few = few_words([asked // cells] * cells, "needle", f"samples={REPORTABLE}")
            drawn.append(f"<p>{escape(few)}</p>" if few else "")
        grids += drawn
    return "".join(grids)


def _grid(name: str, grid: Sequence[Sequence[float | None]], lengths: Sequence[int], depths: Sequence[float]) -> str:
    head = "".join(f"<th>{length:,} tokens</th>" for length in lengths)
    rows = "".join(
        f"<tr><th>at {depth:.2f}</th>{''.join(map(_cell, cells))}</tr>"
        for depth, cells in zip(depths, grid, strict=True)
    )
    return f'<h3>{escape(name)}</h3><div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def _cell(share: float | None) -> str:
    if share is None:
        return '<td class="cell"></td>'
    return f'<td class="cell" style="background: rgba(var(--cell), {0.75 * share:.2f})">{share:.0%}</td>'


def _answers(each: Answers) -> str:
    columns = "".join(
        f"<div><strong>{escape(name)}</strong>\n{escape(reply.text)}\n<small>{escape(reply.facts)}</small></div>"
        for name, reply in each.replies.items()
    )
    return f'<h3>{escape(each.prompt)}</h3><div class="answers">{columns}</div>'


def _pictures(report: dict, folder: Path | None) -> list[tuple[bytes, str]]:
    """The pictures that the record lists and the folder has."""
    listed, fitted = get(report, "other_files"), bool(get(report, "fit"))  # a copy may be of the search for its base
    shown = [name for name in PICTURES if name in listed and (fitted or name != FITTED)]
    names = [name for name in shown if folder and (folder / name).is_file()]
    return [((folder / name).read_bytes(), PICTURES[name]) for name in names if folder]


def compared_page(
    name: str, tables: Sequence[tuple[str, Table, Sequence[str]]], notes: Sequence[str], picture: Any
) -> str:
    """The page of a comparison.

    Args:
        tables: heading, table, and a line for each column.
        picture: the bytes of its PNG, or None.
    """
    sections = [
        (head, f'<div class="wide">{as_html_table(table)}</div>' + "".join(f"<p>{escape(line)}</p>" for line in lines))
        for head, table, lines in tables
    ]
    sections.append(("Notes", "".join(f"<p>{escape(note)}</p>" for note in notes)))
    shown = [(picture, "What each model saves and what it loses.")] if picture else []
    return document(name, sections, shown)
