"""What was measured, kept in FOUNDRY_HOME/tune for the same machine, model and build.

A model counts by its architecture and its tensors' names, shapes and types, not by its path or its weights: files
of one shape (fine-tunes in the same quantization) cost the same arithmetic and share a record. A machine counts by
what its CPUs are and how many of them we may use, so that a narrower mask or quota is another machine. A build
counts by its library files. The types of the cache and the context's length are left out: they move the speed, hardly
the best number of threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from runtime.library_id import build_id
from runtime.settings import Settings
from runtime.tune.search import Found, Point
from toolchain.base import files
from toolchain.base.command import OPENMP_DEFAULTS
from toolchain.base.errors import FoundryError
from toolchain.base.gguf import GgufHeader
from toolchain.base.machine import Machine
from toolchain.base.topology import Cpus

if TYPE_CHECKING:
    from runtime.memory.speed import Speed

TunedName: TypeAlias = Literal["n_threads", "n_threads_batch", "n_ubatch"]
TUNED: Final[tuple[TunedName, ...]] = ("n_threads", "n_threads_batch", "n_ubatch")
NOISY: Final = 0.10
"""Bursts that deviate by more from their median decide nothing."""
ATTEMPTS: Final = 3
"""So often a noisy or failed measurement is made again, at later starts; then what there is stays."""

_FORM: Final = 2  # of the record and the search that it came from
_MOST: Final[Mapping[str, int]] = MappingProxyType({"n_threads": 512, "n_threads_batch": 512, "n_ubatch": 65536})
_PLACEMENT: Final = ("n_gpu_layers", "n_cpu_moe", "tensor_split")  # what a machine with GPUs leaves to its CPUs
# What places OpenMP's threads or makes them wait.
_OPENMP: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a measurement found for each setting that it was made for.

    ``asked`` are the settings that were looked at; one without an entry in ``found`` could not be measured in the
    time and keeps its computed value. ``others`` is how many CPUs other processes kept busy meanwhile, ``crowded``
    whether they left fewer than the largest candidate wanted. ``depth`` is the number of tokens in the
    cache while generation was measured, ``batch`` that of a prompt's piece. ``failed``: memory ran out or the library
    failed, and what is in ``found`` is from before.
    """

    asked: tuple[TunedName, ...]
    found: Mapping[TunedName, Found]
    others: float
    crowded: bool
    depth: int
    batch: int
    seconds: float
    attempts: int = 1
    failed: bool = False

    @property
    def noise(self) -> float:
        """The largest noise of a setting of threads that had a choice; without a choice nothing can be wrong."""
        return max((each.noise for name, each in self._choices()), default=0.0)

    @property
    def settled(self) -> bool:
        """Whether it can be relied on: steady figures on free CPUs, or no choice at all; nothing failed."""
        return not self.failed and (not self._choices() or (self.noise <= NOISY and not self.crowded))

    def covers(self, names: Sequence[TunedName]) -> bool:
        return set(names) <= set(self.asked)

    def _choices(self) -> list[tuple[TunedName, Found]]:
        return [(name, each) for name, each in self.found.items() if name != "n_ubatch" and len(each.points) > 1]

    def as_json(self) -> dict[str, Any]:
        """All of it, as it is kept and as `tune --json` prints it; ``from_json`` reads it again."""
        return {
            "asked": list(self.asked),
            "found": {name: _found_json(each) for name, each in self.found.items()},
            "others": round(self.others, 3),
            "crowded": self.crowded,
            "depth": self.depth,
            "batch": self.batch,
            "seconds": round(self.seconds, 3),
            "attempts": self.attempts,
            "failed": self.failed,
            "noise": round(self.noise, 4),
            "settled": self.settled,
        }


def wanted(settings: Settings) -> tuple[TunedName, ...]:
    """The settings that measuring may choose: not those that a recipe, the environment or a flag gives."""
    free = {"n_threads": ("default", "tuned"), "n_threads_batch": ("default", "tuned"), "n_ubatch": ("default",)}
    return tuple(name for name in TUNED if settings[name].origin in free[name])


def threads_guessed(header: GgufHeader, machine: Machine, settings: Settings) -> bool:
    """Whether a number of threads in ``settings`` is computed, with no measurement behind it."""
    threads = [name for name in wanted(settings) if name != "n_ubatch"]
    known = recorded(header, machine, settings)
    return bool(threads) and (known is None or not set(threads) <= set(known.found))


def recorded(header: GgufHeader, machine: Machine, settings: Settings) -> Tuning | None:
    """What is known of this model here, if it answers for all that ``settings`` leave open.

    None when nothing is kept, when it cannot be read, and when it was noisy or failed and may be measured again.
    """
    known = _read(record_path(header, machine, settings))
    if known is None or not known.covers(wanted(settings)):
        return None
    return known if known.settled or known.attempts >= ATTEMPTS else None


def measured_speed(header: GgufHeader, machine: Machine, settings: Settings) -> Speed | None:
    """What was measured of this model here, where both rates were."""
    from runtime.memory.speed import Speed

    tuning = recorded(header, machine, settings)
    if tuning is None or not {"n_threads", "n_threads_batch"} <= set(tuning.found):
        return None
    generation, prompt = tuning.found["n_threads"], tuning.found["n_threads_batch"]
    return Speed(
        generation_tps=generation.rate(generation.value), prompt_tps=prompt.rate(prompt.value), basis="measured by tune"
    )


def keep(tuning: Tuning, header: GgufHeader, machine: Machine, settings: Settings) -> Tuning:
    """Keep ``tuning`` beside what is known of settings that it did not ask for; what is now kept, rounded as it is.

    One that failed takes nothing away from what is known. Where nothing can be written, nothing is: the next start
    measures again.
    """
    path = record_path(header, machine, settings)
    if (known := _read(path)) is not None:
        rest = [name for name in known.asked if name not in tuning.asked or tuning.failed]
        tuning = replace(
            tuning,
            asked=(*tuning.asked, *(name for name in rest if name not in tuning.asked)),
            found={**{name: known.found[name] for name in rest if name in known.found}, **tuning.found},
            attempts=known.attempts + 1 if known.covers(tuning.asked) else 1,
        )
    kept = {"form": _FORM, **tuning.as_json()}
    with suppress(FoundryError, OSError):
        files.write_json(path, kept)
    return _parse(kept) or tuning


def record_path(header: GgufHeader, machine: Machine, settings: Settings) -> Path:
    """``FOUNDRY_HOME/tune/DIGEST.json`` for this model on this machine with the installed build."""
    gpus = [gpu.name for gpu in machine.gpus]
    about = {
        "form": _FORM,
        "machine": machine_identity(machine),
        "gpus": gpus,
        "placement": [settings[name].value for name in _PLACEMENT] if gpus else [],
        "model": [header.architecture, [[each.name, each.shape, each.type] for each in header.tensors], header.split],
        "build": build_id(),
        "openmp": [os.environ.get(name, OPENMP_DEFAULTS.get(name)) for name in _OPENMP],
    }
    return files.foundry_home() / "tune" / f"{files.digest(about)[:32]}.json"


def machine_identity(machine: Machine) -> dict[str, Any]:
    """What of a machine decides how fast a number of threads is; its memory and free memory do not."""
    names = ("system", "arch", "cpu_model", *Cpus.__dataclass_fields__)
    return {name: getattr(machine, name) for name in names}


def _read(path: Path) -> Tuning | None:
    return _parse(files.read_json(path))


def _parse(content: object) -> Tuning | None:
    match content:
        case {
            "form": form,
            "asked": [*asked],
            "found": dict(found),
            "others": int() | float() as others,
            "crowded": bool(crowded),
            "depth": int(depth),
            "batch": int(batch),
            "seconds": int() | float() as seconds,
            "attempts": int(attempts),
            "failed": bool(failed),
        } if form == _FORM and set(asked) <= set(TUNED) and set(found) <= set(asked):
            parsed = {name: _parse_found(name, each) for name, each in found.items()}
            if None not in parsed.values():
                return Tuning(
                    asked=tuple(asked),
                    found={name: each for name, each in parsed.items() if each is not None},
                    others=float(others),
                    crowded=crowded,
                    depth=depth,
                    batch=batch,
                    seconds=float(seconds),
                    attempts=attempts,
                    failed=failed,
                )
    return None


def _found_json(found: Found) -> dict[str, Any]:
    points = [{"value": p.value, "rate": float(f"{p.rate:.6g}"), "bursts": p.bursts} for p in found.points]
    return {"value": found.value, "noise": round(found.noise, 4), "points": points}


def _parse_found(name: str, raw: object) -> Found | None:
    match raw:
        case {"value": int(value), "noise": int() | float() as noise, "points": [*points]}:
            parsed = [_parse_point(name, point) for point in points]
            kept = tuple(point for point in parsed if point is not None)
            if len(kept) == len(parsed) and value in {point.value for point in kept}:
                return Found(value=value, points=kept, noise=float(noise))
    return None


def _parse_point(name: str, raw: object) -> Point | None:
    match raw:
        case {"value": int(value), "rate": int() | float() as rate, "bursts": int(bursts)} if (
            1 <= value <= _MOST[name] and math.isfinite(rate) and rate > 0
        ):
            return Point(value=value, rate=float(rate), bursts=bursts)
    return None
