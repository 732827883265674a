"""llama-server's own figures, of one model or of each that a router has loaded."""

from __future__ import annotations

from typing import Any

import aiohttp

from runtime.serve.upstream import Upstream

_TIMEOUT = aiohttp.ClientTimeout(total=3.0)  # Prometheus gives a scrape ten seconds by default


async def scrape(session: aiohttp.ClientSession, upstream: Upstream) -> dict[str, str]:
    """Metrics texts by model, "" where there is only one; {} when the child does not answer.

    A router has no figures of its own: it answers for one model (``?model=``), and would load one that is not there
    unless told not to.
    """
    if upstream.state != "ready":
        return {}
    try:
        status, text = await _get(session, upstream, "/metrics")
        if status == 200:
            return {"": text}
        found: dict[str, str] = {}
        for model in await _loaded(session, upstream):
            status, text = await _get(session, upstream, "/metrics", model=model, autoload="false")
            if status == 200:
                found[model] = text
        return found
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return {}


async def _loaded(session: aiohttp.ClientSession, upstream: Upstream) -> list[str]:
    async with session.get(f"{upstream.base_url}/models", headers=_key(upstream), timeout=_TIMEOUT) as reply:
        listed: dict[str, Any] = await reply.json()
    models = listed.get("data", [])
    return [each["id"] for each in models if (each.get("status") or {}).get("value") == "loaded"]


async def _get(session: aiohttp.ClientSession, upstream: Upstream, path: str, **query: str) -> tuple[int, str]:
    url = upstream.base_url + path
    async with session.get(url, params=query, headers=_key(upstream), timeout=_TIMEOUT) as reply:
        return reply.status, await reply.text()


def _key(upstream: Upstream) -> dict[str, str]:
    return {"Authorization": f"Bearer {upstream.api_key}"}
