from __future__ import annotations

import io

import pytest

from runtime.engine.shown import Shown
from toolchain.base import console
from toolchain.base.errors import UsageError

TITLE = "\x1b]0;mine\x07"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_model_cannot_command_a_terminal_and_a_file_gets_its_text_untouched() -> None:
    for stream, expected in ((Terminal(), "a␛]0;mine␇b\n"), (io.StringIO(), f"a{TITLE}b\r\n")):
        shown = Shown(stream)
        for piece in ("a", TITLE, "b\r", "\n"):
            shown.write(piece)
        shown.end()
        assert stream.getvalue() == expected


def test_what_a_message_quotes_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(f"read {TITLE}")
    console.warn(f"read {TITLE}")
    console.failure(UsageError(f"no {TITLE}", evidence=TITLE, hint=TITLE))
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\x07" not in said
    assert said.count("␛]0;mine␇") == 5
