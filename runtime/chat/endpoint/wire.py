"""Requests over HTTP that can be given up at any moment, whatever the server does or does not do."""

from __future__ import annotations

import math
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from runtime.chat.endpoint.errors import Server, unreachable
from toolchain.base.errors import FetchError

if TYPE_CHECKING:
    import httpx2

    from runtime.chat.endpoint.address import Address
    from runtime.interrupts import Interrupt

CONNECT_S: Final = 20.0
_TICK_S: Final = 0.05
_WAITING: Final = 64  # pieces of at most 64 KiB that lie ready before the reading stops


class Cancelled(Exception):
    """The interrupt was raised."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """How an answer begins; the names of its headers are lower-case."""

    status: int
    headers: Mapping[str, str]


class Wire:
    """The way to one server. A connection is made for each request and ends with it: none goes stale."""

    def __init__(self, client: httpx2.Client, server: Server) -> None:
        self._client = client
        self.server = server

    def open(self, method: str, url: str, body: bytes | None, *, interrupt: Interrupt, silence_s: float) -> Answer:
        """The answer's beginning; to be closed. FetchError when none comes, Cancelled after an interrupt.

        ``silence_s`` seconds without a byte end it, before the answer and within it.
        """
        request = self._client.build_request(method, url, content=body)
        answer = Answer(self._client, request, self.server, interrupt, silence_s)
        try:
            answer.begin()
        except BaseException:
            answer.close()
            raise
        return answer

    def close(self) -> None:
        self._client.close()


def make_wire(address: Address, server: Server) -> Wire:
    """Redirects are not followed, nothing compressed is asked for, and what is on this machine is asked directly."""
    import httpx2

    headers = {
        "User-Agent": "llama-foundry",
        "Accept": "text/event-stream, application/json",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
    }
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    client = httpx2.Client(
        headers=headers,
        follow_redirects=False,
        trust_env=not address.loopback,
        verify=httpx2.create_ssl_context() if address.secure or not address.loopback else False,
        timeout=httpx2.Timeout(None, connect=CONNECT_S),
        limits=httpx2.Limits(max_keepalive_connections=0),
    )
    return Wire(client, server)


@dataclass
class Answer:
    """An answer on its way. A thread reads; whoever waits for it looks at the interrupt and at the clock.

    ``ended`` is to be set once all that matters has come: the connection is then ended in good order.
    """

    client: httpx2.Client = field(repr=False)
    request: httpx2.Request = field(repr=False)
    server: Server
    interrupt: Interrupt
    silence_s: float
    ended: bool = False

    def __post_init__(self) -> None:
        self.head = Head(status=0, headers={})
        self._arrived: queue.Queue[Head | bytes | FetchError | None] = queue.Queue(_WAITING)
        self._streams: list[Any] = []
        self._over = threading.Event()
        self._alive = time.monotonic()
        self._end = math.inf
        self._thread = threading.Thread(target=self._read, name="endpoint", daemon=True)

    def begin(self) -> None:
        """Send the request and wait for the head."""
        self.request.extensions["trace"] = self._note
        self._thread.start()
        head = self._take()
        assert isinstance(head, Head)
        self.head = head

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes, undecoded."""
        while (data := self._take()) is not None:
            assert isinstance(data, bytes)
            yield data
        self.ended = True

    def check(self) -> None:
        """Raises Cancelled after an interrupt."""
        if self.interrupt.raised:
            raise Cancelled

    def allow(self, seconds: float) -> None:
        """From now on it may take that long in all."""
        self._end = min(self._end, time.monotonic() + seconds)

    def close(self) -> None:
        """End the connection, wherever it stands; the server sees it at once."""
        self._over.set()
        for stream in self._streams:
            _shut(stream, reset=not self.ended)
        while True:
            try:
                self._arrived.get_nowait()
            except queue.Empty:
                break
        if self._streams:  # one that still looks for the host cannot be hurried
            self._thread.join(timeout=1.0)

    def _take(self) -> Head | bytes | None:
        self._alive = time.monotonic()  # a pause of whoever reads is no silence of the server
        while True:
            self.check()
            if time.monotonic() > self._end:
                raise FetchError(
                    f"{self.server} takes too long for a short answer",
                    hint="see whether the server still works, then try again",
                )
            try:
                item = self._arrived.get(timeout=_TICK_S)
            except queue.Empty:
                self._watch_clock()
                continue
            if isinstance(item, FetchError):
                raise item
            return item

    def _watch_clock(self) -> None:
        silent_s = time.monotonic() - self._alive
        if not self._streams and silent_s > CONNECT_S + 1:
            raise FetchError(
                f"{self.server} did not accept a connection within {CONNECT_S:g} s",
                hint="check the address, the network and the firewall",
            )
        if silent_s > self.silence_s:
            raise FetchError(
                f"{self.server} was silent for {self.silence_s:g} s",
                evidence="a connection stands, and nothing comes over it",
                hint="see whether the server still works; a long prompt on a slow machine may need a shorter one",
            )

    def _read(self) -> None:
        try:
            response = self.client.send(self.request, stream=True)
            try:
                headers = {name.lower(): value for name, value in response.headers.items()}
                self._put(Head(status=response.status_code, headers=headers))
                for data in response.iter_raw():
                    self._put(data)
            finally:
                response.close()
            self._put(None)
        except _GivenUpError:
            return
        except Exception as error:
            with suppress(_GivenUpError):
                self._put(unreachable(error, self.server, connect_s=CONNECT_S))

    def _put(self, item: Head | bytes | FetchError | None) -> None:
        while not self._over.is_set():
            try:
                return self._arrived.put(item, timeout=_TICK_S)
            except queue.Full:
                continue
        raise _GivenUpError

    def _note(self, event: str, info: Mapping[str, Any]) -> None:
        """httpx2's trace of a request: here a connection stands."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._streams.append(info["return_value"])
            self._alive = time.monotonic()
            if self._over.is_set():  # too late: nothing goes over it
                _shut(info["return_value"], reset=True)


def _shut(stream: Any, *, reset: bool) -> None:
    """Wake whoever reads from it; with ``reset`` a server that is stuck in sending learns of it too."""
    with suppress(OSError):  # it may be closed already
        wire = stream.get_extra_info("socket")
        if reset:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.shutdown(socket.SHUT_RDWR)


class _GivenUpError(Exception):
    """Nobody waits any more."""
