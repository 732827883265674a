"""The systemd unit: what it starts, what it forbids, and how it spells both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.serve.systemd import Unit, quoted, unit_text


def unit(**changes: Any) -> Unit:
    plain: dict[str, Any] = {
        "argv": ("/venv/bin/python", "-m", "runtime", "serve", "demo"),
        "folder": Path("/srv/foundry"),
        "user": "llm",
        "writable": (Path("/var/foundry"),),
        "drain_s": 30.0,
        "port": 8080,
        "names": ("demo",),
        "environment": {"FOUNDRY_HOME": "/var/foundry"},
    }
    return Unit(**{**plain, **changes})


def lines(**changes: Any) -> list[str]:
    return unit_text(unit(**changes)).splitlines()


def test_unit_is_hardened() -> None:
    wanted = {
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "PrivateTmp=yes",
        "PrivateDevices=yes",
        "MemoryDenyWriteExecute=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "SystemCallFilter=@system-service",
        "CapabilityBoundingSet=",
    }
    assert wanted <= set(lines())


def test_gpu_is_reached_and_may_write_code() -> None:
    found = lines(gpu=True)
    assert "DeviceAllow=char-nvidia* rw" in found
    assert not {"PrivateDevices=yes", "MemoryDenyWriteExecute=yes"} & set(found)


def test_replies_have_their_time_to_end() -> None:
    found = lines(drain_s=100.0)
    assert {"KillSignal=SIGTERM", "KillMode=mixed", "Restart=on-failure"} <= set(found)
    limit = next(int(line.partition("=")[2]) for line in found if line.startswith("TimeoutStopSec="))
    assert limit >= 100 + 10


def test_key_comes_as_a_credential_and_its_file_is_not_in_the_command() -> None:
    found = lines(key_file=Path("/etc/keys/100% ours"))
    assert "LoadCredential=api-key:/etc/keys/100%% ours" in found
    started = next(line for line in found if line.startswith("ExecStart="))
    assert started.endswith(" --api-key-file %d/api-key")
    assert "ours" not in started


def test_low_port_gets_the_one_capability_that_it_needs() -> None:
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE" in lines(port=443)


def test_words_are_spelled_for_systemd() -> None:
    assert quoted("/plain/path-1.gguf") == "/plain/path-1.gguf"
    assert quoted("a b") == '"a b"'
    assert quoted('50% of "$X"\\') == '"50%% of \\"$$X\\"\\\\"'
    assert quoted("$X", dollar=False) == '"$X"'
    assert quoted("a\nb") == '"a\\nb"'
