"""One question to a server with patience: it is asked again while it is busy, and a refusal is read and explained."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urljoin

from runtime.chat.endpoint.chunk import error_words
from runtime.chat.endpoint.errors import NotAnAnswerError, Refusal, Server, is_out_of_credit, refused
from runtime.chat.endpoint.wire import Answer, Cancelled, Wire
from toolchain.base import console
from toolchain.base.errors import FetchError
from toolchain.base.patience import retry_after_s

if TYPE_CHECKING:
    from runtime.interrupts import Interrupt

TRIES: Final = 4
FIRST_WAIT_S: Final = 1.0  # doubles with each try
LONGEST_WAIT_S: Final = 60.0  # a longer Retry-After is told to the user instead of slept through
_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_ERROR_BYTES: Final = 64 << 10
_ERROR_S: Final = 10.0  # for the body of a refusal
_BODY_BYTES: Final = 16 << 20


def ask(
    wire: Wire,
    method: str,
    url: str,
    body: bytes | None = None,
    *,
    interrupt: Interrupt,
    silence_s: float,
    model: str = "",
    models: Sequence[str] = (),
) -> Answer:
    """The answer, with a status of success, to be closed.

    FetchError (a RefusedError or a ContextFullError where there was an answer) when it fails, Cancelled after an
    interrupt. Nothing of a reply has come before a success, so nothing is said twice.
    """
    for nth in range(1, TRIES + 1):
        answer = wire.open(method, url, body, interrupt=interrupt, silence_s=silence_s)
        coding = answer.head.headers.get("content-encoding", "").strip().lower() or "identity"
        if 200 <= answer.head.status < 300 and coding == "identity":
            return answer
        if 200 <= answer.head.status < 300:
            answer.close()
            raise wire.server.failed(
                f"{wire.server} sends what nobody asked for: a compressed answer",
                evidence=f"Content-Encoding: {coding}",
                hint="look for a proxy in between that compresses",
            )
        try:
            refusal = _read_refusal(answer, wire.server, method, url)
        finally:
            answer.close()
        wait_s = _wait_s(refusal, nth)
        if wait_s is None or nth == TRIES:
            raise refused(refusal, wire.server, model=model, models=models)
        said = f": {refusal.words}" if refusal.words else ""
        console.warn(f"{wire.server} answered HTTP {refusal.status}{said}; asking again in {wait_s:.0f} s")
        _sleep(wait_s, interrupt)
    raise AssertionError("unreachable")


def read_json(answer: Answer, *, within_s: float) -> object:
    """The whole body as JSON; FetchError when it is too long or takes too long, NotAnAnswerError for all else."""
    answer.allow(within_s)
    raw = _read(answer, _BODY_BYTES)
    server = answer.server
    text = raw.decode("utf-8-sig", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise not_an_answer(server, text, reason=reason)


def not_an_answer(server: Server, text: str, *, reason: str = "") -> NotAnAnswerError:
    """The error for a body that is not what the API has."""
    if not text.strip():
        message, hint = f"{server} sent an empty answer", "see its log, and check the address"
    elif text.lstrip()[:1] == "<":
        message = f"{server} answers with a web page"
        hint = "check the path, http://HOST:PORT/v1 for most servers, and that no login page is in between"
    elif text.lstrip()[:1] in ("{", "["):
        message, hint = f"the answer of {server} is not whole", "send the message again; if it repeats, see its log"
    else:
        message, hint = f"the answer of {server} makes no sense", "check that the address is an OpenAI-compatible API"
    evidence = f"{reason}: {text[:2000]}" if reason else text[:2000]
    return NotAnAnswerError(message, evidence=server.safe(evidence), hint=hint)


def _read_refusal(answer: Answer, server: Server, method: str, url: str) -> Refusal:
    answer.allow(_ERROR_S)
    headers = answer.head.headers
    text = ""
    if headers.get("content-encoding", "identity").strip().lower() == "identity":
        with suppress(FetchError):  # the status says enough
            text = _read(answer, _ERROR_BYTES, cut=True).decode("utf-8-sig", "replace")
    words, code = _words_of(text)
    return Refusal(
        status=answer.head.status,
        words=server.safe(words),
        code=server.safe(code),
        body=server.safe(text, limit=4000),
        retry_after_s=retry_after_s(headers.get("retry-after", "")),
        location=server.safe(_absolute(url, headers.get("location", ""))),
        method=method,
        url=url,
    )


def _absolute(url: str, location: str) -> str:
    try:
        return urljoin(url, location) if location else ""
    except ValueError:
        return location


def _words_of(text: str) -> tuple[str, str]:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return "", ""
    if isinstance(value, list) and value:  # Google's API
        value = value[0]
    return error_words(value)


def _read(answer: Answer, limit: int, *, cut: bool = False) -> bytes:
    """The body; one longer than ``limit`` bytes is an error, or is ``cut`` there."""
    parts, size = [], 0
    for data in answer.chunks():
        parts.append(data)
        size += len(data)
        if size > limit:
            if cut:
                break
            raise answer.server.failed(
                f"{answer.server} sends more than an answer can be",
                evidence=f"over {limit >> 20} MiB in one piece",
                hint="check that the address is an OpenAI-compatible API",
            )
    return b"".join(parts)[:limit]


def _wait_s(refusal: Refusal, nth: int) -> float | None:
    """Seconds to wait before the next try; None when another try would not help, or not soon."""
    if refusal.status not in _BUSY or is_out_of_credit(refusal):
        return None
    asked_s = refusal.retry_after_s
    wait_s = FIRST_WAIT_S * (1 << (nth - 1)) if asked_s is None else asked_s
    return wait_s if wait_s <= LONGEST_WAIT_S else None


def _sleep(seconds: float, interrupt: Interrupt) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if interrupt.raised:
            raise Cancelled
        time.sleep(min(left, 0.05))
