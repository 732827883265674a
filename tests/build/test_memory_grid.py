"""The planner's arithmetic held against the library: generated models x context x micro-batch x cache type.

Weights and caches to the byte; compute buffers to the byte too, which is more than the promise (1.00 to 1.10 of
actual). Each family is asked in a child process, so that a crash of the library fails one test.
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.memory.footprint import CUDA, RPC, BufferBytes, Demand, Placement, footprint
from runtime.memory.placement import Traits
from tests.build.ask_child import ask_in_child
from tests.generated_models import FAMILIES, Family, write_header, write_model
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain, list_ids, load

CONTEXTS, MICRO_BATCHES, CACHES, OUTPUTS = (512, 4096, 32768), (64, 512), ("f16", "q8_0", "q4_0"), (1, 0)
GRID = [
    Demand(n_ctx=n_ctx, n_ubatch=n_ubatch, type_k=kv, type_v=kv, n_outputs_max=n_outputs)
    for n_ctx, n_ubatch, kv, n_outputs in itertools.product(CONTEXTS, MICRO_BATCHES, CACHES, OUTPUTS)
]
UNUSUAL = [
    Demand(n_ctx=700, n_ubatch=200, n_outputs_max=7),
    Demand(n_ctx=4096, flash_attn=False),
    Demand(n_ctx=4096, type_k="q8_0", type_v="q4_0"),
    Demand(n_ctx=8192, n_seq_max=4, n_outputs_max=4),
    Demand(n_ctx=8192, n_seq_max=3, n_outputs_max=0, kv_unified=True),
    Demand(n_ctx=4096, n_seq_max=2, n_outputs_max=2, flash_attn=False),
    Demand(n_ctx=8192, swa_full=True),
    Demand(n_ctx=300, n_batch=1000, n_ubatch=0, n_outputs_max=0),
]
ON_HOST = Placement(n_gpu_layers=0)
# As deep and wide as published models; only their headers are written.
PUBLISHED: dict[Family, dict[str, int]] = {
    "llama": {
        "n_layer": 32,
        "n_embd": 4096,
        "n_vocab": 128_256,
        "n_head": 32,
        "n_head_kv": 8,
        "head": 128,
        "n_ff": 14336,
    },
    "qwen2": {"n_layer": 24, "n_embd": 896, "n_vocab": 151_936, "n_head": 14, "n_head_kv": 2, "head": 64, "n_ff": 4864},
    "gemma3": {
        "n_layer": 26,
        "n_embd": 1152,
        "n_vocab": 262_144,
        "n_head": 4,
        "n_head_kv": 1,
        "head": 256,
        "n_ff": 6912,
    },
    "qwen3moe": {
        **{"n_layer": 48, "n_embd": 2048, "n_vocab": 151_936, "n_head": 32, "n_head_kv": 4, "head": 128, "n_ff": 768},
        **{"n_expert": 128, "n_expert_used": 8},
    },
    "lfm2": {"n_layer": 16, "n_embd": 2048, "n_vocab": 65_536, "n_head": 32, "n_head_kv": 8, "head": 64, "n_ff": 8192},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_footprint_is_what_the_library_says(toolchain: Toolchain, tmp_path: Path, family: Family) -> None:
    _hold(write_header(tmp_path / "model.gguf", family), [(demand, ON_HOST) for demand in (*GRID, *UNUSUAL)])


@pytest.mark.parametrize("family", PUBLISHED)
def test_footprint_of_published_extents(toolchain: Toolchain, tmp_path: Path, family: Family) -> None:
    kind = "q8_0" if PUBLISHED[family]["n_embd"] % 256 else "q6_K"
    path = write_header(tmp_path / "model.gguf", family, type=kind, **PUBLISHED[family])
    assert path.stat().st_blocks * 512 < path.stat().st_size / 10  # a hole where the data would be
    _hold(path, [(demand, ON_HOST) for demand in (*UNUSUAL, *GRID[::5])])


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3moe"])
def test_weights_in_every_type(toolchain: Toolchain, tmp_path: Path, family: Family) -> None:
    for kind in ("f32", "bf16", "q8_0", "q4_0", "q5_1", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_nl", "iq4_xs"):
        _hold(write_header(tmp_path / f"{kind}.gguf", family, type=kind), [(Demand(n_ctx=512), ON_HOST)])


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3moe", "lfm2"])
def test_a_real_load_takes_what_was_computed(toolchain: Toolchain, tmp_path: Path, family: Family) -> None:
    _hold(write_model(tmp_path / "model.gguf", family), [(demand, ON_HOST) for demand in UNUSUAL], allocate=True)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "qwen3moe", "lfm2", "granitehybrid"])
def test_splits_over_two_devices(rpc_site: Path, tmp_path: Path, family: Family) -> None:
    """Two RPC servers are two devices: each layer, output layer and expert placement, loaded for real."""
    experts = (0, 2, 99) if family == "qwen3moe" else (0,)
    demands = [
        Demand(n_ctx=512, n_outputs_max=0),
        Demand(n_ctx=4096, n_ubatch=64, type_k="q8_0"),
        Demand(n_ctx=4096, flash_attn=False),
    ]
    cases = [
        (demand, Placement(n_gpu_layers=n, tensor_split=split, cpu_expert_layers=kept, offload_kqv=offload))
        for n, split, kept, offload in itertools.product((0, 1, 3, 99), ((1, 1), (3, 2)), experts, (True, False))
        for demand in demands
    ]
    model = write_model(tmp_path / "model.gguf", family)
    with _servers(rpc_site.parent / "bin" / "ggml-rpc-server", 2) as endpoints:
        _hold(model, cases, allocate=True, site=rpc_site, endpoints=endpoints, traits=RPC)


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_models_decode(toolchain: Toolchain, tmp_path: Path, family: Family) -> None:
    model = write_model(tmp_path / "model.gguf", family, random=True)
    argv = [toolchain.tool("bench"), "-m", model, "-p", "48", "-n", "4", "-r", "1", "-t", "1", "-o", "json"]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=True)
    assert [run["avg_ts"] > 0 for run in json.loads(done.stdout)] == [True, True]


def test_fit_params_agrees(toolchain: Toolchain, tmp_path: Path) -> None:
    """llama-fit-params, in whole MiB, with the logits of a whole micro-batch that llama.cpp's tools reserve."""
    path = write_header(tmp_path / "model.gguf", "llama", n_vocab=32000, n_layer=8)
    for n_ctx, n_ubatch, kind in itertools.product((4096, 32768), MICRO_BATCHES, ("f16", "q8_0")):
        argv = [toolchain.tool("fit-params"), "-m", path, "--fit-print", "on", "-c", n_ctx, "-ub", n_ubatch]
        argv += ["-ctk", kind, "-ctv", kind, "-fa", "on", "-lv", "1"]
        done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=True)
        printed = next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("Host "))
        demand = Demand(n_ctx=n_ctx, n_ubatch=n_ubatch, type_k=kind, type_v=kind, n_outputs_max=0)
        ours = footprint(read_header(path), demand, ON_HOST, 0)[0]
        assert [int(word) for word in printed] == [size // 2**20 for size in (ours.weights, ours.kv, ours.compute)]


@pytest.fixture
def rpc_site(tmp_path: Path) -> Path:
    """A folder to import the bindings of a toolchain with RPC from, beside that toolchain's bin/."""
    found = [made for name in list_ids() if (made := load(name)) and "RPC" in made.backends]
    servers = [made for made in found if (made.bin_dir / "ggml-rpc-server").is_file()]
    if not servers:
        pytest.skip("no toolchain with RPC here: `./inv build --rpc --no-use`")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(servers[-1].wheel), str(site)], check=True)
    (tmp_path / "bin").symlink_to(servers[-1].bin_dir)
    return site


class _servers:
    """``count`` RPC servers on loopback ports, for the length of a with block."""

    def __init__(self, program: Path, count: int) -> None:
        self.program, self.count = program, count
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> list[str]:
        ports = []
        for _ in range(self.count):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ports.append(free.getsockname()[1])
            argv = [str(self.program.resolve()), "-p", str(ports[-1])]
            self.running.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for port in ports:
            _wait_for(port)
        return [f"127.0.0.1:{port}" for port in ports]

    def __exit__(self, *_: object) -> None:
        for server in self.running:
            server.terminate()
            server.wait()


def _wait_for(port: int) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def _hold(
    path: Path,
    cases: list[tuple[Demand, Placement]],
    *,
    allocate: bool = False,
    site: Path | None = None,
    endpoints: list[str] | None = None,
    traits: Traits = CUDA,
) -> None:
    """Every case's footprint against the library's answer; all that differ are told."""
    header = read_header(path)
    asked = ask_in_child(path, cases, allocate=allocate, site=site, endpoints=endpoints or [])
    wrong = []
    for (demand, placement), answer in zip(cases, asked, strict=True):
        ours = footprint(header, demand, placement, len(answer) - 1, traits=traits)
        if (found := [_triple(device) for device in ours]) != answer:
            wrong.append(f"{demand} {placement}\n  library {answer}\n  ours    {found}")
    assert not wrong, f"{len(wrong)} of {len(cases)} differ, such as:\n" + "\n".join(wrong[:3])


def _triple(device: BufferBytes) -> list[int]:
    return [device.weights, device.kv, device.compute]
