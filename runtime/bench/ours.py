"""Our engine's turn, as a child: ``python -m runtime.bench.ours CASE_FILE`` measures it.

The last line of its output is one JSON object: the figures, or ``{"failed": ...}`` with an error's parts. A process of
its own leaves the peers the memory that our model would hold, and makes its peak that of this model alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import statistics
import sys
from pathlib import Path
from typing import Any, Final

from runtime.bench.case import Case, parse_case
from runtime.bench.overhead import overhead_us_per_token, reply
from runtime.engine import Engine, load
from runtime.engine.reply import ReplyStats
from toolchain.base import console
from toolchain.base.errors import FoundryError
from toolchain.base.topology import read_text

_WARM_UP_TOKENS: Final = 8
_BUFFER: Final = re.compile(r":\s+(\S+)\s+(model|KV|RS|output|compute) buffer size\s*=\s*([\d.]+) MiB")
_FLASH: Final = re.compile(r"flash.attention (not supported|enabled)|flash_attn\s*= (enabled|disabled)", re.IGNORECASE)


def main(argv: list[str]) -> int:
    case = parse_case(Path(argv[0]).read_text())
    try:
        engine, log = _load(case)
        with engine:
            figures = measure(engine, case)
    except FoundryError as error:
        parts = {"message": error.message, "evidence": error.evidence, "hint": error.hint}
        console.answer(json.dumps({"failed": {**parts, "exit_code": error.exit_code}}))
        return 0
    buffers = {f"{device} {kind}": round(float(mib) * 2**20) for device, kind, mib in _BUFFER.findall(log)}
    # Where the library says nothing, it does what an unset option means to it: it decides, and on a CPU for it.
    flash = next((found for found in reversed(list(_FLASH.finditer(log)))), None)
    told = {"buffers": buffers, "flash_attn": flash is None or "enabled" in flash[0].lower(), "log": log}
    console.answer(json.dumps({**figures, **told}))
    return 0


def measure(engine: Engine, case: Case) -> dict[str, Any]:
    """Medians over the replies after a warm-up: tokens per second, milliseconds, microseconds, bytes."""
    prompt = case.tokens[case.lengths.depth :]
    reply(engine, prompt, min(_WARM_UP_TOKENS, case.lengths.gen))
    replies = [_reply(engine, case) for _ in range(case.repeat)]
    generated = min(each.generation_steps for each in replies)
    ended = generated < case.lengths.gen
    return {
        "prompt_tps": statistics.median(each.prompt_tps for each in replies),
        "generation_tps": statistics.median(each.generation_tps for each in replies),
        "ttft_ms": statistics.median(each.ttft_ms for each in replies),
        "generated": generated,
        "overhead_us": 0.0 if ended else overhead_us_per_token(engine, case),
        "peak_rss_bytes": peak_rss_bytes(),
        "offloads": engine.offloads,
        "library_dir": str(Path(engine.model.lib._lib._name).resolve().parent),
    }


def peak_rss_bytes() -> int:
    """The most memory that this process had resident, pages of the mapped file included.

    From /proc where there is one: getrusage's figure survives exec (getrusage(2)), so it may be the parent's.
    """
    if own := re.search(r"^VmHWM:\s+(\d+) kB", read_text(Path("/proc/self/status")), re.MULTILINE):
        return int(own[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _reply(engine: Engine, case: Case) -> ReplyStats:
    """One reply with nothing but the depth in the cache."""
    engine.context.clear()
    if case.lengths.depth:
        reply(engine, case.tokens[: case.lengths.depth], 1)
        # As tokens of a reply are: else the engine goes back to where a cold run's pieces end, for the same bits.
        engine.context.exact = 0
    return reply(engine, case.tokens, case.lengths.gen + 1)


def _load(case: Case) -> tuple[Engine, str]:
    """The engine, and the library's log of the loading."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        engine = load(case.model, case.settings, verbose=True)
    engine.model.log.shown = False
    return engine, said.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
