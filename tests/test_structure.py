"""The rules that keep the package readable: rooms, names of modules, sizes, imports; README's map of it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from surgery.data import needle_kinds
from surgery.evaluation.probes import REGISTRY
from surgery.healing.losses import LOSSES
from surgery.operations.head_scorers.scorers import METHODS as SCORERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "surgery"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES, LENGTH, PARAMETERS = 450, 60, 7

# The modules that were decided, room by room: nouns of the field, or the verb that a command line or a recipe has
# for it. No participle, adverb or preposition. A room in OPEN gets a file for each new entry of its registry.
DECIDED = {
    "": "__main__ api errors pipeline version",
    "architecture": "anatomy detect edit families latent layer sliding stock_class surgery_block weights",
    "calibration": "attention_hook cost gradients head_scores layerwise massive moments scoring sinks",
    "calibration/closed_form": "conjugate_gradient cost fit_mlp fit_scores fit_values joint_rank layer layer_inputs "
    "layerwise_fit low_rank vector_layer",
    "cli": "compare completion convert doctor evaluate export help inspect interrupt main measure options pages",
    "cli/render": "anatomy catalogue console durations estimate heads layout model next_command sinks stages "
    "summary tables",
    "config": "arguments catalogue evaluate heal heal_overrides heal_values options overrides recipe validation yaml",
    "conversion": "applied_block convert estimate fit in_memory plan plan_tree preflight streaming",
    "data": "calibration_text documents generated haystack name_list openings packing passage_order passkeys "
    "questions quotations recall_rows repeats requests text text_sources word_list",
    "data/needle_kinds": "base",
    "evaluation": "ablation answers base_runs check check_code check_layers conversation evaluate figures footprint "
    "fresh_process lengths paired recall result run",
    "evaluation/benchmark": "dense_below models result run",
    "evaluation/comparison": "measures result run",
    "evaluation/harness": "answers command scores task_files task_index task_set",
    "evaluation/probes": "base distances fields grid recall settings",
    "engines": "artifact base configuration_decilm llama_cpp llama_cpp_cache llama_cpp_converter llama_cpp_server "
    "process proof run vllm vllm_environment vllm_latent vllm_process",
    "healing": "callbacks contexts distributed heal layerwise_distillation lora models parameters plan record run "
    "sparse_attention teacher trackers trainer validate weighted_gqa",
    "healing/losses": "base objective",
    "io": "card_text demo_model earlier_keys files hub hub_errors identity key_values loading manifest model_folder "
    "model_in_memory output_folder pickle plain_config printing ranges resume safetensors",
    "kernels": "",
    "machine": "command device offload parallel placement progress speed transformers_logging",
    "operations": "absorb base expand head_mask rewrite variants vector",
    "operations/duo_attention": "operation",
    "operations/head_scorers": "choice scorers",
    "operations/kv_evict": "base methods operation",
    "operations/kv_read": "base key_directions methods operation",
    "operations/gqa": "base closed_form closed_form_method grouping heads_by_layer layer lost_alone merge "
    "merge_methods operation",
    "operations/low_rank_kv": "layer operation weights",
    "operations/mla": "layer operation weights",
    "operations/moh": "operation router",
    "operations/prune_heads": "importance operation refit select",
    "operations/sink_calibration": "act base bias_methods operation virtual_key_methods virtual_keys zero_tuning",
    "operations/sliding_layers": "ablation operation window_search",
    "operations/sparse_prefill": "base by_head methods operation pattern_search prompt_share",
    "recipes": "",
    "report": "card card_healing card_metadata card_sections card_summary gate head_map lineage page plots report "
    "reproduction summary timing verdict",
    "search": "budget fit fitted sweep trials",
    "runtime": "modeling_surgery surgery_act surgery_attention surgery_bias surgery_block_attention "
    "surgery_block_selection surgery_cache surgery_config surgery_estimators surgery_gated_compute surgery_gates "
    "surgery_kept_store surgery_kernels surgery_latent surgery_low_rank surgery_projections surgery_query_blocks "
    "surgery_sparse_prefill surgery_stores surgery_visibility",
}
# Functions of more than PARAMETERS: their keywords are a user's options or the settings of one method, by name.
MANY = {
    "api": "apply heal",
    "evaluation": "evaluate evaluate_choices evaluate_needles",
    "data": "calibration make_needles passkeys",
    "evaluation/benchmark": "bench",
    "evaluation/comparison": "compare",
    "search": "fit sweep",
    "healing": "of store",
    "operations/head_scorers": "ablation far_mass fisher gates induction retrieval",
    "operations/moh": "route",
    "operations/sparse_prefill": "search_patterns",
    "report": "heat_maps",
    "runtime": "flexprefill max_threshold pooled sampled unpadded vertical_slash xattention",
}
OPEN = {"runtime": ("surgery_estimate_", "surgery_kv_")}  # room -> how the name of a new entry begins
ENTRIES = {  # room -> modules of its registry, which may come and go
    "data/needle_kinds": {entry.split(":")[0] for entry in needle_kinds.REGISTRY.values()},
    "evaluation/probes": {entry.split(":")[0] for entry in REGISTRY.values()},
    "healing/losses": {entry.split(":")[0] for entry in LOSSES.values()},
    "operations/head_scorers": {method.module for method in SCORERS.values()},
}


def room_of(path: Path) -> str:
    parent = path.parent.relative_to(PACKAGE).as_posix()
    return "" if parent == "." else parent


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_are_small_and_do_not_assert(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Assert), f"user input is never checked with assert: line {node.lineno}"
        if isinstance(node, ast.FunctionDef) and not is_verb(path, node):
            where = f"{node.name}, line {node.lineno}"
            assert node.end_lineno - node.lineno < LENGTH, where
            assert (
                named_parameters(node) <= PARAMETERS or node.name in MANY.get(room_of(path) or path.stem, "").split()
            ), where
            assert positional_parameters(node) <= PARAMETERS, where


def positional_parameters(function: ast.FunctionDef) -> int:
    given = [*function.args.posonlyargs, *function.args.args]
    return len(given) - bool(given[:1] and given[0].arg in ("self", "cls"))


def named_parameters(function: ast.FunctionDef) -> int:
    return positional_parameters(function) + len(function.args.kwonlyargs)


def test_the_list_of_functions_with_many_parameters_is_no_longer_than_they_are():
    found: dict[str, set[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and named_parameters(node) > PARAMETERS and not is_verb(path, node):
                found.setdefault(room_of(path) or path.stem, set()).add(node.name)
    assert found == {room: set(names.split()) for room, names in MANY.items()}


def is_verb(path: Path, function: ast.FunctionDef) -> bool:
    """Whether a function is a verb of the command line: its parameters are flags."""
    return room_of(path) == "cli" and "Annotated" in ast.unparse(function.args)


def test_every_module_has_a_name_that_was_decided():
    found: dict[str, set[str]] = {}
    for path in MODULES:
        room = room_of(path)
        known = found.setdefault(room, set())
        new = (room in OPEN and path.stem.startswith(OPEN[room])) or path.stem in ENTRIES.get(room, ())
        if path.stem != "__init__" and not new:
            known.add(path.stem)
    assert {room: sorted(names) for room, names in found.items()} == {
        room: sorted(names.split()) for room, names in DECIDED.items()
    }


def test_no_class_name_means_two_things():
    """Over all classes of the package, private ones too."""
    owners: dict[str, set[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, set()).add(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    repeated = {name: sorted(where) for name, where in owners.items() if len(where) > 1}
    assert not repeated


def test_operations_that_must_not_know_each_other_are_all_of_them():
    contract = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "independence")
    shared = {"__init__", "base", "head_scorers", "rewrite", "variants", "vector"}
    paths = [
        path for path in (PACKAGE / "operations").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    methods = {f"surgery.operations.{path.stem}" for path in paths if path.stem not in shared}
    assert set(contract["modules"]) == methods


def test_the_runtime_imports_torch_and_transformers_alone():
    """A checkpoint carries it to machines that have these two; a kernel is used where `surgery` is installed."""
    known = set(sys.stdlib_module_names) | {"torch", "transformers"}
    for path in (PACKAGE / "runtime").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attempts = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                kernel = name.startswith("surgery.kernels") and id(node) in attempts
                assert name.split(".")[0] in known or kernel, f"{path.name}:{node.lineno} imports {name}"


def test_files_that_are_named_in_comments_and_documents_exist():
    documents = [*MODULES, *ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "kernels").glob("*.py")]
    for path in documents:
        for name in re.findall(r"(?<![\w/.])(?:[a-z_]+/)+[a-z_*]+\.py\b", path.read_text(encoding="utf-8")):
            if name.startswith(("custom_generate/", "surgery/operations/my_op")):  # a stranger's, yours
                continue
            near = [ROOT, PACKAGE, path.parent, PACKAGE / "operations"]
            assert any(list(folder.glob(name)) for folder in near), f"{path.relative_to(ROOT)} names {name}"


def test_every_parameter_of_the_public_api_has_a_type():
    import surgery

    for name in surgery.__all__:
        public = getattr(surgery, name)
        members = vars(public).values() if inspect.isclass(public) else [public]
        functions = [getattr(member, "__func__", member) for member in members]
        for function in filter(inspect.isfunction, functions):
            if function.__name__.startswith("_") or not function.__module__.startswith("surgery"):
                continue
            for parameter in inspect.signature(function).parameters.values():
                typed = parameter.annotation is not parameter.empty or parameter.name in ("self", "cls")
                assert typed, f"{name}: {function.__qualname__}({parameter.name})"


def test_names_of_the_registries_mean_one_thing():
    from surgery.evaluation.figures import Evaluation, Side
    from surgery.evaluation.probes import every

    limits = [limit for probe in every() for limit in probe.limits]
    assert len(limits) == len(set(limits)), "a gate's limit belongs to one probe"
    shared = set(Evaluation("done", {}, Side()).to_dict())
    assert not shared & {probe.name for probe in every() if not probe.main}, "their figures lie beside these"
    keys = [key for probe in every() for key in (*probe.aliases.recipe, *probe.aliases.limits)]
    assert len(keys) == len(set(keys))


def test_every_room_is_a_layer_and_has_a_docstring():
    layers = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")["layers"]
    modules = [name.strip().removeprefix("surgery.") for line in layers for name in re.split("[|:]", line)]
    named = {name.split(".")[0] for name in modules}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"kernels", "recipes"}
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "version"}
    assert named == rooms | loose
    # Rooms of two floors: what settings, recipe and card follow from, and what knows settings and reports.
    for room in ("evaluation", "healing"):
        floors = [name.split(".")[1] for name in modules if name.startswith(f"{room}.")]
        entries = (path for path in (PACKAGE / room).iterdir() if path.is_dir() or path.suffix == ".py")
        inside = {path.stem for path in entries if not path.stem.startswith("__")}
        assert sorted(floors) == sorted(inside)
    for init in PACKAGE.rglob("__init__.py"):
        said = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        assert len(said) > 20, init
    forbidden = next(
        c for c in PROJECT["tool"]["importlinter"]["contracts"] if "typer" in c.get("forbidden_modules", ())
    )
    assert {name.removeprefix("surgery.") for name in forbidden["source_modules"]} == (rooms | loose | {"version"}) - {
        "cli"
    }


def test_the_map_names_every_room():
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    for path in PACKAGE.iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"{path.name}/" in text
        elif path.suffix == ".py" and not path.stem.startswith("__"):
            assert path.name in text


@pytest.mark.skipif(importlib.util.find_spec("grimp") is None, reason="needs import-linter")
def test_no_module_is_loose_and_none_imports_itself_through_others():
    done = subprocess.run([sys.executable, ROOT / ".ci/structure.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "circles of modules: none" in done.stdout
