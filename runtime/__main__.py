"""The command line: ``python -m runtime VERB MODEL``; each verb is a module of ``runtime/commands``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from runtime.commands import bench, chat, complete, embed, plan, serve, tune
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, FoundryError, MissingError

VERBS = (chat, complete, embed, serve, plan, tune, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (the contract is in toolchain/base/errors.py)."""
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
    except Exception:
        traceback.print_exc()
        return 1
    return status


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
