"""Which device a run takes, and what it refuses: on GPUs that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MachineError, SettingError
from surgery.machine import placement
from surgery.machine.offload import ModelSizes
from surgery.machine.placement import (
    GIB,
    GRADIENTS,
    LAYERS,
    PASSES,
    Place,
    Placement,
    current,
    device_for,
    measured_in_place,
    place_for,
    placed,
    placed_on,
    put,
)

CUDA = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, with so many GiB free; their names are known, and nothing runs on them."""

    def of(*free: float | None) -> None:
        room = {device: None if one is None else int(one * GIB) for device, one in zip(CUDA, free, strict=False)}
        monkeypatch.setattr(placement, "accelerators", lambda: list(room))
        monkeypatch.setattr(placement, "free_on", room.__getitem__)

    return of


def test_without_a_gpu_it_is_the_cpu():
    assert device_for(GIB).type == "cpu"
    assert placement.accelerators() == []


def test_auto_takes_the_gpu_with_most_room(gpus):
    gpus(2, 8)
    assert device_for(GIB) == CUDA[1]
    assert device_for(6 * GIB) == CUDA[1], "1.3 times 6 GiB fit"
    assert device_for(7 * GIB).type == "cpu"
    assert place_for(ModelSizes((), 5 * GIB), beside=2 * GIB) == Place(torch.device("cpu"))


def of_layers(gib: float, count: int, rest: float = 0.0) -> ModelSizes:
    return ModelSizes((int(gib * GIB),) * count, int(rest * GIB))


def test_what_does_not_fit_is_streamed(gpus):
    gpus(2, 8)
    assert place_for(of_layers(2, 14, rest=1), LAYERS) == Place(CUDA[1], streamed=True)
    assert place_for(of_layers(0.5, 10), LAYERS) == Place(CUDA[1])
    assert place_for(of_layers(3, 10, rest=1), LAYERS) == Place(torch.device("cpu"))
    assert place_for(of_layers(2, 14, rest=1), PASSES) == Place(CUDA[1], streamed=True), "two have no room either"
    assert place_for(of_layers(2, 14, rest=1), GRADIENTS) == Place(torch.device("cpu"))
    with placed_on("cuda:0"):
        assert place_for(of_layers(0.5, 60), LAYERS) == Place(CUDA[0], streamed=True)
        with pytest.raises(MachineError, match=r"or 3\.9 GiB layer by layer"):
            place_for(of_layers(1.5, 20), LAYERS)
        with pytest.raises(MachineError) as refused:
            place_for(of_layers(0.5, 60), GRADIENTS)
        assert "layer by layer" not in str(refused.value)


def test_what_does_not_fit_on_one_is_spread_in_proportion_to_their_room(gpus):
    gpus(6, 12)
    model = of_layers(1, 12, rest=0.5)
    expected = Place(CUDA[1], layers=(CUDA[1],) * 8 + (CUDA[0],) * 4)
    assert place_for(model, PASSES) == place_for(model, GRADIENTS) == expected
    assert expected.devices == (CUDA[1], CUDA[0])
    assert place_for(model, LAYERS) == Place(CUDA[1], streamed=True)
    assert place_for(of_layers(1, 14), GRADIENTS) == Place(torch.device("cpu")), "1.3 times 14 GiB are above 18"
    assert place_for(model, GRADIENTS, beside=2 * GIB) == Place(torch.device("cpu")), "each needs what is beside"
    with placed_on("cuda"):
        assert place_for(model) == expected
    with placed_on("cuda:1"):
        assert place_for(model) == Place(CUDA[1], streamed=True)


@pytest.mark.parametrize("seed", range(20))
def test_a_spread_never_overfills_and_keeps_the_order(seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (13,), generator=draw).tolist()
    rooms = {device: int(room) for device, room in zip(CUDA, torch.randint(30, 60, (2,), generator=draw), strict=True)}
    places = placement._in_turn(sizes, rooms)
    if not places:
        assert sum(sizes) > sum(rooms.values()) - max(sizes), "it gives up only where a layer may not fit"
        return
    used = {device: sum(size for size, place in zip(sizes, places, strict=True) if place == device) for device in CUDA}
    assert all(used[device] <= rooms[device] for device in CUDA)
    assert list(dict.fromkeys(places)) == CUDA, "both are used, one after the other"


def test_a_named_device_is_taken(gpus):
    gpus(2, 8)
    with placed_on("cuda:0"):
        assert device_for(GIB) == CUDA[0]
    with placed_on("cuda"):
        assert device_for(GIB) == CUDA[1]
    with placed_on("cpu"):
        assert device_for(GIB).type == "cpu"


def test_a_full_device_is_refused_and_the_other_one_named(gpus):
    gpus(2, 8)
    with placed_on("cuda:0"), pytest.raises(MachineError) as refused:
        device_for(3 * GIB)
    assert "the model needs about 3.9 GiB, and 2.0 GiB are free" in str(refused.value)
    assert "cuda:0: 2.0 GiB free, cuda:1: 8.0 GiB free" in str(refused.value)
    assert refused.value.fix == "--device cuda:1"
    assert refused.value.code == "out-of-memory"
    with placed_on("cuda"), pytest.raises(MachineError) as refused:
        device_for(30 * GIB)
    assert "8.0 GiB are free" in str(refused.value)
    assert "--device cpu" in refused.value.fix


def test_a_device_whose_room_is_unknown_is_taken(gpus):
    gpus(None)
    assert device_for(GIB) == CUDA[0]


def test_what_is_not_there_is_refused():
    with pytest.raises(SettingError, match="unknown device 'gpu'"), placed_on("gpu"):
        pass
    with pytest.raises(MachineError, match="PyTorch sees no such device: cuda:3"), placed_on("cuda:3"):
        pass
    with pytest.raises(SettingError, match="unknown dtype 'int8'"), placed_on("cpu", "int8"):
        pass


def test_a_dtype_that_the_device_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(placement, "_computes", lambda device, dtype: dtype != "bfloat16")
    with pytest.raises(MachineError, match="cpu does not compute in bfloat16"), placed_on("cpu", "bfloat16"):
        pass


def test_an_inner_function_keeps_the_placement_unless_it_names_one():
    @placed
    def inner(*, device: str = "auto", dtype: str = "auto") -> Placement:
        return current()

    @placed
    def outer(*, device: str = "auto", dtype: str = "auto", **named: str) -> Placement:
        return inner(**named)

    assert outer() == Placement()
    assert outer(device="cpu", dtype="float64") == Placement("cpu", "float64")
    assert inner(dtype="float32") == Placement("auto", "float32")
    with placed_on("cpu", "bfloat16"):
        assert inner() == Placement("cpu", "bfloat16")
        assert inner(dtype="float32") == Placement("cpu", "float32")
    assert current() == Placement()


def test_a_failed_function_leaves_no_placement():
    @placed
    def fails(*, device: str = "auto", dtype: str = "auto") -> None:
        raise ValueError

    with pytest.raises(ValueError):
        fails(device="cpu")
    assert current() == Placement()


def test_out_of_memory_while_a_model_moves_is_told(gpus):
    gpus(8)
    model = torch.nn.Linear(2, 2)

    def full(device):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")

    model.to = full
    with pytest.raises(MachineError, match="out of memory on cuda:0: CUDA out of memory"):
        put(model)


def test_a_quantised_model_stays_where_it_is(gpus):
    gpus(8)
    model = SimpleNamespace(is_quantized=True, device=torch.device("cpu"))
    assert put(model) is model
    with placed_on("cuda:0"), pytest.raises(SettingError, match="this model is quantised, and stays where"):
        put(model)


def test_weights_come_back_in_their_own_dtype_and_the_unchanged_ones_bit_for_bit():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5), torch.nn.BatchNorm1d(5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with placed_on("cpu", "bfloat16"), measured_in_place(model):
        assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
        assert model[2].running_mean.dtype == torch.float32, "buffers stay as they are"
        model[0].weight.data.mul_(2)
        model[1] = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
        model.extra = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))  # an operation chose this dtype
    after = model.state_dict()
    assert after["0.weight"].equal((2 * before["0.weight"].bfloat16()).float())
    assert after["0.bias"].equal(before["0.bias"])
    assert not before["0.bias"].bfloat16().float().equal(before["0.bias"]), "bfloat16 alone would have rounded it"
    assert after["1.weight"].dtype == torch.float32
    assert after["1.weight"].shape == (3, 5)
    assert after["extra"].dtype == torch.float64


def test_apply_in_bfloat16_writes_float32_and_keeps_what_it_does_not_change(model, tmp_path):
    base = {name: tensor.float() + 1e-4 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(base, model / "model.safetensors", metadata={"format": "pt"})
    settings = {"calibration_samples": 4, "calibration_length": 64, "check": False, "evaluate": False}
    written = {}
    for dtype in ("auto", "bfloat16"):
        surgery.apply("moh", model, output=tmp_path / dtype, dtype=dtype, **settings)
        written[dtype] = load_file(tmp_path / dtype / "model.safetensors")
    wide, narrow = written.values()
    assert {name: tensor.dtype for name, tensor in narrow.items()} == {name: each.dtype for name, each in wide.items()}
    assert all(narrow[name].equal(tensor) for name, tensor in base.items())
    assert set(narrow) > set(base)
    name = next(name for name in narrow if name.endswith("surgery_router"))
    error = (narrow[name] - wide[name]).norm() / wide[name].norm()
    assert 0 < error < 0.2, "it was measured in bfloat16"
    assert surgery.Report.of(tmp_path / "auto").data.get("measured_in") is None
    assert surgery.Report.of(tmp_path / "bfloat16").data["measured_in"] == {"dtype": "bfloat16"}
    assert surgery.reproduce(tmp_path / "bfloat16", model).same_bits
    assert not surgery.reproduce(tmp_path / "bfloat16", model, dtype="float32").same_bits


def test_a_score_in_another_dtype_says_so_and_is_not_added_to_the_card(model, tmp_path):
    out = tmp_path / "out"
    surgery.apply("duo-attention", model, output=out, overrides=["scores=induction"], check=False, evaluate=False)
    asked = {"windows": 1, "length": 32}
    narrow = surgery.evaluate(out, model, dtype="float64", **asked)
    assert narrow.notes[-1] == "measured in float64, so not added to the card"
    assert surgery.Report.of(out).data["evaluation"] is None
    usual = surgery.evaluate(out, model, **asked)
    assert not any("measured in" in note for note in usual.notes)
    assert narrow.out.cross_entropy != usual.out.cross_entropy
    assert narrow.out.cross_entropy == pytest.approx(usual.out.cross_entropy, rel=0.05)
    assert surgery.evaluate(model, dtype="float64", **asked).notes[-1] == "measured in float64"


def test_figures_of_another_dtype_are_not_mixed_in_a_comparison(model, tmp_path):
    for name in ("a", "b"):
        surgery.apply(
            "gqa", model, output=tmp_path / name, overrides=["method=mean", "kv_heads=1"], check=False, evaluate=False
        )
    models, asked = [tmp_path / "a", tmp_path / "b"], {"folder": tmp_path / "found", "only": ["cache"]}
    surgery.compare(models, model, **asked)
    with pytest.raises(SettingError, match="another base"):
        surgery.compare(models, model, dtype="float64", **asked)
