"""Text to learn that is on every machine with CPython: source code of its library, which the demo model never saw."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import Final

from toolchain.base import files
from toolchain.base.errors import MissingError, UsageError
from toolchain.lora.recipe import Data, Source

PREFIX: Final = "builtin:"
PYTHON_SOURCE: Final = f"{PREFIX}python-source"
_MODULES: Final = (
    *("argparse", "configparser", "contextlib", "dataclasses", "functools"),
    *("shlex", "string", "tempfile", "textwrap", "threading"),
)
"""Pure Python, there in every build of CPython, 390 KB in 3.11; PSF licence."""


def with_files(data: Data) -> Data:
    """``data`` with built-in texts written to FOUNDRY_HOME and named by their paths. UsageError for an unknown one."""
    held = data.held_out_file
    return data.model_copy(
        update={
            "sources": tuple(_with_file(source) for source in data.sources),
            "held_out_file": _with_file(held) if held else None,
        }
    )


def python_source() -> str:
    """The modules' source, one after another; it depends on the Python version."""
    return "\n\n".join(_module(name).read_text(encoding="utf-8").strip() for name in _MODULES) + "\n"


def _with_file(source: Source) -> Source:
    if source.text is None or not source.text.startswith(PREFIX):
        return source
    if source.text != PYTHON_SOURCE:
        near = difflib.get_close_matches(source.text, [PYTHON_SOURCE], n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else f"there is {PYTHON_SOURCE}"
        raise UsageError(f"no built-in text {source.text}", hint=hint)
    text = python_source()
    path = files.home_dir("work") / "texts" / f"python-source-{files.sha256_text(text)[:20]}.txt"
    if not path.exists():
        with files.disk_errors(path), files.locked(path.with_name(".lock")), files.staged(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return source.model_copy(update={"text": str(path)})


def _module(name: str) -> Path:
    found = importlib.util.find_spec(name)
    path = Path(found.origin) if found and found.origin else None
    if path is None or path.suffix != ".py" or not path.is_file():
        raise MissingError(
            f"the source of Python's module {name} is not there",
            evidence=f"its place: {path}",
            hint="install Python with its library's source, or name a text of your own in the recipe",
        )
    return path
