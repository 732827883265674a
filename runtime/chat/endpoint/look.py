"""What a server tells of itself: where its API lies, which models it has, and what is known of the chosen one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

from runtime.chat.endpoint.ask import ask, read_json
from runtime.chat.endpoint.chunk import count
from runtime.chat.endpoint.errors import NotAnAnswerError, RefusedError, Server, near_miss
from runtime.chat.endpoint.wire import Wire
from runtime.interrupts import Interrupt
from toolchain.base import console
from toolchain.base.errors import FetchError, UsageError

if TYPE_CHECKING:
    from runtime.chat.endpoint.address import Address

_LOOK_S: Final = 30.0
_LISTED: Final = 20
_NO_LIST: Final = frozenset({400, 404, 405, 410, 501})
_CONTEXT_KEYS: Final = ("n_ctx", "max_model_len", "context_length", "context_window", "max_context_length")
"""llama-server, vLLM, OpenRouter, Groq, LM Studio."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """``bases`` is where /chat/completions lies, or may lie; ``models`` the names it lists, maybe none."""

    bases: tuple[str, ...]
    model: str
    models: tuple[str, ...]
    llama: bool
    n_ctx: int | None
    sees: bool


def look(wire: Wire, address: Address, model: str | None) -> Found:
    """Ask the server for its models and choose one.

    UsageError when it has several and none is named, or tells none; FetchError when it fails. A server without
    /models, or that has something else there, is taken at its word with a named model.
    """
    listing, base = None, address.bases[0]
    failure: FetchError | None = None
    for place in address.bases:
        try:
            listing = _listed(_get(wire, f"{place}/models"))
        except NotAnAnswerError as error:
            failure = failure or error
            continue
        except RefusedError as error:
            forbidden = error.refusal.status == 403 and model is not None  # a key may be for replies alone
            if error.refusal.status not in _NO_LIST and not forbidden:
                raise
            failure = failure or error
            continue
        base = place
        break
    entries = {wire.server.safe(name, limit=200): entry for name, entry in (listing or {}).items()}
    server = Server(base=base, key=wire.server.key)
    if listing is None and model is None:
        assert failure is not None
        raise _nothing_listed(server, failure)
    chosen = _choose(server, entries, model)
    alone = len(entries) == 1  # a llama-server with one model takes any name for it
    entry = next((one for name, one in entries.items() if alone or chosen in (name, *_aliases(one))), {})
    llama = entry.get("owned_by") == "llamacpp"
    n_ctx, sees = _known(wire, base, entry, llama=llama, alone=alone)
    bases = address.bases if listing is None else (base,)
    return Found(bases=bases, model=chosen, models=tuple(entries), llama=llama, n_ctx=n_ctx, sees=sees)


def adapters(wire: Wire, base: str) -> dict[int, tuple[str, float]]:
    """Names and scales of the adapters that a llama-server has loaded, by their ids; none where it tells of none."""
    told = _get(wire, f"{base.removesuffix('/v1')}/lora-adapters")
    found = {}
    for each in map(_object, told if isinstance(told, list) else ()):
        match each:
            case {"id": int(number), "path": str(path), "scale": int() | float() as scale}:
                found[number] = (wire.server.safe(PurePath(path).name, limit=200), float(scale))
    return found


def _get(wire: Wire, url: str) -> object:
    with closing(ask(wire, "GET", url, interrupt=Interrupt(), silence_s=_LOOK_S)) as answer:
        return read_json(answer, within_s=_LOOK_S)


def _listed(value: Any) -> dict[str, Mapping[str, Any]]:
    """The entries by their names: OpenAI's list, a bare one, or Ollama's; NotAnAnswerError for none of them."""
    if isinstance(value, dict):
        value = value.get("data") if "data" in value else value.get("models")
    if not isinstance(value, list):
        raise NotAnAnswerError("the list of models is none", evidence=type(value).__name__)
    entries = [entry for entry in value if isinstance(entry, dict)]
    named = [(entry.get("id") or entry.get("name"), entry) for entry in entries]
    return {name: entry for name, entry in named if isinstance(name, str) and name.strip()}


def _choose(server: Server, entries: Mapping[str, Mapping[str, Any]], model: str | None) -> str:
    names = list(entries)
    if model is not None:
        known = {alias for name, entry in entries.items() for alias in (name, *_aliases(entry))}
        if known and model not in known:
            console.warn(f"{server} does not list {model}{near_miss(model, names)}; asking for it all the same")
        return model
    if len(names) == 1:
        return names[0]
    if not names:
        raise UsageError(f"{server} has no model ready", hint="load one there, or name one with --endpoint-model")
    more = f"\n... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    raise UsageError(
        f"{server} has {len(names)} models",
        evidence="\n".join(names[:_LISTED]) + more,
        hint=f"choose one: --endpoint-model {names[0]}",
    )


def _nothing_listed(server: Server, failure: FetchError) -> FetchError | UsageError:
    """Why no model can be chosen: the server has no list, or what answers is something else."""
    if isinstance(failure, NotAnAnswerError):
        return failure
    return UsageError(
        f"{server} does not tell which models it has",
        evidence=failure.evidence,
        hint="name one with --endpoint-model, or check the address",
    )


def _known(wire: Wire, base: str, entry: Mapping[str, Any], *, llama: bool, alone: bool) -> tuple[int | None, bool]:
    """Tokens of context, and whether the model sees, as far as the server tells; who tells nothing may see.

    A llama-server with several models would load one to answer for it, so only one with a single model is asked.
    """
    meta = {**entry, **_object(entry.get("meta"))}
    n_ctx = next((found for key in _CONTEXT_KEYS if (found := count(meta.get(key)))), None)
    sees = _sees_by_list(entry)
    if llama and alone:
        with suppress(FetchError):
            props = _object(_get(wire, f"{base.removesuffix('/v1')}/props"))
            vision = _object(props.get("modalities")).get("vision")
            sees = vision if isinstance(vision, bool) else sees
            n_ctx = count(_object(props.get("default_generation_settings")).get("n_ctx")) or n_ctx
    return n_ctx, True if sees is None else sees


def _aliases(entry: Mapping[str, Any]) -> list[str]:
    aliases = entry.get("aliases")
    return [alias for alias in aliases if isinstance(alias, str)] if isinstance(aliases, list) else []


def _sees_by_list(entry: Mapping[str, Any]) -> bool | None:
    """What the entry says, as llama-server's router and OpenRouter, or Mistral, have it."""
    modalities = _object(entry.get("architecture")).get("input_modalities")
    vision = _object(entry.get("capabilities")).get("vision")
    if isinstance(modalities, list):
        return "image" in modalities
    return vision if isinstance(vision, bool) else None


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
