"""Sections of the model card: how to load, limits, how it was made, licence."""

from __future__ import annotations

import re
import shlex

import yaml

from surgery.errors import SurgeryError
from surgery.io.card_text import REPOSITORY, literal
from surgery.io.printing import count
from surgery.report.card_healing import heal_commands
from surgery.report.gate import finite
from surgery.report.verdict import has_tokenizer

MEASURED = ("evaluation", "gate", "check")  # keys of a record that hold words of models, texts and errors
FITTED = "fit.png"  # the picture that `surgery fit` draws


def literal_record(report: dict) -> dict:
    """The record with words of models, texts and errors such that no part of them is read as Markdown."""
    return report | {key: _literal(report[key]) for key in MEASURED if key in report}


def _literal(value):
    if isinstance(value, dict):  # an answer of a model stands between backticks
        return {key: each if key == "answer" else _literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_literal(each) for each in value]
    return literal(value) if isinstance(value, str) else value


def get(report: dict, key: str) -> dict:
    """The mapping at a key; {} if it is missing or null."""
    return report.get(key) or {}


def operations_of(report: dict) -> list[str]:
    """Names of the operations of the report's recipe, in order."""
    return [str(op["op"]) for op in get(report, "recipe").get("operations") or [] if op.get("op")]


def base_name(report: dict) -> str:
    """The Hub id, or the last part of a path: a card is published, and a full path would show its author's folders."""
    base = get(report, "base")
    name = str(base.get("name") or base.get("base_model") or "an unnamed base").replace("\\", "/")
    return str(base.get("hub_id") or name.rstrip("/").rsplit("/", 1)[-1])


def hub_link(name: str) -> str:
    """A model of the Hub, as a link."""
    return f"[{name}](https://huggingface.co/{name})"


def figures_of(report: dict) -> dict:
    """The evaluation; {} if it was not run."""
    evaluation = get(report, "evaluation")
    return evaluation if evaluation.get("status", "done") == "done" else {}


def loading(report: dict) -> str:
    """Code that loads the folder and generates, for every way to load it."""
    install = fenced("pip install attention-surgery", "sh")
    elsewhere = "".join(f"\n\n{sentence}" for sentence in _exported(report))
    if report.get("tier") != "surgical":
        again = f"It needs nothing else. What checks, heals or converts it again is\n\n{install}"
        return f"{_example(report)}\n\n{again}{elsewhere}"
    pinned = "Pin `revision` to a full commit hash: a branch can be given other code later, which would then run."
    return (
        f"With the package:\n\n{install}\n\n{_example(report, ours=True)}\n\nWithout it; this runs code from the "
        f"repository, so read it first:\n\n{_example(report)}\n\n{pinned}{elsewhere}"
    )


def _exported(report: dict) -> list[str]:
    """Two sentences for each file or folder that was made for another engine, and compared with Transformers."""
    return [
        f"`surgery export` made `{each.get('file')}` of it (type {each.get('type')}), and ran that in "
        f"{each.get('engine')} ({each.get('version')}). Log-probabilities differed from those of Transformers by at "
        f"most {each.get('largest_difference')}, and the best token was the same at {each.get('same_best')} of "
        f"{each.get('tokens')} positions."
        for each in report.get("exports") or []
    ]


def _example(report: dict, ours: bool = False) -> str:
    """A script that generates.

    Args:
        ours: load a surgical folder with the package instead of trust_remote_code.
    """
    composite, surgical = get(report, "base").get("composite"), report.get("tier") == "surgical"
    model = "AutoModelForImageTextToText" if composite else "AutoModelForCausalLM"
    reader = "AutoProcessor" if composite else "AutoTokenizer"
    name, flags = reader.removeprefix("Auto").lower(), ""
    lines = [f"from transformers import {model}, {reader}", ""]
    if ours:
        lines = ["import surgery", *lines, "surgery.register()  # once, before the Auto classes"]
    lines.append(f'name = "{report.get("repository") or REPOSITORY}"  # or the path of this folder')
    if surgical and not ours:
        flags = ", trust_remote_code=True, revision=revision"
        lines.append('revision = "the commit whose code you have read"')
    source = f"name{flags}" if has_tokenizer(report) else f'"{get(report, "base").get("hub_id") or "its base"}"'
    lines += [f"{name} = {reader}.from_pretrained({source})", f"model = {model}.from_pretrained(name{flags})", ""]
    if report.get("chat_template", "chat_template.jinja" in get(report, "other_files")):
        content = '[{"type": "text", "text": "Name three colours."}]' if composite else '"Name three colours."'
        options = '"return_dict": True, "return_tensors": "pt"' + ', "tokenize": True' * bool(composite)
        lines += [
            f'messages = [{{"role": "user", "content": {content}}}]',
            f"options = {{{options}}}",
            f"inputs = {name}.apply_chat_template(messages, add_generation_prompt=True, **options)",
        ]
    else:
        text = "text=" * bool(composite)
        lines.append(f'inputs = {name}({text}"The capital of France is", return_tensors="pt")')
    lines += [
        "output = model.generate(**inputs, max_new_tokens=64)",
        f'print({name}.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return fenced("\n".join(lines), "python")


def searched(report: dict) -> list[str]:
    """A sentence for each operation that measured or searched for something: the result, which no plan knows."""
    names = {"ce": "cross-entropy", "entropy": "entropy of the predictions", "labelled": "loss of the right choices"}
    sentences = []
    for operation in report.get("operations") or []:
        record = get(operation, "record")
        sentences += _fitted_text(str(operation.get("op")), record) + _kept_layers(str(operation.get("op")), record)
        if "kept" not in record:
            continue
        name = " ".join(filter(None, (str(operation.get("op")), record.get("method"))))
        figures = [record.get(key) for key in ("held_back_before", "held_back_change", "standard_error")]
        aim = names.get(record.get("objective"), "objective")
        figures_text = ""
        if all(map(finite, figures)):
            figures_text = "{} on what was held back {:.4f}, change {:+.4f} ± {:.4f}".format(aim, *figures)
        if record["kept"]:
            sentences.append(f"{name}: a setting was kept ({figures_text}: a gain of over two standard errors)")
        else:
            no_error = "what was held back is one piece, or copies of one, so that a gain has no standard error"
            nothing_better = no_error if finite(figures[1]) else f"none that was tried lowers the {aim}"
            why = f"{figures_text}: a gain of two standard errors is asked" if figures_text else nothing_better
            sentences.append(f"{name}: no setting was kept ({why}), so it changes nothing")
    return sentences


def _fitted_text(op: str, record: dict) -> list[str]:
    """The text that weights were fitted to."""
    fitted = get(record, "calibration")
    if not fitted.get("text"):
        return []
    digest = f" (sha256 {fitted['sha256']})" if fitted.get("sha256") else ""
    recall = (
        f"; in {100 * fitted['recall']:.3g}% of it something said earlier comes back" if fitted.get("recall") else ""
    )
    return [f"{op}: fitted to {fitted.get('tokens', 0):,} tokens: {fitted['text']}{digest}{recall}"]


def _kept_layers(op: str, record: dict) -> list[str]:
    """Which layers keep how many KV heads, where that was measured: by what copies, and by what each lost alone."""
    layers = [layer for layer in record.values() if isinstance(layer, dict) and "kv_heads" in layer]
    tried = [layer for layer in layers if "lost_alone" in layer]
    most, sentences = max((layer["kv_heads"] for layer in layers), default=0), []
    full = [index for index, layer in enumerate(layers) if layer["kv_heads"] == most]
    copying = [index for index in full if layers[index].get("copying") and layers[index] not in tried]
    if copying:
        score = layers[0].get("copying_by")
        sentences.append(
            f"{op}: layers {_listed(copying)} keep their KV heads, since their heads copy from far back ({score})"
        )
    if any("lost_by_heads" in layer for layer in tried):  # several numbers were tried
        lost = [min(layer["lost_by_heads"].items(), key=lambda each: int(each[0])) for layer in tried]
        heads, losses = count(int(lost[0][0]), "KV head"), [loss for _, loss in lost]
        costs = f"{heads} in one layer alone costs {min(losses):.4f} to {max(losses):.4f} nats (KL)"
        numbers = _listed([layer["kv_heads"] for layer in layers])
        return [
            *sentences,
            f"{op}: the layers keep {numbers} KV heads, by what fewer heads cost in each alone. {costs}",
        ]
    by_loss = [index for index in full if layers[index] in tried]
    others = [layer["lost_alone"] for layer in tried if layer["kv_heads"] != most]
    if not by_loss or not others:
        return sentences
    sides = [layers[index]["lost_alone"] for index in by_loss], others
    cost, rest = (f"{min(side):.4f} to {max(side):.4f}" for side in sides)
    names = _listed(by_loss)
    return [
        *sentences,
        f"{op}: layers {names} keep their KV heads: sharing each alone costs {cost} nats (KL), the others {rest}",
    ]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def limits(report: dict) -> str:
    """The list of limitations from the operations, the surgical tier and the measurement."""
    operations, records = get(report, "recipe").get("operations") or [], report.get("operations") or []
    unchanged = [index for index, each in enumerate(records) if get(each, "record").get("kept") is False]
    acting = [fields for index, fields in enumerate(operations) if fields.get("op") and index not in unchanged]
    lines = list(dict.fromkeys(line for fields in acting for line in _limits_of(fields)))
    if report.get("tier") == "surgical":
        lines.append(
            "A stock class by its name (`LlamaForCausalLM.from_pretrained`) loads this folder without an error and "
            "runs the base's *unchanged* attention: use the lines above."
        )
    lines.append("The table is one text on one machine. Other tasks, languages and lengths were not measured.")
    return "\n".join(f"- {line}" for line in lines)


def _limits_of(fields: dict) -> tuple[str, ...]:
    """The limitations of an operation; () if it is not installed here."""
    from surgery import operations

    try:
        operation = operations.find(str(fields["op"]))
    except SurgeryError:
        return ()
    try:
        return operation.model_validate(fields).limitations()
    except ValueError:  # the fields are another version's
        return operation.LIMITATIONS


def provenance(report: dict) -> str:
    """The command that repeats the surgery, and a list of base, versions, seeds and hashes."""
    base, files = get(report, "base"), get(report, "files")
    pinned = base.get("hub_id") and base.get("revision")
    origin = f"{base_name(report)}@{base['revision']}" if pinned else base_name(report)
    earlier = [f"{' + '.join(operations_of(record))} on {base_name(record)}" for record in report.get("history") or []]
    entries = {
        "base": f"`{origin}`",
        "note on the base": base.get("note"),
        "what changed": "; ".join(map(str, get(report, "plan").get("changes") or [])),
        "model type": base.get("model_type"),
        "fingerprint of the base": base.get("fingerprint"),
        "earlier surgeries": "; ".join(earlier),
        "engine": report.get("engine"),
        "made": report.get("created"),
        "versions": ", ".join(f"{name} {version}" for name, version in get(report, "versions").items()),
        "threads": report.get("threads"),
        "seeds": ", ".join(f"{name} {seed}" for name, seed in get(report, "seeds").items()),
        "files of the base left behind": ", ".join(f"`{name}`" for name in report.get("left_behind") or []),
    }
    lines = [f"- {name}: {fact}" for name, fact in entries.items() if fact not in (None, "")]
    said = [_sentence(str(note)) for note in get(report, "plan").get("notes") or []]
    said += [f"{line}." for line in searched(report) if "setting was" not in line]
    told = "\n".join(["What the plan and the run noted:\n", *(f"- {line}" for line in said)]) if said else ""
    recipe = yaml.safe_dump(get(report, "recipe"), sort_keys=False, allow_unicode=True)
    hashes = [f"- `{name}`: sha256 `{get(files, name).get('sha256')}`" for name in files]
    hashes += [f"- `{name}`: sha256 `{digest}`" for name, digest in get(report, "code").items()]
    folded = [folded_away("The recipe, with every setting", fenced(recipe, "yaml"))]
    folded += [folded_away("Hashes of weights and code", "\n".join(hashes))] if hashes else []
    return "\n\n".join(filter(None, [_how_to_repeat(report, origin), "\n".join(lines), told, *folded]))


def _sentence(clause: str) -> str:
    return f"{clause[:1].upper()}{clause[1:].rstrip('.')}."


def folded_away(what: str, content: str) -> str:
    """A part of the card that a click unfolds."""
    return f"<details>\n<summary>{what}</summary>\n\n{content}\n\n</details>"


def _how_to_repeat(report: dict, origin: str) -> str:
    """The commands that give the same weights, or a sentence that says why there are none."""
    source, changes = str(report.get("recipe_source") or "data"), [str(each) for each in report.get("overrides") or []]
    if report.get("in_memory"):
        return (
            "It was made from a model in memory (`surgery.apply(recipe, model)`): no command repeats it. The "
            "recipe is the one below; whatever was done to the model before or after is not known here."
        )
    if source in ("file", "data"):
        typed = f" It was given with {', '.join(f'`{each}`' for each in changes)}." * bool(changes)
        return (
            "The recipe was its author's own, and no command can name it: the one below has every setting written out."
            f"{typed} `surgery apply FILE.yaml` with it in a file gives the same weights, on the same versions and "
            "machine."
        )
    commands = [shlex.join(["surgery", "apply", source, origin, "-o", "OUT", *changes]), *heal_commands(report)]
    one = "command, versions" if len(commands) == 1 else "commands, data, versions"
    return f"The same {one} and machine give the same weights:\n\n{fenced(chr(10).join(commands), '')}"


def licence(report: dict, base: dict) -> str:
    """The paragraph on the licence; `base`: metadata of the base's card."""
    name = base.get("license_name") or base.get("license") or get(report, "base").get("license")
    unnamed = "the base's card does not name it" if base else "the base's card is not here to name it"
    name = f"**{', '.join(name) if isinstance(name, list) else name}**" if name else f"{unnamed}, so ask its author"
    holds = f"The converted model is under the base's licence: {name}"
    holds += f" ({base['license_link']})" if base.get("license_link") else ""
    if files := report.get("notices"):
        carried = f"The base's licence and notice files are in this folder: {', '.join(f'`{file}`' for file in files)}"
    else:
        known = get(report, "base").get("hub_id") or get(report, "base").get("base_model")
        where = hub_link(str(known)) if known else "the base's folder"
        carried = f"Files of licence and notice, if the base has any, are in {where}"
        carried += "; add them to this folder before you share it" if report.get("in_memory") else ""
    return f"{holds}. {carried}. The weights were modified as said above."


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
