"""Source pins: parsed, archives fetched from a loopback index, folders hashed, refused when unsafe."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.mini_llama import write_tree
from toolchain.base import files
from toolchain.base.errors import FetchError, FoundryError, UsageError
from toolchain.build.pin import parse_pin
from toolchain.build.sdist import unpack
from toolchain.build.source import fetch_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "llama-cpp-python-9.9.9"


@pytest.mark.parametrize(
    "text",
    ["", "sdist:", "sdist:llama-cpp-python", "git:https://example.org/x", "git:@main", "git:x@--upload-pack=y",
     "path:", "zip:x", "sdist:x==1#sha256=12"],
)  # fmt: skip
def test_a_malformed_pin_is_a_usage_error_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pin(text)
    assert "sdist:llama-cpp-python==" in caught.value.hint


def test_a_git_url_may_hold_an_at_sign() -> None:
    pin = parse_pin("git:git@example.org:ggml/llama.cpp@b1234")
    assert (pin.name, pin.ref) == ("git@example.org:ggml/llama.cpp", "b1234")


class Index:
    """A package index on loopback that serves one source archive, whole or cut."""

    def __init__(self, archive: bytes) -> None:
        self.archive = archive
        self.stated = hashlib.sha256(archive).hexdigest()
        self.cut_at: int | None = None
        self.downloads = 0
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.endswith(".tar.gz"):
                    index.downloads += 1
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(index.archive)))
                    self.end_headers()
                    self.wfile.write(index.archive[: index.cut_at])
                    return
                page = f'<a href="/files/{NAME}.tar.gz#sha256={index.stated}">{NAME}.tar.gz</a>'.encode()
                self.send_response(200 if "llama-cpp-python" in self.path else 404)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    served = Index(sdist(tmp_path / "tree"))
    thread = threading.Thread(target=served.server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    yield served
    served.server.shutdown()
    served.server.server_close()
    thread.join()


def sdist(tree: Path) -> bytes:
    """An archive laid out like llama-cpp-python's, with the submodule's commit in its .git."""
    write_tree(tree / "vendor" / "llama.cpp")
    (tree / "llama_cpp").mkdir()
    (tree / "llama_cpp" / "__init__.py").write_text('__version__ = "9.9.9"\n')
    head = tree / ".git" / "modules" / "vendor" / "llama.cpp" / "HEAD"
    head.parent.mkdir(parents=True)
    head.write_text(COMMIT + "\n")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(tree, arcname=NAME)
    return packed.getvalue()


def test_an_sdist_is_fetched_once_and_tells_its_commit(index: Index) -> None:
    pin = parse_pin(f"sdist:llama-cpp-python==9.9.9#sha256={index.stated}")
    first, second = fetch_source(pin), fetch_source(pin)
    assert first == second
    assert index.downloads == 1
    assert (first.commit, first.digest) == (COMMIT, index.stated)
    assert first.bindings is not None
    assert (first.llama / "include" / "llama.h").is_file()
    assert not list(files.foundry_home().rglob(".git"))


@pytest.mark.parametrize("fault", ["wrong pin", "index lies", "cut"])
def test_a_wrong_archive_is_refused_and_leaves_nothing(index: Index, fault: str) -> None:
    asked = good = f"sdist:llama-cpp-python==9.9.9#sha256={index.stated}"
    whole = index.archive
    match fault:
        case "wrong pin":
            asked = f"sdist:llama-cpp-python==9.9.9#sha256={'0' * 64}"
        case "index lies":
            asked, index.archive = "sdist:llama-cpp-python==9.9.9", index.archive[:-1] + b"x"
        case "cut":
            index.cut_at = len(index.archive) // 2
    with pytest.raises(FetchError) as caught:
        fetch_source(parse_pin(asked))
    assert caught.value.hint
    assert not list((files.foundry_home() / "sources").glob("*/source.json"))
    assert not list((files.foundry_home() / "sources").glob(".partial-*"))
    index.archive, index.cut_at = whole, None
    assert fetch_source(parse_pin(good)).commit == COMMIT


def test_a_version_that_is_not_there_is_a_fetch_error(index: Index) -> None:
    with pytest.raises(FetchError, match="no source archive"):
        fetch_source(parse_pin("sdist:llama-cpp-python==1.2.3"))


def member(name: str, *, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("/etc/evil"),
        member(f"{NAME}/../../evil"),
        member(f"{NAME}/link", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member(f"{NAME}/link", kind=tarfile.SYMTYPE, link="../../outside"),
        member(f"{NAME}/hard", kind=tarfile.LNKTYPE, link="../outside"),
        member(f"{NAME}/device", kind=tarfile.CHRTYPE),
        member(f"{NAME}/pipe", kind=tarfile.FIFOTYPE),
    ],
    ids=["absolute", "climbing", "absolute link", "climbing link", "climbing hard link", "device", "fifo"],
)
def test_an_unsafe_member_is_refused(tmp_path: Path, evil: tarfile.TarInfo) -> None:
    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(evil)
    target = tmp_path / "outer" / "inner"
    target.mkdir(parents=True)
    with pytest.raises(FetchError, match="not safe"):
        unpack(archive, target)
    assert list(tmp_path.rglob("*evil*")) == [archive]
    assert not list(target.iterdir())


def test_a_link_inside_the_archive_is_kept(tmp_path: Path) -> None:
    archive = tmp_path / "good.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(member(f"{NAME}/docs/real"))
        tar.addfile(member(f"{NAME}/docs/alias", kind=tarfile.SYMTYPE, link="../docs/real"))
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "docs" / "alias").is_file()


def test_a_directory_is_identified_by_its_content(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    pin = parse_pin(f"path:{root}")
    first = fetch_source(pin)
    assert fetch_source(pin) == first
    (root / "src" / "llama.c").write_text("int llama_answer(void) { return 43; }\n")
    assert fetch_source(pin).digest != first.digest


def test_an_uncommitted_edit_makes_another_source_and_a_commit_does_not(tmp_path: Path) -> None:
    """A path: tree is what lies there, whatever its own repository says."""
    root = write_tree(tmp_path / "tree")
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    pin = parse_pin(f"path:{root}")
    uncommitted = fetch_source(pin)
    subprocess.run([*git, "commit", "--quiet", "-m", "first"], check=True)
    assert fetch_source(pin) == uncommitted
    (root / "src" / "llama.c").write_text("int llama_answer(void) { return 43; }\n")
    edited = fetch_source(pin)
    (root / "untracked.c").write_text("\n")
    assert len({tree.digest for tree in (uncommitted, edited, fetch_source(pin))}) == 3
    assert edited.commit != uncommitted.commit


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_directory_without_llama_cpp_is_a_usage_error(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "tree"
    if kind == "empty":
        root.mkdir()
    with pytest.raises(FoundryError) as caught:
        fetch_source(parse_pin(f"path:{root}"))
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_an_unknown_version_is_taken_on_the_word_of_the_index_and_remembered(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = parse_pin("sdist:llama-cpp-python==9.9.9")
    assert fetch_source(pin).digest == index.stated
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert fetch_source(pin).digest == index.stated
