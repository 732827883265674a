"""``chat``: talk with the model."""

from __future__ import annotations

import argparse
from typing import Any

from runtime.commands.options import model_options, reply_options, request_of, sampling_of, token_limit
from runtime.prepare import load_engine, prepare


def add(verbs: Any) -> None:
    """Declare the verb."""
    talk = verbs.add_parser(
        "chat", parents=[model_options(), reply_options()], help="talk with the model", description=run.__doc__
    )
    talk.add_argument("--system", metavar="TEXT", help="the system message")
    talk.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Talk with the model; the text of each reply goes to stdout."""
    sampling = sampling_of(arguments)
    request = request_of(arguments)
    prepared = prepare(request)
    header = prepared.header
    from runtime.chat.old import Session, converse
    from runtime.interrupts import interrupts_noted
    from runtime.template import chat_template

    with interrupts_noted() as interrupt:
        engine = load_engine(prepared, request, interrupt)
    with engine:
        session = Session(
            engine=engine,
            template=chat_template(header),
            sampling=sampling,
            max_tokens=token_limit(arguments.max_tokens, None),
            stops=tuple(arguments.stop),
            threads=engine.settings.number("n_threads"),
            system=arguments.system or "",
            shows_stats=not arguments.no_stats,
        )
        return converse(session, header)
