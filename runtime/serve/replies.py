"""Errors as OpenAI's clients read them: as a reply, and as an event within a stream.

The form is ``{"error": {"message", "type", "param", "code"}}``; ``code`` is the HTTP status, as llama-server has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from aiohttp import web

from runtime.serve.endpoints import ANTHROPIC, RESPONSES

SERVER = "llama-foundry"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class Refusal(Exception):
    """A request that is answered without being done. ``reason`` is its name in the metrics."""

    def __init__(self, reason: str, response: web.Response) -> None:
        super().__init__(reason)
        self.reason = reason
        self.response = response


def error(
    status: int, message: str, *, retry_after_s: int | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    sent = {"Server": SERVER, **(headers or {})}
    if retry_after_s is not None:
        sent["Retry-After"] = str(retry_after_s)
    return web.json_response({"error": _described(status, message)}, status=status, headers=sent)


def closing(response: web.Response) -> web.Response:
    """The connection ends with this reply: its rest is not to be read, or no more work is wanted."""
    response.force_close()
    return response


def refusal(
    reason: str,
    status: int,
    message: str,
    *,
    retry_after_s: int | None = None,
    headers: Mapping[str, str] | None = None,
    close: bool = True,
) -> Refusal:
    """To be raised; the connection ends with it unless the client is welcome to go on."""
    response = error(status, message, retry_after_s=retry_after_s, headers=headers)
    return Refusal(reason, closing(response) if close else response)


def event(label: str, status: int, message: str) -> bytes:
    """A last event in the form of the stream that it ends. The empty line before it ends an event cut in its middle."""
    described = _described(status, message)
    if label in ANTHROPIC:
        described = {"type": "api_error", "message": message}
    if label in ANTHROPIC | RESPONSES:
        return _event({"type": "error", "error": described}, name="error")
    return _event({"error": described})


def _described(status: int, message: str) -> dict[str, object]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"message": message, "type": kind, "param": None, "code": status}


def _event(value: object, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"\n\n{head}data: {json.dumps(value)}\n\n".encode()
