"""``bench``: how fast a model is here, beside llama-bench and llama-cpp-python on the same library."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runtime.commands.options import MODEL_HELP, flags_of, model_options, request_of
from runtime.prepare import prepare
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.bench.case import Lengths
    from runtime.bench.measure import Scouted, Subject
    from runtime.bench.report import Result

_MOST_RUNS: Final = 1000
_MOST_TOKENS: Final = 1 << 24


def add(verbs: Any) -> None:
    """Declare the verb."""
    one = verbs.add_parser(
        "bench", parents=[model_options()], help="measure a model's speed here, beside others", description=run.__doc__
    )
    what = one.add_argument_group("what is measured", "the context is as long as this takes unless one is asked for")
    what.add_argument("--runs", type=int, default=5, metavar="N", help="rounds of turns (default 5)")
    what.add_argument("--prompt-tokens", type=int, metavar="N", help="default: 512, or what the model's context leaves")
    what.add_argument("--gen-tokens", type=int, default=128, metavar="N", help="generated after it (default 128)")
    what.add_argument("--depth", default="0", metavar="N[,N...]", help="tokens in the cache before (default 0)")
    what.add_argument("--compare", metavar="MODEL", help=f"a second model in the same run: {MODEL_HELP}")
    what.add_argument("--no-peers", action="store_true", help="our engine alone")
    one.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs matplotlib)")
    one.add_argument("--json", action="store_true", help="no tables on stderr; the JSON line on stdout comes anyway")
    one.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure prompt and generation speed, time to first token, overhead, memory and the share of the memory's
    bandwidth, in turns with llama-bench and llama-cpp-python on the same library. The last line of stdout is one
    JSON object.
    """
    depths = _depths(arguments.depth)
    _require_count("--runs", arguments.runs, _MOST_RUNS)
    _require_count("--gen-tokens", arguments.gen_tokens, _MOST_TOKENS)
    if arguments.prompt_tokens is not None:
        _require_count("--prompt-tokens", arguments.prompt_tokens, _MOST_TOKENS)
    if arguments.lora:
        raise UsageError("the others cannot be measured with an adapter", hint="merge it first, or leave --lora out")
    from runtime.bench.report import as_json, tables
    from toolchain.base import console

    if arguments.plot:
        from runtime.bench.plot import require_plot

        require_plot(arguments.plot)
    result = _measure(arguments, depths)
    answer = as_json(result)
    if not arguments.json:
        story = console.story()
        story.width = max(story.width, 120)
        for table in tables(result):
            story.print(table)
        for reason in answer["left_out"]:
            console.say(f"left out: {reason['name']}: {reason['reason']}")
        for warning in answer["warnings"]:
            console.warn(warning)
    console.answer(json.dumps(answer))
    if arguments.plot:
        from runtime.bench.plot import draw

        draw(result, arguments.plot)
    return 0


def _measure(arguments: argparse.Namespace, depths: tuple[int, ...]) -> Result:
    from runtime.bench.contenders import Contender
    from runtime.bench.measure import gather_field, measure
    from runtime.bench.report import Result
    from runtime.bench.roof import memory_roof
    from toolchain.base import console, machine

    subject, lengths, guessed = _subject(arguments, arguments.model, depths)
    second = _subject(arguments, arguments.compare, depths) if arguments.compare else None
    here = machine.probe()
    with console.step("find a prompt that does not end early"):
        found = _scouted(subject, lengths)
        others = _scouted(second[0], second[1]) if second else []
    told = found[0].sample
    if arguments.verbose:
        console.say(told.log)
    field = gather_field(found[0], not arguments.no_peers)
    with console.step("memory's read bandwidth", quiet_s=0.2):
        roof = memory_roof(here, subject.settings, offloads=told.offloads)
    nobody: tuple[Contender, ...] = ()
    entries = [(subject, each.case, field.peers) for each in found]
    if second:
        entries += [(second[0], each.case, nobody) for each in others]
    names = ", ".join(("ours", *(peer.name for peer in field.peers)))
    with console.step(f"{arguments.runs} rounds of {names}") as step:
        measured, watch = measure(entries, runs=arguments.runs, on_turn=step.advance)
    warnings = list(watch.warnings())
    for typed, unmeasured in ((arguments.model, guessed), (arguments.compare, second and second[2])):
        if unmeasured:
            warnings.append(f"{typed}: threads not measured, they are computed: run `python -m runtime tune {typed}`")
    for each in (*found, *others):
        if each.case.lengths.gen < arguments.gen_tokens:
            name = each.case.model.name
            warnings.append(f"{name} ends early after every prompt tried: {each.case.lengths.gen} tokens are generated")
    return Result(
        depths=measured[: len(depths)],
        others=measured[len(depths) :],
        field=field,
        roof=roof,
        runs=arguments.runs,
        warnings=tuple(warnings),
    )


def _subject(
    arguments: argparse.Namespace, typed: str, depths: tuple[int, ...]
) -> tuple[Subject, tuple[Lengths, ...], bool]:
    """The model that was typed with the settings that every verb would give it.

    The context's length is what is to be measured takes, unless a flag, the environment or the recipe asks for one.
    Last comes whether the threads are computed ones, which nobody gave and nothing measured.
    """
    from runtime.bench.case import fitting_lengths, with_own_context
    from runtime.bench.measure import Subject
    from runtime.model_file import open_model
    from runtime.resolve import resolve
    from runtime.settings import asked
    from runtime.tune.record import threads_guessed
    from toolchain.base.gguf import read_header

    resolved = resolve(typed)
    header = open_model(resolved.path)
    lengths_asked = {"prompt": arguments.prompt_tokens, "gen": arguments.gen_tokens}
    deepest = fitting_lengths(header.n_ctx_train, depth=max(depths), **lengths_asked)
    wish = asked(recipe=resolved.runtime, env=os.environ, flags=flags_of(arguments)).get("n_ctx")
    if wish and arguments.prompt_tokens is None:
        room = int(wish.value) - deepest.n_ctx + deepest.prompt
        deepest = replace(deepest, prompt=max(1, min(deepest.prompt, room)))
    if wish and int(wish.value) < deepest.n_ctx:
        who = wish.reason or "the recipe's n_ctx"
        raise UsageError(
            f"{who} {wish.value} is less than the {deepest.n_ctx} tokens to be measured",
            hint=f"--n-ctx {deepest.n_ctx}, or lower --depth, --prompt-tokens or --gen-tokens",
        )
    n_ctx = arguments.n_ctx if wish else str(deepest.n_ctx)
    prepared = prepare(replace(request_of(arguments), model=typed, flags={**flags_of(arguments), "n_ctx": n_ctx}))
    settings = prepared.settings if wish else with_own_context(prepared.settings)
    # The same prompt at every depth: the one that the deepest leaves room for.
    lengths = (replace(deepest, depth=depth) for depth in depths)
    headers = tuple(header if path == header.path else read_header(path) for path in header.shard_paths)
    guessed = not arguments.no_tune and threads_guessed(header, prepared.machine, settings)
    return Subject(headers=headers, settings=settings), tuple(lengths), guessed


def _scouted(subject: Subject, lengths: tuple[Lengths, ...]) -> list[Scouted]:
    from runtime.bench.measure import scout

    return [scout(subject, each) for each in lengths]


def _depths(typed: str) -> tuple[int, ...]:
    """``0,2048`` as numbers, each once, in the order typed."""
    try:
        depths = tuple(dict.fromkeys(int(part) for part in typed.split(",")))
    except ValueError:
        depths = (-1,)
    if not all(0 <= depth <= _MOST_TOKENS for depth in depths):
        raise UsageError(f"--depth takes numbers of tokens, not {typed!r}", hint="such as --depth 0,2048")
    return depths


def _require_count(option: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise UsageError(f"{option} cannot be {value}", hint=f"from 1 to {most}")
