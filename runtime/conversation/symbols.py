"""Symbols in a text: ``[[USER]]`` becomes a value, ``[[TODAY("%d.%m.")]]`` what a function returns."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from runtime.conversation.literals import parse_arguments, scan_arguments
from toolchain.base.errors import UsageError

MAX_ARGUMENT_CHARS: Final = 4096
_BEGIN: Final = re.compile(r"\[\[([A-Za-z_][A-Za-z0-9_]*+)(?=\]\]|\()")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Symbols:
    """Names and what they stand for: a value, or a function that is called each time."""

    def __init__(self) -> None:
        self._known: dict[str, object] = {}

    def register(self, name: str, value_or_function: object) -> None:
        """Let ``[[name]]`` stand for a value, or for the result of a function; the latest registration counts.

        Raises UsageError when ``name`` is not letters, digits and ``_``.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot name a symbol", hint="names are letters, digits and _, such as USER")
        self._known[name] = value_or_function

    def expand(self, text: str) -> str:
        """``text`` with its symbols replaced, once: what a value holds is text.

        Arguments are Python literals. What cannot be told stays visible: ``[[NAME: missing]]`` for a name that
        nobody registered, ``[[NAME: what went wrong]]`` for a function that raised. Everything else stays as it
        is. Takes time in proportion to the text.
        """
        parts: list[str] = []
        done = position = 0
        budget = 4 * len(text) + MAX_ARGUMENT_CHARS  # of characters read in vain: texts can be made to be hostile
        while budget > 0 and (match := _BEGIN.search(text, position)):
            end, args, kwargs = match.end(), (), {}
            if text[end] == "(":
                scan = scan_arguments(text, end, max_chars=MAX_ARGUMENT_CHARS)
                found = None
                if scan.end is not None and text.startswith("]]", scan.end):
                    found = parse_arguments(text[end : scan.end])
                if scan.end is None or found is None:
                    budget -= scan.reached - end
                    position = end
                    continue
                end, args, kwargs = scan.end, found.args, dict(found.kwargs)
            parts += (text[done : match.start()], self._value(match[1], args, kwargs, text[match.end()] == "("))
            done = position = end + 2
        return "".join([*parts, text[done:]])

    def _value(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], called: bool) -> str:
        if name not in self._known:
            return f"[[{name}: missing]]"
        known = self._known[name]
        try:
            if callable(known):
                function: Callable[..., object] = known
                return str(function(*args, **kwargs))
            return f"[[{name}: takes no arguments]]" if called else str(known)
        except (Exception, SystemExit) as error:
            return f"[[{name}: {_told(error)}]]"


def _told(error: BaseException) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__
