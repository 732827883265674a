from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.base import errors
from toolchain.base.errors import CommandError, FoundryError
from toolchain.lora.child_errors import FAILURE, raise_failure, write_failure

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FoundryError)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_childs_error_is_the_same_in_its_parent(kind: type[FoundryError], tmp_path: Path) -> None:
    status = write_failure(tmp_path, kind("it failed", evidence="line 7\nline 8", hint="do this"))
    assert status == kind.exit_code
    with pytest.raises(FoundryError) as caught:
        raise_failure(tmp_path, CommandError("the child ended with status 2"))
    assert type(caught.value) is kind
    told = caught.value
    assert (told.message, told.evidence, told.hint) == ("it failed", "line 7\nline 8", "do this")
    assert not (tmp_path / FAILURE).exists()


@pytest.mark.parametrize("left", [None, "", "{", "[]", '{"exit_code": 2}'])
def test_a_child_that_left_nothing_readable_failed_with_its_status(left: str | None, tmp_path: Path) -> None:
    if left is not None:
        (tmp_path / FAILURE).write_text(left)
    fallback = CommandError("the child ended with status 139")
    with pytest.raises(CommandError) as caught:
        raise_failure(tmp_path, fallback)
    assert caught.value is fallback
