"""A model in this process as what answers a conversation; it can be exchanged, and its adapters too."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from runtime.adapters import Chosen
from runtime.chat.backend import Figures, Piece, ReplyOptions
from runtime.conversation.messages import Message, images_of
from runtime.conversation.reasoning import CLOSE, OPEN, ReasoningSplitter
from runtime.interrupts import interrupts_noted
from runtime.prepare import Prepared, Request, load_engine, prepare
from toolchain.base import console
from toolchain.base.chat_template import ChatTemplate, chat_template
from toolchain.base.errors import FoundryError, UsageError

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.engine.adapters import Adapter
    from runtime.engine.reply import ReplyStats
    from runtime.engine.sampling import SamplingOptions
    from runtime.interrupts import Interrupt
    from runtime.settings import Value


class LocalBackend:
    """A loaded model with its chat template. Made by ``load_local``."""

    def __init__(self, request: Request, prepared: Prepared, engine: Engine) -> None:
        self._take(request, prepared, engine)

    def _take(self, request: Request, prepared: Prepared, engine: Engine) -> None:
        self.request = request
        self.prepared = prepared
        self._engine: Engine | None = engine
        self.template: ChatTemplate = chat_template(prepared.header)
        if self.template.source is None:
            console.warn(
                f"{self.name} has no chat template: using plain `User:` and `Assistant:` lines; "
                "a model that was not tuned for dialogue answers oddly"
            )

    @property
    def engine(self) -> Engine:
        """The engine; UsageError after an exchange of models that left none."""
        if self._engine is None:
            raise UsageError("no model is loaded", hint="/model NAME loads one")
        return self._engine

    @property
    def name(self) -> str:
        return self.prepared.header.path.name

    @property
    def n_ctx(self) -> int | None:
        return self._engine.n_ctx if self._engine else None

    @property
    def sees(self) -> bool:
        return self._engine is not None and self._engine.sees

    def count(self, messages: Sequence[Message]) -> int | None:
        """Tokens of the prompt that the messages make; None while no model is loaded."""
        if self._engine is None:
            return None
        prompt, images = self._prompt(messages)
        return self._engine.count_seen(prompt, images) if images else len(self._engine.tokenize(prompt))

    def reply(
        self, messages: Sequence[Message], options: ReplyOptions, interrupt: Interrupt
    ) -> Generator[Piece, None, None]:
        """The reply as it comes, what the model thinks apart from what it answers."""
        engine, sampling = self.engine, _sampling(options)
        prompt, images = self._prompt(messages)
        thinks = prompt.rstrip().endswith(OPEN)
        if thinks and sampling.grammar:  # a grammar speaks of the answer: the thinking is closed before it
            prompt, thinks = f"{prompt.rstrip()}\n\n{CLOSE}\n\n", False
        thoughts = _Thoughts(inside=thinks)
        chunks = engine.stream(
            engine.see(prompt, images) if images else engine.tokenize(prompt),
            sampling,
            max_tokens=options.max_tokens,
            stops=(*self.template.stops, *options.stops),
            interrupt=interrupt,
        )
        with closing(chunks):
            for chunk in chunks:
                reasoning, text = thoughts.split(chunk.text, last=chunk.stats is not None)
                figures = _figures(chunk.stats, engine.settings.number("n_threads")) if chunk.stats else None
                if text or reasoning or figures:
                    yield Piece(text, reasoning, figures)

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        if self._engine:
            self._engine.close()
        self._engine = None

    def exchange(self, model: str, flags: dict[str, Value], interrupt: Interrupt) -> None:
        """Another model in place of this one, which is freed first; adapters and vision part stay with the old one.

        What is asked for must be there and a model before anything is freed. When it cannot be loaded after that, the
        old one is loaded again and the error raised.
        """
        from runtime.model_file import open_model
        from runtime.resolve import resolve

        open_model(resolve(model).path)
        old, old_prepared = self.request, self.prepared
        wanted = replace(old, model=model, flags={**old.flags, **flags}, lora=(), mmproj=None)
        self.close()
        try:
            prepared = prepare(wanted)
            self._take(wanted, prepared, load_engine(prepared, wanted, interrupt))
        except (FoundryError, KeyboardInterrupt):
            console.warn(f"{model} was not loaded: loading {old_prepared.header.path.name} again")
            interrupt.raised = False
            self._take(old, old_prepared, load_engine(old_prepared, old, interrupt))
            raise

    @property
    def adapters(self) -> tuple[tuple[Adapter, float], ...]:
        """Those that were asked for, in their order, each with its scale; 0 lets it rest."""
        return self.engine.adapters

    def set_adapters(self, chosen: Sequence[tuple[Adapter, float]]) -> None:
        """Let exactly these work, each at its scale; the model stays loaded."""
        self.engine.set_adapters(chosen)
        kept = tuple(Chosen(file=adapter.file, scale=scale) for adapter, scale in chosen)
        self.prepared = replace(self.prepared, adapters=kept)

    def _prompt(self, messages: Sequence[Message]) -> tuple[str, list[bytes]]:
        """The prompt, and the image files that its markers stand for."""
        urls = [url for message in messages for url in images_of(message)]
        marker, images = "", []
        if urls and self.sees:
            from runtime.engine.images import image_bytes

            marker, images = self.engine.image_marker, [image_bytes(url) for url in urls]
        return self.template.render([_as_text(message, marker) for message in messages]), images


def load_local(request: Request) -> LocalBackend:
    """The model that was asked for, planned, tuned and loaded; errors as of ``prepare`` and ``load_engine``."""
    prepared = prepare(request)  # may fetch a model, or read all of one: Ctrl-C ends that at once
    with interrupts_noted() as interrupt:
        return LocalBackend(request, prepared, load_engine(prepared, request, interrupt))


class _Thoughts:
    """Reasoning and answer apart; once the answer has begun, what looks like a marker in it is text."""

    def __init__(self, *, inside: bool) -> None:
        self._splitter: ReasoningSplitter | None = ReasoningSplitter(OPEN, CLOSE, inside=inside)

    def split(self, text: str, *, last: bool) -> tuple[str, str]:
        if self._splitter is None:
            return "", text
        reasoning, answer = self._splitter.feed(text)
        if last or answer.strip():
            more = self._splitter.flush()
            self._splitter = None
            return reasoning + more[0], answer + more[1]
        return reasoning, answer


def _as_text(message: Message, marker: str) -> dict[str, str]:
    """Role and text, with ``marker`` where an image stands."""
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(marker if part["type"] == "image_url" else part["text"] for part in content or ())
    return {"role": message["role"], "content": content}


def _sampling(options: ReplyOptions) -> SamplingOptions:
    if options.json_schema is None:
        return options.sampling
    return replace(options.sampling, grammar=_grammar(options.json_schema))


@lru_cache(maxsize=4)
def _grammar(schema: str) -> str:
    from runtime.engine.json_schema import json_schema_to_gbnf

    return json_schema_to_gbnf(schema)


def _figures(stats: ReplyStats, threads: int) -> Figures:
    return Figures(
        finish_reason=stats.finish_reason,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        completion_tokens=stats.completion_tokens,
        prompt_tps=stats.prompt_tps,
        generation_tps=stats.generation_tps,
        ttft_ms=stats.ttft_ms,
        threads=threads,
    )
