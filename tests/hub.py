"""A Hugging Face hub on this machine, for its real client to download from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

_ROUTE = re.compile(
    r"/api/models/(?P<id>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?"
    r"|/(?P<of>[^/]+/[^/]+)/resolve/(?P<at>[^/]+)/(?P<name>.+)"
)


class Hub:
    """Models by id, each with its commits, the oldest first: files by hash.

    Attributes:
        url: Where it answers.
        downloads: Id and name of each file that was fetched.
    """

    def __init__(self, server: HTTPServer):
        self.url = server.url_for("")
        self.downloads: list[tuple[str, str]] = []
        self._repos: dict[str, dict[str, dict[str, bytes]]] = {}
        server.expect_request(_ROUTE).respond_with_handler(self._answer)

    def add(self, repo_id: str, content: dict[str, bytes]) -> str:
        """A commit, and its hash."""
        commits = self._repos.setdefault(repo_id, {})
        sha = hashlib.sha1(f"{repo_id}{len(commits)}".encode()).hexdigest()
        commits[sha] = content
        return sha

    def _answer(self, request: Request) -> Response:
        given = _ROUTE.fullmatch(request.path)
        assert given
        commits = self._repos.get(given["id"] or given["of"])
        if commits is None:
            return _missing("RepoNotFound")
        revision = given["revision"] or given["at"] or "main"
        sha = list(commits)[-1] if revision == "main" else revision
        content = commits.get(sha)
        if content is None:
            return _missing("RevisionNotFound")
        if given["what"] == "tree":
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                for name, data in content.items()
            ]
            return Response(json.dumps(files), content_type="application/json")
        if given["id"]:
            siblings = [{"rfilename": name} for name in content]
            info = {"id": given["id"], "sha": sha, "siblings": siblings}
            return Response(json.dumps(info), content_type="application/json")
        if given["name"] not in content:
            return _missing("EntryNotFound")
        if request.method == "GET":
            self.downloads.append((given["of"], given["name"]))
        data = content[given["name"]]
        tags = {"X-Repo-Commit": sha, "ETag": f'"{_digest(data)}"'}
        return Response(data, headers=tags)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _missing(code: str) -> Response:
    return Response(status=404, headers={"X-Error-Code": code, "X-Error-Message": code})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub in a thread; nothing may have gone wrong in it."""
    with HTTPServer(threaded=True) as server:
        yield Hub(server)
        server.check()
