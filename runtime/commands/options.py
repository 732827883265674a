"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from runtime.engine.sampling import SamplingOptions

MODEL_HELP: Final = "a .gguf file, a recipe (recipes/demo.yaml or recipes/demo.yaml:Q8_0) or its name (demo:Q8_0)"


def model_options() -> argparse.ArgumentParser:
    """MODEL and the settings of the engine."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("model", metavar="MODEL", help=MODEL_HELP)
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
    return options


def reply_options() -> argparse.ArgumentParser:
    """How the reply is drawn, and where it ends."""
    options = argparse.ArgumentParser(add_help=False)
    reply = options.add_argument_group("the reply")
    reply.add_argument("-n", "--max-tokens", type=int, metavar="N", help="tokens at most; -1: no limit but the context")
    reply.add_argument("--temp", type=float, metavar="T", help="0 takes the likeliest token each time (default 0.8)")
    reply.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest (default 40; 0: off)")
    reply.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that make up P (default 0.95)")
    reply.add_argument("--min-p", type=float, metavar="P", help="at least P times the likeliest (default 0.05)")
    reply.add_argument("--repeat-penalty", type=float, metavar="X", help="above 1 avoids repetition (default 1: off)")
    reply.add_argument("--seed", type=int, metavar="N", help="same seed, same reply (default: a random one)")
    reply.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the reply; may be repeated")
    options.add_argument("--no-stats", action="store_true", help="no line of figures after a reply")
    return options


def sampling_of(arguments: argparse.Namespace) -> SamplingOptions:
    """The sampling that the reply options ask for; the seed is drawn now unless it was given."""
    from runtime.engine.sampling import SamplingOptions, random_seed

    names = ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
    chosen: dict[str, Any] = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return SamplingOptions(**{"seed": random_seed(), **chosen})


def token_limit(asked: int | None, default: int | None) -> int | None:
    """Tokens at most; a negative number asks for no limit."""
    if asked is None:
        return default
    return None if asked < 0 else asked
