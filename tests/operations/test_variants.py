"""A union of methods by itself: which class is made, what is refused, what is recorded, and its schema."""

from __future__ import annotations

import copy
import pickle
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from surgery.operations.variants import Variants, inline_schema, keys_of, own_keys


class Merge(Variants):
    """Heads become one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    method: str = Field(description="How.")
    heads: int = Field(1, ge=1, description="After.")


class Mean(Merge):
    """The mean
    of all.

    More on it.
    """

    method: Literal["mean"] = "mean"
    weight: float | None = Field(0.5, description="Of the first.")


class Draw(Merge):
    """New ones."""

    method: Literal["draw"]
    seed: int = Field(description="Of the draw.")
    scale: float = Field(1.0, description="Of them.")

    @model_validator(mode="after")
    def _no_seven(self) -> Draw:
        if self.seed == 7:
            raise PydanticCustomError("unlucky", "{text}", {"text": "seven is {refused}"})
        return self


METHODS = Merge.union(Mean, Draw)


class Holder(BaseModel):
    merge: Merge | None = None


def test_a_member_that_nothing_asks_any_more_is_refused():
    from surgery.operations.base import RENAMED, WeightRewrite

    for old, new in RENAMED.items():
        with pytest.raises(TypeError, match=f"defines {old}, which nothing asks any more: it is {new[:10]}"):
            type("Old", (WeightRewrite,), {"__module__": __name__, "__annotations__": {}, old: lambda self: []})
        mixin = type("Mixin", (), {old: lambda self: []})
        with pytest.raises(TypeError, match=f"defines {old}, which nothing asks any more"):
            type("Old", (mixin, WeightRewrite), {"__module__": __name__, "__annotations__": {}})


def test_the_shared_class_makes_the_method_that_is_named():
    assert {"mean": Mean, "draw": Draw} == METHODS
    assert type(Merge()) is type(Merge(weight=0.1)) is type(Merge.model_validate({})) is Mean
    made = Merge(method="draw", seed=3)
    assert type(made) is Draw
    assert (made.seed, made.heads, made.scale) == (3, 1, 1.0)
    assert isinstance(made, Merge)
    assert Merge.model_validate(made) is made
    assert Holder(merge=made).merge is made
    assert Holder.model_validate({"merge": {"method": "draw", "seed": 3}}).merge == made
    assert Holder(merge={"heads": 2}).merge == Mean(heads=2)
    for again in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.model_copy()):
        assert again == made
        assert type(again) is Draw
    with pytest.raises(ValidationError, match="frozen"):
        made.seed = 4


def test_all_faults_at_once():
    with pytest.raises(ValidationError) as caught:
        Merge(method="mean", heads=0, seed=4, wrong=1)
    faults = {error["loc"]: error["msg"] for error in caught.value.errors()}
    assert faults == {
        ("seed",): "seed is for method: draw, not mean",
        ("heads",): "Input should be greater than or equal to 1",
        ("wrong",): "Extra inputs are not permitted",
    }
    with pytest.raises(ValidationError, match=r"seven is \{refused\}"):
        Merge(method="draw", seed=7)


def test_an_unknown_method_is_no_message_about_unions():
    for make in (Merge.model_validate, lambda fields: Holder(merge=fields)):
        with pytest.raises(ValidationError, match="method should be 'mean' or 'draw'") as caught:
            make({"method": "meen"})
        assert "tag" not in str(caught.value)


def test_what_nobody_set_goes_by_itself():
    """As in records that hold the fields of all methods."""
    assert Merge(method="draw", seed=1, weight=None) == Draw(method="draw", seed=1)
    assert Merge(method="mean", scale=1.0) == Mean()
    with pytest.raises(ValidationError, match="weight is for method: mean"):
        Merge(method="draw", seed=1, weight=0.5)  # a value, though the default one: somebody set it
    with pytest.raises(ValidationError, match="scale is for method: draw"):
        Merge(method="mean", scale=True)  # 1.0 == True


def test_null_is_the_default_and_what_nobody_set_is_recorded_as_null():
    assert Mean(weight=None).weight == Mean().weight == 0.5
    assert Mean(weight=None).model_dump() == {"method": "mean", "heads": 1, "weight": None}
    assert Mean(weight=0.5).model_dump()["weight"] == 0.5
    assert Mean(weight=0.5).model_dump(exclude={"heads"}) == {"method": "mean", "weight": 0.5}
    assert Holder(merge=Mean()).model_dump() == {"merge": {"method": "mean", "heads": 1, "weight": None}}
    assert Mean.model_validate(Mean().model_dump()) == Mean()


def test_the_identity_holds_other_methods_fields_as_nobody_set_them():
    assert Mean(heads=2).identity() == {"method": "mean", "heads": 2, "weight": None, "scale": 1.0}
    assert Draw(method="draw", seed=3).identity() == Draw(method="draw", seed=3).model_dump() | {"weight": None}


def test_its_schema_is_a_oneof_with_a_discriminator():
    plain = Merge.model_json_schema()
    assert plain["discriminator"] == {
        "mapping": {"draw": "#/$defs/Draw", "mean": "#/$defs/Mean"},
        "propertyName": "method",
    }
    assert [each["$ref"] for each in plain["oneOf"]] == ["#/$defs/Mean", "#/$defs/Draw"]
    inline = inline_schema(Merge)
    assert "$defs" not in str(inline)
    assert [part["properties"]["method"]["const"] for part in inline["oneOf"]] == ["mean", "draw"]
    assert [part.get("required", []) for part in inline["oneOf"]] == [[], ["method", "seed"]]
    assert [part["description"] for part in inline["oneOf"]] == ["The mean of all.", "New ones."]
    assert inline["properties"]["weight"]["default"] == 0.5
    assert inline["properties"]["weight"]["description"] == "mean: of the first."
    assert inline["properties"]["method"]["default"] == "mean"
    assert list(inline["properties"]) == keys_of(Merge) == ["method", "heads", "weight", "seed", "scale"]
    assert own_keys(Draw) == ["seed", "scale"]
    assert inline_schema(Holder) == Holder.model_json_schema()


def test_a_class_without_methods_is_a_class():
    class Alone(Variants):
        method: str = "only"

    assert Alone().method == "only"
    assert not Alone.is_union()
    assert Alone.METHODS == {}
