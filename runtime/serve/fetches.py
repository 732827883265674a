"""Whether llama-server would fetch something from another machine to answer a request.

A part of a message may name its picture or sound by an http URL (handle_media in tools/server/server-common.cpp), and
llama-server asks for whatever the URL names, from where it stands: services of this machine, of its network, of the
cloud it runs in. No option of it stops that.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

_PARTS: Final = frozenset(["image_url", "input_audio", "input_video", "source"])  # the last of Anthropic's messages
_MAY: Final = re.compile(rb'"(?:url|data|image_url)"\s*:\s*"http|\\u00(?:5[fF]|[67])')
# The second: a letter of these words, or their underscore, spelled as a number.


def fetches(body: bytes) -> bool:
    """Whether a body names a part of a message by an http URL, in any of the APIs. JSON that is none of Python's, and
    looks as if it did, counts too."""
    if not _MAY.search(body):
        return False
    try:
        json.loads(body, object_pairs_hook=_look)
    except (ValueError, RecursionError):  # _Found is a ValueError
        return True
    return False


class _Found(ValueError):
    pass


_REMOTE: Final = object()


def _look(pairs: list[tuple[str, Any]]) -> object:
    """Every object of a body, innermost first, with all its pairs: of two with one name either may count."""
    if any((key in _PARTS and value is _REMOTE) or (key == "image_url" and _is_remote(value)) for key, value in pairs):
        raise _Found
    return _REMOTE if any(key in ("url", "data") and _is_remote(value) for key, value in pairs) else None


def _is_remote(value: object) -> bool:
    return isinstance(value, str) and value.startswith("http")
