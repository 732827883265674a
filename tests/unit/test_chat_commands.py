from __future__ import annotations

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from runtime.chat.commands import COMMANDS, Quit, is_command, run_command, unescaped
from runtime.chat.images import MOST_BYTES
from runtime.chat.talk import Talk
from runtime.conversation.tracker import Conversation
from tests.parrot import Parrot, said, talk_with
from toolchain.base.errors import UsageError

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Seat:
    """A user who edits and confirms as told, and sees what is shown."""

    def __init__(self, *, edited: str | None = None, says_yes: bool = False) -> None:
        self.edited = edited
        self.says_yes = says_yes
        self.shown: list[str] = []
        self.asked: list[str] = []

    def edit_text(self, initial: str) -> str | None:
        self.asked.append(initial)
        return self.edited

    def show(self, text: str) -> None:
        self.shown.append(text)

    def confirm(self, question: str) -> bool:
        self.asked.append(question)
        return self.says_yes


def run(talk: Talk, line: str, seat: Seat | None = None) -> str:
    """What the command ``line`` shows, and the text of its reply."""
    seat = seat or Seat()
    pieces = run_command(talk, line, seat)
    reply = "".join(piece.text for piece in pieces or ())
    return "\n".join([*seat.shown, reply]).strip()


def messages(talk: Talk) -> list[tuple[str, object]]:
    return [(message["role"], message["content"]) for message in talk.conversation.messages]


def test_every_command_has_a_usage_and_help_lists_them() -> None:
    listed = run(talk_with(Parrot()), "/help").splitlines()
    for line, command in zip(listed, COMMANDS.values(), strict=False):
        assert line.startswith(command.usage)
        assert command.help in line
    assert run(talk_with(Parrot()), "/help undo").startswith("/undo\n")
    assert run(talk_with(Parrot()), "/help /undo").startswith("/undo\n")


@pytest.mark.parametrize(
    ("typed", "near"),
    [("/rest", "/reset"), ("/help rest", "/reset"), ("/parms temp=1", "/params"), ("/sav x", "/save")],
)
def test_unknown_command_suggests_the_near_one(typed: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(talk_with(Parrot()), typed)
    assert caught.value.hint == f"did you mean {near}?"


def test_command_that_resembles_none_names_the_list() -> None:
    with pytest.raises(UsageError) as caught:
        run(talk_with(Parrot()), "/usr/bin/python")
    assert "/help" in caught.value.hint
    assert "//" in caught.value.hint


def test_two_slashes_are_a_message_that_begins_with_one() -> None:
    assert is_command("/help")
    assert not is_command("//etc")
    assert not is_command("etc")
    assert unescaped("//etc") == "/etc"


@pytest.mark.parametrize("typed", ["/quit", "/exit"])
def test_quit_leaves(typed: str) -> None:
    with pytest.raises(Quit):
        run(talk_with(Parrot()), typed)


@pytest.mark.parametrize("typed", ["/undo 3", "/reset all", "/retry temp=0", "/session x", "/quit now", "/plan --json"])
def test_command_without_arguments_refuses_one_and_does_nothing(typed: str) -> None:
    talk = talk_with(Parrot())
    said(talk, "one")
    with pytest.raises(UsageError, match="takes nothing behind it"):
        run(talk, typed)
    assert len(talk.conversation.turns()) == 1


def test_system_message_is_shown_set_and_taken_away() -> None:
    talk = talk_with(Parrot())
    assert run(talk, "/system") == "no system message"
    assert run(talk, "/system Be brief.") == "system message: Be brief."
    said(talk, "one")
    run(talk, "/reset")
    assert messages(talk) == [("system", "Be brief.")]
    assert run(talk, "/system -") == "no system message"
    assert messages(talk) == []


def test_retry_edit_and_undo_change_the_last_turn() -> None:
    talk = talk_with(Parrot("one", "two", "three"))
    said(talk, "cuont")
    assert run(talk, "/retry") == "two"
    assert run(talk, "/edit count") == "three"
    assert messages(talk) == [("user", "count"), ("assistant", "three")]
    run(talk, "/undo")
    assert messages(talk) == []


def test_edit_without_a_text_opens_the_last_message() -> None:
    talk = talk_with(Parrot("one", "two"))
    said(talk, "cuont")
    seat = Seat(edited="count\nto three")
    assert run(talk, "/edit", seat) == "two"
    assert seat.asked == ["cuont"]
    assert messages(talk)[0] == ("user", "count\nto three")


def test_edit_that_was_given_up_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    talk = talk_with(Parrot("one", "two"))
    said(talk, "count")
    for given_up in (None, " \n"):
        assert run(talk, "/edit", Seat(edited=given_up)) == ""
    assert messages(talk) == [("user", "count"), ("assistant", "one")]
    assert "stays as it is" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["/model x", "/lora", "/plan"])
def test_commands_of_a_model_here_say_that_a_server_answers(typed: str) -> None:
    with pytest.raises(UsageError, match="needs a model in this process"):
        run(talk_with(Parrot()), typed)


def test_session_command_without_a_session_says_how_to_have_one() -> None:
    with pytest.raises(UsageError) as caught:
        run(talk_with(Parrot()), "/session")
    assert "--session NAME" in caught.value.hint


def test_image_goes_with_its_text_or_with_the_next_message(tmp_path: Path) -> None:
    talk = talk_with(Parrot(sees=True))
    path = tmp_path / "my photo.jpg"  # what it holds tells its type, not its name
    path.write_bytes(PNG)
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert run(talk, f'/image "{path}" what is it?') == "yes"
    assert messages(talk)[0][1] == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what is it?"},
    ]
    run(talk, f"/image {path}")
    assert talk.images == [url]
    run(talk, "/image -")
    assert talk.images == []


def test_image_of_a_wrong_type_or_size_is_refused(tmp_path: Path) -> None:
    talk = talk_with(Parrot(sees=True))
    text, large = tmp_path / "a.png", tmp_path / "b.png"
    text.write_text("no image")
    large.write_bytes(PNG)
    with large.open("r+b") as file:
        file.truncate(MOST_BYTES + 1)
    for rest, words in (
        (text, "no image"),
        (large, "more than 20 MiB"),
        ("/dev/zero", "more than 20 MiB"),
        (tmp_path / "c.png", "cannot be read"),
        ("", "no file"),
    ):
        with pytest.raises(UsageError, match=words):
            run(talk, f"/image {rest}")
    assert talk.images == []


def test_image_for_a_model_that_does_not_see_is_refused(tmp_path: Path) -> None:
    talk = talk_with(Parrot())
    with pytest.raises(UsageError, match="parrot does not see") as caught:
        run(talk, f"/image {tmp_path / 'a.png'}")
    assert "--mmproj" in caught.value.hint
    talk.images.append("data:image/png;base64,")  # of a model that saw, before /model
    run(talk, "/image -")
    assert talk.images == []


def test_save_writes_json_and_overwrites_only_when_told(tmp_path: Path) -> None:
    talk = talk_with(Parrot())
    said(talk, "one")
    path = tmp_path / "talk.json"
    run(talk, f"/save {path}")
    written = json.loads(path.read_text())
    assert written == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(UsageError, match="exists") as caught:
        run(talk, f"/save {path}")
    assert caught.value.hint.startswith("/save! ")
    said(talk, "two")
    run(talk, f"/save! {path}")
    assert len(json.loads(path.read_text())) == 4
    run(talk, "/undo")
    run(talk, f"/save {path}", Seat(says_yes=True))
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("command", ["/save", "/export"])
@pytest.mark.parametrize("quote", ["'", '"'])
def test_name_in_quotes_is_the_name_within_them(tmp_path: Path, command: str, quote: str) -> None:
    run(talk_with(Parrot()), f"{command} {quote}{tmp_path / 'my talk.json'}{quote}")
    assert [path.name for path in tmp_path.iterdir()] == ["my talk.json"]


@pytest.mark.parametrize("command", ["/save!", "/export!"])
def test_what_is_no_file_is_not_written_over(tmp_path: Path, command: str) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="no regular file"):
        run(talk_with(Parrot()), f"{command} {pipe}")
    assert pipe.is_fifo()


@pytest.mark.parametrize("command", ["/save", "/export"])
def test_places_that_cannot_be_written_are_told(tmp_path: Path, command: str) -> None:
    talk = talk_with(Parrot())
    folder = tmp_path / "folder.json"
    folder.mkdir()
    for rest, words in (("", "no file named"), (folder, "directory"), (tmp_path / "none" / "x.json", "no directory")):
        with pytest.raises(UsageError, match=words) as caught:
            run(talk, f"{command} {rest}")
        assert command in caught.value.hint
    assert list(folder.iterdir()) == []


def test_export_writes_the_form_that_the_name_asks_for(tmp_path: Path) -> None:
    talk = talk_with(Parrot("# A *title*"), system="Be brief.")
    said(talk, "one\ntwo")
    for suffix in ("md", "json", "yaml", "html"):
        run(talk, f"/export {tmp_path / 'talk'}.{suffix}")
    assert (tmp_path / "talk.md").read_text() == (
        "# talk\n\n## System\n\nBe brief.\n\n## User\n\none\ntwo\n\n## Assistant\n\n# A *title*\n"
    )
    assert json.loads((tmp_path / "talk.json").read_text()) == talk.conversation.messages
    assert Conversation.load(tmp_path / "talk.yaml") == talk.conversation
    assert "<p>one\ntwo</p>" in (tmp_path / "talk.html").read_text()
    with pytest.raises(UsageError, match="names no format") as caught:
        run(talk, f"/export {tmp_path / 'talk.htm'}")
    assert caught.value.hint == "did you mean .html?"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json", ".md", ".yaml"]


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_exported_page_holds_hostile_text_as_text_and_loads_nothing(tmp_path: Path) -> None:
    hostile = '</p><script>alert(1)</script><img src="http://example.org/x.png" onerror="x()">'
    talk = talk_with(Parrot(hostile, sees=True))
    good = "data:image/png;base64,AA=="
    list(talk.ask(hostile, [f'{good}"onload="x()', "http://example.org/y.png", good]))
    path = tmp_path / "<b>&.html"
    run(talk, f"/export {path}")
    page = Tags()
    page.feed(path.read_text())
    assert page.text.count(hostile) == 2
    names = {tag for tag, _ in page.tags}
    assert "script" not in names
    assert "b" not in names
    assert [attributes["src"] for tag, attributes in page.tags if tag == "img"] == [good]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert re.search(r"default-src 'none'", path.read_text())
