"""`surgery fit`: what reaches a budget, what a trial measures, and which option wins, stopped or not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from families import TINY, build
from tokenizers_of_bytes import byte_tokenizer

import surgery
from surgery.architecture.anatomy import Anatomy
from surgery.config import recipe as recipes
from surgery.config.options import RunOptions
from surgery.conversion.plan import make_plan
from surgery.errors import SurgeryError
from surgery.pipeline import apply_to_folder
from surgery.search import fit as search
from surgery.search.budget import Budget, Model, options, pairs
from surgery.search.trials import ANSWERS, FIRST, WHOLE, Damage, Judge, quick

CONTEXT = 2048
QUIET = RunOptions(check=False, evaluate=False, gate=False, overwrite=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    build("Llama", vocab_size=300, intermediate_size=96, max_position_embeddings=2048, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base) -> Model:
    return Model(surgery.Anatomy.of(base), "model", base, chats=False)


def left(model: Model, operations: list[dict], context: int) -> float:
    """What a plan leaves of the cache; above 1 where there is no plan."""
    recipe = {"version": 1, "name": "r", "operations": operations, "evaluate": None}
    try:
        plan = make_plan(recipes.load(recipe), model.anatomy, "model", model.folder)
    except SurgeryError:
        return math.inf
    return plan.after.kv_bytes_at(context) / model.anatomy.kv_bytes_at(context)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_every_option_is_the_mildest_of_its_ladder_that_fits(model, share):
    found = options(model, Budget(share, CONTEXT)).found
    assert found
    for option in found:
        assert option.share == option.plan.after.kv_bytes_at(CONTEXT) / model.anatomy.kv_bytes_at(CONTEXT) <= share
        steps = option.recipe.to_dict()["operations"]
        for index, operation in enumerate(option.recipe.operations):
            for ladder in operation.ladders(model.anatomy):
                at = [rung for rung in ladder if steps[index] | rung == steps[index]]
                if not at:
                    continue
                milder = ladder[: ladder.index(at[0])]
                others = [
                    left(model, [*steps[:index], steps[index] | rung, *steps[index + 1 :]], CONTEXT) for rung in milder
                ]
                assert all(other > share for other in others), option.name


@pytest.mark.parametrize("share", [0.5, 0.25, 0.2, 0.15])
def test_no_setting_that_fits_is_missed(model, share):
    """By brute force: every rung of every recipe of one operation."""
    found = {option.recipe.name for option in options(model, Budget(share, CONTEXT)).found}
    for name in ("gqa", "mla", "duo-attention", "streaming", "hybrid-swa", "prune-heads"):
        recipe = model.recipe(name)
        (step,) = recipe.to_dict()["operations"]
        rungs = [rung for ladder in recipe.operations[0].ladders(model.anatomy) for rung in ladder]
        fits = any(left(model, [step | rung], CONTEXT) <= share for rung in rungs)
        assert fits == (name in found), name


@pytest.mark.parametrize("name", [name for name in TINY if not Anatomy.of(TINY[name]()).composite])
def test_every_family_is_planned(name, tmp_path):
    """One KV head, windows in all layers, other layouts: nothing fits, or what fits is listed, and nothing crashes."""
    tiny = TINY[name]()
    found = options(Model(Anatomy.of(tiny), name, tmp_path, chats=False), Budget(0.5, 128))
    assert found.found or found.left_out


def test_the_nearest_is_one_that_may_be_taken(base, tmp_path):
    for asked in ({"native_only": True}, {"engine": "llama.cpp"}):
        with pytest.raises(SurgeryError) as caught:
            search.fit(base, 0.05, context=CONTEXT, folder=tmp_path / "fit", **asked)
        said = str(caught.value)
        assert "the nearest is" in said
        assert float(said.rpartition("--kv ")[2]) > 0.05
        assert "streaming" not in said
        assert "sinks" not in said.partition("the nearest is")[2]


def test_what_is_left_out_says_why(model):
    small, native = options(model, Budget(0.2, CONTEXT)), options(model, Budget(0.5, CONTEXT, native=True))
    assert small.left_out["prune-heads"] == "it leaves 25% of the cache at least"
    assert "surgical" in native.left_out["duo-attention"]
    assert all(option.plan.tier == "native" for option in native.found)
    assert native.others["mqa"] == "its result needs training"
    assert native.others["expand-kv"] == "no setting of it makes the cache smaller"
    engine = options(model, Budget(0.5, CONTEXT, engine="llama.cpp"))
    assert "llama.cpp cannot express streaming heads" in engine.left_out["duo-attention"]
    assert {option.recipe.name for option in engine.found} >= {"gqa", "mla", "prune-heads"}
    assert options(model, Budget(0.5, CONTEXT)).left_out["mla-absorbed"] == "it computes what mla computes"


def test_without_a_chat_template_conversations_are_no_calibration_text(model):
    mla = next(option for option in options(model, Budget(0.5, CONTEXT)).found if option.recipe.name == "mla")
    assert mla.recipe.operations[0].calibration_text == "mixed"
    chatting = Model(*model[:3])
    mla = next(option for option in options(chatting, Budget(0.5, CONTEXT)).found if option.recipe.name == "mla")
    assert mla.recipe.operations[0].calibration_text == "conversations"


def test_pairs_share_the_budget(model):
    found = {option.recipe.name: option for option in options(model, Budget(0.4, CONTEXT)).found}
    made = pairs([found["prune-heads"], found["duo-attention"]], model, Budget(0.4, CONTEXT))
    assert {option.recipe.name for option in made} >= {"prune-heads + duo-attention"}
    assert all(option.share <= 0.4 for option in made)
    assert pairs([found["mla"], found["duo-attention"]], model, Budget(0.4, CONTEXT)) == [], "nothing follows mla"
    coarse = pairs([found["prune-heads"], found["duo-attention"]], model, Budget(0.25, CONTEXT))
    assert all("per_layer=3" not in option.name for option in coarse), "that alone reaches a quarter"


def test_a_quick_conversion_reads_a_quarter(model):
    recipe = quick(recipes.load("prune-heads"))
    assert (recipe.operations[0].calibration_samples, recipe.operations[0].score_samples) == (8, 2)
    hybrid = quick(recipes.load("hybrid-swa")).operations[0]
    assert (hybrid.calibration_samples, hybrid.rounds) == (1, 1)
    assert quick(recipes.load("streaming")).to_dict() == recipes.load("streaming").to_dict()


def test_damage_is_what_float64_says(base, tmp_path):
    """KL at every eighth position of plain text, and what the answers lost, each token of them counted once."""
    judge = Judge(base, "builtin", CONTEXT, 1)
    same = judge.measure(base)
    assert (same["kl"], same["total"], same["kept"]) == (0.0, 0.0, same["asked"])
    out = tmp_path / "out"
    recipe = {
        "version": 1,
        "name": "r",
        "operations": [{"op": "gqa", "kv_heads": 2, "method": "mean"}],
        "evaluate": None,
    }
    surgery.apply(recipe, base, output=out, check=False, evaluate=False)
    found, logs = judge.measure(out), []
    for folder in (base, out):
        one = surgery.load(folder).double()
        with torch.no_grad():
            logs.append([one(ids[None]).logits[0].log_softmax(-1) for ids, _ in judge.rows()])
    (plain, recall), (changed, answered) = logs
    at = torch.arange(0, CONTEXT - 1, 8)
    kl = (plain[at].exp() * (plain[at] - changed[at])).sum(-1)
    blocks = torch.stack([block.mean() for block in kl.chunk(16)])
    ids, lost = judge.recalls[0].ids, []
    for first, end in judge.recalls[0].answers:
        rows = range(first, end)
        lost.append(sum(float(recall[i - 1, ids[i]] - answered[i - 1, ids[i]]) for i in rows) / len(rows))
    answers = sum(lost) / len(lost)
    assert found["kl"] == pytest.approx(float(blocks.mean()), rel=1e-4)
    assert found["answers"] == pytest.approx(answers, rel=1e-3, abs=1e-5)
    assert found["total"] == pytest.approx(found["kl"] + ANSWERS * max(0.0, answers), rel=1e-4)
    spread = torch.tensor(lost, dtype=torch.float64).std() / len(lost) ** 0.5
    expected = math.hypot(float(blocks.std() / 16**0.5), ANSWERS * float(spread))
    assert found["error"] == pytest.approx(expected, rel=1e-3)


def test_a_forgotten_past_is_seen(base, tmp_path):
    """Short texts do not show a window; answers that are asked from all over the text do."""
    judge = Judge(base, "builtin", CONTEXT, 1)
    assert min(first for recall in judge.recalls for first, _ in recall.spans) < CONTEXT // 4
    lost = {}
    for window in (64, CONTEXT):
        out = tmp_path / str(window)
        step = {"op": "duo_attention", "streaming_ratio": 1.0, "sinks": 0, "window": window}
        recipe = {"version": 1, "name": "r", "operations": [step], "evaluate": None}
        surgery.apply(recipe, base, output=out, check=False, evaluate=False)
        lost[window] = judge.measure(out)
    assert lost[CONTEXT]["total"] < 1e-6 < lost[64]["total"]
    assert max(map(abs, lost[CONTEXT]["lost"])) < 1e-5 < max(map(abs, lost[64]["lost"]))


def test_the_judged_questions_share_nothing_with_those_that_heads_are_chosen_on():
    from surgery.data.passkeys import NEEDLE, QUESTION
    from surgery.search import trials

    def words(text):
        return {word.strip(".,:").lower() for word in text.replace("{label}", "").split()} - {"the", "of"}

    assert not words(NEEDLE + QUESTION) & words(trials.NEEDLE + trials.QUESTION)


def test_the_error_of_a_difference_is_that_of_the_same_texts():
    blocks, lost = [0.1, 0.9, 0.2, 0.8], [1.0, 5.0, 2.0]
    one = dataclasses.replace(trial(0.5, 0.2), blocks=blocks, lost=lost)
    more = dataclasses.replace(one, total=0.52, blocks=[each + 0.02 for each in blocks])
    assert more.worse_than(one), "more in each block"
    mixed = dataclasses.replace(one, total=0.52, blocks=[0.3, 0.7, 0.4, 0.68])
    assert not mixed.worse_than(one)
    assert not dataclasses.replace(more, blocks=[], lost=[]).worse_than(one)


def test_outputs_that_are_not_finite_are_no_result(base, tmp_path, monkeypatch):
    judge = Judge(base, "builtin", CONTEXT, 1)
    judge.of_base  # noqa: B018 (measured now)
    monkeypatch.setattr(
        Judge, "_log_probabilities", lambda self, model: (torch.full_like(each, math.nan) for each in judge.of_base)
    )
    with pytest.raises(SurgeryError, match="not finite"):
        judge.measure(base)


def only(monkeypatch, *names: str) -> None:
    """Let the package ship these recipes alone."""
    known = {name: path for name, path in recipes.shipped().items() if name in names}
    monkeypatch.setattr(recipes, "shipped", lambda: known)


def trial(damage: float, error: float = 0.001) -> Damage:
    return Damage(damage, 0.0, 0, 0, damage, error, 1.0)


class Planned:
    """Trials with damages by option, in place of conversions. A float is for both stages."""

    def __init__(self, damages: dict[str, float | tuple[float, float]], stop: int | None = None, real: bool = False):
        self.damages, self.stop, self.real, self.ran = damages, stop, real, []

    def __call__(self, recipe, model, out: Path, stage, judge, say) -> Damage:
        if len(self.ran) == self.stop:
            raise KeyboardInterrupt
        self.ran.append((recipe.name, stage.name))
        found = self.damages.get(recipe.name, 9.0)
        if isinstance(found, Exception):
            raise found
        if self.real:
            apply_to_folder(recipe, model, out, QUIET)
        out.mkdir(exist_ok=True, parents=True)
        if not self.real:
            (out / "made").write_text(f"{recipe.name} {stage.name}")
        return trial(found[stage is WHOLE] if isinstance(found, tuple) else found)


DAMAGES = {"duo-attention": 0.2, "mla": (0.3, 0.1), "prune-heads": 0.9, "gqa": 0.25, "streaming": 2.0}


@pytest.mark.parametrize(("goal", "kv"), [("decode", 0.5), ("prefill", None)])
def test_the_fastest_that_passes_its_gate(base, tmp_path, monkeypatch, goal, kv):
    """Of those that are tried as their recipes say; what loses less may be slower."""
    speeds = {
        "duo-attention": 1.2,
        "gqa": 3.0,
        "mla": 2.0,
        "sparse-prefill": 1.5,
        "xattention": 2.5,
        "sparse-duo": 1.1,
    }

    def timed(recipe, model, out, stage, judge, say):
        out.mkdir(exist_ok=True, parents=True)
        speed = speeds.get(recipe.name, 0.5) if stage is WHOLE else None
        return dataclasses.replace(trial(0.2), speed=speed)

    monkeypatch.setattr(search, "tried", timed)
    monkeypatch.setattr(search, "Judge", lambda *_: None)
    found = search.fit(base, kv, context=CONTEXT, goal=goal, folder=tmp_path / "fit")
    assert found.best.startswith("gqa" if goal == "decode" else "xattention")
    assert found.rows[found.best].why == {"decode": "decodes fastest", "prefill": "reads prompts fastest"}[goal]
    names = {row.recipe.name for row in found.options.values()}
    assert ("sparse-prefill" in names) == (goal == "prefill")
    assert "slower" in str(found)
    assert "2.50x" in str(found) or goal == "decode"


def ran(base, tmp_path, monkeypatch, damages=DAMAGES, stop=None, **asked):
    planned = Planned(damages, stop)
    monkeypatch.setattr(search, "tried", planned)
    monkeypatch.setattr(search, "Judge", lambda *_: None)
    return planned, search.fit(base, 0.5, context=CONTEXT, folder=tmp_path / "fit", **asked)


def test_the_better_half_is_tried_as_a_whole(base, tmp_path, monkeypatch):
    more = ["duo-with-sinks", "learned-sinks", "prune-heads", "gqa + duo-attention"]
    planned, found = ran(base, tmp_path, monkeypatch, DAMAGES | dict.fromkeys(more, 0.7))
    first = [name for name, stage in planned.ran if stage == "first"]
    whole = [name for name, stage in planned.ran if stage == "whole"]
    assert {*DAMAGES} <= set(first)
    assert len(whole) == (len(first) + 1) // 2
    assert whole[0] == "duo-attention", "what lost least in the first trial"
    assert {"duo-attention", "gqa", "mla"} <= set(whole)
    assert found.best.startswith("mla")
    assert (tmp_path / "fit" / "best" / "made").read_text() == "mla whole"
    assert found.rows[found.best].whole == trial(0.1)
    text = str(found)
    assert "lost more in the first trial" in text
    assert found.rows[found.best].why == "loses least"
    assert "which train or leave the cache as it is" in text
    assert found.to_dict()["options"][0]["option"] == found.best
    assert "gqa + duo-attention" in {name.split(" kv")[0] for name in found.rows}, "a pair of the two best"


def test_what_is_not_told_apart_goes_on(base, tmp_path, monkeypatch):
    alike = dict.fromkeys([*DAMAGES, "duo-with-sinks", "learned-sinks", "hybrid-swa"], 0.2)
    planned, _ = ran(base, tmp_path, monkeypatch, alike)
    whole = [name for name, stage in planned.ran if stage == "whole"]
    assert set(alike) & {name for name, _ in planned.ran} <= set(whole)


def test_what_loses_many_times_more_does_not_go_on(base, tmp_path, monkeypatch):
    planned, found = ran(base, tmp_path, monkeypatch, {"duo-attention": 0.01, "gqa": 0.05, "mla": (0.06, 0.001)})
    assert [name for name, stage in planned.ran if stage == "whole"] == ["duo-attention"]
    assert found.best.startswith("duo-attention")


def test_thoroughly_every_option_is_tried_as_a_whole(base, tmp_path, monkeypatch):
    planned, found = ran(base, tmp_path, monkeypatch, thorough=True)
    assert len(planned.ran) == 2 * len(found.rows)
    assert found.best.startswith("mla")


@pytest.mark.parametrize("stop", range(0, 12, 2))
def test_stopped_and_started_again_it_chooses_the_same(base, tmp_path, monkeypatch, stop):
    planned, whole = ran(base, tmp_path / "whole", monkeypatch)
    assert stop < len(planned.ran)
    with pytest.raises(KeyboardInterrupt):
        ran(base, tmp_path, monkeypatch, stop=stop)
    again, found = ran(base, tmp_path, monkeypatch)
    assert len(again.ran) == len(planned.ran) - stop, "nothing is measured twice"
    assert found.best == whole.best
    if (kept := tmp_path / "fit" / "best.json").is_file():  # else the best trial ended before it was kept
        assert json.loads(kept.read_text())["key"].startswith(found.best)
        assert (tmp_path / "fit" / "best" / "made").read_text() == "mla whole"
    once_more, found = ran(base, tmp_path, monkeypatch)
    assert once_more.ran == []
    assert found.best == whole.best


def test_an_option_that_cannot_be_converted(base, tmp_path, monkeypatch):
    broken = DAMAGES | {"duo-attention": SurgeryError("no room for it")}
    _, found = ran(base, tmp_path, monkeypatch, broken)
    assert next(row.why for name, row in found.rows.items() if name.startswith("duo-attention")) == (
        "not tried: no room for it"
    )
    every = {option.recipe.name: SurgeryError("no disk") for option in options(
        Model(surgery.Anatomy.of(base), "m", base, False), Budget(0.5, CONTEXT)).found}  # fmt: skip
    with pytest.raises(SurgeryError, match="no disk"):
        ran(base, tmp_path / "other", monkeypatch, every)


def test_a_pair_that_cannot_be_converted_is_a_row_alone(base, tmp_path, monkeypatch):
    """None of the others keeps what is asked either: the one that loses least is written all the same."""
    planned, pair = Planned(DAMAGES, real=True), []

    def few(recipe, *rest):
        if "+" in recipe.name:
            pair.append(recipe.name)
            raise SurgeryError("no room for two")
        return dataclasses.replace(planned(recipe, *rest), asked=9, kept=2)

    def finished(folder, base, recipe, options):
        report = surgery.Report.of(folder)
        report.data["check"] = {"passed": True, "items": []}
        report.save()
        return report

    monkeypatch.setattr(search, "tried", few)
    monkeypatch.setattr(search, "Judge", lambda *_: None)
    monkeypatch.setattr(search, "finish", finished)
    only(monkeypatch, "streaming", "duo-attention", "prune-heads", "learned-sinks")
    found = search.fit(base, 0.3, context=CONTEXT, folder=tmp_path / "fit", output=tmp_path / "out")
    assert pair, "a pair was tried"
    assert any("the one that loses least" in note for note in found.notes)
    assert found.chosen


def test_no_trial_begins_after_the_time(base, tmp_path, monkeypatch):
    planned, found = ran(base, tmp_path, monkeypatch, minutes=0)
    assert len(planned.ran) == 1, "one is always tried"
    assert sum(row.why == "not tried: the time was over" for row in found.rows.values()) >= 3
    assert found.order == [], "none was tried as its recipe says"


@pytest.mark.parametrize("fault", ["gate", "check", "error", "recall", None])
def test_the_best_that_passes_is_written(base, tmp_path, monkeypatch, fault):
    """The second one is converted again, since only the best result was kept."""
    planned, out, seen = Planned({"streaming": 0.1, "prune-heads": 0.2}, real=True), tmp_path / "out", []

    def asked_back(recipe, *rest):
        found = planned(recipe, *rest)
        return (
            dataclasses.replace(found, asked=9, kept=2) if fault == "recall" and recipe.name == "streaming" else found
        )

    def finished(folder, base, recipe, options):
        report, wrong = surgery.Report.of(folder), recipe.name == "streaming"
        seen.append(recipe.name)
        if wrong and fault == "error":
            raise SurgeryError("no memory")
        report.data["check"] = {"passed": not (wrong and fault == "check"), "items": []}
        failed = wrong and fault == "gate"
        report.data["gate"] |= {"status": "failed" if failed else "passed", "reasons": ["KL 2"] * failed}
        report.save()
        return report

    monkeypatch.setattr(search, "tried", asked_back)
    monkeypatch.setattr(search, "Judge", lambda *_: None)
    monkeypatch.setattr(search, "finish", finished)
    only(monkeypatch, "streaming", "prune-heads")
    found = search.fit(base, 0.5, context=CONTEXT, folder=tmp_path / "fit", output=out)
    why = {row.name.split()[0]: row.why for row in found.rows.values() if "+" not in row.name}
    expected = {
        "gate": "its gate failed: KL 2",
        "check": "its check failed",
        "error": "it could not be finished: no memory",
        "recall": "it repeats 2 of the 9 passkeys that the base repeats",
        None: "chosen",
    }
    assert why["streaming"] == expected[fault]
    chosen = "streaming" if fault is None else "prune-heads"
    assert found.chosen.startswith(chosen)
    assert seen == (["prune-heads"] if fault == "recall" else ["streaming", "prune-heads"] if fault else ["streaming"])
    assert json.loads((out / "surgery.json").read_text())["recipe"]["name"] == chosen
    assert json.loads((out / "surgery.json").read_text())["fit"]["best"] == found.chosen
    assert sorted(path.name for path in (tmp_path / "fit").iterdir() if path.is_dir()) == [], "no weights are left"


@pytest.mark.parametrize("stop", range(4))
def test_killed_inside_a_conversion(base, tmp_path, monkeypatch, stop):
    """The folder that a conversion left behind is replaced by the next run."""
    from surgery.io.output_folder import OutputFolder

    only(monkeypatch, "streaming", "prune-heads")
    finish, left = OutputFolder._finish, [stop]

    def killed(folder):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        finish(folder)

    asked = {"context": CONTEXT, "folder": tmp_path / "fit", "output": tmp_path / "out"}
    monkeypatch.setattr(OutputFolder, "_finish", killed)
    with pytest.raises(KeyboardInterrupt):
        search.fit(base, 0.5, **asked)
    found = search.fit(base, 0.5, **asked)
    assert found.chosen
    assert surgery.check(tmp_path / "out").passed


def test_nothing_of_the_user_is_removed(base, tmp_path, monkeypatch):
    keep, out = tmp_path / "project", tmp_path / "out"
    for name in ("best", "trial"):
        (keep / name).mkdir(parents=True)
        (keep / name / "mine.txt").write_text("mine")
    refused = {
        "a search needs the name": {"folder": keep},
        "lie in the model's folder": {"folder": base / "kept"},
        "lie in one another": {"folder": tmp_path / "fit", "output": tmp_path / "fit" / "out"},
    }
    for says, asked in refused.items():
        with pytest.raises(SurgeryError, match=says):
            search.fit(base, 0.5, context=CONTEXT, **asked)
    assert (keep / "best" / "mine.txt").read_text() == (keep / "trial" / "mine.txt").read_text() == "mine"
    only(monkeypatch, "streaming", "prune-heads")
    surgery.apply("streaming", base, output=out, check=False, evaluate=False, overrides=["evaluate=null"])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SurgeryError, match="would remove what surgery did not write"):
        search.fit(base, 0.5, context=CONTEXT, output=out, overwrite=True, folder=tmp_path / "fit")
    assert (out / "notes.txt").is_file()


def test_an_output_that_another_run_began(base, tmp_path, monkeypatch):
    """That of another command is refused before the search; of an earlier search nothing is taken over."""
    from surgery.io.output_folder import PROGRESS

    partial, asked = tmp_path / "out.partial", {"folder": tmp_path / "fit", "output": tmp_path / "out"}
    partial.mkdir()
    (partial / PROGRESS).write_text('{"plan": "of another", "done": {}}')
    with pytest.raises(SurgeryError, match="of another conversion"):
        search.fit(base, 0.5, context=CONTEXT, **asked)
    (partial / PROGRESS).write_text('{"plan": "fit", "done": {}}')
    (partial / "model-00007.safetensors").write_text("of an option that lost")
    only(monkeypatch, "streaming", "prune-heads")
    assert search.fit(base, 0.5, context=CONTEXT, **asked).chosen
    assert not list((tmp_path / "out").glob("*00007*"))
    assert surgery.check(tmp_path / "out").passed


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"kv": 0.0}, "a share between 0 and 1"),
        ({"kv": 1}, "a share between 0 and 1"),
        ({"kv": True}, "a share between 0 and 1"),
        ({"kv": 0.001}, "the nearest is"),
        ({"context": 1023}, "at least 1024 tokens"),
        ({"context": "8192"}, "at least 1024 tokens"),
        ({"minutes": -1}, "a number from 0 on"),
        ({"minutes": "3"}, "a number from 0 on"),
        ({"kv": None}, "no share of the KV cache is named"),
        ({"goal": "speed"}, "there is no goal 'speed'"),
        ({"goal": "prefill", "kv": None, "engine": "vllm"}, "nothing leaves 100%"),
        ({"engine": "sglang"}, "no engine 'sglang'"),
    ],
)
def test_wrong_arguments(base, tmp_path, asked, says):
    with pytest.raises(SurgeryError) as caught:
        search.fit(base, **({"kv": 0.5, "context": CONTEXT, "folder": tmp_path / "fit"} | asked))
    assert says in str(caught.value)


def test_a_converted_model_and_another_search_are_refused(base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    surgery.apply("streaming", base, output=out, check=False, evaluate=False, overrides=["evaluate=null"])
    with pytest.raises(SurgeryError, match="converted already"):
        search.fit(out, 0.5, folder=tmp_path / "fit")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    for taken, overwrite, says in (
        (out, False, "OUT exists"),
        (foreign, False, "OUT exists"),
        (foreign, True, "no surgery"),
    ):
        with pytest.raises(SurgeryError, match=says):
            search.fit(base, 0.5, output=taken, overwrite=overwrite, folder=tmp_path / "fit")
    with pytest.raises(SurgeryError, match="may not be the model folder"):
        search.fit(base, 0.5, output=base / "out", folder=tmp_path / "fit")
    ran(base, tmp_path, monkeypatch)
    with pytest.raises(SurgeryError, match="a search with another model, text or context"):
        search.fit(base, 0.5, context=1024, folder=tmp_path / "fit")


@pytest.mark.parametrize(
    ("asked", "says"), [(("--goal", "speed"), "there is no goal 'speed'"), ((), "no share of the KV cache is named")]
)
def test_the_command_knows_goals(surgery, base, asked, says):
    ran = surgery("fit", base, *asked)
    assert (ran.code, says in ran.err) == (2, True)


def test_the_whole_search_on_a_tiny_model(surgery, base, tmp_path, monkeypatch):
    """The command, with two recipes: what it prints, what it writes, and the record in the result."""
    only(monkeypatch, "streaming", "prune-heads")
    ran = surgery("fit", base, "--kv", "0.5", "--context", CONTEXT, "-o", "out", "--keep", "kept")
    assert ran.code in (0, 3), ran.err
    assert "best: " in ran.out
    record = json.loads(Path("out/surgery.json").read_text())
    assert record["check"]["passed"]
    assert record["fit"]["budget"] == {
        "share": 0.5, "context": CONTEXT, "native_only": False, "engine": "", "goal": "quality"
    }  # fmt: skip
    assert len(json.loads(Path("kept/fit.json").read_text())["trials"]) >= 3
    assert Path("kept/fit.png").is_file()
    assert {row["option"].split()[0] for row in record["fit"]["options"]} >= {"streaming", "prune-heads"}
    assert all(FIRST.name in row for row in record["fit"]["options"])
    card = Path("out/README.md").read_text()
    assert "what leaves 50% of the base's KV cache at 2,048 tokens" in card
    assert "| whole |" in card
    assert "| first |" in card
    assert "| chosen |" in card
    assert "](fit.png)" in card
    assert "fit.png" in record["other_files"]
    page = surgery("report", "out").code, Path("out/report.html").read_text()
    assert page[0] == 0
    assert "a filled mark was tried as a whole.</figcaption>" in page[1]
    assert "<h2>What else was tried</h2>" in page[1]
    assert "<td>chosen</td>" in page[1]
    carried = json.loads(Path("out/surgery.json").read_text())
    del carried["fit"]  # as in what the next surgery makes of the result
    Path("out/surgery.json").write_text(json.dumps(carried))
    assert surgery("report", "out").code == 0
    assert "a filled mark was tried as a whole" not in Path("out/report.html").read_text()
