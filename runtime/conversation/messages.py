"""One message, in the form that OpenAI's chat API has and chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

Message: TypeAlias = Mapping[str, Any]
"""``role`` and ``content``, which is a text or a list of parts: ``{"type": "text", "text": ...}`` and
``{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}``."""


def text_of(message: Message) -> str:
    """The text of a message, its other parts left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def images_of(message: Message) -> list[str]:
    """The URLs of a message's images, in their order."""
    content = message["content"]
    if isinstance(content, str):
        return []
    return [part["image_url"]["url"] for part in content if part.get("type") == "image_url"]
