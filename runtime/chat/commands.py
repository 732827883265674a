"""The commands of the chat: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from runtime.chat.backend import Piece
from runtime.conversation.messages import text_of
from runtime.settings import near_miss
from toolchain.base import console
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.chat.talk import Talk

Reply: TypeAlias = Generator[Piece, None, None]

LINES: Final = "A line that ends in \\ goes on in the next. A message that begins with / is typed as //."

_EXCERPT: Final = 60


class Quit(Exception):
    """The user asked to leave."""


class Shell(Protocol):
    """Where the user sits."""

    def edit_text(self, initial: str) -> str | None:
        """The text as the user changes it; None where nobody can, or the user gave up."""

    def show(self, text: str) -> None:
        """What a command answers; it may have several lines."""

    def confirm(self, question: str) -> bool:
        """Whether the user says yes; False where nobody can be asked."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: ``usage`` as typed, ``help`` in a few words; ``run`` gets what stands behind the name."""

    name: str
    usage: str
    help: str
    run: Callable[[Talk, str, Shell], Reply | None]


def run_command(talk: Talk, line: str, shell: Shell) -> Reply | None:
    """Carry out one ``/command``: the reply that it asks for, to be shown as any, or None.

    Raises Quit to leave, UsageError for a command that is none, and what the command itself raises.
    """
    name, rest = _parts(line)
    command = _find(name)
    if rest and command.usage == command.name:
        raise UsageError(f"{name} takes nothing behind it", hint=f"{command.name}: {command.help}")
    return command.run(talk, rest, shell)


def is_command(line: str) -> bool:
    """Whether a line is a command, and no message."""
    return line.startswith("/") and not line.startswith("//")


def unescaped(line: str) -> str:
    """The message that a line stands for: ``//`` at its beginning means a slash."""
    return line[1:] if line.startswith("//") else line


def unquoted(name: str) -> str:
    """The name of a file without the quotes around it, which one with spaces may have."""
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'" else name


def _parts(line: str) -> tuple[str, str]:
    """The name, and what stands behind it: texts keep their line breaks."""
    words = line.strip().split(maxsplit=1)
    return words[0], words[1] if len(words) > 1 else ""


def _find(name: str) -> Command:
    if name not in _BY_NAME:
        hint = near_miss(name, _BY_NAME) or "/help lists the commands; a message that begins with / is typed as //"
        raise UsageError(f"no command {name}", hint=hint)
    return _BY_NAME[name]


def _help(_talk: Talk, name: str, shell: Shell) -> None:
    if name:
        command = _find(f"/{name.removeprefix('/')}")
        shell.show(f"{command.usage}\n  {command.help}")
        return
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.help}" for command in COMMANDS.values()]
    shell.show("\n".join([*lines, LINES]))


def _quit(_talk: Talk, _rest: str, _shell: Shell) -> None:
    raise Quit


def _reset(talk: Talk, _rest: str, _shell: Shell) -> None:
    talk.reset()
    console.say("the conversation is forgotten")


def _system(talk: Talk, text: str, shell: Shell) -> None:
    if text:
        talk.set_system("" if text == "-" else text)
    shell.show(f"system message: {talk.conversation.system}" if talk.conversation.system else "no system message")


def _retry(talk: Talk, _rest: str, _shell: Shell) -> Reply:
    if talk.options.sampling.temp == 0:
        console.warn("the temperature is 0: the reply will be the same (/params temp=0.8)")
    return talk.retry()


def _edit(talk: Talk, text: str, shell: Shell) -> Reply | None:
    before = talk.last_text()
    edited = text or shell.edit_text(before)
    if not edited or not edited.strip():
        console.say("the message stays as it is; /edit TEXT puts another in its place")
        return None
    return talk.edit(edited)


def _undo(talk: Talk, _rest: str, _shell: Shell) -> None:
    console.say(f"taken back: {_excerpt(text_of(talk.undo()))}")


def _save(talk: Talk, name: str, shell: Shell, *, overwrite: bool = False) -> None:
    from runtime.chat.export import destination, save

    path = destination(unquoted(name), command="/save", overwrite=overwrite, confirm=shell.confirm)
    save(talk.conversation.messages, path)
    console.say(f"saved {path}")


def _export(talk: Talk, name: str, shell: Shell, *, overwrite: bool = False) -> None:
    from runtime.chat.export import destination, export, require_format

    name = unquoted(name)
    require_format(name)
    path = destination(name, command="/export", overwrite=overwrite, confirm=shell.confirm, example="talk.html")
    export(talk.conversation.messages, path)
    console.say(f"exported {path}")


def _image(talk: Talk, rest: str, _shell: Shell) -> Reply | None:
    from runtime.chat.images import image_url, named_file
    from runtime.chat.talk import HOW_TO_SEE

    if rest == "-":
        talk.images.clear()
        console.say("no image goes with the next message")
        return None
    if not talk.backend.sees:
        raise UsageError(f"{talk.backend.name} does not see", hint=HOW_TO_SEE)
    if not rest:
        raise UsageError("no file named", hint="/image photo.png What is this?")
    path, text = named_file(rest)
    url = image_url(path)
    if text:
        return talk.ask(text, [url])
    talk.images.append(url)
    console.say(f"{path.name} goes with the next message")
    return None


def _params(talk: Talk, rest: str, shell: Shell) -> None:
    from runtime.chat import params

    if rest:
        talk.options = params.changed(talk.options, rest)
    shell.show(params.shown(talk.options))


def _model(talk: Talk, rest: str, shell: Shell) -> None:
    from runtime.chat.exchange import other_model

    shell.show(other_model(talk, rest))


def _lora(talk: Talk, rest: str, shell: Shell, *, force: bool = False) -> None:
    from runtime.chat.exchange import adapters

    shell.show(adapters(talk, unquoted(rest), force=force))


def _plan(talk: Talk, _rest: str, shell: Shell) -> None:
    from runtime.chat.exchange import plan

    shell.show(plan(talk))


def _session(talk: Talk, _rest: str, shell: Shell) -> None:
    if talk.session is None:
        raise UsageError("this talk is in no session", hint="/save keeps it, or start with --session NAME")
    talk.session.keep(talk)
    shell.show(talk.session.described(talk))


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 1] + "…"


def _insisting(command: Command, run: Callable[[Talk, str, Shell], Reply | None]) -> Command:
    return replace(command, name=f"{command.name}!", run=run)


def _listed() -> tuple[Command, ...]:
    rows: tuple[tuple[str, str, Callable[[Talk, str, Shell], Reply | None]], ...] = (
        ("/help [COMMAND]", "this list", _help),
        ("/retry", "another reply to the last message", _retry),
        ("/edit [TEXT]", "change the last message and have it answered again", _edit),
        ("/undo", "take the last turn back", _undo),
        ("/reset", "forget the conversation; the system message stays", _reset),
        ("/system [TEXT|-]", "show the system message, set it, or take it away", _system),
        (
            "/image FILE [TEXT]",
            "let the model see an image, with the text or the next message; - takes it back",
            _image,
        ),
        ("/params [NAME=VALUE ...]", 'how replies are drawn: temp=0.2 seed=7 stop="###" max_tokens=100', _params),
        ("/model [MODEL [NAME=VALUE]]", "another model in place of this one, the conversation stays", _model),
        (
            "/lora [FILE[=SCALE]|-FILE|-]",
            "adapters: list, add or change the scale, remove, all; /lora! takes one of another model",
            _lora,
        ),
        ("/plan", "settings with their reasons, memory, the speed to expect", _plan),
        ("/save FILE", "the conversation as JSON; /save! writes over a file", _save),
        ("/export FILE", "as .md, .html, .yaml or .json; /export! writes over a file", _export),
        ("/session", "tell of the session and keep it now", _session),
        ("/quit", "leave (or Ctrl-D)", _quit),
    )
    return tuple(Command(name=usage.split()[0], usage=usage, help=text, run=run) for usage, text, run in rows)


COMMANDS: Final[Mapping[str, Command]] = MappingProxyType({command.name: command for command in _listed()})
"""Those that /help lists, by their names with the slash."""

_BY_NAME: Final[Mapping[str, Command]] = MappingProxyType(
    {
        **COMMANDS,
        "/save!": _insisting(COMMANDS["/save"], lambda talk, name, shell: _save(talk, name, shell, overwrite=True)),
        "/export!": _insisting(
            COMMANDS["/export"], lambda talk, name, shell: _export(talk, name, shell, overwrite=True)
        ),
        "/lora!": _insisting(COMMANDS["/lora"], lambda talk, rest, shell: _lora(talk, rest, shell, force=True)),
        "/exit": COMMANDS["/quit"],
    }
)
