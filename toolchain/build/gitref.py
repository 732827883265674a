"""Sources from git: a ref resolved to a commit, fetched shallow with its submodules, and recorded."""

from __future__ import annotations

from pathlib import Path

from toolchain.base import command, files
from toolchain.base.errors import FetchError, FoundryError
from toolchain.build.pin import SourcePin, SourceTree, locate, record, recorded


def fetch_git(pin: SourcePin, update: bool) -> SourceTree:
    """The tree of the recorded commit, or of the commit that the ref names now; see ``source.fetch_source``."""
    note = _note(pin)
    if not update:
        match files.read_json(note):
            case {"commit": str(known)} if tree := recorded(_folder(pin, known)):
                return tree
    with files.locked(note.with_suffix(".lock")):
        scratch = files.home_dir("sources") / f"clone-{files.sha256_text(str(pin))[:12]}"
        with files.staged(scratch) as partial:
            commit = _clone(pin, partial)
            final = _folder(pin, commit)
            if recorded(final) is None:
                llama, bindings = locate(partial, str(pin))
                tree = SourceTree(pin=str(pin), llama=llama, bindings=bindings, digest=commit, commit=commit)
                if bindings:
                    vendored = _git(partial / "vendor" / "llama.cpp", "rev-parse", "HEAD")
                    tree = SourceTree(pin=str(pin), llama=llama, bindings=bindings, digest=commit, commit=vendored)
                for inner in list(partial.rglob(".git")):
                    files.remove(inner, within=partial)
                record(partial, tree)
                files.promote(partial, final)
                partial.mkdir()
        files.remove(scratch, within=scratch.parent)
        files.write_json(note, {"pin": str(pin), "commit": commit})
    done = recorded(_folder(pin, commit))
    assert done is not None
    return done


def _clone(pin: SourcePin, into: Path) -> str:
    """Fetch one commit, shallow where the server lets us, with its submodules; the commit's hash."""
    into.mkdir()
    hint = "check the URL and the ref (branch, tag or full commit), and that git can reach it"
    local = ["-c", "protocol.file.allow=always"] if _is_local(pin.name) else []
    _git(into, "init", "--quiet")
    try:
        _git(into, *local, "fetch", "--quiet", "--depth", "1", "--end-of-options", pin.name, pin.ref)
    except FoundryError:
        try:
            # some servers hand out no lone commits: fetch all branches and tags, then look
            refs = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
            _git(into, *local, "fetch", "--quiet", "--end-of-options", pin.name, *refs)
            _git(into, "update-ref", "FETCH_HEAD", pin.ref)
        except FoundryError as error:
            raise FetchError(f"cannot fetch {pin}", evidence=error.evidence, hint=hint) from error
    try:
        _git(into, "checkout", "--quiet", "--detach", "FETCH_HEAD")
        _git(into, *local, "submodule", "update", "--quiet", "--init", "--recursive", "--depth", "1")
        return _git(into, "rev-parse", "HEAD")
    except FoundryError as error:
        raise FetchError(f"cannot check out {pin}", evidence=error.evidence, hint=hint) from error


def _git(cwd: Path, *arguments: str) -> str:
    return command.capture(
        ["git", *arguments], what=f"git {arguments[0]}", cwd=cwd, hint="install git: `apt-get install git`"
    )


def _is_local(url: str) -> bool:
    return url.startswith(("file://", "/", "./", "../", "~"))


def _folder(pin: SourcePin, commit: str) -> Path:
    return files.home_dir("sources") / f"git-{files.sha256_text(pin.name)[:8]}-{commit[:12]}"


def _note(pin: SourcePin) -> Path:
    return files.home_dir("sources") / "refs" / f"{files.sha256_text(str(pin))[:32]}.json"
