"""What a Python function takes, told to a model, and a model's arguments brought into that form."""

from __future__ import annotations

import enum
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final

from runtime.conversation.annotations import named, schema_of, shown

_PARAMETER_LINE: Final = re.compile(r"^(?::param\s+(?:\w+\s+)?(\w+)\s*:|\s+\*{0,2}(\w+)\s*(?:\([^()]*\))?:)\s*(.*)")
_STARS: Final[Mapping[Any, str]] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_SECTION: Final = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$")


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


def parameters_schema(signature: inspect.Signature, docstring: str) -> dict[str, Any]:
    """The JSON schema of an object that holds the arguments by name; ``*args`` have no place in it."""
    told = parameter_lines(docstring)
    properties: dict[str, Any] = {}
    required: list[str] = []
    more = False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            more = True
            continue
        schema = schema_of(parameter.annotation)
        if name in told:
            schema.setdefault("description", told[name])
        if parameter.default is parameter.empty:
            required.append(name)
        elif (default := _json_like(parameter.default)) is not None:
            schema["default"] = default
        properties[name] = schema
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}


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


def parameter_lines(docstring: str) -> dict[str, str]:
    """What a docstring says of each parameter, in Google's form (``Args:``) or in Sphinx's (``:param x:``)."""
    told: dict[str, str] = {}
    section = current = ""
    for line in docstring.splitlines():
        if heading := _SECTION.match(line):
            section, current = heading[1], ""
            continue
        match = _PARAMETER_LINE.match(line)
        if match and (match[1] or section in ("Args", "Arguments", "Parameters")):
            current = match[1] or match[2]
            told[current] = match[3].strip()
        elif current and line.startswith(" "):
            told[current] = f"{told[current]} {line.strip()}".strip()
        else:
            current = ""
    return told


def _json_like(value: Any) -> Any:
    """A default that a schema can hold; None where it cannot, and for None."""
    if isinstance(value, enum.Enum):
        value = value.value
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return None


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
