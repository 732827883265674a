"""Time to the first token of a prompt: cold, with a warm prefix, and with a restored session.

    .venv/bin/python tests/benchmarks/prefix.py                      # the demo model, 2,000 tokens
    .venv/bin/python tests/benchmarks/prefix.py MODEL.gguf --tokens 4000 --rounds 9

Warm: the cache holds a prompt that shares its first 95 % with this one and then goes on otherwise. Restored: the cache
is empty; a session with those 95 % and no more is restored from disk, the restoring included in the time. Continued:
the same with a session that lacks only the last 32 tokens, a message. Each round runs all, in an order that turns; the
reply (16 tokens, greedy) must be the cold one's. Figures are medians, the ratios those of each round's pair. Nothing
else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DEMO = ROOT / "models" / "demo" / "demo-Q4_K_M.gguf"
GOAL = 0.12
REPLY_TOKENS = 16
MESSAGE_TOKENS = 32

from runtime.engine import Engine  # noqa: E402
from runtime.engine.load import load  # noqa: E402
from runtime.engine.sampling import SamplingOptions  # noqa: E402
from runtime.settings import settle  # noqa: E402
from runtime.tune.threads import tuned_threads  # noqa: E402
from toolchain.base import machine  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare cold, warm and restored prompts.")
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--shared", type=float, default=0.95, help="part of the prompt that is in the cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--type-k", default="f16")
    parser.add_argument("--type-v", default="f16")
    asked = parser.parse_args()
    here = machine.probe()
    flags: dict[str, int | str | None] = {
        "n_ctx": asked.tokens + 512,
        "n_gpu_layers": 0,
        "type_k": asked.type_k,
        "type_v": asked.type_v,
    }
    settings = settle(machine=here, n_ctx_train=None, tuned=tuned_threads(here), flags=flags)
    with load(asked.model, settings) as engine, tempfile.TemporaryDirectory() as folder:
        answer = measure(engine, Path(folder) / "shared.session", asked.tokens, asked.shared, asked.rounds)
    print("| prompt | ms to the first token | of a cold one | tokens read | goal |")
    print("|---|---:|---:|---:|---:|")
    for name in ("cold", "warm", "restored", "continued"):
        row = answer[name]
        goal = "" if name == "cold" else f"<= {GOAL}"
        print(f"| {name} | {row['ms']:.1f} | {row['ratio']:.3f} | {row['read_tokens']} | {goal} |")
    print(json.dumps({"model": asked.model.name, "tokens": asked.tokens, "goal": GOAL, **answer}))
    return 0


def measure(engine: Engine, path: Path, length: int, part: float, rounds: int) -> dict[str, Any]:
    """Medians and ratios by name, whether all replies were one, the session's bytes and the restoring alone."""
    prompt = text_tokens(engine, length + 200)
    shared = int(length * part)
    other = [*prompt[:shared], *prompt[length : length + length - shared]]
    prompt = prompt[:length]

    def cold() -> float:
        engine.context.clear()
        return 0.0

    def warm() -> float:
        engine.context.clear()
        reply(engine, other)
        return 0.0

    def restored(file: Path) -> float:
        engine.context.clear()
        started = time.perf_counter()
        engine.restore_session(file)
        return time.perf_counter() - started

    longer = path.with_name("longer.session")
    for file, count in ((path, shared), (longer, length - MESSAGE_TOKENS)):
        engine.context.reuse(prompt[:count])
        engine.context.decode_prompt(prompt[:count], None)
        engine.save_session(file)
    cases: dict[str, Callable[[], float]] = {
        "cold": cold,
        "warm": warm,
        "restored": lambda: restored(path),
        "continued": lambda: restored(longer),
    }
    for prepare in cases.values():  # once unmeasured
        prepare()
        reply(engine, prompt)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    read: dict[str, int] = {}
    texts: set[str] = set()
    restoring: list[float] = []
    names = list(cases)
    for number in range(rounds):
        for name in names[number % 4 :] + names[: number % 4]:
            before = cases[name]()
            text, first_s, read[name] = reply(engine, prompt)
            seconds[name].append(before + first_s)
            texts.add(text)
            if name == "restored":
                restoring.append(before)
        print(
            f"round {number + 1}: " + ", ".join(f"{n} {s[-1] * 1000:.1f} ms" for n, s in seconds.items()),
            file=sys.stderr,
        )
    rows = {
        name: {
            "ms": round(statistics.median(values) * 1000, 3),
            "ratio": round(statistics.median(x / y for x, y in zip(values, seconds["cold"], strict=True)), 4),
            "read_tokens": read[name],
        }
        for name, values in seconds.items()
    }
    size = path.stat().st_size
    return {
        **rows,
        "same_output": len(texts) == 1,
        "session_bytes": size,
        "restore_ms": round(statistics.median(restoring) * 1000, 3),
    }


def reply(engine: Engine, prompt: list[int]) -> tuple[str, float, int]:
    """(text, seconds to the first token, prompt tokens that were read)."""
    chunks = list(engine.stream(prompt, SamplingOptions(temp=0), max_tokens=REPLY_TOKENS))
    stats = chunks[-1].stats
    assert stats is not None
    return "".join(chunk.text for chunk in chunks), stats.ttft_ms / 1000, stats.processed_tokens


def text_tokens(engine: Engine, length: int) -> list[int]:
    """English that every Python carries."""
    from pydoc_data.topics import topics

    tokens = engine.tokenize("\n".join(map(str, topics.values()))[: 12 * length])
    assert len(tokens) >= length
    return tokens[:length]


if __name__ == "__main__":
    sys.exit(main())
