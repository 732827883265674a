"""Tokens as text: the pieces of a vocabulary, and a stream of them that never cuts a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from runtime.engine.model import Model


class Pieces(dict[int, "str | bytes | None"]):
    """What each token stands for, asked of the library once: its text, or the bytes of a part of a character.

    None is a token that ends the generation. A dictionary, so that a token seen before costs no call into C.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, token: int) -> str | bytes | None:
        piece: str | bytes | None = None
        if not self._model.lib.llama_vocab_is_eog(self._model.vocab, token):
            raw = self._model.piece(token)
            try:
                piece = raw.decode("utf-8")
            except UnicodeDecodeError:
                piece = raw
        self[token] = piece
        return piece

    def text(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``; bytes that make no character become U+FFFD."""
        stream = TextStream()
        return "".join(stream.feed(self[token] or "") for token in tokens) + stream.flush()


class TextStream:
    """Pieces in, text out: the bytes of an unfinished character wait for the rest of it."""

    __slots__ = ("_decoder", "_open")

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = False

    def feed(self, piece: str | bytes) -> str:
        """The text that is complete with ``piece``; bytes that make no character become U+FFFD."""
        if isinstance(piece, str):
            if not self._open:
                return piece
            piece = piece.encode()
        text = self._decoder.decode(piece)
        self._open = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """A mark for the bytes that still wait, if any."""
        self._open = False
        return self._decoder.decode(b"", True)
