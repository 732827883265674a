"""``complete``: continue a prompt as it stands, or several together."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from runtime.commands.options import model_options, reply_options, request_of, sampling_of, token_limit
from runtime.prepare import load_engine, prepare
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, UsageError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from runtime.engine import Engine
    from runtime.engine.logprobs import TokenLogprob
    from runtime.engine.reply import Chunk, ReplyStats
    from runtime.engine.sampling import SamplingOptions
    from runtime.interrupts import Interrupt

COMPLETE_TOKENS: Final = 512
"""Tokens at most unless asked otherwise: nothing but a limit ends a model that was not taught to end."""


def add(verbs: Any) -> None:
    """Declare the verb."""
    one = verbs.add_parser(
        "complete",
        parents=[model_options(sees=True), reply_options()],
        help="continue a prompt",
        description=run.__doc__,
    )
    one.add_argument(
        "-p",
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the prompt; - or nothing reads standard input; several are decoded together",
    )
    one.add_argument("--image", action="append", default=[], metavar="FILE", help="before the prompt; may be repeated")
    one.add_argument("--json", action="store_true", help="one JSON object on stdout: text, figures, settings")
    one.add_argument("--logprobs", type=int, metavar="N", help="each token's probability and the N likeliest (--json)")
    one.add_argument(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="guess repetitions of the text so far: faster where there are any; close choices may fall differently",
    )
    one.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Continue a prompt as it stands, without the chat template; several prompts are decoded together."""
    _check(arguments)
    prompts = [_prompt(given) for given in arguments.prompt or [None]]
    images = [_image(given) for given in arguments.image]
    sampling = sampling_of(arguments)
    request = request_of(arguments)
    if not images:
        request = replace(request, mmproj=None, sees=False)
    prepared = prepare(request, sequences=len(prompts))
    if images and prepared.mmproj is None:
        raise UsageError(f"{prepared.header.path.name} does not see", hint="give its vision part: --mmproj FILE")
    from runtime.engine.reply import stats_line
    from runtime.interrupts import interrupts_noted
    from toolchain.base import console

    with (
        interrupts_noted() as interrupt,
        load_engine(prepared, request, interrupt, sequences=len(prompts)) as engine,
        closing(_chunks(engine, prompts, images, sampling, arguments, interrupt)) as chunks,  # before the engine is
    ):
        settings = engine.settings
        replies = _collect(chunks, len(prompts), shows=not arguments.json)
    if arguments.json:
        found = [reply.as_json() for reply in replies]
        figures = found[0] if len(found) == 1 else {"replies": found}
        common = {"seed": sampling.seed, "model": str(prepared.header.path), "settings": settings.as_json()}
        console.answer_json({**figures, **common})
    if not arguments.no_stats:
        for reply in replies:
            console.say(stats_line(reply.figures, threads=settings.number("n_threads")))
    cancelled = any(reply.figures.finish_reason == "cancelled" for reply in replies)
    return INTERRUPTED_EXIT_CODE if cancelled else 0


class _Collected:
    """A reply as it came."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.tokens: list[TokenLogprob] = []
        self.stats: ReplyStats | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def figures(self) -> ReplyStats:
        assert self.stats is not None
        return self.stats

    def take(self, chunk: Chunk) -> None:
        self.pieces.append(chunk.text)
        self.stats = chunk.stats
        if chunk.token:
            self.tokens.append(chunk.token)

    def as_json(self) -> dict[str, Any]:
        stats = self.figures
        figures: dict[str, Any] = {
            "text": self.text,
            "finish_reason": stats.finish_reason,
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "prompt_tps": round(stats.prompt_tps, 2),
            "generation_tps": round(stats.generation_tps, 2),
            "ttft_ms": round(stats.ttft_ms, 3),
        }
        if stats.drafted_tokens:
            figures |= {"drafted_tokens": stats.drafted_tokens, "accepted_tokens": stats.accepted_tokens}
        if self.tokens:
            figures["logprobs"] = [
                {**_token_json(each.token, each.piece, each.logprob), "top": [_token_json(*top) for top in each.top]}
                for each in self.tokens
            ]
        return figures


def _chunks(
    engine: Engine,
    prompts: Sequence[str],
    images: Sequence[bytes],
    sampling: SamplingOptions,
    arguments: argparse.Namespace,
    interrupt: Interrupt,
) -> Generator[tuple[int, Chunk], None, None]:
    """(index of the prompt, chunk) as they come."""
    limit = token_limit(arguments.max_tokens, COMPLETE_TOKENS)
    if len(prompts) > 1:
        tokens = [engine.tokenize(prompt) for prompt in prompts]
        yield from engine.stream_many(tokens, sampling, max_tokens=limit, stops=arguments.stop, interrupt=interrupt)
        return
    prompt = prompts[0]
    one = engine.stream(
        engine.see(engine.image_marker * len(images) + prompt, images) if images else engine.tokenize(prompt),
        sampling,
        max_tokens=limit,
        stops=arguments.stop,
        interrupt=interrupt,
        lookup=arguments.lookup,
        top_logprobs=arguments.logprobs,
    )
    with closing(one):
        for chunk in one:
            yield 0, chunk


def _collect(chunks: Iterable[tuple[int, Chunk]], count: int, *, shows: bool) -> list[_Collected]:
    """The replies. Shown while they come, in the order of the prompts, with an empty line between them."""
    from runtime.engine.shown import Shown

    replies = [_Collected() for _ in range(count)]
    out, shown = Shown(sys.stdout), 0
    for index, chunk in chunks:
        replies[index].take(chunk)
        if not shows:
            continue
        if index == shown:
            out.write(chunk.text)
        while shown < count and replies[shown].stats:
            out.write("" if replies[shown].text.endswith("\n") else "\n")
            shown += 1
            if shown < count:
                out.write(f"\n{replies[shown].text}")
            out.end()
    return replies


def _token_json(token: int, piece: bytes, logprob: float) -> dict[str, Any]:
    return {"id": token, "text": piece.decode("utf-8", "replace"), "bytes": list(piece), "logprob": round(logprob, 6)}


def _check(arguments: argparse.Namespace) -> None:
    if arguments.logprobs is not None and not arguments.json:
        raise UsageError("--logprobs has no place in plain text", hint="add --json")
    if arguments.logprobs is not None and arguments.logprobs < 0:
        raise UsageError(f"--logprobs cannot be {arguments.logprobs}", hint="0 or more")
    if (arguments.prompt or []).count("-") > 1:
        raise UsageError("-p - twice: standard input is read once", hint="give the other prompts as text")
    if len(arguments.prompt or ()) > 1 and (arguments.logprobs is not None or arguments.lookup or arguments.image):
        raise UsageError("--logprobs, --lookup and --image go with one prompt", hint="give one -p at a time")


def _image(given: str) -> bytes:
    """The image file, whose content is looked at before a model is loaded."""
    from runtime.engine.images import decode_image, read_image
    from toolchain.base import files

    raw = read_image(files.expand(given))
    decode_image(raw)
    return raw


def _prompt(given: str | None) -> str:
    """The prompt as given; ``-`` or a pipe is read to its end, less one final line break."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise UsageError("no prompt", hint='give -p "...", or pipe the text in')
    return sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
