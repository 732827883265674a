"""The tasks of `inv`. A body parses, calls one verb, reports; the work is in toolchain/ and runtime/."""

from __future__ import annotations

import difflib
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from invoke.context import Context
from invoke.exceptions import ParseError
from invoke.program import Program
from invoke.tasks import task

from toolchain.base import command, console, files
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, FoundryError, UsageError

DEMO_RECIPE = files.PROJECT_ROOT / "recipes" / "demo.yaml"
TIERS = ("unit", "build", "e2e", "fault", "gpu")


def foundry_task(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """An invoke task whose errors end as the exit codes of ``toolchain.base.errors``."""

    def decorate(body: Callable[..., None]) -> Any:
        @task(**options)
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> None:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                body(*args, **kwargs)
            except FoundryError as error:
                console.failure(error)
                sys.exit(error.exit_code)
            except BrokenPipeError:
                _nobody_reads()
            except KeyboardInterrupt:
                console.warn("interrupted; finished steps are kept, and the same command goes on after them")
                sys.exit(INTERRUPTED_EXIT_CODE)
            except Exception:
                traceback.print_exc()
                sys.exit(1)

        return run

    return decorate


@foundry_task(
    iterable=["define"],
    help={
        "legacy-finetune": "the LoRA trainer of 2023, beside the other toolchains",
        "prebuilt": "install a wheel that fits this machine instead of compiling",
        "index": "where --prebuilt looks: an index's URL or a folder",
        "sha256": "the hash that the prebuilt wheel must have",
        "or-build": "compile when no prebuilt wheel fits",
        "source": "sdist:NAME==VERSION, git:URL@REF or path:DIR",
        "cuda": "for NVIDIA GPUs",
        "cuda-arch": "75,86,90, native or portable (default: the visible GPUs, else portable)",
        "cuda-toolkit": "a toolkit's folder, or `index` for the package index's (default: the newest that fits)",
        "cpu": "no accelerator (the default)",
        "blas": "openblas or blis",
        "vulkan": "GPUs of any maker through Vulkan",
        "rpc": "layers on other machines",
        "native": "code for this very CPU (the default)",
        "portable": "all CPU variants, the best one loaded at run time",
        "ui": "llama-server with its web page (needs node and npm)",
        "debug": "assertions and debug information, not optimized",
        "define": "an option for cmake, NAME=VALUE; repeatable",
        "jobs": "compilers at once (default: from CPU quota and memory)",
        "update": "ask again what a git branch or tag stands for",
        "no-use": "build it beside the current one and leave that in use",
        "dry-run": "say what would be built",
        "json": "one JSON object on stdout",
    },
)
def build(
    c: Context,
    cuda: bool = False,
    cuda_arch: str | None = None,
    cuda_toolkit: str | None = None,
    cpu: bool = False,
    blas: str | None = None,
    vulkan: bool = False,
    rpc: bool = False,
    native: bool = False,
    portable: bool = False,
    ui: bool = False,
    debug: bool = False,
    legacy_finetune: bool = False,
    prebuilt: bool = False,
    index: str | None = None,
    sha256: str | None = None,
    or_build: bool = False,
    source: str | None = None,
    define: Sequence[str] | None = None,
    jobs: str | None = None,
    update: bool = False,
    no_use: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Fetch and compile llama.cpp once; package and prove the Python bindings on it."""
    from toolchain.build import verbs
    from toolchain.build.install_prebuilt import parse_request

    variants = verbs.chosen_variants(
        cuda=cuda, cpu=cpu, vulkan=vulkan, rpc=rpc, native=native, portable=portable, ui=ui, debug=debug, blas=blas
    )
    request = verbs.request(
        source=source,
        defines=define or (),
        variants=variants,
        cuda_arch=cuda_arch,
        cuda_toolkit=cuda_toolkit,
        legacy=legacy_finetune,
        jobs=jobs,
        update=update,
    )
    if prebuilt:
        typed = {"--define": bool(define), "--cuda-arch": bool(cuda_arch), "--cuda-toolkit": bool(cuda_toolkit)}
        typed |= {"--jobs": bool(jobs), "--update": update, "--legacy-finetune": legacy_finetune}
        refused = [name for name, there in typed.items() if there and not or_build]
        wheel = parse_request(
            index=index,
            source=source,
            variants=variants if or_build else request.variants,
            sha256=sha256,
            only_for_builds=[*refused, *(["--no-use"] if no_use else [])],
        )
        if dry_run:
            verbs.show_prebuilt(wheel, as_json=json)
        else:
            verbs.prebuilt(wheel, otherwise=request if or_build else None, as_json=json)
    elif index or sha256 or or_build:
        raise UsageError("--index, --sha256 and --or-build belong to --prebuilt", hint="add --prebuilt")
    elif dry_run:
        verbs.show_configuration(request, as_json=json)
    else:
        verbs.build_and_use(request, use=not no_use, as_json=json)


@foundry_task(positional=["toolchain_id"], help={"toolchain-id": "the id, or enough of its beginning"})
def use(c: Context, toolchain_id: str) -> None:
    """Make another finished toolchain the current one."""
    from toolchain.build import verbs

    verbs.use(toolchain_id)


@foundry_task(help={"json": "one JSON object on stdout"})
def doctor(c: Context, json: bool = False) -> None:
    """Say what is wrong with machine, toolchain and bindings, and how to mend it."""
    from toolchain.build import verbs

    sys.exit(verbs.examine(as_json=json))


@foundry_task(
    positional=["recipe"],
    help={
        "recipe": "the recipe file",
        "dry-run": "print steps, commands, bytes and peak disk",
        "update": "ask the hub again what the revision stands for",
        "json": "one JSON object on stdout",
    },
)
def quantize(c: Context, recipe: str, dry_run: bool = False, update: bool = False, json: bool = False) -> None:
    """Make the files that a recipe promises: fetch, convert, quantize, evaluate."""
    from toolchain.pipeline import verbs

    if dry_run:
        verbs.show_plan(Path(recipe), update=update, as_json=json)
    else:
        verbs.quantize(Path(recipe), update=update, as_json=json)


@foundry_task(
    positional=["recipe"],
    help={
        "recipe": "the LoRA recipe's file; with --convert, --from-peft and --to-peft what is converted",
        "dry-run": "plan only: memory, time by a short probe, steps",
        "fresh": "train anew, not on from the last checkpoint or result",
        "convert": "OLD.bin, an adapter of llama.cpp's trainer of 2023, to GGUF",
        "from-peft": "FOLDER, an adapter in PEFT form, to GGUF",
        "to-peft": "ADAPTER.gguf to PEFT form",
        "base": "with these: the GGUF that the adapter is for",
        "output": "with these: what to write (default: beside what is read)",
        "json": "one JSON object on stdout",
    },
)
def lora(
    c: Context,
    recipe: str,
    dry_run: bool = False,
    fresh: bool = False,
    convert: bool = False,
    from_peft: bool = False,
    to_peft: bool = False,
    base: str | None = None,
    output: str | None = None,
    json: bool = False,
) -> None:
    """Train a LoRA adapter on a quantized model, and judge it; or convert one between forms."""
    from toolchain.lora import verbs

    form = verbs.chosen_form({"convert": convert, "from-peft": from_peft, "to-peft": to_peft}, base=base, output=output)
    if form:
        trains = {"--dry-run": dry_run, "--fresh": fresh}
        verbs.convert(form, Path(recipe), base=base, output=output, trains=trains, as_json=json)
    else:
        verbs.lora(Path(recipe), dry_run=dry_run, fresh=fresh, as_json=json)


@foundry_task(
    positional=["recipe"],
    help={
        "recipe": "a LoRA recipe whose adapter is trained already; with --base, an adapter's GGUF",
        "base": "the model that this adapter is for",
        "output": "with --base: the file to make (default: beside the adapter)",
        "type": "what the merged model is quantized to (default: the recipe's merge.type, else the base's own types)",
        "json": "one JSON object on stdout",
    },
)
def merge(
    c: Context,
    recipe: str,
    base: str | None = None,
    output: str | None = None,
    type: str | None = None,
    json: bool = False,
) -> None:
    """Merge a trained adapter into its base at full precision, and quantize the result."""
    from toolchain.lora import verbs

    verbs.merge(Path(recipe), base=base, output=output, asked_type=type, as_json=json)


@foundry_task(positional=["file"], help={"file": "a GGUF that `inv quantize`, `inv lora` or `inv merge` made"})
def verify(c: Context, file: str) -> None:
    """Check a made GGUF: header, size and SHA-256 against its sidecar."""
    from toolchain.pipeline import provenance

    noted = provenance.verify(Path(file))
    console.answer(f"{file}: sound, sha256 {noted['sha256']}")


@foundry_task(help={"prompt": "what to say to the model"})
def demo(c: Context, prompt: str = "The import statement") -> None:
    """From nothing to text: build, make a small model, quantize it, judge it, let it talk."""
    from toolchain.pipeline import verbs

    verbs.quantize(DEMO_RECIPE)
    argv = (sys.executable, "-m", "runtime", "complete", str(DEMO_RECIPE), "-p", prompt, "-n", "64", "--seed", "1")
    console.say(f"$ python {command.shown(argv[1:])}")
    command.attach(argv, what="generating text")
    console.say(
        f"talk with it: . .venv/bin/activate; python -m runtime chat {DEMO_RECIPE.relative_to(files.PROJECT_ROOT)}"
    )


@foundry_task(
    help={
        "unused": "also the toolchains that are not in use",
        "toolchain": "also the toolchains in use: the next build compiles again",
        "all": "all that can be made again",
    }
)
def clean(c: Context, unused: bool = False, toolchain: bool = False, all: bool = False) -> None:
    """Delete what can be rebuilt: intermediate files and logs; results in models/ stay."""
    from toolchain.build import verbs

    verbs.clean(unused=unused or toolchain, used=toolchain, everything=all)


@foundry_task(name="test", help={"tier": "unit, build, e2e, fault or gpu (default: all but gpu)", "k": "pytest's -k"})
def test_(c: Context, tier: str | None = None, k: str | None = None) -> None:
    """Run the tests, building what they need."""
    if tier is not None and tier not in TIERS:
        raise UsageError(f"no test tier {tier}", hint=f"there are: {', '.join(TIERS)}")
    folders = [f"tests/{name}" for name in ([tier] if tier else TIERS[:-1])]
    argv = (sys.executable, "-m", "pytest", *folders, *(("-k", k) if k else ()))
    command.attach(argv, what="tests", cwd=files.PROJECT_ROOT)


@foundry_task()
def check(c: Context) -> None:
    """Lint, format, types, import rules, and generated files."""
    from runtime.llama.reference import check_reference
    from toolchain.lora import verbs as lora_verbs
    from toolchain.pipeline import verbs

    for argv in (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("lint-imports",)):
        tool = Path(sys.executable).parent / argv[0]
        command.attach((tool, *argv[1:]), what=" ".join(argv), cwd=files.PROJECT_ROOT)
    verbs.check_schema(files.PROJECT_ROOT / "recipes")
    lora_verbs.check_schema(files.PROJECT_ROOT / "recipes" / "lora")
    check_reference(files.PROJECT_ROOT / "docs")


@foundry_task()
def schema(c: Context) -> None:
    """Write the recipes' schema files from the recipe models."""
    from toolchain.lora import verbs as lora_verbs
    from toolchain.pipeline import verbs

    verbs.write_schema(files.PROJECT_ROOT / "recipes")
    lora_verbs.write_schema(files.PROJECT_ROOT / "recipes" / "lora")


@foundry_task()
def reference(c: Context) -> None:
    """Write the reference of LLaMa into docs/llama.md from its docstrings."""
    from runtime.llama.reference import write_reference

    write_reference(files.PROJECT_ROOT / "docs")


class Front(Program):
    """invoke's own program, but a mistake on the command line is a usage error (2), with what was meant."""

    def parse_core(self, argv: list[str] | None) -> None:
        try:
            super().parse_core(argv)
        except ParseError as error:
            self._refuse(error)

    def parse_tasks(self) -> None:
        try:
            super().parse_tasks()
        except ParseError as error:
            self._refuse(error)

    def _refuse(self, error: ParseError) -> NoReturn:
        typed = next(iter(re.findall(r"'([^']+)'", str(error))), "")
        in_task = error.context if error.context and error.context.name else None
        if in_task:
            known, usual = [*in_task.flags], f"`./inv --help {in_task.name}` shows its options"
        else:
            known, usual = (
                [*self.collection.task_names] if hasattr(self, "collection") else [],
                "`./inv` lists the tasks",
            )
        near = difflib.get_close_matches(typed, known, n=1)
        console.failure(UsageError(str(error).rstrip("!"), hint=f"did you mean {near[0]}?" if near else usual))
        sys.exit(UsageError.exit_code)


def main(argv: list[str]) -> None:
    """Run what was typed; `inv TASK --help` is what everybody tries for `inv --help TASK`."""
    if len(argv) > 2 and argv[-1] in ("-h", "--help") and argv[-2].isidentifier():
        argv = [*argv[:-2], "--help", argv[-2]]
    try:
        Front(name="inv", binary="inv").run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        _nobody_reads()


def _nobody_reads() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(sys.argv)
