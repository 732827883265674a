"""The torch engine's base: the function that llama.cpp computes, from blocks that stay packed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.front_door import PATIENCE_S, ROOT
from tests.generated_models import Family, write_model
from toolchain.base.errors import ArtifactError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain

torch = pytest.importorskip("torch")

from toolchain.lora.torch_engine import unpack, unpack_torch  # noqa: E402
from toolchain.lora.torch_engine.adapted import AdaptedLinear  # noqa: E402
from toolchain.lora.torch_engine.load import load_base  # noqa: E402
from toolchain.lora.torch_engine.packed import PackedLinear  # noqa: E402
from toolchain.lora.torch_engine.unpack import Unpacker  # noqa: E402

N_TOKENS = 32
SHAPE = {"window": 16, "n_layer": 6}
"""A window of half of the tokens, and as many layers as Gemma 3 needs to have one without a window."""

GELU = 5e-3
"""ggml looks GELU up in a table of 16-bit floats; everything else is float32 on both sides."""
EXACT = 5e-5
BOUNDS: dict[Family, float] = {
    **dict.fromkeys(("llama", "llama-tied", "mixtral", "qwen2", "qwen2moe", "qwen3", "qwen3moe"), EXACT),
    **dict.fromkeys(("phi3", "granite", "olmo2", "lfm2"), EXACT),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "starcoder2"), GELU),
}


@pytest.mark.parametrize("family", BOUNDS)
def test_logits_are_those_of_llama_cpp(family: Family, tmp_path: Path, toolchain: Toolchain) -> None:
    path = unsettled(write_model(tmp_path / "model.gguf", family, type="f32", random=True, **SHAPE))
    assert_same_function(path, toolchain, bound=BOUNDS[family])


def _linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def _yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


def _factors(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 32, dtype=np.float32))


def _long(n_trained: int) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_attn_factors(1.2)
        writer.add_rope_scaling_orig_ctx_len(n_trained)
        writer.add_tensor("rope_factors_long.weight", np.linspace(1, 8, 32, dtype=np.float32))
        writer.add_tensor("rope_factors_short.weight", np.linspace(1, 2, 32, dtype=np.float32))

    return add


@pytest.mark.parametrize(
    ("family", "change"),
    [
        pytest.param("llama", _linear, id="linear"),
        pytest.param("gemma3", _linear, id="linear but for layers with a window"),
        pytest.param("qwen2", _yarn, id="yarn"),
        pytest.param("llama", _factors, id="factors of Llama 3.1"),
        pytest.param("phi3", _long(4096), id="short factors of Phi 3"),
        pytest.param("phi3", _long(16), id="long factors of Phi 3"),
    ],
)
def test_rotary_positions_are_scaled_as_in_llama_cpp(
    family: Family, change: Callable[[gguf.GGUFWriter], None], tmp_path: Path, toolchain: Toolchain
) -> None:
    plain = unsettled(write_model(tmp_path / "plain.gguf", family, type="f32", random=True, **SHAPE))
    path = with_changes(plain, tmp_path / "model.gguf", change)
    assert np.abs(library_logits(plain) - library_logits(path)).max() > 0.02, "the change must change something"
    assert_same_function(path, toolchain, bound=BOUNDS[family])


def test_torch_and_the_library_unpack_every_type_to_the_same_bits(toolchain: Toolchain) -> None:
    unpacker = Unpacker(toolchain.lib_dir, 2)
    numbers = torch.Generator().manual_seed(0)
    for kind in unpack_torch.TYPES:
        row_bytes = 3 * GGML_TYPES_BY_NAME[kind].block_bytes
        blocks = torch.randint(0, 256, (512, row_bytes), generator=numbers, dtype=torch.uint8)
        ours = unpack_torch.unpack(blocks, kind, torch.float32)
        theirs = unpacker.unpack(blocks, kind, torch.float32)
        same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
        assert same.all(), f"{kind}: {int((~same).sum())} of {same.numel()} values differ"


def test_every_type_that_the_library_unpacks_can_be_trained_on(toolchain: Toolchain) -> None:
    def unpacked_by_library(kind: str) -> bool:
        layout = GGML_TYPES_BY_NAME[kind]
        blocks = torch.zeros(1, layout.block_bytes, dtype=torch.uint8)
        try:
            Unpacker(toolchain.lib_dir, 1).unpack(blocks, kind, torch.float32)
        except ArtifactError:
            return False
        return True

    able = {kind for kind in GGML_TYPES_BY_NAME if unpacked_by_library(kind)}
    assert able == {*unpack.PLAIN_TYPES, *unpack_torch.TYPES}


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_1", "IQ4_XS", "F16", "BF16"])
def test_gradients_on_packed_weights_are_those_on_unpacked_ones(
    kind: str, tmp_path: Path, toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "TILE_BYTES", 50_000)  # several tiles for a matrix, the last one smaller
    path = quantized(write_model(tmp_path / "full.gguf", "llama", type="f32", random=True), kind, toolchain)
    assert_same_gradients(path, toolchain)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3moe", {"target_modules": ["q_proj", "o_proj"]}),
        ("gemma3", {}),
        ("llama-tied", {"use_dora": True}),
        ("qwen2", {"lora_dropout": 0.3, "use_rslora": True}),
    ],
)
def test_gradients_through_experts_scaled_embeddings_and_magnitudes_are_the_same(
    family: Family, options: dict[str, Any], tmp_path: Path, toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "TILE_BYTES", 50_000)
    path = quantized(write_model(tmp_path / "full.gguf", family, type="f32", random=True), "Q8_0", toolchain)
    assert_same_gradients(path, toolchain, **options)


def test_a_packed_layer_keeps_nothing_for_the_backward_pass_but_its_blocks(
    demo_gguf: Path, toolchain: Toolchain
) -> None:
    layer = load_base([demo_gguf], lib_dir=toolchain.lib_dir).model.model.layers[0].mlp.down_proj
    kept: list[Any] = []
    inputs = torch.randn(4, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        layer(inputs).sum().backward()
    assert [value.data_ptr() for value in kept] == [layer.weight.data_ptr()]
    assert torch.allclose(inputs.grad, layer.dequantize().sum(0).expand_as(inputs), rtol=1e-5, atol=1e-6)


def test_an_adapted_layer_keeps_its_input_and_no_matrix_of_its_outputs_size(
    demo_gguf: Path, toolchain: Toolchain
) -> None:
    """In bfloat16 too: peft's own layer hands the adapter a float32 copy of the input."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["up_proj"])
    config._register_custom_module({PackedLinear: AdaptedLinear})
    model = load_base([demo_gguf], lib_dir=toolchain.lib_dir, dtype=torch.bfloat16).model
    layer = get_peft_model(model, config).base_model.model.model.layers[0].mlp.up_proj
    kept: list[Any] = []
    inputs = torch.randn(64, layer.in_features, dtype=torch.bfloat16)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value)
    with keep, torch.autocast("cpu", torch.bfloat16):
        layer(inputs).float().sum().backward()
    sizes = [value.nbytes for value in kept if len(value) == len(inputs) and value.data_ptr() != inputs.data_ptr()]
    assert sizes == [64 * 4 * 2]
    assert all(pair["default"].weight.grad is not None for pair in (layer.lora_A, layer.lora_B))


def test_weights_stay_in_the_files_own_pages(tmp_path: Path, toolchain: Toolchain) -> None:
    """In a process of its own, which uses each weight: memory that is not the file's stays a fraction of it."""
    sizes = {"n_embd": 1024, "head": 256, "n_ff": 4096, "n_vocab": 512}
    path = write_model(tmp_path / "model.gguf", "qwen2", type="q8_0", **sizes)
    told = json.loads(
        subprocess.run(
            [sys.executable, "-c", PRIVATE_MEMORY, path, toolchain.lib_dir],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        ).stdout
    )
    assert path.stat().st_size > 50 * 2**20
    assert told["packed"] < 0.5 * path.stat().st_size
    assert told["unpacked"] > 3 * path.stat().st_size
    assert told["weight_bytes"] <= 1.01 * path.stat().st_size


PRIVATE_MEMORY = """
import json, sys
from pathlib import Path
import psutil, torch
from toolchain.lora.torch_engine.load import load_base

torch.set_num_threads(1)
process, told = psutil.Process(), {}
tokens = torch.arange(3, 19)[None]
def private():
    return sum(area.anonymous for area in process.memory_maps(grouped=False))
for packed in (True, False):
    before = private()
    loaded = load_base([Path(sys.argv[1])], lib_dir=Path(sys.argv[2]), packed=packed)
    with torch.no_grad():
        loaded.model(tokens)
    told["packed" if packed else "unpacked"] = private() - before
    told.setdefault("weight_bytes", loaded.weight_bytes)
print(json.dumps(told))
"""


def test_neither_peft_nor_accelerate_touches_the_blocks(demo_gguf: Path, toolchain: Toolchain) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from peft import LoraConfig, get_peft_model

    before = hashlib.sha256(demo_gguf.read_bytes()).hexdigest()
    model = load_base([demo_gguf], lib_dir=toolchain.lib_dir).model
    blocks = {name: value.data_ptr() for name, value in model.named_parameters() if value.dtype == torch.uint8}
    assert len(blocks) > 20
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    adapted = Accelerator(cpu=True).prepare(adapted.to(torch.bfloat16).float())
    AcceleratorState._reset_state(reset_partial_state=True)  # which is the process's, and this one goes on
    adapted(torch.arange(3, 19)[None], labels=torch.arange(3, 19)[None]).loss.backward()
    kept = {value.data_ptr() for value in adapted.parameters() if value.dtype == torch.uint8}
    assert kept == set(blocks.values())
    assert hashlib.sha256(demo_gguf.read_bytes()).hexdigest() == before


def test_a_tied_output_matrix_is_the_embeddings_own_memory(tmp_path: Path, toolchain: Toolchain) -> None:
    path = write_model(tmp_path / "model.gguf", "llama-tied", type="q8_0")
    model = load_base([path], lib_dir=toolchain.lib_dir).model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_shards_are_one_model(tmp_path: Path, toolchain: Toolchain) -> None:
    """Whether the output is tied is decided over all shards: here it lies in the last one."""
    path = unsettled(write_model(tmp_path / "model.gguf", "llama", type="f32", random=True))
    split = [toolchain.tool("gguf-split"), "--split-max-tensors", "10", path, tmp_path / "part"]
    subprocess.run(split, check=True, capture_output=True, timeout=PATIENCE_S)
    shards = read_header(next(iter(sorted(tmp_path.glob("part-*"))))).shard_paths
    assert len(shards) > 2
    whole = load_base([path], lib_dir=toolchain.lib_dir).model
    parts = load_base(shards, lib_dir=toolchain.lib_dir).model
    assert torch.equal(logits(whole), logits(parts))


def test_tensors_that_a_model_has_no_place_for_are_refused_by_name(tmp_path: Path, toolchain: Toolchain) -> None:
    """Rather than left out: what they do to the model would be missing from it."""
    plain = write_model(tmp_path / "plain.gguf", "llama", type="f32")
    scaled = with_changes(
        plain, tmp_path / "model.gguf", lambda writer: writer.add_tensor("blk.0.attn_q.scale", np.ones(1, np.float32))
    )
    with pytest.raises(ArtifactError, match="no place for") as refused:
        load_base([scaled], lib_dir=toolchain.lib_dir)
    assert refused.value.evidence == "blk.0.attn_q.scale"


def test_a_missing_tensor_is_named(tmp_path: Path, toolchain: Toolchain) -> None:
    path = write_model(tmp_path / "model.gguf", "mixtral", type="f32")
    data = path.read_bytes()
    assert data.count(b"ffn_up_exps") == 4
    path.write_bytes(data.replace(b"ffn_up_exps", b"ffn_dn_exps", 1))
    with pytest.raises(ArtifactError, match=r"no tensor blk\.0\.ffn_up_exps"):
        load_base([path], lib_dir=toolchain.lib_dir)


def test_half_precision_is_close_to_full(demo_gguf: Path, toolchain: Toolchain) -> None:
    full = logits(load_base([demo_gguf], lib_dir=toolchain.lib_dir).model)
    half = logits(load_base([demo_gguf], lib_dir=toolchain.lib_dir, dtype=torch.bfloat16).model)
    assert half.dtype == torch.bfloat16
    assert (full - half.float()).abs().max() < 0.05 * full.abs().max()


def unsettled(path: Path) -> Path:
    """The model with random norms and biases, which the writer sets to ones and zeros: a swapped one would not show."""
    header, numbers = read_header(path), np.random.default_rng(7)
    with path.open("r+b") as file:
        for tensor in header.tensors:
            if tensor.type == "F32" and sum(size > 1 for size in tensor.shape) == 1:
                middle = 1.0 if "norm" in tensor.name and tensor.name.endswith("weight") else 0.0
                file.seek(header.data_offset + tensor.offset)
                values = middle + 0.1 * numbers.standard_normal(tensor.n_elements)
                file.write(values.astype(np.float32).tobytes())
    return path


def with_changes(path: Path, output: Path, change: Callable[[gguf.GGUFWriter], None]) -> Path:
    """A copy of the model with more in it."""
    reader = gguf.GGUFReader(path)
    architecture = read_header(path).architecture
    writer = gguf.GGUFWriter(output, architecture)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    change(writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def quantized(path: Path, kind: str, toolchain: Toolchain) -> Path:
    """The model with all matrices of one type."""
    output = path.with_name(f"{kind}.gguf")
    tool = [toolchain.tool("quantize"), "--pure", "--tensor-type", f"weight={kind}", path, output, "Q8_0"]
    subprocess.run(tool, check=True, capture_output=True, timeout=PATIENCE_S)
    kinds = {tensor.type for tensor in read_header(output).tensors if len(tensor.shape) > 1}
    assert kind in kinds, kinds
    return output


def some_tokens(n_vocab: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(1).integers(3, n_vocab, N_TOKENS)]


def library_logits(path: Path) -> np.ndarray[Any, Any]:
    """(N_TOKENS, n_vocab) of llama.cpp, its cache in float32 as torch's keys and values are."""
    import llama_cpp

    n_vocab = read_header(path).n_vocab
    assert n_vocab
    sizes = {"n_ctx": 64, "n_batch": 64, "n_ubatch": 64}
    model = llama_cpp.Llama(
        str(path), **sizes, logits_all=True, type_k=0, type_v=0, n_gpu_layers=0, n_threads=1, verbose=False
    )
    model.eval(some_tokens(n_vocab))
    found: np.ndarray[Any, Any] = np.array(model.scores[:N_TOKENS])
    model.close()
    return found


def logits(model: Any) -> Any:
    """(N_TOKENS, n_vocab) of a torch model."""
    with torch.no_grad():
        return model(torch.tensor([some_tokens(model.config.vocab_size)])).logits[0]


def assert_same_function(path: Path, toolchain: Toolchain, *, bound: float) -> None:
    theirs = library_logits(path)
    ours = logits(load_base([path], lib_dir=toolchain.lib_dir, n_threads=2).model).numpy()
    assert np.isfinite(theirs).all()
    assert theirs.std() > 0.05
    assert np.abs(ours - theirs).max() < bound


def assert_same_gradients(path: Path, toolchain: Toolchain, **options: Any) -> None:
    """Of every parameter of an adapter, and of the inputs, to 1e-5 of their norm; the unpacked base's are peft's."""
    from peft import LoraConfig, get_peft_model

    found: list[dict[str, Any]] = []
    for packed in (True, False):
        model = load_base([path], lib_dir=toolchain.lib_dir, packed=packed, n_threads=2).model
        torch.manual_seed(0)
        config = LoraConfig(r=4, init_lora_weights=False, **{"target_modules": "all-linear", **options})
        config._register_custom_module({PackedLinear: AdaptedLinear})
        adapted = get_peft_model(model, config).train(config.lora_dropout > 0)
        assert packed == any(isinstance(module, AdaptedLinear) for module in adapted.modules())
        tokens = torch.tensor([some_tokens(model.config.vocab_size)])
        inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
        torch.manual_seed(1)  # of dropout
        adapted(inputs_embeds=inputs, labels=tokens).loss.backward()
        trained = {name: value.grad for name, value in adapted.named_parameters() if value.requires_grad}
        found.append({**trained, "inputs": inputs.grad})
    ours, theirs = found
    assert len(ours) > 8
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.norm() > 0
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
