"""Which GGUF files a repository on the hub offers, one of them chosen, and that one on disk."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolchain.base import files
from toolchain.base.errors import UsageError
from toolchain.hub.download import download
from toolchain.hub.place import Place
from toolchain.hub.repository import RemoteFile, look_up

# What is taken when none is named: llama.cpp's and ollama's choice, then what is nearest to it in size and
# loss, larger before smaller. A file of no listed name is taken only when there is no other, the smallest first.
DEFAULT_ORDER: Final = (
    *("Q4_K_M", "UD-Q4_K_XL", "Q4_K_L", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "MXFP4", "MXFP4_MOE", "NVFP4"),
    *("Q5_K_M", "UD-Q5_K_XL", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "Q8_0", "Q3_K_L", "Q3_K_M", "UD-Q3_K_XL", "Q3_K_S"),
    *("IQ3_M", "IQ3_S", "IQ3_XXS", "Q2_K", "UD-Q2_K_XL", "IQ2_M"),
)


@dataclass(frozen=True, kw_only=True)
class Quant:
    """One model of a repository: all its files in shard order. Its name is unique there, such as "UD-Q4_K_XL"."""

    name: str
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, kw_only=True)
class RepoListing:
    """The GGUF files of ``repo`` at ``commit``, smallest quant first; ``mmproj``: vision and audio parts."""

    repo: str
    revision: str
    commit: str
    quants: tuple[Quant, ...]
    mmproj: tuple[RemoteFile, ...]


def list_quants(repo: str, revision: str = "main") -> RepoListing:
    """Ask the hub, in one call, which commit ``revision`` is and which models in GGUF it holds.

    A quant's name is what the publisher's file or folder says, in upper case; a file that says none goes by its
    name less ``.gguf``, and so do several that say the same. Left out: importance matrices, vocabularies, adapters,
    heads for speculation and models of which a shard is missing. No quants at all is no error.
    """
    found = look_up(repo, revision, lambda names: sorted(filter(_is_gguf, names)))
    projectors = tuple(file for file in found.chosen if "mmproj" in _base(file.name).lower())
    return RepoListing(
        repo=repo,
        revision=revision,
        commit=found.commit,
        quants=_quants(file for file in found.chosen if file not in projectors),
        mmproj=projectors,
    )


def choose_quant(listing: RepoListing, wanted: str | None) -> Quant:
    """The quant that ``wanted`` names, in any case, by its name or its file's; None: the first of DEFAULT_ORDER.

    ``Q4_K_XL`` also finds ``UD-Q4_K_XL``, and ``F16`` ``FP16``. Raises UsageError with the names there are.
    """
    if not listing.quants:
        shown = "\n".join(file.name for file in listing.mmproj)
        raise UsageError(f"{listing.repo} holds no model in GGUF", evidence=shown, hint="name another repository")
    if wanted is None:
        return min(listing.quants, key=_preference)
    spelled = wanted.upper()
    for names in (_names, _near_names):
        for quant in listing.quants:
            if spelled in names(quant):
                return quant
    known = [quant.name for quant in listing.quants]
    by_spelling = {name.upper(): name for name in known}
    close = [by_spelling[name] for name in difflib.get_close_matches(spelled, by_spelling, n=1)]
    raise UsageError(
        f"{listing.repo} has no {wanted}",
        evidence=f"there are: {', '.join(known)}",
        hint=f"did you mean {listing.repo}:{close[0]}?" if close else f"name one of them: {listing.repo}:{known[0]}",
    )


def gguf_path(listing: RepoListing, quant: Quant, cache_dir: Path) -> Path | None:
    """The quant's first file when all of them are there and were verified; no network."""
    place = Place.of(listing.repo, listing.commit, cache_dir)
    return place.folder / quant.files[0].name if place.holds_verified(quant.files) else None


def fetch_gguf(listing: RepoListing, quant: Quant, cache_dir: Path, on_progress: Callable[[int, int], None]) -> Path:
    """Download what is missing of the quant, verify it, and return its first file.

    Continued, verified and locked as ``snapshot.download_snapshot`` does, in the same cache.
    """
    place = Place.of(listing.repo, listing.commit, cache_dir)
    download(listing.repo, listing.commit, quant.files, place, on_progress, revision=listing.revision)
    return place.folder / quant.files[0].name


def record_listing(listing: RepoListing, cache_dir: Path) -> None:
    """Keep the listing beside the repository's files, so that a later start need not ask the hub."""
    note = _listings(listing.repo, cache_dir) / f"{listing.commit}.json"
    files.write_json(note, dataclasses.asdict(listing))


def recorded_listings(repo: str, cache_dir: Path) -> tuple[RepoListing, ...]:
    """What was recorded of ``repo``, the last recorded first."""
    notes = sorted(_listings(repo, cache_dir).glob("*.json"), key=lambda note: note.stat().st_mtime_ns, reverse=True)
    return tuple(known for note in notes if (known := _listing_from_json(files.read_json(note))))


def forget_listing(listing: RepoListing, cache_dir: Path) -> None:
    """Drop the record of a commit that the hub no longer has."""
    (_listings(listing.repo, cache_dir) / f"{listing.commit}.json").unlink(missing_ok=True)


# As publishers write it: Model-Q4_K_M, model.i1-IQ3_XXS, UD-TQ1_0, q4_k_m, fp16, mxfp4, Q4_0_4_4, IQ2_KT, Q8_0_R8.
_QUANT: Final = re.compile(
    r"(?<![A-Z0-9])(?:UD-)?(?:I?Q[1-9](?:_(?:\d|R\d|K[A-Z]{0,2}|XXS|XS|S|M|L|XL|XXL|NL))*|TQ[12]_0"
    r"|BF16|FP?16|FP?32|FP8|MXFP4(?:_MOE)?|NVFP4)(?![A-Z0-9])"
)
_OTHER_SPELLING: Final = {"F16": "FP16", "FP16": "F16", "F32": "FP32", "FP32": "F32"}
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})", re.IGNORECASE)
_NO_MODEL: Final = re.compile(r"imatrix|(^|[-_.])vocab([-_.]|$)|^(mtp|eagle3|dflash|dspark)-")
# convert_lora_to_gguf writes no k-quants, so a quantized ...-lora-Q4_K_M.gguf is a merged model.
_ADAPTER: Final = re.compile(r"(^|[-_.])(lora|adapter)([-_.](bf16|fp?16|fp?32))?$")


def _is_gguf(name: str) -> bool:
    """Whether the name ends in .gguf and stays below the folder that it is put in."""
    return name.lower().endswith(".gguf") and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _quants(found: Iterable[RemoteFile]) -> tuple[Quant, ...]:
    shards: defaultdict[tuple[str, int], list[RemoteFile]] = defaultdict(list)
    for file in found:
        stem, count = _stem_and_count(file.name)
        base = _base(stem).lower()
        if not (_NO_MODEL.search(base) or _ADAPTER.search(base)):
            shards[stem, count].append(file)
    models = {
        stem: tuple(sorted(parts, key=lambda part: part.name))
        for (stem, count), parts in shards.items()
        if len(parts) == count
    }
    said = {stem: _said(stem) or _base(stem) for stem in models}
    times = Counter(said.values())
    quants = [Quant(name=said[stem] if times[said[stem]] == 1 else stem, files=parts) for stem, parts in models.items()]
    return tuple(sorted(quants, key=lambda quant: (quant.bytes, quant.name)))


def _said(stem: str) -> str | None:
    """The last quant that the file's name says, else its folder's."""
    folder, _, base = stem.upper().rpartition("/")
    return next((said[-1] for text in (base, folder) if (said := _QUANT.findall(text))), None)


def _stem_and_count(name: str) -> tuple[str, int]:
    """The name without ``.gguf`` and shard number, and how many shards there are."""
    stem = name[: -len(".gguf")]
    shard = _SHARD.fullmatch(stem)
    return (shard["stem"], int(shard["count"])) if shard else (stem, 1)


def _names(quant: Quant) -> tuple[str, ...]:
    """What the quant may be called, in upper case."""
    name = quant.files[0].name
    stem, _ = _stem_and_count(name)
    return tuple(text.upper() for text in (quant.name, stem, _base(stem), name, _base(name)))


def _near_names(quant: Quant) -> tuple[str, ...]:
    """What it may also be called, if nothing else is called so."""
    return quant.name.removeprefix("UD-"), _OTHER_SPELLING.get(quant.name, "")


def _preference(quant: Quant) -> tuple[int, int, str]:
    said = _said(_stem_and_count(quant.files[0].name)[0])
    place = DEFAULT_ORDER.index(said) if said in DEFAULT_ORDER else len(DEFAULT_ORDER)
    return place, quant.bytes, quant.name


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _listings(repo: str, cache_dir: Path) -> Path:
    return Place.of(repo, "", cache_dir).store / "listings"


def _listing_from_json(value: object) -> RepoListing | None:
    if not isinstance(value, dict):
        return None
    try:
        quants = tuple(
            Quant(name=quant["name"], files=tuple(RemoteFile(**file) for file in quant["files"]))
            for quant in value["quants"]
        )
        return RepoListing(**{**value, "quants": quants, "mmproj": tuple(RemoteFile(**f) for f in value["mmproj"])})
    except (KeyError, TypeError):
        return None
