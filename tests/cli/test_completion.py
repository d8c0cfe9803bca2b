"""What the shell offers: recipes, models, outputs, settings; nothing heavy is imported, and quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.config import recipe as recipes
from surgery.evaluation import probes
from surgery.operations import builtin_names
from surgery.operations.head_scorers.scorers import METHODS
from surgery.operations.variants import keys_of

HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy", "huggingface_hub")
SECONDS = 0.5  # of CPU, beyond which a person waits for the TAB
ASK = f"""
import sys, time
from surgery.cli import main as cli
try:
    cli.main([])
finally:
    print(time.process_time(), *sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """What is offered for the last word of a command line, from inside `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def ask(line: str) -> list[str]:
        words = {"_SURGERY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, env=os.environ | words, check=False
        )
        seconds, *heavy = done.stderr.split()
        assert heavy == []
        assert float(seconds) < 3 * SECONDS, "three times: other processes share the caches of this machine"
        return done.stdout.split("\n")[:-1] if done.stdout.strip() else []

    return ask


@pytest.fixture
def here(tmp_path) -> Path:
    """A recipe file, a model folder, a folder that surgery wrote, and others."""
    for name, file in (("model", "config.json"), ("out", "surgery.json"), ("deep/out2", "surgery.json")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_text(json.dumps({}))
    (tmp_path / "mine.yaml").write_text(recipes.shipped()["duo-heal"].read_text(encoding="utf-8"))
    (tmp_path / "broken.yaml").write_text("operations: [")
    (tmp_path / "notes.txt").write_text("")
    return tmp_path


def test_recipes(offered, here):
    assert set(offered("surgery apply ")) == {*recipes.shipped(), "mine.yaml", "broken.yaml"}
    assert set(offered("surgery plan m")) == {name for name in recipes.shipped() if name[0] == "m"} | {"mine.yaml"}
    assert set(offered("surgery ls s")) == {
        name for name in (*recipes.shipped(), *builtin_names()) if name.startswith("s")
    }


def test_models_and_outputs(offered, here):
    assert set(offered("surgery inspect ")) == {"smollm2-135m", "model"}
    assert offered("surgery apply gqa sm") == ["smollm2-135m"]
    assert offered("surgery check ") == ["out"]
    assert offered("surgery check deep/") == ["deep/out2"]
    assert offered("surgery check ./o") == ["./out"]
    assert offered("surgery eval out --base m") == ["model"]


def test_settings_of_a_recipe(offered, here):
    from surgery.operations import find

    bare = offered("surgery apply gqa model ")
    fields = set(type(recipes.load("gqa").operations[0]).model_fields) - {"op"}
    assert fields <= {word.removesuffix("=") for word in bare} <= set(keys_of(find("gqa")))
    assert set(offered("surgery apply gqa model me")) == {f"method={name}" for name in find("gqa").METHODS}
    assert set(offered("surgery apply gqa model method = m")) == {"mean"}, "as bash asks for method=m"
    dotted = offered("surgery apply mine.yaml model heal.")
    assert {"heal.tokens=", "heal.method=lora"} <= set(dotted)
    assert "duo_attention.window=" in offered("surgery plan mine.yaml model duo_attention.")
    assert offered("surgery apply broken.yaml model ") == [], "what cannot be read offers nothing"


def test_a_key_of_two_operations_is_offered_with_its_operation(offered, here):
    words = {word.partition("=")[0] for word in offered("surgery apply duo-with-sinks model cal")}
    assert "calibration_samples" not in words


def test_names_of_options(offered, here):
    assert set(offered("surgery eval out --probe ")) == set(probes.REGISTRY)
    assert {"secret=digits", "secret=words"} <= set(offered("surgery eval out --probe needles se"))
    assert offered("surgery apply gqa model --engine s") == ["streaming"]
    assert "tokens=" in offered("surgery heal out ")
    assert set(offered("surgery score model --method ")) == set(METHODS)
    assert offered("surgery export out --for ") == ["llama.cpp", "vllm"]
    assert set(offered("surgery export out --for llama.cpp --type ")) == {"f32", "f16", "bf16", "q8_0"}
    assert offered("surgery export out --type q") == ["q8_0"]
