"""One GGUF to a smaller one, by the built llama-quantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, machine
from toolchain.base.command import OnProgress
from toolchain.base.errors import ArtifactError
from toolchain.base.gguf import GgufHeader, read_header
from toolchain.stages.stage import Stage

# Bits per weight of each type on Llama-3.1-8B, from the table in llama.cpp's tools/quantize/README.md at
# commit 0c1e570; the legacy types follow from their block layout (ggml-common.h), with the output at Q6_K.
BITS_PER_WEIGHT: Mapping[str, float] = {
    "IQ1_S": 2.0042,
    "IQ1_M": 2.1460,
    "IQ2_XXS": 2.3824,
    "IQ2_XS": 2.5882,
    "IQ2_S": 2.7403,
    "IQ2_M": 2.9294,
    "IQ3_XXS": 3.2548,
    "IQ3_XS": 3.4977,
    "IQ3_S": 3.6606,
    "IQ3_M": 3.7628,
    "IQ4_XS": 4.4597,
    "IQ4_NL": 4.6818,
    "Q2_K_S": 2.9697,
    "Q2_K": 3.1593,
    "Q3_K_S": 3.6429,
    "Q3_K_M": 3.9960,
    "Q3_K_L": 4.2979,
    "Q4_0": 4.64,
    "Q4_1": 5.11,
    "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944,
    "Q5_0": 5.58,
    "Q5_1": 6.06,
    "Q5_K_S": 5.5704,
    "Q5_K_M": 5.7036,
    "Q6_K": 6.5633,
    "Q8_0": 8.5008,
    "F16": 16.0005,
    "BF16": 16.0005,
    "F32": 32.0,
}

# llama-quantize refuses these without an importance matrix: tried one by one at commit 0c1e570.
NEEDS_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"})


@dataclass(frozen=True, kw_only=True)
class Quantize(Stage):
    """Quantize ``source`` to ``type``; ``tensors`` maps a tensor-name pattern to a type of its own.

    ``notes`` become ``foundry.*`` keys in the header.
    """

    source: Path
    type: str
    tensors: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]
    tool: Path
    source_digest: str
    toolchain_id: str
    n_params: int

    @property
    def title(self) -> str:
        return f"quantize {self.type}"

    @property
    def identity(self) -> Mapping[str, object]:
        asked = {"type": self.type, "tensors": self.tensors, "notes": self.notes}
        return {"stage": "quantize", "source": self.source_digest, "toolchain": self.toolchain_id, **asked}

    @property
    def bytes(self) -> int:
        return int(self.n_params * BITS_PER_WEIGHT[self.type] / 8)

    def command(self, output: Path) -> tuple[str, ...]:
        options: list[str] = []
        for pattern, type_name in self.tensors:
            options += ["--tensor-type", f"{pattern}={type_name}"]
        for key, value in self.notes:
            options += ["--override-kv", f"foundry.{key}=str:{_short(value)}"]
        threads = str(machine.probe().usable_cpus)
        return (str(self.tool), *options, str(self.source), str(output), self.type, threads)

    def run(self, output: Path, *, log: Path, on_progress: OnProgress) -> None:
        command.run(
            self.command(output),
            what=f"quantizing to {self.type}",
            log=log,
            parse=command.parse_counter,
            on_progress=on_progress,
        )

    def check(self, output: Path) -> Mapping[str, object]:
        """The header is sound, no tensor was lost, and the data is all there."""
        header, source = read_header(output), read_header(self.source)
        lost = _shapes(source) - _shapes(header)
        if lost:
            raise ArtifactError(
                f"{output.name} lacks tensors of its source",
                evidence=", ".join(sorted(name for name, _ in lost)[:8]),
                hint="run the recipe again; if it stays so, try another `./inv build --source`",
            )
        return {"n_params": header.n_params, "bits_per_weight": round(header.bits_per_weight, 4)}


def _shapes(header: GgufHeader) -> set[tuple[str, tuple[int, ...]]]:
    """Of all tensors; extents of 1 at the end do not count, since llama-quantize leaves them out."""
    return {(tensor.name, (*tensor.shape, 1, 1, 1)[:4]) for tensor in header.tensors}


def _short(value: str) -> str:
    """At most 120 bytes: llama-quantize takes 127 (string_parse_kv_override in common.cpp)."""
    return value.encode()[:120].decode(errors="ignore")
