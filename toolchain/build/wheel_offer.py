"""Wheels of llama-cpp-python that can be had: what the name of one, and its place, tell of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

PROJECT = "llama-cpp-python"

Flavour = Literal["cpu", "cuda", "metal", "rocm", "vulkan", "sycl", "unstated"]
CpuLevel = Literal["basic", "avx", "avx2", "avx512"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a folder's name, or a local version, says of the wheels in it; None where it says nothing."""

    flavour: Flavour | None = None
    cuda: tuple[int, int] | None = None
    cpu: CpuLevel | None = None


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A wheel that can be had. ``location`` is a URL without fragment, or a path on this machine.

    ``architectures`` are those that our own wheels name (``+cu130.sm75.ptx90``): machine code and PTX. ``yanked``
    is why its index withdrew it. ``flavour`` is ``unstated`` when neither name nor folder tells.
    """

    location: str
    filename: str
    version: Version
    tags: frozenset[Tag]
    flavour: Flavour
    cuda: tuple[int, int] | None = None
    cpu: CpuLevel | None = None
    architectures: tuple[str, ...] = ()
    sha256: str | None = None
    yanked: str | None = None

    @property
    def is_local(self) -> bool:
        return "://" not in self.location

    @property
    def shown(self) -> str:
        """The location without what may be secret in a URL: user, password and query."""
        if self.is_local:
            return self.location
        parts = urlsplit(self.location)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def parse_offer(
    location: str, *, listed_in: Iterable[str] = (), sha256: str | None = None, yanked: str | None = None
) -> Offer | None:
    """The offer behind a URL or path; None when it is no wheel of llama-cpp-python.

    ``listed_in`` are the folder names on the way to it, outermost first. The wheel's own version tells most,
    then the folder that the file lies in (a release named ``v0.3.4-cu124``), then the folders that list it.
    """
    path = urlsplit(location).path if "://" in location else location
    *folders, filename = unquote(path).split("/")
    try:
        name, version, _, tags = parse_wheel_filename(filename)
    except InvalidWheelFilename:
        return None
    if name != PROJECT or not re.fullmatch(r"[\w.+!-]+", filename):
        return None
    local = version.local or ""
    release = re.fullmatch(r"v?\d[\w.]*-([\w.-]+)", folders[-1]) if folders else None
    parts = [*re.sub(r"^cu(?:da)?(\d\d)\.(\d)(?=\.|$)", r"cu\1\2", local).split(".")[:1], release[1] if release else ""]
    places = [read_place(part) for part in (*parts, *folders[-1:], *reversed([*listed_in]))]
    flavour: Flavour = next((place.flavour for place in places if place.flavour), "unstated")
    return Offer(
        location=location,
        filename=filename,
        version=version,
        tags=tags,
        flavour=flavour,
        cuda=next((place.cuda for place in places if place.cuda and place.flavour == flavour), None),
        cpu=next((place.cpu for place in places if place.cpu), None),
        architectures=tuple(part for part in local.split(".") if re.fullmatch(r"(sm|ptx)\d+[af]?", part)),
        sha256=sha256,
        yanked=yanked,
    )


def read_place(name: str) -> Place:
    """What one folder name (``cu124``, ``AVX2``, ``rocm72``) or first local part (``cpuavx2``) says."""
    text = name.lower()
    if found := re.fullmatch(r"cu(\d\d)(\d?)(avx512|avx2|avx|basic)?", text):  # cu12: 12.0 at least
        return Place(flavour="cuda", cuda=(int(found[1]), int(found[2] or 0)), cpu=_level(found[3]))
    if found := re.fullmatch(r"cpu(avx512|avx2|avx|basic)?", text):
        return Place(flavour="cpu", cpu=_level(found[1]))
    if re.fullmatch(r"rocm[\d.]*|hip(-radeon)?", text):
        return Place(flavour="rocm")
    match text:
        case "cuda" | "metal" | "vulkan" | "sycl":
            return Place(flavour=text)
        case _:
            return Place(cpu=_level(text))


def _level(text: str | None) -> CpuLevel | None:
    levels: tuple[CpuLevel, ...] = ("basic", "avx", "avx2", "avx512")
    return next((level for level in levels if level == text), None)
