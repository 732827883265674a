"""The reference in ``docs/llama.md``: each public name of LLaMa with signature and docstring, below a written start."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from toolchain.base.errors import UsageError

PAGE: Final = "llama.md"
MARK: Final = "<!-- From here on written by `./inv reference`, from the docstrings. -->"
_WIDTH: Final = 100


def reference() -> str:
    """The generated part of the page, from its mark on."""
    from runtime.conversation.tracker import Conversation
    from runtime.llama.describe import LoadResourceInfo, ModelMetaInfo
    from runtime.llama.finish import FinishMeta, FunctionCall
    from runtime.llama.loaded import Loaded
    from runtime.llama.native import Native
    from runtime.llama.options import ReplyArguments
    from runtime.llama.talking import Talking
    from runtime.llama.tokens import Tokens
    from runtime.llama.tracked import Tracked
    from runtime.model import LLaMa

    chapters: list[tuple[str, type]] = [
        ("The model", Loaded),
        ("Text and tokens", Tokens),
        ("Chat", Talking),
        ("Raw text", Native),
        ("The conversation", Tracked),
        ("State", LLaMa),
    ]
    types: list[tuple[str, type]] = [
        ("llm.finish_meta", FinishMeta),
        ("function_call", FunctionCall),
        ("llm.load_resource_info", LoadResourceInfo),
        ("llm.model_meta_info", ModelMetaInfo),
        ("llm.conversation", Conversation),
    ]
    parts = [MARK, "## `LLaMa`", _text(LLaMa)]
    for title, owner in chapters:
        parts += [f"### {title}", *_members(owner, "llm")]
    parts += ["## `ReplyArguments`", _text(ReplyArguments)]
    for called, each in types:
        parts += [f"## `{each.__name__}`", _text(each), *_members(each, called)]
    return "\n\n".join(parts) + "\n"


def public_names(owner: type) -> list[str]:
    """The names of ``owner`` that are not private, in the order in which they were written, the constructor first."""
    constructor = ["__init__"] if getattr(vars(owner).get("__init__"), "__doc__", None) else []
    return [*constructor, *(name for name in vars(owner) if not name.startswith("_") and _shown(vars(owner)[name]))]


def write_reference(docs: Path) -> None:
    """Put the generated part below the mark of the page in ``docs``."""
    page = docs / PAGE
    page.write_text(_written_start(page) + reference())


def check_reference(docs: Path) -> None:
    """Raise UsageError when the page in ``docs`` is not what the docstrings say."""
    page = docs / PAGE
    if page.read_text() != _written_start(page) + reference():
        raise UsageError(f"{page} is out of date", hint="run `./inv reference` and commit the result")


def _written_start(page: Path) -> str:
    start, mark, _ = page.read_text().partition(MARK)
    if not mark:
        raise UsageError(f"{page} has lost the line that its generated part begins with", evidence=MARK)
    return start


def _shown(value: object) -> bool:
    return isinstance(value, property | classmethod) or inspect.isfunction(value)


def _members(owner: type, called: str) -> Iterator[str]:
    for name in public_names(owner):
        value = vars(owner)[name]
        is_of_class = isinstance(value, classmethod)
        heading = "LLaMa" if name == "__init__" else f"{owner.__name__ if is_of_class else called}.{name}"
        if isinstance(value, property):
            returned = inspect.signature(value.fget).return_annotation if value.fget else ""
            line = f"{heading}: {returned}" + ("  # may be set" if value.fset else "")
        else:
            line = _signature(heading, value.__func__ if is_of_class else value)
        yield f"#### `{heading}`\n\n```python\n{line}\n```"
        yield _text(value)


def _signature(heading: str, function: Callable[..., Any]) -> str:
    """As one would write it, one line if it fits, else a line for each parameter."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    given, kinds = [_parameter(each) for each in parameters], [each.kind for each in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        given.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returned = "" if function.__name__ == "__init__" else f" -> {signature.return_annotation}"
    line = f"{heading}({', '.join(given)}){returned}"
    if len(line) <= _WIDTH:
        return line
    return f"{heading}(\n    " + ",\n    ".join(given) + f",\n){returned}"


def _parameter(each: inspect.Parameter) -> str:
    stars = "*" * ((each.kind is each.VAR_POSITIONAL) + 2 * (each.kind is each.VAR_KEYWORD))
    default = "" if each.default is each.empty else f" = {each.default!r}"
    return f"{stars}{each.name}: {each.annotation}{default}"


def _text(documented: object) -> str:
    """A docstring as Markdown."""
    text = inspect.getdoc(documented)
    assert text, f"{documented} has no docstring"
    return text.replace("``", "`")
