"""A loaded model: its handle and its vocabulary."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

from runtime.engine.identity import gguf_identity
from runtime.library_id import build_id
from runtime.library_log import LibraryLog
from toolchain.base.errors import UsageError

_INT32_MAX: Final = 2**31 - 1
_PIECE_BYTES: Final = 256  # longer pieces exist (runs of spaces); they take a second call


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

    def long_piece(self, token: int, size: int) -> bytes:
        """The piece of ``size`` bytes, which a first call with less room told."""
        buffer = (ctypes.c_char * size)()
        self.lib.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
        return bytes(buffer)
