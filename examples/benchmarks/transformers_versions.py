"""Which versions of Transformers load results: version by family by kind of result, each in a fresh environment.

    python examples/benchmarks/transformers_versions.py VERSION... [--families llama ...] [--unguarded] --out FILE

The tiny models of the tests are converted in seven ways: to the native tier, and with each part of the runtime. Then
an environment is made for each version, which has no `surgery`, and shares torch with this one. There each result is
loaded. Its logits with and without a cache, and what it generates with padding and beams, are compared with this
environment's.

`--unguarded` lifts the range of versions that exported code accepts, to find out where it could lie.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from functools import partial
from pathlib import Path

from measured import Measured
from results import write

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "support"))
TOLERANCE = 1e-4  # largest difference of a logit, as a share of the logits' spread
TOKENS, PROMPT = 48, 32  # tokens of a text; those of the first of two forwards through the cache
RESULTS = {  # kind -> an operation that is measured on nothing
    "native": {"op": "gqa", "kv_heads": 2, "method": "mean"},
    "shapes": {"op": "gqa", "kv_heads": [2, 1], "method": "mean"},
    "split": {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 2, "window": 4},
    "sinks": {"op": "sink_calibration", "method": "zero_tuning", "gamma": 3.0},
    "act": {"op": "sink_calibration", "method": "act", "find": "map", "beta": 1.0, "threshold": 1.3},
    "gates": {"op": "moh", "active_ratio": 0.5, "shared_ratio": 0.0, "router": "random"},
    "sparse": {"op": "sparse_prefill", "method": "streaming", "block": 16, "sinks": 4, "window": 4, "dense_below": 0},
}
WHOLE = ("act",)  # kinds whose result depends on where the prompt ends: no forward through the cache is compared
parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("versions", nargs="+", metavar="VERSION", help="such as 5.14.1")
parser.add_argument("--families", nargs="+", help="of tests/support/families.py; all by default")
parser.add_argument("--unguarded", action="store_true", help="lift the range that exported code accepts")
parser.add_argument("--out", type=Path, required=True, help="results as JSON; a second run goes on there")
parser.add_argument("--table", type=Path, metavar="FILE", help="write a table for the pages (results/NAME.json)")
parser.add_argument("--machine", default="", help="with --table: the machine")


def make(folder: Path, families: list[str], unguarded: bool) -> None:
    """Write the results of every family that can be converted, with what this environment computes."""
    import torch
    from families import TINY, VOCAB
    from opened_results import generated

    import surgery

    tokens = torch.randint(3, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    for family in families:
        TINY[family]().save_pretrained(folder / "base" / family)
        for kind, step in RESULTS.items():
            out = folder / "results" / f"{family}-{kind}"
            recipe = {"version": 1, "name": kind, "operations": [step], "evaluate": None}
            try:
                surgery.apply(recipe, str(folder / "base" / family), output=out, check=False, evaluate=False)
            except surgery.SurgeryError as error:
                print(f"{family}, {kind}: {error.what}", file=sys.stderr)
                continue
            if kind == "act":
                lower_betas(out / "model.safetensors")
            model = surgery.load(out, dtype=torch.float32).eval()
            with torch.no_grad():
                logits = model(tokens).logits
            expected = {"tokens": tokens, "logits": logits, "prompt": 0 if kind in WHOLE else PROMPT}
            expected["generated"] = {beams: generated(model, tokens, beams) for beams in (1, 2)}
            torch.save(expected, out / "expected.pt")
            if unguarded:
                lift_range(out / "surgery_config.py")


def lower_betas(file: Path) -> None:
    """Let `act` redistribute attention: with betas of 1 it would not."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("surgery_log_beta"):
            tensor.copy_(torch.linspace(-2, 0, len(tensor)))
    save_file(tensors, file, {"format": "pt"})


def lift_range(code: Path) -> None:
    """Let exported code run in every version."""
    from surgery.runtime.surgery_config import SINCE, TRANSFORMERS

    if code.is_file():
        text = code.read_text(encoding="utf-8")
        assert str(TRANSFORMERS) in text
        assert str(SINCE).replace("'", '"') in text
        text = text.replace(str(TRANSFORMERS), "((0, 0), (99, 0))").replace(str(SINCE).replace("'", '"'), "{}")
        code.write_text(text, encoding="utf-8")


def environment(version: str, folder: Path) -> Path:
    """The Python of a fresh environment with this version of Transformers, and this environment's other packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
    # This path comes after the environment's own packages, and an editable `surgery` is not found by it.
    Path(site.strip(), "torch-of-another.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"transformers=={version}"], check=True)
    return python


def opened(version: str, results: Path) -> dict[str, float | str]:
    """Result -> the largest difference of its logits, or why it does not load."""
    with tempfile.TemporaryDirectory() as scratch:
        python = environment(version, Path(scratch) / "environment")
        found = Path(scratch) / "found.json"
        subprocess.run([python, "-P", str(HERE / "opened_results.py"), str(results), str(found)], check=True)
        return json.loads(found.read_text())


def table(measured: dict[str, dict[str, float | str]]) -> tuple[list[str], list[list[str]]]:
    """The columns, one for versions with the same answers; and the rows, one for families with the same answers."""
    made = sorted({name for each in measured.values() for name in each})
    kinds = {name.rpartition("-")[0]: [] for name in made}
    for name in sorted(made, key=lambda name: list(RESULTS).index(name.rpartition("-")[2])):
        kinds[name.rpartition("-")[0]].append(name)
    answers = {v: tuple(cell([each[name] for name in names], names) for names in kinds.values())
               for v, each in measured.items()}  # fmt: skip
    alike: dict[tuple[str, ...], list[str]] = {}
    for version, cells in answers.items():
        alike.setdefault(cells, []).append(version)
    titles = [vs[0] if len(vs) == 1 else f"{vs[0]} to {vs[-1]}" for vs in alike.values()]
    families: dict[tuple[str, ...], list[str]] = {}
    for family, cells in zip(kinds, zip(*alike, strict=True), strict=True):
        families.setdefault(cells, []).append(family)
    return ["results of", *titles], [[", ".join(names), *cells] for cells, names in families.items()]


def cell(values: list[float | str], names: list[str]) -> str:
    """The kinds of results that open and agree, and those that compute something else; the others do not open."""
    kinds = [name.rpartition("-")[2] for name in names]
    found = list(zip(kinds, values, strict=True))
    good = [kind for kind, value in found if isinstance(value, float) and value <= TOLERANCE]
    other = [kind for kind, value in found if isinstance(value, float) and value > TOLERANCE]
    if not other:
        return "all" if good == list(RESULTS) else ", ".join(good) or "none"
    agrees = (
        "the others agree" if len(good) + len(other) == len(kinds) else ", ".join(good) or "the others do not open"
    )
    return f"{', '.join(other)}: other logits; {agrees}"


def main() -> None:
    from families import TINY

    options = parser.parse_args()
    families = options.families or list(TINY)
    measured = Measured(options.out, {"families": families, "unguarded": options.unguarded})
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), families, options.unguarded)
        found = {v: measured.once(v, partial(opened, v, Path(scratch) / "results")) for v in options.versions}
    columns, lines = table(found)
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    if options.table:
        command = f"python examples/benchmarks/transformers_versions.py {' '.join(options.versions)} --out r.json"
        write(options.table, command, options.machine, columns, lines)


if __name__ == "__main__":
    main()
