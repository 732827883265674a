"""A LoRA adapter as GGUF, in the form that llama.cpp loads, and as numbers.

In memory every pair stands the same way: a weight W of ``out`` rows and ``in`` columns becomes
W + scale * alpha/rank * B A, with A (rank, in) and B (out, rank); experts have a dimension in front. In the file
(src/llama-adapter.cpp) a pair is ``WEIGHT.lora_a`` and ``WEIGHT.lora_b``, for the token embedding B and A transposed:
rows of its lora_a are looked up by token (build_inp_embd in src/llama-graph.cpp).

Beyond what the library applies, a file may hold ``WEIGHT.lora_magnitude``, DoRA's row lengths (arXiv 2402.09353): its
adapter.type is then ``dora``, which runtimes refuse and a merge takes; and vectors that are added to norms, under the
norms' own names, which the library leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from toolchain.base import files
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.gguf import GgufHeader, TensorInfo, read_header
from toolchain.base.tensor_hash import BASE_NAME_KEY, BASE_SHA256_KEY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float32]

EMBEDDING: Final = "token_embd.weight"

_A: Final = ".lora_a"
_B: Final = ".lora_b"
_MAGNITUDE: Final = ".lora_magnitude"
_NORM: Final = "_norm.weight"
_NOTES: Final = "foundry."
_NORMS_KEY: Final = "foundry.lora.norms"
_NORMS_ADDED: Final = "added"
_AGAIN: Final = "train it again, or convert it again from the form it was trained in"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """``a`` (rank, in) and ``b`` (out, rank), of experts (n, rank, in) and (n, out, rank).

    ``magnitude`` (out,) are DoRA's lengths of the rows of the changed weight, or None.
    """

    a: Floats
    b: Floats
    magnitude: Floats | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, rows first."""
        return (*self.b.shape[:-1], int(self.a.shape[-1]))


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterModel:
    """An adapter: ``pairs`` by the GGUF name of the weight, ``norms`` by that of the norm, vectors to be added to it.

    ``alpha`` 0 means that each pair counts once, whatever its rank, as in llama_adapter_lora_weight::get_scale.
    ``base_sha256`` (see ``tensor_hash``) and ``base_name`` are empty where nobody noted the base. ``notes`` stand in
    the file as ``foundry.KEY``.
    """

    architecture: str
    alpha: float
    pairs: Mapping[str, Pair]
    norms: Mapping[str, Floats] = field(default_factory=dict)
    base_sha256: str = ""
    base_name: str = ""
    name: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def factor(self, target: str) -> float:
        """By what B A of ``target`` counts at a scale of 1."""
        return self.alpha / self.pairs[target].rank if self.alpha else 1.0


def write_adapter(path: Path, adapter: AdapterModel) -> None:
    """Write ``adapter`` in float32 to ``path``, which the caller stages.

    ArtifactError where it is not whole: shapes that do not go together, numbers that are not finite.
    """
    import gguf
    import numpy as np

    _check(path.name, adapter)
    with files.disk_errors(path):
        writer = gguf.GGUFWriter(path, adapter.architecture)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "dora" if adapter.dora else "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
            writer.add_name(adapter.name or path.stem)
            for key, value in ((BASE_SHA256_KEY, adapter.base_sha256), (BASE_NAME_KEY, adapter.base_name)):
                if value:
                    writer.add_string(key, value)
            for key, value in adapter.notes.items():
                writer.add_string(_NOTES + key, value)
            if adapter.norms:
                writer.add_string(_NORMS_KEY, _NORMS_ADDED)
            for target, pair in adapter.pairs.items():
                a, b = (pair.b, pair.a.T) if target.endswith(EMBEDDING) else (pair.a, pair.b)
                writer.add_tensor(target + _A, np.ascontiguousarray(a, dtype=np.float32))
                writer.add_tensor(target + _B, np.ascontiguousarray(b, dtype=np.float32))
                if pair.magnitude is not None:
                    writer.add_tensor(target + _MAGNITUDE, np.ascontiguousarray(pair.magnitude, dtype=np.float32))
            for norm, vector in adapter.norms.items():
                writer.add_tensor(norm, np.ascontiguousarray(vector, dtype=np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_adapter(path: Path) -> AdapterModel:
    """The adapter at ``path`` with all of its numbers as float32.

    UsageError: the file is something else; ArtifactError: it is an adapter, but not a whole one.
    """
    header = read_header(path)
    kind = header.text("adapter.type")
    if header.kind != "adapter" or kind not in ("lora", "dora"):
        found = f"an adapter of the kind {kind!r}" if header.kind == "adapter" else f"of the kind {header.kind!r}"
        raise UsageError(f"{path.name} is not a LoRA adapter but {found}", hint="name an adapter in GGUF form")
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise UsageError(
            f"{path.name} is an activated LoRA (aLoRA), which works from the middle of a prompt on",
            hint="it cannot be merged or converted: give a plain LoRA",
        )
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float):
        raise ArtifactError(f"{path.name}: adapter.lora.alpha is {alpha!r}, not a number", hint=_AGAIN)
    parts: dict[str, dict[str, Floats]] = {_A: {}, _B: {}, _MAGNITUDE: {}, "": {}}
    for tensor in header.tensors:
        suffix = next((suffix for suffix in (_A, _B, _MAGNITUDE) if tensor.name.endswith(suffix)), "")
        parts[suffix][tensor.name.removesuffix(suffix)] = _read_tensor(header, tensor)
    if parts[""] and header.text(_NORMS_KEY) != _NORMS_ADDED:
        raise ArtifactError(
            f"{path.name} holds {next(iter(parts['']))} and does not say whether it is added or takes the norm's place",
            hint="convert the adapter again without its norms",
        )
    adapter = AdapterModel(
        architecture=header.architecture,
        alpha=alpha,
        pairs=_pairs(path, parts[_A], parts[_B], parts[_MAGNITUDE]),
        norms=parts[""],
        base_sha256=header.text(BASE_SHA256_KEY) or "",
        base_name=header.text(BASE_NAME_KEY) or "",
        name=header.text("general.name") or "",
        notes={
            key.removeprefix(_NOTES): value
            for key, value in header.metadata.items()
            if isinstance(value, str)
            and key.startswith(_NOTES)
            and key not in (BASE_SHA256_KEY, BASE_NAME_KEY, _NORMS_KEY)
        },
    )
    _check(path.name, adapter)
    return adapter


def check_against(adapter: AdapterModel, base: GgufHeader, *, what: str = "the adapter") -> None:
    """Raise ArtifactError unless the model of ``base``, all its shards, has every weight that ``adapter`` changes."""
    if adapter.architecture != base.architecture:
        raise ArtifactError(
            f"{what} is for {adapter.architecture}, {base.path.name} is a {base.architecture}",
            hint=_another_base(adapter),
        )
    tensors = {tensor.name: tensor for shard in base.shard_paths for tensor in read_header(shard).tensors}
    wanted = {target: pair.shape for target, pair in adapter.pairs.items()}
    wanted |= {norm: vector.shape for norm, vector in adapter.norms.items()}
    for name, shape in wanted.items():
        found = tensors.get(name)
        if found is None:
            raise ArtifactError(
                f"{what} changes {name}, which {base.path.name} does not have", hint=_another_base(adapter)
            )
        if found.shape[::-1] != shape:
            raise ArtifactError(
                f"{what} does not fit {name} of {base.path.name}",
                evidence=f"the model's is {found.shape[::-1]}, the adapter is for {shape}",
                hint=_another_base(adapter),
            )


def _pairs(
    path: Path, lower: Mapping[str, Floats], upper: Mapping[str, Floats], magnitudes: Mapping[str, Floats]
) -> dict[str, Pair]:
    if odd := sorted((lower.keys() ^ upper.keys()) | (magnitudes.keys() - lower.keys())):
        raise ArtifactError(f"{path.name}: the pair for {odd[0]} is not whole", hint=_AGAIN)
    pairs = {}
    for target in lower:
        a, b = lower[target], upper[target]
        if not 2 <= a.ndim <= 3 or a.ndim != b.ndim:
            raise ArtifactError(f"{path.name}: the pair for {target} is of {a.ndim} and {b.ndim} dimensions")
        if target.endswith(EMBEDDING):
            a, b = b.T, a
        pairs[target] = Pair(a=a, b=b, magnitude=magnitudes.get(target))
    return pairs


def _read_tensor(header: GgufHeader, tensor: TensorInfo) -> Floats:
    """Float32, rows first."""
    import gguf
    import numpy as np

    data = np.fromfile(header.path, dtype=np.uint8, count=tensor.nbytes, offset=header.data_offset + tensor.offset)
    kind = gguf.GGMLQuantizationType[tensor.type]
    try:
        values: Floats = gguf.dequantize(data.reshape(math.prod(tensor.shape[1:]), -1), kind)
    except NotImplementedError as error:
        raise ArtifactError(f"{header.path.name}: {tensor.name} is of type {tensor.type}", hint=_AGAIN) from error
    return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape[::-1])


def _check(name: str, adapter: AdapterModel) -> None:
    import numpy as np

    if not adapter.pairs and not adapter.norms:
        raise ArtifactError(f"{name} changes no tensor", hint=_AGAIN)
    if not math.isfinite(adapter.alpha):
        raise ArtifactError(f"{name}: alpha is {adapter.alpha}", hint=_AGAIN)
    for target, pair in adapter.pairs.items():
        a, b, rows = pair.a, pair.b, pair.magnitude
        whole = 2 <= a.ndim == b.ndim <= 3 and a.shape[-2] == b.shape[-1] and a.shape[:-2] == b.shape[:-2]
        if not whole or (rows is not None and rows.shape != b.shape[:-1]):
            lengths = "" if rows is None else f", magnitudes {rows.shape}"
            raise ArtifactError(
                f"{name}: the halves for {target} do not go together",
                evidence=f"A is {a.shape}, B is {b.shape}{lengths}",
                hint=_AGAIN,
            )
    for norm, vector in adapter.norms.items():
        if vector.ndim != 1 or not norm.endswith(_NORM):
            raise ArtifactError(f"{name}: {norm} belongs in no LoRA adapter", hint=_AGAIN)
    numbers = [(target, part) for target, p in adapter.pairs.items() for part in (p.a, p.b, p.magnitude)]
    for target, values in [*numbers, *adapter.norms.items()]:
        if values is not None and not np.isfinite(values).all():
            raise ArtifactError(
                f"{name}: {target} has numbers that are not finite",
                hint="train again with a lower learning rate",
            )


def _another_base(adapter: AdapterModel) -> str:
    return f"it was trained on {adapter.base_name}" if adapter.base_name else "give the model that it was trained on"
