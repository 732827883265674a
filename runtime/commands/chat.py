"""``chat``: talk with a model here, or with one that a server has."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

from runtime.commands.options import flags_of, model_options, reply_options, request_of, sampling_of, token_limit
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.chat.backend import Backend, ReplyOptions


def add(verbs: Any) -> None:
    """Declare the verb."""
    talk = verbs.add_parser(
        "chat",
        parents=[model_options(optional=True, sees=True), reply_options()],
        help="talk with a model",
        description=run.__doc__,
    )
    talk.add_argument("--system", metavar="TEXT", help="the system message")
    talk.add_argument("--session", metavar="NAME", help="keep the talk under this name, and go on with it")
    talk.add_argument("--show-reasoning", action="store_true", help="what the model thinks before it answers, too")
    talk.add_argument("--plain", action="store_true", help="replies as they come, without rendering Markdown")
    elsewhere = talk.add_argument_group(
        "a server instead of MODEL",
        "its key is in the environment: FOUNDRY_API_KEY (OPENAI_API_KEY for OpenAI alone)",
    )
    elsewhere.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, such as http://host:8080/v1")
    elsewhere.add_argument("--endpoint-model", metavar="NAME", help="which of its models (default: its only one)")
    talk.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Talk with a model; the text of each reply goes to stdout. /help lists the commands of the chat."""
    _check(arguments)
    options = _reply_options(arguments)
    shows = {"shows_stats": not arguments.no_stats, "shows_reasoning": arguments.show_reasoning}
    with _session(arguments) as session, closing(_backend(arguments)) as backend:
        from runtime.chat.talk import Talk

        talk = Talk(backend, options)
        if arguments.system:
            talk.set_system(arguments.system)
        with session.keeping(talk) if session else nullcontext():
            if sys.stdin.isatty():
                from runtime.chat.screen import Screen
                from runtime.chat.terminal import at_terminal

                return at_terminal(talk, Screen(**shows, plain=arguments.plain))
            from runtime.chat.pipe import on_pipe

            return on_pipe(talk, **shows)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.endpoint is None and arguments.model is None:
        raise UsageError(
            "no model named", hint="python -m runtime chat MODEL, or --endpoint URL for one that a server has"
        )
    if arguments.endpoint is not None and arguments.model is not None:
        raise UsageError(
            f"{arguments.model} and --endpoint both say what answers",
            hint="leave one of them out; --endpoint-model names a model of the server",
        )
    local = [f"--{name.replace('_', '-')}" for name, value in flags_of(arguments).items() if value is not None]
    given = {"--lora": arguments.lora, "--force": arguments.force, "--mmproj": arguments.mmproj}
    local += [name for name, value in given.items() if value]
    if arguments.endpoint is not None and local:
        raise UsageError(
            f"{local[0]} is for a model in this process, and --endpoint is asked",
            hint="leave one of them out",
        )
    if arguments.endpoint is None and arguments.endpoint_model is not None:
        raise UsageError("--endpoint-model without --endpoint", hint="--endpoint URL names the server")


def _reply_options(arguments: argparse.Namespace) -> ReplyOptions:
    """The schema stays a schema: a server gets it as it is."""
    from runtime.chat.backend import ReplyOptions
    from runtime.engine.grammar import read_argument

    sampling = sampling_of(arguments)  # a schema is checked by becoming a grammar here
    schema = None
    if arguments.json_schema is not None:
        arguments.json_schema, schema = None, read_argument(arguments.json_schema)
        sampling = sampling_of(arguments)
    return ReplyOptions(
        sampling=sampling,
        max_tokens=token_limit(arguments.max_tokens, None),
        stops=tuple(arguments.stop),
        json_schema=schema,
    )


def _session(arguments: argparse.Namespace) -> Any:
    if arguments.session is None:
        return nullcontext()
    from runtime.chat.saved import open_session

    return open_session(arguments.session)


def _backend(arguments: argparse.Namespace) -> Backend:
    if arguments.endpoint is not None:
        from runtime.chat.endpoint import connect, key_for

        return connect(arguments.endpoint, model=arguments.endpoint_model, api_key=key_for(arguments.endpoint))
    from runtime.chat.local import load_local

    return load_local(request_of(arguments))
