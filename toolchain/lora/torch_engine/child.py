"""The process that trains: ``python -m toolchain.lora.torch_engine.child SPEC.json``.

Several processes share the work as ``torchrun --nproc-per-node N -m toolchain.lora.torch_engine.child SPEC.json``, on
several machines with torchrun's own options; base, dataset and libraries then lie at the same paths on each, and the
first process writes. Standard output gets each step's StepLine as JSON, and {"warning": ...}. A run that was ended in
any way goes on from its last checkpoint when it is started again. A FoundryError is left in ``run_dir`` for whoever
started us, and its exit code is ours; interrupted, it is 130.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

from toolchain.base import files
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, FoundryError
from toolchain.lora.child_errors import FAILURE, write_failure
from toolchain.lora.spec import TrainSpec


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    spec = TrainSpec.from_json(json.loads(Path(sys.argv[1]).read_text()))
    run_dir = Path(spec.run_dir)
    try:
        with files.disk_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / FAILURE).unlink(missing_ok=True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else its sums differ from run to run
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peft would ask the hub about the base
        warnings.simplefilter("ignore", FutureWarning)  # what peft and transformers have to settle between them
        from toolchain.lora.torch_engine.train import train

        return train(spec)
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except FoundryError as error:
        sys.stderr.write(f"{error.message}\n{error.evidence}\n{error.hint}\n")
        with contextlib.suppress(FoundryError):  # a disk may be too full even for that
            write_failure(run_dir, error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
