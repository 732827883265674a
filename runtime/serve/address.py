"""Where the server listens, and the keys that it asks for."""

from __future__ import annotations

import errno
import os
import re
import socket
from pathlib import Path
from typing import Final

import psutil

from runtime.serve.guard import is_loopback
from toolchain.base import console
from toolchain.base.errors import UsageError

KEY_VARIABLE: Final = "FOUNDRY_API_KEY"
MAKE_KEY: Final = (
    "make one: `(umask 077; python -c 'import secrets; print(secrets.token_urlsafe(32))' > api-key)`, "
    "then add `--api-key-file api-key`"
)
_TRIED: Final = 50  # ports beyond the one that is taken
_KEY: Final = re.compile(r"[\x21-\x7e]+")  # what a header can carry


def read_keys(path: Path | None) -> frozenset[str]:
    """The keys of a file (one a line, ``#`` begins a comment), else the one in FOUNDRY_API_KEY, else none.

    Raises UsageError for a file that cannot be read, holds no key, or holds what no request could send.
    """
    if path is None:
        text, where = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
    else:
        text, where = _text(path), str(path)
    keys = [line for raw in text.splitlines() if (line := raw.strip()) and not line.startswith("#")]
    if path is not None and not keys:
        raise UsageError(f"{where} holds no API key", hint=MAKE_KEY)
    for number, key in enumerate(keys, 1):
        if not _KEY.fullmatch(key):
            raise UsageError(f"key {number} of {where} holds a sign that no request could send", hint=MAKE_KEY)
    return frozenset(keys)


def require_key(host: str, keys: frozenset[str], origins: frozenset[str] = frozenset()) -> None:
    """Raise UsageError for an address that others reach, or a door open to every web page, without a key."""
    if keys:
        return
    if not is_loopback(host):
        raise UsageError(f"other machines reach {host}, so clients need an API key", hint=MAKE_KEY)
    if "*" in origins:
        raise UsageError("every web page may ask (--allowed-origin *), so clients need an API key", hint=MAKE_KEY)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address of ``host``, all with the port asked for, or the one that the first was given for 0.

    They do not listen yet: a client that comes too early is refused by the kernel instead of kept waiting.
    Raises UsageError for an unknown host, and for a port that is taken, with who has it and the next free one.
    """
    sockets: list[socket.socket] = []
    try:
        for family, address in _addresses(host, port):
            made = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(made)
            if port:  # one that the kernel chooses is nobody else's only without this
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            given = port or (sockets[0].getsockname()[1] if len(sockets) > 1 else 0)
            made.bind((address, given))
    except OSError as error:
        for each in sockets:
            each.close()
        raise cannot_listen(host, port, error) from error
    return sockets


def cannot_listen(host: str, port: int, error: OSError) -> UsageError:
    """What ``error`` means to whoever chose the address."""
    if error.errno == errno.EADDRNOTAVAIL:
        return _no_address(host, error)
    free = free_port(host, port)
    hint = f"--port {free} is free; --port 0 takes any" if free else "--port 0 takes any that is free"
    if isinstance(error, PermissionError):
        return UsageError(f"port {port} needs privileges", evidence=str(error), hint=hint)
    return UsageError(f"port {port} on {host} is taken", evidence=_holder(port) or str(error), hint=hint)


def free_port(host: str, above: int) -> int | None:
    """The next port above ``above`` that nobody listens on, of the next 50."""
    for port in range(above + 1, min(above + 1 + _TRIED, 1 << 16)):
        try:
            with socket.socket(_addresses(host, port)[0][0], socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((_addresses(host, port)[0][1], port))
        except OSError:
            continue
        return port
    return None


def url_of(host: str, port: int) -> str:
    """Where a client on this machine finds the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown and not shown.startswith("[") else f"http://{shown}:{port}"


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise _no_address(host, error) from error
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _no_address(host: str, error: OSError) -> UsageError:
    hint = "127.0.0.1, or 0.0.0.0 for all"
    return UsageError(f"--host {host}: no address of this machine", evidence=str(error), hint=hint)


def _holder(port: int) -> str:
    """Who listens on ``port``, as far as we may know."""
    try:
        pids = {
            each.pid
            for each in psutil.net_connections(kind="tcp")
            if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port and each.pid
        }
        return "\n".join(f"process {pid}: {' '.join(psutil.Process(pid).cmdline())[:160]}" for pid in sorted(pids))
    except psutil.Error:
        return ""


def _text(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o044 and path.stat().st_uid == os.geteuid():
            console.warn(f"others on this machine may read {path}: `chmod 600 {path}`")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path} cannot be read", evidence=str(error), hint=MAKE_KEY) from error
