"""llama-cpp-python packaged around the libraries of a build as a wheel, and installed."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from toolchain.base import command, console, files
from toolchain.base.abi import compare
from toolchain.base.abi_verdict import LAYOUT_FILE
from toolchain.base.errors import FoundryError, MissingError, UsageError
from toolchain.base.machine import Compiler
from toolchain.build import abi, proof
from toolchain.build.cuda import CudaChoice
from toolchain.build.mends import mend
from toolchain.build.pin import DEFAULT_PIN, SourceTree, parse_pin
from toolchain.build.source import fetch_source
from toolchain.build.toolkit_parts import wheel_needs
from toolchain.build.variants import Variant

DISTRIBUTION = "llama_cpp_python"
LAYOUT = 5  # raise when what goes into the wheel or is noted of a build changes: it is part of a Toolchain's id

# The bindings open libllama and libmtmd, and these bring the ggml libraries along.
LIBRARIES = re.compile(r"lib(llama|mtmd|ggml([-_]\w+)*|ggml_shared)\.(so|dylib)")

# A build whose backends are loaded at run time looks for them beside the program, which for Python is the
# interpreter; so the package points at its own folder. Old bindings know nothing of such builds.
LOAD_BACKENDS = """

def _load_backends():
    import ctypes
    import pathlib

    folder = pathlib.Path(__file__).parent / "lib"
    library = next(folder.glob("libggml.*"))
    ctypes.CDLL(str(library)).ggml_backend_load_all_from_path(str(folder).encode())


_load_backends()
"""


def local_version(toolchain_id: str, lib_dir: Path, variants: Sequence[Variant], choice: CudaChoice | None) -> str:
    """What is inside, as a version's local part: ``cu130.sm90.rpc.gCOMMIT.bDIGEST``, ``cpu.portable.g...``.

    Commit and digest begin with a letter, since version numbers lose leading zeros.
    """
    commit, _, digest = toolchain_id.partition("-")
    parts = [_flavour(lib_dir)]
    if choice and choice.toolkit:
        parts = ["cu{}{}".format(*choice.toolkit.release)]
        sass = [code.arch for code in choice.wanted if code.kind == "sass"]
        ptx = [code.arch for code in choice.wanted if code.kind == "ptx" and code.arch not in sass]
        parts += [f"sm{arch}" for arch in sass] + [f"ptx{arch}" for arch in ptx]
    parts += [variant.tag for variant in variants if variant.tag and variant.tag not in parts]
    return ".".join((*parts, f"g{commit}", f"b{digest}"))


def package(
    tree: SourceTree,
    *,
    root: Path,
    compiler: Compiler,
    local: str,
    out: Path,
    loads_backends: bool = False,
    choice: CudaChoice | None = None,
    env: Mapping[str, str | None] | None = None,
) -> Path:
    """The wheel: the Python package of ``tree`` (or of the default pin, for a bare llama.cpp) plus libraries.

    Nothing of llama.cpp is compiled; the package's own build backend makes the wheel. ``root`` is the installed
    build, ``local`` the local part of the version. The bindings are held against the build's headers first: raises
    ArtifactError, field by field, when they disagree.
    """
    sources = tree.bindings or fetch_source(parse_pin(DEFAULT_PIN)).bindings
    assert sources is not None
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=files.home_dir("work"), prefix="wheel-") as scratch:
        stage = Path(scratch)
        package_dir = stage / "llama_cpp"
        shutil.copytree(sources / "llama_cpp", package_dir, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE.md"):
            if (sources / name).is_file():
                shutil.copy2(sources / name, stage / name)
        _write_version(package_dir / "__init__.py", local)
        _copy_libraries(root, package_dir)
        if loads_backends:
            init = package_dir / "__init__.py"
            init.write_text(init.read_text() + LOAD_BACKENDS)
        _write_layout(stage, include_dirs(root, tree), compiler, env)
        if choice and choice.toolkit:
            _write_needs(stage / "pyproject.toml", wheel_needs(choice.toolkit.release[0]))
        hook = (
            "import sys; from scikit_build_core.build import build_wheel; "
            "build_wheel(sys.argv[1], {'wheel.cmake': 'false', 'wheel.platlib': 'true'})"
        )
        command.run([sys.executable, "-c", hook, out], what="packaging llama-cpp-python", cwd=stage)
    return next(out.glob("*.whl"))


def ensure_installed(wheel: Path, *, version: str, commit: str | None, prebuilt: bool = False) -> None:
    """Make ``wheel`` what ``import llama_cpp`` finds in the virtual environment that runs us, and prove it there.

    What was proven is noted in the environment, by the wheel's hash, so a second call costs nothing; bindings that
    fail the proof are taken out again. ``commit`` None: any llama.cpp will do.
    """
    if sys.prefix == sys.base_prefix:
        raise MissingError(
            "no virtual environment to install the bindings into",
            evidence=f"running under {sys.executable}",
            hint="use `./inv build`, or activate .venv first",
        )
    wanted = {"version": version, "wheel": wheel.name, "sha256": files.known_sha256(wheel), "prebuilt": prebuilt}
    lock = _note().with_suffix(".lock")
    with files.locked(lock, lambda pid: console.say(f"waiting for process {pid} (bindings)")):
        if files.read_json(_note()) == wanted and installed_version() == version:
            return
        _note().unlink(missing_ok=True)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
        with console.step(f"install llama-cpp-python {version}"):
            # its needs are in our own lock
            quietly = ("--no-deps", "--no-index", "--force-reinstall")
            command.run((*pip, "install", *quietly, str(wheel)), what="installing the bindings")
            try:
                proof.prove(commit=commit)
            except FoundryError:
                command.run((*pip, "uninstall", "--yes", DISTRIBUTION), what="taking the bindings out again")
                raise
        files.write_json(_note(), wanted)


def installed_version() -> str | None:
    """The version of llama_cpp in this environment, None without one."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def prebuilt_version() -> str | None:
    """The version of the prebuilt wheel that is installed in this environment; None when none is."""
    match files.read_json(_note()):
        case {"prebuilt": True, "version": str(version)} if version == installed_version():
            return version
    return None


def include_dirs(root: Path, tree: SourceTree) -> list[Path]:
    """The headers of the build installed at ``root``; trees of before 2025 install only some, and keep theirs at the
    top.
    """
    installed = root / "include"
    return [installed] if (installed / "ggml.h").is_file() and (installed / "llama.h").is_file() else [tree.llama]


def _note() -> Path:
    return Path(sys.prefix) / "llama_cpp.proven.json"


def _flavour(lib_dir: Path) -> str:
    """The accelerator that the libraries carry, as wheels name it."""
    backends = ("cuda", "hip", "vulkan", "sycl", "metal")
    return next((name for name in backends if list(lib_dir.glob(f"libggml-{name}.*"))), "cpu")


def _copy_libraries(root: Path, package_dir: Path) -> None:
    """The libraries of ``root`` once each; backends that are loaded at run time are installed beside the programs.

    Bindings look in the package's folder ``lib``, those of before mid-2024 in the package itself.
    """
    in_lib = re.search(r'__file__\)+\s*/\s*"lib"', (package_dir / "llama_cpp.py").read_text(errors="replace"))
    into = package_dir / "lib" if in_lib else package_dir
    into.mkdir(exist_ok=True)
    for library in (entry for folder in ("lib", "bin") for entry in sorted((root / folder).glob("lib*"))):
        if LIBRARIES.fullmatch(library.name):
            shutil.copy2(library, into / library.name)


def _write_layout(
    stage: Path, include_dirs: Sequence[Path], compiler: Compiler, env: Mapping[str, str | None] | None
) -> None:
    """Prove the staged bindings against the headers, mending what is known, and write ``abi.json`` into the package."""
    package_dir = stage / "llama_cpp"
    declared = abi.declared_by(stage, env=env)
    layout = abi.compiled_layout(declared, include_dirs=include_dirs, compiler=compiler)
    for fault in mend(package_dir, compare(declared, layout)):
        console.say(f"  mended in the bindings: {fault}")
    layout = abi.prove_abi(path=stage, include_dirs=include_dirs, compiler=compiler, env=env)
    libraries = {
        path.name: files.sha256_file(path) for path in sorted(package_dir.rglob("*")) if LIBRARIES.fullmatch(path.name)
    }
    files.write_json(package_dir / LAYOUT_FILE, {**layout.to_json(), "libraries": libraries})


def _write_needs(pyproject: Path, needs: Sequence[str]) -> None:
    """Add requirements to the package's own, so that pip brings NVIDIA's libraries along elsewhere."""
    added = "".join(f"\n    \"{need}; platform_system == 'Linux'\"," for need in needs)
    text, count = re.subn(r"^dependencies = \[", lambda found: found[0] + added, pyproject.read_text(), flags=re.M)
    if count != 1:
        raise UsageError(f"{pyproject} lists no dependencies", hint="is this llama-cpp-python?")
    pyproject.write_text(text)


def _write_version(init: Path, local: str) -> None:
    text, count = re.subn(
        r'^(__version__\s*=\s*["\'][^"\'+]+)(?:\+[^"\']*)?(["\'])', rf"\g<1>+{local}\g<2>", init.read_text(), flags=re.M
    )
    if count != 1:
        raise UsageError(f"{init} states no version", hint="is this llama-cpp-python?")
    init.write_text(text)
