"""Which device a run takes, and what it refuses: on GPUs that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.conversion import convert, estimate
from surgery.errors import MachineError, SettingError
from surgery.evaluation import check as check_module
from surgery.healing import distributed
from surgery.io import loading
from surgery.io.safetensors import Checkpoint
from surgery.machine import placement
from surgery.machine.offload import STREAMED, ModelSizes, StreamedLayers, end_spreading, in_turn, spread, whole_on_cpu
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
from surgery.operations.head_scorers import scorers

CPU = torch.device("cpu")
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


@pytest.mark.parametrize("seed", range(30))
def test_no_gpu_of_a_spread_is_overfilled_by_the_rest(seed, gpus):
    draw = torch.Generator().manual_seed(seed)
    free = [2.0 + 8.0 * float(torch.rand((), generator=draw)) for _ in CUDA]
    gpus(*free)
    sizes = of_layers(
        0.5, int(torch.randint(4, 24, (), generator=draw)), rest=6 * float(torch.rand((), generator=draw))
    )
    place = place_for(sizes, GRADIENTS)
    if not place.layers:
        return
    assert len(place.devices) == 2
    used = dict.fromkeys(CUDA, 0.0)
    used[place.device] += 1.3 * sizes.rest
    for device, size in zip(place.layers, sizes.layers, strict=True):
        used[device] += 1.3 * size
    for device, room in zip(CUDA, free, strict=True):
        assert used[device] <= room * GIB


@pytest.mark.parametrize("seed", range(20))
def test_a_spread_never_overfills_and_keeps_the_order(seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (13,), generator=draw).tolist()
    rooms = {device: int(room) for device, room in zip(CUDA, torch.randint(30, 60, (2,), generator=draw), strict=True)}
    places = in_turn(sizes, rooms)
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


def test_a_gpu_that_is_too_full_for_a_trial_of_the_dtype_is_passed_over(gpus, monkeypatch):
    gpus(0.001, 70)

    def computes(device: str, dtype: str) -> bool:
        if device in ("cuda:0", "cuda"):
            raise MachineError("out of memory", code="out-of-memory")
        return True

    monkeypatch.setattr(placement, "_computes", computes)
    for asked in ("auto", "cuda"):
        with placed_on(asked, "bfloat16"):
            assert device_for(GIB) == CUDA[1]
    with pytest.raises(MachineError), placed_on("cuda:0", "bfloat16"):
        pass


def test_free_memory_counts_what_this_process_keeps_unused(monkeypatch):
    said = {
        "mem_get_info": lambda device: (5, 16),
        "memory_reserved": lambda device: 7,
        "memory_allocated": lambda _: 4,
    }
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**said))
    assert placement.free_on(CUDA[0]) == 5 + 7 - 4

    def full(device):
        raise RuntimeError("CUDA error: out of memory")

    said["mem_get_info"] = full
    assert placement.free_on(CUDA[0]) == 0
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 3)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 13)  # with what it keeps
    assert placement.free_on(torch.device("mps")) == 13


def test_memory_is_given_back(monkeypatch):
    emptied = []
    module = SimpleNamespace(empty_cache=lambda: emptied.append(True))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    placement.give_back(CUDA[1])
    assert emptied == [True]
    placement.give_back(torch.device("cpu"))
    assert emptied == [True]


def test_a_streamed_model_is_whole_on_the_cpu_in_a_block():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
    with whole_on_cpu(model):
        pass
    assert STREAMED not in vars(model), "it is not streamed"
    streamed = vars(model)[STREAMED] = StreamedLayers(model, torch.device("cpu"))
    model.requires_grad_(False)
    model.layers[0](torch.ones(1, 3))
    assert streamed.there is model.layers[0]
    with whole_on_cpu(model):
        assert STREAMED not in vars(model)
        model.layers[1](torch.ones(1, 3))
        assert streamed.there is None, "its hooks are gone"
    assert vars(model)[STREAMED].device == streamed.device


def test_a_streamed_model_refuses_gradients():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3)])
    StreamedLayers(model, torch.device("cpu"))
    with pytest.raises(MachineError, match="gradients need the whole model"):
        model.layers[0](torch.ones(1, 3))
    with torch.no_grad():
        model.layers[0](torch.ones(1, 3))


def test_a_model_that_was_spread_can_be_moved_like_any_other():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
    model.norm = torch.nn.LayerNorm(3)
    spread(model, torch.device("cpu"), [torch.device("cpu"), torch.device("meta")])
    assert [layer.weight.device.type for layer in model.layers] == ["cpu", "meta"]
    assert model.hf_device_map == {"layers.0": torch.device("cpu"), "layers.1": torch.device("meta"), "norm": CPU}
    end_spreading(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert not {"hf_device_map", "to", "cuda"} & vars(model).keys()


PRUNE = {"op": "prune_heads", "granularity": "kv_group", "per_layer": 1}


def measuring(step: dict) -> dict:
    return {"version": 1, "name": "made", "operations": [step], "evaluate": None}


FAR_MASS = {"op": "duo_attention", "streaming_ratio": 0.5, "scores": "far-mass", "sinks": 2, "window": 8}


@pytest.mark.parametrize(
    ("step", "use"), [(PRUNE, GRADIENTS), (FAR_MASS, PASSES), (PRUNE | {"scores": "magnitude"}, LAYERS)]
)
def test_a_conversion_asks_for_what_its_measurements_need(step, use, model, tmp_path, monkeypatch):
    asked = {}

    def seen(model, **options):
        asked.update(options)
        return measured_in_place(model, **options)

    monkeypatch.setattr(convert, "measured_in_place", seen)
    report = surgery.apply(measuring(step), str(model), output=tmp_path / "out", check=False)
    assert report.folder
    assert asked == {"use": use, "beside": estimate.measuring_bytes(surgery.plan(measuring(step), str(model)))}


def test_scores_by_gradients_ask_for_the_whole_model(model, tmp_path, monkeypatch):
    asked = []

    def load(source, *, use):
        asked.append(use)
        raise LookupError

    monkeypatch.setattr(loading, "load_for_run", load)
    for method in ("gates", "far-mass"):
        with pytest.raises(LookupError):
            scorers.score_to_file(str(model), tmp_path / "scores.json", method)
    assert asked == [GRADIENTS, PASSES]


def test_a_plan_takes_the_speed_of_the_device(gpus, model, monkeypatch):
    speeds = {"cpu": 1e6, "cuda:1": 1e9}
    monkeypatch.setattr(estimate, "flops_per_second", lambda hidden, inner, device, dtype: speeds[device])
    monkeypatch.setattr(estimate, "bytes_per_second", lambda device: speeds[device])
    recipe = measuring(PRUNE) | {"evaluate": {}}
    rewrite = measuring({"op": "gqa", "kv_heads": 1, "method": "mean"}) | {"evaluate": {}}
    seconds = {}
    for device in ("cpu", "cuda"):
        gpus(1, 8)
        made = surgery.plan(recipe, str(model), device=device).estimate.groups()
        only_scored = surgery.plan(rewrite, str(model), device=device).estimate.groups()
        seconds[device] = [made["measure"][0], made["score"][0], only_scored["score"][0]]
    for name, slow, quick in zip(("measured", "scored", "only scored"), seconds["cpu"], seconds["cuda"], strict=True):
        assert slow > 2 * quick, name


def test_a_plan_counts_that_layers_of_a_streamed_model_move_for_each_text(gpus, model, monkeypatch):
    monkeypatch.setattr(estimate, "flops_per_second", lambda *_: 1e12)
    monkeypatch.setattr(estimate, "bytes_per_second", lambda device: 1e3)
    gpus(8)
    whole = surgery.plan(measuring(FAR_MASS), str(model), device="cuda").estimate
    monkeypatch.setattr(estimate, "place_for", lambda *_: Place(CUDA[0], streamed=True))
    streamed = surgery.plan(measuring(FAR_MASS), str(model), device="cuda").estimate
    (measurement,) = surgery.plan(measuring(FAR_MASS), str(model)).steps[0].change.measurements
    moved = measurement.passes * streamed.output_bytes / 1e3
    assert measurement.passes >= 1
    assert streamed.groups()["measure"][0] - whole.groups()["measure"][0] == pytest.approx(moved)


def test_training_is_refused_by_the_plan_too(gpus, model):
    gpus(8, 8)
    recipe = measuring({"op": "gqa", "kv_heads": 1, "method": "mean"}) | {"heal": {"steps": 1, "data": "builtin"}}
    with pytest.raises(SettingError, match="training goes to the first cuda device"):
        surgery.plan(recipe, str(model), device="cuda:1")


def test_a_cpu_run_after_one_on_a_gpu_trains_on_the_cpu(monkeypatch):
    state = distributed.processes()
    monkeypatch.setitem(state._shared_state, "device", torch.device("meta"))
    with placed_on("cpu"):
        assert distributed.processes().device.type == "cpu"


def test_a_loaded_model_takes_no_device_and_no_dtype(model):
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    for call in (
        lambda: surgery.evaluate(loaded, dtype="float64"),
        lambda: surgery.evaluate(model, loaded, device="cpu"),
        lambda: surgery.plan("gqa", loaded, device="cpu"),
        lambda: surgery.apply("gqa", loaded, dtype="bfloat16"),
        lambda: surgery.heal(loaded, device="cpu"),
    ):
        with pytest.raises(SettingError, match="this is a loaded model, which stays where it is"):
            call()


def test_a_named_device_without_room_is_refused_before_anything_is_written(gpus, model, tmp_path):
    gpus(0.00001)
    step = {"op": "prune_heads", "granularity": "kv_group", "per_layer": 1}
    recipe = {"version": 1, "name": "made", "operations": [step], "evaluate": None}
    with pytest.raises(MachineError, match="out of memory on cuda:0: the model needs about"):
        surgery.apply(recipe, str(model), output=tmp_path / "out", device="cuda:0")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(MachineError, match="out of memory on cuda:0"):
        surgery.plan(recipe, str(model), device="cuda:0")


def test_training_goes_to_the_first_gpu_alone(gpus, model, tmp_path):
    gpus(8, 8)
    heal = {"method": "full", "loss": "ce", "data": "builtin", "steps": 1, "length": 64, "batch_tokens": 64}
    recipe = {
        "version": 1, "name": "made", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}], "heal": heal,
        "evaluate": None,
    }  # fmt: skip
    with pytest.raises(SettingError, match="training goes to the first cuda device") as refused:
        surgery.apply(recipe, str(model), output=tmp_path / "out", device="cuda:1")
    assert "CUDA_VISIBLE_DEVICES=1" in str(refused.value)


def test_check_counts_a_model_in_the_dtype_of_the_run(model):
    checkpoint = Checkpoint(model)
    numbers = sum(tensor.numel() for tensor in load_file(Path(model) / "model.safetensors").values())
    assert check_module._loaded_bytes(checkpoint) == checkpoint.size
    with placed_on("cpu", "float64"):
        assert check_module._loaded_bytes(checkpoint) == 8 * numbers


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


def test_a_quantised_base_is_refused_where_a_device_is_named(gpus, model, tmp_path):
    gpus(8)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "modules_to_not_convert": ["self_attn"]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match="this model is quantised, and stays where Transformers put it"):
        surgery.plan(measuring(PRUNE), str(model), device="cuda:0")
    assert surgery.plan(measuring(PRUNE), str(model)).estimate.device is None


def test_a_quantised_model_is_neither_rounded_nor_moved():
    model = torch.nn.Linear(2, 2).double()
    model.is_quantized, model.device = True, torch.device("cpu")

    def moved(*_):
        raise LookupError

    model.to = moved
    with placed_on("auto", "bfloat16"), measured_in_place(model):
        assert model.weight.dtype == torch.float64


def test_a_model_that_is_loaded_for_a_block_says_its_needs_and_gives_its_memory_back(model, monkeypatch):
    asked, given_back = [], []

    def put(model, **options):
        asked.append(options)
        return model

    monkeypatch.setattr(placement, "put", put)
    monkeypatch.setattr(placement, "give_back", given_back.append)
    with loading.loaded(model, beside=123):
        assert not given_back
    assert asked == [{"use": PASSES, "beside": 123}]
    assert given_back == [CPU]


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
