from __future__ import annotations

import stat
from pathlib import Path

import pytest

from runtime.chat.commands import run_command
from runtime.chat.saved import open_session, session_folder
from runtime.conversation.tracker import Conversation
from tests.parrot import Parrot, said, talk_with
from toolchain.base.errors import FetchError, UsageError


class Seat:
    def __init__(self) -> None:
        self.shown = ""

    def edit_text(self, _initial: str) -> str | None:
        return None

    def show(self, text: str) -> None:
        self.shown = text

    def confirm(self, _question: str) -> bool:
        return False


def kept(name: str = "work") -> Conversation:
    return Conversation.load(session_folder(name) / "talk.yaml")


def test_talk_is_on_disk_after_each_turn_and_resumes_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    talk = talk_with(Parrot("a", "b!", "c"), system="S")
    with open_session("work") as session, session.keeping(talk):
        assert capsys.readouterr().err == "session work: new\n"
        said(talk, "one")
        assert kept() == talk.conversation
        with pytest.raises(FetchError):
            said(talk, "two")
        assert len(kept()) == 3
        said(talk, "three")
        assert kept() == talk.conversation
        talk.undo()
        assert len(kept()) == 3
    capsys.readouterr()
    again = talk_with(Parrot())
    with open_session("work") as session, session.keeping(again):
        assert capsys.readouterr().err == "session work: 1 turn\n"
        assert again.conversation == kept()
        assert again.conversation.system == "S"


def test_system_message_of_the_command_line_wins_over_the_kept_one() -> None:
    for system in ("first", "second"):
        talk = talk_with(Parrot(), system=system)
        with open_session("work") as session, session.keeping(talk):
            said(talk, "one")
    assert kept().system == "second"
    assert len(kept().turns()) == 2


def test_only_the_owner_can_read_a_session() -> None:
    talk = talk_with(Parrot())
    with open_session("work") as session, session.keeping(talk):
        said(talk, "one")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in session.folder.iterdir()}
    assert modes["talk.yaml"] == 0o600
    assert stat.S_IMODE(session.folder.stat().st_mode) == 0o700


def test_second_talk_in_the_same_session_is_refused_while_the_first_lasts() -> None:
    with open_session("work"):
        with (
            pytest.raises(UsageError, match="somebody talks in the session work already") as caught,
            open_session("work"),
        ):
            pass
        assert "process" in caught.value.evidence
        with open_session("other"):
            pass
    with open_session("work"):
        pass


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "-a", ".a", "a b", "a\n", "x" * 65, "\x00", "ä"])
def test_name_that_could_lead_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no name for a session"), open_session(name):
        pass
    assert not (tmp_path / "foundry-home" / "sessions").exists()


def test_conversation_that_cannot_be_read_is_an_error_and_stays() -> None:
    folder = session_folder("work")
    folder.mkdir(parents=True)
    (folder / "talk.yaml").write_text("version: 1\nmessages: 5\n")
    with pytest.raises(UsageError, match=r"talk\.yaml"), open_session("work"):
        pass
    assert (folder / "talk.yaml").read_text() == "version: 1\nmessages: 5\n"


def test_what_a_killed_writer_left_is_swept() -> None:
    folder = session_folder("work")
    (folder / ".partial-x-talk.yaml").mkdir(parents=True)
    with open_session("work"):
        assert [path.name for path in folder.iterdir()] == ["lock"]


def test_disk_that_fails_is_told_and_the_talk_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    talk = talk_with(Parrot())
    with open_session("work") as session, session.keeping(talk):
        session.conversation_path = session.folder / "lock" / "talk.yaml"  # a file where a folder should be
        assert said(talk, "one").strip() == "yes"
    assert "the conversation of session work was not kept" in capsys.readouterr().err


def test_session_command_keeps_it_now_and_tells_its_size() -> None:
    talk, seat = talk_with(Parrot()), Seat()
    with open_session("work") as session, session.keeping(talk):
        run_command(talk, "/session", seat)
        assert kept() == talk.conversation
        said(talk, "one")
        run_command(talk, "/session", seat)
        assert seat.shown.startswith("session work: 1 turn, ")
        assert "B of text" in seat.shown
        assert str(session.folder) in seat.shown
        with pytest.raises(UsageError):
            run_command(talk, "/session x", seat)
