"""Several models -> the preset file of llama-server's router, each model with its own planned settings.

The format is that of common/preset.cpp (0c1e570): a section names a model, keys are long options without dashes. A
value ends before ``;``, ``#`` and spaces at the end of its line, and there is no way to write them. A tag behind the
last colon of a name is spelled in capitals, whatever was written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import yaml

from runtime.resolve import Resolved, locate
from runtime.serve.command import Served, model_options
from toolchain.base import files
from toolchain.base.errors import FoundryError, UsageError

_UNWRITABLE: Final = re.compile(r"[;#\n\r]|^\s|\s$")
_UNFIT_NAME: Final = re.compile(r"[\[\],\n\r]|^\s|\s$|^(\*|default|)$")
_TAG: Final = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE)


def expand(typed: Sequence[str]) -> tuple[str, ...]:
    """The models that were typed, a folder of recipes standing for those of them that have a result."""
    found: list[str] = []
    for each in typed:
        recipes = sorted(files.expand(each).glob("*.yaml")) if files.expand(each).is_dir() else []
        made = [name for path in recipes if (name := _made(path))]
        if recipes and not made:
            raise UsageError(f"no recipe in {each} has a result yet", hint=f"make one: `./inv quantize {recipes[0]}`")
        found += made or [each]
    return tuple(found)


def distinct(models: Sequence[Served]) -> tuple[Served, ...]:
    """The models under names of their own: two of one name go by what was typed."""
    counts = Counter(spelled_name(model.name) for model in models)
    named = [
        replace(model, name=model.aliases[0], aliases=())
        if counts[spelled_name(model.name)] > 1 and model.aliases
        else model
        for model in models
    ]
    counts = Counter(spelled_name(model.name) for model in named)
    if twice := next((model.name for model in named if counts[spelled_name(model.name)] > 1), None):
        raise UsageError(f"{twice} is named twice", hint="name each model once")
    return tuple(named)


def preset_ini(models: Sequence[Served], *, at_start: int) -> str:
    """The preset file, of which the first ``at_start`` models are loaded when the router starts.

    Raises UsageError for a path or name that the format cannot hold.
    """
    names = {spelled_name(model.name) for model in models}
    blocks = []
    for number, model in enumerate(models):
        name = spelled_name(model.name)
        if _UNFIT_NAME.search(name):
            raise UsageError(f"{model.name!r} cannot be a model's name in a preset", hint="rename the file")
        others = [alias for alias in dict.fromkeys((model.name, *model.aliases)) if alias not in names]
        lines = [f"[{name}]", *(_line(key, value) for key, value in model_options(model))]
        if usable := [alias for alias in others if not _UNFIT_NAME.search(alias) and not _UNWRITABLE.search(alias)]:
            lines.append(_line("alias", ",".join(usable)))
        if number < at_start:
            lines.append(_line("load-on-startup", None))
        blocks.append("\n".join(lines))
    return "version = 1\n\n" + "\n\n".join(blocks) + "\n"


def spelled_name(name: str) -> str:
    """A name as the router spells it: what stands behind the last colon in capitals, or only its last part."""
    head, colon, tag = name.rpartition(":")
    if not colon:
        return name
    part = _TAG.search(tag)
    return f"{head}:{(part[1] if part else tag).upper()}"


def written(text: str) -> Path:
    """The file that holds ``text``, under a name of its content: the same models give the same command."""
    path = files.home_dir("logs") / f"serve-{files.sha256_text(text)[:12]}.ini"
    if not path.exists():
        with files.staged(path) as partial:
            partial.write_text(text)
    return path


def _line(key: str, value: str | None) -> str:
    if value is not None and _UNWRITABLE.search(value):
        raise UsageError(
            f"{value!r} cannot stand in a preset: it holds `;`, `#`, a line break or a space at an end",
            hint="rename the file, or serve it alone",
        )
    return f"{key} = {'true' if value is None else value}"


def _made(recipe: Path) -> str | None:
    """The recipe's name if its result is here."""
    try:
        name = yaml.safe_load(recipe.read_text())["name"]
        return str(name) if isinstance(locate(str(recipe)), Resolved) else None
    except (FoundryError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
