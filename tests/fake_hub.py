"""A small Hugging Face Hub on loopback: the requests that huggingface_hub makes to read and write models.

Repositories are dictionaries in memory. Every commit is kept, files have the hashes of git and of LFS, and writing
needs a token. What it cannot do is answered with 501, so that a request of a newer library is seen, not guessed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from pretrain.checkpoint.licences import HUB_LICENCES

TOKEN = "hf_of_the_tests"
_LARGE = (".safetensors", ".bin")  # stored by LFS, under their SHA-256


@dataclass
class Repository:
    """Commits (hash -> files), branches and tags (name -> hash), and how others see it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    licence: str | None = None
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with exactly these files and return its hash."""
        digest = hashlib.sha1(f"{len(self.commits)}".encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode() + data)
        self.commits[digest.hexdigest()] = {
            ".gitattributes": b"*.safetensors filter=lfs\n",
            **files,
        }
        self.refs[branch] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class FakeHub:
    """The server, as a context manager; ``requests`` holds method and path of everything that it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}  # uploaded by LFS, before the commit that names them
        self.damaged: set[str] = set()  # files that arrive with one bit flipped
        self.cut: set[str] = set()  # files whose connection ends in their middle
        self.status = 0  # answer everything with it

    def add(self, name: str, directory: Path, **about: object) -> str:
        """Commit the files of a directory to a new or an existing repository, and return the hash of the commit."""
        repository = self.repositories.setdefault(name, Repository())
        for key, value in about.items():
            setattr(repository, key, value)
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        return repository.commit(
            {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}
        )

    def __enter__(self) -> FakeHub:
        hub = self
        handler = type("Handler", (_Handler,), {"hub": hub})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        routes = (
            ("GET", r"/api/models/(.+?)(?:/revision/(.+))?", self._info),
            ("GET", r"/api/models/(.+?)/tree/([^/]+)(?:/(.+))?", self._tree),
            ("HEAD|GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._valid),
            ("POST", r"/api/models/(.+?)/preupload/.+", self._modes),
            ("POST", r"/(.+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/([0-9a-f]{64})", self._put),
            ("POST", r"/api/models/(.+?)/commit/(.+)", self._commit),
        )
        if self.hub.status:
            return self._say(self.hub.status, error="The server is busy.")
        # The last that matches: /tree/ and /revision/ are longer than the name of a model.
        for methods, pattern, action in reversed(routes):
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split("|"):
                if self.command in ("POST", "PUT") and action != self._put and not self._known():
                    return self._say(401, error="Invalid username or password.")
                return action(*found.groups(), *([body] if self.command in ("POST", "PUT") else []))
        return self._say(501, error=f"{self.command} {path} is not known here.")

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _say(self, status: int, content: object = None, code: str = "", **error: str) -> None:
        data = json.dumps(error or content).encode()
        headers = {"Content-Type": "application/json"} | ({"X-Error-Code": code} if code else {})
        self._send(status, headers, data)

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -------------------------------------------------------------------------------------------- reading

    def _found(self, name: str, revision: str | None) -> tuple[Repository, str] | None:
        """The repository and the commit, or None after the error has been sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._known()):
            return self._say(404, code="RepoNotFound", error="Repository not found")
        commit = repository.resolve(revision or "main")
        if commit is None:
            return self._say(404, code="RevisionNotFound", error="Invalid rev id")
        return repository, commit

    def _info(self, name: str, revision: str | None) -> None:
        if found := self._found(name, revision):
            repository, commit = found
            files = [
                {"rfilename": entry.pop("path"), "blobId": entry.pop("oid"), **entry}
                for entry in _entries(repository.commits[commit])
            ]
            for file in files:
                if "lfs" in file:
                    file["lfs"]["sha256"] = file["lfs"].pop("oid")
            card = {"license": repository.licence} if repository.licence else {}
            about = {"id": name, "sha": commit, "siblings": files, "cardData": card}
            self._say(200, about | {"private": repository.private, "tags": []})

    def _tree(self, name: str, revision: str, folder: str | None) -> None:
        if found := self._found(name, revision):
            entries = _entries(found[0].commits[found[1]])
            inside = [e for e in entries if not folder or str(e["path"]).startswith(f"{folder}/")]
            if inside:
                return self._say(200, inside)
            return self._say(404, code="EntryNotFound", error="No such folder")
        return None

    def _file(self, name: str, revision: str, file: str) -> None:
        if (found := self._found(name, revision)) is None:
            return None
        repository, commit = found
        if repository.gated and not self._known():
            return self._say(403, code="GatedRepo", error="Access to this model is restricted.")
        data = repository.commits[commit].get(file)
        if data is None:
            return self._say(404, code="EntryNotFound", error="Entry not found")
        large = file.endswith(_LARGE)
        etag = hashlib.sha256(data).hexdigest() if large else _git_hash(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        if file in self.hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if file in self.hub.cut and self.command == "GET":
            headers["Content-Length"] = str(len(data))
            data = data[: len(data) // 2]
            self.close_connection = True
        return self._send(200, headers, data)

    # -------------------------------------------------------------------------------------------- writing

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            return self._say(409, url | {"error": "You already created this model repo"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private=private)
        self.hub.repositories[name].commit({})
        return self._say(200, url)

    def _valid(self, body: bytes) -> None:
        head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        licence, base = head.get("license", "mit"), head.get("base_model", "org/name")
        errors = [
            {"message": f'"{name}" is not valid'}
            for name, good in (
                ("license", licence in HUB_LICENCES),
                ("license_name", licence != "other" or "license_name" in head),
                ("base_model", re.fullmatch(r"([\w.-]+/)?[\w.-]+", base)),
            )
            if not good
        ]
        self._say(400 if errors else 200, {"errors": errors, "warnings": []})

    def _modes(self, name: str, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        files = [
            {
                "path": p,
                "uploadMode": "lfs" if p.endswith(_LARGE) else "regular",
                "shouldIgnore": False,
            }
            for p in paths
        ]
        self._say(200, {"files": files})

    def _batch(self, name: str, body: bytes) -> None:
        objects = [
            file | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"}}}
            for file in json.loads(body)["objects"]
        ]
        self._say(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs |= {oid: body} if good else {}
        self._say(200 if good else 400)

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        if (found := self._found(name, branch)) is None:
            return
        repository, before = found
        files = dict(repository.commits[before])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, branch)
        self._say(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(files: dict[str, bytes]) -> list[dict[str, object]]:
    """The listing of the files of a commit."""
    found = []
    for path, data in sorted(files.items()):
        entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
        if path.endswith(_LARGE):
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        found.append(entry)
    return found
