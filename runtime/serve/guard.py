"""Who may talk to us: the Host, the Origin and the API key of a request, judged without any I/O.

A web page that a user visits can reach this server through the user's browser. Two checks stop it: the Host must
be ours (a page whose name an attacker points at 127.0.0.1, DNS rebinding, sends its own name), and an Origin, which
browsers add to what pages send, must be ours or allowed.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

ALLOWED_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
_PREFLIGHT_MAX_AGE_S = 600


@dataclass(frozen=True, kw_only=True)
class Guard:
    """``allowed_hosts`` are ``NAME`` (with any port) or ``NAME:PORT``; ``allowed_origins`` are
    ``SCHEME://NAME[:PORT]``, or ``*`` for every page."""

    host: str
    port: int
    api_keys: frozenset[str]
    allowed_hosts: frozenset[str]
    allowed_origins: frozenset[str]

    def is_our_host(self, hosts: Sequence[str]) -> bool:
        """Whether the one Host header names this server. None, or several, do not."""
        return len(hosts) == 1 and self._is_ours(hosts[0])

    def is_allowed_origin(self, origin: str) -> bool:
        if "*" in self.allowed_origins or origin.lower() in {each.lower() for each in self.allowed_origins}:
            return True
        scheme, _, rest = origin.partition("://")
        return scheme in ("http", "https") and "/" not in rest and self._is_ours(rest, default_port=_PORTS[scheme])

    def is_known_key(self, headers: Mapping[str, str]) -> bool:
        """Whether a key is not needed or a right one was sent; takes the same time for every wrong one."""
        return not self.api_keys or is_one_of(sent_key(headers), self.api_keys)

    def cors_headers(self, origin: str | None) -> dict[str, str]:
        """What lets a page read the reply; the Origin was found good before."""
        if origin is None:
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "Retry-After",
            "Vary": "Origin",
        }

    def preflight_headers(self, asked_headers: str) -> dict[str, str]:
        return {
            "Access-Control-Allow-Methods": ALLOWED_METHODS,
            "Access-Control-Allow-Headers": asked_headers or "Authorization, Content-Type, X-Api-Key",
            "Access-Control-Max-Age": str(_PREFLIGHT_MAX_AGE_S),
        }

    def _is_ours(self, authority: str, default_port: int = 80) -> bool:
        parsed = host_and_port(authority, default_port)
        if parsed is None:
            return False
        name, port = parsed
        for allowed in self.allowed_hosts:
            wanted = host_and_port(allowed, 0)
            if wanted is not None and name == wanted[0] and wanted[1] in (0, port):
                return True
        if port != self.port:
            return False
        if name == "localhost" or name == self.host.lower().strip("[]"):
            return True
        address = _address(name)
        if address is None:
            return False
        # DNS rebinding needs a name: an address is what the user typed, and ours when we listen beyond loopback.
        return address.is_loopback or not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``. A name other than localhost may not be."""
    if host.lower() == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def host_and_port(authority: str, default_port: int) -> tuple[str, int] | None:
    """``name:port`` in lower case, without brackets and a dot at the end; None for what is no authority."""
    if not authority or any(sign in authority for sign in "/@?#\\ \t,"):
        return None
    try:
        parsed = urlsplit(f"//{authority}")
        name, port = parsed.hostname, parsed.port
    except ValueError:
        return None
    return (name.removesuffix("."), default_port if port is None else port) if name else None


def sent_key(headers: Mapping[str, str]) -> str:
    """The key of ``Authorization: Bearer KEY`` (OpenAI) or ``x-api-key: KEY`` (Anthropic); "" when there is none."""
    kind, _, key = headers.get("Authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else headers.get("X-Api-Key", "")


def is_one_of(key: str, keys: frozenset[str]) -> bool:
    """Compares all, each in constant time, as digests: neither the length nor the position of a difference shows."""
    digest = _digest(key)
    found = False
    for each in keys:
        found |= hmac.compare_digest(digest, _digest(each))
    return found and bool(key)


_PORTS = {"http": 80, "https": 443}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None
