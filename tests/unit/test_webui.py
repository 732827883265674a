"""The web page of llama-server, with small trees and scripts that stand in for node, npm and the server."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from toolchain.base import files
from toolchain.base.errors import ArtifactError, CommandError, FetchError, FoundryError, MissingError, UsageError
from toolchain.build.webui import Page, build_page, hand_over, page_defines, prove_page

INDEX = '<!doctype html><link href="./_app/small.js"><script>import("./_app/bundle.js")</script>'
GOOD = f"""\
mkdir "$LLAMA_UI_OUT_DIR" "$LLAMA_UI_OUT_DIR/_app"
echo '{INDEX}' >"$LLAMA_UI_OUT_DIR/index.html"
echo small >"$LLAMA_UI_OUT_DIR/_app/small.js"
cat src/page.ts src/page.ts >"$LLAMA_UI_OUT_DIR/_app/bundle.js"
"""
SERVER = """\
import gzip, http.server, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path[1:] or "index.html"
        found = pathlib.Path({folder!r}, name)
        status = 200 if found.is_file() and name != {missing!r} else 404
        self.send_response(status)
        self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(gzip.compress(found.read_bytes() if status == 200 else b"none"))
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
print(f"srv  llama_server: listening on http://127.0.0.1:{{server.server_port}}", flush=True)
server.serve_forever()
"""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The outline of a tree that can build its page."""
    texts = {
        "tools/ui/package.json": "{}",
        "tools/ui/package-lock.json": json.dumps({"packages": {"node_modules/vite": {"engines": {"node": ">=20.19"}}}}),
        "tools/ui/sources.cmake": "",
        "tools/ui/src/page.ts": "a page",
        "scripts/ui-assets.cmake": "",
    }
    for name, text in texts.items():
        write(tmp_path / "llama.cpp" / name, text)
    return tmp_path / "llama.cpp"


class Npm:
    """A script named npm, first on PATH, beside one named node; it notes what it was called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "logs" / "page.log"
        self.does()
        self.node("v20.20.2")

    def does(self, *, ci: str = "mkdir node_modules", run: str = GOOD) -> None:
        calls = f'echo "$@" >>"{self.folder}/calls"\nenv >"{self.folder}/env"\n'
        script(self.folder / "npm", f"#!/bin/sh\nset -e\n{calls}case $1 in\nci)\n{ci}\n;;\nrun)\n{run}\n;;\nesac\n")

    def node(self, version: str) -> None:
        script(self.folder / "node", f"#!/bin/sh\necho {version}\n")

    @property
    def calls(self) -> list[str]:
        noted = self.folder / "calls"
        return [line.split()[0] for line in noted.read_text().splitlines()] if noted.is_file() else []


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Npm:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return Npm(tmp_path / "bin")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def script(path: Path, text: str) -> Path:
    write(path, text).chmod(0o755)
    return path


def kept_pages() -> list[Path]:
    """What is left of pages in FOUNDRY_HOME, finished or half-made."""
    return [path for path in (files.foundry_home() / "work" / "pages").glob("*") if not path.name.endswith(".lock")]


def test_a_page_is_built_in_a_copy_and_only_once(llama: Path, npm: Npm) -> None:
    before, seen = files.tree_digest(llama), []
    first = build_page(llama, log=npm.log, on_progress=lambda *progress: seen.append(progress))
    second = build_page(llama, log=npm.log)
    assert first == second
    assert first is not None
    assert (npm.calls, seen) == (["ci", "run"], [(0, 2), (1, 2), (2, 2)])
    assert (first.folder / first.script).read_text() == "a pagea page"
    assert kept_pages() == [first.folder]
    assert files.tree_digest(llama) == before


@pytest.mark.parametrize("change", ["source", "node"])
def test_other_sources_and_another_node_make_another_page(llama: Path, npm: Npm, change: str) -> None:
    first = build_page(llama, log=npm.log)
    if change == "source":
        write(llama / "tools" / "ui" / "src" / "page.ts", "another page")
    else:
        npm.node("v22.1.0")
    assert build_page(llama, log=npm.log) != first
    assert npm.calls == ["ci", "run"] * 2


def test_what_was_built_beside_the_sources_is_not_part_of_them(llama: Path, npm: Npm) -> None:
    first = build_page(llama, log=npm.log)
    write(llama / "tools" / "ui" / "node_modules" / "vite" / "package.json", "{}")
    assert build_page(llama, log=npm.log) == first


def test_the_users_environment_does_not_leak_into_the_page(
    llama: Path, npm: Npm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NODE_ENV", "VITE_PUBLIC_APP_NAME", "LLAMA_BUILD_NUMBER"):
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("npm_config_https_proxy", "http://127.0.0.1:9")
    build_page(llama, log=npm.log)
    environment = (npm.folder / "env").read_text()
    assert "=mine" not in environment
    assert "npm_config_https_proxy=http://127.0.0.1:9" in environment


@pytest.mark.parametrize(
    ("code", "error", "hint"),
    [
        ("ECONNREFUSED", FetchError, "registry"),
        ("EAI_AGAIN", FetchError, "proxy"),
        ("E403", FetchError, "registry"),
        ("EINTEGRITY", FetchError, "registry"),
        ("SELF_SIGNED_CERT_IN_CHAIN", FetchError, "registry"),
        ("EBADENGINE", MissingError, ">=20.19"),
        ("ENOSPC", MissingError, "FOUNDRY_HOME"),
        ("EUSAGE", CommandError, "log"),
    ],
)
def test_a_failure_of_npm_is_told_by_its_code(
    llama: Path, npm: Npm, code: str, error: type[FoundryError], hint: str
) -> None:
    npm.does(ci=f"echo 'npm error code {code}'; for i in $(seq 30); do echo npm error; done; exit 1")
    with pytest.raises(error) as caught:
        build_page(llama, log=npm.log)
    assert type(caught.value) is error
    assert hint in caught.value.hint
    assert kept_pages() == []
    npm.does()
    assert build_page(llama, log=npm.log) is not None


@pytest.mark.parametrize(
    ("fault", "evidence"),
    [
        ('mkdir "$LLAMA_UI_OUT_DIR"', "no index.html"),
        (GOOD.replace(".js", ".txt"), "loads no script"),
        (GOOD + 'rm "$LLAMA_UI_OUT_DIR/_app/bundle.js"', "_app/bundle.js, which is not there"),
        (GOOD + ': >"$LLAMA_UI_OUT_DIR/_app/bundle.js"', "_app/bundle.js is empty"),
    ],
    ids=["no index", "no script", "script missing", "script empty"],
)
def test_what_is_no_page_is_refused_and_not_kept(llama: Path, npm: Npm, fault: str, evidence: str) -> None:
    npm.does(run=fault)
    with pytest.raises(ArtifactError) as caught:
        build_page(llama, log=npm.log)
    assert evidence in caught.value.evidence
    assert kept_pages() == []


@pytest.mark.parametrize("absent", ["node", "npm"])
def test_without_node_or_npm_it_is_told_what_to_install(
    llama: Path, npm: Npm, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (npm.folder / absent).unlink()
    monkeypatch.setenv("PATH", str(npm.folder))
    with pytest.raises(MissingError, match=absent) as caught:
        build_page(llama, log=npm.log)
    assert "apt-get install nodejs npm" in caught.value.hint
    assert ">=20.19" in caught.value.hint


def test_the_packages_own_wish_for_a_node_comes_first(llama: Path, npm: Npm) -> None:
    write(llama / "tools" / "ui" / "package.json", json.dumps({"engines": {"node": ">=24"}}))
    npm.does(ci="echo npm error code EBADENGINE; exit 1")
    with pytest.raises(MissingError) as caught:
        build_page(llama, log=npm.log)
    assert "node >=24 " in caught.value.hint


@pytest.mark.parametrize(
    "ready",
    ["tools/server/public/index.html.gz", "examples/server/public/index.html", "examples/server/index.html.hpp"],
)
def test_a_tree_with_a_ready_made_page_needs_no_build(tmp_path: Path, npm: Npm, ready: str) -> None:
    older = write(tmp_path / "older" / ready, "page").parents[len(Path(ready).parts) - 1]
    assert page_defines(older) == {}
    assert build_page(older, log=npm.log) is None
    assert npm.calls == []


@pytest.mark.parametrize("lack", ["everything", "tools/server/webui", "sources.cmake"])
def test_a_tree_whose_page_cannot_be_built_is_a_usage_error(llama: Path, tmp_path: Path, npm: Npm, lack: str) -> None:
    tree = llama if lack == "sources.cmake" else tmp_path / "older"
    match lack:
        case "sources.cmake":
            (llama / "tools" / "ui" / "sources.cmake").unlink()
        case "tools/server/webui":
            write(tree / lack / "package.json", "{}")
    verbs: tuple[Callable[[], object], ...] = (lambda: page_defines(tree), lambda: build_page(tree, log=npm.log))
    for verb in verbs:
        with pytest.raises(UsageError) as caught:
            verb()
        assert lack == "everything" or lack in caught.value.evidence
    assert npm.calls == []


def test_a_page_that_the_user_supplied_is_taken(llama: Path, npm: Npm) -> None:
    dist = llama / "tools" / "ui" / "dist"
    write(dist / "index.html", INDEX)
    write(dist / "_app" / "small.js", "1")
    write(dist / "_app" / "bundle.js", "123")
    assert build_page(llama, log=npm.log) == Page(folder=dist, script="_app/bundle.js")
    assert npm.calls == []


def test_a_page_is_handed_over_whole_and_newer_than_its_sources(llama: Path, npm: Npm, tmp_path: Path) -> None:
    page = build_page(llama, log=npm.log)
    assert page is not None
    source, build = llama / "tools" / "ui" / "src" / "page.ts", tmp_path / "build"
    stale = write(build / "tools" / "ui" / "dist" / "stale.js", "old")
    os.utime(source, (4e9, 4e9))  # unpacked by a machine whose clock is ahead
    hand_over(page, llama=llama, build=build)
    index = build / "tools" / "ui" / "dist" / "index.html"
    assert index.stat().st_mtime >= source.stat().st_mtime
    assert not stale.exists()
    assert files.tree_digest(index.parent) == files.tree_digest(page.folder)


def server(tmp_path: Path, folder: Path, *, missing: str = "") -> Path:
    """A program that listens as llama-server does, and serves ``folder`` but for ``missing``."""
    text = SERVER.format(folder=str(folder), missing=missing)
    return script(tmp_path / "llama-server", f"#!{sys.executable}\n{text}")


def test_a_server_that_serves_the_page_is_proven_also_behind_a_proxy(
    llama: Path, npm: Npm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = build_page(llama, log=npm.log)
    assert page is not None
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    prove_page(server(tmp_path, page.folder), page, log=npm.log)


@pytest.mark.parametrize("fault", ["no page", "no script", "another page", "another script"])
def test_a_server_without_the_page_is_refused(llama: Path, npm: Npm, tmp_path: Path, fault: str) -> None:
    page = build_page(llama, log=npm.log)
    assert page is not None
    other = tmp_path / "other"
    shutil.copytree(page.folder, other)
    if fault in ("another page", "another script"):
        write(other / ("index.html" if fault == "another page" else page.script), "old")
    missing = {"no page": "index.html", "no script": "_app/bundle.js"}.get(fault, "")
    with pytest.raises(ArtifactError, match="web page") as caught:
        prove_page(server(tmp_path, other, missing=missing), page, log=npm.log)
    asked = "GET /:" if "page" in fault else f"GET /{page.script}:"
    assert f"{asked} status {404 if 'no ' in fault else 200}" in caught.value.evidence


def test_a_server_that_does_not_start_is_refused_with_its_last_words(llama: Path, npm: Npm, tmp_path: Path) -> None:
    page = build_page(llama, log=npm.log)
    assert page is not None
    program = script(tmp_path / "llama-server", "#!/bin/sh\necho error: unknown argument\nexit 1\n")
    with pytest.raises(ArtifactError) as caught:
        prove_page(program, page, log=npm.log)
    assert "unknown argument" in caught.value.evidence
