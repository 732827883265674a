"""The ABI proof: what the bindings declare, against what a C compiler makes of the library's own headers.

A probe, one C program, prints the size of every struct that the bindings mirror, offset and size of every
field of it, and the value of every constant. The compiler is the judge of all numbers and of whether a name
exists; the headers are read here as well, but only for the names of fields that the bindings do not know.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from toolchain.base import command, files
from toolchain.base.abi import Field, Layout, Struct, compare
from toolchain.base.errors import ArtifactError, CommandError, FoundryError, MissingError
from toolchain.base.machine import Compiler

# In this order: older headers of llava lean on what ggml.h includes.
HEADERS = ("ggml.h", "gguf.h", "llama.h", "mtmd.h", "mtmd-helper.h", "clip.h", "llava.h")
FLAGS = ("-std=gnu11", "-w", "-fdiagnostics-color=never")
ENVIRONMENT = {"LC_ALL": "C"}  # diagnostics in English, which are read here

_BODY = re.compile(r"\b(struct|union)\s*(\w*)\s*\{")
_ENUM = re.compile(r"\benum\s*(\w*)\s*\{([^{}]*)\}")
_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"')
_FUNCTION_POINTER = re.compile(r"\(\s*\*[\s*]*(?:(?:const|restrict|volatile)\s+)*(\w+)")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the probe: what it asks, and the statement that prints the answer behind that key."""

    key: tuple[str, ...]
    expressions: tuple[str, ...]

    @property
    def statement(self) -> str:
        formats = " ".join(["%lld"] * len(self.expressions))
        values = ", ".join(f"(long long)({expression})" for expression in self.expressions)
        return f'printf("{" ".join(self.key)} {formats}\\n", {values});'


@dataclass(frozen=True, kw_only=True)
class Body:
    """A struct of the headers: how C spells it, and the names in it in order."""

    spelling: str
    names: tuple[str, ...]


def prove_abi(
    *,
    path: Path | None,
    include_dirs: Sequence[Path],
    compiler: Compiler,
    env: Mapping[str, str | None] | None = None,
) -> Layout:
    """The compiled layout of what the bindings below ``path`` (None: the installed ones) declare.

    Raises ArtifactError with one line per fault when they disagree; errors else as ``declared_by`` and
    ``compiled_layout``.
    """
    declared = declared_by(path, env=env)
    compiled = compiled_layout(declared, include_dirs=include_dirs, compiler=compiler)
    if faults := compare(declared, compiled):
        raise ArtifactError(
            f"the Python bindings disagree with the library's headers ({len(faults)} faults)",
            evidence="\n".join(faults),
            hint="the bindings must match llama.cpp's commit: build the default source, or a pin of llama-cpp-python",
        )
    return compiled


def declared_by(path: Path | None, *, env: Mapping[str, str | None] | None = None) -> Layout:
    """What the package llama_cpp in the folder ``path`` (None: the installed one) declares, asked of a child.

    Its library must be there, since importing it opens it; ``env`` is added to the child's environment. Raises
    ArtifactError when that fails.
    """
    places = [str(place) for place in (path, files.PROJECT_ROOT) if place]
    environment = {
        "PYTHONPATH": os.pathsep.join(places),
        **dict.fromkeys(("LLAMA_CPP_LIB_PATH", "LLAMA_CPP_LIB", "MTMD_CPP_LIB", "LLAVA_CPP_LIB")),
        **(env or {}),
    }
    child = Path(__file__).with_name("abi_child.py")
    try:
        output = command.run([sys.executable, "-P", child], what="reading the bindings", env=environment).output
        return Layout.from_json(json.loads(output.splitlines()[-1]))
    except (FoundryError, ValueError, IndexError) as error:
        raise ArtifactError(
            "the Python bindings cannot be imported",
            evidence=error.evidence if isinstance(error, FoundryError) else str(error),
            hint="the bindings must match llama.cpp's commit: build the default source, or a pin of llama-cpp-python",
        ) from error


def compiled_layout(declared: Layout, *, include_dirs: Sequence[Path], compiler: Compiler) -> Layout:
    """The same structs and constants as C has them, with all fields that C has, and the names it cannot judge.

    A name belongs to the header that its first word names (``mtmd_caps`` to mtmd.h). A struct is unchecked when
    that header is not in ``include_dirs``; a constant also when no enum of the headers has names like it: then it
    mirrors a private header or is the bindings' own. Raises MissingError without llama.h, CommandError when the
    headers do not compile as C.
    """
    headers = [name for name in HEADERS if any((folder / name).is_file() for folder in include_dirs)]
    if "llama.h" not in headers:
        raise MissingError(
            "the headers of llama.cpp are not there",
            evidence=f"no llama.h in {', '.join(map(str, include_dirs))}",
            hint="run `./inv build`",
        )
    with tempfile.TemporaryDirectory(dir=files.home_dir("work"), prefix="abi-") as scratch:
        probe = _Probe(folder=Path(scratch), compiler=compiler, include_dirs=tuple(include_dirs), headers=headers)
        text = probe.preprocessed()
        bodies = _bodies(text)
        answers = probe.ask([*_struct_checks(declared, bodies), *_constant_checks(declared)])
    structs = {name: _struct(name, answers) for kind, name, *_ in answers if kind == "size"}
    constants = {key[1]: numbers[0] for key, numbers in answers.items() if key[0] == "constant"}
    families = tuple(_families(text))
    unknown = [name for name in declared.structs if name not in structs and _header(name) not in headers]
    unknown += [
        name
        for name in declared.constants
        if name not in constants and (_header(name) not in headers or not name.startswith(families))
    ]
    return Layout(structs=structs, constants=constants, unchecked=tuple(unknown))


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """A folder to compile in, the compiler and the headers."""

    folder: Path
    compiler: Compiler
    include_dirs: tuple[Path, ...]
    headers: Sequence[str]

    def preprocessed(self) -> str:
        """The headers with comments and the insides of strings gone, conditions decided, macros replaced."""
        source = self.folder / "headers.c"
        source.write_text(self._includes())
        command.run(
            self._argv("-E", "-P", source, "-o", source.with_suffix(".i")),
            what="preprocessing the headers of llama.cpp",
            env=ENVIRONMENT,
        )
        return _STRING.sub('""', source.with_suffix(".i").read_text(errors="replace"))

    def ask(self, checks: Sequence[Check]) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The numbers of all checks that compile. Each stands on its own line, so the compiler's errors name
        those that do not; these are dropped and the rest is compiled again.
        """
        left = list(checks)
        while True:
            refused = self._compile(left)
            if not refused:
                break
            left = [check for number, check in enumerate(left) if number not in refused]
        output = command.capture([self.folder / "probe"], what="running the ABI probe")
        lines = (line.split() for line in output.splitlines())
        return {
            check.key: tuple(int(number) for number in words[len(check.key) :])
            for check, words in zip(left, lines, strict=True)
        }

    def _compile(self, checks: Sequence[Check]) -> set[int]:
        """Compile the probe; the positions of checks that the compiler refused, empty when it is made."""
        source, log = self.folder / "probe.c", self.folder / "probe.log"
        head = f"{self._includes()}int main(void) {{\n"
        source.write_text(head + "".join(f"{check.statement}\n" for check in checks) + "return 0;\n}\n")
        log.unlink(missing_ok=True)
        try:
            command.run(
                self._argv(source, "-o", self.folder / "probe"),
                what="compiling the ABI probe",
                env=ENVIRONMENT,
                log=log,
                hint="the headers must compile as C",
            )
        except CommandError:
            # gcc places an error inside a macro at its definition and notes where the macro is used
            named = re.findall(r"probe\.c:(\d+):\d+: (?:error|note: in expansion of)", log.read_text(errors="replace"))
            refused = {int(line) - head.count("\n") - 1 for line in named} & set(range(len(checks)))
            if not refused:
                raise
            return refused
        return set()

    def _includes(self) -> str:
        return "".join(f"#include {name}\n" for name in ("<stdio.h>", *(f'"{name}"' for name in self.headers)))

    def _argv(self, *rest: str | Path) -> list[str | Path]:
        limit = ("-ferror-limit=0",) if "clang" in self.compiler.version else ()  # clang ends after 20 errors
        return [self.compiler.path, *FLAGS, *limit, *(f"-I{folder}" for folder in self.include_dirs), *rest]


def _struct_checks(declared: Layout, bodies: dict[str, Body]) -> Iterator[Check]:
    for name, struct in declared.structs.items():
        body = bodies.get(name, Body(spelling=f"struct {name}", names=()))
        yield Check(key=("size", name), expressions=(f"sizeof({body.spelling})",))
        ours = [part for field in struct.fields for part in field.name.split(".")]
        for field in dict.fromkeys([*body.names, *ours]):
            offset = f"__builtin_offsetof({body.spelling}, {field})"
            size = f"sizeof((({body.spelling} *) 0)->{field})"
            yield Check(key=("field", name, field), expressions=(offset, size))


def _constant_checks(declared: Layout) -> Iterator[Check]:
    for name in declared.constants:
        yield Check(key=("constant", name), expressions=(f"~~({name})",))  # ~ takes integers only, no strings


def _struct(name: str, answers: dict[tuple[str, ...], tuple[int, ...]]) -> Struct:
    fields = [Field(key[2], *numbers) for key, numbers in answers.items() if key[:2] == ("field", name)]
    return Struct(size=answers["size", name][0], fields=tuple(sorted(fields, key=lambda field: field.offset)))


def _header(name: str) -> str:
    return f"{name.partition('_')[0].lower()}.h"


def _bodies(text: str) -> dict[str, Body]:
    """Structs and unions of preprocessed C by tag and by typedef's name."""
    found: dict[str, Body] = {}
    for start in _BODY.finditer(text):
        kind, tag = start.groups()
        end = _closing(text, start.end() - 1)
        names = tuple(_declared_names(text[start.end() : end]))
        if tag:
            found[tag] = Body(spelling=f"{kind} {tag}", names=names)
        elif alias := re.match(r"\s*(\w+)\s*;", text[end + 1 : end + 200]):
            found.setdefault(alias[1], Body(spelling=alias[1], names=names))
    return found


def _declared_names(body: str) -> Iterator[str]:
    """Names that a struct's body declares, in order; members of an unnamed struct or union count as its own."""
    for declaration in _split(body, ";"):
        if inner := _BODY.search(declaration):
            end = _closing(declaration, inner.end() - 1)
            declarators = declaration[end + 1 :]
            if not inner[2] and not declarators.strip():
                yield from _declared_names(declaration[inner.end() : end])
                continue
        else:
            declarators = declaration
        for declarator in _split(declarators, ","):
            if pointer := _FUNCTION_POINTER.search(declarator):
                yield pointer[1]
            elif words := re.findall(r"[A-Za-z_]\w*", re.sub(r"\[[^]]*\]|:.*", "", _outside_parentheses(declarator))):
                yield words[-1]


def _split(text: str, separator: str) -> Iterator[str]:
    """Parts between separators that stand outside all brackets; empty parts are left out."""
    depth, part = 0, ""
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        if sign == separator and depth == 0:
            if part.strip():
                yield part
            part = ""
        else:
            part += sign
    if part.strip():
        yield part


def _outside_parentheses(text: str) -> str:
    """``text`` without attributes and alignments and what they carry in parentheses."""
    text = re.sub(r"\b(__attribute__|_Alignas|__extension__)\b", " ", text)
    while (shorter := re.sub(r"\([^()]*\)", " ", text)) != text:
        text = shorter
    return text


def _closing(text: str, opening: int) -> int:
    """The place of the brace that closes the one at ``opening``."""
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return len(text)


def _families(text: str) -> Iterator[str]:
    """How the names of each enum begin: by its tag and by what they share, two words at least."""
    for tag, body in _ENUM.findall(text):
        names = [part.split("=")[0].strip() for part in _split(body, ",")]
        alike = takewhile(lambda signs: len(set(signs)) == 1, zip(*names, strict=False))
        shared = "".join(signs[0] for signs in alike).rpartition("_")[0]
        for family in (tag.upper(), shared):
            if "_" in family.strip("_"):
                yield f"{family}_"
