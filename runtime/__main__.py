"""The command line: ``python -m runtime complete|chat MODEL``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolchain.base.errors import INTERRUPTED_EXIT_CODE, FoundryError, MissingError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.engine import Engine
    from runtime.interrupts import Interrupt
    from runtime.sampling import SamplingOptions
    from runtime.settings import Settings
    from toolchain.base.gguf import GgufHeader

MODEL_HELP = "a .gguf file, a recipe (recipes/demo.yaml or recipes/demo.yaml:Q8_0) or its name (demo:Q8_0)"
COMPLETE_TOKENS = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (the contract is in toolchain/base/errors.py)."""
    arguments = _parser().parse_args(argv)
    try:
        # A pipe or a terminal of another encoding gets replacement marks, not a traceback.
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        status: int = arguments.verb(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except FoundryError as error:
        from toolchain.base import console

        console.failure(error)
        return error.exit_code
    except ModuleNotFoundError as error:
        # Not through the console: it may be what is missing.
        sys.stderr.write(
            f"✗ this Python has no {error.name}: {sys.executable}\n  → . .venv/bin/activate, or run `./inv`\n"
        )
        return MissingError.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return status


def complete(arguments: argparse.Namespace) -> int:
    """Continue a prompt as it stands, without the chat template."""
    prompt = _prompt(arguments.prompt)
    sampling = _sampling(arguments)
    header, settings = _prepare(arguments)
    from runtime.interrupts import interrupts_noted
    from runtime.reply import stats_line
    from toolchain.base import console

    pieces: list[str] = []
    with interrupts_noted() as interrupt, _load(header.path, settings, arguments, interrupt) as engine:
        chunks = engine.stream(
            engine.tokenize(prompt),
            sampling,
            max_tokens=_limit(arguments.max_tokens, COMPLETE_TOKENS),
            stops=arguments.stop,
            interrupt=interrupt,
        )
        for chunk in chunks:
            stats = chunk.stats
            pieces.append(chunk.text)
            if not arguments.json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    assert stats is not None
    if arguments.json:
        figures = {
            "text": "".join(pieces),
            "finish_reason": stats.finish_reason,
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "prompt_tps": round(stats.prompt_tps, 2),
            "generation_tps": round(stats.generation_tps, 2),
            "ttft_ms": round(stats.ttft_ms, 3),
            "seed": sampling.seed,
            "model": str(header.path),
            "settings": settings.as_json(),
        }
        console.answer_json(figures)
    elif not "".join(pieces).endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    if not arguments.no_stats:
        console.say(stats_line(stats, threads=settings.number("n_threads")))
    return INTERRUPTED_EXIT_CODE if stats.finish_reason == "cancelled" else 0


def chat(arguments: argparse.Namespace) -> int:
    """Talk with the model; the text of each reply goes to stdout."""
    sampling = _sampling(arguments)
    header, settings = _prepare(arguments)
    from runtime.chat import Session, converse
    from runtime.interrupts import interrupts_noted
    from runtime.template import chat_template

    with interrupts_noted() as interrupt:
        engine = _load(header.path, settings, arguments, interrupt)
    with engine:
        session = Session(
            engine=engine,
            template=chat_template(header),
            sampling=sampling,
            max_tokens=_limit(arguments.max_tokens, None),
            stops=tuple(arguments.stop),
            threads=settings.number("n_threads"),
            system=arguments.system or "",
            shows_stats=not arguments.no_stats,
        )
        return converse(session, header)


def _prepare(arguments: argparse.Namespace) -> tuple[GgufHeader, Settings]:
    """The checked header of the model and the settings for it; nothing of the library is touched."""
    from runtime.memory import require_context_fits
    from runtime.model_file import open_model
    from runtime.resolve import resolve
    from runtime.settings import NAMES, settle
    from runtime.tune import tuned_threads
    from toolchain.base import machine

    resolved = resolve(arguments.model)
    header = open_model(resolved.path)
    here = machine.probe()
    settings = settle(
        machine=here,
        n_ctx_train=header.n_ctx_train,
        tuned=tuned_threads(here),
        recipe=resolved.runtime,
        env=os.environ,
        flags={name: getattr(arguments, name) for name in NAMES},
    )
    require_context_fits(header, settings, here)
    return header, settings


def _load(path: Path, settings: Settings, arguments: argparse.Namespace, interrupt: Interrupt) -> Engine:
    from runtime.engine import load
    from toolchain.base import console

    engine = load(path, settings, verbose=arguments.verbose, interrupt=interrupt)
    if settings.number("n_gpu_layers") != 0 and not engine.offloads:
        console.warn("this build has no GPU backend, all layers run on the CPU: `./inv build --define GGML_CUDA=ON`")
    return engine


def _sampling(arguments: argparse.Namespace) -> SamplingOptions:
    from runtime.sampling import SamplingOptions, random_seed

    names = ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
    chosen: dict[str, Any] = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return SamplingOptions(**{"seed": random_seed(), **chosen})


def _prompt(given: str | None) -> str:
    """The prompt as given; ``-`` or a pipe is read to its end, less one final line break."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise UsageError("no prompt", hint='give -p "...", or pipe the text in')
    return sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")


def _limit(asked: int | None, default: int | None) -> int | None:
    """Tokens at most; a negative number asks for no limit."""
    if asked is None:
        return default
    return None if asked < 0 else asked


def _discard_stdout() -> None:
    """Nobody reads any more; keep the interpreter's last flush from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime", description="Run a GGUF model on this machine.")
    verbs = parser.add_subparsers(dest="verb_name", required=True, metavar="VERB")
    shared = _shared_options()
    one = verbs.add_parser("complete", parents=[shared], help="continue a prompt", description=complete.__doc__)
    one.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - or nothing reads standard input")
    one.add_argument("--json", action="store_true", help="one JSON object on stdout: text, figures, settings")
    one.set_defaults(verb=complete)
    talk = verbs.add_parser("chat", parents=[shared], help="talk with the model", description=chat.__doc__)
    talk.add_argument("--system", metavar="TEXT", help="the system message")
    talk.set_defaults(verb=chat)
    return parser


def _shared_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    reply = options.add_argument_group("the reply")
    reply.add_argument("-n", "--max-tokens", type=int, metavar="N", help="tokens at most; -1: no limit but the context")
    reply.add_argument("--temp", type=float, metavar="T", help="0 takes the likeliest token each time (default 0.8)")
    reply.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest (default 40; 0: off)")
    reply.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that make up P (default 0.95)")
    reply.add_argument("--min-p", type=float, metavar="P", help="at least P times the likeliest (default 0.05)")
    reply.add_argument("--repeat-penalty", type=float, metavar="X", help="above 1 avoids repetition (default 1: off)")
    reply.add_argument("--seed", type=int, metavar="N", help="same seed, same reply (default: a random one)")
    reply.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the reply; may be repeated")
    engine = options.add_argument_group("the engine", "each also as FOUNDRY_<NAME> in the environment")
    engine.add_argument("--n-ctx", metavar="N", help="tokens of context (default: 4096, or what the model has)")
    engine.add_argument("--n-threads", metavar="N", help="for generation (default: cores within the CPU quota)")
    engine.add_argument("--n-threads-batch", metavar="N", help="for the prompt (default: CPUs within the quota)")
    engine.add_argument("--n-gpu-layers", metavar="N", help="layers on the GPU, or all")
    engine.add_argument("--n-batch", metavar="N", help="prompt tokens per call (default 2048)")
    engine.add_argument("--n-ubatch", metavar="N", help="prompt tokens per graph (default 512)")
    engine.add_argument("--type-k", metavar="TYPE", help="type of the key cache (default f16)")
    engine.add_argument("--type-v", metavar="TYPE", help="type of the value cache (default f16)")
    options.add_argument("--verbose", action="store_true", help="the library's log on stderr")
    options.add_argument("--no-stats", action="store_true", help="no line of figures after a reply")
    return options


if __name__ == "__main__":
    sys.exit(main())
