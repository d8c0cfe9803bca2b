"""The benchmark on tiny models: what it times, what it counts, what follows from it, what it refuses."""

import copy
import json
import sys

import pytest
import torch
from conftest import LLAMA, edit_json, edit_tensors
from families import one_thread  # noqa: F401 (autouse)

from surgery.errors import MachineError, SurgeryError
from surgery.evaluation.benchmark import run as speed
from surgery.evaluation.benchmark.models import even_split, spaced_layers, synthetic_config
from surgery.evaluation.benchmark.result import Benchmark, Timing, plot
from surgery.evaluation.benchmark.run import FULL, SPLIT, STOCK, bench
from surgery.evaluation.lengths import parse_lengths
from surgery.io.loading import load_model
from surgery.machine import device as peak_memory
from surgery.machine import placement
from surgery.machine.device import PeakMemory

ELEMENT, LAYERS, KV_HEADS, HEAD = 2, 2, 3, 8  # bytes of a bfloat16, and the tiny Llama's sizes
PER_TOKEN = LAYERS * 2 * KV_HEADS * HEAD * ELEMENT  # keys and values
SINKS, WINDOW = 2, 14
LINUX = sys.platform == "linux" and peak_memory.CLEAR.exists()


@pytest.fixture
def split(surgery, model, tmp_path):
    fields = ("streaming_ratio=1.0", f"sinks={SINKS}", f"window={WINDOW}")
    done = surgery("apply", "duo-attention", model, "-o", "out", "--no-check", "--no-eval", *fields)
    assert done.code == 0, done.err
    return tmp_path / "out"


@pytest.fixture
def fake():
    """A benchmark of two lengths whose seconds and bytes are given."""

    def timing(model, length, prefill, decode, *held, peak=None):
        return Timing(model, length, prefill, decode, *held, peak)

    timings = [
        timing(STOCK, 100, (2.0, 4.0, 3.0), (0.4, 0.4, 0.4), 1000, 1010, peak=5000),
        timing(FULL, 100, (2.0, 2.0, 2.0), (0.3, 0.2, 0.4), 1000, 1200, peak=5000),
        timing(SPLIT, 100, (1.0, 1.0, 2.0), (0.1, 0.2, 0.2), 600, 606, peak=4000),
        timing(STOCK, 200, (8.0,), (0.8,), 2000, 2010),
        timing(SPLIT, 200, (4.0,), (0.4,), 500, 505),
    ]
    return Benchmark("a machine", {"synthetic": False, "layers": 2, "dtype": "float32"}, None, None, 3, 16, timings)


def test_ratios_are_medians_of_what_each_round_gives(fake):
    first, second = fake.ratios()
    # by round: prefill 2/1, 4/1, 3/2; decode .4/.1, .4/.2, .4/.2, and to all heads full .3/.1, .2/.2, .4/.2
    assert first["prefill_vs_stock"] == pytest.approx(2.0)
    assert first["ranges"]["prefill_vs_stock"] == pytest.approx([1.5, 4.0])
    assert first["decode_vs_stock"] == pytest.approx(2.0)
    assert first["prefill_vs_block_cache"] == pytest.approx(2.0)
    assert first["decode_vs_block_cache"] == pytest.approx(2.0)
    assert first["ranges"]["decode_vs_block_cache"] == pytest.approx([1.0, 3.0])
    assert first["cache_bytes_vs_stock"] == pytest.approx(0.6)
    assert first["decode_cache_bytes_vs_stock"] == pytest.approx(0.6)
    assert first["peak_memory_vs_stock"] == pytest.approx(0.8)
    assert second["decode_vs_stock"] == pytest.approx(2.0)
    assert second["decode_vs_block_cache"] is None
    assert second["peak_memory_vs_stock"] is None


def test_medians_spreads_and_tokens_a_second(fake):
    facts = fake.to_dict()["timings"][0]
    assert (facts["prefill"], facts["prefill_spread"]) == (3.0, 2.0)
    assert facts["prefill_tokens_per_second"] == pytest.approx(100 / 3)
    assert facts["decode_tokens_per_second"] == pytest.approx(2.5)
    json.dumps(fake.to_dict(), allow_nan=False)


def test_the_picture_has_speeds_and_bytes_apart(fake, tmp_path, monkeypatch):
    drawn = {}

    def curves(path, panels, **options):
        drawn.update(panels=panels, **options)

    monkeypatch.setattr("surgery.report.plots.curves", curves)
    plot(fake, tmp_path / "x.png")
    speed, memory = drawn["panels"]
    prompt, decoding, full = speed.lines.values()
    assert (prompt.x, prompt.y) == ([100, 200], [2.0, 2.0])
    assert prompt.ends == [pytest.approx([1.5, 4.0]), pytest.approx([2.0, 2.0])], "of the rounds"
    assert (decoding.x, decoding.y) == ([100, 200], pytest.approx([2.0, 2.0]))
    assert (full.x, full.y) == ([100], pytest.approx([2.0]))
    cache, peak = memory.lines.values()
    assert (cache.x, cache.y, cache.ends) == ([100, 200], pytest.approx([0.6, 0.25]), None)
    assert (peak.x, peak.y) == ([100], pytest.approx([0.8]))
    assert [*speed.levels.values(), *memory.levels.values()] == [1, 1]


def test_bytes_are_those_held(split, model):
    result = bench(split, model, lengths=(40, 300), rounds=2, decode=2)
    at = {(t.model, t.length): t for t in result.timings}
    assert set(at) == {(name, length) for name in (STOCK, FULL, SPLIT) for length in (40, 300)}
    for length in (40, 300):
        assert at[STOCK, length].cache_bytes == PER_TOKEN * length
        assert at[STOCK, length].decode_cache_bytes == PER_TOKEN * (length + 3)  # one untimed, two timed
        assert at[SPLIT, length].cache_bytes == PER_TOKEN * (SINKS + WINDOW)
        assert at[SPLIT, length].decode_cache_bytes == PER_TOKEN * (SINKS + WINDOW)
    assert at[FULL, 300].cache_bytes == PER_TOKEN * 300
    assert at[FULL, 300].decode_cache_bytes == PER_TOKEN * (301 + 256)  # grown by a block at the first token
    assert all(len(t.prefill_rounds) == len(t.decode_rounds) == 2 for t in result.timings)
    assert all(min(t.prefill_rounds + t.decode_rounds) > 0 for t in result.timings)
    assert [r["length"] for r in result.ratios()] == [40, 300]
    assert result.ratios()[1]["cache_bytes_vs_stock"] == pytest.approx(16 / 300)
    assert result.split["ratio"] == 1
    assert result.model["base_attention"] == "sdpa"
    assert result.notes == []


def test_models_take_turns_and_none_always_begins(split, model, monkeypatch):
    seen = []

    def run(model, ids, decode):
        block = getattr(model.config, "surgery", {"layers": []})
        streaming = sum(len(layer.get("streaming", [])) for layer in block["layers"])
        seen.append((type(model).__name__, streaming))
        return 1.0, 1.0, 1, 1

    monkeypatch.setattr(speed, "_run", run)
    monkeypatch.setattr(speed, "_peak", lambda *args: seen.append("warm") or (7, {}))
    done = []
    result = bench(split, model, lengths=(8,), rounds=3, progress=lambda *args: done.append(args[:2]))
    stock, full, patched = ("LlamaForCausalLM", 0), ("SurgeryLlamaForCausalLM", 0), ("SurgeryLlamaForCausalLM", 6)
    assert seen[:3] == ["warm"] * 3
    assert seen[3:] == [full, patched, stock, patched, stock, full, stock, full, patched]
    assert [t.peak_memory for t in result.timings] == [7, 7, 7]
    assert done[-1] == (96, 96)


def test_the_token_in_which_the_cache_makes_room_does_not_count(split, model, monkeypatch):
    clock = iter([0, 10, 100, 107, 200, 202, 300, 304, 400, 403])  # prompt 10, then 7 (makes room), 2, 4, 3
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    stock = speed.Contender(STOCK, _tiny()).ready()
    prefill, decode, *_ = speed._run(stock, torch.tensor([[1, 2, 3]]), 3)
    assert (prefill, decode) == (10, 3)


def test_native_checkpoint_has_two_rows(surgery, model, tmp_path):
    done = surgery("apply", "gqa", model, "-o", "mqa", "--no-check", "--no-eval", "kv_heads=1", "method=mean")
    assert done.code == 0, done.err
    result = surgery("bench", "mqa", "--base", model, "--lengths", "40", "--rounds", "1", "--json").json
    held = {t["model"]: t["cache_bytes"] for t in result["timings"]}
    assert held == {STOCK: PER_TOKEN * 40, SPLIT: PER_TOKEN * 40 // 3}
    assert result["split"] is None
    assert result["ratios"][0]["decode_vs_block_cache"] is None
    assert "all full" not in surgery("bench", "mqa", "--base", model, "--lengths", "40", "--rounds", "1").out


def test_a_gate_is_off_for_the_full_model_and_counted_for_the_patched_one(surgery, model, tmp_path, monkeypatch):
    from surgery.runtime import surgery_gated_compute as surgery_skipping

    fields = ("active_ratio=0.5", "calibration_samples=4", "calibration_length=32", "router=random")
    done = surgery("apply", "moh", model, "-o", "moh", "--no-check", "--no-eval", "--no-gate", *fields)
    assert done.code == 0, done.err
    logits: dict[str, list] = {STOCK: [], FULL: [], SPLIT: []}
    ids = torch.arange(1, 41)[None]

    def and_keep_logits(self):
        patched = Contender.ready(self)
        logits[self.name].append(patched(input_ids=ids).logits)
        return patched

    Contender = speed.Contender

    class Watched(Contender):
        ready = and_keep_logits

    monkeypatch.setattr(speed, "Contender", Watched)
    monkeypatch.setattr(surgery_skipping, "ROWS", 8)
    with torch.no_grad():
        result = bench(tmp_path / "moh", model, lengths=(40,), rounds=2, decode=2)
    for full, base in zip(logits[FULL], logits[STOCK], strict=True):
        assert (full - base).abs().max() < 0.05  # bfloat16
    assert all(torch.equal(patched, logits[SPLIT][0]) for patched in logits[SPLIT])
    assert (logits[SPLIT][0] - logits[FULL][0]).abs().max() > 0.2
    assert result.gate == {"layers": LAYERS, "kinds": ["moh"], "on": 0.5}
    share = result.ratios()[0]["multiply_adds"]
    at = {t.model: t for t in result.timings}
    assert at[STOCK].work == at[FULL].work == {}
    assert at[SPLIT].work["query projection"][0] * 2 == at[SPLIT].work["query projection"][1]
    assert 0.5 < share < 1
    said = surgery("bench", "moh", "--base", model, "--lengths", "600", "--rounds", "1").out
    assert "converted: moh in 2 layers, 50% of the heads on for a token" in said
    assert "multiply-adds of these layers' attention in the prompt, to the base's: 0." in said


def test_through_the_command(surgery, split, model, tmp_path):
    args = ("bench", split, "--base", model, "--lengths", "40,60", "--rounds", "1", "--decode", "2")
    done = surgery(*args, "--plot", "ratios.png")
    assert done.code == 0, done.err
    assert "to all full" in done.out
    assert "6 of 6 KV heads (1.000) see 2 sinks + 14 tokens; by layer 3 3" in done.out
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    result = surgery(*args, "--json").json
    assert (result["rounds"], result["decode"], len(result["timings"])) == (1, 2, 6)
    assert result["ratios"][0]["cache_bytes_vs_stock"] == pytest.approx(16 / 40)


def test_synthetic_is_longer_than_the_model_and_keeps_the_split_of_its_layers(surgery, split, model):
    edit_json(split / "config.json", surgery=_block(split, [[0, 2], [1]]))
    args = ("bench", split, "--base", model, "--rounds", "1", "--decode", "1", "--synthetic")
    result = surgery(*args, "--lengths", "1100", "--layers", "1", "--json").json
    held = {t["model"]: t["cache_bytes"] for t in result["timings"]}
    per_head = 2 * HEAD * ELEMENT  # one layer
    assert held[STOCK] == held[FULL] == per_head * 3 * 1100
    assert held[SPLIT] == per_head * (2 * 1100 + 16)  # the second layer, in which one head streams
    assert result["model"]["layers_kept"] == [1]
    assert result["split"]["ratio"] == pytest.approx(1 / 3)
    said = surgery(*args, "--lengths", "40", "--layers", "1").out
    assert "layers 1 of the base's 2" in said
    assert "1 of 3 KV heads (0.333)" in said


def test_synthetic_ratio_is_chosen_over_all_layers(surgery, split, model):
    args = ("bench", split, "--base", model, "--lengths", "300", "--rounds", "1", "--synthetic", "--ratio", "0.5")
    result = surgery(*args, "--json").json
    assert result["split"]["streaming"] == 3
    assert sum(result["split"]["streaming_per_layer"]) == 3
    assert result["split"]["sinks_and_windows"] == [[SINKS, WINDOW]]
    assert result["ratios"][0]["cache_bytes_vs_stock"] == pytest.approx((3 * 16 + 3 * 300) / (6 * 300))


def test_synthetic_needs_no_weights_of_the_base(surgery, split, model):
    (model / "model.safetensors").unlink()
    done = surgery("bench", split, "--base", model, "--lengths", "40", "--rounds", "1", "--synthetic")
    assert done.code == 0, done.err
    assert "note: the base: the base cannot be compared" in done.out


def test_layers_are_evenly_spaced():
    assert spaced_layers(30, None) == list(range(30))
    assert spaced_layers(30, 3) == [5, 15, 25]
    assert spaced_layers(4, 2) == [1, 3]
    for count in (0, 5, -1):
        with pytest.raises(SurgeryError, match="layers of 4"):
            spaced_layers(4, count)


def test_lists_with_an_entry_a_layer_are_cut_too():
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(num_hidden_layers=4, layer_types=kinds, max_position_embeddings=64)
    config.surgery = {"format": 1, "layers": [{"streaming": [i]} for i in range(4)]}
    before = copy.deepcopy(config.to_dict())
    small = synthetic_config(config, [0, 3], 100)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.surgery == {"format": 1, "layers": [{"streaming": [0]}, {"streaming": [3]}]}
    assert (small.num_hidden_layers, small.max_position_embeddings) == (2, 100)
    assert synthetic_config(config, [0], 8).max_position_embeddings == 64
    assert config.to_dict() == before


def test_even_split():
    layers = [{"streaming": [0], "sinks": 1, "window": 5}, {}]
    split = even_split(layers, [4, 4], 0.75)
    assert sum(len(layer["streaming"]) for layer in split) == 6
    assert [(layer["sinks"], layer["window"]) for layer in split] == [(1, 5)] * 2
    assert even_split(layers, [4, 4], 0.75) == split
    assert [len(layer["streaming"]) for layer in even_split(layers, [4, 4], 1.0)] == [4, 4]


@pytest.mark.skipif(not LINUX, reason="resident memory has a high-water mark on Linux alone")
def test_peak_is_what_was_taken_and_starts_anew():
    size = 64 << 20
    for wanted in (size, 0, size):
        with PeakMemory() as peak:
            if wanted:
                torch.ones(size // 4)  # gone at once: only a peak can tell
        assert abs(peak.bytes - wanted) < 8 << 20


@pytest.mark.skipif(not LINUX, reason="as above")
def test_peak_grows_with_the_prompt():
    model = _tiny(intermediate_size=1024, max_position_embeddings=4096)
    short, long = (speed._peak(model, torch.ones(1, n, dtype=torch.long), torch.device("cpu"))[0] for n in (64, 4096))
    inner = 4096 * 1024 * 4  # one tensor between up and down projection; two of them are alive at once
    assert long - short > 2 * inner
    assert long < 12 * inner


def test_peak_that_cannot_be_measured_is_none(monkeypatch, tmp_path, surgery, split, model):
    monkeypatch.setattr(peak_memory, "CLEAR", tmp_path / "no" / "clear_refs")
    with PeakMemory() as peak:
        pass
    assert peak.bytes is None
    done = surgery("bench", split, "--base", model, "--lengths", "40", "--rounds", "1")
    assert done.code == 0, done.err
    assert done.out.splitlines()[2].endswith("?")


def test_lengths():
    assert parse_lengths("512, 2k,8K") == (512, 2000, 8000)
    for text in ("", "a", "0", "-1", "1,,2", "1.5", "2k5", "k", "kk", "1kk"):
        with pytest.raises(SurgeryError, match="whole numbers"):
            parse_lengths(text)


def test_refused(refused, model, split):
    args = ("bench", split, "--base", model)
    refused(*args, "--lengths", "9k", says=["beyond the base's 1024 positions", "--synthetic"])
    refused(*args, "--lengths", "1008", "--decode", "16", says=["1025 tokens"])
    refused(*args, "--layers", "1", says=["add --synthetic"])
    refused(*args, "--ratio", "0.5", says=["add --synthetic"])
    refused(*args, "--synthetic", "--layers", "3", says=["3 layers of 2"])
    refused(*args, "--device", "abacus", says=["unknown device 'abacus'", "cpu, cuda"])
    refused(*args, "--plot", "x.jpg", says=[".png, .svg or .pdf"])
    refused(*args, "--plot", "no/x.png", says=["no such folder", "make it first"])
    refused("bench", model, "--base", model, "--synthetic", "--ratio", "0.5", says=["needs a checkpoint with a head"])
    refused("bench", "nothing", "--base", model, says=["no config.json"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(refused, model, split):
    refused("bench", split, "--base", model, "--device", "cuda", says=["no such device: cuda"], code=5)


def test_the_gpu_has_room_for_both_models(monkeypatch, model, split):
    """The emptiest GPU has room for one of the two: auto times the CPU and says so, and a name is refused."""
    device = torch.device("cuda", 0)
    size = sum(weight.nbytes for weight in load_model(model).parameters())
    monkeypatch.setattr(placement, "accelerators", lambda: [device])
    monkeypatch.setattr(placement, "free_on", lambda device: int(2 * size))
    assert speed.device_of("auto").type == "cuda"
    done = bench(split, model, lengths=(16,), rounds=1, decode=1)
    assert done.notes == [speed.NO_ROOM]
    assert done.machine == speed.machine_name(torch.device("cpu"))
    with pytest.raises(MachineError, match="out of memory on cuda:0") as refused:
        bench(split, model, lengths=(16,), rounds=1, decode=1, device="cuda")
    assert refused.value.fix == "--device cpu"
    monkeypatch.setattr(placement, "free_on", lambda device: int(3 * size))
    assert speed.device_of("auto", *[load_model(folder) for folder in (model, split)]) == device


def test_what_helps_where_memory_ends(monkeypatch, model, split):
    """Shorter prompts help the timing, not the weights."""

    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(speed, "_all_rounds", full)
    with pytest.raises(MachineError, match="CUDA out of memory") as refused:
        bench(split, model, lengths=(16,))
    assert refused.value.fix == "shorter --lengths"
    monkeypatch.setattr(speed, "_read_weights", full)
    with pytest.raises(MachineError, match="CUDA out of memory") as refused:
        bench(split, model, lengths=(16,))
    assert "--lengths" not in refused.value.fix


def test_another_base_is_refused_or_noted(refused, surgery, model, split):
    args = ("bench", split, "--base", model, "--lengths", "40", "--rounds", "1")
    assert surgery(*args, "--json").json["notes"] == []
    (model / "model.safetensors").touch()  # a copy of the base, say
    assert surgery(*args, "--json").json["notes"] == []
    edit_tensors(model, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert "this is not the base it was made from" in surgery(*args, "--json").json["notes"][0]
    (split / "surgery.json").unlink()
    assert "it is not known which base" in surgery(*args, "--json").json["notes"][0]
    edit_json(model / "config.json", vocab_size=65)
    refused(*args, says=["its vocab_size is 64, the base's is 65"])


def test_arguments_of_the_function(model, split):
    for wrong in ({"rounds": 0}, {"decode": 0}, {"lengths": ()}, {"lengths": (0,)}, {"rounds": True}):
        with pytest.raises(SurgeryError):
            bench(split, model, **wrong)
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(SurgeryError, match="ratio"):
            bench(split, model, lengths=(8,), synthetic=True, ratio=ratio)


def test_a_prompt_that_fits_in_no_memory_is_refused_before_it_is_run(model, split):
    with pytest.raises(MachineError, match="GiB"):
        bench(split, model, lengths=(10**10,), synthetic=True)


def _tiny(**fields):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(LLAMA | fields))).eval()


def _block(folder, streaming) -> dict:
    block = json.loads((folder / "config.json").read_text())["surgery"]
    layers = [{**layer, "streaming": heads} for layer, heads in zip(block["layers"], streaming, strict=True)]
    return {**block, "layers": layers}
