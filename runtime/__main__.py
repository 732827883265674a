"""The command line: ``python -m runtime VERB MODEL``; each verb is a module of ``runtime/commands``."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from runtime.commands import bench, chat, complete, embed, plan, serve, tune
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, FoundryError, MissingError

VERBS = (chat, complete, embed, serve, plan, tune, bench)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (the contract is in toolchain/base/errors.py)."""
    _open_missing_streams()
    arguments = _parser().parse_args(argv)
    try:
        # A pipe or a terminal of another encoding gets replacement marks, not a traceback.
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        status: int = arguments.verb(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except FoundryError as error:
        from toolchain.base import console

        console.failure(error)
        return error.exit_code
    except ModuleNotFoundError as error:
        # Not through the console: it may be what is missing.
        sys.stderr.write(
            f"✗ this Python has no {error.name}: {sys.executable}\n  → . .venv/bin/activate, or run `./inv`\n"
        )
        return MissingError.exit_code
    except Exception as error:
        return _unforeseen(error)
    return status


def _open_missing_streams() -> None:
    """What was closed by whoever started us reads as empty and swallows what is written."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def _unforeseen(error: Exception) -> int:
    """A full disk behind stdout, which has no name in the error, or a bug."""
    if not (isinstance(error, OSError) and error.errno in _FULL and error.filename is None):
        traceback.print_exc()
        return 1
    _discard_stdout()
    sys.stderr.write(f"✗ the answer cannot be written\n  {error}\n  → make room where stdout goes\n")
    return MissingError.exit_code


def _discard_stdout() -> None:
    """Nobody reads any more; keep the interpreter's last flush from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime", description="Run a GGUF model on this machine.")
    verbs = parser.add_subparsers(dest="verb_name", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
