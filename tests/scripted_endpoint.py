"""An OpenAI-compatible server on loopback that answers what a test tells it to, when it tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

GATE_S = 60  # a bound against hanging, not an expectation


@dataclass(frozen=True)
class Reasoning:
    """Words that come before the answer."""

    text: str


Part: TypeAlias = "str | Reasoning | threading.Event"
"""Text to send, or an event to wait for before the rest is sent; one that is never set keeps the reply open."""


class ScriptedEndpoint:
    """``script`` holds the replies to come, each its parts or the status of an error; ``asked`` what was sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.script: list[Sequence[Part] | int] = []
        self.asked: list[dict[str, Any]] = []

    def said(self, number: int = -1) -> list[tuple[str, Any]]:
        """(role, content) of each message of a request."""
        return [(message["role"], message["content"]) for message in self.asked[number]["messages"]]


@contextmanager
def scripted_endpoint(*, model: str = "scripted", n_ctx: int = 4096) -> Iterator[ScriptedEndpoint]:
    """A server with one model; it is gone when the body ends."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = self.path.endswith("/models")
            entry = {"id": model, "object": "model", "max_model_len": n_ctx}
            self._json(200 if found else 404, {"object": "list", "data": [entry]} if found else {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.asked.append(asked)
            reply = endpoint.script.pop(0)
            if isinstance(reply, int):
                self._json(reply, {"error": {"message": "scripted to fail"}})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                sent = sum(self._part(part) for part in reply)
                self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                usage = {"prompt_tokens": 100 * len(asked["messages"]), "completion_tokens": sent}
                self._event({"choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")
            except OSError:
                pass  # who asked has left
            self.close_connection = True

        def _part(self, part: Part) -> int:
            if isinstance(part, threading.Event):
                for _ in range(GATE_S * 20):
                    if part.wait(0.05) or ended.is_set():
                        break
                    self.wfile.write(b": waiting\n\n")  # fails once nobody reads
                    self.wfile.flush()
                return 0
            name, text = ("reasoning_content", part.text) if isinstance(part, Reasoning) else ("content", part)
            pieces = [text[at : at + 5] for at in range(0, len(text), 5)]
            for piece in pieces:
                self._event({"choices": [{"index": 0, "delta": {name: piece}, "finish_reason": None}]})
            return len(pieces)

        def _event(self, value: dict[str, Any]) -> None:
            value = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": model, **value}
            self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
            self.wfile.flush()

        def _json(self, status: int, value: dict[str, Any]) -> None:
            raw = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        endpoint = ScriptedEndpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            ended.set()
            server.shutdown()
            thread.join()
