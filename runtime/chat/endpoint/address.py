"""Where a server is: what the user typed, checked and brought into one form."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from toolchain.base.errors import UsageError

ALLOW_PLAIN_HTTP: Final = "FOUNDRY_ALLOW_PLAIN_HTTP"
VERSION: Final = r"v\d+\w*"
"""A part of a path."""
_PASTED: Final = ("/chat/completions", "/models")  # paths of the API that belong behind the address
_OPENAI: Final = "https://api.openai.com/"
_EXAMPLE: Final = "such as http://127.0.0.1:8080 or https://api.example.com/v1"


@dataclass(frozen=True, kw_only=True)
class Address:
    """``bases`` are the places where the API may lie, the likeliest first, without a slash at the end."""

    host: str
    secure: bool
    loopback: bool
    bases: tuple[str, ...]


def parse_address(url: str) -> Address:
    """The address in ``url``; UsageError, with the right form where there is one, for what is none.

    Where no part of the path is a version (``v1``, ``v1beta``), the API may lie below ``/v1`` or right there.
    """
    typed = url.strip()
    if not re.fullmatch(r"[!-\[\]-~]+", typed):  # ASCII without blanks, control characters and the backslash
        raise UsageError("--endpoint is not an address", hint=f"write it in full, {_EXAMPLE}")
    scheme, rest = _split_scheme(typed)
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        corrected = f"{scheme}://{rest[authority.rindex('@') + 1 :]}"
        raise UsageError(
            "--endpoint holds a name or a password, which would end up in histories and logs",
            hint=f"write {_without_query(corrected)}; a key belongs into FOUNDRY_API_KEY in the environment",
        )
    if re.search(r"[?#]", rest):
        raise UsageError(
            "--endpoint holds more than an address: something behind '?' or '#'",
            hint=f"write {_without_query(f'{scheme}://{rest}')}; a key belongs into FOUNDRY_API_KEY in the environment",
        )
    host, port = _host_and_port(f"{scheme}://{rest}")
    path = re.sub(r"/+", "/", rest[len(authority) :]).rstrip("/")
    for pasted in _PASTED:
        path = path.removesuffix(pasted)
    place = f"{scheme}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}{path}"
    versioned = any(re.fullmatch(VERSION, part) for part in path.split("/"))
    return Address(
        host=host,
        secure=scheme == "https",
        loopback=_is_loopback(host),
        bases=(place,) if versioned else (f"{place}/v1", place),
    )


def key_for(url: str) -> str | None:
    """The key in the environment for the server at ``url``: OpenAI's goes to OpenAI alone, whatever else is named."""
    if key := os.environ.get("FOUNDRY_API_KEY"):
        return key
    to_openai = parse_address(url).bases[0].startswith(_OPENAI)
    return os.environ.get("OPENAI_API_KEY") if to_openai else None


def checked_key(api_key: str | None, address: Address) -> str:
    """The key as it is sent, "" for none; UsageError where sending it would give it away."""
    key = (api_key or "").strip()
    if not key:
        return ""
    if not re.fullmatch(r"[!-~]+", key):
        raise UsageError(
            "the key for the endpoint holds blanks or other characters that no key has",
            hint="set it again, without quotes and line breaks",
        )
    allowed = os.environ.get(ALLOW_PLAIN_HTTP, "").strip() == "1"
    if not (address.secure or address.loopback or allowed):
        raise UsageError(
            f"the key would go to {address.host} over plain http, readable for everybody on the way",
            hint=f"write https://..., or unset the key, or set {ALLOW_PLAIN_HTTP}=1 in a network that you trust",
        )
    return key


def _split_scheme(typed: str) -> tuple[str, str]:
    scheme, separator, rest = typed.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        return scheme.lower(), rest
    rest = rest if separator else typed
    host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
    near = re.match(r"localhost\b|\[|[\d.]+(:|$)|[^.]*$", host)
    corrected = _without_query(f"{'http' if near else 'https'}://{rest[len(rest) - len(rest.split('@')[-1]) :]}")
    what = f"begins with {scheme}://, which is no way to a server" if separator else "has no http:// or https://"
    raise UsageError(f"--endpoint {what}", hint=f"write {corrected}")


def _host_and_port(url: str) -> tuple[str, int | None]:
    try:
        split = urlsplit(url)
        host, port = split.hostname or "", split.port
        if ":" in host:
            ipaddress.IPv6Address(host)
    except ValueError as error:
        raise UsageError(f"--endpoint {url} is not an address", evidence=str(error), hint=_EXAMPLE) from error
    if not (":" in host or re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", host)) or port == 0:
        raise UsageError(f"--endpoint {url} names no host", hint=_EXAMPLE)
    return host, port


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _without_query(url: str) -> str:
    return re.split(r"[?#]", url, maxsplit=1)[0]
