"""llama-server's web page: built with npm from the pinned sources, handed to the compile, proven in the server.

A tree with ``tools/ui`` makes its page while it is compiled: ``scripts/ui-assets.cmake`` runs npm, in some
versions inside the source folder. It takes a page instead that lies in ``tools/ui/dist`` of the build folder and
is not older than the sources. So the page is made first, in a copy, and cmake starts neither npm nor a download::

    defines = page_defines(llama)  # for cmake's configuration
    page = build_page(llama, log=log)  # None: nothing to build, hand over or prove
    hand_over(page, llama=llama, build=build_dir)  # before `cmake --build`, also when an interrupted one goes on
    prove_page(bin_dir / "llama-server", page, log=log)
"""

from __future__ import annotations

import gzip
import http.client
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolchain.base import command, console, files
from toolchain.base.errors import ArtifactError, CommandError, FetchError, MissingError, UsageError
from toolchain.base.service import serving

DISK_BYTES = 1_200_000_000
"""For the default pin: 692 MiB of node_modules, 169 MiB of npm's cache, 10 MiB of page, and room to grow."""
READY_S = 60.0  # a bound against hanging: a server without a model listens after a few milliseconds

_UI = Path("tools", "ui")
# Without these the tree's cmake would not take our page, but run npm itself.
_NEEDED = (_UI / "package.json", _UI / "package-lock.json", _UI / "sources.cmake", Path("scripts", "ui-assets.cmake"))
# Where trees before tools/ui keep the finished page, from newest to oldest; their cmake embeds it always.
_READY_MADE = (
    "tools/server/public/index.html.gz",
    "tools/server/public/index.html",
    "examples/server/public/index.html.gz",
    "examples/server/public/index.html",
    "examples/server/index.html.hpp",
)
_NOT_SOURCE = frozenset({".git", ".svelte-kit", "dist", "node_modules", "test-results"})
# npm's codes, its own and those of node: the registry is not reached, refuses, has not or sends something else.
_FETCH_CODES = re.compile(
    r"E[45]\d\d|E(CONN|HOST|NET)\w+|E\w*TIMED?OUT|EAI_AGAIN|ENOTFOUND|ENOTCACHED|EINTEGRITY|EPROTO|ETARGET"
    r"|FETCH_ERROR|ERR_(SOCKET|SSL|TLS|PROXY|INVALID_URL)\w*|\w*(CERT|SIGNATURE)\w*"
)
# No package's install script is needed, and none runs. All that the page needs are development dependencies.
_STEPS = (("ci", "--ignore-scripts", "--include=dev"), ("run", "build"))
_REFERENCE = re.compile(r"""["'](?:\./|/)?([\w./-]+\.m?js)["']""")
_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Page:
    """A finished page: its files, and the largest script that ``index.html`` loads, relative to ``folder``."""

    folder: Path
    script: str


def page_defines(llama: Path) -> Mapping[str, str]:
    """cmake's definitions for a build with the page; nothing for a tree that carries its page ready-made.

    Raises UsageError for a tree that has neither. Starts no process.
    """
    if _kind(llama) == "ready-made":
        return {}
    return {"LLAMA_BUILD_UI": "ON", "LLAMA_USE_PREBUILT_UI": "OFF"}


def build_page(llama: Path, *, log: Path, on_progress: command.OnProgress | None = None) -> Page | None:
    """The page of the tree ``llama``, from FOUNDRY_HOME/work where it was built before; None where it is ready-made.

    The same sources and the same major version of node share one page; the second build of it starts no npm. A
    page that the user laid into ``tools/ui/dist`` is taken as it is, since the tree's cmake prefers it too.

    npm's own configuration (registry, proxy, certificates) holds, but no package's install script runs, and its
    cache lies in FOUNDRY_HOME/work. Raises UsageError (no such sources), MissingError (node, npm, disk), FetchError
    (npm's registry), CommandError (the page's own build) or ArtifactError (what came out is no page).
    """
    kind = _kind(llama)
    if kind == "ready-made":
        return None
    if kind == "supplied":
        return _checked(llama / _UI / "dist", hint="remove it, and the page is built from the sources")
    source = llama / _UI
    node = _node(source)
    key = files.digest({"sources": files.tree_digest(source, skip=_NOT_SOURCE), "node": node, "npm": _STEPS})[:16]
    final = files.home_dir("work") / "pages" / key
    with files.locked(final.with_name(f".{key}.lock"), _waiting):
        if not final.is_dir():
            files.require_free(final, DISK_BYTES, "building the web page")
            with files.disk_errors(final), files.staged(final) as partial:
                _make(source, partial, log=log, on_progress=on_progress or _unwatched)
                _checked(partial, hint=f"the output of its build is in {log}")
        return _checked(final, hint=f"remove {final}, and build again")


def hand_over(page: Page, *, llama: Path, build: Path) -> None:
    """Lay ``page`` where the tree's cmake, building in ``build``, takes it for one that it made itself.

    cmake compares the time of index.html with the sources', in whole seconds. An equal page compiles nothing again.
    """
    target = build / _UI / "dist"
    with files.disk_errors(target):
        files.remove(target, within=build)
        shutil.copytree(page.folder, target, copy_function=shutil.copyfile)
        newest = max(path.stat().st_mtime for path in (llama / _UI).rglob("*") if path.is_file())
        stamp = max(time.time(), newest)
        os.utime(target / "index.html", (stamp, stamp))


def prove_page(server: Path, page: Page, *, log: Path) -> None:
    """Start ``server`` (llama-server) on loopback without a model, and fetch the page and its script from it.

    Both must be the files of ``page``, byte by byte; ArtifactError when they are not, or the server does not start.
    """
    with tempfile.TemporaryDirectory(dir=files.home_dir("work"), prefix="page-proof-") as scratch:
        # Without a model it is a router, which starts at once and needs no GPU; it shall find no one's models.
        argv = (server, "--host", "127.0.0.1", "--port", "0", "--offline", "--models-dir", scratch)
        theirs = {name: None for name in os.environ if name.startswith("LLAMA_")}
        try:
            with serving(
                argv,
                what="proving the web page",
                log=log,
                ready=_port,
                timeout_s=READY_S,
                env={**theirs, "LLAMA_CACHE": scratch},
            ) as port:
                for name, path in (("index.html", "/"), (page.script, f"/{page.script}")):
                    _compare(int(port), path, (page.folder / name).read_bytes())
        except (CommandError, http.client.HTTPException, OSError, EOFError, zlib.error) as error:
            evidence = error.evidence if isinstance(error, CommandError) else repr(error)
            raise ArtifactError(
                "llama-server does not serve its web page", evidence=evidence, hint=f"its output is in {log}"
            ) from error


def _kind(llama: Path) -> Literal["sources", "supplied", "ready-made"]:
    if (llama / _UI).is_dir():
        if (llama / _UI / "dist" / "index.html").is_file():
            return "supplied"
        if absent := [str(name) for name in _NEEDED if not (llama / name).is_file()]:
            raise UsageError(
                "the web page of this llama.cpp cannot be built beforehand",
                evidence=f"{llama} has tools/ui, but not {', '.join(absent)}",
                hint="build a newer source, or leave the page out",
            )
        return "sources"
    if any((llama / name).is_file() for name in _READY_MADE):
        return "ready-made"
    older = [name for name in ("tools/server/webui", "examples/server/webui") if (llama / name).is_dir()]
    raise UsageError(
        "this llama.cpp has no web page that can be built",
        evidence=f"{llama} has no tools/ui" + "".join(f"; {name} is an older layout" for name in older),
        hint="build the default source or a newer one, or leave the page out",
    )


def _node(source: Path) -> int:
    """The major version of node; MissingError, with the version that the page wants, when node or npm is not there."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            raise MissingError(
                f"{tool} is not installed, which builds the web page", evidence="", hint=_install_hint(source)
            )
    version = command.capture(("node", "--version"), what="asking node for its version", hint=_install_hint(source))
    found = re.search(r"v(\d+)\.", version)
    if not found:
        raise MissingError("node does not tell its version", evidence=version, hint=_install_hint(source))
    return int(found[1])


def _install_hint(source: Path) -> str:
    """What to install. The version is package.json's own wish, else that of vite, which does the work."""
    wanted = ""
    for name, path in (("package.json", ()), ("package-lock.json", ("packages", "node_modules/vite"))):
        value = files.read_json(source / name)
        for part in (*path, "engines", "node"):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and not wanted:
            wanted = f" (node {value} is wanted; the system's may be older)"
    return f"`apt-get install nodejs npm`{wanted}, or leave the page out"


def _make(source: Path, out: Path, *, log: Path, on_progress: command.OnProgress) -> None:
    """Copy the sources beside ``out``, install their packages there and build the page into ``out``."""
    copy = out.with_name("sources")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*_NOT_SOURCE), symlinks=True)
    cache = files.home_dir("work") / "npm"
    quiet = ("--no-audit", "--no-fund", "--no-progress", "--no-update-notifier", f"--cache={cache}")
    # vite writes VITE_ variables into the page, and without NODE_ENV it builds for production; a build number would
    # make one page differ from another of the same sources.
    theirs = {name: None for name in os.environ if name.startswith(("VITE_", "LLAMA_")) or name == "NODE_ENV"}
    for done, arguments in enumerate(_STEPS):
        on_progress(done, len(_STEPS))
        begin = log.stat().st_size if log.is_file() else 0
        try:
            command.run(
                ("npm", *arguments, *quiet),
                what="building the web page",
                cwd=copy,
                env={**theirs, "LLAMA_UI_OUT_DIR": str(out)},
                log=log,
                hint=f"the whole output is in {log}",
            )
        except CommandError as error:
            said = log.read_bytes()[begin:].decode(errors="replace")
            raise _explained(error, said, source=source, out=out) from error
    files.remove(copy, within=out.parent)  # now, so that its 47,000 files need not be brought to disk with the page
    on_progress(len(_STEPS), len(_STEPS))


def _explained(error: CommandError, said: str, *, source: Path, out: Path) -> Exception:
    """What npm's own error code means here, else ``error`` itself."""
    found = re.search(r"^npm (?:error|ERR!) code (\w+)", said, re.MULTILINE)
    code = found[1] if found else ""
    if "ENOSPC" in said or files.is_full(out.parent):
        return files.disk_full(out, error.evidence)
    if code == "EBADENGINE":
        return MissingError(
            "this node is too old for the web page", evidence=error.evidence, hint=_install_hint(source)
        )
    if _FETCH_CODES.fullmatch(code):
        return FetchError(
            f"npm cannot fetch the web page's packages ({code})",
            evidence=error.evidence,
            hint="check the network, the proxy and `npm config get registry`, then type the same again: what npm "
            "has is kept",
        )
    return error


def _checked(folder: Path, *, hint: str) -> Page:
    """The page in ``folder``; ArtifactError unless index.html loads scripts that are there and no file is empty."""
    index = folder / "index.html"
    text = index.read_text(errors="replace") if index.is_file() else ""
    scripts = sorted({name for name in _REFERENCE.findall(text) if not name.startswith(".")})
    absent = [name for name in scripts if not (folder / name).is_file()]
    empty = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.stat().st_size]
    match text, scripts, absent, empty:
        case "", _, _, _:
            fault = "there is no index.html, or nothing in it"
        case _, [], _, _:
            fault = "index.html loads no script"
        case _, _, [name, *_], _:
            fault = f"index.html loads {name}, which is not there"
        case _, _, _, [name, *_]:
            fault = f"{name} is empty"
        case _:
            return Page(folder=folder, script=max(scripts, key=lambda name: (folder / name).stat().st_size))
    raise ArtifactError("the web page is not whole", evidence=f"{folder}: {fault}", hint=hint)


def _compare(port: int, path: str, wanted: bytes) -> None:
    """Fetch ``path``, directly and not through a proxy; ArtifactError unless it comes with 200 and as ``wanted``."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_S)
    try:
        connection.request("GET", path, headers={"Accept-Encoding": "gzip"})
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status == 200 and response.getheader("Content-Encoding") == "gzip":
        body = gzip.decompress(body)
    if response.status != 200 or body != wanted:
        raise ArtifactError(
            "llama-server does not serve the web page that was built",
            evidence=f"GET {path}: status {response.status}, {len(body)} bytes; {len(wanted)} were built",
            hint="run `./inv build` again; the log of the compile tells which page cmake embedded",
        )


def _port(said: str) -> str | None:
    found = _LISTENING.search(said)
    return found[1] if found else None


def _waiting(pid: str) -> None:
    console.say(f"waiting for process {pid}, which builds the same web page")


def _unwatched(done: int, total: int) -> None:
    pass
