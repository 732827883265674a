"""From ``ggla``, the adapters of 2023, to the GGUF form that llama.cpp has loaded since 2024. numpy alone.

Both runtimes compute W + s B A, and both multiply before they scale: in the file of 2023 s is alpha/r of its header for
all tensors (``llama_apply_lora_from_file_internal``), in the new one alpha over the rank of each pair
(``llama_adapter_lora_weight::get_scale``). Pairs of the commonest rank keep their bits and set the new alpha; in the
others B takes the factor between the two. The old file's A lies as (inputs, rank), the new one's as (rank, inputs).

A norm was adapted too, by a pair with one column: its delta goes along as a vector, which a merge adds and the runtime
leaves out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toolchain.base import files
from toolchain.base.errors import ArtifactError
from toolchain.base.gguf import GgufHeader, read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.build.ggla import Adapter, AdapterTensor, read_adapter
from toolchain.lora.forms.adapter import AdapterModel, Pair, write_adapter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_OLD_NAMES: Final = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    **{"attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output"},
    **{"feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up"},
    **{"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"},
}
"""Llama's tensors before GGUF (until August 2023); the file's version did not change with them."""


@dataclass(frozen=True, kw_only=True)
class BridgeReport:
    """What became of a ggla file: names of the base's weights.

    ``rescaled`` are those of ``pairs`` whose rank is not the commonest: their B was multiplied by a factor, to the
    rounding of float32 (exactly where it is a power of two). ``unchanged`` had a product of zero and were left out.
    ``norms`` have their delta in the file, and only a merge adds it; ``largest_norm_delta`` is the most that an element
    of one changes by.
    """

    alpha: float
    pairs: tuple[str, ...]
    norms: tuple[str, ...]
    rescaled: tuple[str, ...]
    unchanged: tuple[str, ...]
    largest_norm_delta: float

    def lines(self) -> list[str]:
        """The report in words, a fact a line."""
        told = [f"{len(self.pairs)} matrices, alpha {self.alpha:g}"]
        if self.rescaled:
            told.append(f"{len(self.rescaled)} of another rank than most: their scale is now in their B")
        if self.unchanged:
            told.append(f"{len(self.unchanged)} pairs that change nothing are left out")
        if self.norms:
            most = f"by at most {self.largest_norm_delta:.3g}"
            told.append(f"{len(self.norms)} norms change too, {most}: `inv merge` adds that, the runtime cannot")
        return told


def convert(ggla: Path, base: Path, output: Path) -> BridgeReport:
    """Write the adapter in ``ggla`` to ``output`` as GGUF, bound to the weights of ``base``.

    Raises ArtifactError where the file is not whole, or holds a tensor that ``base`` has not, or of another shape: each
    is named. The output appears when it is whole.
    """
    old = read_adapter(ggla)
    header = read_header(base)
    named = _match(old, header)
    ranks = Counter(a.shape[0] for name, (a, _) in named.items() if not _is_norm(name))
    common = ranks.most_common(1)[0][0] if ranks else old.rank
    pairs: dict[str, Pair] = {}
    norms: dict[str, NDArray[np.float32]] = {}
    rescaled, unchanged = [], []
    for name, (a, b) in named.items():
        down, up = a.matrix, b.matrix
        if not (old.alpha and down.any() and up.any()):
            unchanged.append(name)
        elif _is_norm(name):
            norms[name] = (down @ up.T * (old.alpha / old.rank)).ravel()
        else:
            if a.shape[0] != common:
                up = up * (a.shape[0] / common)
                rescaled.append(name)
            pairs[name] = Pair(a=down.T, b=up)
    if not pairs and not norms:
        raise ArtifactError(f"{ggla.name} changes nothing: every pair in it has a product of zero", hint="train longer")
    alpha = old.alpha * common / old.rank
    adapter = AdapterModel(
        architecture=header.architecture,
        alpha=alpha,
        pairs=pairs,
        norms=norms,
        base_sha256=tensors_sha256(header),
        base_name=base.name,
        notes={"lora.converted_from": f"ggla {ggla.name}, SHA-256 {files.sha256_file(ggla)}"},
    )
    with files.disk_errors(output), files.staged(output) as partial:
        write_adapter(partial, adapter)
    return BridgeReport(
        alpha=alpha,
        pairs=tuple(pairs),
        norms=tuple(norms),
        rescaled=tuple(rescaled),
        unchanged=tuple(unchanged),
        largest_norm_delta=max((float(abs(delta).max()) for delta in norms.values()), default=0.0),
    )


def _match(old: Adapter, base: GgufHeader) -> dict[str, tuple[AdapterTensor, AdapterTensor]]:
    """(A, B) by the name of the base's weight; ArtifactError tells of every one that does not fit."""
    shapes = {tensor.name: tensor.shape for path in base.shard_paths for tensor in read_header(path).tensors}
    found, faults = {}, []
    for a, b in old.pairs():
        name = _gguf_name(a.name.removesuffix(".loraA"))
        adapted = (_width(a), _width(b))
        if name not in shapes:
            faults.append(f"{name}: the base has no such tensor")
        elif adapted != (*shapes[name], 1)[:2] or len(shapes[name]) > 2:
            faults.append(f"{name}: {_shown(shapes[name])} in the base, the adapter is for {_shown(adapted)}")
        else:
            found[name] = (a, b)
    if faults:
        more = [f"and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise ArtifactError(
            f"{old.path.name} is not an adapter for {base.path.name}",
            evidence="\n".join([*faults[:8], *more]),
            hint="give --base the model that it was trained on",
        )
    return found


def _gguf_name(name: str) -> str:
    """The weight's name in a GGUF; one that is neither new nor old stays as it is."""
    stem = name.removesuffix(".weight")
    block = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    known = _OLD_NAMES.get(block[2] if block else stem)
    if known is None or not name.endswith(".weight"):
        return name
    return f"blk.{block[1]}.{known}.weight" if block else f"{known}.weight"


def _width(half: AdapterTensor) -> int:
    return (*half.shape, 1)[1]


def _is_norm(name: str) -> bool:
    return name.endswith("_norm.weight")


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
