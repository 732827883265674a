from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime.chat.old import Quit, Session, joined_lines, run_command, save
from runtime.engine.reply import Chunk, ReplyStats
from runtime.engine.sampling import SamplingOptions
from runtime.template import ChatTemplate
from toolchain.base.errors import UsageError


class Parrot:
    """An engine whose tokens are characters and whose replies are fixed."""

    def __init__(self, *, n_ctx: int, reply: str = " yes\n") -> None:
        self.n_ctx = n_ctx
        self.reply = reply
        self.prompts: list[str] = []

    def tokenize(self, text: str) -> list[int]:
        self.prompts.append(text)
        return [ord(character) for character in text]

    def stream(self, tokens: Sequence[int], *_sampling: object, **_options: object) -> Iterator[Chunk]:
        for character in self.reply:
            yield Chunk(character)
        stats = ReplyStats(
            prompt_tokens=len(tokens),
            cached_tokens=0,
            processed_tokens=len(tokens),
            completion_tokens=len(self.reply),
            generation_steps=0,
            prompt_seconds=0.0,
            generation_seconds=0.0,
            ttft_ms=0.0,
            finish_reason="stop",
        )
        yield Chunk("", stats)


def session_with(engine: Any, **options: Any) -> Session:
    return Session(
        engine=engine,
        template=ChatTemplate(
            source="{% for m in messages %}[{{ m.content }}]{% endfor %}", bos_token="", eos_token=""
        ),
        sampling=SamplingOptions(),
        threads=1,
        **{"max_tokens": None, "stops": (), "system": "", "shows_stats": False, **options},
    )


def test_reply_is_kept_and_sent_with_the_next_turn(capsys: pytest.CaptureFixture[str]) -> None:
    parrot = Parrot(n_ctx=400)
    session = session_with(parrot, system="S")
    session.ask("one")
    session.ask("two")
    assert parrot.prompts[-1] == "[S][one][yes][two]"
    assert capsys.readouterr().out == "yes\nyes\n"


def test_oldest_turns_are_left_out_and_the_system_message_stays(capsys: pytest.CaptureFixture[str]) -> None:
    parrot = Parrot(n_ctx=40)
    session = session_with(parrot, system="S")
    for text in ("first one", "second one", "third one"):
        session.ask(text)
    assert parrot.prompts[-1] == "[S][third one]"
    assert "left out" in capsys.readouterr().err
    assert [message["content"] for message in session.messages()][:3] == ["S", "first one", "yes"]


def test_message_that_never_fits_is_refused_and_forgotten() -> None:
    session = session_with(Parrot(n_ctx=40))
    session.ask("short")
    with pytest.raises(UsageError, match="the context holds 40"):
        session.ask("x" * 50)
    assert [turn.user for turn in session.turns] == ["short"]
    session.ask("short again")


def test_lines_ending_in_a_backslash_are_joined() -> None:
    assert list(joined_lines(iter(["a\\", "b", "c", "d\\"]))) == ["a\nb", "c", "d"]


def test_unknown_command_suggests_the_near_one() -> None:
    with pytest.raises(UsageError) as caught:
        run_command(session_with(Parrot(n_ctx=40)), "/rest")
    assert "did you mean /reset?" in caught.value.hint


def test_quit_leaves() -> None:
    with pytest.raises(Quit):
        run_command(session_with(Parrot(n_ctx=40)), "/quit")


def test_reset_forgets_the_turns_and_keeps_the_system_message() -> None:
    session = session_with(Parrot(n_ctx=400))
    run_command(session, "/system Be brief.")
    session.ask("one")
    run_command(session, "/reset")
    assert session.messages() == [{"role": "system", "content": "Be brief."}]
    run_command(session, "/system -")
    assert session.messages() == []


def test_save_writes_json_and_overwrites_only_when_told(tmp_path: Path) -> None:
    session = session_with(Parrot(n_ctx=400))
    session.ask("one")
    path = tmp_path / "talk.json"
    run_command(session, f"/save {path}")
    written = json.loads(path.read_text())
    assert written == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(UsageError, match="exists"):
        run_command(session, f"/save {path}")
    run_command(session, f"/save! {path}")
    with pytest.raises(UsageError, match="directory"):
        save(session, str(tmp_path))
    with pytest.raises(UsageError, match="no file named"):
        run_command(session, "/save")


class Screen(io.StringIO):
    """What was written, and what had been flushed at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_first_text_is_seen_at_once_and_fast_tokens_share_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    session_with(Parrot(n_ctx=4000, reply="x" * 1000)).ask("one")
    assert screen.flushed[0] == "x"
    assert screen.flushed[-1] == "x" * 1000 + "\n"
    assert len(screen.flushed) < 500


def test_text_before_a_failure_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Parrot):
        def stream(self, *_tokens: object, **_options: object) -> Iterator[Chunk]:
            yield Chunk("a")
            yield Chunk("b")
            raise UsageError("broken")

    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    with pytest.raises(UsageError, match="broken"):
        session_with(Breaks(n_ctx=400)).ask("one")
    assert screen.flushed[-1] == "ab"
