"""The vision part of a model: the file that was named, or the one that lies beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.base import console, files
from toolchain.base.errors import FetchError, FoundryError, UsageError
from toolchain.base.gguf import GgufHeader, read_header

if TYPE_CHECKING:
    from toolchain.hub.ggufs import RepoListing


def vision_part(
    typed: str | None, model: Path, *, look_beside: bool, listing: RepoListing | None = None
) -> GgufHeader | None:
    """The header of ``typed``, or of the only ``mmproj*.gguf`` beside ``model`` if one is looked for; None without.

    Of a model from the hub the one that its repository has (``listing``) is fetched. Raises UsageError when ``typed``
    is no vision or audio part, ArtifactError when it lies in its header.
    """
    if typed is not None:
        header = read_header(files.expand(typed))
        if header.kind != "mmproj":
            raise UsageError(f"--mmproj: {header.path.name} is no vision or audio part", hint="its name says mmproj")
        return header
    if look_beside and listing is not None:
        return _of_repository(listing)
    beside = sorted(path for path in model.parent.glob("mmproj*.gguf") if path != model) if look_beside else []
    if len(beside) > 1:
        names = ", ".join(path.name for path in beside)
        console.warn(f"several vision parts lie beside the model ({names}): --mmproj FILE names one")
    if len(beside) != 1:
        return None
    try:
        header = read_header(beside[0])
    except FoundryError as error:
        console.warn(f"{beside[0].name} lies beside the model and is not used: {error.message}")
        return None
    return header if header.kind == "mmproj" else None


def _of_repository(listing: RepoListing) -> GgufHeader | None:
    """Without a network, the model goes without."""
    from runtime.hub_model import fetch_vision

    try:
        path = fetch_vision(listing)
    except FetchError as error:
        console.warn(f"{listing.repo} has a vision part, which cannot be had now: {error.message}")
        return None
    return read_header(path) if path else None
