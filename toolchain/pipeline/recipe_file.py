"""A recipe's file: YAML read strictly, checked against a pydantic model, every error with its line.

What a model's fields may be is the business of the recipe at hand (``recipe.py``, ``lora/recipe.py``).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from toolchain.base.errors import UsageError

MAX_RECIPE_BYTES = 1 << 20
# pydantic's own words for these speak of Python's types.
PLAINLY = {
    "missing": "is missing",
    "model_type": "is made of keys and values: write `{KEY: VALUE}`",
    "tuple_type": "is a list: write `- ENTRY`, or `[ENTRY]`",
    "string_type": "is text: put it in quotes",
    "too_short": "needs at least one entry that is right",
}


class Strict(BaseModel):
    """The base of every part of a recipe: unknown keys are errors, values are not converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


M = TypeVar("M", bound=BaseModel)


def read_recipe(path: Path, model: type[M], *, schema: str, example: str) -> M:
    """The recipe at ``path`` as a ``model``; UsageError with line numbers for all that is wrong with it.

    ``schema`` and ``example`` are the files to look at, relative to the project, that the error names.
    """
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UsageError(f"{path} is too large for a recipe", hint="recipes are small YAML files; see recipes/")
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = _plain(node, path)
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}", hint=_other_recipes(path)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", evidence=str(error), hint="a recipe is a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two: what a scalar or nesting can do
        raise UsageError(f"{path} is not valid YAML", evidence=str(error), hint="mend the line it names") from error
    try:
        return model.model_validate(loaded)
    except ValidationError as error:
        lines = [_describe(problem, node, path, model) for problem in error.errors()]
        hint = f"the schema is {schema}; an example is {example}"
        raise UsageError(f"{path.name} is not a valid recipe", evidence="\n".join(lines), hint=hint) from error


def _plain(node: yaml.Node | None, path: Path) -> Any:
    """The node as plain values. Duplicate keys, aliases and tags of one's own are refused."""
    seen: set[int] = set()

    def walk(inner: yaml.Node) -> Any:
        if id(inner) in seen:
            raise UsageError(f"{_where(path, inner)}: aliases (*name) have no place in a recipe")
        seen.add(id(inner))
        match inner:
            case yaml.MappingNode():
                mapping: dict[Any, Any] = {}
                for key_node, value_node in inner.value:
                    key = walk(key_node)
                    if not isinstance(key, str):
                        raise UsageError(f"{_where(path, key_node)}: a key must be text")
                    if key in mapping:
                        raise UsageError(f"{_where(path, key_node)}: {key} is given twice")
                    mapping[key] = walk(value_node)
                return mapping
            case yaml.SequenceNode():
                return [walk(item) for item in inner.value]
            case _:
                loader = yaml.SafeLoader("")
                return loader.construct_object(inner)

    return walk(node) if node is not None else None


def _describe(problem: ErrorDetails, root: yaml.Node | None, path: Path, model: type[BaseModel]) -> str:
    where = [part for part in problem["loc"] if isinstance(part, str | int)]
    node, place = root, root
    for part in where:
        node, here = _child(node, part)
        place = here or place
    if problem["type"] == "extra_forbidden":
        key = str(where.pop())
        allowed = [*_model_at(model, where).model_fields]
        near = difflib.get_close_matches(key, allowed, n=1)
        message = f"unknown key {key}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(allowed)}")
    else:
        message = PLAINLY.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    keys = [str(part) for part in where if isinstance(part, int) or part.isidentifier()]  # not a union's types
    return f"{_where(path, place)}: {'.'.join(keys) + ': ' if keys else ''}{message}"


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node | None, yaml.Node | None]:
    """(the value below ``part``, the node whose line to name); (None, None) where the file has none."""
    if isinstance(node, yaml.MappingNode):
        return next(((value, key) for key, value in node.value if key.value == part), (None, None))
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None, None


def _where(path: Path, node: yaml.Node | None) -> str:
    line = node.start_mark.line + 1 if node is not None and node.start_mark else 1
    return f"{path.name}:{line}"


def _model_at(model: type[BaseModel], where: list[str | int]) -> type[BaseModel]:
    """The part of ``model`` that the keys ``where`` lead to; list indices stay within the list's entries."""
    for part in where:
        if isinstance(part, str) and (field := model.model_fields.get(part)):
            model = next(iter(_models_in(field.annotation)), model)
    return model


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The models that an annotation such as ``tuple[Quantization, ...]`` or ``Evaluation | None`` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _other_recipes(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = sorted(p.name for p in folder.glob("*.yaml"))
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {folder / near[0]}?"
    return f"{folder} has: {', '.join(names)}" if names else "recipes lie in recipes/"
