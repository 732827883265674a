"""What ``base:`` names -> the model that learns: its file on disk, made or downloaded where it is not there."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolchain.base import console, files
from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader, read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.build.toolchain import Toolchain
from toolchain.hub.errors import GoneError
from toolchain.hub.ggufs import (
    Quant,
    RepoListing,
    choose_quant,
    fetch_gguf,
    forget_listing,
    gguf_path,
    list_quants,
    record_listing,
    recorded_listings,
)
from toolchain.lora.recipe import Base
from toolchain.pipeline import provenance
from toolchain.pipeline.execute import execute, make_step
from toolchain.pipeline.plan import Plan, describe_source, make_plan
from toolchain.pipeline.recipe import load_recipe

KINDS: Final = {
    "adapter": "an adapter",
    "vocab": "a vocabulary without weights",
    "imatrix": "an importance matrix",
    "mmproj": "a vision part",
    "other": "no model",
}


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The base on disk. ``header`` is of its first shard; ``origin`` says what named it, as in ``recipe:demo Q4_K_M``.

    ``full`` is the same model at full precision where it is at hand: the conversion step of its recipe.
    """

    path: Path
    shards: tuple[Path, ...]
    headers: tuple[GgufHeader, ...]
    tensors_sha256: str
    origin: str
    recipe: Path | None = None
    full: Path | None = None

    @property
    def header(self) -> GgufHeader:
        return self.headers[0]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def tensor_bytes(self) -> int:
        return sum(header.tensor_bytes for header in self.headers)

    @property
    def n_params(self) -> int:
        return sum(header.n_params for header in self.headers)


def find_base(asked: Base, recipe_dir: Path, toolchain: Toolchain, *, first: Callable[[], None]) -> BaseModel:
    """The base, hashed; ``first`` is called before one is made or fetched, which may take hours.

    UsageError for what names no text decoder; else the errors of ``first``, of making and of fetching.
    """
    if asked.recipe is not None:
        return _from_recipe(asked, recipe_dir, toolchain, first)
    if asked.gguf is not None:
        path = _place(recipe_dir, asked.gguf)
        if not path.is_file():
            raise UsageError(f"the base is not there: {path}", hint=_near_ggufs(path))
        return read_base(path, origin=f"gguf:{path}")
    assert asked.hub is not None
    return read_base(_fetched(asked.hub, first), origin=f"hub:{asked.hub}")


def read_base(path: Path, *, origin: str, recipe: Path | None = None, full: Path | None = None) -> BaseModel:
    """The model at ``path``, checked to be one that can learn text."""
    header = read_header(path)
    if header.split and header.split[0] > 0:
        header = read_header(header.shard_paths[0])
    _require_text_decoder(header)
    shards = header.shard_paths
    return BaseModel(
        path=header.path,
        shards=shards,
        headers=(header, *(read_header(shard) for shard in shards[1:])),
        tensors_sha256=tensors_sha256(header),
        origin=origin,
        recipe=recipe,
        full=full,
    )


def full_precision(asked: Base, recipe_dir: Path, toolchain: Toolchain) -> Path | None:
    """The base at full precision, made when it is gone; None where the base is no recipe's."""
    if asked.recipe is None:
        return None
    plan = _plan(_place(recipe_dir, asked.recipe), toolchain)
    return plan.source.path if plan.source.kind == "gguf" else make_step(plan, "convert")


def _from_recipe(asked: Base, recipe_dir: Path, toolchain: Toolchain, first: Callable[[], None]) -> BaseModel:
    """The artifact of a quantization recipe; all of the recipe is made when this one is not there."""
    assert asked.recipe is not None
    path = _place(recipe_dir, asked.recipe)
    plan = _plan(path, toolchain)
    labels = [entry.label for entry in plan.recipe.quantize]
    label = asked.type or labels[0]
    if label not in labels:
        raise UsageError(
            f"{plan.recipe.name} makes no {label}",
            evidence=f"it makes: {', '.join(labels)}",
            hint=f"name one of these as base.type, or add {label} to {path.name}",
        )
    step = plan.step(f"quantize {label}")
    if not provenance.is_current(step):
        first()
        execute(plan)
    full = plan.source.path if plan.source.kind == "gguf" else plan.step("convert").output
    return read_base(
        step.output,
        origin=f"recipe:{plan.recipe.name} {label}",
        recipe=path,
        full=full if full is not None and full.is_file() else None,
    )


def _plan(recipe_path: Path, toolchain: Toolchain) -> Plan:
    recipe = load_recipe(recipe_path)
    source = describe_source(recipe, recipe_path.parent)
    return make_plan(recipe, recipe_path=recipe_path, source=source, toolchain=toolchain)


def _fetched(typed: str, first: Callable[[], None]) -> Path:
    """``OWNER/NAME:QUANT`` on disk. What the hub listed is recorded: a base that is on disk is found without asking."""
    repo, _, quant = typed.partition(":")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UsageError(f"base.hub: {typed!r} names no repository", hint="write OWNER/NAME:QUANT, as in a/b:Q4_K_M")
    cache = files.home_dir("hub")
    with files.home_in_use():
        for listing in recorded_listings(repo, cache)[:1]:
            try:
                chosen = choose_quant(listing, quant or None)
            except UsageError:
                break  # the quant came later than the record
            try:
                return _fetch(listing, chosen, cache, first)
            except GoneError:
                forget_listing(listing, cache)
        listing = list_quants(repo)
        record_listing(listing, cache)
        return _fetch(listing, choose_quant(listing, quant or None), cache, first)


def _fetch(listing: RepoListing, quant: Quant, cache: Path, first: Callable[[], None]) -> Path:
    if path := gguf_path(listing, quant, cache):
        return path
    first()
    with console.step(f"fetch {listing.repo} {quant.name} at {listing.commit[:12]}") as step:
        return fetch_gguf(listing, quant, cache, step.advance)


def _require_text_decoder(header: GgufHeader) -> None:
    hint = "base names a whole text model in GGUF: a recipe's result, a file, or OWNER/NAME:QUANT on the hub"
    if header.kind != "model":
        raise UsageError(f"{header.path.name} is {KINDS[header.kind]}, not a model", hint=hint)
    if not header.n_vocab or header.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        raise UsageError(f"{header.path.name} has no vocabulary, so no text can be learned with it", hint=hint)
    causal = header.metadata.get(f"{header.architecture}.attention.causal")
    both_ways = header.arch_int("decoder_start_token_id") is not None or header.architecture.startswith("t5")
    if causal is False or both_ways or "bert" in header.architecture:
        raise UsageError(
            f"{header.path.name} ({header.architecture}) is an encoder: it does not continue text",
            hint=hint,
        )


def _near_ggufs(path: Path) -> str:
    there = sorted(each.name for each in path.parent.glob("*.gguf"))
    if near := difflib.get_close_matches(path.name, there, n=1):
        return f"did you mean {path.parent / near[0]}?"
    if there:
        return f"in {path.parent} there are: {', '.join(there[:5])}"
    return "base.gguf is relative to the recipe; base.recipe makes its base where it is missing"


def _place(folder: Path, typed: str) -> Path:
    """A path from a recipe: relative to the recipe's folder; ``~`` is the user's home."""
    return (folder / files.expand(typed)).absolute()
