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

from toolchain.base import command, files
from toolchain.base.errors import ArtifactError, FoundryError, MissingError, UsageError
from toolchain.build.pin import DEFAULT_PIN, SourceTree, parse_pin
from toolchain.build.source import fetch_source

DISTRIBUTION = "llama_cpp_python"
LAYOUT = 1  # raise when what goes into the wheel changes: it is part of a Toolchain's id

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
    ``+cpu.ID``.
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
        _write_version(stage / "llama_cpp" / "__init__.py", f"{_flavour(lib_dir)}.{toolchain_id.replace('-', '.')}")
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
    if not commit.startswith(found["commit"].split("-")[0]):
        raise ArtifactError(
            "the bindings load another llama.cpp than the one just built",
            evidence=f"built {commit[:12]}, loaded {found['commit']} from {found['library']}",
            hint="unset LD_LIBRARY_PATH and LD_PRELOAD, then run `inv build` again",
        )
    return Proof(
        version=found["version"], commit=found["commit"], backends=tuple(found["backends"]), library=found["library"]
    )


def installed_version() -> str | None:
    """The version of the bindings in this environment, read from its metadata."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def install(wheel: Path) -> None:
    """Install ``wheel`` into the virtual environment that runs us; its needs are in our own lock."""
    if sys.prefix == sys.base_prefix:
        raise MissingError(
            "no virtual environment to install the bindings into",
            evidence=f"running under {sys.executable}",
            hint="use `./inv build`, or activate .venv first",
        )
    quietly = ("--quiet", "--no-deps", "--no-index", "--force-reinstall")
    argv = (sys.executable, "-m", "pip", "install", *quietly, str(wheel))
    command.run(argv, what="installing the bindings")


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
