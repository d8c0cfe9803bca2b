"""The Hub: where a model comes from (`resolve`) and where a result goes (`push`).

A model is a local folder, `smollm2-135m`, or a Hub id with an optional `@revision`, resolved to a commit once.
Weights are fetched only as safetensors, never as pickles. A repository's own `.py` files are copied, never run.
huggingface_hub is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import json
import os.path
import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from surgery.errors import (
    AccessError,
    ModelError,
    ModelNotFoundError,
    NetworkError,
    OutputExistsError,
    RecordError,
    SurgeryError,
    nearest,
)
from surgery.io import card_text, manifest
from surgery.io.files import CARD, REPORT, json_text, utf8
from surgery.io.hub_errors import LOGIN, brief, folders, hub_errors, hub_token
from surgery.io.loading import refuse_adapter
from surgery.io.manifest import WEIGHTS
from surgery.io.model_folder import is_carried
from surgery.io.safetensors import SINGLE_FILE, inside_folder

DEMO, DEMO_BASE = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
INDEX = "model.safetensors.index.json"
FETCHED = [
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*", "vocab*", "merges*", "spiece*", "*.py",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
    "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp",
]  # fmt: skip
# `*` also matches `/` in these patterns; weights in subfolders are training checkpoints or other formats.
NOT_FETCHED = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "onnx/*", "openvino/*", "original/*",
    "checkpoint-*/*", "*/*.safetensors", "consolidated*", "params.json", "adapter_*",
]  # fmt: skip


class SentFile(TypedDict):
    """A file of a push, and its size in bytes."""

    name: str
    bytes: int


class Pushed(TypedDict):
    """The result of a push or of a dry run. A dry run lacks the last four keys."""

    repo: str
    visibility: str
    dry_run: bool
    files: list[SentFile]
    bytes: int
    metadata: dict[str, Any]
    warnings: list[str]
    url: NotRequired[str]
    commit: NotRequired[str]
    created: NotRequired[bool]
    removed: NotRequired[list[str]]


@dataclass(frozen=True)
class ResolvedModel:
    """A resolved model: a folder on this machine, and where the model came from.

    Attributes:
        path: the folder.
        name: what the user typed; for a local path only the folder's own name, since `name` is published.
        hub_id: `org/name` if it came from the Hub.
        revision: the Hub commit, 40 hex digits.
        note: a remark to show with every figure ("dequantised Q4_1 weights").
        base_model: the Hub id to record as the base, if there is one.
        headers: file -> safetensors header as on disk (`{tensor: {dtype, shape, data_offsets}}`) if the weights
            were not requested and are not on this machine. Otherwise None, and `path` holds the weights.
    """

    path: Path
    name: str
    hub_id: str | None = None
    revision: str | None = None
    note: str | None = None
    base_model: str | None = None
    headers: dict[str, dict] | None = None


def folder_of(model: str | Path) -> Path:
    """The folder of a model that is given as a folder, a name or a Hub id."""
    return resolve(str(model)).path


def resolve(model: str, *, weights: bool = True, cached_only: bool = False) -> ResolvedModel:
    """Find a model. An existing folder wins, then the demo model's name, then the Hub.

    Args:
        model: folder, `smollm2-135m`, `org/name`, `name`, or a Hub id with `@revision` (branch, tag, commit).
            Spaces around it are dropped unless a folder has exactly this name.
        weights: if False and the weights are not cached, their names and shapes come back in `headers`
            instead (range requests of some kilobytes).
        cached_only: use the Hub's local cache and no network.

    Raises:
        SurgeryError: no such folder, repository or revision, or one without safetensors.
        MachineError: no network, access or space, or `cached_only` and the model is not in the cache.
    """
    model = str(model)
    if not os.path.isdir(os.path.expanduser(model)):
        model = model.strip()
    if not model:
        raise SurgeryError("no model was named", exists=f"a folder, a Hub id, `{DEMO}`")
    path, (repo, _, revision) = Path(os.path.expanduser(model)), model.partition("@")
    if os.path.isdir(path):  # unlike pathlib, no error on a forbidden folder or too long a name
        refuse_adapter(path)
        return ResolvedModel(path, utf8(path.resolve().name))
    if os.path.exists(path):
        raise ModelNotFoundError("a file, not a folder", where=model, fix="give the folder that holds config.json")
    if model == DEMO:
        from surgery.io.demo_model import demo_model

        return ResolvedModel(Path(demo_model()), DEMO, note="dequantised Q4_1 weights", base_model=DEMO_BASE)
    pathlike = re.match(r"[.~/\\]|[A-Za-z]:[\\/]|.*\\", model) or repo.count("/") > 1 or repo.endswith("/")
    # `runs/exp1` where runs/ exists is a typo in a path, unless `@revision` says that the Hub is meant.
    if pathlike or ("/" in repo and not revision and os.path.isdir(os.path.dirname(repo))):
        close = nearest(path.name, folders(path.parent))
        exists = model.rstrip("/\\").removesuffix(path.name) + close if close else ""
        fix = "give an existing folder or a Hub id" if pathlike else f"to mean the Hub, write `{repo}@main`"
        raise ModelNotFoundError("no such folder", where=model, exists=exists, fix=fix)
    try:
        return _from_hub(model, _valid_id(repo), revision or None, weights, cached_only)
    except SurgeryError as error:
        if "/" in repo or revision:
            raise
        # A bare name may be a typo for a folder or for the demo model: first say that no such folder exists.
        close = nearest(repo, [DEMO, *folders(Path())])
        fix = f"did you mean {close!r}? As a Hub id: {error.fix}" if close else error.fix
        raise type(error)(f"no folder `{repo}` here, and {error.what}", fix=fix, code=error.code) from error


def _valid_id(repo: str) -> str:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ModelNotFoundError(f"not a Hub id: {brief(error)}", where=repo, fix="write `owner/name`") from None
    return repo


def _from_hub(model: str, repo: str, revision: str | None, weights: bool, cached_only: bool) -> ResolvedModel:
    from huggingface_hub import snapshot_download

    patterns = FETCHED + ["*.safetensors"] * weights
    with hub_errors(repo, revision):
        # One call resolves the branch to a commit, records it for offline use, and fetches exactly that commit.
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_FETCHED, local_files_only=cached_only
        )
    path, headers = Path(folder), None
    cached = [p.name for p in path.glob("*.safetensors") if not _not_fetched(p.name)]
    names = [SINGLE_FILE] if SINGLE_FILE in cached else _indexed(path) or cached
    if not names or not all((path / name).is_file() for name in names):
        if not cached_only:
            headers = _headers(repo, path.name, path)  # raises where the repository has no safetensors
        if headers is None or weights:  # cached earlier without its weights, and the Hub is away now
            what = f"the weights of `{repo}` are not all in the Hub cache"
            raise NetworkError(what, fix="allow the network once")
    return ResolvedModel(path, model, hub_id=repo, revision=path.name, base_model=repo, headers=headers)


def _indexed(path: Path) -> list[str]:
    """The shards that the weight index names; none where there is no index."""
    file = path / INDEX
    if not file.is_file():
        return []
    try:
        names = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        return [inside_folder(name, INDEX) for name in names]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError("this weight index cannot be read", where=INDEX) from None


def _not_fetched(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in NOT_FETCHED)


def _headers(repo: str, commit: str, path: Path) -> dict[str, dict]:
    """File -> safetensors header as on disk, for every weight file of a commit, fetched by range requests."""
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    api = HfApi()

    def header(name: str) -> dict:
        metadata = api.parse_safetensors_file_metadata(repo, name, revision=commit)
        tensors = {
            key: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for key, info in metadata.tensors.items()
        }
        return ({"__metadata__": metadata.metadata} if metadata.metadata else {}) | tensors

    with hub_errors(repo, commit):
        files = sorted(api.list_repo_files(repo, revision=commit))
        weights = [name for name in files if name.endswith(".safetensors") and not _not_fetched(name)]
        names = [SINGLE_FILE] if SINGLE_FILE in weights else _indexed(path) or weights  # as Transformers chooses
        if not names:
            others = ", ".join([name for name in files if name.endswith(WEIGHTS)][:8]) or "no weight file"
            fix = "choose a repository that has model.safetensors"
            raise SurgeryError(f"`{repo}` has no safetensors weights", exists=others, fix=fix, code="unsafe-weights")
        with ThreadPoolExecutor(max_workers=8) as pool:
            return dict(zip(names, pool.map(header, names), strict=True))


def push(
    out: str | Path,
    repo: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    revision: str | None = None,
) -> Pushed:
    """Upload a checked output folder to the Hub as one commit, private unless `public`.

    Files that the Hub already has (compared by hash before the upload) are not sent again, so that the same command
    resumes an interrupted push. `create_commit` makes one commit. `upload_folder` might split a large folder over
    several, and users could load half a model. The same commit deletes weight files of an earlier push that this
    folder no longer has, since Transformers might load those instead. The uploaded card has the repository's name in
    its examples, and the uploaded surgery.json records it (`repository`). The local folder is not changed.

    Args:
        out: a folder that passed `surgery check` and has not changed since.
        repo: `owner/name`, or `name` for your own namespace.
        public: make a new repository public. An existing one keeps its visibility, which is reported.
        dry_run: list what would be sent, without a token or network.
        message: commit message.
        revision: branch to push to, created if missing; default `main`.

    Returns:
        `repo`, `visibility`, `files` (name, bytes), `bytes`, `metadata` (of the card), `warnings`, `dry_run`;
        when pushed also `url`, `commit`, `created`, `removed`. Never a token.

    Raises:
        SurgeryError: not an output of surgery, not checked, changed since the check, a bad name, no token.
        MachineError: no network, a refused token, no right to write.
    """
    for name, value in (("message", message), ("revision", revision)):
        if value is not None and not isinstance(value, str):
            raise SurgeryError(f"{name} is {value!r}, not a text", where=name, fix="give a text, or leave it out")
    out = Path(out)
    try:
        report, files = _checked(out)
        changed = _with_name(out, report, repo)
    except OSError as error:
        raise AccessError(f"cannot be read: {error.strerror}", where=str(out)) from None
    result: dict[str, Any] = {
        "repo": _valid_id(repo),
        "visibility": "public" if public else "private",
        "dry_run": dry_run,
    }
    files = [file | {"bytes": len(text)} if (text := changed.get(file["name"])) else file for file in files]
    result |= {"files": files, "bytes": sum(file["bytes"] for file in files)}
    result["metadata"], result["warnings"] = _metadata_and_warnings(out, report)
    if dry_run:
        return cast("Pushed", result)
    if not (token := hub_token()):
        raise SurgeryError(
            "pushing needs a Hub token, and there is none", where=repo, fix=LOGIN, code="permission-denied"
        )
    recipe, base = (report.get(key) or {} for key in ("recipe", "base"))
    origin = base.get("hub_id") or base.get("name") or "a base"
    message = message or f"attention-surgery: {recipe.get('name') or 'a recipe'} on {origin}"
    return cast("Pushed", result | _send(out, result | {"report": report}, token, public, message, revision))


def _metadata_and_warnings(out: Path, report: dict) -> tuple[dict, list[str]]:
    """The metadata of the card, and warnings to read before the upload."""
    from surgery.io.files import split_card

    card, gate, warnings = out / "README.md", report.get("gate") or {}, []
    metadata = split_card(card.read_text(encoding="utf-8", errors="replace"))[0] if card.is_file() else {}
    judged = gate.get("limits") or gate.get("status") not in (None, "not run")  # a recipe may have no gate
    if judged and gate.get("status") != "passed":
        warnings.append(f"the quality gate of this model: {gate.get('status') or 'not run'}")
    if not metadata:
        warnings.append("the card has no metadata: the Hub will show neither base model nor licence")
    return metadata, warnings


def _send(out: Path, result: dict, token: str, public: bool, message: str, revision: str | None) -> dict:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repo, names, warnings = result["repo"], [file["name"] for file in result["files"]], list(result["warnings"])
    with hub_errors(repo, revision, writing=True):
        api = HfApi(token=token)
        repo = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
        existed = api.repo_exists(repo)
        existing = api.list_repo_files(repo) if existed else []
        ours = "surgery.json" in existing or not any(name.endswith(WEIGHTS) for name in existing)
        if not ours and revision is None:  # a typo must not replace another person's model
            fix = "choose another name, or push to a branch of it (revision)"
            raise OutputExistsError("this repository holds a model that is not ours", where=repo, fix=fix)
        url = str(api.create_repo(repo, private=not public, exist_ok=True))
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        private = bool(api.model_info(repo).private)
        if private == public:
            stays = "private" if private else "PUBLIC"
            warnings.append(f"the repository existed and stays {stays}; see {url}/settings")
        existing = api.list_repo_files(repo, revision=revision)
        stale = [n for n in existing if "/" not in n and n.endswith((".safetensors", INDEX)) and n not in names]
        operations = [CommitOperationDelete(name) for name in stale]
        changed = _with_name(out, result["report"], repo)
        operations += [CommitOperationAdd(name, changed.get(name) or str(out / name)) for name in names]
        done = api.create_commit(repo, operations, commit_message=message, revision=revision)
    visibility = "private" if private else "public"
    pushed = {"repo": repo, "visibility": visibility, "url": url, "commit": done.oid, "created": not existed}
    return pushed | {"removed": stale, "warnings": warnings}


def _with_name(out: Path, report: dict, repo: str) -> dict[str, bytes]:
    """Card and record as they are uploaded, with the repository's name in both; {} where nothing changes."""
    known = report.get("other_files") or {}
    if CARD not in known:
        return {}
    card = (out / CARD).read_text(encoding="utf-8", errors="replace")
    text = card_text.named(card, repo, report.get("repository") or card_text.REPOSITORY).encode()
    if text == card.encode():
        return {}
    record = report | {"repository": repo, "other_files": known | {CARD: manifest.entry_of_card(text)}}
    if record.get("record_sha256"):
        record["record_sha256"] = manifest.record_hash(record)
    return {CARD: text, REPORT: (json_text(record) + "\n").encode()}


def _checked(out: Path) -> tuple[dict, list[dict]]:
    """surgery.json and the files to send; an error unless the folder passed `check` and has not changed since.

    Only files that surgery wrote or copied from the base are sent.
    """
    fix = f"run `surgery check {shlex.quote(str(out))}`"
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        passed = (report["check"] or {}).get("passed") is True
        sizes = {inside_folder(name, REPORT): int(info["bytes"]) for name, info in manifest.listed(report).items()}
    except (FileNotFoundError, NotADirectoryError):
        what = "this folder was not made by surgery: it has no surgery.json"
        raise RecordError(what, where=str(out), fix="push the folder that `surgery apply` wrote") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise RecordError("surgery.json is damaged", where=str(out), fix=fix) from None
    there = manifest.paths_in(out)
    if links := [name for name, path in there.items() if path.is_symlink()]:
        raise SurgeryError(
            "a link, which would publish what it points to", where=f"{out.name}/{links[0]}", code="unchecked-output"
        )
    manifest.refuse_unchecked(out, report, passed=passed, intact=manifest.is_intact(report))
    if not any(name.endswith(".safetensors") for name in report["files"]):
        what = "changed since it was checked: no weights are recorded"
        raise SurgeryError(what, where=str(out), fix=fix, code="unchecked-output")
    names = [*sizes]
    if not manifest.is_complete(report):  # a record of an earlier version lists only the weights
        names += [name for name in there if name not in sizes and is_carried(name)]
    return report, [{"name": name, "bytes": (out / name).stat().st_size} for name in sorted({*names, REPORT})]
