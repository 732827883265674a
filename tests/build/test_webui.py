"""The pinned tree's own page, by npm and by the tree's own cmake script; a server without it is found out.

A compile with the page would take this tier's time once more: tests/benchmarks/ui_build.py does that.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.front_door import run
from toolchain.base import files
from toolchain.base.errors import ArtifactError, FetchError, MissingError
from toolchain.build import cmake
from toolchain.build.pin import DEFAULT_PIN, parse_pin
from toolchain.build.source import fetch_source
from toolchain.build.toolchain import Toolchain
from toolchain.build.webui import Page, build_page, hand_over, page_defines, prove_page

NODE_IS_HERE = bool(shutil.which("node") and shutil.which("npm"))
# What the pinned scripts/ui-assets.cmake wants to find, beside the script that index.html loads.
ASSETS = ("manifest.webmanifest", "sw.js", "build.json", "_app/version.json", "_app/bundle.1.css", "workbox-1.js")


@pytest.fixture(scope="module")
def llama() -> Path:
    return fetch_source(parse_pin(DEFAULT_PIN)).llama


def provisioned(page: Page, llama: Path, build: Path) -> str:
    """Hand ``page`` over and run the tree's script as its cmake does while compiling; returns what it says.

    An npm that leaves a trace comes first on PATH.
    """
    hand_over(page, llama=llama, build=build)
    trap = build / "trap" / "npm"
    trap.parent.mkdir()
    trap.write_text(f"#!/bin/sh\ntouch '{build}/npm-was-started'\nexit 1\n")
    trap.chmod(trap.stat().st_mode | stat.S_IXUSR)
    defines = page_defines(llama)
    argv = [
        str(cmake.find_tool("cmake")),
        f"-DUI_SOURCE_DIR={llama / 'tools' / 'ui'}",
        f"-DUI_BINARY_DIR={build / 'tools' / 'ui'}",
        f"-DLLAMA_SOURCE_DIR={llama}",
        f"-DBUILD_UI={defines['LLAMA_BUILD_UI']}",
        f"-DHF_ENABLED={defines['LLAMA_USE_PREBUILT_UI']}",
        "-DLLAMA_UI_GZIP=ON",
        *("-P", str(llama / "scripts" / "ui-assets.cmake")),
    ]
    done = run(argv, env={"PATH": f"{trap.parent}{os.pathsep}{os.environ['PATH']}"})
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not (build / "npm-was-started").exists()
    assert not (build / "tools" / "ui" / "ui-src").exists(), "the script's own copy for npm"
    return said


def small_page(folder: Path) -> Page:
    for name in ("index.html", "_app/bundle.1.js", *ASSETS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return Page(folder=folder, script="_app/bundle.1.js")


def test_the_trees_cmake_takes_a_page_that_is_handed_over_and_starts_no_npm(llama: Path, tmp_path: Path) -> None:
    said = provisioned(small_page(tmp_path / "page"), llama, tmp_path / "build")
    assert f"embedded {2 + len(ASSETS)} assets" in said
    assert "#define LLAMA_UI_HAS_ASSETS 1" in (tmp_path / "build" / "tools" / "ui" / "ui.h").read_text()


def test_the_pinned_page_is_built_by_npm_once_and_embedded(llama: Path, tmp_path: Path) -> None:
    """Where node is not installed, the claim is that it is asked for."""
    log = tmp_path / "page.log"
    if not NODE_IS_HERE:
        with pytest.raises(MissingError, match="not installed"):
            build_page(llama, log=log)
        return
    before = files.tree_digest(llama)
    page = build_page(llama, log=log)
    logged = log.read_text() if log.is_file() else ""
    assert page is not None
    assert build_page(llama, log=log) == page
    assert (log.read_text() if log.is_file() else "") == logged, "npm ran again"
    assert files.tree_digest(llama) == before
    assert (page.folder / page.script).stat().st_size > 1_000_000
    count = sum(path.is_file() for path in page.folder.rglob("*"))
    assert f"embedded {count} assets" in provisioned(page, llama, tmp_path / "build")


def test_npm_without_its_registry_is_a_fetch_error(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Port 9 of loopback stands for an unreachable registry; where node is not installed, it is asked for first."""
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(FetchError if NODE_IS_HERE else MissingError) as caught:
        build_page(llama, log=tmp_path / "page.log")
    assert caught.value.hint
    assert not (tmp_path / "home" / "work" / "pages").exists() or not list(
        (tmp_path / "home" / "work" / "pages").glob("[!.]*")
    )


def test_a_server_that_was_compiled_without_the_page_is_refused(toolchain: Toolchain, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="web page") as caught:
        prove_page(toolchain.tool("server"), small_page(tmp_path / "page"), log=tmp_path / "server.log")
    assert "GET /: status 404" in caught.value.evidence
    assert caught.value.exit_code == 6
