"""What llama-server offers, and what the front does with each of it.

After the routes of ``tools/server/server.cpp`` in the pinned tree. What acts (POST, DELETE) must be listed here to
pass; what only reads passes, but for what is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl

Kind = Literal["ours", "generates", "cheap", "page", "refused", "unknown"]

# These keep a slot of the model busy until they end: they wait for their turn.
GENERATES = frozenset(
    [
        "/completion",
        "/completions",
        "/v1/completions",
        "/chat/completions",
        "/v1/chat/completions",
        "/responses",
        "/v1/responses",
        "/v1/messages",
        "/infill",
        "/embedding",
        "/embeddings",
        "/v1/embeddings",
        "/rerank",
        "/reranking",
        "/v1/rerank",
        "/v1/reranking",
        "/audio/transcriptions",
        "/v1/audio/transcriptions",
    ]
)
# Answered at once, out of turn.
CHEAP_POSTS = frozenset(
    [
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/chat/completions/input_tokens",
        "/v1/chat/completions/input_tokens",
        "/responses/input_tokens",
        "/v1/responses/input_tokens",
        "/v1/messages/count_tokens",
        "/v1/chat/completions/control",
        "/v1/streams/lookup",
    ]
)
CHEAP_GETS = frozenset(["/props", "/models", "/v1/models", "/models/sse", "/slots", "/lora-adapters", "/v1/stream"])
OURS = frozenset(["/health", "/v1/health", "/ready", "/metrics"])
PUBLIC = frozenset(["/health", "/v1/health", "/ready"])
ANTHROPIC = frozenset({"/v1/messages"})
RESPONSES = frozenset({"/responses", "/v1/responses"})

# Names that a configuration may allow, each with the requests it stands for: they change the server for everybody,
# read or write its files, start programs, or fetch from other machines in the server's name.
DANGEROUS: dict[str, tuple[str, re.Pattern[str]]] = {
    "props": ("POST", re.compile(r"/props")),
    "slots": ("POST", re.compile(r"/slots/.*")),
    "lora-adapters": ("POST", re.compile(r"/lora-adapters")),
    "models": ("POST DELETE", re.compile(r"/models(/.*)?")),
    "tools": ("GET HEAD POST", re.compile(r"/tools(/.*)?")),
    "cors-proxy": ("GET HEAD POST", re.compile(r"/cors-proxy(/.*)?")),
}

# llama-server decodes %XX before it looks for a route; no route of its own needs that, so a path must be plain.
_PLAIN_PATH = re.compile(r"(?!.*//)/[A-Za-z0-9._~:@!$&'()*+,=/-]*")
_PLAIN_QUERY = re.compile(r"[\x21\x22\x24-\x7e]*")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """``label`` is the path where it is a known one, for metrics: a client cannot make more of them."""

    label: str
    kind: Kind
    refused_as: str = ""


def classify(method: str, path: str, query: str = "", *, allowed: frozenset[str] = frozenset()) -> Endpoint:
    """What a request is; ``allowed`` are names of ``DANGEROUS`` that may pass after all."""
    for name, (methods, pattern) in DANGEROUS.items():
        if (method in methods.split() and pattern.fullmatch(path)) or (name == "models" and _reloads(path, query)):
            if name in allowed:
                return Endpoint(label=f"/{name}", kind="cheap")
            return Endpoint(label=f"/{name}", kind="refused", refused_as=name)
    reads = method in ("GET", "HEAD")
    kind: Kind = "page" if reads else "unknown"
    if reads and path in OURS:
        kind = "ours"
    elif method == "POST" and path in GENERATES:
        kind = "generates"
    elif (
        (reads and path in CHEAP_GETS)
        or (method == "POST" and path in CHEAP_POSTS)
        or (method == "DELETE" and path == "/v1/stream")
    ):
        kind = "cheap"
    return Endpoint(label="other" if kind in ("page", "unknown") else path, kind=kind)


def split_target(target: str) -> tuple[str, str] | None:
    """The path and the query of an origin-form request target; None for any other form and for odd characters."""
    path, _, query = target.partition("?")
    if not _PLAIN_PATH.fullmatch(path) or not _PLAIN_QUERY.fullmatch(query):
        return None
    return path, query


def _reloads(path: str, query: str) -> bool:
    """A router reads its models anew for `GET /models?reload=1`."""
    return path in ("/models", "/v1/models") and any(name == "reload" for name, _ in parse_qsl(query))
