"""What holds for every operation that makes keys and values of one vector a token."""

import copy
from functools import partial

import pytest
from closed_form import Stopped, Tokens, numbers, stop  # noqa: F401
from families import build

from surgery.architecture.anatomy import Anatomy
from surgery.calibration.closed_form.cost import STEPS
from surgery.operations.base import ApplyContext
from surgery.operations.low_rank_kv.operation import LowRankKV
from surgery.operations.mla.operation import MLA

SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512, "head_dim": 16,
}  # fmt: skip
OPERATIONS = {"mla": partial(MLA, rank=20, rope=12), "low_rank_kv": partial(LowRankKV, rank=20)}


@pytest.fixture(params=OPERATIONS)
def operation(request, numbers):
    small = {"calibration_text": str(numbers), "calibration_samples": 12, "calibration_length": 24}
    return lambda **fields: OPERATIONS[request.param](**small | fields)


@pytest.fixture(scope="module")
def base():
    return build("Llama", seed=4, **SHAPE)


def fit(operation, model, folder=None, progress=None):
    before = Anatomy.of(model)
    context = ApplyContext(operation.plan(before), before, progress, Tokens(), folder=folder)
    return operation.fit(copy.deepcopy(model), context)


def test_a_resumed_run_takes_no_layer_of_another_fit(operation, base, tmp_path, monkeypatch):
    converted, of_layer = [], operation().conversion.LAYER
    convert = of_layer.convert
    monkeypatch.setattr(of_layer, "convert", lambda it: (converted.append(it.layer.anatomy.index), convert(it))[1])
    with pytest.raises(Stopped):
        fit(operation(), base, tmp_path, lambda done, total, label: stop(done) if label == operation().STAGE else None)
    saved = len([*tmp_path.glob("*.state")])
    assert saved

    def missing(**fields):
        converted.clear()
        fit(operation(**fields), base, tmp_path)
        return sorted(converted)

    assert missing(rank=19) == [0, 1], "no layer of another rank"
    assert missing(refit=["o"]) == [0, 1], "none of other refits"
    with monkeypatch.context() as patch:
        patch.setattr(operation().conversion, "REVISION", "of another version")
        assert missing() == [0, 1], "none of another version"
    assert len(missing()) == 2 - saved
    assert missing() == []


@pytest.mark.parametrize("refit", [["q"], ["k"], ["q", "k"], ["o"]])
def test_the_plan_counts_the_solvers_that_run(operation, base, refit, monkeypatch):
    """One layer's: their steps, and two products more for each, by which the plan reckons a fit."""
    from surgery.calibration.closed_form import vector_layer
    from surgery.operations.low_rank_kv import layer as of_low_rank
    from surgery.operations.mla import layer as of_mla

    steps, solve = [], vector_layer.solve
    for module in (vector_layer, of_low_rank, of_mla):
        monkeypatch.setattr(
            module, "solve", lambda *args, **options: (steps.append(options["steps"]), solve(*args, **options))[1]
        )
    fit(operation(refit=refit), base)
    calibration = operation(refit=refit).calibration(Anatomy.of(base))
    assert sorted(steps) == sorted(2 * [round(effort * STEPS) for effort in calibration.scores])
    assert calibration.outputs == ("o" in refit)
