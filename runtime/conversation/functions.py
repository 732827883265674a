"""Python functions that a model may call: told to it, found in what it writes, called with literals only."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from runtime.conversation.annotations import Mismatch, converted, shown
from runtime.conversation.calls import MAX_NAME_CHARS, Call, find_call
from runtime.conversation.signature import signature_of, usage
from runtime.settings import near_miss
from toolchain.base.errors import UsageError

__all__ = ["Call", "Functions", "Result"]

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., object])

INSTRUCTION: Final = """\
You can call these functions. To call one, write it as name(arguments) on a line of its own, outside of code blocks, \
with literal values as arguments, and stop there; its result comes in the next message."""
_NAME: Final = re.compile(rf"[A-Za-z_][A-Za-z0-9_]{{0,{MAX_NAME_CHARS - 1}}}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call gave, as text for the model; ``ok`` is False when the text tells what went wrong."""

    text: str
    ok: bool


@dataclass(frozen=True, kw_only=True)
class _Function:
    run: Callable[..., object]
    signature: inspect.Signature
    description: str


class Functions:
    """Functions by the names under which a model calls them."""

    def __init__(self) -> None:
        self._known: dict[str, _Function] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def register(self, function: AnyFunction, name: str | None = None, description: str | None = None) -> AnyFunction:
        """Let a model call ``function``, described by its signature and docstring; the latest of a name counts.

        Returns ``function``, so that it decorates one. Raises UsageError for a name that is none, and for what
        cannot be called or has no signature.
        """
        known = name if name is not None else getattr(function, "__name__", "")
        if not isinstance(known, str) or not _NAME.fullmatch(known):
            raise UsageError(
                f"{known!r} cannot name a function",
                hint=f"give it a name of at most {MAX_NAME_CHARS} letters, digits and _: register(f, name='add')",
            )
        try:
            signature = signature_of(function)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{known} cannot be described", evidence=str(error), hint="wrap it in a def") from None
        runs = (function, type(function).__call__)
        if any(inspect.iscoroutinefunction(run) or inspect.isasyncgenfunction(run) for run in runs):
            raise UsageError(f"{known} is asynchronous", hint="register a function that returns its result")
        told = description if description is not None else inspect.getdoc(function) or ""
        self._known[known] = _Function(run=function, signature=signature, description=inspect.cleandoc(told))
        return function

    def describe(self) -> str:
        """The functions and how to call them, for a system message; empty without functions."""
        if not self._known:
            return ""
        blocks = [INSTRUCTION]
        for name, function in self._known.items():
            lines = [usage(name, function.signature), *function.description.splitlines()]
            blocks.append("\n    ".join(lines).replace("\n    \n", "\n\n"))
        return "\n\n".join(blocks)

    def find(self, text: str) -> Call | None:
        """The first complete call of a registered function in ``text``: its name and literal arguments.

        Not within code between backticks or tildes, nor within the brackets of another call, nor ``x.name(...)``
        and ``def name(...)``. Nothing is evaluated. A call that is found in the beginning of a text is found in the
        whole of it. Takes time in proportion to the text; a call has at most 65,536 characters.
        """
        return find_call(text, self._known).call

    def call(self, call: Call) -> Result:
        """Call the function and tell what came of it; nothing that it raises gets out but KeyboardInterrupt.

        A text is the result as it is, what JSON knows is written as JSON, anything else as ``str`` writes it.
        """
        function = self._known.get(call.name)
        if function is None:
            hint = near_miss(call.name, self._known)
            return _failed(f"there is no function {call.name}{f'; {hint}' if hint else ''}")
        try:
            bound = _bound(function.signature, call)
        except (TypeError, Mismatch) as error:
            return _failed(f"{error}. It is called as {usage(call.name, function.signature)}")
        try:
            return Result(text=_as_text(function.run(*bound.args, **bound.kwargs)), ok=True)
        except (Exception, SystemExit) as error:
            return _failed(f"{call.name} raised {type(error).__name__}: {_message(error)}")


def _bound(signature: inspect.Signature, call: Call) -> inspect.BoundArguments:
    """The arguments in the form that the parameters want. Raises TypeError or Mismatch."""
    bound = signature.bind(*call.args, **call.kwargs)
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        try:
            if parameter.kind is parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(converted(item, parameter.annotation) for item in value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: converted(item, parameter.annotation) for key, item in value.items()}
            else:
                bound.arguments[name] = converted(value, parameter.annotation)
        except Mismatch as error:
            raise Mismatch(f"argument {name}: {error}") from None
    return bound


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _failed(why: str) -> Result:
    return Result(text=f"error: {why}", ok=False)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return shown(error)
