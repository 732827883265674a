"""Replies to raw text: the stream from the engine, and what is kept of it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from runtime.interrupts import Interrupt
from runtime.llama.ctrl_c import CtrlC
from runtime.llama.finish import FinishMeta, FunctionCall, finish_meta
from runtime.llama.options import Drawn, ReplyArguments, parse_arguments
from runtime.llama.tokens import Tokens
from toolchain.base import console
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.engine.logprobs import Adjust, TokenLogprob
    from runtime.engine.reply import FinishReason, ReplyStats


class Told:
    """What one reply told beside its text, over all its rounds."""

    def __init__(self) -> None:
        self.interrupt = Interrupt()
        self.rounds: list[ReplyStats] = []
        self.logprobs: list[TokenLogprob] = []
        self.calls: list[FunctionCall] = []
        self.dropped_turns = 0

    @property
    def tokens(self) -> int:
        return sum(each.completion_tokens for each in self.rounds)

    def ended(self, reason: FinishReason) -> None:
        """Say why the last round ended, where that was not the engine's doing."""
        self.rounds[-1] = replace(self.rounds[-1], finish_reason=reason)


class Native(Tokens):
    """Replies to raw text, which leave the conversation alone."""

    def create_native_completion(
        self,
        prompt: str,
        *,
        endless: bool = False,
        token_prob_delta: Mapping[int | str, float] | None = None,
        token_prob_abs: Mapping[int | str, float] | None = None,
        **options: Unpack[ReplyArguments],
    ) -> str:
        """The text that goes on behind ``prompt``; arguments and errors as of ``create_native_generator``."""
        return "".join(
            self.create_native_generator(
                prompt, endless=endless, token_prob_delta=token_prob_delta, token_prob_abs=token_prob_abs, **options
            )
        )

    def create_native_generator(
        self,
        prompt: str,
        *,
        endless: bool = False,
        token_prob_delta: Mapping[int | str, float] | None = None,
        token_prob_abs: Mapping[int | str, float] | None = None,
        **options: Unpack[ReplyArguments],
    ) -> Generator[str, None, None]:
        """A generator of the text that goes on behind ``prompt``, in pieces as it comes, never cut in a character.

        The prompt is taken as it stands, without template, symbols or conversation. ``options`` are those of
        ``ReplyArguments``. Tokens are ids, or texts that are one token.

        - ``endless``: the tokens that end a generation are banned. The reply goes on until ``max_tokens``
          (``finish_reason`` ``"length"``), until the context is full (``"context"``) or to a ``stop`` text.
        - ``token_prob_delta``: ``{token: x}``, at each step x is added to the token's logit, a natural logarithm: its
          odds are multiplied by e**x. -inf bans it.
        - ``token_prob_abs``: ``{token: p}``, at each step the token gets the probability p, 0 to 1, in the softmax of
          the logits (after ``token_prob_delta``); the tokens not named share the rest, 1 less all p, in the
          proportions that they have. The samplers come after that: with ``temperature=1, top_k=0, top_p=1, min_p=0``
          the token is drawn with exactly p.

        The generator may be left at any time; ``finish_meta`` is there once it has ended or was left. The first step
        raises UsageError when the prompt is empty or longer than the context, or when another reply is running. At
        once it raises UsageError for wrong options: a text that is several tokens, probabilities of more than 1
        together, ``endless`` with a grammar. KeyboardInterrupt on Ctrl-C.
        """
        from runtime.llama.probabilities import adjustment

        model = self._engine.model
        drawn = self._drawn(options)
        if endless and drawn.sampling.grammar:
            raise UsageError("endless and a grammar exclude each other: a grammar has an end", hint="give one of them")
        adjust = adjustment(
            model, banned=model.ends if endless else (), delta=token_prob_delta, absolute=token_prob_abs
        )
        tokens = model.tokenize(prompt)

        def body() -> Generator[str, None, None]:
            if self._engine.model is not model:
                raise UsageError("the model was loaded anew since this generator was made", hint="make another one")
            told = Told()
            with self._telling(told, drawn):
                yield from self._streamed(tokens, drawn, told, adjust=adjust)

        return self._gate.streamed(body, "no second reply")

    def _drawn(self, options: Mapping[str, Any]) -> Drawn:
        self._engine  # noqa: B018 (a closed one is told now, not at the first step)
        return parse_arguments(options, seed=self.seed)

    @contextmanager
    def _telling(self, told: Told, drawn: Drawn) -> Iterator[None]:
        """When the body ends, or its generator is left, ``finish_meta`` is what was told; None when it fails."""
        self._finish_meta = None
        self._running = told.interrupt
        try:
            yield
        except GeneratorExit:
            self._tell(told, drawn)
            raise
        finally:
            self._running = None
        self._tell(told, drawn)

    def _tell(self, told: Told, drawn: Drawn) -> None:
        if not told.rounds:
            return
        self._finish_meta = finish_meta(
            told.rounds,
            max_tokens=drawn.max_tokens,
            seed=drawn.sampling.seed,
            dropped_turns=told.dropped_turns,
            function_calls=tuple(told.calls),
            logprobs=tuple(told.logprobs),
        )
        if self.verbose:
            console.say(figures_line(self._finish_meta))

    def _streamed(
        self,
        tokens: Sequence[int],
        drawn: Drawn,
        told: Told,
        *,
        stops: Sequence[str] = (),
        adjust: Adjust | None = None,
    ) -> Generator[str, None, None]:
        """Text of one generation; its figures go to ``told``, also when the consumer leaves."""
        limit = drawn.max_tokens
        ctrl_c = CtrlC(told.interrupt)
        stream = self._engine.stream(
            tokens,
            drawn.sampling,
            max_tokens=None if limit is None else limit - told.tokens,
            stops=(*stops, *drawn.stops),
            interrupt=told.interrupt,
            lookup=drawn.lookup,
            top_logprobs=drawn.logprobs,
            adjust=adjust,
        )
        try:
            while True:
                with ctrl_c:
                    chunk = next(stream, None)
                if chunk is None:
                    break
                if chunk.token:
                    told.logprobs.append(chunk.token)
                if chunk.stats:
                    told.rounds.append(chunk.stats)
                if ctrl_c.struck:
                    raise KeyboardInterrupt
                if chunk.text:
                    yield chunk.text
        except GeneratorExit:
            was_cancelled, told.interrupt.raised = told.interrupt.raised, True
            told.rounds.extend(chunk.stats for chunk in stream if chunk.stats)  # it ends in good order, with figures
            told.interrupt.raised = was_cancelled
            raise
        finally:
            stream.close()


def figures_line(meta: FinishMeta) -> str:
    """The one line of figures after a reply."""
    reply = f"{counted(meta.completion_tokens, 'token')} in {meta.generation_ms / 1000:.2f} s"
    prompt = f"{counted(meta.prompt_tokens, 'prompt token')} ({meta.cached_tokens} cached) in {meta.prompt_ms:.0f} ms"
    return f"{reply}, {meta.tokens_per_second:.0f} t/s; {prompt}; {meta.finish_reason}"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
