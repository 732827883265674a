"""Where llama.cpp's source comes from: a pin in, a SourceTree on disk out.

Three kinds of pin: ``sdist:NAME==VERSION`` (a source archive of llama-cpp-python, which carries a complete
llama.cpp), ``git:URL@REF`` and ``path:DIR``. What a moving name (a branch, a tag) stood for is recorded and
reused, so that the same request means the same source until it is asked again with ``--update``.
"""

from __future__ import annotations

from pathlib import Path

from toolchain.base import files
from toolchain.base.command import OnProgress
from toolchain.base.errors import UsageError
from toolchain.build.gitref import fetch_git
from toolchain.build.pin import SourcePin, SourceTree, locate
from toolchain.build.sdist import fetch_sdist


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


def _read_path(pin: SourcePin) -> SourceTree:
    root = Path(pin.name)
    if not root.is_dir():
        raise UsageError(f"no such directory: {root}", hint="path: takes the folder of a llama.cpp source tree")
    llama, bindings = locate(root, str(pin))
    content = files.tree_digest(root, skip=frozenset({".git", "build", "__pycache__", "node_modules"}))
    return SourceTree(pin=str(pin), llama=llama, bindings=bindings, digest=content, commit=f"tree-{content[:12]}")
