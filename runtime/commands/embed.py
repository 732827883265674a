"""``embed``: vectors of texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from runtime.commands.options import model_options
from runtime.commands.prepare import check_adapters, load_adapters, prepare
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, UsageError

if TYPE_CHECKING:
    from runtime.engine.embeddings import Vectors

TEXTS_AT_A_TIME: Final = 256
"""Lines of standard input that are read, embedded and written together."""


def add(verbs: Any) -> None:
    """Declare the verb."""
    vectors = verbs.add_parser(
        "embed", parents=[model_options()], help="make vectors of texts", description=run.__doc__
    )
    vectors.add_argument(
        "-p", "--text", action="append", metavar="TEXT", help="may be repeated; without it each line of standard input"
    )
    vectors.add_argument(
        "--pooling", choices=("mean", "cls", "last"), help="default: the model's own, else mean or last as fits it"
    )
    vectors.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    vectors.add_argument("--raw", action="store_true", help="vectors as they are, not of length 1")
    vectors.add_argument("--json", action="store_true", help="one JSON object: embeddings, n_embd, pooling, tokens")
    vectors.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Make a vector of each text; one JSON array a line, in the order of the texts."""
    texts = _texts(arguments.text)
    prepared = prepare(arguments, "embeddings")
    header, settings = prepared.header, prepared.settings
    check_adapters(header.path, arguments)
    import json

    from runtime.engine.embeddings import Embedder
    from runtime.engine.load import load_model
    from runtime.interrupts import interrupts_noted
    from toolchain.base import console

    rows: list[list[float]] = []
    counts: list[int] = []
    with interrupts_noted() as interrupt:
        model = load_model(header.path, settings, verbose=arguments.verbose, interrupt=interrupt)
        embedder = None
        try:
            adapters = load_adapters(model, arguments)
            embedder = Embedder(model, settings, pooling=arguments.pooling, adapters=adapters)
            while some := list(islice(texts, TEXTS_AT_A_TIME)):
                tokens = embedder.tokenize(some, truncate=arguments.truncate, first=len(counts) + 1)
                found = numbers(embedder.embed(tokens, normalize=not arguments.raw))
                counts += map(len, tokens)
                if arguments.json:
                    rows += found
                else:
                    for row in found:
                        console.answer(json.dumps(row))
                if interrupt.raised:
                    return INTERRUPTED_EXIT_CODE
            if arguments.json:
                answer = {"embeddings": rows, "n_embd": embedder.n_embd, "pooling": embedder.pooling, "tokens": counts}
                console.answer(json.dumps(answer))
        finally:
            if embedder:
                embedder.close()
            model.close()
    return 0


def numbers(vectors: Vectors) -> list[list[float]]:
    """Rows with the nine digits that give each 32-bit number back."""
    return [[float(f"{number:.9g}") for number in row] for row in vectors.tolist()]


def _texts(given: list[str] | None) -> Iterator[str]:
    if given is not None:
        return iter(given)
    if sys.stdin.isatty():
        raise UsageError("no text", hint='give -p "...", or pipe lines in')
    return (line.decode("utf-8", "replace").rstrip("\r\n") for line in sys.stdin.buffer)
