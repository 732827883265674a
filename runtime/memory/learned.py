"""What loads taught: the buffers that the library really made, and the devices that had less room than they said.

Kept in FOUNDRY_HOME/tune/memory-DIGEST.json for one build, model and set of devices (their names and sizes). The same
demand in the same placement gets the sizes that it had, larger or smaller. For others, a compute buffer that was larger
than computed raises all of its kind by that ratio; nothing is lowered, since the arithmetic promises never to be under.
A device that ran out of memory is filled no further for two weeks. What cannot be read is as if it were not there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from runtime.memory.footprint import BufferBytes, Demand, Placement
from toolchain.base import files
from toolchain.base.console import format_bytes
from toolchain.base.errors import FoundryError
from toolchain.base.gguf import GgufHeader

_FORM: Final = 2  # 1 held sums over the contexts of a tuned start
_MOST_LOADS: Final = 16  # the last ones
_MOST_RATIO: Final = 2.0  # a larger one is a misreading
_REMEMBERED_S: Final = 14 * 86400.0
_ROUNDED_MIB: Final = 0.005  # what the log's two decimals may hide
_LINE: Final = re.compile(r":\s+(\S+)\s+(KV|RS|compute) buffer size =\s+([\d.]+) MiB")
_HOSTS: Final = re.compile(r"CPU|.*_Host$|.*_Mapped$|BLAS|AMX")


@dataclass(frozen=True, kw_only=True)
class Load:
    """One load: what was asked, the compute bytes that were planned, and the bytes that were made; host first."""

    asked: str
    planned: tuple[int, ...]
    compute: tuple[int, ...]
    kv: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Shortfall:
    """A device that could not give what it said was free: at most ``most_bytes`` are used ``until`` a Unix time."""

    device: str
    most_bytes: int
    until: float


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What is known of one model on these devices with this build; ``path`` is None where nothing is kept."""

    path: Path | None = None
    loads: tuple[Load, ...] = field(default=())
    shortfalls: tuple[Shortfall, ...] = field(default=())

    def corrected(
        self, demand: Demand, placement: Placement, computed: tuple[BufferBytes, ...]
    ) -> tuple[BufferBytes, ...]:
        """``computed`` as loads have corrected it."""
        same = self.of(demand, placement, len(computed))
        if same is not None:
            known = zip(computed, same.compute, same.kv, strict=True)
            return tuple(
                replace(each, compute=compute or each.compute, kv=kv or each.kv) for each, compute, kv in known
            )
        host, gpu = self.ratios()
        return tuple(
            replace(each, compute=int(each.compute * (gpu if number else host))) for number, each in enumerate(computed)
        )

    def of(self, demand: Demand, placement: Placement, devices: int) -> Load | None:
        """The load that was the very same."""
        asked = _asked(demand, placement)
        return next((load for load in self.loads if load.asked == asked and len(load.compute) == devices), None)

    def ratios(self) -> tuple[float, float]:
        """How much larger than planned compute buffers were, on the host and on GPUs: 1.0 or more."""
        found = [1.0, 1.0]
        for load in self.loads:
            for number, (planned, made) in enumerate(zip(load.planned, load.compute, strict=True)):
                if planned and made:
                    found[number > 0] = max(found[number > 0], made / planned)
        return min(found[0], _MOST_RATIO), min(found[1], _MOST_RATIO)

    def most_bytes(self, device: str, *, now: float | None = None) -> int | None:
        """What of ``device`` may be used at most; None where nothing is known against using all that is free."""
        at = time.time() if now is None else now
        return min(
            (each.most_bytes for each in self.shortfalls if each.device == device and each.until > at), default=None
        )

    def with_load(
        self, demand: Demand, placement: Placement, planned: Sequence[BufferBytes], made: Mapping[str, Sequence[int]]
    ) -> Lessons:
        """With one more load; ``made`` as of ``made_buffers``."""
        load = Load(
            asked=_asked(demand, placement),
            planned=tuple(each.compute for each in planned),
            compute=tuple(made["compute"]),
            kv=tuple(map(_kv, planned, made["kv"], made["caches"])),
        )
        others = [each for each in self.loads if each.asked != load.asked]
        return replace(self, loads=(load, *others)[:_MOST_LOADS])

    def with_shortfall(self, device: str, most_bytes: int) -> Lessons:
        """With ``device`` filled with ``most_bytes`` at most."""
        others = [each for each in self.shortfalls if each.device != device]
        new = Shortfall(device=device, most_bytes=max(0, most_bytes), until=time.time() + _REMEMBERED_S)
        return replace(self, shortfalls=(new, *others))

    def limits(self, devices: Iterable[str], *, now: float | None = None) -> tuple[str, ...]:
        """Such as ``GPU 0 is filled to 6.80 GiB at most since a load failed on 2026-07-01``, for each limited one."""
        at, names = time.time() if now is None else now, set(devices)
        return tuple(
            f"{each.device} is filled to {format_bytes(each.most_bytes)} at most since a load failed on "
            + time.strftime("%Y-%m-%d", time.localtime(each.until - _REMEMBERED_S))
            for each in self.shortfalls
            if each.device in names and each.until > at
        )

    def doubted(self) -> Lessons:
        """With shortfalls that limit nothing any more; a load that uses more then drops them (``current``)."""
        return replace(self, shortfalls=tuple(replace(each, until=0.0) for each in self.shortfalls))

    def current(self) -> Lessons:
        """Without shortfalls of the past."""
        return replace(self, shortfalls=tuple(each for each in self.shortfalls if each.until > time.time()))

    def keep(self) -> None:
        """Write them, whole or not at all; where nothing can be written, nothing is."""
        if self.path is not None:
            content = {
                "form": _FORM,
                "loads": [asdict(load) for load in self.loads],
                "shortfalls": [asdict(short) for short in self.shortfalls],
            }
            with suppress(FoundryError, OSError):
                files.write_json(self.path, content)


def lessons_for(headers: Sequence[GgufHeader], devices: Iterable[tuple[str, int]], build: str) -> Lessons:
    """What is kept for this model, these devices (name, total bytes) and this build."""
    about: dict[str, Any] = {
        "form": _FORM,
        "build": build,
        "devices": [list(device) for device in devices],
        "model": [[header.architecture, [[t.name, t.shape, t.type] for t in header.tensors]] for header in headers],
    }
    path = files.foundry_home() / "tune" / f"memory-{files.digest(about)[:32]}.json"
    match files.read_json(path):
        case {"form": form, "loads": [*loads], "shortfalls": [*shortfalls]} if form == _FORM:
            read = tuple(load for load in map(_parse_load, loads) if load is not None)
            short = tuple(each for each in map(_parse_shortfall, shortfalls) if each is not None)
            return Lessons(path=path, loads=read[:_MOST_LOADS], shortfalls=short)
    return Lessons(path=path)


def made_buffers(lines: Iterable[str], n_gpus: int) -> dict[str, list[int]] | None:
    """Bytes of ``kv`` and ``compute`` buffers on the host and each GPU, from the library's log of one context.

    ``caches`` counts the buffers that ``kv`` is the sum of. None where the log tells of no compute buffer, or of a
    device that is none of these.
    """
    made = {name: [0] * (n_gpus + 1) for name in ("kv", "caches", "compute")}
    for line in lines:
        if found := _LINE.search(line):
            device = device_of_buffer(found[1])
            if device > n_gpus:
                return None
            size = int((float(found[3]) + _ROUNDED_MIB) * (1 << 20))
            made["compute" if found[2] == "compute" else "kv"][device] += size
            made["caches"][device] += found[2] != "compute"
    return made if any(made["compute"]) else None


def device_of_buffer(buffer: str) -> int:
    """0 for the host's buffers, 1 for the first GPU's (``CUDA0``, ``Vulkan0``, ``MTL0``, ``Metal``)."""
    if _HOSTS.match(buffer):
        return 0
    number = re.search(r"(\d+)$", buffer)
    return 1 + int(number[1]) if number else 1


def _kv(planned: BufferBytes, made: int, caches: int) -> int:
    """``planned`` where the log's rounded figures agree with it, else ``made``."""
    hidden = caches * int(2 * _ROUNDED_MIB * (1 << 20) + 1)
    return planned.kv if abs(made - planned.kv) <= hidden else made


def _asked(demand: Demand, placement: Placement) -> str:
    return files.digest([asdict(demand), str(placement)])[:32]


def _parse_load(raw: object) -> Load | None:
    match raw:
        case {"asked": str(asked), "planned": [*planned], "compute": [*compute], "kv": [*kv]} if len(planned) == len(
            compute
        ) == len(kv) and all(_is_size(each) for each in (*planned, *compute, *kv)):
            return Load(asked=asked, planned=tuple(planned), compute=tuple(compute), kv=tuple(kv))
    return None


def _parse_shortfall(raw: object) -> Shortfall | None:
    match raw:
        case {"device": str(device), "most_bytes": size, "until": int() | float() as until} if _is_size(size):
            return Shortfall(device=device, most_bytes=size, until=float(until))
    return None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 50
