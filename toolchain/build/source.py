"""Where llama.cpp's source comes from: a pin in, a SourceTree on disk out.

Three kinds of pin: ``sdist:NAME==VERSION`` (a source archive of llama-cpp-python, which carries a complete
llama.cpp), ``git:URL@REF`` and ``path:DIR``. What a moving name (a branch, a tag) stood for is recorded and
reused, so that the same request means the same source until it is asked again with ``--update``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from toolchain.base import files
from toolchain.base.command import OnProgress
from toolchain.base.errors import UsageError
from toolchain.build.gitref import fetch_git
from toolchain.build.pin import SourcePin, SourceTree, locate
from toolchain.build.sdist import fetch_sdist

# What the copy leaves out: other builds, and models that a user keeps in a checkout.
NOT_COPIED = (".git", "build", "*.gguf", "*.bin", "*.pth", "*.safetensors")


def fetch_source(pin: SourcePin, *, update: bool = False, on_progress: OnProgress | None = None) -> SourceTree:
    """The tree of ``pin``: from FOUNDRY_HOME/sources when it is there, else fetched.

    ``update`` asks again what a branch or tag stands for. Raises FetchError when it cannot be had or has
    the wrong hash, UsageError when it is no llama.cpp.
    """
    match pin.kind:
        case "sdist":
            return fetch_sdist(pin, on_progress)
        case "git":
            return fetch_git(pin, update)
        case "path":
            return _read_path(pin)


def writes_among_its_sources(llama: Path) -> bool:
    """Whether compiling the tree changes it, as it did from 2023 to 2024; then it is built from a copy."""
    return any((llama / "scripts" / name).is_file() for name in ("gen-build-info-cpp.cmake", "build-info.h.in"))


def stage_source(tree: SourceTree, into: Path) -> Path:
    """A copy of the tree's llama.cpp at ``into`` to build from; one that is there already is left as it is.

    Such trees write ``build-info.cpp`` (before: ``build-info.h``) among their own sources while they build, from
    what git says about whichever repository lies around them. The copy keeps the source as it was fetched, and in
    it the template names the tree's commit.
    """
    if into.is_dir():
        return into
    with files.disk_errors(into), files.staged(into) as partial:
        shutil.copytree(tree.llama, partial, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for template in (*partial.glob("common/build-info.*.in"), *partial.glob("scripts/build-info.*.in")):
            text = template.read_text().replace("@BUILD_COMMIT@", tree.short_commit)
            template.write_text(text.replace("@BUILD_NUMBER@", "0"))
    return into


def _read_path(pin: SourcePin) -> SourceTree:
    root = Path(pin.name)
    if not root.is_dir():
        raise UsageError(f"no such directory: {root}", hint="path: takes the folder of a llama.cpp source tree")
    llama, bindings = locate(root, str(pin))
    content = files.tree_digest(root, skip=frozenset({".git", "build", "__pycache__", "node_modules"}))
    return SourceTree(pin=str(pin), llama=llama, bindings=bindings, digest=content, commit=f"tree-{content[:12]}")
