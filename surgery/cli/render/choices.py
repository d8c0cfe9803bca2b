"""Multiple choice as lines: how many are right, base beside patched, and where the two differ."""

from __future__ import annotations

from surgery.cli.render import console
from surgery.cli.render.needles import NAMES, percent


def lines(result) -> None:
    """What a `ChoiceResult` says."""
    out = console()
    if result.status != "done":
        out.print(f"not run: {result.reason}")
        return
    settings, both = result.settings, len(result.outcomes) > 1
    for label in result.outcomes:
        side = result.side(label)
        name = NAMES[label] if both else "model"
        out.print(
            f"{name + ':':<9}{side['right']} of {side['of']} questions right ({percent(side)}), "
            f"{side['nll']:.3f} nats for the right choice"
        )
    if paired := result.paired():
        out.print(
            f"paired:  both right {paired['both']}, only the base {paired['only_base']}, only the patched model "
            f"{paired['only_out']}, neither {paired['neither']} (McNemar's exact test: p = {paired['p']:.2g})"
        )
    size = sorted({len(item.choices) for item in result.items})
    counts = f"{size[0]}" if len(size) == 1 else f"{size[0]} to {size[-1]}"
    made = f", passages of {settings['context']} tokens, seed {settings['seed']}" if "context" in settings else ""
    out.print(f"{counts} choices each{made}; a guess is right with probability {result.chance:.1%}")
    out.print(f"questions: {settings['text']['title']}, sha256 {settings['text']['sha256']}")
    for note in result.notes:
        out.print(f"note: {note}")
