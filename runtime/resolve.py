"""What the user typed -> a GGUF file: a path, a recipe whose result lies in ``models/<name>/``, or one on the hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from runtime.hub_model import HubName, fetch_model, parse_hub_name
from runtime.legacy_ggml import converted, is_legacy_ggml
from runtime.settings import near_miss
from toolchain.base import files
from toolchain.base.errors import ArtifactError, FetchError, UsageError
from toolchain.hub.ggufs import RepoListing

_RECIPE: Final = re.compile(r"(?P<path>.+\.ya?ml)(?::(?P<type>[^:]*))?$")
_NAME: Final = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)(?::(?P<type>[^:/]*))?$")
_ADDRESS: Final = re.compile(r"https?://[^/]+/(?P<repo>[\w.-]+/[\w.-]+)")
_LISTED: Final = 12
_WHAT_TO_NAME: Final = "name a .gguf file, a recipe or a hub repository (owner/repo)"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The file to load, and of a recipe's result its name, its type and the recipe's ``runtime`` block.

    Of a model from the hub ``repo`` is the repository, ``type`` the quant and ``listing`` what else is there.
    """

    path: Path
    recipe: str | None = None
    repo: str | None = None
    type: str | None = None
    runtime: Mapping[str, object] = field(default_factory=dict)
    listing: RepoListing | None = None


def resolve(typed: str, *, root: Path = files.PROJECT_ROOT, models: Path | None = None) -> Resolved:
    """The file that ``typed`` means, downloaded first if it lies on the hub and nowhere here.

    Raises as ``locate`` does, and for a hub repository as ``hub_model.fetch_model`` does.
    """
    found = locate(typed, root=root, models=models)
    if isinstance(found, Resolved):
        return found
    try:
        fetched = fetch_model(found)
    except FetchError as error:
        here = f"no file and no recipe of that name is here, so {found.repo} on the hub was asked"
        error.evidence = f"{error.evidence}\n{here}".lstrip()
        raise
    return Resolved(path=fetched.path, repo=found.repo, type=fetched.quant.name, listing=fetched.listing)


def locate(typed: str, *, root: Path = files.PROJECT_ROOT, models: Path | None = None) -> Resolved | HubName:
    """The file that ``typed`` means if it is here, else the hub repository; nothing is fetched.

    A GGML ``.bin`` of 2023 means the GGUF made of it, now if this is its first use (see ``legacy_ggml.converted``).
    ``root`` is the project with its recipes, ``models`` holds the results. A path wins over a recipe's name, and
    both over a repository. Raises UsageError with a next step when there is no such file, and ArtifactError when
    a recipe's result is not what its manifest says.
    """
    if not typed.strip():
        raise UsageError("no model named", hint=_WHAT_TO_NAME)
    models = models or files.models_dir()
    path = files.expand(typed)
    if match := _RECIPE.fullmatch(typed):
        recipe = _find_recipe(files.expand(match["path"]), root)
        return _result(_recipe_name(recipe), match["type"], models, quantize=_shown(recipe, root))
    if path.is_dir():
        raise _is_directory(path)
    if path.exists():
        return Resolved(path=converted(path) if is_legacy_ggml(path) else path)
    if (named := _NAME.fullmatch(typed)) and (models / named["name"] / "manifest.json").exists():
        return _result(named["name"], named["type"], models, quantize=f"recipes/{named['name']}.yaml")
    on_hub = parse_hub_name(typed)
    if on_hub and not on_hub.repo.endswith(".gguf") and not Path(typed).parent.is_dir():
        return on_hub
    if named and (root / "recipes" / f"{named['name']}.yaml").exists():
        raise _not_quantized(named["name"], f"recipes/{named['name']}.yaml")
    if address := _ADDRESS.match(typed):
        raise UsageError(f"{typed} is an address", hint=f"a repository is named without its host: {address['repo']}")
    raise _no_file(path, models)


def _find_recipe(path: Path, root: Path) -> Path:
    for candidate in (path, root / path):
        if candidate.is_file():
            return candidate
    known = [_shown(p, root) for p in sorted((root / "recipes").glob("*.yaml"))]
    raise UsageError(
        f"no recipe {path}",
        evidence=f"recipes: {', '.join(known)}" if known else "",
        hint=near_miss(str(path), known) or "name a file in recipes/",
    )


def _recipe_name(recipe: Path) -> str:
    try:
        content = yaml.safe_load(recipe.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{recipe} cannot be read as a recipe", evidence=str(error)) from error
    match content:
        case {"name": str(name)} if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            return name
    raise UsageError(f"{recipe} has no usable name", hint="a recipe begins with `name: my-model`")


def _result(name: str, type_: str | None, models: Path, *, quantize: str) -> Resolved:
    folder = models / name
    content = files.read_json(folder / "manifest.json")
    if content is None:
        raise _not_quantized(name, quantize)
    again = f"`./inv quantize {quantize}`"
    artifacts = _artifacts(content)
    if not artifacts:
        raise ArtifactError(f"{folder / 'manifest.json'} lists no artifact", hint=f"make it again: {again}")
    types = [str(artifact["type"]) for artifact in artifacts]
    wanted = type_ or types[0]
    chosen = next((a for a in artifacts if str(a["type"]).lower() == wanted.lower()), None)
    if chosen is None:
        raise UsageError(
            f"{name} has no {wanted}",
            evidence=f"there are: {', '.join(types)}",
            hint=near_miss(wanted.upper(), types) or f"{name}:{types[0]}, or add the type to {quantize}",
        )
    path = folder / Path(str(chosen["file"])).name
    if not path.is_file():
        raise UsageError(f"{path} is gone", evidence=f"the manifest of {name} lists it", hint=f"make it again: {again}")
    size, promised = path.stat().st_size, chosen.get("bytes")
    if isinstance(promised, int) and size != promised:
        raise ArtifactError(
            f"{path.name} is not the file its manifest lists",
            evidence=f"{size} bytes, the manifest says {promised}",
            hint=f"make it again: {again}",
        )
    runtime = content.get("runtime") if isinstance(content, dict) else None
    return Resolved(
        path=path, recipe=name, type=str(chosen["type"]), runtime=runtime if isinstance(runtime, dict) else {}
    )


def _artifacts(content: object) -> list[dict[str, object]]:
    match content:
        case {"artifacts": list(items)}:
            return [item for item in items if isinstance(item, dict) and "type" in item and "file" in item]
    return []


def _shown(path: Path, root: Path) -> str:
    """The path as one would type it in the project."""
    absolute = path.absolute()
    return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(path)


def _not_quantized(name: str, recipe: str) -> UsageError:
    return UsageError(f"the recipe {name} has no result yet", hint=f"make it: `./inv quantize {recipe}`")


def _is_directory(path: Path) -> UsageError:
    old = [p for p in path.glob("*.bin") if is_legacy_ggml(p)]
    held = sorted(p.relative_to(path) for p in (*path.glob("*.gguf"), *path.glob("*/*.gguf"), *old))
    models = [p for p in held if not p.name.startswith("mmproj")] or held
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")) and not held:
        return UsageError(
            f"{path} is a model folder of original weights, which are quantized through a recipe first",
            evidence=f"recipes/mine.yaml:\n  name: mine\n  model: {{path: {path.absolute()}}}\n  quantize: [Q4_K_M]",
            hint="write that file, then `./inv quantize recipes/mine.yaml`",
        )
    return UsageError(
        f"{path} is a directory",
        evidence="\n".join(map(str, held[:_LISTED])) or "no .gguf file in it",
        hint=f"name the file: {path / models[0]}" if models else _WHAT_TO_NAME,
    )


def _no_file(path: Path, models: Path) -> UsageError:
    if path.is_symlink():
        return UsageError(f"{path} points to {path.readlink()}, which is not there", hint=_WHAT_TO_NAME)
    folder = path.parent
    beside = sorted(p.name for p in folder.glob("*.gguf")) if folder.is_dir() else []
    made = sorted(p.parent.name for p in models.glob("*/manifest.json"))
    if beside:
        evidence = f"{folder} holds: {', '.join(beside[:_LISTED])}"
    else:
        evidence = f"no .gguf file in {folder}" if folder.is_dir() else f"no directory {folder}"
    if made:
        evidence += f"\nrecipes with a result: {', '.join(made[:_LISTED])}"
    return UsageError(
        f"no file {path}",
        evidence=evidence,
        hint=_near_file(path.name, (*beside, *made)) or _WHAT_TO_NAME,
    )


def _near_file(name: str, known: Iterable[str]) -> str:
    """As ``near_miss``, without the ending that all names have in common."""
    by_stem = {each.removesuffix(".gguf"): each for each in known}
    close = difflib.get_close_matches(name.removesuffix(".gguf"), by_stem, n=1)
    return f"did you mean {by_stem[close[0]]}?" if close else ""
