"""The package index, as pip is configured here: find one distribution, download it, know its hash."""

from __future__ import annotations

import atexit
import hashlib
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from toolchain.base.command import OnProgress
from toolchain.base.errors import FetchError, FoundryError

if TYPE_CHECKING:
    from unearth import Link, PackageFinder


def package_finder(*, source_of: Sequence[str] = (), wheel_of: Sequence[str] = ()) -> PackageFinder:
    """A finder over pip's configured indexes; for the names in ``source_of`` it wants source archives only, for
    those in ``wheel_of`` wheels that fit this machine only.
    """
    from unearth import PackageFinder

    urls = _index_urls()
    return PackageFinder(
        session=_open_session(urls),
        index_urls=urls,
        no_binary=[*source_of],
        only_binary=[*wheel_of],
        ignore_compatibility=bool(source_of),
    )


def best_link(finder: PackageFinder, requirement: str, *, what: str) -> Link:
    """The newest file that satisfies ``requirement``; FetchError when the index has none or cannot be reached."""
    try:
        best = finder.find_best_match(requirement).best
    except (FoundryError, KeyboardInterrupt):
        raise
    except Exception as error:  # the client library's own errors have no common root
        raise unreachable(what, error) from error
    if best is None:
        raise FetchError(
            f"no {what} in the package index",
            evidence=f"asked for {requirement}",
            hint="check the name and version, or your pip index configuration (`pip config list`)",
        )
    return best.link


def stated_sha256(link: Link) -> str | None:
    """What the index says the file's hash is: in the JSON form of the index, or behind the link's #."""
    stated = (link.hashes or {}).get("sha256") or (link.hash if link.hash_name == "sha256" else None)
    return stated if isinstance(stated, str) and re.fullmatch(r"[0-9a-f]{64}", stated) else None


def download(finder: PackageFinder, url: str, target: Path, on_progress: OnProgress | None) -> str:
    """Stream ``url`` into ``target``; its SHA-256. Raises what the client raises (see ``unreachable``)."""
    total = hashlib.sha256()
    done = 0
    with finder.session.get_stream(url) as response, target.open("wb") as sink:
        response.raise_for_status()
        size = int(response.headers.get("content-length") or 0)
        for chunk in response.iter_bytes():
            sink.write(chunk)
            total.update(chunk)
            done += len(chunk)
            if on_progress and size:
                on_progress(done, size)
    return total.hexdigest()


def is_this_machine(host: str) -> bool:
    """Whether nobody else can answer for ``host``: its name or address is the loopback's."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def unreachable(what: str, error: Exception) -> FetchError:
    """The client's error as ours."""
    return FetchError(
        f"cannot fetch {what}",
        evidence=f"{type(error).__name__}: {error}",
        hint="check the network and pip's index configuration, or build from path:DIR",
    )


def wrong_hash(name: str, *, expected: str, found: str) -> FetchError:
    return FetchError(
        f"{name} has the wrong hash",
        evidence=f"expected sha256 {expected}\nfound    sha256 {found}",
        hint="the file was changed or the download damaged: try again, and if it stays so, do not use that index",
    )


def _open_session(index_urls: Sequence[str]) -> Any:
    """The client that a finder opens by itself, which also follows redirects: mirrors keep files elsewhere."""
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers.sync import PyPIClient

    session = PyPIClient(
        auth=MultiDomainBasicAuth(index_urls=index_urls),
        follow_redirects=True,
        event_hooks={"response": [_require_safe_redirect]},
    )
    atexit.register(session.close)
    return session


def _require_safe_redirect(response: Any) -> None:
    """Raise FetchError for a redirect to a connection that others can answer, or to a file of this machine."""
    if not response.has_redirect_location:
        return
    target = urlsplit(urljoin(str(response.url), response.headers["location"]))
    host = target.hostname or ""
    if not (target.scheme == "https" or (target.scheme == "http" and is_this_machine(host))):
        raise FetchError(
            f"the package index redirects to a connection that is not encrypted: {host or target.scheme}",
            evidence=f"{response.url.copy_with(query=None)} -> {target.scheme}://{host}",
            hint="use another index (`pip config list` shows which are configured)",
        )


def _index_urls() -> list[str]:
    """The package index as pip is configured here; else pip's own default."""
    from pip._internal.configuration import Configuration
    from pip._internal.models.index import PyPI

    configuration = Configuration(isolated=False)
    configuration.load()
    values = dict(configuration.items())
    extra: list[str] = []
    index = PyPI.simple_url
    for key in ("global", "install", "download", ":env:"):
        index = values.get(f"{key}.index-url", index)
        extra += values.get(f"{key}.extra-index-url", "").split()
    return [index, *extra]
