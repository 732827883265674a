"""`inv build --cuda` with a real nvcc, on a tree that compiles in seconds: toolkit, architectures, and the proof.

What the CUDA code of the real llama.cpp does is tested where there is a GPU (tests/gpu); compiling it takes half an
hour on two cores.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.front_door import inv, inv_json
from tests.mini_llama import write_tree
from toolchain.build.toolkit import find_toolkits

pytestmark = pytest.mark.skipif(
    not find_toolkits(), reason="no CUDA toolkit here, and none is part of this tier's promise"
)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked here is asked as on a machine without a GPU, wherever the tests run."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_dry_run_explains_the_choice(built: object, home: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", cuda="asked")
    told = inv_json("build", "--cuda-arch", "90", "--source", f"path:{tree}", "--dry-run")
    assert told["variants"] == ["cuda"]
    assert any("architectures 90: asked for" in line for line in told["cuda"])
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in told["options"]


def test_kernels_are_compiled_for_what_was_asked_and_the_proof_goes_on(
    built: object, home: Path, tmp_path: Path
) -> None:
    """The kernel links with cuBLAS and holds sm_90; then the bindings' proof refuses this tree, as it must."""
    tree = write_tree(tmp_path / "tree", cuda="asked")
    done = inv("build", "--cuda", "--cuda-arch", "90", "--no-use", "--source", f"path:{tree}")
    assert done.returncode == 6, done.stderr
    assert "the Python bindings" in done.stderr
    assert "list the CUDA code" in done.stderr
    assert "sm_90" in done.stderr
    assert not [path for path in (home / "toolchains").glob("[!.]*") if path.is_dir()]


def test_a_library_without_the_architecture_is_refused_by_name(built: object, home: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", cuda="80")
    done = inv("build", "--cuda", "--cuda-arch", "90", "--no-use", "--source", f"path:{tree}")
    assert done.returncode == 6, done.stderr
    assert "lacks compute_90, sm_90" in " ".join(done.stderr.split())
    assert "it carries" in done.stderr


def test_the_cuda_option_of_other_years_is_understood(built: object, home: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", cuda="asked")
    listing = tree / "CMakeLists.txt"
    listing.write_text(
        listing.read_text().replace("GGML_CUDA ", "LLAMA_CUBLAS ").replace("(GGML_CUDA)", "(LLAMA_CUBLAS)")
    )
    told = inv_json("build", "--define", "GGML_CUDA=ON", "--cuda-arch", "90", "--source", f"path:{tree}", "--dry-run")
    assert "-DLLAMA_CUBLAS=ON" in told["options"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cuda", "--define", "GGML_CUDA=OFF"), "--define GGML_CUDA=OFF contradicts --cuda"),
        (("--cuda", "--define", "NONSENSE=1"), "has no option NONSENSE"),
        (("--cuda-arch", "banana"), "not a CUDA architecture"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_fetched(
    built: object, home: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (home / "sources").unlink()
    tree = write_tree(tmp_path / "tree", cuda="asked")
    done = inv("build", *arguments, "--source", f"path:{tree}", env={"PIP_INDEX_URL": "http://127.0.0.1:9/simple"})
    assert done.returncode == 2, done.stderr
    assert words in done.stderr


def test_a_dry_run_fetches_nothing(built: object, home: Path, tmp_path: Path) -> None:
    (home / "sources").unlink()
    tree = write_tree(tmp_path / "tree", cuda="asked")
    env = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    told = inv_json("build", "--cuda", "--cuda-arch", "86", "--source", f"path:{tree}", "--dry-run", env=env)
    assert told["disk_bytes"] > 1 << 29


def test_architectures_given_to_cmake_reach_the_solver(built: object, home: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", cuda="asked")
    told = inv_json("build", "--define", "CMAKE_CUDA_ARCHITECTURES=86", "--source", f"path:{tree}", "--dry-run")
    assert any("architectures 86: asked for" in line for line in told["cuda"])


def test_a_named_toolkit_that_is_not_there_is_refused(built: object, home: Path, tmp_path: Path) -> None:
    for arguments, env in ((("--cuda-toolkit", str(tmp_path)), {}), (("--cuda",), {"CUDA_HOME": str(tmp_path)})):
        done = inv("build", *arguments, "--dry-run", env=env)
        assert done.returncode == 3, done.stderr
        assert "names no CUDA toolkit" in done.stderr


def test_a_host_compiler_that_nvcc_does_not_take_is_refused_before_cmake(
    built: object, home: Path, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "g++ (GCC) 99.1.0"\n')
    compiler.chmod(0o755)
    env = {"CXX": str(compiler), "PATH": f"{tmp_path}:{Path(str(shutil.which('cmake'))).parent}:/usr/bin:/bin"}
    done = inv("build", "--cuda", "--cuda-arch", "90", "--dry-run", env={**env, "CUDAHOSTCXX": str(compiler)})
    assert done.returncode == 3, done.stderr
    assert "gcc 99 is newer than CUDA" in done.stderr
    assert "apt-get install g++-" in done.stderr
    assert not (home / "logs").exists()
