"""The part of the model card that says how a model was healed, and how much of the damage came back."""

from __future__ import annotations

import shlex

TOWARDS = {
    "ce": "the next token of the text (cross-entropy)",
    "distill": "the base's probabilities (distillation)",
    "both": "the next token of the text and the base's probabilities",
}


def healing(report: dict) -> list[str]:
    """The section as a list of one, or [] for a model that was not trained."""
    record = report.get("heal")
    if not record:
        return []
    told = " ".join(f"{each}." for each in [*_how(record), *healed(report)])
    return ["## Healing\n\n" + "\n\n".join(filter(None, (told, _table(report))))]


def healed(report: dict) -> list[str]:
    """How much came back, a sentence each."""
    record = report.get("heal") or {}
    if not record:
        return []
    found, before, shares = [], record.get("converted"), record.get("recovered") or {}
    evaluation = report.get("evaluation") or {}
    if before and evaluation.get("status") == "done":
        base, out = evaluation["base"], evaluation["out"]
        figures = (base["cross_entropy"], before["cross_entropy"], out["cross_entropy"])
        if None not in figures:
            line = "Cross-entropy: base {:.3f}, {} {:.3f}, healed {:.3f} nats a token"
            line = line.format(figures[0], _before(record), *figures[1:])
            share = shares.get("cross_entropy")
            found.append(line + _came_back(share))
        kl = (before["kl"], evaluation["kl"]["mean"])
        if None not in kl:
            line = "KL to the base: {} {:.3f}, healed {:.3f}".format(_before(record), *kl)
            found.append(line + _came_back(shares.get("kl")))
    return found


def _before(record: dict) -> str:
    """What the model is called that this training began with."""
    return "healed before" if record.get("earlier") else "converted"


def _came_back(share: float | None) -> str:
    if share is None:
        return ""
    return f": {share:.0%} came back" if 0 < share < 1 else ": all came back" if share >= 1 else ": nothing came back"


def heal_commands(report: dict) -> list[str]:
    """The commands after `surgery apply` that heal, where they were commands of their own."""
    record = report.get("heal") or {}
    steps = [each for each in [*record.get("earlier", []), record] if "overrides" in each]
    commands = []
    for number, step in enumerate(steps):
        names = ["OUT", *(f"HEALED{place + 1}" for place in range(len(steps) - 1)), "HEALED"]
        commands.append(shlex.join(["surgery", "heal", names[number], *step["overrides"], "-o", names[number + 1]]))
    return commands


def _how(record: dict) -> list[str]:
    settings, data, loss = record["settings"], record.get("data") or {}, record.get("loss") or {}
    what = {
        "full": "All weights were trained",
        "parts": "What the surgery added or rewrote was trained",
        "lora": f"Updates of rank {settings['rank']} to {record.get('adapted')} matrices were trained and merged",
    }[settings["method"]]
    mixing = record.get("mixing")
    if mixing and settings["method"] == "parts" and mixing["weights"] == record["parameters"]:
        what = "Weights that mix the base's K and V heads were trained and folded (WGQA)"
    elif mixing:
        what += f", {mixing['weights']:,} weights that mix the base's K and V heads among it, folded (WGQA)"
    if settings["method"] == "lora" and record.get("in_full"):
        what += f", and in full {', '.join(f'`{name}`' for name in record['in_full'])}"
    lines = [f"{what} ({record['parameters']:,} parameters), towards {TOWARDS[settings['loss']]}"]
    where = f"{data.get('data')} (sha256 `{str(data.get('sha256'))[:12]}`, {data.get('tokens', 0):,} tokens)"
    machine = f"{record['processes']} process{'es' * (record['processes'] > 1)} on {record['device']}"
    lines.append(
        f"{record['tokens']:,} tokens in {record['steps']:,} steps of {record['step_tokens']:,}, "
        f"{record['minutes']:g} minutes with {machine}, on {where}"
    )
    if data.get("rows") and (rounds := record["tokens"] / (data["rows"] * settings["length"])) > 1.5:
        lines.append(f"It read these texts {rounds:.1f} times")
    for earlier in reversed(record.get("earlier") or []):
        asked = earlier["settings"]
        lines.append(
            f"Before that it was trained on {earlier['tokens']:,} tokens of {(earlier.get('data') or {}).get('data')} "
            f"({asked['method']}, {asked['loss']})"
        )
    if settings["keep_adapter"]:
        before = "" if "overrides" in record else ", which this recipe makes with `heal=null`"
        lines.append(f"The updates alone are in `adapter/`; they load on the model as it was before them{before}")
    if record.get("ended_by") == "gate":
        lines.append("It ended early, when a part of the held-out text passed the gate")
    if None not in (loss.get("first"), loss.get("last")):
        lines.append(f"The training loss went from {loss['first']:.3f} to {loss['last']:.3f}")
    return lines


def _table(report: dict) -> str:
    """Base, converted and healed on one text."""
    before, evaluation = (report["heal"] or {}).get("converted"), report.get("evaluation") or {}
    if not before or evaluation.get("status") != "done":
        return ""
    base, out, kl = evaluation["base"], evaluation["out"], evaluation["kl"]
    loss = [side["cross_entropy"] for side in (base, before, out)]
    rows = [
        ("perplexity", base["perplexity"], before["perplexity"], out["perplexity"], "{:,.4g}"),
        ("cross-entropy, nats per token", *loss, "{:.4f}"),
        ("KL from the base, mean", None, before["kl"], kl["mean"], "{:.4g}"),
        ("top-1 agreement with the base", None, before["top1_agreement"], evaluation["top1_agreement"], "{:.1%}"),
    ]
    lines = [f"| | base | {_before(report['heal'])} | healed |", "| --- | ---: | ---: | ---: |"]
    for name, *values, form in rows:
        lines.append(f"| {name} | {' | '.join('' if value is None else form.format(value) for value in values)} |")
    return "\n".join(lines)
