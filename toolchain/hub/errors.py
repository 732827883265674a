"""Talking to the hub with patience: retries while it is busy, and every failure told in our own words."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from toolchain.base import files
from toolchain.base.errors import FetchError, FoundryError, UsageError
from toolchain.base.patience import causes, retry_after_s

if TYPE_CHECKING:
    import httpx2

HUB = "https://huggingface.co"

_T = TypeVar("_T")
_TRIES = 3
_FIRST_WAIT_S = 1.0  # doubles with each try
_LONGEST_WAIT_S = 30.0  # a longer Retry-After is told to the user instead of slept through
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_LOG_IN = f"create a read token at {HUB}/settings/tokens, then `export HF_TOKEN=...` and run again"
ANEW = "run again to download it anew; if it repeats, look for a proxy or mirror in between"


class Stop(BaseException):
    """Ends a worker at its next chunk; no library's ``except Exception`` holds it up."""


class _Halt:
    """A hook for the library's HTTP client: no further request once ``stopping`` is set."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def __call__(self, _: httpx2.Request) -> None:
        if self._stopping.is_set():
            raise Stop


@dataclass(frozen=True)
class Where:
    """What is being fetched, for messages, and whether to go on."""

    repo: str
    revision: str
    file: str = ""
    folder: Path = Path()
    stopping: threading.Event = field(default_factory=threading.Event)

    def __str__(self) -> str:
        return f"{self.file} of {self.repo}" if self.file else self.repo

    def unusable_answer(self, evidence: str) -> FetchError:
        return FetchError(
            f"what answered for {self} is not the hub: its answer makes no sense",
            evidence=evidence,
            hint="check HF_ENDPOINT and the proxy settings (HTTPS_PROXY, NO_PROXY), then run again",
        )


class WrongLengthError(FetchError):
    """The server ended a body, in good order, at another length than it had stated."""


class GoneError(FetchError):
    """The hub no longer has the commit or the file; a listing of earlier days named it."""


def patiently(call: Callable[[], _T], where: Where) -> _T:
    """``call()``, tried again while the hub is busy; any failure becomes a FoundryError.

    The library's own retries of busy answers are taken out (see ``_prepare_client``): they have no
    setting, take up to half a minute and sleep through a Retry-After of any length.
    """
    for nth in range(1, _TRIES + 1):
        try:
            _prepare_client(where)
            return call()
        except FoundryError:
            raise
        except Exception as error:
            wait_s = _wait_s(error, nth)
            if wait_s is None or nth == _TRIES:
                raise _explain(error, where) from error
        if where.stopping.wait(wait_s):
            raise Stop
    raise AssertionError("unreachable")


def _prepare_client(where: Where) -> None:
    """Keep the library quiet; make its HTTP client hand us busy answers at once, and stop when we stop."""
    from huggingface_hub import get_session
    from huggingface_hub.utils.logging import set_verbosity

    if not {"HF_HUB_VERBOSITY", "HF_DEBUG"} & os.environ.keys():
        set_verbosity(logging.ERROR)
    client = get_session()
    theirs = {
        event: [hook for hook in hooks if hook is not _raise_if_busy and not isinstance(hook, _Halt)]
        for event, hooks in client.event_hooks.items()
    }
    client.event_hooks = {
        "request": [*theirs["request"], _Halt(where.stopping)],
        "response": [*theirs["response"], _raise_if_busy],
    }


def _raise_if_busy(response: httpx2.Response) -> None:
    from huggingface_hub import hf_raise_for_status

    if response.status_code in _BUSY:
        response.read()
        hf_raise_for_status(response)


def _wait_s(error: Exception, nth: int) -> float | None:
    """Seconds to wait before the next try; None when another try would not help, or not soon."""
    import httpx2

    usual_s = _FIRST_WAIT_S * (1 << (nth - 1))
    for cause in causes(error):
        if (response := _answer(cause)) is not None:
            if response.status_code not in _BUSY:
                return None
            asked_s = _retry_after_s(response)
            wait_s = usual_s if asked_s is None else asked_s
            return wait_s if wait_s <= _LONGEST_WAIT_S else None
        if isinstance(cause, httpx2.ReadError):
            return usual_s
    return None


def _retry_after_s(response: httpx2.Response) -> float | None:
    """Seconds the server asks us to wait: Retry-After (a number or a date), else the RateLimit header."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    if stated := response.headers.get("Retry-After", "").strip():
        return retry_after_s(stated)
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


def _answer(error: BaseException) -> httpx2.Response | None:
    from huggingface_hub.errors import HfHubHTTPError

    return error.response if isinstance(error, HfHubHTTPError) else None


def _explain(error: Exception, where: Where) -> FoundryError:
    """The failure in our words: what, evidence, next step. Told by the first cause we know."""
    from huggingface_hub import constants

    for cause in causes(error):
        said = _safe(str(cause).strip()) or type(cause).__name__
        if (response := _answer(cause)) is not None:
            return _explain_answer(response, where)
        if isinstance(cause, OSError) and (full := files.disk_error(cause, where.folder)):
            return full
        if isinstance(cause, OSError) and said.startswith("Consistency check failed"):
            first_line = said.splitlines()[0]
            message = f"{where} did not arrive as the hub states it"
            return WrongLengthError(message, evidence=first_line, hint=ANEW)
        if told := _explain_silence(cause, constants.ENDPOINT, where):
            return FetchError(told[0], evidence=said, hint=told[1])
    return where.unusable_answer(_safe(f"{type(error).__name__}: {str(error).strip()[:500]}"))


def _explain_silence(cause: BaseException, host: str, where: Where) -> tuple[str, str] | None:
    """Message and hint when no hub answered at all; None when that was not it."""
    import httpx2
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    told = None
    match cause:
        case OfflineModeIsEnabled():
            told = (
                f"{where} is not in the cache and offline mode is on",
                "`unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE` and run again",
            )
        case LocalTokenNotFoundError():
            told = f"no token for {where}", _LOG_IN
        case httpx2.ProxyError():
            told = (
                f"the proxy refused the way to {host}",
                "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY, then run again",
            )
        case httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            told = (
                f"{host!r} is not an address of a hub",
                f"set HF_ENDPOINT to a full address such as {HUB}, or unset it",
            )
        case httpx2.TimeoutException():
            told = (
                f"{host} did not answer in time for {where}",
                "run again (what has arrived is kept); on a slow line set HF_HUB_ETAG_TIMEOUT=60 and"
                " HF_HUB_DOWNLOAD_TIMEOUT=60",
            )
        case httpx2.ConnectError() if "CERTIFICATE" in str(cause).upper():
            told = (
                f"the certificate of {host} is not trusted",
                "behind an inspecting proxy, set SSL_CERT_FILE to its certificate bundle",
            )
        case httpx2.ConnectError():
            told = f"cannot reach {host}", "check the network, HF_ENDPOINT and HTTPS_PROXY, then run again"
        case httpx2.TransportError():
            told = (
                f"the connection broke while fetching {where}",
                "run again: the download continues where it stopped",
            )
    return told


def _explain_answer(response: httpx2.Response, where: Where) -> FetchError:
    """A refusal, told by the hub's X-Error-Code where it gives one, else by the status."""
    status, repo, token = response.status_code, where.repo, _token()
    code, said = response.headers.get("X-Error-Code", ""), response.headers.get("X-Error-Message", "")
    kind: type[FetchError] = FetchError
    match status, code:
        case _, "GatedRepo" if token:
            message = f"{repo} is gated and your token has no access to it"
            hint = (
                f"accept the licence at {HUB}/{repo} with the account the token belongs to (a fine-grained"
                " token also needs the right to read gated repositories), then run again"
            )
        case _, "GatedRepo":
            message = f"{repo} is gated: it needs an accepted licence and a token"
            hint = f"accept the licence at {HUB}/{repo}, {_LOG_IN}"
        case _, "RevisionNotFound":
            kind = GoneError
            message = f"{repo} has no revision {where.revision!r}"
            hint = f"see its branches and tags at {HUB}/{repo}/tree/main and set `revision` in the recipe"
        case _, "EntryNotFound":
            kind = GoneError
            message = f"{where} is gone from the hub"
            hint = "the repository was changed: run `./inv quantize RECIPE --update`"
        case 401, _ if token and code != "RepoNotFound":
            message = "the hub refused the token: it is wrong or has expired"
            hint = f"{_LOG_IN} (or `unset HF_TOKEN` for a public repository)"
        case 401 | 404, _:
            message = f"{repo} was not found on the hub, or it is private"
            message += " and your token cannot see it" if token else ""
            hint = f"check the spelling at {HUB}/{repo}{'' if token else f'; if it is private, {_LOG_IN}'}"
        case 403, _:
            message = f"the hub does not allow access to {where}"
            hint = f"see {HUB}/{repo}; check what the token may read at {HUB}/settings/tokens"
        case 429, _:
            wait_s = _retry_after_s(response)
            message = "the hub limits how often you may ask, and the limit is reached"
            hint = "run again in a few minutes" if wait_s is None else f"run again in {wait_s:.0f} s"
            hint += "" if token else "; with a token (HF_TOKEN) the limit is higher"
        case 416, _:
            kind = WrongLengthError
            message = f"the hub cannot continue {where}; the part that was there is deleted"
            hint = "run again to download it anew"
        case _ if status in _BUSY or status >= 500:
            message = f"the hub is out of order (HTTP {status}) while fetching {where}"
            hint = "see https://status.huggingface.co and run again later: what has arrived is kept"
        case _:
            message, hint = f"the hub refused {where} (HTTP {status})", f"look at {HUB}/{repo} in a browser"
    url = response.request.url.copy_with(query=None)
    evidence = _safe(f"{response.request.method} {url}: HTTP {status} {said}".rstrip())
    return kind(message, evidence=evidence, hint=hint)


def _token() -> str | None:
    """The token in use; only ever asked whether there is one, and to blot it out of evidence."""
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception:
        return None  # a failing token exchange is the failure being explained


def _safe(text: str) -> str:
    """``text`` without the token and without query strings, which sign download addresses."""
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    token = _token()
    return text.replace(token, "<token>") if token else text


def require_names(repo: str, revision: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        pasted = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", repo)
        raise UsageError(
            f"{repo!r} is not the name of a hub repository",
            evidence=str(error),
            hint=f"write {pasted[1]}" if pasted else "write it as owner/name, e.g. Qwen/Qwen3-0.6B",
        ) from error
    if not revision.strip():
        raise UsageError(f"empty revision for {repo}", hint="name a branch, a tag or a commit, e.g. main")


def not_convertible(repo: str, names: Sequence[str]) -> FetchError:
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    shown = "\n".join(names[:20]) + (f"\n... and {len(names) - 20} more" if len(names) > 20 else "")
    if ggufs:
        why, hint = (
            "it holds GGUF files already",
            f"they need no recipe: `python -m runtime chat {repo}` downloads one and talks with it",
        )
    elif any(name.startswith("adapter_model.") for name in names):
        why, hint = "it is an adapter", "name the base model it was trained on (see its config)"
    else:
        why = "no model*.safetensors and no pytorch_model*.bin"
        hint = f"see what it is at {HUB}/{repo}; name a repository with transformers weights"
    return FetchError(f"{repo} has nothing to convert: {why}", evidence=shown or "(no files)", hint=hint)
