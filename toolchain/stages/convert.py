"""A Hugging Face model folder to one GGUF at full precision, by llama.cpp's own converter in a child."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolchain.base import command
from toolchain.base.command import OnProgress
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.gguf import read_header
from toolchain.stages.stage import Stage, package_version

OutType = Literal["auto", "f32", "f16", "bf16"]
BYTES_PER_WEIGHT: Mapping[str, int] = {"auto": 2, "f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Convert(Stage):
    """Convert ``model_dir`` with the converter in ``convert_dir``. ``n_params`` is for the estimate only.

    ``source_digest`` identifies the model's content where no earlier step does. Python code in the model's
    folder runs only with ``trust_remote_code`` (see ``convert_child``).
    """

    model_dir: Path
    model_name: str
    trust_remote_code: bool
    outtype: OutType
    convert_dir: Path
    source_digest: str
    toolchain_id: str
    n_params: int

    @property
    def title(self) -> str:
        return f"convert to GGUF ({self.outtype})"

    @property
    def identity(self) -> Mapping[str, object]:
        # the tokenizer's conversion goes through transformers
        asked = {"outtype": self.outtype, "name": self.model_name, "code": self.trust_remote_code}
        versions = {name: package_version(name) for name in ("transformers", "sentencepiece")}
        return {"stage": "convert", **asked, "source": self.source_digest, "toolchain": self.toolchain_id, **versions}

    @property
    def bytes(self) -> int:
        return self.n_params * BYTES_PER_WEIGHT[self.outtype]

    def command(self, output: Path) -> tuple[str, ...]:
        trust = ("--trust-remote-code",) if self.trust_remote_code else ()
        script = self.convert_dir / "convert_hf_to_gguf.py"
        target = ("--outfile", str(output), "--outtype", self.outtype, "--model-name", self.model_name)
        child = Path(__file__).with_name("convert_child.py")
        return (sys.executable, str(child), *trust, str(script), str(self.model_dir), *target)

    def run(self, output: Path, *, log: Path, on_progress: OnProgress) -> None:
        command.run(
            self.command(output),
            what="converting the model",
            # what is in the folder is all there is: no look-ups on the hub while converting
            env={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": None},
            log=log,
            parse=parse_percent,
            on_progress=on_progress,
            hint="an architecture or tokenizer that this llama.cpp does not know needs a newer `./inv build --source`",
        )

    def check(self, output: Path) -> Mapping[str, object]:
        """The header is sound and holds at least the model's tensors."""
        header = read_header(output)
        if not header.tensors:
            raise ArtifactError(f"the converter wrote no tensors to {output}", hint="run it again; read the log")
        return {"n_params": header.n_params, "tensors": len(header.tensors)}


def parse_percent(recent: str) -> tuple[int, int] | None:
    """The last ``NN%|`` of a progress bar."""
    found = re.findall(r"(\d+)%\|", recent)
    return (int(found[-1]), 100) if found else None


def check_model_dir(path: Path) -> None:
    """Raise UsageError unless ``path`` looks like a Hugging Face model folder."""
    if not path.is_dir():
        what = f"{path} is a file, not a model folder" if path.exists() else f"no such model folder: {path}"
        raise UsageError(what, hint="model.path names a folder, relative to the recipe's")
    names = [p.name for p in path.iterdir()]
    if "config.json" not in names or not any(n.endswith((".safetensors", ".bin")) for n in names):
        raise UsageError(
            f"{path} is not a Hugging Face model folder",
            evidence=f"it holds: {', '.join(sorted(names)[:12]) or 'nothing'}",
            hint="it needs config.json, the tokenizer's files and *.safetensors; for a .gguf use model.gguf",
        )


def model_files(path: Path) -> list[str]:
    """Relative names of the files in a model folder, sorted; hidden ones (a clone's .git) do not count."""
    names = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
    return sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts))


def count_params(model_dir: Path) -> int:
    """Weights in the folder's safetensors, read from their headers; from file sizes for other formats.

    Format: u64 length, then that much JSON of {name: {dtype, shape, data_offsets}}
    (huggingface/safetensors README). A header that makes no sense counts by the file's size.
    """
    total = 0
    for path in sorted(model_dir.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8).ljust(8, b"\0"))
            try:
                header = json.loads(handle.read(length)) if 0 < length <= min(size, 1 << 28) else {}
                shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
                total += sum(_product(shape) for shape in shapes) if shapes else size // 2
            except (ValueError, KeyError, TypeError, AttributeError):
                total += size // 2
    return total or sum(p.stat().st_size for p in model_dir.glob("*.bin")) // 2


def _product(shape: list[int]) -> int:
    result = 1
    for extent in shape:
        result *= int(extent)
    return result
