"""The command from end to end on a tiny model, what it does not import, and operations that others add."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEXT, listing

FAST = ("--no-check", "--no-eval")
SHIPPED = {"act", "duo-after-gqa", "duo-attention", "duo-with-sinks", "expand-kv", "gqa", "learned-sinks", "mae"}
SHIPPED |= {
    "mla",
    "mla-absorbed",
    "moh",
    "mqa",
    "prune-heads",
    "streaming",
    "zero-tuning",
    "sparse-prefill",
    "xattention",
    "flexprefill",
}
SHIPPED |= {"minference", "moba", "moba-heal", "streaming-delta", "sparse-duo"}
SHIPPED |= {"duo-heal", "gqa-distill", "gqa-uptrain", "learned-sinks-heal", "mae-heal", "moh-heal", "wgqa"}
SHIPPED |= {"adaptive-heads", "hip", "loki", "recycled", "tokenselect"}
SHIPPED |= {"evict", "evict-duo", "hybrid-swa", "hybrid-swa-heal", "low-rank-kv", "mla-heal", "snap", "task-kv"}
SCORED = ("evaluate.windows=1", "evaluate.length=16")


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory) -> Path:
    """A folder with a model, a text, and what `apply` made of them, checked and scored: copy it before changing it."""
    import surgery

    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "words.txt").write_text(TEXT, encoding="utf-8")
    settings = {"evaluate.text": str(folder / "words.txt"), "evaluate.windows": 1, "evaluate.length": 16}
    surgery.apply("mqa", folder / "model", output=folder / "out", **settings)
    return folder


@pytest.fixture
def out(made, tmp_path) -> Path:
    """A copy of that output, beside a model and a text."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True)) / "out"


def report_of(folder: Path) -> dict:
    return json.loads((folder / "surgery.json").read_text(encoding="utf-8"))


# --- listing ------------------------------------------------------------------------------------------------


def test_ls(surgery):
    shown = surgery("ls", "--all")
    assert shown.code == 0
    for word in ("expand-kv", "gqa", "mqa", "kv_heads", "required", "default mean", "KV heads after"):
        assert word in shown.out
    for word in ("mean | first | random", "whole number from 1", "number from 0 to 1", "uses", "default 240"):
        assert word in shown.out
    assert "default None" not in shown.out
    assert re.search(r"^mqa +gqa +One KV head", shown.out, re.MULTILINE)
    data = surgery("ls", "--json").json
    assert set(data["recipes"]) == SHIPPED
    assert data["uses"]["mqa"] == ["gqa"]
    assert data["operations"]["gqa"]["kv_heads"]["description"]
    assert data["broken"] == {}


def test_version_and_help(surgery):
    import surgery as package

    assert surgery("--version").out == f"{package.__version__}\n"
    for command in ("ls", "cp", "schema", "inspect", "plan", "apply", "heal", "check", "eval", "push", "doctor"):
        assert command in surgery("--help").out
        shown = surgery(command, "--help")
        assert shown.code == 0
        assert f"Usage: surgery {command}" in shown.out


def test_inspect(surgery, model):
    shown = surgery("inspect", model)
    assert re.search(r"^model: llama, 0.1M parameters, context 1,024, hidden size 72, BF16$", shown.out, re.M)
    assert "KV cache: 192 bytes per token (196.6 kB at 1,024 tokens)\n" in shown.out
    assert re.search(r"^gqa +surgical +KV 192 → 128 B/token +no$", shown.out, re.M)
    assert shown.out.splitlines()[-1] == f"next: surgery plan duo-attention {model}"
    facts = surgery("inspect", model, "--json")
    assert facts.err == ""
    assert facts.json["layers"][1]["heads"] == 9
    refused = {name: reasons for name, reasons in facts.json["recipes"].items() if reasons}
    assert set(facts.json["recipes"]) == set(SHIPPED)
    assert refused.pop("moba-heal")[0].endswith("last_layers_full is 3, and there are 2 layers: none becomes sparse")
    assert {"flexprefill", "xattention"} <= set(refused)
    assert {"gqa", "moba", "moh", "zero-tuning"}.isdisjoint(refused)
    long = [name for name, reasons in refused.items() if "rows of 2048 tokens are longer" in reasons[0]]
    assert long == ["gqa-distill", "hybrid-swa-heal"]
    short = [reasons[0] for name, reasons in refused.items() if name not in long]
    assert all("tokens unchanged, and this model takes 1,024" in reason for reason in short)


def test_plan_shows_old_and_new_and_touches_nothing(surgery, model, tmp_path):
    before = listing(tmp_path)
    shown = surgery("plan", "gqa", model, "kv_heads=1")
    assert "model.layers.0-1.self_attn" in shown.out
    assert "KV heads 3 → 1" in shown.out
    assert "k_proj.weight [24, 72] → [8, 72]" in shown.out
    assert "KV cache per token: 192 → 64 bytes" in shown.out
    data = surgery("plan", "gqa", model, "kv_heads=1", "--json")
    assert data.err == ""
    assert data.json["tier"] == "native"
    assert data.json["kv_bytes_per_token"] == {"before": 192, "after": 64}
    assert listing(tmp_path) == before


def test_doctor(surgery):
    shown, data = surgery("doctor").out, surgery("doctor", "--json").json
    assert "packages: torch" in shown
    assert data["packages"]["torch"]
    verdict = shown.splitlines()[-1]
    assert verdict.startswith("Everything works here. " if not data["problems"] else "Not everything works here: ")


def test_no_colour_codes_in_a_pipe(surgery, model, out, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    push = ("push", out, "me/x", "--dry-run")
    for args in (("ls",), ("ls", "gqa"), ("inspect", model), ("plan", "mqa", model), push, ("doctor",)):
        done = surgery(*args)
        assert done.code == 0, done.err
        assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_pipe_that_takes_no_arrows(encoding):
    """As on Windows, where a pipe is not UTF-8."""
    env = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "surgery", "ls"]
    for more in ([], ["--json"]):
        done = subprocess.run([*command, *more], capture_output=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        assert b"MHA" in done.stdout
    assert json.loads(done.stdout.decode(encoding))["recipes"]


# --- apply --------------------------------------------------------------------------------------------------


def test_apply_in_a_folder_with_spaces_and_other_letters(surgery, model, text, tmp_path):
    home = tmp_path / "Größe 模型 the best"
    home.mkdir()
    model.rename(home / "mein Modell")
    text.rename(home / "Wörter.txt")
    base, out = home / "mein Modell", home / "Ergebnis ü"
    settings = (f"evaluate.text={home / 'Wörter.txt'}", *SCORED)
    done = surgery(
        "apply",
        "gqa",
        base,
        "kv_heads=1",
        "method=mean",
        *settings,
        "evaluate.needles=0",
        "min_needles=null",
        "-o",
        out,
    )
    assert done.code == 0, done.err
    assert done.err == ""
    for line in (
        "KV heads 3 → 1 in 2 layers",
        "passed   hashes",
        "passed   generates",
        "changed: ",
        "cost:      perplexity",
    ):
        assert line in done.out
    assert done.out.splitlines()[-2].startswith("next:      ")
    report, card = report_of(out), (out / "README.md").read_text(encoding="utf-8")
    assert report["check"]["passed"] is True
    assert {item["status"] for item in report["check"]["items"]} == {"passed"}
    assert report["evaluation"]["text"]["title"] == "Wörter.txt"
    assert report["evaluation"]["text"]["tokens"] == 15
    assert report["gate"] == {"status": "passed", "limits": {"max_kl": 0.2, "min_chat": 0.7}, "reasons": []}
    assert report["base"]["name"] == "mein Modell"
    assert report["engine"] == "streaming"
    assert "Wörter.txt" in card
    assert "quality gate, max_kl 0.2, min_chat 0.7: **passed**" in card
    again = surgery("check", out, "--base", base)
    assert again.code == 0, again.err
    assert "logits against base" in again.out
    assert re.fullmatch(r"\d checks passed\. next: surgery push '.*' OWNER/NAME", again.out.splitlines()[-1])


def test_apply_json_is_one_object_on_stdout(surgery, model, text):
    done = surgery("apply", "mqa", model, f"evaluate.text={text}", *SCORED, "-o", "out", "--no-check", "--json")
    assert done.code == 0
    assert done.err == ""
    assert done.json["gate"]["status"] == "passed"
    assert done.json["check"] is None
    assert done.json == report_of(Path("out"))


def test_a_failed_gate_is_3_and_keeps_the_folder(surgery, model, text, tmp_path):
    args = ("apply", "mqa", model, f"evaluate.text={text}", *SCORED, "max_kl=0", "--no-check")
    done = surgery(*args, "-o", "out")
    assert done.code == 3
    assert done.err.count("error:") == 1
    assert "the quality gate failed: max_kl: " in done.err
    assert "the limit is 0" in done.err
    assert "accept the damage with --no-gate" in done.err
    report = report_of(tmp_path / "out")
    assert report["gate"]["status"] == "failed"
    card = (tmp_path / "out/README.md").read_text()
    assert "**The quality gate failed:** " in card
    assert "**failed**" in card

    spoken = surgery(*args, "-o", "spoken", "--json")
    assert spoken.code == 3
    assert spoken.json["gate"]["status"] == "failed"
    assert spoken.err.startswith("error: ")

    let = surgery(*args, "-o", "let", "--no-gate")
    assert let.code == 0
    report = report_of(tmp_path / "let")
    assert report["gate"]["status"] == "skipped"
    assert report["evaluation"]["kl"]["mean"] > 0
    assert (
        "> **The limits of the recipe were set aside** (`--no-gate`). It would have failed: max_kl"
        in (tmp_path / "let/README.md").read_text()
    )


def test_what_is_not_done_is_said_not_to_be_done(surgery, model, tmp_path):
    done = surgery("apply", "mqa", model, "-o", "out", *FAST)
    assert done.code == 0
    assert "cost:      not measured\n" in done.out
    assert "gate:      not run\n" in done.out
    assert "verdict:   nothing is known of its quality\n" in done.out
    assert "next:      surgery check out" in done.out
    report, card = report_of(tmp_path / "out"), (tmp_path / "out/README.md").read_text()
    assert (report["check"], report["evaluation"], report["gate"]["status"]) == (None, None, "not run")
    assert "**not measured**" in card
    assert "> **Not measured.**" in card


def test_without_limits_there_is_no_gate(surgery, model, tmp_path):
    done = surgery("apply", "mqa", model, "-o", "out", *FAST, "evaluate=null")
    assert "cost:      not measured\n" in done.out
    assert "gate:      none\n" in done.out
    assert "> **The quality gate" not in (tmp_path / "out/README.md").read_text()


def test_what_comes_next_is_a_command_that_can_be_copied(surgery, model, text, tmp_path):
    """The base as it was typed, never a push of what failed."""
    (tmp_path / "deep er").mkdir()
    base = model.rename(tmp_path / "deep er/model")
    scored = (f"evaluate.text={text}", *SCORED)
    last = surgery("apply", "mqa", base, *scored, "-o", "a", *FAST).out.splitlines()[-2]
    assert last == f"next:      surgery check a --base '{base}'"
    last = surgery("apply", "mqa", base, *scored, "-o", "b", "--no-eval").out.splitlines()[-2]
    assert last == f"next:      surgery eval b --base '{base}' --text words.txt --windows 1 --length 16"
    last = surgery("apply", "mqa", base, *scored, "-o", "c", "max_kl=0").out.splitlines()[-2]
    assert last.startswith(f"next:      surgery apply mqa '{base}' evaluate.text=")
    assert last.endswith(" max_kl=0 method=closed_form -o c-2")
    load, last = surgery("apply", "mqa", base, *scored, "-o", "d").out.splitlines()[-3:-1]
    assert load == 'load:      AutoModelForCausalLM.from_pretrained("d")'
    assert last == "next:      surgery push d OWNER/NAME"
    heads = ("streaming_ratio=1", "window=6", "sinks=2")
    done = surgery("apply", "duo-attention", base, *heads, *scored, "-o", "e", "--no-gate")
    assert done.out.splitlines()[-3] == 'load:      surgery.load("e")', done.out + done.err
    assert "bytes that do not grow" in done.out


def test_a_name_is_printed_as_it_is(surgery, model):
    done = surgery("apply", "mqa", model, "-o", "out[a]:fire:", *FAST)
    assert "surgery check 'out[a]:fire:'" in done.out


def test_a_difference_is_measured_and_not_passed(capsys):
    from surgery.cli.render.console import STATUS_STYLE
    from surgery.cli.render.tables import checks

    checks([{"name": "logits against base", "status": "measured", "detail": "0.1 [b]at most[/b]"}])
    assert capsys.readouterr().out.split(maxsplit=1)[0] == "measured"
    assert STATUS_STYLE["measured"] == "cyan"


def test_plan_of_a_head_split(surgery, model):
    shown = surgery("plan", "duo-attention", model, "window=6", "sinks=2").out
    assert "3 of 6 KV heads see only 2 sinks + 6 tokens" in shown
    assert "streaming KV heads" not in shown, "which layer has how many is not known before the model is measured"
    assert shown.count("self_attn") == 1
    assert "KV cache that does not grow: 0 → 768 bytes" in shown
    assert re.search(r"^time: .*measure", shown, re.MULTILINE)
    (model.parent / "scores.tsv").write_text("0\t0\t1\n0\t1\t1\n")
    shown = surgery("plan", "duo-attention", model, f"scores={model.parent / 'scores.tsv'}").out
    assert "0 → 2 streaming KV heads" in shown
    assert "0 → 1 streaming KV heads" in shown


def test_inspect_of_a_head_split(surgery, model):
    args = ("streaming_ratio=1", "window=6", "sinks=2", "--no-check", "--no-eval")
    assert surgery("apply", "duo-attention", model, "-o", "out", *args).code == 0
    shown = surgery("inspect", "out").out
    assert "a streaming head sees: 2 sinks + 6 tokens" in shown
    assert re.search(r"0-1 +9 +3 +3 +8 ", shown), shown


def test_inspect_of_what_nothing_follows(surgery, model):
    """A native result that no recipe can be applied to is said to be one, with the reason."""
    args = (
        "rank=20",
        "refit=[]",
        "calibration_text=mixed",
        "calibration_samples=2",
        "calibration_length=16",
        "--no-check",
        "--no-eval",
    )
    assert surgery("apply", "mla", model, "-o", "out", *args).code == 0
    shown = surgery("inspect", "out").out
    said = " ".join(shown.split())
    assert "Made by surgery: mla. None of the recipes that come with surgery can be applied to this result." in said
    assert "The operation absorb can, and makes it decode faster: write a recipe with" in said
    assert "gqa" in shown.partition("These cannot be applied as they are:")[2].partition("start from its base")[0]


def test_inspect_of_gates_and_terms(surgery, model):
    """A gate leaves the table of heads as the base's is: what a surgery set is said."""
    args = ("router=zero", "keep_first_layers=1", "--no-check", "--no-eval")
    assert surgery("apply", "mae", model, "-o", "out", *args).code == 0
    shown = surgery("inspect", "out").out
    assert "changed by a surgery: gate in 1 of 2 layers\n" in shown
    block = next(line for line in shown.splitlines() if line.startswith("Made by surgery: mae."))
    can, need = re.search(
        r"applied to this result: (.*?)\. \d+ can only be applied to its base: (.*?)\. To", block
    ).groups()
    data = surgery("inspect", "out", "--json").json
    assert data["terms"] == {"gate": [1]}
    assert data["made_by"] == "mae"
    assert can.split(", ") == [name for name, reasons in data["recipes"].items() if not reasons]
    assert need.split(", ") == [name for name, effect in data["effects"].items() if effect.get("needs_base")]
    assert "act" in can.split(", ")
    assert "duo-after-gqa" in need.split(", ")
    assert "changed by a surgery" not in surgery("inspect", model).out


def test_the_estimate_says_of_what_it_is(surgery, model):
    shown = surgery("plan", "mqa", model).out
    assert re.search(r"^time:    about [\d.]+ (s|min) on \d+ threads? \(.*check \d", shown, re.MULTILINE)
    assert re.search(r"^memory:  about \d.* at the peak", shown, re.MULTILINE)
    assert re.search(r"^disk:    \d", shown, re.MULTILINE)
    assert shown.splitlines()[-1] == f"next:      surgery apply mqa {model} -o OUT"
    estimate = surgery("plan", "mqa", model, "--json").json["estimate"]
    parts = estimate["parts"]
    assert list(parts) == ["write", "check", "score"]
    assert estimate["seconds"] == pytest.approx(sum(part["seconds"] for part in parts.values()), abs=0.3)
    assert estimate["memory_bytes"] == max(part["memory_bytes"] for part in parts.values())


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("args", [["ls"], ["ls", "--json"], ["schema"]])
def test_a_reader_that_leaves_is_no_fault(args):
    """As in `surgery ls | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "surgery", *args], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_quiet(surgery, model):
    done = surgery("apply", "mqa", model, "-o", "out", *FAST, "--quiet")
    assert done.code == 0
    assert done.err == ""
    labels = [line.partition(":")[0].split()[0] for line in done.out.splitlines()]
    assert labels == ["changed", "cost", "gate", "verdict", "next", "done"]


def test_both_engines_write_the_same_tensors(surgery, model, tmp_path):
    import torch
    from safetensors.torch import load_file

    for engine in ("streaming", "loaded"):
        done = surgery("apply", "mqa", model, "-o", engine, "--engine", engine, *FAST)
        assert done.code == 0, done.err
        assert report_of(tmp_path / engine)["engine"] == engine
    one, two = (load_file(tmp_path / engine / "model.safetensors") for engine in ("streaming", "loaded"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_same_command_twice_gives_the_same_hashes(surgery, model, tmp_path):
    for out in ("one", "two"):
        assert surgery("apply", "gqa", model, "kv_heads=1", "method=random", "-o", out, *FAST).code == 0
    assert report_of(tmp_path / "one")["files"] == report_of(tmp_path / "two")["files"]


# --- check, eval --------------------------------------------------------------------------------------------


def test_check_without_memory_runs_layer_by_layer_and_says_so(surgery, out):
    done = surgery("check", out, "--memory", "0.0001", "--json")
    assert done.code == 0, done.err
    items = {item["name"]: item for item in done.json["items"]}
    for name in ("loads with stock Transformers", "generates"):
        assert items[name]["status"] == "not run"
        assert "GiB of memory" in items[name]["detail"]
    assert items["layers one by one"]["status"] == "passed"
    assert report_of(out)["check"] == done.json
    assert "**not run**" in (out / "README.md").read_text()


def test_eval(surgery, out, text):
    args = ("--text", text, "--windows", "2", "--length", "16")
    alone = surgery("eval", "out", *args, "--json")
    assert alone.err == ""
    assert alone.json["base"] is None
    pair = surgery("eval", "out", "--base", "model", *args, "--json").json
    assert pair["kl"]["mean"] > 0
    assert pair["out"]["kv_bytes_per_token"] == 64
    assert pair["base"]["kv_bytes_per_token"] == 192
    same = surgery("eval", "model", "--base", "model", *args, "--json").json
    assert same["kl"]["mean"] == pytest.approx(0, abs=1e-7)
    assert same["top1_agreement"] == 1
    shown = surgery("eval", "out", "--base", "model", *args)
    assert re.search(r"^ +base +converted +ratio$", shown.out, re.M)
    assert re.search(r"^KV bytes per token +192 +64 +0\.333$", shown.out, re.M)
    assert "Measured on 30 tokens (2 windows of 16) of words.txt" in shown.out
    assert shown.out.splitlines()[-1] == "next: surgery eval out --base model --probe needles"
    assert re.search(
        r"^The perplexity is \d\.\d{3} times the base's, and the best token is the same at ", shown.out, re.M
    )


def test_a_gate_is_not_passed_with_another_base(surgery, model, text, tmp_path):
    scored = (f"evaluate.text={text}", *SCORED, "max_kl=0.0000001")
    assert surgery("apply", "mqa", model, "-o", "o1", *scored, "--no-eval").code == 0
    args = ("--text", text, "--windows", "1", "--length", "16", "--json")
    before = listing(tmp_path)
    wrong = surgery("eval", "o1", "--base", "o1", *args)
    assert wrong.code == 0
    (note,) = wrong.json["notes"]
    assert note.startswith("not added to the card: this is not the base it was made from")
    assert listing(tmp_path) == before
    other = surgery("eval", "o1", "--base", "model", "--text", text, "--windows", "2", "--length", "16", "--json")
    assert any("not those of its recipe" in note for note in other.json["notes"])
    assert listing(tmp_path) == before
    right = surgery("eval", "o1", "--base", "model", *args)
    assert "notes" not in right.json
    assert report_of(tmp_path / "o1")["gate"]["status"] == "failed"


# --- what is not imported -----------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy", "huggingface_hub")
SPY = f"""
import sys
from surgery.cli import main as cli
try:
    cli.main()
finally:
    print("heavy:", *sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""


def spied(*args: str, **env: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", SPY, *args], capture_output=True, text=True, env=os.environ | env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "args", ["--help", "apply -h", "--version", "ls", "ls gqa", "ls expand", "ls --all", "ls --json", "schema"]
)
def test_help_and_lists_import_nothing_heavy(args):
    assert spied(*args.split()).stderr == "heavy:\n"


@pytest.mark.parametrize(("typed", "offered"), [("surgery ", "inspect"), ("surgery apply --ov", "--overwrite")])
def test_completion_imports_nothing_heavy(typed, offered):
    words = {"_SURGERY_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    done = spied(**words)
    assert offered in done.stdout
    assert done.stderr == "heavy:\n"


def test_the_package_imports_nothing_heavy():
    code = f"import sys, surgery; assert not set({HEAVY}) & set(sys.modules); surgery.SurgeryError; dir(surgery)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- operations of other packages ---------------------------------------------------------------------------

HALVES = '''
from typing import ClassVar, Literal

from pydantic import Field
from surgery import Change, WeightRewrite


class KeepOne(WeightRewrite):
    """Keep one KV head and drop the others."""

    summary: ClassVar[str] = "Keep one KV head."

    op: Literal["keep_one"] = "keep_one"
    head: int = Field(0, ge=0, description="The head that stays.")

    def problems(self, anatomy):
        count = anatomy.layers[0].kv_heads
        return [] if self.head < count else [f"keep_one: no KV head {self.head}; there are 0 to {count - 1}"]

    def plan(self, anatomy):
        return Change(anatomy.with_kv_heads(1), (f"KV head {self.head} alone",))

    def rewrite(self, layer, target):
        kept = slice(self.head, self.head + 1)
        return layer.replace(anatomy=target, k=layer.k[kept], v=layer.v[kept]), {"kept": self.head}
'''
RECIPE = "version: 1\nname: keep-one\noperations:\n  - op: keep_one\n    head: 2\nheal: null\nevaluate: {max_kl: 5}\n"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a module with one entry point of the group `surgery.operations`."""
    site = tmp_path / "site"

    def install(name: str, target: str, source: str) -> None:
        module = target.partition(":")[0]
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[surgery.operations]\n{name} = {target}\n")
        (site / f"{module}.py").write_text(source)

    monkeypatch.syspath_prepend(str(site))
    yield install
    for module in [name for name, value in sys.modules.items() if str(site) in str(getattr(value, "__file__", ""))]:
        del sys.modules[module]


def test_an_operation_is_one_file_and_one_recipe(surgery, refused, plugin, model, text, tmp_path):
    import torch
    from safetensors.torch import load_file

    plugin("keep_one", "headless:KeepOne", HALVES)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    assert "keep_one" in surgery("ls").out
    assert "Keep one KV head." in surgery("ls", "keep_one").out
    listed = surgery("ls", "mine.yaml").out
    assert "quality gate: max_kl 5" in listed
    assert "head=2" in listed
    assert surgery("ls", "--json").json["operations"]["keep_one"]["head"]["default"] == 0
    assert "keep_one" in str(surgery("schema").json["properties"]["operations"])
    assert "KV head 2 alone" in surgery("plan", "mine.yaml", model).out
    refused("plan", "mine.yaml", model, "head=3", says=["keep_one: no KV head 3; there are 0 to 2"])
    refused("plan", "mine.yaml", model, "haed=3", says=["no field 'haed'", "did you mean 'head'?"])
    args = (f"evaluate.text={text}", *SCORED, "-o", "out")
    done = surgery("apply", "mine.yaml", model, *args, "--no-check")
    assert done.code == 0, done.err
    old, new = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    for part in ("k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{part}.weight"
        assert torch.equal(new[name], old[name][16:24])
    report = report_of(tmp_path / "out")
    assert report["operations"][0]["record"] == {f"model.layers.{i}.self_attn": {"kept": 2} for i in range(2)}
    assert "keep_one" in (tmp_path / "out/README.md").read_text()


SCALE = HALVES.replace("KeepOne", "Scale").replace("keep_one", "scale")
SCALE = SCALE.replace("anatomy.with_kv_heads(1)", "anatomy")
SCALE = SCALE[: SCALE.index("    def rewrite")] + (
    "    def rewrite(self, layer, target):\n        return layer.replace(v=layer.v * 2, o=layer.o / 2), {'by': 2}\n"
)


@pytest.mark.parametrize("engine", ["streaming", "loaded"])
def test_an_operation_that_keeps_the_shapes_is_carried_out(surgery, plugin, model, tmp_path, engine):
    from safetensors.torch import load_file

    plugin("scale", "scaling:Scale", SCALE)
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("keep_one", "scale"))
    done = surgery("apply", "mine.yaml", model, "-o", "out", "--engine", engine, *FAST)
    assert done.code == 0, done.err
    name = "model.layers.0.self_attn.v_proj.weight"
    old, new = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert (old[name] * 2).equal(new[name])


BROKEN = {
    "import": ("broken:Op", "import module_that_is_not_there", "No module named 'module_that_is_not_there'"),
    "syntax": ("broken:Op", "def (", "SyntaxError"),
    "raises": ("broken:Op", "raise RuntimeError('no GPU here')", "RuntimeError: no GPU here"),
    "attribute": ("broken:Op", "", "no attribute 'Op'"),
    "no module": ("missing_module:Op", None, "No module named 'missing_module'"),
    "function": ("broken:Op", "def Op(): pass", "is not a subclass of surgery.Operation"),
    "other class": ("broken:Op", "class Op: pass", "is not a subclass of surgery.Operation"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_operation_is_listed_and_harms_nothing(surgery, refused, plugin, model, tmp_path, kind):
    target, source, says = BROKEN[kind]
    plugin("shaky", target, source or "")
    if source is None:
        (tmp_path / "site/missing_module.py").unlink()
    shown = surgery("ls")
    assert shown.code == 0
    assert shown.err == ""
    assert "shaky" in shown.out
    assert says in shown.out
    assert says in surgery("ls", "--json").json["broken"]["shaky"]
    assert surgery("schema").code == 0
    assert surgery("plan", "gqa", model).code == 0
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("keep_one", "shaky"))
    refused("apply", "mine.yaml", model, "-o", "out", says=["mine.yaml:4: the operation 'shaky' of ", says])


def test_a_broken_operation_is_not_even_loaded_by_other_work(surgery, plugin, model):
    plugin("shaky", "broken:Op", "raise SystemExit('loaded')")
    assert surgery("plan", "gqa", model).code == 0
    assert surgery("inspect", model).code == 0
    assert "broken" not in sys.modules


def test_a_builtin_name_cannot_be_taken_over(surgery, plugin, model):
    plugin("gqa", "broken:Op", "raise SystemExit('taken over')")
    assert surgery("plan", "gqa", model).code == 0
    assert surgery("ls", "--json").json["broken"] == {}
