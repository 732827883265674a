"""The real llama.cpp build, its wheel and its proof."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.front_door import LONG_S, ROOT, environment, inv, inv_argv, inv_json, json_without_processes, leftovers
from toolchain.base import files
from toolchain.build.options import tree_options
from toolchain.build.pin import DEFAULT_PIN, parse_pin
from toolchain.build.source import fetch_source
from toolchain.build.toolchain import Toolchain, list_ids, load
from toolchain.build.variants import VARIANTS, spelled

IMPORT = """
import json, llama_cpp, psutil
llama_cpp.llama_backend_init()
maps = {m.path for m in psutil.Process().memory_maps() if "libllama" in m.path or "libggml" in m.path}
print(json.dumps({"version": llama_cpp.__version__, "maps": sorted(maps)}))
"""


def test_the_build_answers_one_json_object(built: dict[str, Any], toolchain: Toolchain) -> None:
    assert {"toolchain_id", "reused", "commit", "backends", "wheel", "seconds", "executed", "reason"} <= built.keys()
    assert built["commit"] == "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
    assert built["backends"] == ["CPU"]
    assert Path(built["wheel"]).is_file()
    assert not leftovers(files.foundry_home() / "toolchains")


@pytest.mark.parametrize("name", ["quantize", "perplexity", "imatrix", "bench", "cli", "server", "gguf-split"])
def test_the_tools_run_wherever_they_are_called_from(toolchain: Toolchain, name: str, tmp_path: Path) -> None:
    done = subprocess.run([toolchain.tool(name), "--help"], cwd=tmp_path, env={}, capture_output=True, check=False)
    assert b"error while loading" not in done.stderr
    assert done.stdout + done.stderr


def test_the_tools_know_the_pinned_commit(toolchain: Toolchain) -> None:
    done = subprocess.run([toolchain.tool("cli"), "--version"], capture_output=True, text=True, check=True)
    assert toolchain.commit[:7] in done.stdout + done.stderr


def test_the_same_request_again_starts_no_process(built: dict[str, Any]) -> None:
    again = json_without_processes(
        "from toolchain.build import verbs\nverbs.build_and_use(verbs.request(), use=True, as_json=True)"
    )
    assert again["reused"] is True
    assert again["toolchain_id"] == built["toolchain_id"]


def imported(python: Path, cwd: Path) -> dict[str, Any]:
    """What ``import llama_cpp`` finds for ``python`` with an empty environment."""
    done = subprocess.run([python, "-c", IMPORT], cwd=cwd, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def same_libraries(found: dict[str, Any], toolchain: Toolchain) -> bool:
    return bool(found["maps"]) and all(
        files.sha256_file(Path(path)) == files.sha256_file(toolchain.lib_dir / Path(path).name)
        for path in found["maps"]
    )


def test_import_llama_cpp_runs_on_this_build(toolchain: Toolchain, tmp_path: Path) -> None:
    found = imported(Path(sys.executable), tmp_path)
    assert found["version"] == toolchain.wheel_version
    assert {Path(p).name for p in found["maps"]} >= {"libllama.so", "libggml-base.so", "libggml-cpu.so", "libggml.so"}
    assert same_libraries(found, toolchain)


def test_any_other_venv_installs_the_same_wheel(toolchain: Toolchain, tmp_path: Path) -> None:
    venv.create(tmp_path / "other", with_pip=True)
    python = tmp_path / "other" / "bin" / "python"
    locked = ("-c", str(ROOT / "constraints.txt"))
    subprocess.run(
        [python, "-m", "pip", "install", "-q", *locked, toolchain.wheel, "psutil"], check=True, timeout=LONG_S
    )
    assert same_libraries(imported(python, tmp_path), toolchain)


def test_the_wheel_carries_no_file_twice_and_says_what_is_inside(toolchain: Toolchain) -> None:
    assert re.fullmatch(r"llama_cpp_python-[\d.]+\+cpu\.\w+\.\w+-py3-none-\w+\.whl", toolchain.wheel.name)
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", toolchain.wheel], capture_output=True, text=True, check=True
    ).stdout
    libraries = re.findall(r"llama_cpp/lib/(\S+)", listing)
    assert sorted(libraries) == sorted({*libraries})
    assert "libllama.so" in libraries
    assert not [name for name in libraries if re.search(r"\.so\.\d", name)]


def test_another_option_set_lies_beside_it_after_an_interrupt(built: dict[str, Any], toolchain: Toolchain) -> None:
    """A bare llama.cpp tree by path, portable and with RPC: interrupted in mid-compile, then finished.

    Whether the proof's decode holds for it is part of the build; the current toolchain stays what it was.
    """
    note = next(files.home_dir("sources").glob("sdist-*0.3.36*/source.json"))
    source = f"path:{note.parent}/vendor/llama.cpp"
    options = ("build", "--no-use", "--source", source, "--portable", "--rpc")
    wanted = inv_json(*options, "--dry-run")["toolchain_id"]
    assert wanted != built["toolchain_id"]
    if load(wanted) is None:
        log = files.foundry_home() / "logs" / f"build-{wanted}.log"
        running = subprocess.Popen(inv_argv(*options), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
        while running.poll() is None and "[30/" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=120)
        assert running.returncode == 130, told
        assert wanted not in list_ids()
        compiled = set((files.foundry_home() / "work" / f"build-{wanted}").rglob("*.o"))
        assert len(compiled) >= 20
    made = inv_json(*options)
    assert made["toolchain_id"] == wanted
    assert {"CPU", "RPC"} <= set(made["backends"])
    assert re.search(r"\+cpu\.rpc\.portable\.g\w+\.b\w+-py3", made["wheel"])
    assert {wanted, built["toolchain_id"]} <= set(list_ids())
    assert os.readlink(files.foundry_home() / "toolchains" / "current") == toolchain.id
    assert imported(Path(sys.executable), ROOT)["version"] == toolchain.wheel_version


def test_a_portable_wheel_loads_the_best_variant_for_this_cpu(built: dict[str, Any], tmp_path: Path) -> None:
    """The build of the test above, imported elsewhere: one CPU library among many is mapped, and it computes."""
    portable = next(found for i in list_ids() if (found := load(i)) and "portable" in found.variants)
    with zipfile.ZipFile(portable.wheel) as archive:
        archive.extractall(tmp_path)
    variants = {path.name for path in (tmp_path / "llama_cpp" / "lib").glob("libggml-cpu-*.so")}
    assert len(variants) > 5
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    mapped = {Path(path).name for path in json.loads(done.stdout.splitlines()[-1])["maps"]}
    assert len(mapped & variants) == 1


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_is_made_of_options_of_the_pinned_tree(built: dict[str, Any], name: str) -> None:
    known = tree_options(fetch_source(parse_pin(DEFAULT_PIN)).llama)
    options = [option for option in VARIANTS[name].defines if not option.startswith("CMAKE_")]
    assert [spelled(option, known) for option in options] == options


def test_use_switches_there_and_back(built: dict[str, Any], toolchain: Toolchain) -> None:
    others = [i for i in list_ids() if i != toolchain.id]
    assert others, "the build beside it, made by the test above"
    try:
        done = inv("use", others[0])
        assert done.returncode == 0, done.stderr
        other = load(others[0])
        assert other is not None
        assert imported(Path(sys.executable), ROOT)["version"] == other.wheel_version
    finally:
        back = inv("use", toolchain.id)
    assert back.returncode == 0, back.stderr
    assert imported(Path(sys.executable), ROOT)["version"] == toolchain.wheel_version
