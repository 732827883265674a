"""How often llama.cpp is compiled for tools and bindings together, and what a rebuild costs with ccache.

    .venv/bin/python tests/benchmarks/one_native_build.py

Counts the translation units that `inv build` really compiles (through wrappers around cc and c++), and those that
bare cmake would compile for the tools alone with the same options (from ninja's own list). Then `inv clean
--toolchain` and the same build again, from a cache of its own that the first build filled. Needs ccache. Nothing
else should run on the machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
WRAPPER = """#!/bin/sh
for argument; do [ "$argument" = -c ] && echo "$*" >>"{log}" && break; done
exec {real} "$@"
"""


def main() -> int:
    if not shutil.which("ccache"):
        sys.exit("ccache is not installed: apt-get install ccache")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        log = place / "compiled"
        for name in ("cc", "c++"):
            wrapper = place / name
            wrapper.write_text(WRAPPER.format(log=log, real=shutil.which(name)))
            wrapper.chmod(0o755)
        environment = {
            **os.environ,
            "CC": str(place / "cc"),
            "CXX": str(place / "c++"),
            "FOUNDRY_HOME": str(place / "home"),
            "CCACHE_DIR": str(place / "ccache"),
        }
        os.environ.update(environment)
        tools = planned(place / "bare")
        cold = timed("build", "--no-use")
        compiled, alike = count(log), cache_hits()
        timed("clean", "--toolchain")
        warm = timed("build", "--no-use")
        answer = {
            "units_for_the_tools_alone": tools,
            "units_for_tools_and_bindings": compiled + alike,
            "of_these_alike_and_taken_from_ccache": alike,
            "ratio": round((compiled + alike) / tools, 4),
            "units_in_the_warm_rebuild": count(log) - compiled,
            "cold_s": round(cold, 1),
            "warm_s": round(warm, 1),
            "warm_share": round(warm / cold, 4),
        }
    print(json.dumps(answer, indent=2))
    return 0


def planned(build: Path) -> int:
    """Translation units that ninja would compile for the same configuration without bindings."""
    from toolchain.build import cmake
    from toolchain.build.configure import BuildRequest, configure

    configuration = configure(BuildRequest())
    program, ninja = cmake.find_tool("cmake"), cmake.find_tool("ninja")
    argv = cmake.configure_argv(
        cmake=program, ninja=ninja, source=configuration.tree.llama, build=build,
        options=configuration.options, c=configuration.c, cxx=configuration.cxx,
    )  # fmt: skip
    subprocess.run(argv, check=True, capture_output=True)
    listed = subprocess.run([ninja, "-C", build, "-t", "commands"], check=True, capture_output=True, text=True)
    return own_units(listed.stdout)


def count(log: Path) -> int:
    return own_units(log.read_text()) if log.exists() else 0


def cache_hits() -> int:
    """Compilations that ccache has spared so far."""
    told = subprocess.run(["ccache", "--print-stats"], check=True, capture_output=True, text=True).stdout
    return sum(int(n) for n in re.findall(r"(?m)^(?:direct|preprocessed)_cache_hit\s+(\d+)$", told))


def own_units(commands: str) -> int:
    """Objects of cmake's targets among compilers' command lines; its own checks and the ABI probe are none.

    By what comes out, since ccache hands the compiler a preprocessed file of another name.
    """
    return len(re.findall(r"-o (?!\S*cmTC_)\S+\.dir/\S+\.o\b", commands))


def timed(*arguments: str) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "tasks.py", *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
