"""What the fields of a recipe admit, the runtime admits too: no documented value fails only when a model is made."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from surgery import operations
from surgery.runtime.surgery_estimators import estimator, estimator_names, settings_problems

METHODS = operations.find("sparse_prefill").METHODS
VALUES = (0, 1, -1, 0.0, 0.5, 1.0, 1.5, [0, 1], [1, 1], "none", "mean", True, None)


def accepts(method: str, name: str, value: object) -> bool:
    try:
        METHODS[method](op="sparse_prefill", method=method, **{name: value})
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("method", [name for name in estimator_names() if name != "by_head"])
def test_a_value_that_a_field_takes_runs(method):
    settings = set(estimator(method).defaults) & set(METHODS[method].model_fields)
    assert settings
    for name in settings:
        taken = [value for value in VALUES if value is not None and accepts(method, name, value)]
        assert taken, name
        for value in taken:
            assert not settings_problems(method, {name: value}, 64), (name, value)
