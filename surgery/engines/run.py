"""The order of an export: refuse what cannot work, write the file, run it, compare, and record the result."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.architecture.anatomy import Anatomy
from surgery.architecture.layer import BYTES
from surgery.config.arguments import refuse_no_path, refuse_no_text
from surgery.engines import artifact, find
from surgery.engines.base import EngineQuestion, Obstacle, ServingEngine
from surgery.engines.proof import GENERATED, LONGEST, PROMPT, Agreement, compare, make_question, reference
from surgery.errors import (
    CheckError,
    MachineError,
    ModelError,
    RecordError,
    UnsupportedModelError,
)
from surgery.io import manifest
from surgery.io.files import read_json, write_json
from surgery.io.loading import read_tokenizer, refuse_adapter
from surgery.io.output_folder import refuse_small_disk
from surgery.io.printing import Block, Printed, byte_size
from surgery.machine.device import too_big
from surgery.machine.progress import Progress, begin
from surgery.report.report import FILE as RECORD
from surgery.report.report import Report

WRITING, RUNNING, COMPARING = "writing", "running it in the engine", "comparing with Transformers"
FLOAT32 = 4  # bytes of a weight while Transformers computes what the engine is compared with


@dataclass(frozen=True, repr=False)
class Exported(Printed):
    """A file or folder for another engine that was run and compared with Transformers.

    Attributes:
        path: the file or folder.
        engine: the engine's name.
        entry: what surgery.json says of it: engine, version, type, file name, sha256, bytes, agreement, KV bytes.
        command: a command that runs it.
    """

    path: Path
    engine: str
    entry: dict[str, Any]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """The entry, with the file's path and the command."""
        return self.entry | {"path": str(self.path), "next": self.command}

    def headline(self) -> str:
        return f"{self.path.name} for {self.engine}: {_agreement(self.entry)}"

    def blocks(self) -> list[Block]:
        entry = self.entry
        size = f"{self.path}, {byte_size(entry['bytes'])}, {entry['type']}"
        blocks: list[Block] = [("wrote", f"{size}, sha256 {entry['sha256'][:12]}")]
        blocks.append(("compared", f"{self.engine} ({entry['version']}) and Transformers, {_agreement(entry)}"))
        cache = f"{entry['kv_bytes_per_token']:,} bytes a token with two bytes for each number"
        if "engine_cache_bytes_per_token" in entry:
            wide = "" if entry["engine_cache_number_bytes"] == 2 else " with four bytes for each"
            cache += f"; {self.engine} counts {entry['engine_cache_bytes_per_token']:,}{wide}"
        blocks.append(("cache", cache))
        if "context" in entry:
            window = (
                f"at most {entry['context']:,} tokens, which the file says too: the model has a sliding window, and "
                f"{self.engine} computes none for this family"
            )
            blocks.append(("context", window))
        if not shutil.which(program := shlex.split(self.command)[0]):
            blocks.append(("note", f"{program} is a program of {self.engine}, and is not on PATH here"))
        return [*blocks, ("next", self.command)]


def _agreement(entry: dict[str, Any]) -> str:
    tokens, same, ties = entry["tokens"], entry["same_best"], entry["near_ties"]
    near = f" ({ties} near ties)" if ties else ""
    return (
        f"log-probabilities differ by at most {entry['largest_difference']:.1e}, "
        f"same best token at {same} of {tokens} positions{near}"
    )


def export(
    out: str | Path,
    engine: str,
    file: str | Path,
    *,
    kind: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a checked checkpoint for another engine, run it there, and compare it with Transformers.

    The result gets its name when the engine agrees. A result that does not is kept as FILE.failed, which replaces an
    earlier one. The figures are appended to `exports` in surgery.json.

    Args:
        out: a folder that passed `check`.
        engine: "llama.cpp" or "vllm".
        file: the file to write; its name ends with .gguf for llama.cpp. The folder to write for vLLM.
        kind: for llama.cpp, number format of the weights: "f32" (the default), "f16", "bf16" or "q8_0". All but the
            first round the weights: the difference is reported. A fault is NaN, another best token at more than half
            of the positions, or other text tokens.
        overwrite: replace an existing file, or a folder of an earlier export.
        progress: called with done, total and a label.

    Returns:
        The file or folder, with the figures that surgery.json has too.

    Raises:
        SurgeryError: the engine cannot express the checkpoint, is not installed, or the file exists.
        MachineError: disk or memory are too small.
        CheckError: the engine computes something else, or cannot run the file.
    """
    refuse_no_path("out", out, needed=True)
    refuse_no_text("engine", engine)
    refuse_no_path("file", file, needed=True)
    target = find(engine)
    kind = target.type_named(kind)
    typed = Path(file).expanduser()
    path = artifact.output_path(typed, Path(out), target.suffix, overwrite, target.name)
    _checked(Path(out), target)
    anatomy = _expressible(Path(out), target)
    _refuse_no_tokenizer(Path(out), target)
    version = target.version()  # after what no installation mends
    refuse_small_disk(path.parent, target.disk_bytes(anatomy, kind))
    _refuse_small_memory(anatomy)
    with artifact.unfinished(path) as partial:
        figures = _written_and_proven(Path(out), target, kind, anatomy, partial, progress)
        artifact.refuse_existing(typed, target.suffix, overwrite)  # it may have appeared during this run
        report = _checked(Path(out), target)  # again: another command may have recorded or changed something
        entry = {"engine": target.name, "version": version, "type": kind, "file": path.name, **figures}
        if partial.is_dir():
            write_json(partial / artifact.RECORD, entry)
        artifact.put(partial, path)
    _record(report, entry)
    return Exported(typed, target.name, entry, target.command(str(typed)))


def _written_and_proven(
    out: Path, engine: ServingEngine, kind: str, anatomy: Anatomy, partial: Path, progress: Progress | None
) -> dict[str, Any]:
    """Write the file or folder `partial` and compare it with Transformers: what the record says of it.

    Raises:
        CheckError: the engine computes something else, or cannot run it.
    """
    begin(progress, WRITING)
    facts = engine.write(out, anatomy, kind, partial)
    if partial.is_dir():  # so that a later export knows whose folder it is, if this one fails
        write_json(partial / artifact.RECORD, {"engine": engine.name})
    words = anatomy.config.get_text_config().vocab_size
    question, expected_text = make_question(out, *_reach(anatomy, facts), words)
    question = replace(question, cache_bytes=_cache_bytes(anatomy, len(question.prompt) + question.generate))
    agreement, cache = _prove(out, engine, question, expected_text, partial, progress)
    _refuse_other_results(agreement, kind == engine.exact, engine)
    sizes = {"sha256": artifact.digest(partial), "bytes": artifact.size(partial)}
    return sizes | agreement.to_dict() | {"kv_bytes_per_token": _half_cache(anatomy), **cache, **facts}


def _reach(anatomy: Anatomy, facts: dict[str, Any]) -> tuple[int | None, int]:
    """The most tokens that a file takes (None: unknown), and its smallest sliding window (0: it has none)."""
    return facts.get("context") or anatomy.positions, _window(anatomy)


def _window(anatomy: Anatomy) -> int:
    """The smallest sliding window of the layers; 0: they have none."""
    return min((layer.window for layer in anatomy.layers if layer.window), default=0)


def _prove(
    out: Path,
    engine: ServingEngine,
    question: EngineQuestion,
    expected_text: list[int],
    file: Path,
    progress: Progress | None,
) -> tuple[Agreement, dict[str, int]]:
    """Run the file and compare it; what the record says of the engine's own cache, if the engine tells.

    Args:
        expected_text: the tokens of the question's text.
    """
    begin(progress, RUNNING)
    answers = engine.ask(file, question)
    if (count := len(answers.best)) != question.generate or count != len(answers.generated):
        what = f"{engine.name} answered for {count} of {question.generate} tokens"
        raise CheckError(what, fix="do not use it; it is kept for a report. Export again")
    begin(progress, COMPARING)
    count, number = answers.cache_bytes, answers.number_bytes
    cache = {} if count is None else {"engine_cache_bytes_per_token": count, "engine_cache_number_bytes": number}
    return compare(reference(out, question, answers), answers, expected_text), cache


def _refuse_other_results(agreement: Agreement, exact: bool, engine: ServingEngine) -> None:
    if faults := agreement.faults(exact):
        raise CheckError(
            f"{engine.name} does not compute what Transformers does: {'; '.join(faults)}",
            fix="do not use it; it is kept for a report. Report the model's family and the recipe",
        )


def _checked(out: Path, engine: ServingEngine) -> Report:
    """The report of a folder that passed `check` and has not changed since."""
    if (out / "config.json").is_file() and not (out / RECORD).is_file():
        raise RecordError(
            "no surgery.json: not a checkpoint that surgery wrote",
            where=str(out),
            fix=f"a stock checkpoint needs no export of ours: {engine.name} or its converter reads it. `surgery apply "
            "RECIPE MODEL -o OUT` writes a converted one",
        )
    report = Report.of(out)
    refuse_adapter(out)
    manifest.refuse_unchecked(out, report.data, passed=report.passed is True, intact=report.intact)
    return report


def _refuse_no_tokenizer(out: Path, engine: ServingEngine) -> None:
    try:
        read_tokenizer(out)
    except ModelError as error:
        raise ModelError(
            f"{error.what}, and what {engine.name} runs holds the tokenizer too",
            where=str(out),
            fix="put the tokenizer's files into the base's folder, and convert that again",
        ) from error


def _refuse_small_memory(anatomy: Anatomy) -> None:
    """Raise where the model in float32, with the cache of the longest question, does not fit in memory."""
    if reason := too_big(FLOAT32 * anatomy.parameters + _cache_bytes(anatomy, _longest(anatomy))):
        raise MachineError(
            f"the comparison in float32 {reason}",
            fix="end other programs, or use a machine with more memory: no file is written without its proof",
            code="out-of-memory",
        )


def _expressible(out: Path, engine: ServingEngine) -> Anatomy:
    """The anatomy of a checkpoint that the engine can express; else an error that names every obstacle."""
    if read_json(out / "config.json").get("quantization_config"):
        smallest = min(engine.types, key=engine.types.__getitem__)
        small = f", with --type {smallest} for a small file" if len(engine.types) > 1 else ""
        raise UnsupportedModelError(
            "the weights are quantised, and an export needs them as they were",
            where=str(out),
            fix=f"export the unquantised result{small}",
        )
    anatomy = Anatomy.of(out)
    if obstacles := engine.obstacles(anatomy):
        first, *others = (_refusal(engine, each, out) for each in obstacles)
        raise UnsupportedModelError(first.what, where=first.where, fix=first.fix, others=tuple(others))
    return anatomy


def _refusal(engine: ServingEngine, obstacle: Obstacle, out: Path) -> UnsupportedModelError:
    what, fix = f"{engine.name} cannot express {obstacle.what}", f"the nearest that it can: {obstacle.nearest}"
    return UnsupportedModelError(what, where=str(out), fix=fix)


def _longest(anatomy: Anatomy) -> int:
    """The most tokens that an engine is asked about: prompt and continuation."""
    return min(_window(anatomy) + PROMPT, LONGEST) + GENERATED


def _cache_bytes(anatomy: Anatomy, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in float32."""
    return 2 * _half_cache(anatomy) * tokens


def _half_cache(anatomy: Anatomy) -> int:
    """KV bytes of one token with 2 bytes for each number, in all layers, with or without a sliding window."""
    return anatomy.kv_bytes_at(1) * 2 // BYTES.get(anatomy.dtype, 2)


def _record(report: Report, entry: dict[str, Any]) -> None:
    """Append an entry to `exports`, in place of an earlier one of the same engine and file name, and save."""
    same = ("engine", "file")
    earlier = [each for each in report.data.get("exports") or [] if any(each.get(key) != entry[key] for key in same)]
    report.data["exports"] = [*earlier, entry]
    report.save()
