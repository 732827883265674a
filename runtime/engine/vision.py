"""Sight: llama.cpp's libmtmd turns images into embeddings, which are decoded between the tokens of a prompt.

In the cache an image is known by numbers below 0, one for each of its positions, drawn from a hash of its content and
of the vision part that read it. So a prompt with the same images goes on from the cache, and one with others does not.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import secrets
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from runtime.engine.context import Context, too_large
from runtime.engine.identity import gguf_identity
from runtime.engine.images import Picture, decode_image
from runtime.engine.model import Model
from runtime.engine.seen import Part, Seen, Span, words
from runtime.library import import_vision_library
from runtime.library_log import OUT_OF_MEMORY
from toolchain.base import console
from toolchain.base.errors import ArtifactError, FoundryError, MemoryFitError, UsageError

_TEXT: Final = 0  # enum mtmd_input_chunk_type in mtmd.h
_REMEMBERED: Final = 16
"""Images whose prepared pixels are kept, a few megabytes each."""
_MOST_SHRINKS: Final = 4
_SHRINK: Final = 0.97  # sides are rounded to whole patches, and words stand around the picture


class Vision:
    """The vision part of a model in memory. Made by ``open_vision``; ``close`` frees it, before its model."""

    def __init__(self, *, mtmd: Any, model: Model, handle: Any, marker: str, path: Path, most_cells: int) -> None:
        self.marker = marker
        self._most_cells = most_cells
        self.path = path
        self.identity = gguf_identity(path)
        self._mtmd = mtmd
        self._model = model
        self._handle = handle
        self._known: dict[str, tuple[Part, ...]] = {}

    def close(self) -> None:
        """Free it; a second call does nothing."""
        if self._handle:
            self._mtmd.mtmd_free(self._handle)
        self._handle = None

    def see(self, prompt: str, images: Sequence[bytes]) -> Seen:
        """``prompt`` with an image file of ``images`` for each ``marker`` in it.

        Raises UsageError for an image that cannot be read, as many markers as there are not images, and a prompt that
        ends in an image.
        """
        seen = Seen(self, self._composed(prompt, images))
        if not seen.tokens or seen.tokens[-1] < 0:
            raise UsageError("a prompt ends in words, not in an image", hint="ask something about the image")
        return seen

    def count(self, prompt: str, images: Sequence[bytes]) -> int:
        """Cells that ``see`` of the same takes; cheap for images that were among the last ones."""
        return sum(part.cells for part in self._composed(prompt, images))

    def look(self, context: Context, span: Span, length: int) -> None:
        """Encode a picture of a prompt of ``length`` positions; what comes out is decoded behind what the cache holds.

        Raises UsageError for one that has to be in one micro-batch and is not, MemoryFitError without room.
        """
        mtmd, log, part = self._mtmd, self._model.log, span.part
        rows = context.rows_at_once
        if part.cells > rows and mtmd.mtmd_decode_use_non_causal(self._handle, part.chunk):
            raise UsageError(
                f"this model reads an image in one piece, of {part.cells} tokens; a micro-batch has {rows}",
                hint=f"--n-ubatch {-(-part.cells // 256) * 256}",
            )
        log.begin()
        reached = ctypes.c_int32()
        arguments = (part.chunk, span.start, 0, rows, False, ctypes.byref(reached))
        status = mtmd.mtmd_helper_eval_chunk_single(self._handle, context.handle, *arguments)
        if status:
            context.keep(span.start)
            evidence = log.tail()
            if status == 1 and "decode" in evidence:
                raise MemoryFitError("the cache has no room for the image", evidence=evidence, hint="raise --n-ctx")
            if OUT_OF_MEMORY.search(evidence):
                raise too_large("no memory left to read the image", evidence)
            raise FoundryError(f"the library failed to read the image (status {status})", evidence=evidence)
        assert reached.value == span.end  # the positions are counted as the library counts them
        context.extend(part.tokens, length)

    def _composed(self, prompt: str, images: Sequence[bytes]) -> Iterator[Part]:
        """As ``mtmd_tokenize`` would have it: each stretch of words is tokenized by itself."""
        first, *others = prompt.split(self.marker)
        if len(others) != len(images):
            what = f"the prompt has room for {len(others)} images, and {len(images)} are given"
            raise UsageError(what, hint="one marker an image")
        yield words(self._model.tokenize(first))
        for image, text in zip(images, others, strict=True):
            yield from self._parts(image)
            yield words(self._model.tokenize_bare(text))

    def _parts(self, image: bytes) -> tuple[Part, ...]:
        """What the library makes of an image; remembered for the last ones."""
        name = hashlib.sha256(image).hexdigest()
        found = self._known.pop(name, None) or tuple(self._read(name, image))
        self._known[name] = found
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return found

    def _read(self, name: str, image: bytes) -> Iterator[Part]:
        """One that would take more than its share of the context is made smaller, where that makes it take less."""
        mtmd, whole = self._mtmd, decode_image(image)
        picture, owner = whole, self._prepared(whole)
        cells = mtmd.mtmd_helper_get_n_tokens(owner.handle)
        for _ in range(_MOST_SHRINKS):
            if cells <= self._most_cells:
                break
            smaller = picture.shrunk(math.sqrt(self._most_cells / cells) * _SHRINK)
            fewer = self._prepared(smaller)
            if mtmd.mtmd_helper_get_n_tokens(fewer.handle) >= cells:
                break
            picture, owner, cells = smaller, fewer, mtmd.mtmd_helper_get_n_tokens(fewer.handle)
        if picture is not whole:
            sizes = f"{whole.width} x {whole.height} pixels is read at {picture.width} x {picture.height}"
            console.warn(f"an image of {sizes}, {cells} tokens: it may fill half of the context (--n-ctx)")
        name = f"{name} {picture.width} {picture.height}"
        for index in range(mtmd.mtmd_input_chunks_size(owner.handle)):
            chunk = mtmd.mtmd_input_chunks_get(owner.handle, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == _TEXT:
                yield words(self._text_of(chunk))
            else:
                tokens = self._stand_ins(f"{name} {index}", mtmd.mtmd_input_chunk_get_n_pos(chunk))
                cells = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                yield Part(tokens=tuple(tokens), cells=cells, chunk=chunk, owner=owner)

    def _prepared(self, picture: Picture) -> _Chunks:
        mtmd, found, raw = self._mtmd, _Chunks(self._mtmd), self.marker.encode()
        text = mtmd.mtmd_input_text(text=raw, text_len=len(raw), add_special=False, parse_special=True)
        bitmap = self._bitmap(picture)
        try:
            given = (ctypes.c_void_p * 1)(bitmap)
            self._model.log.begin()
            if mtmd.mtmd_tokenize(self._handle, found.handle, ctypes.byref(text), given, 1):
                evidence = self._model.log.tail()
                raise UsageError("the vision part does not take this image", evidence=evidence, hint="send another")
        finally:
            mtmd.mtmd_bitmap_free(bitmap)
        return found

    def _bitmap(self, picture: Picture) -> Any:
        """Of pixels decoded here: the library hands a file that it cannot read to a video player as a child process."""
        rgb = (ctypes.c_uint8 * len(picture.rgb)).from_buffer_copy(picture.rgb)
        return self._mtmd.mtmd_bitmap_init(picture.width, picture.height, rgb)

    def _text_of(self, chunk: Any) -> list[int]:
        count = ctypes.c_size_t()
        tokens = self._mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return list(tokens[: count.value]) if tokens else []

    def _stand_ins(self, name: str, count: int) -> list[int]:
        """``count`` numbers in [-2^31, -1]."""
        digest = hashlib.shake_256(f"{self.identity} {name}".encode()).digest(4 * count)
        return [-1 - (number & 0x7FFFFFFF) for number in array("I", digest)]


class _Chunks:
    """What the library keeps of one image, freed with the last part of it."""

    def __init__(self, mtmd: Any) -> None:
        self.handle = mtmd.mtmd_input_chunks_init()
        weakref.finalize(self, mtmd.mtmd_input_chunks_free, self.handle)


def open_vision(path: Path, model: Model, *, n_threads: int, on_gpu: bool, most_cells: int) -> Vision:
    """The vision part at ``path`` in memory, for ``model``; an image shall not take more than ``most_cells`` tokens.

    Raises UsageError when the file is none or belongs to another model, MemoryFitError when memory runs out.
    """
    mtmd = import_vision_library(model.lib, model.log)
    marker = f"<__image_{secrets.token_hex(8)}__>"
    params = mtmd.mtmd_context_params_default()
    params.media_marker = marker.encode()
    params.n_threads = n_threads
    params.use_gpu = on_gpu
    params.print_timings = False
    model.log.begin()
    handle = mtmd.mtmd_init_from_file(os.fsencode(path), model.handle, params)
    if not handle:
        evidence = model.log.tail()
        if OUT_OF_MEMORY.search(evidence):
            raise too_large(f"{path.name} does not fit in memory", evidence)
        if "mismatch" in evidence:
            raise UsageError(
                f"{path.name} is the vision part of another model",
                evidence=evidence,
                hint="take the mmproj file that was published with this model",
            )
        raise ArtifactError(
            f"the library refuses {path.name}",
            evidence=evidence,
            hint="the file may be made for a newer llama.cpp: see `./inv build --source`",
        )
    if not mtmd.mtmd_support_vision(handle):
        mtmd.mtmd_free(handle)
        raise UsageError(f"{path.name} hears and does not see", hint="name a vision part (mmproj)")
    return Vision(mtmd=mtmd, model=model, handle=handle, marker=marker, path=path, most_cells=most_cells)
