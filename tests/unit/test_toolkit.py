"""CUDA toolkits laid out as files, their nvcc a shell script, and an index on 127.0.0.1 that completes them."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.loopback_wheels import Reply, WheelIndex, page, serve
from toolchain.base import files
from toolchain.base.errors import CommandError, FetchError, MissingError
from toolchain.base.machine import find_compiler
from toolchain.build.cuda_facts import known_architectures
from toolchain.build.toolkit import Toolkit, ask, find_toolkits
from toolchain.build.toolkit_parts import COMPILER_WHEELS, complete, fetch_toolkit, make_driver_stub

SEARCHED = ("CUDACXX", "CUDA_HOME", "CUDA_PATH")
SYSTEM_PATH = os.environ["PATH"]
CUBLAS = {"include/cublas_v2.h": "", "lib/libcublas.so.13": "13", "lib/libcublasLt.so.13": "13"}


@pytest.fixture(autouse=True)
def _no_toolkit_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in SEARCHED:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[WheelIndex]:
    with serve({}) as served:
        monkeypatch.setenv("PIP_INDEX_URL", f"{served.url}/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
        yield served


def nvcc_script(version: str, archs: str, log: Path) -> str:
    """Answers as nvcc does, the folder above the path it was called by being its toolkit."""
    release = ".".join(version.split(".")[:2])
    return f"""#!/bin/sh
echo "$1" >> {log}
case $1 in
--version) echo "Cuda compilation tools, release {release}, V{version}" ;;
--list-gpu-arch) printf 'compute_%s\\n' {archs} ;;
--dryrun) printf '#$ _SPACE_= \\n#$ TOP=%s\\n' "${{0%/*}}/.." >&2 ;;
esac
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def lay_out(
    root: Path, version: str = "12.4.131", *, cublas: bool = True, stub: bool = True, archs: str = "50 90"
) -> Path:
    """A toolkit at ``root``, laid out as NVIDIA's; ``ROOT.asked`` holds a line for each question to its nvcc."""
    write(root / "bin" / "nvcc", nvcc_script(version, archs, root.with_name(f"{root.name}.asked")))
    limits = "#if __GNUC__ > 13\n#error\n#endif\n#if (__clang_major__ >= 18)\n#error\n#endif\n"
    write(root / "include" / "crt" / "host_config.h", limits)
    write(root / "lib64" / "libcudart.so", "")
    if cublas:
        write(root / "include" / "cublas_v2.h", "")
        write(root / "lib64" / "libcublas.so", "")
    if stub:
        write(root / "lib64" / "stubs" / "libcuda.so", "")
    return root


def asked(root: Path) -> list[str]:
    return root.with_name(f"{root.name}.asked").read_text().split()


def test_a_toolkit_tells_what_it_is_and_what_it_lacks(tmp_path: Path) -> None:
    lay_out(tmp_path / "usr/local/cuda-12.4")
    lay_out(tmp_path / "opt/cuda", "13.0.88", cublas=False, stub=False)
    whole, bare = find_toolkits(tmp_path)
    assert (whole.version, whole.release, whole.archs) == ("12.4.131", (12, 4), frozenset({"50", "90"}))
    assert (whole.gcc_max, whole.clang_max, whole.cublas, whole.driver_stub) == (13, 17, True, True)
    assert (bare.release, bare.cublas, bare.driver_stub) == ((13, 0), False, False)
    assert bare.nvcc == tmp_path / "opt/cuda/bin/nvcc"


def test_a_header_of_cublas_without_its_library_is_no_cublas(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "opt/cuda")
    (root / "lib64/libcublas.so").unlink()
    assert not find_toolkits(tmp_path)[0].cublas


def test_a_link_to_an_installed_toolkit_is_not_another_one(tmp_path: Path) -> None:
    for version in ("12.4.131", "13.0.88"):
        lay_out(tmp_path / f"usr/local/cuda-{version[:4]}", version)
    (tmp_path / "usr/local/cuda").symlink_to("cuda-13.0")
    assert [toolkit.version for toolkit in find_toolkits(tmp_path)] == ["13.0.88", "12.4.131"]


@pytest.mark.parametrize("variable", [*SEARCHED, "PATH", "--cuda-toolkit"])
def test_a_named_toolkit_comes_before_the_installed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    lay_out(tmp_path / "usr/local/cuda-13.0", "13.0.88")
    mine = lay_out(tmp_path / "mine", "12.8.93")
    values = {"CUDACXX": mine / "bin/nvcc", "PATH": mine / "bin"}
    if variable != "--cuda-toolkit":
        monkeypatch.setenv(variable, str(values.get(variable, mine)))
    found = find_toolkits(tmp_path, named=str(mine) if variable == "--cuda-toolkit" else None)
    assert [(toolkit.version, toolkit.found_by) for toolkit in found] == [
        ("12.8.93", variable),
        ("13.0.88", str(tmp_path / "usr/local/cuda-13.0")),
    ]


@pytest.mark.parametrize("variable", [*SEARCHED, "--cuda-toolkit"])
def test_a_named_toolkit_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    lay_out(tmp_path / "usr/local/cuda-13.0", "13.0.88")
    if variable != "--cuda-toolkit":
        monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(MissingError, match=variable) as caught:
        find_toolkits(tmp_path, named=str(tmp_path / "nowhere") if variable == "--cuda-toolkit" else None)
    assert str(tmp_path / "nowhere") in caught.value.evidence
    assert variable in caught.value.hint


def test_a_wrapper_stands_for_the_toolkit_behind_it(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "usr/local/cuda-12.4")
    write(tmp_path / "path/nvcc", f'#!/bin/sh\nexec {root}/bin/nvcc "$@"\n')
    (found,) = find_toolkits(tmp_path)
    assert (found.root, found.found_by, found.cublas) == (root, "PATH", True)
    lay_out(root, "12.5.82")
    assert [toolkit.version for toolkit in find_toolkits(tmp_path)] == ["12.5.82"]


def test_an_nvcc_that_names_its_folder_of_targets_has_its_root_above(tmp_path: Path) -> None:
    """As conda's does; headers and libraries then lie in targets/ only."""
    root = lay_out(tmp_path / "conda")
    for name, inner in {"include": "include", "lib64": "lib"}.items():
        target = root / "targets/x86_64-linux" / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / name).rename(target)
    nvcc = root / "bin/nvcc"
    write(nvcc, nvcc.read_text().replace("/..", "/../targets/x86_64-linux"))
    wrapper = write(tmp_path / "path/nvcc", f'#!/bin/sh\nexec {nvcc} "$@"\n')
    found = ask(wrapper, "PATH")
    assert (found.root, found.gcc_max, found.cublas, found.driver_stub) == (root, 13, True, True)


def test_an_nvcc_that_names_no_folder_has_its_root_above_itself(tmp_path: Path) -> None:
    """As Debian's does, which spreads the toolkit over /usr."""
    root = lay_out(tmp_path / "usr", cublas=False, stub=False)
    nvcc = root / "bin/nvcc"
    write(nvcc, nvcc.read_text().replace("TOP", "_HERE_"))
    write(root / "include/cublas_v2.h", "")
    write(root / "lib/x86_64-linux-gnu/libcublas.so", "")
    found = ask(nvcc, "PATH")
    assert (found.root, found.cublas) == (root, True)


def test_nvcc_is_asked_once_and_again_when_its_file_changes(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "opt/cuda")
    first = find_toolkits(tmp_path)
    assert find_toolkits(tmp_path) == first
    assert asked(root) == ["--version", "--list-gpu-arch", "--dryrun"]
    lay_out(root, "12.8.93", archs="90 120")
    (newer,) = find_toolkits(tmp_path)
    assert (newer.version, newer.archs) == ("12.8.93", frozenset({"90", "120"}))
    assert len(asked(root)) == 6


def test_an_nvcc_that_lists_no_architectures_is_taken_at_its_release(tmp_path: Path) -> None:
    nvcc = lay_out(tmp_path / "opt/cuda", "11.0.221") / "bin/nvcc"
    write(nvcc, nvcc.read_text().replace("--list-gpu-arch) ", "--list-gpu-arch) echo unknown option; exit 1; "))
    assert find_toolkits(tmp_path)[0].archs == known_architectures((11, 0))


@pytest.mark.parametrize(
    ("says", "error"),
    [("echo hello", MissingError), ("echo 'cannot open shared object'; exit 127", CommandError)],
    ids=["nonsense", "fails"],
)
def test_an_nvcc_that_cannot_be_asked_is_an_error_unless_there_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], says: str, error: type[Exception]
) -> None:
    broken = write(tmp_path / "usr/local/cuda-13.0/bin/nvcc", f"#!/bin/sh\n{says}\n")
    with pytest.raises(error) as caught:
        find_toolkits(tmp_path)
    assert str(broken) in str(caught.value.hint)  # type: ignore[attr-defined]
    sound = lay_out(tmp_path / "usr/local/cuda-12.4")
    assert [toolkit.root for toolkit in find_toolkits(tmp_path)] == [sound]
    assert "passed over" in capsys.readouterr().err
    with pytest.raises(error):
        find_toolkits(tmp_path, named=str(broken.parents[1]))


def offer(index: WheelIndex, name: str, version: str, inside: Mapping[str, str], *, folder: str = "cu13") -> str:
    """Put a wheel of a part into the index, behind a redirect; the path of its bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for inner, text in inside.items():
            archive.writestr(f"nvidia/{folder}/{inner}", text)
    body = packed.getvalue()
    filename = f"{name.replace('-', '_')}-{version}-py3-none-manylinux_2_17_{platform.machine()}.whl"
    index.replies[f"/files/{filename}"] = Reply(status=302, location=f"/blobs/{filename}?signature=secret")
    index.replies[f"/blobs/{filename}"] = Reply(body)
    known = index.replies.get(f"/simple/{name}/", page())
    link = page(f"/files/{filename}#sha256={hashlib.sha256(body).hexdigest()}")
    index.replies[f"/simple/{name}/"] = Reply(known.body + link.body, link.kind)
    return f"/blobs/{filename}"


def downloads(index: WheelIndex) -> list[str]:
    return [path for path in index.log if path.startswith("/blobs/")]


def without_cublas(tmp_path: Path, version: str = "13.0.88") -> Toolkit:
    return ask(lay_out(tmp_path / "cuda", version, cublas=False) / "bin/nvcc", "PATH")


def test_a_toolkit_without_cublas_becomes_whole_in_foundry_home(tmp_path: Path, index: WheelIndex) -> None:
    fitting = offer(index, "nvidia-cublas", "13.0.9", CUBLAS)
    offer(index, "nvidia-cublas", "13.1.0", CUBLAS)
    given = without_cublas(tmp_path)
    before = files.tree_digest(given.root)
    whole = complete(given)
    assert (whole.cublas, whole.version, whole.archs) == (True, given.version, given.archs)
    assert files.foundry_home() in whole.root.parents
    assert (whole.lib_dir / "libcublas.so").read_text() == (whole.lib_dir / "libcublasLt.so").read_text() == "13"
    assert (whole.root / "include/crt/host_config.h").is_file()
    assert whole.driver_stub
    assert files.tree_digest(given.root) == before
    assert complete(given) == whole
    assert complete(whole) is whole
    assert downloads(index) == [fitting]


def test_each_major_release_has_its_own_wheel_of_cublas(tmp_path: Path, index: WheelIndex) -> None:
    inside = {"include/cublas_v2.h": "", "lib/libcublas.so.12": ""}
    fitting = offer(index, "nvidia-cublas-cu12", "12.4.5.8", inside, folder="cublas")
    offer(index, "nvidia-cublas-cu12", "12.8.4.1", inside, folder="cublas")
    assert complete(without_cublas(tmp_path, "12.4.131")).cublas
    assert downloads(index) == [fitting]
    with pytest.raises(MissingError) as caught:
        complete(without_cublas(tmp_path, "11.8.89"))
    assert caught.value.hint == "apt-get install libcublas-dev-11-8"


@pytest.mark.parametrize("fault", ["not there", "another release", "changed", "damaged", "another content", "cut"])
def test_a_wheel_of_cublas_that_cannot_be_had_leaves_nothing(tmp_path: Path, index: WheelIndex, fault: str) -> None:
    version = "12.9.1" if fault == "another release" else "13.0.9"
    inside = {"nothing": ""} if fault == "another content" else CUBLAS
    blob = index.replies[offer(index, "nvidia-cublas", version, inside)]
    match fault:
        case "not there":
            del index.replies["/simple/nvidia-cublas/"]
        case "changed":
            blob.body = blob.body[:-1] + b"x"
        case "cut":
            blob.cut_at = len(blob.body) // 2
        case "damaged":
            sound = hashlib.sha256(blob.body).hexdigest().encode()
            blob.body = blob.body[:-40]
            listing = index.replies["/simple/nvidia-cublas/"]
            listing.body = listing.body.replace(sound, hashlib.sha256(blob.body).hexdigest().encode())
    with pytest.raises(FetchError, match="has no cuBLAS") as caught:
        complete(without_cublas(tmp_path))
    assert "apt-get install libcublas-dev-13-0" in caught.value.hint
    assert not [path for path in files.home_dir("sources").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("target", ["http://example.org/x.whl", "file:///etc/hostname"])
def test_an_unsafe_redirect_is_not_followed(tmp_path: Path, index: WheelIndex, target: str) -> None:
    blob = offer(index, "nvidia-cublas", "13.0.9", CUBLAS)
    index.replies[blob.replace("/blobs/", "/files/")].location = target
    with pytest.raises(FetchError, match="redirects") as caught:
        complete(without_cublas(tmp_path))
    assert target.partition("//")[0] in caught.value.evidence


def test_a_whole_toolkit_comes_from_wheels_and_moves_with_foundry_home(
    tmp_path: Path, index: WheelIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    insides = {
        "nvidia-cuda-nvcc": {"bin/nvcc": nvcc_script("13.0.88", "90", tmp_path / "asked")},
        "nvidia-nvvm": {"nvvm/bin/cicc": "", "lib/libnvvm.so.4": ""},
        "nvidia-cuda-crt": {"include/crt/host_config.h": "#if __GNUC__ > 15\n"},
        "nvidia-cuda-runtime": {"include/cuda_runtime.h": "", "lib/libcudart.so.13": ""},
        "nvidia-cuda-cccl": {"include/cccl/cub/cub.cuh": ""},
        "nvidia-cublas": CUBLAS,
    }
    assert {*insides} == {*COMPILER_WHEELS, "nvidia-cublas"}
    for name, inside in insides.items():
        offer(index, name, "13.0.85", inside)
    made = fetch_toolkit((13, 0))
    assert (made.version, made.gcc_max, made.cublas, made.driver_stub) == ("13.0.88", 15, True, False)
    moved = tmp_path / "elsewhere"
    shutil.move(files.foundry_home(), moved)
    monkeypatch.setenv("FOUNDRY_HOME", str(moved))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    again = fetch_toolkit((13, 0))
    assert again.root == moved / "sources" / made.root.name
    for name in ("bin/nvcc", "nvvm/bin/cicc", "include/cccl/cub/cub.cuh", "lib/libcudart.so", "lib64/libcublas.so"):
        assert (again.root / name).is_file(), name
    assert os.access(again.root / "nvvm/bin/cicc", os.X_OK)
    assert len(downloads(index)) == len(insides)


def test_a_program_linked_with_the_stand_in_for_the_driver_needs_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", SYSTEM_PATH)
    compiler = find_compiler("c")
    stub = make_driver_stub(compiler)
    assert make_driver_stub(compiler) == stub
    source = tmp_path / "main.c"
    source.write_text("int cuDeviceGet(int *, int);\nint main(void) { int d; return cuDeviceGet(&d, 0); }\n")
    program = tmp_path / "main"
    subprocess.run([compiler.path, source, "-L", stub, "-lcuda", "-o", program], check=True)
    shown = subprocess.run(["readelf", "-d", program], check=True, capture_output=True, text=True).stdout
    assert "[libcuda.so.1]" in shown
    # nothing, or a real driver, answers by itself; the stand-in says that there is no device
    alone = subprocess.run([program], check=False, capture_output=True, env={"LD_LIBRARY_PATH": str(stub)})
    assert alone.returncode not in (0, 100)
    helped = subprocess.run([program], check=False, env={"LD_LIBRARY_PATH": str(stub / "run")})
    assert helped.returncode == 100
