"""A checkpoint carries the code that its surgery uses and no other; Transformers and the Hub find all of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import edit_json, edit_record
from fake_hub import FakeHub
from families import stranger
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import surgery
from surgery.io import manifest
from surgery.io.files import sha256
from surgery.runtime import modeling_surgery as runtime
from surgery.runtime import surgery_config
from surgery.runtime.surgery_estimators import estimator_names
from surgery.runtime.surgery_gates import Gate

HERE = Path(runtime.__file__).parent
# The package's kernels: of sparse prefill, of a gate, and of every surgical model.
KERNEL, GATHERED = {"block_sparse_prefill.py", "estimators.py"}, {"gathered_heads.py"}
ALWAYS = {"surgery_triton.py", "streaming_prefill.py", "split_decode.py"}
ALL = {path.name for path in HERE.glob("*.py")} - {"__init__.py"} | KERNEL | GATHERED | ALWAYS
CORE = {"modeling_surgery.py"} | ALWAYS
CORE |= {
    f"surgery_{name}.py" for name in ("attention", "cache", "config", "kept_store", "kernels", "stores", "visibility")
}
SPARSE = {"sparse_prefill", "block_attention", "block_selection", "estimators"}
GATE = {"kind": "moh", "unit": "head", "shared": [0, 1], "active": 4}
ROUTERS = Gate.of(GATE, [3, 3, 3]).shapes(72)
PATTERNS = [{"method": "streaming", "sinks": 16, "window": 16}] * 8
PATTERNS += [{"method": "vertical_slash", "vertical": 16, "slash": 16}]
SPLIT = {"streaming": [0], "sinks": 2, "window": 6}
POOLED = {"method": "pooled", "block": 16, "density": 0.4}
# What is done to both layers of the tiny Llama -> the files besides the core.
CASES = {
    "split": (SPLIT, set()),
    "gamma": ({"parameters": {"surgery_log_gamma": [9]}}, {"bias"}),
    "act": ({"parameters": {"surgery_log_beta": [9], "surgery_sink_probe": [9, 10]}}, {"bias", "act"}),
    "act by map": ({"parameters": {"surgery_log_beta": [9]}, "act": {"alpha": 1.3}}, {"bias", "act"}),
    "gate": ({"gate": GATE, "parameters": ROUTERS}, {"gated_compute", "gates"}),
    "pooled": ({"sparse": POOLED}, SPARSE | {"estimate_pooled"}),
    "flexprefill": (
        {"sparse": {"method": "flexprefill", "block": 16}},
        SPARSE | {"estimate_flexprefill", "estimate_pooled", "estimate_vertical_slash"},
    ),
    "by head": (
        {"sparse": {"method": "by_head", "block": 16, "patterns": PATTERNS}},
        SPARSE | {"estimate_streaming", "estimate_vertical_slash"},
    ),
    "all": (
        SPLIT | {"gate": GATE, "parameters": ROUTERS | {"surgery_log_gamma": [9]}, "sparse": POOLED},
        SPARSE | {"estimate_pooled", "bias", "gated_compute", "gates"},
    ),
}
IDS = torch.randint(3, 60, (1, 100), generator=torch.Generator().manual_seed(0))
RUNNER = """
import json, sys, torch
from transformers import AutoModelForCausalLM

answers = []
for job in json.load(sys.stdin):
    try:
        model = AutoModelForCausalLM.from_pretrained(job["name"], trust_remote_code=True).eval()
        with torch.no_grad():
            torch.save(model(input_ids=torch.tensor(job["ids"])).logits, job["logits"])
        package = type(model).__module__.rpartition(".")[0]
        kernels = sys.modules[f"{package}.surgery_kernels"]  # its own, which a GPU would run
        assert kernels._module("split_decode").__name__ == f"{package}.split_decode"
        model.save_pretrained(job["again"])
        answers.append("")
    except (ValueError, OSError) as error:
        answers.append(str(error))
assert "surgery" not in sys.modules
print("ANSWERS" + json.dumps(answers))
"""


def code_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def operated(folder: Path, entry: dict):
    """The tiny Llama with this entry in both layers, and parameters that do something."""
    model = surgery.load(folder).float()
    runtime.patch(model, {"layers": [entry] * 2})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "surgery_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 - 0.5)
    return model


def job(root: Path, label: str, name: str) -> dict:
    out = {"again": str(root / f"{label}-again"), "logits": str(root / f"{label}.pt")}
    return {"name": name, "ids": IDS.tolist()} | out


@pytest.fixture(scope="module")
def opened(tiny_llama, tmp_path_factory):
    """Every case saved by this package, then loaded and saved again by a stranger: from a folder, one from a Hub."""
    root = tmp_path_factory.mktemp("carried")
    jobs, models = [], {}
    for name, (entry, _) in CASES.items():
        models[name] = operated(tiny_llama, entry)
        models[name].save_pretrained(root / name)
        surgery.load(root / name).save_pretrained(root / f"{name}-own")
        jobs.append(job(root, name, str(root / name)))
    lacking = root / "lacking"  # its config was edited by hand, and uses what it does not carry
    models["split"].save_pretrained(lacking)
    block = json.loads((lacking / "config.json").read_text())["surgery"]
    edit_json(lacking / "config.json", surgery=block | {"layers": [{"gate": GATE, "parameters": ROUTERS}] * 2})
    jobs.append(job(root, "lacking", str(lacking)))
    with FakeHub() as hub:
        hub.add("org/all", {path.name: path.read_bytes() for path in (root / "all").iterdir()})
        jobs.append(job(root, "hub", "org/all"))
        keep = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("HF_", "HUGGING"))}
        keep |= {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(root / "home"),
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [stranger(root / "env"), "-P", "-c", RUNNER],
            input=json.dumps(jobs),
            env=keep | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=root,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        fetched = {path.rpartition("/")[2] for _, path, _ in hub.requests("GET", ".py")}
    answers = json.loads(done.stdout.partition("ANSWERS")[2])
    return root, models, dict(zip([*CASES, "lacking", "hub"], answers, strict=True)), fetched


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_carries_what_it_uses(opened, name):
    root, models, answers, _ = opened
    assert answers[name] == ""
    wanted = CORE | {f"surgery_{part}.py" for part in CASES[name][1]}
    wanted |= KERNEL if "sparse_prefill" in CASES[name][1] else set()
    wanted |= GATHERED if "gates" in CASES[name][1] else set()
    code = code_in(root / name)
    assert set(code) == wanted
    assert code_in(root / f"{name}-own") == code == code_in(root / f"{name}-again")
    with torch.no_grad():
        mine, memory = surgery.load(root / name)(input_ids=IDS).logits, models[name](input_ids=IDS).logits
    assert torch.equal(torch.load(root / f"{name}.pt"), mine)
    assert (mine - memory).abs().max() <= 1e-4


def test_what_transformers_copies_by_the_text_is_what_is_there(opened):
    for name in CASES:
        folder = opened[0] / name
        found = {Path(file).name for file in get_relative_import_files(folder / "modeling_surgery.py")}
        assert found | {"modeling_surgery.py"} == set(code_in(folder))


def test_the_entry_itself_names_every_file(opened):
    """Transformers 4 takes the files that config.json's names, and what that one imports: no more."""
    for name in CASES:
        folder = opened[0] / name
        named = {f"{file}.py" for file in get_relative_imports(folder / "modeling_surgery.py")}
        assert named | {"modeling_surgery.py"} == set(code_in(folder))


def test_from_the_hub_all_that_is_carried_is_fetched(opened):
    root, _, answers, fetched = opened
    assert answers["hub"] == ""
    assert fetched == set(code_in(root / "all")) < ALL
    assert torch.equal(torch.load(root / "hub.pt"), torch.load(root / "all.pt"))
    assert code_in(root / "hub-again") == code_in(root / "all")


def test_code_of_the_base_takes_the_place_of_none(tiny_llama, tmp_path):
    """A base that was sparse by another version brings files of the same names."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    for name in ("surgery_sparse_prefill.py", *KERNEL):
        (base / name).write_text("# of another version\n")
    given = {"check": False, "evaluate": False, "overrides": ["every=8", "block=16"]}
    surgery.apply("sparse-prefill", str(base), output=tmp_path / "out", **given)
    code = code_in(tmp_path / "out")
    assert {*KERNEL} < set(code)
    assert not any(content.startswith(b"# of another version") for content in code.values())


def test_code_that_did_not_come_along_is_named(opened):
    answer = opened[2]["lacking"]
    assert "surgery_gated_compute.py did not come with this checkpoint" in answer
    assert "surgery.load" in answer


def test_every_file_is_the_cores_or_a_parts():
    found = {*CORE}
    for name in surgery_config.FILES:
        found |= set(surgery_config.exported_files([name]))
    assert found == ALL
    assert set(surgery_config.exported_files([])) == CORE


def test_a_file_describes_the_estimators_that_have_a_line_for_it():
    """Of both, no more: files that are not the runtime's (a kernel) describe none."""
    files = {file for file in surgery_config.FILES.values() if (HERE / f"{file}.py").is_file()}
    described = {file: getattr(import_module(f"surgery.runtime.{file}"), "ESTIMATORS", {}) for file in files}
    found = {f"sparse.{name}": file for file, names in described.items() for name in names}
    assert found == {f"sparse.{name}": surgery_config.FILES[f"sparse.{name}"] for name in estimator_names()}


def test_a_split_alone_carries_less_than_half(opened):
    lines = {name: text.count(b"\n") for name, text in surgery_config.exported_files(surgery_config.FILES).items()}
    carried = sum(text.count(b"\n") for text in code_in(opened[0] / "split").values())
    assert carried < 0.5 * sum(lines.values())


@pytest.mark.parametrize("name", ["os", "../evil", "surgery_terms", ""])
def test_no_other_name_is_imported(name):
    with pytest.raises(ValueError, match="there is no part"):
        surgery_config.load_file(name)


def test_a_part_that_is_used_no_longer_is_left_out(tiny_llama, tmp_path):
    model = operated(tiny_llama, CASES["gamma"][0])
    entries = [{**layer, "parameters": {}} for layer in model.config.surgery["layers"]]
    model.config.surgery = model.config.surgery | {"layers": entries}
    runtime.attach(model)
    with torch.no_grad():
        want = surgery.load(tiny_llama).float()(input_ids=IDS).logits
        assert (model(input_ids=IDS).logits - want).abs().max() <= 1e-5
    model.config.save_pretrained(tmp_path / "out")
    assert set(code_in(tmp_path / "out")) == CORE


def looked_at(ran, name: str = "runtime files") -> tuple[str, str]:
    return next((item["status"], item["detail"]) for item in ran.json["items"] if item["name"] == name)


def test_check_says_that_the_code_is_another_versions(surgery, model, tmp_path):
    """As the version that wrote it recorded it, it is no fault; edited after that, it is."""
    made = surgery("apply", "streaming", model, "-o", "out", "sinks=2", "window=6", "--no-check", "--no-eval")
    assert made.code == 0, made.err
    out = tmp_path / "out"
    assert looked_at(surgery("check", out, "--json")) == ("passed", "11 files, identical to this version's")
    (out / "surgery_older.py").write_text("# a file that this version does not have\n")
    (out / "surgery_cache.py").write_text("raise RuntimeError('another version')\n")
    report = json.loads((out / "surgery.json").read_text())
    code = {path.name: sha256(path) for path in out.glob("*.py")}
    files = report["other_files"] | {name: manifest.entry(out / name) for name in code}
    edit_record(out, code=code, other_files=files, versions=report["versions"] | {"surgery": "0.0.7"})
    ran = surgery("check", out, "--json")
    assert ran.code == 0, ran.out
    status, detail = looked_at(ran)
    assert status == "noted"
    assert "another version's (surgery 0.0.7), as it was written: surgery_cache.py differs" in detail
    assert looked_at(ran, "loads with trust_remote_code")[0] == "not run"
    assert looked_at(ran, "loads with surgery.load")[0] == "passed"
    (out / "surgery_older.py").write_text("# edited\n")
    ran = surgery("check", out)
    assert ran.code == 4
    assert "surgery_cache.py differs" in ran.out
