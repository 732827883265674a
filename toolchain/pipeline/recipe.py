"""A recipe: the YAML file that says which model becomes which files. Parsed once, here; trusted after.

Every error names the file and line and, for a near miss, what was probably meant.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from toolchain.base.errors import UsageError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.stages.convert import OutType
from toolchain.stages.demo_model import PRESETS
from toolchain.stages.quantize import BITS_PER_WEIGHT, NEEDS_IMATRIX

MAX_RECIPE_BYTES = 1 << 20
BUILTIN_CORPUS = "builtin:python-docs"
# pydantic's own words for these speak of Python's types.
PLAINLY = {
    "missing": "is missing",
    "model_type": "is made of keys and values, as in `model: {hub: OWNER/NAME}` (in quantize, a type's name will do)",
    "tuple_type": "is a list: write `- Q4_K_M`",
    "string_type": "is text: put it in quotes",
    "too_short": "needs at least one entry that is right",
}
SCHEMA_NAME = "recipe.schema.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(_Strict):
    """Where the weights come from: exactly one of hub, path, gguf and demo."""

    hub: str | None = Field(None, description="a repository on the Hugging Face hub, OWNER/NAME")
    path: str | None = Field(None, description="a Hugging Face model folder, relative to the recipe")
    gguf: str | None = Field(None, description="a GGUF in F32, F16 or BF16, relative to the recipe")
    demo: str | None = Field(None, description=f"a model that is made on this machine: {' or '.join(PRESETS)}")
    revision: str | None = Field(None, description="hub only: branch, tag or commit; main when left out")

    trust_remote_code: bool = Field(False, description="path only: let the tokenizer's own Python code run")

    @field_validator("demo")
    @classmethod
    def _known_demo(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"no demo model {value!r}; there are {', '.join(PRESETS)}")
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        named = [name for name in ("hub", "path", "gguf", "demo") if getattr(self, name) is not None]
        if len(named) != 1:
            given = f"{' and '.join(named)} are given" if named else "none is given"
            raise ValueError(f"exactly one of hub, path, gguf and demo is needed; {given}")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision goes with hub only")
        if self.trust_remote_code and self.path is None:
            raise ValueError("trust_remote_code goes with path only: code is never fetched from the hub")
        return self


class Conversion(_Strict):
    outtype: OutType = Field("auto", description="the float type of the conversion; auto keeps 16 bits")


class Quantization(_Strict):
    """One file to make. A plain type name in the recipe is short for ``{type: NAME}``."""

    type: str = Field(description="a llama-quantize type, as in Q4_K_M", json_schema_extra={"enum": [*BITS_PER_WEIGHT]})
    tensors: Mapping[str, str] = Field({}, description="tensor-name pattern: type, for tensors of their own type")
    suffix: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$", description="a file name part beside the type")

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        name = value.upper()
        if name not in BITS_PER_WEIGHT:
            near = difflib.get_close_matches(name, BITS_PER_WEIGHT, n=1)
            raise ValueError(f"no quantization type {value!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if name in NEEDS_IMATRIX:
            raise ValueError(f"{name} needs an importance matrix, which recipes cannot make; the nearest is Q2_K")
        return name

    @field_validator("tensors")
    @classmethod
    def _pattern(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for pattern, type_name in value.items():
            if type_name.upper() not in GGML_TYPES_BY_NAME:
                near = difflib.get_close_matches(type_name.upper(), GGML_TYPES_BY_NAME, n=1)
                raise ValueError(
                    f"no tensor type {type_name!r}" + (f"; did you mean {near[0].lower()}?" if near else "")
                )
            if pattern != pattern.lower() or "(?" in pattern:
                raise ValueError(f"{pattern!r}: llama-quantize knows lower case and ECMAScript patterns only")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
            if "=" in pattern:
                raise ValueError(f"{pattern!r}: llama-quantize takes no = in a pattern")
        return value

    @property
    def label(self) -> str:
        return self.type + (f"-{self.suffix}" if self.suffix else "")


class Evaluation(_Strict):
    corpus: str = Field(description=f"a text file, relative to the recipe, or {BUILTIN_CORPUS}")
    n_ctx: Annotated[int, Field(ge=8)] = Field(512, description="window length in tokens")
    chunks: Annotated[int, Field(ge=1)] | None = Field(None, description="at most so many windows")


class RuntimeDefaults(_Strict):
    n_ctx: Annotated[int, Field(ge=1)] | None = Field(None, description="context length in tokens")
    kv_type: Literal["f16", "bf16", "f32", "q8_0", "q4_0"] | None = Field(None, description="KV cache type")


class Recipe(_Strict):
    """What ``inv quantize`` makes: ``models/NAME/NAME-TYPE.gguf`` for each entry of quantize."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder and the files")
    model: Model
    convert: Conversion = Conversion(outtype="auto")
    quantize: tuple[Quantization, ...] = Field(min_length=1, strict=False)
    evaluate: Evaluation | None = None
    runtime: RuntimeDefaults | None = None

    @field_validator("quantize", mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return tuple({"type": v} if isinstance(v, str) else v for v in value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _distinct_files(self) -> Recipe:
        labels = [q.label for q in self.quantize]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"quantize names {', '.join(sorted(twice))} twice; give one of them a suffix")
        return self


def load_recipe(path: Path) -> Recipe:
    """Read and check the recipe at ``path``; UsageError with line numbers for all that is wrong with it."""
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
        return Recipe.model_validate(loaded)
    except ValidationError as error:
        lines = [_describe(problem, node, path) for problem in error.errors()]
        hint = f"the schema is recipes/{SCHEMA_NAME}; an example is recipes/demo.yaml"
        raise UsageError(f"{path.name} is not a valid recipe", evidence="\n".join(lines), hint=hint) from error


def schema_text() -> str:
    """The JSON schema of a recipe, as it is kept in ``recipes/recipe.schema.json``."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


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


def _describe(problem: ErrorDetails, root: yaml.Node | None, path: Path) -> str:
    where = [part for part in problem["loc"] if isinstance(part, str | int)]
    node, place = root, root
    for part in where:
        node, here = _child(node, part)
        place = here or place
    dotted = ".".join(str(part) for part in where)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        key = str(where[-1])
        allowed = _fields_at([str(p) for p in where[:-1]])
        near = difflib.get_close_matches(key, allowed, n=1)
        message = f"unknown key {key}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(allowed)}")
        dotted = ".".join(str(part) for part in where[:-1])
    else:
        message = PLAINLY.get(problem["type"], message)
    return f"{_where(path, place)}: {dotted + ': ' if dotted else ''}{message}"


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


def _fields_at(where: list[str]) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        "model": Model,
        "convert": Conversion,
        "quantize": Quantization,
        "evaluate": Evaluation,
        "runtime": RuntimeDefaults,
    }
    return [*(models.get(where[0], Recipe) if where else Recipe).model_fields]


def _other_recipes(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = sorted(p.name for p in folder.glob("*.yaml"))
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {folder / near[0]}?"
    return f"{folder} has: {', '.join(names)}" if names else "recipes lie in recipes/"
