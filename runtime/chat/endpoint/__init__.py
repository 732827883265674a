"""Conversations with a server elsewhere, over OpenAI's chat API."""

from runtime.chat.endpoint.address import key_for
from runtime.chat.endpoint.endpoint import connect

__all__ = ["connect", "key_for"]
