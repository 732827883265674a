"""What each request to llama-server is."""

from __future__ import annotations

import pytest

from runtime.serve.endpoints import DANGEROUS, classify, split_target


@pytest.mark.parametrize(
    ("request_line", "kind"),
    [
        ("POST /v1/chat/completions", "generates"),
        ("POST /v1/messages", "generates"),
        ("POST /v1/embeddings", "generates"),
        ("POST /tokenize", "cheap"),
        ("GET /v1/models", "cheap"),
        ("GET /props", "cheap"),
        ("DELETE /v1/stream", "cheap"),
        ("GET /health", "ours"),
        ("HEAD /ready", "ours"),
        ("GET /metrics", "ours"),
        ("GET /index.html", "page"),
        ("GET /v1/chat/completions", "page"),
        ("POST /props", "refused"),
        ("POST /slots/0", "refused"),
        ("POST /lora-adapters", "refused"),
        ("POST /models/load", "refused"),
        ("POST /models/unload", "refused"),
        ("POST /models", "refused"),
        ("DELETE /models", "refused"),
        ("GET /models?reload=1", "refused"),
        ("GET /models?%72eload=1", "refused"),
        ("GET /tools", "refused"),
        ("POST /tools", "refused"),
        ("GET /cors-proxy", "refused"),
        ("POST /predict", "unknown"),
        ("POST /v1/chat/completions/", "unknown"),
        ("DELETE /v1/models", "unknown"),
        ("POST //props", "unknown"),
    ],
)
def test_each_request_is_of_its_kind(request_line: str, kind: str) -> None:
    method, target = request_line.split()
    path, _, query = target.partition("?")
    assert classify(method, path, query).kind == kind


def test_a_dangerous_endpoint_passes_where_it_is_allowed_by_name() -> None:
    assert classify("POST", "/slots/0", allowed=frozenset({"slots"})).kind == "cheap"
    assert classify("POST", "/props", allowed=frozenset({"slots"})).kind == "refused"
    assert set(DANGEROUS) == {"props", "slots", "lora-adapters", "models", "tools", "cors-proxy"}


def test_labels_are_few_whatever_is_asked() -> None:
    labels = {classify("GET", f"/{i}").label for i in range(100)} | {
        classify("POST", f"/slots/{i}").label for i in range(9)
    }
    assert labels == {"other", "/slots"}


@pytest.mark.parametrize(
    "target",
    [
        "/%70rops",
        "http://evil.example/",
        "*",
        "evil.example:443",
        "/a b",
        "/a\\b",
        "/é",
        "",
        "//a",
        "/a//b",
        "/a#b",
        "/a?b#c",
        "/;x",
    ],
)
def test_targets_that_could_be_read_in_two_ways_are_refused(target: str) -> None:
    assert split_target(target) is None


def test_a_plain_target_is_split() -> None:
    assert split_target("/v1/stream?conv_id=a%2Fb&from=3") == ("/v1/stream", "conv_id=a%2Fb&from=3")
