"""The commands that change or explain what answers: another model, its adapters, its plan."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.chat.endpoint.endpoint import Endpoint
from runtime.chat.local import LocalBackend
from runtime.interrupts import interrupts_noted
from runtime.settings import NAMES, near_miss, parse_value
from toolchain.base import files
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.chat.talk import Talk
    from runtime.engine.adapters import Adapter
    from runtime.settings import Value


def other_model(talk: Talk, typed: str) -> str:
    """``MODEL [n_ctx=N ...]``: load it in place of the one that answers now, and keep the conversation; what to say.

    Of a server it is the name of another of its models. Without a model it says which one answers. Errors as of
    ``LocalBackend.exchange`` and ``Endpoint.exchange``; the old one then answers on.
    """
    if isinstance(talk.backend, Endpoint):
        return _other_of_server(talk, talk.backend, typed)
    local = _local(talk, "/model")
    if not typed:
        return f"{local.name}, {local.engine.n_ctx} tokens of context"
    model, flags = _parsed(typed)
    alone = " without its adapters" if local.prepared.adapters else ""
    with interrupts_noted() as interrupt:
        try:
            local.exchange(model, flags, interrupt)
        finally:
            talk.count_again()
    return f"{local.name}{alone}, {local.n_ctx} tokens of context; the conversation stays"


def _other_of_server(talk: Talk, endpoint: Endpoint, name: str) -> str:
    if not name:
        others = ", ".join(each for each in endpoint.models if each != endpoint.name)
        return f"{endpoint.name}; the server also has {others}" if others else endpoint.name
    try:
        endpoint.exchange(name)
    finally:
        talk.count_again()
    return f"{endpoint.name}; the conversation stays"


def adapters(talk: Talk, typed: str, *, force: bool = False) -> str:
    """``FILE[=SCALE]`` adds an adapter or changes its scale, ``-FILE`` takes it away and ``-`` all of them; what works
    then, a line each. ``force`` takes one that was trained on another model.

    Of a llama-server it is the id or the name of one that it has, at a scale of our own; 0 in place of away.
    """
    from runtime.engine.adapters import AnotherBaseError

    if isinstance(talk.backend, Endpoint):
        return _adapters_of_server(talk.backend, typed)
    local = _local(talk, "/lora")
    if typed:
        try:
            local.set_adapters(_changed(local, typed, force=force or local.request.force))
        except AnotherBaseError as error:
            error.hint = f"/lora! {typed} insists; /model loads another base"
            raise
        talk.count_again()
    lines = [f"{adapter.file.path} at {scale:g}" for adapter, scale in local.adapters]
    return "\n".join(lines) or "no adapters; /lora FILE[=SCALE] adds one"


def _adapters_of_server(endpoint: Endpoint, typed: str) -> str:
    from runtime.engine.adapters import parse_adapter

    found = endpoint.adapters()
    if typed:
        away = typed.startswith("-")
        named, scale = (Path(typed[1:].strip()), 0.0) if away else parse_adapter(typed)
        meant = {number for number, (name, _) in found.items() if typed == "-" or str(named) in (str(number), name)}
        if not meant and typed != "-":
            raise UsageError(f"the server has no adapter {named}", hint="/lora lists them; /lora ID=0.5 changes one")
        found = {number: (name, scale if number in meant else at) for number, (name, at) in found.items()}
        endpoint.set_adapters({number: at for number, (_, at) in found.items()})
    lines = [f"{number} {name} at {scale:g}" for number, (name, scale) in found.items()]
    return "\n".join(lines) or "the server has no adapters"


def plan(talk: Talk) -> str:
    """The settings with their reasons, where the model lies and what to expect, as ``plan`` prints them."""
    from runtime.memory.show import plan_lines
    from runtime.tune.record import measured_speed

    local = _local(talk, "/plan")
    settings, prepared = local.engine.settings, local.prepared
    planned = prepared.planned.plan
    speed = measured_speed(prepared.header, prepared.machine, settings) or planned.speed
    return "\n".join(plan_lines(planned, settings, speed, plain=True))


def _local(talk: Talk, command: str) -> LocalBackend:
    if not isinstance(talk.backend, LocalBackend):
        raise UsageError(
            f"{command} needs a model in this process; {talk.backend.name} answers from a server",
            hint="python -m runtime chat MODEL, without --endpoint",
        )
    return talk.backend


def _parsed(typed: str) -> tuple[str, dict[str, Value]]:
    if files.expand(typed).is_file():
        return typed, {}
    try:
        model, *words = shlex.split(typed)
    except ValueError as error:
        raise UsageError("a quote is not closed", evidence=str(error), hint='/model "name with spaces.gguf"') from error
    flags: dict[str, Value] = {}
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name not in NAMES or not equals:
            hint = near_miss(name, NAMES) if name not in NAMES else f"/model {model} {name}=VALUE"
            raise UsageError(
                f"/model: {word} is no setting",
                hint=hint or "a name with spaces stands in quotes; settings are n_ctx=8192 and the like",
            )
        flags[name] = parse_value(name, value, "/model")
    return model, flags


def _changed(local: LocalBackend, typed: str, *, force: bool) -> list[tuple[Adapter, float]]:
    from runtime.engine.adapters import parse_adapter

    chosen = list(local.adapters)
    if typed == "-":
        return []
    if typed.startswith("-") and not files.expand(typed).is_file():
        gone = _known(chosen, files.expand(typed[1:].strip()))
        if gone is None:
            names = [adapter.file.path.name for adapter, _ in chosen]
            raise UsageError(
                f"no adapter {typed[1:].strip()} is at work", hint=near_miss(typed[1:], names) or "/lora lists them"
            )
        return [each for each in chosen if each[0] != gone]
    path, scale = parse_adapter(typed)
    known = _known(chosen, path)
    there = known.file.path if known and not path.is_file() else path
    adapter = local.engine.load_adapter(there, force=force) if there.is_file() or not known else known
    if known is None:
        return [*chosen, (adapter, scale)]
    return [(adapter, scale) if each == known else (each, before) for each, before in chosen]


def _known(chosen: Sequence[tuple[Adapter, float]], path: Path) -> Adapter | None:
    """The adapter that ``path`` names, by its path or, where that is clear, by its file's name."""
    if exact := [each for each, _ in chosen if each.file.path.resolve() == path.resolve()]:
        return exact[0]
    named = [each for each, _ in chosen if each.file.path.name == str(path)]
    return named[0] if len(named) == 1 else None
