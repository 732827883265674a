"""A hardened systemd unit that serves as we were asked to. Pure: text in, text out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CREDENTIAL: Final = "api-key"
STOP_S: Final = 20
"""Seconds beyond the drain: llama-server ends, and then we do."""

_PRIVILEGED_PORT: Final = 1024
_NEVER_AGAIN: Final = (2, 3, 6, 7)  # exit codes that the same start would meet again: usage, missing, artifact, memory

_HARDENED: Final = """\
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
KeyringMode=private
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077
LimitCORE=0"""

_CPU_ONLY: Final = """\
PrivateDevices=yes
MemoryDenyWriteExecute=yes"""

# A GPU's driver writes code at run time, and opens its devices by these names (see /proc/devices).
_WITH_GPU: Final = """\
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=char-drm rw
DeviceAllow=char-kfd rw"""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is started, where, as whom. ``argv`` is without the key; ``key_file`` comes as a credential.

    ``environment`` are variables to set, ``writable`` the folders that may be written.
    """

    argv: Sequence[str]
    folder: Path
    user: str
    writable: Sequence[Path]
    drain_s: float
    port: int
    names: Sequence[str]
    environment: Mapping[str, str]
    key_file: Path | None = None
    gpu: bool = False


def unit_text(unit: Unit) -> str:
    """The unit's file, to be installed under /etc/systemd/system."""
    command = " ".join(quoted(part) for part in unit.argv)
    if unit.key_file:
        command += f" --api-key-file %d/{CREDENTIAL}"
    lines = [
        "[Unit]",
        f"Description=llama-foundry serves {_one_line(', '.join(unit.names))}",
        "Documentation=file:" + _specifiers(str(unit.folder / "docs" / "serving.md")).replace(" ", "%%20"),
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"User={unit.user}",
        f"WorkingDirectory={_specifiers(str(unit.folder))}",
        *(f"Environment={quoted(f'{name}={value}', dollar=False)}" for name, value in unit.environment.items()),
        *([f"LoadCredential={CREDENTIAL}:{_specifiers(str(unit.key_file))}"] if unit.key_file else []),
        f"ExecStart={command}",
        "# a model may take minutes to load",
        "TimeoutStartSec=infinity",
        "# running replies end first, then llama-server",
        "KillSignal=SIGTERM",
        "KillMode=mixed",
        f"TimeoutStopSec={int(unit.drain_s) + STOP_S}",
        "Restart=on-failure",
        "RestartSec=5",
        f"RestartPreventExitStatus={' '.join(map(str, _NEVER_AGAIN))}",
        "# a llama-server that the kernel kills for its memory is started again by us",
        "OOMPolicy=continue",
        "",
        *(f"ReadWritePaths={quoted(str(path), dollar=False)}" for path in unit.writable),
        _HARDENED,
        _WITH_GPU if unit.gpu else _CPU_ONLY,
        *_capabilities(unit.port),
        "",
        "[Install]",
        "WantedBy=multi-user.target",
        "",
    ]
    return "\n".join(lines)


def quoted(text: str, *, dollar: bool = True) -> str:
    """One word of a unit's line: specifiers doubled, signs escaped; ``dollar`` where variables are expanded."""
    escaped = _specifiers(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    if dollar:
        escaped = escaped.replace("$", "$$")
    return escaped if re.fullmatch(r"[\w@%+=:,./-]+", escaped) else f'"{escaped}"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _one_line(text: str) -> str:
    return " ".join(_specifiers(text).split())


def _capabilities(port: int) -> tuple[str, ...]:
    """None, but for the one that a port below 1024 needs."""
    if 0 < port < _PRIVILEGED_PORT:
        return ("CapabilityBoundingSet=CAP_NET_BIND_SERVICE", "AmbientCapabilities=CAP_NET_BIND_SERVICE")
    return ("CapabilityBoundingSet=", "AmbientCapabilities=")
