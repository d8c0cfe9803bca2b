"""resolve and push against a Hub on this machine: one subprocess per set of environment variables."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import BAD, GOOD, READ_ONLY, FakeHub

from surgery.errors import SurgeryError
from surgery.io import manifest
from surgery.io.hub import DEMO, hub_errors, push, resolve

ROOT = Path(__file__).resolve().parents[2]
RUNNER = """
import dataclasses, json, sys
from surgery.errors import SurgeryError
import surgery.io.hub as hub
if "huggingface_hub" in sys.modules:
    sys.exit("importing surgery.io.hub imported huggingface_hub")
answers = []
for name, args, kwargs in json.load(sys.stdin):
    try:
        made = getattr(hub, name)(*args, **kwargs)
        answers.append(made if isinstance(made, dict) else dataclasses.asdict(made))
    except SurgeryError as error:
        answers.append(error.to_dict() | {"text": str(error)})
if "torch" in sys.modules or "transformers" in sys.modules:
    sys.exit("torch or transformers was imported")
print("ANSWERS" + json.dumps(answers, default=str))
"""


def call(name: str, *args, **kwargs) -> tuple:
    return name, [str(a) if isinstance(a, Path) else a for a in args], kwargs


def run(endpoint: str, home: Path, *calls: tuple, token: str = "", **env: str) -> list[dict]:
    """Each call's result, or its error as a dict; and no token anywhere in what the process prints."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "PYTHONPATH": str(ROOT),
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", **({"HF_TOKEN": token} if token else {}),
           **env}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(calls), env=keep | env, cwd=home, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for secret in (GOOD, BAD, READ_ONLY):
        assert secret not in done.stdout + done.stderr
    return json.loads(done.stdout.partition("ANSWERS")[2])


def safetensors(names: list[str], size: int = 200_000) -> bytes:
    """A file whose header is right and whose data is long enough to notice that it was fetched."""
    header = {n: {"dtype": "F32", "shape": [size], "data_offsets": [i * size * 4, (i + 1) * size * 4]}
              for i, n in enumerate(names)}  # fmt: skip
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4 * size * len(names))


@pytest.fixture(scope="module")
def hub():
    files = {
        "config.json": b"{}", "README.md": b"# A", "LICENSE": b"terms", "tokenizer.model": b"t", "modeling_x.py": b"",
        "model.safetensors": safetensors(["a"]), "pytorch_model.bin": b"pickle", "model.gguf": b"g",
        "onnx/config.json": b"{}", "original/params.json": b"{}", "consolidated.safetensors": b"x",
        "checkpoint-5/model.safetensors": b"x", "adapter_model.safetensors": b"x", "images/head.png": b"png",
    }  # fmt: skip
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    with FakeHub() as fake:
        fake.add("org/model", {"config.json": b'{"main": 1}', "model.safetensors": safetensors(["m"])})
        fake.add("org/model", files, branch="dev")
        fake.add("org/sharded", {
            "config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(),
            "model-00001-of-00002.safetensors": safetensors(["a"]),
            "model-00002-of-00002.safetensors": safetensors(["b"]),
        })  # fmt: skip
        evil = {"weight_map": {"a": "../../escaped.safetensors"}}
        fake.add("org/evil", {"config.json": b"{}", "model.safetensors.index.json": json.dumps(evil).encode()})
        fake.add("org/gated", {"config.json": b"{}", "model.safetensors": b""}, gated=True)
        fake.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
        fake.add("me/secret", {"config.json": b"{}", "model.safetensors": safetensors(["s"])}, private=True)
        yield fake


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path


def names(folder: str) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}


def test_download_then_offline(hub, home):
    dev = hub.repos["org/model"].branches["dev"]
    at_dev, at_commit, main, _, secret = run(
        hub.url, home, call("resolve", "org/model@dev"), call("resolve", f"org/model@{dev}"),
        call("resolve", "org/model"), call("resolve", "org/sharded", weights=False),
        call("resolve", "me/secret"), token=GOOD,
    )  # fmt: skip
    assert at_dev["revision"] == at_commit["revision"] == dev
    assert (at_dev["hub_id"], at_dev["base_model"], at_dev["name"]) == ("org/model", "org/model", "org/model@dev")
    assert names(at_dev["path"]) == {
        "config.json", "README.md", "LICENSE", "tokenizer.model", "modeling_x.py", "model.safetensors",
        "images/head.png",
    }  # fmt: skip
    assert main["revision"] == hub.repos["org/model"].branches["main"] != dev
    assert main["headers"] is None
    assert secret["hub_id"] == "me/secret"

    offline = run(
        hub.url, home, call("resolve", "org/model@dev"), call("resolve", "org/model"), call("resolve", "org/other"),
        call("resolve", "org/sharded"), call("resolve", "org/model@nope"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert [answer["revision"] for answer in offline[:2]] == [dev, main["revision"]]
    for missing in offline[2:]:
        assert missing["exit_code"] == 5
        assert "HF_HUB_OFFLINE" in missing["error"] + missing["fix"] or "cache" in missing["error"]
    before = len(hub.log)
    cached = run(hub.url, home, call("resolve", "org/model@dev", cached_only=True, weights=False),
                 call("resolve", "org/other", cached_only=True))  # fmt: skip
    assert cached[0]["headers"] is None
    assert cached[1]["exit_code"] == 5
    assert "cache" in cached[1]["error"]
    assert len(hub.log) == before, "cached_only asked the network"


def test_headers_without_the_weights(hub, home):
    hub.log.clear()
    one, two = run(hub.url, home, call("resolve", "org/model@dev", weights=False),
                   call("resolve", "org/sharded", weights=False))  # fmt: skip
    assert one["headers"] == {
        "model.safetensors": {
            "__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [200000], "data_offsets": [0, 800000]},
        }
    }  # fmt: skip
    assert list(two["headers"]) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert two["headers"]["model-00002-of-00002.safetensors"]["b"]["shape"] == [200000]
    requests = hub.requests("GET", ".safetensors")
    weights = [entry for entry in requests if entry[1].endswith(".safetensors")]
    assert len(weights) == 3
    assert all(span.startswith("bytes=0-1000") for *_, span in weights), weights
    assert not any(name.endswith(".safetensors") for name in names(one["path"]))


def test_one_sentence_per_failure(hub, home):
    gated, missing, revision, pickled, evil, secret, syntax = run(
        hub.url, home, call("resolve", "org/gated"), call("resolve", "org/modle"), call("resolve", "org/model@nope"),
        call("resolve", "org/pickled"), call("resolve", "org/evil"), call("resolve", "me/secret"),
        call("resolve", "not a model"),
    )  # fmt: skip
    assert gated["exit_code"] == 5
    assert f"accept its terms at {hub.url}/org/gated and log in with `hf auth login`" in gated["fix"]
    assert missing["exit_code"] == secret["exit_code"] == 2
    assert "private" in missing["error"]
    assert revision["exit_code"] == 2
    assert "`nope`" in revision["error"]
    assert pickled["exit_code"] == 2
    assert "pytorch_model.bin" in pickled["exists"]
    assert "leaves its folder" in evil["error"]
    assert "not a Hub id" in syntax["error"]
    missing, bad = (
        run(hub.url, home, call("resolve", "org/modle"), token=GOOD)[0],
        run(hub.url, home, call("resolve", "org/model"), token=BAD)[0],
    )
    assert (missing["exit_code"], bad["exit_code"]) == (2, 5)
    assert "does not accept this token" in bad["error"]


def test_no_network(home):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    out = output(home / "out")
    down, upload = run(closed, home, call("resolve", "org/model"), call("push", out, "me/m"), token=GOOD)
    for error in (down, upload):
        assert error["exit_code"] == 5
        assert "cannot be reached" in error["error"]
        assert closed in error["where"]


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), 5, "the disk is full"),
        (PermissionError(errno.EACCES, "denied", "/cache"), 5, "no permission"),
        (TimeoutError("slow"), 5, "cannot be reached"),
        (ConnectionResetError("reset"), 5, "cannot be reached"),
        (RuntimeError(f"upload broke, token {GOOD}"), 5, "the transfer failed"),
        (ValueError("bad card"), 2, "bad card"),
        (json.JSONDecodeError("<html>", "", 0), 5, "not the Hub that answers"),
    ],
)
def test_what_the_machine_raises(raised, code, message):
    wrapped = RuntimeError("Error while uploading 'x'")  # as huggingface_hub does with what breaks in its threads
    wrapped.__cause__ = raised
    with pytest.raises(SurgeryError, match=message) as error, hub_errors("org/model", writing=True):
        raise wrapped
    assert error.value.exit_code == code
    assert GOOD not in str(error.value)


def test_a_bug_stays_a_bug():
    with pytest.raises(KeyError), hub_errors("org/model"):
        raise KeyError("ours")


def test_local_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / DEMO).mkdir()
    (tmp_path / "weights.gguf").write_text("x")
    assert resolve("org/model").hub_id is None, "a folder wins over a Hub id"
    assert resolve(DEMO).note is None, "a folder wins over the demo model"
    assert resolve(str(tmp_path / "runs" / "first")).name == "first"
    assert resolve(".").name == tmp_path.name
    for typo in ("./frist", "runs/frst", "runs/first/deep/er", str(tmp_path / "nothing"), "~/no-such-folder-here"):
        with pytest.raises(SurgeryError, match="no such folder") as error:
            resolve(typo)
        assert error.value.exit_code == 2
    with pytest.raises(SurgeryError) as error:
        resolve("runs/frst")
    assert error.value.exists == "runs/first"
    assert "runs/frst@main" in error.value.fix
    with pytest.raises(SurgeryError, match="a file, not a folder"):
        resolve("weights.gguf")
    with pytest.raises(SurgeryError, match="no model was named"):
        resolve(" ")


def output(out: Path, **changes) -> Path:
    """A folder as `surgery apply` and `surgery check` leave it."""
    out.mkdir()
    weights = safetensors(["a"], size=1000)
    report = {
        "format": 1, "recipe": {"name": "gqa"}, "base": {"name": "first"}, "gate": {"status": "passed"},
        "check": {"passed": True, "items": []},
        "files": {"model.safetensors": {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}},
    } | changes  # fmt: skip
    (out / "model.safetensors").write_bytes(weights)
    (out / "config.json").write_text("{}")
    (out / "README.md").write_text("---\nbase_model: org/model\nlicense: mit\n---\n# Card\n")
    (out / "surgery.json").write_text(json.dumps(report))
    (out / "left.partial").write_text("x")
    (out / ".cache").mkdir()
    (out / ".cache" / "x").write_text("x")
    (out / "x.lock").write_text("x")
    return out


SENT = {"README.md", "config.json", "model.safetensors", "surgery.json"}


def test_push(hub, home):
    out = output(home / "out")
    failed = output(home / "failed", gate={"status": "failed"})
    hub.add("me/open", {"model.safetensors": b"old", "surgery.json": b"{}", "note.txt": b"mine",
                        "model-00001-of-00009.safetensors": b"stale"})  # fmt: skip
    hub.add("me/other", {"model.safetensors": b"somebody's"})
    private, again, public, existing, bare, other, branch, org = run(
        hub.url, home, call("push", out, "me/new"), call("push", out, "me/new"),
        call("push", failed, "me/public", public=True, message="hello"), call("push", out, "me/open"),
        call("push", out, "bare"), call("push", out, "me/other"), call("push", out, "me/other", revision="mqa"),
        call("push", out, "a b/c"), token=GOOD,
    )  # fmt: skip
    new = hub.repos["me/new"]
    assert new.private
    assert (private["visibility"], private["created"], private["warnings"]) == ("private", True, [])
    assert set(new.files()) == SENT | {".gitattributes"}
    assert new.files()["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert len(new.commits) == 2, "one commit for creation, one for the whole folder, none for a repeated push"
    assert new.messages[-1] == "attention-surgery: gqa on first"
    assert private["commit"] == again["commit"] == new.branches["main"]
    assert again["created"] is False
    assert len(hub.requests("PUT", "/lfs/")) == 1, "the weights were sent once in all of these pushes"

    assert not hub.repos["me/public"].private
    assert public["visibility"] == "public"
    assert hub.repos["me/public"].messages[-1] == "hello"
    assert any("failed" in warning for warning in public["warnings"])

    assert existing["visibility"] == "public"
    assert any("PUBLIC" in warning for warning in existing["warnings"])
    assert existing["removed"] == ["model-00001-of-00009.safetensors"]
    assert set(hub.repos["me/open"].files()) == SENT | {"note.txt"}

    assert bare["repo"] == "me/bare"
    assert other["exit_code"] == 2
    assert "not ours" in other["error"]
    assert hub.repos["me/other"].files() == {"model.safetensors": b"somebody's"}
    assert set(hub.repos["me/other"].files("mqa")) == SENT
    assert branch["repo"] == "me/other"
    assert "not a Hub id" in org["error"]


def test_the_card_on_the_hub_names_its_repository(hub, home):
    out = output(home / "card")
    (out / "README.md").write_text('---\nlicense: mit\n---\nname = "OWNER/NAME"\n\n## Licence\n')
    report = json.loads((out / "surgery.json").read_text())
    for name in ("left.partial", ".cache/x", "x.lock"):
        (out / name).unlink()
    report["other_files"] = manifest.other_files(out, report["files"])
    (out / "surgery.json").write_text(json.dumps(report | {"record_sha256": manifest.record_hash(report)}))
    dry, pushed = run(hub.url, home, call("push", out, "card", dry_run=True), call("push", out, "card"), token=GOOD)
    assert pushed["repo"] == "me/card"
    files = hub.repos["me/card"].files()
    assert b'name = "me/card"' in files["README.md"]
    assert b"OWNER/NAME" in (out / "README.md").read_bytes()
    there = home / "there"
    there.mkdir()
    for name, content in files.items():
        (there / name).write_bytes(content)
    record = json.loads(files["surgery.json"])
    assert record["repository"] == "me/card"
    assert manifest.is_intact(record)
    (there / ".gitattributes").unlink()
    assert manifest.differences(there, record, intact=True) == []
    sizes = {file["name"]: file["bytes"] for file in dry["files"]}
    assert sizes["README.md"] == len((out / "README.md").read_bytes()) - len("OWNER/NAME") + len("card")


def test_push_refused(hub, home):
    out = output(home / "out")
    bad_card = output(home / "bad-card")
    (bad_card / "README.md").write_text("---\nbase_model: /home/me/model\n---\n")
    (none,) = run(hub.url, home, call("push", out, "me/m"))
    (bad,) = run(hub.url, home, call("push", out, "me/m"), token=BAD)
    (right,) = run(hub.url, home, call("push", out, "me/m"), token=READ_ONLY)
    card, namespace = run(hub.url, home, call("push", bad_card, "me/m"), call("push", out, "m"), token=GOOD)
    assert none["exit_code"] == 2
    assert "hf auth login" in none["fix"]
    assert bad["exit_code"] == right["exit_code"] == 5
    assert "does not accept this token" in bad["error"]
    assert "write to" in right["error"]
    assert card["exit_code"] == 2
    assert "base_model is not a model id" in card["text"]
    assert namespace["repo"] == "me/m"


def test_dry_run_needs_nothing(tmp_path):
    out = output(tmp_path / "out", gate={"status": "skipped"})
    closed = "http://127.0.0.1:9"
    (dry,) = run(closed, tmp_path, call("push", out, "me/m", dry_run=True))
    assert {file["name"] for file in dry["files"]} == SENT
    assert dry["bytes"] == sum((out / name).stat().st_size for name in SENT)
    assert dry["metadata"] == {"base_model": "org/model", "license": "mit"}
    assert dry["visibility"] == "private"
    assert dry["dry_run"] is True
    assert "commit" not in dry
    assert any("skipped" in warning for warning in dry["warnings"])


def unlisted(out: Path) -> None:
    (out / "extra.safetensors").write_bytes(b"x")


def flipped(out: Path) -> None:
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "surgery.json").unlink(), "no surgery.json"),
        (lambda out: (out / "surgery.json").write_text("{"), "damaged"),
        (lambda out: (out / "surgery.json").write_text("[]"), "damaged"),
        (lambda out: (out / "model.safetensors").write_bytes(b"short"), "changed since"),
        (lambda out: (out / "model.safetensors").unlink(), "changed since"),
        (flipped, "changed since"),
        (unlisted, "changed since"),
    ],
)
def test_spoilt_folders_stay_here(tmp_path, spoil, message):
    out = output(tmp_path / "out")
    spoil(out)
    with pytest.raises(SurgeryError, match=message) as error:
        push(out, "me/m", dry_run=True)
    assert error.value.exit_code == 2
    assert "surgery" in error.value.fix


@pytest.mark.parametrize("check", [None, {"passed": False}, {"passed": "yes"}, {}])
def test_unchecked_folders_stay_here(tmp_path, check):
    out = output(tmp_path / "out", check=check)
    with pytest.raises(SurgeryError, match="has not passed") as error:
        push(out, "me/m", dry_run=True)
    assert f"surgery check {out}" in error.value.fix


def test_names_and_links_stay_inside(tmp_path):
    evil = output(tmp_path / "evil", files={"../secret.safetensors": {"sha256": "", "bytes": 1}})
    with pytest.raises(SurgeryError, match="leaves its folder"):
        push(evil, "me/m", dry_run=True)
    out = output(tmp_path / "out")
    try:
        (out / "notes.txt").symlink_to(tmp_path / "evil" / "config.json")
    except OSError:
        pytest.skip("no links on this system")
    with pytest.raises(SurgeryError, match="a link"):
        push(out, "me/m", dry_run=True)
