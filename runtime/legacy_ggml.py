"""GGML ``.bin`` files of 2023 become GGUF on first use, by the pinned llama.cpp's own converter; the original stays.

The GGUF lies beside the original as ``X.bin.gguf``, or in FOUNDRY_HOME's folder ``work`` where that one cannot take it,
with a note ``X.bin.gguf.from.json`` of what it was made from: while that holds, no process is started.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final, TypeAlias

from runtime.legacy_header import MAGICS, LegacyHeader, read_legacy_header
from toolchain.base import command, console, files
from toolchain.base.errors import ArtifactError, FoundryError, MissingError, UsageError
from toolchain.base.gguf import GgufHeader, read_header

Stamp: TypeAlias = dict[str, int | str]

CONVERTER: Final = "convert_llama_ggml_to_gguf.py"
LAYERS_70B: Final = 80
"""Of Llama 2 70B, and of LLaMA 65B; the former alone has 8 heads of queries for each head of keys."""

_GQA_70B: Final = 8
_FORM: Final = 1
_MORE_BYTES: Final = 16 << 20  # metadata of the GGUF beyond what the original has
# The file says neither. The converter's own help: 1e-6 for LLaMA 1, 1e-5 for Llama 2; its default lies between.
_LLAMA_1: Final = ("5.0e-06", "2048")
_LLAMA_2: Final = ("1e-5", "4096")
_NAMED_LLAMA_2: Final = re.compile(r"(?<![a-z0-9])(?:[a-z]*llama[-_. ]?v?2|l2)(?!\d)|code[-_ ]?llama", re.IGNORECASE)
_NAMED_CODE_LLAMA: Final = re.compile(r"code[-_ ]?llama", re.IGNORECASE)
_MADE_BY: Final = "made by llama-foundry of"
_OTHERWISE: Final = "take the model in GGUF, or quantize the original weights through a recipe"


def is_legacy_ggml(path: Path) -> bool:
    """Whether the file at ``path`` begins as GGML, GGMF or GGJT do; False for what cannot be read."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) in MAGICS
    except OSError:
        return False


def converted(path: Path, *, is_70b: bool = False) -> Path:
    """The GGUF made of the ``.bin`` at ``path``: as it lies there from an earlier use, or made now.

    ``is_70b`` holds the file to be a Llama 2 70B; how its heads are grouped is read off its tensors in any case. Raises
    UsageError for a format that cannot be converted and for an ``is_70b`` that is wrong, ArtifactError for a file that
    lies or is cut, MissingError without room or converter, CommandError when the converter fails.
    """
    if is_70b:
        _require_70b_of(read_legacy_header(path))
    places, stamp = _places(path), _stamp(path)
    if place := _still_holding(places, stamp):
        return place
    header = read_legacy_header(path)
    with files.home_in_use(), files.locked(_lock(path), on_wait=_tell_wait):
        if place := _still_holding(places, stamp):  # another process made it meanwhile
            return place
        place = _place_with_room(places, header)
        _convert(header, stamp, place)
    return place


def require_70b(header: GgufHeader) -> None:
    """Raise UsageError, saying what the file is, unless ``header`` is that of a Llama with 70 billion weights."""
    groups = header.arch_ints("attention.head_count_kv") or (0,)
    heads = header.arch_int("attention.head_count") or 0
    grouped = min(groups) > 0 and all(heads == _GQA_70B * each for each in groups)
    if not (header.architecture == "llama" and header.n_layer == LAYERS_70B and grouped):
        size = _size(header.n_layer or 0, header.arch_int("embedding_length") or 0, header.n_params)
        raise _not_70b(header.path, f"{header.architecture}, {size}")


def find_converter() -> Path:
    """The pinned converter, with gguf-py beside it: in the current Toolchain, else in the source it was built from.

    Raises MissingError when neither has it.
    """
    toolchain = files.foundry_home() / "toolchains" / "current"
    if (carried := toolchain / "convert" / CONVERTER).is_file():
        return carried
    note = files.read_json(toolchain / "toolchain.json")
    pin, commit = (str(note.get(key)) for key in ("source", "commit")) if isinstance(note, dict) else ("", "")
    for tree, known in _trees(pin):
        if known in ("", commit) and (tree / CONVERTER).is_file():
            return tree / CONVERTER
    raise MissingError(
        "there is no converter for GGML files of 2023",
        evidence=f"looked for {CONVERTER} in {toolchain} and in the source tree of {pin or 'its llama.cpp'}",
        hint="run `./inv build`, which fetches llama.cpp's source",
    )


def _trees(pin: str) -> list[tuple[Path, str]]:
    """Folders of llama.cpp that ``pin`` stands for, each with its commit (empty: the pin is a folder)."""
    if pin.startswith("path:"):
        root = Path(pin.removeprefix("path:"))
        return [(root / "vendor" / "llama.cpp", ""), (root, "")]
    found = []
    for note in sorted((files.foundry_home() / "sources").glob("*/source.json")):
        match files.read_json(note):
            case {"pin": str(named), "llama": str(llama), "commit": str(commit)} if named == pin:
                found.append((note.parent / llama, commit))
    return found


def conversion_arguments(header: LegacyHeader) -> tuple[str, ...]:
    """What the file does not say: how heads are grouped by its tensors, whether it is Llama 2 by those or its name."""
    eps, n_ctx = _LLAMA_2 if _is_llama_2(header) else _LLAMA_1
    return ("--gqa", str(header.gqa), "--eps", eps, "--context-length", n_ctx)


def _is_llama_2(header: LegacyHeader) -> bool:
    return header.gqa > 1 or bool(_NAMED_LLAMA_2.search(header.path.name))


def _convert(header: LegacyHeader, stamp: Stamp, place: Path) -> None:
    path, note, converter = header.path, _note(place), find_converter()
    arguments = conversion_arguments(header)
    say = f"{_MADE_BY} {path.name} ({header.format}, {header.file_type})"
    child = (sys.executable, Path(__file__).with_name("legacy_child.py"), converter)
    with console.step(f"convert {path.name} to GGUF ({header.format}, {header.file_type}; once)"):
        note.unlink(missing_ok=True)
        with files.disk_errors(place), files.staged(place) as partial:
            target = ("--input", path.absolute(), "--output", partial, "--name", path.stem, "--desc", say)
            command.run(
                [*child, *target, *arguments],
                what=f"converting {path.name}",
                env={"PYTHONPATH": None, "NO_LOCAL_GGUF": None, "PYTHONDONTWRITEBYTECODE": "1"},
                log=files.home_dir("logs") / "convert-legacy.log",
                hint=_OTHERWISE,
            )
            _check_made(read_header(partial), header)
            if _stamp(path) != stamp:
                raise ArtifactError(f"{path.name} changed while it was converted", hint="run the command again")
        made = {"made_bytes": place.stat().st_size, "arguments": arguments, "converter": files.sha256_file(converter)}
        files.write_json(note, {**stamp, **made})
    if not _is_llama_2(header):
        eps, n_ctx = _LLAMA_1
        console.say(f"{path.name} does not say whether it is LLaMA 1 or 2: {n_ctx} tokens and an eps of {eps} are set")
    if _NAMED_CODE_LLAMA.search(path.name):
        console.warn(
            "Code Llama's rope base has no place in such files: beyond a short context a GGUF of it does better"
        )


def _check_made(made: GgufHeader, of: LegacyHeader) -> None:
    """Raise ArtifactError unless the GGUF is the LLaMA that the original is."""
    told = (made.architecture, made.n_layer, made.arch_int("embedding_length"), made.n_vocab, made.n_params)
    heads = (made.arch_int("attention.head_count"), made.arch_int("attention.head_count_kv"))
    wanted = ("llama", of.n_layer, of.n_embd, of.n_vocab, of.n_params)
    if told != wanted or heads != (of.n_head, of.n_head_kv):
        raise ArtifactError(
            f"the converter made another model of {of.path.name}",
            evidence=f"wanted  {wanted}, heads {of.n_head} and {of.n_head_kv}\nmade    {told}, heads {heads}",
            hint=_OTHERWISE,
        )


def _stamp(path: Path) -> Stamp:
    """What the original is known by."""
    stat = path.stat()
    return {"form": _FORM, "source": path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _still_holding(places: tuple[Path, ...], stamp: Stamp) -> Path | None:
    """The place with a GGUF that was made of this very original."""
    for place in places:
        noted = files.read_json(_note(place))
        if not isinstance(noted, dict) or any(noted.get(key) != value for key, value in stamp.items()):
            continue
        if place.is_file() and place.stat().st_size == noted.get("made_bytes"):
            return place
    return None


def _places(path: Path) -> tuple[Path, Path]:
    """Beside the original, and in FOUNDRY_HOME."""
    name = f"{path.name}.gguf"
    digest = files.sha256_text(str(path.resolve()))[:16]
    return path.with_name(name), files.foundry_home() / "work" / "legacy" / digest / name


def _place_with_room(places: tuple[Path, Path], header: LegacyHeader) -> Path:
    beside, at_home = places
    needed = header.file_bytes + _MORE_BYTES
    if os.access(beside.parent, os.W_OK) and _may_replace(beside):
        try:
            files.require_free(beside, needed, f"the GGUF of {header.path.name}")
        except MissingError:
            files.require_free(at_home, needed, f"the GGUF of {header.path.name}, there and beside it")
        else:
            return beside
    files.require_free(at_home, needed, f"the GGUF of {header.path.name}")
    return at_home


def _may_replace(place: Path) -> bool:
    """Whether nothing is there, or an earlier conversion of ours."""
    if not place.exists() or _note(place).exists():
        return True
    try:
        return (read_header(place).text("general.description") or "").startswith(_MADE_BY)
    except FoundryError:
        return False


def _note(place: Path) -> Path:
    return place.with_name(f"{place.name}.from.json")


def _lock(path: Path) -> Path:
    return files.home_dir("work") / "legacy" / f"{files.sha256_text(str(path.resolve()))[:16]}.lock"


def _tell_wait(holder: str) -> None:
    console.say(f"process {holder} converts the file; waiting for it")


def _require_70b_of(header: LegacyHeader) -> None:
    if not (header.n_layer == LAYERS_70B and header.gqa == _GQA_70B):
        raise _not_70b(header.path, f"{header.format}, {_size(header.n_layer, header.n_embd, header.n_params)}")


def _not_70b(path: Path, what: str) -> UsageError:
    return UsageError(f"{path.name} is no Llama 70B: {what}", hint="leave out is_70b: the file itself says what it is")


def _size(n_layer: int, n_embd: int, n_params: int) -> str:
    return f"{n_layer} layers of width {n_embd}, {_rounded(n_params)} parameters"


def _rounded(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
