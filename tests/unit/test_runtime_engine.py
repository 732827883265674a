"""The token loop on a scripted library: what the C side would say, without a model."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from runtime.engine import Engine
from runtime.engine.context import Context
from runtime.engine.model import Model
from runtime.engine.reply import Chunk, StopSplitter
from runtime.engine.sampling import SamplingOptions
from runtime.engine.shown import Shown
from runtime.engine.text import TextStream
from runtime.interrupts import Interrupt
from runtime.library_log import LibraryLog
from runtime.settings import settle
from tests.described import machine
from toolchain.base.errors import FoundryError, MemoryFitError, UsageError

END = 0
GREEDY = SamplingOptions(temp=0)


class ScriptedLibrary:
    """Draws tokens 1, 2, ... whose pieces are given, then the end token."""

    def __init__(self, pieces: Sequence[bytes], statuses: Sequence[int] = ()) -> None:
        self.pieces = pieces
        self.statuses = iter(statuses)
        self.drawn = 0
        self.held = 0
        self.freed = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments: 1

    def llama_batch_get_one(self, _tokens: object, count: int) -> int:
        return count

    def llama_decode(self, _context: object, count: int) -> int:
        status = next(self.statuses, 0)
        self.held += 0 if status else count
        return status

    def llama_memory_seq_pos_max(self, _memory: object, _sequence: int) -> int:
        return self.held - 1

    def llama_memory_seq_pos_min(self, _memory: object, _sequence: int) -> int:
        return 0

    def llama_memory_seq_rm(self, _memory: object, _sequence: int, start: int, _end: int) -> bool:
        self.held = start
        return True

    def llama_memory_clear(self, _memory: object, _data: bool) -> None:
        self.held = 0

    def llama_sampler_sample(self, *_arguments: object) -> int:
        self.drawn += 1
        return self.drawn if self.drawn <= len(self.pieces) else END

    def llama_vocab_is_eog(self, _vocab: object, token: int) -> bool:
        return token == END

    def llama_token_to_piece(self, _vocab: object, token: int, buffer: Any, room: int, *_rest: object) -> int:
        piece = self.pieces[token - 1]
        if len(piece) > room:
            return -len(piece)
        ctypes.memmove(buffer, piece, len(piece))
        return len(piece)

    def llama_sampler_free(self, _chain: object) -> None:
        self.freed += 1


def engine_on(library: ScriptedLibrary, *, n_ctx: int = 64) -> Engine:
    model = Model(lib=library, log=LibraryLog(shown=False), handle=1)
    return Engine(Context(model=model, handle=1, n_ctx=n_ctx, n_batch=4))


def streamed(pieces: Sequence[bytes], **options: Any) -> list[Chunk]:
    library = ScriptedLibrary(pieces)
    chunks = list(engine_on(library).stream([1, 2, 3], GREEDY, **options))
    assert library.freed == 1
    return chunks


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_character_split_over_tokens_comes_out_whole() -> None:
    raw = "Zoë 🦙!".encode()
    chunks = streamed([raw[i : i + 1] for i in range(len(raw))])
    assert [chunk.text for chunk in chunks if chunk.text] == ["Z", "o", "ë", " ", "🦙", "!"]


def test_character_cut_off_at_the_end_is_marked_and_not_lost() -> None:
    assert text_of(streamed(["🦙".encode()[:2]])) == "�"


def test_long_piece_is_read_with_a_second_call() -> None:
    assert text_of(streamed([b" " * 300 + b"x"])) == " " * 300 + "x"


def test_stop_string_is_found_across_tokens_and_not_shown() -> None:
    chunks = streamed([b"one\n", b"Us", b"er", b": two"], stops=["\nUser:"])
    assert text_of(chunks) == "one"
    assert chunks[-1].stats is not None
    assert chunks[-1].stats.finish_reason == "stop"


def test_held_back_text_is_shown_when_the_reply_ends() -> None:
    assert text_of(streamed([b"one\n", b"Us"], stops=["\nUser:"])) == "one\nUs"


def test_limit_is_exact() -> None:
    stats = streamed([b"a"] * 9, max_tokens=4)[-1].stats
    assert stats is not None
    assert (stats.completion_tokens, stats.finish_reason) == (4, "length")


def test_full_context_ends_the_reply() -> None:
    library = ScriptedLibrary([b"a"] * 99)
    stats = list(engine_on(library, n_ctx=8).stream([1, 2, 3], GREEDY))[-1].stats
    assert stats is not None
    assert (stats.completion_tokens, stats.finish_reason, library.held) == (6, "length", 8)


def test_library_without_room_ends_the_reply() -> None:
    library = ScriptedLibrary([b"a"] * 9, statuses=[0, 0, 1])
    stats = list(engine_on(library).stream([1, 2, 3], GREEDY))[-1].stats
    assert stats is not None
    assert (stats.completion_tokens, stats.finish_reason) == (2, "length")


def test_no_tokens_asked_for_is_no_token_drawn() -> None:
    library = ScriptedLibrary([b"a"])
    stats = list(engine_on(library).stream([1, 2, 3], GREEDY, max_tokens=0))[-1].stats
    assert stats is not None
    assert (stats.completion_tokens, stats.finish_reason, library.drawn) == (0, "length", 0)


def test_reader_that_leaves_frees_the_sampler_and_keeps_what_was_decoded() -> None:
    library = ScriptedLibrary([b"a"] * 9)
    engine = engine_on(library)
    chunks = engine.stream([11, 12, 13], GREEDY)
    next(chunks)
    next(chunks)
    chunks.close()
    assert (library.freed, library.held) == (1, 4)
    assert engine.context.cached == [11, 12, 13, 1]


def test_piece_of_a_token_is_asked_for_once() -> None:
    library = ScriptedLibrary([b"a"] * 3)
    engine = engine_on(library)
    assert text_of(list(engine.stream([11], GREEDY))) == "aaa"
    library.pieces, library.drawn = [b"b"] * 3, 0
    assert text_of(list(engine.stream([11], GREEDY))) == "aaa"


def test_failing_decode_is_an_error_and_frees_the_sampler() -> None:
    library = ScriptedLibrary([b"a"] * 9, statuses=[0, -3])
    with pytest.raises(FoundryError, match="status -3"):
        list(engine_on(library).stream([1, 2, 3], GREEDY))
    assert library.freed == 1


def test_memory_that_runs_out_is_told_from_other_errors() -> None:
    engine = engine_on(ScriptedLibrary([b"a"] * 9, statuses=[0, -3]))
    engine.model.log.write(4, b"ggml_backend_alloc: failed to allocate buffer\n")
    with pytest.raises(MemoryFitError):
        list(engine.stream([1, 2, 3], GREEDY))


def test_interrupt_stops_before_the_next_token() -> None:
    interrupt = Interrupt()

    def listen() -> Iterator[Chunk]:
        for chunk in engine_on(ScriptedLibrary([b"a"] * 99)).stream([1, 2], GREEDY, interrupt=interrupt):
            yield chunk
            interrupt.raised = True

    chunks = list(listen())
    assert text_of(chunks) == "a"
    assert chunks[-1].stats is not None
    assert chunks[-1].stats.finish_reason == "cancelled"


def test_common_beginning_is_not_decoded_again() -> None:
    library = ScriptedLibrary([b"a", b"b"])
    engine = engine_on(library)
    list(engine.stream([11, 12, 13], GREEDY))
    library.drawn = 0
    stats = list(engine.stream([11, 12, 13, 1, 2, 50, 51], GREEDY))[-1].stats
    assert stats is not None
    assert (stats.cached_tokens, stats.prompt_tokens) == (5, 7)


def test_same_prompt_again_decodes_its_last_token() -> None:
    library = ScriptedLibrary([])
    engine = engine_on(library)
    list(engine.stream([11, 12, 13], GREEDY))
    stats = list(engine.stream([11, 12, 13], GREEDY))[-1].stats
    assert stats is not None
    assert (stats.cached_tokens, library.held) == (2, 3)


def test_cache_that_cannot_be_cut_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ScriptedLibrary([])
    engine = engine_on(library)
    list(engine.stream([11, 12, 13], GREEDY))
    monkeypatch.setattr(library, "llama_memory_seq_rm", lambda *_arguments: False, raising=False)
    stats = list(engine.stream([11, 12, 99], GREEDY))[-1].stats
    assert stats is not None
    assert (stats.cached_tokens, library.held) == (0, 3)


@pytest.mark.parametrize(("tokens", "message"), [([], "empty"), ([1] * 65, "65 tokens, the context holds 64")])
def test_prompt_without_room_is_refused(tokens: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(engine_on(ScriptedLibrary([])).stream(tokens, GREEDY))


@pytest.mark.parametrize(("layers", "pieces"), [("0", [8, 2]), ("all", [4, 4, 2]), ("1", [4, 4, 2])])
def test_prompt_goes_to_a_gpu_in_micro_batches_so_that_ctrl_c_is_seen(layers: str, pieces: list[int]) -> None:
    library = ScriptedLibrary([])
    decoded: list[int] = []
    library.llama_decode = lambda _context, count: decoded.append(count) or 0  # type: ignore[method-assign,func-returns-value]
    library.llama_n_ubatch = lambda _context: 4  # type: ignore[attr-defined]
    settings = settle(machine=machine(), n_ctx_train=None, flags={"n_gpu_layers": layers})
    model = Model(lib=library, log=LibraryLog(shown=False), handle=1)
    context = Context(model=model, handle=1, n_ctx=64, n_batch=8, settings=settings)
    assert context.decode_prompt(list(range(10)), None)
    assert decoded == pieces


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_stop_splitter_finds_the_same_however_the_text_is_cut(size: int) -> None:
    text = "aab aabaa <end> tail"
    splitter, shown = StopSplitter(["aabaac", "<end>", ""]), ""
    for start in range(0, len(text), size):
        piece, found = splitter.feed(text[start : start + size])
        shown += piece
        if found:
            break
    assert shown == "aab aabaa "


def test_earliest_of_several_stop_strings_wins() -> None:
    assert StopSplitter(["cd", "bc"]).feed("abcd") == ("a", True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temp": -1.0},
        {"temp": float("nan")},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"seed": -1},
        {"repeat_penalty": 0.0},
        {"typical": 0.0},
        {"mirostat": 3},
        {"xtc_probability": 1.5},
        {"dry_base": 0.5},
        {"repeat_last_n": -1},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: float("inf")}},
    ],
)
def test_sampling_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SamplingOptions(**wrong)


@pytest.mark.parametrize("cut", range(1, 12))
def test_text_is_the_same_however_its_bytes_are_cut(cut: int) -> None:
    raw = "Zoë 🦙 ok".encode()
    stream, text = TextStream(), ""
    for start in range(0, len(raw), cut):
        piece = raw[start : start + cut]
        try:
            text += stream.feed(piece.decode())
        except UnicodeDecodeError:
            text += stream.feed(piece)
    assert text + stream.flush() == "Zoë 🦙 ok"


def test_whole_piece_behind_a_broken_character_marks_it() -> None:
    stream = TextStream()
    assert stream.feed("🦙".encode()[:2]) + stream.feed("a") == "\ufffda"


def test_fast_text_is_flushed_now_and_then_and_slow_text_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, flushes = iter([1.0, 1.001, 1.002, 1.1, 1.2]), []
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    monkeypatch.setattr(stream, "flush", lambda: flushes.append(stream.getvalue()), raising=False)
    shown = Shown(stream)
    for text in "abcde":
        shown.write(text)
    shown.end()
    assert flushes == ["a", "abcd", "abcde", "abcde"]


def test_library_log_keeps_errors_as_evidence_and_stays_silent(capsys: pytest.CaptureFixture[str]) -> None:
    log = LibraryLog(shown=False)
    log.write(2, b"loading\n")
    log.write(4, b"bad ")
    log.write(5, b"magic\n")
    assert log.tail() == "bad magic"
    assert capsys.readouterr() == ("", "")
