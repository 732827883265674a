"""A conversation as a file to keep or to show: JSON, YAML, Markdown, or a page of HTML that needs nothing else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from runtime.conversation.messages import Message, images_of, text_of
from runtime.conversation.tracker import Conversation
from runtime.settings import near_miss
from toolchain.base import files
from toolchain.base.errors import FoundryError, MissingError, UsageError

_NAMES: Final = MappingProxyType({"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"})
_IMAGE: Final = re.compile(r"data:image/(png|jpeg|gif|webp|bmp);base64,[A-Za-z0-9+/]+={0,2}")

_STYLE: Final = """\
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
article { border-left: .25rem solid #8888; padding: 0 1rem; margin: 1.5rem 0; }
article.user { border-color: #27c; }
article.assistant { border-color: #2a6; }
h1 { font-size: 1.3rem; }
h2 { font-size: .85rem; margin: 0 0 .3rem; opacity: .7; }
p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
img { max-width: 100%; }
"""


def destination(
    typed: str, *, command: str, overwrite: bool, confirm: Callable[[str], bool], example: str = "talk.json"
) -> Path:
    """Where to write; UsageError for a place that cannot be, or a file that is there and may not be written over."""
    if not typed:
        raise UsageError("no file named", hint=f"{command} {example}")
    path = files.expand(typed)
    if path.is_dir():
        raise UsageError(f"{path} is a directory", hint=f"{command} {path / example}")
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
        raise UsageError(f"{path} is no regular file", hint=f"{command} {example}")
    if not path.parent.is_dir():
        raise UsageError(f"no directory {path.parent}", hint=f"{command} {example} writes into the current one")
    if path.exists() and not overwrite and not confirm(f"{path} exists; write over it?"):
        raise UsageError(f"{path} exists", hint=f"{command}! {typed} writes over it")
    return path


def save(messages: Sequence[Message], path: Path) -> None:
    """The messages as a JSON list, in one atomic step."""
    _write(path, as_json(messages, path.stem))


def export(messages: Sequence[Message], path: Path) -> None:
    """The conversation in the form that the file's suffix names, in one atomic step; UsageError for another suffix."""
    require_format(path.name)
    _write(path, FORMATS[path.suffix.lower()](messages, path.stem))


def require_format(name: str) -> None:
    """Raise UsageError for a name whose suffix stands for no format; an empty name is left to ``destination``."""
    suffix = Path(name).suffix.lower()
    if name and suffix not in FORMATS:
        raise UsageError(
            f"{name}: {suffix or 'no suffix'} names no format",
            hint=near_miss(suffix, FORMATS) or f"a name that ends in {', '.join(FORMATS)}",
        )


def as_json(messages: Sequence[Message], _title: str) -> str:
    """A list of the messages."""
    return json.dumps([dict(message) for message in messages], indent=2) + "\n"


def as_yaml(messages: Sequence[Message], _title: str) -> str:
    """As ``Conversation.from_yaml`` reads it."""
    conversation = Conversation()
    for message in messages:
        conversation.add(message["role"], message["content"])
    return conversation.to_yaml()


def as_markdown(messages: Sequence[Message], title: str) -> str:
    """A heading for each message; its text as it stands, since models write Markdown."""
    parts = [f"# {title}"]
    for message in messages:
        images = [f"![image]({url})" for url in images_of(message)]
        parts += [f"## {_speaker(message)}", *images, text_of(message).strip()]
    return "\n\n".join(filter(None, parts)) + "\n"


def as_html(messages: Sequence[Message], title: str) -> str:
    """One page; every text is escaped, nothing is loaded from elsewhere and no script can run."""
    articles = []
    for message in messages:
        role = message["role"] if message["role"] in _NAMES else "tool"
        images = [f'<img alt="image" src="{url}">' for url in images_of(message) if _IMAGE.fullmatch(url)]
        articles.append(
            f'<article class="{role}">\n<h2>{html.escape(_speaker(message))}</h2>\n'
            + "".join(f"{image}\n" for image in images)
            + f"<p>{html.escape(text_of(message).strip())}</p>\n</article>\n"
        )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{''.join(articles)}</body>\n</html>\n"
    )


FORMATS: Final[Mapping[str, Callable[[Sequence[Message], str], str]]] = MappingProxyType(
    {".md": as_markdown, ".json": as_json, ".yaml": as_yaml, ".yml": as_yaml, ".html": as_html}
)


def _speaker(message: Message) -> str:
    return _NAMES.get(message["role"], str(message["role"]))


def _write(path: Path, text: str) -> None:
    try:
        with files.disk_errors(path), files.staged(path) as partial:
            partial.write_bytes(text.encode("utf-8", "replace"))
    except MissingError:
        raise
    except (OSError, FoundryError) as error:
        raise UsageError(f"{path} cannot be written", evidence=str(error)) from error
