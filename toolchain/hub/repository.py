"""What a repository on the hub holds, asked for in one call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from toolchain.hub.errors import Where, patiently, require_names

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file of a repository by its name in it; ``sha256`` as the hub states it, for LFS files only."""

    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Repository:
    """All names at ``commit``, those chosen of them with what is known of each, and the weights' count if stated."""

    commit: str
    names: tuple[str, ...]
    chosen: tuple[RemoteFile, ...]
    n_params: int | None


def look_up(repo: str, revision: str, choose: Callable[[Iterable[str]], Iterable[str]]) -> Repository:
    """Ask the hub which commit ``revision`` is and what it holds; sizes are demanded of what ``choose`` picks only.

    Raises FetchError when the hub does not answer, refuses or answers nonsense; UsageError for a malformed name.
    """
    require_names(repo, revision)

    def ask() -> Any:
        from huggingface_hub import HfApi, constants

        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    where = Where(repo, revision)
    info = patiently(ask, where)
    sizes = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    names = tuple(choose(sizes))
    unsized = [name for name in names if not isinstance(sizes[name].size, int)]
    if unsized or not _COMMIT.fullmatch(info.sha or ""):
        lacking = f"no size for {unsized[0]}" if unsized else f"commit id {info.sha!r}"
        raise where.unusable_answer(lacking)
    return Repository(
        commit=info.sha,
        names=tuple(sorted(sizes)),
        chosen=tuple(
            RemoteFile(name=name, bytes=sizes[name].size, sha256=_stated_sha256(sizes[name])) for name in names
        ),
        n_params=info.safetensors.total if info.safetensors else None,
    )


def _stated_sha256(sibling: Any) -> str | None:
    stated = sibling.lfs.sha256 if sibling.lfs else None
    return stated if isinstance(stated, str) and _SHA256.fullmatch(stated) else None
