"""llama-server with its web page: build the page with npm, compile the server around it, prove that it serves it.

    .venv/bin/python tests/benchmarks/ui_build.py --jobs 2

Prints one JSON object with the seconds of each part. Only the program llama-server is compiled, with the options
that `inv build` uses; ccache helps where it is installed. The page is made anew, npm's packages are fetched anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from toolchain.build import cmake, webui  # noqa: E402
from toolchain.build.compile import BuildRequest, configure  # noqa: E402
from toolchain.build.pin import DEFAULT_PIN  # noqa: E402

Result = TypeVar("Result")
seconds: dict[str, float] = {}


def main() -> int:
    parser = argparse.ArgumentParser(description="Build llama-server with its web page and prove it.")
    parser.add_argument("--source", default=DEFAULT_PIN)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--scratch", type=Path, help="where to build (default: a temporary directory)")
    asked = parser.parse_args()
    tree = configure(BuildRequest(source=asked.source)).tree
    defines = tuple(f"{name}={value}" for name, value in webui.page_defines(tree.llama).items())
    settled = configure(BuildRequest(source=asked.source, defines=defines, jobs=asked.jobs))
    program, ninja = cmake.find_tool("cmake"), cmake.find_tool("ninja")
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        build, log = Path(scratch) / "build", Path(scratch) / "log"
        os.environ["FOUNDRY_HOME"] = f"{scratch}/home"  # the sources are fetched, all else is to be made anew
        page = timed("page", lambda: webui.build_page(tree.llama, log=log))
        if page is None:
            print(f"{tree.pin} carries its page ready-made", file=sys.stderr)
            return 2
        argv = cmake.configure_argv(
            cmake=program,
            ninja=ninja,
            source=tree.llama,
            build=build,
            options=settled.options,
            c=settled.c,
            cxx=settled.cxx,
        )
        timed("configure", lambda: subprocess.run(argv, check=True, stdout=sys.stderr))
        timed("hand_over", lambda: webui.hand_over(page, llama=tree.llama, build=build))
        compile_argv = (*cmake.build_argv(cmake=program, build=build, jobs=settled.jobs.count), "-t", "llama-server")
        timed("compile", lambda: subprocess.run(compile_argv, check=True, stdout=sys.stderr))
        timed("proof", lambda: webui.prove_page(build / "bin" / "llama-server", page, log=log))
        again = timed("page_again", lambda: webui.build_page(tree.llama, log=log))
        assert again == page
    print(json.dumps({"source": tree.pin, "jobs": settled.jobs.count, "seconds": seconds}, indent=2))
    return 0


def timed(name: str, part: Callable[[], Result]) -> Result:
    """The result of ``part``; its wall time goes into ``seconds``."""
    started = time.monotonic()
    result = part()
    seconds[name] = round(time.monotonic() - started, 2)
    return result


if __name__ == "__main__":
    sys.exit(main())
