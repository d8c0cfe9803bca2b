"""How far a run is: stages, their numbers and estimates, lines in a pipe, a bar in a terminal, Ctrl-C."""

from __future__ import annotations

import io
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import STAGE_LINE
from rich.console import Console

from surgery.cli import interrupt
from surgery.cli.render import stages
from surgery.cli.render.durations import about, clock, lasted
from surgery.cli.render.stages import Stage, StageBars, StageLines, Stages
from surgery.machine.progress import StageClock, begin, renamed


class Recorded(Stages):
    """Keeps what it is told to show."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def began(self, stage: Stage) -> None:
        self.seen.append(("began", stage.label))

    def ended(self, stage: Stage) -> None:
        self.seen.append(("ended", stage.label))


def test_stages_are_numbered_in_the_order_that_was_expected():
    shown = Recorded()
    with shown:
        shown.expect(["loading", "scoring", "training", "scoring"])
        for label in ("loading", "scoring", "scoring: 2", "training: loss 3", "scoring"):
            shown(0, 2, label)
    numbered = ["1/4 loading", "2/4 scoring", "3/4 training", "4/4 scoring"]
    assert shown.seen == [(what, label) for label in numbered for what in ("began", "ended")]


def test_a_stage_that_was_not_expected_is_taken_in_and_one_that_is_left_out_is_skipped():
    shown = Recorded()
    with shown:
        shown.expect(["a", "b", "c"])
        for label in ("a", "new", "c"):
            shown(0, 0, label)
    assert [label for what, label in shown.seen if what == "began"] == ["1/3 a", "2/4 new", "4/4 c"]


def test_one_stage_and_unknown_ones_have_no_number():
    for expected in ([], ["a"]):
        shown = Recorded()
        with shown:
            shown.expect(expected)
            shown(0, 3, "a")
        assert shown.seen == [("began", "a"), ("ended", "a")]


def test_a_stage_that_fails_does_not_end():
    shown = Recorded()
    shown.__enter__()
    shown(0, 3, "a")
    shown.__exit__(ValueError, ValueError(), None)
    assert shown.seen == [("began", "a")]


@pytest.mark.parametrize("step", [0.5, 90.0, 7200.0])
@pytest.mark.parametrize("before", [0, 10])
def test_the_estimate_is_what_is_left_at_the_pace_so_far(monkeypatch, step, before):
    """Steps of any length, hours too, are judged from the first one on; what an earlier run did took no time."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stage = Stage("a", "a", 30, before, "", before, now[0])
    assert stage.remaining is None
    for done in range(before + 1, 30):
        now[0] += step
        stage.update(done, 30, "")
        assert stage.remaining == pytest.approx((30 - done) * step)
    now[0] += step / 2
    assert stage.remaining == pytest.approx(step / 2), "time passes between two steps"
    now[0] += 5 * step
    assert stage.remaining == 0
    stage.update(30, 30, "")
    assert stage.remaining is None


@pytest.mark.parametrize(
    ("done", "total", "count"),
    [(10, 30, "10 of 30"), (3200, 14336, "3,200 of 14,336"), (31, 100, "31 %"), (52e6, 520e6, "10 %"), (0, 0, "")],
)
def test_counts_that_say_something(done, total, count):
    assert Stage("a", "a", int(total), int(done)).count == count


def test_durations():
    assert [lasted(s) for s in (0.2, 62, 99.4, 328, 7500)] == ["0 s", "62 s", "99 s", "5 min 28 s", "2 h 5 min"]
    estimates = {0.1: "1 s", 4: "4 s", 37: "40 s", 94: "90 s", 100: "2 min", 320: "5 min", 9000: "2.5 h"}
    assert {seconds: about(seconds) for seconds in estimates} == estimates
    assert [clock(s) for s in (0, 59.6, 290, 3890)] == ["0:00", "1:00", "4:50", "1:04:50"]


def test_lines_at_begin_and_end_and_while_nothing_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(stages, "SILENCE", 0.2)
    with StageLines() as shown:
        shown.expect(["calibration text", "merging layers"])
        shown(0, 0, "calibration text")
        time.sleep(0.7)
        shown(0, 30, "merging layers")
        shown(10, 30, "merging layers: best 2")
        time.sleep(0.5)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""
    assert all(STAGE_LINE.match(line) for line in lines), lines
    words = [line[11:] for line in lines]
    assert words[0] == "1/2 calibration text"
    assert words.count("1/2 calibration text: 0 s so far") + words.count("1/2 calibration text: 1 s so far") >= 2
    assert any(re.fullmatch(r"1/2 calibration text: done in \d s", line) for line in words)
    assert any(re.fullmatch(r"2/2 merging layers: 10 of 30, best 2, about \d+ s left", line) for line in words)
    assert words[-1] == "2/2 merging layers: done in 0 s" or words[-1] == "2/2 merging layers: done in 1 s"


def test_a_closed_stderr_does_not_stop_the_work(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    with StageLines() as shown:
        shown(0, 1, "a")


@pytest.mark.parametrize("width", [80, 140])
def test_one_bar_that_fits_and_is_gone_when_its_stage_ends(width, monkeypatch):
    now = [time.monotonic()]
    file = io.StringIO()
    with StageBars(Console(file=file, force_terminal=True, width=width, legacy_windows=False)) as shown:
        shown.expect(["loading the model", "scoring the converted model"])
        shown(0, 0, "loading the model")
        assert len(shown._bars.tasks) == 1
        shown(0, 30, "scoring the converted model")
        shown.stage.began -= 72
        shown(6, 30, "scoring the converted model")
        assert len(shown._bars.tasks) == 1, "the one before is gone"
        drawn = Console(file=io.StringIO(), width=width, force_terminal=False, legacy_windows=False)
        drawn.print(shown._bars.get_renderable())
        (line,) = drawn.file.getvalue().splitlines()
    assert len(line) <= width
    assert line.split("━")[0] == "2/2 scoring the converted model "
    assert "6 of 30 1:12 elapsed, about 4:48 left" in line
    assert now


def test_a_clock_passes_calls_on_and_adds_up_the_stages(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    measured = StageClock(lambda *call: calls.append(call))
    for seconds, label in ((2, "loading"), (5, "scoring: the base"), (7, "scoring: the model"), (11, "loading")):
        now[0] += seconds
        measured(0, 1, label)
    now[0] += 1
    assert measured.seconds() == {"planning": 2, "loading": 5 + 1, "scoring": 7 + 11}
    assert [label for _, _, label in calls] == ["loading", "scoring: the base", "scoring: the model", "loading"]


def test_begin_and_renamed_ask_nobody_where_nobody_asks():
    begin(None, "a", 3)
    assert renamed(None, "a") is None
    calls = []
    begin(renamed(lambda *call: calls.append(call), "b"), "a", 3)
    assert calls == [(0, 3, "b")]


# --- the command ----------------------------------------------------------------------------------------------


def test_a_pipe_gets_lines_and_quiet_gets_none(surgery, model, text):
    scored = (f"evaluate.text={text}", "evaluate.windows=1", "evaluate.length=16")
    done = surgery("apply", "mqa", model, *scored, "-o", "a", "--no-check")
    names = [line[11:].split(":")[0].strip() for line in done.stages if ": done in" in line]
    assert names == ["1/3 writing", "2/3 scoring the base", "3/3 scoring the converted model"]
    assert done.out.splitlines()[-1].startswith("done in ")
    for flag in ("--quiet", "--json"):
        assert surgery("apply", "mqa", model, *scored, "-o", f"b{flag}", "--no-check", flag).stages == []


@pytest.fixture
def pressed(monkeypatch):
    """Ctrl-C at the `count`-th call of the progress of this stage."""

    def press(stage: str, count: int = 1) -> None:
        calls, call = [], Stages.__call__

        def watched(self, done, total, label):
            calls.append(label.split(":")[0] == stage)
            if sum(calls) == count and calls[-1]:
                raise KeyboardInterrupt
            call(self, done, total, label)

        monkeypatch.setattr(Stages, "__call__", watched)

    return press


def test_ctrl_c_names_what_is_kept_and_the_command_that_goes_on(surgery, model, text, tmp_path, pressed, monkeypatch):
    scored = (f"evaluate.text={text}", "evaluate.windows=1", "evaluate.length=16")
    base, closed = ("apply", "gqa", "model", *scored), ("calibration_samples=6", "calibration_length=16")
    Path("model").exists() or model.rename("model")
    pressed("merging layers", 2)
    done = surgery(*base, *closed, "calibration_text=words.txt", "-o", "a b")
    assert done.code == 130
    assert done.err.startswith("interrupted; finished layers are kept in a b.partial. Go on: surgery apply gqa model ")
    assert done.err.endswith(" -o 'a b' --resume\n")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    resumed = surgery(*base, *closed, "calibration_text=words.txt", "-o", "a b", "--resume", "--no-gate")
    assert resumed.code == 0, resumed.err


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("writing", "interrupted; nothing is finished yet. Go on: surgery apply mqa"),
        ("scoring the base", "interrupted; out is complete, but for its check and scores. Go on: surgery apply mqa"),
    ],
)
def test_ctrl_c_while_files_are_written_or_scored(surgery, model, text, pressed, stage, words):
    pressed(stage)
    scored = (f"evaluate.text={text}", "evaluate.windows=1", "evaluate.length=16")
    done = surgery("apply", "mqa", model, *scored, "-o", "out", "--no-check")
    assert done.code == 130
    assert done.err.startswith(words)
    assert done.err.endswith(" --resume\n")


def test_ctrl_c_where_nothing_is_kept(surgery, model, text, pressed):
    pressed("scoring the model")
    done = surgery("eval", model, "--text", text, "--windows", "1", "--length", "16")
    assert done.err == f"interrupted; nothing was recorded. Begin again: surgery eval {model} --text {text}" + (
        " --windows 1 --length 16\n"
    )
    interrupt.forget()
    assert interrupt.message(["ls"]) == "interrupted"
    assert signal.getsignal(signal.SIGINT) is not None
