"""Known errors in the bindings' declarations, mended while packaging: each only where the ABI proof finds its fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Mend:
    """One upstream error: the beginning of the proof's sentence, and the text that replaces another, in which file."""

    fault: str
    file: str
    old: str
    new: str


MENDS = (
    # llama_opt_init takes the struct by value: C reads four bytes behind what Python wrote (0.3.36)
    Mend(
        fault="llama_opt_params.optimizer_type: in C",
        file="llama_cpp.py",
        old='("get_opt_pars_ud", ctypes.c_void_p),',
        new='("get_opt_pars_ud", ctypes.c_void_p), ("optimizer_type", ctypes.c_int),',
    ),
    # another name for the same bytes (0.2.57)
    Mend(
        fault="llama_kv_cache_view.n_max_seq: called n_seq_max in C",
        file="llama_cpp.py",
        old='("n_max_seq", ctypes.c_int32)',
        new='("n_seq_max", ctypes.c_int32)',
    ),
)


def mend(package: Path, faults: Iterable[str]) -> tuple[str, ...]:
    """Mend what is known of ``faults`` in the package's sources; the faults that were mended."""
    mended = []
    for fault in faults:
        for known in MENDS:
            source = package / known.file
            if fault.startswith(known.fault) and (text := source.read_text()).count(known.old) == 1:
                source.write_text(text.replace(known.old, known.new))
                mended.append(fault)
    return tuple(mended)
