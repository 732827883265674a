"""The public class: a model in memory that talks, continues text, calls functions, and keeps what was said."""

from __future__ import annotations

from pathlib import Path

from runtime.conversation.tracker import Conversation
from runtime.llama.talking import Talking
from toolchain.base.errors import ArtifactError, UsageError

__all__ = ["LLaMa"]


class LLaMa(Talking):
    """A model in memory with one context and one conversation.

    Each class that it stands on adds one concern (``runtime/llama/``). It may be used beside a running asyncio loop
    (its calls block: ``asyncio.to_thread``) and from any thread, by one caller at a time: a call while a reply is
    running is refused with UsageError, whoever makes it. The attributes ``verbose`` and ``seed`` mean what they do in
    the constructor, and may be set at any time. Errors are ``toolchain.base.errors.FoundryError``: a message,
    ``evidence`` and a ``hint``.
    """

    def save_state(self, path: str | Path) -> None:
        """Write the conversation and what the cache holds of it to ``path``, in one atomic step, readable by you alone.

        A file of the cache's size (``load_resource_info`` tells it) for the tokens that were read so far. Raises
        UsageError when no token was read yet or ``path`` is a directory, MissingError when the disk is full or may not
        be written.
        """
        with self._gate.held("save_state"):
            if (target := Path(path)).is_dir():
                raise UsageError(f"{path} is a directory", hint=f"name a file, such as {target / 'talk.state'}")
            note = {"conversation": self._conversation.to_yaml(), "left_out": len(self._left_out)}
            self._engine.save_session(target, note)

    def load_state(self, path: str | Path) -> int:
        """Go on where ``save_state`` was called, in another process too; how many tokens the cache then holds.

        The model has to be the same file, with the same adapters; another build of llama.cpp or other cache types cost
        the time to read the tokens again. The conversation becomes the saved one. Raises UsageError for a file that is
        no state, or of another model, ArtifactError for one that is damaged; the conversation then stays as it was.
        Nothing in the file is executed; still, load no state that a stranger made.
        """
        from runtime.engine import session

        with self._gate.held("load_state"):
            note = session.read(Path(path)).note
            match note:
                case {"conversation": str(text), "left_out": int(left_out)}:
                    conversation = Conversation.from_yaml(text)
                case _:
                    raise ArtifactError(f"{path} holds no conversation", hint="it was saved by another program")
            tokens = self._engine.restore_session(Path(path))
            self._conversation.adopt(conversation)
            self._left_out = conversation.turns()[:left_out]
            return tokens
