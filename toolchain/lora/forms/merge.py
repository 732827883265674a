"""An adapter into its base: one GGUF that needs no adapter, held against base and adapter at run time.

With the base's full-precision source at hand the sum is made there and quantized as the base was; without it, the
base's own numbers are all there is: what the adapter leaves alone is copied to the byte, the rest is quantized again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toolchain.base import console, files, machine
from toolchain.base.errors import ArtifactError, CommandError
from toolchain.base.gguf import GgufHeader, read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.build.toolchain import Toolchain
from toolchain.lora.forms.adapter import check_against, read_adapter
from toolchain.lora.forms.ggml_values import GgmlValues, open_values
from toolchain.lora.forms.merge_gate import Gate, Text, hold_against
from toolchain.lora.forms.merged_weights import EXACT, Scaled, changed_tensors, write_merged
from toolchain.lora.forms.requantize import quantization, require_own_types
from toolchain.lora.forms.rewrite import rewritten_bytes
from toolchain.pipeline.recipe import Quantization

MERGED_KEY: Final = "foundry.merged"
"""In a merged model's header: the adapters in it, each with its scale."""
MERGED_BASE_KEY: Final = "foundry.merged_base"
"""The file name of their base."""


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


def _shards(path: Path) -> list[GgufHeader]:
    return [read_header(shard) for shard in read_header(path).shard_paths]


def _values(toolchain: Toolchain) -> GgmlValues:
    return open_values(toolchain.lib_dir, machine.probe().compute_threads)
