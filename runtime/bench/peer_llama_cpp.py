"""llama-cpp-python's turn, as a child: ``python -m runtime.bench.peer_llama_cpp CASE_FILE 0|1`` (flash attention).

The one module besides runtime/library.py that imports llama_cpp: here its own API is what is measured. Prints one JSON
object. The reply's first call processes the prompt and draws one token; the second finds the prompt in the cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from runtime.bench.case import parse_case
from runtime.engine.load import KV_TYPE_IDS
from runtime.settings import parse_split
from toolchain.base import console


def main(argv: list[str]) -> int:
    from llama_cpp import Llama

    case = parse_case(Path(argv[0]).read_text())
    names = ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "n_gpu_layers")
    kv = {name: KV_TYPE_IDS[case.settings.text(name)] for name in ("type_k", "type_v")}
    numbers = {name: case.settings.number(name) for name in names}
    split = parse_split(case.settings.text("tensor_split"))
    how = {"tensor_split": list(split) or None, "flash_attn": argv[1] == "1", "verbose": False}
    llama = Llama(str(case.model), **numbers, **kv, **how)
    tokens, depth, gen = list(case.tokens), case.lengths.depth, case.lengths.gen

    def seconds(prompt: list[int], count: int) -> float:
        began = time.perf_counter()
        llama.create_completion(prompt, max_tokens=count, temperature=0)
        return time.perf_counter() - began

    seconds(tokens[depth:], 8)  # warm-up
    prompt_s, generation_s, generated = [], [], []
    for _ in range(case.repeat):
        llama.reset()
        if depth:
            seconds(tokens[:depth], 1)
        prompt_s.append(seconds(tokens, 1))
        generation_s.append(seconds(tokens, gen + 1))
        generated.append(llama.n_tokens - len(tokens))
    figures = {
        "prompt_tps": case.lengths.prompt / statistics.median(prompt_s),
        "generation_tps": gen / statistics.median(generation_s),
        "generated": min(generated),
    }
    console.answer(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
