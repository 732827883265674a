"""What a request must be before anything is done for it. Raises replies.Refusal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import hdrs, web

from runtime.serve.endpoints import split_target
from runtime.serve.guard import ALLOWED_METHODS, Guard
from runtime.serve.replies import refusal

MEMORY_RETRY_S = 5


def target_of(request: web.Request, guard: Guard) -> tuple[str, str]:
    """The path and query of a well-formed request to this server from whoever may ask; keys are another matter."""
    target = split_target(request.raw_path)
    if target is None or request.method == hdrs.METH_CONNECT:
        raise refusal("target", 400, "the request's target must be a plain path, with no %XX before the question mark")
    if not guard.is_our_host(request.headers.getall(hdrs.HOST, ())):
        said = "the Host header does not name this server (serve --allowed-host NAME allows another)"
        raise refusal("host", 403, said)
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and not guard.is_allowed_origin(origin):
        said = "pages of this origin may not use this server (serve --allowed-origin URL allows one)"
        raise refusal("origin", 403, said)
    if origin is None and request.headers.get("Sec-Fetch-Site") == "cross-site" and not _is_visit(request):
        raise refusal("origin", 403, "pages of another site may not use this server")
    if request.method not in ALLOWED_METHODS.split(", "):
        raise refusal("method", 405, "no such method here", headers={hdrs.ALLOW: ALLOWED_METHODS})
    if request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
        raise refusal("upgrade", 400, "no WebSocket here; replies stream as server-sent events")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise refusal("encoding", 415, "send the body as it is, not compressed")
    return target


def _is_visit(request: web.Request) -> bool:
    """Whether a browser goes to a page of ours, as by a link, rather than a page asking for a part of itself."""
    return request.headers.get("Sec-Fetch-Mode") == "navigate"


@dataclass
class Bodies:
    """Request bodies, each whole, each at most ``max_bytes`` and ``within_s``, all at a time ``max_held_bytes``."""

    max_bytes: int
    max_held_bytes: int
    within_s: float
    held_bytes: int = 0

    @asynccontextmanager
    async def held(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body, counted as held as long as the context lasts."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.within_s):
                await self._read(request, body)
        except TimeoutError:
            self.held_bytes -= len(body)
            raise refusal("slow", 408, f"the body did not arrive within {self.within_s:g} s") from None
        except web.RequestPayloadError:
            self.held_bytes -= len(body)
            raise refusal("body", 400, "the body breaks off, or is not what its head says") from None
        except BaseException:
            self.held_bytes -= len(body)
            raise
        try:
            yield bytes(body)
        finally:
            self.held_bytes -= len(body)

    async def _read(self, request: web.Request, body: bytearray) -> None:
        if (request.content_length or 0) > self.max_bytes:
            raise self._too_large()
        async for chunk in request.content.iter_any():
            body += chunk
            self.held_bytes += len(chunk)
            if len(body) > self.max_bytes:
                raise self._too_large()
            if self.held_bytes > self.max_held_bytes:
                said = "the bodies of other requests fill the memory that is set aside for them"
                raise refusal("memory", 429, said, retry_after_s=MEMORY_RETRY_S)

    def _too_large(self) -> Exception:
        return refusal("size", 413, f"the body is longer than {self.max_bytes} bytes")
