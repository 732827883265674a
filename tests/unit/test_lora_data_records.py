from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from toolchain.base.errors import UsageError
from toolchain.lora.data.prepare import DataRequest, prepare_data
from toolchain.lora.data.problems import Problems
from toolchain.lora.data.records import MAX_LINE_BYTES, MAX_RUN, DataFile, Kind, check_files, conversations, read_text

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'


def written(path: Path, data: str | bytes, kind: Kind = "chat") -> DataFile:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return DataFile(path=str(path), kind=kind)


def read(file: DataFile) -> list[list[tuple[str, str]]]:
    problems = Problems()
    found = [[(m["role"], m["content"]) for m in each.messages] for each in conversations(file, problems)]
    problems.settle()
    return found


def refusal(*files: DataFile) -> UsageError:
    with pytest.raises(UsageError) as caught:
        check_files(files)
    assert caught.value.hint
    return caught.value


def turns(*said: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in said]})


TALK = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("chat", GOOD),
        ("chat", '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}'),
        ("instruct", '{"instruction": "Hi", "output": "Hello"}'),
        ("instruct", '{"instruction": "Hi", "input": "", "output": "Hello"}'),
        ("instruct", '{"prompt": "Hi", "completion": "Hello"}'),
        ("instruct", '{"question": "Hi", "answer": "Hello", "source": "a forum"}'),
    ],
)
def test_every_form_becomes_the_same_conversation(kind: Kind, line: str, tmp_path: Path) -> None:
    assert read(written(tmp_path / "data.jsonl", line, kind)) == [TALK]


def test_an_instructions_input_stands_in_a_paragraph_of_its_own(tmp_path: Path) -> None:
    line = '{"instruction": "Translate", "input": "chat", "output": "Katze"}'
    assert read(written(tmp_path / "data.jsonl", line, "instruct"))[0][0] == ("user", "Translate\n\nchat")


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n\n", "\n   \n"])
def test_line_ends_blank_lines_and_a_byte_order_mark_do_not_matter(ending: str, tmp_path: Path) -> None:
    assert read(written(tmp_path / "data.jsonl", "\ufeff" + ending.join([GOOD, GOOD]))) == [TALK, TALK]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{not json}", "broken JSON"),
        ('{"messages": [', "the line ends there"),
        ("[1, 2]", "not an object but [1, 2]"),
        ("[" * 100_000, "broken JSON"),
        ("1" * 5_000, "broken JSON"),
        ('{"text": "Hi"}', "it has no messages; its keys are text"),
        ('{"mesages": []}', "write messages for mesages"),
        ('{"instruction": "Hi", "output": "Hello"}', "name the file under `instruct:`"),
        ('{"messages": "Hi"}', "messages is Hi, not a list of turns"),
        ('{"messages": []}', "messages is [], not a list of turns"),
        ('{"messages": ["Hi"]}', "messages[0] is Hi, not an object"),
        ('{"messages": [{"content": "Hi"}]}', "messages[0] has no role"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: content is missing"),
        (turns(("user", 7), ("assistant", "x")), "messages[0]: content is 7, not text"),
        (turns(("user", None), ("assistant", "x")), "messages[0]: content is None, not text"),
        (turns(("usr", "Hi"), ("assistant", "x")), "unknown role usr; did you mean user?"),
        (turns(("human", "Hi"), ("assistant", "x")), "unknown role human; did you mean user?"),
        (turns(("narrator", "Hi")), "unknown role narrator; known: system, user, assistant, tool"),
        (turns(("system", "Hi")), "only system turns"),
        (turns(("system", "Hi"), ("user", "Hi")), "no turn of the assistant to learn, turns of system, user"),
        (turns(("user", "Hi"), ("assistant", " \n")), "messages[1]: the assistant says nothing"),
        (turns(("user", "\ud800"), ("assistant", "x")), "half a character (\\ud800)"),
        (turns(("user", "a\0b"), ("assistant", "x")), "a NUL character"),
        (turns(("user", "x" * (MAX_RUN + 1)), ("assistant", "x")), f"a run of {MAX_RUN + 1} characters"),
    ],
)
def test_a_line_that_cannot_be_learned_is_named_with_the_reason(line: str, told: str, tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "talks.jsonl", f"{GOOD}\n\n{line}\n{GOOD}\n"))
    assert told in error.evidence
    assert error.evidence.startswith("talks.jsonl:3: ")
    assert len(error.evidence.splitlines()) == 1
    assert len(error.evidence) < 400


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"instruction": "Hi"}', "it has no output; its keys are instruction"),
        ('{"prompt": "Hi", "response": "x"}', "it has no completion; its keys are prompt, response"),
        ('{"text": "Hi"}', "it has none of instruction and output, prompt and completion, question and answer"),
        ('{"prompt": [{"role": "user"}], "completion": "x"}', "prompt is [{'role': 'user'}], not text"),
        ('{"prompt": "Hi", "completion": " "}', "completion is empty"),
        (GOOD, "name the file under `chat:`"),
    ],
)
def test_an_instruction_that_cannot_be_learned_is_named_with_the_reason(line: str, told: str, tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "data.jsonl", line, "instruct"))
    assert error.evidence.startswith("data.jsonl:1: ")
    assert told in error.evidence


def test_problems_of_all_files_are_told_together_and_not_without_end(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", "no\n" * 3)
    second = written(tmp_path / "b.jsonl", "no\n" * 1000)
    lines = refusal(first, second).evidence.splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == [f"a.jsonl:{n}" for n in (1, 2, 3)] + [
        f"b.jsonl:{n}" for n in range(1, 8)
    ]
    assert lines[-1] == "(read no further)"


def test_escape_sequences_of_a_stranger_are_shown_harmless(tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "\x1b[2J\nuser", "content": "Hi"}]})
    assert "\x1b" not in refusal(written(tmp_path / "data.jsonl", line)).evidence


@pytest.mark.parametrize("kind", ["text", "chat", "instruct"])
@pytest.mark.parametrize(("data", "found"), [(b"", "0 bytes"), (b" \n\n\t\r\n", "6 bytes, all of them blank")])
def test_a_file_without_examples_is_refused(kind: Kind, data: bytes, found: str, tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "data", data, kind))
    assert "holds nothing to learn" in error.message
    assert error.evidence == found


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_utf_16_is_named_with_the_way_to_convert_it(kind: Kind, tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "data", GOOD.encode("utf-16"), kind))
    assert "UTF-16" in error.message
    assert "iconv" in error.hint


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize(
    ("bad", "told"), [("caf\u00e9".encode("latin1"), "not UTF-8: byte 0xe9 at byte 4"), (b"a\0b", "NUL byte")]
)
def test_a_byte_that_is_no_text_is_named_with_its_line(kind: Kind, bad: bytes, told: str, tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "data", GOOD.encode() + b"\n" + bad + b"\n", kind))
    assert error.evidence.startswith("data:2: ")
    assert told in error.evidence


def test_a_character_across_two_reads_is_whole_and_a_cut_one_at_the_end_is_not(tmp_path: Path) -> None:
    euros = "\u20ac" * 500_000  # three bytes each: no power of two is a multiple of that
    check_files([written(tmp_path / "whole.txt", euros, "text")])
    error = refusal(written(tmp_path / "cut.txt", euros.encode()[:-1], "text"))
    assert "ends inside a character" in error.evidence


def test_a_line_of_10_mb_is_refused_as_an_example_and_taken_as_a_text(tmp_path: Path) -> None:
    line = b"word " * (2 << 20)
    error = refusal(written(tmp_path / "data.jsonl", GOOD.encode() + b"\n" + line + b"\n" + b"no json\n"))
    assert f"data.jsonl:2: a line of {len(line) + 1} bytes; {MAX_LINE_BYTES} are the most" in error.evidence
    assert "data.jsonl:3: broken JSON" in error.evidence
    check_files([written(tmp_path / "data.txt", line, "text")])


def test_a_text_is_read_as_it_is_without_its_byte_order_mark(tmp_path: Path) -> None:
    assert read_text(written(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\n\r\nb ", "text")) == b"a\r\n\r\nb "


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_file_that_is_not_there_or_a_folder_names_what_is_near(kind: Kind, tmp_path: Path) -> None:
    written(tmp_path / "talks.jsonl", GOOD)
    near = refusal(DataFile(path=str(tmp_path / "talk.jsonl"), kind=kind))
    assert f"did you mean {tmp_path / 'talks.jsonl'}?" in near.hint
    folder = refusal(DataFile(path=str(tmp_path), kind=kind))
    assert "is a folder" in folder.message
    assert "talks.jsonl" in folder.hint
    assert "relative to the recipe" in refusal(DataFile(path=str(tmp_path / "no" / "a.txt"), kind=kind)).hint


def request(tmp_path: Path, sources: Sequence[DataFile]) -> DataRequest:
    return DataRequest(
        base=str(tmp_path / "base.gguf"),
        sources=tuple(sources),
        held_out=0.1,
        held_out_file=None,
        n_ctx=64,
        packing=True,
        learn_prompts=False,
        seed=1,
        n_threads=1,
    )


def test_bad_files_are_told_before_the_base_is_looked_at_and_leave_nothing(tmp_path: Path) -> None:
    asked = request(tmp_path, [written(tmp_path / "a.jsonl", "no")])
    with pytest.raises(UsageError, match="cannot be learned"):
        prepare_data(asked, tmp_path / "out", log=tmp_path / "log")
    assert sorted(path.name for path in tmp_path.iterdir()) in (["a.jsonl"], ["a.jsonl", "foundry-home"])


def test_a_request_comes_back_from_its_json(tmp_path: Path) -> None:
    from dataclasses import asdict, replace

    plain = request(tmp_path, [DataFile(path="/a", kind="text", repeat=3), DataFile(path="/b", kind="chat")])
    for asked in (plain, replace(plain, held_out_file=DataFile(path="/c", kind="instruct"))):
        assert DataRequest.from_json(json.loads(json.dumps(asdict(asked)))) == asked
