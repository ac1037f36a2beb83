"""A small Hugging Face hub on this machine: what its client needs of the HTTP API to
make a repository, upload to it in commits, and download a revision."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_for_tests"


@dataclass
class Repo:
    """Its commits, oldest first: hash and files."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, content: dict[str, bytes]) -> str:
        names = [f"{n}:{hashlib.sha1(b).hexdigest()}" for n, b in content.items()]
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(names)}".encode()).hexdigest()
        self.commits.append((sha, content))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((c for c in self.commits if c[0] == revision), None)


class FakeHub:
    """The state of the hub, and what was asked of it.

    Attributes:
        repos: By id.
        objects: What was uploaded as large files, by SHA-256.
        requests: Method and path of every request.
        full: Refuse large files, as where the storage of an account is used up.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.full = False
        self.url = ""

    def add(self, repo_id: str, content: dict[str, bytes]) -> str:
        repo = self.repos.setdefault(repo_id, Repo())
        return repo.commit(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status: int = 200, **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def handle_one(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        writes = self.command in ("POST", "PUT") and "/objects/" not in self.path
        if (writes or "whoami" in self.path) and not known:
            return self.fail(401, "Unauthorized")
        for pattern, act in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.path}"):
                return act(self, *match.groups())
        self.fail(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def repo(self, repo_id: str) -> Repo | None:
        found = self.hub.repos.get(repo_id)
        if found is None:
            self.fail(404, "RepoNotFound")
        return found

    def whoami(self):
        self.answer({"type": "user", "name": "someone", "orgs": [], "auth": {}})

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer({"url": f"{self.hub.url}/{name}"}, 409)
        self.hub.add(name, {".gitattributes": b""})
        self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self):
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo_id, revision):
        if (repo := self.repo(repo_id)) is None:
            return
        asked = json.loads(self.body)["files"]
        large = ("*.safetensors", "tokenizer.json")
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs"
                if any(fnmatch(f["path"], p) for p in large)
                else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for f in asked
        ]
        assert repo.at(revision)
        self.answer({"files": modes})

    def batch(self, repo_id):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            if self.hub.full:
                error = {"code": 403, "message": "the storage is full"}
                objects.append({"oid": oid, "size": size, "error": error})
                continue
            entry = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                put = {"href": f"{self.hub.url}/objects/{oid}"}
                verify = {"href": f"{self.hub.url}/verify"}
                entry["actions"] = {"upload": put, "verify": verify}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def put_object(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.answer()

    def verify(self):
        asked = json.loads(self.body)
        assert len(self.hub.objects[asked["oid"]]) == asked["size"]
        self.answer()

    def commit(self, repo_id, revision):
        if (repo := self.repo(repo_id)) is None:
            return
        content = dict(repo.at(revision)[1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                content[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del content[value["path"]]
        sha = repo.commit(content)
        url = f"{self.hub.url}/{repo_id}"
        self.answer(
            {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        )

    def info(self, repo_id, revision=None):
        if (repo := self.repo(repo_id)) is None:
            return
        if (found := repo.at(revision or "main")) is None:
            return self.fail(404, "RevisionNotFound")
        sha, content = found
        self.answer(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": sha,
                "private": False,
                "tags": [],
            }
            | {"siblings": [{"rfilename": name} for name in content], "downloads": 0}
        )

    def tree(self, repo_id, revision):
        if (repo := self.repo(repo_id)) is None:
            return
        if (found := repo.at(revision)) is None:
            return self.fail(404, "RevisionNotFound")
        self.answer(
            [
                {"type": "file", "path": n, "size": len(b)}
                | {"oid": hashlib.sha1(b).hexdigest()}
                for n, b in found[1].items()
            ]
        )

    def resolve(self, repo_id, revision, name):
        if (repo := self.repo(repo_id)) is None:
            return
        if (found := repo.at(revision)) is None:
            return self.fail(404, "RevisionNotFound")
        sha, content = found
        if name not in content:
            return self.fail(404, "EntryNotFound")
        data = content[name]
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(
            data, X_Repo_Commit=sha, ETag=tag, Content_Length=str(len(data)),
            Accept_Ranges="none",
        )  # fmt: skip


_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (r"POST /api/models/(.+)/preupload/([^/]+)", _Handler.preupload),
    (r"POST /(.+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /objects/(\w+)", _Handler.put_object),
    (r"POST /verify", _Handler.verify),
    (r"POST /api/models/(.+)/commit/([^/]+)", _Handler.commit),
    (r"GET /api/models/(.+)/revision/([^/]+)", _Handler.info),
    (r"GET /api/models/(.+)/tree/([^/]+)", _Handler.tree),
    (r"GET /api/models/([^/]+/[^/]+)", _Handler.info),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub in a thread."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
