"""A talk with a name: kept after each turn, and taken up again in a moment.

    FOUNDRY_HOME/sessions/NAME/talk.yaml     the conversation, written after each change of it
    FOUNDRY_HOME/sessions/NAME/state.bin     what the model had read: it spares the reading, nothing else
    FOUNDRY_HOME/sessions/NAME/lock          held while somebody talks

Each file is replaced whole and readable by its owner alone. The state may be older than the conversation, or of
another model: what it lacks is read again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runtime.conversation.tracker import Conversation
from runtime.interrupts import interrupts_noted
from toolchain.base import console, files
from toolchain.base.errors import FoundryError, UsageError

if TYPE_CHECKING:
    from runtime.chat.talk import Talk
    from runtime.engine import Engine

STATE_SHARE: Final = 0.02
"""Of the time that passes, at most so much goes into states before the end: a large one is written less often."""
QUIET_S: Final = 0.5
"""A state that is written faster leaves no line."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SavedTalk:
    """A session that nobody else has; made by ``open_session``. ``earlier`` is what was said in it before."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.conversation_path = folder / "talk.yaml"
        self.state_path = folder / "state.bin"
        self.earlier = Conversation.load(self.conversation_path) if self.conversation_path.exists() else None
        self._state_due = 0.0
        self._stale = False

    @contextmanager
    def keeping(self, talk: Talk) -> Iterator[None]:
        """Put what was said before into ``talk``; keep each change of it from now on, and the state at the end.

        A state that does not go with the model is told and left. A disk that fails is told each time, and the talk
        goes on.
        """
        if self.earlier is None:
            console.say(f"session {self.name}: new")
        else:
            self._take_up(talk, self.earlier)
        talk.session = self

        def keep() -> None:
            self._stale = True
            with self._told("conversation"):
                self.keep(talk, state=time.monotonic() >= self._state_due)

        talk.changed.append(keep)
        try:
            yield
        finally:
            talk.changed.remove(keep)
            if self._stale:
                with self._told("state"), console.step(f"keep session {self.name}", quiet_s=QUIET_S):
                    self._keep_state(talk)

    def keep(self, talk: Talk, *, state: bool = True) -> None:
        """Write the conversation now, and the state with it. MissingError when the disk does not take it."""
        text = talk.conversation.to_yaml()
        with files.disk_errors(self.conversation_path), files.staged(self.conversation_path) as partial:
            partial.touch(mode=0o600)
            partial.write_bytes(text.encode())
        if state:
            self._keep_state(talk)

    def described(self, talk: Talk) -> str:
        """Its name, turns, sizes and place."""
        named = ((self.conversation_path, "text"), (self.state_path, "state"))
        sizes = [f"{console.format_bytes(path.stat().st_size)} of {what}" for path, what in named if path.exists()]
        return f"session {self.name}: {', '.join([_turns(talk.conversation), *sizes])} in {self.folder}"

    def _take_up(self, talk: Talk, earlier: Conversation) -> None:
        system = talk.conversation.system
        talk.conversation.adopt(earlier)
        if system:
            talk.conversation.system = system
        started = time.monotonic()
        restored = self._restore_state(talk)
        how = f", restored in {time.monotonic() - started:.1f} s" if restored else ""
        console.say(f"session {self.name}: {_turns(earlier)}{how}")

    def _restore_state(self, talk: Talk) -> bool:
        engine = _engine(talk)
        if engine is None or not self.state_path.exists():
            return False
        try:
            with interrupts_noted() as interrupt:
                engine.restore_session(self.state_path, interrupt)
        except FoundryError as error:
            console.warn(f"what was said is read anew: {error.message}")
            return False
        return True

    def _keep_state(self, talk: Talk) -> None:
        engine = _engine(talk)
        if engine is None or not engine.context.cached:
            return
        started = time.monotonic()
        engine.save_session(self.state_path)
        ended = time.monotonic()
        self._state_due = ended + (ended - started) / STATE_SHARE
        self._stale = False

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except FoundryError as error:
            console.warn(f"the {what} of session {self.name} was not kept: {error.message}")


@contextmanager
def open_session(name: str) -> Iterator[SavedTalk]:
    """The session ``name``, new or as it was left; nobody else can open it meanwhile.

    Raises UsageError for a name that is none, while somebody else has it, and for a conversation that cannot be read.
    """
    folder = session_folder(name)

    def refuse(holder: str) -> None:
        raise UsageError(
            f"somebody talks in the session {name} already", evidence=f"process {holder}", hint="take another name"
        )

    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with files.locked(folder / "lock", on_wait=refuse):
        files.sweep(folder)
        yield SavedTalk(name, folder)


def session_folder(name: str) -> Path:
    """Where the session is kept; UsageError for a name that is none."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a session",
            hint="letters, digits, dots, dashes and underscores, a letter or digit first, 64 at most",
        )
    return files.foundry_home() / "sessions" / name


def _engine(talk: Talk) -> Engine | None:
    """The engine that answers, if it is in this process."""
    from runtime.chat.local import LocalBackend

    return talk.backend.engine if isinstance(talk.backend, LocalBackend) else None


def _turns(conversation: Conversation) -> str:
    count = len(conversation.turns())
    return "1 turn" if count == 1 else f"{count} turns"
