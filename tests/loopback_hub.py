"""A small real hub on 127.0.0.1: as much of the Hugging Face HTTP API as a download needs, with faults.

Two servers, as the hub has: one answers the API and says where a file is, the other, of another origin,
hands out the large files. Faults are set per repository and may change while it runs. Everything ends
with the ``with`` block; nothing waits longer than ``Faults.hang_s``.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".gguf", ".model"})
GOOD_TOKEN = "hf_loopbackGoodToken"  # accepted everywhere
OTHER_TOKEN = "hf_loopbackOtherToken"  # a real account's, without access to gated repositories
_CHUNK = 1 << 20


@dataclass
class Faults:
    """What goes wrong for one repository. Counted faults wear off; the rest stay until changed."""

    gated: bool = False
    private: bool = False
    status: int = 0  # answer with this error ...
    status_times: int = 0  # ... so many more times
    status_on: str = ""  # ... to requests whose path contains this
    retry_after: str = ""
    cut_after: int = -1  # the next large body longer than this ends here, once
    reset: bool = False  # the cut is a connection reset, not a close
    hang_after: int = -1  # ... or stops here for hang_s, once
    hang_api: bool = False
    hang_s: float = 5.0
    drop: bool = False  # connections to files close without an answer
    wrong_bytes: str = ""  # this file arrives with its last byte changed
    short_by: int = 0  # weights arrive, in good order, so many bytes short
    ignore_range: bool = False
    odd_etag: bool = False  # as a mirror might: not the SHA-256
    xet: bool = False  # announce Xet storage, which is not served here
    claim_bytes: int = 0  # state this size for weights
    garbage: bool = False  # the API answers with a web page


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    range: str
    authorized: bool
    cdn: bool


@dataclass
class Model:
    folder: Path
    faults: Faults

    @cached_property
    def files(self) -> dict[str, bytes]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}

    @cached_property
    def hashes(self) -> dict[str, str]:
        return {name: hashlib.sha256(body).hexdigest() for name, body in self.files.items()}

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps(self.hashes).encode()).hexdigest()

    def etag(self, name: str) -> str:
        if is_lfs(name):
            return f"mirror-{self.hashes[name][:16]}" if self.faults.odd_etag else self.hashes[name]
        body = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    def served(self, name: str) -> bytes:
        body = self.files[name]
        if self.faults.wrong_bytes == name:
            body = body[:-1] + bytes([body[-1] ^ 1])
        return body[: len(body) - self.faults.short_by] if name.endswith(".safetensors") else body

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, body in self.files.items():
            size = self.faults.claim_bytes if self.faults.claim_bytes and is_lfs(name) else len(body)
            lfs = {"size": size, "sha256": self.hashes[name], "pointerSize": 134}
            siblings.append({"rfilename": name, "size": size, **({"lfs": lfs} if is_lfs(name) else {})})
        return {
            "sha": self.commit,
            "private": self.faults.private,
            "gated": "manual" if self.faults.gated else False,
            "siblings": siblings,
            "safetensors": {"parameters": {"F32": 1234}, "total": 1234},
        }


@dataclass
class LoopbackHub:
    models: dict[str, Model]
    url: str = ""
    cdn_url: str = ""
    log: list[Seen] = field(default_factory=list)
    body_bytes: int = 0  # of large files, written to sockets so far
    counting: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def faults(self, repo: str) -> Faults:
        return self.models[repo].faults

    def requests(self, containing: str, method: str = "") -> list[Seen]:
        """Requests so far whose path contains ``containing``, oldest first."""
        return [seen for seen in self.log if containing in seen.path and method in ("", seen.method)]

    def count(self, n_bytes: int) -> None:
        with self.counting:
            self.body_bytes += n_bytes


def is_lfs(name: str) -> bool:
    return Path(name).suffix in LFS_SUFFIXES


@contextmanager
def serve_hub(models: Mapping[str, Path], faults: Mapping[str, Faults] | None = None) -> Iterator[LoopbackHub]:
    """Serve each ``owner/name`` from a folder; revisions are ``main`` and the commit."""
    known = {repo: Model(path, (faults or {}).get(repo, Faults())) for repo, path in models.items()}
    hub = LoopbackHub(known)
    servers = [_server(hub, cdn=False), _server(hub, cdn=True)]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join(10)


def _server(hub: LoopbackHub, *, cdn: bool) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "cdn": cdn})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    hub: LoopbackHub
    cdn: bool

    def log_message(self, *_: object) -> None:
        return None

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.log.append(Seen(self.command, path, self.headers.get("Range", ""), bool(token), self.cdn))
        parts = path.strip("/").split("/")
        try:
            match parts:
                case ["cdn", owner, name, *rest] if self.cdn:
                    self._body(self.hub.models[f"{owner}/{name}"], "/".join(rest))
                case ["api", "models", owner, name]:
                    self._api(f"{owner}/{name}", "main", token)
                case ["api", "models", owner, name, "revision", revision]:
                    self._api(f"{owner}/{name}", revision, token)
                case [owner, name, "resolve", revision, *rest]:
                    self._resolve(f"{owner}/{name}", revision, "/".join(rest), token)
                case _:
                    self._refuse(404)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _api(self, repo: str, revision: str, token: str) -> None:
        model = self._model(repo, revision, token, gate=False)
        if model is None:
            return
        if model.faults.hang_api:
            self.hub.ended.wait(model.faults.hang_s)
        if model.faults.garbage:
            self._send(200, b"<html>Sign in to the guest network</html>", {"Content-Type": "text/html"})
            return
        info = {"id": repo, **model.info()}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, revision: str, name: str, token: str) -> None:
        model = self._model(repo, revision, token, gate=True)
        if model is None:
            return
        if model.faults.drop:
            self.close_connection = True
            return
        headers = {"X-Repo-Commit": model.commit}
        if name not in model.files:
            self._refuse(404, "EntryNotFound", headers=headers)
        elif is_lfs(name):
            headers["X-Linked-Size"] = str(model.faults.claim_bytes or len(model.files[name]))
            headers["X-Linked-ETag"] = f'"{model.etag(name)}"'
            headers["Location"] = f"{self.hub.cdn_url}/cdn/{repo}/{name}?Signature=secret"
            if model.faults.xet:
                headers["X-Xet-Hash"] = model.hashes[name]
                headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{repo}/xet-read-token/main"
            self._send(302, b"", headers)
        else:
            self._plain(model.served(name), headers | {"ETag": f'"{model.etag(name)}"'})

    def _model(self, repo: str, revision: str, token: str, *, gate: bool) -> Model | None:
        """The model asked for; None when the refusal was sent."""
        model = self.hub.models.get(repo)
        if refusal := self._refusal(model, revision, token, gate=gate):
            self._refuse(*refusal)
            return None
        return model

    def _refusal(
        self, model: Model | None, revision: str, token: str, *, gate: bool
    ) -> tuple[int, str, str, Mapping[str, str]] | None:
        """Status, X-Error-Code, X-Error-Message and further headers, as the real hub words them."""
        if token and token not in (GOOD_TOKEN, OTHER_TOKEN):
            return 401, "", f"Invalid credentials in Authorization header ({token})", {}
        if model is None or (model.faults.private and token != GOOD_TOKEN):
            return (404, "RepoNotFound", "", {}) if token else (401, "", "Invalid username or password.", {})
        faults, refusal = model.faults, None
        if faults.status_times > 0 and faults.status_on in self.path:
            faults.status_times -= 1
            refusal = faults.status, "", "", {"Retry-After": faults.retry_after} if faults.retry_after else {}
        elif revision not in ("main", model.commit):
            refusal = 404, "RevisionNotFound", f"Invalid rev id: {revision}", {}
        elif gate and faults.gated and token != GOOD_TOKEN:
            refusal = 403 if token else 401, "GatedRepo", "Access to this model is restricted.", {}
        return refusal

    def _body(self, model: Model, name: str) -> None:
        """A large file or the part of it asked for, with the faults that strike bodies."""
        faults, body = model.faults, model.served(name)
        asked = self._asked(len(body), ignore_range=faults.ignore_range)
        if asked is None:
            return
        status, part, headers = asked
        self._head(status, len(part), headers)
        if self.command == "HEAD":
            return
        cut = faults.cut_after if faults.cut_after < len(body) else -1
        hang = faults.hang_after if faults.hang_after < len(body) else -1
        if cut >= 0:
            faults.cut_after = -1
        if hang >= 0:
            faults.hang_after = -1
        stop = min(part.stop, cut if cut >= 0 else hang if hang >= 0 else len(body))
        for at in range(part.start, stop, _CHUNK):
            chunk = body[at : min(at + _CHUNK, stop)]
            self.wfile.write(chunk)
            self.hub.count(len(chunk))
        if cut >= 0:
            self.close_connection = True
            if faults.reset:
                linger_0 = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                self.connection.setsockopt(1, 13, linger_0)  # SOL_SOCKET, SO_LINGER on Linux
                self.connection.close()
        elif hang >= 0:
            self.hub.ended.wait(faults.hang_s)
            self.close_connection = True

    def _plain(self, body: bytes, headers: Mapping[str, str]) -> None:
        """A small file or the part of it asked for."""
        if asked := self._asked(len(body)):
            status, part, extra = asked
            self._send(status, body[part.start : part.stop], {**headers, **extra})

    def _asked(self, n_bytes: int, *, ignore_range: bool = False) -> tuple[int, range, dict[str, str]] | None:
        """Status, bytes and headers for ``bytes=FIRST-[LAST]`` or for no Range; None when a refusal was sent."""
        asked = self.headers.get("Range", "")
        if not asked or ignore_range:
            return 200, range(n_bytes), {}
        first, _, last = asked.removeprefix("bytes=").partition("-")
        if int(first) >= n_bytes:
            self._refuse(416, headers={"Content-Range": f"bytes */{n_bytes}"})
            return None
        part = range(int(first), min(int(last) + 1, n_bytes) if last else n_bytes)
        return 206, part, {"Content-Range": f"bytes {part.start}-{part.stop - 1}/{n_bytes}"}

    def _refuse(self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None) -> None:
        extra = {key: text for key, text in {"X-Error-Code": code, "X-Error-Message": message}.items() if text}
        self._send(status, b"", {**extra, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, text in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, text)
        self.end_headers()
