"""What users install, and the rules that keep the repository readable."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = sorted((ROOT / "surgery").rglob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_kernels_and_recipes_and_no_top_level_package_of_their_own(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"surgery"}
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"surgery/recipes/{recipe.name}" in names
    assert "surgery/py.typed" in names
    assert "surgery/kernels/__init__.py" not in names
    assert "surgery/recipes/__init__.py" not in names
    ours = {f"surgery/{p.relative_to(ROOT / 'surgery').as_posix()}" for p in MODULES}
    for kernel in (ROOT / "kernels").glob("*.py"):
        assert f"surgery/kernels/{kernel.name}" in names
    shims = {"surgery/kernels/__init__.py", "surgery/recipes/__init__.py"}
    assert ours - shims <= set(names)
    inside = [name for name in names if ".dist-info" not in name and name != "surgery/py.typed"]
    assert {Path(name).suffix for name in inside} == {".py", ".yaml"}, "pages and plots are in the sdist alone"


def test_wheel_runs_from_anywhere(wheel, tmp_path):
    target = tmp_path / "site with spaces é"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    code = "import surgery, surgery.cli.main; print(surgery.__file__); surgery.cli.main.main(['ls'])"
    env = os.environ | {"PYTHONPATH": str(target), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert recipe.stem.removesuffix("-heal") in done.stdout


def test_the_workflow_runs_the_test_command_on_every_python_of_the_classifiers():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    classifiers = "\n".join(PROJECT["project"]["classifiers"])
    assert job["strategy"]["matrix"]["python"] == re.findall(r"Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    assert PROJECT["project"]["requires-python"] == f">={job['strategy']['matrix']['python'][0]}"
    assert job["steps"][-1]["run"] == ".ci/run"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("folder", ["kernels", "recipes"])
def test_top_level_folders_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_version_is_said_once():
    import surgery

    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "surgery/version.py"
    assert surgery.__version__ == version("attention-surgery")


def test_readme_names_every_verb():
    from surgery.cli.main import app

    readme = (ROOT / "surgery" / "cli" / "README.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert f"surgery {command.name or command.callback.__name__}" in readme


def test_importing_surgery_imports_nothing_heavy():
    code = (
        "import sys, surgery, surgery.cli.main, surgery.config.recipe, surgery.operations;"
        "surgery.operations.catalogue();"
        "print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_streamed_conversion_starts_without_what_trains_or_runs_models(base, tmp_path):
    """Its imports took longer than the copying of 4 GiB."""
    code = (
        "import sys, surgery;"
        "surgery.apply('mqa', sys.argv[1], output=sys.argv[2], check=False, evaluate=False);"
        "heavy = ('peft', 'datasets', 'matplotlib', 'transformers.trainer', 'transformers.modeling_utils');"
        "print([name for name in heavy if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(base), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_survive_their_modules():
    """A submodule that is imported becomes an attribute of the package: no public function may have its name."""
    import pkgutil

    import surgery

    names = [module.name for module in pkgutil.iter_modules(surgery.__path__)]
    assert not set(names) & set(surgery.__all__)
    for name in set(names) - {"__main__"}:
        importlib.import_module(f"surgery.{name}")
    for name in surgery.__all__:
        assert isinstance(getattr(surgery, name), str) or callable(getattr(surgery, name)), name


def test_a_type_checker_sees_every_public_name():
    """Public names are imported on first use, which a type checker cannot follow: a block that never runs has them."""
    import surgery

    tree = ast.parse((ROOT / "surgery/__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [node for node in ast.walk(block) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen.keys() == set(surgery.__all__) - {"__version__"}
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(surgery, name)
