"""The share of the machine's read bandwidth that generation reaches."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.bench.case import Case
from runtime.bench.reads import read_bytes_per_token
from runtime.settings import Settings
from toolchain.base.gguf import GgufHeader
from toolchain.base.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Roof:
    """Bytes per second that this machine reads from memory; None, with the reason, where they are no roof."""

    bytes_per_s: float | None
    reason: str = ""

    def share(self, bytes_per_token: float, tokens_per_s: float) -> float | None:
        """The part of the bandwidth in use; above 1 for a model that stays in the CPU's caches."""
        return bytes_per_token * tokens_per_s / self.bytes_per_s if self.bytes_per_s else None


def memory_roof(machine: Machine, settings: Settings, *, offloads: bool) -> Roof:
    """The machine's bandwidth with all its CPUs, as kept from an earlier measurement, else measured now (a second)."""
    if offloads and settings.number("n_gpu_layers") != 0:
        return Roof(bytes_per_s=None, reason="layers are on a GPU, whose memory is not measured")
    from runtime.tune.bandwidth import read_bandwidth

    return Roof(bytes_per_s=read_bandwidth(machine))


def case_bytes_per_token(headers: tuple[GgufHeader, ...], case: Case) -> float:
    """Bytes that a token of ``case`` reads, half-way through its generation."""
    lengths, text = case.lengths, case.settings.text
    tokens = lengths.depth + lengths.prompt + lengths.gen / 2
    return read_bytes_per_token(headers, type_k=text("type_k"), type_v=text("type_v"), tokens=tokens)
