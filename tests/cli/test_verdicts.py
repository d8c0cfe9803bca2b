"""What check, eval, bench and doctor say at their end, and errors that hide no other."""

from __future__ import annotations

import pytest
from families import COMMON, build

from surgery.cli.render.next_command import Typed, next_command
from surgery.cli.render.tables import bench_verdict, check_verdict, doctor_verdict
from surgery.config import recipe as recipes
from surgery.errors import SurgeryError
from surgery.evaluation.probes.needles import Needles
from surgery.evaluation.probes.perplexity import Perplexity
from surgery.report.verdict import verdict


def ratios(cache=0.63, prompt=(0.9, 1.0, 1.1), decoding=(0.9, 1.0, 1.1)) -> dict:
    (low, prefill, high), (lowest, decode, highest) = prompt, decoding
    ranges = {"prefill_vs_stock": [low, high], "decode_vs_stock": [lowest, highest]}
    speeds = {"prefill_vs_stock": prefill, "decode_vs_stock": decode}
    return {"length": 1000, "cache_bytes_vs_stock": cache, "ranges": ranges} | speeds


def test_a_benchmark_in_words():
    noise = "At 1,000 tokens: cache 0.63 of the base's; prompt and decoding within the noise (spread 1.22)."
    assert bench_verdict(ratios()) == noise
    mixed = bench_verdict(ratios(prompt=(1.4, 1.5, 1.6), decoding=(0.4, 0.5, 0.6)))
    assert (
        mixed == "At 1,000 tokens: cache 0.63 of the base's; prompt 1.50 times as fast; decoding 2.00 times as slow."
    )
    assert "within" not in mixed
    assert bench_verdict(ratios(cache=None)).startswith("At 1,000 tokens: prompt and")


@pytest.mark.parametrize(
    ("statuses", "evaluated", "says"),
    [
        (["passed"] * 3 + ["measured"], False, "3 checks passed. next: surgery eval 'o ut' --base MODEL"),
        (["passed"], True, "1 check passed. next: surgery push 'o ut' OWNER/NAME"),
        (["passed", "not run"], True, "1 check passed, 1 not run. next: surgery push 'o ut' OWNER/NAME"),
        (["passed", "failed"], True, "1 of 2 checks failed."),
    ],
)
def test_a_check_in_words(capsys, statuses, evaluated, says):
    items = [{"status": status} for status in statuses]
    data = {"check": {"items": items}, "base": {"name": "the base"}, "evaluation": {"out": 1} if evaluated else None}
    check_verdict(data, "o ut")
    assert capsys.readouterr().out == f"{says}\n"
    if "eval" in says:
        for base in ({"name": "smollm2-135m"}, {"name": "owner/name", "hub_id": "owner/name"}):
            check_verdict(data | {"base": base}, "out")
            assert capsys.readouterr().out.endswith(f"next: surgery eval out --base {base['name']}\n")


CPU = {"device": "cpu", "name": "EPYC"}


def test_a_machine_in_words():
    report = {"doors": {"native": "works: x", "surgical": "fails: y"}, "problems": ["p"], "devices": [CPU]}
    assert doctor_verdict(report) == (
        "Not everything works here: loading (surgical) fails; 1 problem named above. CPU only: PyTorch sees no GPU."
    )
    gpus = [{"device": f"cuda:{number}", "name": "H100"} for number in range(2)]
    whole = report | {"doors": {"native": "works: x"}, "problems": [], "devices": [CPU, *gpus]}
    assert doctor_verdict(whole) == "Everything works here. GPU: cuda:0 (H100), cuda:1 (H100)."


def test_needles_in_words():
    def verdict(kept, of):
        return Needles.verdict({"kept": {"kept": kept, "of": of}})

    assert "no longer copies from its prompt" in verdict(0, 12)
    assert "finds 7 of the 12 needles that the base finds" in verdict(7, 12)
    assert "all 12 needles" in verdict(12, 12)
    assert verdict(0, 0) == "", "where nothing counts, nothing is judged"


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (10.0, 10.001, "The perplexity is within 0.05% of the base's"),
        (10.0, 10.3, "The perplexity is 1.030 times the base's"),
        (10.0, 50.0, "The converted model is not usable as it is: its perplexity is 5 times the base's"),
        (10.0, None, "not usable as it is: its perplexity is not a number"),
    ],
)
def test_perplexity_in_words(before, after, says):
    record = {"base": {"perplexity": before}, "out": {"perplexity": after}, "kl": {"mean": 0.1}, "top1_agreement": 0.9}
    assert says in Perplexity.verdict(record)
    alone = Perplexity.verdict(record | {"base": None, "kl": None})
    assert alone == "" if after else "not a number" in alone, "nothing to compare with"


def test_wrong_overrides_are_all_shown():
    with pytest.raises(SurgeryError) as raised:
        recipes.load("gqa", ["foo=3", "active_ratio=1.5", "kv_heads=x"])
    faults = [raised.value, *raised.value.others]
    assert [fault.where for fault in faults] == [
        f"override {text!r}" for text in ("foo=3", "active_ratio=1.5", "kv_heads=x")
    ]
    assert str(raised.value).count("available: ") == 1, "the keys of the recipe are listed once"


def test_a_mistyped_folder(surgery, refused, out_folder):
    refused("check", "nosuch", says=["nosuch: no such folder"])
    refused("check", "mergde", says=["mergde: no such folder", "did you mean 'merged'?"])


@pytest.fixture
def out_folder(tmp_path):
    (tmp_path / "merged").mkdir()
    return tmp_path / "merged"


def test_a_mistyped_model_is_said_to_be_no_folder_first(surgery, out_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ran = surgery("eval", "mergde")
    assert ran.code in (2, 5)
    assert ran.err.startswith("error: no folder `mergde` here, and ")
    assert "did you mean 'merged'?" in ran.err


def test_a_score_on_noise_says_nothing():
    """The base is no language model on this text; neither a push nor a milder setting follows from such figures."""
    figures = {"base": {"perplexity": 5e4}, "out": {"perplexity": 9e5}, "kl": {"mean": 2.0, "p99": 3.0}}
    data = {
        "check": {"passed": True, "items": []}, "evaluation": {"status": "done", **figures}, "files": {},
        "gate": {"status": "not run", "limits": {"max_kl": 1.0}}, "recipe": {"operations": []},
    }  # fmt: skip
    assert verdict(data) == "nothing is known of its quality: its base cannot tell this text from noise"
    asked = Typed("apply", "mqa", "model", ("kv_heads=1",))
    said = "surgery apply mqa model kv_heads=1 evaluate.text=FILE -o out-2"
    assert next_command(data, "out", asked) == said
    known = {"base": {"perplexity": 50.0}, "out": {"perplexity": 51.0}, "kl": {"mean": 0.01, "p99": 0.1}}
    known = data | {"evaluation": {"status": "done", **known}}
    assert next_command(known, "out", asked) == "surgery push out OWNER/NAME"
    assert verdict(known).startswith("usable, if the cost is right for you")


@pytest.mark.parametrize(
    ("kv_heads", "recipe", "asked", "said"),
    [
        (8, "mla", "keep_kv=0.3", "keep_kv=0.45"),
        (8, "mla", "keep_kv=0.45", "keep_kv=0.56"),  # no vector needs more than the layer's input
        (8, "low-rank-kv", "keep_kv=0.4", "keep_kv=0.5"),
        (8, "low-rank-kv", "keep_kv=0.5", ""),
        (4, "mla", "keep_kv=0.7", "keep_kv=0.85"),
        (4, "mla", "keep_kv=0.97", ""),  # what more would leave saves too little
        (4, "hybrid-swa", "sliding=0.5", ""),  # of two layers one slides: half of that is the same
        (1, "duo-attention", "streaming_ratio=0.5", ""),  # the one head streams, or none
        (4, "evict", "keys=900", "keys=1800"),
        (4, "evict", "keys=64", "keys=128"),
        (4, "mqa", "kv_heads=1", "method=closed_form"),  # as much of the cache, with less loss
    ],
)
def test_a_milder_setting_fits_the_model_and_leaves_more_of_its_cache(kv_heads, recipe, asked, said, tmp_path):
    size = {"num_key_value_heads": kv_heads, "max_position_embeddings": 4096}
    build("Llama", **(COMMON | size)).save_pretrained(tmp_path)
    lost = {"base": {"perplexity": 20.0}, "out": {"perplexity": 90.0}, "kl": {"mean": 2.0, "p99": 3.0}}
    data = {
        "check": {"passed": True, "items": []}, "evaluation": {"status": "done", **lost}, "files": {},
        "gate": {"status": "failed", "limits": {"max_kl": 1.0}}, "recipe": {"operations": []},
    }  # fmt: skip
    command = next_command(data, "out", Typed("apply", recipe, str(tmp_path), (asked,)))
    kept = f"{asked} " if said.partition("=")[0] != asked.partition("=")[0] else ""
    again = f"surgery apply {recipe} {tmp_path} {kept}{said} -o out-2"
    assert command.startswith(again if said else "surgery heal out")
