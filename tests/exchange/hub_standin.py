"""A stand-in of the Hugging Face Hub's API: what its client asks when model repositories are made, pushed and pulled.

Everything is in memory. Answers have the fields that the client reads; xet storage is not offered.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
"""Tokens: may write to all, may read all, may see what is public."""

Files = dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs"})

    def commit(self, branch: str, files: Files) -> str:
        text = json.dumps([len(self.commits), {name: digest(content) for name, content in files.items()}])
        commit = hashlib.sha1(text.encode()).hexdigest()  # noqa: S324  as git names commits
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Hub:
    """Repositories by name, what was asked for (method and path), and answers that go wrong.

    Attributes:
        broken: start of "METHOD path" -> status that it is answered with.
        cut: bytes after which downloads break off.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    stored: Files = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: dict[str, int] = field(default_factory=dict)
    cut: int | None = None

    def files(self, name: str, revision: str = "main") -> Files:
        repo = self.repos[name]
        return repo.commits[repo.resolve(revision) or ""]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece, or each waits for an acknowledgement
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        self.body = self._read()
        path = urlsplit(self.path).path
        asked = f"{self.command} {path}"
        self.hub.asked.append(asked)
        try:
            self._break(asked)
            self._route(path)
        except RefusedError as refused:
            self._send(b'{"error": "refused"}', refused.status, {k: v for k, v in refused.headers.items() if v})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _break(self, asked: str) -> None:
        for start, status in self.hub.broken.items():
            if asked.startswith(start):
                raise RefusedError(status, message="it is broken")

    def _route(self, path: str) -> None:  # noqa: C901  a table of addresses
        words = [unquote(word) for word in path.strip("/").split("/")]
        match words:
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "validate-yaml"]:
                self._validate()
            case ["api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "branch", branch]:
                self._branch(f"{owner}/{name}", branch)
            case ["api", "models", owner, name, "preupload", _]:
                self._writing(f"{owner}/{name}")
                files = json.loads(self.body)["files"]
                modes = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": self._oid(f"{owner}/{name}", each["path"]),
                    }
                    for each in files
                ]
                self._json({"files": modes})
            case [owner, git, "info", "lfs", "objects", "batch"]:
                self._writing(f"{owner}/{git.removesuffix('.git')}")
                self._json({"transfer": "basic", "objects": [self._upload(each) for each in self._said()["objects"]]})
            case ["lfs", oid]:
                if digest(self.body) != oid:
                    raise RefusedError(400, message="another digest")
                self.hub.stored[oid] = self.body
                self._json({})
            case ["api", "models", owner, name, "commit", branch]:
                self._commit(f"{owner}/{name}", branch)
            case [owner, name, "resolve", revision, *file]:
                self._file(f"{owner}/{name}", revision, "/".join(file))
            case _:
                raise RefusedError(404, message=f"nothing is at {path}")

    def _said(self) -> Any:
        return json.loads(self.body)

    def _token(self) -> str | None:
        said = self.headers.get("Authorization")
        token = said.removeprefix("Bearer ") if said else None
        if token not in (None, WRITER, READER, STRANGER):
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return token

    def _seen(self, name: str) -> Repo:
        token, repo = self._token(), self.hub.repos.get(name)
        if repo is None or (repo.private and token not in (WRITER, READER)):
            raise RefusedError(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def _writing(self, name: str) -> Repo:
        repo = self._seen(name)
        if self._token() != WRITER:
            raise RefusedError(403, message="You may not write here")
        return repo

    def _at(self, name: str, revision: str) -> tuple[str, Files]:
        repo = self._seen(name)
        commit = repo.resolve(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def _create(self) -> None:
        said = self._said()
        name = f"{said['organization']}/{said['name']}"
        if self._token() != WRITER:
            raise RefusedError(403, message="You may not make repositories there")
        if name in self.hub.repos:
            raise RefusedError(409, message="You already created this model repo")
        self.hub.repos[name] = Repo(private=said.get("private") is True or said.get("visibility") == "private")
        self._json({"url": f"{self._here()}/{name}"})

    def _validate(self) -> None:
        wrong = "license: my own" in self._said()["content"]
        errors = [{"message": '"license" must be one of its list'}] if wrong else []
        self._json({"errors": errors, "warnings": []}, 400 if wrong else 200)

    def _info(self, name: str, revision: str) -> None:
        commit, files = self._at(name, revision)
        siblings = [{"rfilename": file} for file in sorted(files)]
        self._json({"id": name, "sha": commit, "private": self._seen(name).private, "siblings": siblings, "tags": []})

    def _branch(self, name: str, branch: str) -> None:
        repo = self._writing(name)
        if branch in repo.branches:
            raise RefusedError(409, message="Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._json({})

    def _oid(self, name: str, path: str) -> str | None:
        content = self.hub.files(name).get(path)
        if content is None:
            return None
        if path.endswith(".safetensors"):
            return digest(content)
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324  as git names files

    def _upload(self, each: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": each["oid"], "size": each["size"]}
        if each["oid"] in self.hub.stored:
            return found
        return found | {"actions": {"upload": {"href": f"{self._here()}/lfs/{each['oid']}"}}}

    def _commit(self, name: str, branch: str) -> None:
        repo, files = self._writing(name), dict(self._at(name, branch)[1])
        for line in self.body.splitlines():
            value = json.loads(line)["value"]
            if value.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
                raise RefusedError(412, message="The repository has changed")
            match json.loads(line)["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.stored[value["oid"]]
        commit = repo.commit(branch, files)
        self._json({"commitUrl": f"{self._here()}/{name}/commit/{commit}", "commitOid": commit})

    def _file(self, name: str, revision: str, file: str) -> None:
        commit, files = self._at(name, revision)
        if self._seen(name).gated:
            raise RefusedError(403, "GatedRepo", "Access to it is restricted")
        if file not in files:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        self._send(files[file], 200, {"ETag": f'"{digest(files[file])}"', "X-Repo-Commit": commit}, cut=self.hub.cut)

    def _here(self) -> str:
        return f"http://{self.headers['Host']}"

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, headers: dict[str, str], *, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[:cut])
        if cut is not None and len(content) > cut:
            self.close_connection = True


class Server:
    """`with Server() as hub:`, the hub's `url` beside what it holds."""

    def __enter__(self) -> Self:
        self.hub = Hub()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Handler", (Handler,), {"hub": self.hub}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
