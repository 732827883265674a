"""A model in GGUF on the Hugging Face hub, by ``owner/repo`` or ``owner/repo:QUANT``: its file, or only its headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolchain.base import console, files
from toolchain.base.errors import FetchError, UsageError
from toolchain.hub.errors import GoneError
from toolchain.hub.ggufs import (
    Quant,
    RepoListing,
    choose_quant,
    fetch_gguf,
    forget_listing,
    gguf_path,
    list_quants,
    record_listing,
    recorded_listings,
)
from toolchain.hub.headers import quant_headers
from toolchain.hub.place import Place
from toolchain.hub.repository import RemoteFile

_HUB: Final = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?::(?P<quant>[^:/]+))?$")
_QUIET_S: Final = 1.0
_VISION_TYPES: Final = ("BF16", "F16", "Q8_0", "F32")


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A repository and the quant asked for; None: the one that ``ggufs.DEFAULT_ORDER`` puts first."""

    repo: str
    quant: str | None


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A downloaded model: its first file, and what it is of."""

    path: Path
    listing: RepoListing
    quant: Quant


@dataclass(frozen=True, kw_only=True)
class RemotePlanTarget:
    """What can be planned for without a download: by quant, files that hold the headers, in shard order.

    ``chosen`` is the quant that would be loaded. The files have the sizes of the real ones and no tensor data,
    except those of a quant that was downloaded, which are the real ones.
    """

    listing: RepoListing
    chosen: Quant
    headers: Mapping[str, tuple[Path, ...]]


def parse_hub_name(typed: str) -> HubName | None:
    """``owner/repo[:QUANT]``; None for anything else."""
    match = _HUB.fullmatch(typed)
    return HubName(repo=match["repo"], quant=match["quant"]) if match else None


def fetch_model(name: HubName, cache_dir: Path | None = None) -> HubModel:
    """The model's files on disk, downloaded if they are not in the cache that recipes use as well.

    What the hub listed is recorded with its commit: a model that is on disk is found without asking, and a
    download that was cut goes on at the same commit while the hub has it. Any other is of what the hub has now.
    Raises UsageError when the repository has no GGUF or not this one, else as ``toolchain.hub.ggufs.fetch_gguf`` does.
    """
    cache = cache_dir or files.home_dir("hub")
    known = [(listing, quant) for listing in recorded_listings(name.repo, cache) if (quant := _offered(listing, name))]
    for listing, quant in known:
        if path := gguf_path(listing, quant, cache):
            return HubModel(path=path, listing=listing, quant=quant)
    with files.home_in_use():
        for listing, quant in known:
            if not _begun(listing, quant, cache):
                continue
            try:
                return _fetch(listing, quant, cache)
            except GoneError:
                forget_listing(listing, cache)
        listing = _list(name, cache)
        return _fetch(listing, choose_quant(listing, name.quant), cache)


def fetch_vision(listing: RepoListing, cache_dir: Path | None = None) -> Path | None:
    """The repository's vision part on disk, downloaded if it is not; None where it has none. Errors as of the model."""
    if not listing.mmproj:
        return None
    cache = cache_dir or files.home_dir("hub")
    chosen = min(listing.mmproj, key=_vision_preference)
    part = Quant(name=Path(chosen.name).name, files=(chosen,))
    if path := gguf_path(listing, part, cache):
        return path
    with files.home_in_use():
        return _fetch(listing, part, cache).path


def remote_model_headers(typed: str, cache_dir: Path | None = None, *, all_quants: bool = False) -> RemotePlanTarget:
    """The headers of the quant that ``typed`` means, or of all in its repository; no tensor data is read.

    The hub is asked what the repository holds; where it does not answer, what it said last is taken, if the headers
    are on disk. Raises UsageError when ``typed`` names no repository or quant, else as ``quant_headers`` does.
    """
    name = parse_hub_name(typed)
    if name is None:
        raise UsageError(f"{typed!r} names no hub repository", hint="write owner/repo or owner/repo:Q4_K_M")
    cache = cache_dir or files.home_dir("hub")
    with files.home_in_use():
        try:
            listing = _list(name, cache)
        except FetchError as error:
            for known in recorded_listings(name.repo, cache)[:1]:
                console.warn(f"{error.message}; what {name.repo} held at {known.commit[:12]} is taken")
                return _headers(known, name, cache, all_quants)
            raise
        return _headers(listing, name, cache, all_quants)


def _headers(listing: RepoListing, name: HubName, cache: Path, all_quants: bool) -> RemotePlanTarget:
    chosen = choose_quant(listing, name.quant)
    wanted = listing.quants if all_quants else (chosen,)
    with console.step(f"read the headers of {name.repo}", quiet_s=_QUIET_S) as step:
        found = quant_headers(listing, wanted, cache, step.advance)
    return RemotePlanTarget(listing=listing, chosen=chosen, headers=found)


def _list(name: HubName, cache: Path) -> RepoListing:
    """What the hub says now, recorded."""
    listing = list_quants(name.repo)
    if not listing.quants and not listing.mmproj:
        raise _needs_recipe(name)
    record_listing(listing, cache)
    return listing


def _offered(listing: RepoListing, name: HubName) -> Quant | None:
    try:
        return choose_quant(listing, name.quant)
    except UsageError:
        return None


def _vision_preference(file: RemoteFile) -> tuple[int, int]:
    """As the models' own training had it, before what takes more room or loses some."""
    spelled = Path(file.name).name.upper()
    first = next((place for place, name in enumerate(_VISION_TYPES) if name in spelled), len(_VISION_TYPES))
    return first, file.bytes


def _begun(listing: RepoListing, quant: Quant, cache: Path) -> bool:
    """Whether a part of it was downloaded."""
    place = Place.of(listing.repo, listing.commit, cache)
    return place.missing_bytes(quant.files) < sum(file.bytes for file in quant.files)


def _fetch(listing: RepoListing, quant: Quant, cache: Path) -> HubModel:
    with console.step(f"fetch {listing.repo} {quant.name} at {listing.commit[:12]}") as step:
        path = fetch_gguf(listing, quant, cache, step.advance)
    return HubModel(path=path, listing=listing, quant=quant)


def _needs_recipe(name: HubName) -> UsageError:
    recipe = name.repo.partition("/")[2].lower()
    block = f"  name: {recipe}\n  model: {{hub: {name.repo}}}\n  quantize: [{name.quant or 'Q4_K_M'}]"
    return UsageError(
        f"{name.repo} holds no GGUF; its weights are quantized through a recipe first",
        evidence=f"recipes/{recipe}.yaml:\n{block}",
        hint=f"write that file, then `./inv quantize recipes/{recipe}.yaml`",
    )
