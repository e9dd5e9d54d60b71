"""A local stand-in for the HTTP interface of the Hugging Face hub, for the real client to talk to.

It keeps each commit whole, as files by path. Files that end in .safetensors go through the large-file protocol as on
the hub: announced, put one by one, named in the commit by their SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

TOKEN = "hf_of_the_tests"


class HubServer(ThreadingHTTPServer):
    """Attributes: repositories, name → its commits, newest last, each (id, files); private, names of those that were
    made so; requests, "METHOD path" of each; refuse, the status with which pushes are answered, 0 for none."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.refuse = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Make these files the repository's newest commit; returns its id."""
        number = str(len(self.repositories.setdefault(name, [])))
        content = b"".join(path.encode() + data for path, data in sorted(files.items()))
        commit = hashlib.sha1(number.encode() + content).hexdigest()
        self.repositories[name].append((commit, dict(files)))
        return commit

    def files(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """A commit's id and files; None where there is none such."""
        commits = self.repositories.get(name, [])
        found = commits[-1:] if revision == "main" else [one for one in commits if one[0] == revision]
        return found[0] if found else None


@contextmanager
def hub_in_use(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A stand-in that the client takes for the hub, with a cache and a token of the test's own."""
    server = HubServer()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
    for name, value in {**settings, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, body: bytes) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                if method in ("POST", "PUT") and "validate-yaml" not in path:
                    # What is uploaded goes to a signed address, which takes no token, on the hub.
                    if method == "POST" and self.headers["Authorization"] != f"Bearer {TOKEN}":
                        return self._answer(401, {"error": "no token"})
                    if self.server.refuse:
                        return self._answer(self.server.refuse, {"error": "not yours"}, X_Error_Message="not yours")
                return handle(self, body, *match.groups())
        return self._answer(404, {"error": f"no such place: {path}"}, X_Error_Code="RepoNotFound")

    def do_GET(self) -> None:
        self._route(b"")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self._route(self.rfile.read(int(self.headers["Content-Length"] or 0)))

    do_PUT = do_POST  # noqa: N815

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.server.repositories
        if not known:
            self.server.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            if wanted.get("visibility") == "private" or wanted.get("private"):
                self.server.private.add(name)
        self._answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "id": name})

    def validate(self, body: bytes) -> None:
        head = json.loads(body)["content"].split("---")[1]
        errors = [] if "license:" in head and "library_name:" in head else [{"message": "no licence, or no library"}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = json.loads(body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
        self._answer(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def batch(self, body: bytes, name: str) -> None:
        objects = json.loads(body)["objects"]
        places = [{**one, "actions": {"upload": {"href": f"{self.server.url}/put/{one['oid']}"}}} for one in objects]
        self._answer(200, {"transfer": "basic", "objects": places})

    def put(self, body: bytes, oid: str) -> None:
        whole = hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self._answer(200 if whole else 400)

    def make_commit(self, body: bytes, name: str, revision: str) -> None:
        known = self.server.files(name)
        files = dict(known[1]) if known else {}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.server.commit(name, files)
        url = f"{self.server.url}/{name}/commit/{commit}"
        self._answer(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        found = self.server.files(name, revision)
        if found is None:
            code = "RevisionNotFound" if name in self.server.repositories else "RepoNotFound"
            return self._answer(404, {"error": "not found"}, X_Error_Code=code)
        siblings = [{"rfilename": path} for path in found[1]]
        return self._answer(200, {"id": name, "sha": found[0], "siblings": siblings, "private": False})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        found = self.server.files(name, revision)
        if found is None:
            return self._answer(404, {"error": "not found"}, X_Error_Code="RevisionNotFound")
        return self._answer(
            200,
            [{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in found[1].items()],
        )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self.server.files(name, revision)
        if found is None or path not in found[1]:
            return self._answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
        data = found[1][path]
        return self._answer(200, data, ETag=f'"{_oid(data)}"', X_Repo_Commit=found[0])


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/put/([0-9a-f]+)", _Handler.put),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.make_commit),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
