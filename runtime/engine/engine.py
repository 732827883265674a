"""What the rest of the runtime uses: a loaded model with one context, streaming replies."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from runtime.engine import session
from runtime.engine.adapters import Adapter, open_adapter, set_adapters
from runtime.engine.context import Context
from runtime.engine.generate import Outcome, SingleSteps, Steps, Watch, generate
from runtime.engine.reply import Chunk, Reply, ReplyStats
from runtime.engine.sampling import SamplingOptions
from runtime.engine.seen import PlacedSteps, Seen, words
from runtime.engine.speculate import LookupSteps, can_speculate
from runtime.engine.text import Pieces
from runtime.interrupts import Interrupt
from runtime.settings import MOST_SEQUENCES
from toolchain.base.errors import MemoryFitError, UsageError

if TYPE_CHECKING:  # numpy is left to what needs it: a damaged file is refused before it is imported
    from runtime.engine.draw import Sampler
    from runtime.engine.embeddings import Pooling, Vectors
    from runtime.engine.logprobs import Adjust, Rows
    from runtime.engine.vision import Vision
    from runtime.settings import Settings


class Engine:
    """A loaded model with one context. Made by ``load``; ``close`` frees both."""

    def __init__(self, context: Context) -> None:
        self._context: Context | None = context
        self.model = context.model
        self.pieces = Pieces(context.model)
        self.adapters: tuple[tuple[Adapter, float], ...] = ()  # as chosen, those of scale 0 too
        self._vision: Vision | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the context, the vision part and the model; a second call does nothing."""
        if self._vision:
            self._vision.close()
        if self._context:
            self._context.close()
        self.model.close()

    @property
    def context(self) -> Context:
        """The context; MemoryFitError after one for more replies, and the one of before, found no memory."""
        if self._context is None:
            raise MemoryFitError(
                "the model has no context any more: memory ran out while one for several replies was made",
                evidence=self.model.log.tail(),
                hint="load the model again, with a lower --n-ctx or fewer prompts at once",
            )
        return self._context

    @property
    def settings(self) -> Settings:
        """What the context was made with."""
        assert self.context.settings is not None
        return self.context.settings

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self.context.n_ctx

    @property
    def offloads(self) -> bool:
        """Whether this build of the library can use a GPU at all."""
        return bool(self.model.lib.llama_supports_gpu_offload())

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text`` with special tokens parsed, and with the BOS that the model wants exactly once."""
        return self.model.tokenize(text)

    @property
    def sees(self) -> bool:
        """Whether prompts may hold images."""
        return self._vision is not None

    @property
    def image_marker(self) -> str:
        """What stands for an image in a prompt; UsageError where the model does not see."""
        return self._eyes().marker

    def open_vision(self, path: Path) -> None:
        """Load the vision part at ``path`` beside the model; errors as of ``vision.open_vision``."""
        from runtime.engine.vision import open_vision

        on_gpu = self.offloads and self.settings.number("n_gpu_layers") != 0
        threads = self.settings.number("n_threads_batch")
        self._vision = open_vision(path, self.model, n_threads=threads, on_gpu=on_gpu, most_cells=self.n_ctx // 2)

    def see(self, prompt: str, images: Sequence[bytes]) -> Seen:
        """``prompt`` with the image files ``images`` where its ``image_marker`` stand; errors as of ``Vision.see``."""
        return self._eyes().see(prompt, images)

    def count_seen(self, prompt: str, images: Sequence[bytes]) -> int:
        """Tokens that ``see`` of the same would have; cheap for images that were seen before."""
        return self._eyes().count(prompt, images)

    def _eyes(self) -> Vision:
        if self._vision is None:
            name = self.model.path.name if self.model.path else "this model"
            raise UsageError(f"{name} does not see", hint="give its vision part: --mmproj FILE")
        return self._vision

    def stream(
        self,
        prompt: Sequence[int] | Seen,
        sampling: SamplingOptions,
        *,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
        interrupt: Interrupt | None = None,
        lookup: bool = False,
        top_logprobs: int | None = None,
        adjust: Adjust | None = None,
    ) -> Generator[Chunk, None, None]:
        """Pieces of the reply to ``prompt`` as they come; the last chunk carries the statistics.

        ``prompt`` are tokens, or what ``see`` made of words and images.

        Ends at the model's end of generation, at a stop string, after ``max_tokens`` (None: no limit), when the
        context is full, or within one token after ``interrupt`` was raised. ``lookup`` guesses repetitions ahead
        where the model's cache can take guesses back; see ``speculate.py`` for why it is off unless asked for.
        ``top_logprobs`` gives each token a chunk with its log-probability and those of so many of the likeliest.
        ``adjust`` may change each row of logits before a token is drawn from it. Raises UsageError when the prompt
        is empty or leaves no room, and for sampling options that this model cannot follow.
        """
        from runtime.engine.logprobs import Logprobs, Rows

        context = self.context
        asked = prompt if isinstance(prompt, Seen) else Seen(None, [words(prompt)])
        context.require_room(asked.n_tokens)
        rows = Rows(self.model, context.handle)
        sampler = self._sampler(sampling, rows, asked.text_tokens)
        try:
            started = time.perf_counter()
            cached_tokens = asked.cells(context.reuse(asked.tokens, asked.ranges))
            whole = asked.decode(context, interrupt)
            prompt_done = time.perf_counter()
            processed_tokens = asked.cells(len(context.cached)) - cached_tokens
            limit = self._limit(asked.n_tokens, max_tokens)
            reply = Reply(self.pieces, limit, stops)
            steps = self._steps(asked, limit, lookup=lookup)
            watch = None
            if adjust or top_logprobs is not None:
                logprobs = None if top_logprobs is None else Logprobs(self.model, rows, top_logprobs)
                watch = Watch(rows, logprobs, adjust)
            if whole:
                outcome = yield from generate(context, reply, sampler.draw, steps, interrupt or Interrupt(), watch)
            else:
                outcome = Outcome("cancelled", 0, 0, prompt_done)
        finally:
            sampler.close()
        stats = ReplyStats(
            prompt_tokens=asked.n_tokens,
            cached_tokens=cached_tokens,
            processed_tokens=processed_tokens,
            completion_tokens=outcome.tokens,
            generation_steps=outcome.steps,
            prompt_seconds=prompt_done - started,
            generation_seconds=time.perf_counter() - prompt_done,
            ttft_ms=(outcome.first_at - started) * 1000,
            finish_reason=outcome.finish,
            drafted_tokens=getattr(steps, "drafted", 0),
            accepted_tokens=getattr(steps, "accepted", 0),
        )
        yield Chunk("", stats)

    def stream_many(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions | Sequence[SamplingOptions],
        *,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
        interrupt: Interrupt | None = None,
    ) -> Generator[tuple[int, Chunk], None, None]:
        """Pieces of the replies to several prompts, with the prompt's index; each reply ends as ``stream``'s do.

        They are decoded together, as many at once as the context has room for (16 at most): a reply takes the room
        of its prompt and ``max_tokens``, so without a limit they come one after the other. A context that was not
        made for so many is made anew, and the cache is then empty; it keeps what the prompts begin with in common.
        ``interrupt`` ends them within one batch.
        """
        from runtime.engine.sequences import Request, Together

        each = [sampling] * len(prompts) if isinstance(sampling, SamplingOptions) else sampling
        if not prompts:
            return
        for tokens in prompts:
            self.context.require_room(len(tokens))
        self._widen(len(prompts))
        if self.model.lib.llama_n_seq_max(self.context.handle) == 1:
            for index, (tokens, options) in enumerate(zip(prompts, each, strict=True)):
                chunks = self.stream(tokens, options, max_tokens=max_tokens, stops=stops, interrupt=interrupt)
                yield from ((index, chunk) for chunk in chunks)
            return
        requests = [
            Request(
                index=index,
                prompt=list(tokens),
                sampling=options,
                limit=self._limit(len(tokens), max_tokens),
                stops=stops,
            )
            for index, (tokens, options) in enumerate(zip(prompts, each, strict=True))
        ]
        together = Together(
            context=self.context, pieces=self.pieces, interrupt=interrupt or Interrupt(), waiting=requests
        )
        yield from together.run()

    def _widen(self, sequences: int) -> None:
        """Have a context for so many replies at once; the old one goes first, they may not fit side by side."""
        from runtime.engine.load import make_context

        old = self.context
        wanted = min(sequences, MOST_SEQUENCES)
        if sequences == 1 or old.settings is None or self.model.lib.llama_n_seq_max(old.handle) > wanted:
            return
        old.close()
        self._context = None
        try:
            self._context = make_context(self.model, old.settings, wanted)
        except BaseException:
            self._context = make_context(self.model, old.settings)
            raise
        finally:
            if self._context:
                set_adapters(self._context, old.adapters)

    def _sampler(self, sampling: SamplingOptions, rows: Rows, tokens: Sequence[int]) -> Sampler:
        from runtime.engine.draw import Sampler

        return Sampler(self.model, self.context.handle, sampling, rows=rows, pieces=self.pieces, prompt=list(tokens))

    def _steps(self, prompt: Seen, limit: int, *, lookup: bool) -> Steps:
        if prompt.spans:
            return PlacedSteps(self.context) if self.context.in_space else SingleSteps(self.context)
        guesses = lookup and can_speculate(self.model)
        return LookupSteps(self.context, prompt.tokens, limit) if guesses else SingleSteps(self.context)

    def _limit(self, n_prompt: int, max_tokens: int | None) -> int:
        """Tokens of a reply at most; the last one needs no place in the context, it is never decoded."""
        room = self.n_ctx - n_prompt + 1
        return room if max_tokens is None else min(room, max_tokens)

    def save_session(self, path: Path, note: Mapping[str, object] = MappingProxyType({})) -> None:
        """Write what the cache holds to ``path``, with ``note``, any JSON object; errors as of ``session.save``."""
        session.save(self.context, path, note=note)

    def restore_session(self, path: Path, interrupt: Interrupt | None = None) -> int:
        """Put what was saved at ``path`` into the cache; the number of tokens. Errors as of ``session.restore``."""
        session.restore(self.context, path, interrupt=interrupt)
        return len(self.context.cached)

    def load_adapter(self, path: Path, *, force: bool = False) -> Adapter:
        """The LoRA adapter at ``path`` in memory, at work nowhere yet; errors as of ``adapters.open_adapter``."""
        return open_adapter(self.model, path, force=force)

    def set_adapters(self, chosen: Sequence[tuple[Adapter, float]]) -> None:
        """Let exactly these adapters work, each at its scale; the cache is emptied when anything changes."""
        set_adapters(self.context, chosen)
        self.adapters = tuple(chosen)

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        truncate: bool = False,
    ) -> Vectors:
        """One vector for each text, float32 [n_texts, n_embd], with the adapters at work; the cache is not touched.

        Each call makes a context of its own: for many calls hold an ``Embedder``, whose terms these are.
        """
        from runtime.engine.embeddings import Embedder

        assert self.context.settings is not None
        embedder = Embedder(self.model, self.context.settings, pooling=pooling, adapters=self.context.adapters)
        try:
            return embedder.embed(embedder.tokenize(texts, truncate=truncate), normalize=normalize)
        finally:
            embedder.close()
