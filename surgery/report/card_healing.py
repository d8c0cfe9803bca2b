"""The section of the model card on healing: how it was trained, and what came back."""

from __future__ import annotations

import shlex

from surgery.errors import all_of
from surgery.healing import losses
from surgery.io.card_text import literal
from surgery.operations.sparse_prefill.prompt_share import NEARLY_ALL

CURVE = "healing/loss.png"  # the picture that `surgery heal` draws


def healing(report: dict) -> list[str]:
    """The section as a list of one, or [] for a model that was not trained."""
    record = report.get("heal")
    if not record:
        return []
    summary = " ".join(f"{each}." for each in [*_how(record), *healed(report)])
    curve = (
        f"![Loss and distance to the base while it trained]({CURVE})"
        if CURVE in (report.get("other_files") or {})
        else ""
    )
    return ["## Healing\n\n" + "\n\n".join(filter(None, (summary, _table(report), curve)))]


def healed(report: dict) -> list[str]:
    """How much of the damage healing recovered, in a sentence for each figure."""
    record = report.get("heal") or {}
    if not record:
        return []
    sentences, before, shares = [], record.get("converted"), record.get("recovered") or {}
    evaluation = report.get("evaluation") or {}
    if before and evaluation.get("status") == "done":
        base, out = evaluation["base"], evaluation["out"]
        figures = (base["cross_entropy"], before["cross_entropy"], out["cross_entropy"])
        if None not in figures:
            line = "Cross-entropy: base {:.3f}, {} {:.3f}, healed {:.3f} nats a token"
            line = line.format(figures[0], _before(record), *figures[1:])
            share = shares.get("cross_entropy")
            sentences.append(line + _came_back(share))
        kl = (before["kl"], evaluation["kl"]["mean"])
        if None not in kl:
            line = "KL to the base: {} {:.3f}, healed {:.3f}".format(_before(record), *kl)
            sentences.append(line + _came_back(shares.get("kl")))
    return sentences


def _before(record: dict) -> str:
    """A word for the model that this training started from."""
    return "healed before" if record.get("earlier") else "converted"


def _came_back(share: float | None) -> str:
    if share is None:
        return ""
    return f": {share:.0%} came back" if 0 < share < 1 else ": all came back" if share >= 1 else ": nothing came back"


def heal_commands(report: dict) -> list[str]:
    """The `surgery heal` commands to run after `surgery apply`; [] if the recipe itself healed."""
    record = report.get("heal") or {}
    steps = [each for each in [*record.get("earlier", []), record] if "overrides" in each]
    commands = []
    for index, step in enumerate(steps):
        names = ["OUT", *(f"HEALED{step_index + 1}" for step_index in range(len(steps) - 1)), "HEALED"]
        commands.append(shlex.join(["surgery", "heal", names[index], *step["overrides"], "-o", names[index + 1]]))
    return commands


def _how(record: dict) -> list[str]:
    settings, data, loss = record["settings"], record.get("data") or {}, record.get("loss") or {}
    what = {
        "full": "All weights were trained",
        "parts": "What the surgery added or rewrote was trained",
        "lora": f"Updates of rank {settings.get('rank')} to {record.get('adapted')} matrices were trained and merged",
    }[settings["method"]]
    mixing = record.get("mixing")
    if mixing and settings["method"] == "parts" and mixing["weights"] == record["parameters"]:
        what = "Weights that mix the base's K and V heads were trained and folded (WGQA)"
    elif mixing:
        what += f", {mixing['weights']:,} weights that mix the base's K and V heads among it, folded (WGQA)"
    if settings["method"] == "lora" and record.get("in_full"):
        what += f", and in full {', '.join(f'`{name}`' for name in record['in_full'])}"
    lines = [f"{what} ({record['parameters']:,} parameters), towards {losses.goals(settings['loss'])}"]
    if started := record.get("started"):
        lines.append(
            "Before that each layer's attention was fitted to the base's, which also changed "
            f"{started['parameters']:,} other parameters: {', '.join(f'`{name}`' for name in started['names'])}"
        )
    if sure := settings.get("sure"):
        lines.append(
            f"A token's loss counted {1 - sure:g} + {sure:g} p, where p is the base's largest probability for it"
        )
    machine = f"{record['processes']} process{'es' * (record['processes'] > 1)} on {record['device']}"
    lines.append(
        f"{record['tokens']:,} tokens in {record['steps']:,} steps of {record['step_tokens']:,}, "
        f"{record['minutes']:g} minutes with {machine}, on {_texts(data)}"
    )
    if recall := data.get("recall"):
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in recall.items() if kind != "rows")
        lines.append(
            f"In {recall['rows']:,} of the {data['rows']:,} rows something said earlier in the row comes back "
            f"({kinds})"
        )
    if data.get("rows") and (rounds := record["tokens"] / (data["rows"] * settings["length"])) > 1.5:
        lines.append(f"It read these texts {rounds:.1f} times")
    for earlier in reversed(record.get("earlier") or []):
        earlier_settings, text = earlier["settings"], str((earlier.get("data") or {}).get("data"))
        lines.append(
            f"Before that it was trained on {earlier['tokens']:,} tokens of {literal(text)} "
            f"({earlier_settings['method']}, {losses.written(earlier_settings['loss'])})"
        )
    if settings.get("keep_adapter"):
        before = "" if "overrides" in record else ", which this recipe makes with `heal=null`"
        lines.append(f"The updates alone are in `adapter/`; they load on the model as it was before them{before}")
    if settings.get("alternate"):
        lines.append("Gates and experts were trained in turn, one step each")
    if attention := record.get("attention"):
        lines += _attention(attention, record.get("keys_read"))
    if record.get("ended_by") == "gate":
        lines.append("It ended early, when a part of the held-out text passed the gate")
    if None not in (loss.get("first"), loss.get("last")):
        attention = record.get("attention") or {}
        under = " in the steps with sparse attention" * bool(attention.get("full_steps") and attention["sparse_steps"])
        under += f" in the steps that train the {loss['of']}" if "of" in loss else ""
        lines.append(f"The training loss went from {loss['first']:.3f} to {loss['last']:.3f}{under}")
    return lines


def _texts(data: dict) -> str:
    """The texts of a training, each with its hash and length."""
    each = [
        f"{literal(str(text.get('data')))} (sha256 `{str(text.get('sha256'))[:12]}`, {text.get('tokens', 0):,} tokens)"
        for text in data.get("sources") or [data]
    ]
    return all_of(each)


def _attention(record: dict, keys_read: dict | None) -> list[str]:
    """How a model with sparse prefill was trained, and what both kinds of attention make of the text."""
    sparse, full, loss = record["sparse_steps"], record["full_steps"], record["text_loss"]
    steps = f"Attention was sparse in {sparse:,} steps" if sparse else "Attention was never sparse"
    then = f" and full in the {'last ' * bool(sparse)}{full:,}" if full else " and never full"
    if sparse and keys_read is not None:
        where = f"in {keys_read['layers']} of {keys_read['of']} layers"
        then += f". In its documents a query reads {keys_read['share']:.0%} of the keys before it, {where}"
        then += ": they are too short to be read sparsely" * (keys_read["share"] > NEARLY_ALL)
    return [
        steps + then,
        f"At the end, {loss['tokens']:,} tokens of the training text have a loss of {loss['sparse']:.3f} nats a token "
        f"with sparse attention and of {loss['full']:.3f} with full attention",
    ]


def _table(report: dict) -> str:
    """The table of base, converted and healed model on one text."""
    before, evaluation = (report["heal"] or {}).get("converted"), report.get("evaluation") or {}
    if not before or evaluation.get("status") != "done":
        return ""
    base, out, kl = evaluation["base"], evaluation["out"], evaluation["kl"]
    loss = [side["cross_entropy"] for side in (base, before, out)]
    rows = [
        ("perplexity", base["perplexity"], before["perplexity"], out["perplexity"], "{:,.4g}"),
        ("cross-entropy, nats per token", *loss, "{:.4f}"),
        ("KL from the base, mean", None, before["kl"], kl["mean"], "{:.4g}"),
        ("same best token as the base", None, before["top1_agreement"], evaluation["top1_agreement"], "{:.1%}"),
    ]
    lines = [f"| | base | {_before(report['heal'])} | healed |", "| --- | ---: | ---: | ---: |"]
    for name, *values, form in rows:
        lines.append(f"| {name} | {' | '.join('' if value is None else form.format(value) for value in values)} |")
    return "\n".join(lines)
