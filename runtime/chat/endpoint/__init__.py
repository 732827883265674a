"""Conversations with a server elsewhere, over OpenAI's chat API."""

from runtime.chat.endpoint.endpoint import connect

__all__ = ["connect"]
