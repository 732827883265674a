"""Git sources through a mirror: real repositories, a real `git http-backend` on loopback, real kills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.mini_llama import write_tree
from toolchain.base import files
from toolchain.base.errors import FetchError, UsageError
from toolchain.build.pin import SourceTree, parse_pin
from toolchain.build.source import fetch_source

FETCH = """\
import sys
from toolchain.build.pin import parse_pin
from toolchain.build.source import fetch_source
print(fetch_source(parse_pin(sys.argv[1])).digest)
"""


@pytest.fixture(autouse=True)
def _user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose git does not wait for the disk, and for whom loopback is behind no proxy."""
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / ".gitconfig").write_text("[core]\n\tfsync = none\n")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def git(cwd: Path, *arguments: str, data: str | bytes = "") -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always")
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=cwd,
        capture_output=True,
        check=True,
        input=data.encode() if isinstance(data, str) else data,
    )
    return done.stdout.decode().strip()


def new_repository(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    git(root, "init", "--quiet", "--template=", "--initial-branch", "main")
    return root


def commit(repo: Path, message: str = "more") -> str:
    git(repo, "add", ".")
    git(repo, "commit", "--quiet", "--allow-empty", "-m", message)
    return head(repo)


def head(repo: Path) -> str:
    return git(repo, "rev-parse", "HEAD")


def fetch(repo: Path | str, ref: str, *, update: bool = False) -> SourceTree:
    return fetch_source(parse_pin(f"git:{repo}@{ref}"), update=update)


def mirror() -> Path:
    (found,) = (files.home_dir("sources") / "mirrors").glob("*.git")
    return found


def packed_objects() -> int:
    told = git(mirror(), "count-objects", "-v")
    return int(dict(line.split(": ") for line in told.splitlines())["in-pack"])


def forget_trees() -> None:
    """Leave the mirrors only, as if the unpacked sources and the notes had been deleted to save space."""
    for path in files.home_dir("sources").iterdir():
        if path.name != "mirrors":
            files.remove(path, within=path.parent)


def gone(repo: Path) -> Path:
    return repo.rename(repo.with_name("gone"))


def assert_nothing_half_made() -> None:
    sources = files.home_dir("sources")
    assert not list(sources.rglob(f"{files.PARTIAL}*"))
    assert not list(sources.glob("git-*/.git"))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare llama.cpp of three commits (tag v1 on the first, annotated v2 on the second, branch main), and beside it
    a repository shaped like llama-cpp-python with it as a submodule, by a relative URL.
    """
    remotes = tmp_path_factory.mktemp("made") / "remotes"
    llama = new_repository(write_tree(remotes / "llama.cpp"))
    (llama / "data").mkdir()
    for number in range(10):
        (llama / "data" / f"{number}.txt").write_text(f"{number}\n" + random.Random(number).randbytes(2000).hex())
    commit(llama, "first")
    git(llama, "tag", "v1")
    (llama / "README").write_text("second\n")
    commit(llama, "second")
    git(llama, "tag", "--annotate", "-m", "the second", "v2")
    (llama / "README").write_text("third\n")
    commit(llama, "third")
    bindings = new_repository(remotes / "llama-cpp-python")
    (bindings / "llama_cpp").mkdir()
    (bindings / "llama_cpp" / "__init__.py").write_text('__version__ = "9.9.9"\n')
    add_submodule(bindings, "vendor/llama.cpp", "../llama.cpp", head(llama))
    commit(bindings, "first")
    for repo in (llama, bindings):
        git(repo, "repack", "-a", "-d", "--quiet")  # few files to copy
    return remotes


@pytest.fixture
def llama(made_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_once, tmp_path / "remotes") / "llama.cpp"


@pytest.fixture
def bindings(llama: Path) -> Path:
    return llama.with_name("llama-cpp-python")


def add_submodule(repo: Path, path: str, url: str, linked: str, *, name: str = "") -> None:
    with (repo / ".gitmodules").open("a") as sink:
        sink.write(f'[submodule "{name or path}"]\n\tpath = "{path}"\n\turl = "{url}"\n')
    git(repo, "update-index", "--add", "--cacheinfo", f"160000,{linked},{path}")
    (repo / path).mkdir(parents=True, exist_ok=True)  # else `git add .` takes the link away again


@pytest.mark.parametrize("ref", ["main", "v1", "v2", "commit", "old commit", "abbreviated", "old abbreviated"])
def test_a_branch_a_tag_and_a_commit_are_fetched(llama: Path, ref: str) -> None:
    named = {
        "commit": head(llama),
        "old commit": git(llama, "rev-parse", "v1"),
        "abbreviated": head(llama)[:9],
        "old abbreviated": git(llama, "rev-parse", "v2^{commit}")[:7],
    }.get(ref, ref)
    expected = git(llama, "rev-parse", f"{named}^{{commit}}")
    tree = fetch(f"file://{llama}", named)
    assert tree.digest == tree.commit == expected
    assert (tree.llama / "README").is_file() == (ref not in ("v1", "old commit"))
    assert (tree.llama / "data" / "9.txt").read_bytes() == (llama / "data" / "9.txt").read_bytes()
    assert_nothing_half_made()
    if "abbreviated" not in ref:
        assert git(mirror(), "rev-list", "--count", expected) == "1"


def test_a_commit_is_found_on_a_server_that_hands_out_no_lone_commits(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "user" / ".gitconfig").write_text("[protocol]\n\tversion = 0\n")
    old = git(llama, "rev-parse", "v2^{commit}~1")
    git(llama, "tag", "--delete", "v1")
    with pytest.raises(subprocess.CalledProcessError):
        git(new_repository(tmp_path / "probe"), "fetch", f"file://{llama}", old)
    assert fetch(f"file://{llama}", "main").digest == head(llama)
    assert fetch(f"file://{llama}", old).digest == old


def test_a_moved_branch_is_seen_with_update_only(llama: Path) -> None:
    first = fetch(llama, "main")
    (llama / "README").write_text("fourth\n")
    newest = commit(llama)
    assert fetch(llama, "main") == first
    assert fetch(llama, "main", update=True).digest == newest != first.digest
    assert fetch(llama, "main").digest == newest


def test_a_second_ref_brings_only_the_objects_that_differ(llama: Path) -> None:
    fetch(f"file://{llama}", "v1")
    whole = packed_objects()
    fetch(f"file://{llama}", "v2")
    assert whole > 20
    assert packed_objects() - whole <= 5  # the tag, its commit, its top folder, README, and the base of a difference
    fetch(f"file://{llama}", "main")
    assert packed_objects() - whole <= 9
    assert not git(mirror(), "fsck")


def test_nothing_that_was_fetched_is_ever_collected(llama: Path) -> None:
    first = fetch(llama, "main").digest
    git(llama, "reset", "--quiet", "--hard", "v1")
    assert fetch(llama, "main", update=True).digest != first
    git(mirror(), "gc", "--quiet", "--prune=now")
    gone(llama)
    forget_trees()
    assert fetch(llama, first).digest == first


def test_an_unpacked_source_costs_no_git_call(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = head(llama)
    by_branch, by_commit = fetch(llama, "main"), fetch(llama, newest)
    monkeypatch.setenv("PATH", "")
    assert fetch(llama, "main") == by_branch
    assert fetch(llama, newest) == fetch(llama, newest, update=True) == by_commit


def test_a_deleted_source_is_unpacked_again_as_it_was_recorded(llama: Path) -> None:
    first = fetch(llama, "main")
    files.remove(first.llama, within=first.llama.parent)
    (llama / "README").write_text("fourth\n")
    commit(llama)
    assert fetch(llama, "main") == first
    assert (first.llama / "README").read_text() == "third\n"


@pytest.mark.parametrize("ref", ["main", "v2", "commit", "abbreviated"])
def test_what_is_cached_serves_without_the_repository(
    llama: Path, ref: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"commit": head(llama), "abbreviated": head(llama)[:8]}.get(ref, ref)
    first = fetch(llama, named)
    gone(llama)
    forget_trees()
    assert fetch(llama, named) == first
    told = capsys.readouterr().err
    assert (first.digest in told) == (ref != "commit")  # a hash cannot have moved: nothing to warn of


def test_the_whole_history_serves_any_of_its_commits_once_it_was_fetched(llama: Path) -> None:
    old = git(llama, "rev-parse", "v1")
    fetch(f"file://{llama}", "main")
    fetch(f"file://{llama}", git(llama, "rev-parse", "--short=7", "v2^{commit}"))
    gone(llama)
    assert fetch(f"file://{llama}", old).digest == old
    assert fetch(f"file://{llama}", "v1").digest == old
    with pytest.raises(FetchError):
        fetch(f"file://{llama}", "b1234")


def test_update_without_the_repository_is_an_error_that_says_what_is_cached(llama: Path) -> None:
    first = fetch(llama, "main")
    gone(llama)
    with pytest.raises(FetchError) as caught:
        fetch(llama, "main", update=True)
    assert f"cached: main was commit {first.digest}" in caught.value.evidence
    assert "--update" in caught.value.hint
    assert fetch(llama, "main") == first


@pytest.mark.parametrize("what", ["ref", "hash", "repository"])
def test_what_is_not_there_is_a_fetch_error_and_leaves_no_mirror(llama: Path, tmp_path: Path, what: str) -> None:
    pin = {"ref": f"{llama}@nowhere", "hash": f"{llama}@{'0' * 39}1", "repository": f"{tmp_path}/nothing@main"}[what]
    with pytest.raises(FetchError) as caught:
        fetch_source(parse_pin(f"git:{pin}"))
    assert caught.value.evidence
    assert caught.value.hint
    assert_nothing_half_made()
    left = list((files.home_dir("sources") / "mirrors").glob("*.git"))
    assert len(left) == (what == "hash")  # its branches and tags were fetched to look for it


@pytest.mark.parametrize("url", ["llama.cpp", "ext::sh -c touch% evil", "evil://host/x", "git@-oProxyCommand=x:y"])
def test_a_pin_that_is_no_url_of_a_repository_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError):
        fetch(url, "main")


def test_the_trainers_fork_of_2023_is_a_source(tmp_path: Path) -> None:
    """xaedes/llama.cpp at finetune-lora has llama.h beside the CMakeLists.txt, and no submodule."""
    fork = new_repository(tmp_path / "xaedes" / "llama.cpp")
    (fork / "examples").mkdir()
    for name in ("CMakeLists.txt", "llama.h", "llama.cpp", "Makefile", "examples/CMakeLists.txt"):
        (fork / name).write_text("\n")
    commit(fork)
    git(fork, "branch", "finetune-lora")
    tree = fetch(f"file://{fork}", "finetune-lora")
    assert (tree.bindings, tree.commit) == (None, head(fork))
    assert (tree.llama / "llama.h").is_file()


def test_a_relative_submodule_is_fetched_at_its_commit(bindings: Path, llama: Path) -> None:
    linked = head(llama)
    (llama / "README").write_text("later\n")
    commit(llama)
    tree = fetch(f"file://{bindings}", "main")
    assert tree.bindings is not None
    assert (tree.digest, tree.commit) == (head(bindings), linked)
    assert (tree.llama / "README").read_text() == "third\n"
    assert (tree.bindings / "llama_cpp" / "__init__.py").is_file()
    assert not list(tree.bindings.rglob(".git"))


def test_a_nested_submodule_is_fetched_too(bindings: Path, llama: Path) -> None:
    kompute = new_repository(llama.parent / "kompute.git")
    (kompute / "kompute.h").write_text("\n")
    add_submodule(llama, "ggml/kompute", "./../../remotes/kompute.git/", commit(kompute))
    linked = commit(llama)
    git(bindings, "update-index", "--cacheinfo", f"160000,{linked},vendor/llama.cpp")
    git(bindings, "commit", "--quiet", "-m", "nested")
    tree = fetch(bindings, "main")
    assert tree.commit == linked
    assert (tree.llama / "ggml" / "kompute" / "kompute.h").is_file()


def test_a_link_without_a_url_stays_an_empty_folder(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(llama, "update-index", "--add", "--cacheinfo", f"160000,{head(llama)},stray")
    git(llama, "commit", "--quiet", "-m", "stray")
    tree = fetch(llama, "main")
    assert not list((tree.llama / "stray").iterdir())
    assert "stray stays empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "name", "url"),
    [
        ("../evil", "", "../llama.cpp"),
        ("/evil", "", "../llama.cpp"),
        (".git/hooks", "", "../llama.cpp"),
        ("sub/.GIT", "", "../llama.cpp"),
        ("sub", "../../hooks", "../llama.cpp"),
        ("sub", "/etc", "../llama.cpp"),
        ("sub", "", "ext::sh -c 'touch evil'"),
        ("sub", "", "--upload-pack=touch evil"),
        ("sub", "", "-u./evil"),
        ("sub", "", "evil://host/x"),
        ("sub", "", "ssh://-oProxyCommand=evil/x"),
        ("sub", "", "llama.cpp"),
        ("sub", "", "../" * 30 + "evil"),
    ],
)
def test_a_hostile_submodule_is_refused(llama: Path, tmp_path: Path, path: str, name: str, url: str) -> None:
    (llama / ".gitmodules").write_text(f'[submodule "{name or path}"]\n\tpath = "{path}"\n\turl = "{url}"\n')
    commit(llama)
    with pytest.raises(FetchError, match="not safe") as caught:
        fetch(llama, "main")
    told = f"{caught.value.message} {caught.value.evidence}"
    assert all(text in told for text in (name, path if path != "sub" else "", url if url != "../llama.cpp" else ""))
    assert_nothing_half_made()
    assert not list(tmp_path.rglob("evil"))


def test_a_submodule_below_a_link_stays_in_the_tree(llama: Path, tmp_path: Path) -> None:
    """git writes no such tree; a server may: the link `out` and the folder `out` in one tree."""
    (tmp_path / "target").mkdir()
    link = git(llama, "hash-object", "-w", "--stdin", data=str(tmp_path / "target"))
    inner = git(llama, "mktree", "--missing", data=f"160000 commit {head(llama)}\tsub\n")
    modules = git(llama, "hash-object", "-w", "--stdin", data='[submodule "s"]\npath = out/sub\nurl = ../llama.cpp\n')
    top = git(llama, "ls-tree", "HEAD")
    listing = f"{top}\n120000 blob {link}\tout\n040000 tree {inner}\tout\n100644 blob {modules}\t.gitmodules\n"
    hostile = git(llama, "commit-tree", "-m", "evil", git(llama, "mktree", data=listing))
    git(llama, "branch", "evil", hostile)
    tree = fetch(llama, "evil")
    assert not list((tmp_path / "target").iterdir())
    assert not (tree.llama / "out").is_symlink()


def test_a_git_folder_in_a_commit_is_refused(llama: Path) -> None:
    config = git(llama, "hash-object", "-w", "--stdin", data="[core]\n\tfsmonitor = touch evil\n")
    folder = git(llama, "mktree", data=f"100644 blob {config}\tconfig\n")
    top = git(llama, "mktree", data=f"{git(llama, 'ls-tree', 'HEAD')}\n040000 tree {folder}\t.git\n")
    git(llama, "branch", "evil", git(llama, "commit-tree", "-m", "evil", top))
    with pytest.raises(FetchError):
        fetch(llama, "evil")
    assert_nothing_half_made()


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "data/../../outside"])
def test_a_link_that_leads_outside_is_refused(llama: Path, target: str) -> None:
    (llama / "link").symlink_to(target)
    commit(llama)
    with pytest.raises(FetchError, match="not safe") as caught:
        fetch(llama, "main")
    assert target in caught.value.evidence
    assert_nothing_half_made()


def test_a_link_inside_the_tree_is_kept(llama: Path) -> None:
    (llama / "src" / "readme").symlink_to("../README")
    commit(llama)
    assert (fetch(llama, "main").llama / "src" / "readme").readlink() == Path("../README")


def test_code_of_the_user_and_of_the_tree_does_not_run(llama: Path, tmp_path: Path) -> None:
    """Filters such as LFS, hooks, templates and fsmonitor, in the user's configuration and named by the tree."""
    ran = tmp_path / "ran"
    trap = tmp_path / "hooks" / "reference-transaction"
    trap.parent.mkdir()
    trap.write_text(f"#!/bin/sh\ntouch {ran}\n")
    trap.chmod(0o755)
    (tmp_path / "template" / "hooks").mkdir(parents=True)
    os.link(trap, tmp_path / "template" / "hooks" / trap.name)
    (llama / ".gitattributes").write_text("data/* filter=lfs\nsrc export-ignore\n")
    commit(llama)
    (tmp_path / "user" / ".gitconfig").write_text(
        f"[core]\n\thooksPath = {trap.parent}\n\tfsmonitor = touch {ran}\n\tautocrlf = true\n"
        f"[init]\n\ttemplateDir = {tmp_path / 'template'}\n"
        f'[filter "lfs"]\n\tsmudge = "touch {ran}; cat"\n\trequired = true\n'
    )
    tree = fetch(llama, "main")
    assert not ran.exists()
    assert (tree.llama / "data" / "1.txt").read_bytes() == (llama / "data" / "1.txt").read_bytes()
    assert (tree.llama / "src" / "llama.c").is_file()


def test_a_repository_that_the_caller_works_in_is_left_alone(
    bindings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a git hook, where GIT_DIR names the user's own repository."""
    victim = new_repository(tmp_path / "victim")
    commit(victim, "mine")
    before = git(victim, "log", "--all", "--format=%H %D")
    with monkeypatch.context() as hook:
        hook.setenv("GIT_DIR", str(victim / ".git"))
        hook.setenv("GIT_WORK_TREE", str(victim))
        hook.setenv("GIT_INDEX_FILE", str(victim / ".git" / "index"))
        fetch(bindings, "main")
    assert git(victim, "log", "--all", "--format=%H %D") == before
    assert git(victim, "status", "--short") == ""


def test_a_relative_repository_means_the_callers_folder(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    assert fetch(f"./{llama.name}", "main").digest == head(llama)


class Server:
    """`git http-backend` on loopback: counts what it sends, and may cut or hold the next pack."""

    def __init__(self, root: Path) -> None:
        self.packs: list[int] = []
        self.cut_next_pack = self.hold_next_pack = False
        self.holding, self.let_go = threading.Event(), threading.Event()
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                env = {
                    **os.environ,
                    "GIT_PROJECT_ROOT": str(root),
                    "GIT_HTTP_EXPORT_ALL": "1",
                    "PATH_INFO": path,
                    "QUERY_STRING": query,
                    "REQUEST_METHOD": self.command,
                    "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                    "CONTENT_LENGTH": str(len(body)),
                    "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                    "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                }
                done = subprocess.run(["git", "http-backend"], input=body, capture_output=True, env=env, check=True)
                headers, _, content = done.stdout.partition(b"\r\n\r\n")
                stated = dict(line.split(": ", 1) for line in headers.decode().split("\r\n"))
                self.send_response(int(stated.pop("Status", "200").split()[0]))
                for name, value in {**stated, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                served.send(self, content)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def send(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        if b"PACK" not in content:
            handler.wfile.write(content)
            return
        self.packs.append(len(content))
        half = len(content) // 2
        handler.wfile.write(content[:half])
        handler.wfile.flush()
        if self.cut_next_pack:
            self.cut_next_pack = False
            handler.close_connection = True
            return
        if self.hold_next_pack:
            self.hold_next_pack = False
            self.holding.set()
            self.let_go.wait(30)
            handler.close_connection = True
            return
        handler.wfile.write(content[half:])


@pytest.fixture
def server(bindings: Path) -> Iterator[Server]:
    serving = Server(bindings.parent)
    thread = threading.Thread(target=serving.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield serving
    serving.let_go.set()
    serving.http.shutdown()
    serving.http.server_close()
    thread.join()


def test_a_server_is_asked_for_the_little_that_differs(server: Server, llama: Path) -> None:
    first = fetch(f"{server.url}/llama.cpp", "v1")
    second = fetch(f"{server.url}/llama.cpp", "v2")
    assert first.digest != second.digest
    large, small = server.packs
    assert small < large / 3


def test_submodules_of_a_server_come_from_it_and_not_from_this_machine(
    server: Server, bindings: Path, llama: Path
) -> None:
    assert fetch(f"{server.url}/llama-cpp-python", "main").commit == head(llama)
    (bindings / ".gitmodules").write_text(f'[submodule "l"]\n\tpath = vendor/llama.cpp\n\turl = {llama}\n')
    commit(bindings)
    with pytest.raises(FetchError, match="not safe") as caught:
        fetch(f"{server.url}/llama-cpp-python", "main", update=True)
    assert "on this machine" in caught.value.evidence


def test_a_cut_fetch_is_an_error_and_the_next_one_succeeds(server: Server, llama: Path) -> None:
    url = f"{server.url}/llama.cpp"
    old = fetch(url, "v1")
    server.cut_next_pack = True
    with pytest.raises(FetchError):
        fetch(url, "main")
    assert_nothing_half_made()
    assert fetch(url, "main").digest == head(llama)
    assert fetch(url, "v1") == old
    assert not git(mirror(), "fsck")


def test_a_killed_fetch_leaves_a_mirror_that_works(server: Server, llama: Path) -> None:
    url = f"{server.url}/llama.cpp"
    server.hold_next_pack = True
    child = subprocess.Popen([sys.executable, "-c", FETCH, f"git:{url}@main"], start_new_session=True)
    try:
        assert server.holding.wait(30)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    server.let_go.set()
    (mirror() / "shallow.lock").touch()
    assert fetch(url, "main").digest == head(llama)
    assert not list(mirror().glob("objects/*/tmp_*"))
    assert not git(mirror(), "fsck")
    assert_nothing_half_made()


def test_two_processes_fetch_once(server: Server, llama: Path) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-c", FETCH, f"git:{server.url}/llama.cpp@{ref}"], stdout=subprocess.PIPE, text=True
        )
        for ref in ("main", "main", "v2")
    ]
    told = [child.communicate(timeout=60)[0].strip() for child in both]
    assert told == [head(llama), head(llama), git(llama, "rev-parse", "v2^{commit}")]
    assert len(server.packs) == 2
    assert min(server.packs) < max(server.packs) / 3
    assert_nothing_half_made()
