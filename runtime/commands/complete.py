"""``complete``: continue a prompt as it stands."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

from runtime.commands.options import model_options, reply_options, sampling_of, token_limit
from runtime.commands.prepare import load_engine, prepare
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, UsageError

COMPLETE_TOKENS: Final = 512
"""Tokens at most unless asked otherwise: nothing but a limit ends a model that was not taught to end."""


def add(verbs: Any) -> None:
    """Declare the verb."""
    one = verbs.add_parser(
        "complete", parents=[model_options(), reply_options()], help="continue a prompt", description=run.__doc__
    )
    one.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - or nothing reads standard input")
    one.add_argument("--json", action="store_true", help="one JSON object on stdout: text, figures, settings")
    one.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Continue a prompt as it stands, without the chat template."""
    prompt = _prompt(arguments.prompt)
    sampling = sampling_of(arguments)
    header, settings = prepare(arguments)
    from runtime.engine.reply import stats_line
    from runtime.interrupts import interrupts_noted
    from toolchain.base import console

    pieces: list[str] = []
    with interrupts_noted() as interrupt, load_engine(header.path, settings, arguments, interrupt) as engine:
        chunks = engine.stream(
            engine.tokenize(prompt),
            sampling,
            max_tokens=token_limit(arguments.max_tokens, COMPLETE_TOKENS),
            stops=arguments.stop,
            interrupt=interrupt,
        )
        for chunk in chunks:
            stats = chunk.stats
            pieces.append(chunk.text)
            if not arguments.json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    assert stats is not None
    if arguments.json:
        figures = {
            "text": "".join(pieces),
            "finish_reason": stats.finish_reason,
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "prompt_tps": round(stats.prompt_tps, 2),
            "generation_tps": round(stats.generation_tps, 2),
            "ttft_ms": round(stats.ttft_ms, 3),
            "seed": sampling.seed,
            "model": str(header.path),
            "settings": settings.as_json(),
        }
        console.answer_json(figures)
    elif not "".join(pieces).endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    if not arguments.no_stats:
        console.say(stats_line(stats, threads=settings.number("n_threads")))
    return INTERRUPTED_EXIT_CODE if stats.finish_reason == "cancelled" else 0


def _prompt(given: str | None) -> str:
    """The prompt as given; ``-`` or a pipe is read to its end, less one final line break."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise UsageError("no prompt", hint='give -p "...", or pipe the text in')
    return sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
