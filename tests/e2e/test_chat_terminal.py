"""The chat as a user sees it: ``python -m runtime chat`` at a pseudo-terminal, its screen compared."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

import pytest

from runtime.chat.markdown import markdown_lines
from tests.pseudo_terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    ENTER,
    NEW_LINE,
    TAB,
    UP,
    PseudoTerminal,
    at_terminal,
    pasted,
)
from tests.scripted_endpoint import Reasoning, ScriptedEndpoint, scripted_endpoint
from toolchain.base.files import PROJECT_ROOT

REPLY = """\
# Sorting

There are **two** ways, `sorted` and `list.sort`. The *first* makes a new list; the second works in place.

1. Collect
2. Call `sorted(values)`
   - with `key=`

```python
def top(values, n=3):
    return sorted(values, reverse=True)[:n]  # not in place
```

| function | returns |
|:---------|--------:|
| `sorted` | a list  |

> Programs must be written for people to read.

The end.
"""

PROMPT = r"^>(?= |$)"
Chat: TypeAlias = Callable[..., AbstractContextManager[PseudoTerminal]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    unwanted = ("FOUNDRY_", "OPENAI_", "NO_COLOR", "COLUMNS", "LINES", "COLORTERM")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {
        **clean,
        "FOUNDRY_HOME": str(tmp_path / "home"),
        "FOUNDRY_NO_TUNE": "1",
        "GOMP_SPINCOUNT": "100",
        "TERM": "xterm-256color",
        "PYTHONPATH": str(PROJECT_ROOT),
    }


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with scripted_endpoint() as server:
        yield server


@pytest.fixture
def chat(environment: dict[str, str], endpoint: ScriptedEndpoint) -> Chat:
    """Starts a chat with the scripted server; its first argument is the replies to come."""

    def start(
        *script: object, arguments: tuple[object, ...] = (), columns: int = 80, rows: int = 24, **changes: str
    ) -> AbstractContextManager[PseudoTerminal]:
        endpoint.script = [[reply] if isinstance(reply, str) else reply for reply in script]  # type: ignore[misc]
        return at_terminal(
            ["chat", "--endpoint", endpoint.url, *arguments], environment | changes, columns=columns, rows=rows
        )

    return start


def leave(terminal: PseudoTerminal) -> None:
    terminal.press(CTRL_D)
    assert terminal.ended() == 0, terminal.text


def answered(terminal: PseudoTerminal, times: int = 1) -> str:
    """The text when so many replies have their figures and the next prompt is there."""
    return terminal.wait_for(r"prompt\s+tokens[^>]*\n>", times=times)


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (36, 10)])
def test_reply_is_rendered_as_the_whole_text_would_be(chat: Chat, columns: int, rows: int) -> None:
    with chat([Reasoning("let me think of it"), REPLY], columns=columns, rows=rows) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"How do I sort?{ENTER}")
        answered(terminal)
        shown = terminal.lines[terminal.lines.index("> How do I sort?") + 1 :]
        leave(terminal)
    expected = [line.plain for line in markdown_lines(REPLY, columns - 1)]
    assert shown[0] == "thought for 5 words"
    assert shown[1 : 1 + len(expected)] == expected
    assert "Traceback" not in terminal.text
    assert b"\x1b[1mtwo" in terminal.raw  # bold


def test_thoughts_are_counted_while_they_come_and_folded_afterwards(chat: Chat) -> None:
    gate = threading.Event()
    with chat([Reasoning("one two three "), gate, "Done."]) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"Think{ENTER}")
        terminal.wait_for("thinking… 3 words")
        gate.set()
        text = answered(terminal)
        leave(terminal)
    assert "thought for 3 words\nDone.\n" in text
    assert "thinking" not in text


def test_thoughts_are_shown_with_show_reasoning(chat: Chat) -> None:
    with chat([Reasoning("one two\nthree"), "Done."], arguments=("--show-reasoning",)) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"Think{ENTER}")
        text = answered(terminal)
        leave(terminal)
    assert "> Think\none two\nthree\n\nDone.\n" in text


def test_open_block_is_seen_before_it_ends_and_completed_in_place(chat: Chat) -> None:
    gate = threading.Event()
    with chat(["A **bo", gate, "ld** word.\n\n- one\n- tw", gate, "o"]) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"Go{ENTER}")
        terminal.wait_for(r"^A \*\*bo$")
        gate.set()
        text = answered(terminal)
        leave(terminal)
    assert "> Go\nA bold word.\n\n• one\n• two\n" in text
    assert "**" not in text


@pytest.mark.parametrize("columns", [60, 34])
def test_resizing_while_a_reply_comes_loses_nothing(chat: Chat, columns: int) -> None:
    gate = threading.Event()
    first = "First paragraph.\n\n" + " ".join(f"word{n}" for n in range(40))
    with chat([first, gate, " last.\n\nThe end."], columns=48, rows=12) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"Go{ENTER}")
        terminal.wait_for("word39")
        terminal.resize(columns, 12)
        gate.set()
        terminal.wait_for(r"^The end\.")
        text = answered(terminal)
        leave(terminal)
    said = text[text.index("> Go") :]
    assert "First paragraph." in said
    assert [word for word in said.split() if word.startswith("word")] == [f"word{n}" for n in range(40)]
    assert said.index("last.") > said.index("word39")


def test_lines_are_added_by_each_of_the_keys_and_by_pasting(chat: Chat, endpoint: ScriptedEndpoint) -> None:
    with chat("A.", "B.") as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"one{NEW_LINE}two{ALT_ENTER}three\\{ENTER}four{ENTER}")
        assert "> one\n… two\n… three\n… four\nA." in answered(terminal)
        terminal.press(f"{pasted('/five' + ENTER + 'six')} seven{ENTER}")
        terminal.wait_for("no command /five")
        terminal.press(f"{pasted('five' + ENTER + '/six')} seven{ENTER}")
        answered(terminal, 2)
        leave(terminal)
    assert endpoint.said(0) == [("user", "one\ntwo\nthree\nfour")]
    assert endpoint.said(1)[-1] == ("user", "five\n/six seven")


def test_ctrl_c_stops_a_reply_keeps_what_came_and_the_next_message_works(
    chat: Chat, endpoint: ScriptedEndpoint
) -> None:
    with chat(["It begins and", threading.Event()], "Fine.") as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"Go{ENTER}")
        terminal.wait_for("It begins and")
        terminal.press(CTRL_C)
        terminal.wait_for(r"stopped[^>]*\n>")
        terminal.press(f"And now?{ENTER}")
        answered(terminal)
        leave(terminal)
    assert endpoint.said() == [("user", "Go"), ("assistant", "It begins and"), ("user", "And now?")]


def test_ctrl_c_at_the_prompt_clears_the_line_and_says_how_to_leave(chat: Chat, endpoint: ScriptedEndpoint) -> None:
    with chat("Fine.") as terminal:
        terminal.wait_for(PROMPT)
        terminal.press("never sent")
        terminal.wait_for("> never sent")
        terminal.press(CTRL_C)
        terminal.wait_for(r"Ctrl-D or /quit leaves(.*\n)+>$")
        terminal.press(f"sent{ENTER}")
        answered(terminal)
        terminal.press(f"/quit{ENTER}")
        assert terminal.ended() == 0
    assert endpoint.said() == [("user", "sent")]


def test_keys_typed_while_a_reply_comes_wait_for_the_prompt(chat: Chat, endpoint: ScriptedEndpoint) -> None:
    gate = threading.Event()
    with chat(["It be", gate, "gins."], "Fine.") as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"Go{ENTER}")
        terminal.wait_for("It be")
        assert not terminal.echoes()
        terminal.press(f"typed ahead{ENTER}")
        gate.set()
        text = answered(terminal, 2)
        leave(terminal)
    assert "> Go\nIt begins.\n" in text
    assert "> typed ahead\nFine.\n" in text
    assert endpoint.said()[-1] == ("user", "typed ahead")


def test_history_is_kept_across_chats_and_takes_up_the_one_of_readline(
    chat: Chat, environment: dict[str, str], endpoint: ScriptedEndpoint
) -> None:
    kept = Path(environment["FOUNDRY_HOME"]) / "chat-history"
    kept.parent.mkdir()
    kept.write_text("an old line\n")
    with chat("A.") as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(UP)
        terminal.wait_for("> an old line")
        terminal.press(f" and{NEW_LINE}a new one{ENTER}")
        answered(terminal)
        leave(terminal)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    with chat("B.") as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(UP)
        terminal.wait_for("> an old line and\n… a new one")
        terminal.press(ENTER)
        answered(terminal)
        leave(terminal)
    assert endpoint.said(0) == endpoint.said(1) == [("user", "an old line and\na new one")]


def test_last_message_is_edited_in_the_line_tried_again_and_taken_back(chat: Chat, endpoint: ScriptedEndpoint) -> None:
    with chat("One.", "Two.", "Three.", "Four.") as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"What is a clas{ENTER}")
        answered(terminal)
        terminal.press(f"/edit{ENTER}")
        terminal.wait_for("^edit> What is a clas$")
        terminal.press(f"s?{ENTER}")
        answered(terminal, 2)
        terminal.press(f"/retry{ENTER}")
        answered(terminal, 3)
        terminal.press(f"/edit{ENTER}")
        terminal.wait_for(r"^edit> What is a class\?$", times=2)
        terminal.press(CTRL_C)  # the message stays as it was
        terminal.wait_for(r"^edit> What is a class\?\n[^>]*^>$")
        terminal.press(f"/undo{ENTER}")
        terminal.wait_for(r"/undo\n(.*\n)+>$")
        terminal.press(f"Last{ENTER}")
        answered(terminal, 4)
        leave(terminal)
    assert [endpoint.said(number) for number in range(4)] == [
        [("user", "What is a clas")],
        [("user", "What is a class?")],
        [("user", "What is a class?")],
        [("user", "Last")],
    ]


def test_commands_and_file_names_are_completed(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "mine.gguf").touch()
    with chat() as terminal:
        terminal.wait_for(PROMPT)
        terminal.press("/exp")
        terminal.wait_for(r"/export FILE")  # the menu
        terminal.press(TAB)
        terminal.wait_for(r"^> /export$")
        terminal.press(CTRL_C)
        terminal.wait_for("leaves")
        terminal.press(f"/lora {tmp_path}/adap")
        terminal.wait_for(r"adapters/")  # the menu
        terminal.press(TAB)
        whole = f"/lora {tmp_path}/adapters"
        terminal.wait_until(lambda: whole in terminal.text.replace("\n", ""), whole)
        terminal.press(f"{CTRL_C}/quit{ENTER}")
        assert terminal.ended() == 0


def test_long_line_is_folded_without_looking_like_several(chat: Chat) -> None:
    with chat("Fine.", columns=20) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"{'word' * 7}{NEW_LINE}two{ENTER}")
        assert "> wordwordwordwordwo\n  rdwordword\n… two\nFine." in answered(terminal)
        leave(terminal)


def test_errors_are_told_and_the_chat_goes_on(chat: Chat, endpoint: ScriptedEndpoint) -> None:
    with chat(400, "Fine.") as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"Go{ENTER}")
        terminal.wait_for(r"scripted to fail(.*\n)+>")
        terminal.press(f"/no-such{ENTER}")
        terminal.wait_for(r"no command /no-such(.*\n)+>")
        terminal.press(f"Again{ENTER}")
        answered(terminal)
        leave(terminal)
    assert endpoint.said() == [("user", "Again")]
    assert "Traceback" not in terminal.text


def test_bar_tells_the_model_and_how_full_its_context_is(chat: Chat) -> None:
    with chat("word " * 10, arguments=("--session", "notes")) as terminal:
        terminal.wait_for(r"^scripted  ctx ▯▯▯▯▯▯▯▯ 0/4,096  session notes$")
        terminal.press(f"Go{ENTER}")
        terminal.wait_for(r"^scripted  ctx ▮▯▯▯▯▯▯▯ 110/4,096  session notes$")
        leave(terminal)
    assert "ctx" not in "\n".join(terminal.lines[-3:])


def test_model_cannot_command_the_terminal(chat: Chat) -> None:
    hostile = "\x1b]0;owned\x07\x1b]52;c;aGk=\x07\x1b[2J\x1b[1;1Hend"
    for arguments in ((), ("--plain",)):
        with chat(hostile, arguments=arguments) as terminal:
            terminal.wait_for(PROMPT)
            terminal.press(f"Go{ENTER}")
            text = answered(terminal)
            leave(terminal)
        assert "\n␛]0;owned␇␛]52;c;aGk=␇␛[2J␛[1;1Hend\n" in text
        assert (terminal.title, b"\x1b]52" in terminal.raw) == ("", False)


def test_plain_reply_is_the_text_itself(chat: Chat) -> None:
    for arguments, changes in ((("--plain",), {}), ((), {"NO_COLOR": "1"})):
        with chat("# A\n*b*", arguments=arguments, **changes) as terminal:
            terminal.wait_for(PROMPT)
            terminal.press(f"Go{ENTER}")
            assert "> Go\n# A\n*b*\n" in answered(terminal)
            leave(terminal)


def test_dumb_terminal_gets_plain_lines_and_no_cursor_moves(chat: Chat, endpoint: ScriptedEndpoint) -> None:
    with chat("# A\n*b*", TERM="dumb") as terminal:
        terminal.wait_for(PROMPT)
        terminal.press("one\\\n")
        terminal.wait_for("^…")
        terminal.press("two\n")
        terminal.wait_for(r"^# A\n\*b\*\n.*prompt tokens\n>")
        leave(terminal)
    assert endpoint.said() == [("user", "one\ntwo")]
    assert b"\x1b" not in terminal.raw


def test_replies_go_to_a_file_and_all_else_to_the_terminal(
    environment: dict[str, str], endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    endpoint.script = [[Reasoning("hm hm"), "# A\n*b*"]]
    out = tmp_path / "replies.md"
    program = (
        "import os, sys; sys.argv[0] = 'runtime'; "
        f"os.dup2(os.open({str(out)!r}, os.O_WRONLY | os.O_CREAT), 1); "
        "from runtime.__main__ import main; sys.exit(main())"
    )
    with at_terminal(["chat", "--endpoint", endpoint.url], environment, program=program) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press("Go\n")
        terminal.wait_for(r"thought for 2 words\n.*prompt tokens\n>")
        leave(terminal)
    assert out.read_text() == "# A\n*b*\n"
    assert "*b*" not in terminal.text


def test_model_on_this_machine_answers_at_a_terminal(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    arguments = ["chat", demo_gguf, "-n", 12, "--temp", 0, "--json-schema", '{"const": "two words"}']
    with at_terminal(arguments, environment) as terminal:
        terminal.wait_for(r"^demo-Q4_K_M.* ctx ▯▯▯▯▯▯▯▯ 0/")
        terminal.press(f"What is a class?{ENTER}")
        terminal.wait_for(r'^> What is a class\?\n"two words"\n.*t/s generation')
        terminal.wait_for(r"^demo-Q4_K_M.* ctx ▮")
        leave(terminal)
    assert "Traceback" not in terminal.text


def test_turns_that_are_left_out_are_told_between_the_message_and_its_reply(
    environment: dict[str, str], demo_gguf: Path
) -> None:
    arguments = ["chat", demo_gguf, "-n", 24, "--n-ctx", 96, "--seed", 3]
    with at_terminal(arguments, environment) as terminal:
        for number in range(4):
            terminal.wait_for(PROMPT, times=number + 1)
            terminal.press(f"Tell me about number {number} and what it means.{ENTER}")
            terminal.wait_for("t/s generation", times=number + 1)
        leave(terminal)
    assert "means.\n! the oldest turn was left out of the prompt: the context holds 96 tokens\n" in terminal.text
