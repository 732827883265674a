"""Requests that would make llama-server ask other machines, in every API that it speaks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime.serve.fetches import fetches

URL = "http://169.254.169.254/latest/meta-data"
DATA = "data:image/png;base64,aHR0cA=="


def parts(url: str) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "input_image", "image_url": url},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "input_audio", "input_audio": {"format": "mp3", "data": url}},
        {"type": "input_video", "input_video": {"url": url}},
    ]


def body(part: dict[str, Any]) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": URL}, part]}]}).encode()


@pytest.mark.parametrize("part", parts(URL))
def test_a_part_that_is_elsewhere_is_found(part: dict[str, Any]) -> None:
    assert fetches(body(part))


@pytest.mark.parametrize("part", parts(DATA))
def test_a_part_that_comes_along_is_not(part: dict[str, Any]) -> None:
    assert not fetches(body(part))


@pytest.mark.parametrize(
    "sent",
    [
        rb'{"image_url": {"\u0075rl": "http://x"}}',
        rb'{"image\u005furl": {"url": "\u0068ttp://x"}}',
        b'{"image_url": {"url": "http://x", "url": "data:"}}',
        b'{"image_url": {"url": "http://x"}, "image_url": {"url": "data:"}}',
        b'{"image_url" :\n {"url"\t: "http://x"}}',
        b'{"image_url": {"url": "http://x"}} and more',
        b"[" * 100_000 + b'{"url": "http',
    ],
)
def test_no_spelling_hides_it(sent: bytes) -> None:
    assert fetches(sent)


@pytest.mark.parametrize(
    "sent",
    [
        {"messages": [{"role": "user", "content": "see http://x and \u00e9 and \u006a"}]},
        {"tools": [{"function": {"parameters": {"properties": {"url": {"default": "http://x"}}}}}]},
        {"messages": [{"tool_calls": [{"function": {"arguments": '{"image_url": {"url": "http://x"}}'}}]}]},
        {"metadata": {"url": "http://x"}},
    ],
)
def test_a_url_that_nobody_follows_passes(sent: dict[str, Any]) -> None:
    assert not fetches(json.dumps(sent).encode())
