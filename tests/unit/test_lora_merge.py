"""Merging, as far as it goes without the built library: what is refused, which types there are, what is copied."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.generated_models import write_model
from tests.unit.test_lora_adapter import adapter_for
from toolchain.base.errors import ArtifactError, MissingError, UsageError
from toolchain.base.gguf import GgufHeader, TensorInfo, read_header
from toolchain.base.gguf_header import StringArray
from toolchain.lora.forms.adapter import AdapterModel
from toolchain.lora.forms.merge_gate import Gate, require_close
from toolchain.lora.forms.merged_weights import Scaled, changed_tensors
from toolchain.lora.forms.requantize import nearest, parse_type, require_own_types
from toolchain.lora.forms.rewrite import rewrite, rewritten_bytes
from toolchain.stages.quantize import BITS_PER_WEIGHT, NEEDS_IMATRIX


def data(header: GgufHeader, name: str) -> bytes:
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    with header.path.open("rb") as file:
        file.seek(header.data_offset + tensor.offset)
        return file.read(tensor.nbytes)


def plain(header: GgufHeader) -> dict[str, object]:
    """Metadata that can be compared."""
    lists = (StringArray, memoryview)
    return {key: tuple(value) if isinstance(value, lists) else value for key, value in header.metadata.items()}


def test_a_file_is_written_again_with_only_the_named_tensors_changed(tmp_path: Path) -> None:
    base = read_header(write_model(tmp_path / "b.gguf", "llama", n_layer=2, random=True, template="{{ messages }}"))
    changed = "blk.1.ffn_up.weight"
    new = np.arange(256 * 512, dtype=np.float32)

    def content(shard: GgufHeader, tensor: TensorInfo) -> Iterator[bytes]:
        assert (shard.path, tensor.name) == (base.path, changed)
        yield from (half.tobytes() for half in np.split(new, 2))

    seen: list[tuple[int, int]] = []
    types, notes = {changed: "F32"}, {"foundry.merged": "a.gguf x 1"}
    rewrite(
        [base],
        tmp_path / "r.gguf",
        types=types,
        content=content,
        notes=notes,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    made = read_header(tmp_path / "r.gguf")
    assert plain(made) == {**plain(base), **notes}
    assert [(t.name, t.shape) for t in made.tensors] == [(t.name, t.shape) for t in base.tensors]
    assert {t.name: t.type for t in made.tensors} == {t.name: t.type for t in base.tensors} | types
    assert data(made, changed) == new.tobytes()
    assert all(data(made, t.name) == data(base, t.name) for t in base.tensors if t.name != changed)
    assert 0 <= made.file_bytes - rewritten_bytes([base], types) < 4096
    assert seen[-1] == (base.tensor_bytes, base.tensor_bytes)
    # and a second time over the first: the note is replaced, not doubled
    rewrite([made], tmp_path / "r2.gguf", types={}, content=content, notes={"foundry.merged": "b"})
    assert plain(read_header(tmp_path / "r2.gguf")) == {**plain(base), "foundry.merged": "b"}


def test_keys_keep_the_type_that_they_have(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_uint8("a.u8", 7)
    writer.add_int64("a.i64", -7)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.ints", [1, 2, 3])
    writer.add_array("a.words", ["", "\N{SNOWMAN}" * 9])
    writer.add_tensor("x_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rewrite([read_header(tmp_path / "k.gguf")], tmp_path / "r.gguf", types={}, content=lambda *_: (), notes={})
    before, after = ((tmp_path / name).read_bytes() for name in ("k.gguf", "r.gguf"))
    assert after == before


def test_content_of_another_length_is_noticed(tmp_path: Path) -> None:
    base = read_header(write_model(tmp_path / "b.gguf", "llama", n_layer=1))
    with pytest.raises(ArtifactError, match="changed while it was read"):
        rewrite(
            [base],
            tmp_path / "r.gguf",
            types={"output_norm.weight": "F32"},
            content=lambda *_: [struct.pack("<f", 1)],
            notes={},
        )


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    base = read_header(write_model(tmp_path / "b.gguf", "llama", n_layer=1))
    with pytest.raises(MissingError, match="the disk is full"):
        rewrite([base], Path("/dev/full"), types={}, content=lambda *_: (), notes={})


def test_types_that_need_an_importance_matrix_are_refused_with_the_nearest_that_does_not() -> None:
    assert parse_type("q4_k_m").type == "Q4_K_M"
    for name in NEEDS_IMATRIX:
        with pytest.raises(UsageError, match="importance matrix") as raised:
            parse_type(name)
        assert raised.value.hint.endswith(nearest(name))
        assert nearest(name) not in NEEDS_IMATRIX
        assert BITS_PER_WEIGHT[nearest(name)] >= BITS_PER_WEIGHT[name]
    assert (nearest("IQ2_XXS"), nearest("IQ3_XXS")) == ("Q2_K", "Q3_K_S")
    with pytest.raises(UsageError, match="did you mean Q4_K_M"):
        parse_type("Q4_KM")


def test_a_base_whose_changed_tensors_need_a_matrix_is_refused(tmp_path: Path) -> None:
    base = read_header(write_model(tmp_path / "b.gguf", "llama", n_layer=1, type="iq2_xs"))
    up = [tensor for tensor in base.tensors if "ffn_up" in tensor.name]
    with pytest.raises(UsageError, match=r"ffn_up\.weight is IQ2_XS") as raised:
        require_own_types(base, up)
    assert "Q2_K" in raised.value.hint
    require_own_types(base, [tensor for tensor in base.tensors if "norm" in tensor.name])


def test_an_embedding_that_is_the_output_too_cannot_take_an_adapter(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "t.gguf", "llama-tied", n_layer=1)
    scaled = [Scaled(name="a.gguf", adapter=adapter_for(tied, "token_embd"))]
    with pytest.raises(UsageError, match="is the output's matrix too"):
        changed_tensors([read_header(tied)], scaled)


def test_weights_with_a_scale_of_their_own_are_left_alone(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float32))
    writer.add_tensor("blk.0.attn_q.scale", np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    scaled = [Scaled(name="a.gguf", adapter=adapter_for(tmp_path / "n.gguf", "attn_q.weight"))]
    with pytest.raises(UsageError, match="a scale of its own"):
        changed_tensors([read_header(tmp_path / "n.gguf")], scaled)


def test_dora_is_merged_alone_and_whole(tmp_path: Path) -> None:
    base = read_header(write_model(tmp_path / "b.gguf", "llama", n_layer=1))
    plain_adapter = adapter_for(base.path, "attn_q")
    pairs = {
        target: type(pair)(a=pair.a, b=pair.b, magnitude=np.ones(256, np.float32))
        for target, pair in plain_adapter.pairs.items()
    }
    dora = AdapterModel(architecture="llama", alpha=1.0, pairs=pairs)
    assert changed_tensors([base], [Scaled(name="d", adapter=dora)]).keys() == pairs.keys()
    for scaled in (
        [Scaled(name="d", adapter=dora, scale=0.5)],
        [Scaled(name="d", adapter=dora), Scaled(name="p", adapter=plain_adapter)],
    ):
        with pytest.raises(UsageError, match="d is a DoRA"):
            changed_tensors([base], scaled)


def test_a_merged_model_that_is_too_far_off_is_refused_with_the_figures() -> None:
    gate = Gate(mean_kld=0.07, error=0.001, same_top=0.91, reference="base and adapter", quantization_kld=0.02)
    require_close(gate, 0.07, "x.gguf")
    with pytest.raises(ArtifactError, match=r"x\.gguf is too far from base and adapter") as raised:
        require_close(gate, 0.05, "x.gguf")
    assert "0.0700" in raised.value.evidence
    assert "at most 0.05" in raised.value.evidence
    assert "0.0200" in raised.value.evidence
    unknown = Gate(mean_kld=float("nan"), error=0.0, same_top=0.0, reference="base", quantization_kld=None)
    with pytest.raises(ArtifactError):
        require_close(unknown, 0.05, "x.gguf")
