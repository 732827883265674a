"""A recipe: the YAML file that says which model becomes which files. Parsed once, here; trusted after.

Every error names the file and line and, for a near miss, what was probably meant.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.pipeline.recipe_file import Strict, read_recipe
from toolchain.stages.convert import OutType
from toolchain.stages.demo_model import PRESETS
from toolchain.stages.quantize import BITS_PER_WEIGHT, NEEDS_IMATRIX

BUILTIN_CORPUS = "builtin:python-docs"
SCHEMA_NAME = "recipe.schema.json"


class Model(Strict):
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


class Conversion(Strict):
    outtype: OutType = Field("auto", description="the float type of the conversion; auto keeps 16 bits")


class Quantization(Strict):
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


class Evaluation(Strict):
    corpus: str = Field(description=f"a text file, relative to the recipe, or {BUILTIN_CORPUS}")
    n_ctx: Annotated[int, Field(ge=8)] = Field(512, description="window length in tokens")
    chunks: Annotated[int, Field(ge=1)] | None = Field(None, description="at most so many windows")


class RuntimeDefaults(Strict):
    n_ctx: Annotated[int, Field(ge=1)] | None = Field(None, description="context length in tokens")
    kv_type: Literal["f16", "bf16", "f32", "q8_0", "q4_0"] | None = Field(None, description="KV cache type")


class Recipe(Strict):
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
    return read_recipe(path, Recipe, schema=f"recipes/{SCHEMA_NAME}", example="recipes/demo.yaml")


def schema_text() -> str:
    """The JSON schema of a recipe, as it is kept in ``recipes/recipe.schema.json``."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"
