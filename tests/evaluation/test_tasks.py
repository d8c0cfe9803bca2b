"""Tasks of lm-eval: scores against an independent computation, pairs, both ways to load, RULER, gate, card, errors."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import WORDS, edit_tensors
from families import one_thread  # noqa: F401 (a fixture)

import surgery as package
from surgery.errors import MachineError, NetworkError, SettingError, SurgeryError
from surgery.evaluation import harness
from surgery.evaluation.harness import answers as asking
from surgery.evaluation.harness import task_index, task_set
from surgery.evaluation.harness.command import command
from surgery.evaluation.harness.scores import TaskResult, paired_interval
from surgery.evaluation.harness.task_files import write_task as write
from surgery.evaluation.probes.settings import make
from surgery.io.loading import load_model, read_tokenizer
from surgery.report.gate import gate

ITEMS = 9


@pytest.fixture(autouse=True)
def answers(tmp_path, tmp_path_factory, monkeypatch):
    """Answers are kept in a folder of the test, and nothing is fetched."""
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def model(tiny_llama, tmp_path):
    """The tiny Llama in float32: lm-eval takes log-probabilities in the dtype of the logits."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    load_model(tiny_llama, dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def items(tmp_path) -> list[dict]:
    """Questions of words that the tiny tokenizer knows; their choices have one to three words."""
    draw = random.Random(0)
    questions = []
    for _ in range(ITEMS):
        choices = [" ".join(draw.sample(WORDS, draw.randint(1, 3))) for _ in range(4)]
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))
        questions.append({"prompt": prompt, "choices": choices, "answer": draw.randrange(4)})
    lines = "".join(json.dumps(each) + "\n" for each in questions)
    (tmp_path / "items.jsonl").write_text(lines, encoding="utf-8")
    return questions


def write_task(folder, name, **keys):
    """A YAML file of a task over `items.jsonl`."""
    data = {"test": str(folder / "items.jsonl")}
    config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": data}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | keys), encoding="utf-8")
    return str(folder / f"{name}.yaml")


@pytest.fixture
def choosing(tmp_path, items) -> str:
    return write_task(
        tmp_path, "choosing", output_type="multiple_choice", doc_to_text="prompt", doc_to_choice="choices",
        doc_to_target="answer", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}], metadata={"version": 2.0},
    )  # fmt: skip


@pytest.fixture
def writing(tmp_path, items) -> str:
    return write_task(
        tmp_path, "writing", output_type="generate_until", doc_to_text="prompt", doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["zzz"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip


@pytest.fixture
def merged(model, tmp_path):
    """The tiny model with one KV head in each layer."""
    package.apply("gqa", model, output=tmp_path / "out", check=False, evaluate=False, method="mean")
    return tmp_path / "out"


def tasks(*names, **settings):
    return make("tasks", {"names": list(names)} | settings)


# --- scores ---------------------------------------------------------------------------------------------------------


def log_probability(model, tokenizer, prompt: str, choice: str) -> float:
    """Of a choice after its prompt, in float64, from one forward without a cache."""
    before, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {choice}")["input_ids"]
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(rows[place - 1, whole[place]].item() for place in range(len(before), len(whole)))


def test_choices_are_scored_as_an_independent_computation_says(model, choosing, items):
    result = tasks(choosing).measure(model)
    loaded, tokenizer = load_model(model).eval(), read_tokenizer(model)
    for item, case in zip(items, result["cases"], strict=True):
        sums = [log_probability(loaded, tokenizer, item["prompt"], choice) for choice in item["choices"]]
        a_letter = [total / len(choice) for total, choice in zip(sums, item["choices"], strict=True)]
        right = {"acc": sums.index(max(sums)), "acc_norm": a_letter.index(max(a_letter))}
        assert case["out"] == {metric: float(best == item["answer"]) for metric, best in right.items()}
    row = result["tasks"]["choosing"]
    assert row["metric"] == "acc_norm", "where a task has it, it judges"
    assert row["out"] == sum(case["out"]["acc_norm"] for case in result["cases"]) / ITEMS
    assert (row["of"], row["version"], row["fewshot"]) == (ITEMS, 2.0, 0)
    assert "drop" not in row
    assert str(result).splitlines()[1].split() == ["choosing", "acc_norm", str(ITEMS), f"{row['out']:.4g}"]


def test_what_is_written_is_what_generate_writes(model, writing, items, monkeypatch):
    loaded, tokenizer, seen = load_model(model).eval(), read_tokenizer(model), {}
    keep = asking._AnswerHook.add_partial

    def note(self, kind, request, answer):
        seen[request[0]] = answer
        keep(self, kind, request, answer)

    monkeypatch.setattr(asking._AnswerHook, "add_partial", note)
    result = tasks(writing, batch=4).measure(model)
    for item, case in zip(items, result["cases"], strict=True):
        ids = torch.tensor([tokenizer(item["prompt"])["input_ids"]])
        done = loaded.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        written = tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True)
        assert seen[item["prompt"]] == written
        assert case["out"] == {"exact_match": float(written == item["choices"][0])}


def test_a_model_is_compared_with_its_base_item_by_item(model, merged, choosing, writing):
    result = tasks(choosing, writing, limit=6).measure(merged, model)
    cases = [case for case in result["cases"] if case["task"] == "choosing"]
    assert [case["item"] for case in cases] == list(range(6))
    drops = [case["base"]["acc_norm"] - case["out"]["acc_norm"] for case in cases]
    row = result["tasks"]["choosing"]
    assert row["drop"] == pytest.approx(sum(drops) / 6, abs=1e-12)
    assert (row["worse"], row["better"]) == (drops.count(1.0), drops.count(-1.0))
    assert row["low"] < row["drop"] < row["high"]
    alone = tasks(choosing, writing, limit=6).measure(model)
    assert {name: each["out"] for name, each in alone["tasks"].items()} == {
        name: each["base"] for name, each in result["tasks"].items()
    }
    assert tasks(choosing).measure(model, model)["tasks"]["choosing"]["drop"] == 0


@pytest.mark.parametrize(("worse", "better", "same"), [(12, 0, 0), (0, 0, 10), (3, 1, 6), (0, 4, 0), (7, 0, 93)])
def test_the_interval_of_shares_is_agresti_and_mins(worse, better, same):
    low, high = paired_interval([1.0] * worse + [-1.0] * better + [0.0] * same, shares=True)
    more, less, of = (
        worse + 0.5,
        better + 0.5,
        worse + better + same + 2,
    )  # the four cells, each with half an item more
    middle = (more - less) / of
    spread = 1.959964 * math.sqrt(more + less - (more - less) ** 2 / of) / of
    bounds = (max(-1.0, middle - spread), min(1.0, middle + spread))  # a difference of two shares is no larger
    assert (low, high) == pytest.approx(bounds, abs=1e-12)


def test_the_interval_of_other_scores_is_that_of_a_mean():
    drops = [0.5, -1.25, 3.0, 2.0, 0.0]
    low, high = paired_interval(drops, shares=False)
    values = torch.tensor(drops, dtype=torch.float64)
    spread = 1.959964 * values.std().item() / math.sqrt(5)
    assert (low, high) == pytest.approx((values.mean().item() - spread, values.mean().item() + spread), abs=1e-12)


def test_examples_and_a_metric_of_a_corpus(model, merged, tmp_path, items):
    rolling = write_task(
        tmp_path, "rolling", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="prompt",
        metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    row = tasks(rolling).measure(merged, model)["tasks"]["rolling"]
    assert (row["metric"], row["higher_is_better"]) == ("word_perplexity", False)
    assert row["drop"] == row["out"] - row["base"], "a higher perplexity is a drop"
    assert "low" not in row, "no mean over items, so no interval of one"
    loaded, tokenizer = load_model(model).eval(), read_tokenizer(model)
    total = 0.0
    for item in items:
        ids = tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():  # lm-eval begins a text with the token before which nothing stands
            rows = loaded(input_ids=torch.tensor([[1, *ids]])).logits[0].double().log_softmax(-1)
        total += sum(rows[place, token].item() for place, token in enumerate(ids))
    words = sum(len(item["prompt"].split()) for item in items)
    assert row["base"] == pytest.approx(math.exp(-total / words), rel=1e-4)


# --- both ways to load ----------------------------------------------------------------------------------------------


def test_lm_evals_own_command_scores_the_same(model, tmp_path, choosing, writing):
    package.apply("streaming", model, output=tmp_path / "out", check=False, evaluate=False, sinks=1, window=3)
    result = tasks(choosing, writing, both_ways=True).measure(tmp_path / "out", model)
    assert result["by_others"] == {"same": 2 * ITEMS, "of": 2 * ITEMS}
    assert "gives the same score for 18 of 18 items" in str(result)
    other = tasks(choosing).measure(model)["cases"]
    mine = [case for case in result["cases"] if case["task"] == "choosing"]
    assert [case["out"] for case in other] == [case["base"] for case in mine]


# --- an interrupted run ---------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(model, merged, choosing, writing, monkeypatch):
    whole = tasks(choosing, writing).measure(merged, model).to_dict()
    for file in (model.parent / "cache/answers").iterdir():
        file.unlink()

    class Stopped(BaseException):
        """As Ctrl-C is: other errors inside lm-eval are told as lm-eval's."""

    def stop(done, total, label):
        if label.endswith("now the converted model") and done >= 60:
            raise Stopped

    with pytest.raises(Stopped):
        tasks(choosing, writing).measure(merged, model, progress=stop)
    files = sorted((model.parent / "cache/answers").iterdir())
    kept = [len(file.read_text().splitlines()) for file in files]
    assert len(kept) == 2
    assert min(kept) < max(kept) == 4 * ITEMS + ITEMS, "of the base all, of the model a part"
    with files[0].open("a") as file:
        file.write('["cut off')
    asked = []
    add = asking._AnswerHook.add_partial
    monkeypatch.setattr(asking._AnswerHook, "add_partial", lambda self, *rest: (asked.append(1), add(self, *rest)))
    assert tasks(choosing, writing).measure(merged, model).to_dict() == whole
    assert len(asked) == max(kept) - min(kept), "what was answered is not asked again"


def test_answers_are_of_one_model_one_tokenizer_and_one_kind_of_device(model, merged, monkeypatch):
    tokenizer = read_tokenizer(model)
    names = {asking.answers_file(model, tokenizer, 1), asking.answers_file(merged, tokenizer, 1)}
    names.add(asking.answers_file(model, tokenizer, 2))
    tokenizer.add_tokens(["new"])
    names.add(asking.answers_file(model, tokenizer, 1))

    def change(tensors) -> None:  # of one head, which no sample of bytes need hold
        weight = tensors["model.layers.1.self_attn.q_proj.weight"] = tensors[
            "model.layers.1.self_attn.q_proj.weight"
        ].clone()
        weight[16:24] = 0

    edit_tensors(model, change)
    names.add(asking.answers_file(model, read_tokenizer(merged), 1))
    assert len(names) == 5
    for kind in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(asking, "accelerators", lambda kind=kind: [torch.device(kind, 0)])
        names.add(asking.answers_file(model, read_tokenizer(merged), 1))
    assert len(names) == 8


def test_a_loaded_base_beside_a_folder(model, merged, choosing):
    """The answers of the base are not kept as those of the folder."""
    folders = tasks(choosing).measure(merged, model)["tasks"]
    for file in (model.parent / "cache/answers").iterdir():
        file.unlink()
    mixed = tasks(choosing).measure(merged, load_model(model), tokenizer=read_tokenizer(model))["tasks"]
    assert mixed == folders
    assert tasks(choosing).measure(merged, model)["tasks"] == folders


def test_a_model_of_nan_is_broken_and_not_scored_by_chance(model, merged, choosing):
    broken = load_model(model)
    for weight in broken.parameters():
        weight.data.fill_(math.nan)
    result = tasks(choosing).measure(broken, model, tokenizer=read_tokenizer(model))
    assert f"NaN or infinite values for {ITEMS} of {ITEMS} items" in str(result)
    with pytest.raises(SurgeryError, match="the base model itself gives NaN"):
        tasks(choosing).measure(merged, broken, tokenizer=read_tokenizer(model))


@pytest.fixture
def broken(model):
    """The model with NaN in every weight, loaded."""
    result = load_model(model)
    for weight in result.parameters():
        weight.data.fill_(math.nan)
    return result


def test_what_a_model_of_nan_scores_are_misses(model, broken, tmp_path, items):
    """NaN likelihoods rank the first choice best, and a written text may hold the answer by chance."""
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(each | {"answer": 0}) + "\n" for each in items))
    choosing = write_task(
        tmp_path, "choosing", output_type="multiple_choice", doc_to_text="prompt", doc_to_choice="choices",
        doc_to_target="answer", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    result = tasks(choosing).measure(broken, model, tokenizer=read_tokenizer(model))
    assert result["tasks"]["choosing"]["out"] == 0.0
    assert all(case["out"] == {"acc": 0.0} for case in result["cases"])


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_nan_in_what_is_written_is_seen(model, merged, broken, tmp_path, items, batch, drawn):
    kwargs = {"until": ["zzz"], "max_gen_toks": 3, "do_sample": drawn} | ({"temperature": 1.0} if drawn else {})
    writing = write_task(
        tmp_path, "writing", output_type="generate_until", doc_to_text="prompt", doc_to_target="{{choices[0]}}",
        generation_kwargs=kwargs, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    tokenizer = read_tokenizer(model)
    asked = tasks(writing, batch=batch)
    result = asked.measure(broken, model, tokenizer=tokenizer)
    assert f"out gives NaN or infinite values for {ITEMS} of {ITEMS} items: misses" in str(result)
    with pytest.raises(SurgeryError, match="the base model itself gives NaN"):
        asked.measure(merged, broken, tokenizer=tokenizer)
    assert "NaN" not in str(asked.measure(merged, model))


def test_one_bad_answer_is_the_one_that_is_told_also_from_the_kept_answers(model, writing, items):
    """One word has an infinite embedding. Requests are asked in batches, and not in the order of the items."""
    word, tokenizer = "rain", read_tokenizer(model)
    for number, item in enumerate(items):
        item["prompt"] = " ".join(each for each in item["prompt"].split() if each != word) or "the"
        item["prompt"] += f" {word}" if number == 4 else ""
    (model.parent / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]

    def change(tensors) -> None:
        table = tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        table[token] = math.inf

    sound = shutil.copytree(model, model.parent / "sound")
    edit_tensors(model, change)
    first = tasks(writing, batch=2).measure(model, sound)
    again = tasks(writing, batch=2).measure(model, sound)
    for result in (first, again):
        assert f"NaN or infinite values for 1 of {ITEMS} items" in str(result)
        assert [score.broken for score in result.outcomes["out"]] == [number == 4 for number in range(ITEMS)]


def test_two_names_of_one_task_and_prompts_that_are_cut(model, merged, tmp_path, items, choosing, writing):
    (tmp_path / "again.yaml").write_text((tmp_path / "choosing.yaml").read_text())
    with pytest.raises(SurgeryError, match="has the task choosing, which another name has too"):
        tasks(choosing, str(tmp_path / "again.yaml")).measure(model)
    long = [item | {"prompt": " ".join(WORDS * 80)} for item in items]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(each) + "\n" for each in long))
    says = "2 prompts longer, with the answer, than the model takes: lm-eval cut the beginning off"
    for _ in range(2):  # the second time all answers are known
        assert says in str(tasks(choosing, limit=2).measure(merged, model))
    positions = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    for words, cut in ((positions - 4, False), (positions - 3, True)):  # the answer may have 4 tokens
        long = [item | {"prompt": " ".join((WORDS * 80)[:words])} for item in items]
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(each) + "\n" for each in long))
        assert ("1 prompt longer" in str(tasks(writing, limit=1).measure(model))) is cut


def test_a_group_has_a_row_of_its_own(model, merged, tmp_path, choosing, monkeypatch):
    second = tmp_path / "second.yaml"
    second.write_text((tmp_path / "choosing.yaml").read_text().replace("task: choosing", "task: second"))
    monkeypatch.setattr(task_set.TaskSet, "groups", lambda self: {"both": ["choosing", "second"], "none": ["other"]})
    rows = tasks(choosing, str(second)).measure(merged, model)["tasks"]
    one, both = rows["choosing"], rows["both"]
    assert "none" not in rows
    assert (both["of"], both["tasks"], both["metric"]) == (2 * ITEMS, 2, "acc_norm")
    assert both["drop"] == pytest.approx(one["drop"])
    assert both["high"] - both["low"] < one["high"] - one["low"], "twice the items"


def test_a_file_of_a_group(model, merged, tmp_path, choosing):
    """With a task of another file of its folder and one of its own."""
    own = yaml.safe_load((tmp_path / "choosing.yaml").read_text()) | {"task": "own", "doc_to_target": "{{answer % 2}}"}
    rule = {"metric": "acc", "weight_by_size": True}
    file = tmp_path / "ours.yaml"
    file.write_text(yaml.safe_dump({"group": "ours", "task": ["choosing", own], "aggregate_metric_list": [rule]}))
    result = tasks(str(file)).measure(merged, model)
    rows, members = result["tasks"], ("choosing", "ours::own")
    assert set(rows) == {"ours", *members} == task_index.row_names([str(file)])
    right = [case["out"]["acc"] for case in result["cases"]]
    assert len(right) == 2 * ITEMS
    assert rows["ours"]["out"] == pytest.approx(sum(right) / len(right))
    cases = [case for case in result["cases"] if case["task"] == "choosing"]
    assert rows["choosing"]["out"] == pytest.approx(sum(case["out"]["acc_norm"] for case in cases) / ITEMS)
    words = command("M", result.tasks, task_set.Asking())
    assert words[words.index("--tasks") + 1] == "ours"
    assert words[words.index("--include_path") + 1] == str(tmp_path.resolve())


@pytest.mark.slow
def test_lm_evals_own_command_reads_the_file_of_a_group(model, merged, tmp_path, choosing):
    result = tasks(group_file(tmp_path, "ours.yaml", "ours", "[choosing]"), both_ways=True).measure(merged, model)
    assert result["by_others"] == {"same": ITEMS, "of": ITEMS}


def test_files_of_groups_in_two_folders_are_refused_before_a_model_is_converted(refused, model, tmp_path):
    files = [tmp_path / "one/a.yaml", tmp_path / "two/b.yaml"]
    for file in files:
        file.parent.mkdir()
        file.write_text(f"group: {file.stem}\ntask: [piqa]\n")
    says = ["a.yaml and", "b.yaml are groups of tasks in two folders", "put them into one folder"]
    refused("eval", model, "--tasks", ",".join(map(str, files)), says=says, has_json=False)


def group_file(folder, name: str, group: str, tasks: str):
    (folder / name).write_text(f"group: {group}\ntask: {tasks}\n")
    return str(folder / name)


def test_a_group_that_lm_eval_would_take_from_another_place_is_refused(model, tmp_path, choosing):
    first, again = (group_file(tmp_path, name, "ours", "[choosing]") for name in ("a.yaml", "b.yaml"))
    assert set(tasks(first).measure(model)["tasks"]) == {"ours", "choosing"}
    with pytest.raises(SurgeryError, match=r"the group ours of .*b.yaml is also that of .*a.yaml"):
        tasks(again).measure(model)
    assert task_index.row_names([again]) is None
    with pytest.raises(SurgeryError, match=r"a file NAME\.yaml alone"):
        tasks(group_file(tmp_path, "c.yml", "mmlu", "[choosing]")).measure(model)
    with pytest.raises(SurgeryError, match=r"the group of .*d.yaml has no tasks"):
        tasks(group_file(tmp_path, "d.yaml", "none", "choosing")).measure(model)


def test_a_file_with_a_class_is_a_task(tmp_path):
    """lm-eval takes it for a task although it has a group, as its own files of SCROLLS do."""
    file = tmp_path / "own.yaml"
    file.write_text("group: ours\ntask: own\nclass: !function own.Own\n")
    assert task_index.group_of_file(str(file)) == ""


@pytest.mark.parametrize(
    ("rules", "metric", "figures"),
    [
        ([], "acc_norm", (0.6, 0.4)),  # over the items, by the metric that judges the tasks
        ([("acc", True)], "acc", (0.4, 0.2)),
        ([("acc", False)], "acc", (0.625, 0.125)),  # over the tasks: (1/4 + 1) / 2, (1/4 + 0) / 2
        ([("f1", True)], None, ()),
    ],
)
def test_a_group_is_judged_as_its_file_says(rules, metric, figures):
    """By the metric that it names, over the items or over its tasks, as lm-eval reports it."""

    def mean(values):
        return sum(values) / len(values)

    task = SimpleNamespace(
        config=SimpleNamespace(metadata=None, num_fewshot=0), higher_is_better=dict,
        aggregation=lambda: {"acc": mean, "acc_norm": mean},
    )  # fmt: skip
    members = {"long": task, "short": task}
    listed = [SimpleNamespace(metric=name, weight_by_size=by_size) for name, by_size in rules]
    group = SimpleNamespace(
        get_all_tasks=lambda: [SimpleNamespace(task_name=name) for name in members], aggregate_metric_list=listed
    )
    cases = [("long", number) for number in range(4)] + [("short", 0)]
    scores = {"base": {"acc": [1, 0, 0, 0, 1], "acc_norm": [1, 1, 0, 0, 1]}}
    scores |= {"out": {"acc": [1, 0, 0, 0, 0], "acc_norm": [1, 1, 0, 0, 0]}}
    outcomes = {
        side: [task_set.ItemScore({name: each[name][index] for name in each}, "") for index in range(5)]
        for side, each in scores.items()
    }
    chosen = task_set.TaskSet({"tasks": members, "groups": {"ours": group}}, ("ours",))
    rows = TaskResult("done", {}, cases, outcomes=outcomes, tasks=chosen).compare()
    if metric is None:
        assert "ours" not in rows
        return
    row = rows["ours"]
    assert (row["metric"], row["base"], row["out"]) == (metric, *map(pytest.approx, figures))
    assert row["drop"] == pytest.approx(figures[0] - figures[1])
    assert ("low" in row) == (figures != (0.625, 0.125)), "the interval is of a mean over the items"


def test_errors_inside_lm_eval_are_told(refused, model, choosing, tmp_path, items):
    (tmp_path / "cache/answers").mkdir(parents=True)
    says = ["chat=true needs a chat template"]
    refused("eval", model, "--probe", "tasks", f"names={choosing}", "chat=true", says=says, has_json=False)
    says = ["lm-eval cannot run these tasks"]
    refused("eval", model, "--probe", "tasks", f"names={choosing}", "fewshot=100", says=says, has_json=False)


def test_drawn_answers_are_not_kept(model, tmp_path, items):
    drawn = write_task(
        tmp_path, "drawn", output_type="generate_until", doc_to_text="prompt", doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["zzz"], "max_gen_toks": 3, "do_sample": True, "temperature": 1.0},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    assert asking._is_drawn(("prompt", {"temperature": 5.0}))
    assert not asking._is_drawn(("prompt", {"temperature": 0.0}))
    assert not asking._is_drawn(("prompt", {"temperature": 5.0, "do_sample": False}))
    state = torch.get_rng_state(), random.getstate()
    tasks(drawn).measure(model)
    assert not any((tmp_path / "cache/answers").glob("*"))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1], "the caller's random numbers are not touched"


# --- memory ---------------------------------------------------------------------------------------------------------


def needed(monkeypatch, probe, *models) -> list[int]:
    """Bytes that each model is said to need besides its weights."""
    asked = []
    monkeypatch.setattr("surgery.evaluation.paired.too_big", lambda weights, extra: (asked.append(extra), "")[1])
    probe.measure(*models)
    return asked


def test_the_memory_of_logits_is_counted(model, merged, tmp_path, items, choosing, writing, monkeypatch):
    config = load_model(model).config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4  # keys and values, float32
    of_logits = 2 * 3 * 512 * config.vocab_size * 4  # two copies, a batch of 3, prompts of 512 tokens
    base, out = needed(monkeypatch, tasks(choosing, batch=3, limit=1), merged, model)
    assert base == 2 * 3 * 512 * token + of_logits
    assert base - out == 2 * 3 * 512 * token * 2 // 3, "one KV head of three"
    assert needed(monkeypatch, tasks(writing, batch=3, limit=1), model) == [2 * 3 * 512 * token], "only of one token"
    (tmp_path / "items.jsonl").write_text(json.dumps({"prompt": " ".join(WORDS * 200)}) + "\n")
    rolling = write_task(
        tmp_path, "rolling", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="prompt",
        metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    (bytes_,) = needed(monkeypatch, tasks(rolling), model)
    assert bytes_ == 2 * 512 * token + 2 * config.max_position_embeddings * config.vocab_size * 4


def test_a_plan_shows_the_memory_of_logits(tiny_llama):
    from surgery.conversion.estimate import estimate

    def memory(**settings):
        probes = {"perplexity": {"windows": 1, "length": 64}, "tasks": settings}
        recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
        plan = package.plan(recipe | {"evaluate": {"probes": probes}}, str(tiny_llama))
        return {each.stage: each.memory_bytes for each in estimate(plan).stages}["tasks"], plan.before

    one, anatomy = memory(names=["piqa"])
    many, _ = memory(names=["piqa"], batch=65)
    width = {"F32": 4, "BF16": 2, "F16": 2}[anatomy.dtype]
    assert many - one == 2 * 64 * 512 * anatomy.config.vocab_size * width
    assert memory(ruler=[256])[0] < one, "what is written needs the logits of one token"


# --- RULER ----------------------------------------------------------------------------------------------------------


class Documents(dict):
    """The items of a RULER task as far as `TaskSet` reads them."""

    def __len__(self):
        return len(self["max_length"])


def test_of_every_length_the_first_items_are_asked():
    task = SimpleNamespace(eval_docs=Documents(max_length=[4096] * 5 + [8192] * 5))
    chosen = task_set.TaskSet({"tasks": {"ruler_vt": task}, "groups": {}}, ("ruler_vt",), (4096, 8192))
    assert chosen.items(2) == {"ruler_vt": [0, 1, 5, 6]}
    scores = [task_set.ItemScore({"4096": 0.5, "8192": -1.0}, ""), task_set.ItemScore({"4096": -1.0, "8192": 1.0}, "")]
    assert [score.number("4096") for score in scores] == [0.5, None]
    assert chosen.metrics("ruler_vt", scores) == ["4096", "8192"]


def test_a_length_that_rulers_tasks_do_not_name_is_summed_up_as_the_others():
    task = SimpleNamespace(aggregation=lambda: {"4096": lambda values: sum(values) / len(values)})
    chosen = task_set.TaskSet({"tasks": {"ruler_vt": task, "mine": task}, "groups": {}}, ("ruler_vt",), (1024,))
    scores = [task_set.ItemScore({"1024": value}, "") for value in (0.5, 1.0, 0.0)]
    assert chosen.total("ruler_vt", "1024", scores) == 0.5
    with pytest.raises(SettingError, match="mine gives 1024, and does not say"):
        chosen.total("mine", "1024", scores)


def test_another_length_of_ruler_joins_the_record():
    def record(length, names) -> dict:
        row = {"metric": str(length), "of": 2, "base": 1.0, "out": 0.5, "drop": 0.5}
        side = {"ruler_vt": {str(length): 1.0}}
        settings = {"names": names, "ruler": [length]}
        return {"status": "done", "tasks": {f"ruler_vt {length}": row}, "base": side, "out": side, "items": 2} | {
            "settings": settings
        }

    joined = make("tasks", {"ruler": [4096]}).joined(record(4096, []), record(1024, ["piqa"]))
    assert joined["settings"] == {"names": ["piqa"], "ruler": [4096, 1024]}
    assert list(joined["tasks"]) == ["ruler_vt 4096", "ruler_vt 1024"]
    assert joined["base"] == {"ruler_vt": {"4096": 1.0, "1024": 1.0}}
    assert joined["items"] == 4


@pytest.mark.slow
def test_a_task_of_ruler_at_a_length_of_its_own(tiny, monkeypatch):
    """Prompts and rules are those of lm-eval."""
    monkeypatch.setattr(task_set, "RULER", ("niah_single_1",))
    found = package.evaluate(tiny, tiny, probe="tasks", ruler=[1000], limit=2)
    score = found["tasks"]["niah_single_1 1000"]
    assert (score["metric"], score["of"], score["base"], score["out"], score["drop"]) == ("1000", 2, 0.0, 0.0, 0.0)


def test_tasks_of_ruler_that_the_network_does_not_give_are_left_out(model, monkeypatch):
    tried = []

    def load(manager, name):
        tried.append(name)
        if name not in task_set.RULER_OFFLINE:
            raise NetworkError("the essays are not here")
        return {"tasks": {name: name}, "groups": {}, "group_map": {}}

    monkeypatch.setattr(task_set, "_load", load)
    found = task_set.load_tasks((), (512,), read_tokenizer(model))
    assert set(found.loaded["tasks"]) == set(task_set.RULER_OFFLINE)
    first, *others = found.left_out.values()
    assert first == "the essays are not here"
    assert set(others) == {"not tried, since the essays are not here"}
    assert {*found.left_out, *task_set.RULER_OFFLINE} == set(task_set.RULER)
    assert len(tried) == 1 + len(task_set.RULER_OFFLINE), "the network is tried once"
    with pytest.raises(NetworkError, match="essays"):
        task_set.load_tasks(("niah_single_2",), (512,), read_tokenizer(model))


def test_tasks_of_ruler_that_cannot_be_made_at_a_length_are_left_out(model, monkeypatch):
    def load(manager, name):
        if name != "ruler_vt":
            raise SettingError("it leaves no room for the prompt")
        return {"tasks": {name: name}, "groups": {}, "group_map": {}}

    monkeypatch.setattr(task_set, "_load", load)
    found = task_set.load_tasks((), (512,), read_tokenizer(model))
    assert set(found.loaded["tasks"]) == {"ruler_vt"}
    assert set(found.left_out.values()) == {"it leaves no room for the prompt"}
    with pytest.raises(SettingError, match="no room"):
        task_set.load_tasks(("niah_single_1",), (512,), read_tokenizer(model))
    monkeypatch.setattr(task_set, "RULER", ("niah_single_1",))
    with pytest.raises(SettingError, match=r"no task of RULER could be made\n.*no room"):
        task_set.load_tasks((), (512,), read_tokenizer(model))


def test_what_nltk_prints_when_a_task_is_imported_is_not_seen(capsys, monkeypatch):
    import nltk

    message = nltk.downloader.ErrorMessage(None, "no network")
    monkeypatch.setattr(nltk.downloader.Downloader, "incr_download", lambda *args, **options: iter([message]))
    nltk.download("punkt_tab", print_error_to=sys.stderr)
    assert "[nltk_data] no network" in capsys.readouterr().err, "what would be seen"
    with task_set.quiet():
        nltk.download("punkt_tab")
    assert capsys.readouterr() == ("", "")


def test_data_of_nltk_that_are_missing_are_told_in_a_line():
    import nltk

    def load(names):
        nltk.data.find("tokenizers/of_nobody")

    with pytest.raises(NetworkError, match="the task niah_single_2 needs data of nltk") as caught:
        task_set._load(SimpleNamespace(load=load), "niah_single_2")
    assert len(str(caught.value)) < 300


def test_prompts_longer_than_the_model(refused, model):
    refused("eval", model, "--ruler", "4096", says=["out has 1024 positions, RULER's prompts have 4096 tokens"])


# --- gate, record, card ---------------------------------------------------------------------------------------------


def test_the_gate_bounds_each_task():
    def judged(limits, **drops):
        done = {"status": "done", "tasks": {name: {"drop": drop, "out": 0.5} for name, drop in drops.items()}}
        evaluation = {"status": "done", "out": {"perplexity": 2.0}, "base": {"perplexity": 2.0}, "tasks": done}
        return gate(evaluation, {"max_drop": limits})

    assert judged({"piqa": 0.01}, piqa=0.01) == ("passed", [])
    assert judged({"piqa": 0.01}, piqa=-0.2) == ("passed", [])
    assert judged({"piqa": 0.01}, piqa=0.02) == ("failed", ["max_drop piqa: 0.02, the limit is 0.01"])
    assert judged({"piqa": 0.01}, boolq=0.0) == ("not run", ["max_drop piqa: not measured; measured: boolq"])
    assert judged({"piqa": 0.01, "boolq": 0.1}, piqa=0.0, boolq=0.2)[0] == "failed"
    assert judged({"piqa": 0.01}, piqa=None) == ("failed", ["max_drop piqa: the figure is not a number"])
    for wrong in ({"piqa": "x"}, {"piqa": True}, 0.1):
        with pytest.raises(SurgeryError, match="not a number for each item"):
            judged(wrong, piqa=0.0)


@pytest.mark.parametrize(("limit", "code", "status"), [(1.0, 0, "passed"), (0.0, 3, "failed")])
def test_a_recipe_asks_for_tasks_and_bounds_them(surgery, model, text, choosing, monkeypatch, limit, code, status):
    drop = {"choosing": {"drop": 0.25, "base": 0.75, "out": 0.5, "metric": "acc", "of": 4, "low": 0.1, "high": 0.4}}
    blocks = {"perplexity": {"windows": 1, "length": 64}, "tasks": {"max_drop": {"choosing": limit}}}
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    (text.parent / "r.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": {"text": text.name, "probes": blocks}}))
    monkeypatch.setattr("surgery.evaluation.harness.scores.TaskResult.compare", lambda self: drop)
    named = f"evaluate.probes.tasks.names=[{choosing}]"
    ran = surgery("apply", "r.yaml", model, "-o", "out", named, "--no-check")
    assert ran.code == code, ran.err
    assert f"drop of choosing 0.250 {'≤' if code == 0 else '>'} {limit}" in ran.out
    record = json.loads((text.parent / "out/surgery.json").read_text()) if code == 0 else None
    if record:
        assert record["gate"] == {"status": status, "limits": {"max_drop": {"choosing": limit}}, "reasons": []}
        assert record["evaluation"]["tasks"]["tasks"] == drop


def test_figures_join_record_and_card(surgery, model, text, choosing, writing):
    ran = surgery(
        "apply", "streaming", model, "-o", "out", "sinks=1", "window=3", "--no-check", "--no-gate",
        f"evaluate={{text: {text.name}, windows: 1, length: 64}}",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    first = surgery("eval", "out", "--base", model, "--tasks", choosing)
    assert first.code == 0, first.err
    assert "not added" not in first.out
    second = surgery("eval", "out", "--base", model, "--tasks", f"{choosing},{writing}", "--limit", 3)
    assert second.code == 0, second.err
    data = json.loads((text.parent / "out/surgery.json").read_text())["evaluation"]["tasks"]
    assert {name: row["of"] for name, row in data["tasks"].items()} == {"choosing": ITEMS, "writing": 3}
    assert set(data["base"]) == set(data["out"]) == {"choosing", "writing"}
    assert data["settings"]["names"] == ["choosing.yaml", "writing.yaml"], "a record is published: no folders"
    third = surgery("eval", "out", "--base", model, "--tasks", writing)
    assert "not added to the card, which keeps the scores that it has" in third.out
    card = (text.parent / "out/README.md").read_text()
    assert f"choosing {data['tasks']['choosing']['drop']:.4f} (" in card
    front = yaml.safe_load(card.split("---")[1])
    metrics = {each["dataset"]["name"]: each["metrics"] for each in front["model-index"][0]["results"]}
    value = round(data["tasks"]["choosing"]["out"], 4)
    assert metrics["choosing"][0] | {"args": None} == {
        "type": "acc_norm", "name": "acc_norm", "value": value, "args": None
    }  # fmt: skip


def test_json_is_not_mixed_with_what_tasks_print(surgery, model, tmp_path, items):
    (tmp_path / "loud.py").write_text(
        "from datasets import Dataset\n"
        "def read(**_):\n"
        "    print('Max length')\n"
        f"    return {{'test': Dataset.from_list({items!r})}}\n"
    )
    (tmp_path / "loud.yaml").write_text(
        "task: loud\ncustom_dataset: !function loud.read\ndataset_path: ''\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n"
    )
    ran = surgery("eval", model, "--tasks", "loud.yaml", "--json")
    assert ran.json["tasks"]["loud"]["of"] == ITEMS
    assert ran.err == ""


# --- our questions as tasks of lm-eval ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("choices", {"items": 8, "context": 12}),
        ("needles", {"lengths": [300], "secret": "digits", "samples": 1, "form": "plain"}),
    ],
)
def test_our_questions_are_scored_alike(tmp_path, name, settings):
    from families import TINY
    from tokenizers_of_bytes import byte_tokenizer

    folder, tokenizer = tmp_path / "bytes", byte_tokenizer()
    TINY["llama"](vocab_size=300, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = write(make(name, settings), folder, tmp_path / "made")
    own = make(name, settings).measure(folder)
    assert (written.items, written.left_out) == (len(own.cases), 0)
    cases = tasks(str(written.file)).measure(folder)["cases"]
    field = "right" if name == "choices" else "hit"
    assert [case["out"]["acc"] for case in cases] == [float(case["out"][field]) for case in own["cases"]]
    with pytest.raises(SurgeryError, match="exists already"):
        write(make(name, settings), folder, tmp_path / "made")


def test_what_lm_eval_would_score_otherwise_is_left_out(refused, surgery, model, tmp_path, items):
    says = ["lm-eval would read every question as other tokens, or score it otherwise"]
    same = [{"prompt": "the cat", "choices": ["sat on", "sat"], "answer": 0}] * 3
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in same))
    refused("eval", model, "--probe", "choices", "labelled=q.jsonl", "--write-task", "made", says=says, has_json=False)
    says = ["perplexity cannot be written as a task", "choices, "]
    refused("eval", model, "--write-task", "made", says=says, has_json=False)
    assert surgery("eval", model, "--probe", "needles", "late=true", "--write-task", "made").code == 2
    assert surgery("eval", model, "--probe", "needles", "--base", model, "--write-task", "made").code == 2
    equal = [*same, {"prompt": "the cat", "choices": ["sat", "ran"], "answer": 1}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in equal))
    ran = surgery("eval", model, "--probe", "choices", "labelled=q.jsonl", "--write-task", "made")
    assert "made/surgery_choices.yaml: 1 items; 3 left out" in ran.out


# --- what is refused ------------------------------------------------------------------------------------------------


REFUSED = {
    "no such task": (
        ("--tasks", "piqaa"),
        ["lm-eval has no task 'piqaa'", "tasks and groups", "did you mean 'piqa'?"],
    ),
    "no such file": (("--tasks", "mine.yaml"), ["there is no task file mine.yaml"]),
    "both at once": (("--tasks", "piqaa,mine.yaml"), ["no task 'piqaa'", "no task file mine.yaml"]),
    "no name": (("--tasks", ""), ["no task is named", "lm_eval ls tasks"]),
    "no name at all": (("--probe", "tasks"), ["no task is named"]),
    "two probes": (("--tasks", "piqa", "--needles"), ["use either --needles or --tasks, not both"]),
    "a limit alone": (("--limit", "3"), ["--limit is only for tasks", "add --tasks"]),
    "no items": (("--probe", "tasks", "names=piqa", "limit=0"), ["limit should be at least 1; it is 0"]),
    "not a task": (("--tasks", "bad.yaml"), ["lm-eval cannot load the task bad.yaml", "check the file"]),
    "no data": (("--tasks", "lost.yaml"), ["lm-eval cannot load the task lost.yaml", "nowhere.jsonl"]),
    "code": (("--tasks", "code.yaml"), ["runs the code that a model writes, which is refused"]),
    "flag and name": (("--probe", "tasks", "--limit", "3"), ["use either --limit or --probe", "write limit=..."]),
    "a folder it is not": (("--probe", "tasks", "names=piqa", "bath=2"), ["unknown key 'bath'", "batch"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses(refused, model, tmp_path, items, case):
    options, says = REFUSED[case]
    (tmp_path / "bad.yaml").write_text("task: bad\noutput_type: nonsense\n")
    keys = "output_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n"
    (tmp_path / "lost.yaml").write_text("task: lost\n" + keys + data % "nowhere.jsonl")
    (tmp_path / "code.yaml").write_text("task: code\nunsafe_code: true\n" + keys + data % "items.jsonl")
    (tmp_path / "cache").mkdir()
    refused("eval", model, *options, says=says, has_json=False)


def test_a_task_whose_data_are_on_the_hub(refused, model, tmp_path):
    refused(
        "eval", model, "--tasks", "piqa", code=5, has_json=False,
        says=["the data of the task piqa are not on this machine", "allow the network once"],
    )  # fmt: skip


def test_lm_eval_is_missing(model, choosing, monkeypatch):
    find = harness.importlib.util.find_spec
    monkeypatch.setattr(
        harness.importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    with pytest.raises(MachineError, match=r"attention-surgery\[eval\]") as caught:
        tasks(choosing).measure(model)
    assert caught.value.code == "missing-package"


def test_both_ways_need_a_folder(model, choosing):
    with pytest.raises(SurgeryError, match="both_ways needs a folder"):
        tasks(choosing, both_ways=True).measure(load_model(model), tokenizer=read_tokenizer(model))


def test_a_recipe_file_may_not_name_a_task_file(refused, model, tmp_path):
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    for names in (["piqa", "mine.yaml"], "piqa,mine.yml"):
        (tmp_path / "r.yaml").write_text(
            yaml.safe_dump(recipe | {"evaluate": {"probes": {"tasks": {"names": names}}}})
        )
        says = ["r.yaml:", "may not name a file of a task, which can run code", "name it in the command"]
        refused("plan", "r.yaml", model, says=says)
    asked = {"evaluate": {"probes": {"tasks": {"names": ["piqa"], "both_ways": True}}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | asked))
    says = ["may not set evaluate.probes.tasks.both_ways: it runs the code in the folder"]
    refused("plan", "r.yaml", model, says=says)


def test_a_recipe_with_unknown_tasks_is_refused_before_anything_is_converted(refused, model, tmp_path):
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    for block, says in (
        ({"names": ["piqaa"]}, "did you mean 'piqa'?"),
        ({"ruler": [4096]}, "RULER's prompts have 4096"),
    ):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": {"probes": {"tasks": block}}}))
        refused("apply", "r.yaml", model, "-o", "out", says=[says])


WRONG = {
    "a slip": ({"names": ["piqa"]}, "piqaa", ["max_drop bounds 'piqaa', which is not measured", "mean 'piqa'?"]),
    "another task": ({"names": ["piqa", "boolq"]}, "winogrande", ["boolq, piqa", "or measure it too"]),
    "a tag has no row": ({"names": ["ai2_arc"]}, "ai2_arc", ["bounds 'ai2_arc'", "arc_challenge, arc_easy"]),
    "not in the group": ({"names": ["mmlu_stem"]}, "mmlu_anatomyy", ["mmlu_abstract_algebra", "mean 'mmlu_anatomy'?"]),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("verb", [("plan",), ("apply", "-o", "out")])
def test_a_limit_of_what_is_not_measured_is_refused_at_once(refused, model, tmp_path, case, verb):
    """`refused` sees that nothing was written."""
    block, item, says = WRONG[case]
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    asked = {"probes": {"tasks": block | {"max_drop": {item: 0.01}}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": asked}))
    refused(verb[0], "r.yaml", model, *verb[1:], says=says)


def test_limits_of_ruler_name_the_length_and_are_read_without_lm_eval(refused, model, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "is_installed", lambda: False)
    recipe = {"version": 1, "name": "r", "operations": [{"op": "gqa", "kv_heads": 1, "method": "mean"}]}
    limit = {"ruler_vt": 0.1, "ruler_cwe 8192": 0.1, "ruler_fwe 4096": 0.1}
    asked = {"probes": {"tasks": {"ruler": [4096], "max_drop": limit}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": asked}))
    says = ["r.yaml:", "max_drop bounds 'ruler_cwe 8192', 'ruler_vt', which are not measured", "'ruler_cwe 4096'?"]
    refused("plan", "r.yaml", model, says=says)


def test_rows_of_groups_tags_and_files(tmp_path):
    """Each name stands for the rows that lm-eval makes of it; the groups here are lm-eval's own."""
    assert task_index.row_names(["piqa"]) == {"piqa"}
    assert task_index.row_names(["ai2_arc"]) == {"arc_easy", "arc_challenge"}
    mmlu = task_index.row_names(["mmlu"])
    assert {"mmlu", "mmlu_stem", "mmlu_abstract_algebra"} <= mmlu
    assert len(mmlu) == 1 + 4 + 57, "the group, its four groups and 57 subjects"
    assert "mmlu_generative::stem" in task_index.row_names(["mmlu_generative"]), "a group inside a group's file"
    file = tmp_path / "mine.yaml"
    file.write_text("task: mine\ndoc_to_text: !function mine.read\n")
    assert task_index.row_names([str(file)]) == {"mine"}
    file.write_text("group: ours\ntask: [piqa, {task: own, doc_to_text: x}]\n")
    assert task_index.row_names([str(file)]) == {"ours", "piqa", "ours::own"}
    file.write_text("include: other.yaml\n")
    assert task_index.row_names([str(file), "piqa"]) is None, "the file does not say"
    assert task_index.row_names([str(tmp_path / "none.yaml")]) is None


@pytest.mark.parametrize(
    "lines",
    [
        "group: [x, y]\ntask: own\n",
        "task: [piqa, hellaswag]\n",
        "group: {a: b}\n",
        "task: &t [{group: h, task: *t}]\n",
    ],
)
def test_a_file_that_names_nothing_in_strings_does_not_say(tmp_path, lines):
    """Older spellings of lm-eval, and a file that refers to itself."""
    file = tmp_path / "odd.yaml"
    file.write_text(lines)
    assert task_index.row_names([str(file)]) is None


def test_prompts_that_differ_are_not_compared(model, merged, choosing, monkeypatch):
    run, calls = asking.run, []

    def other_prompts(*args, **keys):
        calls.append(1)
        scores = run(*args, **keys)
        if len(calls) == 2:
            scores["choosing"][0] = task_set.ItemScore(scores["choosing"][0].values, "another")
        return scores

    monkeypatch.setattr("surgery.evaluation.probes.tasks.run", other_prompts)
    with pytest.raises(SurgeryError, match="asked different prompts for 1 of 9 items"):
        tasks(choosing).measure(merged, model)
