"""A stand-in for the Hugging Face Hub on 127.0.0.1: enough of its HTTP interface for the real `huggingface_hub` client.

It keeps repositories in memory, gives every commit a 40-hex hash, treats .safetensors files as LFS objects (whose ETag
is their SHA-256) and all others as git blobs, answers Range requests, and counts what it is asked. `faults` spoil
answers. Xet storage is not spoken: set HF_HUB_DISABLE_XET=1 for uploads.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_testtoken"
OWNER = "tester"


@dataclass
class Repository:
    """Commits in order, each a full set of files; `main` is the last."""

    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, changes: dict[str, bytes]) -> str:
        files = {**(self.commits[self.head] if self.commits else {}), **changes}
        revision = hashlib.sha1(f"{len(self.commits)} {sorted(files)} {time.time_ns()}".encode()).hexdigest()
        self.commits[revision] = files
        return revision

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def resolve(self, revision: str) -> str | None:
        if revision == "main" and self.commits:
            return self.head
        return revision if revision in self.commits else None


class HubServer:
    """The server with its state; `with running_hub() as hub:` starts and stops one.

    Attributes:
        repositories: ``"owner/name"`` -> Repository.
        requests: (method, path) of every request, in order.
        faults: file name -> ``"short"`` (half the body, and says so), ``"broken"`` (connection lost half-way, once),
            ``"stalled"`` (silence half-way, once), ``"wrong"`` (a changed byte), ``"silent"`` (no answer for 8 s),
            ``"dripping"`` (a byte now and then), ``"down"`` (HTTP 503), ``"busy"`` (HTTP 429).
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, str] = {}
        self.lock = threading.Lock()
        self.connections: list[socket.socket] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], *, gated: bool = False) -> str:
        """Commit files to a repository, made if missing; the commit."""
        repository = self.repositories.setdefault(name, Repository())
        repository.gated = gated
        return repository.commit(files)

    def count(self, method: str | None = None) -> int:
        """Requests so far."""
        return sum(method in (None, asked) for asked, _ in self.requests)

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Stop, and hang up on clients that keep their connection open."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def running_hub() -> Iterator[HubServer]:
    hub = HubServer()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _RefusalError(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            hub.connections.append(self.connection)

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            with hub.lock:
                hub.requests.append((self.command, path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self._chunks()
            try:
                for pattern, method in ROUTES:
                    if found := re.fullmatch(pattern, f"{self.command} {path}"):
                        getattr(self, method)(body, *found.groups())
                        return
                raise _RefusalError(404, None, f"no route for {self.command} {path}")
            except _RefusalError as refusal:
                headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
                self.reply(refusal.status, {"error": str(refusal)}, headers)

        def reply(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _chunks(self) -> bytes:
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        # --- who may do what

        def repository(self, name: str) -> Repository:
            if name not in hub.repositories:
                raise _RefusalError(401, "RepoNotFound", "Repository not found")
            repository = hub.repositories[name]
            if repository.gated and not self.authorized:
                raise _RefusalError(401, "GatedRepo", f"Access to model {name} is restricted")
            return repository

        def commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
            repository = self.repository(name)
            commit = repository.resolve(revision)
            if commit is None:
                raise _RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return commit, repository.commits[commit]

        @property
        def authorized(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def writer(self, owner: str) -> None:
            if not self.authorized:
                raise _RefusalError(401, None, "Invalid username or password.")
            if owner != OWNER:
                raise _RefusalError(403, None, f"You don't have the rights to write to {owner}")

        # --- reading

        def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
            fault = hub.faults.get(path)
            if fault in ("down", "busy"):
                raise _RefusalError(*((503, None, "Unavailable") if fault == "down" else (429, None, "Too Many")))
            if fault == "silent":
                time.sleep(8)
            commit, files = self.commit(name, revision)
            if path not in files:
                raise _RefusalError(404, "EntryNotFound", "Entry not found")
            content = files[path]
            etag = sha256(content) if is_lfs(path) else git_oid(content)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            if is_lfs(path):
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            if self.command == "HEAD":
                self.reply(200, content, headers)
                return
            start, end, status = 0, len(content), 200
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end, status = int(asked[1]), min(end, int(asked[2] or end) + 1), 206
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            sent = content[start:end]
            if fault == "short":
                sent = sent[: len(sent) // 2]
            elif fault == "wrong":
                sent = bytes([sent[0] ^ 1]) + sent[1:]
            elif fault == "dripping" or (fault in ("broken", "stalled") and end == len(content)):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.close_connection = True
                if fault == "dripping":
                    for byte in sent:
                        if hub.faults.get(path) == fault:
                            self.wfile.write(bytes([byte]))
                            time.sleep(0.2)
                    return
                del hub.faults[path]
                self.wfile.write(sent[: len(sent) // 2])
                time.sleep(5 if fault == "stalled" else 0)
                return
            self.reply(status, sent, headers)

        def model_info(self, _: bytes, name: str, revision: str | None) -> None:
            commit, files = self.commit(name, revision or "main")
            self.reply(200, {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})

        def paths_info(self, body: bytes, name: str, revision: str) -> None:
            _, files = self.commit(name, revision)
            asked = parse_qs(body.decode())["paths"]
            self.reply(200, [_facts(path, files[path]) for path in asked if path in files])

        # --- writing

        def whoami(self, _: bytes) -> None:
            self.writer(OWNER)
            self.reply(200, {"type": "user", "name": OWNER, "orgs": [], "auth": {"type": "access_token"}})

        def create(self, body: bytes) -> None:
            asked = json.loads(body)
            owner = asked.get("organization") or OWNER
            self.writer(owner)
            name = f"{owner}/{asked['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(name, Repository())
            if not known:
                hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self.reply(409 if known else 200, {"url": f"{hub.url}/{name}", "name": name})

        def validate_yaml(self, body: bytes) -> None:
            text = json.loads(body)["content"]
            try:
                _, header, _ = text.split("---\n", 2)
                facts = yaml.safe_load(header)
                errors = [] if isinstance(facts.get("license"), str) else [{"message": '"license" is required'}]
            except (ValueError, AttributeError, yaml.YAMLError) as error:
                errors = [{"message": f"invalid YAML: {error}"}]
            self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

        def preupload(self, body: bytes, name: str, _: str) -> None:
            self.writer(name.split("/")[0])
            self.repository(name)
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if is_lfs(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.reply(200, {"files": modes})

        def lfs_batch(self, body: bytes, name: str) -> None:
            self.writer(name.split("/")[0])
            objects = []
            for asked in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}", "header": {}}}
                objects.append(asked if asked["oid"] in hub.objects else asked | {"actions": upload})
            self.reply(200, {"transfer": "basic", "objects": objects})

        def lfs_upload(self, body: bytes, oid: str) -> None:
            if sha256(body) != oid:
                raise _RefusalError(400, None, "the content does not match its oid")
            hub.objects[oid] = body
            self.reply(200)

        def make_commit(self, body: bytes, name: str, _: str) -> None:
            self.writer(name.split("/")[0])
            repository = self.repository(name)
            changes = {}
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    changes[value["path"]] = hub.objects[value["oid"]]
            commit = repository.commit(changes)
            url = f"{hub.url}/{name}/commit/{commit}"
            self.reply(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    return Handler


def _facts(path: str, content: bytes) -> dict[str, Any]:
    facts: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_lfs(path):
        facts["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return facts


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
    (rf"GET /api/models/{_REPO}(?:/revision/([^/]+))?", "model_info"),
    (rf"POST /api/models/{_REPO}/paths-info/([^/]+)", "paths_info"),
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"POST /api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/([0-9a-f]{64})", "lfs_upload"),
    (rf"POST /api/models/{_REPO}/commit/([^/]+)", "make_commit"),
]
