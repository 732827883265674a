"""Bare git mirrors below FOUNDRY_HOME/sources/mirrors: one per repository, filled one shallow commit at a time.

A second ref of a repository brings only the objects that the mirror lacks. Refs of our own keep what was fetched:
``refs/foundry/named/REF`` is what REF was when it was last asked for, ``refs/foundry/commits/HASH`` says that this
commit is there with all of its files. Nothing is ever collected.

git starts here and nowhere else, deaf to the caller's GIT_* variables and without hooks. A fetch reads the user's
configuration (proxies, credentials, URL rewriting); everything else reads none of it, so that no filter, LFS
included, runs and the files come out as the commit has them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from toolchain.base import command, console, files
from toolchain.base.errors import CommandError, FetchError
from toolchain.build.pin import is_local

WHOLE_DEPTH = 2147483647
"""The depth that git reads as "all of it": gitprotocol-pack and `git fetch --unshallow` use this number."""

_KEEP = 64 << 20  # bytes of git's answer that are read: a listing of a tree of 500,000 files
_HASH = re.compile(r"[0-9a-fA-F]{7,40}")  # git abbreviates to seven digits at least; `b1234` is a tag
_REMOTE = re.compile(r"(?:https?|git|ssh)://[^\s/-][^\s/]*/\S+|[^\s/:-][^\s/:]*:(?!:|//)\S+")
_SETTINGS = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "fetch.unpackLimit": "1",  # a pack appears at once and whole; loose objects would come one by one
    "fetch.writeCommitGraph": "false",
    "foundry.ready": "true",
}
"""A mirror's own settings, which overrule the user's; the last one says that the others are there."""
_NO_CONFIG = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_ATTR_NOSYSTEM": "1",
    "HOME": os.devnull,  # git before 2.32 does not know GIT_CONFIG_GLOBAL
    "XDG_CONFIG_HOME": os.devnull,
}


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """The mirror of ``url`` in ``folder``, which need not exist yet; ``local`` lets git read this machine's files."""

    url: str
    folder: Path
    local: bool


def mirror_of(url: str, *, local: bool) -> Mirror:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", url.rstrip("/").rpartition("/")[2].removesuffix(".git"))[:40]
    folder = files.home_dir("sources") / "mirrors" / f"{name or 'repository'}-{files.sha256_text(url)[:12]}.git"
    return Mirror(url=url, folder=folder, local=local)


def refused(url: str, *, local: bool) -> str:
    """Why ``url`` is not fetched: neither http(s), git, ssh nor, with ``local``, a path of this machine. Else ""."""
    if is_local(url):
        return "" if local else "it names a repository on this machine"
    return "" if _REMOTE.fullmatch(url) and "@-" not in url else "it is neither an http(s), git or ssh URL nor a path"


def is_full(ref: str) -> bool:
    """Whether ``ref`` is a whole commit hash, which can mean one thing only."""
    return re.fullmatch(r"[0-9a-f]{40}", ref) is not None


def resolve(mirror: Mirror, ref: str, *, update: bool) -> str:
    """The commit that ``ref`` (branch, tag, hash of at least 7 digits) names, now in the mirror with its files.

    A whole hash that is there costs no connection. When the fetch fails and the mirror has ``ref`` from before, that
    is used with a warning; with ``update``, or when it has not, FetchError.
    """
    with files.locked(_lock(mirror), lambda pid: console.say(f"waiting for process {pid} ({mirror.url})")):
        if is_full(ref) and holds(mirror, ref):
            return ref
        try:
            _fetch(mirror, ref)
            commit = ask(mirror, "rev-parse", "--verify", f"{_named(ref)}^{{commit}}")
        except CommandError as error:
            commit = _instead(mirror, ref, error, update)
        ask(mirror, "update-ref", _kept(commit), commit)
        return commit


def holds(mirror: Mirror, commit: str) -> bool:
    """Whether ``commit`` and all of its files were fetched before."""
    return _look_up(mirror, _kept(commit)) == commit


def ask(mirror: Mirror, *arguments: str) -> str:
    """The answer of a git command that reads or writes the mirror only."""
    return _git(*arguments, cwd=mirror.folder, env={**_NO_CONFIG, "GIT_DIR": str(mirror.folder)})


def write_files(mirror: Mirror, commit: str, into: Path, index: Path) -> None:
    """Write the files of ``commit`` into the folder ``into``, without a .git; submodules become empty folders.

    ``index`` is a path for git's scratch; CommandError when a name in the commit is not safe (``..``, ``.git``).
    """
    env = {**_NO_CONFIG, "GIT_DIR": str(mirror.folder), "GIT_WORK_TREE": str(into), "GIT_INDEX_FILE": str(index)}
    index.unlink(missing_ok=True)
    _git("read-tree", commit, cwd=into, env=env)
    _git("checkout-index", "--all", "--quiet", cwd=into, env=env)


def _fetch(mirror: Mirror, ref: str) -> None:
    """Bring what ``ref`` names now, and name it; the caller holds the lock."""
    _prepare(mirror)
    shallow = [] if _is_set(mirror, "whole") else ["--depth=1"]
    try:
        _receive(mirror, *shallow, refspecs=[f"+{ref}:{_named(ref)}"])
    except CommandError:
        if not _HASH.fullmatch(ref):
            raise
        # an abbreviated hash, or a server that hands out no lone commits
        branches_and_tags = ["+refs/heads/*:refs/foundry/heads/*", "+refs/tags/*:refs/foundry/tags/*"]
        _receive(mirror, f"--depth={WHOLE_DEPTH}", "--prune", refspecs=branches_and_tags)
        ask(mirror, "config", "foundry.whole", "true")
        ask(mirror, "update-ref", _named(ref), ask(mirror, "rev-parse", "--verify", f"{ref}^{{commit}}"))


def _receive(mirror: Mirror, *options: str, refspecs: list[str]) -> None:
    allowed = "http:https:git:ssh" + (":file" if mirror.local else "")
    options = ("--quiet", "--no-tags", "--no-recurse-submodules", *options)
    _git(
        *("fetch", *options, "--end-of-options", mirror.url, *refspecs),
        cwd=mirror.folder,
        env={"GIT_DIR": str(mirror.folder), "GIT_ALLOW_PROTOCOL": allowed},
    )


def _prepare(mirror: Mirror) -> None:
    """Make the mirror, or take away what a killed git left in it: its locks and half-received packs."""
    with files.disk_errors(mirror.folder):
        mirror.folder.mkdir(parents=True, exist_ok=True)
    for left in ("*.lock", "refs/**/*.lock", "shallow_*", "objects/*/tmp_*"):
        for path in mirror.folder.glob(left):
            files.remove(path, within=mirror.folder)
    if not (_exists(mirror) and _is_set(mirror, "ready")):
        ask(mirror, "init", "--quiet", "--bare", "--template=")
        for name, value in _SETTINGS.items():
            ask(mirror, "config", name, value)


def _exists(mirror: Mirror) -> bool:
    return (mirror.folder / "HEAD").is_file() and (mirror.folder / "config").is_file()


def _is_set(mirror: Mirror, mark: Literal["ready", "whole"]) -> bool:
    """Whether the mirror's settings are written; whether all branches and tags were fetched once, after which a
    shallow fetch would cut their history again.
    """
    return f"foundry.{mark}=true" in ask(mirror, "config", "--local", "--list").splitlines()


def _instead(mirror: Mirror, ref: str, error: CommandError, update: bool) -> str:
    """The commit that ``ref`` was when it was last fetched; warns that nobody could be asked what it is today."""
    if (old := _cached(mirror, ref)) is None:
        _forget_empty(mirror)
        raise FetchError(
            f"cannot fetch {ref} from {mirror.url}",
            evidence=error.evidence,
            hint="check the URL and the ref (branch, tag or commit), and that git can reach it",
        ) from error
    if update and not is_full(ref):
        raise FetchError(
            f"cannot ask {mirror.url} what {ref} is now",
            evidence=f"{error.evidence}\ncached: {ref} was commit {old}",
            hint=f"without --update the cached commit {old[:12]} is used",
        ) from error
    console.warn(f"using {ref} as fetched before, commit {old}: {_reason(error)}")
    return old


def _cached(mirror: Mirror, ref: str) -> str | None:
    """What ``ref`` was when it was last fetched, by itself or along with all branches and tags."""
    for name in (_named(ref), f"refs/foundry/tags/{ref}", f"refs/foundry/heads/{ref}"):
        if commit := _look_up(mirror, name):
            return commit
    commit = _look_up(mirror, ref) if _HASH.fullmatch(ref) else None
    return commit if commit and _is_complete(mirror, commit) else None


def _is_complete(mirror: Mirror, commit: str) -> bool:
    try:
        ask(mirror, "rev-list", "--objects", "--quiet", "--no-walk", commit)
    except CommandError:
        return False
    return True


def _look_up(mirror: Mirror, name: str) -> str | None:
    if not _exists(mirror):
        return None
    try:
        return ask(mirror, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except CommandError:
        return None


def _forget_empty(mirror: Mirror) -> None:
    """Leave no mirror of what was mistyped."""
    if not (_exists(mirror) and ask(mirror, "for-each-ref", "--count=1")):
        files.remove(mirror.folder, within=mirror.folder.parent)


def _named(ref: str) -> str:
    return f"refs/foundry/named/{quote(ref, safe='')}"


def _kept(commit: str) -> str:
    return f"refs/foundry/commits/{commit}"


def _lock(mirror: Mirror) -> Path:
    return mirror.folder.with_name(mirror.folder.name + ".lock")


def _reason(error: CommandError) -> str:
    """The line in which git says what went wrong."""
    lines = error.evidence.splitlines()
    return next((line for line in lines if line.startswith("fatal:")), lines[0] if lines else error.message)


def _git(*arguments: str, cwd: Path, env: dict[str, str]) -> str:
    """Run git, deaf to a repository that our caller works in, without hooks, and never asking for a password."""
    ours: dict[str, str | None] = {
        name: None for name in os.environ if name.startswith("GIT_") and not name.startswith(("GIT_SSL", "GIT_SSH"))
    }
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "LC_ALL": "C"}
    return command.run(
        ["git", *arguments],
        what=f"git {arguments[0]}",
        cwd=cwd,
        env={**ours, **quiet, **env},
        keep=_KEEP,
        hint="install git: `apt-get install git`",
    ).output.strip()
