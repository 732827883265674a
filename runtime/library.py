"""The importer of llama_cpp (beside one child, bench/peer_llama_cpp.py): bindings held against their library first."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, Final

from runtime.library_log import LibraryLog
from toolchain.base import console
from toolchain.base.abi_verdict import require_agreement
from toolchain.base.command import CUDA_DEFAULTS, OPENMP_DEFAULTS
from toolchain.base.errors import MissingError

_MEND: Final = "run `./inv build`, and unset LLAMA_CPP_LIB_PATH if it is set"
_F16: Final = 1  # enum ggml_type in ggml.h, the default type of the cache


def import_library() -> Any:
    """The module ``llama_cpp.llama_cpp``.

    Raises MissingError without a usable library, ArtifactError when the structs that the bindings declare are not
    those of the library; warns where nobody can say (bindings that were not built here).
    """
    for name, value in (*OPENMP_DEFAULTS.items(), *CUDA_DEFAULTS.items()):
        os.environ.setdefault(name, value)  # read when the library is loaded, CUDA's when it first counts devices
    try:
        import llama_cpp.llama_cpp as lib
    except ModuleNotFoundError as error:
        raise MissingError("llama_cpp is not installed", evidence=str(error), hint="run `./inv build`") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise MissingError("llama_cpp does not go with its library", evidence=str(error), hint=_MEND) from error
    if unknown := require_agreement(Path(lib.__file__).parent, Path(lib._lib._name), [lib]):
        console.warn(f"{unknown}; `./inv doctor` says more")
        defaults = lib.llama_context_default_params()
        if (defaults.type_k, defaults.type_v) != (_F16, _F16):
            raise MissingError(
                "llama_cpp and its library disagree about the layout of llama_context_params",
                evidence=f"default cache types read as {defaults.type_k} and {defaults.type_v}, f16 is {_F16}",
                hint=_MEND,
            )
    return lib


def import_vision_library(lib: Any, log: LibraryLog) -> Any:
    """The module ``llama_cpp.mtmd_cpp``, libmtmd's bindings, with its messages in ``log``; errors as of the above."""
    try:
        import llama_cpp.mtmd_cpp as mtmd
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        what = "this build of llama_cpp cannot read images"
        raise MissingError(what, evidence=str(error), hint=_MEND) from error
    require_agreement(Path(mtmd.__file__).parent, Path(mtmd._libmtmd._name), [mtmd])
    callback = lib.llama_log_callback(log.write)
    mtmd.mtmd_helper_log_set(callback, None)  # and libmtmd's own
    _vision_routes[:] = [callback]
    return mtmd


_vision_routes: list[Any] = []
_routes: list[Any] = []  # the library keeps a callback's address, so none may be collected that it may return to


def route_log(lib: Any, verbose: bool) -> LibraryLog:
    """The library's log from now on, or until one that was in use before is set again.

    Routes nest: what stands behind the one in use now was left when that one was set again, and is dropped.
    """
    current, data = ctypes.c_void_p(), ctypes.c_void_p()
    ctypes.CDLL(lib._lib._name).llama_log_get(ctypes.byref(current), ctypes.byref(data))
    while _routes and ctypes.cast(_routes[-1], ctypes.c_void_p).value != current.value:
        _routes.pop()
    log = LibraryLog(shown=verbose)
    callback = lib.llama_log_callback(log.write)
    lib.llama_log_set(callback, None)
    _routes.append(callback)
    return log
