"""The model's own chat template, rendered without trusting it.

A template is a program that came with the model. It runs in jinja2's immutable sandbox, with its repetitions,
its time and its memory bounded. Names and filters are those that templates expect of transformers
(``apply_chat_template``): raise_exception, strftime_now, tojson without HTML escapes, the ``generation`` block.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
from jinja2.exceptions import SecurityError

from toolchain.base.errors import ArtifactError
from toolchain.base.gguf import GgufHeader

Message = Mapping[str, str]
"""``role`` (system, user or assistant) and ``content``."""

MAX_SOURCE_CHARS: Final = 1 << 20
"""The largest template in use today has some 20,000 characters."""
RENDER_SECONDS: Final = 5.0
RENDER_BYTES: Final = 512 * 2**20
MAX_REPEATED_CHARS: Final = 1 << 20
PLAIN_STOPS: Final = ("\nUser:",)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a conversation becomes a prompt. ``stops`` are the strings that end a reply beside the model's own token."""

    source: str | None
    bos_token: str
    eos_token: str
    stops: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        """The prompt that asks for the next assistant message; with ``ask`` False, the conversation as it stands.

        A template that knows no system role gets the system text at the head of the first user message. Raises
        ArtifactError with the template's own words when it fails.
        """
        if self.source is None:
            return _plain(messages, ask)
        try:
            return self._apply(messages, ask)
        except ArtifactError:
            merged = _merge_system(messages)
            if merged is None:
                raise
            try:
                return self._apply(merged, ask)
            except ArtifactError:
                pass  # the system message was not what it minded: tell the first failure
            raise

    def _apply(self, messages: Sequence[Message], ask: bool) -> str:
        source = self.source or ""
        if len(source) > MAX_SOURCE_CHARS:
            raise _refused(f"it has {len(source)} characters, {MAX_SOURCE_CHARS} are the most")
        try:
            with _bounded():
                return _compiled(source).render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=ask,
                    bos_token=self.bos_token,
                    eos_token=self.eos_token,
                    tools=None,
                )
        except _TooLong:
            raise _refused(f"it was not done after {RENDER_SECONDS:.0f} s") from None
        except MemoryError:
            raise _refused(f"it wanted more than {RENDER_BYTES // 2**20} MiB") from None
        except Exception as error:  # whatever a stranger's program raises
            where = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise _refused(f"{type(error).__name__}{where}: {error}") from error


def chat_template(header: GgufHeader) -> ChatTemplate:
    """The template of a model; without one, a plain dialogue of ``User:`` and ``Assistant:`` lines."""
    source = header.chat_template
    return ChatTemplate(
        source=source,
        bos_token=_token(header, "bos"),
        eos_token=_token(header, "eos"),
        stops=() if source is not None else PLAIN_STOPS,
    )


def _plain(messages: Sequence[Message], ask: bool) -> str:
    """The documented form for a model without a template: paragraphs, each named by its speaker."""
    names = {"user": "User: ", "assistant": "Assistant: "}
    parts = [f"{names.get(message['role'], '')}{message['content']}" for message in messages]
    return "\n".join([*parts, "Assistant:"] if ask else parts)


def _merge_system(messages: Sequence[Message]) -> list[Message] | None:
    """The messages without a system role; None when there is nothing to merge."""
    match list(messages):
        case [{"role": "system", "content": system}, {"role": "user", "content": user}, *rest]:
            return [{"role": "user", "content": f"{system}\n\n{user}"}, *rest]
    return None


def _token(header: GgufHeader, name: str) -> str:
    number = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(number, int) or not isinstance(tokens, Sequence) or not 0 <= number < len(tokens):
        return ""
    return str(tokens[number])


def _refused(why: str) -> ArtifactError:
    return ArtifactError(
        "the model's chat template cannot be used",
        evidence=why,
        hint="`python -m runtime complete MODEL -p TEXT` needs no template; a corrected file may be published",
    )


class _TooLong(BaseException):
    """Past the sandbox's own ``except Exception``."""


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses products and powers that would take long or much in one uninterruptible step."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_small(left) and _small(right)):
            raise SecurityError("a power beyond bounds")
        for repeated, times in ((left, right), (right, left)):
            if isinstance(times, int) and hasattr(repeated, "__len__"):
                if len(repeated) * times > MAX_REPEATED_CHARS:
                    raise SecurityError("a repetition beyond bounds")
            elif isinstance(times, int) and times.bit_length() > 256:
                raise SecurityError("a product beyond bounds")
        return super().call_binop(context, operator, left, right)


def _small(value: object) -> bool:
    return isinstance(value, int | float) and -64 <= value <= 64


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """Compiling takes tens of milliseconds, rendering a hundredth of that; data sets render thousands of times."""
    return _environment().from_string(source)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@contextmanager
def _bounded() -> Iterator[None]:
    """Time by an alarm, which Python delivers in the main thread only; memory by the address space's limit."""
    with _address_space(RENDER_BYTES), _alarm(RENDER_SECONDS):
        yield


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise _TooLong

    before: Any = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _address_space(more_bytes: int, statm: Path = Path("/proc/self/statm")) -> Iterator[None]:
    """At most ``more_bytes`` of address space beyond what is in use; no limit where /proc does not tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        yield
        return
    wanted = used + more_bytes
    if any(limit != resource.RLIM_INFINITY and limit < wanted for limit in (soft, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
