"""What to think of a result: its gate with figures and limits, one verdict, and what makes the figures say little."""

from __future__ import annotations

from typing import Any

from surgery.evaluation.probes.perplexity import NO_MODEL, shown_perplexity
from surgery.report.gate import comparisons, damage


def gate_words(data: dict[str, Any]) -> str:
    """ "passed (KL 0.502 ≤ 1.0)", "failed (KL 1.320 > 1.0)", "not run", "none"."""
    gate = data["gate"]
    if not gate["limits"]:
        return "none"
    facts = [str(each) for each in comparisons(data["evaluation"], gate["limits"])]
    facts += gate.get("reasons") or [] if gate["status"] == "not run" else []
    return gate["status"] + (f" ({', '.join(facts)})" if facts else "")


def verdict(data: dict[str, Any]) -> str:
    """One sentence: whether the result can be used, and if not, why and by how much."""
    check, evaluation, gate = data["check"], data["evaluation"], data["gate"]
    if check and not check["passed"]:
        faults = [item["name"] for item in check["items"] if item["status"] == "failed"]
        return f"damaged: {', '.join(faults)}"
    if not evaluation or evaluation["status"] != "done":
        return "nothing is known of its quality"
    healed = bool(data.get("heal"))
    if says_nothing(data):
        return "nothing is known of its quality: its base cannot tell this text from noise"
    costs, missed = damage(evaluation), [each for each in comparisons(evaluation, gate["limits"]) if not each.passed]
    if gate["status"] == "failed":
        amounts = [
            f"{each.words} is {abs(each.value - each.limit):.3g} too {'low' if each.at_least else 'high'}"
            for each in missed
        ]
        words = f"it lost more than the recipe allows: {'; '.join(amounts or gate.get('reasons', []))}"
    elif costs:
        words = f"not usable{'' if healed else ' before healing'}: {costs[0]}"
    elif gate["limits"] and gate["status"] == "passed":
        words = "usable: it is within the recipe's limits"
    elif gate["limits"]:
        words = f"usable, if the cost is right for you: the gate was {gate['status']}"
    else:
        words = "usable, if the cost is right for you: the recipe sets no limit"
    return f"{words}; healing won nothing back" if healed and nothing_came_back(data) else words


def notes(data: dict[str, Any]) -> list[str]:
    """Reasons why the figures say little, and trackers that did not get all of them."""
    faults = (data.get("heal") or {}).get("tracker_faults")
    faults = [f"the tracker {fault}" for fault in faults] if isinstance(faults, list) else []
    if not has_tokenizer(data):
        given = (
            "surgery.save(model, OUT, report, tokenizer=tokenizer) adds it"
            if data.get("in_memory")
            else "add its files"
        )
        faults.append(f"the folder has no tokenizer: {given}")
    if (before := _perplexity_of_no_model(data)) is None:
        return faults
    return [
        *faults,
        f"the base's perplexity is {shown_perplexity(before)}: it is no language model, or this is not its text",
    ]


def says_nothing(data: dict[str, Any]) -> bool:
    """Whether the gate was not run since the base is no language model on the text of the score."""
    return data["gate"]["status"] == "not run" and _perplexity_of_no_model(data) is not None


def _perplexity_of_no_model(data: dict[str, Any]) -> float | None:
    """The base's perplexity where the base is no language model on this text; None: it is one, or was not scored."""
    before = ((data["evaluation"] or {}).get("base") or {}).get("perplexity")
    return before if isinstance(before, int | float) and before > NO_MODEL else None


def has_tokenizer(data: dict[str, Any]) -> bool:
    """Whether the folder has a tokenizer, by the list of files in its record; True if there is no list."""
    names = data.get("other_files")
    kinds = ("tokenizer", "vocab", "spiece", "processor", "preprocessor")
    return not isinstance(names, dict) or not names or any(name.startswith(kinds) for name in names)


def nothing_came_back(data: dict[str, Any]) -> bool:
    """Whether a healing was measured and improved no figure."""
    shares = [share for share in ((data.get("heal") or {}).get("recovered") or {}).values() if share is not None]
    return bool(shares) and max(shares) <= 0
