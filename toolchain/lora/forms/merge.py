"""An adapter into its base: one GGUF that needs no adapter, held against base and adapter at run time.

With the base's full-precision source at hand the sum is made there and quantized as the base was; without it, the
base's own numbers are all there is: what the adapter leaves alone is copied to the byte, the rest is quantized again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from toolchain.base import console, files, machine
from toolchain.base.command import shown
from toolchain.base.errors import ArtifactError, CommandError, UsageError
from toolchain.base.ggml_types import FILE_TYPES
from toolchain.base.gguf import GgufHeader, read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.build.toolchain import Toolchain
from toolchain.lora.base import BaseModel, full_precision
from toolchain.lora.forms.adapter import check_against, read_adapter
from toolchain.lora.forms.ggml_values import GgmlValues, open_values
from toolchain.lora.forms.merge_gate import Gate, Text, hold_against, require_close
from toolchain.lora.forms.merged_weights import EXACT, Scaled, changed_tensors, write_merged
from toolchain.lora.forms.requantize import parse_type, quantization, require_own_types
from toolchain.lora.forms.rewrite import rewritten_bytes
from toolchain.lora.recipe import LoraRecipe
from toolchain.pipeline import provenance
from toolchain.pipeline.recipe import Quantization, load_recipe

MERGED_KEY: Final = "foundry.merged"
"""In a merged model's header: the adapters in it, each with its scale."""
MERGED_BASE_KEY: Final = "foundry.merged_base"
"""The file name of their base."""


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
    label = asked.label if asked else _own_label(base.header)
    final = files.models_dir() / recipe.name / f"{recipe.name}-{label}.gguf"
    window = Text(path=text, n_ctx=recipe.evaluate.n_ctx, chunks=recipe.evaluate.chunks)
    made_of = {
        "base": base.tensors_sha256,
        "adapter": files.known_sha256(adapter),
        "type": asked.model_dump() if asked else None,
        "at_full_precision": base.recipe is not None,
        "judged_on": [files.known_sha256(text), window.n_ctx, window.chunks],
        "toolchain": toolchain.id,
    }
    fingerprint = files.digest({"stage": "merge", **made_of})
    lock = final.with_name(f".{final.name}.lock")
    with files.home_in_use(), files.locked(lock, lambda pid: console.say(f"waiting for process {pid} (same model)")):
        noted = provenance.read_sidecar(final)
        _refuse_other(final, noted, base)
        if _is_current(final, noted, fingerprint):
            found = _merged_model(final, label, noted, reused=True)
            if found.gate.mean_kld > recipe.merge.max_mean_kld:  # the bound is lower by now
                _remove(final)
            require_close(found.gate, recipe.merge.max_mean_kld, final.name)
            return found
        log = files.home_dir("logs") / recipe.name / f"merge-{label}.log"
        log.unlink(missing_ok=True)
        full = full_precision(recipe.base, recipe_dir, toolchain)
        chosen = [(adapter, 1.0)]
        with files.staging(final) as partial:
            started = time.monotonic()
            command = merge(base.path, chosen, partial, toolchain=toolchain, log=log, full=full, asked=asked)
            seconds = time.monotonic() - started
            gate = judge(partial, base.path, chosen, window, full=full, toolchain=toolchain, log=log)
            require_close(gate, recipe.merge.max_mean_kld, final.name)
            noted = {
                **_described(final, partial, toolchain),
                "fingerprint": fingerprint,
                "seconds": round(seconds, 2),
                "quality": asdict(gate),
                "merge": {**made_of, "base_name": base.name, "adapter_name": adapter.name},
                "source": {"kind": "merge", "name": base.origin, "commit": None, "files": None, "digest": None},
                "recipe": {"name": recipe.name, "sha256": files.sha256_text(recipe.model_dump_json())},
                "commands": [shown(command).replace(str(partial.parent), str(final.parent))] if command else [],
            }
            _place(partial, final, noted)
    return _merged_model(final, label, noted, reused=False)


def merge(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    output: Path,
    *,
    toolchain: Toolchain,
    log: Path,
    full: Path | None = None,
    asked: Quantization | None = None,
    force: bool = False,
) -> tuple[str, ...]:
    """Write ``base`` with ``adapters``, each at its scale, to ``output``, which the caller stages.

    ``asked`` is made by llama-quantize, of ``full`` where it is given; without ``asked`` every tensor keeps its type.
    Returns llama-quantize's command, empty where it did not run. ArtifactError when an adapter does not fit or was
    trained on another base (unless ``force``), UsageError for a type that needs an importance matrix.
    """
    shards = _shards(base)
    scaled = [_fitting(path, scale, shards[0], force) for path, scale in adapters]
    source = _shards(full) if full and asked else shards
    changed = changed_tensors(source, scaled)
    if asked is None:
        require_own_types(shards[0], changed.values())
    types = {name: EXACT if asked else tensor.type for name, tensor in changed.items()}
    target = output.with_name("sum.gguf") if asked else output
    n_params = sum(shard.n_params for shard in source)
    stage = quantization(target, asked, n_params=n_params, toolchain=toolchain) if asked else None
    room = rewritten_bytes(source, types) + (stage.bytes if stage else 0)
    files.require_free(output, room, f"{output.name} and what it is made from")
    names = "; ".join(f"{one.name} x {one.scale:g}" for one in scaled)
    with console.step(f"add {names} to {source[0].path.name}") as step:
        write_merged(
            source,
            scaled,
            target,
            types=types,
            values=_values(toolchain),
            notes={MERGED_KEY: names, MERGED_BASE_KEY: shards[0].path.name},
            on_progress=step.advance,
        )
    if stage is None:
        return ()
    with console.step(stage.title) as step:
        try:
            stage.run(output, log=log, on_progress=step.advance)
        except CommandError as error:  # a child that fails on a full disk rarely says why
            if files.is_full(output):
                raise files.disk_full(output.parent, error.evidence) from error
            raise
        stage.check(output)
    target.unlink()
    return stage.command(output)


def judge(
    merged: Path,
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    text: Text,
    *,
    full: Path | None,
    toolchain: Toolchain,
    log: Path,
) -> Gate:
    """How far ``merged`` is from ``base`` with ``adapters``."""
    shards = _shards(base)
    chosen = [(path, Scaled(name=path.name, adapter=read_adapter(path), scale=scale)) for path, scale in adapters]
    with console.step(f"hold {merged.name} against base and adapter") as step:
        return hold_against(
            merged,
            shards,
            chosen,
            text,
            full=full,
            values=_values(toolchain),
            toolchain=toolchain,
            log=log,
            on_progress=step.advance,
        )


def _asked(base: BaseModel, type: str | None) -> Quantization | None:
    """What llama-quantize shall make: the recipe's entry for that type, or the one that ``base`` is."""
    if base.recipe is None:
        return parse_type(type) if type else None
    recipe = load_recipe(base.recipe)
    if type is None:
        return next(entry for entry in recipe.quantize if base.path.name == f"{recipe.name}-{entry.label}.gguf")
    named = [entry for entry in recipe.quantize if type.upper() in (entry.label.upper(), entry.type)]
    return named[0] if named else parse_type(type)


def _own_label(header: GgufHeader) -> str:
    known = header.file_type
    return known if known and known in FILE_TYPES.values() else "merged"


def _fitting(path: Path, scale: float, base: GgufHeader, force: bool) -> Scaled:
    adapter = read_adapter(path)
    check_against(adapter, base, what=path.name)
    if adapter.base_sha256 and not force and adapter.base_sha256 != (found := tensors_sha256(base)):
        raise ArtifactError(
            f"{path.name} was trained on another base than {base.path.name}",
            evidence=f"its base is {adapter.base_name or 'not named'}, tensors {adapter.base_sha256}\n"
            f"{base.path.name} has tensors {found}",
            hint="merge it into the file that it was trained on",
        )
    return Scaled(name=path.name, adapter=adapter, scale=scale)


def _refuse_other(final: Path, noted: Mapping[str, object], base: BaseModel) -> None:
    """UsageError when a file has the name that was not merged: the base itself, a recipe's artifact, anybody's own."""
    is_base = final.resolve() in [shard.resolve() for shard in base.shards]
    if is_base or (final.exists() and not _was_merged(final, noted)):
        raise UsageError(
            f"{final} is there and was not merged",
            evidence="the merged model would take its place",
            hint="give the LoRA recipe another name than the base's recipe has",
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


def _shards(path: Path) -> list[GgufHeader]:
    return [read_header(shard) for shard in read_header(path).shard_paths]


def _values(toolchain: Toolchain) -> GgmlValues:
    return open_values(toolchain.lib_dir, machine.probe().compute_threads)


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
