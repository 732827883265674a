"""Annotations of parameters: as a model reads them, and for values that have to follow them."""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

_SCALARS: Final[Mapping[Any, str]] = {str: "string", int: "integer", float: "number", bool: "boolean"}
_LISTS: Final = (list, tuple, set, frozenset, Sequence)
_MAPPINGS: Final = (dict, Mapping)
_WORDS: Final[Mapping[type, str]] = {
    str: "a text", bool: "True or False", int: "a whole number", float: "a number", list: "a list", dict: "a mapping",
    tuple: "a list", set: "a list", frozenset: "a list",
}  # fmt: skip


class Mismatch(ValueError):
    """An argument that is not what its parameter wants."""


def converted(value: Any, annotation: Any) -> Any:
    """``value`` as the parameter wants it: an Enum's member for its value or name, a float for a whole number.

    Raises Mismatch for what it is not. A value whose annotation says nothing is taken as it is.
    """
    inner = get_args(annotation)
    match _form(annotation):
        case "scalar":
            value = _scalar(value, annotation)
        case "none" if value is not None:
            raise Mismatch(f"expected None, got {shown(value)}")
        case "annotated":
            value = converted(value, inner[0])
        case "choice":
            value = _chosen(value, annotation)
        case "union":
            value = _one_of(value, inner)
        case "list":
            value = _listed(value, annotation, inner)
        case "mapping":
            value = _mapped(value, inner)
    return value


def named(annotation: Any) -> str:
    match _form(annotation):
        case "none":
            return "None"
        case "annotated":
            return named(get_args(annotation)[0])
        case "choice":
            return " | ".join(map(shown, _choices(annotation)))
        case "union":
            return " | ".join(map(named, get_args(annotation)))
    return inspect.formatannotation(annotation).replace("typing.", "").replace("collections.abc.", "")


def shown(value: object) -> str:
    """A value in an error, at most some sixty characters of it."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _form(annotation: Any) -> str:
    origin = get_origin(annotation) or annotation
    if annotation is None or annotation is type(None):
        return "none"
    if origin is Annotated:
        return "annotated"
    if origin is Literal or (isinstance(annotation, type) and issubclass(annotation, enum.Enum)):
        return "choice"
    if origin in (Union, types.UnionType):
        return "union"
    forms = (("scalar", tuple(_SCALARS)), ("list", _LISTS), ("mapping", _MAPPINGS))
    return next((form for form, kinds in forms if any(origin is kind for kind in kinds)), "any")


def _choices(annotation: Any) -> list[Any]:
    """What may be given for a Literal or an Enum: an Enum's values, or its names where JSON knows no such value."""
    if get_origin(annotation) is Literal:
        return [choice.value if isinstance(choice, enum.Enum) else choice for choice in get_args(annotation)]
    return [m.value if isinstance(m.value, str | int | float) else m.name for m in annotation]


def _chosen(value: Any, annotation: Any) -> Any:
    if get_origin(annotation) is Literal:
        candidates = list(zip(_choices(annotation), get_args(annotation), strict=True))
    else:
        candidates = [(m.value, m) for m in annotation] + [(name, m) for name, m in annotation.__members__.items()]
    for given, chosen in candidates:
        if type(given) is type(value) and given == value:
            return chosen
    raise Mismatch(f"expected one of {', '.join(map(shown, _choices(annotation)))}, got {shown(value)}")


def _one_of(value: Any, options: Sequence[Any]) -> Any:
    """``value`` as the first option that takes it, one of its own type before others."""
    wrong: list[str] = []
    for option in sorted(options, key=lambda option: option is not type(value)):
        try:
            return converted(value, option)
        except Mismatch as error:
            wrong.append(str(error).removesuffix(f", got {shown(value)}").removeprefix("expected "))
    raise Mismatch(f"expected {' or '.join(wrong)}, got {shown(value)}")


def _scalar(value: Any, wanted: Any) -> Any:
    if type(value) is wanted:
        return value
    if wanted is float and type(value) is int:
        return _float(value)
    if wanted is int and type(value) is float and value.is_integer():
        return int(value)
    raise Mismatch(f"expected {_WORDS[wanted]}, got {shown(value)}")


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise Mismatch(f"expected a number, got one of {value.bit_length()} bits") from None


def _listed(value: Any, annotation: Any, inner: tuple[Any, ...]) -> Any:
    origin = get_origin(annotation) or annotation
    if not isinstance(value, list | tuple | set):
        raise Mismatch(f"expected a list, got {shown(value)}")
    kinds: Sequence[Any] = [inner[0]] * len(value) if inner else [Any] * len(value)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        kinds = inner
        if len(kinds) != len(value):
            raise Mismatch(f"expected a list of {len(kinds)}, got {shown(value)}")
    items = [converted(item, kind) for item, kind in zip(value, kinds, strict=True)]
    return items if origin in (list, Sequence) else origin(items)


def _mapped(value: Any, inner: tuple[Any, ...]) -> Any:
    if not isinstance(value, dict):
        raise Mismatch(f"expected a mapping, got {shown(value)}")
    if len(inner) != 2:
        return value
    return {converted(key, inner[0]): converted(item, inner[1]) for key, item in value.items()}
