"""Indexes of wheels on 127.0.0.1, in the layouts that people name, with wheels of a few bytes and faults.

As the real ones do, a page's address without its last slash is redirected, a folder without a page is a 404, and
the wheels lie elsewhere: behind a redirect, in a folder named after a release.
"""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

Wheel = tuple[str, bytes]
"""File name and content."""

PAGE = "text/html; charset=utf-8"


@dataclass
class Reply:
    """What one path answers. ``cut_at`` sends the length of the whole and ends after so many bytes."""

    body: bytes = b""
    kind: str = "application/octet-stream"
    status: int = 200
    location: str = ""
    cut_at: int | None = None


@dataclass
class WheelIndex:
    """A running index: ``replies`` may be changed while it runs; ``log`` holds the paths asked for."""

    replies: dict[str, Reply]
    url: str = ""
    log: list[str] = field(default_factory=list)

    def blob(self, filename: str) -> Reply:
        """The reply that holds the bytes of a wheel."""
        return next(reply for path, reply in self.replies.items() if path.startswith("/blobs/") and filename in path)


def make_wheel(
    version: str,
    tag: str = "py3-none-linux_x86_64",
    *,
    content: str = "",
    extra: Mapping[str, bytes] | None = None,
    spoil: Mapping[str, bytes | None] | None = None,
) -> Wheel:
    """A sound wheel of llama-cpp-python that holds next to nothing.

    ``extra`` files are part of it; ``spoil`` replaces, adds or (None) takes out files after RECORD was written.
    """
    information = f"llama_cpp_python-{version}.dist-info"
    inside: dict[str, bytes] = {
        "llama_cpp/__init__.py": f'__version__ = "{version}"\n{content}'.encode(),
        "llama_cpp/lib/libllama.so": b"\x7fELF" + bytes(range(256)) * 8,
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n".encode(),
        f"{information}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
        **(extra or {}),
    }
    rows = [f"{name},sha256={_record_digest(body)},{len(body)}" for name, body in inside.items()]
    inside[f"{information}/RECORD"] = "\n".join([*rows, f"{information}/RECORD,,"]).encode()
    for name, body in (spoil or {}).items():
        inside.pop(name, None)
        if body is not None:
            inside[name] = body
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in inside.items():
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), body, zipfile.ZIP_DEFLATED)
    return f"llama_cpp_python-{version}-{tag}.whl", packed.getvalue()


def own_layout(wheels: Mapping[str, Sequence[Wheel]], *, hashes: bool = False) -> dict[str, Reply]:
    """llama-cpp-python's own: ``/whl/cu124/llama-cpp-python/``, releases per folder, nothing at ``/whl/``."""
    replies: dict[str, Reply] = {}
    for folder, files in wheels.items():
        releases = [(f"v{name.split('-')[1].split('+')[0]}{'' if folder == 'cpu' else f'-{folder}'}", name, body)
                    for name, body in files]  # fmt: skip
        replies[f"/whl/{folder}/"] = page("llama-cpp-python/")
        replies[f"/whl/{folder}/llama-cpp-python/"] = _project(replies, releases, hashes=hashes)
    return replies


def older_layout(wheels: Mapping[str, Sequence[Wheel]]) -> dict[str, Reply]:
    """The one of 2023: ``/AVX2/cu117/llama-cpp-python/``, listings at each level, ``%2B`` in the addresses."""
    replies: dict[str, Reply] = {}
    for folder, files in wheels.items():
        level, flavour = folder.split("/")
        release = "cpu" if flavour == "cpu" else "wheels" if level == "AVX2" else level
        replies[f"/{folder}/"] = page("llama-cpp-python/", "llama-cpp-python-ggml/")
        replies[f"/{folder}/llama-cpp-python/"] = _project(replies, [(release, *wheel) for wheel in files])
    for level in {folder.split("/")[0] for folder in wheels}:
        replies[f"/{level}/"] = page(*(f"{name.split('/')[1]}/" for name in wheels if name.startswith(f"{level}/")))
    replies["/"] = page(*sorted({f"{folder.split('/')[0]}/" for folder in wheels}), "textgen/", "../", "cu117.html")
    return replies


def page(*links: str) -> Reply:
    """An HTML page of links."""
    anchors = "".join(f'<a href="{link}">{link}</a><br/>\n' for link in links)
    return Reply(f"<!DOCTYPE html><html><body>{anchors}</body></html>".encode(), PAGE)


@contextmanager
def serve(replies: Mapping[str, Reply]) -> Iterator[WheelIndex]:
    """Serve until the end of the ``with`` block."""
    index = WheelIndex(dict(replies))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"index": index}))
    index.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _project(replies: dict[str, Reply], files: Sequence[tuple[str, str, bytes]], *, hashes: bool = False) -> Reply:
    """A project's page of (release, file name, content); the files go to ``replies`` behind redirects."""
    links = []
    for release, name, body in files:
        path = f"/owner/repo/releases/download/{release}/{name}"
        blob = f"/blobs/{hashlib.sha256(body).hexdigest()[:12]}/{name}"
        replies[path] = Reply(status=302, location=f"{quote(blob)}?signature=secret")
        replies[blob] = Reply(body)
        links.append(quote(path) + (f"#sha256={hashlib.sha256(body).hexdigest()}" if hashes else ""))
    return page(*links)


def _record_digest(body: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()


class _Handler(BaseHTTPRequestHandler):
    index: WheelIndex
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait for each other

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.index.log.append(path)
        reply = self.index.replies.get(path)
        if reply is None and f"{path}/" in self.index.replies:
            reply = Reply(status=301, location=f"{quote(path)}/")
        reply = reply or Reply(b"<html>no such page</html>", PAGE, 404)
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        if reply.location:
            self.send_header("Location", reply.location)
        self.end_headers()
        self.wfile.write(reply.body[: reply.cut_at])
        self.close_connection = reply.cut_at is not None

    def log_message(self, *_: object) -> None:
        pass
