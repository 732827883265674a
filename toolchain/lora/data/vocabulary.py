"""A base's vocabulary at work, in llama.cpp itself; for ``child``, which alone may import llama_cpp.

Tokens are made by the library that the result will run in. transformers rebuilds a tokenizer from a GGUF for some
architectures only, and does not promise the same tokens; here both sides are the same code.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolchain.base.abi_verdict import require_agreement
from toolchain.base.errors import ArtifactError, MissingError, UsageError
from toolchain.lora.data.split import Span, cut_points
from toolchain.lora.dataset_file import Tokens

PIECE_BYTES: Final = 64 << 10
"""A text is tokenized in parts of this size: the tokenizers' time and memory grow faster than their input."""
_STACK_BYTES: Final = 112 << 20  # Linux keeps 128 MiB free below the main thread's stack
_LINE: Final = b"\n"
_TOLD_LEVELS: Final = (3, 4)  # GGML_LOG_LEVEL_WARN and _ERROR in ggml.h
_MMAP: Final = 1  # LLAMA_LOAD_MODE_MMAP in llama.h
_F32: Final = 0  # GGML_TYPE_F32 in ggml.h


def import_library() -> Any:
    """The module ``llama_cpp.llama_cpp``; its warnings are kept for errors. MissingError without a usable one."""
    _deepen_stack()
    try:
        import llama_cpp.llama_cpp as lib
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise MissingError("llama_cpp cannot be used", evidence=str(error), hint="run `./inv build`") from error
    require_agreement(Path(lib.__file__).parent, Path(lib._lib._name), [lib])
    callback = lib.llama_log_callback(_tell)
    _told_by[:] = [callback]
    lib.llama_log_set(callback, None)
    lib.llama_backend_init()
    return lib


@contextmanager
def open_vocabulary(lib: Any, base: Path) -> Iterator[Vocabulary]:
    """The vocabulary of the GGUF at ``base``, without its weights; ArtifactError when the library refuses it."""
    params = lib.llama_model_default_params()
    params.vocab_only = True
    with _model(lib, base, params) as handle:
        yield Vocabulary(lib, lib.llama_model_get_vocab(handle), base.name)


class Vocabulary:
    """Text to tokens as ``runtime.engine.model`` makes them: special tokens parsed, BOS exactly once if it is wanted.

    ``end`` is what ends a reply that no template ends: EOS, else EOT, else None.
    """

    def __init__(self, lib: Any, handle: Any, name: str) -> None:
        self._lib, self._handle = lib, handle
        self.n_vocab = int(lib.llama_vocab_n_tokens(handle))
        if self.n_vocab == 0:
            raise ArtifactError(f"{name} has no vocabulary", hint="a base for training needs its tokenizer inside")
        bos = int(lib.llama_vocab_bos(handle))
        self._bos = bos if bos >= 0 and lib.llama_vocab_get_add_bos(handle) else None
        ends = (int(lib.llama_vocab_eos(handle)), int(lib.llama_vocab_eot(handle)))
        self.end = next((token for token in ends if token >= 0), None)
        self._buffer = np.empty(1 << 16, np.int32)
        self._line = self.bare(_LINE)

    def tokens(self, text: str) -> list[int]:
        """What the runtime feeds for ``text``."""
        tokens: list[int] = self.bare(text.encode()).tolist()
        return tokens if self._bos is None or tokens[:1] == [self._bos] else [self._bos, *tokens]

    def continued(self, raw: bytes) -> Tokens:
        """Tokens of a text that goes on behind another one, without the space that SentencePiece begins with.

        It is tokenized behind a line break, whose tokens are taken off again.
        """
        behind = self.bare(_LINE + raw)
        head = len(self._line)
        if behind[:head].tolist() == self._line.tolist():
            return behind[head:]
        return self.bare(raw)

    def document(self, data: bytes, span: Span) -> Iterator[Tokens]:
        """The tokens of ``data[span]`` as a text of its own, in parts that together are those of the whole."""
        places = [span[0], *cut_points(data, span, PIECE_BYTES), span[1]]
        for number, (start, end) in enumerate(itertools.pairwise(places)):
            if number:
                yield self.continued(data[start:end])
                continue
            tokens = self.bare(data[start:end])
            missing = self._bos is not None and tokens[:1].tolist() != [self._bos]
            yield np.concatenate([np.array([self._bos], np.int32), tokens]) if missing else tokens

    def bare(self, raw: bytes) -> Tokens:
        """Tokens of ``raw`` alone, nothing added but the tokenizer's own leading space."""
        if len(self._buffer) < len(raw) + 8:  # hardly any tokenizer makes more tokens than bytes
            self._buffer = np.empty(len(raw) + 8, np.int32)
        count = self._tokenize(raw)
        if -(2**31) < count < 0:
            self._buffer = np.empty(-count, np.int32)
            count = self._tokenize(raw)
        if count < 0:
            raise UsageError(f"a text of {len(raw)} bytes cannot be tokenized", hint="cut it into several examples")
        return self._buffer[:count].copy()

    def ends_reply(self, token: int) -> bool:
        """Whether a generation stops at ``token``."""
        return bool(self._lib.llama_vocab_is_eog(self._handle, token))

    def _tokenize(self, raw: bytes) -> int:
        place = self._buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        return int(self._lib.llama_tokenize(self._handle, raw, len(raw), place, len(self._buffer), False, True))


def library_logits(lib: Any, base: Path, ids: Sequence[int], n_threads: int) -> NDArray[np.float32]:
    """(len(ids), n_vocab) logits of ``base`` on ``ids``, computed on the CPU with a cache of f32.

    The weights stay where the file is mapped: no device, no repacked copy. ArtifactError when they make no numbers.
    """
    no_devices = (ctypes.c_void_p * 1)(None)  # a list that ends at once
    params = lib.llama_model_default_params()
    params.devices = ctypes.addressof(no_devices)
    params.n_gpu_layers = 0
    params.load_mode = _MMAP
    params.use_extra_bufts = False
    with _model(lib, base, params) as model:
        context = lib.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = len(ids)
        context.n_threads = context.n_threads_batch = n_threads
        context.type_k = context.type_v = _F32
        context.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED: the kernels for f32 are the plain ones
        context.offload_kqv = context.op_offload = False
        handle = lib.llama_init_from_model(model, context)
        if not handle:
            raise ArtifactError(f"the library makes no context for {base.name}", hint="read the log")
        try:
            return _logits(lib, handle, ids, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
        finally:
            lib.llama_free(handle)


def _logits(lib: Any, context: Any, ids: Sequence[int], n_vocab: int) -> NDArray[np.float32]:
    batch = lib.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if status := lib.llama_decode(context, batch):
            raise ArtifactError("the library cannot compute with this base", evidence=f"llama_decode returned {status}")
        rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), shape=(n_vocab,)) for i in range(len(ids))]
        logits = np.stack(rows).astype(np.float32)
    finally:
        lib.llama_batch_free(batch)
    if not np.isfinite(logits).all():
        wrong = f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} logits are no numbers"
        raise ArtifactError("the base computes nothing", evidence=wrong, hint="its weights are damaged: fetch it again")
    return logits


@contextmanager
def _model(lib: Any, path: Path, params: Any) -> Iterator[Any]:
    handle = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not handle:
        raise ArtifactError(
            f"the library refuses {path.name}",
            evidence="\n".join(_told[-5:]),
            hint="the file may be made for a newer llama.cpp: see `./inv build --source`, or convert it again",
        )
    try:
        yield handle
    finally:
        lib.llama_model_free(handle)


def _deepen_stack() -> None:
    """Room for the tokenizers that go through std::regex, which calls itself for each character of a run.

    Without it 16,000 letters in a row end the process; with it, ``records.MAX_RUN`` and PIECE_BYTES are safe.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(hard, _STACK_BYTES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


_told: list[str] = []
_told_by: list[Any] = []  # the library keeps the callback's address


def _tell(level: int, text: bytes, _data: object) -> None:
    if level in _TOLD_LEVELS:
        _told.append(text.decode("utf-8", "replace").rstrip())
        del _told[:-50]
