"""The conversation with a model: its turns, its commands, and the loop at a terminal or on a pipe.

The text of each reply goes to stdout, everything else to stderr. Ctrl-C during a reply stops the reply and
keeps what there is of it; at the prompt it only says how to leave.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runtime.engine import Engine
from runtime.engine.reply import FinishReason, ReplyStats, stats_line
from runtime.engine.sampling import SamplingOptions
from runtime.engine.shown import Shown
from runtime.interrupts import interrupts_noted
from runtime.settings import near_miss
from runtime.template import ChatTemplate
from toolchain.base import console, files
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, FoundryError, UsageError
from toolchain.base.gguf import GgufHeader

PROMPT: Final = "> "
MORE: Final = "… "
HISTORY_LINES: Final = 1000

HELP: Final = """\
/help           this list
/reset          forget the conversation; the system message stays
/system TEXT    set the system message; alone it shows it, with - it clears it
/save FILE      write the conversation as JSON; /save! writes over a file that exists
/quit           leave (or Ctrl-D)
A line that ends in \\ goes on in the next. A message that begins with / is typed as //."""


@dataclass(kw_only=True)
class Turn:
    """What the user said and what the model answered, the whole or the part before Ctrl-C."""

    user: str
    assistant: str = ""


@dataclass(kw_only=True)
class Session:
    """A conversation with a loaded model. Turns before ``dropped`` no longer fit the context."""

    engine: Engine
    template: ChatTemplate
    sampling: SamplingOptions
    max_tokens: int | None
    stops: tuple[str, ...]
    threads: int
    system: str
    shows_stats: bool
    turns: list[Turn] = field(default_factory=list)
    dropped: int = 0

    def messages(self, *, first: int = 0) -> list[dict[str, str]]:
        """The conversation from turn ``first`` on, the system message always at its head."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[first:]:
            said.append({"role": "user", "content": turn.user})
            if turn is not self.turns[-1] or turn.assistant:
                said.append({"role": "assistant", "content": turn.assistant})
        return said

    def ask(self, text: str) -> FinishReason:
        """Stream the reply to ``text`` to stdout and keep the turn; a turn that fails is not kept."""
        self.turns.append(Turn(user=text))
        try:
            stats = self._reply(self.turns[-1])
        except BaseException:
            self.turns.pop()
            self.dropped = min(self.dropped, len(self.turns))
            raise
        if self.shows_stats:
            console.say(stats_line(stats, threads=self.threads))
        return stats.finish_reason

    def _reply(self, turn: Turn) -> ReplyStats:
        tokens = self._fit()
        pieces: list[str] = []
        out = Shown(sys.stdout)
        limit, stops = self.max_tokens, (*self.template.stops, *self.stops)
        try:
            with interrupts_noted() as interrupt:
                for chunk in self.engine.stream(
                    tokens, self.sampling, max_tokens=limit, stops=stops, interrupt=interrupt
                ):
                    text = chunk.text if pieces else chunk.text.lstrip()
                    if text:
                        pieces.append(text)
                        out.write(text)
                    stats = chunk.stats
            out.write("" if pieces and pieces[-1].endswith("\n") else "\n")
        finally:
            out.end()
        turn.assistant = "".join(pieces).rstrip()
        assert stats is not None
        return stats

    def _fit(self) -> list[int]:
        """Tokens of the prompt, the oldest turns left out until a quarter of the context is free for the reply.

        The last turn always stays; alone it may take all but the last token's room.
        """
        n_ctx = self.engine.n_ctx
        reserve = min(self.max_tokens or n_ctx, n_ctx // 4)
        before = self.dropped
        while True:
            tokens = self.engine.tokenize(self.template.render(self.messages(first=self.dropped)))
            alone = self.dropped == len(self.turns) - 1
            if len(tokens) + reserve <= n_ctx or (alone and len(tokens) < n_ctx):
                break
            if alone:
                raise UsageError(
                    f"this message makes a prompt of {len(tokens)} tokens; the context holds {n_ctx}",
                    hint="send it in parts, or start with a larger --n-ctx if the model has it",
                )
            self.dropped += 1
        if lost := self.dropped - before:
            turns = "turn was" if lost == 1 else f"{lost} turns were"
            console.warn(f"the oldest {turns} left out of the prompt: the context holds {n_ctx} tokens")
        return tokens


class Quit(Exception):
    """The user asked to leave."""


def converse(session: Session, header: GgufHeader) -> int:
    """Run the conversation to its end; the exit code.

    At a terminal it is 0. On a pipe each line is a turn, the first turn that failed gives the code, and
    Ctrl-C ends it.
    """
    if session.template.source is None:
        console.warn(
            f"{header.path.name} has no chat template: using plain `User:` and `Assistant:` lines; "
            "a model that was not tuned for dialogue answers oddly"
        )
    if sys.stdin.isatty():
        return _at_terminal(session, header)
    return _on_pipe(session)


def run_command(session: Session, line: str) -> None:
    """Carry out one ``/command``; Quit to leave, UsageError for one that is none."""
    name, _, rest = line.partition(" ")
    known = _commands()
    if name not in known:
        hint = near_miss(name, known) or "/help lists the commands; a message that begins with / is typed as //"
        raise UsageError(f"no command {name}", hint=hint)
    known[name](session, rest.strip())


def save(session: Session, name: str, *, overwrite: bool = False) -> Path:
    """Write the messages to ``name`` as a JSON list, in one atomic step; the path written."""
    if not name:
        raise UsageError("no file named", hint="/save talk.json")
    path = files.expand(name)
    if path.is_dir():
        raise UsageError(f"{path} is a directory", hint=f"/save {path / 'talk.json'}")
    if not path.parent.is_dir():
        raise UsageError(f"no directory {path.parent}", hint="/save talk.json writes into the current one")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists", hint=f"/save! {name} writes over it")
    try:
        files.write_json(path, session.messages())
    except OSError as error:
        raise UsageError(f"{path} cannot be written", evidence=str(error)) from error
    return path


def joined_lines(lines: Iterator[str]) -> Iterator[str]:
    """Lines with those that end in a backslash joined to the next."""
    parts: list[str] = []
    for line in lines:
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts = []
    if parts:
        yield "\n".join(parts)


def _at_terminal(session: Session, header: GgufHeader) -> int:
    console.say(f"{header.path.name}, {session.engine.n_ctx} tokens of context. /help lists the commands.")
    with _line_editing():
        while True:
            try:
                _take(session, _typed())
            except (EOFError, Quit):
                return 0
            except FoundryError as error:
                console.failure(error)
            except KeyboardInterrupt:
                sys.stderr.write("\n")
                console.say("Ctrl-D or /quit leaves; Ctrl-C stops a reply")


def _on_pipe(session: Session) -> int:
    status = 0
    lines = (raw.decode("utf-8", "replace").rstrip("\r\n") for raw in sys.stdin.buffer)
    try:
        for text in joined_lines(lines):
            try:
                if _take(session, text) == "cancelled":
                    return INTERRUPTED_EXIT_CODE
            except FoundryError as error:
                console.failure(error)
                status = status or error.exit_code
    except Quit:
        pass
    return status


def _take(session: Session, text: str) -> FinishReason | None:
    """One turn or one command; None where there was no reply."""
    if not text.strip():
        return None
    if text.startswith("/") and not text.startswith("//"):
        run_command(session, text.strip())
        return None
    return session.ask(text.removeprefix("/") if text.startswith("//") else text)


def _typed() -> str:
    """One message from the terminal, its continued lines joined."""
    prompts = iter((PROMPT,))
    return next(joined_lines(iter(lambda: _input(next(prompts, MORE)), None)))


def _input(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)  # stdout belongs to the replies
    sys.stderr.flush()
    return input()


def _commands() -> dict[str, Callable[[Session, str], None]]:
    return {
        "/help": lambda _session, _rest: console.say(HELP),
        "/reset": _reset,
        "/save": lambda session, rest: console.say(f"saved {save(session, rest)}"),
        "/save!": lambda session, rest: console.say(f"saved {save(session, rest, overwrite=True)}"),
        "/system": _set_system,
        "/quit": _quit,
        "/exit": _quit,
    }


def _reset(session: Session, _rest: str) -> None:
    session.turns.clear()
    session.dropped = 0
    console.say("the conversation is forgotten")


def _set_system(session: Session, text: str) -> None:
    if text:
        session.system = "" if text == "-" else text
    console.say(f"system message: {session.system}" if session.system else "no system message")


def _quit(_session: Session, _rest: str) -> None:
    raise Quit


@contextmanager
def _line_editing() -> Iterator[None]:
    """Editing and a history kept under FOUNDRY_HOME, where this Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    kept = files.foundry_home() / "chat-history"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(kept)
    except OSError:
        pass  # the first time, or a place we may not read
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        try:
            readline.write_history_file(kept)
            kept.chmod(0o600)
        except OSError as error:
            console.warn(f"the history of typed lines was not kept: {error}")
