"""Markdown of a reply: how it looks, and that it looks the same however it comes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from rich.cells import cell_len
from rich.text import Text

from runtime.chat.flow import Flow
from runtime.chat.markdown import QUOTE, markdown_lines
from toolchain.base.harmless import Harmless, harmless

REPLY = """\
# Sorting in Python

There are **two** ways, `sorted` and `list.sort`. The *first* makes a new list; the second works in place
and returns [nothing](https://docs.python.org/3/howto/sorting.html).

1. Collect the values
2. Call `sorted(values)`
   - with `key=`
   - with `reverse=True`

```python
def top(values: list[int], n: int = 3) -> list[int]:
    \"\"\"The largest ones.

    First the largest.
    \"\"\"
    return sorted(values, reverse=True)[:n]  # not in place
```

| function | in place | returns |
|:---------|:--------:|--------:|
| `sorted` | no       | a list  |

> Programs must be written for people to read,
> and only incidentally for machines to execute.

---
Last words, with a very long line that does not end soon, since it has to be longer than the page is wide and even
longer than a narrow screen is high, so that its first lines leave it before the last ones come; and then *it ends*.
"""

FRAGMENTS = (
    *("# H\n", "## H", "####### x", "#", "text *em* and **strong** `c` here", "\n", "\n", "\n\n", " ", "\t"),
    *(
        "- item one\n",
        "- item two",
        "  - nested\n",
        "1. one\n",
        "2. two\n",
        "10. ten\n",
        "- [ ] task\n",
        "-",
        "+ plus\n",
    ),
    *("> quote\n", ">", "```python\n", "x = '''a\n", "```\n", "``", "~~~\n", "    code\n", "---\n", "===\n", "***\n"),
    *("| a | b |\n", "|---|---|\n", "| 1 | 2 |\n", "|", "[l](http://x)", "[", "](", "![i](u)", "[r]: http://x\n"),
    *("<b>", "<!-- c -->\n", "<div>\n", "&amp;", "&", "~~s~~", "*", "**", "_", "__", "`", "\\", "(c)"),
    *("wörter 漢字漢字漢字 🙂 ", "a long line of prose that goes on for more than the width of the page ", "word" * 20),
)


def plain(lines: Sequence[Text]) -> list[str]:
    return [line.plain for line in lines]


def streamed(text: str, cuts: Sequence[int], width: int, height: int) -> list[str]:
    """All lines given by a flow that gets ``text`` in pieces and is looked at after each."""
    flow, given, before = Flow(), [], 0
    for cut in (*cuts, len(text)):
        flow.feed(text[before:cut])
        done, still_open = flow.take(width, height)
        assert len(still_open) <= height
        given += done
        before = cut
    return plain([*given, *flow.end(width)])


def shown(markdown: str, width: int = 40) -> list[str]:
    return plain(markdown_lines(markdown, width))


def ink(lines: Sequence[str]) -> str:
    return "".join("".join(lines).replace(QUOTE.strip(), "").split())


@pytest.mark.parametrize("width", [20, 79])
@pytest.mark.parametrize("height", [3, 23])
def test_reply_token_by_token_is_the_reply_at_once(width: int, height: int) -> None:
    assert streamed(REPLY, range(0, len(REPLY), 3), width, height) == shown(REPLY, width)


@pytest.mark.parametrize("seed", range(40))
def test_any_text_cut_anywhere_is_the_text_at_once(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choice(FRAGMENTS) for _ in range(chance.randrange(1, 25)))
    width, height = chance.choice((8, 12, 20, 39, 79)), chance.choice((1, 2, 5, 23))
    cuts = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(60)))
    assert streamed(text, cuts, width, height) == shown(text, width), (text, width, height)


@pytest.mark.parametrize("seed", range(40))
def test_short_text_character_by_character_is_the_text_at_once(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choice(FRAGMENTS) for _ in range(5))
    assert streamed(text, range(len(text)), 12, 1) == shown(text, 12), text


@pytest.mark.parametrize("seed", range(8))
def test_change_of_the_width_neither_loses_nor_repeats_text(seed: int) -> None:
    chance = random.Random(seed)
    flow, given, width = Flow(), [], 60
    for character in REPLY.replace("---\n", ""):  # a rule is as long as the page is wide
        if chance.random() < 0.02:
            width = chance.choice((40, 50, 60, 79))
        flow.feed(character)
        given += flow.take(width, 4)[0]
    given += flow.end(width)
    # The line below the head of a table is as long as its columns are wide, which depends on the width.
    assert ink(plain(given)).replace("─", "") == ink(shown(REPLY.replace("---\n", ""), 79)).replace("─", "")


def test_paragraph_higher_than_the_screen_gives_up_its_first_lines_while_it_comes() -> None:
    flow = Flow()
    flow.feed("word " * 200)
    done, still_open = flow.take(40, 5)
    assert (len(done), len(still_open)) == (20, 5)
    assert streamed("word " * 200, [500], 40, 5) == shown("word " * 200, 40)


def test_code_higher_than_the_screen_gives_up_its_first_lines_while_it_comes() -> None:
    flow = Flow()
    flow.feed("```python\n" + "".join(f"x{n} = {n}\n" for n in range(50)))
    done, still_open = flow.take(40, 10)
    assert plain(done)[:2] == ["```python", "x0 = 0"]
    assert plain(still_open)[-2:] == ["x49 = 49", "```"]
    assert len(done) + len(still_open) == 52


def test_finished_blocks_are_given_once_and_the_open_one_is_drawn_anew() -> None:
    flow = Flow()
    flow.feed("First.\n\nSecond,\n**bo")
    assert [plain(lines) for lines in flow.take(40, 23)] == [["First."], ["", "Second,", "**bo"]]
    flow.feed("ld**.")
    assert [plain(lines) for lines in flow.take(40, 23)] == [[], ["", "Second,", "bold."]]
    assert plain(flow.end(40)) == ["", "Second,", "bold."]


@pytest.mark.parametrize("width", [8, 13, 40])
def test_no_line_is_wider_than_the_page(width: int) -> None:
    text = REPLY + "漢字" * 30 + "\n\n- " + "w" * 99 + "\n\n```\n" + "漢字" * 30 + "\n```\n"
    assert max(cell_len(line.plain) for line in markdown_lines(text, width)) <= width


@pytest.mark.parametrize(
    ("markdown", "lines"),
    [
        ("# Head *line*\ntext", ["Head line", "", "text"]),
        ("one\ntwo", ["one", "two"]),
        ("Here:\n- a\n- b\n\n- c", ["Here:", "• a", "• b", "", "• c"]),
        ("9. a\n9. b\n   - c\n     - d", ["9. a", "10. b", "    ◦ c", "      ▪ d"]),
        ("> a\n> > b", ["▌ a", "▌", "▌ ▌ b"]),
        ("```py\nif x:\n\ty\n\n```", ["```py", "if x:", "    y", "", "```"]),
        ("| a | bb |\n|--:|----|\n| 100 | 2 |", ["  a   bb", "────────", "100   2"]),
        ("see ![a cat](cat.png)", ["see image: a cat (cat.png)"]),
        ("<https://x.org> and [x](https://y.org)", ["https://x.org and x (https://y.org)"]),
        ("[a]: http://x\n\n[a]", ["[a]: http://x", "", "[a]"]),
        ("a <b>c</b> &lt;", ["a <b>c</b> <"]),
        ("<div>\n*x*\n</div>", ["<div>", "x", "</div>"]),
        ("Title\n=====", ["Title", "====="]),
        ("", []),
    ],
)
def test_block_looks_like(markdown: str, lines: list[str]) -> None:
    assert shown(markdown) == lines


def test_table_on_a_page_too_narrow_for_columns_keeps_its_cells() -> None:
    assert ink(shown("| a | b | c |\n|---|---|---|\n| one | two | three |", 12)) == "a|b|cone|two|three"


def test_code_is_coloured_by_its_language_and_only_its_colour_differs() -> None:
    code = "```python\ndef f(): return 'x'\n```"
    assert len(markdown_lines(code, 40)[1].spans) > 3
    assert shown(code) == ["```python", "def f(): return 'x'", "```"]
    assert shown("```no-such-language\nx\n```") == ["```no-such-language", "x", "```"]


@pytest.mark.parametrize(
    "hostile",
    [
        "\x1b]52;c;aGk=\x07",  # writes the clipboard
        "\x1b]0;title\x1b\\",
        "\x1b[2J\x1b[H",
        "\x9b2J",  # the same in one character
        "\x9d0;title\x9c",
        "safe\rover",
        "a\x08b\x7f",
        "\u202egnp.exe",
        "one\x85two\u2028three",
    ],
)
def test_control_characters_are_seen_and_do_nothing(hostile: str) -> None:
    for text in (harmless(hostile), "\n".join(shown(harmless(f"{hostile}\n```\n{hostile}\n```")))):
        assert not [character for character in text if not character.isprintable() and character != "\n"]


def test_line_ends_survive_being_cut() -> None:
    filtered = Harmless()
    pieces = ["a\r", "\nb\r", "c\r\n", "", "\r\r", "\n", "d\x1b", "[2J"]
    assert "".join(map(filtered.feed, pieces)) == "a\nb\nc\n\n\nd␛[2J" == harmless("".join(pieces))
