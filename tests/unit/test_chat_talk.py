from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from itertools import islice

import pytest

from runtime.chat.backend import ContextFullError, Figures, Piece, ReplyOptions, figures_line
from runtime.conversation.messages import Message
from runtime.interrupts import Interrupt
from tests.parrot import OPTIONS, Parrot, said, talk_with
from toolchain.base.errors import FetchError, UsageError

PNG = "data:image/png;base64,iVBORw0KGgo="


def contents(talk: object) -> list[object]:
    return [message["content"] for message in talk.conversation.messages]  # type: ignore[attr-defined]


def test_reply_is_kept_trimmed_and_sent_with_the_next_turn() -> None:
    parrot = Parrot(" yes\n")
    talk = talk_with(parrot, system="S")
    assert said(talk, "one") == "yes\n"
    said(talk, "two")
    assert parrot.prompts[-1] == "[S][one][yes][two]"


def test_reasoning_is_passed_on_and_not_kept() -> None:
    talk = talk_with(Parrot("(hm) well"))
    pieces = list(talk.ask("one"))
    assert "".join(piece.reasoning for piece in pieces) == "hm"
    assert contents(talk) == ["one", "well"]


def test_oldest_turns_are_dropped_whole_and_said_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    parrot = Parrot(n_ctx=40)
    talk = talk_with(parrot, system="S")
    for text in ("first one", "second one", "third one"):
        said(talk, text)
    assert parrot.prompts[-1] == "[S][third one]"
    told = capsys.readouterr().err.splitlines()
    assert told == ["! the oldest turn was left out of the prompt: the context holds 40 tokens"] * 2
    assert contents(talk)[:3] == ["S", "first one", "yes"]
    list(talk.retry())
    assert parrot.prompts[-1] == "[S][third one]"
    assert capsys.readouterr().err == ""


class ShortOfContext(Parrot):
    """A server that does not tell its context and refuses more than ``most`` messages."""

    def __init__(self, most: int = 3) -> None:
        super().__init__()
        self.most = most

    def reply(
        self, messages: Sequence[Message], options: ReplyOptions, interrupt: Interrupt
    ) -> Generator[Piece, None, None]:
        if len(messages) > self.most:
            raise ContextFullError("too long")
        yield from super().reply(messages, options, interrupt)


def test_server_that_only_refuses_gets_fewer_turns_until_it_answers(capsys: pytest.CaptureFixture[str]) -> None:
    parrot = ShortOfContext()
    talk = talk_with(parrot)
    for text in ("one", "two", "three"):
        said(talk, text)
    assert parrot.prompts[-1] == "[two][yes][three]"
    assert capsys.readouterr().err.count("left out") == 1
    assert len(talk.conversation.turns()) == 3


def test_message_that_a_server_finds_too_long_alone_is_refused_and_forgotten() -> None:
    talk = talk_with(ShortOfContext())
    said(talk, "one")
    talk.backend = ShortOfContext(most=0)
    with pytest.raises(ContextFullError):
        said(talk, "two")
    assert contents(talk) == ["one", "yes"]


def test_message_that_never_fits_is_refused_and_forgotten() -> None:
    talk = talk_with(Parrot(n_ctx=40))
    said(talk, "short")
    with pytest.raises(UsageError, match="the context holds 40"):
        said(talk, "x" * 50)
    assert contents(talk) == ["short", "yes"]
    said(talk, "short again")


def test_turn_that_fails_is_not_kept() -> None:
    talk = talk_with(Parrot("yes", "no!"))
    said(talk, "one")
    with pytest.raises(FetchError):
        said(talk, "two")
    assert contents(talk) == ["one", "yes"]


def test_stopped_reply_keeps_what_came() -> None:
    talk = talk_with(Parrot("half^way"))
    assert said(talk, "one") == "half"
    assert talk.figures is not None
    assert talk.figures.finish_reason == "cancelled"
    assert contents(talk) == ["one", "half"]


def test_reply_stopped_before_its_first_word_leaves_no_turn(capsys: pytest.CaptureFixture[str]) -> None:
    talk = talk_with(Parrot("yes", "^"))
    said(talk, "one")
    said(talk, "two")
    assert contents(talk) == ["one", "yes"]
    assert "not kept" in capsys.readouterr().err


def test_reader_that_leaves_stops_the_reply_and_what_came_is_kept() -> None:
    talk = talk_with(Parrot("a long reply"))
    pieces = talk.ask("one")
    assert "".join(piece.text for piece in islice(pieces, 3)) == "a l"
    pieces.close()
    assert contents(talk) == ["one", "a l"]


def test_sigint_during_a_reply_ends_it_and_raises_nothing() -> None:
    talk = talk_with(Parrot("a long reply"))
    text = ""
    for piece in talk.ask("one"):
        text += piece.text
        if len(text) == 3:
            os.kill(os.getpid(), signal.SIGINT)
    assert text == "a l"


def test_stop_ends_the_reply_that_is_coming() -> None:
    talk = talk_with(Parrot("a long reply"))
    text = ""
    for piece in talk.ask("one"):
        text += piece.text
        talk.stop()
    assert text == "a"
    talk.stop()  # nothing is coming
    assert said(talk, "two") == "a long reply"


def test_retry_has_the_next_seed_and_takes_the_replys_place() -> None:
    parrot = Parrot("one", "two", "three", "four")
    talk = talk_with(parrot)
    said(talk, "count")
    list(talk.retry())
    list(talk.retry())
    assert contents(talk) == ["count", "three"]
    said(talk, "on")
    assert [options.sampling.seed for options in parrot.options] == [7, 8, 9, 7]


def test_retry_that_fails_leaves_the_reply_as_it_was() -> None:
    talk = talk_with(Parrot("good", "bad!"))
    said(talk, "one")
    with pytest.raises(FetchError):
        list(talk.retry())
    assert contents(talk) == ["one", "good"]


def test_edit_answers_another_message_in_its_place() -> None:
    parrot = Parrot("one", "two", "three")
    talk = talk_with(parrot)
    said(talk, "first")
    said(talk, "secnd")
    list(talk.edit("second"))
    assert contents(talk) == ["first", "one", "second", "three"]
    assert parrot.prompts[-1] == "[first][one][second]"


def test_undo_takes_back_one_turn_at_a_time() -> None:
    talk = talk_with(Parrot(), system="S")
    said(talk, "one")
    said(talk, "two")
    assert talk.undo()["content"] == "two"
    assert contents(talk) == ["S", "one", "yes"]
    talk.undo()
    with pytest.raises(UsageError, match="no turn"):
        talk.undo()
    with pytest.raises(UsageError, match="no reply"):
        list(talk.retry())
    with pytest.raises(UsageError, match="no message"):
        list(talk.edit("x"))


def test_reset_forgets_the_turns_and_keeps_the_system_message() -> None:
    talk = talk_with(Parrot(), system="S")
    said(talk, "one")
    talk.reset()
    assert contents(talk) == ["S"]
    assert talk.used_tokens() is None


def test_used_tokens_are_those_of_the_last_reply_and_counted_after_an_undo() -> None:
    talk = talk_with(Parrot(n_ctx=400))
    assert talk.used_tokens() == 0
    said(talk, "one")
    assert talk.used_tokens() == len("[one]") + 1
    said(talk, "two")
    talk.undo()
    assert talk.used_tokens() == len("[one][yes]")


def test_images_go_with_the_next_message_of_a_model_that_sees() -> None:
    talk = talk_with(Parrot(sees=True))
    talk.images.append(PNG)
    said(talk, "what is it?")
    assert contents(talk)[0] == [
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "text", "text": "what is it?"},
    ]
    assert talk.images == []
    list(talk.edit("what is that?"))
    assert contents(talk)[0][0] == {"type": "image_url", "image_url": {"url": PNG}}  # type: ignore[index]


def test_image_for_a_model_that_does_not_see_is_refused() -> None:
    talk = talk_with(Parrot())
    with pytest.raises(UsageError, match="does not see"):
        list(talk.ask("what is it?", [PNG]))
    assert contents(talk) == []


@pytest.mark.parametrize("n_ctx", [None, 400])
def test_images_of_a_conversation_are_left_out_for_a_model_that_does_not_see(
    n_ctx: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = talk_with(Parrot(sees=True))
    list(talk.ask("what is it?", [PNG]))
    blind = talk.backend = Parrot(n_ctx=n_ctx)
    talk.count_again()
    said(talk, "and now?")
    said(talk, "and then?")
    assert blind.images == [[], []]
    assert capsys.readouterr().err == "! parrot does not see: the conversation's images are left out\n"
    assert isinstance(contents(talk)[0], list)  # another model may see it again


def test_image_that_a_model_does_not_see_is_taken_back_as_the_hint_says() -> None:
    talk = talk_with(Parrot(sees=True))
    list(talk.ask("what is it?", [PNG]))
    talk.backend = Parrot()
    with pytest.raises(UsageError, match="does not see") as caught:
        list(talk.retry())
    assert "/undo" in caught.value.hint
    talk.images.append(PNG)
    with pytest.raises(UsageError, match="does not see") as caught:
        said(talk, "what is that?")
    assert "/image -" in caught.value.hint
    assert "--mmproj" in caught.value.hint


def test_changes_are_told_after_they_were_made() -> None:
    talk, seen = talk_with(Parrot("a", "b!")), []
    talk.changed.append(lambda: seen.append(len(talk.conversation)))
    said(talk, "one")
    with pytest.raises(FetchError):
        said(talk, "two")
    talk.set_system("S")
    talk.undo()
    assert seen == [2, 3, 1]


def test_options_of_the_talk_reach_the_backend() -> None:
    parrot = Parrot()
    said(talk_with(parrot), "one")
    assert parrot.options == [OPTIONS]


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        (
            Figures(
                finish_reason="stop",
                prompt_tokens=1,
                cached_tokens=0,
                completion_tokens=4,
                prompt_tps=9.6,
                generation_tps=30.2,
                threads=2,
            ),
            "4 tokens, 30 t/s generation; 1 prompt token (0 cached), 10 t/s; 2 threads",
        ),
        (Figures(finish_reason="length"), "cut at the token limit or the end of the context"),
        (Figures(finish_reason="cancelled"), "stopped"),
        (Figures(finish_reason="content_filter"), "ended: content_filter"),
        (Figures(finish_reason="stop"), ""),
    ],
)
def test_line_of_figures_tells_what_is_known(figures: Figures, line: str) -> None:
    assert figures_line(figures) == line
