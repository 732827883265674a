from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from runtime.chat.pipe import joined_lines, on_pipe
from tests.parrot import Parrot, talk_with
from toolchain.base.errors import INTERRUPTED_EXIT_CODE


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def give(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return give


class Stream(io.StringIO):
    """What was written, and what had been flushed at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_lines_ending_in_a_backslash_are_joined() -> None:
    assert list(joined_lines(iter(["a\\", "b", "c", "d\\"]))) == ["a\nb", "c", "d"]


def test_each_line_is_a_turn_and_each_reply_ends_its_line(
    given: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    parrot = Parrot("yes\n", "no")
    given("one\n\n//two\\\r\nthree\n")
    assert on_pipe(talk_with(parrot)) == 0
    out, err = capsys.readouterr()
    assert out == "yes\nno\n"
    assert parrot.prompts[-1] == "[one][yes][/two\nthree]"
    assert len(err.splitlines()) == 2
    assert "prompt tokens" in err


def test_first_failure_gives_the_code_and_the_rest_is_answered(
    given: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    given("/sav x\none\ntwo\n/edit\n/edit new\n")
    assert on_pipe(talk_with(Parrot("a!", "b", "c")), shows_stats=False) == 2
    out, err = capsys.readouterr()
    assert out == "a\nb\nc\n"
    assert "did you mean /save?" in err
    assert "the parrot flew away" in err
    assert "no editor on a pipe" in err


def test_quit_leaves_what_follows_unread(given: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    given("/quit\nnever asked\n")
    assert on_pipe(talk_with(Parrot())) == 0
    assert capsys.readouterr().out == ""


def test_stopped_reply_ends_the_pipe_with_130(given: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    given("one\ntwo\n")
    assert on_pipe(talk_with(Parrot("ha^lf"))) == INTERRUPTED_EXIT_CODE
    assert capsys.readouterr().out == "ha\n"


def test_reasoning_is_left_out_unless_it_is_asked_for(
    given: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    given("one\n")
    on_pipe(talk_with(Parrot("(hm)well")), shows_stats=False)
    assert capsys.readouterr().out == "well\n"
    given("one\n")
    on_pipe(talk_with(Parrot("(hm)well")), shows_stats=False, shows_reasoning=True)
    assert capsys.readouterr().out == "<think>hm\n</think>\nwell\n"
    given("one\n")
    on_pipe(talk_with(Parrot("(hm\n)")), shows_stats=False, shows_reasoning=True)
    assert capsys.readouterr().out == "<think>hm\n</think>\n"


def test_first_text_is_seen_at_once_and_fast_tokens_share_flushes(
    given: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream()
    monkeypatch.setattr("sys.stdout", stream)
    given("one\n")
    on_pipe(talk_with(Parrot("x" * 1000)))
    assert stream.flushed[0] == "x"
    assert stream.flushed[-1] == "x" * 1000 + "\n"
    assert len(stream.flushed) < 500


def test_text_before_a_failure_is_not_lost(given: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr("sys.stdout", stream)
    given("one\n")
    assert on_pipe(talk_with(Parrot("ab!"))) == 4
    assert stream.flushed[-1].startswith("ab")
