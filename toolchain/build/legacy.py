"""The LoRA trainer of 2023: which trees have it, how it is compiled and installed, and the proof that it trains.

llama.cpp carried ``finetune`` from September 2023 to July 2024 (pull requests 2632 and 8669). Until June 2024
(7809) its programs had no ``llama-`` in their names, and those trees are the ones meant here. The proof trains three
steps on a small model, merges the adapter into it and asks the merged model about the text: each of the four
programs has to do its part.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, files
from toolchain.base.errors import ArtifactError, CommandError, UsageError
from toolchain.build.ggla import AdapterTensor, read_adapter
from toolchain.build.options import ORIGIN, tree_options
from toolchain.build.pin import SourceTree

LEGACY_PIN = "sdist:llama-cpp-python==0.2.57"
FORK_PIN = "git:https://github.com/xaedes/llama.cpp@finetune-lora"
TRAINER_PROGRAMS = ("finetune", "export-lora", "main", "perplexity")
"""Names of cmake's targets and of the programs that they make."""

# What the trainer is built with where its tree knows the option. The programs are among the examples; native code
# is said aloud because its default was OFF before October 2023 and is ON since.
TREE_DEFAULTS: Mapping[str, str] = {
    "LLAMA_BUILD_EXAMPLES": "ON",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_NATIVE": "ON",
}

# cmake's own variables. Programs get their final RPATH when they are linked, since they are copied, not installed.
CMAKE_DEFAULTS: Mapping[str, str] = {
    "BUILD_SHARED_LIBS": "OFF",
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": f"{ORIGIN};{ORIGIN}/../lib",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "GIT_EXECUTABLE": "OFF",
}

# The proof's training. The rate is fifty times the default: three steps must show beyond any rounding. Measured on
# the default pin: losses 6.30, 5.91, 4.52, perplexity of the text from 517 to 38, all within 0.2 s.
STEPS, RANK, CONTEXT, BATCH, RATE, SEED = 3, 4, 32, 4, "0.05", 1
TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on\n" * 8
HINT = "build the trainer again with `./inv build --legacy-finetune`; native code runs on CPUs with the same features"


@dataclass(frozen=True, kw_only=True)
class TrainerProof:
    """What the proof measured.

    ``losses`` are the mean cross entropies (nats a token) that the trainer printed before each step, ``trained`` of
    ``pairs`` are the low-rank pairs that left zero, and the perplexities are of the text that was trained on.
    """

    losses: tuple[float, ...]
    rank: int
    pairs: int
    trained: int
    perplexity_base: float
    perplexity_merged: float
    seconds: float


def has_trainer(llama: Path) -> bool:
    """Whether the llama.cpp tree carries the trainer and the program that merges its adapters, by their old names."""
    listings = [llama / "examples" / name / "CMakeLists.txt" for name in ("finetune", "export-lora")]
    return all(one.is_file() and "llama-" not in one.read_text(errors="replace") for one in listings)


def require_trainer(tree: SourceTree) -> None:
    """Raise UsageError when ``tree`` has no trainer."""
    if not has_trainer(tree.llama):
        raise UsageError(
            f"{tree.pin} has no trainer",
            evidence=f"{tree.llama / 'examples'} has no finetune with export-lora, or has them as llama-finetune",
            hint=f"two pins that have it: --source {LEGACY_PIN} (the default) and --source {FORK_PIN}",
        )


def default_defines(llama: Path) -> dict[str, str]:
    """The cache variables of a trainer's build, as far as the tree knows them."""
    known = tree_options(llama)
    return {**CMAKE_DEFAULTS, **{name: value for name, value in TREE_DEFAULTS.items() if name in known}}


def install_programs(build_dir: Path, prefix: Path) -> None:
    """Copy the programs to ``prefix/bin`` and shared libraries, if any were built, to ``prefix/lib``.

    ``cmake --install`` would ask for every target of the tree. Raises ArtifactError when a program is not there.
    """
    missing = [name for name in TRAINER_PROGRAMS if not (build_dir / "bin" / name).is_file()]
    if missing:
        raise ArtifactError(
            f"the build made no {', '.join(missing)}",
            evidence=f"looked in {build_dir / 'bin'}",
            hint="run the same `./inv build` again and read its log",
        )
    libraries = [path for path in sorted(build_dir.rglob("lib*")) if path.suffix in (".so", ".dylib")]
    with files.disk_errors(prefix):
        (prefix / "bin").mkdir(parents=True, exist_ok=True)
        (prefix / "lib").mkdir(exist_ok=True)
        for name in TRAINER_PROGRAMS:
            shutil.copy2(build_dir / "bin" / name, prefix / "bin" / name)
        for library in libraries:
            shutil.copy2(library, prefix / "lib" / library.name)


def prove_trainer(bin_dir: Path, *, env: Mapping[str, str | None] | None = None, on_gpu: bool = False) -> TrainerProof:
    """Train, merge, judge and generate with the programs in ``bin_dir``, in a scratch folder of FOUNDRY_HOME.

    ``env`` is added to their environment; ``on_gpu``: the merged model's layers must lie on a GPU. Raises
    ArtifactError, with what a program said last, when one fails, when the loss does not fall, when the adapter is not
    what was asked for, or when the merged model knows the text no better than its base does.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=files.home_dir("work"), prefix="trainer-") as scratch:
        bench = _Bench(bin_dir=bin_dir, folder=Path(scratch), env=env or {})
        model_program = Path(__file__).with_name("trainer_model.py")
        command.run([sys.executable, model_program, bench.base], what="making the proof's base model")
        bench.text.write_text(TEXT)
        losses = _train(bench)
        pairs = _check_adapter(bench.adapter)
        trained = sum(b.values.any() for _, b in pairs)
        base, merged = _merge_and_judge(bench)
        told = bench.run(
            "main", "-m", bench.merged, "-p", "the quick", "-n", 4, "-t", 1, "-c", CONTEXT, "--seed", SEED, "-ngl", 99
        )
        offloaded = re.search(r"offloaded (\d+)/(\d+) layers to GPU", told)
        if on_gpu and not (offloaded and offloaded[1] == offloaded[2]):
            raise _refused("a GPU is visible, and the model is not on it", _tail(told))
    return TrainerProof(
        losses=losses,
        rank=RANK,
        pairs=len(pairs),
        trained=int(trained),
        perplexity_base=base,
        perplexity_merged=merged,
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """The programs under test and the scratch folder that they work in."""

    bin_dir: Path
    folder: Path
    env: Mapping[str, str | None]

    @property
    def base(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def merged(self) -> Path:
        return self.folder / "merged.gguf"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter.bin"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    def run(self, name: str, *arguments: str | Path | int) -> str:
        """The program's output; ArtifactError when it does not end with 0."""
        argv: list[str | Path] = [self.bin_dir / name, *map(str, arguments)]
        try:
            return command.run(argv, what="proving the trainer", cwd=self.folder, env=self.env, hint=HINT).output
        except CommandError as error:
            raise _refused(error.message, error.evidence) from error


def _train(bench: _Bench) -> tuple[float, ...]:
    """The loss before each step, as the trainer prints them; it prints none after the last."""
    paths = ("--model-base", bench.base, "--train-data", bench.text, "--lora-out", bench.adapter)
    fresh = ("--checkpoint-in", bench.folder / "none", "--checkpoint-out", "", "--save-every", 0, "--seed", SEED)
    size = ("--lora-r", RANK, "--ctx", CONTEXT, "--batch", BATCH, "--threads", 1)
    rate = ("--adam-iter", STEPS, "--adam-alpha", RATE, "--warmup", 0)
    output = bench.run("finetune", *paths, *fresh, *size, *rate)
    printed = {int(step): _number(loss) for step, loss in re.findall(r"\biter=\s*(\d+)\b.*?\bloss=(\S+)", output)}
    losses = tuple(printed[step] for step in range(1, STEPS + 1) if step in printed)
    told = ", ".join(f"{loss:.4f}" for loss in losses)
    if len(losses) < STEPS:
        raise _refused(f"the trainer took {len(losses)} of {STEPS} steps", _tail(output))
    if not all(map(math.isfinite, losses)):
        raise _refused("the trainer's loss is not finite", f"losses: {told}\n{_tail(output)}")
    if losses[-1] >= losses[0]:
        raise _refused("the trainer's loss does not fall", f"losses: {told}\n{_tail(output)}")
    return losses


def _check_adapter(path: Path) -> list[tuple[AdapterTensor, AdapterTensor]]:
    """The pairs (A, B) of the adapter. B begins as zero: an adapter with nothing but zeros there learned nothing."""
    adapter = read_adapter(path)
    pairs = adapter.pairs()
    if adapter.rank != RANK:
        raise _refused("the adapter has the wrong rank", f"asked for {RANK}, its header says {adapter.rank}")
    for a, b in pairs:
        wanted = 1 if "_norm." in a.name else RANK  # vectors (norms) are trained with rank 1
        if (a.shape[0], b.shape[0]) != (wanted, wanted):
            raise _refused("the adapter has the wrong rank", f"{a.name} {a.shape}, {b.name} {b.shape}: not {wanted}")
        if not all(map(math.isfinite, (*a.values, *b.values))):
            raise _refused("the adapter holds numbers that are not finite", f"in {a.name} or {b.name}")
    if not any(b.values.any() for _, b in pairs):
        raise _refused("the adapter changes nothing", f"B is zero in all of its {len(pairs)} pairs")
    return pairs


def _merge_and_judge(bench: _Bench) -> tuple[float, float]:
    """Perplexity of the text under the base model and under the merged one."""
    bench.run("export-lora", "-m", bench.base, "-l", bench.adapter, "-o", bench.merged, "-t", 1)
    found = []
    for model in (bench.base, bench.merged):
        output = bench.run("perplexity", "-m", model, "-f", bench.text, "-c", CONTEXT, "-b", CONTEXT, "-t", 1)
        # the last word, or where a tree of 2023 has none the last of the running estimates
        values = re.findall(r"PPL = (\S+)", output) or re.findall(r"\[\d+\]([^,\s]+)", output)
        found.append(_number(values[-1]) if values else math.nan)
        if not math.isfinite(found[-1]):
            raise _refused(f"the perplexity of {model.name} cannot be had", _tail(output))
    base, merged = found
    if merged >= base:
        raise _refused(
            "the merged model has learned nothing", f"perplexity of the training text: base {base}, merged {merged}"
        )
    return base, merged


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _tail(output: str) -> str:
    return "\n".join(output.splitlines()[-command.TAIL_LINES :])


def _refused(message: str, evidence: str) -> ArtifactError:
    return ArtifactError(f"the trainer fails its proof: {message}", evidence=evidence, hint=HINT)
