"""The GGUF header reader: it agrees with gguf-py on honest files and names the lie in every other."""

from __future__ import annotations

import io
import os
import random
import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.ggml_types import FILE_TYPES, GGML_TYPES_BY_NAME, REMOVED_GGML_TYPES
from toolchain.base.gguf import GGML_TYPES, HeaderLimits, StringArray, read_header

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
F32_TENSOR, Q4_0_TENSOR = 0, 2


# --- files made by hand -----------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def key(name: str | bytes, value_type: int, payload: bytes) -> bytes:
    return text(name) + u32(value_type) + payload


def string_key(name: str, value: str | bytes) -> bytes:
    return key(name, STRING, text(value))


def array_key(name: str, item_type: int, count: int, payload: bytes) -> bytes:
    return key(name, ARRAY, u32(item_type) + u64(count) + payload)


def tensor(
    name: str | bytes = "a.weight",
    shape: Sequence[int] = (32,),
    ggml_type: int = F32_TENSOR,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + u32(len(shape) if n_dims is None else n_dims) + dims + struct.pack("<iQ", ggml_type, offset)


ARCHITECTURE = string_key("general.architecture", "llama")


def packed(
    *keys: bytes,
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    n_keys: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
    architecture: bytes = ARCHITECTURE,
    alignment: int = 32,
) -> bytes:
    """A GGUF whose counts may lie; ``architecture`` is put before the other keys."""
    entries = [entry for entry in (architecture, *keys) if entry]
    head = b"GGUF" + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(entries) if n_keys is None else n_keys)
    body = head + b"".join(entries) + b"".join(tensors)
    return body + (bytes(-len(body) % alignment) + data if tensors else b"")


def write(tmp_path: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def refusal(path: Path, **options: Any) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        read_header(path, **options)
    error = caught.value
    assert error.exit_code == 6
    assert path.name in error.message
    assert error.hint
    assert error.evidence.isprintable() or "\n" in error.evidence
    for part in ("field  ", "value  ", "at     byte ", f" of {path.stat().st_size}"):
        assert part in error.evidence
    return error


# --- honest files -----------------------------------------------------------------------------------


def write_model(path: Path, alignment: int | None = None, tensors: bool = True) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_type("model")
    writer.add_name("naïve ☃ model")
    writer.add_file_type(15)
    writer.add_context_length(4096)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(8)
    writer.add_head_count_kv([4, 2])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_chat_template("{{ messages }}")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "▁the", "", "é" * 100])
    writer.add_token_scores([0.0, -1.5, -2.0, float("-inf")])
    writer.add_token_types([2, 1, 1, 1])
    writer.add_add_bos_token(True)
    writer.add_uint8("test.u8", 255)
    writer.add_int8("test.i8", -128)
    writer.add_uint16("test.u16", 65535)
    writer.add_int16("test.i16", -32768)
    writer.add_int32("test.i32", -(2**31))
    writer.add_uint64("test.u64", 2**64 - 1)
    writer.add_int64("test.i64", -(2**63))
    writer.add_float64("test.f64", 1e300)
    writer.add_array("test.bools", [True, False, True])
    if tensors:
        writer.add_tensor("token_embd.weight", np.ones((4, 64), np.float16))
        writer.add_tensor("odd", np.arange(7, dtype=np.float32))
        q8 = np.zeros((3, 2 * 34), np.uint8)
        writer.add_tensor("blk.0.ffn_up.weight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        q4_k = np.zeros((2, 5, 144), np.uint8)
        writer.add_tensor("blk.1.ffn_up_exps.weight", q4_k, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        writer.add_tensor("ints", np.arange(5, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 4096])
@pytest.mark.parametrize("tensors", [True, False], ids=["model", "vocab"])
def test_every_field_agrees_with_gguf_py(tmp_path: Path, alignment: int | None, tensors: bool) -> None:
    path = write_model(tmp_path / "model.gguf", alignment, tensors)
    header, reference = read_header(path), gguf.GGUFReader(path)

    fields = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    ours = {k: list(v) if isinstance(v, StringArray | memoryview) else v for k, v in header.metadata.items()}
    assert ours == fields
    assert [type(v) for v in ours.values()] == [type(v) for v in fields.values()]
    assert header.version == 3
    assert header.byte_order == "little"
    assert header.alignment == reference.alignment
    assert header.file_bytes == path.stat().st_size
    if tensors:
        assert header.data_offset == reference.data_offset
    assert [(t.name, t.shape, t.type, t.nbytes, t.n_elements) for t in header.tensors] == [
        (t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.n_bytes, t.n_elements) for t in reference.tensors
    ]
    assert [header.data_offset + t.offset for t in header.tensors] == [t.data_offset for t in reference.tensors]


def test_properties_say_what_a_runtime_asks(tmp_path: Path) -> None:
    header = read_header(write_model(tmp_path / "model.gguf"))
    assert (header.kind, header.architecture, header.file_type) == ("model", "llama", "Q4_K_M")
    assert (header.n_ctx_train, header.n_layer, header.n_vocab) == (4096, 2, 4)
    assert header.chat_template == "{{ messages }}"
    assert header.n_params == 4 * 64 + 7 + 3 * 64 + 2 * 5 * 256 + 5
    assert header.tensor_bytes == 4 * 64 * 2 + 7 * 4 + 3 * 2 * 34 + 2 * 5 * 144 + 5 * 4
    assert header.bits_per_weight == 8 * header.tensor_bytes / header.n_params
    assert header.arch_int("embedding_length") == 64
    assert header.arch_ints("attention.head_count") == (8, 8)
    assert header.arch_ints("attention.head_count_kv") == (4, 2)
    assert header.arch_ints("attention.layer_norm_rms_epsilon") is None
    assert header.arch_int("absent") is None
    assert header.split is None
    assert header.shard_paths == (header.path,)
    assert len(repr(header)) < 1000  # the vocabulary is not in it


def test_a_bare_file_answers_none_and_zero(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, packed()))
    assert header.kind == "vocab"
    assert header.tensors == ()
    assert (header.n_params, header.tensor_bytes, header.bits_per_weight) == (0, 0, 0.0)
    assert (header.n_ctx_train, header.n_layer, header.n_vocab, header.file_type) == (None,) * 4
    assert header.chat_template is None


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ([string_key("general.type", "adapter")], "adapter"),
        ([string_key("general.type", "imatrix")], "imatrix"),
        ([string_key("general.type", "mmproj")], "mmproj"),
        ([string_key("general.type", "novelty")], "other"),
        ([string_key("general.type", "model")], "model"),
        ([], "model"),
    ],
)
def test_the_kind_follows_general_type(tmp_path: Path, keys: list[bytes], kind: str) -> None:
    path = write(tmp_path, packed(*keys, tensors=[tensor()], data=bytes(128)))
    assert read_header(path).kind == kind


def test_a_clip_file_is_a_projector_whatever_its_type_says(tmp_path: Path) -> None:
    path = write(tmp_path, packed(architecture=string_key("general.architecture", "clip")))
    assert read_header(path).kind == "mmproj"


def test_an_importance_matrix_needs_no_architecture(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, packed(string_key("general.type", "imatrix"), architecture=b"")))
    assert (header.kind, header.architecture) == ("imatrix", "")


def shard(no: int, count: int, architecture: bytes = ARCHITECTURE) -> bytes:
    numbers = [key("split.no", U16, struct.pack("<H", no)), key("split.count", U16, struct.pack("<H", count))]
    return packed(*numbers, architecture=architecture)


def test_a_shard_names_its_siblings(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, shard(1, 3, architecture=b""), "m-00002-of-00003.gguf"))
    assert (header.kind, header.split) == ("model", (1, 3))
    assert [p.name for p in header.shard_paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert header.path in header.shard_paths


def test_a_renamed_shard_is_told_its_name(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, shard(0, 3), "m.gguf"))
    with pytest.raises(ArtifactError) as caught:
        _ = header.shard_paths
    assert "-00001-of-00003.gguf" in caught.value.hint


@pytest.mark.parametrize("count", [0, 1])
def test_a_merged_file_is_not_split(tmp_path: Path, count: int) -> None:
    header = read_header(write(tmp_path, shard(0, count)))
    assert (header.split, header.shard_paths) == (None, (header.path,))


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    old = write(tmp_path, path.read_bytes()[:4] + u32(2) + path.read_bytes()[8:], "old.gguf")
    header = read_header(old)
    assert header.version == 2
    assert header.tensors == read_header(path).tensors
    assert header.metadata == read_header(path).metadata


def test_the_last_tensor_may_lack_its_padding(tmp_path: Path) -> None:
    path = write(tmp_path, packed(tensors=[tensor(shape=(3,))], data=bytes(12)))
    assert read_header(path).tensors[0].nbytes == 12


def test_a_tensor_without_dimensions_is_one_element(tmp_path: Path) -> None:
    path = write(tmp_path, packed(tensors=[tensor(shape=())], data=bytes(4)))
    assert (read_header(path).tensors[0].shape, read_header(path).n_params) == ((1,), 1)


def test_empty_arrays_are_read(tmp_path: Path) -> None:
    keys = [array_key("test.none", STRING, 0, b""), array_key("test.zero", F32, 0, b"")]
    metadata = read_header(write(tmp_path, packed(*keys))).metadata
    assert [len(v) for v in metadata.values() if isinstance(v, StringArray | memoryview)] == [0, 0]


def test_string_arrays_index_like_sequences(tmp_path: Path) -> None:
    words = [f"word{i}" * (i % 7) for i in range(1000)]
    payload = b"".join(text(word) for word in words)
    path = write(tmp_path, packed(array_key("tokenizer.ggml.tokens", STRING, 1000, payload)))
    tokens = read_header(path).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, StringArray)
    assert list(tokens) == words
    assert (tokens[-1], tokens[3:9:2], "word5" * 5 in tokens) == (words[-1], tuple(words[3:9:2]), True)
    with pytest.raises(IndexError):
        _ = tokens[1000]


def test_string_arrays_longer_than_a_read_block_are_whole(tmp_path: Path) -> None:
    words = ["x" * 200_000, "", "y" * 65_536, "z"] + ["short"] * 30_000
    payload = b"".join(text(word) for word in words)
    after = string_key("general.name", "comes after")
    path = write(tmp_path, packed(array_key("tokenizer.ggml.tokens", STRING, len(words), payload), after))
    metadata = read_header(path).metadata
    assert metadata["tokenizer.ggml.tokens"][:] == tuple(words)  # type: ignore[index]
    assert metadata["general.name"] == "comes after"


def test_token_bytes_that_are_not_utf8_survive(tmp_path: Path) -> None:
    path = write(tmp_path, packed(array_key("tokenizer.ggml.tokens", STRING, 1, text(b"\xff\xfe"))))
    tokens = read_header(path).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, StringArray)
    assert tokens[0].encode("utf-8", "surrogateescape") == b"\xff\xfe"


# --- the tables -------------------------------------------------------------------------------------


def test_the_type_table_agrees_with_gguf_py() -> None:
    sizes = dict(gguf.GGML_QUANT_SIZES)
    sizes[gguf.GGMLQuantizationType.Q8_1] = (32, 36)  # 40 in gguf-py 0.19; block_q8_1 is two halves and 32 bytes
    for known, (block_size, block_bytes) in sizes.items():
        ours = GGML_TYPES[known.value]
        assert (ours.name, ours.block_size, ours.block_bytes) == (known.name, block_size, block_bytes)
    assert not set(GGML_TYPES) & set(REMOVED_GGML_TYPES)
    assert GGML_TYPES_BY_NAME["Q4_K"].nbytes(512) == 288


def test_the_file_type_table_agrees_with_gguf_py() -> None:
    theirs = {t.value: t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in gguf.LlamaFileType}
    theirs.pop(1024, None)  # "guessed" is a flag
    assert {number: FILE_TYPES[number] for number in theirs} == theirs


def test_a_guessed_file_type_keeps_its_name_and_a_new_one_its_number(tmp_path: Path) -> None:
    def named(number: int) -> str | None:
        return read_header(write(tmp_path, packed(key("general.file_type", U32, u32(number))))).file_type

    assert (named(1024 + 15), named(999)) == ("Q4_K_M", "file type 999")


# --- lies -------------------------------------------------------------------------------------------

HUGE = 2**62
LONG_AS = "a string runs past the end of the file"
TOO_MANY = "more items announced than the file can hold"
ENDS = "the file ends inside its header"


def alignment_key(value: int) -> bytes:
    return key("general.alignment", U32, u32(value))


def one(**options: Any) -> bytes:
    """A file of one tensor with enough data."""
    return packed(tensors=[tensor(**options)], data=bytes(4096))


def two(second_offset: int) -> bytes:
    tensors = [tensor("a", (40,)), tensor("b", (8,), offset=second_offset)]
    return packed(tensors=tensors, data=bytes(4096))


LIES: dict[str, tuple[bytes, str]] = {
    "empty_file": (b"", "an empty file"),
    "zeros": (bytes(64), "zero bytes"),
    "ggml": (b"lmgg" + bytes(60), "GGML .bin of 2023"),
    "ggmf": (b"fmgg" + bytes(60), "GGMF .bin of 2023"),
    "ggjt": (b"tjgg" + bytes(60), "GGJT .bin of 2023"),
    "ggla": (b"algg" + bytes(60), "ggla adapter"),
    "session": (b"nsgg" + bytes(60), "session file"),
    "sequence_state": (b"qsgg" + bytes(60), "sequence state"),
    "safetensors": (u64(20) + b'{"__metadata__":{}}  ', "a safetensors file"),
    "torch_zip": (b"PK\x03\x04" + bytes(40) + b"archive/data.pkl", "zip archive"),
    "pickle": (b"\x80\x02}q\x00.", "Python pickle"),
    "html": (b"\n <!DOCTYPE html><html>404</html>", "a web page"),
    "xml_error": (b"<?xml version='1.0'?><Error/>", "a web page"),
    "json_error": (b'{"error":"Repository not found"}', "JSON text"),
    "lfs_pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "git-lfs pointer",
    ),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "gzip data"),
    "unknown_format": (b"what is this", "unknown format"),
    "magic_only": (b"GGUF", ENDS),
    "version_0": (packed(version=0), "neither GGUF version 2 nor 3"),
    "version_1": (packed(version=1), "version 1"),
    "version_4": (packed(version=4), "neither GGUF version 2 nor 3"),
    "big_endian_3": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF"),
    "big_endian_2": (b"GGUF" + struct.pack(">IQQ", 2, 0, 0), "a big-endian GGUF"),
    "tensor_count_huge": (packed(n_tensors=HUGE), TOO_MANY),
    "tensor_count_one_too_many": (packed(n_tensors=1), ENDS),
    "tensor_count_overflows": (packed(n_tensors=2**64 - 1), TOO_MANY),
    "key_count_huge": (packed(n_keys=HUGE), TOO_MANY),
    "key_count_one_too_many": (packed(n_keys=2), ENDS),
    "key_length_huge": (packed(u64(HUGE) + b"k" * 20), LONG_AS),
    "key_too_long": (packed(string_key("k" * 65_536, "v")), "a string longer than 65535 bytes"),
    "key_empty": (packed(string_key("", "value")), "empty or holds a NUL"),
    "key_with_nul": (packed(string_key("a\0b", "value")), "empty or holds a NUL"),
    "key_not_utf8": (packed(key(b"a\xffb", U32, u32(1))), "not UTF-8"),
    "key_twice": (packed(key("k", U32, u32(1)), key("k", U32, u32(2))), "a key appears twice"),
    "value_type_13": (packed(key("some.key", 13, bytes(16))), "no such value type"),
    "value_type_huge": (packed(key("some.key", 2**32 - 1, bytes(16))), "no such value type"),
    "string_length_huge": (packed(key("some.key", STRING, u64(HUGE) + b"text")), LONG_AS),
    "string_length_one_too_long": (packed(key("some.key", STRING, u64(5) + b"text")), LONG_AS),
    "string_not_utf8": (packed(string_key("general.name", b"ok\xc3(")), "not UTF-8"),
    "string_of_surrogates": (packed(string_key("general.name", b"\xed\xa0\x80")), "not UTF-8"),
    "scalar_cut": (packed(key("some.key", U64, b"1234")), ENDS),
    "bool_2": (packed(key("some.key", BOOL, b"\2")), "neither 0 nor 1"),
    "bool_in_array_255": (packed(array_key("some.key", BOOL, 3, b"\0\1\xff")), "neither 0 nor 1"),
    "array_of_arrays": (packed(array_key("k", ARRAY, 1, u32(U8) + u64(1) + b"1")), "an array of arrays"),
    "array_item_type_13": (packed(array_key("some.key", 13, 1, bytes(16))), "no such value type"),
    "array_of_bytes_huge": (packed(array_key("some.key", U8, HUGE, b"12")), TOO_MANY),
    "array_of_floats_one_too_many": (packed(array_key("some.key", F32, 3, bytes(8))), TOO_MANY),
    "array_of_strings_huge": (packed(array_key("some.key", STRING, HUGE, text("one"))), TOO_MANY),
    "array_string_length_huge": (packed(array_key("k", STRING, 1, u64(HUGE))), LONG_AS),
    "array_second_string_too_long": (
        packed(array_key("k", STRING, 2, text("one") + u64(9) + b"two")),
        LONG_AS,
    ),
    "array_of_strings_cut": (packed(array_key("k", STRING, 2, text("twelve bytes"))), ENDS),
    "architecture_missing": (packed(architecture=b""), "no architecture"),
    "architecture_empty": (packed(architecture=string_key("general.architecture", "")), "no architecture"),
    "architecture_number": (packed(architecture=key("general.architecture", U32, u32(1))), "not a string"),
    "type_number": (packed(key("general.type", U32, u32(1))), "not a string"),
    "template_number": (packed(key("tokenizer.chat_template", U32, u32(1))), "not a string"),
    "file_type_string": (packed(string_key("general.file_type", "Q4_K_M")), "not an integer"),
    "context_length_string": (packed(string_key("llama.context_length", "4096")), "not an integer"),
    "context_length_float": (packed(key("llama.context_length", F32, bytes(4))), "not an integer"),
    "embedding_length_bool": (packed(key("llama.embedding_length", BOOL, b"\1")), "not an integer"),
    "block_count_array": (packed(array_key("llama.block_count", U32, 1, u32(1))), "not an integer"),
    "block_count_negative": (packed(key("llama.block_count", I32, b"\xff" * 4)), "negative"),
    "block_count_huge": (packed(key("llama.block_count", U32, u32(2**32 - 1))), "layers"),
    "tokens_of_numbers": (
        packed(array_key("tokenizer.ggml.tokens", U32, 1, u32(1))),
        "not an array of strings",
    ),
    "scores_of_strings": (
        packed(array_key("tokenizer.ggml.scores", STRING, 1, text(""))),
        "not an array of num",
    ),
    "scores_fewer_than_tokens": (
        packed(
            array_key("tokenizer.ggml.scores", F32, 1, bytes(4)),
            array_key("tokenizer.ggml.tokens", STRING, 2, text("a") + text("b")),
        ),
        "fewer values than the 2 tokens",
    ),
    "shard_number_past_count": (shard(3, 3), "not the number of one of the 3 shards"),
    "shard_without_number": (
        packed(key("split.count", U16, b"\3\0")),
        "not the number of one of the 3 shards",
    ),
    "shard_count_huge": (
        packed(key("split.count", U64, u64(HUGE)), key("split.no", U32, u32(0))),
        "65535 shards",
    ),
    "alignment_0": (packed(alignment_key(0)), "power of two"),
    "alignment_4": (packed(alignment_key(4)), "power of two"),
    "alignment_48": (packed(alignment_key(48)), "power of two"),
    "alignment_huge": (packed(alignment_key(2**31)), "an alignment above"),
    "alignment_u64": (packed(key("general.alignment", U64, u64(32))), "not a u32"),
    "alignment_string": (packed(string_key("general.alignment", "32")), "not a u32"),
    "tensor_name_64_bytes": (one(name="n" * 64), "a string longer than 63 bytes"),
    "tensor_name_empty": (one(name=""), "empty or holds a NUL"),
    "tensor_name_with_nul": (one(name="a\0b"), "empty or holds a NUL"),
    "tensor_name_not_utf8": (one(name=b"\xffname"), "not UTF-8"),
    "tensor_name_twice": (
        packed(tensors=[tensor("a"), tensor("a", offset=128)], data=bytes(256)),
        "a tensor name appears twice",
    ),
    "dimensions_5": (one(shape=(1, 1, 1, 1, 1)), "more than 4 dimensions"),
    "dimensions_huge": (one(n_dims=2**32 - 1), "more than 4 dimensions"),
    "dimension_0": (one(shape=(32, 0)), "no elements"),
    "dimension_negative": (one(shape=(2**64 - 1,)), "more than an int64"),
    "product_overflows": (one(shape=(2**32, 2**32, 2)), "more than an int64"),
    "product_wraps_to_zero": (one(shape=(2**32, 2**32)), "more than an int64"),
    "row_not_whole_blocks": (one(shape=(48,), ggml_type=Q4_0_TENSOR), "not whole Q4_0 blocks"),
    "row_not_whole_though_the_product_is": (
        one(shape=(16, 2), ggml_type=Q4_0_TENSOR),
        "not whole Q4_0 blocks",
    ),
    "tensor_type_removed_q4_2": (one(ggml_type=4), "removed tensor type Q4_2"),
    "tensor_type_removed_q4_0_4_8": (one(ggml_type=32), "removed tensor type Q4_0_4_8"),
    "tensor_type_43": (one(ggml_type=43), "no such tensor type"),
    "tensor_type_negative": (one(ggml_type=-1), "no such tensor type"),
    "offset_not_aligned": (two(161), "not aligned to 32"),
    "offset_inside_the_one_before": (two(128), "overlaps the one before"),
    "offset_of_the_one_before": (two(0), "overlaps the one before"),
    "offset_leaves_a_gap": (two(192), "leaves a gap"),
    "first_offset_not_0": (one(offset=32), "leaves a gap"),
    "offset_huge": (two(2**64 - 32), "leaves a gap"),
    "data_cut_by_one_byte": (packed(tensors=[tensor()], data=bytes(127)), "ends inside its tensor data"),
    "data_missing": (packed(tensors=[tensor()]), "ends inside its tensor data"),
    "data_of_the_second_cut": (
        packed(tensors=[tensor("a"), tensor("b", offset=128)], data=bytes(200)),
        "ends inside its tensor data",
    ),
    "data_start_past_the_end": (
        packed(alignment_key(2**20), tensors=[tensor()], data=bytes(4096)),
        "ends inside its tensor data",
    ),
    "data_of_an_exabyte": (one(shape=(2**60,)), "ends inside its tensor data"),
}


@pytest.mark.parametrize(("content", "says"), LIES.values(), ids=LIES.keys())
def test_lie_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    tracemalloc.start()
    try:
        error = refusal(write(tmp_path, content))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert says in error.message
    assert peak < 2**20 + 8 * len(content)


def test_the_evidence_points_at_the_byte(tmp_path: Path) -> None:
    content = packed(key("some.key", STRING, u64(HUGE) + b"text"))
    evidence = refusal(write(tmp_path, content)).evidence
    assert "length of value of 'some.key'" in evidence
    assert str(HUGE) in evidence
    assert f"byte {content.index(u64(HUGE))} of {len(content)}" in evidence


def test_a_hostile_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, packed(key("\x1b[2J\r" + "x" * 5000, 99, b""))))
    assert "\x1b" not in error.message + error.evidence
    assert len(error.evidence) < 1000


@pytest.mark.parametrize("missing", [Path("absent.gguf"), Path(".")], ids=["absent", "directory"])
def test_a_path_that_is_no_file_is_a_usage_error(tmp_path: Path, missing: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_header(tmp_path / missing)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (2, True)


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UsageError):
        read_header(tmp_path / "pipe.gguf")


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (HeaderLimits(header_bytes=100), "a header above 100 bytes"),
        (HeaderLimits(kv_count=3), "more than 3 items"),
        (HeaderLimits(tensor_count=3), "more than 3 items"),
        (HeaderLimits(array_items=3), "more than 3 items"),
        (HeaderLimits(string_bytes=3), "longer than 3 bytes"),
        (HeaderLimits(layers=1), "more than 1 layers"),
        (HeaderLimits(alignment=32), "an alignment above 32"),
    ],
    ids=["header_bytes", "kv_count", "tensor_count", "array_items", "string_bytes", "layers", "alignment"],
)
def test_a_lower_limit_refuses_an_honest_file(tmp_path: Path, limits: HeaderLimits, says: str) -> None:
    path = write_model(tmp_path / "model.gguf", alignment=64)
    assert says in refusal(path, limits=limits).message


@pytest.mark.parametrize("room", range(0, 400, 7))
def test_the_header_limit_holds_wherever_it_falls(tmp_path: Path, room: int) -> None:
    payload = b"".join(text("x" * i) for i in range(20))
    path = write(tmp_path, packed(array_key("tokenizer.ggml.tokens", STRING, 20, payload)))
    assert path.stat().st_size > 400
    assert f"a header above {room} bytes" in refusal(path, limits=HeaderLimits(header_bytes=room)).message


# --- bounded work -----------------------------------------------------------------------------------


def test_every_cut_is_refused_until_the_data_is_whole(tmp_path: Path) -> None:
    content = write_model(tmp_path / "whole.gguf").read_bytes()
    header = read_header(tmp_path / "whole.gguf")
    last = header.tensors[-1]
    needed = header.data_offset + last.offset + last.nbytes
    assert needed < len(content)
    for size in [*range(header.data_offset + 1), *range(header.data_offset + 2, needed, 61), needed - 1]:
        refusal(write(tmp_path, content[:size], "cut.gguf"))
    for size in range(needed, len(content) + 1):
        assert read_header(write(tmp_path, content[:size], "cut.gguf")).tensors == header.tensors


def test_every_cut_of_a_vocabulary_is_refused(tmp_path: Path) -> None:
    content = packed(array_key("tokenizer.ggml.tokens", STRING, 3, text("a") + text("") + text("ccc")))
    for size in range(len(content)):
        refusal(write(tmp_path, content[:size], "cut.gguf"))
    assert read_header(write(tmp_path, content)).n_vocab == 3


def mutants(content: bytes, count: int) -> Iterator[bytes]:
    chance = random.Random(20230821)
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 4))):
            at = chance.randrange(len(mutant))
            match chance.randrange(4):
                case 0:
                    mutant[at] ^= 1 << chance.randrange(8)
                case 1:
                    mutant[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    mutant[at : at + 8] = struct.pack("<Q", chance.choice((2**64 - 1, 2**63, 2**32, 2**20)))
                case _:
                    del mutant[at : at + chance.randrange(1, 16)]
        yield bytes(mutant)


def test_a_mutant_is_read_or_refused_in_bounded_memory(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole.gguf")
    header = read_header(whole)
    content = whole.read_bytes()[: header.data_offset + 64]  # mostly header, so that most hits count
    content += bytes(header.file_bytes - len(content))
    verdicts = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for mutant in mutants(content, 2000):
            path = write(tmp_path, mutant, "mutant.gguf")
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            try:
                read_header(path)
                verdicts["read"] += 1
            except ArtifactError:
                verdicts["refused"] += 1
            assert tracemalloc.get_traced_memory()[1] - before < 2**19 + 16 * len(mutant)
    finally:
        tracemalloc.stop()
    assert min(verdicts.values()) > 100


@pytest.mark.parametrize("item_type", [U8, U64, BOOL, STRING, ARRAY])
@pytest.mark.parametrize("count", [2**24, 2**40, 2**64 - 1])
def test_a_tiny_file_announcing_a_huge_array_costs_nothing(tmp_path: Path, item_type: int, count: int) -> None:
    """gguf-py 0.19 appends an empty value per announced item of such a file until memory is gone."""
    content = packed(key("k", ARRAY, u32(item_type) + u64(count)), architecture=b"")
    assert len(content) == 49
    tracemalloc.start()
    try:
        refusal(write(tmp_path, content))
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("at", [8, 16, 24, 35])
def test_a_43_byte_file_with_a_huge_count_is_refused(tmp_path: Path, at: int) -> None:
    content = b"GGUF" + u32(3) + u64(1) + u64(1) + text("abc") + u32(ARRAY) + u32(U8)
    content = content[:at] + u64(2**60) + content[at + 8 :]
    assert len(content) == 43
    refusal(write(tmp_path, content))


@pytest.mark.parametrize(
    ("item_type", "item"), [(STRING, text("")), (STRING, text("ab")), (U8, b"\7"), (F32, bytes(4))]
)
def test_an_array_costs_a_small_multiple_of_its_bytes(tmp_path: Path, item_type: int, item: bytes) -> None:
    count = 2**20 // len(item)
    path = write(tmp_path, packed(array_key("test.array", item_type, count, item * count)))
    tracemalloc.start()
    try:
        header = read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * header.file_bytes
    finally:
        tracemalloc.stop()
    values = header.metadata["test.array"]
    assert isinstance(values, StringArray | memoryview)
    assert len(values) == count


def test_no_more_is_read_than_the_header_and_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elements = 2**31
    content = packed(tensors=[tensor(shape=(elements,))])
    path = write(tmp_path, content)
    os.truncate(path, len(content) + 4 * elements)  # 8 GiB, of which the disk holds one block
    asked: list[int] = []

    class CountingFile(io.FileIO):
        def readinto(self, buffer: Any, /) -> int | None:
            got = super().readinto(buffer)
            asked.append(got or 0)
            return got

    def open_counting(self: Path, mode: str, buffering: int = -1) -> io.BufferedReader:
        return io.BufferedReader(CountingFile(self, mode), buffering)

    monkeypatch.setattr(Path, "open", open_counting)
    header = read_header(path)
    assert header.tensor_bytes == 4 * elements
    assert 0 < sum(asked) <= len(content) + 2 * 64 * 1024


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, packed(string_key("general.name", "n" * 500)))
    real = path.stat()
    os.truncate(path, 200)
    monkeypatch.setattr(os, "fstat", lambda _: real)
    with pytest.raises(ArtifactError, match="shrank"):
        read_header(path)
