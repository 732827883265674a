"""llama-cpp-python packaged around the libraries of a build, installed, and proven by a child process."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from toolchain.base import command, console, files
from toolchain.base.errors import ArtifactError, FoundryError, MissingError, UsageError
from toolchain.build.pin import DEFAULT_PIN, SourceTree, parse_pin
from toolchain.build.source import fetch_source

DISTRIBUTION = "llama_cpp_python"
LAYOUT = 2  # raise when what goes into the wheel changes: it is part of a Toolchain's id

# The bindings open libllama and libmtmd, and these bring the ggml libraries along.
LIBRARIES = re.compile(r"lib(llama|mtmd|ggml(-\w+)*)\.(so|dylib)")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the child found in the library that ``import llama_cpp`` really loads."""

    version: str
    commit: str
    backends: tuple[str, ...]
    library: str


def package(tree: SourceTree, *, lib_dir: Path, toolchain_id: str, out: Path) -> Path:
    """The wheel: the Python package of ``tree`` (or of the default pin, for a bare llama.cpp) plus libraries.

    Nothing is compiled; the package's own build backend makes the wheel. Its version carries the local part
    ``+cpu.gCOMMIT.bDIGEST``: letters first, since version numbers lose leading zeros.
    """
    sources = tree.bindings or fetch_source(parse_pin(DEFAULT_PIN)).bindings
    assert sources is not None
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=files.home_dir("work"), prefix="wheel-") as scratch:
        stage = Path(scratch)
        shutil.copytree(sources / "llama_cpp", stage / "llama_cpp", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE.md"):
            if (sources / name).is_file():
                shutil.copy2(sources / name, stage / name)
        commit, _, digest = toolchain_id.partition("-")
        local = f"{_flavour(lib_dir)}.g{commit}.b{digest}"
        _write_version(stage / "llama_cpp" / "__init__.py", local)
        libraries = stage / "llama_cpp" / "lib"
        libraries.mkdir(exist_ok=True)
        for library in sorted(lib_dir.iterdir()):
            if LIBRARIES.fullmatch(library.name):
                shutil.copy2(library, libraries / library.name)
        hook = (
            "import sys; from scikit_build_core.build import build_wheel; "
            "build_wheel(sys.argv[1], {'wheel.cmake': 'false', 'wheel.platlib': 'true'})"
        )
        command.run([sys.executable, "-c", hook, out], what="packaging llama-cpp-python", cwd=stage)
    return next(out.glob("*.whl"))


def prove_wheel(wheel: Path, *, commit: str) -> Proof:
    """Unpack ``wheel`` somewhere else and prove it there; raises ArtifactError when it does not hold."""
    with tempfile.TemporaryDirectory(dir=files.home_dir("work"), prefix="proof-") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        return prove(commit=commit, path=Path(scratch))


def prove(*, commit: str, path: Path | None = None) -> Proof:
    """Import llama_cpp in a child (from ``path``, else as installed) and make it compute.

    Raises ArtifactError when it does not load, is of another commit, or computes wrong numbers.
    """
    child = Path(__file__).with_name("prove_child.py")
    environment = {"PYTHONPATH": str(path) if path else None, "LLAMA_CPP_LIB_PATH": None}
    try:
        output = command.run([sys.executable, child], what="proving the bindings", env=environment).output
        found = json.loads(output.splitlines()[-1])
    except (FoundryError, ValueError, IndexError) as error:
        evidence = error.evidence if isinstance(error, FoundryError) else str(error)
        raise ArtifactError(
            "the Python bindings do not work with the libraries of this build",
            evidence=evidence,
            hint="the bindings must match llama.cpp's commit: build the default source, or a pin of llama-cpp-python",
        ) from error
    if found["commit"].split("-")[0] != commit:  # older trees add -dirty outside a repository
        raise ArtifactError(
            "the bindings load another llama.cpp than the one just built",
            evidence=f"built {commit}, loaded {found['commit']} from {found['library']}",
            hint="unset LD_LIBRARY_PATH and LD_PRELOAD, then run `./inv build` again",
        )
    return Proof(
        version=found["version"], commit=found["commit"], backends=tuple(found["backends"]), library=found["library"]
    )


def ensure_installed(wheel: Path, *, version: str, commit: str) -> None:
    """Make ``wheel`` what ``import llama_cpp`` finds in the virtual environment that runs us, and prove it there.

    What was proven is noted in the environment, so a second call costs nothing; bindings that fail the proof
    are taken out again.
    """
    if sys.prefix == sys.base_prefix:
        raise MissingError(
            "no virtual environment to install the bindings into",
            evidence=f"running under {sys.executable}",
            hint="use `./inv build`, or activate .venv first",
        )
    note = Path(sys.prefix) / "llama_cpp.proven.json"
    wanted = {"version": version, "wheel": wheel.name}
    with files.locked(note.with_suffix(".lock"), lambda pid: console.say(f"waiting for process {pid} (bindings)")):
        if files.read_json(note) == wanted and _installed_version() == version:
            return
        note.unlink(missing_ok=True)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
        with console.step(f"install llama-cpp-python {version}"):
            # its needs are in our own lock
            quietly = ("--no-deps", "--no-index", "--force-reinstall")
            command.run((*pip, "install", *quietly, str(wheel)), what="installing the bindings")
            try:
                prove(commit=commit)
            except FoundryError:
                command.run((*pip, "uninstall", "--yes", DISTRIBUTION), what="taking the bindings out again")
                raise
        files.write_json(note, wanted)


def _installed_version() -> str | None:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def _flavour(lib_dir: Path) -> str:
    """The accelerator that the libraries carry, as wheels name it."""
    backends = ("cuda", "hip", "vulkan", "sycl", "metal")
    return next((name for name in backends if list(lib_dir.glob(f"libggml-{name}.*"))), "cpu")


def _write_version(init: Path, local: str) -> None:
    text, count = re.subn(
        r'^(__version__\s*=\s*["\'][^"\'+]+)(?:\+[^"\']*)?(["\'])', rf"\g<1>+{local}\g<2>", init.read_text(), flags=re.M
    )
    if count != 1:
        raise UsageError(f"{init} states no version", hint="is this llama-cpp-python?")
    init.write_text(text)
