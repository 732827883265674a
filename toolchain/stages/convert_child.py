"""Run as a program: llama.cpp's converter, with the code in a model's folder kept from running.

The converter loads some tokenizers with transformers' ``trust_remote_code``, which imports Python files named by
the model's own configuration: from its folder, from any other path, or from a cache. All of these end in one
function of transformers, and that one refuses here, unless ``--trust-remote-code`` is the first argument.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import NoReturn


def main() -> None:
    trusted = sys.argv[1:2] == ["--trust-remote-code"]
    script, *arguments = sys.argv[2 if trusted else 1 :]
    if not trusted:
        import transformers.dynamic_module_utils as dynamic

        dynamic.get_class_in_module = refuse
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def refuse(class_name: str, module_path: object, **_: object) -> NoReturn:
    """In the place of ``transformers.dynamic_module_utils.get_class_in_module``."""
    raise SystemExit(
        f"the model wants to run Python code of its own: {class_name} in {module_path}\n"
        "read that code; a model.path recipe may then say trust_remote_code: true"
    )


if __name__ == "__main__":
    main()
