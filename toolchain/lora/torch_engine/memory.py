"""The most memory that this process used from a moment on.

On the CPU that is resident memory: private pages, and those pages of a mapped file (the base) that were touched and
that the kernel still keeps for us. On a GPU it is what torch's allocator handed out there.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

import psutil

_CLEAR: Final = Path("/proc/self/clear_refs")
_STATUS: Final = Path("/proc/self/status")
_POLL_S: Final = 0.02


class MemoryWatch:
    """Counts from its making on. ``import_bytes`` is what the process held on this device at that moment."""

    def __init__(self, device: str) -> None:
        self._device, self._polled = device, 0
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.import_bytes = int(torch.cuda.memory_allocated())
            return
        self.import_bytes = int(psutil.Process().memory_info().rss)
        self._by_kernel = _forget_peak()
        if not self._by_kernel:
            threading.Thread(target=self._poll, name="memory", daemon=True).start()

    def peak_bytes(self) -> int:
        """The most memory at any time so far, beyond ``import_bytes``."""
        if self._device == "cuda":
            import torch

            peak = int(torch.cuda.max_memory_allocated())
        else:
            peak = _kernel_peak() if self._by_kernel else self._polled
        return max(0, peak - self.import_bytes)

    def _poll(self) -> None:
        process, pause = psutil.Process(), threading.Event()
        while not pause.wait(_POLL_S):
            self._polled = max(self._polled, int(process.memory_info().rss))


def _forget_peak() -> bool:
    """Whether the kernel keeps the peak for us, from now on: 5 resets VmHWM (proc(5), since Linux 4.0)."""
    try:
        _CLEAR.write_text("5")
        return _kernel_peak() > 0
    except (OSError, ValueError):
        return False


def _kernel_peak() -> int:
    """VmHWM in bytes; 0 where the kernel does not tell it."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
