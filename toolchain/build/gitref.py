"""Sources from git: a ref resolved to a commit, fetched shallow with its submodules, and recorded."""

from __future__ import annotations

import os
from pathlib import Path

from toolchain.base import command, files
from toolchain.base.errors import FetchError, FoundryError
from toolchain.build.pin import SourcePin, SourceTree, is_local, locate, record, recorded, ref_note


def fetch_git(pin: SourcePin, update: bool) -> SourceTree:
    """The tree of the recorded commit, or of the commit that the ref names now; see ``source.fetch_source``."""
    note = ref_note(pin)
    if not update:
        match files.read_json(note):
            case {"commit": str(known)} if tree := recorded(_folder(pin, known)):
                return tree
    clone = files.home_dir("sources") / f"clone-{files.sha256_text(str(pin))[:12]}"
    with files.locked(note.with_suffix(".lock")), files.staging(clone) as partial:
        commit = _clone(pin, partial)
        final = _folder(pin, commit)
        with files.locked(final.with_name(final.name + ".lock")):
            if recorded(final) is None:
                llama, bindings = locate(partial, str(pin))
                vendored = _git(llama, "rev-parse", "HEAD") if bindings else commit
                for inner in list(partial.rglob(".git")):
                    files.remove(inner, within=partial)
                record(
                    partial,
                    SourceTree(pin=str(pin), llama=llama, bindings=bindings, digest=commit, commit=vendored),
                )
                files.promote(partial, final)
    files.write_json(note, {"pin": str(pin), "commit": commit})
    done = recorded(final)
    assert done is not None
    return done


def _clone(pin: SourcePin, into: Path) -> str:
    """Fetch one commit, shallow where the server lets us, with its submodules; the commit's hash."""
    into.mkdir()
    hint = "check the URL and the ref (branch, tag or full commit), and that git can reach it"
    local = ["-c", "protocol.file.allow=always"] if is_local(pin.name) else []
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
    """Run git in ``cwd``, deaf to a repository that our caller works in, and never asking for a password."""
    ours = {
        name: None for name in os.environ if name.startswith("GIT_") and not name.startswith(("GIT_SSL", "GIT_SSH"))
    }
    return command.capture(
        ["git", *arguments],
        what=f"git {arguments[0]}",
        cwd=cwd,
        env={**ours, "GIT_TERMINAL_PROMPT": "0"},
        hint="install git: `apt-get install git`",
    )


def _folder(pin: SourcePin, commit: str) -> Path:
    return files.home_dir("sources") / f"git-{files.sha256_text(pin.name)[:8]}-{commit[:12]}"
