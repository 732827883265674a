"""Indexes of wheels that somebody else built, on the web or in a folder: which wheels are there.

Three layouts are read: llama-cpp-python's own (``whl/cu124/llama-cpp-python/``), the older one with folders per
CPU feature (``AVX2/cu117/llama-cpp-python/``), and a folder of wheels with or without such subfolders.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

from packaging.utils import canonicalize_name

from toolchain.base import console, files
from toolchain.base.errors import FetchError, FoundryError, UsageError
from toolchain.build.index import is_this_machine, stated_sha256
from toolchain.build.wheel_offer import PROJECT, Offer, Place, parse_offer, read_place

if TYPE_CHECKING:
    from unearth import Link
    from unearth.fetchers.sync import PyPIClient

DEFAULT_INDEX = "https://abetlen.github.io/llama-cpp-python/whl"
"""Where llama-cpp-python's README says its wheels are; its folders have no listing above them."""

FOLDERS = (
    "cpu", "cu118", "cu121", "cu122", "cu123", "cu124", "cu125", "cu126", "cu130", "cu132",
    "metal", "rocm72", "vulkan",
)  # fmt: skip
"""Folder names to try below an index without a listing: those for Linux and macOS that llama-cpp-python's README
(of 0.3.36) and release scripts name."""

OLDER_FOLDERS = tuple(
    f"{level}/{flavour}"
    for level in ("AVX2", "AVX", "AVX512", "basic")
    for flavour in ("cpu", "cu116", "cu117", "cu118", "cu120", "cu121", "cu122")
)
"""The same for the older layout (jllllll/llama-cpp-python-cuBLAS-wheels, 2023)."""

MAX_DEPTH = 4
MAX_PAGES = 250
"""The older index, walked from its top, has under a hundred pages; guessing asks for at most 43."""

HTML, JSON = "text/html", "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON}, application/vnd.pypi.simple.v1+html;q=0.2, {HTML};q=0.1"


def find_offers(index: str) -> tuple[Offer, ...]:
    """Every wheel of llama-cpp-python below ``index``: a URL (its base, one of its folders, a project's page or a
    wheel) or a folder or wheel on this machine.

    Pages are followed downwards on the same origin. Raises FetchError, which lists the addresses tried, when the
    index cannot be reached or has none; UsageError when ``index`` is neither a URL nor there.
    """
    if not index.startswith(("http://", "https://")):
        return _in_folder(index)
    tried: list[str] = []
    with open_client(index) as client:
        if urlsplit(index).path.endswith(".whl"):
            from unearth import Link

            found = [*_offers([Link(index)], listed_in=_names(index))]
        else:
            root = index.partition("#")[0].removesuffix("index.html").rstrip("/") + "/"
            found = _walk(client, [root], tried)
            for guesses in _guesses(root):
                if found:
                    break
                found = _walk(client, [f"{root}{guess}/" for guess in guesses], tried)
    if not found:
        raise _nothing(index, tried)
    return tuple(dict.fromkeys(found))


def open_client(url: str) -> PyPIClient:
    """The client of the package index library: proxies and certificates as the environment says. Release files
    lie behind redirects, so these are followed; never to a connection that others can answer.
    """
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers.sync import PyPIClient

    return PyPIClient(
        auth=MultiDomainBasicAuth(prompting=False, index_urls=[url]),
        follow_redirects=True,
        event_hooks={"request": [lambda request: _require_encrypted(str(request.url))]},
    )


def _in_folder(named: str) -> tuple[Offer, ...]:
    """Wheels in a folder and its subfolders. Folder names tell what for, those of the last two above it too."""
    path = unquote(urlsplit(named).path) if named.startswith("file://") else named
    root = files.expand(path).absolute()
    if not root.exists():
        raise UsageError(
            f"no index at {named}",
            evidence=f"it is neither a URL nor here: {root}",
            hint=f"name a folder with wheels, or an index such as {DEFAULT_INDEX}/cpu",
        )
    top = root if root.is_dir() else root.parent
    paths = [root] if root.is_file() else sorted(_files_below(root))
    offers = [parse_offer(str(path), listed_in=(*top.parts[-2:], *path.relative_to(top).parts[:-1])) for path in paths]
    if not (found := tuple(filter(None, offers))):
        raise _nothing(named, [str(root)])
    return found


def _files_below(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        if len(Path(folder).relative_to(root).parts) >= MAX_DEPTH:
            subfolders.clear()
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder) / name for name in names)


def _walk(client: PyPIClient, starts: Sequence[str], tried: list[str]) -> list[Offer]:
    """Offers of the pages at ``starts`` and, breadth first, of the folders below those that hold no wheel."""
    queue = deque((url, 0) for url in starts)
    seen = {*starts}
    found: list[Offer] = []
    while queue:
        url, depth = queue.popleft()
        if len(tried) >= MAX_PAGES:
            console.warn(f"stopped looking for wheels after {MAX_PAGES} pages: name a folder further down")
            break
        base, links = _links(client, url, tried)
        found += (offers := [*_offers(links, listed_in=_names(url))])
        if not offers and depth < MAX_DEPTH:
            below = [folder for folder in _folders(base, links) if folder not in seen]
            seen.update(below)
            queue.extend((folder, depth + 1) for folder in below)
    return found


def _links(client: PyPIClient, url: str, tried: list[str]) -> tuple[str, list[Link]]:
    """The folder that one page stands for and its links; none when there is no such page.

    Raises FetchError when the server cannot be reached or fails.
    """
    from unearth import Link
    from unearth.collector import IndexPage, parse_html_page, parse_json_response

    try:
        response = client.get(url, headers={"Accept": ACCEPT})
        tried.append(f"{Link(url).redacted}: {response.status_code} {response.reason_phrase}")
        final, kind = str(response.url), response.headers.get("content-type", "").lower()
        if response.status_code in (403, 404, 410):
            return final, []
        response.raise_for_status()
        page = IndexPage(Link(final), response.content, response.encoding, kind)
        links = parse_json_response(page) if kind.startswith(JSON) else parse_html_page(page) if "html" in kind else ()
        return urljoin(final, "."), [*links]
    except FoundryError:
        raise
    except Exception as error:  # the client library's own errors have no common root
        raise FetchError(
            f"cannot read the index {Link(url).redacted}",
            evidence="\n".join([f"{type(error).__name__}: {error}", *_shown(tried)]),
            hint="check the address and the network, or name a folder with wheels",
        ) from error


def _offers(links: Sequence[Link], *, listed_in: Sequence[str]) -> Iterator[Offer]:
    for link in links:
        reason: object = link.yank_reason  # the JSON form may also say just true
        yanked = reason if isinstance(reason, str) else "" if reason else None
        if link.is_wheel and (
            offer := parse_offer(
                link.url_without_fragment, listed_in=listed_in, sha256=stated_sha256(link), yanked=yanked
            )
        ):
            yield offer


def _folders(base: str, links: Sequence[Link]) -> list[str]:
    """Folders that a page links to, below it on the same origin, whose names can matter; the project's own page
    alone where there is one.
    """
    linked = (link.url_without_fragment.partition("?")[0].removesuffix("index.html") for link in links)
    below = dict.fromkeys(url.rstrip("/") + "/" for url in linked if url.startswith(base) and url != base)
    names = {url: _names(url)[-1] for url in below}
    if project := [url for url, name in names.items() if canonicalize_name(name) == PROJECT]:
        return project
    return [url for url, name in names.items() if read_place(name) != Place() or name in ("whl", "wheels")]


def _names(url: str) -> list[str]:
    """The folder names of a URL's path, outermost first."""
    return [name for name in unquote(urlsplit(url).path).split("/") if name]


def _guesses(root: str) -> Iterator[Sequence[str]]:
    """Addresses below a root without a listing, the likely ones first."""
    places = [read_place(name) for name in _names(root)]
    yield [PROJECT]
    if not any(place.flavour for place in places):
        yield [f"{folder}/{PROJECT}" for folder in FOLDERS]
        if not any(place.cpu for place in places):
            yield [f"{folder}/{PROJECT}" for folder in OLDER_FOLDERS]


def _require_encrypted(url: str) -> None:
    """Raise FetchError for a URL that is neither https nor on this machine."""
    host = urlsplit(url).hostname or ""
    if not (is_this_machine(host) or url.startswith("https://")):
        raise FetchError(
            f"the connection to {host} is not encrypted",
            evidence=f"{urlsplit(url).scheme}://{host}",
            hint="use https, or download the wheel yourself and name its folder",
        )


def _nothing(index: str, tried: Sequence[str]) -> FetchError:
    return FetchError(
        f"no wheel of {PROJECT} at {index}",
        evidence="\n".join(_shown(tried)),
        hint=f"name the index, one of its folders ({DEFAULT_INDEX}/cu124), or a folder with wheels",
    )


def _shown(tried: Sequence[str]) -> list[str]:
    more = [f"and {len(tried) - 12} more addresses"] if len(tried) > 12 else []
    return ["tried:", *tried[:12], *more] if tried else []
