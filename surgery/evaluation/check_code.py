"""Verifies the code in a surgical folder. A check runs that code only if it is this version's, byte for byte."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from surgery.errors import shown
from surgery.evaluation.check_layers import FAILED, NOTED, PASSED
from surgery.io.files import REPORT, read_json, sha256
from surgery.io.model_folder import RUNTIME, load_config
from surgery.version import __version__

FOREIGN = "the code in the folder is not this version's"


def check_runtime_code(folder: Path) -> tuple[str, str]:
    """Compare the code in a surgical folder with the code that this version writes.

    With trust_remote_code, Transformers runs the files that `auto_map` names, the files that these import, and
    `custom_generate/generate.py`. Other .py files, which were copied from the base, are never run.

    Returns:
        (status, detail). PASSED: the code is this version's. NOTED: it is another version's, unchanged since it was
        written. FAILED: any other code.
    """
    from surgery.runtime.surgery_config import ENTRY, exported_files, parts_of

    config = load_config(folder)  # its `surgery` block is valid: `Anatomy.of` has read it
    entries = read_json(folder / "config.json").get("auto_map")
    if not isinstance(entries, dict):
        return FAILED, f"{FOREIGN}: auto_map is {shown(entries)}"
    entries = [entry for value in entries.values() for entry in (value if isinstance(value, list) else [value])]
    if other := [entry for entry in entries if str(entry).partition(".")[0] != ENTRY]:
        return FAILED, f"{FOREIGN}: auto_map names {other[0]}"
    if (folder / "custom_generate").exists():
        return FAILED, f"{FOREIGN}: it has custom_generate"
    expected = exported_files(parts_of(config.surgery["layers"]))
    fault = ""
    for name, content in expected.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            fault = f"{name} {'differs' if (folder / name).is_file() else 'is missing'}"
            break
    if not fault:
        return PASSED, f"{len(expected)} files, identical to this version's"
    if (version := _recorded_version(folder)) and version != f"surgery {__version__}":
        return NOTED, f"another version's ({version}), as it was written: {fault}; surgery.load runs this version's"
    return FAILED, f"{FOREIGN}: {fault}"


def _recorded_version(folder: Path) -> str:
    """The version that wrote the code of a folder; "" if surgery.json does not list exactly this code."""
    if not (folder / REPORT).is_file():
        return ""
    report = read_json(folder / REPORT)
    code, versions = report.get("code"), report.get("versions")
    present = {path.name for path in folder.iterdir() if any(fnmatchcase(path.name, pattern) for pattern in RUNTIME)}
    if not isinstance(code, dict) or not isinstance(versions, dict) or present - set(code):
        return ""
    unchanged = all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in code.items())
    return f"surgery {versions.get('surgery')}" if unchanged else ""
