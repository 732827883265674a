"""A loaded model: its handle and its vocabulary."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runtime.engine.identity import gguf_identity
from runtime.library_id import build_id
from runtime.library_log import LibraryLog
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.engine.adapters import Adapter

_INT32_MAX: Final = 2**31 - 1
_PIECE_BYTES: Final = 256  # longer pieces exist (runs of spaces); they take a second call
_SPECIAL: Final = 1 | 8 | 16  # LLAMA_TOKEN_ATTR_UNKNOWN, _CONTROL, _USER_DEFINED: what parsing special tokens finds


class Model:
    """Weights and vocabulary in memory; ``lib`` is the library's low-level API, ``handle`` its llama_model.

    ``identity`` tells which file it was loaded from (``gguf_identity``), ``build`` with which build of the library:
    both as they were then, whatever happens to the files later.
    """

    def __init__(self, *, lib: Any, log: LibraryLog, handle: Any, path: Path | None = None) -> None:
        self.lib = lib
        self.log = log
        self.handle = handle
        self.path = path
        self.identity = gguf_identity(path) if path else ""
        self.build = build_id()
        self.adapters: dict[object, Adapter] = {}  # in memory with it, by the stamps of their files
        self.vocab = lib.llama_model_get_vocab(handle)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        """Free it; a second call does nothing. Its contexts have to be freed before."""
        if self.handle:
            self.lib.llama_model_free(self.handle)
        self.handle = None

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text`` with special tokens parsed, and with the BOS that the model wants exactly once."""
        tokens = self._tokens(text, framed=False)
        bos = self.lib.llama_vocab_bos(self.vocab)
        if bos >= 0 and self.lib.llama_vocab_get_add_bos(self.vocab) and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def tokenize_bare(self, text: str) -> list[int]:
        """Tokens of ``text`` alone, with special tokens parsed and nothing added."""
        return self._tokens(text, framed=False)

    def tokenize_framed(self, text: str) -> list[int]:
        """Tokens of a whole text, between the special tokens that the model wants before and after it."""
        return self._tokens(text, framed=True)

    def _tokens(self, text: str, *, framed: bool) -> list[int]:
        lib, raw = self.lib, text.encode("utf-8", "replace")
        # No tokenizer makes more tokens than bytes, but for a prefix space and the like.
        buffer = (ctypes.c_int32 * (len(raw) + 8))()
        count = lib.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), framed, True)
        if -_INT32_MAX <= count < -len(buffer):  # INT32_MIN: more than the library can count
            buffer = (ctypes.c_int32 * -count)()
            count = lib.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), framed, True)
        if count < 0:
            raise UsageError(f"the prompt of {len(raw)} bytes cannot be tokenized", hint="shorten it")
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that ``token`` stands for, maybe a part of a character; empty for a control token."""
        buffer: Any = (ctypes.c_char * _PIECE_BYTES)()
        size = self.lib.llama_token_to_piece(self.vocab, token, buffer, _PIECE_BYTES, 0, False)
        return buffer[:size] if size >= 0 else self.long_piece(token, -size)

    def named_piece(self, token: int) -> bytes:
        """As ``piece``, but a control token is its name, such as ``</s>``."""
        size = -self.lib.llama_token_to_piece(self.vocab, token, None, 0, 0, True)
        buffer = (ctypes.c_char * max(size, 1))()
        self.lib.llama_token_to_piece(self.vocab, token, buffer, size, 0, True)
        return bytes(buffer[: max(size, 0)])

    def named_pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """The bytes of each token of a text, without the spaces that a tokenizer of this vocabulary puts in.

        SentencePiece begins a text with a space, and goes on with one after each special token
        (llama_vocab::impl::tokenize in llama-vocab.cpp).
        """
        begins = self._adds_space
        for token in tokens:
            piece = self.named_piece(token)
            special = bool(self.lib.llama_vocab_get_attr(self.vocab, token) & _SPECIAL)
            yield piece.removeprefix(b" ") if begins and not special else piece
            begins = special and self._adds_space

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text that ``tokenize_bare`` makes ``tokens`` of; bytes that make no character become U+FFFD."""
        return b"".join(self.named_pieces(tokens)).decode("utf-8", "replace")

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a generation."""
        return tuple(token for token in range(self.n_vocab) if self.lib.llama_vocab_is_eog(self.vocab, token))

    @cached_property
    def by_piece(self) -> dict[bytes, int]:
        """The first token of each piece that is some; control tokens have none."""
        found = {self.piece(token): token for token in reversed(range(self.n_vocab))}
        return {piece: token for piece, token in found.items() if piece}

    @cached_property
    def _adds_space(self) -> bool:
        return b"".join(map(self.piece, self.tokenize_bare("x"))).startswith(b" ")

    def long_piece(self, token: int, size: int) -> bytes:
        """The piece of ``size`` bytes, which a first call with less room told."""
        buffer = (ctypes.c_char * size)()
        self.lib.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
        return bytes(buffer)
