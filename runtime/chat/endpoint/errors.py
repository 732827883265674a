"""What a server did wrong, in our words: a sentence, its own words as evidence, the next thing to do."""

from __future__ import annotations

import difflib
import re
import socket
import ssl
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from runtime.chat.backend import ContextFullError
from runtime.chat.endpoint.address import VERSION, parse_address
from toolchain.base.errors import FetchError, UsageError
from toolchain.base.patience import causes

_SHOWN: Final = 500
"""Characters of a server's own words that are shown."""
_READ: Final = 64 << 10
_TELLING: Final = 8
_AGAIN: Final = "send the message again"
_PLAIN: Final = {
    400: ("does not understand the request", "its own words above say what"),
    408: ("ran out of patience", _AGAIN),
    413: ("does not take a message so large", "send a smaller image or a shorter text"),
    422: ("does not understand the request", "its own words above say what"),
    500: ("failed inside (HTTP 500)", f"see the server's log, then {_AGAIN}"),
    504: ("waited in vain for what is behind it (HTTP 504)", _AGAIN),
}
"""What a status says, and the hint."""


class NotAnAnswerError(FetchError):
    """What came is not what the API has: a web page, half of a JSON text, something else."""


class RefusedError(FetchError):
    """A server answered with an error; ``refusal`` is what it said."""

    refusal: Refusal


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An error answer. ``words`` is the server's message, ``body`` the beginning of all it sent, both made safe;
    ``retry_after_s`` is what it asks to wait, ``location`` where a redirect points."""

    status: int
    words: str = ""
    code: str = ""
    body: str = ""
    retry_after_s: float | None = None
    location: str = ""
    method: str = "POST"
    url: str = ""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server as messages name it; makes foreign text fit to be shown."""

    base: str
    key: str = field(default="", repr=False)

    def __str__(self) -> str:
        return self.base

    def safe(self, text: str, limit: int = _SHOWN) -> str:
        """``text`` without control characters and without the key, and not too long."""
        text = text[:_READ]
        plain = "".join(" " if char.isspace() else char for char in text if not _is_control(char) or char in "\n\t")
        plain = " ".join(_without_key(plain, self.key).split())
        return plain if len(plain) <= limit else plain[: limit - 1] + "…"

    def failed(self, message: str, *, evidence: str = "", hint: str = "") -> FetchError:
        return FetchError(message, evidence=self.safe(evidence), hint=hint)


def unreachable(error: Exception, server: Server, *, connect_s: float) -> FetchError:
    """Why there is no connection, or none any more; ``error`` is httpx2's and is not kept: it holds the request."""
    import httpx2

    chain = list(causes(error))[::-1]  # the innermost first, which says most
    said = f"{type(chain[0]).__name__}: {chain[0]}"
    told = None
    for cause in chain:
        match cause:
            case socket.gaierror():
                told = f"there is no host of the name in {server}", "check the spelling and the network"
            case ssl.SSLCertVerificationError():
                told = (
                    f"the certificate of {server} is not trusted",
                    "behind an inspecting proxy, or for a certificate of your own, set SSL_CERT_FILE to its bundle",
                )
            case ssl.SSLError():
                plain = server.base.replace("https://", "http://", 1)
                told = f"{server} does not speak TLS as we do", f"if it speaks plain http, write {plain}"
            case ConnectionRefusedError():
                told = f"nothing listens at {server}", "start the server, or check the port"
            case httpx2.ProxyError():
                told = f"the proxy refused the way to {server}", "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
            case httpx2.ConnectTimeout():
                told = (
                    f"{server} did not accept a connection within {connect_s:g} s",
                    "check the address, the network and the firewall",
                )
            case httpx2.TimeoutException():
                told = f"{server} takes in nothing more", _AGAIN
            case httpx2.ConnectError() | httpx2.UnsupportedProtocol():
                told = f"cannot reach {server}", "check the network, HTTPS_PROXY and NO_PROXY"
            case httpx2.RemoteProtocolError() if not _ended_early(cause):
                told = f"what answers at {server} does not speak HTTP as we do", "check the address and the port"
            case httpx2.RemoteProtocolError() | httpx2.ReadError() | httpx2.WriteError() | httpx2.NetworkError():
                told = f"the connection to {server} broke", f"see the server's log, then {_AGAIN}"
        if told:
            break
    message, hint = told or (f"what answers at {server} does not speak HTTP as we do", "check the address")
    return server.failed(message, evidence=said, hint=hint)


def refused(refusal: Refusal, server: Server, *, model: str = "", models: Sequence[str] = ()) -> FetchError:
    """The error that an answer with an error status means."""
    message, hint = _sentence(refusal, server, model, models)
    evidence = f"{refusal.method} {refusal.url}: HTTP {refusal.status}"
    said = refusal.words or refusal.body
    kind = ContextFullError if is_context_full(refusal) else RefusedError
    error = kind(message, evidence=server.safe(f"{evidence}: {said}" if said else evidence), hint=hint)
    if isinstance(error, RefusedError):
        error.refusal = refusal
    return error


def is_context_full(refusal: Refusal) -> bool:
    """llama.cpp and OpenAI have codes for it, others only words."""
    if refusal.status not in (400, 413, 422):
        return False
    words = refusal.words.lower()
    codes = ("exceed_context_size_error", "context_length_exceeded")
    return refusal.code in codes or "maximum context length" in words or "prompt is too long" in words


def is_out_of_credit(refusal: Refusal) -> bool:
    """Waiting does not help there."""
    return refusal.status == 402 or refusal.code in ("insufficient_quota", "billing_hard_limit_reached")


def near_miss(name: str, names: Sequence[str]) -> str:
    """ " (did you mean X?)", or nothing."""
    folded = {one.lower(): one for one in names if one != name}
    near = difflib.get_close_matches(name.lower(), folded, n=1)
    return f" (did you mean {folded[near[0]]}?)" if near else ""


def _sentence(refusal: Refusal, server: Server, model: str, models: Sequence[str]) -> tuple[str, str]:
    """What failed, and what to do."""
    if is_context_full(refusal):
        return "the conversation is longer than the server's context", "/undo or /reset makes room"
    if is_out_of_credit(refusal):
        return f"the account at {server} has no credit left", "see the provider's billing page"
    match refusal.status:
        case 401:
            told = (
                f"{server} {'refused the key' if server.key else 'wants a key'}",
                f"{'check' if server.key else 'set'} FOUNDRY_API_KEY in the environment",
            )
        case 403:
            told = f"{server} does not allow this", f"check what the key may do, and whether it may use {model or 'it'}"
        case 404 | 405 if _is_about_model(refusal, model):
            told = f"{server} has no model {model}{near_miss(model, models)}", _choose(model, models)
        case 404 | 405:
            told = f"{server} has no chat completions", _right_path(server.base)
        case 429:
            told = f"{server} limits how often you may ask, and the limit is reached", _wait(refusal)
        case 502 | 503:
            told = f"{server} is out of order or busy (HTTP {refusal.status})", _wait(refusal)
        case status if status in _PLAIN:
            told = f"{server} {_PLAIN[status][0]}", _PLAIN[status][1]
        case status if status >= 500:
            told = f"{server} is out of order (HTTP {status})", f"see the server's log, then {_AGAIN}"
        case status if 300 <= status < 400 and (target := _base_of(refusal.location)):
            told = f"{server} sends elsewhere, which is not followed", f"if you trust it: --endpoint {target}"
        case status:
            told = f"{server} answered HTTP {status}, which is no answer", "check the address"
    return told


def _right_path(base: str) -> str:
    head, _, last = base.rpartition("/")
    right = base if last == "v1" else f"{head if re.fullmatch(VERSION, last) else base}/v1"
    return f"{'check the path' if right == base else f'try --endpoint {right}'}; most have it at http://HOST:PORT/v1"


def _is_about_model(refusal: Refusal, model: str) -> bool:
    return bool(model) and "model" in f"{refusal.code} {refusal.words}".lower()


def _choose(model: str, models: Sequence[str]) -> str:
    models = [name for name in models if name != model]
    shown = ", ".join(models[:10]) + (", ..." if len(models) > 10 else "")
    return f"--endpoint-model with one of {shown}" if models else "name one that it has with --endpoint-model"


def _wait(refusal: Refusal) -> str:
    return f"ask again in {refusal.retry_after_s:.0f} s" if refusal.retry_after_s else "ask again later"


def _base_of(location: str) -> str:
    """The address to type for where a redirect points; "" where that is none."""
    with suppress(UsageError):
        return parse_address(re.split(r"[?#]", location, maxsplit=1)[0]).bases[-1]
    return ""


def _is_control(char: str) -> bool:
    """Also what turns the direction of writing or cannot be written at all."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _without_key(text: str, key: str) -> str:
    """``text`` with <key> for the key and for any beginning of it that is long enough to tell something."""
    begin = key[:_TELLING]
    while begin and (at := text.find(begin)) >= 0:
        shared = next((n for n, char in enumerate(key) if text[at + n : at + n + 1] != char), len(key))
        text = f"{text[:at]}<key>{text[at + shared :]}"
    return text


def _ended_early(error: Exception) -> bool:
    """httpx2 has one class for a peer that goes away and for one that talks nonsense."""
    return "disconnected" in str(error) or "closed connection" in str(error)
