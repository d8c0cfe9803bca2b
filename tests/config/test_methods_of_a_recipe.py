"""Methods as a union: fields of another method, unknown methods, records of earlier versions, schema and lists."""

from __future__ import annotations

import json

import pytest
import yaml

from surgery import operations
from surgery.config import recipe as recipes
from surgery.config.heal import Heal
from surgery.errors import SurgeryError
from surgery.operations.variants import Variants, inline_schema, keys_of, own_keys

UNIONS = ("gqa", "sink_calibration", "sparse_prefill", "heal")
FIRST = {"gqa": {"kv_heads": 1}, "heal": {"steps": 3}}  # what each method needs
STRANGERS = [  # union, method, a field of another method, its value, words
    ("gqa", "mean", "keep_layers", 0.5, "keep_layers: read by method: closed_form alone, not by mean; drop this"),
    ("gqa", "random", "ridge", 0.1, "ridge: read by method: closed_form alone, not by random"),
    ("sink_calibration", "act", "gamma", 2.0, "gamma is for method: zero_tuning, not act"),
    ("sink_calibration", "kv_bias", "logit", 1.0, "logit is for method: learned, not kv_bias"),
    ("sparse_prefill", "streaming", "gamma", 0.9, "streaming has no setting 'gamma'; pooled, flexprefill, xattention"),
    ("sparse_prefill", "pooled", "calibration_samples", 4, "pooled has no setting 'calibration_samples'; by_head has"),
    ("heal", "full", "rank", 4, "heal.rank is read by method: lora, and this is full: drop it, or write 16"),
    ("heal", "parts", "keep_adapter", True, "heal.keep_adapter is of method: lora, this is method: parts"),
]

# Fields whose default has changed since: what a record of an earlier version says keeps its meaning.
CHANGED = {("sink_calibration", "act"): {"layers": None}}  # then all layers

# What records held before methods had classes: every field of every method, where nobody set one.
EARLIER = {
    "gqa": {
        "op": "gqa",
        "kv_heads": 1,
        "align": "none",
        "grouping": "neighbours",
        "keep_layers": 0.0,
        "seed": 0,
        "refit": ["q", "k", "v", "o", "mlp"],
        "sequential": False,
        "ridge": "auto",
        "calibration_samples": 28,
        "calibration_length": 512,
        "calibration_text": "mixed",
    },
    "sink_calibration": {
        "op": "sink_calibration",
        "layers": None,
        "heads": None,
        "exclude": [],
        "gamma": None,
        "groups": "heads",
        "grid": None,
        "objective": "ce",
        "beta": None,
        "threshold": None,
        "start": "fit",
        "logit": None,
        "value": "fit",
        "calibration_samples": 16,
        "calibration_length": 512,
        "text": "builtin",
        "labelled": None,
    },
    "sparse_prefill": {
        "op": "sparse_prefill",
        "block": 128,
        "dense_below": 1024,
        "last_rows_dense": 0,
        "delta": None,
        "layers": None,
        "heads": "all",
        "per_layer": {},
        "gamma": None,
        "density": None,
        "alpha": None,
        "queries": None,
        "reduce": None,
        "similarity": None,
        "every": None,
        "first": None,
        "local": None,
        "stride": None,
        "top": None,
        "votes": None,
        "representative": None,
        "sinks": None,
        "window": None,
        "last": None,
        "vertical": None,
        "slash": None,
        "nearest": None,
        "tau": None,
        "min_budget": None,
        "max_budget": None,
        "patterns": None,
        "calibration_samples": 2,
        "calibration_length": 2048,
    },
    "heal": {
        "loss": "distill",
        "mix": 0.5,
        "temperature": 1.0,
        "hidden": 0.0,
        "mixing": "none",
        "balance": 0.01,
        "teacher": "live",
        "top_k": 64,
        "data": "self",
        "column": None,
        "chat": False,
        "length": 512,
        "batch_tokens": 4096,
        "tokens": None,
        "steps": 3,
        "minutes": None,
        "rank": 16,
        "alpha": None,
        "dropout": 0.0,
        "learning_rate": None,
        "warmup": 0.05,
        "weight_decay": 0.0,
        "clip": 1.0,
        "precision": "auto",
        "gradient_checkpointing": False,
        "warm_start": 0,
        "eval_every": 0,
        "stop_at_gate": False,
        "checkpoint_every": 50,
        "keep_checkpoints": 2,
        "keep_adapter": False,
        "report_to": "none",
        "seed": 0,
    },
}


def union(name: str) -> type[Variants]:
    return Heal if name == "heal" else operations.find(name)


METHODS = [(name, method) for name in UNIONS for method in union(name).METHODS]


def data(name: str, **fields) -> dict:
    """A recipe with these fields of a union."""
    fields = FIRST.get(name, {}) | fields
    step = {"op": "expand"} if name == "heal" else {"op": name, **fields}
    return {"version": 1, "name": "mine", "operations": [step], "heal": fields if name == "heal" else None}


def settings(loaded: recipes.Recipe, name: str) -> Variants:
    return loaded.heal if name == "heal" else loaded.operations[0]


@pytest.mark.parametrize(("name", "method", "field", "value", "says"), STRANGERS)
def test_a_field_of_another_method_names_file_line_and_method(
    refused, model, tmp_path, name, method, field, value, says
):
    text = yaml.safe_dump(data(name, method=method, **{field: value}), sort_keys=False)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    line = next(number for number, words in enumerate(text.splitlines(), 1) if f"{field}:" in words)
    own = [key for key in own_keys(union(name).variant(method)) if key != "method"]
    told = refused("plan", "./mine.yaml", model, says=[f"mine.yaml:{line}: {says}"])
    assert name == "heal" or all(key in told.err for key in own), "what the method has is listed"
    plain = yaml.safe_dump(data(name, method=method), sort_keys=False)
    (tmp_path / "mine.yaml").write_text(plain, encoding="utf-8")
    override = f"{name}.{field}={json.dumps(value)}"
    refused("apply", "./mine.yaml", model, override, "-o", "out", says=[f"override {override!r}: {says}"])


@pytest.mark.parametrize("name", UNIONS)
def test_an_unknown_method_lists_the_known_ones_and_what_else_is_wrong(name):
    known = list(union(name).METHODS)
    with pytest.raises(SurgeryError) as caught:
        recipes.load(data(name, method=f"{known[-1]}x", nonsense=1, **{"seed": -1} if name in ("gqa", "heal") else {}))
    said = str(caught.value)
    assert said.startswith(f"recipe: method should be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}; it is ")
    assert f"did you mean {known[-1]!r}?" in said
    assert "unknown key 'nonsense'" in said
    assert ("seed should be at least 0" in said) == (name in ("gqa", "heal"))
    for wrong in (None, 3, ["x"], {"x": 1}, True):
        with pytest.raises(SurgeryError, match="method should be"):
            recipes.load(data(name, method=wrong))


def test_a_method_that_must_be_named():
    with pytest.raises(SurgeryError, match="the key 'method' is missing") as caught:
        recipes.load(data("sink_calibration", gamma=-1.0))
    assert "zero_tuning, act, learned, kv_bias" in caught.value.exists
    assert [fault.what for fault in caught.value.others] == ["gamma should be at least 0.001; it is -1.0"]
    defaults = [union(name).default_method() for name in UNIONS]
    assert defaults == ["mean", None, "pooled", "lora"]


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("gqa", {"keep_layer": 0.5}, "did you mean 'keep_layers', of method: closed_form?"),
        ("gqa", {"alin": "none"}, "did you mean 'align'?"),
        ("sink_calibration", {"method": "kv_bias", "logits": 1}, "did you mean 'logit', of method: learned?"),
        ("sparse_prefill", {"strid": 8}, "did you mean 'stride', of method: xattention?"),
        ("heal", {"method": "full", "ranc": 8}, "did you mean 'rank', of method: lora?"),
    ],
)
def test_a_misspelt_field_of_another_method_names_both(name, fields, says):
    with pytest.raises(SurgeryError, match="unknown key") as caught:
        recipes.load(data(name, **fields))
    assert caught.value.fix == says


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_a_record_of_an_earlier_version_still_loads_and_is_the_same_run(name, method):
    """It holds the fields of all methods, those that nobody set at their defaults or null."""
    changed = CHANGED.get((name, method), {})
    now = recipes.load(data(name, method=method, **changed))
    ours = settings(now, name)
    earlier = now.to_dict()
    whole = earlier["heal"] if name == "heal" else earlier["operations"][0]
    later = set(type(ours).LATER) - set(changed)
    assert whole.keys() | later == type(ours).model_fields.keys(), "fields of other methods are not recorded"
    assert not later & whole.keys(), "nobody set them"
    whole |= {key: value for key, value in EARLIER[name].items() if key not in whole}
    assert whole == EARLIER[name] | {"method": method}
    of_all = {key for method in union(name).METHODS.values() for key in method.LATER}
    assert set(keys_of(union(name))) == whole.keys() | of_all
    again = recipes.load(earlier)
    assert again == now
    assert again.to_dict() == now.to_dict()
    assert again.identity() == now.identity() == earlier, "resume hashes are of the record as it was"
    assert union(name).model_validate(whole) == ours
    assert type(union(name)(**whole)) is type(ours)


def test_a_default_that_nobody_set_is_recorded_as_it_was():
    plain, given = (recipes.load(data("sparse_prefill", **fields)) for fields in ({}, {"gamma": 0.9}))
    assert plain.operations[0].gamma == given.operations[0].gamma == 0.9
    assert [each.to_dict()["operations"][0]["gamma"] for each in (plain, given)] == [None, 0.9]
    assert recipes.load(plain.to_dict()).operations[0].gamma == 0.9
    shared = recipes.load(data("sparse_prefill", density=0.3, gamma=None)).operations[0]
    assert (shared.gamma, shared.density) == (None, 0.3)
    rates = [recipes.load(data("heal", method=method)).heal for method in Heal.METHODS]
    assert [heal.rate for heal in rates] == [5e-4, 2e-4, 5e-4]
    assert [heal.model_dump()["learning_rate"] for heal in rates] == [None] * 3
    copied = rates[1].model_copy(update={"learning_rate": 1e-3, "precision": "float32"})
    assert (copied.rate, copied.precision) == (1e-3, "float32")


def test_keys_are_recorded_in_the_order_that_records_have():
    heal = list(recipes.load(data("heal")).to_dict()["heal"])
    assert heal[heal.index("minutes") :][:5] == ["minutes", "rank", "alpha", "dropout", "learning_rate"]
    assert heal[-4:] == ["keep_checkpoints", "keep_adapter", "report_to", "seed"]
    fitted = list(recipes.load(data("gqa", method="closed_form")).to_dict()["operations"][0])
    assert fitted[:8] == ["op", "kv_heads", "method", "align", "grouping", "keep_layers", "seed", "refit"]


@pytest.mark.parametrize("name", UNIONS)
def test_the_schema_tells_methods_apart_with_their_defaults(surgery, name):
    whole = surgery("schema").json
    if name == "heal":
        part = next(each for each in whole["properties"]["heal"]["anyOf"] if "oneOf" in each)
        methods = [whole["$defs"][each["$ref"].rsplit("/", 1)[-1]] for each in part["oneOf"]]
    else:
        parts = whole["properties"]["operations"]["items"]["oneOf"]
        (part,) = [each for each in parts if each["properties"]["op"]["const"] == name]
        methods = part["oneOf"]
    assert part["discriminator"]["propertyName"] == "method"
    found = {each["properties"]["method"]["const"]: each for each in methods}
    assert list(found) == list(union(name).METHODS)
    for method, schema in found.items():
        cls = union(name).METHODS[method]
        fields = {key: field for key, field in cls.model_fields.items() if key not in ("op", "method")}
        assert schema["properties"].keys() - {"op", "method"} == fields.keys()
        assert schema["additionalProperties"] is False
        assert ("method" in schema.get("required", [])) == (method != union(name).default_method())
        assert all(schema["properties"][key]["description"] for key in (*fields, "method"))
        defaults = {key: schema["properties"][key].get("default", "none") for key in fields}
        assert defaults == {key: "none" if field.is_required() else field.default for key, field in fields.items()}


def test_a_recipe_fits_the_schema_by_exactly_one_method(surgery):
    """By hand, as an editor would: of the methods of a oneOf, one may take the keys."""
    schema = surgery("schema").json["properties"]["operations"]["items"]["oneOf"]
    parts = {each["properties"]["op"]["const"]: each for each in schema}
    steps = [
        step for file in recipes.shipped().values() for step in yaml.safe_load(file.read_text("utf-8"))["operations"]
    ]
    counted = 0
    for step in steps:
        for methods in filter(None, [parts[step["op"]].get("oneOf")]):
            fits = [
                each["properties"]["method"]["const"]
                for each in methods
                if set(each["required"]) <= step.keys() <= each["properties"].keys()
                and step.get("method", each["properties"]["method"]["const"]) == each["properties"]["method"]["const"]
            ]
            assert fits == [step.get("method", union(step["op"]).default_method())], step
            counted += 1
    assert counted > 10


def test_lists_name_each_method_with_its_own_fields(surgery):
    shown, listed = surgery("ls", "--all").out, surgery("ls", "--json").json
    for name in UNIONS:
        assert list(listed["methods"][name]) == list(union(name).METHODS)
        for method, facts in listed["methods"][name].items():
            cls = union(name).METHODS[method]
            assert list(facts["fields"]) == own_keys(cls)
            assert facts["description"]
            assert name == "heal" or f"  method: {method}" in shown
    for name in UNIONS[:-1]:
        common = set.intersection(*(set(method.model_fields) for method in union(name).METHODS.values()))
        assert listed["operations"][name].keys() == set(keys_of(union(name)))
        assert all(listed["operations"][name][key] == inline_schema(union(name))["properties"][key] for key in common)
    assert listed["operations"]["sparse_prefill"]["gamma"]["default"] == 0.9
    assert "default" not in listed["operations"]["sparse_prefill"]["reduce"], "methods differ in it"


def test_overrides_find_the_fields_of_every_method():
    loaded = recipes.load(data("gqa"), ["method=closed_form", "keep_layers=0.5"])
    assert loaded.operations[0].keep_layers == 0.5
    loaded = recipes.load(data("heal"), ["heal.method=full", "heal.rank=16"])
    assert loaded.heal == Heal(method="full", steps=3)
