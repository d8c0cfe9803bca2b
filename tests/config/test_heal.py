"""The heal: block: what it takes, what it refuses and where it says so, and the plan that follows from it."""

from __future__ import annotations

import pytest
from families import CONVERTIBLE, one_thread  # noqa: F401

from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.heal import Heal
from surgery.config.heal_overrides import settings
from surgery.errors import SurgeryError
from surgery.healing.parameters import select_trainable, touched
from surgery.healing.plan import MICRO_TOKENS, HealPlan, micro_rows
from surgery.io.model_folder import model_table

RECIPE = """version: 1
name: mine
operations:
  - op: gqa
    kv_heads: 1
heal:
  method: full
  tokens: 1e6
evaluate: {max_kl: 1.0}
"""


def test_numbers_as_yaml_reads_them():
    """YAML 1.1 reads 1e6 as text."""
    heal = Heal(tokens="1e6", learning_rate="5e-4", rank=8.0)
    assert (heal.tokens, heal.learning_rate, heal.rank) == (1_000_000, 5e-4, 8)
    assert heal.planned_steps == 245  # of 4,096 tokens, the last not full
    assert heal.rows == 8


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "one of tokens, steps, minutes; it has none"),
        ({"tokens": 10, "steps": 3}, "it has tokens and steps"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"steps": 1.5}, "valid integer"),
        ({"steps": True}, "valid integer"),
        ({"minutes": 0}, "greater than 0"),
        ({"steps": 1, "length": 512, "batch_tokens": 511}, "batch_tokens 511 holds no row of heal.length 512"),
        ({"steps": 1, "stop_at_gate": True}, "needs heal.eval_every"),
        ({"steps": 1, "method": "full", "keep_adapter": True}, "is of method: lora, this is method: full"),
        (
            {"steps": 1, "method": "full", "alpha": 7},
            "alpha is read by method: lora, and this is full: drop it, or write null",
        ),
        (
            {"steps": 1, "mix": 0.9, "top_k": 3},
            "mix is read with loss: both, .* heal.top_k is read",
        ),
        ({"steps": 1, "loss": "ce", "temperature": 3}, "temperature is read by distillation"),
        ({"steps": 1, "loss": "ce", "teacher": "stored"}, "teacher is read where a teacher is asked"),
        ({"steps": 1, "top_k": 3}, "top_k is read with teacher: stored"),
        ({"steps": 1, "column": "body"}, "column is read of data with columns .*, not of self"),
        ({"steps": 1, "hidden": 0.5, "teacher": "stored"}, "does not keep"),
        ({"steps": 1, "learning_rate": float("nan")}, "finite number"),
        ({"steps": 1, "temperature": 1e30}, "less than or equal to 1000"),
        ({"steps": 1, "loss": "mse"}, "'ce', 'distill' or 'both'"),
    ],
)
def test_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Heal(**fields)


def test_what_another_method_leaves_unread_goes_with_it():
    """A second healing begins with the block of the first, whole."""
    known = Heal(steps=3, rank=8, dropout=0.1, loss="both", mix=0.3, teacher="stored", top_k=32, temperature=2.0)
    known = {"heal": known.model_dump(), "evaluate": None}
    found, _ = settings(known, overrides=["method=parts", "loss=ce", "teacher=live"])
    assert found == Heal(steps=3, method="parts", loss="ce")
    found, _ = settings(known, overrides=["loss=distill"])
    assert found == Heal(steps=3, rank=8, dropout=0.1, teacher="stored", top_k=32, temperature=2.0)
    with pytest.raises(SurgeryError, match="rank is read by method: lora"):
        settings(known, overrides=["method=parts", "rank=4"])


def test_a_recipe_with_heal(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    loaded = recipes.load(tmp_path / "mine.yaml", ["heal.warmup=0.1", "heal.minutes=2.5"])
    assert loaded.heal == Heal(method="full", minutes=2.5, warmup=0.1)  # minutes stand in place of its tokens
    assert recipes.load(loaded.to_dict()).heal == loaded.heal
    assert recipes.load("gqa", ["heal.steps=3"]).heal == Heal(steps=3)  # where the recipe has none
    assert recipes.load(tmp_path / "mine.yaml", ["heal=null"]).heal is None


def test_an_override_takes_along_what_it_leaves_without_use(tmp_path):
    """Of the recipe's values alone: what was typed, or was idle before, is refused."""
    assert recipes.load("gqa-distill").heal.self_tokens
    assert recipes.load("gqa-distill", ["heal.data=builtin"]).heal.self_tokens is None
    plain = recipes.load("gqa-distill", ["heal.loss=ce"]).heal
    assert (plain.loss, plain.sure, plain.recall) == ("ce", 0.0, 0.5)
    with pytest.raises(SurgeryError, match="self_tokens is read with data: self"):
        recipes.load("gqa-distill", ["heal.data=builtin", "heal.self_tokens=100000"])
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("  method: full", "  method: full\n  rank: 4"))
    with pytest.raises(SurgeryError, match="rank is read by method: lora"):
        recipes.load(tmp_path / "mine.yaml", ["heal.data=builtin"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("  metod: full", ["mine.yaml:7: unknown key 'metod'", "did you mean 'method'?"]),
        ("  method: half", ["mine.yaml:7: method should be 'lora', 'full' or 'parts'; it is 'half'"]),
        ("  steps: 0", ["mine.yaml:7: steps should be at least 1; it is 0"]),
        ("  minutes: 3", ["mine.yaml:6: heal names one of tokens, steps, minutes; it has tokens and minutes"]),
        ("  data: /etc/passwd", ["mine.yaml:7: heal.data of a recipe file may not be absolute", "'/etc/passwd'"]),
        ("  data: [self, /etc/passwd]", ["mine.yaml:7: heal.data of a recipe file may not be absolute", "passwd"]),
        ("  data: [self, self]", ["mine.yaml:7: data names 'self' twice", "name each once"]),
        ("  data: [a.txt, ./a.txt]", ["mine.yaml:7: data names './a.txt' twice"]),
        ("  data: []", ["mine.yaml:7: data should be self, conversations, builtin, a file", "it is []"]),
        ("  data: [self, 3]", ["mine.yaml:7: data should be self", "[self, builtin]"]),
        ("  data: ../x.txt", ["mine.yaml:7: heal.data of a recipe file may not be absolute or hold .."]),
    ],
)
def test_faults_name_their_line(tmp_path, line, says):
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("  method: full", line))
    with pytest.raises(SurgeryError) as caught:
        recipes.load(tmp_path / "mine.yaml")
    assert not [words for words in says if words not in str(caught.value)], str(caught.value)


def test_settings_of_a_command():
    known = {"heal": {"method": "full", "tokens": 1000}, "evaluate": {"max_kl": 1.0}}
    heal, judged = settings(known, overrides=["steps=3", "heal.loss=ce", "evaluate.windows=2"], warmup=0.1)
    assert heal == Heal(method="full", steps=3, loss="ce", warmup=0.1)
    assert (judged.windows, judged.max_kl) == (2, 1.0)
    assert settings(known, {"steps": 2})[0] == Heal(steps=2)
    assert settings(known, Heal(steps=2, rank=3))[0] == Heal(steps=2, rank=3)
    assert settings({"heal": None, "evaluate": None}, overrides=["steps=1"])[1] is None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], ["one of tokens, steps, minutes"]),
        (["steps"], ["a setting is written key=value"]),
        (["stpes=1"], ["override 'stpes=1': unknown key 'stpes'", "did you mean 'steps'?"]),
        (["gqa.kv_heads=1"], ["a setting is written key=value", "heal.KEY"]),
        (["steps=0", "evaluate.windows=0"], ["steps should be at least 1", "windows should be at least 1"]),
    ],
)
def test_faults_of_a_command(overrides, says):
    with pytest.raises(SurgeryError) as caught:
        settings({"heal": None, "evaluate": {}}, overrides=overrides)
    assert not [words for words in says if words not in str(caught.value)], str(caught.value)


def test_what_the_operations_touched():
    assert touched([{"op": "gqa", "kv_heads": 1}]) == {"k", "v"}
    assert touched([{"op": "gqa", "kv_heads": 1, "align": "procrustes"}]) == set("qkvo")
    assert touched([{"op": "gqa", "kv_heads": 1, "method": "closed_form", "refit": ["o"]}]) == set("qkvo")
    assert touched([{"op": "prune_heads", "per_layer": 1}]) == {"q", "o"}
    assert touched([{"op": "moh"}, {"op": "duo_attention"}]) == set()
    assert touched([{"op": "somebody_elses", "how": 1}]) == set("qkvo")  # not installed here: anything


@pytest.mark.parametrize(
    "family", ["llama", "llama_bias", "qwen3", "phi", "phi3", "olmo2", "falcon_new", "mixtral", "gpt_oss"]
)
def test_what_trains(family):
    """Against explicit expectations from the modules of a model, not from the anatomy."""
    from torch import nn

    model = CONVERTIBLE[family]()
    table, anatomy = model_table(model), Anatomy.of(model)
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(step.isdigit() for step in name.split("."))
    }

    def chosen(method):
        heal = Heal(steps=1, method=method, rank=2 if method == "lora" else 16)
        is_linear = lambda path: isinstance(model.get_submodule(path), nn.Linear)  # noqa: E731
        return select_trainable(heal, anatomy, table, frozenset("kv"), is_linear)

    fused = {"phi3": "qkv_proj", "falcon_new": "query_key_value"}.get(family)
    keys = {name for name in linears if name.rpartition(".")[2] in ((fused,) if fused else ("k_proj", "v_proj"))}
    anew = {name for name in table if name.rpartition(".")[0] in keys}
    anew |= {name for name in table if family == "olmo2" and ".k_norm." in name}  # one row for each head
    assert set(chosen("parts").parameters) == anew
    assert chosen("parts").count == sum(model.get_parameter(name).numel() for name in anew)
    full = chosen("full")
    assert full.count == sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    lora = chosen("lora")
    assert set(lora.parameters) == anew
    assert set(lora.adapted) == linears - keys  # neither embeddings nor the output head
    factors = sum(2 * sum(model.get_submodule(name).weight.shape) for name in linears - keys)
    assert lora.count == factors + chosen("parts").count


def test_nothing_to_train_in_parts():
    model = CONVERTIBLE["llama"]()
    with pytest.raises(SurgeryError, match="that is nothing here"):
        select_trainable(Heal(steps=1, method="parts"), Anatomy.of(model), model_table(model), frozenset())


def test_rows_of_a_forward():
    assert micro_rows(8, 512) == 8
    assert micro_rows(24, 512) == 8  # the most that fit and divide
    assert micro_rows(7, 1024) == 1  # 4 would fit; 7 is prime
    assert micro_rows(3, 2 * MICRO_TOKENS) == 1
    assert micro_rows(8, 512, 49_152) == 8
    assert micro_rows(8, 512, 262_144) == 2  # logits of 1 GiB
    assert micro_rows(8, 512, 1 << 30) == 1


def test_the_plan_counts():
    model = CONVERTIBLE["llama"]()
    table, anatomy = model_table(model), Anatomy.of(model)
    heal = Heal(tokens=10_000, length=64, batch_tokens=256, method="full", loss="ce", data="builtin")
    plan = HealPlan.of(heal, anatomy, table, frozenset("kv"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert plan.trained.count == plan.parameters == count
    assert plan.checkpoint_bytes == 12 * count
    assert plan.base_parameters == 0  # nothing asks it
    assert "40 steps of 256 tokens" in plan.lines[1]
    beside = HealPlan.of(heal.model_copy(update={"loss": "distill"}), anatomy, table, frozenset("kv"), base=anatomy)
    assert beside.memory_bytes > plan.memory_bytes + 4 * count


def test_plan_of_a_recipe(surgery, model):
    shown = surgery("plan", "mqa", model, "heal.steps=3", "heal.method=parts", "heal.data=builtin")
    assert shown.code == 0, shown.err
    assert "heal (parts): 2,304 parameters train" in shown.out  # 2 layers, K and V of 8 x 72
    assert "3 steps of 4,096 tokens" in shown.out
    as_json = surgery("plan", "mqa", model, "heal.steps=3", "--json").json
    assert as_json["heal"]["steps"] == 3
    assert as_json["heal"]["in_full"] == [
        "model.layers.N.self_attn.k_proj.weight",
        "model.layers.N.self_attn.v_proj.weight",
    ]
    refused = surgery("plan", "duo-attention", model, "heal.steps=3", "heal.method=parts")
    assert refused.code == 2
    assert "that is nothing here" in refused.err
