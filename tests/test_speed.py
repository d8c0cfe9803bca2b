"""The benchmark on a tiny model: what it times, what it counts, what it refuses."""

import pytest

from surgery.errors import SurgeryError
from surgery.evaluation.speed import FULL, SPLIT, STOCK, bench, parse_lengths


@pytest.fixture
def split(surgery, model, tmp_path):
    fields = ("streaming_ratio=1.0", "sinks=2", "window=14")
    done = surgery("apply", "duo-attention", model, "-o", "out", "--no-check", "--no-eval", *fields)
    assert done.code == 0, done.err
    return tmp_path / "out"


def test_models_take_turns_and_bytes_are_those_held(split, model):
    result = bench(split, model, lengths=(40, 80), rounds=2, decode=2)
    at = {(t.model, t.length): t for t in result.timings}
    assert set(at) == {(name, length) for name in (STOCK, FULL, SPLIT) for length in (40, 80)}
    per_token = 2 * 2 * 3 * 8 * 2  # layers, keys and values, KV heads, head size, bytes
    for length in (40, 80):
        assert at[STOCK, length].cache_bytes == per_token * length
        assert at[SPLIT, length].cache_bytes == per_token * (2 + 14)
    assert all(t.prefill > 0 and t.decode > 0 and t.prefill_spread >= 1 for t in result.timings)
    assert [r["length"] for r in result.ratios()] == [40, 80]
    assert result.ratios()[1]["cache_bytes_vs_stock"] == pytest.approx(16 / 80)


def test_through_the_command(surgery, split, model):
    done = surgery("bench", split, "--base", model, "--lengths", "40", "--rounds", "1")
    assert done.code == 0, done.err
    assert "of all heads full on the same cache" in done.out
    assert surgery("bench", split, "--base", model, "--lengths", "40", "--rounds", "1", "--json").json["rounds"] == 1


def test_lengths():
    assert parse_lengths("512, 2k,8K") == (512, 2000, 8000)
    for text in ("", "a", "0", "-1", "1,,2", "1.5"):
        with pytest.raises(SurgeryError, match="whole numbers"):
            parse_lengths(text)


def test_refused(refused, model, split):
    refused("bench", model, "--base", model, says=["no head split", "duo-attention"])
    refused("bench", split, "--base", model, "--lengths", "9k", says=["beyond the base's 1024 positions"])
