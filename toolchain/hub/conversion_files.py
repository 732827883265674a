"""Which files of a repository on the hub conversion needs."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What convert_hf_to_gguf.py reads: model*.safetensors, else pytorch_model*.bin, from the top folder. The
# strict patterns pass over duplicates such as model.fp16.safetensors; the loose ones are the fallback.
_WEIGHTS = (
    (r"model([-_]\d+[-_]of[-_]\d+)?\.safetensors", "model.safetensors.index.json"),
    (r"model.*\.safetensors", "model.safetensors.index.json"),
    (r"pytorch_model([-_]\d+[-_]of[-_]\d+)?\.bin", "pytorch_model.bin.index.json"),
    (r"pytorch_model.*\.bin", "pytorch_model.bin.index.json"),
)
_BESIDE_WEIGHTS = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|vocab|tekken|chat_template|modules"
    r"|preprocessor_config|processor_config|video_preprocessor_config)\.json"
    r"|tokenizer[^/]*\.(json|model)|tokenizer\.model\.v\d+|vocab\.txt|merges\.txt|[^/]*\.tiktoken"
    r"|spiece\.model|sentencepiece\.bpe\.model|chat_template\.jinja|\d+_\w+/config\.json"
    r"|(README|LICEN[CS]E|NOTICE|USE_POLICY)(\.(md|txt))?",
    re.IGNORECASE,
)


def choose_files(names: Iterable[str]) -> tuple[str, ...]:
    """The names conversion needs, sorted; empty when there are no weights it can read.

    Never Python code, and no second copy of the weights in another format.
    """
    present = sorted(names)
    for pattern, index in _WEIGHTS:
        if weights := [name for name in present if re.fullmatch(pattern, name) and "/" not in name]:
            rest = [name for name in present if name == index or _BESIDE_WEIGHTS.fullmatch(name)]
            return tuple(sorted({*weights, *rest}))
    return ()
