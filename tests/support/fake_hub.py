"""A Hub on 127.0.0.1, small enough to read: what huggingface_hub asks when it lists, downloads and uploads.

    with FakeHub() as hub:
        commit = hub.add("org/model", {"config.json": b"{}", "model.safetensors": weights})
        ...                      # a subprocess with HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET=1 and its own HF_HOME
        assert hub.requests("GET", "model.safetensors") == []

HF_ENDPOINT is read when huggingface_hub is imported, hence the subprocess. `hub.log` has every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

GOOD, READ_ONLY, BAD = "hf_goodgoodgood1", "hf_readreadread2", "hf_badbadbadbad3"
MODEL = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> files
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str = "", message: str = "no") -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunks()
        self.server.log.append((self.command, path, self.headers.get("Range") or ""))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.token == BAD:
            return self.refuse(401, message=f"Invalid credentials in Authorization header: {self.token}")
        for method, pattern, action in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return self.route(action, match.groupdict(), body)
        return self.refuse(404, message=f"fake Hub: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def chunks(self) -> bytes:
        """A body sent in chunks: the client streams what it uploads."""
        chunks = []
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def route(self, action: str, fields: dict[str, str], body: bytes) -> None:
        """Who may: a private repository is a missing one to strangers, and the read-only token may not write."""
        name = fields.get("repo")
        if name is None:
            return getattr(self, action)(body=body, **fields)
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.token):
            return self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if self.command in ("POST", "PUT") and self.token != GOOD:
            return self.refuse(403, message="this token may not write")
        sha = repo.find(fields.pop("rev", None) or "main")
        if sha is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        fields.pop("repo")
        return getattr(self, action)(repo=repo, name=name, sha=sha, body=body, **fields)

    def whoami(self, body: bytes) -> None:
        self.answer(200, {"name": "me"}) if self.token else self.refuse(401)

    def validate(self, body: bytes) -> None:
        bad = "base_model: /" in json.loads(body)["content"]
        errors = [{"message": "base_model is not a model id"}] * bad
        self.answer(400 if bad else 200, {"errors": errors, "warnings": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self.token != GOOD:
            return self.refuse(403 if self.token else 401, message="no right to create here")
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", **url})
        self.server.add(name, {".gitattributes": b""}, private=wanted.get("visibility") == "private")
        return self.answer(200, url)

    def info(self, repo: Repo, name: str, sha: str, body: bytes) -> None:
        files = [{"rfilename": file} for file in repo.commits[sha]]
        self.answer(200, {"id": name, "sha": sha, "private": repo.private, "siblings": files, "tags": []})

    def tree(self, repo: Repo, name: str, sha: str, body: bytes) -> None:
        files = repo.commits[sha].items()
        self.answer(200, [{"type": "file", "path": f, "size": len(c), "oid": blob(c)} for f, c in files])

    def file(self, repo: Repo, name: str, sha: str, file: str, body: bytes) -> None:
        content, commit = repo.commits[sha].get(file), {"X_Repo_Commit": sha}
        if repo.gated:
            return self.refuse(403 if self.token else 401, "GatedRepo", "Access is restricted")
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            chunk = content[int(byte_range[1]) : int(byte_range[2]) + 1]
            span = f"bytes {byte_range[1]}-{int(byte_range[1]) + len(chunk) - 1}/{len(content)}"
            return self.answer(206, chunk, Content_Range=span, **commit)
        return self.answer(200, content, ETag=f'"{blob(content)}"', Accept_Ranges="bytes", **commit)

    def branch(self, repo: Repo, name: str, sha: str, body: bytes, branch: str) -> None:
        repo.branches.setdefault(branch, sha)
        self.answer(200, {})

    def preupload(self, repo: Repo, name: str, sha: str, body: bytes) -> None:
        present, answers = repo.commits[sha], []
        for file in json.loads(body)["files"]:
            path, large = file["path"], file["path"].endswith(".safetensors")
            oid = None if path not in present else self.server.oid(present[path], large)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def batch(self, repo: Repo, name: str, sha: str, body: bytes) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            href = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
            objects.append(item if item["oid"] in self.server.large else item | {"actions": href})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes) -> None:
        self.server.large[oid] = body
        self.answer(200)

    def commit(self, repo: Repo, name: str, sha: str, body: bytes) -> None:
        files, message = dict(repo.commits[sha]), ""
        for line in map(json.loads, body.decode().splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        branch = next(b for b, at in reversed(repo.branches.items()) if at == sha)
        new = repo.commit(branch, files, message)
        self.answer(200, {"success": True, "commitOid": new, "commitUrl": f"{self.server.url}/{name}/commit/{new}"})


ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", "/api/repos/create", "create"),
    ("GET", f"/api/models/{MODEL}(/revision/(?P<rev>.+))?", "info"),
    ("GET", f"/api/models/{MODEL}/tree/(?P<rev>[^/]+)", "tree"),
    ("POST", f"/api/models/{MODEL}/branch/(?P<branch>.+)", "branch"),
    ("POST", f"/api/models/{MODEL}/preupload/(?P<rev>.+)", "preupload"),
    ("POST", f"/api/models/{MODEL}/commit/(?P<rev>.+)", "commit"),
    ("POST", f"/{MODEL}.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", "store"),
    ("GET", f"/{MODEL}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", "file"),
    ("HEAD", f"/{MODEL}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", "file"),
]


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str]] = []

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def add(self, name: str, files: dict[str, bytes], branch: str = "main", **flags: bool) -> str:
        repo = self.repos.setdefault(name, Repo(**flags))
        return repo.commit(branch, files)

    @staticmethod
    def oid(content: bytes, large: bool) -> str:
        return hashlib.sha256(content).hexdigest() if large else blob(content)

    def requests(self, method: str, fragment: str) -> list[tuple[str, str, str]]:
        return [entry for entry in self.log if entry[0] == method and fragment in entry[1]]
