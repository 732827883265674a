"""Who takes part: our engine, llama-bench, llama-cpp-python; each turn is a child process of its own."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from runtime.bench.case import Case
from runtime.bench.tools import Tool
from toolchain.base import command
from toolchain.base.errors import (
    ArtifactError,
    CommandError,
    FoundryError,
    MemoryFitError,
    MissingError,
    UsageError,
)
from toolchain.base.files import PROJECT_ROOT

_ERRORS: Final = {kind.exit_code: kind for kind in (UsageError, MissingError, ArtifactError, MemoryFitError)}
_KEEP: Final = 8 << 20  # characters of a child's output


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One turn: tokens per second of the prompt and of the generation, medians of its replies."""

    prompt_tps: float
    generation_tps: float


@dataclass(frozen=True, kw_only=True)
class OwnSample(Sample):
    """One turn of ours, with what only we tell. ``buffers`` are the library's own, in bytes, by device and purpose."""

    ttft_ms: float
    generated: int
    overhead_us: float
    peak_rss_bytes: int
    buffers: Mapping[str, int]
    flash_attn: bool
    offloads: bool
    library_dir: Path
    log: str


class Contender(Protocol):
    """``contains`` says what is in its figures."""

    name: str
    contains: str

    def measure(self, case: Case, case_file: Path) -> Sample:
        """One turn, in a child. ``case_file`` holds ``case``."""


class Ours:
    name = "ours"
    contains = "greedy sampling, text, streaming, no lookup ahead; a random prompt"

    def measure(self, case: Case, case_file: Path) -> OwnSample:
        """One turn; raises what the engine raised in the child, as the same class."""
        del case
        found = _last_object(_python("runtime.bench.ours", case_file))
        if failed := found.get("failed"):
            kind = _ERRORS.get(failed["exit_code"], FoundryError)
            raise kind(failed["message"], evidence=failed["evidence"], hint=failed["hint"])
        return OwnSample(**{**found, "library_dir": Path(found["library_dir"])})


class LlamaBench:
    """Its generation starts at depth + prompt tokens, where ours does, so each turn is two runs of it."""

    name = "llama-bench"
    contains = "decoding alone: no sampling, no text; random tokens, also generated ones"

    def __init__(self, tool: Tool, *, flash_attn: bool) -> None:
        self._tool = tool
        self._flash_attn = flash_attn

    def measure(self, case: Case, case_file: Path) -> Sample:
        del case_file
        rates = []
        for generates in (False, True):
            argv = llama_bench_argv(self._tool.path, case, flash_attn=self._flash_attn, generates=generates)
            output = command.run(argv, what="measure with llama-bench", cwd=PROJECT_ROOT, keep=_KEEP).output
            rates.append(statistics.median(map(float, _last_object(output)["samples_ts"])))
        return Sample(prompt_tps=rates[0], generation_tps=rates[1])


class LlamaCppPython:
    name = "llama-cpp-python"
    contains = "create_completion: greedy sampling and text, not streamed; the same random prompt as ours"

    def __init__(self, *, flash_attn: bool) -> None:
        self._flash_attn = flash_attn

    def measure(self, case: Case, case_file: Path) -> Sample:
        found = _last_object(_python("runtime.bench.peer_llama_cpp", case_file, "1" if self._flash_attn else "0"))
        if found["generated"] != case.lengths.gen:
            raise CommandError(
                f"llama-cpp-python generated {found['generated']} tokens where we generate {case.lengths.gen}",
                hint="measure without the others: --no-peers",
            )
        return Sample(prompt_tps=found["prompt_tps"], generation_tps=found["generation_tps"])


def llama_bench_argv(program: Path, case: Case, *, flash_attn: bool, generates: bool) -> tuple[str, ...]:
    """The command that measures the prompt of ``case``, or its generation, with the same settings as ours."""
    lengths, number, text = case.lengths, case.settings.number, case.settings.text
    threads = number("n_threads" if generates else "n_threads_batch")
    depth = lengths.depth + (lengths.prompt if generates else 0)
    options: dict[str, str | int | Path] = {
        "-m": case.model.absolute(),
        "-r": case.repeat,
        "-o": "jsonl",
        "-t": threads,
        "-ngl": number("n_gpu_layers"),
        "-b": number("n_batch"),
        "-ub": number("n_ubatch"),
        "-ctk": text("type_k"),
        "-ctv": text("type_v"),
        "-fa": int(flash_attn),
        "-p": 0 if generates else lengths.prompt,
        "-n": lengths.gen if generates else 0,
        "-d": depth,
    }
    if experts := number("n_cpu_moe"):
        options["-ncmoe"] = experts
    if split := text("tensor_split"):
        options["-ts"] = split.replace(",", "/")
    return (str(program), *(str(part) for pair in options.items() for part in pair))


def _python(module: str, *arguments: str | Path) -> str:
    argv: Sequence[str | Path] = (sys.executable, "-m", module, *arguments)
    return command.run(argv, what="measure", cwd=PROJECT_ROOT, keep=_KEEP).output


def _last_object(output: str) -> dict[str, Any]:
    """The last line of a child's output that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            found = json.loads(line)
            assert isinstance(found, dict)
            return found
    raise CommandError(
        "a child that measures gave no figures",
        evidence=output[-2000:],
        hint="run the bench again; `./inv doctor` looks for what is missing",
    )
