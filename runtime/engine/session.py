"""A sequence on disk: the library's own sequence file, and behind it what is needed to trust it.

    library's file        header, tokens (int32), state: llama_state_seq_save_file streams it, without a copy in memory
    checkpoints           of recurrent models, one after the other
    statement             JSON: what it is a state of
    footer, 28 bytes      magic, format version, length of the statement, CRC-32 of all that stands before it

The library's parser trusts what it reads, so nothing is handed to it before model, tokens and checksum agree. The
checksum tells damage, not malice (SHA-256 took three times as long, a tenth of the way to the first token): restore
no session that a stranger made.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.engine.context import Context
from runtime.engine.prefix import Checkpoint
from runtime.interrupts import Interrupt
from toolchain.base import console, files
from toolchain.base.errors import ArtifactError, FoundryError, UsageError

FORMAT: Final = 2
_FOOTER: Final = struct.Struct("<8sQQI")
_MAGIC: Final = b"fdrysess"
_LIBRARY_HEAD: Final = struct.Struct("<4sII")  # LLAMA_STATE_SEQ_MAGIC as it lies on disk, version, tokens
_LIBRARY_MAGIC: Final = b"qsgg"
_MOST_STATEMENT_BYTES: Final = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a session file says of itself. ``library_bytes`` of it are the library's; ``note`` is the caller's."""

    path: Path
    model: str
    model_name: str
    build: str
    n_ctx: int
    cache_types: tuple[str, str]
    adapters: tuple[tuple[str, float], ...]
    tokens: int
    exact: int
    checkpoints: tuple[tuple[int, int], ...]
    library_bytes: int
    note: Mapping[str, object]


def save(context: Context, path: Path, *, note: Mapping[str, object]) -> None:
    """Write what the cache of ``context`` holds to ``path`` in one atomic step, readable by its owner alone.

    ``note`` is any JSON object of the caller's, such as the turns of a conversation. Raises UsageError
    when there is nothing to save, MissingError when the disk is full or may not be written.
    """
    if not context.cached:
        raise UsageError("there is nothing to save: no token was read yet")
    lib, tokens = context.model.lib, context.cached
    size = lib.llama_state_seq_get_size(context.handle, 0) + 4 * len(tokens)
    files.require_free(path.absolute().parent, size, f"the session {path.name}")
    with files.disk_errors(path), files.staged(path) as partial:
        kept = (ctypes.c_int32 * len(tokens))(*tokens)
        written = lib.llama_state_seq_save_file(context.handle, os.fsencode(partial), 0, kept, len(tokens))
        if not written or partial.stat().st_size != written:
            if files.is_full(partial.parent):
                raise files.disk_full(path, context.model.log.tail())
            raise FoundryError(f"the library could not write the state to {path}", evidence=context.model.log.tail())
        partial.chmod(0o600)
        statement = json.dumps(_statement(context, written, note)).encode()
        with partial.open("ab") as file:
            for checkpoint in context.checkpoints:
                file.write(checkpoint.state)
            file.write(statement)
        with _mapped(partial) as data:
            checksum = zlib.crc32(data)
        with partial.open("ab") as file:
            file.write(_FOOTER.pack(_MAGIC, FORMAT, len(statement), checksum))


def read(path: Path) -> Saved:
    """What the session at ``path`` says of itself; its checksum is not looked at.

    Raises UsageError for a file that cannot be read, ArtifactError for one that is no whole session.
    """
    with _mapped(path) as data:
        return _read(path, data)


def restore(context: Context, path: Path, *, interrupt: Interrupt | None) -> Saved:
    """Put the sequence saved at ``path`` into the cache of ``context``; what the cache held is gone then.

    A state of another build of the library or with other cache types is not handed over: its tokens are decoded
    again, with a warning. Raises what ``read`` raises, ArtifactError when the file is damaged, UsageError when it is
    of another model or other adapters, or longer than the context. An interrupt leaves the part that was decoded.
    """
    with _mapped(path) as data:
        saved = _read(path, data)
        _require_same(context, saved)
        _require_whole(path, data)
        tokens = _tokens(context, saved, data)
        context.clear()
        why, cache_types = "", _cache_types(context)
        if saved.build != context.model.build:
            why = f"it was saved by another build of the library ({saved.build})"
        elif saved.cache_types != cache_types:
            why = f"its cache is {'/'.join(saved.cache_types)}, this one {'/'.join(cache_types)}"
        elif not _load(context, saved, tokens, data):
            why = "the library does not take its state"
    if why:
        words = next((at for at, token in enumerate(tokens) if token < 0), len(tokens))  # an image is not in the file
        console.warn(
            f"{path.name}: {why}; reading {'its' if words == saved.tokens else 'the first'} {words} tokens again"
        )
        context.decode_prompt(tokens[:words], interrupt)
    return saved


def _cache_types(context: Context) -> tuple[str, str]:
    settings = context.settings
    return (settings.text("type_k"), settings.text("type_v")) if settings else ("", "")


def _statement(context: Context, written: int, note: Mapping[str, object]) -> dict[str, object]:
    assert context.model.path is not None
    return {
        "model": context.model.identity,
        "model_name": context.model.path.name,
        "build": context.model.build,
        "n_ctx": context.n_ctx,
        "cache_types": list(_cache_types(context)),
        "adapters": [[adapter.identity, scale] for adapter, scale in context.adapters],
        "tokens": len(context.cached),
        "exact": context.exact,
        "checkpoints": [[kept.tokens, len(kept.state)] for kept in context.checkpoints],
        "library_bytes": written,
        "note": dict(note),
    }


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes; sessions are replaced whole and never changed, so they stay while they are read."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise _no_session(path)
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read", evidence=str(error), hint="check the path") from error
    with data:
        yield data


def _read(path: Path, data: mmap.mmap) -> Saved:
    foot = data[-_FOOTER.size :]
    if len(foot) < _FOOTER.size or foot[: len(_MAGIC)] != _MAGIC:
        if data[: len(_LIBRARY_MAGIC)] == _LIBRARY_MAGIC:
            raise _damaged(path, "it ends too early, or was saved by another program")
        raise _no_session(path)
    _, version, length, _ = _FOOTER.unpack(foot)
    if version != FORMAT:
        raise ArtifactError(
            f"{path.name} is a session of format {version}, this runtime reads {FORMAT}",
            hint="delete it and start a new one",
        )
    end = len(data) - _FOOTER.size
    if length > min(_MOST_STATEMENT_BYTES, end):
        raise _damaged(path, "its statement is longer than it")
    saved = _parse(path, data[end - length : end])
    head = data[: _LIBRARY_HEAD.size]
    blobs = sum(blob for _, blob in saved.checkpoints)
    if head != _LIBRARY_HEAD.pack(_LIBRARY_MAGIC, _library_version(head), saved.tokens) or (
        saved.library_bytes + blobs + length != end
    ):
        raise _damaged(path, "its parts do not add up to its size")
    return saved


def _parse(path: Path, raw: bytes) -> Saved:
    try:
        match json.loads(raw):
            case {
                "model": str(model),
                "model_name": str(model_name),
                "build": str(build),
                "n_ctx": int(n_ctx),
                "cache_types": [str(type_k), str(type_v)],
                "adapters": list(adapters),
                "tokens": int(tokens),
                "exact": int(exact),
                "checkpoints": list(checkpoints),
                "library_bytes": int(library_bytes),
                "note": dict(note),
            } if tokens > 0 and 0 <= exact <= tokens and all(0 < n <= tokens and size > 0 for n, size in checkpoints):
                return Saved(
                    path=path,
                    model=model,
                    model_name=model_name,
                    build=build,
                    n_ctx=n_ctx,
                    cache_types=(type_k, type_v),
                    adapters=tuple((str(identity), float(scale)) for identity, scale in adapters),
                    tokens=tokens,
                    exact=exact,
                    checkpoints=tuple((int(count), int(size)) for count, size in checkpoints),
                    library_bytes=library_bytes,
                    note=note,
                )
    except (ValueError, TypeError, RecursionError):
        pass
    raise _damaged(path, "its statement cannot be read")


def _require_same(context: Context, saved: Saved) -> None:
    assert context.model.path is not None
    if saved.model != context.model.identity:
        raise UsageError(
            f"{saved.path.name} is a session with another model",
            evidence=f"saved with {saved.model_name}; loaded is {context.model.path.name}, which differs",
            hint=f"load {saved.model_name} as it was then, or start a new session",
        )
    if saved.adapters != tuple((adapter.identity, scale) for adapter, scale in context.adapters):
        raise UsageError(
            f"{saved.path.name} was saved with other LoRA adapters or scales",
            evidence=f"saved with {len(saved.adapters)} at {[scale for _, scale in saved.adapters]}, "
            f"loaded are {len(context.adapters)} at {[scale for _, scale in context.adapters]}",
            hint="give the same --lora FILE=SCALE, in the same order",
        )
    if saved.tokens > context.n_ctx:
        raise UsageError(
            f"{saved.path.name} holds {saved.tokens} tokens, the context {context.n_ctx}",
            hint=f"--n-ctx {saved.n_ctx} is what it was saved with",
        )


def _require_whole(path: Path, data: mmap.mmap) -> None:
    end = len(data) - _FOOTER.size
    with memoryview(data) as view, view[:end] as checked:
        if _FOOTER.unpack(data[end:])[3] != zlib.crc32(checked):
            raise _damaged(path, "its CRC-32 is not the one it was saved with")


def _tokens(context: Context, saved: Saved, data: mmap.mmap) -> list[int]:
    tokens = array("i", data[_LIBRARY_HEAD.size : _LIBRARY_HEAD.size + 4 * saved.tokens])
    if len(tokens) != saved.tokens or max(tokens) >= context.model.n_vocab:  # below 0: a part of an image
        raise _damaged(saved.path, "it holds tokens that the model does not have")
    return tokens.tolist()


def _load(context: Context, saved: Saved, tokens: list[int], data: mmap.mmap) -> bool:
    """Let the library read its part; False, with an empty cache, when it refuses."""
    room, count = (ctypes.c_int32 * len(tokens))(), ctypes.c_size_t()
    taken = context.model.lib.llama_state_seq_load_file(
        context.handle, os.fsencode(saved.path), 0, room, len(tokens), ctypes.byref(count)
    )
    if not taken:
        context.clear()
    if not taken or not context.fill(tokens, saved.exact):
        return False
    at = saved.library_bytes
    for held, size in saved.checkpoints:
        context.checkpoints.add(Checkpoint(tokens=held, state=data[at : at + size]))
        at += size
    return True


def _library_version(head: bytes) -> int:
    return int.from_bytes(head[4:8], "little")


def _no_session(path: Path) -> UsageError:
    return UsageError(f"{path} is not a session", hint="name a file that was saved as one")


def _damaged(path: Path, how: str) -> ArtifactError:
    return ArtifactError(f"the session {path.name} is damaged: {how}", hint="delete it and start a new one")
