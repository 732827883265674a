"""One wheel that somebody else built, fetched by its hash and verified."""

from __future__ import annotations

import shutil
from pathlib import Path

from toolchain.base import console, files
from toolchain.base.command import OnProgress
from toolchain.base.errors import FetchError, FoundryError
from toolchain.build.index import wrong_hash
from toolchain.build.wheel_archive import check_wheel
from toolchain.build.wheel_index import open_client
from toolchain.build.wheel_offer import Offer


def fetch_wheel(offer: Offer, *, sha256: str | None = None, on_progress: OnProgress | None = None) -> Path:
    """The wheel as a verified file in FOUNDRY_HOME, without network when it is there already.

    Its hash is the one asked for, else the one that its index states, else that of the first download, which is
    recorded and must stay (said so in a warning). Raises FetchError when it cannot be had or is another file, and
    ArtifactError when it is not a sound wheel; then nothing of it stays.
    """
    root = files.home_dir("sources") / "wheels"
    if there := _cached(root, offer, _expected(offer, sha256)):
        return there
    with files.locked(root / f"{offer.filename}.lock"), files.staging(root / offer.filename) as partial:
        expected = _expected(offer, sha256)
        if there := _cached(root, offer, expected):
            return there
        if offer.is_local:
            with files.disk_errors(root):
                shutil.copyfile(offer.location, partial)
        else:
            _download(offer, partial, on_progress)
        found = files.sha256_file(partial)
        if expected and found != expected:
            raise wrong_hash(offer.filename, expected=expected, found=found)
        check_wheel(partial)
        final = root / found / offer.filename
        with files.disk_errors(final):
            final.parent.mkdir(exist_ok=True)
            files.promote(partial, final)
        if not (offer.is_local or offer.sha256):
            files.write_json(_note(offer), {"url": offer.shown, "sha256": found})
        if not expected:
            console.warn(
                f"{offer.filename}: its index states no hash. Recorded that of this first download, which must stay "
                f"the same from now on: sha256 {found}"
            )
    return final


def _expected(offer: Offer, asked: str | None) -> str | None:
    """The hash that the file must have, None on first use; FetchError when two who know it disagree.

    A hash that is asked for overrules what was recorded; a file on this machine is what it is now.
    """
    note = files.read_json(_note(offer))
    before = str(note["sha256"]) if isinstance(note, dict) and "sha256" in note and not asked else None
    known = {"asked for": asked, "stated by its index": offer.sha256, "of the first download": before}
    if offer.is_local:
        try:
            known["of the file"] = files.known_sha256(Path(offer.location))
        except OSError as error:
            raise FetchError(f"cannot read {offer.location}", evidence=str(error), hint="is it still there?") from error
    stated = {who: value for who, value in known.items() if value}
    if len({*stated.values()}) > 1:
        anew = f", or delete {_note(offer)} to trust it anew" if before else ""
        raise FetchError(
            f"{offer.filename} has the wrong hash",
            evidence="\n".join(f"sha256 {value} {who}" for who, value in stated.items()),
            hint=f"give the right hash{anew}, or use another wheel",
        )
    return next(iter(stated.values()), None)


def _cached(root: Path, offer: Offer, expected: str | None) -> Path | None:
    """The wheel of that hash, when it is here; a damaged file is taken away."""
    path = root / (expected or "-") / offer.filename
    if not path.is_file():
        return None
    if files.known_sha256(path) == expected:
        return path
    files.remove(path, within=root)
    return None


def _note(offer: Offer) -> Path:
    """Where it is recorded which hash a URL had when it was first used."""
    return files.home_dir("sources") / "refs" / f"{files.sha256_text(offer.location)[:32]}.json"


def _download(offer: Offer, target: Path, on_progress: OnProgress | None) -> None:
    """Stream the wheel into ``target``; FetchError when it does not come whole, or something else comes."""
    done = 0
    headers = {"Accept-Encoding": "identity"}
    try:
        with open_client(offer.location) as client, client.get_stream(offer.location, headers=headers) as response:
            if response.status_code >= 400:
                raise _not_had(offer, f"the server answers {response.status_code} {response.reason_phrase}")
            size = int(response.headers.get("content-length") or 0)
            kind = response.headers.get("content-type", "")
            if kind.startswith(("text/", "application/json", "application/xhtml")):
                raise _not_had(offer, f"the server answers with a page ({kind})")
            files.require_free(target, size + (64 << 20), offer.filename)
            with target.open("wb") as sink:
                for chunk in response.iter_bytes(1 << 20):
                    sink.write(chunk)
                    done += len(chunk)
                    if on_progress and size:
                        on_progress(done, size)
    except FoundryError:
        raise
    except OSError as error:
        raise files.disk_error(error, target) or _not_had(offer, f"{type(error).__name__}: {error}") from error
    except Exception as error:  # the client library's own errors have no common root
        raise _not_had(offer, f"{type(error).__name__}: {error}") from error


def _not_had(offer: Offer, why: str) -> FetchError:
    return FetchError(
        f"cannot fetch {offer.filename}",
        evidence=f"{offer.shown}\n{why}",
        hint="run the same command again; check the network, or use another index",
    )
