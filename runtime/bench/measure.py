"""The run itself: find a prompt that does not end early, then rounds in which every contender takes its turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.bench.case import Case, Lengths, make_case, repeated, shortened
from runtime.bench.contenders import Contender, LlamaBench, LlamaCppPython, Ours, OwnSample, Sample
from runtime.bench.quiet import Watch
from runtime.bench.tools import Tool, find_llama_bench
from runtime.settings import Settings
from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader

_PROMPTS: Final = 8  # tried for one whose greedy continuation is long enough

OnTurn = Callable[[int, int], None]
"""Called with (turns done, turns in all)."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure; ``headers`` are those of all its files."""

    headers: tuple[GgufHeader, ...]
    settings: Settings


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One subject at one depth: the samples of each contender by name, ours among them."""

    subject: Subject
    case: Case
    samples: Mapping[str, tuple[Sample, ...]]

    @property
    def own(self) -> tuple[OwnSample, ...]:
        return tuple(sample for sample in self.samples[Ours.name] if isinstance(sample, OwnSample))


@dataclass(frozen=True, kw_only=True)
class Scouted:
    """A case whose generation does not end before its time, and what the run that showed it told."""

    case: Case
    sample: OwnSample


@dataclass(frozen=True, kw_only=True)
class Field:
    """Who takes part beside us, and who was left out, with the reason."""

    peers: tuple[Contender, ...]
    left_out: Mapping[str, str]
    tool: Tool | None


def scout(subject: Subject, lengths: Lengths) -> Scouted:
    """The case of ``subject`` to measure, found by a discarded run of ours, which also tells how long a reply takes.

    No contender bans the end of generation, which would add to what is measured: random prompts are tried until greedy
    generation goes on for ``lengths.gen`` tokens. Where none of eight does, the longest is kept and ``gen`` shortened.
    Raises UsageError when the model ends at once after each.
    """
    tried: list[Scouted] = []
    for seed in range(_PROMPTS):
        case = make_case(subject.headers[0], subject.settings, lengths, seed)
        sample = _turn(Ours(), case)
        assert isinstance(sample, OwnSample)
        tried.append(Scouted(case=case, sample=sample))
        if sample.generated >= lengths.gen:
            break
    best = max(tried, key=lambda each: each.sample.generated)
    sample, case = best.sample, best.case
    if sample.generated == 0:
        raise UsageError(f"{case.model.name} ends at once, whatever the prompt", hint="measure another model")
    case = shortened(case, min(lengths.gen, sample.generated))
    seconds = case.lengths.prompt / sample.prompt_tps + case.lengths.gen / sample.generation_tps
    return Scouted(case=repeated(case, seconds), sample=sample)


def gather_field(scouted: Scouted, wanted: bool) -> Field:
    """The peers on the library that our run used, with the flash attention that it settled on."""
    if not wanted:
        return Field(peers=(), left_out={each.name: "--no-peers" for each in (LlamaBench, LlamaCppPython)}, tool=None)
    flash_attn, peers, left_out = scouted.sample.flash_attn, list[Contender](), dict[str, str]()
    tool = find_llama_bench(scouted.sample.library_dir)
    if isinstance(tool, Tool):
        peers.append(LlamaBench(tool, flash_attn=flash_attn))
    else:
        left_out[LlamaBench.name] = tool
    if scouted.case.settings.number("n_cpu_moe"):
        left_out[LlamaCppPython.name] = "its API cannot keep experts on the CPU (n_cpu_moe)"
    else:
        peers.append(LlamaCppPython(flash_attn=flash_attn))
    return Field(peers=tuple(peers), left_out=left_out, tool=tool if isinstance(tool, Tool) else None)


def measure(
    entries: Sequence[tuple[Subject, Case, Sequence[Contender]]], *, runs: int, on_turn: OnTurn
) -> tuple[tuple[Measured, ...], Watch]:
    """``runs`` rounds over ``entries``: in each round every contender of every case takes one turn, always in the
    same order, so that what changes on the machine meets all of them. A round before these is discarded for peers;
    ours had its discarded run when its prompt was found.
    """
    turns = [(at, contender) for at, (_, _, field) in enumerate(entries) for contender in (Ours(), *field)]
    found: dict[tuple[int, str], list[Sample]] = {(at, contender.name): [] for at, contender in turns}
    first = [turn for turn in turns if not isinstance(turn[1], Ours)]
    total, done = len(first) + runs * len(turns), 0
    watch = Watch()
    for number in range(runs + 1):
        for at, contender in turns if number else first:
            sample = _turn(contender, entries[at][1])
            if number:
                found[at, contender.name].append(sample)
            done += 1
            on_turn(done, total)
    measured = tuple(
        Measured(
            subject=subject,
            case=case,
            samples={name: tuple(each) for (where, name), each in found.items() if where == at},
        )
        for at, (subject, case, _) in enumerate(entries)
    )
    return measured, watch


def _turn(contender: Contender, case: Case) -> Sample:
    with tempfile.TemporaryDirectory() as place:
        case_file = Path(place) / "case.json"
        case_file.write_text(case.to_json())
        return contender.measure(case, case_file)
