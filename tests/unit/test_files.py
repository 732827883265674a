"""Atomic outputs, locks, digests and guarded deletion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.front_door import ROOT
from toolchain.base import files
from toolchain.base.errors import MissingError


def test_a_failed_body_leaves_neither_output_nor_scratch(tmp_path: Path) -> None:
    def half() -> None:
        with files.staged(tmp_path / "out") as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert not list(tmp_path.iterdir())


def test_a_staged_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    for name in ("old", "new"):
        with files.staged(final) as partial:
            partial.mkdir()
            (partial / name).touch()
    assert [p.name for p in final.iterdir()] == ["new"]


def test_what_a_killed_attempt_left_is_swept_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom toolchain.base import files\n"
        f"with files.staged(Path({str(tmp_path / 'out')!r})) as partial:\n"
        "    partial.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".partial-*"))
    with files.staged(tmp_path / "out") as partial:
        partial.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom toolchain.base import files\n"
        f"with files.locked(Path({str(lock)!r})):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    waited: list[str] = []
    with files.locked(lock, waited.append):
        assert not waited
        assert lock.read_text() == str(os.getpid())


def test_a_remembered_hash_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("one")
    first = files.known_sha256(path)
    assert first == files.known_sha256(path) == files.sha256_file(path)
    path.write_text("two!")
    assert files.known_sha256(path) == files.sha256_file(path) != first


def test_a_tree_digest_sees_names_contents_and_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    seen = {files.tree_digest(tmp_path)}
    (tmp_path / "a").write_text("2")
    seen.add(files.tree_digest(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    seen.add(files.tree_digest(tmp_path))
    (tmp_path / "c").symlink_to("b")
    seen.add(files.tree_digest(tmp_path))
    (tmp_path / "d").symlink_to("/tmp", target_is_directory=True)
    seen.add(files.tree_digest(tmp_path))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("x")
    seen.add(files.tree_digest(tmp_path))
    assert len(seen) == 5


def test_nothing_outside_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for target in (tmp_path, tmp_path / "home", tmp_path / "other"):
        with pytest.raises(ValueError, match="refusing"):
            files.remove(target, within=tmp_path / "home")
    assert (tmp_path / "home").is_dir()


def test_too_little_space_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        files.require_free(tmp_path / "not" / "there", 1 << 60, "a very large model")
    assert "GiB free" in caught.value.evidence


def test_two_writers_of_one_json_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom toolchain.base import files\n"
        f"for i in range(200): files.write_json(Path({str(tmp_path / 'x.json')!r}), {{'i': i}})\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) for _ in range(2)]
    assert [child.wait(timeout=60) for child in both] == [0, 0]
    assert files.read_json(tmp_path / "x.json") == {"i": 199}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_home_in_use_is_not_cleaned(tmp_path: Path) -> None:
    with files.home_in_use(), files.home_in_use(), files.home_alone() as alone:
        assert not alone
    with files.home_alone() as alone:
        assert alone


def test_a_home_that_is_a_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "file"))
    with pytest.raises(MissingError, match="cannot write"):
        files.home_dir("work")
