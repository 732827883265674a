"""Where a model comes from: made here (demo), or downloaded from the hub at a pinned commit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.base import command, files, machine
from toolchain.base.command import OnProgress
from toolchain.hub import snapshot as hub
from toolchain.stages import corpus, demo_model
from toolchain.stages.convert import check_model_dir
from toolchain.stages.stage import Stage, package_version


@dataclass(frozen=True, kw_only=True)
class MakeDemo(Stage):
    """Train the demo model ``preset`` from the text that CPython carries."""

    preset: str

    @property
    def title(self) -> str:
        return f"make the demo model ({self.preset})"

    @property
    def identity(self) -> Mapping[str, object]:
        program = files.sha256_file(Path(demo_model.__file__))
        packages = {name: package_version(name) for name in ("torch", "transformers", "sentencepiece", "safetensors")}
        text = corpus.corpus_digest("train")
        return {"stage": "demo", "preset": self.preset, "program": program, "text": text, **packages}

    @property
    def bytes(self) -> int:
        return demo_model.demo_bytes(demo_model.PRESETS[self.preset])

    def command(self, output: Path) -> tuple[str, ...]:
        threads = str(machine.probe().usable_cpus)
        module = (sys.executable, "-m", "toolchain.stages.demo_model")
        return (*module, "--preset", self.preset, "--out", str(output), "--threads", threads)

    def run(self, output: Path, *, log: Path, on_progress: OnProgress) -> None:
        command.run(
            self.command(output),
            what="making the demo model",
            log=log,
            parse=command.parse_counter,
            on_progress=on_progress,
            hint="run `./inv` to mend the environment",
        )

    def check(self, output: Path) -> Mapping[str, object]:
        check_model_dir(output)
        return {}


@dataclass(frozen=True, kw_only=True)
class FetchHub(Stage):
    """Download ``snapshot`` into the hub cache; the output file only says where the snapshot lies."""

    snapshot: hub.HubSnapshot
    cache_dir: Path

    @property
    def title(self) -> str:
        return f"fetch {self.snapshot.repo}"

    @property
    def identity(self) -> Mapping[str, object]:
        chosen = [[file.name, file.bytes, file.sha256] for file in self.snapshot.files]
        return {"stage": "hub", "repo": self.snapshot.repo, "commit": self.snapshot.commit, "files": chosen}

    @property
    def bytes(self) -> int:
        return self.snapshot.bytes

    def command(self, output: Path) -> tuple[str, ...]:
        revision = ("--revision", self.snapshot.commit, "--cache-dir", str(self.cache_dir))
        return (
            "(in process)",
            "hf",
            "download",
            self.snapshot.repo,
            *revision,
            *(file.name for file in self.snapshot.files),
        )

    def run(self, output: Path, *, log: Path, on_progress: OnProgress) -> None:
        hub.download_snapshot(self.snapshot, self.cache_dir, on_progress)
        output.write_text(self.snapshot.commit)

    def check(self, output: Path) -> Mapping[str, object]:
        return {"commit": self.snapshot.commit}

    def present(self, output: Path) -> bool:
        """Also the snapshot itself, which lies in the hub cache and may have been cleaned there."""
        return output.exists() and hub.snapshot_dir(self.snapshot, self.cache_dir) is not None


@dataclass(frozen=True, kw_only=True)
class WriteCorpus(Stage):
    """The held-out part of the Python documentation as a text file."""

    split: corpus.Split = "heldout"

    @property
    def title(self) -> str:
        return "write the evaluation text"

    @property
    def bytes(self) -> int:
        return 1 << 16

    @property
    def identity(self) -> Mapping[str, object]:
        return {"stage": "corpus", "split": self.split, "text": corpus.corpus_digest(self.split)}

    def command(self, output: Path) -> tuple[str, ...]:
        return ("(in process)", "pydoc_data.topics", self.split, str(output))

    def run(self, output: Path, *, log: Path, on_progress: OnProgress) -> None:
        output.write_text(corpus.python_docs(self.split))


@dataclass(frozen=True, kw_only=True)
class CopyCorpus(Stage):
    """A text of the user's, kept by content: what was judged stays known when the file changes."""

    path: Path
    sha256: str

    @property
    def title(self) -> str:
        return "copy the evaluation text"

    @property
    def identity(self) -> Mapping[str, object]:
        return {"stage": "corpus", "sha256": self.sha256}

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    def command(self, output: Path) -> tuple[str, ...]:
        return ("(in process)", "cp", str(self.path), str(output))

    def run(self, output: Path, *, log: Path, on_progress: OnProgress) -> None:
        shutil.copyfile(self.path, output)
