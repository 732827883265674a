"""The 2023 trainer: really compiled from its pin, really trained, and refused when what it writes is wrong."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.front_door import inv, inv_json
from toolchain.base import files
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.build import ggla, legacy
from toolchain.build.pin import DEFAULT_PIN, SourceTree, parse_pin
from toolchain.build.source import fetch_source
from toolchain.build.toolchain import Toolchain, current, load


@pytest.fixture(scope="session")
def tree() -> SourceTree:
    return fetch_source(parse_pin(legacy.LEGACY_PIN))


@pytest.fixture(scope="session")
def built_trainer() -> dict[str, Any]:
    """What `inv build --legacy-finetune` answers; it compiles the trainer when that is not done."""
    return inv_json("build", "--legacy-finetune")


@pytest.fixture(scope="session")
def trainer(built_trainer: dict[str, Any]) -> Path:
    """The folder of the trainer's programs."""
    found = load(built_trainer["toolchain_id"])
    assert found is not None
    return found.bin_dir


@pytest.fixture
def adapter(trainer: Path, tmp_path: Path) -> Path:
    """What the real trainer writes in one step."""
    base, text, out = tmp_path / "base.gguf", tmp_path / "text.txt", tmp_path / "adapter.bin"
    model_program = Path(legacy.__file__).with_name("trainer_model.py")
    subprocess.run([sys.executable, model_program, base], check=True)
    text.write_text(legacy.TEXT)
    argv: list[str | Path] = [trainer / "finetune", "--model-base", base, "--train-data", text, "--lora-out", out]
    argv += ["--checkpoint-out", "", "--lora-r", "4", "--adam-iter", "1", "--warmup", "0"]
    argv += ["--ctx", "32", "--batch", "1", "--threads", "1"]
    subprocess.run(argv, check=True, capture_output=True, cwd=tmp_path)
    return out


def with_program(trainer: Path, place: Path, name: str, script: str) -> Path:
    """A folder of programs where ``name`` is a Python script that has the real one as ``real``."""
    place.mkdir()
    for program in legacy.TRAINER_PROGRAMS:
        (place / program).symlink_to(trainer / program)
    (place / name).unlink()
    prelude = "import pathlib, shutil, subprocess, sys\n"
    prelude += f"real = {str(trainer / name)!r}\noption = lambda flag: sys.argv[sys.argv.index(flag) + 1]\n"
    (place / name).write_text(f"#!{sys.executable}\n{prelude}{script}")
    (place / name).chmod(0o755)
    return place


def trains_then(damage: str) -> str:
    """A trainer that really trains, and then does ``damage`` to its adapter (its path is ``out``)."""
    return f"subprocess.run([real, *sys.argv[1:]], check=True)\nout = pathlib.Path(option('--lora-out'))\n{damage}\n"


def test_the_trainer_is_a_toolchain_of_its_own_beside_the_modern_one(
    toolchain: Toolchain, built_trainer: dict[str, Any], trainer: Path
) -> None:
    assert sorted(path.name for path in trainer.iterdir()) == sorted(legacy.TRAINER_PROGRAMS)
    assert "three steps" in built_trainer["reason"]
    assert (built_trainer["wheel"], built_trainer["backends"]) == (None, ["CPU"])
    modern, own = current(), current("trainer")
    assert modern is not None
    assert own is not None
    assert (modern.id, own.id) == (toolchain.id, built_trainer["toolchain_id"])
    assert inv_json("build", "--legacy-finetune")["reused"] is True


def test_the_trainer_is_built_from_a_git_pin_too(
    built_trainer: dict[str, Any], tree: SourceTree, tmp_path: Path
) -> None:
    """As from xaedes' branch: a bare llama.cpp in a repository. What would be built, without building it again."""
    repository = tmp_path / "llama.cpp"
    shutil.copytree(tree.llama, repository, ignore=shutil.ignore_patterns("models", "media", "kompute"))
    for argv in (["init", "-q", "-b", "finetune-lora"], ["add", "-A"], ["commit", "-q", "-m", "2023"]):
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        subprocess.run(["git", *identity, *argv], cwd=repository, check=True)
    pin = f"git:file://{repository}@finetune-lora"
    told = inv_json("build", "--legacy-finetune", "--source", pin, "--dry-run")
    assert told["toolchain_id"] != built_trainer["toolchain_id"]
    assert "-DLLAMA_BUILD_EXAMPLES=ON" in told["options"]


def test_a_modern_tree_has_no_trainer(built: dict[str, Any]) -> None:
    done = inv("build", "--legacy-finetune", "--source", DEFAULT_PIN, "--dry-run")
    assert done.returncode == 2
    assert "has no trainer" in done.stderr
    assert legacy.LEGACY_PIN in done.stderr


def test_the_trainer_takes_three_steps_and_its_adapter_merges(trainer: Path) -> None:
    proof = legacy.prove_trainer(trainer)
    assert len(proof.losses) == 3
    assert proof.losses[2] < proof.losses[1] < proof.losses[0]
    assert proof.rank == 4
    assert proof.trained == proof.pairs == 21  # embedding, norm, output and nine weights in each of two layers
    assert proof.perplexity_merged < proof.perplexity_base / 2
    assert not list(files.home_dir("work").glob("trainer-*/base.gguf"))


def test_the_programs_know_the_pinned_commit_and_the_source_stays_as_fetched(trainer: Path, tree: SourceTree) -> None:
    done = subprocess.run([trainer / "main", "--version"], capture_output=True, text=True, check=True)
    assert tree.short_commit in done.stdout + done.stderr
    shipped = (tree.llama / "common" / "build-info.cpp").read_text()
    assert "Ubuntu" in shipped, "the sdist's own file, written where it was packed"


def test_the_base_model_is_the_same_every_time(tmp_path: Path) -> None:
    program = Path(legacy.__file__).with_name("trainer_model.py")
    for name in ("one.gguf", "two.gguf"):
        subprocess.run([sys.executable, program, tmp_path / name], check=True)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_a_tree_without_the_trainer_is_refused_and_two_pins_are_named(tree: SourceTree, tmp_path: Path) -> None:
    legacy.require_trainer(tree)
    with pytest.raises(UsageError) as refused:
        legacy.require_trainer(replace(tree, llama=tmp_path, pin="path:elsewhere"))
    assert "path:elsewhere has no trainer" in refused.value.message
    assert legacy.LEGACY_PIN in refused.value.hint
    assert "git:https://github.com/xaedes/llama.cpp@finetune-lora" in refused.value.hint


def test_a_tree_that_calls_it_llama_finetune_is_refused(tree: SourceTree, tmp_path: Path) -> None:
    """So it was in June and July 2024: the programs of this build would not be among its targets."""
    for name in ("finetune", "export-lora"):
        folder = tmp_path / "examples" / name
        folder.mkdir(parents=True)
        (folder / "CMakeLists.txt").write_text(f"set(TARGET llama-{name})\n")
    with pytest.raises(UsageError, match="has no trainer"):
        legacy.require_trainer(replace(tree, llama=tmp_path))


def test_a_build_that_lacks_a_program_is_not_installed(trainer: Path, tmp_path: Path) -> None:
    (tmp_path / "build" / "bin").mkdir(parents=True)
    (tmp_path / "build" / "bin" / "main").symlink_to(trainer / "main")
    with pytest.raises(ArtifactError, match="made no finetune, export-lora, perplexity"):
        legacy.install_programs(tmp_path / "build", tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()


ZERO_ADAPTER = """\
import struct
data = bytearray(out.read_bytes())
at = 16
while at < len(data):
    n, name_bytes, kind = struct.unpack_from('<3I', data, at)
    count = 4
    for width in struct.unpack_from(f'<{n}I', data, at + 12):
        count *= width
    at += 12 + 4 * n + name_bytes
    loraB = data[at - 1:at] == b'B'
    at += -at % 32
    if loraB:
        data[at:at + count] = bytes(count)
    at += count
out.write_bytes(data)
"""


@pytest.mark.parametrize(
    ("script", "why"),
    [
        pytest.param(trains_then(ZERO_ADAPTER), "changes nothing", id="zero"),
        pytest.param(trains_then("out.write_bytes(out.read_bytes()[:-64])"), "not a whole ggla adapter", id="cut"),
        pytest.param(trains_then("out.write_bytes(b'')"), "not a whole ggla adapter", id="empty"),
        pytest.param(trains_then("out.unlink()"), "not a whole ggla adapter", id="missing"),
        pytest.param("sys.argv[sys.argv.index('--lora-r') + 1] = '2'\n" + trains_then(""), "wrong rank", id="rank"),
        pytest.param(
            "sys.argv[sys.argv.index('--adam-iter') + 1] = '2'\n" + trains_then(""), "took 2 of 3 steps", id="steps"
        ),
        pytest.param(
            "sys.argv[sys.argv.index('--adam-alpha') + 1] = '-0.05'\n" + trains_then(""), "does not fall", id="uphill"
        ),
        pytest.param(
            "for step in range(4): print(f'opt: iter= {step} sched=1.0 loss=nan |->')", "not finite", id="nan"
        ),
        pytest.param("print('GGML_ASSERT: no'); sys.exit(134)", "ended with status 134", id="crash"),
    ],
)
def test_a_trainer_that_does_not_train_is_refused(trainer: Path, tmp_path: Path, script: str, why: str) -> None:
    broken = with_program(trainer, tmp_path / "bin", "finetune", script)
    with pytest.raises(ArtifactError) as refused:
        legacy.prove_trainer(broken)
    assert why in refused.value.message
    assert refused.value.evidence


def test_an_export_that_leaves_the_adapter_out_is_refused(trainer: Path, tmp_path: Path) -> None:
    """The real one does so, with a warning and status 0, when it cannot open the adapter."""
    script = "sys.argv[sys.argv.index('-l') + 1] = 'nowhere'\nsubprocess.run([real, *sys.argv[1:]], check=True)\n"
    broken = with_program(trainer, tmp_path / "bin", "export-lora", script)
    with pytest.raises(ArtifactError, match="has learned nothing"):
        legacy.prove_trainer(broken)


def test_a_program_that_cannot_load_the_merged_model_is_refused(trainer: Path, tmp_path: Path) -> None:
    script = "model = pathlib.Path(option('-m'))\nmodel.write_bytes(model.read_bytes()[:4096])\n"
    script += "sys.exit(subprocess.run([real, *sys.argv[1:]]).returncode)\n"
    broken = with_program(trainer, tmp_path / "bin", "main", script)
    with pytest.raises(ArtifactError, match="main ended with status 1") as refused:
        legacy.prove_trainer(broken)
    assert "failed to load model" in refused.value.evidence


def test_an_adapter_is_read_as_it_was_written(adapter: Path) -> None:
    found = ggla.read_adapter(adapter)
    assert (found.rank, found.alpha) == (4, 4)
    a, b = found.pairs()[0]
    assert (a.name, a.shape) == ("token_embd.weight.loraA", (4, 64))
    assert (b.name, b.shape) == ("token_embd.weight.loraB", (4, 286))
    assert len(b.values) == 4 * 286


@pytest.mark.parametrize(
    ("offset", "value", "why"),
    [
        (0, 0x46554747, "0x46554747"),
        (4, 2, "version 2"),
        (16, 9, "9 dimensions"),
        (20, 1 << 30, "a name of 1073741824 bytes"),
        (24, 2, "type 2"),
        (28, 1 << 31, "it ends after"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter: Path, offset: int, value: int, why: str) -> None:
    """Magic, version, dimensions, bytes of the name, type and width of the first tensor."""
    data = bytearray(adapter.read_bytes())
    struct.pack_into("<I", data, offset, value)
    adapter.write_bytes(data)
    with pytest.raises(ArtifactError) as refused:
        ggla.read_adapter(adapter)
    assert why in refused.value.evidence


def test_an_adapter_with_half_a_pair_is_refused(tmp_path: Path) -> None:
    name = b"output.weight.loraA"
    header = struct.pack("<6I", ggla.MAGIC, 1, 1, 1, 1, len(name)) + struct.pack("<2I", 0, 2) + name
    path = tmp_path / "half.bin"
    path.write_bytes(header + bytes(-len(header) % 32) + array("f", [1, 2]).tobytes())
    with pytest.raises(ArtifactError) as refused:
        ggla.read_adapter(path).pairs()
    assert "no output.weight.loraB" in refused.value.evidence
