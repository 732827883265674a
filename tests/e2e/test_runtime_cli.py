"""``python -m runtime`` as a user runs it: child processes on a real demo model, pipes, and a terminal."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.front_door import runtime
from tests.pseudo_terminal import forked
from toolchain.base.files import PROJECT_ROOT
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain

PROMPT = "The class statement"
PATIENCE_S = 120
TIRELESS = ("--temp", "0", "--n-ctx", "32768")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    # Threads that wait for each other by spinning crawl when other work holds a CPU: let them sleep soon.
    patient = {"GOMP_SPINCOUNT": "100"}
    own = {
        "FOUNDRY_HOME": str(tmp_path / "home"),
        "FOUNDRY_NO_TUNE": "1",
        "TERM": "dumb",
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    return {**clean, **patient, **own}


@pytest.fixture(scope="session")
def tireless_gguf(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with its context length overwritten by 32,768: replies long enough to be interrupted."""
    path = tmp_path_factory.mktemp("tireless") / "tireless.gguf"
    path.write_bytes(with_context_length(demo_gguf, 32_768))
    return path


def with_context_length(model: Path, n_ctx: int) -> bytes:
    """The model's bytes with its training context overwritten in place."""
    header = read_header(model)
    key = f"{header.architecture}.context_length".encode()
    raw = bytearray(model.read_bytes())
    at = raw.index(key) + len(key)
    assert struct.unpack_from("<II", raw, at) == (4, header.n_ctx_train)
    struct.pack_into("<I", raw, at + 4, n_ctx)
    return bytes(raw)


@pytest.mark.parametrize(
    "verb", [("complete", "-p", PROMPT), ("complete", "-p", PROMPT, "--json"), ("chat",), ("plan",)], ids=" ".join
)
def test_full_disk_behind_stdout_is_told(environment: dict[str, str], demo_gguf: Path, verb: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "runtime", verb[0], demo_gguf, *verb[1:]],
            input="hello\n",
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("verb", [("complete", "-n", "5"), ("chat", "-n", "5")], ids=lambda verb: verb[0])
def test_closed_stream_is_an_empty_one(
    environment: dict[str, str], demo_gguf: Path, verb: tuple[str, ...], closed: str
) -> None:
    argv = [sys.executable, "-m", "runtime", verb[0], demo_gguf, *verb[1:]]
    shell = ["sh", "-c", f'"$@" {closed}', "sh", *map(str, argv)]
    done = subprocess.run(
        shell, env=environment, input="hello\n", capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def complete_json(environment: dict[str, str], model: Path, *arguments: object, **options: Any) -> dict[str, Any]:
    done = runtime(environment, "complete", model, "-p", PROMPT, "--json", *arguments, **options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_first_start_measures_and_the_figures_come_last(environment: dict[str, str], demo_gguf: Path) -> None:
    done = runtime({**environment, "FOUNDRY_NO_TUNE": ""}, "complete", demo_gguf, "-p", PROMPT, "-n", 4)
    assert done.returncode == 0, done.stderr
    told, figures = done.stderr.splitlines()
    assert "once (seconds; --no-tune skips it)" in told
    assert figures.startswith("4 tokens, ")
    again = runtime(
        {**environment, "FOUNDRY_NO_TUNE": ""}, "complete", demo_gguf, "-p", PROMPT, "-n", 4, "--n-threads", 1
    )
    assert again.returncode == 0, again.stderr
    assert "; 1 thread" in again.stderr


def test_complete_prints_text_and_one_line_of_figures(environment: dict[str, str], demo_gguf: Path) -> None:
    done = runtime(environment, "complete", demo_gguf, "-p", PROMPT, "-n", 16)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.search(r"^\d+ tokens?, \d+ t/s generation; \d+ prompt tokens \(0 cached\)", done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_seed_reproduces_and_another_differs(environment: dict[str, str], demo_gguf: Path) -> None:
    first, again, other = (complete_json(environment, demo_gguf, "-n", 32, "--seed", n)["text"] for n in (7, 7, 8))
    assert first == again != other


def test_reported_seed_gives_the_reply_again(environment: dict[str, str], demo_gguf: Path) -> None:
    first = complete_json(environment, demo_gguf, "-n", 24)
    assert complete_json(environment, demo_gguf, "-n", 24, "--seed", first["seed"])["text"] == first["text"]


def test_streamed_text_is_the_text_of_json_also_where_characters_break(
    environment: dict[str, str], demo_gguf: Path
) -> None:
    wild = ("--temp", 5, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--seed", 3, "-n", 64)
    streamed = runtime(environment, "complete", demo_gguf, "-p", PROMPT, *wild).stdout
    assert streamed.removesuffix("\n") == complete_json(environment, demo_gguf, *wild)["text"].removesuffix("\n")


def test_json_holds_the_figures_and_the_settings(environment: dict[str, str], demo_gguf: Path) -> None:
    done = complete_json(environment, demo_gguf, "-n", 8, "--temp", 0, "--n-ctx", 128)
    assert done["completion_tokens"] <= 8
    assert done["prompt_tokens"] > 1
    assert done["finish_reason"] in ("stop", "length")
    assert min(done["prompt_tps"], done["generation_tps"], done["ttft_ms"]) > 0
    settings = {setting["name"]: setting for setting in done["settings"]}
    assert settings["n_ctx"] == {"name": "n_ctx", "value": 128, "origin": "flag", "reason": "--n-ctx"}


def test_micro_batches_do_not_change_the_greedy_reply(environment: dict[str, str], demo_gguf: Path) -> None:
    greedy = ("-n", 12, "--temp", 0)
    pieces = ("--n-batch", 2, "--n-ubatch", 2)
    whole = complete_json(environment, demo_gguf, *greedy)
    assert complete_json(environment, demo_gguf, *greedy, *pieces)["text"] == whole["text"]


def test_greedy_text_is_that_of_llama_completion(
    environment: dict[str, str], demo_gguf: Path, toolchain: Toolchain
) -> None:
    theirs = subprocess.run(
        [toolchain.bin_dir / "llama-completion", "-m", demo_gguf, "-p", PROMPT, "-n", "24", "--temp", "0", "-no-cnv"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    ours = complete_json(environment, demo_gguf, "-n", 24, "--temp", 0)["text"]
    shown = theirs.stdout.strip()
    # llama-completion writes through a logger that its end does not wait for: its last tokens may be missing
    assert len(shown) > len(PROMPT) + 20
    assert (PROMPT + ours).strip().startswith(shown)


def test_stop_string_ends_the_reply_and_is_not_shown(environment: dict[str, str], demo_gguf: Path) -> None:
    greedy = ("-n", 40, "--temp", 0)
    text = complete_json(environment, demo_gguf, *greedy)["text"]
    stop = text[len(text) // 2 :][:3]
    stopped = complete_json(environment, demo_gguf, *greedy, "--stop", stop)
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_prompt_may_come_through_a_pipe(environment: dict[str, str], demo_gguf: Path) -> None:
    greedy = ("-n", 12, "--temp", 0, "--no-stats")
    piped = runtime(environment, "complete", demo_gguf, *greedy, given=f"{PROMPT}\n")
    named = runtime(environment, "complete", demo_gguf, *greedy, "-p", PROMPT)
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, named.stdout, "")


def test_verbose_shows_the_librarys_log_and_only_then(environment: dict[str, str], demo_gguf: Path) -> None:
    done = runtime(environment, "complete", demo_gguf, "-p", PROMPT, "-n", 1, "--verbose")
    assert "llama_model_loader" in done.stderr
    assert "llama_model_loader" not in done.stdout


def test_reader_that_leaves_is_no_error(environment: dict[str, str], demo_gguf: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "runtime", "complete", demo_gguf, "-p", PROMPT, "-n", "-1"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == ""
    assert child.wait(PATIENCE_S) == 0


def hostile_file(path: Path) -> Path:
    """Announces 2**60 keys."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60) + b"\0" * 64)
    return path


@pytest.mark.parametrize("verb", ["complete", "chat"])
def test_lying_header_is_refused_before_any_library_is_imported(
    environment: dict[str, str], tmp_path: Path, verb: str
) -> None:
    path = hostile_file(tmp_path / "lie.gguf")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "runtime", verb, path],
        env=environment,
        input=PROMPT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 6
    assert done.stdout == ""
    assert "lie.gguf" in done.stderr
    assert not re.search(r"\|\s+(llama_cpp|numpy)\b", done.stderr)


def test_help_imports_nothing_heavy(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "runtime", "chat", "--help"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0
    assert "--n-ctx" in done.stdout
    assert not re.search(r"\|\s+(llama_cpp|numpy|jinja2|rich|psutil|yaml)\b", done.stderr)


def test_wrong_values_are_usage_errors(environment: dict[str, str], demo_gguf: Path) -> None:
    trained = read_header(demo_gguf).n_ctx_train
    for arguments, said in [
        (("--n-ctx", 10**6), f"trained with {trained}"),
        (("--type-k", "q8-0"), "did you mean q8_0?"),
        (("--top-p", 7), "--top-p"),
        (("-p", "word " * 2 * (trained or 4096)), "the context holds"),
    ]:
        done = runtime(environment, "complete", demo_gguf, "-p", PROMPT, *arguments)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert done.stdout == ""


def test_missing_model_is_a_usage_error_with_its_neighbour(environment: dict[str, str], demo_gguf: Path) -> None:
    done = runtime(environment, "complete", demo_gguf.with_suffix(".ggu"), "-p", PROMPT)
    assert done.returncode == 2
    assert f"did you mean {demo_gguf.name}?" in done.stderr


def test_model_that_the_library_refuses_is_told_in_its_words(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    architecture = read_header(demo_gguf).architecture
    strange = architecture[::-1]
    path = tmp_path / "strange.gguf"
    raw = demo_gguf.read_bytes().replace(f"{architecture}.".encode(), f"{strange}.".encode())
    at = raw.index(architecture.encode(), raw.index(b"general.architecture"))
    path.write_bytes(raw[:at] + strange.encode() + raw[at + len(strange) :])
    done = runtime(environment, "complete", path, "-p", PROMPT)
    assert done.returncode == 6
    assert f"unknown model architecture: '{strange}'" in done.stderr


def test_context_beyond_the_machines_memory_is_refused_and_not_killed(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    path = tmp_path / "vast.gguf"
    path.write_bytes(with_context_length(demo_gguf, 2**31 - 1))
    done = runtime(environment, "complete", path, "-p", PROMPT, "--n-ctx", 2**31 - 1)
    assert done.returncode == 7
    assert "does not fit in memory" in done.stderr
    assert "--n-ctx" in done.stderr


def test_library_of_another_build_is_told_and_names_the_build(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    done = runtime({**environment, "LLAMA_CPP_LIB_PATH": str(tmp_path)}, "complete", demo_gguf, "-p", PROMPT)
    assert done.returncode == 3
    assert "`./inv build`" in done.stderr


def test_prompt_is_interrupted_between_graph_nodes(environment: dict[str, str], tireless_gguf: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "runtime", "complete", tireless_gguf, *TIRELESS, "-n", "1", "--verbose"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stderr is not None
    child.stdin.write("word " * 8_000)
    child.stdin.close()
    child.stdin = None
    for line in child.stderr:
        if "reserve took" in line:  # the context is ready
            break
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE_S)
    assert (child.returncode, out.strip()) == (130, ""), err
    assert "0 tokens" in err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_threads_follow_the_affinity_mask(environment: dict[str, str], demo_gguf: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    done = complete_json(environment, demo_gguf, "-n", 1, preexec_fn=lambda: os.sched_setaffinity(0, {cpu}))
    settings = {setting["name"]: setting["value"] for setting in done["settings"]}
    assert (settings["n_threads"], settings["n_threads_batch"]) == (1, 1)


def test_chat_on_a_pipe_answers_each_line_and_ends(
    environment: dict[str, str], demo_gguf: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = f"What is a class?\n\nAnd a\\\nfunction?\n/save {saved}\n"
    done = runtime(environment, "chat", demo_gguf, "-n", 12, "--seed", 1, "--system", "Be brief.", given=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert len(re.findall(r"t/s generation", done.stderr)) == 2
    assert [message["role"] for message in json.loads(saved.read_text())] == [
        "system",
        *("user", "assistant") * 2,
    ]
    assert json.loads(saved.read_text())[3]["content"] == "And a\nfunction?"


def test_second_turn_reuses_the_first_ones_cache(environment: dict[str, str], demo_gguf: Path) -> None:
    done = runtime(environment, "chat", demo_gguf, "-n", 8, "--temp", 0, given="What is a class?\nWhy?\n")
    cached = [int(count) for count in re.findall(r"\((\d+) cached\)", done.stderr)]
    assert cached[0] == 0
    assert cached[1] > 5


def test_overflowing_context_drops_old_turns_and_goes_on(environment: dict[str, str], demo_gguf: Path) -> None:
    lines = "".join(f"Tell me about number {n} and what it means.\n" for n in range(8))
    done = runtime(environment, "chat", demo_gguf, "--n-ctx", 96, "-n", 24, given=lines)
    assert done.returncode == 0, done.stderr
    assert "left out of the prompt" in done.stderr
    assert len(re.findall(r"t/s generation", done.stderr)) == 8


def test_message_larger_than_the_context_is_told_and_the_chat_goes_on(
    environment: dict[str, str], demo_gguf: Path
) -> None:
    lines = f"{'word ' * 200}\nWhat is a class?\n"
    done = runtime(environment, "chat", demo_gguf, "--n-ctx", 64, "-n", 8, given=lines)
    assert done.returncode == 2
    assert "the context holds 64" in done.stderr
    assert len(re.findall(r"t/s generation", done.stderr)) == 1


def test_unknown_command_on_a_pipe_gives_its_code(environment: dict[str, str], demo_gguf: Path) -> None:
    done = runtime(environment, "chat", demo_gguf, given="/sav x\n/quit\nnever asked\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean /save?" in done.stderr


def test_interrupted_completion_keeps_its_text_and_exits_130(environment: dict[str, str], tireless_gguf: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "runtime", "complete", tireless_gguf, "-p", PROMPT, *TIRELESS, "-n", "-1"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert child.stdout is not None
    shown = b""
    while len(shown.strip()) < 20 and (more := child.stdout.read(1)):
        shown += more
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 130, err
    assert len(shown.strip()) >= 20
    assert b"stopped" in err
    assert b"Traceback" not in err


class Terminal:
    """A child on a pseudo-terminal: what it showed, and keys to press."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def wait_for(self, pattern: str, *, after: int = 0) -> int:
        """Read until ``pattern`` shows behind position ``after``; the position behind it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.compile(pattern).search(self.shown, after)):
            assert time.monotonic() < deadline, f"{pattern!r} did not show in {self.shown!r}"
            if not self._read(PATIENCE_S):
                raise AssertionError(f"the child ended before {pattern!r} showed: {self.shown!r}")
        return found.end()

    def interrupt_until(self, pattern: str, *, after: int) -> int:
        """Ctrl-C at a prompt. CPython's readline misses one that comes before it waits for keys, so it may repeat."""
        for _ in range(PATIENCE_S):
            self.press("\x03")
            while self._read(1.0):
                if re.compile(pattern).search(self.shown, after):
                    return len(self.shown)
        raise AssertionError(f"{pattern!r} did not show in {self.shown!r}")

    def drain(self) -> None:
        while self._read(PATIENCE_S):
            pass

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.descriptor], [], [], timeout_s)[0]:
            return False
        try:
            raw = os.read(self.descriptor, 1 << 16)
        except OSError:  # Linux: the other end was closed
            return False
        self.shown += raw.decode("utf-8", "replace")
        return bool(raw)


@contextmanager
def on_terminal(environment: dict[str, str], arguments: Sequence[object]) -> Iterator[tuple[int, Terminal]]:
    """(process id, terminal) of ``python -m runtime ...``; killed at the end if it still runs."""
    with forked(["-m", "runtime", *map(str, arguments)], environment) as (process, descriptor):
        yield process, Terminal(descriptor)


def test_ctrl_c_at_a_terminal_stops_the_reply_and_not_the_program(
    environment: dict[str, str], tireless_gguf: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    with on_terminal(environment, ["chat", tireless_gguf, *TIRELESS]) as (process, terminal):
        at = terminal.wait_for(r"> ")
        at = terminal.interrupt_until(r"Ctrl-D or /quit leaves[^\n]*\n\S*> ", after=at)
        # The model may end a reply by itself; one of these runs on until it is stopped.
        for question in ("What is a class?", "Why?", "the the the", "not not not"):
            terminal.press(f"{question}\n")
            at = terminal.wait_for(rf"{re.escape(question)}\r\n.*\w", after=at)
            terminal.press("\x03")
            at = terminal.wait_for(r"t/s generation[^>]*threads?[^\n]*\n", after=at)  # the line may be folded
            if terminal.shown.endswith("stopped\r\n", 0, at):
                break
            terminal.wait_for(r"> ", after=at)
        else:
            pytest.fail(f"no reply was stopped: {terminal.shown!r}")
        at = terminal.wait_for(r"> ", after=at)
        terminal.press(f"/save {saved}\n")
        at = terminal.wait_for(r"saved", after=at)
        terminal.wait_for(r"> ", after=at)
        terminal.press("/quit\n")
        terminal.drain()
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    last = json.loads(saved.read_text())[-1]
    assert last["role"] == "assistant"
    assert last["content"]
    assert "Traceback" not in terminal.shown


def test_ctrl_d_leaves_and_the_typed_lines_are_remembered(environment: dict[str, str], demo_gguf: Path) -> None:
    for _ in range(2):
        with on_terminal(environment, ["chat", demo_gguf, "-n", "4"]) as (process, terminal):
            at = terminal.wait_for(r"> ")
            terminal.press("/help\n")
            at = terminal.wait_for(r"/reset", after=at)
            terminal.wait_for(r"> ", after=at)
            terminal.press("\x04")
            terminal.drain()
            assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    history = Path(environment["FOUNDRY_HOME"]) / "chat-history"
    if history.exists():  # where this Python has readline
        assert "/help" in history.read_text()
        assert history.stat().st_mode & 0o077 == 0
