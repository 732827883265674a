"""The chat at a terminal: what is typed is edited, remembered and completed; nothing but the user ends it."""

from __future__ import annotations

import sys
import termios
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from prompt_toolkit import PromptSession, prompt
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from runtime.chat.commands import COMMANDS, Quit, is_command, run_command, unescaped
from runtime.chat.history import KeptHistory
from runtime.chat.meter import Level, meter
from runtime.chat.pipe import joined_lines
from runtime.chat.screen import Screen, can_draw
from runtime.chat.talk import Talk
from toolchain.base import console, files
from toolchain.base.errors import FoundryError
from toolchain.base.harmless import harmless

PROMPT: Final = "> "
MORE: Final = "… "
EDIT: Final = "edit> "
LEAVING: Final = "Ctrl-D or /quit leaves; Ctrl-C stops a reply"
NAMES_A_FILE: Final = frozenset({"/lora", "/image", "/export", "/save", "/model"})

_COLORS: Final[dict[Level, str]] = {"calm": "ansigreen", "filling": "ansiyellow", "full": "ansired bold"}
_STYLE: Final = Style.from_dict({"bottom-toolbar": "noreverse"})
_SEPARATOR: Final = "  "


def at_terminal(talk: Talk, screen: Screen) -> int:
    """Talk until the user leaves; 0. Errors are told, and the talk goes on.

    Needs a terminal at stdin. Where stdout is none, or one that cannot move its cursor, lines are typed plainly.
    """
    n_ctx = talk.backend.n_ctx
    context = f", {n_ctx:,} tokens of context" if n_ctx else ""
    shell = EditedShell(talk) if can_draw(sys.stdout) else PlainShell()
    console.say(f"{harmless(talk.backend.name)}{context}. /help lists the commands.{shell.keys}")
    with shell.keys_unseen():
        while True:
            try:
                _take(talk, screen, shell)
            except (EOFError, Quit):
                return 0
            except FoundryError as error:
                console.failure(error)
            except KeyboardInterrupt:
                console.say(LEAVING)


def _take(talk: Talk, screen: Screen, shell: PlainShell | EditedShell) -> None:
    """One message or one command, to its end."""
    text = shell.read()
    if not text.strip():
        return
    asked = run_command(talk, text, shell) if is_command(text) else talk.ask(unescaped(text))
    if asked is not None:
        screen.show(asked)


class _Asking(ABC):
    """The Shell that commands see, on whatever way there is to ask for a line."""

    @abstractmethod
    def ask(self, question: str) -> str:
        """A line that the user types after ``question``; EOFError and KeyboardInterrupt for Ctrl-D and Ctrl-C."""

    @abstractmethod
    def edit(self, initial: str) -> str:
        """The text as the user changes it."""

    def edit_text(self, initial: str) -> str | None:
        """The text as the user changes it; None after Ctrl-C or Ctrl-D."""
        try:
            return self.edit(initial)
        except (EOFError, KeyboardInterrupt):
            return None

    def show(self, text: str) -> None:
        console.say(harmless(text))

    def confirm(self, question: str) -> bool:
        try:
            return _is_yes(self.ask(f"{question} [y/N] "))
        except (EOFError, KeyboardInterrupt):
            return False


class PlainShell(_Asking):
    """Lines as the terminal itself gives them; the prompt goes to stderr where stdout belongs to the replies."""

    keys = ""

    def read(self) -> str:
        """The next message; its line goes on where it ends in a backslash. EOFError at the end."""
        prompts = iter((PROMPT,))
        return next(joined_lines(iter(lambda: _typed(next(prompts, MORE)), None)))

    @contextmanager
    def keys_unseen(self) -> Iterator[None]:
        """The terminal shows them itself."""
        yield

    def ask(self, question: str) -> str:
        return _typed(question)

    def edit(self, initial: str) -> str:
        self.show(initial)
        return _typed(EDIT)


class EditedShell(_Asking):
    """Lines edited by prompt_toolkit, with a history, completion, and a bar that tells how full the context is."""

    keys = "\nEnter sends, Alt-Enter or Ctrl-J adds a line, Ctrl-C stops a reply."

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._bar: StyleAndTextTuples = []
        self._session: PromptSession[str] = PromptSession(
            history=KeptHistory(files.foundry_home() / "chat-history"),
            completer=ChatCompleter(),
            complete_while_typing=Condition(lambda: is_command(get_app().current_buffer.text)),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation=lambda _width, _line, wraps: " " * len(MORE) if wraps else MORE,
            bottom_toolbar=lambda: self._bar,
            style=_STYLE,
        )

    def read(self) -> str:
        """The next message; EOFError and KeyboardInterrupt for Ctrl-D and Ctrl-C."""
        self._bar = _bar(self._talk, self._session.app.output.get_size().columns)
        return self._session.prompt(PROMPT)

    @contextmanager
    def keys_unseen(self) -> Iterator[None]:
        """While the body runs, keys are shown by the prompt alone: those that come before it wait for it."""
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        quiet = termios.tcgetattr(descriptor)
        quiet[0] &= ~termios.ICRNL
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSANOW, before)

    def ask(self, question: str) -> str:
        return prompt(question)

    def edit(self, initial: str) -> str:
        return self._session.prompt(EDIT, default=initial)


class ChatCompleter(Completer):
    """Names of commands, and of files after those that take one."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not is_command(text) or "\n" in text:
            return
        name, space, rest = text.partition(" ")
        if not space:
            for command in COMMANDS.values():
                if command.name.startswith(name):
                    yield Completion(
                        command.name, start_position=-len(name), display=command.usage, display_meta=command.help
                    )
        elif name.removesuffix("!") in NAMES_A_FILE:
            yield from self._paths.get_completions(Document(rest.lstrip()), complete_event)


def _keys() -> KeyBindings:
    """Enter sends, except behind a backslash, which it turns into a line break; Alt-Enter and Ctrl-J add a line."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end_of_line:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _add_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _bar(talk: Talk, columns: int) -> StyleAndTextTuples:
    """The model, how full its context is, and the session's name; the model's name gives way where there is no room."""
    try:
        used = talk.used_tokens()
    except FoundryError:
        used = None  # asking will tell
    gauge = meter(used, talk.backend.n_ctx)
    session = f"{_SEPARATOR}session {talk.session.name}" if talk.session else ""
    room = columns - 1 - len(gauge.text) - len(_SEPARATOR) - len(session)
    name = harmless(talk.backend.name)
    if len(name) > room:
        name = f"{name[: max(room - 1, 0)]}…"
    model = f"{name}{_SEPARATOR}" if room > 3 else ""
    return [("", model), (_COLORS[gauge.level], gauge.text), ("", session)]


def _typed(question: str) -> str:
    """A line of the terminal, typed without an editor."""
    if sys.stdout.isatty():
        return input(question)
    sys.stderr.write(question)
    sys.stderr.flush()
    return input()


def _is_yes(answer: str) -> bool:
    return answer.strip().lower() in ("y", "yes")
