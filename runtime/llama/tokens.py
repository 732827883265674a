"""Text to tokens and back."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.llama.loaded import Loaded
from toolchain.base.errors import UsageError


class Tokens(Loaded):
    """The model's vocabulary at work. These calls may be made while a reply is running."""

    def tokenize(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Token ids of ``text``, in their order; special tokens written in it (``</s>``) are parsed.

        ``add_bos`` puts the token first that the model wants before a text, if it wants one. Characters that UTF-8
        does not have (lone surrogates) are read as ``?``.
        """
        model = self._engine.model
        return model.tokenize(text) if add_bos else model.tokenize_bare(text)

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text of token ids; of what ``tokenize`` makes of a text, that text.

        Special tokens are written by their names. Bytes that make no character become U+FFFD. Not to be had back is
        what the model's tokenizer itself throws away, such as spaces beside some special tokens. Raises UsageError for
        an id that the model does not have.
        """
        model = self._engine.model
        return model.detokenize(self._checked(tokens))

    def get_n_tokens(self, text: str) -> int:
        """How many tokens ``tokenize(text)`` has."""
        return len(self.tokenize(text))

    def tokenize_as_str(self, text: str) -> list[str]:
        """The text of each token of ``text``; together they are ``text``.

        A character that several tokens share stands with the last of them, the others are empty.
        """
        from runtime.engine.text import TextStream

        model = self._engine.model
        stream = TextStream()
        pieces = [stream.feed(piece) for piece in model.named_pieces(model.tokenize_bare(text))]
        if pieces and (rest := stream.flush()):
            pieces[-1] += rest
        return pieces

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        given, n_vocab = list(tokens), self._engine.model.n_vocab
        for token in given:
            if not 0 <= token < n_vocab:
                raise UsageError(f"there is no token {token}", hint=f"this model's tokens are 0 to {n_vocab - 1}")
        return given
