from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from runtime.engine import session
from runtime.engine.adapters import parse_adapter
from toolchain.base.errors import ArtifactError, FoundryError, UsageError

STATEMENT: dict[str, Any] = {
    "model": "ab" * 32,
    "model_name": "some.gguf",
    "build": "0.3.36",
    "n_ctx": 512,
    "cache_types": ["f16", "f16"],
    "adapters": [["cd" * 32, 0.5]],
    "tokens": 3,
    "exact": 2,
    "checkpoints": [[2, 4]],
    "library_bytes": 34,
    "note": {"turns": []},
}


def written(path: Path, statement: object = STATEMENT, **foot: Any) -> Path:
    """A session file with 10 bytes of state and 4 of a checkpoint, whatever its statement says."""
    raw = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    library = struct.pack("<4sII3i", b"qsgg", 3, 3, 7, 8, 9) + bytes(10)
    footer = struct.pack(
        "<8sQQI", foot.get("magic", b"fdrysess"), foot.get("version", 2), foot.get("length", len(raw)), 0
    )
    path.write_bytes(library + bytes(4) + raw + footer)
    return path


def test_statement_is_read_back(tmp_path: Path) -> None:
    saved = session.read(written(tmp_path / "a.session"))
    assert (saved.tokens, saved.exact, saved.cache_types) == (3, 2, ("f16", "f16"))
    assert saved.adapters == (("cd" * 32, 0.5),)
    assert saved.checkpoints == ((2, 4),)
    assert saved.note == {"turns": []}


@pytest.mark.parametrize(
    "lie",
    [
        {"tokens": 4},
        {"tokens": 0},
        {"tokens": "3"},
        {"exact": 4},
        {"library_bytes": 33},
        {"library_bytes": 10**18},
        {"checkpoints": [[2]]},
        {"checkpoints": [[2, 44], [2, -40]]},
        {"checkpoints": [[4, 4]]},
        {"checkpoints": 5},
        {"adapters": [["x", "y"]]},
        {"note": []},
        {"model": None},
    ],
)
def test_statement_that_does_not_go_with_the_file_is_refused(tmp_path: Path, lie: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="is damaged"):
        session.read(written(tmp_path / "a.session", {**STATEMENT, **lie}))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"tokens": 1e999}'])
def test_statement_that_is_no_json_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(ArtifactError, match="is damaged"):
        session.read(written(tmp_path / "a.session", raw))


@pytest.mark.parametrize(
    ("foot", "message"),
    [
        ({"magic": b"fdrysesT"}, "ends too early"),
        ({"version": 1}, "format 1, this runtime reads 2"),
        ({"length": 2**63}, "longer than it"),
        ({"length": 5}, "is damaged"),
    ],
)
def test_footer_that_lies_is_refused(tmp_path: Path, foot: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        session.read(written(tmp_path / "a.session", **foot))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.session")
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(FoundryError, match=r"damaged|not a session"):
            session.read(path)


def test_other_files_are_no_sessions(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(json.dumps([{"role": "user", "content": "x" * 100}]))
    with pytest.raises(UsageError, match="is not a session"):
        session.read(tmp_path / "talk.json")
    for path in (tmp_path, tmp_path / "none.session"):
        with pytest.raises(UsageError, match="cannot be read"):
            session.read(path)


@pytest.mark.parametrize(
    ("typed", "scale"), [("a.gguf", 1.0), ("a.gguf=0.5", 0.5), ("a.gguf=-2", -2.0), ("a=b.gguf=1e-1", 0.1)]
)
def test_scale_stands_behind_the_file(typed: str, scale: float) -> None:
    path, found = parse_adapter(typed)
    assert found == scale
    assert path.name.endswith(".gguf")


@pytest.mark.parametrize("typed", ["a.gguf=", "a.gguf=much", "a.gguf=nan", "a.gguf=inf", "a.gguf=1e39", "=1"])
def test_scale_that_is_no_number_is_refused(typed: str) -> None:
    with pytest.raises(UsageError, match="is not a scale"):
        parse_adapter(typed)


def test_file_whose_name_has_an_equals_sign_needs_no_scale(tmp_path: Path) -> None:
    path = tmp_path / "a=1"
    path.touch()
    assert parse_adapter(str(path)) == (path, 1.0)
