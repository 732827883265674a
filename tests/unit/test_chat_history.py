"""What was typed before: kept in a file, bounded, private, and read also as readline left it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from runtime.chat.history import ENTRIES, ENTRY_BYTES, FILE_BYTES, KeptHistory


def remembered(path: Path) -> list[str]:
    """What the next chat begins with, the newest first."""
    return list(KeptHistory(path).load_history_strings())


def test_entries_come_back_newest_first_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "home" / "chat-history"
    texts = ["one", "two\nlines", 'a "quoted" one', "wörter 漢字"]
    for text in texts:
        KeptHistory(path).store_string(text)
    KeptHistory(path).store_string("half a character: \ud800")
    assert remembered(path) == ["half a character: ?", *reversed(texts)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("written", "entries"),
    [
        ("first\nsecond \\040\n", ["second \\040", "first"]),
        ("_HiStOrY_V2_\nfirst\\040line\nsecond\n", ["second", "first line"]),
        ('plain\n"json \\" line"\n"broken\n\n', ['"broken', 'json " line', "plain"]),
        ("", []),
    ],
)
def test_lines_of_readline_are_entries(tmp_path: Path, written: str, entries: list[str]) -> None:
    path = tmp_path / "chat-history"
    path.write_text(written)
    assert remembered(path) == entries


def test_file_that_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "chat-history"
    path.write_text("old\n")
    path.chmod(0o644)
    KeptHistory(path).store_string("new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_file_stays_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "chat-history"
    path.write_text("".join(f"line {number}\n" for number in range(2 * ENTRIES + 1)))
    assert remembered(path)[0] == f"line {2 * ENTRIES}"
    assert len(remembered(path)) == len(path.read_text().splitlines()) == ENTRIES
    path.write_text("".join(f"{number} {'x' * 5000}\n" for number in range(FILE_BYTES // 5000 + 1)))
    assert remembered(path)[0].startswith(f"{FILE_BYTES // 5000} ")
    assert path.stat().st_size <= FILE_BYTES // 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_text_that_was_pasted_by_the_page_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "chat-history"
    history = KeptHistory(path)
    history.append_string("x" * ENTRY_BYTES)
    history.append_string("short")
    assert remembered(path) == ["short"]


def test_place_that_cannot_be_written_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    history = KeptHistory(tmp_path / "file" / "chat-history")
    assert list(history.load_history_strings()) == []
    history.append_string("one")
    history.append_string("two")
    assert capsys.readouterr().err.count("not remembered for the next chat") == 1
