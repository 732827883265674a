"""`inv build --prebuilt` through the front door: real wheels of this build, from real indexes on loopback."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.described_fatbin import elf, entry, fatbin
from tests.described_nvml import write_nvml
from tests.front_door import ROOT, environment
from tests.loopback_wheels import Wheel, make_wheel, own_layout, serve
from toolchain.base import files
from toolchain.base.gpu import Gpu
from toolchain.build.toolchain import Toolchain

RTX_3060 = Gpu(name="NVIDIA GeForce RTX 3060", memory_bytes=12 << 30, capability=(8, 6), uuid="GPU-1")
ANY_LINUX = "py3-none-linux_x86_64"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own that sees our packages, but installs llama_cpp for itself."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (next(folder.glob("lib/python3*/site-packages")) / "zz-ours.pth").write_text("\n".join(ours))
    return folder / "bin" / "python"


@pytest.fixture
def own_wheel(toolchain: Toolchain) -> Wheel:
    return toolchain.wheel.name, toolchain.wheel.read_bytes()


def prebuilt(python: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = [str(python), "tasks.py", "build", "--prebuilt", *arguments]
    return subprocess.run(
        argv, cwd=ROOT, env=environment(env), capture_output=True, text=True, timeout=600, check=False
    )


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def told(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("where", ["an index", "a folder"])
def test_a_wheel_that_fits_is_installed_and_proven(
    python: Path, toolchain: Toolchain, own_wheel: Wheel, where: str, tmp_path: Path
) -> None:
    misfit = make_wheel("0.3.36", "cp39-cp39-linux_x86_64")
    with serve(own_layout({"cpu": [own_wheel, misfit]}, hashes=True)) as index:
        place = f"{index.url}/whl" if where == "an index" else str(toolchain.wheel.parent)
        found = answer(prebuilt(python, "--index", place, "--json"))
    assert found["toolchain_id"] is None
    assert found["backends"] == ["CPU"]
    assert found["commit"].startswith(toolchain.short_commit)
    assert found["abi"] == "its structs agree"
    assert Path(found["wheel"]).name == toolchain.wheel.name
    if where == "an index":
        assert any("CPython 3.9" in reason or "3.9" in reason for reason in found["rejected"])
    asked = subprocess.run(
        [python, "-c", "import llama_cpp; print(llama_cpp.__version__, llama_cpp.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    version, place = asked.stdout.split()
    assert version == toolchain.wheel_version
    assert place.startswith(str(python.parent.parent))


def test_a_wheel_for_the_wrong_cuda_is_refused_with_its_reason(python: Path, tmp_path: Path) -> None:
    env = write_nvml(tmp_path, [RTX_3060], driver="550.54.14", cuda=(12, 4))
    with serve(own_layout({"cu130": [make_wheel("0.3.36", ANY_LINUX)]})) as index:
        done = prebuilt(python, "--index", f"{index.url}/whl", env=env)
    assert done.returncode == 3, done.stderr
    assert "CUDA 13.0 is more than the driver can run (12.4)" in told(done)
    assert "--or-build" in told(done)


def test_a_wheel_whose_library_lacks_the_gpus_architecture_is_refused(python: Path, tmp_path: Path) -> None:
    """Neither name nor folder tells; the library's own device code does."""
    env = write_nvml(tmp_path, [RTX_3060], driver="550.54.14", cuda=(12, 4))
    library = elf((".nv_fatbin", fatbin(entry(2, 90), entry(2, 75))))
    wheel = make_wheel("0.3.36", ANY_LINUX, extra={"llama_cpp/lib/libggml-cuda.so": library})
    with serve(own_layout({"cu121": [wheel]})) as index:
        done = prebuilt(python, "--index", f"{index.url}/whl", env=env)
    assert done.returncode == 6, done.stderr
    assert "this build cannot run on the visible NVIDIA GeForce RTX 3060 (sm_86)" in told(done)
    assert "it carries sm_75, sm_90" in told(done)


def renamed(wheel: bytes, version: str, **extra: bytes) -> Wheel:
    """The wheel under another version, sound in itself, with ``extra`` files in its package."""
    inside: dict[str, bytes] = {f"llama_cpp/{name}": body for name, body in extra.items()}
    information = f"llama_cpp_python-{version}.dist-info"
    with zipfile.ZipFile(io.BytesIO(wheel)) as old:
        for name in old.namelist():
            body = old.read(name)
            if name.endswith(".dist-info/METADATA"):
                body = re.sub(rb"(?m)^Version: .*$", f"Version: {version}".encode(), body, count=1)
            inside[re.sub(r"^[^/]+\.dist-info", information, name)] = body
    del inside[f"{information}/RECORD"]
    rows = []
    for name, body in inside.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(body)}")
    inside[f"{information}/RECORD"] = "\n".join([*rows, f"{information}/RECORD,,"]).encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name, body in inside.items():
            new.writestr(name, body)
    return f"llama_cpp_python-{version}-{ANY_LINUX}.whl", packed.getvalue()


def test_a_cpu_wheel_in_a_cuda_folder_is_refused(python: Path, own_wheel: Wheel, tmp_path: Path) -> None:
    """The wheel that silently runs on the CPU: it computes, and is not what its place promises."""
    env = write_nvml(tmp_path, [RTX_3060], driver="550.54.14", cuda=(12, 4))
    with serve(own_layout({"cu124": [renamed(own_wheel[1], "0.3.36")]})) as index:
        done = prebuilt(python, "--index", f"{index.url}/whl", env=env)
    assert done.returncode == 6, done.stderr
    assert "was promised, but the library has no CUDA backend" in told(done)


def test_another_wheel_of_the_same_name_is_installed_anew(python: Path, own_wheel: Wheel) -> None:
    """llama-cpp-python's index has the same file names in its folders cpu and cu124."""
    for wheel in (renamed(own_wheel[1], "0.3.36"), renamed(own_wheel[1], "0.3.36", marker=b"the second")):
        with serve(own_layout({"cpu": [wheel]}, hashes=True)) as index:
            answer(prebuilt(python, "--index", f"{index.url}/whl", "--json"))
    assert list(python.parent.parent.glob("lib/python3*/site-packages/llama_cpp/marker"))


def test_a_prebuilt_wheel_is_healthy_and_a_recipe_leaves_it_alone(
    python: Path, toolchain: Toolchain, own_wheel: Wheel
) -> None:
    with serve(own_layout({"cpu": [own_wheel]}, hashes=True)) as index:
        answer(prebuilt(python, "--index", f"{index.url}/whl", "--json"))
    env = environment({"CUDA_VISIBLE_DEVICES": ""})
    doctor = subprocess.run(
        [python, "tasks.py", "doctor"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert doctor.returncode == 0, doctor.stdout
    assert "a prebuilt wheel" in doctor.stdout
    program = "from toolchain.build import verbs; print(verbs.ensure_current().id)"
    done = subprocess.run([python, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == toolchain.id
    assert "install" not in done.stderr


def test_a_download_that_is_cut_leaves_nothing(python: Path) -> None:
    name, body = make_wheel("0.3.36", ANY_LINUX, content="# cut on its way")
    with serve(own_layout({"cpu": [(name, body)]}, hashes=True)) as index:
        index.blob(name).cut_at = len(body) // 2
        done = prebuilt(python, "--index", f"{index.url}/whl")
    assert done.returncode == 4, done.stderr
    assert name in told(done)
    digest = hashlib.sha256(body).hexdigest()
    assert not list((files.foundry_home() / "sources" / "wheels").glob(f"{digest}/*"))


def test_a_wheel_that_is_cut_off_is_refused(python: Path) -> None:
    name, body = make_wheel("0.3.36", ANY_LINUX, content="# never fetched before")
    with serve(own_layout({"cpu": [(name, body[: len(body) // 2])]})) as index:
        done = prebuilt(python, "--index", f"{index.url}/whl")
    assert done.returncode == 6, done.stderr
    assert name in told(done)


def test_bindings_that_cannot_be_loaded_are_refused(python: Path) -> None:
    with serve(own_layout({"cpu": [make_wheel("0.3.36", ANY_LINUX, content="import llama_cpp.llama_cpp")]})) as index:
        done = prebuilt(python, "--index", f"{index.url}/whl")
    assert done.returncode == 6, done.stderr
    assert "cannot be imported" in told(done)


def test_nothing_fits_and_a_build_was_not_asked_for(python: Path) -> None:
    with serve(own_layout({"metal": [make_wheel("0.3.36", "cp311-cp311-macosx_11_0_arm64")]})) as index:
        done = prebuilt(python, "--index", f"{index.url}/whl")
    assert done.returncode == 3, done.stderr
    assert "no prebuilt wheel fits this machine" in told(done)


def test_or_build_builds_when_nothing_fits(python: Path, toolchain: Toolchain) -> None:
    with serve(own_layout({"metal": [make_wheel("0.3.36", "cp311-cp311-macosx_11_0_arm64")]})) as index:
        found = answer(prebuilt(python, "--index", f"{index.url}/whl", "--or-build", "--json"))
    assert (found["toolchain_id"], found["reused"]) == (toolchain.id, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--portable",), "--prebuilt cannot choose portable"),
        (("--no-use",), "--no-use cannot be honoured"),
        (("--define", "GGML_LTO=ON", "--jobs", "2"), "--define, --jobs cannot be honoured"),
        (("--source", "path:."), "takes published versions"),
        (("--sha256", "12"), "no SHA-256"),
    ],
)
def test_what_cannot_be_asked_of_a_wheel_is_a_usage_error(python: Path, arguments: tuple[str, ...], words: str) -> None:
    done = prebuilt(python, *arguments)
    assert done.returncode == 2, done.stderr
    assert words in told(done)
