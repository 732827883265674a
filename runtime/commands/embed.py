"""``embed``: vectors of texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from runtime.commands.options import model_options, request_of
from runtime.prepare import Prepared, prepare
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, MemoryFitError, UsageError

if TYPE_CHECKING:
    from runtime.engine.embeddings import Vectors

TEXTS_AT_A_TIME: Final = 256
"""Texts that are embedded and written together at most."""
READ_BYTES: Final = 1 << 16
"""Of standard input at a time: what a pipe holds."""


def add(verbs: Any) -> None:
    """Declare the verb."""
    vectors = verbs.add_parser(
        "embed", parents=[model_options(writes=False)], help="make vectors of texts", description=run.__doc__
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
    prepared = prepare(request_of(arguments), "embeddings")
    header, settings = prepared.header, prepared.settings
    import json
    from functools import partial

    from runtime import adapters
    from runtime.engine.embeddings import BATCH_TOKENS, Embedder
    from runtime.engine.load import load_model
    from runtime.interrupts import interrupts_noted
    from toolchain.base import console

    rows: list[list[float]] = []
    counts: list[int] = []
    check_room(prepared, min(BATCH_TOKENS, settings.number("n_ctx")), 1)
    with interrupts_noted() as interrupt:
        model = load_model(header.path, settings, verbose=arguments.verbose, interrupt=interrupt)
    embedder = None
    try:
        embedder = Embedder(
            model,
            settings,
            pooling=arguments.pooling,
            adapters=adapters.load(model, prepared.adapters),
            check_room=partial(check_room, prepared),
        )
        for some in texts:  # not within ``interrupts_noted``: Ctrl-C ends the waiting for input at once
            with interrupts_noted() as interrupt:
                tokens = embedder.tokenize(some, truncate=arguments.truncate, first=len(counts) + 1)
                found = numbers(embedder.embed(tokens, normalize=not arguments.raw, interrupt=interrupt))
                counts += map(len, tokens)
                rows += found if arguments.json else ()
                for row in () if arguments.json else found:
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


def check_room(prepared: Prepared, tokens: int, texts: int) -> None:
    """MemoryFitError when the model and a context for ``tokens`` tokens of ``texts`` texts do not fit what was free.

    Such a context is one micro-batch, and has a row of results for each token (see ``make_embedding_context``).
    """
    from runtime.engine.embeddings import EXACT_TOKENS
    from runtime.memory.footprint import Demand, footprint
    from runtime.memory.here import as_placement
    from toolchain.base.console import format_bytes

    planned = prepared.planned
    n_gpus = len(planned.plan.choice.needs) - 1
    demand = Demand(
        n_ctx=tokens,
        n_batch=tokens,
        n_ubatch=tokens,
        n_seq_max=texts,
        n_outputs_max=tokens,
        flash_attn=tokens > EXACT_TOKENS,
        kv_unified=True,
    )
    placement = as_placement(prepared.settings, n_gpus)
    buffers = footprint(planned.headers, demand, placement, n_gpus, traits=planned.traits)
    needs = [each.total for each in buffers]
    if len(planned.devices) == 1:
        needs = [sum(needs)]
    short = [
        f"{device.name}: {format_bytes(need)} needed, {format_bytes(device.usable_bytes)} to use"
        for device, need in zip(planned.devices, needs, strict=True)
        if need > device.usable_bytes
    ]
    if short:
        raise MemoryFitError(
            f"{prepared.header.path.name} and texts of {tokens} tokens do not fit in memory",
            evidence="\n".join(short),
            hint="embed shorter texts (a lower --n-ctx with --truncate cuts them), or take a smaller quantization",
        )


def _texts(given: list[str] | None) -> Iterator[list[str]]:
    """The texts, some at a time; of standard input all lines that are there, without waiting for more."""
    if given is not None:
        return (given[at : at + TEXTS_AT_A_TIME] for at in range(0, len(given), TEXTS_AT_A_TIME))
    if sys.stdin.isatty():
        raise UsageError("no text", hint='give -p "...", or pipe lines in')
    return _lines()


def _lines() -> Iterator[list[str]]:
    rest = b""
    while piece := sys.stdin.buffer.read1(READ_BYTES):  # type: ignore[union-attr]
        *whole, rest = (rest + piece).split(b"\n")
        for at in range(0, len(whole), TEXTS_AT_A_TIME):
            yield [_text(line) for line in whole[at : at + TEXTS_AT_A_TIME]]
    if rest:
        yield [_text(rest)]


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r")
