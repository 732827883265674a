"""Run as a program by ``abi.declared_by``: import the bindings and tell what they declare.

The package is the first llama_cpp on PYTHONPATH, else the one that is installed. The last line of stdout is a
JSON object, the layout.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType

from toolchain.base.abi import declared_layout

MODULES = ("_ggml", "llama_cpp", "mtmd_cpp", "llava_cpp")


def main() -> int:
    sys.stdout.write("\n" + json.dumps(declared_layout(bindings()).to_json()) + "\n")
    return 0


def bindings() -> list[ModuleType]:
    """The modules of the package that declare C types.

    Left out are those that this version of the package does not have, and those whose library is not there:
    llava_cpp.py is still shipped where libllava no longer is, and nobody can import it. Any other failure is
    raised.
    """
    modules: list[ModuleType] = []
    for name in (f"llama_cpp.{module}" for module in MODULES):
        try:
            modules.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
        except FileNotFoundError:
            if name == "llama_cpp.llama_cpp":
                raise
    return modules


if __name__ == "__main__":
    sys.exit(main())
