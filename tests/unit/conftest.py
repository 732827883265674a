"""The unit tier's fence: no network beyond loopback, and no process left behind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest


@pytest.fixture(autouse=True)
def _fence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    connect = socket.socket.connect

    def only_loopback(self: socket.socket, address: Any) -> None:
        host = str(address[0]) if isinstance(address, tuple) else "localhost"
        if not (host.startswith("127.") or host in ("localhost", "::1")):
            raise OSError(f"the unit tier may not reach {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_loopback)
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "foundry-home"))
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p not in before and p.is_running()]
    assert not left, f"processes left behind: {left}"
