"""``serve`` under load: clients that leave, and more of them than it can answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests import serving as fixtures
from tests.fronted_llama import load
from tests.serving import ENDLESS, HELLO, PATIENCE_S, Server, serving

environment, tireless = fixtures.environment, fixtures.tireless

TOKENS = 3_000
LEAVERS = 50
CLIENTS = 2
QUEUE = 4


@pytest.fixture(scope="module")
def busy(environment: dict[str, str], tireless: Path) -> Iterator[Server]:
    limits = ("--parallel", CLIENTS, "--max-queue", QUEUE)
    with serving(environment, tireless, "--n-ctx", 8192, *limits) as running:
        yield running


def idle_s(child: psutil.Process) -> float:
    """The processor time of ``child`` once it rests."""
    seen = -1.0
    while (now := sum(child.cpu_times()[:2])) != seen:
        seen = now
        time.sleep(0.1)
    return float(now)


def test_a_reply_that_nobody_waits_for_is_not_computed(busy: Server) -> None:
    client, child = busy.client(timeout=PATIENCE_S), busy.child()
    asked = {"model": "any", "messages": HELLO, "max_tokens": TOKENS, "extra_body": ENDLESS}
    before = idle_s(child)
    client.chat.completions.create(**asked)
    whole_s = idle_s(child) - before
    after_s = 0.0
    for _ in range(LEAVERS):
        stream = client.chat.completions.create(**asked, stream=True)
        next(iter(stream))
        stream.close()
        left = sum(child.cpu_times()[:2])
        after_s += idle_s(child) - left
    print(f"a whole reply {whole_s:.2f} s of processor time; after {LEAVERS} disconnects {after_s:.2f} s")
    assert after_s / LEAVERS <= 0.05 * whole_s


def test_overload_is_turned_away_and_what_is_computed_is_of_use(busy: Server) -> None:
    """Goodput without a clock: as many places are in use as without the overload, and every token is of a whole
    reply."""
    told: Any = SimpleNamespace(base_url=busy.url, api_key="none")
    alone = asyncio.run(load(busy.url, told, CLIENTS, replies=16))
    crowded = asyncio.run(load(busy.url, told, 4 * (CLIENTS + QUEUE), replies=16))
    print(f"places in use per decode: {alone.per_decode:.2f} alone, {crowded.per_decode:.2f} crowded")
    print(f"tokens of whole replies: {crowded.good_tokens} of {crowded.all_tokens:.0f}")
    assert alone.statuses == {200}
    assert {200, 429} <= crowded.statuses <= {200, 429, 503}
    assert crowded.per_decode >= 0.9 * alone.per_decode
    assert crowded.good_tokens >= 0.9 * crowded.all_tokens
