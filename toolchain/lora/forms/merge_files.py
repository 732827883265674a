"""``inv merge``: which file a merge makes, by a recipe or of two files by name, and what stands beside it.

A merged model that is too far from base and adapter never gets its name; one that is there already is not made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.base import console, files
from toolchain.base.command import shown
from toolchain.base.errors import UsageError
from toolchain.base.ggml_types import FILE_TYPES
from toolchain.base.gguf import GgufHeader, read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.build.toolchain import Toolchain
from toolchain.lora.base import BaseModel, full_precision
from toolchain.lora.forms.merge import MERGED_KEY, judge, merge
from toolchain.lora.forms.merge_gate import Gate, Text, require_close
from toolchain.lora.forms.requantize import parse_type
from toolchain.lora.recipe import Judging, LoraRecipe, Merging
from toolchain.pipeline import provenance
from toolchain.pipeline.recipe import Quantization, load_recipe


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """What ``inv merge`` promises. ``seconds`` is what making it took, in this run or an earlier one."""

    path: Path
    type: str
    bytes: int
    sha256: str
    bits_per_weight: float
    gate: Gate
    seconds: float
    reused: bool


def merge_recipe(
    recipe: LoraRecipe,
    base: BaseModel,
    adapter: Path,
    *,
    recipe_dir: Path,
    text: Path,
    toolchain: Toolchain,
    type: str | None = None,
) -> MergedModel:
    """``models/NAME/NAME-TYPE.gguf`` with its sidecar: ``base`` with ``adapter`` in it, judged on ``text``.

    ``type`` goes before the recipe's ``merge.type``; without either it is what the base is. What is there already is
    not made again. ArtifactError when it is further from base and adapter than ``merge.max_mean_kld``; then nothing
    stands under that name.
    """
    asked = _asked(base, type or recipe.merge.type)
    label = _label(asked, base.header)
    order = _Order(
        final=files.models_dir() / recipe.name / f"{recipe.name}-{label}.gguf",
        label=label,
        base=base.header,
        base_sha256=base.tensors_sha256,
        adapter=adapter,
        asked=asked,
        full=lambda: full_precision(recipe.base, recipe_dir, toolchain),
        at_full_precision=base.recipe is not None,
        text=Text(path=text, n_ctx=recipe.evaluate.n_ctx, chunks=recipe.evaluate.chunks),
        most=recipe.merge.max_mean_kld,
        told={
            "source": {"kind": "merge", "name": base.origin, "commit": None, "files": None, "digest": None},
            "recipe": {"name": recipe.name, "sha256": files.sha256_text(recipe.model_dump_json())},
        },
    )
    return _make(order, toolchain)


def merge_file(
    adapter: Path, base: Path, output: Path | None, *, text: Path, toolchain: Toolchain, type: str | None = None
) -> MergedModel:
    """As ``merge_recipe``, of two files: to ``output``, or beside the adapter by its name and the type."""
    header, judging = read_header(base), Judging.model_validate({})
    asked = parse_type(type) if type else None
    label = _label(asked, header)
    order = _Order(
        final=output or adapter.with_name(f"{adapter.stem}-{label}.gguf"),
        label=label,
        base=header,
        base_sha256=tensors_sha256(header),
        adapter=adapter,
        asked=asked,
        full=lambda: None,
        at_full_precision=False,
        text=Text(path=text, n_ctx=judging.n_ctx, chunks=judging.chunks),
        most=Merging.model_validate({}).max_mean_kld,
        told={"source": {"kind": "merge", "name": base.name, "commit": None, "files": None, "digest": None}},
    )
    return _make(order, toolchain)


@dataclass(frozen=True, kw_only=True)
class _Order:
    """A file to make. ``full`` finds, or makes, the base's full-precision source; ``told`` is for the sidecar."""

    final: Path
    label: str
    base: GgufHeader
    base_sha256: str
    adapter: Path
    asked: Quantization | None
    full: Callable[[], Path | None]
    at_full_precision: bool
    text: Text
    most: float
    told: Mapping[str, object]


def _make(order: _Order, toolchain: Toolchain) -> MergedModel:
    final, adapter, window = order.final, order.adapter, order.text
    made_of = {
        "base": order.base_sha256,
        "adapter": files.known_sha256(adapter),
        "type": order.asked.model_dump() if order.asked else None,
        "at_full_precision": order.at_full_precision,
        "judged_on": [files.known_sha256(window.path), window.n_ctx, window.chunks],
        "toolchain": toolchain.id,
    }
    fingerprint = files.digest({"stage": "merge", **made_of})
    lock = final.with_name(f".{final.name}.lock")
    with files.home_in_use(), files.locked(lock, lambda pid: console.say(f"waiting for process {pid} (same model)")):
        noted = provenance.read_sidecar(final)
        _refuse_other(order, noted)
        if _is_current(final, noted, fingerprint):
            found = _merged_model(final, order.label, noted, reused=True)
            if found.gate.mean_kld > order.most:  # the bound is lower by now
                _remove(final)
            require_close(found.gate, order.most, final.name)
            return found
        log = files.home_dir("logs") / "merge" / f"{final.stem}.log"
        log.unlink(missing_ok=True)
        full, base, chosen = order.full(), order.base.path, [(adapter, 1.0)]
        with files.staging(final) as partial:
            started = time.monotonic()
            command = merge(base, chosen, partial, toolchain=toolchain, log=log, full=full, asked=order.asked)
            seconds = time.monotonic() - started
            gate = judge(partial, base, chosen, window, full=full, toolchain=toolchain, log=log)
            require_close(gate, order.most, final.name)
            noted = {
                **_described(final, partial, toolchain),
                "fingerprint": fingerprint,
                "seconds": round(seconds, 2),
                "quality": asdict(gate),
                "merge": {**made_of, "base_name": base.name, "adapter_name": adapter.name},
                **order.told,
                "commands": [shown(command).replace(str(partial.parent), str(final.parent))] if command else [],
            }
            _place(partial, final, noted)
    return _merged_model(final, order.label, noted, reused=False)


def _asked(base: BaseModel, type: str | None) -> Quantization | None:
    """What llama-quantize shall make: the recipe's entry for that type, or the one that ``base`` is."""
    if base.recipe is None:
        return parse_type(type) if type else None
    recipe = load_recipe(base.recipe)
    if type is None:
        return next(entry for entry in recipe.quantize if base.path.name == f"{recipe.name}-{entry.label}.gguf")
    named = [entry for entry in recipe.quantize if type.upper() in (entry.label.upper(), entry.type)]
    return named[0] if named else parse_type(type)


def _label(asked: Quantization | None, header: GgufHeader) -> str:
    known = header.file_type
    return asked.label if asked else known if known and known in FILE_TYPES.values() else "merged"


def _refuse_other(order: _Order, noted: Mapping[str, object]) -> None:
    """UsageError when a file has the name that was not merged: the base itself, a recipe's artifact, anybody's own."""
    final = order.final
    is_base = final.resolve() in [shard.resolve() for shard in order.base.shard_paths]
    if is_base or (final.exists() and not _was_merged(final, noted)):
        raise UsageError(
            f"{final} is there and was not merged",
            evidence="the merged model would take its place",
            hint="name another file with --output, or give the LoRA recipe another name than the base's recipe has",
        )


def _was_merged(path: Path, noted: Mapping[str, object]) -> bool:
    """By its sidecar; by its header where a kill came between the two."""
    return "merge" in noted if noted else MERGED_KEY in read_header(path).metadata


def _place(made: Path, final: Path, noted: Mapping[str, object]) -> None:
    """Put ``made`` under its final name, then its sidecar; the old one goes before, so none speaks of another file."""
    provenance.sidecar_path(final).unlink(missing_ok=True)
    files.promote(made, final)
    files.write_json(provenance.sidecar_path(final), noted)


def _remove(final: Path) -> None:
    provenance.sidecar_path(final).unlink(missing_ok=True)
    final.unlink()


def _is_current(final: Path, noted: Mapping[str, object], fingerprint: str) -> bool:
    same = noted.get("fingerprint") == fingerprint and final.is_file()
    return same and files.known_sha256(final) == noted.get("sha256")


def _described(final: Path, made: Path, toolchain: Toolchain) -> dict[str, object]:
    header = read_header(made)
    return {
        "format": provenance.FORMAT,
        "file": final.name,
        "bytes": header.file_bytes,
        "sha256": files.sha256_file(made),
        "n_params": header.n_params,
        "bits_per_weight": round(header.bits_per_weight, 4),
        "toolchain": {
            "id": toolchain.id,
            "llama_cpp": toolchain.commit,
            "source": toolchain.source,
            "options": toolchain.options,
            "compilers": toolchain.compilers,
        },
    }


def _merged_model(path: Path, label: str, noted: Mapping[str, Any], *, reused: bool) -> MergedModel:
    return MergedModel(
        path=path,
        type=label,
        bytes=noted["bytes"],
        sha256=noted["sha256"],
        bits_per_weight=noted["bits_per_weight"],
        gate=Gate(**noted["quality"]),
        seconds=noted["seconds"],
        reused=reused,
    )
