"""The ABI comparison on a small header of our own, compiled for real, and ctypes classes written here."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from toolchain.base.abi import Field, Layout, Struct, compare, declared_layout
from toolchain.base.errors import ArtifactError, CommandError, MissingError
from toolchain.base.machine import Compiler
from toolchain.build.abi import compiled_layout

HEADER = """
#include <stdbool.h>
#include <stdint.h>
#define OLD(declaration, hint) declaration __attribute__((deprecated(hint)))
#define LLAMA_DEFAULT_SEED 0xFFFFFFFF
#define LLAMA_GREETING "hello"
#define LLAMA_DANGLING (no_such_thing + 1)
enum llama_kind {
    LLAMA_KIND_NONE = -1, // } and ; in a comment
    LLAMA_KIND_PLAIN,
    LLAMA_KIND_FANCY = 1 << 3,
};
typedef bool (*llama_callback)(float progress, void * data);
struct llama_opaque;
struct llama_params {
    int32_t n_first, n_second;
    enum llama_kind kind;
    /* int32_t n_gone; */
    bool flag;
#ifdef LLAMA_NEVER
    int32_t n_never;
#endif
    const char * name, * other;
    bool (*callback)(float progress, void * data);
    OLD(float ratios[4], "use weights; (the {old ones");
    union {
        int64_t val_i64;
        char    val_str[24];
    };
    struct llama_opaque * opaque;
};
typedef struct llama_pair { double left; double right; } llama_pair;
typedef struct { int64_t id; } llama_untagged;
"""

COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)] or ["cc"]


class LlamaValue(ctypes.Union):
    _fields_ = [("val_i64", ctypes.c_int64), ("val_str", ctypes.c_char * 24)]


PARAMS = [
    ("n_first", ctypes.c_int32),
    ("n_second", ctypes.c_int32),
    ("kind", ctypes.c_int),
    ("flag", ctypes.c_bool),
    ("name", ctypes.c_char_p),
    ("other", ctypes.c_char_p),
    ("callback", ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float, ctypes.c_void_p)),
    ("ratios", ctypes.c_float * 4),
    ("value", LlamaValue),
    ("opaque", ctypes.c_void_p),
]


def bindings(*structs: type[ctypes.Structure], **names: object) -> Layout:
    """What a module declares that has llama_params, llama_pair and the other things of HEADER, and ``names``."""
    module = ModuleType("bindings")
    vars(module).update(
        {
            "llama_params": type("llama_params", (ctypes.Structure,), {"_fields_": PARAMS}),
            "llama_pair": type(
                "llama_pair",
                (ctypes.Structure,),
                {"_fields_": [("left", ctypes.c_double), ("right", ctypes.c_double)]},
            ),
            "llama_untagged": type("llama_untagged", (ctypes.Structure,), {"_fields_": [("id", ctypes.c_int64)]}),
            "llama_opaque": type("llama_opaque", (ctypes.Structure,), {}),
            "LLAMA_DEFAULT_SEED": 0xFFFFFFFF,
            "LLAMA_KIND_NONE": -1,
            "LLAMA_KIND_PLAIN": 0,
            "LLAMA_KIND_FANCY": 8,
            "_private": 3,
            **{struct.__name__: struct for struct in structs},
            **names,
        }
    )
    return declared_layout([module])


def in_c(declared: Layout, folder: Path, header: str = HEADER, compiler: str = COMPILERS[0]) -> Layout:
    folder.mkdir(exist_ok=True)
    (folder / "llama.h").write_text(header)
    found = shutil.which(compiler)
    assert found
    return compiled_layout(declared, include_dirs=[folder], compiler=Compiler(path=Path(found), version=compiler))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_bindings_that_mirror_the_header_have_no_faults(tmp_path: Path, compiler: str) -> None:
    declared = bindings()
    compiled = in_c(declared, tmp_path / "include", compiler=compiler)
    assert compare(declared, compiled) == ()
    assert compiled.unchecked == ()
    names = [field.name for field in compiled.structs["llama_params"].fields]
    assert names == [*(n for n, _ in PARAMS[:8]), "val_i64", "val_str", "opaque"]
    assert compiled.structs["llama_pair"] == declared.structs["llama_pair"]
    assert dict(compiled.constants) == dict(declared.constants)


@pytest.mark.parametrize(
    ("old", "new", "faults"),
    [
        pytest.param(
            "int32_t n_first, n_second;",
            "int32_t n_first; int32_t n_new; int32_t n_second;",
            ["llama_params.n_new: in C (4 bytes at offset 4), not in the bindings"],
            id="inserted in the middle",
        ),
        pytest.param(
            "bool flag;",
            "bool flag; bool flag_too;",
            ["llama_params.flag_too: in C (1 bytes at offset 13), not in the bindings"],
            id="inserted into padding, where nothing else moves",
        ),
        pytest.param(
            "opaque;\n};",
            "opaque; void (*at_end)(int a, int b); };",
            ["llama_params.at_end: in C (8 bytes at offset 88), not in the bindings"],
            id="inserted at the end",
        ),
        pytest.param(
            "int64_t val_i64;",
            "int64_t val_i64; double val_f64;",
            ["llama_params.val_f64: in C (8 bytes at offset 56), not in the bindings"],
            id="inserted into an unnamed union",
        ),
        pytest.param(
            "bool flag;",
            "",
            ["llama_params.flag: in the bindings (1 bytes at offset 12), not in C"],
            id="removed",
        ),
        pytest.param(
            "int32_t n_first,",
            "int32_t n_1st,",
            ["llama_params.n_first: called n_1st in C (4 bytes at offset 0)"],
            id="renamed",
        ),
        pytest.param(
            "n_first, n_second",
            "n_second, n_first",
            ["llama_params: the order is n_first, n_second in the bindings, n_second, n_first in C"],
            id="two of one size swapped",
        ),
        pytest.param(
            "int32_t n_first, n_second;",
            "int32_t n_new, n_second, n_first;",
            [
                "llama_params.n_new: in C (4 bytes at offset 0), not in the bindings",
                "llama_params: the order is n_first, n_second in the bindings, n_second, n_first in C",
            ],
            id="swapped behind an inserted one",
        ),
        pytest.param(
            "float ratios[4]",
            "float ratios[6]",
            ["llama_params.ratios: 16 bytes in the bindings, 24 in C"],
            id="longer array",
        ),
        pytest.param(
            "enum llama_kind kind;",
            "_Alignas(16) enum llama_kind kind;",
            ["llama_params.kind: at offset 8 in the bindings, 16 in C"],
            id="moved by alignment only",
        ),
        pytest.param(
            "double right; }",
            "double right; } __attribute__((aligned(64)))",
            ["llama_pair: 16 bytes in the bindings, 64 in C"],
            id="larger by alignment only",
        ),
        pytest.param("1 << 3", "1 << 4", ["LLAMA_KIND_FANCY: 8 in the bindings, 16 in C"], id="enum value"),
        pytest.param("0xFFFFFFFF", "42", ["LLAMA_DEFAULT_SEED: 4294967295 in the bindings, 42 in C"], id="macro"),
        pytest.param(
            "LLAMA_KIND_FANCY = 1 << 3,",
            "",
            ["LLAMA_KIND_FANCY: in the bindings (8), not in C"],
            id="enum constant removed",
        ),
        pytest.param("llama_pair", "llama_couple", ["struct llama_pair: in the bindings, not in C"], id="no struct"),
        pytest.param("int64_t id;", "int32_t id;", ["llama_untagged.id: 8 bytes in the bindings, 4 in C"], id="no tag"),
    ],
)
def test_a_change_in_the_header_is_refused_by_name(tmp_path: Path, old: str, new: str, faults: list[str]) -> None:
    assert old in HEADER
    declared = bindings()
    assert list(compare(declared, in_c(declared, tmp_path / "include", HEADER.replace(old, new)))) == faults


def test_a_swap_in_the_bindings_is_refused_by_name(tmp_path: Path) -> None:
    swapped = [PARAMS[1], PARAMS[0], *PARAMS[2:]]
    declared = bindings(type("llama_params", (ctypes.Structure,), {"_fields_": swapped}))
    assert compare(declared, in_c(declared, tmp_path / "include")) == (
        "llama_params: the order is n_second, n_first in the bindings, n_first, n_second in C",
    )


def test_a_union_may_have_a_name_in_c(tmp_path: Path) -> None:
    named = HEADER.replace("};\n    struct llama_opaque *", "} value;\n    struct llama_opaque *")
    assert named != HEADER
    declared = bindings()
    assert compare(declared, in_c(declared, tmp_path / "include", named)) == ()


def test_fields_of_an_extended_structure_count(tmp_path: Path) -> None:
    left = type("Left", (ctypes.Structure,), {"_fields_": [("left", ctypes.c_double)]})
    declared = bindings(type("llama_pair", (left,), {"_fields_": [("right", ctypes.c_double)]}))
    assert compare(declared, in_c(declared, tmp_path / "include")) == ()


def test_a_struct_is_unchecked_only_where_its_header_is_not_there(tmp_path: Path) -> None:
    fields = {"_fields_": [("n", ctypes.c_int)]}
    strangers = [type(name, (ctypes.Structure,), fields) for name in ("llava_embed", "llama_gone")]
    declared = bindings(*strangers)
    compiled = in_c(declared, tmp_path / "include")
    assert compiled.unchecked == ("llava_embed",)
    assert compare(declared, compiled) == ("struct llama_gone: in the bindings, not in C",)
    (tmp_path / "include" / "llava.h").write_text("struct llava_embed { int n; int m; };\n")
    assert "llava_embed.m: in C (4 bytes at offset 4), not in the bindings" in compare(
        declared, in_c(declared, tmp_path / "include")
    )


def test_constants_that_no_header_speaks_of_are_unchecked(tmp_path: Path) -> None:
    names = dict.fromkeys(
        ("LLAMA_MAX_DEVICES", "LLAMA_VOCAB_PRE_TYPE_BLOOM", "LLAMA_GREETING", "LLAMA_DANGLING", "MTMD_KIND_TEXT"), 5
    )
    declared = bindings(LLAMA_KIND_LOST=9, **names)
    compiled = in_c(declared, tmp_path / "include")
    assert set(compiled.unchecked) == set(names)
    assert compare(declared, compiled) == ("LLAMA_KIND_LOST: in the bindings (9), not in C",)


def test_bindings_read_in_part_are_compared_in_part(tmp_path: Path) -> None:
    """The runtime imports fewer modules than the build has seen."""
    declared = bindings()
    compiled = in_c(declared, tmp_path / "include")
    part = Layout(structs={"llama_pair": declared.structs["llama_pair"]}, constants={})
    assert compare(part, compiled) == ()


def test_a_layout_survives_json() -> None:
    layout = Layout(
        structs={"llama_pair": Struct(size=16, fields=(Field("left", 0, 8), Field("value.right", 8, 8)))},
        constants={"LLAMA_TOKEN_NULL": -1},
        unchecked=("llava_embed",),
    )
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        {"structs": {}},
        {"structs": {"a": 3}, "constants": {}, "unchecked": []},
        {"structs": {"a": {"size": 8, "fields": ["x 0"]}}, "constants": {}, "unchecked": []},
        {"structs": {"a": {"size": 8, "fields": ["x 0 eight"]}}, "constants": {}, "unchecked": []},
        {"structs": {}, "constants": {"A_B": "many"}, "unchecked": []},
    ],
)
def test_a_damaged_layout_is_refused(damaged: object) -> None:
    with pytest.raises(ArtifactError, match="no ABI layout"):
        Layout.from_json(damaged)


def test_headers_that_do_not_compile_are_a_failed_command(tmp_path: Path) -> None:
    with pytest.raises(CommandError) as caught:
        in_c(bindings(), tmp_path / "include", HEADER.replace("bool flag;", "class flag;"))
    assert "class flag" in caught.value.evidence


def test_missing_headers_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="headers of llama") as caught:
        compiled_layout(bindings(), include_dirs=[tmp_path], compiler=Compiler(path=Path("cc"), version="cc"))
    assert str(tmp_path) in caught.value.evidence
