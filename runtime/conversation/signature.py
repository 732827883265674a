"""What a Python function takes, told to a model, and a model's arguments brought into that form."""

from __future__ import annotations

import enum
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final

from runtime.conversation.annotations import named, shown

_STARS: Final[Mapping[Any, str]] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def signature_of(function: Callable[..., object]) -> inspect.Signature:
    """The signature with its annotations resolved as far as they can be. Raises ValueError or TypeError if none."""
    signature = inspect.signature(function)
    try:
        hints = typing.get_type_hints(_hinted(function), include_extras=True)
    except Exception:  # an annotation may be any text
        hints = {}
    parameters = [
        parameter.replace(annotation=_resolved(parameter.annotation, hints.get(name)))
        for name, parameter in signature.parameters.items()
    ]
    returns = _resolved(signature.return_annotation, hints.get("return"))
    return signature.replace(parameters=parameters, return_annotation=returns)


def usage(name: str, signature: inspect.Signature) -> str:
    """``name(a: int, b: str = "x") -> float``, as a model may read it."""
    parts: list[str] = []
    star = False
    positional = 0
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional = len(parts) + 1
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        star = star or parameter.kind is parameter.VAR_POSITIONAL
        prefix = _STARS.get(parameter.kind, "")
        text = f"{prefix}{parameter.name}"
        if parameter.annotation is not parameter.empty:
            text += f": {named(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            default = parameter.default
            text += f" = {shown(default.value if isinstance(default, enum.Enum) else default)}"
        parts.append(text)
    if positional:
        parts.insert(positional, "/")
    returns = signature.return_annotation
    return f"{name}({', '.join(parts)})" + ("" if returns is signature.empty else f" -> {named(returns)}")


def _resolved(annotation: Any, hint: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return annotation
    if hint is not None:
        return hint
    return Any if isinstance(annotation, str) else annotation


def _hinted(function: Callable[..., object]) -> Any:
    """What carries the annotations: the function itself, or the ``__call__`` of an object."""
    inner = inspect.unwrap(function)
    if inspect.isroutine(inner) or inspect.isclass(inner):
        return inner.__init__ if inspect.isclass(inner) else inner
    return getattr(inner, "func", type(inner).__call__)
