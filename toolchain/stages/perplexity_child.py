"""Run as a program, with llama-perplexity and its arguments: the same program, and its last lines are not lost.

llama.cpp's logger is a thread that the end of its programs does not wait for (common_log_main in common/log.cpp,
llama.cpp issue 22142): on a busy machine the last lines, and with them the figures, are lost though all went well. So
its main is called here, in the library that holds it (tools/perplexity/CMakeLists.txt), and the logger is waited for.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

MAIN = "_Z16llama_perplexityiPPc"  # int llama_perplexity(int argc, char ** argv)
LOGGER = "_Z15common_log_mainv"  # common_log * common_log_main()
FLUSH = "_Z16common_log_flushP10common_log"  # void common_log_flush(common_log *)


def library(tool: Path, name: str = "llama-perplexity-impl") -> Path | None:
    """The library of that name that ``tool`` was built with; None where it was built in one piece."""
    return next((tool.resolve().parent.parent / "lib").glob(f"lib{name}.*"), None)


def main(argv: list[str]) -> int:
    for name in (signal.SIGINT, signal.SIGPIPE):  # as a program without Python has them
        signal.signal(name, signal.SIG_DFL)
    tool = Path(argv[0])
    try:
        main_of_tool = ctypes.CDLL(str(library(tool)))[MAIN]
        common = ctypes.CDLL(str(library(tool, "llama-common")))
        logger, flush = common[LOGGER], common[FLUSH]
    except (AttributeError, OSError):  # a source of another time, whose parts have other names
        os.execv(tool, argv)
    logger.restype = ctypes.c_void_p
    flush.argtypes, flush.restype = (ctypes.c_void_p,), None
    words = (ctypes.c_char_p * (len(argv) + 1))(*map(os.fsencode, argv), None)
    status = int(main_of_tool(len(argv), words))
    flush(logger())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
