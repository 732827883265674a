"""The HTTP server before llama-server: who may ask, who waits, what is passed on.

app = make_app(config, upstream)
runner = make_runner(app)
await runner.setup()
await web.TCPSite(runner, config.host, config.port).start()
...
await drain(app)  # at most config.drain_s and a second
await runner.cleanup()
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import hdrs, web

from runtime.serve import replies
from runtime.serve.adapters import Adapters
from runtime.serve.address import require_key
from runtime.serve.admission import Admission, ClosedError, QueueFullError
from runtime.serve.door import Bodies, target_of
from runtime.serve.endpoints import PUBLIC, Endpoint, classify
from runtime.serve.fetches import fetches
from runtime.serve.forward import Asked, Forwarder, new_session
from runtime.serve.guard import ALLOWED_METHODS, Guard, sent_key
from runtime.serve.metrics import Metrics, joined
from runtime.serve.scrape import scrape
from runtime.serve.upstream import Upstream
from toolchain.base import console

MIB = 1 << 20
HEAD_S = 30.0  # for the first request's head, and between requests
BODY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class FrontConfig:
    """``parallel`` requests generate at once and ``max_queue`` wait. ``allowed_endpoints`` are names of
    ``endpoints.DANGEROUS``, ``adapters`` the scales of the model's adapters at the start. The bodies that are held at
    one time take at most ``max_held_bytes`` together."""

    host: str
    port: int
    api_keys: frozenset[str] = frozenset()
    allowed_hosts: frozenset[str] = frozenset()
    allowed_origins: frozenset[str] = frozenset()
    parallel: int = 1
    max_queue: int = 32
    drain_s: float = 30.0
    ui: bool = False
    allowed_endpoints: frozenset[str] = frozenset()
    adapters: tuple[float, ...] = ()
    max_body_bytes: int = 64 * MIB
    max_held_bytes: int = 256 * MIB
    body_s: float = BODY_S
    head_s: float = HEAD_S
    stall_s: float = 60.0


def make_app(config: FrontConfig, upstream: Upstream) -> web.Application:
    """The application; UsageError as of ``address.require_key``."""
    require_key(config.host, config.api_keys, config.allowed_origins)
    app = web.Application(middlewares=[web.middleware(_at_the_door)])
    app[_FRONT] = front = _Front(config=config, upstream=upstream)
    app.router.add_route("*", "/{path:.*}", _nothing)
    app.cleanup_ctx.append(front.sessions)
    app.on_response_prepare.append(_add_headers)
    return app


def make_runner(app: web.Application) -> web.AppRunner:
    """A runner with the bounds set: sizes and times of heads, an end to handlers whose client has left.

    aiohttp's own log would show lines of broken requests, which may hold keys: it goes nowhere.
    """
    quiet = logging.getLogger("runtime.serve.http")
    quiet.disabled = True
    return web.AppRunner(
        app,
        handle_signals=False,
        handler_cancellation=True,
        access_log=None,
        logger=quiet,
        keepalive_timeout=app[_FRONT].config.head_s,
        lingering_time=2.0,
        max_line_size=8190,
        max_field_size=8190,
        max_headers=100,
        auto_decompress=False,
        shutdown_timeout=1.0,
    )


async def drain(app: web.Application) -> None:
    """Refuse new work, send those away who wait, let running replies end, cut what is left after ``drain_s``."""
    front = app[_FRONT]
    front.draining = True
    front.admission.close()
    await front.forwarder.finish(front.config.drain_s)


@dataclass
class _Front:
    config: FrontConfig
    upstream: Upstream
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False

    def __post_init__(self) -> None:
        config = self.config
        self.admission = Admission(parallel=config.parallel, max_queue=config.max_queue)
        self.guard = Guard(
            host=config.host,
            port=config.port,
            api_keys=config.api_keys,
            allowed_hosts=config.allowed_hosts,
            allowed_origins=config.allowed_origins,
        )
        self.adapters = Adapters(config.adapters)
        self.bodies = Bodies(config.max_body_bytes, config.max_held_bytes, config.body_s)
        self.forwarder: Forwarder

    async def sessions(self, _: web.Application) -> AsyncIterator[None]:
        session = new_session()
        self.forwarder = Forwarder(session, self.upstream, self.metrics, self.config.stall_s)
        yield
        await session.close()


_FRONT = web.AppKey("front", _Front)
_LABEL = web.RequestKey("label", str)  # the endpoint's name for metrics, once it is known
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _nothing(_: web.Request) -> web.StreamResponse:
    raise AssertionError("the middleware answers every request")


async def _at_the_door(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every request comes through here, also those that no route would match; each is counted once."""
    front = request.app[_FRONT]
    response: web.StreamResponse
    try:
        response = await _reply(front, request)
    except replies.Refusal as refusal:
        front.metrics.rejected[refusal.reason] += 1
        response = refusal.response
    except asyncio.CancelledError:
        front.metrics.cancelled += 1
        raise
    except ConnectionError:  # found while writing to it
        front.metrics.cancelled += 1
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=499)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]  # the error's own text might hold what a client sent
        where = f"{Path(at.filename).name}:{at.lineno}"
        console.warn(f"{type(error).__name__} in {where} while answering {request.get(_LABEL, 'a request')}")
        response = replies.closing(replies.error(500, "the server failed at this request"))
    front.metrics.requests[request.get(_LABEL, "other"), response.status] += 1
    return response


async def _reply(front: _Front, request: web.Request) -> web.StreamResponse:
    path, query = target_of(request, front.guard)
    if request.method == hdrs.METH_OPTIONS:
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        return web.Response(status=204, headers={hdrs.ALLOW: ALLOWED_METHODS, **front.guard.preflight_headers(asked)})
    endpoint = classify(request.method, path, query, allowed=front.config.allowed_endpoints)
    request[_LABEL] = endpoint.label
    page = endpoint.kind == "page" and (front.config.ui or path == "/")
    known = front.guard.is_known_key(request.headers)
    if not known and path not in PUBLIC and not page:
        said = "no such API key" if sent_key(request.headers) else "an API key is needed"
        raise replies.refusal("key", 401, said, headers={hdrs.WWW_AUTHENTICATE: "Bearer"})
    match endpoint.kind:
        case "ours":
            return await _ours(front, endpoint.label)
        case "refused":
            said = f"{endpoint.refused_as} is not open to clients (serve --allow-admin opens it)"
            raise replies.refusal("endpoint", 403, said)
        case "unknown":
            raise replies.refusal("unknown", 404, f"no such endpoint: {request.method} {path}")
        case "page" if path == "/" and not front.config.ui:
            said = f"llama-foundry serves a language model here.\nOpenAI-compatible API: http://{request.host}/v1\n"
            return web.Response(text=said)
        case _:
            return await _pass_on(front, request, endpoint, with_key=known)


async def _pass_on(front: _Front, request: web.Request, endpoint: Endpoint, *, with_key: bool) -> web.StreamResponse:
    """A page's assets are asked for without our key when the client has none: the child knows which are public."""
    arrived_s = time.monotonic()
    if front.draining:
        raise _shutting_down()
    async with front.bodies.held(request) as sent:
        if request.method == hdrs.METH_POST and "cors-proxy" not in front.config.allowed_endpoints and fetches(sent):
            said = "this server fetches nothing: send what the model is to see or hear as a data: URL"
            raise replies.refusal("fetch", 403, said, close=False)
        restarts, generates = front.upstream.restarts, endpoint.kind == "generates"
        body = front.adapters.settled(endpoint.label, sent, restarts=restarts) if generates else sent
        asked = Asked(endpoint=endpoint, target=request.raw_path, body=body, with_key=with_key, arrived_s=arrived_s)
        if endpoint.label == "/lora-adapters" and request.method == hdrs.METH_POST:
            scales = front.adapters.asked(body)
            reply = await front.forwarder.forward(request, asked)
            if reply.status == 200:
                front.adapters.set(scales, restarts=restarts)
            return reply
        if not generates:
            return await front.forwarder.forward(request, asked)
        try:
            async with front.admission.turn():
                return await front.forwarder.forward(request, asked)
        except QueueFullError as full:
            said = f"{front.admission.in_flight} requests generate and {front.admission.waiting} wait already"
            raise replies.refusal("queue", 429, said, retry_after_s=full.retry_after_s, close=False) from None
        except ClosedError:
            raise _shutting_down() from None


async def _ours(front: _Front, label: str) -> web.Response:
    state = "stopping" if front.draining else front.upstream.state
    ready = state == "ready"
    match label:
        case "/ready":
            headers = {} if ready else {hdrs.RETRY_AFTER: str(max(1, front.upstream.retry_after_s))}
            return web.json_response({"status": state}, status=200 if ready else 503, headers=headers)
        case "/metrics":
            ours = front.metrics.text(
                waiting=front.admission.waiting,
                in_flight=front.admission.in_flight,
                ready=ready,
                restarts=front.upstream.restarts,
            )
            text = joined(ours, await scrape(front.forwarder.session, front.upstream))
            return web.Response(body=text.encode(), headers={hdrs.CONTENT_TYPE: "text/plain; version=0.0.4"})
        case _:
            return web.json_response({"status": "ok"})


def _shutting_down() -> replies.Refusal:
    return replies.refusal("shutdown", 503, "the server is shutting down", retry_after_s=_RESTART_S)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers[hdrs.SERVER] = replies.SERVER
    front = request.app[_FRONT]
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and front.guard.is_allowed_origin(origin):
        response.headers.update(front.guard.cors_headers(origin))


_RESTART_S = 10  # until whoever stopped us may have another server up
