"""The files of a recipe's ``data`` part to one folder of tokens: the parent's side, which imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from toolchain.base import command, files
from toolchain.base.command import OnProgress
from toolchain.base.errors import CommandError, MissingError
from toolchain.lora.child_errors import raise_failure
from toolchain.lora.data.records import DataFile, check_files

REQUEST: Final = "request.json"
DATASET: Final = "dataset.npz"
TRAIN_TEXT: Final = "train.txt"
HELD_TEXT: Final = "held_out.txt"
FACTS: Final = "facts.json"


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """Everything that the tokens depend on, beside what stands in the files. Paths are absolute.

    ``base`` is the GGUF (its first shard) whose vocabulary and template make the tokens. ``held_out`` is the share of
    ``sources`` that is kept for the evaluation, unless ``held_out_file`` is there for it.
    """

    base: str
    sources: tuple[DataFile, ...]
    held_out: float
    held_out_file: DataFile | None
    n_ctx: int
    packing: bool
    learn_prompts: bool
    seed: int
    n_threads: int

    @property
    def files(self) -> tuple[DataFile, ...]:
        return (*self.sources, self.held_out_file) if self.held_out_file else self.sources

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataRequest:
        held = value["held_out_file"]
        sources = tuple(DataFile(**source) for source in value["sources"])
        return cls(**{**value, "sources": sources, "held_out_file": DataFile(**held) if held else None})


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What became of the files. Without ``held_``: of what is learned, each file counted as often as it repeats.

    An example is a window of a text or a conversation, or one of its replies where the template writes earlier ones
    anew. ``tokens`` are those that a model is shown in an epoch, ``learned_tokens`` those that count in its loss;
    ``cut`` examples lost their end to n_ctx, ``dropped`` ones all that was to be learned. ``longest`` is in tokens,
    before the cut. ``leaked`` examples stand in the held-out file too and were left out. ``padding`` is the unused
    share of the rows. ``inputs`` are the SHA-256 of the files by their paths.
    """

    examples: int
    tokens: int
    learned_tokens: int
    rows: int
    cut: int
    dropped: int
    longest: int
    leaked: int
    padding: float
    held_examples: int
    held_tokens: int
    held_learned_tokens: int
    held_rows: int
    held_cut: int
    held_dropped: int
    has_template: bool
    """False: the model has none, and conversations became the plain dialogue of the runtime."""
    inputs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The dataset, and what is learned and held out as text; held_text is empty without a held-out part.

    In the texts a conversation is plain dialogue, whatever the model's template: llama-perplexity and the trainer of
    2023 read special tokens as plain characters.
    """

    dataset: Path
    train_text: Path
    held_text: Path
    facts: DataFacts


def prepare_data(request: DataRequest, folder: Path, *, log: Path, on_progress: OnProgress | None = None) -> Prepared:
    """Make ``folder``, or take what is there: the caller names it by all that it depends on, and holds its lock.

    The files are checked before anything is started. ``on_progress`` counts KiB of input. Raises UsageError for what
    is wrong with the files or with n_ctx, ArtifactError for a base that the library or its template refuses,
    MissingError for a full disk.
    """
    if made := read_prepared(folder):
        return made
    check_files(request.files)
    with files.staged(folder) as partial:
        partial.mkdir()
        files.write_json(partial / REQUEST, asdict(request))
        try:
            command.run(
                [sys.executable, "-m", "toolchain.lora.data.child", partial / REQUEST],
                what="preparing the data",
                cwd=files.PROJECT_ROOT,
                log=log,
                parse=command.parse_counter,
                on_progress=on_progress,
            )
        except (CommandError, MissingError) as error:
            raise_failure(partial, error)
        (partial / REQUEST).unlink()
    made = read_prepared(folder)
    assert made is not None
    return made


def read_prepared(folder: Path) -> Prepared | None:
    """What ``prepare_data`` made in ``folder``; None when it did not."""
    facts = files.read_json(folder / FACTS)
    if not isinstance(facts, dict):
        return None
    return Prepared(
        dataset=folder / DATASET,
        train_text=folder / TRAIN_TEXT,
        held_text=folder / HELD_TEXT,
        facts=DataFacts(**facts),
    )
