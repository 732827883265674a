"""Which weights of a base the adapter goes on: the recipe's words and names -> GGUF tensor suffixes, in one spelling.

A suffix is what stands between ``blk.N.`` and ``.weight``: attn_q, ffn_down. Stacked experts are no linear layers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Final

from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader

_MATRIX: Final = re.compile(r"blk\.\d+\.(?P<suffix>\w+)\.weight")
_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "all-linear": ("attn_", "ffn_"),
    "attention": ("attn_",),
    "feed-forward": ("ffn_",),
}
_ROUTER: Final = "ffn_gate_inp"
# transformers' names of Llama and those that follow it, by gguf-py's tensor_mapping.py
_SPELLED: Final[Mapping[str, str]] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "qkv_proj": "attn_qkv",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "c_fc": "ffn_up",
    "down_proj": "ffn_down",
}


def target_suffixes(headers: Sequence[GgufHeader], asked: Sequence[str] | str) -> tuple[str, ...]:
    """The suffixes that ``asked`` means in this base, sorted. UsageError for a name that it has no matrix of."""
    there = sorted({suffix for suffix, _, _ in adaptable(headers)})
    if isinstance(asked, str):
        found = [suffix for suffix in there if suffix.startswith(_WORDS[asked]) and not suffix.startswith(_ROUTER)]
        if not found:
            raise UsageError(
                f"{headers[0].path.name} ({headers[0].architecture}) has no matrix that `targets: {asked}` means",
                evidence=f"it has: {', '.join(there) or 'none'}",
                hint="name them in adapter.targets",
            )
        return tuple(found)
    wanted = [_SPELLED.get(name, name) for name in asked]
    for name, typed in zip(wanted, asked, strict=True):
        if name not in there:
            near = difflib.get_close_matches(typed, [*there, *_SPELLED], n=1)
            raise UsageError(
                f"adapter.targets: {headers[0].path.name} has no {typed}",
                evidence=f"it has: {', '.join(there)}",
                hint=f"did you mean {near[0]}?" if near else "name some of these, or all-linear",
            )
    return tuple(sorted(set(wanted)))


def adaptable(headers: Sequence[GgufHeader]) -> list[tuple[str, int, int]]:
    """(suffix, inputs, outputs) of every matrix in the blocks, in the file's order."""
    found = []
    for header in headers:
        for tensor in header.tensors:
            match = _MATRIX.fullmatch(tensor.name)
            if match and len(tensor.shape) == 2:
                found.append((match["suffix"], tensor.shape[0], tensor.shape[1]))
    return found
