"""A hub of one process: the calls of the hub's HTTP interface that its client makes to list, fetch and commit."""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from typing import Any

import yaml

COMMIT = "a" * 40
LARGE = (".safetensors", ".png", ".webp", ".gif")


class Hub:
    """Repositories by name, each with its files; ``requests`` and ``commits`` tell what was asked and made.

    ``cut`` ends every transfer of a file after so many bytes; ``sizes`` replaces what listings say.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.sizes: dict[str, int] = {}
        self.requests: list[str] = []
        self.commits: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.cut: int | None = None
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.owner.requests.append(f"{method} {path}")
        for pattern, handle in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._listing),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._valid),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/(\w+)", self._put),
        ):
            if found := re.fullmatch(pattern, path):
                handle(body, *found.groups())
                return
        self._answer(404, {"error": "no such call"})

    def _answer(self, status: int, data: Any, **headers: str) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            cut = self.owner.cut
            if cut is not None and "ETag" in headers and len(content) > cut:
                self.wfile.write(content[:cut])
                self.close_connection = True
                return
            self.wfile.write(content)

    def _known(self, repository: str, revision: str | None) -> bool:
        if repository not in self.owner.repositories:
            self._answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return False
        if revision not in (None, "main", COMMIT):
            self._answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return False
        return True

    def _listing(self, body: bytes, repository: str, revision: str | None) -> None:
        if not self._known(repository, revision):
            return
        files = self.owner.repositories[repository]
        siblings = [
            {"rfilename": n, "size": self.owner.sizes.get(n, len(c)), "blobId": _id(c)} for n, c in files.items()
        ]
        card = self.owner.cards.get(repository)
        self._answer(
            200,
            {
                "id": repository,
                "modelId": repository,
                "sha": COMMIT,
                "siblings": siblings,
                "cardData": card,
                "tags": [],
            },
        )

    def _file(self, body: bytes, repository: str, revision: str, name: str) -> None:
        if not self._known(repository, revision):
            return
        content = self.owner.repositories[repository].get(name)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        headers = {"ETag": f'"{_id(content)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(span[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206, content[start:], **headers)
            return
        self._answer(200, content, **headers)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.owner.repositories.setdefault(name, {})
        self._answer(200, {"url": f"{self.owner.address}/{name}", "name": name, "id": name})

    def _valid(self, body: bytes) -> None:
        head = json.loads(body)["content"].split("---\n")[1]
        errors = [] if isinstance(yaml.safe_load(head), dict) else [{"message": "no mapping"}]
        self._answer(200, {"errors": errors, "warnings": []})

    def _preupload(self, body: bytes, repository: str, revision: str) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": modes})

    def _batch(self, body: bytes, repository: str) -> None:
        objects = [
            {
                "oid": entry["oid"],
                "size": entry["size"],
                "actions": {"upload": {"href": f"{self.owner.address}/lfs/{entry['oid']}", "header": {}}},
            }
            for entry in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.owner.objects[oid] = body
        self._answer(200, {})

    def _commit(self, body: bytes, repository: str, revision: str) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line]
        files = self.owner.repositories[repository]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.owner.objects[value["oid"]]
        head = next(line["value"] for line in lines if line["key"] == "header")
        self.owner.commits.append({"repository": repository, "revision": revision, **head})
        self._answer(200, {"commitUrl": f"{self.owner.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})


def _id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
