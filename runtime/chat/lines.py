"""Text within a block, marked up, and lines of a width made of it."""

from __future__ import annotations

from functools import cache
from typing import Final

from markdown_it.tree import SyntaxTreeNode
from rich.cells import chop_cells
from rich.console import Console
from rich.style import Style
from rich.text import Text

TAB: Final = "    "

_RISKY: Final = frozenset("*_`[]~<&!|\\")
"""Characters that text to come can turn into markup; one that was markup already is no longer in the text."""
_STYLES: Final = {"em": "italic", "strong": "bold", "s": "strike", "code_inline": "cyan", "link": "underline"}


def inline(node: SyntaxTreeNode, style: str = "") -> tuple[Text, int]:
    """The text of a block's inline content, and where in it the first character stands that may become markup."""
    text = Text(style=style)
    risky: list[int] = []
    for child in node.children:
        for part in child.children:
            _append(text, part, Style(), risky)
    return text, min(risky, default=len(text))


def _append(text: Text, node: SyntaxTreeNode, style: Style, risky: list[int]) -> None:
    match node.type:
        case "text":
            plain = node.content.replace("\t", TAB)
            risky.extend(len(text) + at for at, mark in enumerate(plain) if mark in _RISKY)
            text.append(plain, style)
        case "softbreak" | "hardbreak":
            text.append("\n")
        case "code_inline":
            text.append(node.content.replace("\t", TAB), style + Style.parse(_STYLES[node.type]))
        case "image":
            text.append("image: ", style + Style(dim=True))
            _append_link(text, node, str(node.attrs.get("src", "")), style, risky)
        case "link":
            _append_link(text, node, str(node.attrs.get("href", "")), style, risky)
        case _:
            _append_children(text, node, style + Style.parse(_STYLES.get(node.type, "")), risky)


def _append_children(text: Text, node: SyntaxTreeNode, style: Style, risky: list[int]) -> None:
    """What is risky inside of a mark puts the mark at risk: code that begins in it and ends behind it undoes it."""
    start, before = len(text), len(risky)
    for child in node.children:
        _append(text, child, style, risky)
    if len(risky) > before:
        risky.append(start)


def _append_link(text: Text, node: SyntaxTreeNode, address: str, style: Style, risky: list[int]) -> None:
    """The words and, where they do not tell it, the address: a link must not lead elsewhere than it says."""
    start = len(text)
    if "%60" in address:  # a backtick
        risky.append(start)
    _append_children(text, node, style + Style.parse(_STYLES["link"]), risky)
    words = text.plain[start:]
    if not words:
        text.append(address, style + Style.parse(_STYLES["link"]))
    elif address and address not in (words, f"mailto:{words}"):
        text.append(f" ({address})", style + Style(dim=True))


def wrapped(text: Text, width: int) -> list[Text]:
    return [trimmed(line) for line in text.wrap(layout(), width, overflow="fold")]


def folded(line: Text, width: int) -> list[Text]:
    """A line of code in pieces of ``width`` cells; no space of it is lost."""
    pieces = chop_cells(line.plain, width)
    offsets = [sum(map(len, pieces[:number])) for number in range(1, len(pieces))]
    return list(line.divide(offsets))


def joined_line(lead: Text, line: Text) -> Text:
    return trimmed(Text().append_text(lead).append_text(line))


def trimmed(line: Text) -> Text:
    line.rstrip()
    return line


@cache
def layout() -> Console:
    """Measures and lays out; prints nothing."""
    return Console(force_terminal=True, color_system="truecolor", width=80, legacy_windows=False, emoji=False)
