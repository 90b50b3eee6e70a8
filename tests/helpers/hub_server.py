"""A server on loopback that speaks as much of the Hub's HTTP API as pushing and pulling a model or a dataset take, and
pushing a Space."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: every commit is a whole set of files. `faults` makes the next transfers break off.

    Models are kept by their id, datasets by "datasets/" and their id, Spaces by "spaces/" and theirs.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}  # id -> commit -> path -> bytes
        self.heads: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.faults: dict[str, int] = {"upload": 0, "download": 0}
        self.served: list[str] = []  # names of files that were sent

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process of its own has this server for its Hub, whatever it inherits."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
        }

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        contents = [(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([self.heads.get(repo), contents]).encode()).hexdigest()  # noqa: S324
        self.repositories.setdefault(repo, {})[oid] = files
        self.heads[repo] = oid
        return oid

    def takes_fault(self, kind: str) -> bool:
        if self.faults[kind] > 0:
            self.faults[kind] -= 1
            return True
        return False


_REPO = "((?:datasets/)?[^/]+/[^/]+)"  # as in the addresses of files
_API = "/api/(models|datasets|spaces)/([^/]+/[^/]+)"
_LARGE = (".safetensors", ".sqlite", ".faiss")


def _key(kind: str | None, repo: str) -> str:
    folder = {"dataset": "datasets/", "space": "spaces/"}.get((kind or "").removesuffix("s"), "")
    return folder + repo


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any):
        pass

    # ---- reading ----

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            return self._json({"name": "tester", "type": "user", "orgs": []})
        if match := re.fullmatch(_API + "(?:/revision/([^/]+))?", path):
            return self._with_commit(_key(match[1], match[2]), match[3] or "main", self._info)
        if match := re.fullmatch(_API + "/tree/([^/]+)(?:/(.*))?", path):
            return self._with_commit(_key(match[1], match[2]), match[3], self._tree, match[4] or "")
        if match := re.fullmatch(f"/{_REPO}/resolve/([^/]+)/(.+)", path):
            return self._with_commit(match[1], match[2], self._file, match[3])
        return self._error(404, "EntryNotFound")

    def _with_commit(self, repo: str, revision: str, answer, *args):
        if repo not in self.server.heads:
            return self._error(401, "RepoNotFound")
        oid = self.server.heads[repo] if revision == "main" else revision
        files = self.server.repositories[repo].get(oid)
        if files is None:
            return self._error(404, "RevisionNotFound")
        return answer(repo, oid, files, *args)

    def _info(self, repo, oid, files):
        siblings = [{"rfilename": name} for name in files]
        repo = repo.removeprefix("datasets/")
        self._json({"_id": "0", "id": repo, "modelId": repo, "sha": oid, "private": False, "tags": [],
                    "siblings": siblings})  # fmt: skip

    def _tree(self, repo, oid, files, folder):
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha256(data).hexdigest()[:40]}
            for name, data in files.items()
            if name.startswith(folder)
        ]
        self._json(entries) if entries or not folder else self._error(404, "EntryNotFound")

    def _file(self, repo, oid, files, name):
        if name not in files:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": oid})
        data = files[name]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        body = data[start:]
        self.send_response(206 if start else 200)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes",
                   "Content-Length": str(len(body))}  # fmt: skip
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.served.append(name)
        if name.endswith(".safetensors") and self.server.takes_fault("download"):
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    # ---- writing ----

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'tester'}/{request['name']}"
            repo = _key(request.get("type"), name)
            if repo in self.server.heads:
                return self._json({"error": "You already created it", "url": f"{self.server.url}/{repo}"}, 409)
            self.server.commit(repo, {})
            return self._json({"url": f"{self.server.url}/{repo}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if re.fullmatch(_API + "/preupload/[^/]+", path):
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                 "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self._json({"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {"oid": entry["oid"], "size": entry["size"],
                 "actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]  # fmt: skip
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(_API + "/commit/[^/]+", path):
            return self._commit(_key(match[1], match[2]), body)
        return self._error(404, "EntryNotFound")

    def do_PUT(self):
        length = int(self.headers["Content-Length"])
        if self.server.takes_fault("upload"):
            self.rfile.read(length // 2)
            self.close_connection = True
            return None
        data = self.rfile.read(length)
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        return self._json({})

    def _commit(self, repo: str, body: bytes):
        files = dict(self.server.repositories[repo][self.server.heads[repo]])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = self.server.commit(repo, files)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    # ---- answers ----

    def _json(self, value: Any, status: int = 200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None):
        self.send_response(status)
        for key, value in {"X-Error-Code": code, "Content-Length": "0", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
