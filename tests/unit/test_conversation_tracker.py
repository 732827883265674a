"""A conversation: its messages, its turns, what a failure leaves of it, and YAML that gives back every character."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.conversation import document
from runtime.conversation.messages import images_of, text_of
from runtime.conversation.tracker import Conversation
from toolchain.base.errors import FoundryError, UsageError

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1,\n "b": "x"}'}}

AWKWARD = [
    "", " ", "\n", "\n\n", "yes", "no", "1.0", "null", "~", "2024-01-31", "0x1F", "1e5", "=", "<<", "- a", "a: b",
    "# c", "  leading", "trailing  ", "\ttab", "a\tb", "one\n", "one\n\n", "\none", "\n\n one\n", "a\nb",
    " a\n  b\n c", "a  \nb", "a\n   \nb", "a\n   ", "a\n\t\nb\n", "\ta\nb", "a\r\nb", "a\rb", "\r",
    "a\x85b\n\u2028\u2029", "\x00\x01\x1b\x7f\x9f", "\ufeffbom\n", "emoji 😀🏽\nü", "\U0001fffe\U0010ffff",
    "\ufffe\uffff\ufdd0", "lone \ud83d surrogate", "quote \" ' \\ \\n", "---\n...\n---", "%YAML 1.1\n", "&a *a !b",
    "{a: [b]}\n", "| block\n", "> fold", "k: |2-\n  x", "a\n# b\n", "x" * 3000,
    "word " * 900 + "\n" + "word " * 900,
]  # fmt: skip


def talk() -> Conversation:
    conversation = Conversation()
    conversation.system = "Be brief."
    conversation.add("user", "one")
    conversation.add("assistant", "1")
    conversation.add("user", "two")
    return conversation


def test_messages_are_shared_by_no_one() -> None:
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:x"}},
    ]
    conversation = Conversation()
    conversation.add("user", parts)
    other = Conversation()
    other.adopt(conversation)
    before = conversation.to_yaml()
    parts[1]["image_url"]["url"] = "changed"
    parts.clear()
    conversation.messages[0]["content"][0]["text"] = "changed"
    conversation.turns()[0][0]["content"].clear()  # type: ignore[index]
    other.pop()["content"].clear()
    assert conversation.to_yaml() == before
    assert images_of(conversation.messages[0]) == ["data:x"]


def test_the_system_message_stands_first_and_stays() -> None:
    conversation = Conversation()
    conversation.add("user", "hello")
    conversation.system = "Be kind."
    assert [m["role"] for m in conversation.messages] == ["system", "user"]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]
    with pytest.raises(UsageError):
        conversation.pop()
    with pytest.raises(UsageError):
        conversation.add("system", "Another.")
    conversation.system = ""
    assert conversation.messages == []
    assert conversation.system == ""


def test_a_message_that_is_none_is_refused_and_not_kept() -> None:
    conversation = talk()
    before = conversation.messages
    for role, content, more in (
        ("usr", "x", {}), ("user", 1, {}), ("user", None, {}), ("user", ["x"], {}), ("user", [{"type": "text"}], {}),
        ("user", "x", {"nmae": "y"}), ("user", "x", {"name": 3}), ("assistant", None, {"tool_calls": [{}]}),
        ("user", [{"type": "image_url", "image_url": {"uri": "x"}}], {}),
        ("assistant", "x", {"tool_calls": {"a": b""}}),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            conversation.add(role, content, **more)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        conversation.add("asistant", "x")  # type: ignore[arg-type]
    assert caught.value.hint == "did you mean assistant?"
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UsageError):
        conversation.add("assistant", "x", tool_calls=[{"function": {"name": "f", "arguments": endless}}])
    assert conversation.messages == before


def test_a_message_may_only_call_tools() -> None:
    conversation = Conversation()
    conversation.add("assistant", None, tool_calls=[CALL])
    conversation.add("tool", "3", tool_call_id="c1")
    assert text_of(conversation.messages[0]) == ""
    assert Conversation.from_yaml(conversation.to_yaml()) == conversation


def test_turns_begin_at_the_users_messages() -> None:
    conversation = Conversation()
    conversation.add("assistant", "Hello!")
    for role, content in (("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d"), ("user", "e")):
        conversation.add(role, content)  # type: ignore[arg-type]
    conversation.system = "s"
    assert [[m["content"] for m in turn] for turn in conversation.turns()] == [["Hello!"], ["a", "b", "c", "d"], ["e"]]


def test_inverted_roles_keep_system_and_invert_back() -> None:
    conversation = talk()
    before = conversation.messages
    conversation.invert_roles()
    assert [m["role"] for m in conversation.messages] == ["system", "assistant", "user", "assistant"]
    conversation.invert_roles()
    assert conversation.messages == before


def test_adopting_takes_the_others_system_too() -> None:
    conversation, other = talk(), Conversation()
    other.add("user", "only this")
    conversation.adopt(other)
    assert conversation == other
    other.adopt(talk())
    assert other.system == "Be brief."


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_failed_transaction_leaves_the_conversation_as_it_was(error: type[BaseException]) -> None:
    conversation = talk()
    before = conversation.messages
    with pytest.raises(error), conversation.transaction():  # noqa: PT012
        conversation.pop()
        conversation.system = "Other."
        conversation.add("user", "lost")
        conversation.invert_roles()
        conversation.reset()
        raise error
    assert conversation.messages == before


def test_transactions_nest() -> None:
    conversation = talk()
    with conversation.transaction():
        conversation.add("assistant", "kept")
        with pytest.raises(ValueError, match="inner"), conversation.transaction():  # noqa: PT012
            conversation.add("user", "lost")
            raise ValueError("inner")
        conversation.add("user", "kept too")
    assert [m["content"] for m in conversation.messages][-2:] == ["kept", "kept too"]


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_yaml_gives_back_an_awkward_text(text: str) -> None:
    conversation = Conversation()
    conversation.system = text or "-"
    conversation.add("user", text, name=text)
    conversation.add("user", [{"type": "text", "text": text}, PICTURE])
    more = {"id": text, "function": {"name": "f", text[:40] or "k": [text, [text], {"a": [{"b": text}, []], "c": {}}]}}
    conversation.add("assistant", text, tool_calls=[more], reasoning_content=text)
    written = conversation.to_yaml()
    assert Conversation.from_yaml(written).messages == conversation.messages
    assert written.encode().decode() == written
    assert yaml.safe_load(written)["messages"] == conversation.messages  # to any other reader as well


def test_yaml_gives_back_random_texts_and_values() -> None:
    rng = random.Random(5)
    alphabet = "ab \n\n  \t\r:-#'\"\\|>{}[]%&*!?,.~\x00\x85\u2028\u00a0\ufeff😀\ud800"
    for _ in range(300):
        conversation = Conversation()
        for _ in range(rng.randrange(4)):
            content = "".join(rng.choices(alphabet, k=rng.randrange(25)))
            value = rng.choice(
                [None, True, 0, -(10**40), 1e300, -1e-7, 0.1, float("inf"), content, [], {}, [[content]]]
            )
            conversation.add("user", content, tool_calls=[{"function": {"name": "f"}, "x": value}])
        assert Conversation.from_yaml(conversation.to_yaml()).messages == conversation.messages


def test_yaml_is_readable() -> None:
    conversation = talk()
    conversation.add("assistant", "def f():\n    return 1\n")
    assert conversation.to_yaml() == (
        'version: 1\nmessages:\n- role: system\n  content: "Be brief."\n- role: user\n  content: "one"\n'
        '- role: assistant\n  content: "1"\n- role: user\n  content: "two"\n'
        "- role: assistant\n  content: |\n    def f():\n        return 1\n"
    )


def test_a_conversation_written_by_hand_is_read() -> None:
    text = "messages:\n  - {role: user, content: Hello there}\n  - role: assistant\n    content: >-\n      a\n      b\n"
    text += "version: 1\n"
    assert [m["content"] for m in Conversation.from_yaml(text).messages] == ["Hello there", "a b"]
    assert Conversation.from_yaml(text.replace("\n", "\r\n")) == Conversation.from_yaml(text)


@pytest.mark.parametrize("text", ["9" * 5000, "1" + ":1" * 100_000, "0x" + "F" * 100_000, "1_" * 50_000])
def test_a_long_number_is_a_text(text: str) -> None:
    conversation = Conversation.from_yaml(f"version: 1\nmessages:\n- role: user\n  content: {text}\n")
    assert conversation.messages[0]["content"] == text


GOOD = "version: 1\nmessages:\n- role: user\n  content: hello\n"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("", "", "is empty"),
        ("version: 1\n", "", "no messages"),
        ("messages: []\n", "", "no version"),
        (GOOD.replace("1", "2"), "line 1", "version is 2"),
        (GOOD.replace("1", "yes"), "line 1", "version is True"),
        (GOOD + "extra: 1\n", "line 5", "unknown key 'extra'"),
        ("- role: user\n", "line 1", "no mapping"),
        ("hello", "line 1", "no mapping"),
        ("version: 1\nmessages: hello\n", "line 2", "no list"),
        (GOOD + "- hello\n", "line 5", "message 2 is a text"),
        (GOOD + "- role: user\n", "line 5", "message 2 has no content"),
        (GOOD + "- role: user\n  contents: x\n", "line 6", "unknown key 'contents'"),
        (GOOD + "- role: usr\n  content: x\n", "line 5", "role 'usr'"),
        (GOOD + "- role: [user]\n  content: x\n", "line 5", "role ['user']"),
        (GOOD + "- role: system\n  content: x\n", "line 5", "can only be the first"),
        (GOOD + "- role: user\n  content: yes\n", "line 6", "truth value"),
        (GOOD + "- role: user\n  content: 1.0\n", "line 6", "a number"),
        (GOOD + "- role: user\n  content: 2024-01-31\n", "line 6", "date"),
        (GOOD + "- role: user\n  content:\n  - type: txt\n    text: x\n", "line 7", "type 'txt'"),
        (GOOD + "- role: user\n  content: x\n  content: y\n", "line 7", "twice"),
        (GOOD + "- role: user\n  content: &a x\n", "line 6", "anchors"),
        (GOOD + "- role: user\n  content: *a\n", "line 6", "anchors"),
        (GOOD + "- role: user\n  content: !!python/object/apply:os.getcwd [x]\n", "line 6", "a part"),
        (GOOD + "- role: user\n  content: !!python/name:os.getcwd ''\n", "line 6", "constructor"),
        (GOOD + "- role: user\n  content: !!binary aGk=\n", "line 6", "bytes"),
        (GOOD + "- role: user\n  content: !!int x\n", "line 6", "tag"),
        (GOOD + "- role: user\n  ? [a]\n  : b\n", "line 6", "key"),
        (GOOD + "  content: x\n", "line 5", "twice"),
        (GOOD + "  name: [\n", "line 6", ""),
        (GOOD + "---\na: b\n", "", "second document"),
        (GOOD + "\tx: y", "line 5", ""),
        ("version: 1\nmessages: " + "[" * 100_000, "line 2", "nested"),
        ("version: 1\nmessages:\n" + "- " * 5_000 + "x", "line 3", "nested"),
        ("version: 1\nmessages: \x00", "", ""),
        ("version: 1\nmessages: \ud800", "", ""),
        ("version: " + "9" * 5000, "line 1", "version"),
    ],
)  # fmt: skip
def test_a_wrong_document_is_refused_with_its_line(text: str, line: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Conversation.from_yaml(text)
    assert line in caught.value.message
    assert told in caught.value.message + caught.value.evidence
    assert caught.value.hint


def test_a_misspelt_key_is_answered_with_the_right_one() -> None:
    for wrong, right in (("mesages: []", "messages"), ("messages:\n- {role: user, contnet: x}", "content")):
        with pytest.raises(UsageError) as caught:
            Conversation.from_yaml(f"version: 1\n{wrong}\n")
        assert caught.value.hint == f"did you mean {right}?"


def test_random_documents_are_read_or_refused() -> None:
    rng = random.Random(7)
    pieces = [
        *GOOD,
        "version: 1\n",
        "messages:\n",
        "- role: user\n",
        "  content: ",
        "|\n",
        "&a",
        "*a",
        "!!",
        "{",
        "]",
        "\t",
        "\x01",
    ]
    for _ in range(400):
        text = list(GOOD)
        for _ in range(rng.randrange(1, 5)):
            text.insert(rng.randrange(len(text)), rng.choice(pieces))
        try:
            conversation = Conversation.from_yaml("".join(text))
        except UsageError:
            continue
        assert Conversation.from_yaml(conversation.to_yaml()) == conversation


def test_too_many_entries_and_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(document, "MAX_ENTRIES", 1000)
    with pytest.raises(UsageError, match="more than 1000 entries"):
        Conversation.from_yaml(f"version: 1\nmessages: [{'a,' * 2000}]")
    monkeypatch.setattr(document, "MAX_BYTES", 1000)
    conversation = Conversation()
    conversation.add("user", "ü" * 600)
    (tmp_path / "large.yaml").write_text("#" * 2000)
    for act in (
        conversation.to_yaml,
        lambda: Conversation.load(tmp_path / "large.yaml"),
        lambda: Conversation.from_yaml("ü" * 600),
    ):
        with pytest.raises(UsageError, match="too large"):
            act()


def test_a_conversation_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "talk [1].yaml"
    conversation = talk()
    conversation.save(str(path))
    conversation.add("assistant", "\r\n\ud83d")
    conversation.save(path)
    assert Conversation.load(str(path)) == conversation
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Conversation.load(path) == conversation
    assert os.listdir(path.parent) == [path.name]


def test_a_save_keeps_a_link_and_a_mode(tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real.yaml", tmp_path / "link.yaml", tmp_path / "pipe"
    real.touch(mode=0o600)
    link.symlink_to(real.name)
    os.mkfifo(pipe)
    talk().save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert Conversation.load(link) == Conversation.load(real) == talk()
    with pytest.raises(UsageError, match="no file"):
        talk().save(pipe)


def test_files_that_hold_no_conversation_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("version: 1 # ü".encode("latin-1"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name in ("latin.yaml", "list.yaml", "missing.yaml", ".", "a\0b", "n" * 300):
        with pytest.raises(UsageError) as caught:
            Conversation.load(tmp_path / name)
        assert str(tmp_path) in caught.value.message


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "talk.yaml"
    talk().save(path)
    before = path.read_bytes()
    for wrong in (tmp_path, path / "below", tmp_path / ("n" * 300), tmp_path / "a\0b"):
        with pytest.raises(FoundryError):
            talk().save(wrong)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["talk.yaml"]
