"""An OpenAI-compatible server on 127.0.0.1 that says what a test's script says, and fails in every way HTTP can.

    from tests.failing_server import answer, chat, failing_server

    with failing_server(chat("Hello **world**")) as server:        # streams a reply, one chunk for each text
        connect(server.url, model=None, api_key=None)              # http://127.0.0.1:PORT/v1
    with failing_server(answer(503, headers={"Retry-After": "0"}), chat("there")) as server: ...

The script is one ``Answer`` for each POST to /chat/completions, in turn; the last one goes on for ever. A reply
from a file of Markdown, slowly: ``chat(text, size=7, pause_s=0.02)``; one that never ends, to be cancelled:
``chat("a", "b", HANG)`` or ``chat(*["word "] * 10_000, pause_s=0.05)``; with reasoning: ``chat(Thought("hm"), "yes")``.

What an answer consists of is sent as it stands, in its order: bytes; a float is a pause in seconds; ``RESET``
breaks the connection, ``CLOSE`` ends it without the end of the body, ``HANG`` stays silent until the client goes,
``Repeated`` sends the same bytes many times. Whatever else can be on a wire is
``Answer((b"...", HANG), framing="raw")``.

GET /models tells ``models`` (names, or the whole entries; an Answer for a failure), GET /props ``props`` when there
are some. ``server.requests`` holds what was asked, with its headers and body, and for each whether the client went
away before the end (``left``, a threading.Event). With ``tls`` it speaks https; see ``certificate``. Everything ends
with the ``with`` block.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

RESET: Final = "reset"
CLOSE: Final = "close"
HANG: Final = "hang"
_KEY: Final = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQguyk3CJEK9gWZDg/1PEsBmTWYk3YlNHK7tU+ivmgGY7OhRANCAAR/"
    "ilCtTsICBcZTgCfn5VWU1E5qqmlrb9TtOE/7wliUgZje66x/os4VGaeBnHu/bcIdldpA2EGPASUZY2YvyfHv"
)
_CERTIFICATE: Final = (
    "MIIBjzCCATagAwIBAgIUEmZxAaXGOxbwU6tlEn/A58eSZ5kwCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2"
    "MTEyMzAyNDUwOVoYDzIxMjYxMDMwMDI0NTA5WjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC"
    "AAR/ilCtTsICBcZTgCfn5VWU1E5qqmlrb9TtOE/7wliUgZje66x/os4VGaeBnHu/bcIdldpA2EGPASUZY2YvyfHvo2QwYjAdBgNV"
    "HQ4EFgQUtK8E3gkLtFk0ApnnaCTIe3yv5vowHwYDVR0jBBgwFoAUtK8E3gkLtFk0ApnnaCTIe3yv5vowDwYDVR0TAQH/BAUwAwEB"
    "/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0cAMEQCIDHJpTMf57HCCtVE9qtek7p05xxS8HKAJcMQE88Yj7RQAiADi98i"
    "WFD+9DBkVUQNh8+olhDLNqFArgD2kKTY1Bqtdg=="
)
"""Of 127.0.0.1, signed by itself, until 2126; trusted by nobody but a test."""
_LONGEST_S = 60.0  # nothing waits longer than this for a client


@dataclass(frozen=True)
class Repeated:
    """The same bytes ``times`` times, or until the client goes."""

    data: bytes
    times: int = 1 << 60


@dataclass(frozen=True)
class Thought:
    """Text that comes as reasoning, under the name that the server has for it."""

    text: str
    field: str = "reasoning_content"


Part: TypeAlias = "bytes | float | Repeated | Literal['reset', 'close', 'hang']"


@dataclass(frozen=True)
class Answer:
    """One answer; ``raw`` framing sends no status line and no headers, ``close`` ends the body with the connection."""

    parts: Sequence[Part] = ()
    status: int = 200
    content_type: str = "text/event-stream"
    headers: Mapping[str, str] = field(default_factory=dict)
    framing: Literal["chunked", "length", "close", "raw"] = "chunked"
    before_s: float = 0.0  # silence before the status line


@dataclass
class Asked:
    """A request as it came; ``headers`` by their lower-case names."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    left: threading.Event = field(default_factory=threading.Event)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class FailingServer:
    url: str
    port: int
    requests: list[Asked] = field(default_factory=list)

    @property
    def chats(self) -> list[Asked]:
        """The requests for a reply."""
        return [asked for asked in self.requests if asked.path.endswith("/chat/completions")]


def answer(
    status: int = 200, body: object = None, *, headers: Mapping[str, str] | None = None, content_type: str = ""
) -> Answer:
    """A short answer: JSON unless ``body`` is text or bytes; without one, an error in OpenAI's form."""
    if body is None:
        body = {"error": {"message": f"scripted failure {status}", "type": "scripted", "code": None}}
    if isinstance(body, str | bytes):
        data = body.encode(errors="replace") if isinstance(body, str) else body
        kind = content_type or "text/html; charset=utf-8"
    else:
        data, kind = json.dumps(body).encode(), content_type or "application/json"
    return Answer((data,), status=status, content_type=kind, headers=headers or {}, framing="length")


def event(value: object, end: bytes = b"\n\n") -> bytes:
    """A server-sent event; a text is its data as it stands."""
    return b"data: " + (value if isinstance(value, str) else json.dumps(value)).encode(errors="replace") + end


def delta(finish: str | None = None, **changes: object) -> dict[str, object]:
    """A chunk as OpenAI streams it."""
    choice = {"index": 0, "delta": changes, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "scripted", "choices": [choice]}


def chat(
    *pieces: str | Thought | float,
    size: int = 0,
    pause_s: float = 0.0,
    finish: str | None = "stop",
    usage: Mapping[str, object] | None = None,
    timings: Mapping[str, object] | None = None,
    done: bool = True,
) -> Answer:
    """A streamed reply, one chunk for each piece, or for each ``size`` characters; RESET, CLOSE, HANG end it there."""
    parts: list[Part] = [event(delta(role="assistant", content=None))]
    for piece in pieces:
        match piece:
            case "reset" | "close" | "hang":
                return Answer((*parts, piece))
            case Thought(text=text, field=name):
                parts.append(event(delta(**{name: text})))
            case str():
                step = size or max(1, len(piece))
                for at in range(0, len(piece), step):
                    parts += [event(delta(content=piece[at : at + step])), *([pause_s] if pause_s else [])]
            case _:
                parts.append(float(piece))
    last = delta(finish)
    if timings is not None:
        last["timings"] = dict(timings)
    parts.append(event(last))
    if usage is not None:
        parts.append(event({**delta(), "choices": [], "usage": dict(usage)}))
    if done:
        parts.append(event("[DONE]"))
    return Answer(parts)


@contextmanager
def failing_server(
    *script: Answer,
    models: Sequence[str | Mapping[str, object]] | Answer = ("scripted",),
    props: Mapping[str, object] | None = None,
    prefix: str = "/v1",
    others: Mapping[str, Answer] | None = None,
    tls: bool = False,
) -> Iterator[FailingServer]:
    """The server of the module's docstring; ``others`` are answers by "METHOD /path", ``prefix`` the API's path."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    number = listener.getsockname()[1]
    context = _tls_context() if tls else None
    server = FailingServer(url=f"http{'s' if tls else ''}://127.0.0.1:{number}{prefix}", port=number)
    stopping = threading.Event()
    fixed = dict(others or {})
    fixed.setdefault(f"GET {prefix}/models", models if isinstance(models, Answer) else answer(body=_listed(models)))
    if props is not None:
        fixed.setdefault(f"GET {prefix.removesuffix('/v1')}/props", answer(body=dict(props)))
    remaining = list(script)
    lock = threading.Lock()

    def choose(asked: Asked) -> Answer:
        with lock:
            server.requests.append(asked)
            if known := fixed.get(f"{asked.method} {asked.path}"):
                return known
            if asked.method == "POST" and asked.path == f"{prefix}/chat/completions" and remaining:
                return remaining.pop(0) if len(remaining) > 1 else remaining[0]
        return answer(404, {"error": {"message": f"no such path: {asked.path}"}})

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), context.wrap_socket(connection, server_side=True) if context else connection as wire:
            wire.settimeout(_LONGEST_S)
            if asked := _read_request(wire):
                _Sending(wire, asked, stopping).send(choose(asked))

    def accept() -> None:
        while not stopping.is_set():
            with suppress(OSError):
                connection, _ = listener.accept()
                thread = threading.Thread(target=serve, args=(connection,), daemon=True)
                serving.append(thread)
                thread.start()

    serving: list[threading.Thread] = []
    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield server
    finally:
        stopping.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes what accepts
        accepting.join()
        listener.close()
        for thread in serving:
            thread.join(timeout=5)


class _Sending:
    """One answer on its way, and what became of the client meanwhile."""

    def __init__(self, connection: socket.socket, asked: Asked, stopping: threading.Event) -> None:
        self._connection = connection
        self._asked = asked
        self._stopping = stopping

    def send(self, told: Answer) -> None:
        chunked = told.framing == "chunked"
        try:
            if told.before_s and self._client_leaves_within(told.before_s):
                return
            if told.framing != "raw":
                self._connection.sendall(_head(told))
            for part in told.parts:
                if not self._send_part(part, chunked):
                    return
            if chunked:
                self._connection.sendall(b"0\r\n\r\n")
        except OSError:
            self._asked.left.set()
            raise

    def _send_part(self, part: Part, chunked: bool) -> bool:
        """Whether the answer goes on behind ``part``."""
        match part:
            case bytes():
                self._connection.sendall(_framed(part, chunked))
            case Repeated(data=data, times=times):
                framed, sent = _framed(data, chunked), 0
                while sent < times and not self._stopping.is_set():
                    self._connection.sendall(framed)
                    sent += 1
            case "reset":
                self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            case "close":
                return False
            case "hang":
                self._client_leaves_within(_LONGEST_S)
                return False
            case _:
                return not self._client_leaves_within(part)
        return True

    def _client_leaves_within(self, seconds: float) -> bool:
        """Waits that long; True as soon as the client has gone, or the server ends."""
        while seconds > 0 and not self._stopping.is_set():
            slice_s = min(seconds, 0.02)
            seconds -= slice_s
            readable, _, _ = select.select([self._connection], [], [], slice_s)
            if readable and not self._connection.recv(1 << 16):
                self._asked.left.set()
                return True
        return self._stopping.is_set()


def certificate() -> str:
    """The PEM text that a client has to trust (SSL_CERT_FILE) to talk with a server with ``tls``."""
    return f"-----BEGIN CERTIFICATE-----\n{_CERTIFICATE}\n-----END CERTIFICATE-----\n"


def _tls_context() -> ssl.SSLContext:
    kind = "PRIVATE KEY"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(f"-----BEGIN {kind}-----\n{_KEY}\n-----END {kind}-----\n{certificate()}")
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _listed(models: Sequence[str | Mapping[str, object]]) -> dict[str, object]:
    entries = [{"id": one, "object": "model"} if isinstance(one, str) else dict(one) for one in models]
    return {"object": "list", "data": entries}


def _head(told: Answer) -> bytes:
    lines = [f"HTTP/1.1 {told.status} Scripted"]
    headers = {"Content-Type": told.content_type} if told.content_type else {}
    if told.framing == "chunked":
        headers["Transfer-Encoding"] = "chunked"
    elif told.framing == "length":
        headers["Content-Length"] = str(sum(len(part) for part in told.parts if isinstance(part, bytes)))
    headers |= {"Connection": "close", **told.headers}
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin-1")


def _framed(data: bytes, chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked and data else data


def _read_request(connection: socket.socket) -> Asked | None:
    """The request on the connection; None when there is none (a TLS greeting, a client that left)."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        if not (more := connection.recv(1 << 16)) or not (raw + more)[:1].isalpha():
            return None
        raw += more
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        body += connection.recv(1 << 20)
    return Asked(method=method, path=path, headers=headers, body=body)
