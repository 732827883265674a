"""A server elsewhere that answers conversations over OpenAI's chat API: llama-server, vLLM, a paid provider."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from runtime.chat.backend import Piece, ReplyOptions
from runtime.chat.endpoint.address import checked_key, parse_address
from runtime.chat.endpoint.ask import ask, read_json
from runtime.chat.endpoint.chunk import count
from runtime.chat.endpoint.errors import RefusedError, Server
from runtime.chat.endpoint.look import Found, adapters, look
from runtime.chat.endpoint.reply import Reply
from runtime.chat.endpoint.request import encode, refused_fields, request_body, sent, unknown_extras
from runtime.chat.endpoint.wire import Answer, Cancelled, Wire, make_wire
from runtime.interrupts import Interrupt
from toolchain.base import console
from toolchain.base.errors import FetchError, UsageError

if TYPE_CHECKING:
    from runtime.chat.endpoint.address import Address
    from runtime.conversation.messages import Message

SILENCE_S: Final = 300.0
"""A long prompt on a slow machine is read in silence."""
_COUNT_S: Final = 30.0


class Endpoint:
    """A Backend over HTTP. ``count`` is known of a llama-server only."""

    _counts: bool
    _scales: dict[int, float] | None

    def __init__(self, wire: Wire, address: Address, found: Found, timeout_s: float) -> None:
        self._wire = wire
        self._address = address
        self._timeout_s = timeout_s
        self._take(found)

    def __repr__(self) -> str:
        return f"<{self.name} at {self._bases[0]}>"

    @property
    def name(self) -> str:
        return self._found.model

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that the server lists, maybe none."""
        return self._found.models

    @property
    def n_ctx(self) -> int | None:
        return self._found.n_ctx

    @property
    def sees(self) -> bool:
        return self._found.sees

    def count(self, messages: Sequence[Message]) -> int | None:
        """Tokens of the prompt by the server's own template and vocabulary; one that failed is not asked again."""
        if not self._counts:
            return None
        body = encode({"model": self.name, "messages": sent(messages)})
        url = f"{self._bases[0]}/chat/completions/input_tokens"
        with (
            suppress(FetchError),
            closing(ask(self._wire, "POST", url, body, interrupt=Interrupt(), silence_s=_COUNT_S)) as answer,
        ):
            value = read_json(answer, within_s=_COUNT_S)
            if isinstance(value, dict) and (tokens := count(value.get("input_tokens"))) is not None:
                return tokens
        self._counts = False
        return None

    def reply(
        self, messages: Sequence[Message], options: ReplyOptions, interrupt: Interrupt
    ) -> Generator[Piece, None, None]:
        """As the contract says; a ContextFullError (a FetchError) when the server finds the conversation too long."""
        reply = Reply(asked_at=time.monotonic(), silence_s=self._timeout_s)
        try:
            with closing(self._ask(messages, options, interrupt)) as answer:
                yield from reply.pieces(answer)
        except Cancelled:
            yield from reply.rest()
            yield Piece(figures=reply.figures("cancelled"))
            return
        yield Piece(figures=reply.figures(reply.finish_reason))

    def exchange(self, model: str) -> None:
        """Let another of the server's models answer; errors as of ``connect``, and the one before answers on then."""
        self._take(look(self._wire, self._address, model))

    def adapters(self) -> dict[int, tuple[str, float]]:
        """Names of the server's adapters and the scales at which it answers here, by their ids; UsageError where it is
        no llama-server.
        """
        if not self._found.llama:
            raise UsageError(
                f"{self._wire.server} is no llama-server, and tells of no adapters",
                hint="choose one of its models with /model NAME",
            )
        served = adapters(self._wire, self._bases[0])
        own = self._scales
        return {
            number: (name, scale if own is None else own.get(number, 0.0)) for number, (name, scale) in served.items()
        }

    def set_adapters(self, scales: Mapping[int, float]) -> None:
        """Ask for these scales with each request from now on, by the adapters' ids; nobody else is answered so."""
        self._scales = dict(scales)

    def close(self) -> None:
        self._wire.close()

    def _take(self, found: Found) -> None:
        """What was learned of another model does not count any more."""
        self._found = found
        self._bases = found.bases
        self._without: frozenset[str] = frozenset()
        self._warned: set[str] = set()
        self._counts = found.llama
        self._scales = None

    def _ask(self, messages: Sequence[Message], options: ReplyOptions, interrupt: Interrupt) -> Answer:
        """The beginning of the answer; where nobody told its place, all that are left are tried.

        What the server refuses of the request, and a reply can do without, is left out from then on.
        """
        nowhere: RefusedError | None = None
        while True:
            body = request_body(messages, options, model=self.name, llama=self._found.llama, without=self._without)
            if self._scales is not None:
                body["lora"] = [{"id": number, "scale": scale} for number, scale in self._scales.items()]
            self._warn_of_extras(body)
            try:
                answer = self._post(body, interrupt)
                self._bases = self._bases[:1]
                return answer
            except RefusedError as error:
                refusal = error.refusal
                if refusal.status in (404, 405):
                    nowhere = nowhere or error
                    if len(self._bases) == 1:
                        break
                    self._bases = self._bases[1:]
                    continue
                said = f"{refusal.words} {refusal.code}" if refusal.words else refusal.body
                refused = refused_fields(said, body) if refusal.status in (400, 422) else frozenset()
                if not refused:
                    raise
            self._without |= refused
            for name in sorted(refused - {"stream_options", "max_tokens"}):
                console.warn(f"{self._wire.server} does not take {name}: asking without it")
        self._bases = self._found.bases
        raise nowhere

    def _post(self, body: dict[str, Any], interrupt: Interrupt) -> Answer:
        self._wire.server = replace(self._wire.server, base=self._bases[0])
        return ask(
            self._wire,
            "POST",
            f"{self._bases[0]}/chat/completions",
            encode(body),
            interrupt=interrupt,
            silence_s=self._timeout_s,
            model=self.name,
            models=self._found.models,
        )

    def _warn_of_extras(self, body: dict[str, Any]) -> None:
        extras = [] if self._found.llama else [name for name in unknown_extras(body) if name not in self._warned]
        if extras:
            self._warned.update(extras)
            host = urlsplit(self._bases[0]).netloc
            console.warn(f"{', '.join(extras)}: options of llama.cpp, which {host} may not know; sent all the same")


def connect(url: str, *, model: str | None, api_key: str | None, timeout_s: float = SILENCE_S) -> Endpoint:
    """The server at ``url``, asked for its models: the only one is chosen, ``model`` names one of several.

    ``timeout_s`` bounds silences, not replies. ``api_key`` is sent to this server only and shown nowhere. UsageError
    for a wrong address, a key that plain http would give away, or a model to be chosen; FetchError when it fails.
    """
    address = parse_address(url)
    server = Server(base=address.bases[0], key=checked_key(api_key, address))
    wire = make_wire(address, server)
    try:
        found = look(wire, address, model)
    except BaseException:
        wire.close()
        raise
    return Endpoint(wire, address, found, timeout_s)
