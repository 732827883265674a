from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final

import pytest

from runtime.legacy_ggml import CONVERTER, conversion_arguments, converted, find_converter, is_legacy_ggml, require_70b
from runtime.legacy_header import read_legacy_header
from tests.generated_models import write_header
from tests.legacy_ggml_files import write_legacy
from toolchain.base import files
from toolchain.base.errors import ArtifactError, FoundryError, MissingError, UsageError
from toolchain.base.gguf import read_header

TINY: Final[dict[str, Any]] = {"n_embd": 32, "n_head": 2, "n_head_kv": 2, "n_layer": 1, "n_ff": 32, "n_vocab": 260}
N_VOCAB, N_LAYER, FTYPE = 8, 24, 32  # offsets in a GGJT file


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_legacy(tmp_path / "small.bin", **TINY)


def patched(path: Path, offset: int, value: int) -> Path:
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, offset, value)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(("container", "version"), [("GGML", 1), ("GGMF", 1), ("GGJT", 1), ("GGJT", 2), ("GGJT", 3)])
def test_the_formats_of_2023_are_known_by_their_first_bytes(tmp_path: Path, container: str, version: int) -> None:
    path = write_legacy(tmp_path / "x.bin", container=container, version=version, type="F16", **TINY)
    assert is_legacy_ggml(path)
    found = read_legacy_header(path)
    assert (found.container, found.version, found.file_type, found.n_layer) == (container, version, "F16", 1)
    assert found.format == ("GGML" if container == "GGML" else f"{container} v{version}")


def test_what_is_no_such_file_is_none(tmp_path: Path) -> None:
    for name, content in (("a.gguf", b"GGUF"), ("b.bin", b""), ("pytorch_model.bin", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        assert not is_legacy_ggml(tmp_path / name)
    assert not is_legacy_ggml(tmp_path)
    assert not is_legacy_ggml(tmp_path / "nowhere.bin")


def test_header_tells_extents_and_grouped_heads(tmp_path: Path) -> None:
    header = read_legacy_header(write_legacy(tmp_path / "g.bin", n_head=8, n_head_kv=1, n_layer=3, n_ff=160))
    assert (header.n_head, header.n_head_kv, header.gqa, header.n_layer, header.n_ff) == (8, 1, 8, 3, 160)
    assert (header.n_vocab, header.n_embd, header.file_type) == (512, 64, "Q4_0")


@pytest.mark.parametrize(
    ("name", "llama_2"),
    [
        ("llama-2-7b-chat.ggmlv3.q4_0.bin", True),
        ("nous-hermes-llama2-13b.ggmlv3.q4_K_M.bin", True),
        ("mythomax-l2-13b.ggmlv3.q5_1.bin", True),
        ("codellama-7b.ggmlv3.Q4_0.bin", True),
        ("llama-7b.ggmlv3.q4_0.bin", False),
        ("llama-30b.ggmlv3.q2_K.bin", False),
        ("guanaco-65B.ggmlv3.q4_0.bin", False),
        ("vicuna-7b-v1.3.ggmlv3.q4_0.bin", False),
        ("open-llama-20b.bin", False),
    ],
)
def test_llama_2_is_known_by_its_name(tmp_path: Path, name: str, llama_2: bool) -> None:
    arguments = conversion_arguments(read_legacy_header(write_legacy(tmp_path / name, **TINY)))
    eps, n_ctx = ("1e-5", "4096") if llama_2 else ("5.0e-06", "2048")
    assert arguments == ("--gqa", "1", "--eps", eps, "--context-length", n_ctx)


def test_grouped_heads_are_llama_2_whatever_the_name(tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "model.bin", **{**TINY, "n_head": 4, "n_head_kv": 1})
    assert conversion_arguments(read_legacy_header(path))[:4] == ("--gqa", "4", "--eps", "1e-5")


@pytest.mark.parametrize(
    ("container", "version", "type"),
    [
        ("GGML", 1, "Q4_0"),
        ("GGMF", 1, "Q4_1"),
        ("GGJT", 1, "Q4_0"),
        ("GGJT", 1, "Q5_1"),
        ("GGJT", 2, "Q4_0"),
        ("GGJT", 2, "Q8_0"),
    ],
)
def test_blocks_of_an_older_layout_are_refused_by_name_with_the_way_out(
    tmp_path: Path, container: str, version: int, type: str
) -> None:
    path = write_legacy(tmp_path / "old.bin", container=container, version=version, type=type, **TINY)
    with pytest.raises(UsageError) as caught:
        converted(path)
    assert container in caught.value.message
    assert type in caught.value.message
    assert "quantize the original weights" in caught.value.hint


def test_blocks_that_did_not_change_in_version_3_are_taken(tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "v2.bin", version=2, type="Q5_0", **TINY)
    assert read_legacy_header(path).file_type == "Q5_0"


def test_file_type_that_hides_old_blocks_is_seen_through(tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "liar.bin", version=1, type="Q4_0", **TINY)
    with pytest.raises(UsageError, match="whose blocks no"):
        read_legacy_header(patched(path, FTYPE, 1))


def test_a_file_cut_anywhere_is_refused(small: Path, tmp_path: Path) -> None:
    whole, cut = small.read_bytes(), tmp_path / "cut.bin"
    for size in (*range(4, 200), *range(200, len(whole), 331), len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(FoundryError):
            read_legacy_header(cut)


def test_bytes_behind_the_last_tensor_are_refused(small: Path) -> None:
    small.write_bytes(small.read_bytes() + b"\0" * 7)
    with pytest.raises(ArtifactError, match="ends inside tensor"):
        read_legacy_header(small)


@pytest.mark.parametrize("n_vocab", [0, 2, 10**6, 2**32 - 1])
def test_a_vocabulary_that_the_file_cannot_hold_is_refused(small: Path, n_vocab: int) -> None:
    with pytest.raises(ArtifactError, match="a vocabulary that the file cannot hold"):
        read_legacy_header(patched(small, N_VOCAB, n_vocab))


@pytest.mark.parametrize(("layers", "error"), [(0, UsageError), (2, ArtifactError), (2**32 - 1, UsageError)])
def test_layers_that_are_not_there_are_refused(small: Path, layers: int, error: type[FoundryError]) -> None:
    with pytest.raises(error):
        read_legacy_header(patched(small, N_LAYER, layers))


def test_another_architecture_in_the_same_container_is_told_apart(small: Path) -> None:
    """The other examples of ggml wrote the same magic, with their file type and version in one number (2002)."""
    with pytest.raises(UsageError, match="not of a LLaMA"):
        read_legacy_header(patched(small, FTYPE, 2002))


def test_70b_is_held_against_the_tensors(tmp_path: Path) -> None:
    small = write_legacy(tmp_path / "small.bin", **TINY)
    old = write_legacy(tmp_path / "65b.bin", **{**TINY, "n_layer": 80})
    for path, layers in ((small, "1 layers"), (old, "80 layers")):
        with pytest.raises(UsageError, match="is no Llama 70B") as caught:
            converted(path, is_70b=True)
        assert layers in caught.value.message
    assert list(tmp_path.glob("*.gguf")) == []


def test_70b_is_held_against_the_header_of_a_gguf(tmp_path: Path) -> None:
    small = read_header(write_header(tmp_path / "small.gguf", "llama"))
    with pytest.raises(UsageError, match=r"no Llama 70B: llama, 4 layers of width 256, .*M parameters"):
        require_70b(small)
    old = read_header(write_header(tmp_path / "65b.gguf", "llama", n_layer=80, n_head=64, n_head_kv=64))
    with pytest.raises(UsageError, match="80 layers"):
        require_70b(old)
    require_70b(read_header(write_header(tmp_path / "70b.gguf", "llama", n_layer=80, n_head=64, n_head_kv=8)))


def test_full_disk_is_told_before_the_converter_starts(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1 << 10}))
    with pytest.raises(MissingError, match="not enough disk space for the GGUF"):
        converted(small)
    assert sorted(path.name for path in small.parent.iterdir() if path.is_file()) == ["small.bin"]


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FOUNDRY_HOME with the note of a Toolchain and one source tree."""
    home = tmp_path / "home"
    monkeypatch.setenv("FOUNDRY_HOME", str(home))
    root = home / "toolchains" / "abc-1"
    root.mkdir(parents=True)
    (root.parent / "current").symlink_to("abc-1")
    (root / "toolchain.json").write_text(json.dumps({"source": "sdist:x==1", "commit": "abc"}))
    for commit in ("abc", "def"):
        tree = home / "sources" / f"sdist-{commit}"
        (tree / "vendor").mkdir(parents=True)
        files.write_json(tree / "source.json", {"pin": "sdist:x==1", "llama": "vendor", "commit": commit})
        (tree / "vendor" / CONVERTER).write_text(commit)
    return root


def test_converter_is_of_the_tree_that_the_toolchain_was_built_from(toolchain: Path) -> None:
    assert find_converter().read_text() == "abc"
    find_converter().unlink()
    with pytest.raises(MissingError, match="no converter") as caught:
        find_converter()
    assert "sdist:x==1" in caught.value.evidence


def test_converter_that_the_toolchain_carries_is_preferred(toolchain: Path) -> None:
    (toolchain / "convert").mkdir()
    (toolchain / "convert" / CONVERTER).write_text("carried")
    assert find_converter().read_text() == "carried"


def test_converter_of_a_local_source_is_found_by_its_folder(toolchain: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / CONVERTER).write_text("mine")
    files.write_json(toolchain / "toolchain.json", {"source": f"path:{tmp_path / 'mine'}", "commit": "tree-1"})
    assert find_converter().read_text() == "mine"
