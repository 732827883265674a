"""Hosts, origins and keys."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.serve.guard import Guard, is_loopback


def guard(**changes: Any) -> Guard:
    defaults = {
        "host": "127.0.0.1",
        "port": 8080,
        "api_keys": frozenset(),
        "allowed_hosts": frozenset(),
        "allowed_origins": frozenset(),
    }
    return Guard(**{**defaults, **changes})


@pytest.mark.parametrize(
    "host", ["localhost:8080", "LOCALHOST:8080", "127.0.0.1:8080", "[::1]:8080", "localhost.:8080"]
)
def test_the_names_of_loopback_are_ours(host: str) -> None:
    assert guard().is_our_host([host])


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8080",
        "localhost:8081",
        "localhost",
        "localhost.evil.example:8080",
        "192.168.1.4:8080",
        "user@localhost:8080",
        "localhost:8080/",
        "localhost:80 80",
        "localhost:8080,evil.example",
        "[::1:8080",
        "localhost:99999",
        "",
    ],
)
def test_every_other_host_is_not(host: str) -> None:
    assert not guard().is_our_host([host])


def test_no_host_and_two_hosts_are_refused() -> None:
    assert not guard().is_our_host([])
    assert not guard().is_our_host(["localhost:8080", "localhost:8080"])


def test_an_allowed_host_has_any_port_or_the_one_named() -> None:
    named = guard(allowed_hosts=frozenset({"models.example", "other.example:9000"}))
    assert named.is_our_host(["Models.Example"])
    assert named.is_our_host(["models.example:8443"])
    assert named.is_our_host(["other.example:9000"])
    assert not named.is_our_host(["other.example:9001"])


def test_beyond_loopback_any_address_is_ours_and_no_name_is() -> None:
    outside = guard(host="0.0.0.0", api_keys=frozenset({"k"}))
    assert outside.is_our_host(["192.168.1.4:8080"])
    assert outside.is_our_host(["[fe80::1]:8080"])
    assert not outside.is_our_host(["192.168.1.4:80"])
    assert not outside.is_our_host(["rebound.example:8080"])


@pytest.mark.parametrize(
    ("origin", "good"),
    [
        ("http://localhost:8080", True),
        ("http://127.0.0.1:8080", True),
        ("http://localhost:3000", False),
        ("http://evil.example", False),
        ("http://localhost:8080.evil.example", False),
        ("null", False),
        ("file://", False),
        ("http://localhost:8080/", False),
        ("ftp://localhost:8080", False),
        ("https://app.example", True),
        ("https://APP.example", True),
        ("https://app.example:444", False),
    ],
)
def test_origins(origin: str, good: bool) -> None:
    assert guard(allowed_origins=frozenset({"https://app.example"})).is_allowed_origin(origin) is good


def test_every_origin_where_all_are_allowed() -> None:
    assert guard(allowed_origins=frozenset({"*"})).is_allowed_origin("null")


@pytest.mark.parametrize(
    ("headers", "known"),
    [
        ({"Authorization": "Bearer right"}, True),
        ({"Authorization": "bearer right"}, True),
        ({"X-Api-Key": "second"}, True),
        ({"Authorization": "Bearer wrong"}, False),
        ({"Authorization": "Basic right"}, False),
        ({"Authorization": "right"}, False),
        ({"Authorization": "Bearer "}, False),
        ({"Authorization": "Bearer rightx"}, False),
        ({"X-Api-Key": "righ"}, False),
        ({"X-Api-Key": "\udcff"}, False),
        ({}, False),
    ],
)
def test_keys(headers: dict[str, str], known: bool) -> None:
    assert guard(api_keys=frozenset({"right", "second"})).is_known_key(headers) is known


def test_no_key_is_needed_where_none_is_set() -> None:
    assert guard().is_known_key({})


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_is_told_from_the_rest(host: str, inside: bool) -> None:
    assert is_loopback(host) is inside
