"""A GBNF grammar as a sampler of the library, and what is wrong with one that it refuses."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from runtime.engine.model import Model
from toolchain.base.errors import UsageError

_PARSER: Final = "error parsing grammar: "  # llama_grammar_parser::parse in llama-grammar.cpp
_UNDEFINED: Final = re.compile("Undefined rule identifier '(.+)'")
_HINT: Final = "the language is described in grammars/README.md of llama.cpp; it begins at the rule `root`"


def parse_grammar(model: Model, grammar: str) -> Any:
    """A grammar sampler of the library, to be freed by the caller; UsageError, with the line, for a broken one."""
    if "\0" in grammar:
        raise UsageError("the grammar holds a NUL character", hint="take it out: write \\x00 where it is meant")
    with tempfile.TemporaryFile() as file:
        with _stderr_of_c(file):
            sampler = model.lib.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
        if sampler:
            return sampler
        file.seek(0)
        message = _message(file.read().decode("utf-8", "replace"), grammar)
    raise UsageError("the grammar cannot be used", evidence=message or model.log.tail().rpartition("\n")[2], hint=_HINT)


def read_argument(given: str) -> str:
    """What an option that takes a file or a text means: the file's text where there is one, else itself."""
    try:
        path = Path(given)
        if path.is_file():
            return path.read_text("utf-8")
    except (OSError, ValueError) as error:  # a text too long for a name, or with NUL in it
        if isinstance(error, UnicodeDecodeError):
            raise UsageError(
                f"{given} is no UTF-8 text",
                evidence=str(error),
                hint=f"iconv -t UTF-8 {given} > new, then give that file",
            ) from error
    if given.endswith((".gbnf", ".json")):
        raise UsageError(f"there is no file {given}", hint="name a file that exists, or give the text itself")
    return given


def _message(said: str, grammar: str) -> str:
    """The parser's complaint with the line; it ends in the part of the grammar that it did not understand."""
    _, known, rest = said.partition(_PARSER)
    if not known:
        return ""
    complaint = rest.removesuffix("\n").removesuffix(f"\n\n{grammar}")
    what, at, tail = complaint.partition(" at ")
    if at and grammar.endswith(tail):
        before = grammar[: len(grammar) - len(tail)]
    elif found := _UNDEFINED.search(complaint):
        what = complaint
        use = re.search(rf"(?<![\w-]){re.escape(found[1])}(?![\w-])", grammar)
        before = grammar[: use.start() if use else 0]
    else:
        return complaint
    line = before.count("\n") + 1
    shown = grammar.split("\n")[line - 1].rstrip("\r")
    column = len(before) - (before.rfind("\n") + 1)
    return f"line {line}: {what}\n{shown}\n{' ' * column}^"


@contextmanager
def _stderr_of_c(file: IO[bytes]) -> Iterator[None]:
    """While the body runs, what is written to file descriptor 2 goes to ``file``: the parser tells nobody else."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
