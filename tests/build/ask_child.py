"""Asks the library in a child process: a JSON question on stdin, the answers as the last line of stdout.

So a crash of the library ends one question, and a child may import the bindings of another toolchain.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from runtime.library import import_library
from runtime.memory.ask_library import ask
from runtime.memory.footprint import Demand, Placement
from tests.front_door import ROOT

Answer: TypeAlias = list[list[int]]
"""[weights, kv, compute] of the host and of each device, bytes."""


def ask_in_child(
    path: Path,
    cases: Sequence[tuple[Demand, Placement]],
    *,
    allocate: bool = False,
    site: Path | None = None,
    endpoints: Sequence[str] = (),
) -> list[Answer]:
    """The library's answer to each case. ``site``: import the bindings from there; ``endpoints``: of RPC servers."""
    rows = [[vars(demand), vars(placement)] for demand, placement in cases]
    question: dict[str, Any] = {"path": str(path), "allocate": allocate, "endpoints": [*endpoints], "cases": rows}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*([str(site)] if site else []), str(ROOT)])}
    argv, asked = [sys.executable, "-m", "tests.build.ask_child"], json.dumps(question)
    done = subprocess.run(argv, input=asked, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[Answer] = json.loads(done.stdout.splitlines()[-1])
    return answers


def main() -> None:
    question = json.load(sys.stdin)
    for endpoint in question["endpoints"]:
        add_server(endpoint)
    answers = []
    for demand, placement in question["cases"]:
        placed = {**placement, "tensor_split": tuple(placement["tensor_split"])}
        found = ask(Path(question["path"]), Demand(**demand), Placement(**placed), allocate=question["allocate"])
        answers.append([[device.weights, device.kv, device.compute] for device in found])
    print(json.dumps(answers))


def add_server(endpoint: str) -> None:
    """Make an RPC server one of the library's devices (add_rpc_devices in common/arg.cpp)."""
    raw = ctypes.CDLL(import_library()._lib._name)
    raw.ggml_backend_reg_by_name.restype = raw.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    raw.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    raw.ggml_backend_register.argtypes = [ctypes.c_void_p]
    found = raw.ggml_backend_reg_get_proc_address(raw.ggml_backend_reg_by_name(b"RPC"), b"ggml_backend_rpc_add_server")
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(found)
    raw.ggml_backend_register(add(endpoint.encode()))


if __name__ == "__main__":
    main()
