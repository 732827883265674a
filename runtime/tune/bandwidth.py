"""How many bytes a second this machine reads from memory: the roof over generation, which reads all weights per token.

Method: as many Python threads as asked for each take the maximum of a slice of their own, over and over for a fifth of
a second (numpy lets go of the interpreter meanwhile), the slices together four times as large as the caches. Each
thread writes its slice first, so that on a machine with several memory nodes it lies near the thread. The threads'
rates count together; the median of three such windows is the answer.

It is a lower bound: the reduction does a little arithmetic on each cache line. On the machine of docs/performance.md it
reached 0.98 of what the C library's memchr reads with two threads, and 0.86 with one.
"""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from runtime.tune.neighbours import Neighbours, crowded
from runtime.tune.record import ATTEMPTS, machine_identity
from toolchain.base import files
from toolchain.base.errors import FoundryError
from toolchain.base.machine import Machine
from toolchain.base.topology import read_text

_WINDOWS: Final = 3
_WINDOW_S: Final = 0.2
_LEAST_BYTES: Final = 256 << 20
_TIMES_CACHE: Final = 4
_CACHES: Final = "sys/devices/system/cpu"
_FORM: Final = 1


def read_bandwidth(machine: Machine, *, threads: int | None = None, again: bool = False) -> float:
    """Bytes read per second with ``threads`` threads (None: one per CPU that a prompt would use).

    Measured in about a second and kept in FOUNDRY_HOME/tune for this kind of machine; ``again`` measures anew. Beside
    other work it comes out too low: then the next calls measure again, a few times, and the best stays. Never takes
    more than a quarter of the free memory.
    """
    count = threads or machine.prompt_threads.count
    known = None if again else _read(machine, count)
    if known is not None and (not known.crowded or known.attempts >= ATTEMPTS):
        return known.bytes_per_s
    busy = Neighbours()
    measured = _measure(count, _buffer_bytes(machine))
    was_crowded = crowded(machine, count, busy.cpus())
    best, attempts = (max(measured, known.bytes_per_s), known.attempts + 1) if known else (measured, 1)
    note = {"form": _FORM, "threads": count, "bytes_per_s": round(best), "crowded": was_crowded, "attempts": attempts}
    with suppress(FoundryError, OSError):
        files.write_json(_path(machine, count), note)
    return float(round(best))


def recorded_bandwidth(machine: Machine, *, threads: int | None = None) -> float | None:
    """The best that ``read_bandwidth`` found before; None when it was never asked here."""
    known = _read(machine, threads or machine.prompt_threads.count)
    return known.bytes_per_s if known else None


def cache_bytes(root: Path = Path("/")) -> int:
    """The last-level caches of all CPUs together, each counted once; 0 where the kernel does not say."""
    found: dict[tuple[str, str], int] = {}
    for folder in (root / _CACHES).glob("cpu[0-9]*/cache/index*"):
        level, size, shared = (read_text(folder / name) for name in ("level", "size", "shared_cpu_list"))
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
        if (digits := size.rstrip("KMG")).isdigit() and read_text(folder / "type") != "Instruction":
            found[level, shared] = int(digits) * unit
    last = max((level for level, _ in found), default="")
    return sum(size for (level, _), size in found.items() if level == last)


class _Known(NamedTuple):
    bytes_per_s: float
    crowded: bool
    attempts: int


def _read(machine: Machine, threads: int) -> _Known | None:
    match files.read_json(_path(machine, threads)):
        case {
            "form": form,
            "threads": known,
            "bytes_per_s": int() | float() as rate,
            "crowded": bool(was_crowded),
            "attempts": int(attempts),
        } if form == _FORM and known == threads and 0 < rate < float("inf"):
            return _Known(float(rate), was_crowded, attempts)
    return None


def _path(machine: Machine, threads: int) -> Path:
    about = {"form": _FORM, "machine": machine_identity(machine), "threads": threads}
    return files.foundry_home() / "tune" / f"bandwidth-{files.digest(about)[:32]}.json"


def _buffer_bytes(machine: Machine) -> int:
    wanted = max(_LEAST_BYTES, _TIMES_CACHE * cache_bytes())
    return max(1 << 20, min(wanted, machine.available_bytes // 4))


def _measure(threads: int, total_bytes: int) -> float:
    """The sum over all threads of bytes per second."""
    import numpy as np

    count = max(1, total_bytes // 8 // threads)
    slices = [np.empty(count, np.int64) for _ in range(threads)]
    windows = [[0.0] * threads for _ in range(_WINDOWS)]
    ready = threading.Barrier(threads)

    def read(number: int) -> None:
        mine = slices[number]
        mine.fill(1)
        for rates in windows:
            ready.wait()
            passes, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < _WINDOW_S or not passes:
                mine.max()
                passes += 1
            rates[number] = passes * mine.nbytes / elapsed

    team = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    for each in team:
        each.start()
    for each in team:
        each.join()
    return statistics.median(map(sum, windows))
