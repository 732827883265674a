"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from runtime.prepare import tuning_is_off
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.engine.sampling import SamplingOptions
    from runtime.prepare import Request
    from runtime.settings import Value

MODEL_HELP: Final = (
    "a .gguf file, a recipe (recipes/demo.yaml or recipes/demo.yaml:Q8_0) or its name (demo:Q8_0), "
    "or a GGUF repository on the hub (owner/repo or owner/repo:Q4_K_M)"
)

SAMPLERS: Final = (
    ("repeat_penalty", float, "X", "above 1 avoids repetition (1: off)"),
    ("repeat_last_n", int, "N", "tokens that the three penalties look back over (64)"),
    ("frequency_penalty", float, "X", "for each time that a token came (0: off)"),
    ("presence_penalty", float, "X", "for a token that came at all (0: off)"),
    ("dry_multiplier", float, "X", "against repeated sequences; around 0.8 (0: off)"),
    ("dry_base", float, "X", "growth of that penalty with the length (1.75)"),
    ("dry_allowed_length", int, "N", "tokens that may be repeated (2)"),
    ("dry_penalty_last_n", int, "N", "tokens that DRY looks back over (64)"),
    ("top_nsigma", float, "N", "draw from logits within N standard deviations of the best (-1: off)"),
    ("typical", float, "P", "locally typical sampling (1: off)"),
    ("xtc_probability", float, "P", "chance that XTC takes the likeliest away (0: off)"),
    ("xtc_threshold", float, "P", "least probability of what XTC takes away (0.1)"),
    ("dynatemp_range", float, "X", "the temperature follows the entropy within +-X (0: off)"),
    ("dynatemp_exp", float, "X", "and how (1)"),
    ("mirostat", int, "1|2", "hold the surprise at a level, instead of all that cuts candidates (0: off)"),
    ("mirostat_lr", float, "X", "its learning rate (0.1)"),
    ("mirostat_ent", float, "X", "its level (5)"),
)
"""Options of the samplers that are off by default: name, type, metavar, help."""


def model_options(
    *, writes: bool = True, optional: bool = False, several: bool = False, sees: bool = False
) -> argparse.ArgumentParser:
    """MODEL, which may be left out where it is ``optional`` and is a list where there may be ``several``, and the
    settings of the engine; without those that only matter to one that ``writes`` text, or that ``sees`` images.
    """
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("model", metavar="MODEL", nargs="?" if optional else "+" if several else None, help=MODEL_HELP)
    engine = options.add_argument_group("the engine", "each also as FOUNDRY_<NAME> in the environment")
    engine.add_argument("--n-ctx", metavar="N", help="tokens of context (default: 4096, the model's, or what fits)")
    if writes:
        engine.add_argument("--n-threads", metavar="N", help="for generation (default: measured once)")
    engine.add_argument("--n-threads-batch", metavar="N", help="for the prompt (default: measured once)")
    engine.add_argument("--n-gpu-layers", metavar="N", help="layers on the GPU, or all (default: planned)")
    engine.add_argument("--n-cpu-moe", metavar="N", help="layers whose experts stay on the host (default: planned)")
    engine.add_argument("--tensor-split", metavar="A,B", help="shares of the layers by GPU (default: planned)")
    if writes:
        _add_text_settings(engine)
    engine.add_argument(
        "--no-tune",
        action="store_true",
        default=tuning_is_off(),
        help="compute the threads instead of measuring them once",
    )
    engine.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=SCALE]", help="a LoRA adapter; may be repeated"
    )
    engine.add_argument("--force", action="store_true", help="take a --lora that was trained on another model too")
    if sees:
        vision = "the model's vision part (default: mmproj*.gguf beside the model, or in its hub repository)"
        engine.add_argument("--mmproj", metavar="FILE", help=vision)
        engine.add_argument("--no-mmproj", dest="sees", action="store_false", help="without it, and without images")
    options.set_defaults(sees=sees)
    options.add_argument("--verbose", action="store_true", help="the library's log on stderr")
    return options


def request_of(arguments: argparse.Namespace) -> Request:
    """What the model options ask for; a verb need not have all of them."""
    from runtime.prepare import Request

    return Request(
        model=arguments.model,
        flags=flags_of(arguments),
        lora=tuple(arguments.lora),
        force=getattr(arguments, "force", False),
        mmproj=arguments.mmproj if getattr(arguments, "sees", False) else None,
        sees=getattr(arguments, "sees", False),
        tune=not arguments.no_tune,
        verbose=getattr(arguments, "verbose", False),
    )


def flags_of(arguments: argparse.Namespace) -> dict[str, Value | None]:
    """The settings among the options."""
    from runtime.settings import NAMES

    return {name: getattr(arguments, name, None) for name in NAMES}


def reply_options() -> argparse.ArgumentParser:
    """How the reply is drawn, and where it ends."""
    options = argparse.ArgumentParser(add_help=False)
    reply = options.add_argument_group("the reply")
    reply.add_argument("-n", "--max-tokens", type=int, metavar="N", help="tokens at most; -1: no limit but the context")
    reply.add_argument("--temp", type=float, metavar="T", help="0 takes the likeliest token each time (default 0.8)")
    reply.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest (default 40; 0: off)")
    reply.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that make up P (default 0.95)")
    reply.add_argument("--min-p", type=float, metavar="P", help="at least P times the likeliest (default 0.05)")
    reply.add_argument("--seed", type=int, metavar="N", help="same seed, same reply (default: a random one)")
    reply.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the reply; may be repeated")
    reply.add_argument("--grammar", metavar="FILE|TEXT", help="GBNF that the reply has to follow")
    reply.add_argument("--json-schema", metavar="FILE|TEXT", help="the reply is JSON that this schema accepts")
    options.add_argument("--no-stats", action="store_true", help="no line of figures after a reply")
    rare = options.add_argument_group("rarely needed for the reply", "as in llama.cpp, all off by default")
    rare.add_argument("--logit-bias", action="append", default=[], metavar="ID=BIAS", help="-inf bans; may be repeated")
    for name, kind, metavar, text in SAMPLERS:
        rare.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    rare.add_argument(
        "--dry-sequence-breaker",
        action="append",
        metavar="TEXT",
        help="ends a repetition for DRY, instead of line break, colon, quote and asterisk; may be repeated",
    )
    return options


def sampling_of(arguments: argparse.Namespace) -> SamplingOptions:
    """The sampling that the reply options ask for; the seed is drawn now unless it was given."""
    from runtime.engine.grammar import read_argument
    from runtime.engine.json_schema import json_schema_to_gbnf
    from runtime.engine.sampling import SamplingOptions, random_seed

    names = ("temp", "top_k", "top_p", "min_p", "seed", *(name for name, *_ in SAMPLERS))
    chosen: dict[str, Any] = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.dry_sequence_breaker:
        chosen["dry_sequence_breakers"] = tuple(arguments.dry_sequence_breaker)
    if arguments.grammar is not None and arguments.json_schema is not None:
        raise UsageError("--grammar and --json-schema both say what the reply is", hint="give one of them")
    if arguments.grammar is not None:
        chosen["grammar"] = read_argument(arguments.grammar)
    if arguments.json_schema is not None:
        chosen["grammar"] = json_schema_to_gbnf(read_argument(arguments.json_schema))
    return SamplingOptions(**{"seed": random_seed(), **chosen, "logit_bias": _biases(arguments.logit_bias)})


def _add_text_settings(engine: argparse._ArgumentGroup) -> None:
    engine.add_argument("--n-batch", metavar="N", help="prompt tokens per call (default 2048)")
    engine.add_argument("--n-ubatch", metavar="N", help="prompt tokens per graph (default: 512, planned or measured)")
    engine.add_argument("--type-k", metavar="TYPE", help="type of the key cache (default: f16, or planned)")
    engine.add_argument("--type-v", metavar="TYPE", help="type of the value cache (default: f16, or planned)")


def _biases(typed: Sequence[str]) -> dict[int, float]:
    """``ID=BIAS`` of each; llama.cpp's ``ID+BIAS`` and ``ID-BIAS`` mean the same."""
    found = {}
    for text in typed:
        parts = re.fullmatch(r"(\d+)(?:=|(?=[+-]))(.+)", text.strip())
        try:
            if not parts:
                raise ValueError(text)
            found[int(parts[1])] = float(parts[2])
        except ValueError as error:
            raise UsageError(
                f"--logit-bias {text}: not a token's id and a number", hint="such as 15043=-1.5, or 15043=-inf"
            ) from error
    return found


def token_limit(asked: int | None, default: int | None) -> int | None:
    """Tokens at most; a negative number asks for no limit."""
    if asked is None:
        return default
    return None if asked < 0 else asked
