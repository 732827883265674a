"""Markdown as lines of styled text: what each block looks like, and which of its lines more text can still change.

CommonMark with tables and strikethrough, as markdown-it reads it. Left out is what would change text that was shown
already, or hide text: HTML (shown as typed), reference definitions, headings underlined by a second line. A line
break of the source stays one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from rich import box
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from runtime.chat.lines import TAB, folded, inline, joined_line, layout, trimmed, wrapped

MIN_WIDTH: Final = 8
RULE_WIDTH: Final = 40
CODE_THEME: Final = "ansi_dark"
"""Of the terminal's own sixteen colours, so that it reads on any background."""

QUOTE: Final = "▌ "
_BULLETS: Final = ("• ", "◦ ", "▪ ")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block, or one item of a list. ``start`` is its first line of the source; ``gap`` a blank line before it.

    ``index`` is the place in the list, 0 for all that is none; ``list_start`` the first line of the list or block.
    """

    node: SyntaxTreeNode
    kind: str
    start: int
    gap: bool
    marker: str = ""
    index: int = 0
    list_start: int = 0


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Lines without their line ends; text to come cannot change the first ``stable`` of them."""

    lines: list[Text]
    stable: int = 0


@dataclass(frozen=True, kw_only=True)
class View:
    """The lines of the source, of which the first ``settled`` are complete, and the cells there are for them."""

    source: Sequence[str]
    width: int
    settled: int
    depth: int = 0

    def narrower(self, cells: int, *, deeper: bool = False) -> View:
        return replace(self, width=max(self.width - cells, 2), depth=self.depth + deeper)


def markdown_lines(text: str, width: int) -> list[Text]:
    """The whole of ``text``, none of its lines wider than ``width`` cells."""
    view = view_of(text, width, ended=True)
    return _joined(blocks(text), view).lines


def view_of(text: str, width: int, *, ended: bool = False) -> View:
    """How ``text`` is seen; its last line may still grow unless it has ``ended``."""
    source = tuple(text.split("\n"))
    return View(source=source, width=max(width, MIN_WIDTH), settled=len(source) - (not ended))


def blocks(text: str, *, before: str = "") -> list[Block]:
    """The blocks of ``text`` in their order; ``before`` is the kind of the block in front of it, if there was one."""
    tree = SyntaxTreeNode(_parser().parse(text))
    return _blocks(tree.children, text.split("\n"), before=before)


def render(block: Block, view: View) -> Rendered:
    """The lines of one block of the text that is seen."""
    return _RENDERERS[block.kind](block, view)


def _blocks(nodes: Sequence[SyntaxTreeNode], source: Sequence[str], *, before: str = "", depth: int = 0) -> list[Block]:
    found: list[Block] = []
    for node in nodes:
        start = _start(node)
        if node.type not in ("bullet_list", "ordered_list"):
            found.append(Block(node=node, kind=node.type, start=start, gap=bool(before), list_start=start))
            before = node.type
            continue
        for index, item in enumerate(node.children):
            at = _start(item)
            loose = at > 0 and not source[at - 1].strip(" \t>")
            gap = bool(before) and (loose or (index == 0 and before not in ("paragraph", "list_item")))
            number = f"{int(node.attrs.get('start', 1)) + index}. " if node.type == "ordered_list" else ""
            marker = number or _BULLETS[depth % len(_BULLETS)]
            found.append(
                Block(node=item, kind=item.type, start=at, gap=gap, marker=marker, index=index, list_start=start)
            )
            before = item.type
    return found


def _joined(found: Sequence[Block], view: View) -> Rendered:
    """The blocks below each other. A block is final when another begins in front of the last two complete lines:
    two, since the head of a table is a paragraph until the line below it is complete.
    """
    lines: list[Text] = []
    stable, final = 0, True
    for number, block in enumerate(found):
        if block.gap:
            lines.append(Text())
        here = render(block, view)
        if final:
            final = number + 1 < len(found) and found[number + 1].start < view.settled - 1
            sure = len(here.lines) if final else here.stable
            stable = len(lines) + sure if sure else stable
        lines.extend(here.lines)
    return Rendered(lines=lines, stable=stable)


def _quote(block: Block, view: View) -> Rendered:
    inside = _joined(_blocks(block.node.children, view.source, depth=view.depth), view.narrower(len(QUOTE)))
    bar = Text(QUOTE, "dim")
    return Rendered(lines=[joined_line(bar, line) for line in inside.lines], stable=inside.stable)


def _item(block: Block, view: View) -> Rendered:
    room = len(block.marker)
    inner = view.narrower(room, deeper=True)
    body = _joined(_blocks(block.node.children, view.source, depth=inner.depth), inner)
    marker, indent = Text(block.marker, "bold"), Text(" " * room)
    lines = [joined_line(indent if number else marker, line) for number, line in enumerate(body.lines)]
    return Rendered(lines=lines or [marker], stable=body.stable)


def _heading(block: Block, view: View) -> Rendered:
    level = int(block.node.tag[1:])
    style = "bold underline" if level == 1 else "bold" if level < 4 else "bold italic"
    return Rendered(lines=wrapped(inline(block.node, style)[0], view.width))


def _rule(_block: Block, view: View) -> Rendered:
    return Rendered(lines=[Text("─" * min(view.width, RULE_WIDTH), "dim")])


def _paragraph(block: Block, view: View) -> Rendered:
    """A line is final when the word that begins the next one cannot become another, shorter one."""
    text, risky = inline(block.node)
    lines = wrapped(text, view.width)
    plain, at, stable = text.plain, 0, 0
    for line, following in pairwise(lines):
        at = plain.index(line.plain, at) + len(line.plain)
        word = (following.plain.split() or [""])[0]
        at_word = plain.index(word, at)
        ended = re.compile(r"\S*").match(plain, at_word)
        if ended is None or ended.end() > risky:
            break
        stable += 1
    return Rendered(lines=lines, stable=stable)


def _code(block: Block, view: View) -> Rendered:
    """Code between its marks, dimmed, so that it can be copied as it stands; too long lines are folded."""
    node = block.node
    mark = node.markup or "```"
    info = node.info.strip()
    lines = folded(Text(mark + info, "dim"), view.width)
    code: list[Text] = []
    if node.content:
        code = list(_highlighted(node.content.removesuffix("\n").replace("\t", TAB), info).split(allow_blank=True))
    # The last line of the source may still grow, and into the mark that ends the code.
    final = len(code) - (node.map is not None and node.map[1] >= view.settled)
    stable = len(lines) if final > 0 else 0
    for number, line in enumerate(code):
        lines.extend(folded(line, view.width))
        if number < final:
            stable = len(lines)
    lines.append(Text(mark, "dim"))
    return Rendered(lines=lines, stable=stable)


def _highlighted(code: str, info: str) -> Text:
    if info:
        styled = Syntax("", info.split(maxsplit=1)[0], theme=CODE_THEME).highlight(code)
        plain = styled.plain.removesuffix("\n")
        if plain == code:
            return styled[: len(plain)]
    return Text(code)


def _table(block: Block, view: View) -> Rendered:
    """No line of a table is final before all are: the widths of its columns are those of all rows."""
    node, width = block.node, view.width
    rows = [[inline(cell)[0] for cell in row.children] for part in node.children for row in part.children]
    heads = node.children[0].children[0].children
    if width < 5 * len(heads):
        return Rendered(lines=[line for row in rows for line in wrapped(Text(" | ").join(row), width)])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for head, text in zip(heads, rows[0], strict=True):
        style = str(head.attrs.get("style", ""))
        table.add_column(
            text, justify="right" if "right" in style else "center" if "center" in style else "left", overflow="fold"
        )
    for row in rows[1:]:
        table.add_row(*row)
    console = layout()
    drawn = console.render_lines(table, console.options.update(width=width), pad=False)
    lines = [trimmed(Text.assemble(*((part.text, part.style or "") for part in line))) for line in drawn]
    return Rendered(lines=lines)


def _start(node: SyntaxTreeNode) -> int:
    return node.map[0] if node.map else 0


@cache
def _parser() -> MarkdownIt:
    """Deeper nesting than 64 is not read: what is below it would be lost, and nobody can see it."""
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 64})
    return parser.enable(["table", "strikethrough"]).disable(["reference", "lheading"])


_RENDERERS: Final[Mapping[str, Callable[[Block, View], Rendered]]] = {
    "paragraph": _paragraph,
    "heading": _heading,
    "fence": _code,
    "code_block": _code,
    "hr": _rule,
    "table": _table,
    "blockquote": _quote,
    "list_item": _item,
}
