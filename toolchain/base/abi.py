"""Do the Python bindings and the compiled library mean the same structs and constants?

The bindings declare llama.cpp's structs once more, in ctypes. Where the two differ, the library reads memory
that Python never wrote. Here both sides are plain numbers and are compared by name; ``toolchain.build.abi``
gets the library's side from a C compiler.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

from toolchain.base.errors import ArtifactError

CONSTANT = re.compile(r"[A-Z][A-Z0-9]*_[A-Z]\w*")


class Field(NamedTuple):
    """A field of a struct; offset and size in bytes. ``value.val_i64`` is a member of a union ``value``."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Struct:
    """A struct of ``size`` bytes and its fields in memory order."""

    size: int
    fields: tuple[Field, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Structs and integer constants by name.

    ``unchecked`` are names of the bindings that the C headers at hand cannot speak of: their header is not
    there, or they were never part of it.
    """

    structs: Mapping[str, Struct]
    constants: Mapping[str, int]
    unchecked: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, object]:
        """As JSON takes it; a field is one line, ``NAME OFFSET SIZE``."""
        return {
            "structs": {
                name: {"size": struct.size, "fields": [f"{f.name} {f.offset} {f.size}" for f in struct.fields]}
                for name, struct in self.structs.items()
            },
            "constants": dict(self.constants),
            "unchecked": list(self.unchecked),
        }

    @staticmethod
    def from_json(value: object) -> Layout:
        """What ``to_json`` wrote; ArtifactError for anything else."""
        match value:
            case {"structs": dict(structs), "constants": dict(constants), "unchecked": list(unchecked)}:
                pass
            case _:
                raise _not_a_layout("structs, constants and unchecked are wanted")
        try:
            return Layout(
                structs={
                    str(name): Struct(
                        size=int(struct["size"]), fields=tuple(_field(*line.split(" ")) for line in struct["fields"])
                    )
                    for name, struct in structs.items()
                },
                constants={str(name): int(number) for name, number in constants.items()},
                unchecked=tuple(str(name) for name in unchecked),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _not_a_layout(f"{type(error).__name__}: {error}") from error


def declared_layout(modules: Iterable[ModuleType]) -> Layout:
    """What imported ctypes bindings declare: their Structures with fields, and their integer constants.

    A Structure without fields stands for a C type that is only pointed to, and is left out. A union that is a
    field is listed with its members, since C may have it without a name.
    """
    structs: dict[str, Struct] = {}
    constants: dict[str, int] = {}
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, ctypes.Structure):
                if fields := _declared_fields(value):
                    structs[value.__name__] = Struct(size=ctypes.sizeof(value), fields=fields)
            elif isinstance(value, int) and not isinstance(value, bool) and CONSTANT.fullmatch(name):
                constants[name] = int(value)
    return Layout(structs=structs, constants=constants)


def compare(declared: Layout, compiled: Layout) -> tuple[str, ...]:
    """One sentence per fault, naming struct and field, or constant; empty when the bindings are right.

    What only C has is no fault, except for a field of a struct that both have. Names in
    ``compiled.unchecked`` are passed over.
    """
    skipped = frozenset(compiled.unchecked)
    faults: list[str] = []
    for name, struct in declared.structs.items():
        if found := compiled.structs.get(name):
            faults += _struct_faults(name, struct, found)
        elif name not in skipped:
            faults.append(f"struct {name}: in the bindings, not in C")
    for name, value in declared.constants.items():
        if name in compiled.constants:
            if (number := compiled.constants[name]) != value:
                faults.append(f"{name}: {value} in the bindings, {number} in C")
        elif name not in skipped:
            faults.append(f"{name}: in the bindings ({value}), not in C")
    return tuple(faults)


def _field(name: str, offset: str, size: str) -> Field:
    return Field(name, int(offset), int(size))


def _not_a_layout(why: str) -> ArtifactError:
    return ArtifactError("this is no ABI layout", evidence=why, hint="run `./inv build` to make it again")


def _declared_fields(struct: type[ctypes.Structure]) -> tuple[Field, ...]:
    """The fields of a Structure and of those that it extends, in order, unions with their members."""
    fields: list[Field] = []
    for owner in reversed(struct.__mro__):
        for name, kind, *_ in vars(owner).get("_fields_", ()):
            place = getattr(struct, name)
            fields.append(Field(name, place.offset, place.size))
            if isinstance(kind, type) and issubclass(kind, ctypes.Union):
                fields += [f._replace(name=f"{name}.{f.name}", offset=place.offset + f.offset) for f in _members(kind)]
    return tuple(fields)


def _members(union: type[ctypes.Union]) -> Iterator[Field]:
    for name, *_ in getattr(union, "_fields_", ()):
        place = getattr(union, name)
        yield Field(name, place.offset, place.size)


def _struct_faults(name: str, declared: Struct, compiled: Struct) -> list[str]:
    """Causes before consequences: where a field too many or out of order explains it, no shift is told."""
    theirs = {f.name: f for f in compiled.fields}
    ours = {f.name: f for f in _as_c_names(declared.fields, theirs)}
    missing = [f for f in ours.values() if f.name not in theirs]
    extra = [f for f in theirs.values() if f.name not in ours]
    faults: list[str] = []
    for lost in missing:
        if renamed := next((f for f in extra if f[1:] == lost[1:]), None):
            extra.remove(renamed)
            faults.append(f"{name}.{lost.name}: called {renamed.name} in C ({_place(renamed)})")
        else:
            faults.append(f"{name}.{lost.name}: in the bindings ({_place(lost)}), not in C")
    faults += [f"{name}.{new.name}: in C ({_place(new)}), not in the bindings" for new in extra]
    pairs = [(f, theirs[f.name]) for f in ours.values() if f.name in theirs]
    faults += [f"{name}.{f.name}: {f.size} bytes in the bindings, {c.size} in C" for f, c in pairs if f.size != c.size]
    faults += _order_faults(name, pairs)
    if faults:
        return faults
    if shifted := next(((f, c) for f, c in pairs if f.offset != c.offset), None):
        return [f"{name}.{shifted[0].name}: at offset {shifted[0].offset} in the bindings, {shifted[1].offset} in C"]
    if declared.size != compiled.size:
        return [f"{name}: {declared.size} bytes in the bindings, {compiled.size} in C"]
    return []


def _order_faults(name: str, pairs: list[tuple[Field, Field]]) -> list[str]:
    """Fields of both sides that follow each other differently; members of a union begin at one offset."""
    ours = [f.name for f, _ in sorted(pairs, key=lambda pair: (pair[0].offset, pair[0].name))]
    theirs = [c.name for _, c in sorted(pairs, key=lambda pair: (pair[1].offset, pair[1].name))]
    moved = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    if not moved:
        return []
    one, other = (", ".join(side) for side in zip(*moved, strict=True))
    return [f"{name}: the order is {one} in the bindings, {other} in C"]


def _as_c_names(fields: tuple[Field, ...], c_names: Mapping[str, Field]) -> list[Field]:
    """A union that C knows by its name is one field; the members of one without a name are the struct's own."""
    unions = {f.name.partition(".")[0] for f in fields if "." in f.name}
    kept: list[Field] = []
    for f in fields:
        head, _, member = f.name.partition(".")
        if head in unions and head not in c_names:
            if member:
                kept.append(f._replace(name=member))
        elif not member:
            kept.append(f)
    return kept


def _place(f: Field) -> str:
    return f"{f.size} bytes at offset {f.offset}"
